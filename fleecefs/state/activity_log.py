"""Where a disk has been written to since its bitmaps were saved, durably.

Persistent dirty bitmaps live in memory and are saved now and then. So that a crash of
the host loses no bit, the area of 64 MiB around it is in this log before the guest
writes; after such a crash all areas in the log count as dirty.

A writer sets bits, calls `ensure`, then writes. A saver calls `rotate`, copies the
bits, makes them durable, calls `settle`; one save at a time. What holds:

    An area is in every log that a crash can leave, from when an `ensure` of it returns
    until a `settle` begins whose `rotate` came after that `ensure` last looked.
    No area is in it that nobody has asked for since the log was made.

Hence a bit is in the last durable save, or its area is in the log. If `ensure` last
looked before `rotate`, the bit was set before the copy: the save has it when `settle`
begins. If after, the `settle` of that save does not drop the area. A save that failed
needs nothing: without `settle` nothing is dropped, and the next save has its bits too.

Why it holds. Under the lock there are three sets:

    asked     since the last `rotate`
    earlier   asked for before it: `rotate` adds `asked`, `settle` drops them all
    durable   in every log that a crash can leave

A round of I/O writes `asked | earlier`, its goal. When it begins, `durable` loses what
is not in the goal: until the sync each sector is the old one or the new one, so only
what both have is sure. It gets the goal when the sync has succeeded. So only `settle`
makes it lose anything, and nothing in `asked`.

`ensure` adds to `asked` and returns when `durable` has it all. An area from before
`rotate` is there already, and survives `settle` for it has been asked for again; while
`settle` writes, it is not there, and waits for the next round. Who waits asks again
each time he looks, so it does not matter how many saves he sleeps through.

One thread does all I/O: nobody waits for storage beyond his deadline, and all who wait
share a sync. After an error no area is written again, since the kernel drops what it
could not write. The void marker is, for its own sync is all that it needs.

A disk does not tear a sector. Nor does the page cache, because a page is written to
once between two syncs.
"""

import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.block.bitmap import PAGE, replace_file, sync_directory
from fleecefs.errors import Error, NoSpace, NotUsable, TimedOut
from fleecefs.killpoint import reached
from fleecefs.units import MiB

# A bit more to log for each 64 MiB that a guest begins to write to, and no more than
# this to copy in vain for each of them after a crash.
AREA_SIZE = 64 * MiB

# The table is in docs/formats.md. A sector is never torn.
_SECTOR = 512
_FRAME = struct.Struct("<8sII16s")  # magic, version, index of the sector, disk
_CRC = struct.Struct("<I")  # of all before it, at the end
_MAGIC = b"flcactv\0"
_VERSION = 1
_PAYLOAD = _SECTOR - _FRAME.size - _CRC.size
_AREAS = 8 * _PAYLOAD  # in a sector: 3808, that is 238 GiB of the disk

# Indexes of sectors. The marker shares no page with areas: what is wrong with these
# leaves it alone.
_VOID = PAGE // _SECTOR
_FIRST = 2 * _VOID

_SIZES = struct.Struct("<QQ")  # of the disk, and of an area: in sector 0
_NOTE = struct.Struct("<I")  # length of what follows: in the marker
_NOTE_MAX = _PAYLOAD - _NOTE.size

# Storage that hangs may do so for ever. Its thread does not keep the process.
_CLOSE_SECONDS_MAX = 5.0


