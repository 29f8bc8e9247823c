"""What the control socket can be asked to do: a table of commands.

What blocks (the inventory, the status) runs in a thread.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import trio

from fleecefs import __version__
from fleecefs.control import qmp
from fleecefs.control.arguments import (
    BOOLEAN,
    INTEGER,
    STRING,
    Command,
    check_arguments,
    optional,
)
from fleecefs.control.bitmaps import BitmapCommands
from fleecefs.control.jobs import JobCommands
from fleecefs.control.qmp import ErrorClass, Message, QmpError
from fleecefs.control.session import Request
from fleecefs.control.transactions import (
    SNAPSHOT_ARGUMENTS,
    create_snapshot,
    snapshot_options,
)
from fleecefs.errors import NotFound
from fleecefs.inventory import Inventory
from fleecefs.jobs.held import CheckPlace
from fleecefs.jobs.registry import Jobs

log = logging.getLogger(__name__)

# 10000 extents of at most 100 bytes each fit in a line of 1 MiB.
MAP_COUNT_MAX = 10_000


class Lifecycle(NamedTuple):
    """What only the daemon itself can tell or do."""

    # Blocking; the shape is results.Status, but for the jobs.
    status: Callable[[], Message]
    # Takes force. Returns when the daemon has decided to end and may be answered;
    # raises OSError if it will not.
    umount: Callable[[bool], Awaitable[None]]
    # Does not return: the next daemon takes over, and connections are lost.
    restart: Callable[[], Awaitable[None]]
    # Blocking; raises NotUsable for a path that leads to the mount.
    check_place: CheckPlace = lambda path: None


class Commands:
    """Every command, bound to the daemon it works on."""

    def __init__(self, inventory: Inventory, jobs: Jobs, lifecycle: Lifecycle) -> None:
        self._inventory = inventory
        self._jobs = jobs
        self._lifecycle = lifecycle
        self.table = {
            "query-commands": Command(self._query_commands, {}),
            "query-version": Command(self._query_version, {}),
            "quit": Command(self._umount, {}),
            "fleecefs-restart": Command(self._restart, {}),
            "fleecefs-status": Command(self._status, {}),
            "fleecefs-snapshot-create": Command(
                self._snapshot_create, SNAPSHOT_ARGUMENTS
            ),
            "fleecefs-snapshot-delete": Command(
                self._snapshot_delete, {"name": STRING}
            ),
            "fleecefs-snapshot-list": Command(self._snapshot_list, {}),
            "fleecefs-snapshot-show": Command(self._snapshot_show, {"name": STRING}),
            "fleecefs-map": Command(
                self._map,
                {
                    "file": STRING,
                    "offset": optional(INTEGER),
                    "count": optional(INTEGER),
                },
            ),
            "fleecefs-umount": Command(self._umount, {"force": optional(BOOLEAN)}),
            **JobCommands(inventory, jobs, lifecycle.check_place).table,
            **BitmapCommands(inventory).table,
        }

    async def answer(self, request: Request) -> Message:
        """Carry out a request and return the reply, whatever happens."""
        try:
            value = await self._execute(request)
        except Exception as e:
            return qmp.failure(_as_qmp_error(e, request), request.tag)
        return qmp.success(value, request.tag)

    async def _execute(self, request: Request) -> object:
        command = self.table.get(request.name)
        if command is None:
            raise QmpError(
                f"there is no command {request.name!r}", ErrorClass.COMMAND_NOT_FOUND
            )
        check_arguments(request.arguments, command.arguments)
        return await command.handler(**request.arguments)

    async def _query_commands(self) -> list[Message]:
        return [{"name": name} for name in sorted(self.table)]

    async def _query_version(self) -> Message:
        return qmp.version(__version__)

    async def _status(self) -> Message:
        status = await trio.to_thread.run_sync(self._lifecycle.status)
        # Those that are known: who asks how things are does not wait for a target.
        return {**status, "jobs": [job.describe() for job in self._jobs.all()]}

    async def _snapshot_create(self, **arguments: object) -> Message:
        def create() -> Message:
            create_snapshot(self._inventory, snapshot_options(arguments))
            return self._inventory.describe_snapshot(str(arguments["name"]))

        return await trio.to_thread.run_sync(create)

    async def _snapshot_delete(self, name: str) -> Message:
        await trio.to_thread.run_sync(self._inventory.delete_snapshot, name)
        return {}

    async def _snapshot_list(self) -> list[Message]:
        return await trio.to_thread.run_sync(self._inventory.describe_snapshots)

    async def _snapshot_show(self, name: str) -> Message:
        return await trio.to_thread.run_sync(self._inventory.describe_snapshot, name)

    async def _map(
        self, file: str, offset: int = 0, count: int = MAP_COUNT_MAX
    ) -> Message:
        if offset < 0:
            raise QmpError("Parameter 'offset' expects a value of at least 0")
        if not 1 <= count <= MAP_COUNT_MAX:
            raise QmpError(
                f"Parameter 'count' expects a value from 1 to {MAP_COUNT_MAX}"
            )
        return await trio.to_thread.run_sync(self._inventory.map, file, offset, count)

    async def _restart(self) -> Message:
        await self._lifecycle.restart()
        return {}

    async def _umount(self, force: bool = False) -> Message:
        await self._lifecycle.umount(force)
        return {}


def _as_qmp_error(error: Exception, request: Request) -> QmpError:
    if isinstance(error, QmpError):
        return error
    if isinstance(error, NotFound):
        return QmpError(str(error), ErrorClass.DEVICE_NOT_FOUND)
    if isinstance(error, OSError):
        text = error.strerror or str(error)
        return QmpError(f"{error.filename}: {text}" if error.filename else text)
    log.error("control command %s failed", request.name, exc_info=error)
    return QmpError("internal error: the daemon's log tells more")
