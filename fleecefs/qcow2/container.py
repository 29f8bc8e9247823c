"""A container: an empty qcow2 file that has the dirty bitmaps of a raw disk.

What a file holds is decided by its first sector. So bitmaps are changed like this:

    1  write bits, tables and directory into free clusters; raise their counts; flush
    2  write the first sector, which now leads to the new directory; flush
    3  lower the counts of the clusters that nothing leads to any more

A power failure before 2 leaves the old bitmaps, one after it the new ones, all of them
together. What else it can leave is counts that are too high, "leaked clusters" to
`qemu-img check`: they are set right when the file is opened to be changed. Clusters
whose bits have not changed are not written again; the new table has them too.

To say that bitmaps are in use is simpler: their flags are written where they are, each
within a sector, and flushed. QEMU takes the bitmaps away while it does so, by the
autoclear bit, because it writes the whole directory; we need not, and a power failure
leaves each flag as it was or set. It takes no space, so it works on a full disk too.

We write to nothing but containers: see `Container.open`.
"""

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple, Self

from bitarray import bitarray

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import (
    ALL_ZEROES,
    AUTO,
    EXTRA_DATA_COMPATIBLE,
    FLAGS_AT,
    IN_USE,
    Entry,
    Table,
    bit_count,
    check_entries,
    encode_bits,
    encode_directory,
    encode_table,
    table_count,
)
from fleecefs.qcow2.clusters import Clusters
from fleecefs.qcow2.contents import (
    Contents,
    has_guest_data,
    naming,
    read_contents,
    read_counts,
)
from fleecefs.qcow2.counts import Blocks, Counts
from fleecefs.qcow2.file import File, write_all
from fleecefs.qcow2.header import (
    L1_SIZE_MAX,
    SECTOR,
    Directory,
    Header,
    check_writable,
    new_header,
)
from fleecefs.units import KiB

# QEMU's default: a cluster has the bits of 32 GiB at a granularity of 64 KiB.
_CLUSTER_SIZE = 64 * KiB


class Bitmap(NamedTuple):
    """A bitmap as it is to be stored.

    `bits` has one bit a granularity, little-endian. `changed` are the ranges of bits,
    (first, end), outside of which they are as in the file; None is all of them.
    """

    name: str
    granularity: int
    bits: bitarray
    is_auto: bool = True
    is_in_use: bool = False
    changed: Sequence[tuple[int, int]] | None = None


