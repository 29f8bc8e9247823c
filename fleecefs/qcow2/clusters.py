"""Which clusters of a qcow2 file are in use."""

from collections.abc import Iterable

from bitarray.util import zeros

from fleecefs.errors import NotUsable

# 32 MiB of bits: a file of 16 TiB, if its clusters have 64 KiB.
_CLUSTERS_MAX = 1 << 28


class Clusters:
    """The clusters of a file, as bits that are set for those in use."""

    def __init__(self, cluster_size: int, file_size: int) -> None:
        self.cluster_size = cluster_size
        self._file_size = file_size
        count = self._count(file_size)
        if count > _CLUSTERS_MAX:
            raise NotUsable(
                f"has {count} clusters; fleecefs takes up to {_CLUSTERS_MAX}"
            )
        self.used = zeros(count)

    def _count(self, length: int) -> int:
        return -(-length // self.cluster_size)

    def claim(self, offset: int, length: int, what: str) -> None:
        """Take what is in the file; NotUsable if it can not be there."""
        if not length:
            return
        if offset % self.cluster_size:
            raise NotUsable(f"{what} at {offset} does not begin with a cluster")
        if offset + length > self._file_size:
            raise NotUsable(f"{what} at {offset} is not within the file")
        first = offset // self.cluster_size
        end = first + self._count(length)
        if self.used.find(1, first, end) >= 0:
            raise NotUsable(f"{what} at {offset} overlaps with something else")
        self.used[first:end] = 1

    def claim_each(self, offsets: Iterable[int], what: str) -> None:
        """Take single clusters; `claim` for a million of them in a second or less."""
        size, used = self.cluster_size, self.used
        end = self._file_size - size
        for offset in offsets:
            index, within = divmod(offset, size)
            if within or offset > end or used[index]:
                # To say which of these it is.
                self.claim(offset, size, what)
            used[index] = 1

    def copy(self) -> "Clusters":
        copy = Clusters(self.cluster_size, 0)
        copy.used = self.used.copy()
        return copy

    def allocate(self, length: int) -> int:
        """Return the offset of free clusters in a row, which are in use from now on."""
        count = self._count(length)
        first = self._find_free(count)
        lacking = first + count - len(self.used)
        if lacking > 0:
            self.used.extend(zeros(lacking))
        self.used[first : first + count] = 1
        return first * self.cluster_size

    def _find_free(self, count: int) -> int:
        """Return the first cluster of a gap that is large enough, or is the end."""
        first = self.used.find(0)
        while first >= 0:
            end = self.used.find(1, first)
            if end < 0 or end - first >= count:
                return first
            first = self.used.find(0, end)
        return len(self.used)
