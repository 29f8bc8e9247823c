"""What is wrong with a state directory that is not in use: `fleecefs check`.

Repaired is only what is safe: files of epochs that no state knows are removed. All that
concerns a snapshot's content is decided by the next mount, which breaks it or not.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from fleecefs.block.bitmap import Owner, read_saved
from fleecefs.errors import NotFound, describe
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.state import runtime
from fleecefs.state.directory import (
    BitmapRecord,
    DiskRecord,
    EpochRecord,
    State,
    StateDirectory,
)
from fleecefs.state.preserved_log import read_log


class Finding(NamedTuple):
    """One thing that was found, and whether `check --repair` can mend it."""

    what: str
    problem: str
    can_repair: bool
    repaired: bool = False


def check(path: Path, *, repair: bool) -> list[Finding]:
    """Return what is wrong with a state directory; nothing else is changed.

    Raises NotFound if there is none, Busy if it is in use, NotUsable if state.json
    can not be read.
    """
    if not (path / "state.json").exists():
        raise NotFound(f"no state in {path}")
    directory = StateDirectory.open(path)
    try:
        state = directory.load()
        assert state is not None
        return list(_check(path, state, repair=repair))
    finally:
        directory.close()


def _check(path: Path, state: State, *, repair: bool) -> Iterator[Finding]:
    is_same_boot = state.boot_id == runtime.boot_id()
    if not state.is_clean:
        crashed = "the daemon and its keeper" if is_same_boot else "the host"
        yield Finding(str(path), f"not unmounted cleanly: {crashed} crashed", False)
    for snapshot in state.snapshots:
        for file in snapshot.files:
            if file.lost is not None:
                name = f"snapshot {snapshot.name} of {file.disk}"
                yield Finding(name, f"is broken: {file.lost}", False)
    for disk in state.disks:
        if not os.path.exists(disk.source):
            yield Finding(f"disk {disk.name}", f"{disk.source} is missing", False)
        for epoch in disk.epochs:
            yield from _check_epoch(path, state, disk, epoch)
        for bitmap in disk.bitmaps:
            if bitmap.persistent:
                yield from _check_bitmap(path, state, disk, bitmap)
    yield from _check_orphans(path, state, repair=repair)


def _check_epoch(
    path: Path, state: State, disk: DiskRecord, epoch: EpochRecord
) -> Iterator[Finding]:
    what = f"epoch {epoch.number} of {disk.name}"
    store = path / epoch.store / "store.raw"
    if not store.exists():
        yield Finding(what, f"{store} is missing", False)
    elif store.stat().st_size != disk.size:
        yield Finding(what, f"{store} has not the size of the disk", False)
    place = path / "disks" / disk.name / "epochs" / f"{epoch.number:04}"
    count = -(-disk.size // disk.cluster_size)
    owner = Owner(UUID(disk.id), epoch.number, count)
    # In use, or after a crash of the daemon, those on tmpfs count.
    saved = ["preserved.bits", "disk.bits"] if state.is_clean else []
    if state.is_clean and (place / "denied.bits").exists():
        saved.append("denied.bits")
    for name in saved:
        yield from _check_file(what, partial(read_saved, place / name, owner))
    if epoch.durability == "host":
        log = place / "preserved.log"
        yield from _check_file(what, lambda: list(read_log(log, owner)))


def _check_file(what: str, read: Callable[[], object]) -> Iterator[Finding]:
    try:
        read()
    except FileNotFoundError as e:
        yield Finding(what, f"{e.filename} is missing", False)
    except OSError as e:
        yield Finding(what, describe(e), False)


def _check_bitmap(
    path: Path, state: State, disk: DiskRecord, bitmap: BitmapRecord
) -> Iterator[Finding]:
    what = f"bitmap {bitmap.name} of {disk.name}"
    if bitmap.inconsistent is not None:
        yield Finding(what, f"is inconsistent: {bitmap.inconsistent}", False)
        return
    place = path / bitmap.container
    try:
        with open(place, "rb") as opened:
            file = DescriptorFile(opened.fileno(), str(place))
            contents = read_contents(file)
            entry = contents.entries.get(bitmap.name)
            if entry is None:
                yield Finding(what, f"is not in {place}", False)
            elif state.is_clean and entry.is_in_use:
                yield Finding(what, f"was left in use in {place}", False)
            else:
                contents.bits(file, bitmap.name)
    except FileNotFoundError:
        yield Finding(what, f"{place} is missing", False)
    except OSError as e:
        yield Finding(what, describe(e), False)


def _check_orphans(path: Path, state: State, *, repair: bool) -> Iterator[Finding]:
    known = {
        (disk.name, f"{epoch.number:04}")
        for disk in state.disks
        for epoch in disk.epochs
    }
    bases = {path, *(_base(path, epoch) for d in state.disks for epoch in d.epochs)}
    for base in sorted(bases):
        for place in sorted(base.glob("disks/*/epochs/*")):
            if (place.parts[-3], place.name) in known:
                continue
            if repair:
                shutil.rmtree(place)
            yield Finding(str(place), "belongs to no snapshot", True, repair)


def _base(path: Path, epoch: EpochRecord) -> Path:
    """Return what an epoch's store is below: BASE/disks/NAME/epochs/NUMBER."""
    return Path(os.path.normpath(path / epoch.store)).parents[3]
