"""What the target of a mirror still lacks, while the guest goes on writing.

Wherever source and target may differ, a granule is *dirty*, or it is being *copied*, or
a write to it has not been answered yet. Why that is so at every instant, also when the
daemon dies there (both sets of bits outlive it, block/bitmap.py):

1. A write in the background sets the bits before it overwrites the source, and again
   afterwards, also if it has failed. Who copies clears the bit first and then reads the
   source: if that was too early, the second time makes it dirty again.
2. Who copies says so before it clears the bit, and takes that back when the target has
   the data, or after it has set the bit again. So what the daemon before was copying is
   dirty to the next one, and no granule is copied twice at a time.
3. While the mirror *follows* (QEMU's write-blocking), a write goes to the target, too,
   before it is answered. It waits until nobody copies its granules and no earlier write
   to them is under way, and nobody begins to copy them until it ends. Then it sets the
   bits that were clear, overwrites the source, writes those granules to the target and
   clears their bits. What was dirty is left to who copies.

Writes that follow wait for those that came earlier and for copies, which wait for
nobody: there is no cycle. Following begins while the disk is drained, so that no write
of the other kind is under way. It may end at any time: then no write clears a bit any
more. That happens when the target fails or does not answer, which the guest is never
told; the job is, by `take_failure`.

All is guarded by the disk's lock, except that setting bits is atomic under the GIL.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bitarray import bitarray
from bitarray.util import ones

from fleecefs.block.bitmap import next_clear
from fleecefs.block.image import Image
from fleecefs.block.requests import Requests
from fleecefs.block.store import runs
from fleecefs.errors import Abandoned, TimedOut
from fleecefs.killpoint import reached
from fleecefs.units import KiB, MiB

GRANULARITY = 64 * KiB
GRANULARITY_MIN, GRANULARITY_MAX = 512, 64 * MiB

Run = tuple[int, int]


class Sink(NamedTuple):
    """How a write comes to the target: write(data, offset), zero(length, offset)."""

    write: Callable[[memoryview, int], None]
    zero: Callable[[int, int], None]


class Following:
    """A guest's write to granules [first, stop) that goes to the target, too."""

    __slots__ = (
        "abandoned",
        "begun",
        "deadline",
        "first",
        "is_done",
        "is_on_target",
        "own",
        "stop",
        "thread",
    )

    def __init__(self, first: int, stop: int, timeout: float) -> None:
        self.first, self.stop = first, stop
        self.begun = time.monotonic()
        # Until when the target has to answer.
        self.deadline = self.begun + timeout
        self.thread = threading.get_ident()
        # Which granules were clean: these it writes to the target. None while it waits.
        self.own: bitarray | None = None
        self.is_on_target = False
        self.is_done = False
        # Somebody else serves the request; it still may write to the target.
        self.abandoned = False


