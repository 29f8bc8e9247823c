"""Reference counts of clusters, in refcount blocks of a cluster each.

They are never believed. A container has no guest data, so a cluster is in use if and
only if the header leads to it, and then its count is 1. Counts are written for other
programs, and for `qemu-img check`.

Source: docs/interop/qcow2.rst of QEMU.
"""

from array import array
from collections.abc import Iterator
from typing import TypeAlias

from bitarray import bitarray
from bitarray.util import zeros

from fleecefs.qcow2.clusters import Clusters
from fleecefs.qcow2.header import Header

# The refcount table: the offset of each block, 0 where there is none.
Blocks: TypeAlias = "array[int]"


class Counts:
    """How the counts of a file are laid out."""

    def __init__(self, header: Header) -> None:
        self._order = header.refcount_order
        self._block_size = header.cluster_size
        self._per_block = self._block_size * 8 >> self._order

    def encode(self, used: bitarray) -> bytes:
        """Return counts that are 1 where a cluster is in use; a multiple of 8."""
        if self._order >= 3:
            width = 1 << (self._order - 3)
            counts = bytearray(len(used) * width)
            counts[width - 1 :: width] = used.unpack(b"\0", b"\1")
            return bytes(counts)
        width = 1 << self._order
        bits = bitarray(len(used) * width, endian="little")
        bits[::width] = used
        return bits.tobytes()

    def block(self, used: bitarray, index: int) -> bytes:
        """Return a whole block of counts."""
        first = index * self._per_block
        piece = used[first : first + self._per_block]
        piece.extend(zeros(self._per_block - len(piece)))
        return self.encode(piece)

    def uncovered(self, used: bitarray, blocks: Blocks) -> list[int]:
        """Return the indexes of blocks that are missing."""
        return [
            index
            for index in range(-(-len(used) // self._per_block))
            if (index >= len(blocks) or not blocks[index])
            and used.find(1, index * self._per_block, (index + 1) * self._per_block)
            >= 0
        ]

    def changes(
        self, before: bitarray, after: bitarray, blocks: Blocks
    ) -> Iterator[tuple[bytes, int]]:
        """Yield (data, offset) for what has to be written into the blocks that are."""
        length = max(len(before), len(after))
        # A multiple of 8, so that counts of less than a byte come in whole bytes.
        length = -(-length // 8) * 8
        before = before + zeros(length - len(before))
        after = after + zeros(length - len(after))
        changed = before ^ after
        for index, offset in enumerate(blocks):
            first, end = index * self._per_block, (index + 1) * self._per_block
            if first >= length:
                return
            low = changed.find(1, first, end)
            if not offset or low < 0:
                continue
            high = changed.find(1, first, end, right=True)
            low, stop = low // 8 * 8, high // 8 * 8 + 8
            at = ((low - first) << self._order) // 8
            yield self.encode(after[low:stop]), offset + at

    def cover(
        self, header: Header, blocks: Blocks, clusters: Clusters
    ) -> tuple[Header, Blocks]:
        """Return header and blocks that have a count for each cluster in use.

        If that takes more blocks they are allocated, and so is a new table: so that
        the header brings all of it into force at once.
        """
        blocks = blocks[:]
        is_new = False
        while lacking := self.uncovered(clusters.used, blocks):
            # One more, as table and blocks may reach into the next one.
            count = max(len(blocks), lacking[-1] + 2)
            if not is_new or count > len(blocks):
                table_clusters = -(-count * 8 // self._block_size)
                header = header._replace(
                    refcount_table_offset=clusters.allocate(count * 8),
                    refcount_table_clusters=table_clusters,
                )
                capacity = table_clusters * self._block_size // 8
                blocks.extend([0] * (capacity - len(blocks)))
                is_new = True
            for index in lacking:
                blocks[index] = clusters.allocate(self._block_size)
        return header, blocks
