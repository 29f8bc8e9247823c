"""How backups begin: new ones, all of one instant, and those that go on."""

import contextlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from uuid import uuid4

from bitarray import bitarray

from fleecefs.bitmaps.steps import Add, Fill, Freeze, Step, find_good
from fleecefs.block.dirty import GRANULARITY
from fleecefs.errors import NotFound, NotUsable, SnapshotLost
from fleecefs.inventory import Inventory, PrivateOptions
from fleecefs.jobs.backup import BackupJob
from fleecefs.jobs.held import CheckPlace, surroundings_of
from fleecefs.jobs.options import (
    BackupOptions,
    BitmapMode,
    Format,
    Sync,
    check_options,
)
from fleecefs.jobs.record import Record, options_of, told_of
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
                options = _as_full(options, f"target {options.target} was new")
            jobs.append((options, target, record))
            steps += fallen
            if options.bitmap is not None:
                steps.append(Freeze(options.device, options.bitmap, record.key))
        reached("job.opened")
        for options, target, record in jobs:
            undo.callback(record.remove)
            record.create(told_of(options, target))
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
    bitmaps = inventory.bitmaps.find(disk)
    try:
        find_good(bitmaps, name)
    except NotFound:
        bits = bitarray(-(-bitmaps.disk.size // GRANULARITY), endian="little")
        bits.setall(1)
        reason = f"there was no bitmap {name!r}"
        return _as_full(options, reason), [Add(disk, name, bits=bits)]
    except NotUsable:
        lost = bitmaps.held[name].bitmap.inconsistent
        reason = f"bitmap {name!r} was inconsistent: {lost}"
        return _as_full(options, reason), [Fill(disk, name)]
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


def _reopen_target(
    options: BackupOptions, size: int, *, is_new: bool, identity: str
) -> Target:
    if options.format is Format.RAW:
        return reopen_target(options.target, size, is_new=is_new, identity=identity)
    backing = None
    if options.backing is not None:
        assert options.backing_format is not None
        backing = record_backing(
            options.backing, options.backing_format.value, options.target
        )
    return reopen_qcow2(options.target, size, backing)


def resume_backup(inventory: Inventory, record: Record) -> BackupJob | None:
    """Return a backup that goes on, or None if it never began."""
    told = record.told()
    options = options_of(told)
    private = inventory.private.get(record.key)
    is_new = bool(told["target-is-new"])
    error = None
    target = None
    try:
        size = inventory.find_disk(options.device).size
        identity = str(told["target-identity"])
        target = _reopen_target(options, size, is_new=is_new, identity=identity)
    except OSError as e:
        error = e
    if private is None:
        if target is not None:
            target.remove_unused()
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
