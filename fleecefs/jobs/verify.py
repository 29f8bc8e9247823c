"""Verifying a backup: is it like the disk of now, but for what a dirty bitmap has?

A proof that the bitmap is right: what was written since the backup, and nothing but
that, may differ. The disk and the bitmap are looked at at one instant, so the guest may
go on.

A job that verifies needs no record: it does not go on in the next daemon, which drops
its snapshot. And it never costs the guest an error, whatever the mount's policy is.
"""

from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import trio

from fleecefs.bitmaps.steps import Look
from fleecefs.block.epoch import OnCbwError
from fleecefs.errors import Differs, NotUsable
from fleecefs.inventory import Inventory, PrivateOptions, PrivateSnapshot
from fleecefs.jobs.compare import Comparer
from fleecefs.jobs.differences import Differences
from fleecefs.jobs.held import (
    CheckPlace,
    check,
    cost_of,
    end_if_broken,
    in_thread,
    surroundings_of,
)
from fleecefs.jobs.job import Job
from fleecefs.jobs.openbackup import OpenBackup, open_backup
from fleecefs.jobs.options import VerifyOptions
from fleecefs.units import format_size

# What closing a backup may take until it is left to itself.
_CLOSE_SECONDS = 1.0


class VerifyJob(Job):
    """Compares one disk, as it was at the instant, with a backup; `look` has the bits.

    It fails if they differ where they should not.
    """

    type = "verify"
    has_done = "compared"
    outlives_daemon = False

    def __init__(
        self,
        inventory: Inventory,
        private: PrivateSnapshot,
        backup: OpenBackup,
        options: VerifyOptions,
        look: Look | None,
    ) -> None:
        super().__init__(
            options.job_id,
            options.device,
            speed=options.speed,
            auto_dismiss=options.auto_dismiss,
        )
        self.options = options
        self.progress.remaining = private.snapshot.size
        self._inventory = inventory
        # None once it has been let go of.
        self._private: PrivateSnapshot | None = private
        self._backup = backup
        self._format = backup.format.value
        self._cost = cost_of(private)
        self._dirty: int | None = None
        self._differences = Differences()
        if look is not None:
            self._dirty = look.bits.count() * look.granularity
            self._differences = Differences(look.bits, look.granularity)
        self._has_compared = False

    async def work(self) -> None:
        private = self._private
        assert private is not None
        end_if_broken(self, private)
        await Comparer(self, private.snapshot, self._backup, self._differences).run()
        check(private)
        self._has_compared = True
        if self._differences.count:
            raise Differs(self._describe_failure())

    def _describe_failure(self) -> str:
        found, bitmap = self._differences, self.options.bitmap
        extents = "1 extent" if found.count == 1 else f"{found.count} extents"
        text = f"differs from {self.options.target} in {extents}"
        text += f", {format_size(found.outside)}"
        return text if bitmap is None else f"{text}, outside bitmap '{bitmap}'"

    async def clean(self) -> None:
        private = self._private
        assert private is not None
        self._cost = cost_of(private)
        self._private = None
        private.broke = lambda reason: None
        await trio.to_thread.run_sync(self._inventory.delete_private, private)
        # Of those that are in it, the last one closes it.
        with trio.move_on_after(_CLOSE_SECONDS):
            await in_thread(self._backup.users, self._backup.users.close)

    def details(self) -> dict[str, Any]:
        found, is_known = self._differences, self._has_compared
        return {
            "target": str(self.options.target),
            "sync": None,
            "format": self._format,
            "backing": None,
            "bitmap": self.options.bitmap,
            "bitmap-mode": None,
            "fell-back": None,
            "cost": self._cost if self._private is None else cost_of(self._private),
            "differs": found.outside if is_known else None,
            "differs-dirty": found.within if is_known else None,
            "dirty": self._dirty,
            "extent-count": found.count if is_known else None,
            "extents": found.extents if is_known else [],
        }


def create_verify(
    inventory: Inventory,
    options: VerifyOptions,
    check_place: CheckPlace = lambda path: None,
) -> VerifyJob:
    """Return a job of this instant; blocking. If it is refused, nothing has changed.

    `check_place` raises NotUsable for a path that leads to our own mount.
    """
    inventory.check_open()
    if options.speed < 0:
        raise NotUsable("a speed is not negative")
    disk = inventory.find_disk(options.device)
    surroundings = surroundings_of(inventory, check_place)
    look = None
    if options.bitmap is not None:
        look = Look(options.device, options.bitmap)
    with ExitStack() as undo:
        backup = open_backup(options.target, disk.size, options.format, surroundings)
        undo.callback(backup.users.close)
        wanted = PrivateOptions(
            options.device, uuid4().hex, on_cbw_error=OnCbwError.BREAK_SNAPSHOT
        )
        steps = [] if look is None else [look]
        (private,) = inventory.create_private([wanted], steps)
        undo.pop_all()
    return VerifyJob(inventory, private, backup, options, look)
