"""Backups: one instant of some disks, copied while the guests go on.

A backup is a private snapshot and a Copier that releases what it has copied. What a job
needs to go on after a crash of the daemon:

    STATE/jobs/KEY.json      what it was told; there from before its instant until the
                             end, and as long as it is there its snapshot is kept
    RUNTIME/jobs/KEY.json    what changes: its speed, whether it rests, how it ends

How far it is needs no record of its own: see copy.py. No job survives the host.
"""

import contextlib
import enum
import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio
from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.bitmaps.steps import Add, Fill, Freeze, Step, find_good
from fleecefs.block.bitmap import replace_file, sync_directory
from fleecefs.block.dirty import GRANULARITY, scaled
from fleecefs.block.epoch import OnCbwError
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import FlushFailed, NotFound, NotUsable, SnapshotLost, describe
from fleecefs.inventory import Inventory, PrivateOptions, PrivateSnapshot
from fleecefs.jobs.copy import Copier
from fleecefs.jobs.held import (
    CheckPlace,
    check,
    cost_of,
    end_if_broken,
    in_thread,
    surroundings_of,
)
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BackupOptions, BitmapMode, Format, OnError, Sync
from fleecefs.jobs.target import (
    Surroundings,
    Target,
    create_qcow2,
    find_backing,
    open_target,
    record_backing,
    reopen_qcow2,
    reopen_target,
)
from fleecefs.killpoint import reached
from fleecefs.units import format_size

log = logging.getLogger(__name__)

_FORMAT = "fleecefs-job"
_VERSION = 1

# With Sync.NONE a cancel is the normal end: for so long it may bring to the target what
# is preserved already. A target that hangs has no more time than that.
_LAST_SECONDS = 5.0

# What closing a target may take until it is left to itself.
_CLOSE_SECONDS = 1.0


class Record:
    """Where a job is remembered."""

    def __init__(self, inventory: Inventory, key: str) -> None:
        self.key = key
        self._told = inventory.state_path / "jobs" / f"{key}.json"
        self._now = inventory.runtime_path / "jobs" / f"{key}.json"

    def create(self, told: dict[str, Any]) -> None:
        """Remember durably what a job was told."""
        for path in self._told.parent, self._now.parent:
            path.mkdir(mode=0o700, exist_ok=True)
        document = {"format": _FORMAT, "version": _VERSION, **told}
        replace_file(self._told, (json.dumps(document, indent=1) + "\n").encode())

    def told(self) -> dict[str, Any]:
        """Return what a job was told; NotUsable if that can not be read."""
        try:
            told = json.loads(self._told.read_bytes())
        except (OSError, ValueError):
            raise NotUsable(f"{self._told}: is damaged") from None
        if not isinstance(told, dict) or told.get("format") != _FORMAT:
            raise NotUsable(f"{self._told}: is no record of a job")
        if told.get("version") != _VERSION:
            raise NotUsable(f"{self._told}: has version {told.get('version')}")
        return told

    def save(self, now: dict[str, Any]) -> None:
        """Remember what changes: on tmpfs, so it does not wait."""
        new = self._now.with_suffix(".new")
        # Without it the job goes on as it was told.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(now))
            new.replace(self._now)

    def now(self) -> dict[str, Any]:
        """Return what was saved last."""
        with contextlib.suppress(OSError, ValueError):
            now = json.loads(self._now.read_bytes())
            if isinstance(now, dict):
                return now
        return {}

    def remove(self) -> None:
        """Forget the job: it does not go on."""
        self._now.unlink(missing_ok=True)
        # It may never have been made, nor the directory.
        with contextlib.suppress(FileNotFoundError):
            self._told.unlink()
            sync_directory(self._told.parent)


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
        # The ids of those it ends with, until its transaction knows.
        self.group = [self.id]
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
            "backing": _text(self.options.backing),
            "bitmap": self.options.bitmap,
            "bitmap-mode": _value(self.options.bitmap_mode),
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


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _value(word: enum.Enum | None) -> Any:
    return None if word is None else word.value


