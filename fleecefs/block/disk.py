"""A live disk: what the guest reads and writes.

The walk of a guest's write: range check here, then `History.preserve` for clusters that
a snapshot still needs, then the dirty bitmaps, then the source, through the mirror if
there is one. Every write is a registered request while it runs, so that a drained disk
stands still.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import get_ident
from uuid import UUID

from fleecefs.block.bitmap import LiveBits
from fleecefs.block.dirty import Recorder
from fleecefs.block.epoch import Epoch, History
from fleecefs.block.extent import Extent, Mapped, clip, pieces
from fleecefs.block.image import Image, mapped_at
from fleecefs.block.mirror import Mirror
from fleecefs.block.requests import DRAIN_SECONDS_MAX, Requests, drain_deadline
from fleecefs.errors import FlushFailed, NoSpace
from fleecefs.killpoint import reached
from fleecefs.units import KiB, MiB

log = logging.getLogger(__name__)

CLUSTER_SIZE_MIN = 4 * KiB
# A copy is one cluster at least, and a guest write waits for it.
CLUSTER_SIZE_MAX = 1 * MiB
# A disk's bitmap has at most so many bits (8 MiB): 4 KiB clusters up to 256 GiB.
_BITS_MAX = 64 * MiB

# A discard or zero of a whole disk preserves it in pieces of this size, each with a
# cbw-timeout of its own, so that a guest's mkfs does not break its snapshots.
_PIECE_SIZE = 64 * MiB


_READS, _WRITES = 0, 1


def default_cluster_size(size: int) -> int:
    """Return the smallest power of two for which the bitmap of a disk stays small."""
    cluster_size = CLUSTER_SIZE_MIN
    while -(-size // cluster_size) > _BITS_MAX:
        cluster_size *= 2
    return cluster_size


class Disk:
    """A source being exposed and protected. Its size never changes."""

    def __init__(
        self,
        name: str,
        disk_id: UUID,
        source: Image,
        history: History,
        live: LiveBits | None = None,
    ) -> None:
        self.name = name
        self.id = disk_id
        self.source = source
        self.size = source.size
        self.history = history
        self.requests: Requests = history.requests
        # Replaced while the disk is drained; None while no bitmap records.
        self.recorder: Recorder | None = None
        # Begins while the disk is drained; None while it has no mirror.
        self.mirror: Mirror | None = None
        # Why no flush can succeed any more; the kernel may have dropped dirty pages.
        self.flush_error = live.note if live is not None else None
        # Of no bits, but with counters and a note that outlive the daemon.
        self._live = live
        self._counters = live.counters if live is not None else [0, 0]

    @property
    def reads(self) -> int:
        """How many reads there have been since the disk was mounted."""
        return self._counters[_READS]

    @property
    def writes(self) -> int:
        """How many writes there have been since the disk was mounted."""
        return self._counters[_WRITES]

    @property
    def cluster_size(self) -> int:
        return self.history.cluster_size

    def read(self, length: int, offset: int) -> bytes:
        """Return current bytes; less only at the end."""
        if offset + length > self.size:
            length = clip(offset, length, self.size)
        self._counters[_READS] += 1
        return self.source.pread(length, offset)

    def write(
        self, data: bytes | memoryview, offset: int, durable: bool = False
    ) -> int:
        """Write, and return how much: less if the end or the source's space is near.

        `durable`: on stable storage on return (O_DSYNC). Raises NoSpace beyond the
        end, and whatever the source or, under break-guest-write, the store raises.
        """
        end = offset + len(data)
        if end > self.size:
            data = data[: clip(offset, len(data), self.size)]
            end = offset + len(data)
            if not data:
                raise NoSpace("write beyond the end of the disk")
        thread, requests, history = get_ident(), self.requests, self.history
        with requests.lock:
            if requests.is_drained:
                requests.wait_opened()
            requests.writes[thread] = (offset, end)
        try:
            if history.newest is not None:
                history.preserve(offset, end)
            reached("write.preserved")
            if self.recorder is not None:
                self.recorder.record(offset, end)
            self._counters[_WRITES] += 1
            # Looked at once: it may end meanwhile.
            mirror = self.mirror
            if mirror is None:
                written = self.source.pwrite(data, offset)
            else:
                written = mirror.write(self.source, data, offset)
            reached("write.written")
            if durable:
                self.flush()
            return written
        finally:
            with requests.lock:
                requests.writes.pop(thread, None)
                requests.changed()

    def zero(self, length: int, offset: int) -> None:
        """Make a range read as zeroes. NoSpace beyond the end; nothing is done then."""
        if offset + length > self.size:
            raise NoSpace("zeroes beyond the end of the disk")
        for extent in pieces(offset, offset + length, _PIECE_SIZE):
            with self._overwriting(extent.offset, extent.end):
                self._mirrored(self.source.zero, extent)

    def discard(self, length: int, offset: int) -> None:
        """Give a range's space back; it reads as zeroes. The end cuts it."""
        end = offset + clip(offset, length, self.size)
        for extent in pieces(offset, end, _PIECE_SIZE):
            with self._overwriting(extent.offset, extent.end):
                self._mirrored(self.source.discard, extent)

    def _mirrored(self, overwrite: Callable[[int, int], None], extent: Extent) -> None:
        mirror = self.mirror
        if mirror is None:
            overwrite(extent.length, extent.offset)
        else:
            mirror.zero(overwrite, extent.length, extent.offset)

    @contextmanager
    def _overwriting(self, offset: int, end: int) -> Iterator[None]:
        """Do as `write` does around the overwriting itself."""
        thread, requests = get_ident(), self.requests
        with requests.lock:
            if requests.is_drained:
                requests.wait_opened()
            requests.writes[thread] = (offset, end)
        try:
            if self.history.newest is not None:
                self.history.preserve(offset, end)
            reached("overwrite.preserved")
            if self.recorder is not None:
                self.recorder.record(offset, end)
            yield
            reached("overwrite.done")
        finally:
            with requests.lock:
                requests.writes.pop(thread, None)
                requests.changed()

    def flush(self) -> None:
        """Make all acknowledged writes durable.

        A failure is for ever: Linux reports a lost page once, then forgets it, so a
        second flush would succeed without the data (fsyncgate).
        """
        if self.flush_error is not None:
            raise FlushFailed(self.flush_error)
        try:
            self.source.flush()
        except OSError as e:
            self.flush_error = f"a flush failed: {e.strerror}"
            if self._live is not None:
                self._live.note = self.flush_error
            log.error("disk %s: %s; no later one succeeds", self.name, self.flush_error)
            raise
        if self.flush_error is not None:
            # One that ran at the same time was told, and only that one.
            raise FlushFailed(self.flush_error)

    # -- where data and holes are

    def map(self, offset: int, end: int) -> Iterator[Mapped]:
        """Yield what [offset, end) consists of just now, in order, without gaps."""
        while offset < min(end, self.size):
            mapped = mapped_at(self.source, offset, min(end, self.size))
            # Empty: a discard came between the two searches, so look again.
            if mapped.length:
                yield mapped
            offset = mapped.end

    def find_data(self, offset: int) -> int:
        """Return where data is next at or after offset, or the size."""
        return self.source.find_data(offset)

    def find_hole(self, offset: int) -> int:
        """Return where a hole is next at or after offset, or the size."""
        return self.source.find_hole(offset)

    def allocated(self) -> int:
        """Return the bytes of storage the source occupies."""
        return self.source.allocated()

    def move(self, source: Image) -> None:
        """Live on another source from now on, which is alike. The disk is drained.

        Who reads from the one before reads what it was at this instant, and looks
        afterwards at what is preserved; it is closed when nobody does any more.
        """
        self.source = self.history.source = source

    # -- for data threads that are over their time

    def has_late(self, now: float) -> bool:
        """Tell whether `expire` has something to do."""
        mirror = self.mirror
        return self.history.has_late(now) or (
            mirror is not None and mirror.has_late(now)
        )

    def expire(self, now: float) -> dict[int, OSError | None]:
        """Give up requests that hang; return whose they were. See History.expire."""
        outcome, mirror = self.history.expire(now), self.mirror
        if mirror is not None:
            outcome.update(dict.fromkeys(mirror.expire(now)))
        return outcome


def drained(disks: list[Disk], seconds: float = DRAIN_SECONDS_MAX) -> ExitStack:
    """Return a context in which none of the disks is being written to.

    Always in the same order, so that two of these can not wait for each other. Busy if
    running writes take longer than that.
    """
    stack = ExitStack()
    deadline = drain_deadline(seconds)
    try:
        for disk in sorted(disks, key=lambda disk: disk.id):
            stack.enter_context(disk.requests.drained(deadline))
    except BaseException:
        stack.close()
        raise
    return stack


def freeze(
    disks: list[Disk],
    epochs: list[Epoch],
    others: Iterable[Disk] = (),
    apply: Callable[[], None] = lambda: None,
) -> None:
    """Begin an epoch on each disk, all at one instant.

    `apply` is what else belongs to that instant, also of other disks.
    """
    with drained([*disks, *others]):
        for disk, epoch in zip(disks, epochs, strict=True):
            disk.history.append(epoch)
            reached("freeze.appended")
        apply()
