"""The commands about dirty bitmaps: QEMU's, and what we have besides.

Most of them are also actions of a transaction: steps (bitmaps/steps.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import trio

from fleecefs.bitmaps import steps
from fleecefs.bitmaps.mount import describe_as_qemu
from fleecefs.bitmaps.steps import Step
from fleecefs.block.dirty import GRANULARITY
from fleecefs.control.arguments import (
    BOOLEAN,
    INTEGER,
    STRING,
    STRINGS,
    STRINGS_OR_OBJECTS,
    Argument,
    Command,
    Handler,
    check_arguments,
    optional,
)
from fleecefs.control.qmp import Message, QmpError
from fleecefs.inventory import Inventory

_OF_BITMAP = {"node": STRING, "name": STRING}


class Action(NamedTuple):
    """A step, made from the arguments by name once they have been checked."""

    step: Callable[..., Step]
    arguments: dict[str, Argument]


def _add(
    node: str,
    name: str,
    granularity: int = GRANULARITY,
    persistent: bool = False,
    disabled: bool = False,
    container: str | None = None,
) -> Step:
    return steps.Add(
        node,
        name,
        granularity=granularity,
        persistent=persistent,
        recording=not disabled,
        container=None if container is None else absolute("container", container),
    )


def _merge(node: str, target: str, bitmaps: list[str | Message]) -> Step:
    return steps.Merge(node, target, [_source(node, each) for each in bitmaps])


def _source(node: str, bitmap: str | Message) -> tuple[str, str]:
    if isinstance(bitmap, str):
        return node, bitmap
    check_arguments(bitmap, _OF_BITMAP)
    return str(bitmap["node"]), str(bitmap["name"])


def _copy(node: str, name: str, target: str, persistent: bool = False) -> Step:
    return steps.Copy(node, name, target, persistent=persistent)


def _set(
    node: str,
    name: str,
    persistent: bool | None = None,
    auto: bool | None = None,
    container: str | None = None,
) -> Step:
    path = None if container is None else absolute("container", container)
    return steps.Set(node, name, persistent=persistent, auto=auto, container=path)


def absolute(name: str, text: str) -> Path:
    """Return a path; what it would be relative to, only the client knows."""
    path = Path(text)
    if not path.is_absolute():
        raise QmpError(f"Parameter {name!r} expects an absolute path")
    return path


def _of_bitmap(step: Callable[[str, str], Step]) -> Action:
    return Action(lambda node, name: step(node, name), _OF_BITMAP)


ACTIONS = {
    "block-dirty-bitmap-add": Action(
        _add,
        {
            **_OF_BITMAP,
            "granularity": optional(INTEGER),
            "persistent": optional(BOOLEAN),
            "disabled": optional(BOOLEAN),
            "container": optional(STRING),
        },
    ),
    "block-dirty-bitmap-remove": _of_bitmap(steps.Remove),
    "block-dirty-bitmap-clear": _of_bitmap(steps.Clear),
    "block-dirty-bitmap-enable": _of_bitmap(steps.Enable),
    "block-dirty-bitmap-disable": _of_bitmap(steps.Disable),
    "block-dirty-bitmap-merge": Action(
        _merge, {"node": STRING, "target": STRING, "bitmaps": STRINGS_OR_OBJECTS}
    ),
    "fleecefs-bitmap-copy": Action(
        _copy, {**_OF_BITMAP, "target": STRING, "persistent": optional(BOOLEAN)}
    ),
    "fleecefs-bitmap-set": Action(
        _set,
        {
            **_OF_BITMAP,
            "persistent": optional(BOOLEAN),
            "auto": optional(BOOLEAN),
            "container": optional(STRING),
        },
    ),
    "abort": Action(steps.Abort, {}),
}


class BitmapCommands:
    """The part of the table of commands that is about dirty bitmaps."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self.table = {
            **{
                name: Command(self._changing(action), action.arguments)
                for name, action in ACTIONS.items()
                if name != "abort"
            },
            "fleecefs-bitmap-list": Command(self._list, {"node": optional(STRING)}),
            "fleecefs-bitmap-save": Command(self._save, {"node": optional(STRING)}),
            "fleecefs-bitmap-attach": Command(
                self._attach,
                {"node": STRING, "container": STRING, "names": optional(STRINGS)},
            ),
            "fleecefs-bitmap-export": Command(
                self._export,
                {"node": STRING, "file": STRING, "names": optional(STRINGS)},
            ),
            "fleecefs-bitmap-import": Command(
                self._import,
                {"node": STRING, "file": STRING, "names": optional(STRINGS)},
            ),
            "query-block": Command(self._query_block, {}),
            "query-named-block-nodes": Command(self._query_nodes, {}),
        }

    def _changing(self, action: Action) -> Handler:
        async def change(**arguments: object) -> Message:
            await self._change([action.step(**arguments)])
            return {}

        return change

    async def _change(self, wanted: list[Step]) -> None:
        await trio.to_thread.run_sync(self._inventory.change_bitmaps, wanted)

    def _disks(self, node: str | None) -> list[str]:
        if node is None:
            return list(self._inventory.disks)
        return [self._inventory.find_disk(node).name]

    async def _list(self, node: str | None = None) -> list[Message]:
        def describe() -> list[Message]:
            bitmaps = self._inventory.bitmaps
            return [b for disk in self._disks(node) for b in bitmaps.describe(disk)]

        return await trio.to_thread.run_sync(describe)

    async def _save(self, node: str | None = None) -> Message:
        disks = self._disks(node)
        await trio.to_thread.run_sync(self._inventory.save_bitmaps, disks)
        return {}

    async def _attach(
        self, node: str, container: str, names: list[str] | None = None
    ) -> list[str]:
        step = steps.Attach(node, absolute("container", container), names or ())
        await self._change([step])
        return step.attached

    async def _export(
        self, node: str, file: str, names: list[str] | None = None
    ) -> list[str]:
        path = absolute("file", file)
        return await trio.to_thread.run_sync(
            self._inventory.export_bitmaps, node, path, names
        )

    async def _import(
        self, node: str, file: str, names: list[str] | None = None
    ) -> list[str]:
        path = absolute("file", file)
        return await trio.to_thread.run_sync(
            self._inventory.import_bitmaps, node, path, names
        )

    async def _query_block(self) -> list[Message]:
        nodes = await self._query_nodes()
        return [
            {"device": node["node-name"], "type": "unknown", "inserted": node}
            for node in nodes
        ]

    async def _query_nodes(self) -> list[Message]:
        def describe() -> list[Message]:
            return [
                {
                    "node-name": disk["name"],
                    "drv": "raw",
                    "file": disk["source"],
                    "ro": False,
                    "image": {
                        "filename": disk["source"],
                        "format": "raw",
                        "virtual-size": disk["size"],
                    },
                    "dirty-bitmaps": self._of_qemu(disk["name"]),
                }
                for disk in self._inventory.describe_disks()
            ]

        return await trio.to_thread.run_sync(describe)

    def _of_qemu(self, disk: str) -> list[Message]:
        held = list(self._inventory.bitmaps.find(disk).held.values())
        described = [describe_as_qemu(each) for each in held]
        for each in described:
            # As in QEMU, which tells it only where it is so.
            if not each["inconsistent"]:
                del each["inconsistent"]
        return described