def create_backups(
    inventory: Inventory,
    wanted: Sequence[BackupOptions | Step],
    check_place: CheckPlace = lambda path: None,
) -> list[BackupJob]:
    """Return jobs of one instant; blocking. If one is refused, nothing has changed.

    The steps are what happens to bitmaps at the same instant, in the order of all.
    `check_place` raises NotUsable for a path that leads to our own mount.
    """
    inventory.check_open()
    backups = [each for each in wanted if isinstance(each, BackupOptions)]
    for options in backups:
        check_options(options)
        inventory.find_disk(options.device)
    surroundings = surroundings_of(inventory, check_place)
    jobs: list[tuple[BackupOptions, Target, Record]] = []
    steps: list[Step] = []
    with ExitStack() as undo:
        for each in wanted:
            if not isinstance(each, BackupOptions):
                steps.append(each)
                continue
            options, fallen = _fall_back(inventory, each)
            target = _open_target(inventory, options, surroundings)
            undo.callback(target.close)
            undo.callback(target.remove)
            record = Record(inventory, uuid4().hex)
            is_increment = options.sync.is_of_bitmap and options.format is Format.RAW
            if is_increment and target.is_new and options.fallback:
                options = _as_full(options, f"target {options.target} is new")
            jobs.append((options, target, record))
            steps += fallen
            if options.bitmap is not None:
                steps.append(Freeze(options.device, options.bitmap, record.key))
        reached("job.opened")
        for options, target, record in jobs:
            undo.callback(record.remove)
            record.create(_told(options, target))
        reached("job.recorded")
        privates = inventory.create_private(
            [
                PrivateOptions(
                    options.device,
                    record.key,
                    options.on_cbw_error,
                    options.cbw_timeout,
                    has_holes=options.sync is Sync.TOP,
                )
                for options, _, record in jobs
            ],
            steps,
        )
        undo.pop_all()
    created = [
        BackupJob(inventory, private, target, options, record)
        for private, (options, target, record) in zip(privates, jobs, strict=True)
    ]
    for job in created:
        # It may have broken meanwhile: then the job tells.
        with contextlib.suppress(SnapshotLost):
            job.restrict()
        job.count_progress()
    return created


