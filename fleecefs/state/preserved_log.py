"""Which clusters of an epoch are preserved, durably: `--durability host`.

A file with a header page, as bits have it (block/bitmap.py), and records of 32 bytes.
A record is written and synced after the clusters' data, and before the guest overwrites
them; so whatever the disk of a guest has lost, the store has.

Each record has a CRC and stands for itself: writers append at once, and after a crash
one may be missing before another. A missing record is all zeroes, and belongs to a
write that had not begun. No record is ever changed, and no sector of a disk is torn; so
what is neither zeroes nor whole is damage, and the log is refused.

The first record's place is kept for the one that says that the snapshot is broken:
there is space for it, whatever else is full.
"""

import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from fleecefs.block.bitmap import PAGE, Owner, sync_directory
from fleecefs.block.raw import fallocate
from fleecefs.errors import NoSpace, NotUsable

PRESERVED = 1  # the store has the clusters
LOST = 2  # the snapshot is broken

_RECORD = struct.Struct("<IIQQ8x")  # CRC of what follows, kind, first, stop
_NONE = bytes(_RECORD.size)
_LOST_AT = PAGE
_FIRST_AT = PAGE + _RECORD.size

# Space is allocated ahead, so that a sync has no metadata to write. A log has always
# whole steps, which shows one that was cut short.
_STEP = 1 << 20


class Record(NamedTuple):
    kind: int
    first: int
    stop: int

    def encode(self) -> bytes:
        body = _RECORD.pack(0, *self)[4:]
        return struct.pack("<I", zlib.crc32(body)) + body


class PreservedLog:
    """The log of one epoch, open for appending."""

    def __init__(self, fd: int, end: int, allocated: int) -> None:
        self._fd = fd
        self._end = end
        self._allocated = allocated
        self._lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, owner: Owner) -> Self:
        """Make an empty log, durably."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        log = cls(fd, _FIRST_AT, _STEP)
        os.pwrite(fd, owner.header().ljust(PAGE, b"\0"), 0)
        fallocate(fd, 0, 0, _STEP)
        os.fsync(fd)
        sync_directory(path.parent)
        return log

    @classmethod
    def open(cls, path: Path, owner: Owner) -> Self:
        """Open a log to append to it; NotUsable if it is another's."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            owner.check(os.pread(fd, PAGE, 0), path)
            size = _size(fd, path)
            # Behind the last one: where a crash left gaps, they stay.
            return cls(fd, _find_end(fd, size), size)
        except BaseException:
            os.close(fd)
            raise

    def append(self, first: int, stop: int) -> None:
        """Say that the store has clusters, durably after the next `sync`."""
        with self._lock:
            offset = self._end
            if offset + _RECORD.size > self._allocated:
                fallocate(self._fd, 0, self._allocated, _STEP)
                self._allocated += _STEP
            self._end += _RECORD.size
        self._put(Record(PRESERVED, first, stop), offset)

    def mark_lost(self) -> None:
        """Say that the snapshot is broken, durably after the next `sync`."""
        self._put(Record(LOST, 0, 0), _LOST_AT)

    def _put(self, record: Record, offset: int) -> None:
        data = record.encode()
        if os.pwrite(self._fd, data, offset) != len(data):
            raise NoSpace("no space for the log of preserved clusters")

    def sync(self) -> None:
        """Make all records durable that were added before."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # As an image's: the last writer may hold a log whose epoch is gone already.
    __del__ = close


def read_log(path: Path, owner: Owner) -> Iterator[Record]:
    """Yield all records; NotUsable if the file is another's, or damaged."""
    with path.open("rb") as file:
        owner.check(file.read(PAGE), path)
        _size(file.fileno(), path)
        while data := file.read(_STEP):
            for at in range(0, len(data), _RECORD.size):
                found = data[at : at + _RECORD.size]
                if found == _NONE:
                    continue
                record = Record(*_RECORD.unpack(found)[1:])
                if record.encode() != found:
                    raise NotUsable(f"{path}: a record is damaged")
                yield record


def _find_end(fd: int, size: int) -> int:
    """Return where the last record ends."""
    start = size - _STEP
    while not (data := os.pread(fd, _STEP, start).rstrip(b"\0")):
        start -= _STEP
    end = start + len(data)
    return max(_FIRST_AT, end + -end % _RECORD.size)


def _size(fd: int, path: Path) -> int:
    size = os.fstat(fd).st_size
    if not size or size % _STEP:
        raise NotUsable(f"{path}: is truncated")
    return size
