"""fleecefs mirror: start a mirror, and follow it until it is ready."""

import click

from fleecefs.cli import follow
from fleecefs.cli.daemons import connect
from fleecefs.cli.options import (
    absolute,
    complete_disks,
    complete_paths,
    detach_option,
    job_id_option,
    json_lines_option,
    mount_option,
    no_auto_dismiss_option,
    on_source_error_option,
    on_target_error_option,
    size,
)
from fleecefs.cli.text import printable


@click.command(short_help="Copy a disk, and let the copy follow it or take its place.")
@mount_option
@click.option(
    "--sync",
    type=click.Choice(["full", "top", "none"]),
    default="full",
    show_default=True,
    help="Copy all, what is allocated in the source, or only what the guest writes from"
    " now on.",
)
@click.option(
    "--copy-mode",
    type=click.Choice(["background", "write-blocking"]),
    default="background",
    show_default=True,
    help="When what the guest writes comes to TARGET: later, or before its write is"
    " answered.",
)
@click.option(
    "--converge",
    type=click.Choice(["auto"]),
    help="If the guest writes faster than is copied, let it wait: write-blocking.",
)
@click.option(
    "--target-is-zero",
    is_flag=True,
    help="TARGET is full of zeroes: do not write any where the disk has them.",
)
@click.option(
    "--speed",
    metavar="SIZE",
    callback=size,
    help="Bytes a second, in the background.  [default: no limit]",
)
@click.option(
    "--granularity",
    metavar="SIZE",
    callback=size,
    help="How much becomes dirty with the first byte.  [default: 64 KiB]",
)
@click.option(
    "--buf-size",
    metavar="SIZE",
    callback=size,
    help="How much data is in flight at the most.  [default: 16 MiB]",
)
@on_source_error_option
@on_target_error_option
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(min=1),
    help="How many copies at a time.  [default: 2]",
)
@job_id_option
@click.option(
    "--no-auto-finalize",
    is_flag=True,
    help="Before the disk moves, wait for 'fleecefs job finalize'.",
)
@no_auto_dismiss_option
@detach_option
@json_lines_option
@click.argument("disk", metavar="DISK", shell_complete=complete_disks)
@click.argument(
    "target", metavar="TARGET", callback=absolute, shell_complete=complete_paths
)
def mirror(
    sync: str,
    copy_mode: str,
    converge: str | None,
    target_is_zero: bool,
    speed: int | None,
    granularity: int | None,
    buf_size: int | None,
    on_source_error: str | None,
    on_target_error: str | None,
    workers: int | None,
    job_id: str | None,
    no_auto_finalize: bool,
    no_auto_dismiss: bool,
    detach: bool,
    as_json: bool,
    disk: str,
    target: str,
) -> None:
    """Copy DISK to TARGET while it is in use, and let TARGET follow what is written.

    TARGET is a raw file, which is made if it is not there, or a block device of at
    least that size. What it held is overwritten.

    When both are alike, the job is ready, and the command returns: then 'fleecefs job
    complete' moves the disk to TARGET, without an interruption for whoever uses it, and
    'fleecefs job cancel' leaves TARGET a copy of that moment. Ctrl-C leaves the job
    running.

    \b
    Example:
      fleecefs mirror web.raw /newstore/web.raw
      fleecefs job complete web.raw
    """
    options: dict[str, object] = {
        "job-id": job_id,
        "sync": sync,
        "copy-mode": copy_mode,
        "converge": converge,
        "target-is-zero": target_is_zero,
        "speed": speed,
        "granularity": granularity,
        "buf-size": buf_size,
        "on-source-error": on_source_error,
        "on-target-error": on_target_error,
        "max-workers": workers,
        "auto-finalize": not no_auto_finalize,
        "auto-dismiss": not no_auto_dismiss,
    }
    options = {name: value for name, value in options.items() if value is not None}
    with connect() as client:
        client.execute("blockdev-mirror", device=disk, target=target, **options)
    ids = [job_id or disk]
    if detach:
        click.echo(printable(ids[0]))
        return
    try:
        jobs = follow.follow(ids, as_json)
    except KeyboardInterrupt:
        follow.leave(ids, "wait --ready")
    follow.conclude(jobs, as_json)