class Container:
    """A container, open to be changed.

    If a change fails, by an OSError other than NotUsable, the file has the old bitmaps
    or the new ones; to find out which, and to go on, open it again. `was_void` says
    that there were bitmaps when it was opened, but none that could be trusted (see
    Header); they are gone.
    """

    def __init__(self, file: File, contents: Contents, clusters: Clusters) -> None:
        self.contents = contents
        self._file = file
        self._clusters = clusters
        self._has_failed = False
        self.was_void = contents.header.is_void

    @classmethod
    def create(
        cls,
        file: File,
        size: int,
        cluster_size: int = _CLUSTER_SIZE,
        identity: bytes | None = None,
    ) -> Self:
        """Make an empty file a container without bitmaps, and make it durable.

        The size of the disk is rounded up to sectors, as QEMU does. A power failure
        leaves a file that is none of qcow2, or the container; that the file's name is
        durable is the caller's to see to.
        """
        if file.size():
            raise NotUsable(f"{file.name}: is not empty")
        size = -(-size // SECTOR) * SECTOR
        # An entry of the L1 table stands for a cluster full of L2 entries.
        l1_size = -(-size * 64 // cluster_size**2) * 8
        if not 0 < l1_size <= L1_SIZE_MAX:
            raise NotUsable(f"{file.name}: a disk of {size} bytes can have no bitmaps")
        clusters = Clusters(cluster_size, 0)
        clusters.allocate(SECTOR)
        # Only allocated: as all that is never written, it reads as zeroes.
        header = new_header(size, cluster_size, clusters.allocate(l1_size))
        header = header._replace(l1_count=l1_size // 8, identity=identity)
        contents = Contents(header, array("Q"), {}, {})
        container = cls(file, contents, Clusters(cluster_size, 0))
        with container._changing():
            container._commit({}, {}, clusters)
        return container

    @classmethod
    def open(cls, file: File) -> Self:
        """Open a container and clean up what a crash has left in it.

        NotUsable, and nothing written, if there is guest data or anything else that
        writing could damage: see `check_writable`.
        """
        contents = read_contents(file)
        with naming(file):
            check_writable(contents.header)
        if has_guest_data(file, contents.header):
            raise NotUsable(f"{file.name}: has guest data, so it can only be read")
        container = cls(file, contents, contents.clusters(file.size()))
        container._repair()
        return container

    def bits(self, name: str) -> bitarray:
        """See Contents.bits."""
        return self.contents.bits(self._file, name)

    def mark_in_use(self, names: Iterable[str]) -> None:
        """Say, durably, that from now on writes may be missing in these bitmaps."""
        contents = self.contents
        assert contents.header.directory
        starts = accumulate((e.length for e in contents.entries.values()), initial=0)
        offsets = dict(zip(contents.entries, starts, strict=False))
        entries = dict(contents.entries)
        with self._changing():
            for name in names:
                assert not entries[name].is_foreign
                flags = entries[name].flags | IN_USE
                entries[name] = entries[name]._replace(flags=flags)
                offset = contents.header.directory.offset + offsets[name] + FLAGS_AT
                write_all(self._file, struct.pack(">I", flags), offset)
            self._file.flush()
        self.contents = contents._replace(entries=entries)

    def update(
        self, bitmaps: Iterable[Bitmap] = (), remove: Iterable[str] = ()
    ) -> None:
        """Remove bitmaps, add or replace others, durably and all at once.

        NotUsable, and nothing written, if they are beyond the limits. Bitmaps that are
        not named stay as they are, foreign ones too.
        """
        bitmaps = list(bitmaps)
        entries = dict(self.contents.entries)
        tables = dict(self.contents.tables)
        for name in remove:
            del entries[name], tables[name]
        with naming(self._file):
            for bitmap in bitmaps:
                entries[bitmap.name] = self._planned(bitmap, entries)
            check_entries(
                entries.values(), self.contents.size, self.contents.header.cluster_size
            )
        with self._changing():
            clusters = self._clusters.copy()
            for bitmap in bitmaps:
                old = tables.get(bitmap.name)
                table = self._write_bits(bitmap, old, clusters)
                if table != old:
                    offset = self._write_padded(encode_table(table), clusters)
                    entry = entries[bitmap.name]._replace(table_offset=offset)
                    entries[bitmap.name], tables[bitmap.name] = entry, table
            self._commit(entries, tables, clusters)

    def _planned(self, bitmap: Bitmap, entries: dict[str, Entry]) -> Entry:
        """Return the entry of a bitmap, but for where its table will be."""
        name, granularity, bits = bitmap[:3]
        size, cluster_size = self.contents.size, self.contents.header.cluster_size
        assert granularity.bit_count() == 1
        assert len(bits) == bit_count(size, granularity)
        assert bits.endian == "little"
        entry = Entry(
            name,
            granularity.bit_length() - 1,
            AUTO * bitmap.is_auto | IN_USE * bitmap.is_in_use,
            0,
            table_count(size, granularity, cluster_size),
        )
        old = entries.get(name)
        if old is None:
            assert bitmap.changed is None, "nothing has changed in what is new"
            return entry
        if old.is_foreign:
            raise NotUsable(f"bitmap {name!r} is of a kind that fleecefs does not know")
        if bitmap.changed is not None:
            assert old.granularity == entry.granularity
            assert old.table_count == entry.table_count
        return entry._replace(
            flags=entry.flags | old.flags & EXTRA_DATA_COMPATIBLE,
            table_offset=old.table_offset,
            extra_data=old.extra_data,
        )

    def _write_bits(
        self, bitmap: Bitmap, old: "Table | None", clusters: Clusters
    ) -> Table:
        """Write the clusters whose bits have changed, and return the new table."""
        cluster_size = clusters.cluster_size
        if bitmap.changed is None or old is None:
            count = table_count(self.contents.size, bitmap.granularity, cluster_size)
            table = array("Q", [ALL_ZEROES]) * count
            indexes = set(range(count))
        else:
            table = old[:]
            indexes = set()
            per_cluster = cluster_size * 8
            for first, end in bitmap.changed:
                indexes.update(range(first // per_cluster, -(-end // per_cluster)))
        for index in sorted(indexes):
            data = encode_bits(bitmap.bits, index, cluster_size)
            table[index] = self._write_padded(data, clusters) if data else ALL_ZEROES
        return table

    def _write_padded(self, data: bytes, clusters: Clusters) -> int:
        """Write into new clusters, the rest of them zeroes; return where they are."""
        offset = clusters.allocate(len(data))
        padding = bytes(-len(data) % clusters.cluster_size)
        write_all(self._file, data + padding, offset)
        return offset

    def _commit(
        self, entries: dict[str, Entry], tables: dict[str, Table], clusters: Clusters
    ) -> None:
        """Make these the bitmaps of the file, in the order told at the top."""
        directory = None
        if entries:
            data = encode_directory(entries.values())
            offset = self._write_padded(data, clusters)
            directory = Directory(len(entries), len(data), offset)
        old = self.contents
        counts = Counts(old.header)
        header, blocks = counts.cover(old.header, old.blocks, clusters)
        header = header.with_directory(directory)
        if blocks != old.blocks:
            self._write_new_counts(header, blocks, clusters)
        self._write_counts(self._clusters, clusters, old.blocks)
        self._file.flush()
        self._write_header(header)
        self.contents = Contents(header, blocks, entries, tables)
        self._clusters = self.contents.clusters(self._file.size())
        self._write_counts(clusters, self._clusters, blocks)

    def _write_new_counts(
        self, header: Header, blocks: Blocks, clusters: Clusters
    ) -> None:
        """Write the blocks that are new, and the table, which is new then."""
        counts = Counts(header)
        old = self.contents.blocks
        for index, offset in enumerate(blocks):
            if offset and not (index < len(old) and old[index]):
                write_all(self._file, counts.block(clusters.used, index), offset)
        write_all(self._file, encode_table(blocks), header.refcount_table_offset)

    def _write_counts(self, before: Clusters, after: Clusters, blocks: Blocks) -> None:
        counts = Counts(self.contents.header)
        for data, offset in counts.changes(before.used, after.used, blocks):
            write_all(self._file, data, offset)

    def _write_header(self, header: Header) -> None:
        write_all(self._file, header.encode(), 0)
        self._file.flush()

    def _repair(self) -> None:
        """Make durable what has been read, and the counts right.

        Header and flags may be in the page cache only: their writer was killed, or a
        flush failed. What they say can be relied on when it is durable, not before.
        """
        counts = Counts(self.contents.header)
        used = self._clusters.used
        with naming(self._file):
            if counts.uncovered(used, self.contents.blocks):
                raise NotUsable("has damaged counts: try `qemu-img check -r all` on it")
            wrong = [
                (wanted, self.contents.blocks[index])
                for index, found in read_counts(self._file, self.contents)
                if found != (wanted := counts.block(used, index))
            ]
        header = self.contents.header
        header = header.with_directory(header.directory)
        if header.directory:
            directory = encode_directory(self.contents.entries.values())
            write_all(self._file, directory, header.directory.offset)
        self._write_header(header)
        for data, offset in wrong:
            write_all(self._file, data, offset)
        self.contents = self.contents._replace(header=header)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let nothing be changed any more once a change has failed midway."""
        if self._has_failed:
            raise NotUsable(f"{self._file.name}: a change has failed; open it again")
        self._has_failed = True
        yield
        self._has_failed = False
