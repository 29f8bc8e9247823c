"""fleecefs map: where the bytes of a file lie, in the manner of qemu-img map."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli.daemons import choose_by_path, connect
from fleecefs.cli.options import complete_disk_files, json_option, mount_option
from fleecefs.cli.text import print_json

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.control.results import Map, MapExtent


@click.command("map", short_help="Show which parts of a file hold data, and where.")
@mount_option
@json_option
@click.argument("file", metavar="FILE", shell_complete=complete_disk_files)
def map_file(as_json: bool, file: str) -> None:
    """Show which parts of a file hold data, and where.

    FILE is DISK or snapshots/NAME/DISK, or the full path of one of these files.
    WHERE is source, ram or disk (the tiers of the store), or none for a hole.
    """
    client, file = _find(file)
    with client:
        pages = _pages(client, file)
        if as_json:
            _print_as_json(list(pages))
            return
        _print_lines(pages)


def _find(file: str) -> "tuple[Client, str]":
    from fleecefs.control.client import Client

    found = choose_by_path(file)
    if found is None:
        return connect(), file
    running, inside = found
    return Client(running.socket), inside


def _pages(client: "Client", file: str) -> "Iterator[Map]":
    offset: int | None = 0
    while offset is not None:
        answer = client.execute("fleecefs-map", file=file, offset=offset)
        page = cast("Map", answer)
        yield page
        offset = page["next"]


def _print_as_json(pages: "list[Map]") -> None:
    """Print the pages as the one result that they are parts of."""
    extents = [extent for page in pages for extent in page["extents"]]
    print_json({"size": pages[-1]["size"], "extents": extents, "next": None})


def _print_lines(pages: "Iterator[Map]") -> None:
    # Asked for ahead of the titles: where there is no such file, none are printed.
    first = next(pages)
    click.echo(f"{'OFFSET':<18}{'LENGTH':<18}{'DATA':<6}WHERE")
    for page in itertools.chain([first], pages):
        for extent in page["extents"]:
            click.echo(_line(extent))


def _line(extent: "MapExtent") -> str:
    data = "yes" if extent["data"] else "no"
    return f"{extent['start']:<#18x}{extent['length']:<#18x}{data:<6}{extent['where']}"