class Mirror:
    """The granules of a disk that its target lacks. Thread-safe.

    `timeout` is for how many seconds a write waits for the target at the most.
    """

    def __init__(
        self,
        size: int,
        granularity: int,
        dirty: bitarray,
        copying: bitarray,
        requests: Requests,
        timeout: float = math.inf,
    ) -> None:
        self.size = size
        self.granularity = granularity
        self.shift = granularity.bit_length() - 1
        self.count = -(-size // granularity)
        self._dirty = dirty
        self._copying = copying
        self._requests = requests
        self._timeout = timeout
        # What a daemon before us was copying.
        dirty |= copying
        copying.setall(0)
        # Known to be zeroes on the target; None if nothing is known.
        self._zero: bitarray | None = None
        self._sink: Sink | None = None
        # In the order of arrival.
        self._following: list[Following] = []
        self._failure: OSError | None = None
        # Whether the target has all, and has had every write since.
        self.is_synced = False
        # Writes that waited for the target, and for how long the slowest did.
        self.waited = 0
        self.longest_wait = 0.0

    # -- for writers

    def write(self, source: Image, data: bytes | memoryview, offset: int) -> int:
        """Write to the source, and say or do what that means for the target."""
        view = memoryview(data)

        def on_target(sink: Sink, start: int, end: int) -> None:
            sink.write(view[start - offset : end - offset], start)

        return self._overwrite(
            offset, len(view), lambda: source.pwrite(data, offset), on_target
        )

    def zero(
        self, overwrite: Callable[[int, int], None], length: int, offset: int
    ) -> None:
        """Zero or discard on the source, by `overwrite`, and do as `write` does."""

        def on_source() -> int:
            overwrite(length, offset)
            return length

        self._overwrite(
            offset,
            length,
            on_source,
            lambda sink, start, end: sink.zero(end - start, start),
        )

    def _overwrite(
        self,
        offset: int,
        length: int,
        on_source: Callable[[], int],
        on_target: Callable[[Sink, int, int], None],
    ) -> int:
        first, stop = offset >> self.shift, ((offset + length - 1) >> self.shift) + 1
        write = self._begin(first, stop) if self._sink is not None else None
        if write is None:
            self._dirty[first:stop] = 1
            reached("mirror.marked")
            try:
                return on_source()
            finally:
                self._dirty[first:stop] = 1
        try:
            written = on_source()
            reached("mirror.on-source")
            self._follow(write, offset, offset + written, on_target)
            write.is_done = write.is_done and written == length
        finally:
            self._end(write)
        if write.abandoned:
            raise Abandoned
        return written

    def _begin(self, first: int, stop: int) -> Following | None:
        """Register a write that follows; None if following has ended meanwhile."""
        write = Following(first, stop, self._timeout)
        requests = self._requests
        with requests.lock:
            self._following.append(write)
            while self._sink is not None and self._has_to_wait(write):
                if not requests.wait_changed(write.deadline):
                    self._stop_following(self._too_late())
            if self._sink is None:
                self._following.remove(write)
                requests.changed()
                return None
            write.own = ~self._dirty[first:stop]
            self._dirty[first:stop] = 1
            if self._zero is not None:
                self._zero[first:stop] = 0
        return write

    def _has_to_wait(self, write: Following) -> bool:
        if self._copying.find(1, write.first, write.stop) >= 0:
            return True
        for other in self._following:
            if other is write:
                return False
            if other.first < write.stop and write.first < other.stop:
                return True
        raise AssertionError(write)

    def _follow(
        self,
        write: Following,
        offset: int,
        end: int,
        on_target: Callable[[Sink, int, int], None],
    ) -> None:
        """Write to the target what of [offset, end) it does not lack otherwise."""
        with self._requests.lock:
            sink, own = self._sink, write.own
            if sink is None:
                return
            # The source may have taken some of its time.
            write.deadline = time.monotonic() + self._timeout
            write.is_on_target = True
        assert own is not None
        try:
            for first, stop in runs(own, 0, len(own)):
                start = max(offset, (write.first + first) << self.shift)
                until = min(end, (write.first + stop) << self.shift)
                if start < until:
                    on_target(sink, start, until)
            write.is_done = True
            reached("mirror.on-target")
        except OSError as e:
            with self._requests.lock:
                self._stop_following(e)

    def _end(self, write: Following) -> None:
        seconds = time.monotonic() - write.begun
        with self._requests.lock:
            self._following.remove(write)
            if write.is_done and self._sink is not None and not write.abandoned:
                assert write.own is not None
                self._dirty[write.first : write.stop] &= ~write.own
            else:
                self.is_synced = False
            self.waited += 1
            self.longest_wait = max(self.longest_wait, seconds)
            self._requests.changed()

    # -- a target that hangs

    def has_late(self, now: float) -> bool:
        """Tell whether `expire` has something to do."""
        return any(self._is_late(write, now) for write in list(self._following))

    @staticmethod
    def _is_late(write: Following, now: float) -> bool:
        return write.is_on_target and not write.abandoned and write.deadline < now

    def expire(self, now: float) -> list[int]:
        """Stop following if the target hangs; return the threads that hang in it.

        Their requests are to be served again: the source has the data, and the bits
        stay set. Until such a thread comes back, nobody copies what it may write.
        """
        with self._requests.lock:
            late = [write for write in self._following if self._is_late(write, now)]
            for write in late:
                write.abandoned = True
                self._requests.writes.pop(write.thread, None)
            if late:
                self._stop_following(self._too_late())
        return [write.thread for write in late]

    def _too_late(self) -> TimedOut:
        return TimedOut(f"the target took longer than {self._timeout:g} s for a write")

    def _stop_following(self, error: OSError | None) -> None:
        """Let writes be in the background from now on; hold the lock."""
        if self._sink is not None:
            self._failure = self._failure or error
        self._sink = None
        self.is_synced = False
        self._requests.changed()

    # -- for the job

    @property
    def is_following(self) -> bool:
        return self._sink is not None

    @property
    def is_hanging(self) -> bool:
        """Whether a write that was given up may still come to the target."""
        return any(write.abandoned for write in list(self._following))

    def follow(self, sink: Sink) -> None:
        """Let writes go to the target from now on. The disk is drained."""
        with self._requests.lock:
            self._sink = sink

    def unfollow(self) -> None:
        """Let no write wait for the target any more, also none that does."""
        with self._requests.lock:
            self._stop_following(None)
            for write in self._following:
                write.deadline = 0.0

    def take_failure(self) -> OSError | None:
        """Return, once, why following has ended."""
        with self._requests.lock:
            failure, self._failure = self._failure, None
        return failure

    def mark_synced(self) -> None:
        """Find out whether the target has all."""
        with self._requests.lock:
            self.is_synced = self._sink is not None and self._is_alike()

    def mark_zero(self) -> None:
        """Say that the target reads as zeroes everywhere."""
        with self._requests.lock:
            self._zero = ones(self.count, endian="little")

    def mark_dirty(self, offset: int, end: int) -> None:
        """Say that the target lacks [offset, end)."""
        self._dirty[offset >> self.shift : ((end - 1) >> self.shift) + 1] = 1

    def redo(self) -> None:
        """Say that the target may lack anything, also what is on its way to it."""
        with self._requests.lock:
            # So no write clears what it has not set itself.
            self._stop_following(None)
            self._dirty[: self.count] = 1
            self._zero = None

    @property
    def is_dirty(self) -> bool:
        """Whether there is something to copy, without a look at who does it."""
        return self._dirty.find(1) >= 0

    def left(self) -> int:
        """Return about how many bytes are to be copied, those being copied among them.

        Exactly, while nobody writes and nothing is copied.
        """
        count = self._dirty.count() + self._copying.count() - self._own()
        length = max(0, count) * self.granularity
        has_tail = length and self._dirty[self.count - 1]
        return length - (-self.size % self.granularity if has_tail else 0)

    def is_alike(self) -> bool:
        """Tell whether the target has all, but for writes that bring it themselves."""
        with self._requests.lock:
            return self._is_alike()

    def _is_alike(self) -> bool:
        if self._copying.find(1) >= 0:
            return False
        return not self.is_dirty or self._dirty.count() == self._own()

    def _own(self) -> int:
        """Return how many granules are dirty only until writes that follow end."""
        return sum(
            write.own.count()
            for write in list(self._following)
            if write.own is not None and not write.abandoned
        )

    def claim(
        self, start: int, stop: int, count: int, excluded: Iterable[Run] = ()
    ) -> Run | None:
        """Take up to `count` dirty granules in [start, stop) to copy; None if none.

        To be ended by `finish` or `fail`, whatever happens.
        """
        with self._requests.lock:
            at = start
            while (first := self._dirty.find(1, at, stop)) >= 0:
                end = next_clear(self._dirty, first, min(first + count, stop))
                first, end = self._free_part(first, end, excluded)
                if first < end:
                    self._copying[first:end] = 1
                    reached("mirror.claiming")
                    self._dirty[first:end] = 0
                    return first, end
                at = first
        return None

    def _free_part(self, first: int, end: int, excluded: Iterable[Run]) -> Run:
        """Return the first part of [first, end) that nobody uses, or an empty one."""
        used = [
            (start, stop)
            for start, stop in (
                *((write.first, write.stop) for write in self._following),
                *excluded,
            )
            if start < end and first < stop
        ]
        while first < end:
            busy = [stop for start, stop in used if start <= first < stop]
            if self._copying[first]:
                busy.append(next_clear(self._copying, first, end))
            if not busy:
                break
            first = max(busy)
        found = self._copying.find(1, first, end) if first < end else -1
        limits = [start for start, _ in used if start > first]
        return first, min(end, *limits, found if found >= 0 else end)

    def finish(self, first: int, stop: int) -> None:
        """Say that the target has what was claimed."""
        with self._requests.lock:
            self._copying[first:stop] = 0
            self._requests.changed()

    def fail(self, first: int, stop: int) -> None:
        """Say that the target still lacks what was claimed."""
        with self._requests.lock:
            self._dirty[first:stop] = 1
            self._copying[first:stop] = 0
            self._requests.changed()

    def is_zero(self, first: int, stop: int) -> bool:
        """Whether the target is known to read as zeroes there."""
        zero = self._zero
        return zero is not None and zero.find(0, first, stop) < 0

    def set_zero(self, first: int, stop: int, *, is_zero: bool) -> None:
        """Remember what was, or is about to be, written to the target."""
        # Looked at once: it may be forgotten meanwhile.
        zero = self._zero
        if zero is not None:
            zero[first:stop] = is_zero
