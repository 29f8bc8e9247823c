"""One disk as it was at one instant, read-only.

What is read comes from two places: preserved clusters from the stores of the snapshot's
epoch and later ones, everything else from the source, as a registered reader. The
proof that this is exact is in epoch.py.
"""

from collections.abc import Iterator
from threading import get_ident
from uuid import UUID

from bitarray import bitarray

from fleecefs.block.bitmap import next_set
from fleecefs.block.epoch import Epoch, History, Split
from fleecefs.block.extent import Mapped, clip
from fleecefs.block.image import mapped_at
from fleecefs.block.store import runs
from fleecefs.errors import ReadOnly, SnapshotLost

# A search for the next data or hole holds up writers while it looks at the bits.
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
        self._cluster_size = history.cluster_size
        self._shift = history.cluster_size.bit_length() - 1
        # What the source was found to be last. A search may take as long as the data
        # (tmpfs), and of one that is overwritten here and there each run asks.
        self._known = Mapped(0, 0, "none")

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
        plan = self._plan(first, stop)
        if plan is None:
            try:
                data: bytes | memoryview = self._history.source.pread(length, offset)
            finally:
                self._unregister()
        else:
            data = self._read_mixed(length, offset, plan)
        self._check(first, stop)
        return data

    def _plan(self, first: int, stop: int) -> Split | None:
        """Find where each cluster is, and register as a reader of those on the source.

        Returns None if all of them are. One look under one lock: with the epochs of an
        earlier look, one that began in between would be missed, and all it has.
        """
        plan = None
        on_source = [(first, stop)]
        requests, history = self._requests, self._history
        with requests.lock:
            self._check(first, stop)
            chain = history.chain(self.epoch)
            for epoch in chain:
                if epoch.preserved.find(1, first, stop) >= 0:
                    plan = history.split(chain, first, stop)
                    on_source = [
                        (first + a, first + b)
                        for a, b in runs(plan[0], 0, stop - first)
                    ]
                    break
            if on_source:
                requests.readers[get_ident()] = (on_source, self.epoch)
        return plan

    def _check(self, first: int, stop: int) -> None:
        """Raise SnapshotLost if the snapshot, or this part of it, is gone.

        Before a read, and again after it: what was gone by then may be anything.
        """
        epoch = self.epoch
        if epoch.lost is not None:
            raise SnapshotLost(epoch.lost)
        if epoch.denied is not None and epoch.denied.find(1, first, stop) >= 0:
            raise SnapshotLost("this part of the snapshot was discarded")

    def _unregister(self) -> None:
        requests = self._requests
        with requests.lock:
            requests.readers.pop(get_ident(), None)
            requests.changed()

    def _read_mixed(self, length: int, offset: int, plan: Split) -> memoryview:
        """Read what is still on the source in one go, and the rest over it."""
        data = memoryview(bytearray(length))
        on_source, preserved = plan
        try:
            self._read_source(data, offset, on_source)
        finally:
            self._unregister()
        for epoch, bits in preserved:
            epoch.store.read_into(data, offset, offset >> self._shift, bits)
        return data

    def _read_source(self, buffer: memoryview, offset: int, bits: bitarray) -> None:
        """Fill a buffer from the first of these clusters to the last."""
        begin = bits.find(1)
        if begin < 0:
            return
        first, shift = offset >> self._shift, self._shift
        start = max((first + begin) << shift, offset)
        last = first + bits.find(1, right=True)
        end = min((last + 1) << shift, offset + len(buffer))
        self._history.source.pread_into(buffer[start - offset : end - offset], start)

    # -- for jobs

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with whole clusters as they were, without holding back writers.

        They may overwrite the source meanwhile; see epoch.py for why that does no harm.
        Raises SnapshotLost if the snapshot is broken or deleted, also while reading.
        """
        first = offset >> self._shift
        stop = ((offset + len(buffer) - 1) >> self._shift) + 1
        on_source, _ = self._split(first, stop)
        self._read_source(buffer, offset, on_source)
        for epoch, bits in self._split(first, stop)[1]:
            epoch.store.read_into(buffer, offset, first, bits)
        self._check(first, stop)

    def is_on_source(self, first: int, stop: int) -> bool:
        """Tell whether none of the clusters has been overwritten until now."""
        return bool(self._split(first, stop)[0].all())

    def _split(self, first: int, stop: int) -> Split:
        """Return where the clusters are just now."""
        history = self._history
        with self._requests.lock:
            self._check(first, stop)
            return history.split(history.chain(self.epoch), first, stop)

    def locate(self, first: int, stop: int) -> tuple[str, int]:
        """Return where a cluster is just now, as Mapped does, and where its run ends.

        Without I/O: "source" may be a hole.
        """
        history = self._history
        with self._requests.lock:
            self._check(first, first)
            epoch, stop = history.holder(history.chain(self.epoch), first, stop)
        if epoch is None:
            return "source", stop
        tier, stop = epoch.store.locate(first, stop)
        return "none" if tier is None else tier.name, stop

    def count_in_ram(self, first: int, stop: int) -> int:
        """Return how many clusters are in the RAM tier of some epoch."""
        with self._requests.lock:
            self._check(first, first)
            chain = self._history.chain(self.epoch)
        tiers = [tier for epoch in chain for tier in epoch.store.tiers]
        return sum(t.bits.count(1, first, stop) for t in tiers if t.name == "ram")

    def preserved_runs(self, among: bitarray) -> Iterator[tuple[int, int]]:
        """Yield runs of some clusters that were preserved for this snapshot."""
        history = self._history
        with self._requests.lock:
            self._check(0, 0)
            found = bitarray(len(among), endian="little")
            for epoch in history.chain(self.epoch):
                found |= epoch.preserved[: len(among)]
        return runs(found & among, 0, len(among))

    # -- where data and holes are

    def map(self, offset: int, end: int) -> Iterator[Mapped]:
        """Yield what [offset, end) consists of, in order, without gaps."""
        while offset < min(end, self.size):
            mapped = self._mapped(offset, min(end, self.size))
            yield mapped
            offset = mapped.end

    def _mapped(self, offset: int, end: int) -> Mapped:
        """Return what it is at offset, up to where that changes, or before.

        The source is asked without holding back writers, and before the look at the
        bits: what nobody has overwritten by then was as it is now when it was asked.
        """
        end = min(end, offset + _SEARCH_SIZE_MAX)
        first, stop = offset >> self._shift, ((end - 1) >> self._shift) + 1
        known = self._known
        while True:
            epoch, run_stop = self._holder(first, stop)
            if epoch is not None or known.offset <= offset < known.end:
                break
            known = self._known = mapped_at(self._history.source, offset, self.size)
        where = known.where
        if epoch is None:
            end = min(known.end, run_stop << self._shift, end)
        else:
            tier, run_stop = epoch.store.locate(first, run_stop)
            end = min(run_stop << self._shift, end)
            where = "none" if tier is None else tier.name
        self._check(first, run_stop)
        return Mapped(offset, end - offset, where)

    def _holder(self, first: int, stop: int) -> tuple[Epoch | None, int]:
        """Return who has a cluster, None is the source, and until which one."""
        history = self._history
        with self._requests.lock:
            self._check(first, first + 1)
            if self.epoch.denied is not None:
                # What was discarded is no hole.
                stop = next_set(self.epoch.denied, first, stop)
            return history.holder(history.chain(self.epoch), first, stop)

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
        epoch = self.epoch
        with self._requests.lock:
            self._check(first, first)
            if epoch.denied is None:
                epoch.denied = epoch.make_denied()
            epoch.denied[first:stop] = 1
            free = self._history.give_up(epoch, first, stop)
        free()

    def restrict(self, wanted: bitarray) -> None:
        """Give up all but these clusters: they are all that is ever read."""
        epoch = self.epoch
        with self._requests.lock:
            self._check(0, 0)
            if epoch.denied is None:
                epoch.denied = epoch.make_denied()
            epoch.denied |= ~wanted
            free = self._history.give_up(epoch, 0, len(epoch.preserved))
        free()

    # -- what a snapshot refuses

    def write(self, data: memoryview, offset: int, durable: bool = False) -> int:
        raise ReadOnly("a snapshot is read-only")

    def flush(self) -> None:
        """Do nothing: there is nothing to make durable."""
