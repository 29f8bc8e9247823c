"""How mirrors begin: new ones, and those that go on."""

import enum
import logging
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from fleecefs.inventory import Inventory
from fleecefs.jobs.held import CheckPlace, surroundings_of
from fleecefs.jobs.mirror import MirrorJob
from fleecefs.jobs.options import (
    CopyMode,
    MirrorOptions,
    OnError,
    Sync,
    check_mirror,
)
from fleecefs.jobs.record import Record
from fleecefs.jobs.target import Target, open_target, reopen_target
from fleecefs.killpoint import reached

log = logging.getLogger(__name__)


def create_mirror(
    inventory: Inventory,
    options: MirrorOptions,
    check_place: CheckPlace = lambda path: None,
) -> MirrorJob:
    """Return a job that mirrors from now on; blocking. If refused, nothing has changed.

    `check_place` raises NotUsable for a path that leads to our own mount.
    """
    inventory.check_open()
    check_mirror(options)
    disk = inventory.find_disk(options.device)
    surroundings = surroundings_of(inventory, check_place)
    with ExitStack() as undo:
        target = open_target(options.target, disk.size, surroundings)
        undo.callback(target.close)
        undo.callback(target.remove)
        record = Record(inventory, uuid4().hex)
        undo.callback(record.remove)
        record.create(_told_of(options, target))
        is_zero = target.is_blank or options.target_is_zero
        # Where the source has holes, too, if the target may have something else there.
        lacks_all = options.sync is Sync.FULL or (
            options.sync is Sync.TOP and not is_zero
        )
        mirror = inventory.create_mirror(
            options.device, record.key, options.granularity, lacks_all=lacks_all
        )
        if is_zero:
            mirror.mirror.mark_zero()
        reached("mirror.created")
        undo.pop_all()
    has_begun = lacks_all or options.sync is Sync.NONE
    job = MirrorJob(inventory, mirror, target, options, record, has_begun=has_begun)
    job.count_progress()
    return job


def resume_mirror(inventory: Inventory, record: Record) -> MirrorJob | None:
    """Return a mirror that goes on, or None if it never began.

    One that the daemon before has completed has only to say so.
    """
    told = record.told()
    options = _options_of(told)
    mirror = inventory.mirrors.get(record.key)
    has_moved = mirror is None and inventory.lives_on(options.device, options.target)
    target, error = None, None
    if not has_moved:
        try:
            size = inventory.find_disk(options.device).size
            is_new = bool(told["target-is-new"])
            identity = str(told["target-identity"])
            target = reopen_target(
                options.target, size, is_new=is_new, identity=identity
            )
        except OSError as e:
            error = e
        if mirror is None:
            log.info("job %s ended with the host, or never began", options.job_id)
            if target is not None:
                # What it has made is no copy.
                target.remove()
                target.close()
            return None
    has_begun = options.sync is not Sync.TOP
    job = MirrorJob(inventory, mirror, target, options, record, has_begun=has_begun)
    job.created = float(told["created"])
    job.target_error = error
    job.go_on(record.now())
    return job


def _told_of(options: MirrorOptions, target: Target) -> dict[str, Any]:
    """Return what a job was told, for its record."""
    told = {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in asdict(options).items()
    }
    told |= {
        "type": MirrorJob.type,
        "target": str(options.target),
        "target_is_new": target.is_new,
        "target_identity": target.identity,
        "created": time.time(),
    }
    return {name.replace("_", "-"): value for name, value in told.items()}


def _options_of(told: dict[str, Any]) -> MirrorOptions:
    """Return what a record says that a job was told; KeyError, ValueError if none."""
    return MirrorOptions(
        device=told["device"],
        target=Path(told["target"]),
        job_id=told["job-id"],
        sync=Sync(told["sync"]),
        speed=told["speed"],
        granularity=told["granularity"],
        buf_size=told["buf-size"],
        on_source_error=OnError(told["on-source-error"]),
        on_target_error=OnError(told["on-target-error"]),
        copy_mode=CopyMode(told["copy-mode"]),
        is_auto=told["is-auto"],
        target_is_zero=told["target-is-zero"],
        workers=told["workers"],
        auto_finalize=told["auto-finalize"],
        auto_dismiss=told["auto-dismiss"],
    )
