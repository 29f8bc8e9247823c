"""Which daemon a command talks to.

The mount itself is never looked at: its daemon may hang, and who stats the mount
would hang with it.
"""

import os
from typing import TYPE_CHECKING

import click

from fleecefs.errors import NotFound

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.state.runtime import RunningMount

# Where the options leave the mount that was asked for, in click's context.
MOUNT_KEY = "fleecefs.mount"

# As the kernel (path_resolution(7)).
LINKS_MAX = 40


def connect(timeout: float | None = None) -> "Client":
    """Return a client, not yet connected, of the daemon the user means."""
    from fleecefs.control.client import TIMEOUT, Client

    mount: str | None = click.get_current_context().meta.get(MOUNT_KEY)
    return Client(choose(mount).socket, TIMEOUT if timeout is None else timeout)


def choose(mount: str | None) -> "RunningMount":
    """Return the daemon that serves mount, or the only one there is."""
    from fleecefs.state.runtime import running_mounts

    if mount is not None:
        # Only that one is looked at: another daemon may hang.
        names = {os.path.abspath(mount), resolve(mount)}
        return _serving(mount, running_mounts(names))
    running = running_mounts()
    if not running:
        raise NotFound("no daemon is running: start one with 'fleecefs mount'")
    if len(running) > 1:
        mounts = ", ".join(sorted(each.mount for each in running))
        raise click.UsageError(f"choose a daemon with --mount: {mounts}")
    return running[0]


def choose_by_path(path: str) -> tuple["RunningMount", str] | None:
    """Return the daemon on whose mount an absolute path lies, and the rest of it."""
    from fleecefs.state.runtime import running_mounts

    for running in running_mounts():
        inside = path.removeprefix(running.mount + "/")
        if inside != path:
            return running, inside
    return None


def resolve(path: str) -> str:
    """Return the absolute path of a mount point, without symbolic links."""
    path = os.path.abspath(path)
    for _ in range(LINKS_MAX):
        head, tail = os.path.split(path)
        path = os.path.join(os.path.realpath(head), tail)
        try:
            # Unlike stat(2) and lstat(2), this asks no filesystem mounted there.
            link = os.readlink(path)
        except OSError:
            break
        path = os.path.normpath(os.path.join(os.path.dirname(path), link))
    return path


def _serving(mount: str, running: "list[RunningMount]") -> "RunningMount":
    from fleecefs.fuse.mount import mounts
    from fleecefs.state.runtime import last_words

    names = {os.path.abspath(mount), resolve(mount)}
    for each in running:
        if each.mount in names:
            return each
    for name in names:
        reason = last_words(name)
        if reason is not None:
            raise NotFound(f"no daemon serves {mount}: its keeper gave up: {reason}")
    if names.intersection(mounts()):
        raise NotFound(f"{mount} has lost its daemon: use 'fleecefs umount {mount}'")
    raise NotFound(f"no daemon serves {mount}: start one with 'fleecefs mount'")
