"""fleecefs umount: end a daemon and wait until nothing of it is left."""

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli import daemons
from fleecefs.cli.options import complete_mounts
from fleecefs.cli.text import printable
from fleecefs.errors import Busy, NotFound, TimedOut

if TYPE_CHECKING:
    from fleecefs.control.results import Status
    from fleecefs.state.runtime import RunningMount

# To finish the requests of a busy guest and to save the state.
END_TIMEOUT = 60.0


@click.command(short_help="Unmount, and end the daemon.")
@click.option("--force", is_flag=True, help="Also while files are in use.")
@click.argument("mount", metavar="MOUNT", shell_complete=complete_mounts)
def umount(force: bool, mount: str) -> None:
    """Unmount MOUNT, and end its daemon. Snapshots stay, for the next mount.

    Refused while files are in use, unless --force is given.
    """
    from fleecefs.fuse.mount import mounts

    try:
        running = daemons.choose(mount)
    except NotFound:
        path = daemons.resolve(mount)
        if path not in mounts():
            raise
        _unmount_abandoned(path, force)
        click.echo(f"{printable(path)} had lost its daemon, and is unmounted now")
        return
    _end(running, force)


def _unmount_abandoned(path: str, force: bool) -> None:
    # Lazy only when told: whoever has files open there gets errors, not an end.
    command = ["fusermount3", "-u", *(["-z"] if force else []), "--", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Busy(f"{path} has lost its daemon, but: {done.stderr.strip()}")


def _end(running: "RunningMount", force: bool) -> None:
    from fleecefs.control.client import ConnectionLost
    from fleecefs.fuse.mount import mounts

    deadline = time.monotonic() + END_TIMEOUT
    try:
        _end_daemon(running, force, deadline)
    except ConnectionLost:
        # The daemon has died. The keeper starts the next one: that one has to be told
        # too, unless it finds that all is unmounted.
        if running.mount in mounts():
            _end(daemons.choose(running.mount), force)
            return
        with _process(running.pid) as ended:
            _wait(ended, deadline)


def _end_daemon(running: "RunningMount", force: bool, deadline: float) -> None:
    from fleecefs.control.client import Client

    with contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(running.socket, END_TIMEOUT))
        status = cast("Status", client.execute("fleecefs-status"))
        processes = [
            (pid, stack.enter_context(_process(pid)))
            for pid in (status["pid"], status["keeper-pid"])
            if pid is not None
        ]
        client.execute("fleecefs-umount", force=force)
        client.wait_closed()
        for pid, ended in processes:
            if not _wait(ended, deadline):
                raise TimedOut(
                    f"process {pid} of {running.mount} has not ended"
                    f" within {END_TIMEOUT:.0f} s: see its log"
                )


@contextlib.contextmanager
def _process(pid: int) -> Iterator[int | None]:
    """Yield a descriptor that tells when a process has ended; None if it has."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _wait(ended: int | None, deadline: float) -> bool:
    if ended is None:
        return True
    waiting = select.poll()
    waiting.register(ended, select.POLLIN)
    left = max(0.0, deadline - time.monotonic())
    return bool(waiting.poll(left * 1000))
