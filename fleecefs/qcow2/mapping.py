"""From the clusters of a disk to those of a qcow2 file: L1 and L2 tables.

The L1 table has the offset of each L2 table, 0 where there is none. An L2 table is a
cluster of entries, one for each cluster of the disk: where its data is; or that it
reads as zeroes; or that it is unallocated, and reads as it does in the backing file.

Source: docs/interop/qcow2.rst of QEMU.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fleecefs.qcow2.bitmaps import Table

# What an L2 entry is when it is not the offset of a cluster.
UNALLOCATED, ZERO = 0, 1

# Of entries of both tables: the count of the cluster is exactly 1.
COPIED = 1 << 63
# Of L2 entries.
COMPRESSED = 1 << 62
OFFSET_BITS = 0x00FF_FFFF_FFFF_FE00


class Piece(NamedTuple):
    """What of a range belongs to one L2 table: so many entries from `first` on."""

    table_index: int
    first: int
    entry_count: int
    offset: int
    length: int


class Run(NamedTuple):
    """A range of the disk that lies in a row in the file, from `place` on.

    Or `place` is UNALLOCATED or ZERO, and that is so for all of it.
    """

    place: int
    offset: int
    length: int


def pieces(offset: int, length: int, cluster_size: int) -> Iterator[Piece]:
    """Cut a range of the disk where another L2 table begins."""
    per_table = cluster_size // 8
    table_reach = per_table * cluster_size
    end = offset + length
    while offset < end:
        stop = min(end, (offset // table_reach + 1) * table_reach)
        index = offset // cluster_size
        count = -(-stop // cluster_size) - index
        table_index, first = divmod(index, per_table)
        yield Piece(table_index, first, count, offset, stop - offset)
        offset = stop


def runs(piece: Piece, entries: Table, cluster_size: int) -> Iterator[Run]:
    """Yield where the range lies by these entries, in the order of the disk.

    What entries there are besides the offset of data and ZERO is not looked at.
    """
    end = piece.offset + piece.length
    run = Run(UNALLOCATED, piece.offset, 0)
    at = piece.offset
    for entry in entries:
        within = at % cluster_size
        length = min(cluster_size - within, end - at)
        place = _place(entry, within)
        follows = run.place if run.place <= ZERO else run.place + run.length
        if place == follows:
            run = Run(run.place, run.offset, run.length + length)
        else:
            if run.length:
                yield run
            run = Run(place, at, length)
        at += length
    yield run


def _place(entry: int, within: int) -> int:
    if entry & ZERO:
        return ZERO
    place = entry & OFFSET_BITS
    return place + within if place else UNALLOCATED
