"""One disk as it was at one instant, read-only.

What is read comes from two places: preserved clusters from the stores of the snapshot's
epoch and later ones, everything else from the source, as a registered reader. The
proof that this is exact is in epoch.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from uuid import UUID

from fleecefs.block.epoch import Epoch, History
from fleecefs.block.extent import Mapped, clip
from fleecefs.block.image import mapped_at
from fleecefs.errors import ReadOnly, SnapshotLost

# A search for the next data or hole holds writers of the part it looks at.
_SEARCH_SIZE_MAX = 1 << 30


class Snapshot:
    """A disk at the instant its epoch began. `allocated` is what it occupied then."""

    def __init__(
        self,
        disk_id: UUID,
        history: History,
        epoch: Epoch,
        *,
        size: int,
        created_ns: int,
        allocated: int,
    ) -> None:
        self.disk_id = disk_id
        self.epoch = epoch
        self.size = size
        self.created_ns = created_ns
        self._allocated = allocated
        self._history = history
        self._requests = history.requests
        self._source = history.source
        self._cluster_size = history.cluster_size
        self._shift = history.cluster_size.bit_length() - 1

    @property
    def lost(self) -> str | None:
        """Why it can not be read any more, or None."""
        return self.epoch.lost

    @property
    def cluster_size(self) -> int:
        return self._cluster_size

    def allocated(self) -> int:
        """Return the bytes of storage the disk occupied at the instant."""
        return self._allocated

    def read(self, length: int, offset: int) -> bytes | memoryview:
        """Return bytes as they were at the instant; less only at the end.

        Raises SnapshotLost if the snapshot is broken or deleted, also while reading.
        """
        length = clip(offset, length, self.size)
        if not length:
            return b""
        first = offset >> self._shift
        stop = ((offset + length - 1) >> self._shift) + 1
        chain = self._register_untouched(first, stop)
        if chain is None:
            try:
                data: bytes | memoryview = self._source.pread(length, offset)
            finally:
                self._unregister()
        else:
            data = memoryview(bytearray(length))
            self._read_mixed(data, offset, chain)
        if self.epoch.lost is not None:
            raise SnapshotLost(self.epoch.lost)
        return data

    def _register_untouched(self, first: int, stop: int) -> list[Epoch] | None:
        """Register as a reader of the source if all of it is there, else say no.

        Returns None when registered, otherwise the epochs to look into.
        """
        requests = self._requests
        with requests.lock:
            chain = self._chain(first, stop)
            for epoch in chain:
                if epoch.preserved.find(1, first, stop) >= 0:
                    return chain
            requests.readers[get_ident()] = (first, stop, self.epoch)
        return None

    def _chain(self, first: int, stop: int) -> list[Epoch]:
        """Return the epochs to read from, or raise if these clusters are gone."""
        epoch = self.epoch
        if epoch.lost is not None:
            raise SnapshotLost(epoch.lost)
        if epoch.denied is not None and epoch.denied.find(1, first, stop) >= 0:
            raise SnapshotLost("this part of the snapshot was discarded")
        return self._history.chain(epoch)

    def _unregister(self) -> None:
        requests = self._requests
        with requests.lock:
            requests.readers.pop(get_ident(), None)
            requests.changed()

    def _read_mixed(self, data: memoryview, offset: int, chain: list[Epoch]) -> None:
        """Read what is still on the source in one go, and the rest over it."""
        end = offset + len(data)
        shift = self._shift
        first, stop = offset >> shift, ((end - 1) >> shift) + 1
        requests = self._requests
        with requests.lock:
            plan = list(self._plan(chain, first, stop))
            on_source = [run for run in plan if run[2] is None]
            if on_source:
                hull = on_source[0][0], on_source[-1][1]
                requests.readers[get_ident()] = (*hull, self.epoch)
        if on_source:
            try:
                start, until = max(hull[0] << shift, offset), min(hull[1] << shift, end)
                part = data[start - offset : until - offset]
                self._source.pread_into(part, start)
            finally:
                self._unregister()
        for start, until, epoch in plan:
            if epoch is not None:
                start, until = max(start << shift, offset), min(until << shift, end)
                part = data[start - offset : until - offset]
                epoch.store.read_into(part, start)

    def _plan(
        self, chain: list[Epoch], first: int, stop: int
    ) -> Iterator[tuple[int, int, Epoch | None]]:
        """Yield runs of clusters and the epoch that has them; None is the source."""
        while first < stop:
            epoch, end = self._history.holder(chain, first, stop)
            yield first, end, epoch
            first = end

    # -- where data and holes are

    def map(self, offset: int, end: int) -> Iterator[Mapped]:
        """Yield what [offset, end) consists of, in order, without gaps."""
        while offset < min(end, self.size):
            mapped = self._mapped(offset, min(end, self.size))
            yield mapped
            offset = mapped.end

    def _mapped(self, offset: int, end: int) -> Mapped:
        shift = self._shift
        end = min(end, offset + _SEARCH_SIZE_MAX)
        first, stop = offset >> shift, ((end - 1) >> shift) + 1
        with self._reading_source(first, stop) as (epoch, run_stop):
            end = min(run_stop << shift, end)
            if epoch is None:
                return mapped_at(self._source, offset, end)
        tier, tier_stop = epoch.store.locate(first, run_stop)
        end = min(tier_stop << shift, end)
        return Mapped(offset, end - offset, "none" if tier is None else tier.name)

    @contextmanager
    def _reading_source(
        self, first: int, stop: int
    ) -> Iterator[tuple[Epoch | None, int]]:
        """Find who holds the first clusters; inside, the source stays as it is."""
        requests = self._requests
        with requests.lock:
            chain = self._chain(first, first + 1)
            found = self._history.holder(chain, first, stop)
            requests.readers[get_ident()] = (first, found[1], self.epoch)
        try:
            yield found
        finally:
            self._unregister()
        if self.epoch.lost is not None:
            raise SnapshotLost(self.epoch.lost)

    def find_data(self, offset: int) -> int:
        """Return where data is next at or after offset, or the size."""
        for mapped in self.map(offset, self.size):
            if mapped.is_data:
                return mapped.offset
        return self.size

    def find_hole(self, offset: int) -> int:
        """Return where a hole is next at or after offset, or the size."""
        for mapped in self.map(offset, self.size):
            if not mapped.is_data:
                return mapped.offset
        return self.size

    # -- giving up parts of it

    def discard(self, length: int, offset: int) -> None:
        """Give up a part that has been read: no more preserving for it, space back.

        Rounded inward to clusters. Reading it later is an error.
        """
        size = self._cluster_size
        end = min(offset + length, self.size)
        first = -(-offset // size)
        stop = -(-end // size) if end == self.size else end // size
        if first >= stop:
            return
        epoch, history = self.epoch, self._history
        with self._requests.lock:
            chain = self._chain(first, first)
            if epoch.denied is None:
                epoch.denied = epoch.make_denied()
            epoch.denied[first:stop] = 1
            is_oldest = history.epochs[0] is epoch
            if is_oldest and chain == [epoch]:
                # Nobody else reads this: a set bit means that no write preserves it.
                epoch.preserved[first:stop] = 1
        if is_oldest:
            epoch.store.free(first, stop)

    # -- what a snapshot refuses

    def write(self, data: memoryview, offset: int, durable: bool = False) -> int:
        raise ReadOnly("a snapshot is read-only")

    def flush(self) -> None:
        """Do nothing: there is nothing to make durable."""
