"""fleecefs bitmap ...: what was written since a point, for incremental backups."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import click

from fleecefs.cli import container as containers
from fleecefs.cli.daemons import connect
from fleecefs.cli.edge import report
from fleecefs.cli.options import (
    absolute,
    complete_bitmaps,
    complete_disks,
    complete_paths,
    json_option,
    mount_option,
    size,
)
from fleecefs.cli.text import print_json, print_table, printable
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.control.results import DirtyBitmap

_disk = click.argument("disk", metavar="DISK", shell_complete=complete_disks)
_disk_or_all = click.argument(
    "disk", metavar="[DISK]", required=False, shell_complete=complete_disks
)
_name = click.argument("name", metavar="NAME", shell_complete=complete_bitmaps)
_names = click.argument(
    "names",
    metavar="NAME...",
    nargs=-1,
    required=True,
    shell_complete=complete_bitmaps,
)
_names_or_all = click.argument(
    "names", metavar="[NAME]...", nargs=-1, shell_complete=complete_bitmaps
)
# Those in a file: the daemon does not know them yet.
_stored_names = click.argument("names", metavar="[NAME]...", nargs=-1)
_file = click.argument(
    "file", metavar="FILE", callback=absolute, shell_complete=complete_paths
)


def _container(help: str, *, required: bool = False) -> Callable[..., Any]:
    return click.option(
        "--container",
        metavar="FILE",
        required=required,
        callback=absolute,
        shell_complete=complete_paths,
        help=help,
    )


@click.group(short_help="Record what is written, for incremental backups.")
@mount_option
def bitmap() -> None:
    """Record what is written to a disk, for incremental backups.

    A dirty bitmap has a bit for each part of its disk, set when the part is written
    to. 'fleecefs backup --bitmap' copies what is dirty, and starts over.

    \b
    Example:
      fleecefs bitmap add web.raw daily
      fleecefs backup web.raw /backup/web.raw --bitmap daily
      fleecefs backup web.raw /backup/web.raw --bitmap daily --sync incremental
    """


@bitmap.command("list")
@mount_option
@json_option
@_container("List what is in a qcow2 file. It may be in use; no daemon is asked.")
@_disk_or_all
def list_bitmaps(as_json: bool, container: str | None, disk: str | None) -> None:
    """List the bitmaps of all disks or of one, or those in a file."""
    if container is not None:
        if disk is not None:
            raise click.UsageError("give DISK or --container, not both")
        containers.list_stored(container, as_json)
        return
    with connect() as client:
        answer = client.execute("fleecefs-bitmap-list", node=disk)
    if as_json:
        print_json(answer)
        return
    _print_bitmaps(cast("list[DirtyBitmap]", answer))


@bitmap.command()
@mount_option
@click.option(
    "--granularity",
    metavar="SIZE",
    callback=size,
    help="What one bit stands for: a power of two from 512 to 2GiB.  [default: 64K]",
)
@click.option("--transient", is_flag=True, help="Forget it when the mount ends.")
@click.option("--disabled", is_flag=True, help="Record nothing until it is enabled.")
@_container("Save it in this qcow2 file, made if missing.  [default: in --state]")
@_disk
@click.argument("name", metavar="NAME")
def add(
    granularity: int | None,
    transient: bool,
    disabled: bool,
    container: str | None,
    disk: str,
    name: str,
) -> None:
    """Add a bitmap NAME to DISK, which records from now on."""
    with connect() as client:
        client.execute(
            "block-dirty-bitmap-add",
            node=disk,
            name=name,
            granularity=granularity,
            persistent=not transient,
            disabled=disabled,
            container=container,
        )


def _verb(name: str, help: str) -> None:
    """Add a command that does something to bitmaps of a disk."""

    def tell(ctx: click.Context, disk: str, names: tuple[str, ...]) -> None:
        from fleecefs.control.client import CommandFailed

        statuses = []
        with connect() as client:
            for each in names:
                try:
                    client.execute(f"block-dirty-bitmap-{name}", node=disk, name=each)
                except CommandFailed as e:
                    # As rm: it is done to the others nevertheless.
                    statuses.append(report(e))
        if statuses:
            ctx.exit(statuses[0])

    decorated: Callable[..., None]
    decorated = _disk(_names(mount_option(click.pass_context(tell))))
    bitmap.command(name, help=help)(decorated)


_verb("remove", "Remove bitmaps, from their file too.")
_verb("clear", "Start over with nothing dirty; also with what is inconsistent.")
_verb("enable", "Let bitmaps record from now on.")
_verb("disable", "Let bitmaps stay as they are.")


@bitmap.command()
@mount_option
@_disk
@click.argument("target", metavar="TARGET", shell_complete=complete_bitmaps)
@click.argument(
    "sources",
    metavar="SOURCE...",
    nargs=-1,
    required=True,
    shell_complete=complete_bitmaps,
)
def merge(disk: str, target: str, sources: tuple[str, ...]) -> None:
    """Add to bitmap TARGET what is dirty in the bitmaps SOURCE.

    They may have other granularities.
    """
    with connect() as client:
        client.execute(
            "block-dirty-bitmap-merge", node=disk, target=target, bitmaps=list(sources)
        )


@bitmap.command(short_help="Add a bitmap that has what another has now.")
@mount_option
@click.option("--persistent", is_flag=True, help="Keep the copy when the mount ends.")
@_disk
@_name
@click.argument("new_name", metavar="NEWNAME")
def copy(persistent: bool, disk: str, name: str, new_name: str) -> None:
    """Add a bitmap NEWNAME that has what NAME has now, and does not record."""
    with connect() as client:
        client.execute(
            "fleecefs-bitmap-copy",
            node=disk,
            name=name,
            target=new_name,
            persistent=persistent,
        )


@bitmap.command()
@mount_option
@_disk_or_all
def save(disk: str | None) -> None:
    """Save the persistent bitmaps now, of all disks or of one.

    They are saved every minute and at the end anyway.
    """
    with connect() as client:
        client.execute("fleecefs-bitmap-save", node=disk)


@bitmap.command("set", short_help="Change whether a bitmap is persistent.")
@mount_option
@click.option(
    "--persistent/--transient",
    default=None,
    help="Keep it when the mount ends, or forget it then.",
)
@click.option(
    "--auto/--no-auto",
    default=None,
    help="Record again after the next mount, or not until it is enabled.",
)
@_container("With --persistent: save it in this qcow2 file.  [default: in --state]")
@_disk
@_name
def set_bitmap(
    persistent: bool | None,
    auto: bool | None,
    container: str | None,
    disk: str,
    name: str,
) -> None:
    """Change whether a bitmap is persistent, and what it does after a mount."""
    if container is not None and not persistent:
        raise click.UsageError("--container needs --persistent")
    if persistent is None and auto is None:
        raise click.UsageError("give --persistent, --transient, --auto or --no-auto")
    with connect() as client:
        client.execute(
            "fleecefs-bitmap-set",
            node=disk,
            name=name,
            persistent=persistent,
            auto=auto,
            container=container,
        )


@bitmap.command()
@mount_option
@json_option
@_container("The qcow2 file that they are in, and stay in.", required=True)
@_disk
@_stored_names
def attach(as_json: bool, container: str, disk: str, names: tuple[str, ...]) -> None:
    """Use bitmaps that are in a file already, all or some.

    Those with the flag `auto` record from now on, the others when they are enabled.
    """
    with connect() as client:
        answer = client.execute(
            "fleecefs-bitmap-attach",
            node=disk,
            container=container,
            names=list(names) or None,
        )
        listed = client.execute("fleecefs-bitmap-list", node=disk)
    if as_json:
        print_json(answer)
        return
    attached = cast("list[str]", answer)
    _say(f"attached to {disk}", attached)
    bitmaps = cast("list[DirtyBitmap]", listed)
    _print_problems(each for each in bitmaps if each["name"] in attached)


@bitmap.command(short_help="Write bitmaps to a file, for another host.")
@mount_option
@json_option
@_disk
@_file
@_names_or_all
def export(as_json: bool, disk: str, file: str, names: tuple[str, ...]) -> None:
    """Write bitmaps to a new FILE, to take them to another host with the disk.

    All that are right, or some. Stop the guest before: the file is of use as long as
    nobody writes to the disk.
    """
    with connect() as client:
        answer = client.execute(
            "fleecefs-bitmap-export", node=disk, file=file, names=list(names) or None
        )
    if as_json:
        print_json(answer)
        return
    _say(f"exported from {disk}", cast("list[str]", answer))


@bitmap.command("import", short_help="Add bitmaps that were exported.")
@mount_option
@json_option
@_disk
@_file
@_stored_names
def import_bitmaps(as_json: bool, disk: str, file: str, names: tuple[str, ...]) -> None:
    """Add the bitmaps in FILE that were exported on another host, all or some.

    Refused if it is another disk, or if it was written to since. Start the guest
    afterwards.
    """
    with connect() as client:
        answer = client.execute(
            "fleecefs-bitmap-import", node=disk, file=file, names=list(names) or None
        )
    if as_json:
        print_json(answer)
        return
    _say(f"imported to {disk}", cast("list[str]", answer))


def describe_problem(bitmap: "DirtyBitmap") -> str | None:
    """Return why a bitmap can not be used, and what to do, if it is so."""
    if not bitmap["inconsistent"]:
        return None
    return (
        f"bitmap {bitmap['name']} of {bitmap['disk']} is inconsistent:"
        f" {bitmap['reason']}; make a full backup with --fallback full, or remove it"
    )


def _print_bitmaps(bitmaps: "list[DirtyBitmap]") -> None:
    print_table(
        ["BITMAP", "DISK", ">DIRTY", ">GRANULARITY", "STATE", "PERSISTENT"],
        [
            [
                each["name"],
                each["disk"],
                "-" if each["inconsistent"] else format_size(each["count"]),
                format_size(each["granularity"]),
                _state(each),
                _persistence(each),
            ]
            for each in bitmaps
        ],
    )
    _print_problems(bitmaps)


def _print_problems(bitmaps: "Iterable[DirtyBitmap]") -> None:
    for each in bitmaps:
        problem = describe_problem(each)
        if problem is not None:
            click.echo(printable(problem))


def _state(bitmap: "DirtyBitmap") -> str:
    if bitmap["inconsistent"]:
        return "inconsistent"
    if bitmap["busy"]:
        return "busy"
    return "recording" if bitmap["recording"] else "disabled"


def _persistence(bitmap: "DirtyBitmap") -> str:
    if not bitmap["persistent"]:
        return "no"
    return "yes" if bitmap["auto"] else "yes, no auto"


def _say(what: str, names: list[str]) -> None:
    click.echo(printable(f"{what}: {', '.join(names)}"))
