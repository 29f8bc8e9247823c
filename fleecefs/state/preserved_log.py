"""Which clusters of an epoch are preserved, durably: `--durability host`.

A file with a header page, as bits have it (block/bitmap.py), and records of 32 bytes.
A record is written and synced after the clusters' data, and before the guest overwrites
them; so whatever the disk of a guest has lost, the store has.

Records are found by their CRC, each for itself: writers append at once, and after a
crash one may be missing before another. A record that is torn or missing belongs to a
write that had not begun. No record is ever changed.
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
from fleecefs.errors import NoSpace

PRESERVED = 1  # the store has the clusters
LOST = 2  # the snapshot is broken

_RECORD = struct.Struct("<IIQQ8x")  # CRC of what follows, kind, first, stop

# Space is allocated ahead, so that a sync has no metadata to write.
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
        os.pwrite(fd, owner.header().ljust(PAGE, b"\0"), 0)
        fallocate(fd, 0, 0, _STEP)
        os.fsync(fd)
        sync_directory(path.parent)
        return cls(fd, PAGE, _STEP)

    @classmethod
    def open(cls, path: Path, owner: Owner) -> Self:
        """Open a log to append to it; NotUsable if it is another's."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            owner.check(os.pread(fd, PAGE, 0), path)
        except BaseException:
            os.close(fd)
            raise
        # Beyond all there is: where a crash left gaps, they stay.
        size = os.fstat(fd).st_size
        return cls(fd, size, size)

    def append(self, kind: int, first: int, stop: int) -> None:
        """Add a record; durable on return. OSError if it is not."""
        record = Record(kind, first, stop).encode()
        with self._lock:
            offset = self._end
            if offset + _RECORD.size > self._allocated:
                fallocate(self._fd, 0, self._allocated, _STEP)
                self._allocated += _STEP
            self._end += _RECORD.size
        if os.pwrite(self._fd, record, offset) != len(record):
            raise NoSpace("no space for the log of preserved clusters")
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # As an image's: the last writer may hold a log whose epoch is gone already.
    __del__ = close


def read_log(path: Path, owner: Owner) -> Iterator[Record]:
    """Yield all valid records; NotUsable if the file is another's."""
    with path.open("rb") as file:
        owner.check(file.read(PAGE), path)
        while data := file.read(_STEP):
            whole = len(data) - len(data) % _RECORD.size
            for crc, kind, first, stop in _RECORD.iter_unpack(data[:whole]):
                record = Record(kind, first, stop)
                if kind and record.encode()[:4] == struct.pack("<I", crc):
                    yield record
