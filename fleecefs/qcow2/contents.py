"""What a qcow2 file holds, as far as dirty bitmaps go: read, and checked in all parts.

Files come from anywhere, so nothing in them is believed: every number is compared with
its limit before it is used, nothing outside the file is read, no two structures may
overlap, and what is read of a file is limited. Whatever is wrong is a NotUsable that
names the file. The bits are read when they are asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import (
    ALL_ONES,
    ALL_ZEROES,
    Entry,
    Table,
    bit_count,
    check_entries,
    check_table,
    decode_bits,
    decode_directory,
    decode_table,
    table_count,
)
from fleecefs.qcow2.clusters import Clusters
from fleecefs.qcow2.counts import Blocks
from fleecefs.qcow2.file import File
from fleecefs.qcow2.header import AREA_MAX, L1_SIZE_MAX, Header, decode_header
from fleecefs.units import MiB

# Header, directory, the tables of a million clusters and the refcount table are 17 MiB.
_READ_MAX = 32 * MiB

_NO_CLUSTER = (ALL_ZEROES, ALL_ONES)

# An entry of the snapshot table has at least so many bytes.
_SNAPSHOT_SIZE_MIN = 40

# What a container has of reference counts is far less; see Counts.
_COUNTS_SIZE_MAX = 64 * MiB


class Contents(NamedTuple):
    """The header and all that it leads to, but for guest data and bits.

    `entries` and `tables` have the same names, in the order of the directory.
    """

    header: Header
    blocks: Blocks
    entries: dict[str, Entry]
    tables: dict[str, Table]

    @property
    def size(self) -> int:
        """The size of the disk in bytes."""
        return self.header.size

    def clusters(self, file_size: int) -> Clusters:
        """Return the clusters that are in use; NotUsable if any are so twice."""
        header, cluster_size = self.header, self.header.cluster_size
        clusters = Clusters(cluster_size, file_size)
        # The file may end within the cluster, but not within the first sector of it.
        clusters.claim(0, 1, "header")
        clusters.claim(header.l1_offset, header.l1_count * 8, "L1 table")
        length = header.refcount_table_clusters * cluster_size
        clusters.claim(header.refcount_table_offset, length, "refcount table")
        clusters.claim_each(filter(None, self.blocks), "refcount block")
        length = header.snapshot_count * _SNAPSHOT_SIZE_MIN
        clusters.claim(header.snapshots_offset, length, "snapshot table")
        if header.directory:
            _, length, offset = header.directory
            clusters.claim(offset, length, "bitmap directory")
        for name, entry in self.entries.items():
            clusters.claim(entry.table_offset, entry.table_count * 8, "bitmap table")
            kept = (v for v in self.tables[name] if v not in _NO_CLUSTER)
            clusters.claim_each(kept, "cluster of bits")
        return clusters

    def bits(self, file: File, name: str) -> bitarray:
        """Return the bits as they were stored last, little-endian, one a granularity.

        NotUsable if the bitmap is foreign. If it is in use, writes since then are
        missing: the bits are of use only to those who know them from elsewhere.
        """
        with naming(file):
            return self._bits(file, name)

    def _bits(self, file: File, name: str) -> bitarray:
        entry, table = self.entries[name], self.tables[name]
        cluster_size = self.header.cluster_size
        count = bit_count(self.size, entry.granularity)
        if entry.is_foreign:
            raise NotUsable(f"bitmap {name!r} is of a kind that fleecefs does not know")
        if len(table) != table_count(self.size, entry.granularity, cluster_size):
            raise NotUsable(f"bitmap {name!r} is in use, and of another disk size")
        bits = zeros(count, endian="little")
        for index, value in enumerate(table):
            first = index * cluster_size * 8
            end = min(first + cluster_size * 8, count)
            if value == ALL_ONES:
                bits[first:end] = 1
            elif value != ALL_ZEROES:
                piece = decode_bits(_Reader(file).read(cluster_size, value))
                if piece[end - first :].any():
                    raise NotUsable(
                        f"bitmap {name!r} has bits set beyond the end of the disk"
                    )
                bits[first:end] = piece[: end - first]
        return bits


def read_contents(file: File) -> Contents:
    """Return what a qcow2 file holds; nothing is written to it.

    It may have guest data, a backing file and snapshots: they do not matter here. The
    bitmaps of a file whose header `is_void` can not be trusted, and are not there.
    """
    with naming(file):
        reader = _Reader(file)
        header = decode_header(reader.read_some(AREA_MAX, 0))
        entries: list[Entry] = []
        if header.directory:
            count, length, offset = header.directory
            entries = decode_directory(reader.read(length, offset), count)
            check_entries(entries, header.size, header.cluster_size)
        tables = {each.name: _read_table(reader, each) for each in entries}
        length = header.refcount_table_clusters * header.cluster_size
        blocks = decode_table(reader.read(length, header.refcount_table_offset))
        contents = Contents(
            header, blocks, {each.name: each for each in entries}, tables
        )
        contents.clusters(file.size())
        return contents


def _read_table(reader: "_Reader", entry: Entry) -> Table:
    table = decode_table(reader.read(entry.table_count * 8, entry.table_offset))
    check_table(table)
    return table


def has_guest_data(file: File, header: Header) -> bool:
    """Return whether any cluster has ever been written, by what is in the L1 table."""
    with naming(file):
        reader = _Reader(file, L1_SIZE_MAX)
        return any(reader.read(header.l1_count * 8, header.l1_offset).strip(b"\0"))


def read_counts(file: File, contents: Contents) -> Iterator[tuple[int, bytes]]:
    """Yield index and bytes of the refcount blocks that are."""
    reader = _Reader(file, _COUNTS_SIZE_MAX)
    for index, offset in enumerate(contents.blocks):
        if offset:
            yield index, reader.read(contents.header.cluster_size, offset)


@contextmanager
def naming(file: File) -> Iterator[None]:
    """Put the name of the file in front of what is wrong with it."""
    try:
        yield
    except NotUsable as e:
        raise NotUsable(f"{file.name}: {e}") from None


class _Reader:
    """Reads within the file only, and only so much."""

    def __init__(self, file: File, length_max: int = _READ_MAX) -> None:
        self._file = file
        self._left = length_max

    def read(self, length: int, offset: int) -> bytes:
        if offset + length > self._file.size():
            raise NotUsable(f"has something at {offset} that is not within the file")
        self._left -= length
        if self._left < 0:
            raise NotUsable("has more tables than fleecefs reads")
        data = self._file.pread(length, offset)
        if len(data) != length:
            raise NotUsable("became shorter while it was read")
        return data

    def read_some(self, length: int, offset: int) -> bytes:
        """Read less where the file ends before."""
        return self.read(min(length, self._file.size() - offset), offset)
