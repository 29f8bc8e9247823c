"""The files of a backup: what each has of the disk, and which one it lies on.

Nothing in a file is believed: every number is compared with its limit before it is
used, and nothing outside the file is read.

Entries of the tables are read when they are needed, and not kept: the page cache does
that, and so a hostile file takes no memory.
"""

import operator
import os
import stat
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from fleecefs.errors import NotUsable
from fleecefs.qcow2.backing import Backing, decode_backing
from fleecefs.qcow2.bitmaps import Table, decode_table
from fleecefs.qcow2.header import (
    AREA_MAX,
    BACKING_NAME_LENGTH_MAX,
    INCOMPATIBLE_EXTENDED_L2,
    INCOMPATIBLE_EXTERNAL_DATA,
    Header,
    decode_header,
)
from fleecefs.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_BITS,
    UNALLOCATED,
    ZERO,
    Piece,
    pieces,
    runs,
)

_L1_ENTRY = struct.Struct(">Q")

# Fills a buffer with what is at an offset of the disk.
_Below = Callable[[memoryview, int], None]


class Opened(NamedTuple):
    """A file that is open, and how long it was then."""

    path: Path
    fd: int
    status: os.stat_result
    size: int

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a regular file or block device; the error names it."""
        with naming_path(path):
            # Before it is opened: with some devices opening alone does something.
            _check_kind(os.stat(path))
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                _check_kind(status)
                return cls(path, fd, status, os.lseek(fd, 0, os.SEEK_END))
            except BaseException:
                os.close(fd)
                raise

    @property
    def is_device(self) -> bool:
        return stat.S_ISBLK(self.status.st_mode)

    def read(self, length: int, offset: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer, from within the file."""
        if offset + len(buffer) > self.size:
            raise NotUsable(f"has something at {offset} that is not within the file")
        while buffer:
            count = os.preadv(self.fd, (buffer,), offset)
            if not count:
                raise NotUsable("became shorter while it was read")
            buffer, offset = buffer[count:], offset + count


@contextmanager
def naming_path(path: Path) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with it."""
    try:
        yield
    except NotUsable as e:
        raise NotUsable(f"{path}: {e}") from None
    except OSError as e:
        raise OSError(e.errno, f"{path}: {e.strerror}") from None


def _check_kind(status: os.stat_result) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise NotUsable("is not a regular file or block device")


class Layer(Protocol):
    """What one file has of the disk. `size` bytes; what is beyond reads as zeroes."""

    file: Opened
    size: int
    backing: Backing | None

    def read(self, buffer: memoryview, offset: int, below: _Below) -> None:
        """Fill the buffer; `below` does it where the backing file is to be read."""


class Raw:
    """A raw file or device. It has no backing file, whatever it begins with."""

    backing: Backing | None = None

    def __init__(self, file: Opened) -> None:
        self.file = file
        self.size = file.size

    def read(self, buffer: memoryview, offset: int, below: _Below) -> None:
        with naming_path(self.file.path):
            self.file.read_into(buffer, offset)


class Image:
    """A qcow2 file."""

    def __init__(self, file: Opened) -> None:
        self.file = file
        header = decode_header(file.read(min(AREA_MAX, file.size), 0))
        _check_header(header)
        self._cluster_size = header.cluster_size
        self._l1_offset = header.l1_offset
        self.size = header.size
        self.backing = self._find_backing(header)
        l1_count = -(-header.size * 8 // header.cluster_size**2)
        if header.l1_count < l1_count:
            raise NotUsable(f"L1 table has {header.l1_count} entries, not {l1_count}")
        self._check_place(header.l1_offset)
        # Its last entry, to see that all of it is within the file.
        file.read(_L1_ENTRY.size, header.l1_offset + (l1_count - 1) * _L1_ENTRY.size)

    def _find_backing(self, header: Header) -> Backing | None:
        offset, length = header.backing_file_offset, header.backing_file_size
        if not offset:
            return None
        if offset + length > header.cluster_size or length > BACKING_NAME_LENGTH_MAX:
            raise NotUsable(f"name of the backing file has {length} bytes at {offset}")
        return decode_backing(self.file.read(length, offset), header.backing_format)

    def read(self, buffer: memoryview, offset: int, below: _Below) -> None:
        for piece in pieces(offset, len(buffer), self._cluster_size):
            with naming_path(self.file.path):
                entries = self._entries(piece)
            for run in runs(piece, entries, self._cluster_size):
                part = buffer[run.offset - offset :][: run.length]
                if run.place == UNALLOCATED:
                    below(part, run.offset)
                elif run.place == ZERO:
                    clear(part)
                else:
                    with naming_path(self.file.path):
                        self._read_data(part, run.place)

    def _entries(self, piece: Piece) -> Table:
        at = self._l1_offset + piece.table_index * _L1_ENTRY.size
        (entry,) = _L1_ENTRY.unpack(self.file.read(_L1_ENTRY.size, at))
        table = entry & OFFSET_BITS
        if entry & ~(OFFSET_BITS | COPIED):
            raise NotUsable(f"L1 table has an entry {entry:#x}")
        if not table:
            return array("Q", bytes(piece.entry_count * 8))
        self._check_place(table)
        data = self.file.read(piece.entry_count * 8, table + piece.first * 8)
        entries = decode_table(data)
        # A bit that is wrong in one of them is in all of them together.
        self._check_entries(reduce(operator.or_, entries))
        return entries

    def _check_entries(self, union: int) -> None:
        if union & COMPRESSED:
            raise NotUsable("has compressed clusters, which fleecefs does not read")
        if union & ~(OFFSET_BITS | COPIED | ZERO):
            raise NotUsable("L2 table has entries with bits that have no meaning")
        self._check_place(union & OFFSET_BITS)

    def _check_place(self, place: int) -> None:
        if place % self._cluster_size:
            raise NotUsable("has something that does not begin with a cluster")

    def _read_data(self, buffer: memoryview, place: int) -> None:
        """Read clusters in a row, of which the file may end within the last."""
        last = (place + len(buffer) - 1) // self._cluster_size * self._cluster_size
        if last >= self.file.size:
            raise NotUsable(f"has data at {last}, which is not within the file")
        length = min(len(buffer), max(0, self.file.size - place))
        clear(buffer[length:])
        self.file.read_into(buffer[:length], place)


def _check_header(header: Header) -> None:
    for what, is_there in [
        ("an external data file", header.incompatible & INCOMPATIBLE_EXTERNAL_DATA),
        ("extended L2 entries", header.incompatible & INCOMPATIBLE_EXTENDED_L2),
        ("encryption", header.crypt_method),
    ]:
        if is_there:
            raise NotUsable(f"has {what}, which fleecefs does not read")


def clear(buffer: memoryview) -> None:
    buffer[:] = bytes(len(buffer))
