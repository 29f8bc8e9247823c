"""Options and arguments that several commands share, and how they complete."""

import math
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import click
from click.shell_completion import CompletionItem

from fleecefs.cli.daemons import MOUNT_KEY, connect
from fleecefs.logs import JOURNAL
from fleecefs.units import parse_size

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.control.results import DirtyBitmap, Job, Snapshot, Status

# A shell that waits for TAB waits for the daemon.
COMPLETION_TIMEOUT = 1.0


def complete_mounts(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the mounts of running daemons."""
    from fleecefs.state.runtime import running_mounts

    return _beginning(incomplete, (each.mount for each in running_mounts()))


def complete_snapshots(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the names of snapshots."""
    return _beginning(incomplete, _asked(ctx, _snapshot_names))


def complete_disks(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the names of disks."""
    return _beginning(incomplete, _asked(ctx, _disk_names))


def complete_disk_files(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the names of live files and of those in snapshots."""
    return _beginning(incomplete, _asked(ctx, _file_names))


def complete_jobs(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the ids of jobs."""
    return _beginning(incomplete, _asked(ctx, _job_ids))


def complete_bitmaps(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[str]:
    """Complete the names of the bitmaps of a disk, or of all as long as there is none.

    A name that several disks have is there once.
    """
    disk: str | None = ctx.params.get("disk")
    return _beginning(incomplete, _asked(ctx, lambda c: _bitmap_names(c, disk)))


def complete_paths(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> "list[CompletionItem[str]]":
    """Leave it to the shell, which knows files."""
    return [CompletionItem(incomplete, type="file")]


def absolute(
    ctx: click.Context, param: click.Parameter, path: str | None
) -> str | None:
    """Take a path; the daemon works in another directory."""
    return None if path is None else os.path.abspath(path)


def log_place(
    ctx: click.Context, param: click.Parameter, path: str | None
) -> str | None:
    """Take a path, or the word for the journal."""
    return path if path == JOURNAL else absolute(ctx, param, path)


def size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """Take a size like 64K or 10GiB."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as e:
        raise click.BadParameter(str(e), ctx, param) from None


def seconds(
    ctx: click.Context, param: click.Parameter, value: float | None
) -> float | None:
    """Take a duration."""
    if value is not None and not 0 <= value < math.inf:
        raise click.BadParameter("write a number of seconds, or 0", ctx, param)
    return value


def _remember_mount(
    ctx: click.Context, param: click.Parameter, mount: str | None
) -> None:
    # The command's own option is parsed after the program's, and wins.
    if mount is not None:
        ctx.meta[MOUNT_KEY] = mount


_ON_ERROR = click.Choice(["report", "ignore", "stop", "enospc", "auto"])

on_source_error_option = click.option(
    "--on-source-error",
    type=_ON_ERROR,
    help="If the disk can not be read.  [default: report]",
)
on_target_error_option = click.option(
    "--on-target-error",
    type=_ON_ERROR,
    help="If TARGET can not be written: fail (report), try again (ignore), pause"
    " (stop), or pause if it is full (enospc).  [default: report]",
)

job_id_option = click.option(
    "--job-id", metavar="ID", help="Its name.  [default: DISK]"
)
no_auto_dismiss_option = click.option(
    "--no-auto-dismiss",
    is_flag=True,
    help="Keep its result until 'fleecefs job dismiss'.",
)
detach_option = click.option(
    "--detach", is_flag=True, help="Print the job's id, and do not follow."
)
json_lines_option = click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON object every second."
)

# After the command ...
mount_option = click.option(
    "-m",
    "--mount",
    metavar="MOUNT",
    expose_value=False,
    callback=_remember_mount,
    shell_complete=complete_mounts,
    help="The daemon that serves MOUNT; with a single daemon it is found.",
)

# ... or before it, where the environment has a word, too.
mount_option_of_program = click.option(
    "-m",
    "--mount",
    metavar="MOUNT",
    envvar="FLEECEFS_MOUNT",
    show_envvar=True,
    expose_value=False,
    callback=_remember_mount,
    shell_complete=complete_mounts,
    help="The daemon to talk to; with a single daemon it is found.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the daemon's answer as JSON."
)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _asked(ctx: click.Context, ask: "Callable[[Client], list[str]]") -> list[str]:
    """Return the daemon's answer, or nothing if there is none to be had."""
    try:
        with ctx.scope(cleanup=False), connect(COMPLETION_TIMEOUT) as client:
            return ask(client)
    except (OSError, click.ClickException):
        return []


def _snapshot_names(client: "Client") -> list[str]:
    snapshots = cast("list[Snapshot]", client.execute("fleecefs-snapshot-list"))
    return [snapshot["name"] for snapshot in snapshots]


def _disk_names(client: "Client") -> list[str]:
    status = cast("Status", client.execute("fleecefs-status"))
    return [disk["name"] for disk in status["disks"]]


def _bitmap_names(client: "Client", disk: str | None) -> list[str]:
    answer = client.execute("fleecefs-bitmap-list", node=disk)
    bitmaps = cast("list[DirtyBitmap]", answer)
    return list(dict.fromkeys(bitmap["name"] for bitmap in bitmaps))


def _job_ids(client: "Client") -> list[str]:
    jobs = cast("list[Job]", client.execute("fleecefs-job-list"))
    return [job["id"] for job in jobs]


def _file_names(client: "Client") -> list[str]:
    status = cast("Status", client.execute("fleecefs-status"))
    live = [disk["name"] for disk in status["disks"]]
    return live + [
        f"snapshots/{snapshot['name']}/{disk['name']}"
        for snapshot in status["snapshots"]
        for disk in snapshot["disks"]
    ]
