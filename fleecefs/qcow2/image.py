"""A new image: a qcow2 file that a job fills, in any order and from many threads.

Cluster 0 is for the header, the L1 table begins with cluster 1, and all else, L2 tables
and data, is appended in the order in which it is needed. Entries of L1 and L2 tables
are in the file before a write returns, and nothing is known of them that is not in the
file: so whoever opens the file after its writer was killed goes on where it stopped.

There is no header before `flush`, so nobody can take an unfinished file for an image.
`flush` finds out which clusters are in use by what is in the tables, writes reference
counts for just these, makes all that durable, and writes the sector that makes the file
an image. What comes after that takes the header away first.

An entry is written before the data, because another thread may write another part of
the same cluster. Until then the cluster reads as zeroes, for it is beyond all that was
ever written. What goes wrong in between leaves a cluster that nothing leads to, or one
that is all zeroes; the next try to write there finds and fills it.

The lock is held for reads and writes of entries, but never for those of data. They are
some bytes in pages of the page cache, and must not be done by two threads at once; a
target that makes them wait would make the data wait too.
"""

import os
import threading
from array import array
from typing import Self

from fleecefs.errors import FlushFailed, NotUsable
from fleecefs.qcow2.backing import Backing
from fleecefs.qcow2.bitmaps import Table, encode_table
from fleecefs.qcow2.contents import naming
from fleecefs.qcow2.counts import Counts
from fleecefs.qcow2.file import write_all
from fleecefs.qcow2.header import (
    AREA_MAX,
    L1_SIZE_MAX,
    SECTOR,
    Header,
    decode_header,
    new_header,
)
from fleecefs.qcow2.imagefile import ImageFile
from fleecefs.qcow2.mapping import UNALLOCATED, ZERO, Piece, Run, pieces, runs
from fleecefs.qcow2.tables import Tables
from fleecefs.units import KiB

# QEMU's default: an L2 table has the entries of 512 MiB.
_CLUSTER_SIZE = 64 * KiB


