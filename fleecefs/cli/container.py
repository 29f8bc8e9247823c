"""What is in a container, told without a daemon: a qcow2 file that may be in use."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import click

from fleecefs.cli.text import print_json, print_table
from fleecefs.errors import NotUsable
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.qcow2.contents import Contents
    from fleecefs.qcow2.file import DescriptorFile

Stored = TypedDict(
    "Stored",
    {
        "name": str,
        "granularity": int,
        # Dirty bytes, in whole bits, as they were saved last; None if nobody can tell.
        "count": int | None,
        # Whether a program uses it, or has left it so.
        "in-use": bool,
        "auto": bool,
        # Whether it is of a kind that fleecefs does not know.
        "foreign": bool,
        # Of the disk.
        "size": int,
    },
)


def list_stored(path: str, as_json: bool) -> None:
    """Print the bitmaps in a container; NotUsable if it is none."""
    stored = _read(Path(path))
    if as_json:
        print_json(stored)
        return
    print_table(
        ["BITMAP", ">DIRTY", ">OF", ">GRANULARITY", "FLAGS"],
        [
            [
                each["name"],
                "-" if each["count"] is None else format_size(each["count"]),
                format_size(each["size"]),
                format_size(each["granularity"]),
                _flags(each),
            ]
            for each in stored
        ],
    )
    if any(each["in-use"] for each in stored):
        click.echo("in use: what is dirty since it was saved, the file does not tell")


def _read(path: Path) -> list[Stored]:
    from fleecefs.bitmaps.containers import read_container

    contents, file, fd = read_container(path)
    try:
        if contents.header.is_void:
            raise NotUsable(
                f"container {path}: another program has changed it without its bitmaps,"
                " so they are worth nothing"
            )
        return [
            {
                "name": name,
                "granularity": entry.granularity,
                "count": _count(contents, file, name),
                "in-use": entry.is_in_use,
                "auto": entry.is_auto,
                "foreign": entry.is_foreign,
                "size": contents.size,
            }
            for name, entry in contents.entries.items()
        ]
    finally:
        os.close(fd)


def _count(contents: "Contents", file: "DescriptorFile", name: str) -> int | None:
    try:
        bits = contents.bits(file, name)
    except NotUsable:
        return None
    return bits.count() * contents.entries[name].granularity


def _flags(bitmap: Stored) -> str:
    flags = {
        "in use": bitmap["in-use"],
        "auto": bitmap["auto"],
        "foreign": bitmap["foreign"],
    }
    return ", ".join(flag for flag, is_set in flags.items() if is_set)
