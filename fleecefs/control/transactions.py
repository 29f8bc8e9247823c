"""Backups, and what can be done together with them at one instant.

The actions of a transaction are backups and what is done to bitmaps, in any order, or
one snapshot and what is done to bitmaps.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import trio

from fleecefs.bitmaps.steps import Add, Step
from fleecefs.block.epoch import OnCbwError
from fleecefs.control import bitmaps
from fleecefs.control.arguments import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    check_arguments,
    check_at_least_0,
    one_of,
    optional,
    word,
    words_of,
)
from fleecefs.control.bitmaps import absolute
from fleecefs.control.qmp import Message, QmpError
from fleecefs.inventory import Inventory
from fleecefs.jobs.options import (
    WORKERS,
    BackupOptions,
    BitmapMode,
    Format,
    OnError,
    Sync,
)
from fleecefs.jobs.registry import Jobs

# Each worker is a thread that may hang with its target.
WORKERS_MAX = 256

BACKUP = "blockdev-backup"
SNAPSHOT = "fleecefs-snapshot-create"

_ON_ERROR = words_of(OnError)
_FORMAT = words_of(Format)

BACKUP_ARGUMENTS = {
    "job-id": optional(STRING),
    "device": STRING,
    "target": STRING,
    "sync": words_of(Sync),
    "speed": optional(INTEGER),
    "on-source-error": optional(_ON_ERROR),
    "on-target-error": optional(_ON_ERROR),
    "on-cbw-error": optional(words_of(OnCbwError)),
    "cbw-timeout": optional(NUMBER),
    "max-workers": optional(INTEGER),
    "auto-finalize": optional(BOOLEAN),
    "auto-dismiss": optional(BOOLEAN),
    "bitmap": optional(STRING),
    "bitmap-mode": optional(words_of(BitmapMode)),
    "format": optional(_FORMAT),
    "backing": optional(STRING),
    "backing-format": optional(_FORMAT),
    "fallback": optional(one_of("full")),
}

SNAPSHOT_ARGUMENTS = {
    "name": STRING,
    "disks": optional(STRINGS),
    "bitmap": optional(STRING),
}

ACTION_ARGUMENTS = {"type": STRING, "data": OBJECT}


class SnapshotOptions(NamedTuple):
    """One snapshot; `bitmap` is one that begins at the instant, on each disk."""

    name: str
    disks: list[str] | None
    bitmap: str | None


async def transact(
    inventory: Inventory, jobs: Jobs, actions: Sequence[Message], *, is_grouped: bool
) -> None:
    """Do all of it at one instant, or nothing."""
    wanted = [_wanted(action, is_grouped=is_grouped) for action in actions]
    snapshots = [each for each in wanted if isinstance(each, SnapshotOptions)]
    others = [each for each in wanted if not isinstance(each, SnapshotOptions)]
    steps = [each for each in others if not isinstance(each, BackupOptions)]
    if len(steps) < len(others):
        if snapshots:
            raise QmpError("a transaction has backups or a snapshot, not both")
        await jobs.start_backups(others, grouped=is_grouped)
    elif snapshots:
        if len(snapshots) > 1:
            raise QmpError("a transaction has one snapshot: it can be of all disks")
        await trio.to_thread.run_sync(create_snapshot, inventory, snapshots[0], steps)
    elif steps:
        await trio.to_thread.run_sync(inventory.change_bitmaps, steps)


def _wanted(
    action: Message, *, is_grouped: bool
) -> BackupOptions | SnapshotOptions | Step:
    check_arguments(action, ACTION_ARGUMENTS)
    kind, data = str(action["type"]), cast("Message", action["data"])
    if is_grouped and kind != BACKUP:
        raise QmpError(
            f"Action '{kind}' does not support transaction property completion-mode ="
            " grouped"
        )
    if kind == BACKUP:
        check_arguments(data, BACKUP_ARGUMENTS)
        return backup_options(data)
    if kind == SNAPSHOT:
        check_arguments(data, SNAPSHOT_ARGUMENTS)
        return snapshot_options(data)
    if kind in bitmaps.ACTIONS:
        check_arguments(data, bitmaps.ACTIONS[kind].arguments)
        return bitmaps.ACTIONS[kind].step(**data)
    raise QmpError(
        f"Parameter 'type' does not accept value {kind!r}:"
        f" it takes {', '.join([BACKUP, SNAPSHOT, *bitmaps.ACTIONS])}"
    )


def snapshot_options(arguments: Message) -> SnapshotOptions:
    """Return what the arguments of a snapshot say, once their types were checked."""
    return SnapshotOptions(
        str(arguments["name"]),
        cast("list[str] | None", arguments.get("disks")),
        cast("str | None", arguments.get("bitmap")),
    )


def create_snapshot(
    inventory: Inventory, options: SnapshotOptions, steps: Sequence[Step] = ()
) -> None:
    """Create a snapshot as told; blocking."""
    begun: list[Step] = []
    if options.bitmap is not None:
        disks = list(inventory.disks) if options.disks is None else options.disks
        begun = [Add(disk, options.bitmap) for disk in dict.fromkeys(disks)]
    inventory.create_snapshot(options.name, options.disks, [*steps, *begun])


def backup_options(arguments: Message) -> BackupOptions:
    """Return what the arguments of a backup say, once their types were checked."""
    check_at_least_0(arguments, "speed")
    check_at_least_0(arguments, "cbw-timeout")
    workers = cast("int", arguments.get("max-workers", WORKERS))
    if not 1 <= workers <= WORKERS_MAX:
        raise QmpError(
            f"Parameter 'max-workers' expects a value from 1 to {WORKERS_MAX}"
        )
    backing = arguments.get("backing")
    device = str(arguments["device"])
    return BackupOptions(
        device=device,
        target=absolute("target", str(arguments["target"])),
        job_id=str(arguments.get("job-id", device)),
        sync=Sync(arguments["sync"]),
        speed=cast("int", arguments.get("speed", 0)),
        on_source_error=word(arguments, "on-source-error", OnError) or OnError.REPORT,
        on_target_error=word(arguments, "on-target-error", OnError) or OnError.REPORT,
        on_cbw_error=word(arguments, "on-cbw-error", OnCbwError),
        cbw_timeout=cast("float | None", arguments.get("cbw-timeout")),
        workers=workers,
        auto_finalize=bool(arguments.get("auto-finalize", True)),
        auto_dismiss=bool(arguments.get("auto-dismiss", True)),
        bitmap=cast("str | None", arguments.get("bitmap")),
        bitmap_mode=word(arguments, "bitmap-mode", BitmapMode),
        format=Format(arguments.get("format", Format.RAW.value)),
        backing=None if backing is None else absolute("backing", str(backing)),
        backing_format=word(arguments, "backing-format", Format),
        fallback="fallback" in arguments,
    )
