"""Backups: one instant of some disks, copied while the guests go on.

A backup is a private snapshot and a Copier that releases what it has copied. If a dirty
bitmap belongs to it, that begins anew at the instant; how the job ends decides whether
what it had until then is forgotten.
"""

import logging
from typing import Any

import trio
from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.block.dirty import scaled
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import FlushFailed, SnapshotLost, describe
from fleecefs.inventory import Inventory, PrivateSnapshot
from fleecefs.jobs.copy import Copier
from fleecefs.jobs.held import check, cost_of, end_if_broken, in_thread
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BackupOptions, BitmapMode, Sync
from fleecefs.jobs.record import Record, text_of, value_of
from fleecefs.jobs.target import Target
from fleecefs.killpoint import reached

log = logging.getLogger(__name__)

# With Sync.NONE a cancel is the normal end: for so long it may bring to the target what
# is preserved already. A target that hangs has no more time than that.
_LAST_SECONDS = 5.0

# What closing a target may take until it is left to itself.
_CLOSE_SECONDS = 1.0


class BackupJob(Job):
    """Copies one disk, as it was at the instant, to a target."""

    type = "backup"

    def __init__(
        self,
        inventory: Inventory,
        private: PrivateSnapshot,
        target: Target | None,
        options: BackupOptions,
        record: Record,
    ) -> None:
        super().__init__(
            options.job_id,
            options.device,
            speed=options.speed,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        self.options = options
        self._inventory = inventory
        self._record = record
        self._has_cleaned = False
        # None once it has been let go of.
        self._private: PrivateSnapshot | None = private
        self._target = target
        # Why there is none, for a job that goes on.
        self.target_error: OSError | None = None
        self._cost = cost_of(private)
        # What there was to copy when it began.
        self._total = private.snapshot.size
        # Some of what was written may be lost, and the kernel tells that only once.
        self._has_failed_flush = False

    def restrict(self) -> None:
        """Copy only what is dirty in its bitmap; blocking."""
        private = self._private
        assert private is not None
        found = self._inventory.bitmaps.find_frozen(self._record.key)
        if not self.options.sync.is_of_bitmap or found is None:
            return
        if private.snapshot.lost is not None:
            return
        bitmap = found[1].bitmap
        assert bitmap.frozen is not None
        assert self._target is not None
        wanted = _wanted(
            bitmap.frozen, bitmap.granularity, private.snapshot, self._target.unit
        )
        try:
            private.snapshot.restrict(wanted)
        except SnapshotLost:
            raise
        except OSError:
            # Space that could not be given back comes back with the snapshot.
            pass
        self._total = _bytes_left(private.snapshot)

    def count_progress(self) -> None:
        """Find out how much there is to copy, and has been copied already."""
        private = self._private
        assert private is not None
        if private.snapshot.lost is not None:
            return
        left = _bytes_left(private.snapshot)
        self.progress.current = self._total - left
        if self.options.sync is not Sync.NONE:
            self.progress.remaining = left

    # -- its life

    async def work(self) -> None:
        if self.is_committing:
            # The daemon before has done all but to commit.
            return
        private, target = self._private, self._target
        assert private is not None
        if self.target_error is not None:
            raise self.target_error
        end_if_broken(self, private)
        assert target is not None
        # With a bitmap what is there may count, if this fails: all that is clean in it.
        has_bitmap = self.options.bitmap is not None
        if self.options.sync is Sync.FULL and not has_bitmap and not self.restarts:
            await self._empty(target)
        await self._new_copier(private, target).run()
        check(private)
        reached("job.copied")
        # What a flush could not write is released already: there is no second try.
        with self.in_flight():
            await self._flush(target)
        reached("job.flushed")

    async def _flush(self, target: Target) -> None:
        """Make the target durable; once that has failed, or was left, it never is."""
        if self._has_failed_flush:
            raise FlushFailed("an earlier flush of the target failed")
        self._has_failed_flush = True
        try:
            await in_thread(target.users, target.flush)
        except OSError:
            self.save()
            raise
        self._has_failed_flush = False

    async def _empty(self, target: Target) -> None:
        while True:
            await self.turn()
            try:
                with self.in_flight():
                    return await in_thread(target.users, target.empty)
            except OSError as e:
                await self.on_error(e, is_read=False)

    def _new_copier(
        self, private: PrivateSnapshot, target: Target, *, is_last: bool = False
    ) -> Copier:
        return Copier(
            self,
            private.snapshot,
            private.disk.history,
            target,
            sync=self.options.sync,
            workers=self.options.workers,
            is_urgent=self._is_ram_filling,
            is_last=is_last,
        )

    def _is_ram_filling(self) -> bool:
        ram = self._inventory.budgets.ram
        return ram.limit is not None and 2 * ram.used >= ram.limit

    async def prepare(self) -> None:
        # Who goes on to commit has done so.
        if not self.is_committing:
            await self._settle_bitmap()

    async def _settle_bitmap(self) -> None:
        if self.options.bitmap_mode is not BitmapMode.NEVER:
            await trio.to_thread.run_sync(
                self._inventory.settle_bitmap, self._record.key, abandon_on_cancel=True
            )

    async def commit(self) -> None:
        if self.options.bitmap is None:
            return
        has_begun_anew = self.options.bitmap_mode is not BitmapMode.NEVER
        left = bitarray(endian="little") if has_begun_anew else None
        await self._end_bitmap(left)
        reached("job.committed")

    async def abort(self) -> None:
        private, target, options = self._private, self._target, self.options
        assert private is not None
        if options.sync is Sync.NONE:
            if target is not None and self.is_cancelled and not private.snapshot.lost:
                await self._copy_last(private, target)
            return
        is_always = options.bitmap_mode is BitmapMode.ALWAYS
        if is_always and await self._keep_part(private, target):
            return
        is_never = options.bitmap_mode is BitmapMode.NEVER
        if (options.fell_back and not is_never) or (
            is_always and not options.sync.is_of_bitmap
        ):
            # What was clean in it says nothing about this target.
            await self._end_bitmap(_all_clusters(private.snapshot))
        if target is not None:
            # A part of a backup is none: nobody shall take it for one.
            with trio.move_on_after(_CLOSE_SECONDS):
                await in_thread(target.users, target.remove)

    async def _keep_part(self, private: PrivateSnapshot, target: Target | None) -> bool:
        """Let the next job copy the rest only, if what is copied is durable."""
        if target is None or private.snapshot.epoch.denied is None:
            # Out of reach, or nobody knows any more what was copied.
            return False
        left = _clusters_left(private.snapshot)
        reason = "the target does not answer"
        with trio.move_on_after(_LAST_SECONDS):
            try:
                await self._flush(target)
                await self._settle_bitmap()
                await self._end_bitmap(left)
                return True
            except OSError as e:
                reason = describe(e)
        log.warning("job %s: nothing counts as copied: %s", self.id, reason)
        return False

    async def _end_bitmap(self, left: bitarray | None) -> None:
        await trio.to_thread.run_sync(
            self._inventory.end_bitmap, self._record.key, left
        )

    async def _copy_last(self, private: PrivateSnapshot, target: Target) -> None:
        """Bring to the target what is preserved by now, if it does not take long."""
        copier = self._new_copier(private, target, is_last=True)
        with trio.move_on_after(_LAST_SECONDS):
            try:
                await copier.run()
                await in_thread(target.users, target.flush)
                return
            except OSError as e:
                log.warning("job %s: the last of it failed: %s", self.id, describe(e))
                return
        log.warning(
            "job %s: not all that was overwritten has come to the target in %g s",
            self.id,
            _LAST_SECONDS,
        )

    async def clean(self) -> None:
        if self._has_cleaned:
            return
        self._has_cleaned = True
        private, target = self._private, self._target
        assert private is not None
        self._cost = self._cost_now()
        self._private = self._target = None
        private.broke = lambda reason: None
        # First: without it the snapshot is an orphan, whatever happens next.
        await trio.to_thread.run_sync(self._record.remove)
        reached("job.forgotten")
        await trio.to_thread.run_sync(self._inventory.delete_private, private)
        if target is not None:
            with trio.move_on_after(_CLOSE_SECONDS):
                await in_thread(target.users, target.close)

    def save(self) -> None:
        if self._has_cleaned:
            return
        if self.transaction is not None:
            self.group = [job.id for job in self.transaction.jobs]
        self._record.save(
            {
                "speed": self.limit.speed,
                "user-paused": self.is_user_paused,
                "restarts": self.restarts,
                "error": self.error,
                "cancelled": self.is_cancelled,
                "group": self.group,
                "io-status": self.io_status,
                "total": self._total,
                "committing": self.is_committing,
                "flush-failed": self._has_failed_flush and self.error is not None,
            }
        )

    # -- what there is to know

    def details(self) -> dict[str, Any]:
        return {
            "target": str(self.options.target),
            "sync": self.options.sync.value,
            "format": self.options.format.value,
            "backing": text_of(self.options.backing),
            "bitmap": self.options.bitmap,
            "bitmap-mode": value_of(self.options.bitmap_mode),
            "fell-back": self.options.fell_back,
            "cost": self._cost_now(),
        }

    def _cost_now(self) -> dict[str, Any]:
        return self._cost if self._private is None else cost_of(self._private)

    # -- going on

    def go_on(self, now: dict[str, Any]) -> None:
        """Be as the job of the daemon before was, before anything runs."""
        self.restarts = int(now.get("restarts", 0)) + 1
        self.group = [str(job_id) for job_id in now.get("group", self.group)]
        self.limit.speed = int(now.get("speed", self.limit.speed))
        self.io_status = str(now.get("io-status", self.io_status))
        self._total = int(now.get("total", self._total))
        self.is_committing = bool(now.get("committing"))
        self._has_failed_flush = bool(now.get("flush-failed"))
        self.count_progress()
        if now.get("error"):
            # It was about to end.
            self.error = str(now["error"])
            self.is_cancelled = bool(now.get("cancelled"))
        elif now.get("user-paused"):
            self.pause()
        self.save()


def _clusters_left(snapshot: Snapshot) -> bitarray:
    """Return the clusters that were not released, by their bits."""
    denied = snapshot.epoch.denied
    assert denied is not None
    left = ~denied
    left[-(-snapshot.size // snapshot.cluster_size) :] = 0
    return left


def _all_clusters(snapshot: Snapshot) -> bitarray:
    """Return the bits of all clusters, as long as bits in use are."""
    count = -(-snapshot.size // snapshot.cluster_size)
    clusters = zeros(-(-count // 64) * 64, endian="little")
    clusters[:count] = 1
    return clusters


def _bytes_left(snapshot: Snapshot) -> int:
    if snapshot.epoch.denied is None:
        return snapshot.size
    left = _clusters_left(snapshot)
    length = left.count() * snapshot.cluster_size
    last = (snapshot.size - 1) // snapshot.cluster_size
    if left[last]:
        length -= -snapshot.size % snapshot.cluster_size
    return length


def _wanted(
    frozen: bitarray, granularity: int, snapshot: Snapshot, unit: int
) -> bitarray:
    """Return the clusters that have something dirty, in whole units of the target."""
    denied = snapshot.epoch.denied
    assert denied is not None
    size = snapshot.cluster_size
    wanted = zeros(len(denied), endian="little")
    step = max(unit, size)
    for first, stop in scaled(frozen, granularity, step):
        wanted[first * step // size : stop * step // size] = 1
    return wanted
