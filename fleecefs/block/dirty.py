"""Dirty bitmaps: which parts of a disk have been written since a point in time.

A bit stands for `granularity` bytes, and is set before the source is written: so a kill
in between loses none, and the request that is sent again sets it once more. Bitmaps
begin, end and are cleared while the disk is drained. So no write is between its bit and
its bytes when that happens, and a bit need not be set a second time afterwards.

Most writes go where something was written before. What all bitmaps have is therefore
kept in one more bitmap, `covered`: a write that finds its bits there is done after one
look, however many bitmaps there are. It is a cache: it may say less than the bitmaps
have, never more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.block.store import runs
from fleecefs.units import GiB, KiB

GRANULARITY = 64 * KiB
GRANULARITY_MIN, GRANULARITY_MAX = 512, 2 * GiB

# A unit of bits that is saved or not: 4 KiB of them.
_UNIT_SHIFT = 15


class Mark(NamedTuple):
    """Where a write is recorded: the bits, and the units of them to be saved."""

    bits: bitarray
    unsaved: bitarray


class DirtyBitmap:
    """One bitmap of a disk. To be changed only while the disk is drained.

    bits          what was written; while the bitmap is `recording`, writes add to it
    frozen        while a job copies what was written until its instant: just that.
                  `bits` have begun anew; how the job ends decides what becomes of both
    inconsistent  why writes may be missing; None while it is right
    """

    def __init__(
        self,
        name: str,
        size: int,
        granularity: int,
        bits: bitarray,
        *,
        recording: bool = False,
        inconsistent: str | None = None,
    ) -> None:
        self.name = name
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.bit_count = -(-size // granularity)
        self.bits = bits
        self.recording = recording
        self.frozen: bitarray | None = None
        self.inconsistent = inconsistent
        # Units that are not as they were saved last.
        self._unsaved = zeros(_units(self.bit_count), endian="little")
        self._unsaved.setall(1)
        # Whoever saves sees all of a swap, or nothing of it.
        self._swapping = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a job uses it: nothing else may change it."""
        return self.frozen is not None

    @property
    def count(self) -> int:
        """The dirty bytes, in whole bits; of a busy one, what its job is about."""
        frozen = self.frozen
        return (self.bits if frozen is None else frozen).count() * self.granularity

    def set(self, offset: int, end: int) -> None:
        """Say that [offset, end) is dirty."""
        _set([self.mark()], offset >> self.shift, (end - 1) >> self.shift)

    def mark(self) -> Mark:
        """Return what a write sets, until the next freeze."""
        return Mark(self.bits, self._unsaved)

    def add(self, bits: bitarray, granularity: int) -> None:
        """Say that what other bits have is dirty, too; rounded outward."""
        # Bits in use are padded, those from elsewhere are not.
        if granularity == self.granularity and len(bits) == len(self.bits):
            self.bits |= bits
        else:
            for first, stop in scaled(bits, granularity, self.granularity):
                self.bits[first : min(stop, self.bit_count)] = 1
        self._unsaved.setall(1)

    def freeze(self, bits: bitarray) -> None:
        """Begin anew, in these bits, and keep what there is."""
        assert self.frozen is None
        with self._swapping:
            self.frozen, self.bits = self.bits, bits
        self._unsaved.setall(1)

    def abdicate(self) -> None:
        """Forget what was frozen: it is copied."""
        self.frozen = None
        self._unsaved.setall(1)

    def reclaim(self) -> None:
        """Take back what was frozen: it has to be copied again."""
        assert self.frozen is not None
        self.bits |= self.frozen
        with self._swapping:
            self.frozen = None
        self._unsaved.setall(1)

    @property
    def is_saved(self) -> bool:
        """Whether nothing has changed since `take_unsaved`."""
        return not self._unsaved.any()

    def take_unsaved(self) -> list[tuple[int, int]]:
        """Return the runs of bits that may have changed since the last call.

        Whoever sets a bit says so afterwards: what comes too late for these runs, the
        next call has.
        """
        unsaved = self._unsaved.copy()
        # Not setall(0): one that is set between the two calls would be lost.
        self._unsaved &= ~unsaved
        end = self.bit_count
        return [
            (first << _UNIT_SHIFT, min(stop << _UNIT_SHIFT, end))
            for first, stop in runs(unsaved, 0, len(unsaved))
        ]

    def keep_unsaved(self) -> None:
        """Have all to be saved again: the last time it did not work."""
        self._unsaved.setall(1)

    def to_save(self) -> bitarray:
        """Return a copy of all that is dirty, as if a job that uses it had failed."""
        with self._swapping:
            # Once: it is forgotten without the lock.
            bits, frozen = self.bits[: self.bit_count], self.frozen
            if frozen is not None:
                bits |= frozen[: self.bit_count]
        return bits


def _set(marks: list[Mark], first: int, last: int) -> None:
    """Set bits [first, last], and after them their units: see `take_unsaved`.

    Units also of bits that are set: whoever has set them may not have come to that.
    """
    if first == last:
        unit = first >> _UNIT_SHIFT
        for bits, unsaved in marks:
            bits[first] = 1
            unsaved[unit] = 1
        return
    for bits, unsaved in marks:
        bits[first : last + 1] = 1
        unsaved[first >> _UNIT_SHIFT : (last >> _UNIT_SHIFT) + 1] = 1


def _units(count: int) -> int:
    return ((count - 1) >> _UNIT_SHIFT) + 1


def scaled(
    bits: bitarray, granularity: int, to_granularity: int
) -> Iterator[tuple[int, int]]:
    """Yield the runs of set bits in another granularity, rounded outward."""
    for first, stop in runs(bits, 0, len(bits)):
        end = stop * granularity
        yield first * granularity // to_granularity, -(-end // to_granularity)


class Recorder:
    """Records the writes to one disk in its bitmaps, as they are when it is made.

    `commit` makes durable that something in [offset, end) is dirty, where that has to
    outlive the host; it may raise OSError, and the write fails with it.
    """

    __slots__ = ("_commit", "_covered", "_groups", "_shift")

    def __init__(
        self,
        size: int,
        bitmaps: Iterable[DirtyBitmap],
        commit: Callable[[int, int], None] | None = None,
    ) -> None:
        groups: dict[int, list[Mark]] = {}
        for bitmap in bitmaps:
            groups.setdefault(bitmap.shift, []).append(bitmap.mark())
        self._groups = list(groups.items())
        self._shift = min(groups)
        self._covered = zeros(((size - 1) >> self._shift) + 1, endian="little")
        self._commit = commit

    def record(self, offset: int, end: int) -> None:
        """Say that [offset, end) is about to be written."""
        shift = self._shift
        first, last = offset >> shift, (end - 1) >> shift
        if first == last:
            if self._covered[first]:
                return
        elif self._covered.find(0, first, last + 1) < 0:
            return
        for shift, marks in self._groups:
            _set(marks, offset >> shift, (end - 1) >> shift)
        # After the bits, see state/activity_log.py.
        if self._commit is not None:
            self._commit(offset, end)
        self._covered[first : last + 1] = 1
