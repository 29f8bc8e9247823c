"""Bitmap directory, bitmap tables and bits of a qcow2 file: bytes <-> values.

The directory has an entry for each bitmap, an entry leads to the bitmap's table, and
the table to the clusters with its bits: bit n is in byte n / 8, its lowest bit first.

Source: docs/interop/qcow2.rst of QEMU.
"""

import struct
import sys
from array import array
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from bitarray import bitarray

from fleecefs.errors import NotUsable
from fleecefs.qcow2.header import BITMAPS_MAX, DIRECTORY_SIZE_MAX
from fleecefs.units import MiB

# What is in a table instead of the offset of a cluster.
ALL_ZEROES, ALL_ONES = 0, 1

# Offset of the table, its count of entries, flags, kind, granularity, length of the
# name, length of extra data.
_ENTRY = struct.Struct(">QIIBBHI")
FLAGS_AT = 12

IN_USE, AUTO, EXTRA_DATA_COMPATIBLE = 1, 2, 4
_FLAGS_KNOWN = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE

DIRTY_TRACKING = 1

# QEMU's limits.
_GRANULARITY_BITS = range(9, 32)
_NAME_LENGTH = range(1, 1024)

# Ours: what the bits of one bitmap, and of all in a file, may take of memory.
BITS_SIZE_MAX = 64 * MiB
_ALL_BITS_SIZE_MAX = 256 * MiB
# 256 MiB of bits in clusters of 512 bytes, and twice that for bitmaps in use.
_TABLE_COUNT_MAX = 1 << 20

# Entries of 64 bits; the offset of a cluster is in bits 9 to 55.
Table: TypeAlias = "array[int]"
_OFFSET_BITS = 0x00FF_FFFF_FFFF_FE00


class Entry(NamedTuple):
    """A bitmap as the directory has it."""

    name: str
    granularity_bits: int
    flags: int
    table_offset: int
    table_count: int
    kind: int = DIRTY_TRACKING
    extra_data: bytes = b""

    @property
    def granularity(self) -> int:
        return 1 << self.granularity_bits

    @property
    def is_in_use(self) -> bool:
        """Whether writes may be missing: it was in use when the file was left."""
        return bool(self.flags & IN_USE)

    @property
    def is_auto(self) -> bool:
        """Whether it is to record all writes, from when the disk is opened."""
        return bool(self.flags & AUTO)

    @property
    def is_foreign(self) -> bool:
        """Whether we do not understand it: it is kept as it is, and not used."""
        needs_more = self.extra_data and not self.flags & EXTRA_DATA_COMPATIBLE
        return self.kind != DIRTY_TRACKING or bool(needs_more)

    @property
    def length(self) -> int:
        """The bytes it takes in the directory."""
        length = _ENTRY.size + len(self.extra_data) + len(self.name.encode())
        return (length + 7) // 8 * 8

    def encode(self) -> bytes:
        name = self.name.encode()
        head = _ENTRY.pack(
            self.table_offset,
            self.table_count,
            self.flags,
            self.kind,
            self.granularity_bits,
            len(name),
            len(self.extra_data),
        )
        return (head + self.extra_data + name).ljust(self.length, b"\0")


def encode_directory(entries: Iterable[Entry]) -> bytes:
    return b"".join(entry.encode() for entry in entries)


def decode_directory(data: bytes, count: int) -> list[Entry]:
    """Return `count` entries, which are all of the data; otherwise NotUsable."""
    view = memoryview(data)
    entries = []
    offset = 0
    for _ in range(count):
        entry = _decode_entry(view[offset:])
        entries.append(entry)
        offset += entry.length
    if offset != len(data):
        raise NotUsable("bitmap directory is not as long as its entries")
    return entries


def _decode_entry(data: memoryview) -> Entry:
    if len(data) < _ENTRY.size:
        raise NotUsable("bitmap directory is not as long as its entries")
    *numbers, name_length, extra_length = _ENTRY.unpack_from(data)
    table_offset, table_count, flags, kind, granularity_bits = numbers
    extra_end = _ENTRY.size + extra_length
    if extra_end + name_length > len(data):
        raise NotUsable("bitmap directory is not as long as its entries")
    try:
        name = bytes(data[extra_end : extra_end + name_length]).decode()
    except UnicodeDecodeError:
        raise NotUsable("has a bitmap whose name is not UTF-8") from None
    extra = bytes(data[_ENTRY.size : extra_end])
    return Entry(name, granularity_bits, flags, table_offset, table_count, kind, extra)


