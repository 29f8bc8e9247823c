"""Where two images differ: found sector by sector, and told in order.

A difference inside a dirty bitmap is one to be expected; one outside proves the bitmap
wrong, or the backup. The granularity of a bitmap is a whole number of sectors: so a
sector is either in it or not.
"""

from bitarray import bitarray

from fleecefs.block.bitmap import next_clear, next_set

SECTOR = 512

# Who has to look at more of them knows enough.
EXTENTS_MAX = 1000

# The begin and the end of what differs.
Run = tuple[int, int]


def find_runs(one: bytearray, other: bytearray, length: int) -> list[Run]:
    """Return the runs of sectors in which the first `length` bytes differ."""
    if one.startswith(memoryview(other)[:length]):
        return []
    runs: list[Run] = []
    for begin in range(0, length, SECTOR):
        end = min(begin + SECTOR, length)
        if one[begin:end] == other[begin:end]:
            continue
        if runs and runs[-1][1] == begin:
            begin, _ = runs.pop()
        runs.append((begin, end))
    return runs


class Differences:
    """What has been found, to be told in order.

    extents         [offset, length] of those outside the bitmap, the first ones
    count           of how many, adjacent ones being one
    outside, within the bytes that differ there
    """

    def __init__(
        self, dirty: bitarray | None = None, granularity: int = SECTOR
    ) -> None:
        """Without a bitmap all is outside."""
        self.extents: list[list[int]] = []
        self.count = 0
        self.outside = self.within = 0
        self._dirty = dirty
        self._granularity = granularity
        # Where what is outside has come to.
        self._end = -1

    def add(self, begin: int, end: int) -> None:
        """Tell of a run, which lies beyond all that were told of."""
        if self._dirty is None:
            self._add_outside(begin, end)
            return
        size = self._granularity
        while begin < end:
            index, stop = begin // size, (end - 1) // size + 1
            if self._dirty[index]:
                until = min(next_clear(self._dirty, index, stop) * size, end)
                self.within += until - begin
            else:
                until = min(next_set(self._dirty, index, stop) * size, end)
                self._add_outside(begin, until)
            begin = until

    def _add_outside(self, begin: int, end: int) -> None:
        assert begin >= self._end
        self.outside += end - begin
        if begin > self._end:
            self.count += 1
            if self.count <= EXTENTS_MAX:
                self.extents.append([begin, end - begin])
        elif self.count <= EXTENTS_MAX:
            self.extents[-1][1] += end - begin
        self._end = end
