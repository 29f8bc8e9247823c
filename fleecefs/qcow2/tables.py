"""L1 and L2 tables of an image that is filled, and where its next cluster goes.

Only places of data are kept track of here, not the data. Of the tables nothing is
remembered but the L1 table, so that what is in the file is true whatever went wrong:
an entry that could not be written may be there or not, and its place is not used again.
"""

import struct
from array import array

from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import Table, decode_table, encode_table
from fleecefs.qcow2.clusters import Clusters
from fleecefs.qcow2.file import File, write_all
from fleecefs.qcow2.header import Header
from fleecefs.qcow2.mapping import COPIED, ZERO, Piece
from fleecefs.units import TiB

# So far beyond the end of the file, and the size of the disk, there may be places that
# were lost to writes that failed. More is damage, and would take much memory to count.
_LOST_MAX = 16 * TiB


class Tables:
    """The tables; only one thread at a time may use them."""

    def __init__(self, file: File, header: Header) -> None:
        self._file = file
        self._header = header
        self._cluster_size = header.cluster_size
        self._l1: Table = array("Q", bytes(header.l1_count * 8))
        self._next = self._begin

    @property
    def _begin(self) -> int:
        """The place of the first cluster behind the L1 table."""
        return self._rounded(self._header.l1_offset + self._header.l1_count * 8)

    def _rounded(self, end: int) -> int:
        return -(-end // self._cluster_size) * self._cluster_size

    def load(self) -> None:
        """Go on with what is in the file; NotUsable if it can not be ours."""
        self.keep_off(self._file.size())
        self.keep_off(len(self.used().used) * self._cluster_size)

    def keep_off(self, end: int) -> None:
        """Let no new cluster begin before that."""
        self._next = max(self._next, self._rounded(end))

    def place(self) -> int:
        """Return the entry for a new cluster: nothing was ever written there."""
        place = self._next
        self._next += self._cluster_size
        return place | COPIED

    def has(self, piece: Piece) -> bool:
        """Return whether there is an L2 table: otherwise all is unallocated."""
        return bool(self._l1[piece.table_index])

    def entries(self, piece: Piece) -> Table:
        table = self._l1[piece.table_index]
        if not table:
            return array("Q", bytes(piece.entry_count * 8))
        return self._read(piece.entry_count, table + piece.first * 8)

    def write(self, piece: Piece, entries: Table) -> None:
        """Change the entries in the file."""
        table = self._l1[piece.table_index] or self._new_table(piece.table_index)
        write_all(self._file, encode_table(entries), table + piece.first * 8)

    def _new_table(self, index: int) -> int:
        entry = self.place()
        at = self._header.l1_offset + index * 8
        write_all(self._file, struct.pack(">Q", entry), at)
        self._l1[index] = entry & ~COPIED
        return self._l1[index]

    def _read(self, count: int, offset: int) -> Table:
        """Read what was written there; until then it reads as zeroes."""
        return decode_table(self._file.pread(count * 8, offset).ljust(count * 8, b"\0"))

    def used(self) -> Clusters:
        """Return the clusters of header, tables and data, by what is in the file.

        NotUsable if anything leads to where we put nothing, or to what has a use.
        """
        entries = self._read(self._header.l1_count, self._header.l1_offset)
        self._l1 = array("Q", [entry & ~COPIED for entry in entries])
        found = zeros(self._begin // self._cluster_size)
        found.setall(1)
        count = len(found)
        for table in filter(None, self._l1):
            entries = self._read(self._cluster_size // 8, table)
            places = [entry & ~COPIED for entry in entries if entry > ZERO]
            places.append(table)
            self._claim(places, found)
            count += len(places)
        if found.count() != count:
            raise NotUsable("has tables that lead to the same place twice")
        clusters = Clusters(self._cluster_size, 0)
        clusters.used = found
        return clusters

    def _claim(self, places: list[int], found: bitarray) -> None:
        end = max(places) + self._cluster_size
        # An entry is written before data is: places may lie beyond the end.
        end_max = max(self._next, self._file.size() + self._header.size + _LOST_MAX)
        if end > end_max or any(place % self._cluster_size for place in places):
            raise NotUsable("has a table that leads to where nothing can be")
        found.extend(zeros(max(0, end // self._cluster_size - len(found))))
        found[[place // self._cluster_size for place in places]] = 1