def check_entries(entries: Iterable[Entry], size: int, cluster_size: int) -> None:
    """Raise NotUsable if a disk of that size can not have these bitmaps in a file."""
    entries = list(entries)
    for entry in entries:
        _check_name(entry.name)
        try:
            _check_entry(entry, size, cluster_size)
        except NotUsable as e:
            raise NotUsable(f"bitmap {entry.name!r} {e}") from None
    if len({each.name for each in entries}) < len(entries):
        raise NotUsable("has two bitmaps of the same name")
    bits = sum(_bits_size(size, each) for each in entries if not each.is_foreign)
    for what, number, number_max in [
        ("bitmaps", len(entries), BITMAPS_MAX),
        (
            "bytes of directory",
            sum(each.length for each in entries),
            DIRECTORY_SIZE_MAX,
        ),
        ("bytes of bits", bits, _ALL_BITS_SIZE_MAX),
        (
            "clusters of bits",
            sum(each.table_count for each in entries),
            _TABLE_COUNT_MAX,
        ),
    ]:
        if number > number_max:
            raise NotUsable(f"has {number} {what}; fleecefs takes up to {number_max}")


def _check_name(name: str) -> None:
    if len(name.encode()) not in _NAME_LENGTH:
        raise NotUsable("has a bitmap whose name is empty or too long")
    if not name.isprintable():
        raise NotUsable(f"has a bitmap whose name can not be printed: {name!r}")


def _check_entry(entry: Entry, size: int, cluster_size: int) -> None:
    if entry.flags & ~_FLAGS_KNOWN:
        raise NotUsable(f"has flags that fleecefs does not know: {entry.flags:#x}")
    if not entry.table_count:
        raise NotUsable("has no table")
    if entry.is_foreign:
        return
    if entry.granularity_bits not in _GRANULARITY_BITS:
        raise NotUsable(f"has a granularity of 2**{entry.granularity_bits}")
    if _bits_size(size, entry) > BITS_SIZE_MAX:
        raise NotUsable(f"has more than {BITS_SIZE_MAX} bytes of bits")
    # One in use may be left over from before the disk got another size.
    wanted = table_count(size, entry.granularity, cluster_size)
    if entry.table_count != wanted and not entry.is_in_use:
        raise NotUsable(f"has a table of {entry.table_count} entries, not {wanted}")


def _bits_size(size: int, entry: Entry) -> int:
    return (bit_count(size, entry.granularity) + 7) // 8


def bit_count(size: int, granularity: int) -> int:
    """Return how many bits a bitmap has for a disk of that size."""
    return -(-size // granularity)


def table_count(size: int, granularity: int, cluster_size: int) -> int:
    """Return how many entries its table has: one for each cluster of bits."""
    return -(-bit_count(size, granularity) // (cluster_size * 8))


def encode_table(table: Table) -> bytes:
    return _swapped(table).tobytes()


def decode_table(data: bytes) -> Table:
    return _swapped(array("Q", data))


def _swapped(table: Table) -> Table:
    """Return it in the other order of bytes, if this machine needs that."""
    table = table[:]
    if sys.byteorder == "little":
        table.byteswap()
    return table


def check_table(table: Table) -> None:
    """Raise NotUsable if bits are set that have no meaning."""
    for value in table:
        if value & ~_OFFSET_BITS and value != ALL_ONES:
            raise NotUsable(f"has a table with an entry {value:#x}")


def encode_bits(bits: bitarray, index: int, cluster_size: int) -> bytes:
    """Return the cluster with that index in the table; empty if it is all zeroes."""
    first = index * cluster_size * 8
    piece = bits[first : first + cluster_size * 8]
    return piece.tobytes().ljust(cluster_size, b"\0") if piece.any() else b""


def decode_bits(data: bytes) -> bitarray:
    """Return all bits of a cluster, those beyond the end of the disk too."""
    bits = bitarray(endian="little")
    bits.frombytes(data)
    return bits
