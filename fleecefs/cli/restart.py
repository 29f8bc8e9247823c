"""fleecefs restart: the next daemon takes over, under the mount's users."""

import contextlib
import time
from typing import cast

import click

from fleecefs.cli.daemons import connect
from fleecefs.cli.options import mount_option
from fleecefs.cli.text import format_duration
from fleecefs.control.client import Client, ConnectionLost
from fleecefs.control.results import Status
from fleecefs.errors import TimedOut

# As long as the keeper tries.
_SECONDS = 60.0


@click.command(short_help="Start a new daemon, without unmounting.")
@mount_option
def restart() -> None:
    """Start a new daemon for a mount, for example after an upgrade.

    Users of the mount see a pause; nothing fails and nothing is lost.
    """
    with connect() as client:
        before = _generation(client)
        begin = time.monotonic()
        # The answer is that the daemon ends.
        with contextlib.suppress(ConnectionLost):
            client.execute("fleecefs-restart")
    while time.monotonic() - begin < _SECONDS:
        try:
            with connect() as client:
                generation = _generation(client)
        except ConnectionLost:
            continue
        if generation > before:
            took = format_duration(time.monotonic() - begin)
            click.echo(f"daemon {generation} has taken over, after {took}")
            return
    raise TimedOut(f"no new daemon within {_SECONDS:g} s; see the log")


def _generation(client: Client) -> int:
    return cast(Status, client.execute("fleecefs-status"))["generation"]
