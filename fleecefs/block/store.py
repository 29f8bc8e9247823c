"""Where an epoch's preserved clusters live: a RAM tier in front of a disk tier.

A tier is a sparse file with every cluster at its own offset, and a bitmap of the
clusters it holds. A cluster that reads as zeroes is in no tier: it costs no space and
no I/O. What a tier may hold is limited by a Budget that many stores share.

Data is in a tier before its bit is set, and the bit of a tier is set before the
epoch's: whoever sees a bit can read the data.
"""

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator

from bitarray import bitarray

from fleecefs.block.bitmap import next_set
from fleecefs.block.extent import Extent
from fleecefs.block.image import Image
from fleecefs.errors import NoSpace, Unsupported
from fleecefs.killpoint import reached

# So many parts of a tier are read with what is between them: a call for each would take
# longer. Not of one on disk, if most of it is between: the kernel caches holes, too.
_SCATTERED = 4

# Runs are freed with what is between them, if that is no more.
_GAP_SIZE_MAX = 1 << 20

# A run is read whole before it is written again: this much memory at most.
COPY_SIZE_MAX = 1 << 20


class Budget:
    """Bytes that stores may hold together; None is no limit.

    One within another counts what a part of the stores hold of its bytes.
    """

    def __init__(
        self, limit: int | None, name: str, *, within: "Budget | None" = None
    ) -> None:
        self.limit = limit
        self._within = within
        self.name = name
        self.used = 0
        self.peak = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Reserve bytes, or return False if they are not there."""
        if self._within is not None and not self._within.take(size):
            return False
        with self._lock:
            used = self.used + size
            has_room = self.limit is None or used <= self.limit
            if has_room:
                self.used = used
                self.peak = max(self.peak, used)
        if not has_room and self._within is not None:
            self._within.give(size)
        return has_room

    def charge(self, size: int) -> None:
        """Count bytes that are held already, whatever the limit says."""
        with self._lock:
            self.used += size
            self.peak = max(self.peak, self.used)
        if self._within is not None:
            self._within.charge(size)

    def give(self, size: int) -> None:
        with self._lock:
            self.used -= size
        if self._within is not None:
            self._within.give(size)

    def statistics(self) -> dict[str, int | None]:
        return {"limit": self.limit, "used": self.used, "peak": self.peak}


class Tier:
    """One file of clusters at their own offsets, and the bits of those it holds."""

    def __init__(
        self,
        name: str,
        image: Image,
        bits: bitarray,
        budget: Budget,
        cluster_size: int,
    ) -> None:
        self.name = name
        self.image = image
        self.bits = bits
        self._budget = budget
        self._cluster_size = cluster_size
        self._lock = threading.Lock()
        self._dropped = False
        budget.charge(self.used)

    @property
    def used(self) -> int:
        return self.bits.count() * self._cluster_size

    def put(self, data: bytes, first: int, stop: int) -> bool:
        """Keep whole clusters; False if the budget is used up, OSError if it fails.

        The last cluster of a disk may be cut short by the disk's end.
        """
        size = (stop - first) * self._cluster_size
        if not self._budget.take(size):
            return False
        try:
            written = self.image.pwrite(data, first * self._cluster_size)
            if written != len(data):
                raise NoSpace(f"no space in the store's {self.name} tier")
        except OSError:
            self._budget.give(size)
            raise
        reached("put.written")
        with self._lock:
            if self._dropped:
                self._budget.give(size)
            else:
                # A copy that failed midway may have brought some of them before.
                before = self.bits.count(1, first, stop)
                self.bits[first:stop] = 1
                if before:
                    self._budget.give(before * self._cluster_size)
        return True

    def read_into(self, buffer: memoryview, offset: int, parts: list[Extent]) -> None:
        """Fill parts of a buffer, that of [offset, ...)."""
        begin, end = parts[0].offset, parts[-1].end
        wanted = sum(part.length for part in parts)
        if len(parts) < _SCATTERED or (
            self.name == "disk" and 2 * wanted < end - begin
        ):
            for part in parts:
                at = part.offset - offset
                self.image.pread_into(buffer[at : at + part.length], part.offset)
            return
        data = memoryview(self.image.pread(end - begin, begin))
        for part in parts:
            at = part.offset - offset
            found = part.offset - begin
            buffer[at : at + part.length] = data[found : found + part.length]

    def free(self, first: int, stop: int) -> None:
        """Forget the clusters in [first, stop) that are here and give back space.

        Nobody reads any of [first, stop) any more, nor needs what is being put there.
        The space goes first: a crash in between leaves bits, by which it is found.
        """
        for start, end in self._near_runs(first, stop):
            if self._dropped:
                return
            try:
                self._discard(start, end)
                reached("free.discarded")
            finally:
                self._clear(start, end)

    def _near_runs(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield runs of clusters that are here, or few of them are not."""
        gap = max(1, _GAP_SIZE_MAX // self._cluster_size)
        start = end = -1
        for next_start, next_end in runs(self.bits, first, stop):
            if start >= 0 and next_start - end > gap:
                yield start, end
                start = next_start
            elif start < 0:
                start = next_start
            end = next_end
        if start >= 0:
            yield start, end

    def hand_over(self, first: int, stop: int) -> None:
        """Forget clusters that another tier has now, and give back their space."""
        # The bits go first: by them they are looked for here.
        self._clear(first, stop)
        reached("hand_over.cleared")
        self._discard(first, stop)

    def _clear(self, first: int, stop: int) -> None:
        with self._lock:
            if self._dropped:
                return
            # Somebody else may be freeing some of them just now.
            freed = self.bits.count(1, first, stop)
            self.bits[first:stop] = 0
            self._budget.give(freed * self._cluster_size)

    def _discard(self, first: int, stop: int) -> None:
        offset = first * self._cluster_size
        length = min(stop * self._cluster_size, self.image.size) - offset
        # If it can not: the space comes back with the file.
        with contextlib.suppress(Unsupported):
            self.image.discard(length, offset)

    def drop(self) -> None:
        """Give back the whole budget. The image is closed by its last user."""
        with self._lock:
            if self._dropped:
                return
            self._dropped = True
            self._budget.give(self.used)


class Store:
    """The tiers of one epoch, fastest first, as one place for clusters."""

    def __init__(
        self,
        tiers: list[Tier],
        cluster_size: int,
        size: int,
        remove: Callable[[], None] = lambda: None,
    ) -> None:
        self.tiers = tiers
        self._cluster_size = cluster_size
        self._size = size
        self._zeroes = bytes(cluster_size)
        self._remove = remove

    def put(
        self,
        data: bytes,
        first: int,
        is_hole: Callable[[int], bool] = lambda cluster: True,
    ) -> None:
        """Keep whole clusters from `first` on; those that are zeroes cost nothing.

        But zeroes are kept as data where `is_hole` says so of a cluster.
        """
        size, zeroes = self._cluster_size, self._zeroes
        count = -(-len(data) // size)
        if count == 1:
            if data != zeroes[: len(data)] or not is_hole(first):
                self._put(data, first, first + 1)
            return
        # Runs of clusters that are all zeroes or all not.
        start = 0
        start_is_zero = data.startswith(zeroes) and is_hole(first)
        for index in range(1, count):
            at = index * size
            is_zero = data.startswith(zeroes[: len(data) - at], at)
            is_zero = is_zero and is_hole(first + index)
            if is_zero != start_is_zero:
                if not start_is_zero:
                    self._put(data[start * size : at], first + start, first + index)
                start, start_is_zero = index, is_zero
        if not start_is_zero:
            rest = data[start * size :] if start else data
            self._put(rest, first + start, first + count)

    def _put(self, data: bytes, first: int, stop: int) -> None:
        *faster, last = self.tiers
        for tier in faster:
            try:
                if tier.put(data, first, stop):
                    return
            except OSError as e:
                # A full tmpfs is a full tier: the next one takes it.
                if e.errno != errno.ENOSPC:
                    raise
        if not last.put(data, first, stop):
            raise NoSpace("the store has reached its limit")

    def read_into(
        self, buffer: memoryview, offset: int, first: int, clusters: bitarray
    ) -> None:
        """Fill parts of a buffer, that of [offset, ...), with preserved clusters.

        Those are the set bits, counted from `first`; they may be in any tier.
        """
        begin, end = offset, offset + len(buffer)

        def parts(bits: bitarray) -> list[Extent]:
            size = self._cluster_size
            found = []
            for start, stop in runs(bits, 0, len(bits)):
                at = max((first + start) * size, begin)
                found.append(Extent(at, min((first + stop) * size, end) - at))
            return found

        rest = clusters
        for tier in self.tiers:
            here = tier.bits[first : first + len(rest)] & rest
            if here.any():
                tier.read_into(buffer, offset, parts(here))
                rest = rest & ~here
        for zeroes in parts(rest):
            at = zeroes.offset - offset
            buffer[at : at + zeroes.length] = bytes(zeroes.length)

    def locate(self, cluster: int, stop: int) -> tuple[Tier | None, int]:
        """Return the tier that has a cluster and where its run ends."""
        for tier in self.tiers:
            if tier.bits[cluster]:
                found = tier.bits.find(0, cluster, stop)
                return tier, found if found >= 0 else stop
        return None, min(next_set(tier.bits, cluster, stop) for tier in self.tiers)

    def free(self, first: int, stop: int) -> None:
        """Forget clusters nobody will ask for again."""
        for tier in self.tiers:
            tier.free(first, stop)

    def settle(self) -> None:
        """Move everything to the last tier and make it durable, before a clean end."""
        *faster, last = self.tiers
        step = max(1, COPY_SIZE_MAX // self._cluster_size)
        for tier in faster:
            for first, stop in runs(tier.bits, 0, len(tier.bits)):
                for start in range(first, stop, step):
                    end = min(start + step, stop)
                    offset = start * self._cluster_size
                    length = min(end * self._cluster_size, self._size) - offset
                    data = tier.image.pread(length, offset)
                    if not last.put(data, start, end):
                        raise NoSpace("the store has reached its limit")
                    reached("settle.copied")
                    tier.hand_over(start, end)
        self.flush()

    def flush(self) -> None:
        """Make the last tier durable."""
        self.tiers[-1].image.flush()

    def used(self) -> dict[str, int]:
        """Return the bytes kept in each tier, by the tier's name."""
        return {tier.name: tier.used for tier in self.tiers}

    def drop(self) -> None:
        """Give back all space: the epoch is gone."""
        for tier in self.tiers:
            tier.drop()
        self._remove()


def runs(bits: bitarray, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of set bits in [first, stop)."""
    while (start := bits.find(1, first, stop)) >= 0:
        first = bits.find(0, start, stop)
        if first < 0:
            first = stop
        yield start, first
