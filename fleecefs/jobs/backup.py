"""Backups: one instant of some disks, copied while the guests go on.

A backup is a private snapshot and a Copier that releases what it has copied. What a job
needs to go on after a crash of the daemon:

    STATE/jobs/KEY.json      what it was told; there from before its instant until the
                             end, and as long as it is there its snapshot is kept
    RUNTIME/jobs/KEY.json    what changes: its speed, whether it rests, how it ends

How far it is needs no record of its own: see copy.py. No job survives the host.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio

from fleecefs.block.bitmap import replace_file, sync_directory
from fleecefs.block.epoch import LONGEST, WAITS, OnCbwError
from fleecefs.errors import NotUsable, SnapshotLost, describe
from fleecefs.inventory import Inventory, PrivateOptions, PrivateSnapshot
from fleecefs.jobs.copy import Copier
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BackupOptions, OnError, Sync
from fleecefs.jobs.target import Surroundings, Target, open_target, reopen_target
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

CheckPlace = Callable[[str], None]


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
        self._cost = _cost_of(private)
        self._count_progress(private)

    def _count_progress(self, private: PrivateSnapshot) -> None:
        snapshot = private.snapshot
        denied = snapshot.epoch.denied
        if snapshot.lost is not None or denied is None:
            return
        done = min(denied.count() * snapshot.cluster_size, snapshot.size)
        self.progress.current = done
        if self.options.sync is not Sync.NONE:
            self.progress.remaining = snapshot.size - done

    # -- its life

    async def work(self) -> None:
        private, target = self._private, self._target
        assert private is not None
        token = trio.lowlevel.current_trio_token()
        private.broke = lambda reason: self._tell_broke(token, reason)
        _check(private)
        assert target is not None
        if self.options.sync is Sync.FULL and not self.restarts:
            await self._empty(target)
        await self._new_copier(private, target).run()
        _check(private)
        reached("job.copied")
        # What a flush could not write is released already: there is no second try.
        with self.in_flight():
            await _in_thread(target, target.flush)
        reached("job.flushed")

    async def _empty(self, target: Target) -> None:
        while True:
            await self.turn()
            try:
                with self.in_flight():
                    return await _in_thread(target, target.empty)
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

    def _tell_broke(self, token: trio.lowlevel.TrioToken, reason: str) -> None:
        """End at once: nothing that is copied from now on is of the instant."""
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(self.fail, _broken(reason))

    async def abort(self) -> None:
        private, target = self._private, self._target
        if private is None or target is None:
            return
        if self.options.sync is not Sync.NONE:
            # A part of a backup is none: nobody shall take it for one.
            with trio.move_on_after(_CLOSE_SECONDS):
                await _in_thread(target, target.remove)
        elif self.is_cancelled and private.snapshot.lost is None:
            await self._copy_last(private, target)

    async def _copy_last(self, private: PrivateSnapshot, target: Target) -> None:
        """Bring to the target what is preserved by now, if it does not take long."""
        copier = self._new_copier(private, target, is_last=True)
        with trio.move_on_after(_LAST_SECONDS):
            try:
                await copier.run()
                await _in_thread(target, target.flush)
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
                await _in_thread(target, target.close)

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
            }
        )

    # -- what there is to know

    def details(self) -> dict[str, Any]:
        return {
            "target": str(self.options.target),
            "sync": self.options.sync.value,
            "cost": self._cost_now(),
        }

    def _cost_now(self) -> dict[str, Any]:
        return self._cost if self._private is None else _cost_of(self._private)

    # -- going on

    def go_on(self, now: dict[str, Any]) -> None:
        """Be as the job of the daemon before was, before anything runs."""
        self.restarts = int(now.get("restarts", 0)) + 1
        self.group = [str(job_id) for job_id in now.get("group", self.group)]
        self.limit.speed = int(now.get("speed", self.limit.speed))
        self.io_status = str(now.get("io-status", self.io_status))
        if now.get("error"):
            # It was about to end.
            self.error = str(now["error"])
            self.is_cancelled = bool(now.get("cancelled"))
        elif now.get("user-paused"):
            self.pause()
        self.save()


def _cost_of(private: PrivateSnapshot) -> dict[str, Any]:
    """Return what a job costs the guest (control/results.py, Cost)."""
    counters, budgets = private.snapshot.epoch.counters, private.budgets
    return {
        "waited": int(counters[WAITS]),
        "longest-wait": counters[LONGEST] / 1e9,
        "ram": budgets.ram.used,
        "ram-peak": budgets.ram.peak,
        "disk": budgets.disk.used,
        "disk-peak": budgets.disk.peak,
    }


def _check(private: PrivateSnapshot) -> None:
    if private.snapshot.lost is not None:
        raise _broken(private.snapshot.lost)


def _broken(reason: str) -> SnapshotLost:
    return SnapshotLost(f"its snapshot is broken: {reason}")


async def _in_thread(target: Target, function: Callable[[], None]) -> None:
    """Run what may hang in the target, in a thread that can be abandoned."""

    def run() -> None:
        with target.used():
            function()

    limiter = trio.CapacityLimiter(1)
    await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)


def create_backups(
    inventory: Inventory,
    wanted: Sequence[BackupOptions],
    check_place: CheckPlace = lambda path: None,
) -> list[BackupJob]:
    """Return jobs of one instant; blocking. If one is refused, nothing has changed.

    `check_place` raises NotUsable for a path that leads to our own mount.
    """
    inventory.check_open()
    for options in wanted:
        _check_options(options)
        inventory.find_disk(options.device)
    surroundings = _surroundings(inventory, check_place)
    records = [Record(inventory, uuid4().hex) for _ in wanted]
    with ExitStack() as undo:
        targets = []
        for options in wanted:
            disk = inventory.find_disk(options.device)
            target = open_target(options.target, disk.size, surroundings)
            undo.callback(target.close)
            undo.callback(target.remove)
            targets.append(target)
        reached("job.opened")
        for options, target, record in zip(wanted, targets, records, strict=True):
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
                for options, record in zip(wanted, records, strict=True)
            ]
        )
        undo.pop_all()
    return [
        BackupJob(inventory, *parts)
        for parts in zip(privates, targets, wanted, records, strict=True)
    ]


def _check_options(options: BackupOptions) -> None:
    if options.workers < 1:
        raise NotUsable(f"{options.workers} workers: at least one is needed")
    if options.speed < 0:
        raise NotUsable("a speed is not negative")
    if options.cbw_timeout is not None and options.cbw_timeout < 0:
        raise NotUsable("a cbw-timeout is not negative")


def _surroundings(inventory: Inventory, check_place: CheckPlace) -> Surroundings:
    sources = {
        name: inventory.source_status(disk) for name, disk in inventory.disks.items()
    }
    return Surroundings(sources, inventory.own_places(), check_place)


def _told(options: BackupOptions, target: Target) -> dict[str, Any]:
    told = {
        **asdict(options),
        "target": str(options.target),
        "sync": options.sync.value,
        "on_source_error": options.on_source_error.value,
        "on_target_error": options.on_target_error.value,
        "on_cbw_error": options.on_cbw_error and options.on_cbw_error.value,
        "target_is_new": target.is_new,
        "created": time.time(),
    }
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
    )


def resume_jobs(inventory: Inventory) -> list[list[BackupJob]]:
    """Return the jobs of the daemon before, in groups that end together; blocking."""
    groups: dict[tuple[str, ...], list[BackupJob]] = {}
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
    return sorted(groups.values(), key=lambda jobs: jobs[0].created)


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
        target = reopen_target(options.target, size, is_new=is_new)
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
    job.go_on(record.now())
    if error is not None:
        job.fail(error)
    if job.is_good:
        done = format_size(job.progress.current)
        log.info("job %s goes on, with %s copied", job.id, done)
    return job