class NewImage:
    """The image while it is filled; of block/image.py's Image what a target needs.

    What was not written reads as zeroes, or as it does in the backing file. That file
    is never read here: of a cluster that is touched, all that the backing file has
    otherwise must be written, zeroed or discarded in the end, in whatever parts. No two
    threads may be in the same bytes at once.

    A range is that of the disk, and lies within it. What ends with the disk covers its
    last cluster.
    """

    def __init__(
        self, file: ImageFile, size: int, backing: Backing | None, cluster_size: int
    ) -> None:
        """Use `create` or `resume`."""
        self.size = size
        self.cluster_size = cluster_size
        self.file = file
        self.backing = backing
        with naming(file):
            self._header = _header(size, backing, cluster_size)
        self._tables = Tables(file, self._header)
        self._lock = threading.Lock()
        # How often something was about to change.
        self._changes = 0
        self._has_header = False
        self._flush_failed = False

    @classmethod
    def create(
        cls,
        file: ImageFile,
        size: int,
        backing: Backing | None = None,
        cluster_size: int = _CLUSTER_SIZE,
    ) -> Self:
        """Begin an image for a disk of that size in an empty file; it stays empty."""
        if file.size():
            raise NotUsable(f"{file.name}: is not empty")
        return cls(file, size, backing, cluster_size)

    @classmethod
    def resume(
        cls,
        file: ImageFile,
        size: int,
        backing: Backing | None = None,
        cluster_size: int = _CLUSTER_SIZE,
    ) -> Self:
        """Go on with what `create` began, with the same arguments.

        NotUsable, and nothing written, if the file has something else. All is there
        that was written before the writer was killed; after a power failure there may
        be any part of it.
        """
        image = cls(file, size, backing, cluster_size)
        with naming(file):
            image._find_header()
            image._tables.load()
        return image

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """Write, and return how much: less than all if space ran out midway.

        If it fails or is short, it may be tried again with the same data.
        """
        data = memoryview(data)
        self._check_range(len(data), offset)
        placed: list[Run] = []
        with self._lock:
            self._change()
            for piece in pieces(offset, len(data), self.cluster_size):
                placed += runs(piece, self._allocate(piece), self.cluster_size)
        return self._write(data, placed)

    def discard(self, length: int, offset: int) -> None:
        """Make the range read as zeroes, with as little storage as that takes."""
        self._check_range(length, offset)
        for piece in pieces(offset, length, self.cluster_size):
            with self._lock:
                placed = self._hide(piece)
            for run in placed:
                self.file.zero(run.length, run.place)

    # There is no cheaper way.
    zero = discard

    def flush(self) -> None:
        """Make the file an image, complete and durable.

        For when no write is running; one that begins later takes the header away.
        """
        counted_at = -1
        while True:
            with self._lock:
                if not self._has_header and counted_at == self._changes:
                    write_all(self.file, self._encoded_header()[:SECTOR], 0)
                    self._has_header = True
                if self._has_header:
                    break
                self._write_counts()
                counted_at = self._changes
            self._sync()
        self._sync()

    def allocated(self) -> int:
        """Return the bytes of storage it occupies."""
        return self.file.allocated()

    def close(self) -> None:
        self.file.close()

    def _check_range(self, length: int, offset: int) -> None:
        assert 0 <= offset <= offset + length <= self.size

    def _change(self) -> None:
        """Be called, with the lock, before anything is changed."""
        self._changes += 1
        if self._has_header:
            write_all(self.file, bytes(SECTOR), 0)
            self._has_header = False
            # Durable, before a power failure can leave the header with what comes now.
            # The lock is held: nobody may go on before that, and it is once.
            self._sync()

    def _sync(self) -> None:
        if self._flush_failed:
            # What was written before may be lost, and the kernel tells only once.
            raise FlushFailed(f"{self.file.name}: an earlier flush failed")
        try:
            self.file.flush()
        except OSError:
            self._flush_failed = True
            raise

    def _allocate(self, piece: Piece) -> Table:
        """Return the entries of a piece, each of them the place of a cluster now."""
        entries = self._tables.entries(piece)
        if min(entries) <= ZERO:
            places = (e if e > ZERO else self._tables.place() for e in entries)
            entries = array("Q", places)
            self._tables.write(piece, entries)
        return entries

    def _write(self, data: memoryview, placed: list[Run]) -> int:
        written = 0
        for run in placed:
            try:
                count = self.file.pwrite(data[written:][: run.length], run.place)
            except OSError:
                if not written:
                    raise
                return written
            written += count
            if count < run.length:
                break
        return written

    def _hide(self, piece: Piece) -> list[Run]:
        """Let a range not read from the backing file; return where there was data."""
        if self.backing is None and not self._tables.has(piece):
            return []
        entries = self._tables.entries(piece)
        placed = [
            run for run in runs(piece, entries, self.cluster_size) if run.place > ZERO
        ]
        is_backed = self.backing is not None and UNALLOCATED in entries
        if placed or is_backed:
            self._change()
        if is_backed:
            self._tables.write(piece, self._hidden(piece, entries))
        return placed

    def _hidden(self, piece: Piece, entries: Table) -> Table:
        hidden = array("Q", [entry or ZERO for entry in entries])
        for at in {0, piece.entry_count - 1}:
            if not entries[at] and not self._is_whole(piece, at):
                # The rest of the cluster will be written, or zeroed too.
                hidden[at] = self._tables.place()
        return hidden

    def _is_whole(self, piece: Piece, at: int) -> bool:
        """Tell whether a piece covers its cluster `at`, as far as there is a disk."""
        start = (piece.offset // self.cluster_size + at) * self.cluster_size
        end = min(start + self.cluster_size, self.size)
        return piece.offset <= start and end <= piece.offset + piece.length

    def _write_counts(self) -> None:
        """Write all that belongs to the image but the first sector.

        Counts take the place of those of an earlier flush: nothing leads to them.
        """
        with naming(self.file):
            used = self._tables.used()
        counts = Counts(self._header)
        self._header, blocks = counts.cover(self._header, array("Q"), used)
        end = len(used.used) * self.cluster_size
        self._tables.keep_off(end)
        for index, place in enumerate(blocks):
            if place:
                write_all(self.file, counts.block(used.used, index), place)
        table = encode_table(blocks)
        write_all(self.file, table, self._header.refcount_table_offset)
        if self.file.size() < end:
            write_all(self.file, b"\0", end - 1)
        rest = self._encoded_header()[SECTOR:]
        write_all(self.file, rest, SECTOR)

    def _encoded_header(self) -> bytes:
        name = os.fsencode(self.backing.name) if self.backing else b""
        return self._header.encode_image(name)

    def _find_header(self) -> None:
        """See whether the file is an image already, and that it is this one."""
        if not any(self.file.pread(SECTOR, 0)):
            return
        found = decode_header(self.file.pread(AREA_MAX, 0))
        self._header = self._header._replace(
            refcount_table_offset=found.refcount_table_offset,
            refcount_table_clusters=found.refcount_table_clusters,
        )
        wanted = self._encoded_header()
        if self.file.pread(len(wanted), 0) != wanted:
            raise NotUsable("is not the image that was begun here")
        self._has_header = True


def _header(size: int, backing: Backing | None, cluster_size: int) -> Header:
    header = new_header(size, cluster_size, l1_offset=cluster_size)
    if not 0 < header.l1_count * 8 <= L1_SIZE_MAX:
        raise NotUsable(f"a disk of {size} bytes can have no image")
    if backing is None:
        return header
    backing.check()
    return header._replace(backing_format=backing.format.encode())