def _fall_back(
    inventory: Inventory, options: BackupOptions
) -> tuple[BackupOptions, list[Step]]:
    """Return what to do with a bitmap that can not be used, if that was told.

    All counts as dirty in it then: if the full backup fails, so does what comes next
    without one.
    """
    disk, name = options.device, options.bitmap
    if name is None or not options.fallback:
        return options, []
    try:
        find_good(inventory.bitmaps.find(disk), name)
    except NotFound as e:
        size = inventory.find_disk(disk).size
        bits = bitarray(-(-size // GRANULARITY), endian="little")
        bits.setall(1)
        return _as_full(options, str(e)), [Add(disk, name, bits=bits)]
    except NotUsable as e:
        return _as_full(options, str(e)), [Fill(disk, name)]
    return options, []


def _as_full(options: BackupOptions, reason: str) -> BackupOptions:
    """Return a full backup that takes the place of an increment."""
    mode = options.bitmap_mode
    if mode is not BitmapMode.NEVER:
        mode = BitmapMode.ON_SUCCESS
    log.warning("backup of %s is a full one: %s", options.device, reason)
    return replace(
        options, sync=Sync.FULL, bitmap_mode=mode, backing=None, fell_back=reason
    )


def _open_target(
    inventory: Inventory, options: BackupOptions, surroundings: Surroundings
) -> Target:
    size = inventory.find_disk(options.device).size
    if options.format is Format.RAW:
        return open_target(options.target, size, surroundings)
    backing = None
    if options.backing is not None:
        told = options.backing_format and options.backing_format.value
        backing = find_backing(
            options.backing, told, size, options.target, surroundings
        )
    return create_qcow2(options.target, size, surroundings, backing)


def check_options(options: BackupOptions) -> None:
    """Raise NotUsable for what makes no sense together; QEMU's rules and words."""
    if options.workers < 1:
        raise NotUsable(f"{options.workers} workers: at least one is needed")
    if options.speed < 0:
        raise NotUsable("a speed is not negative")
    if options.cbw_timeout is not None and options.cbw_timeout < 0:
        raise NotUsable("a cbw-timeout is not negative")
    _check_bitmap(options.sync, options.bitmap, options.bitmap_mode)
    if options.fallback and options.bitmap is None:
        raise NotUsable("a fallback is for a backup with a bitmap")
    if options.format is Format.RAW:
        if options.backing is not None:
            raise NotUsable("a raw target has no backing file: use format qcow2")
    elif options.sync is Sync.NONE:
        raise NotUsable("sync mode 'none' needs a raw target")
    elif options.sync is Sync.TOP and options.backing is not None:
        raise NotUsable(
            "sync mode 'top' has no backing file: what is not allocated would be seen "
            "through"
        )
    if options.backing_format is not None and options.backing is None:
        raise NotUsable("a backing format is for a backing file")


def _check_bitmap(sync: Sync, bitmap: str | None, mode: BitmapMode | None) -> None:
    if sync.is_of_bitmap and bitmap is None:
        raise NotUsable(
            f"must provide a valid bitmap name for '{sync.value}' sync mode"
        )
    if bitmap is None:
        if mode is not None:
            raise NotUsable("Cannot specify bitmap sync mode without a bitmap")
        return
    if sync is Sync.INCREMENTAL and mode not in (None, BitmapMode.ON_SUCCESS):
        raise NotUsable(
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'"
        )
    if sync is not Sync.INCREMENTAL and mode is None:
        raise NotUsable("Bitmap sync mode must be given when providing a bitmap")
    if sync is Sync.NONE:
        raise NotUsable("sync mode 'none' does not produce meaningful bitmap outputs")
    if mode is BitmapMode.NEVER and not sync.is_of_bitmap:
        raise NotUsable(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync "
            f"mode '{sync.value}'"
        )


def _told(options: BackupOptions, target: Target) -> dict[str, Any]:
    told = {
        **asdict(options),
        "target": str(options.target),
        "sync": options.sync.value,
        "on_source_error": options.on_source_error.value,
        "on_target_error": options.on_target_error.value,
        "on_cbw_error": _value(options.on_cbw_error),
        "bitmap_mode": _value(options.bitmap_mode),
        "target_format": options.format.value,
        "backing": _text(options.backing),
        "backing_format": target.backing_format,
        "target_is_new": target.is_new,
        "created": time.time(),
    }
    # Where the record says what kind of file it is.
    del told["format"]
    return {name.replace("_", "-"): value for name, value in told.items()}


def _options(told: dict[str, Any]) -> BackupOptions:
    on_cbw_error = told["on-cbw-error"]
    return BackupOptions(
        device=told["device"],
        target=Path(told["target"]),
        job_id=told["job-id"],
        sync=Sync(told["sync"]),
        speed=told["speed"],
        on_source_error=OnError(told["on-source-error"]),
        on_target_error=OnError(told["on-target-error"]),
        on_cbw_error=on_cbw_error and OnCbwError(on_cbw_error),
        cbw_timeout=told["cbw-timeout"],
        workers=told["workers"],
        auto_finalize=told["auto-finalize"],
        auto_dismiss=told["auto-dismiss"],
        bitmap=told["bitmap"],
        bitmap_mode=told["bitmap-mode"] and BitmapMode(told["bitmap-mode"]),
        format=Format(told["target-format"]),
        backing=told["backing"] and Path(told["backing"]),
        backing_format=told["backing-format"] and Format(told["backing-format"]),
        fallback=told["fallback"],
        fell_back=told["fell-back"],
    )


def resume_jobs(inventory: Inventory) -> list[list[BackupJob]]:
    """Return the jobs of the daemon before, in groups that end together; blocking."""
    groups: dict[tuple[str, ...], list[BackupJob]] = {}
    for path in (inventory.state_path / "jobs").glob("*.json.new"):
        # A crash has cut it short.
        path.unlink()
    for path in (inventory.state_path / "jobs").glob("*.json"):
        record = Record(inventory, path.stem)
        try:
            job = _resume(inventory, record)
        except (NotUsable, KeyError, ValueError, TypeError) as e:
            log.error("job %s does not go on: %s", path.stem, e)
            job = None
        if job is None:
            private = inventory.private.get(record.key)
            record.remove()
            if private is not None:
                inventory.delete_private(private)
            continue
        groups.setdefault(tuple(job.group), []).append(job)
    for jobs in groups.values():
        jobs.sort(key=lambda job: job.created)
        # All are told so before the first commits: if one was not, none has.
        is_committing = all(job.is_committing for job in jobs)
        for job in jobs:
            job.is_committing = is_committing
    return sorted(groups.values(), key=lambda jobs: jobs[0].created)


def _reopen_target(options: BackupOptions, size: int, *, is_new: bool) -> Target:
    if options.format is Format.RAW:
        return reopen_target(options.target, size, is_new=is_new)
    backing = None
    if options.backing is not None:
        assert options.backing_format is not None
        backing = record_backing(
            options.backing, options.backing_format.value, options.target
        )
    return reopen_qcow2(options.target, size, backing)


def _resume(inventory: Inventory, record: Record) -> BackupJob | None:
    """Return a job that goes on, or None if it never began."""
    told = record.told()
    options = _options(told)
    private = inventory.private.get(record.key)
    is_new = bool(told["target-is-new"])
    error = None
    target = None
    try:
        size = inventory.find_disk(options.device).size
        target = _reopen_target(options, size, is_new=is_new)
    except OSError as e:
        error = e
    if private is None:
        if target is not None:
            if not target.allocated():
                target.remove()
            target.close()
        return None
    job = BackupJob(inventory, private, target, options, record)
    job.created = float(told["created"])
    job.target_error = error
    if target is not None:
        # It may have been killed before it was.
        with contextlib.suppress(SnapshotLost):
            job.restrict()
    job.go_on(record.now())
    if job.is_good and error is None:
        done = format_size(job.progress.current)
        log.info("job %s goes on, with %s copied", job.id, done)
    return job
