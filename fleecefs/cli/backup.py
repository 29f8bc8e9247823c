"""fleecefs backup: start a job, and follow it."""

import os
from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli import follow
from fleecefs.cli.daemons import connect
from fleecefs.cli.options import (
    absolute,
    complete_disks,
    complete_paths,
    mount_option,
    seconds,
    size,
)
from fleecefs.cli.text import printable

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.control.results import Status

_ON_ERROR = click.Choice(["report", "ignore", "stop", "enospc", "auto"])


@click.command(short_help="Copy a disk as it is now, while it is in use.")
@mount_option
@click.option(
    "--all",
    "directory",
    metavar="DIR",
    callback=absolute,
    shell_complete=complete_paths,
    help="Back up every disk to a file of its name in DIR: all or none.",
)
@click.option(
    "--sync",
    type=click.Choice(["full", "top", "none"]),
    default="full",
    show_default=True,
    help="Copy all, what is allocated in the source, or only what the guest"
    " overwrites from now on (until cancelled).",
)
@click.option(
    "--speed",
    metavar="SIZE",
    callback=size,
    help="Bytes a second, of each disk.  [default: no limit]",
)
@click.option(
    "--on-source-error",
    type=_ON_ERROR,
    help="If the disk can not be read.  [default: report]",
)
@click.option(
    "--on-target-error",
    type=_ON_ERROR,
    help="If TARGET can not be written: fail (report), try again (ignore), pause"
    " (stop), or pause if it is full (enospc).  [default: report]",
)
@click.option(
    "--on-cbw-error",
    type=click.Choice(["break-snapshot", "break-guest-write"]),
    help="Who suffers if overwritten data can not be kept: the job, or the guest."
    "  [default: as mounted]",
)
@click.option(
    "--cbw-timeout",
    metavar="SECONDS",
    type=float,
    callback=seconds,
    help="How long a guest's write waits for that; 0: no limit.  [default: as mounted]",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="How many copies at a time.  [default: 24]",
)
@click.option("--job-id", metavar="ID", help="Its name.  [default: DISK]")
@click.option(
    "--no-auto-finalize",
    is_flag=True,
    help="When all is copied, wait for 'fleecefs job finalize'.",
)
@click.option(
    "--no-auto-dismiss",
    is_flag=True,
    help="Keep its result until 'fleecefs job dismiss'.",
)
@click.option("--detach", is_flag=True, help="Print the job's id, and do not follow.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object every second."
)
@click.argument("disk", metavar="[DISK]", required=False, shell_complete=complete_disks)
@click.argument(
    "target",
    metavar="[TARGET]",
    required=False,
    callback=absolute,
    shell_complete=complete_paths,
)
def backup(
    directory: str | None,
    sync: str,
    speed: int | None,
    on_source_error: str | None,
    on_target_error: str | None,
    on_cbw_error: str | None,
    cbw_timeout: float | None,
    workers: int | None,
    job_id: str | None,
    no_auto_finalize: bool,
    no_auto_dismiss: bool,
    detach: bool,
    as_json: bool,
    disk: str | None,
    target: str | None,
) -> None:
    """Copy DISK, as it is at this instant, to TARGET, while it is in use.

    TARGET is a raw file, which is made if it is not there, or a block device of at
    least that size. What it held is overwritten. However slow it is, writes of the
    guest do not wait for it.

    The command follows the job to its end. Ctrl-C leaves the job running; with
    'fleecefs job' it can be watched, paused or cancelled.

    \b
    Example:
      fleecefs backup web.raw /backup/web.raw --speed 200MiB
      fleecefs backup --all /backup/tonight
    """
    options: dict[str, object] = {
        "job-id": job_id,
        "sync": sync,
        "speed": speed,
        "on-source-error": on_source_error,
        "on-target-error": on_target_error,
        "on-cbw-error": on_cbw_error,
        "cbw-timeout": cbw_timeout,
        "max-workers": workers,
        "auto-finalize": not no_auto_finalize,
        "auto-dismiss": not no_auto_dismiss,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if directory is not None:
        if disk is not None or job_id is not None:
            raise click.UsageError("--all takes no DISK, TARGET or --job-id")
        ids = _start_all(directory, options)
    elif disk is not None and target is not None:
        ids = [job_id or disk]
        with connect() as client:
            client.execute("blockdev-backup", device=disk, target=target, **options)
    else:
        raise click.UsageError("give DISK and TARGET, or --all DIR")
    if detach:
        click.echo("\n".join(map(printable, ids)))
        return
    try:
        jobs = follow.follow(ids, as_json)
    except KeyboardInterrupt:
        follow.leave(ids)
    follow.conclude(jobs, as_json)


def _start_all(directory: str, options: dict[str, object]) -> list[str]:
    """Start a backup of every disk, of one instant; return the ids of the jobs."""
    with connect() as client:
        disks = _disks(client)
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "device": disk,
                    "target": os.path.join(directory, disk),
                    **options,
                },
            }
            for disk in disks
        ]
        properties = {"completion-mode": "grouped"}
        client.execute("transaction", actions=actions, properties=properties)
    return disks


def _disks(client: "Client") -> list[str]:
    status = cast("Status", client.execute("fleecefs-status"))
    return [disk["name"] for disk in status["disks"]]
