"""fleecefs snapshot ...: create, list, show, delete."""

from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli.daemons import connect
from fleecefs.cli.edge import report
from fleecefs.cli.options import (
    complete_disks,
    complete_snapshots,
    json_option,
    mount_option,
)
from fleecefs.cli.text import (
    format_duration,
    format_time,
    print_json,
    print_table,
    printable,
)
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.control.results import Snapshot


@click.group(short_help="Create, list, show and delete snapshots.")
@mount_option
def snapshot() -> None:
    """Create, list, show and delete snapshots.

    A snapshot is a directory MOUNT/snapshots/NAME of read-only files: mkdir and
    rmdir there do the same as create and delete.
    """


@snapshot.command()
@mount_option
@click.option(
    "--bitmap",
    metavar="NAME",
    help="Start a dirty bitmap of this name on each disk, at the same instant.",
)
@json_option
@click.argument("name", metavar="NAME")
@click.argument("disks", metavar="[DISK]...", nargs=-1, shell_complete=complete_disks)
def create(
    bitmap: str | None, as_json: bool, name: str, disks: tuple[str, ...]
) -> None:
    """Freeze all disks, or those given, at one instant."""
    with connect() as client:
        answer = client.execute(
            "fleecefs-snapshot-create",
            name=name,
            disks=list(disks) or None,
            bitmap=bitmap,
        )
    if as_json:
        print_json(answer)
        return
    created = cast("Snapshot", answer)
    names = ", ".join(disk["name"] for disk in created["disks"])
    held = format_duration(created["held"])
    click.echo(
        printable(f"snapshot {created['name']} of {names}; writers were held {held}")
    )


@snapshot.command("list")
@mount_option
@json_option
def list_snapshots(as_json: bool) -> None:
    """List the snapshots."""
    with connect() as client:
        answer = client.execute("fleecefs-snapshot-list")
    if as_json:
        print_json(answer)
        return
    print_snapshots(cast("list[Snapshot]", answer))


@snapshot.command()
@mount_option
@json_option
@click.argument("name", metavar="NAME", shell_complete=complete_snapshots)
def show(as_json: bool, name: str) -> None:
    """Show the disks of a snapshot and what it takes to keep them."""
    with connect() as client:
        answer = client.execute("fleecefs-snapshot-show", name=name)
    if as_json:
        print_json(answer)
        return
    _print_details(cast("Snapshot", answer))


@snapshot.command()
@mount_option
@click.argument(
    "names",
    metavar="NAME...",
    nargs=-1,
    required=True,
    shell_complete=complete_snapshots,
)
@click.pass_context
def delete(ctx: click.Context, names: tuple[str, ...]) -> None:
    """Delete snapshots, in any order, and free their space."""
    from fleecefs.control.client import CommandFailed

    statuses = []
    with connect() as client:
        for name in names:
            try:
                client.execute("fleecefs-snapshot-delete", name=name)
            except CommandFailed as e:
                # As rm: the others are deleted nevertheless.
                statuses.append(report(e))
    if statuses:
        ctx.exit(statuses[0])


def print_snapshots(snapshots: "list[Snapshot]") -> None:
    """Print a table of snapshots, and why any of them is broken."""
    print_table(
        ["SNAPSHOT", "CREATED", "STATE", ">DISKS", ">PRESERVED", ">HELD"],
        [
            [
                each["name"],
                format_time(each["created"]),
                each["state"],
                str(len(each["disks"])),
                format_size(sum(disk["preserved"] for disk in each["disks"])),
                format_duration(each["held"]),
            ]
            for each in snapshots
        ],
    )
    for each in snapshots:
        _print_reasons(each)


def _print_details(shown: "Snapshot") -> None:
    lines = {
        "name": shown["name"],
        "state": shown["state"],
        "created": format_time(shown["created"]),
        "held": f"writers, for {format_duration(shown['held'])}",
    }
    for title, text in lines.items():
        click.echo(f"{title:<9}{printable(text)}")
    click.echo()
    print_table(
        ["DISK", "STATE", ">SIZE", ">PRESERVED", ">IN RAM", ">ON DISK"],
        [
            [
                disk["name"],
                disk["state"],
                format_size(disk["size"]),
                format_size(disk["preserved"]),
                format_size(disk["ram"]),
                format_size(disk["disk"]),
            ]
            for disk in shown["disks"]
        ],
    )
    _print_reasons(shown)


def _print_reasons(shown: "Snapshot") -> None:
    for disk in shown["disks"]:
        if disk["reason"] is not None:
            text = f"{shown['name']}/{disk['name']} is broken: {disk['reason']}"
            click.echo(printable(text))
