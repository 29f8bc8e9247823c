"""fleecefs verify: compare a disk with a backup of it."""

from typing import TYPE_CHECKING, NoReturn

import click

from fleecefs.cli import follow
from fleecefs.cli.daemons import connect
from fleecefs.cli.edge import FAILED, JOB_FAILED, complain
from fleecefs.cli.options import (
    absolute,
    complete_bitmaps,
    complete_disks,
    complete_paths,
    detach_option,
    json_lines_option,
    mount_option,
    size,
)
from fleecefs.cli.text import printable
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.control.results import Job

# Extents that people are shown; a program gets a thousand.
_LINES_MAX = 20


@click.command(short_help="Compare a disk with a backup of it.")
@mount_option
@click.option(
    "--bitmap",
    metavar="NAME",
    shell_complete=complete_bitmaps,
    help="A dirty bitmap of DISK that records what was written since the backup:"
    " there they may differ.",
)
@click.option(
    "--format",
    type=click.Choice(["raw", "qcow2"]),
    help="What TARGET is, if that is not certain.",
)
@click.option(
    "--speed",
    metavar="SIZE",
    callback=size,
    help="Bytes a second.  [default: no limit]",
)
@click.option("--job-id", metavar="ID", help="Its name.  [default: verify-DISK]")
@detach_option
@json_lines_option
@click.argument("disk", metavar="DISK", shell_complete=complete_disks)
@click.argument(
    "target", metavar="TARGET", callback=absolute, shell_complete=complete_paths
)
def verify(
    bitmap: str | None,
    format: str | None,
    speed: int | None,
    job_id: str | None,
    detach: bool,
    as_json: bool,
    disk: str,
    target: str,
) -> None:
    """Compare DISK, as it is at this instant, with TARGET, a backup of it.

    They have to be the same outside the dirty bitmap, or everywhere without one. That
    proves that the bitmap is right: a backup of what is dirty is all that TARGET lacks.
    TARGET is a raw file or block device, or a qcow2 file with the backups it adds to.

    The exit status is 0 if they are the same, 1 if not: then the extents that differ
    are shown. It is 4 if that could not be found out.

    \b
    Example:
      fleecefs verify web.raw /backup/web.raw --bitmap daily
    """
    options: dict[str, object] = {
        "job-id": job_id,
        "bitmap": bitmap,
        "format": format,
        "speed": speed,
    }
    options = {name: value for name, value in options.items() if value is not None}
    job_id = job_id or f"verify-{disk}"
    with connect() as client:
        client.execute("fleecefs-verify", device=disk, target=target, **options)
    if detach:
        click.echo(printable(job_id))
        return
    try:
        (job,) = follow.follow([job_id], as_json)
    except KeyboardInterrupt:
        follow.leave([job_id])
    _conclude(job, as_json)


def _conclude(job: "Job", as_json: bool) -> NoReturn:
    """Say what has come out, and exit with the status for it."""
    context = click.get_current_context()
    outside = job.get("differs")
    if outside is None:
        complain(follow.find_problem(job) or f"job {job['id']} has no result")
        context.exit(JOB_FAILED)
    both = f"{job['disk']} and {job['target']}"
    where = "" if job["bitmap"] is None else f" outside bitmap '{job['bitmap']}'"
    if not outside:
        if not as_json:
            click.echo(printable(f"{both} are the same{where}{_within(job)}"))
        context.exit(0)
    if not as_json:
        _print_extents(job)
    complain(f"{both} differ{where} in {format_size(outside)}{_within(job)}")
    context.exit(FAILED)


def _within(job: "Job") -> str:
    """Return what is to be expected: how much the bitmap is about."""
    within, dirty = job.get("differs-dirty"), job.get("dirty")
    if within is None or dirty is None:
        return ""
    return f" ({format_size(within)} differ within, {format_size(dirty)} dirty)"


def _print_extents(job: "Job") -> None:
    """Print where they differ, as fleecefs map does."""
    click.echo(f"{'OFFSET':<18}LENGTH")
    shown = job.get("extents", [])[:_LINES_MAX]
    for offset, length in shown:
        click.echo(f"{offset:<#18x}{length:#x}")
    left = (job.get("extent-count") or 0) - len(shown)
    if left:
        click.echo(f"and {left} more")
