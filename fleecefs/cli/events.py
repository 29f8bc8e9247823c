"""fleecefs events: follow what happens."""

import json
from typing import TypedDict, cast

import click

from fleecefs.cli.daemons import connect
from fleecefs.cli.options import json_option, mount_option
from fleecefs.cli.text import format_time, printable


class Timestamp(TypedDict):
    """When, since 1970."""

    seconds: int
    microseconds: int


class Event(TypedDict):
    """QMP's shape of an event."""

    event: str
    data: dict[str, object]
    timestamp: Timestamp


@click.command(short_help="Print events as they happen.")
@mount_option
@json_option
def events(as_json: bool) -> None:
    """Print a line for every event, until Ctrl-C or the end of the daemon.

    With --json every line is a JSON object.
    """
    with connect() as client:
        for event in client.events():
            click.echo(json.dumps(event) if as_json else _line(cast("Event", event)))


def _line(event: Event) -> str:
    words = [f"{key}={_word(value)}" for key, value in event["data"].items()]
    when = format_time(event["timestamp"]["seconds"])
    return printable(" ".join([when, event["event"], *words]))


def _word(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_word, value))
    return value if isinstance(value, str) else json.dumps(value)
