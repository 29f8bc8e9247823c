"""What can be done to dirty bitmaps: steps, of which several make one instant.

A step is prepared, in the order of the steps, and may refuse; what it adds or takes
away is then there for the steps after it. When all are prepared, the state is saved,
the disks are drained, and each step is applied: that can not fail. Afterwards it is
finished: what has to last is made durable. If a step refuses, or the instant does not
come about, those before are undone, the last one first.

What a bitmap loses is only forgotten once the state that says so is saved: until then
it is frozen (bitmaps/disk.py), and after a crash of the daemon it is taken back. So a
command that was cut short has lost no bit.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from bitarray import bitarray

from fleecefs.bitmaps.disk import DiskBitmaps, HeldBitmap
from fleecefs.block.dirty import GRANULARITY, GRANULARITY_MAX, GRANULARITY_MIN
from fleecefs.errors import BadName, Busy, NotFound, NotUsable, Refused
from fleecefs.killpoint import reached
from fleecefs.qcow2.bitmaps import BITS_SIZE_MAX
from fleecefs.state.directory import BitmapRecord
from fleecefs.units import format_size

_NAME_LENGTH_MAX = 1023

# Why a bitmap is inconsistent whose bits were to come from elsewhere.
CUT_SHORT = "the command that was to make it was cut short"

FindDisk = Callable[[str], DiskBitmaps]


class Step(Protocol):
    """One thing to be done to a bitmap."""

    def prepare(self, find: FindDisk) -> None:
        """Check, and provide what it takes; raise OSError to refuse."""

    def apply(self) -> None:
        """Do it; the disks are drained."""

    def finish(self) -> None:
        """Make durable what has to last; the guest goes on."""

    def undo(self) -> None:
        """Be as before it was prepared, also if it was applied."""

    def concerned(self) -> Sequence[DiskBitmaps]:
        """Return whose bitmaps it changes or reads, once it is prepared."""


def find_bitmap(bitmaps: DiskBitmaps, name: str) -> HeldBitmap:
    """Return a bitmap by name; NotFound if there is none."""
    held = bitmaps.held.get(name)
    if held is None:
        raise NotFound(f"Dirty bitmap '{name}' not found")
    return held


def find_free(bitmaps: DiskBitmaps, name: str) -> HeldBitmap:
    """Return a bitmap that no job uses; Busy if one does."""
    held = find_bitmap(bitmaps, name)
    if held.bitmap.busy:
        raise _in_use(name)
    return held


def _in_use(name: str) -> Busy:
    return Busy(
        f"Bitmap '{name}' is currently in use by another operation and cannot be used"
    )


def find_good(bitmaps: DiskBitmaps, name: str) -> HeldBitmap:
    """Return one that is right, too; NotUsable with the reason if it is not."""
    held = find_free(bitmaps, name)
    _check_right(held)
    return held


def _check_right(held: HeldBitmap) -> None:
    name = held.record.name
    if held.bitmap.inconsistent is not None:
        raise NotUsable(
            f"Bitmap '{name}' is inconsistent and cannot be used: "
            f"{held.bitmap.inconsistent}; clear it or remove it"
        )


def check_bitmap_name(name: str) -> None:
    """Raise BadName unless a bitmap can be called so, in a qcow2 file too."""
    if not name:
        raise BadName("Bitmap name cannot be empty")
    # First: what can not be printed may have no bytes.
    if not name.isprintable():
        raise BadName(f"Bitmap name {name!r} can not be printed")
    if len(name.encode()) > _NAME_LENGTH_MAX:
        raise BadName(f"Bitmap name is longer than {_NAME_LENGTH_MAX} bytes")


def check_granularity(granularity: int, size: int) -> None:
    """Raise NotUsable unless a disk of that size can have a bitmap with it."""
    if granularity < GRANULARITY_MIN or granularity.bit_count() != 1:
        raise NotUsable("Granularity must be power of 2 and at least 512")
    if granularity > GRANULARITY_MAX:
        raise NotUsable(f"Granularity must be at most {format_size(GRANULARITY_MAX)}")
    needed = -(-size // granularity) // 8
    if needed > BITS_SIZE_MAX:
        raise NotUsable(
            f"a granularity of {format_size(granularity)} needs {format_size(needed)} "
            f"of bits, more than {format_size(BITS_SIZE_MAX)}; use a larger one"
        )


class Add:
    """Add a bitmap, clear or with some bits; `container` None is the disk's own."""

    def __init__(
        self,
        disk: str,
        name: str,
        *,
        granularity: int = GRANULARITY,
        persistent: bool = True,
        recording: bool = True,
        container: Path | None = None,
        bits: bitarray | None = None,
    ) -> None:
        self._disk = disk
        self._container = container
        self._bits = bits
        self._record = BitmapRecord(name, 0, granularity, recording, persistent)

    def prepare(self, find: FindDisk) -> None:
        record = self._record
        self._bitmaps = bitmaps = find(self._disk)
        check_bitmap_name(record.name)
        check_granularity(record.granularity, bitmaps.disk.size)
        bitmaps.check_new(record.name)
        if self._container is not None and not record.persistent:
            raise NotUsable("a transient bitmap is in no container")
        record.number = bitmaps.new_number()
        live = bitmaps.create_bits(record)
        if self._bits is not None:
            live.bits[: len(self._bits)] = self._bits
        self._held = bitmaps.add(record, live)
        reached("bitmap.prepared")
        try:
            if record.persistent:
                bitmaps.store(self._held, self._container)
        except BaseException:
            bitmaps.forget(self._held)
            live.drop()
            raise
        reached("bitmap.stored")

    def apply(self) -> None:
        self._held.bitmap.recording = self._record.recording
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        if self._record.recording and self._record.persistent:
            self._bitmaps.settle_past()

    def undo(self) -> None:
        self._bitmaps.forget(self._held)
        self._bitmaps.update_recorder()
        self._held.live.drop()
        with contextlib.suppress(OSError):
            # Left in its container it is one that was in use when it was left.
            self._bitmaps.unstore(self._held)

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Remove:
    """Remove a bitmap, also an inconsistent one, and from its container."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self._held = find_free(self._bitmaps, self._name)
        self._bitmaps.reach(self._held)
        self._bitmaps.let_go(self._held)
        self._was_recording = self._held.bitmap.recording

    def apply(self) -> None:
        self._held.bitmap.recording = False
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        self._bitmaps.gone(self._held)

    def undo(self) -> None:
        self._bitmaps.restore(self._held)
        _record_again(self._bitmaps, self._held, self._was_recording)

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


def _record_again(bitmaps: DiskBitmaps, held: HeldBitmap, was_recording: bool) -> None:
    """Let a bitmap be as it was, after it may have missed writes."""
    if was_recording and not held.bitmap.recording:
        held.bitmap.recording = True
        held.bitmap.set(0, bitmaps.disk.size)
    bitmaps.update_recorder()


class Swap:
    """Other bits for a bitmap: what it had until the instant is frozen."""

    def __init__(self, bitmaps: DiskBitmaps, held: HeldBitmap, job: str | None) -> None:
        self._bitmaps = bitmaps
        self._held = held
        record = held.record
        if held.is_swapping:
            # Once at an instant: what was frozen has one place only.
            raise _in_use(record.name)
        before, record.number = record.number, bitmaps.new_number()
        try:
            self._live = bitmaps.create_bits(record)
        except BaseException:
            record.number = before
            raise
        record.frozen, record.job = before, job
        held.is_swapping = True
        reached("bitmap.swapping")

    def apply(self) -> None:
        held, live = self._held, self._live
        live.counters[:] = held.live.counters
        held.is_swapping = False
        held.bitmap.frozen = None
        held.bitmap.freeze(live.bits)
        held.frozen, held.live = held.live, live
        self._bitmaps.update_recorder()

    def undo(self) -> None:
        held, record = self._held, self._held.record
        if held.frozen is not None:
            self._bitmaps.thaw(held, is_copied=False)
            return
        held.is_swapping = False
        held.bitmap.frozen = None
        assert record.frozen is not None
        record.number, record.frozen, record.job = record.frozen, None, None
        self._live.drop()


class Freeze:
    """Let a bitmap begin anew, for a job that copies what it had until then.

    `job` is the key of the job's private snapshot, `frozen` what is to be copied.
    """

    def __init__(self, disk: str, name: str, job: str) -> None:
        self._disk = disk
        self._name = name
        self._job = job

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        held = find_good(self._bitmaps, self._name)
        self._swap = Swap(self._bitmaps, held, self._job)
        # So that a later step finds it busy.
        held.bitmap.frozen = held.bitmap.bits

    def apply(self) -> None:
        self._swap.apply()

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        self._swap.undo()

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Look:
    """Copy what a bitmap has at the instant, also one that a job uses, to `bits`."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name
        self.bits = bitarray(endian="little")
        self.granularity = GRANULARITY

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        held = find_bitmap(self._bitmaps, self._name)
        _check_right(held)
        self._bitmap = held.bitmap
        self.granularity = held.bitmap.granularity

    def apply(self) -> None:
        self.bits = self._bitmap.to_save()

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        pass

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Clear:
    """Forget what was dirty; an inconsistent bitmap is right again, and records."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = bitmaps = find(self._disk)
        self._held = held = find_free(bitmaps, self._name)
        self._was = held.bitmap.inconsistent
        if self._was is not None and held.record.persistent:
            bitmaps.store_again(held)
        self._swap = Swap(bitmaps, held, None)

    def apply(self) -> None:
        bitmap = self._held.bitmap
        if self._was is not None:
            bitmap.inconsistent = None
            bitmap.recording = True
        self._swap.apply()

    def finish(self) -> None:
        record, bitmap = self._held.record, self._held.bitmap
        try:
            if record.persistent:
                self._bitmaps.settle_past()
        except OSError:
            self.undo()
            raise
        self._bitmaps.thaw(self._held, is_copied=True)
        record.inconsistent, record.recording = None, bitmap.recording
        self._bitmaps.save_if_stored(self._held)

    def undo(self) -> None:
        self._swap.undo()
        self._held.bitmap.inconsistent = self._was

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Fill:
    """Let an inconsistent bitmap be right again, by saying that all is dirty."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = bitmaps = find(self._disk)
        self._held = held = find_free(bitmaps, self._name)
        self._was = held.bitmap.inconsistent
        self._was_recording = held.bitmap.recording
        held.bitmap.set(0, bitmaps.disk.size)
        if held.record.persistent:
            bitmaps.store_again(held)
        # So that a later step finds it right.
        held.lose(None)
        held.record.recording = held.bitmap.recording = True

    def apply(self) -> None:
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        self._held.lose(self._was)
        self._held.bitmap.recording = self._held.record.recording = self._was_recording
        self._bitmaps.update_recorder()

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Abort:
    """Refuse: for those who want to see that a transaction changes nothing."""

    def prepare(self, find: FindDisk) -> None:
        raise Refused("Transaction aborted using Abort action")

    def apply(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        pass

    def concerned(self) -> Sequence[DiskBitmaps]:
        return []


class Enable:
    """Let a bitmap record from now on."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self._held = held = find_good(self._bitmaps, self._name)
        self._before = held.record.recording, held.bitmap.recording
        if held.is_stored:
            self._bitmaps.provide_log()
        held.record.recording = True

    def apply(self) -> None:
        self._held.bitmap.recording = True
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        if self._held.is_stored:
            self._bitmaps.settle_past()
        self._bitmaps.save_if_stored(self._held)

    def undo(self) -> None:
        self._held.record.recording, self._held.bitmap.recording = self._before
        self._bitmaps.update_recorder()

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Disable:
    """Let a bitmap stay as it is at the instant."""

    def __init__(self, disk: str, name: str) -> None:
        self._disk = disk
        self._name = name

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self._held = held = find_good(self._bitmaps, self._name)
        self._before = held.record.recording, held.bitmap.recording
        # Ahead of the instant: cut short after it, it lacks writes. What it has by then
        # is not lost: its container says that it was recording.
        held.record.recording = False

    def apply(self) -> None:
        self._held.bitmap.recording = False
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        self._bitmaps.save_if_stored(self._held)

    def undo(self) -> None:
        self._held.record.recording, was_recording = self._before
        _record_again(self._bitmaps, self._held, was_recording)

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Merge:
    """Add to a bitmap what others have, (disk, name), also in other granularities."""

    def __init__(
        self, disk: str, target: str, sources: Sequence[tuple[str, str]]
    ) -> None:
        self._disk = disk
        self._target = target
        self._sources = sources

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self._held = find_good(self._bitmaps, self._target)
        self._others = [find(disk) for disk, _ in self._sources]
        self._merged = [
            find_good(bitmaps, name).bitmap
            for bitmaps, (_, name) in zip(self._others, self._sources, strict=True)
        ]
        size = self._bitmaps.disk.size
        for bitmaps in self._others:
            if bitmaps.disk.size != size:
                raise NotUsable(
                    f"Bitmaps are of different sizes (destination size is {size} and "
                    f"source size is {bitmaps.disk.size}) and can't be merged"
                )

    def apply(self) -> None:
        self._held.is_unlogged = True
        for source in self._merged:
            self._held.bitmap.add(source.bits, source.granularity)

    def finish(self) -> None:
        self._bitmaps.save_if_stored(self._held)
        self._held.is_unlogged = False

    def undo(self) -> None:
        """Leave it: what was merged is no more than too much."""

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps, *self._others]


class Copy:
    """Add a bitmap that has what another has at the instant, and does not record."""

    def __init__(
        self, disk: str, name: str, target: str, *, persistent: bool = False
    ) -> None:
        self._disk = disk
        self._name = name
        self._target = target
        self._persistent = persistent
        self._steps: list[Step] = []

    def prepare(self, find: FindDisk) -> None:
        granularity = find_good(find(self._disk), self._name).bitmap.granularity
        add = Add(
            self._disk,
            self._target,
            granularity=granularity,
            persistent=self._persistent,
            recording=False,
        )
        add.prepare(find)
        # Until it has what it is to have: a copy that was cut short is none.
        self._held = find(self._disk).held[self._target]
        self._held.record.inconsistent = CUT_SHORT
        merge = Merge(self._disk, self._target, [(self._disk, self._name)])
        merge.prepare(find)
        self._steps = [add, merge]

    def apply(self) -> None:
        for step in self._steps:
            step.apply()

    def finish(self) -> None:
        for step in self._steps:
            step.finish()
        self._held.record.inconsistent = None

    def undo(self) -> None:
        for step in reversed(self._steps):
            step.undo()

    def concerned(self) -> Sequence[DiskBitmaps]:
        return self._steps[0].concerned()


class Set:
    """Change whether a bitmap is persistent, and whether it records after a mount."""

    def __init__(
        self,
        disk: str,
        name: str,
        *,
        persistent: bool | None = None,
        auto: bool | None = None,
        container: Path | None = None,
    ) -> None:
        self._disk = disk
        self._name = name
        self._persistent = persistent
        self._auto = auto
        self._container = container
        self._is_stored_now = False

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self._held = held = find_good(self._bitmaps, self._name)
        self._auto_before = held.record.auto
        if self._container is not None and not self._persistent:
            raise NotUsable("a transient bitmap is in no container")
        if self._persistent and held.record.persistent and self._container is not None:
            raise NotUsable(f"Bitmap '{self._name}' is persistent already")
        if self._auto is not None:
            held.record.auto = self._auto
        if self._persistent and not held.record.persistent:
            self._bitmaps.store(held, self._container)
            self._is_stored_now = True

    def apply(self) -> None:
        # From here on what is new is logged; what there is `finish` saves.
        self._held.bitmap.keep_unsaved()
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        record = self._held.record
        if self._persistent is False and record.persistent:
            self._bitmaps.unstore(self._held)
            record.persistent = False
        if self._is_stored_now:
            self._bitmaps.settle_past()
        self._bitmaps.save_if_stored(self._held)
        if self._is_stored_now:
            record.persistent = True

    def undo(self) -> None:
        self._held.record.auto = self._auto_before
        if self._is_stored_now:
            with contextlib.suppress(OSError):
                self._bitmaps.unstore(self._held)

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]


class Attach:
    """Use bitmaps that are in a container already, all that nobody uses or some."""

    def __init__(self, disk: str, container: Path, names: Sequence[str] = ()) -> None:
        self._disk = disk
        self._path = container
        self._names = names
        self.attached: list[str] = []

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._disk)
        self.attached = self._bitmaps.attach(self._path, self._names)

    def apply(self) -> None:
        self._bitmaps.update_recorder()

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        self._bitmaps.detach(self.attached)

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]
