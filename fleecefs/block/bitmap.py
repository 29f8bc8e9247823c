"""Bits in use: one bit a cluster, in memory that outlives the daemon.

The bits are mmapped from preallocated files on tmpfs: the kernel keeps them when the
daemon is killed between two instructions, they vanish with the boot, and they can not
fault on a full or failing disk. A header page in front of them says whose they are.
Setting bits is atomic under the GIL; which bits to set is decided under a disk's lock.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Self
from uuid import UUID

from bitarray import bitarray

from fleecefs.errors import NotUsable
from fleecefs.killpoint import reached

PAGE = 4096

# Magic, version, CRC of the payload, disk, epoch, count of bits, CRC of these: the
# table is in docs/formats.md.
_HEADER = struct.Struct("<8sII16sQQI")
_MAGIC = b"flcbits\0"
_VERSION = 1

# In the header page: the length of a note, and its text (why a snapshot is broken).
_NOTE_AT = 256
_NOTE = struct.Struct("<I")
_NOTE_MAX = 1024

# And some numbers of 64 bits, for whoever counts.
_COUNTERS_AT = 2048
_COUNTERS = 32


class Owner:
    """Whose bits they are: checked whenever a file is opened."""

    def __init__(self, disk: UUID, epoch: int, count: int) -> None:
        self.disk, self.epoch, self.count = disk, epoch, count

    def header(self, payload_crc: int = 0) -> bytes:
        head = _HEADER.pack(
            _MAGIC, _VERSION, payload_crc, self.disk.bytes, self.epoch, self.count, 0
        )[:-4]
        return head + struct.pack("<I", zlib.crc32(head))

    def check(self, page: bytes, path: Path) -> int:
        """Return the payload's CRC, or raise NotUsable naming the file."""
        if len(page) < _HEADER.size or not page.startswith(_MAGIC):
            raise NotUsable(f"{path}: not a file of bits of fleecefs")
        _, version, payload_crc, disk, epoch, count, crc = _HEADER.unpack_from(page)
        if version != _VERSION:
            raise NotUsable(f"{path}: has version {version}, not {_VERSION}")
        if crc != zlib.crc32(page[: _HEADER.size - 4]):
            raise NotUsable(f"{path}: header is damaged")
        if (disk, epoch, count) != (self.disk.bytes, self.epoch, self.count):
            raise NotUsable(f"{path}: belongs to another disk or epoch")
        return int(payload_crc)


class LiveBits:
    """The bits of one epoch, mapped from a file on tmpfs.

    `bits` is an ordinary bitarray; `note` is a short text kept with them, written
    before whatever it excuses.
    """

    def __init__(self, path: Path, owner: Owner, memory: mmap.mmap) -> None:
        self.path = path
        self.owner = owner
        self._memory = memory
        view = memoryview(memory)[PAGE : PAGE + _payload_size(owner.count)]
        self.bits = bitarray(endian="little", buffer=view)
        end = _COUNTERS_AT + 8 * _COUNTERS
        self.counters = memoryview(memory)[_COUNTERS_AT:end].cast("Q")

    @classmethod
    def create(cls, path: Path, owner: Owner) -> Self:
        """Make a preallocated file of zero bits; ENOSPC if tmpfs is full."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, PAGE + _payload_size(owner.count))
            os.pwrite(fd, owner.header(), 0)
            return cls(path, owner, mmap.mmap(fd, 0))
        except OSError as e:
            raise OSError(e.errno, e.strerror, str(path)) from None
        finally:
            os.close(fd)

    @classmethod
    def open(cls, path: Path, owner: Owner) -> Self:
        """Map a file that an earlier daemon left; NotUsable if it is not that file."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            owner.check(os.pread(fd, PAGE, 0), path)
            if os.fstat(fd).st_size != PAGE + _payload_size(owner.count):
                raise NotUsable(f"{path}: is truncated")
            return cls(path, owner, mmap.mmap(fd, 0))
        finally:
            os.close(fd)

    @property
    def note(self) -> str | None:
        (length,) = _NOTE.unpack_from(self._memory, _NOTE_AT)
        start = _NOTE_AT + _NOTE.size
        text = self._memory[start : start + min(length, _NOTE_MAX)]
        return text.decode(errors="replace") if length else None

    @note.setter
    def note(self, text: str) -> None:
        data = text.encode()[:_NOTE_MAX]
        start = _NOTE_AT + _NOTE.size
        self._memory[start : start + len(data)] = data
        reached("note.written")
        # The length last: it is what makes the note be there.
        _NOTE.pack_into(self._memory, _NOTE_AT, len(data))

    def save(self, path: Path) -> None:
        """Write the bits to a file that survives the host, durable on return."""
        save_bits(path, self.owner, self.bits)

    def load(self, path: Path) -> None:
        """Take over the bits of a saved file; NotUsable if it is torn or foreign."""
        payload = read_saved(path, self.owner)
        self._memory[PAGE : PAGE + len(payload)] = payload

    def drop(self) -> None:
        """Remove the file; the mapping lives as long as somebody uses the bits."""
        self.path.unlink(missing_ok=True)


def save_bits(path: Path, owner: Owner, bits: bitarray) -> None:
    """Replace a file of saved bits, durably and in one step."""
    payload = bits.tobytes().ljust(_payload_size(owner.count), b"\0")
    page = owner.header(zlib.crc32(payload)).ljust(PAGE, b"\0")
    replace_file(path, page + payload)


def read_saved(path: Path, owner: Owner) -> bytes:
    """Return the bytes of saved bits; NotUsable if they are torn or another's."""
    data = path.read_bytes()
    crc = owner.check(data[:PAGE], path)
    payload = data[PAGE:]
    if len(payload) != _payload_size(owner.count) or zlib.crc32(payload) != crc:
        raise NotUsable(f"{path}: bits are damaged or truncated")
    return payload


def replace_file(path: Path, data: bytes) -> None:
    """Write a new version of a small file: whole, durable, or not at all."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    reached("replace.written")
    temporary.replace(path)
    reached("replace.renamed")
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, durably."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)


def sync_directory(path: Path) -> None:
    """Make names created, renamed or removed in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _payload_size(count: int) -> int:
    """Bytes of the bits, in whole 64-bit words."""
    return -(-count // 64) * 8


def next_set(bits: bitarray, start: int, stop: int) -> int:
    """Return the first set bit in [start, stop), or stop."""
    found = bits.find(1, start, stop)
    return found if found >= 0 else stop


def next_clear(bits: bitarray, start: int, stop: int) -> int:
    """Return the first clear bit in [start, stop), or stop."""
    found = bits.find(0, start, stop)
    return found if found >= 0 else stop
