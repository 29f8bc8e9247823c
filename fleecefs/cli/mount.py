"""fleecefs mount: from words to settings; the keeper does the rest."""

import os
from typing import NamedTuple

import click

from fleecefs.cli.daemons import resolve
from fleecefs.cli.options import absolute, complete_paths, log_place, seconds, size
from fleecefs.cli.text import printable

# Long enough for a disk that hangs for a moment, shorter than a guest's own limit
# for a request (30 s for SCSI in Linux).
CBW_TIMEOUT = 10.0


class DiskOption(NamedTuple):
    """One --disk."""

    name: str
    source: str


def _disk(text: str) -> DiskOption:
    """Split [NAME=]SOURCE; a path with a slash before the `=` has no name."""
    name, equals, source = text.partition("=")
    if not equals or "/" in name:
        name, source = os.path.basename(os.path.abspath(text)), text
    if not name or not source:
        raise click.BadParameter(f"{text!r} lacks a name or a source: write NAME=FILE")
    return DiskOption(name, os.path.abspath(source))


def _disks(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> list[DiskOption]:
    disks = [_disk(text) for text in texts]
    names = [disk.name for disk in disks]
    for name in names:
        if names.count(name) > 1:
            raise click.BadParameter(
                f"two disks are named {name!r}: name one with NAME=SOURCE", ctx, param
            )
    return disks


@click.command(short_help="Mount disks, so that snapshots of them can be taken.")
@click.option(
    "--disk",
    "disks",
    metavar="[NAME=]SOURCE",
    multiple=True,
    required=True,
    callback=_disks,
    shell_complete=complete_paths,
    help="A raw image or block device, and the name of its file. Repeat for more.",
)
@click.option(
    "--state",
    metavar="DIR",
    callback=absolute,
    shell_complete=complete_paths,
    help="Where snapshots are remembered between mounts.",
)
@click.option(
    "--store",
    metavar="DIR",
    callback=absolute,
    shell_complete=complete_paths,
    help="Where overwritten data is kept for snapshots.  [default: in --state]",
)
@click.option(
    "--store-limit",
    metavar="SIZE",
    callback=size,
    help="The space that snapshots may take on disk.  [default: unlimited]",
)
@click.option(
    "--ram-limit",
    metavar="SIZE",
    callback=size,
    help="The space that snapshots may take in RAM, before they use the disk.",
)
@click.option(
    "--on-cbw-error",
    type=click.Choice(["break-snapshot", "break-guest-write"]),
    default="break-snapshot",
    show_default=True,
    help="Who suffers if overwritten data can not be kept.",
)
@click.option(
    "--cbw-timeout",
    metavar="SECONDS",
    type=float,
    default=CBW_TIMEOUT,
    show_default=True,
    callback=seconds,
    help="How long a guest's write waits for that at most; 0: no limit.",
)
@click.option(
    "--cluster-size",
    metavar="SIZE",
    callback=size,
    help="The unit of copy-before-write.  [default: 4K, more for large disks]",
)
@click.option(
    "--durability",
    type=click.Choice(["process", "host"]),
    default="process",
    show_default=True,
    help="What snapshots survive: a crash of the daemon, or of the host too (slow).",
)
@click.option(
    "--bitmaps",
    type=click.Choice(["auto", "no"]),
    default="auto",
    show_default=True,
    help="Load persistent dirty bitmaps, or not: then those that should have recorded"
    " are inconsistent.",
)
@click.option("--foreground", is_flag=True, help="Stay, and log to stderr.")
@click.option("--allow-other", is_flag=True, help="Let other users use the files.")
@click.option(
    "--log",
    metavar="FILE",
    callback=log_place,
    shell_complete=complete_paths,
    help="Append the log to a file, or send it to the `journal`.",
)
@click.argument("mount", metavar="MOUNT", shell_complete=complete_paths)
def mount(
    disks: list[DiskOption],
    state: str | None,
    store: str | None,
    store_limit: int | None,
    ram_limit: int | None,
    on_cbw_error: str,
    cbw_timeout: float,
    cluster_size: int | None,
    durability: str,
    bitmaps: str,
    foreground: bool,
    allow_other: bool,
    log: str | None,
    mount: str,
) -> None:
    """Mount disks on the directory MOUNT, so that snapshots of them can be taken.

    Returns when the files are usable. The sources are locked meanwhile: use only
    the files on MOUNT.

    \b
    Example:
      fleecefs mount --disk web.raw=/dev/vg/web --disk /images/db.raw /mnt/live
    """
    from fleecefs.keeper import launch, stay
    from fleecefs.state.directory import default_path

    where = resolve(mount)
    state = state or str(default_path(where))
    if log is None and not foreground:
        log = f"{state}/fleecefs.log"
    settings: dict[str, object] = {
        "mount": where,
        "disks": [disk._asdict() for disk in disks],
        "state": state,
        "store": store,
        "store_limit": store_limit,
        "ram_limit": ram_limit,
        "on_cbw_error": on_cbw_error,
        "cbw_timeout": cbw_timeout,
        "cluster_size": cluster_size,
        "durability": durability,
        "bitmaps": bitmaps,
        "allow_other": allow_other,
        "log": log,
    }
    if foreground:
        stay(settings)
        return
    for note in launch(settings):
        click.echo(printable(f"note: {note}"), err=True)