class _Void:
    """Somebody who wants the log to be void, and how it went."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.error: OSError | None = None


class _Round(NamedTuple):
    """What is written and synced at once: areas, or the void marker."""

    data: bytes
    offset: int
    goal: bitarray
    void: _Void | None


class ActivityLog:
    """The log of one disk. `areas` is what it had when it was opened.

    `void_reason` says why the disk's bitmaps can not be trusted after a crash of the
    host; None if they can.
    """

    def __init__(
        self, path: Path, disk: UUID, areas: bitarray, void_reason: str | None
    ) -> None:
        self.path = path
        self.areas = areas
        self.void_reason = void_reason
        self._disk = disk
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._needed = threading.Condition(self._lock)  # what the thread waits for
        self._ended = threading.Condition(self._lock)  # what all others wait for
        self._asked = areas.copy()
        self._earlier = zeros(len(areas), "little")
        self._durable = areas.copy()
        # What is in `asked` and in `durable`. Replaced, never changed: see `ensure`.
        self._current = areas.copy()
        self._voids: list[_Void] = []
        self._begun = self._done = 0  # rounds of areas
        self._is_settling = False
        self._failed: OSError | None = None
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @classmethod
    def create(cls, path: Path, disk: UUID, size: int) -> Self:
        """Make an empty log, durably and in one step; it replaces what is there."""
        areas = zeros(_count(size), "little")
        # In full, so that no space is needed later: no ENOSPC then.
        data = _sector(0, disk, _SIZES.pack(size, AREA_SIZE)).ljust(PAGE, b"\0")
        data += _void_sector(disk, "").ljust(PAGE, b"\0")
        data += _area_sectors(disk, areas, 0, len(areas))
        replace_file(path, data)
        return cls(path, disk, areas, None)

    @classmethod
    def open(cls, path: Path, disk: UUID, size: int) -> Self:
        """Open the log of a disk; NotUsable if it is damaged, or another's."""
        data = path.read_bytes()
        log = cls(path, disk, *_read_log(data, disk, size, path))
        try:
            # It may be in the page cache only, even where a sync failed and the next
            # one would not tell. The same bytes again: nothing can be torn.
            _write(log._fd, data, 0)
            sync_directory(path.parent)
        except BaseException:
            log.close()
            raise
        return log

    def ensure(self, first: int, stop: int, deadline: float) -> None:
        """Return when areas [first, stop) are in the log, durably, or it is void.

        TimedOut after the deadline, on the monotonic clock; OSError if the log has
        failed, and has not all of them.
        """
        assert 0 <= first <= stop <= len(self.areas)
        # No lock: `_current` is looked up once, and what it refers to never changes.
        # Either this comes before `rotate` replaces it, and the caller's bits, set
        # earlier, are in the copy that is made later. Or it is the new one.
        if self._current.find(0, first, stop) < 0 or self.void_reason is not None:
            return
        with self._lock:
            while self.void_reason is None:
                self._asked[first:stop] = 1
                if self._durable.find(0, first, stop) < 0:
                    self._current = self._asked & self._durable
                    return
                self._check_working()
                self._need()
                self._wait(deadline)

    def rotate(self) -> None:
        """Begin a save: what was asked for before it is dropped by `settle`."""
        with self._lock:
            self._earlier |= self._asked
            self._asked = zeros(len(self.areas), "little")
            self._current = self._asked.copy()

    def settle(self) -> None:
        """Drop what was asked for before `rotate`: the save is durable.

        On return the log has been durable with no areas but those asked for since.
        """
        with self._lock:
            self._check_working()
            self._earlier.setall(0)
            self._is_settling = True
            # Not the round that is under way: it has them still.
            number = self._begun + 1
            self._need()
            while self._done < number:
                self._check_working()
                self._ended.wait()

    def mark_void(self, reason: str, deadline: float) -> None:
        """Say that bitmaps can not be trusted: durable on return, then all may go on.

        It is tried even if the log has failed, and may be tried again. OSError if it
        could not be written, TimedOut after the deadline: then it may be void later.
        """
        assert reason
        void = _Void(reason)
        with self._lock:
            self._voids.append(void)
            try:
                while self.void_reason is None:
                    if self._is_closed or void.error is not None:
                        raise self._copy_of(void.error or self._failed)
                    self._need()
                    self._wait(deadline)
            finally:
                # Who no longer waits has no use for it: his guest's write has failed.
                self._voids.remove(void)

    def close(self) -> None:
        """End the thread and let those who wait fail; storage may go on to hang."""
        with self._lock:
            was_closed = self._is_closed
            self._is_closed = True
            self._failed = self._failed or Error("is closed")
            self._needed.notify_all()
            self._ended.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS_MAX)
        elif not was_closed:
            os.close(self._fd)

    # -- with the lock held

    def _check_working(self) -> None:
        if self._failed is not None:
            raise self._copy_of(self._failed)

    def _copy_of(self, error: OSError | None) -> OSError:
        # One for each who raises it: an exception has a traceback.
        assert error is not None
        return OSError(error.errno, error.strerror, str(self.path))

    def _need(self) -> None:
        """Wake the thread, or start it."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True)
            try:
                thread.start()
            except RuntimeError as e:
                raise Error(f"{self.path}: {e}") from None
            self._thread = thread
        self._needed.notify()

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimedOut(f"{self.path}: the storage does not answer")
        self._ended.wait(min(left, threading.TIMEOUT_MAX))

    # -- the thread

    def _run(self) -> None:
        try:
            while (work := self._take()) is not None:
                error = None
                try:
                    if work.data:
                        _write(self._fd, work.data, work.offset)
                except OSError as e:
                    error = e
                self._finish(work, error)
        finally:
            with self._lock:
                # Closed, or a bug: then nobody shall wait in vain.
                self._is_closed = True
                self._failed = self._failed or Error("its thread has ended")
                self._ended.notify_all()
            # Here, not in `close`: no other file may get the number while it is in use.
            os.close(self._fd)

    def _take(self) -> _Round | None:
        """Wait for something to do; None when the log is closed."""
        with self._lock:
            while not self._is_closed:
                void = next((each for each in self._voids if each.error is None), None)
                if void is not None and self.void_reason is None:
                    data = _void_sector(self._disk, void.reason)
                    return _Round(data, _SECTOR * _VOID, self._durable, void)
                goal = self._asked | self._earlier
                is_needed = self._is_settling or goal != self._durable
                if is_needed and self._failed is None:
                    return self._begin(goal)
                self._needed.wait()
        return None

    def _begin(self, goal: bitarray) -> _Round:
        changed = goal ^ self._durable
        self._durable &= goal
        self._is_settling = False
        self._begun += 1
        if not changed.any():
            return _Round(b"", 0, goal, None)
        # In one piece, even if there is something between that has not changed.
        start, stop = changed.find(1), changed.find(1, right=True) + 1
        data = _area_sectors(self._disk, goal, start, stop)
        return _Round(data, _SECTOR * (_FIRST + start // _AREAS), goal, None)

    def _finish(self, work: _Round, error: OSError | None) -> None:
        with self._lock:
            if error is not None:
                self._failed = self._failed or error
            if work.void is not None:
                work.void.error = error
                if error is None:
                    self.void_reason = work.void.reason
            elif error is None:
                self._durable = work.goal
                self._done = self._begun
            self._ended.notify_all()


def _write(fd: int, data: bytes, offset: int) -> None:
    """Write, durably."""
    if os.pwrite(fd, data, offset) != len(data):
        raise NoSpace("no space for the log of activity")
    reached("activity.written")
    os.fdatasync(fd)
    reached("activity.synced")


# -- the format


def _length(size: int) -> int:
    """Return the size of the log of a disk."""
    return _SECTOR * (_FIRST + -(-_count(size) // _AREAS))


def _count(size: int) -> int:
    return -(-size // AREA_SIZE)


def _sector(index: int, disk: UUID, payload: bytes) -> bytes:
    body = _FRAME.pack(_MAGIC, _VERSION, index, disk.bytes)
    body += payload.ljust(_PAYLOAD, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def _void_sector(disk: UUID, reason: str) -> bytes:
    note = reason.encode(errors="replace")[:_NOTE_MAX]
    return _sector(_VOID, disk, _NOTE.pack(len(note)) + note)


def _area_sectors(disk: UUID, areas: bitarray, start: int, stop: int) -> bytes:
    """Return the sectors that have the areas [start, stop)."""
    return b"".join(
        _sector(_FIRST + at // _AREAS, disk, areas[at : at + _AREAS].tobytes())
        for at in range(start - start % _AREAS, stop, _AREAS)
    )


def _read(data: bytes, index: int, disk: UUID, path: Path) -> bytes:
    """Return the payload of a sector; NotUsable if it is not what it should be."""
    sector = data[_SECTOR * index : _SECTOR * (index + 1)]
    if len(sector) < _SECTOR or not sector.startswith(_MAGIC):
        raise NotUsable(f"{path}: sector {index} is not of an activity log of fleecefs")
    _, version, found, owner = _FRAME.unpack_from(sector)
    if version != _VERSION:
        raise NotUsable(f"{path}: has version {version}, not {_VERSION}")
    payload = sector[_FRAME.size : -_CRC.size]
    if found != index or sector != _sector(index, UUID(bytes=owner), payload):
        raise NotUsable(f"{path}: sector {index} is damaged")
    if owner != disk.bytes:
        raise NotUsable(f"{path}: belongs to another disk")
    return payload


def _read_log(
    data: bytes, disk: UUID, size: int, path: Path
) -> tuple[bitarray, str | None]:
    """Return which areas are in a log, and why it is void."""
    found, area_size = _SIZES.unpack_from(_read(data, 0, disk, path))
    if (found, area_size) != (size, AREA_SIZE):
        raise NotUsable(f"{path}: belongs to a disk of another size")
    if len(data) != _length(size):
        raise NotUsable(f"{path}: has {len(data)} bytes, not {_length(size)}")
    areas = bitarray(endian="little")
    for index in range(_FIRST, len(data) // _SECTOR):
        areas.frombytes(_read(data, index, disk, path))
    payload = _read(data, _VOID, disk, path)
    (length,) = _NOTE.unpack_from(payload)
    reason = payload[_NOTE.size :][:length].decode(errors="ignore")
    return areas[: _count(size)], reason or None
