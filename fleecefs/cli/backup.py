"""fleecefs backup: start a job, and follow it."""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli import follow
from fleecefs.cli.daemons import connect
from fleecefs.cli.options import (
    absolute,
    complete_bitmaps,
    complete_disks,
    complete_paths,
    detach_option,
    job_id_option,
    json_lines_option,
    mount_option,
    no_auto_dismiss_option,
    on_source_error_option,
    on_target_error_option,
    seconds,
    size,
)
from fleecefs.cli.text import printable

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.control.results import DirtyBitmap, Status

_FORMAT = click.Choice(["raw", "qcow2"])


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
    type=click.Choice(["full", "top", "none", "incremental", "bitmap"]),
    default="full",
    show_default=True,
    help="Copy all, what is allocated in the source, what the guest overwrites from"
    " now on (none, until cancelled), or what is dirty in --bitmap.",
)
@click.option(
    "--bitmap",
    metavar="NAME",
    shell_complete=complete_bitmaps,
    help="A dirty bitmap of DISK, which starts over at this instant.",
)
@click.option(
    "--bitmap-mode",
    type=click.Choice(["on-success", "never", "always"]),
    help="Let it start over if the job succeeds, never, or also for the part that is"
    " copied if it fails.  [default: on-success]",
)
@click.option(
    "--fallback",
    type=click.Choice(["full"]),
    help="If the bitmap can not be used, copy all, and start it over.",
)
@click.option("--format", type=_FORMAT, help="What TARGET is to be.  [default: raw]")
@click.option(
    "--backing",
    metavar="PREVIOUS",
    callback=absolute,
    shell_complete=complete_paths,
    help="With --format qcow2: the backup before, which TARGET adds to.",
)
@click.option(
    "--backing-format",
    type=_FORMAT,
    help="What PREVIOUS is, if that is not certain.",
)
@click.option(
    "--speed",
    metavar="SIZE",
    callback=size,
    help="Bytes a second, of each disk.  [default: no limit]",
)
@on_source_error_option
@on_target_error_option
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
@job_id_option
@click.option(
    "--no-auto-finalize",
    is_flag=True,
    help="When all is copied, wait for 'fleecefs job finalize'.",
)
@no_auto_dismiss_option
@detach_option
@json_lines_option
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
    bitmap: str | None,
    bitmap_mode: str | None,
    fallback: str | None,
    format: str | None,
    backing: str | None,
    backing_format: str | None,
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
    least that size. What it held is overwritten. With --format qcow2 it is a new file.
    However slow it is, writes of the guest do not wait for it.

    The command follows the job to its end. Ctrl-C leaves the job running; with
    'fleecefs job' it can be watched, paused or cancelled.

    \b
    Example:
      fleecefs backup web.raw /backup/web.raw --speed 200MiB
      fleecefs backup --all /backup/tonight
      fleecefs backup web.raw /backup/web.raw --bitmap daily --sync incremental
    """
    if bitmap is not None and bitmap_mode is None and sync != "incremental":
        bitmap_mode = "on-success"
    options: dict[str, object] = {
        "job-id": job_id,
        "sync": sync,
        "bitmap": bitmap,
        "bitmap-mode": bitmap_mode,
        "fallback": fallback,
        "format": format,
        "backing": backing,
        "backing-format": backing_format,
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
        if disk is not None or job_id is not None or backing is not None:
            raise click.UsageError("--all takes no DISK, TARGET, --job-id or --backing")
        ids = _start_all(directory, options)
    elif disk is not None and target is not None:
        ids = [job_id or disk]
        _start(disk, target, options)
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


def _start(disk: str, target: str, options: dict[str, object]) -> None:
    """Start a backup of one disk."""
    with connect() as client:
        _note_new([target], options)
        with _hinting(client, [disk], options):
            client.execute("blockdev-backup", device=disk, target=target, **options)


def _start_all(directory: str, options: dict[str, object]) -> list[str]:
    """Start a backup of every disk, of one instant; return the ids of the jobs."""
    suffix = ".qcow2" if options.get("format") == "qcow2" else ""
    with connect() as client:
        disks = _disks(client)
        targets = [os.path.join(directory, disk + suffix) for disk in disks]
        actions = [
            {
                "type": "blockdev-backup",
                "data": {"device": disk, "target": target, **options},
            }
            for disk, target in zip(disks, targets, strict=True)
        ]
        properties = {"completion-mode": "grouped"}
        _note_new(targets, options)
        with _hinting(client, disks, options):
            client.execute("transaction", actions=actions, properties=properties)
    return disks


def _note_new(targets: list[str], options: dict[str, object]) -> None:
    """Say what an increment makes of a raw file that is not there yet."""
    is_increment = options["sync"] in ("incremental", "bitmap") and "bitmap" in options
    if not is_increment or options.get("format") == "qcow2" or "fallback" in options:
        return
    for target in targets:
        if not os.path.exists(target):
            text = (
                f"note: {target} is new: it gets only what is dirty in"
                f" '{options['bitmap']}', the rest of it is holes"
            )
            click.echo(printable(text), err=True)


@contextlib.contextmanager
def _hinting(
    client: "Client", disks: list[str], options: dict[str, object]
) -> Iterator[None]:
    """Tell of --fallback if the daemon refuses a bitmap that can not be used."""
    from fleecefs.control.client import CommandFailed

    try:
        yield
    except CommandFailed as e:
        name = options.get("bitmap")
        if f"'{name}'" not in e.desc or "fallback" in options:
            raise
        # It may as well be busy: then a full backup is refused, too.
        answer = client.execute("fleecefs-bitmap-list")
        good = [
            bitmap["disk"]
            for bitmap in cast("list[DirtyBitmap]", answer)
            if bitmap["name"] == name and not bitmap["inconsistent"]
        ]
        if set(disks) <= set(good):
            raise
        hint = "or make a full backup with --fallback full"
        raise type(e)(e.error_class, f"{e.desc}; {hint}") from None


def _disks(client: "Client") -> list[str]:
    status = cast("Status", client.execute("fleecefs-status"))
    return [disk["name"] for disk in status["disks"]]
