"""A disk in memory that has a mirror, and the target that its writes come to."""

from fleecefs.block.disk import drained
from fleecefs.block.memory import MemoryImage
from fleecefs.block.mirror import Mirror, Run, Sink
from tests.support.disks import CLUSTER, letters, make_bits, make_disk
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.running import WatchedRequests

# A time at which every write that is on the target is over its limit.
LATER = 1000.0


class Mirrored:
    """A disk, its mirror and its target; both images have gates, faults behind them.

    Without `on_target`, the target is like the disk. The bits are at hand as if they
    were in the files of a daemon: `dirty` and `copying`, and as text by `shown`.
    """

    def __init__(
        self,
        data: bytes,
        on_target: bytes | None = None,
        *,
        granularity: int = CLUSTER,
        timeout: float = 10.0,
    ) -> None:
        self.memory = MemoryImage(len(data), data)
        self.source_faults = Faulty(self.memory)
        self.source = Gate(self.source_faults)
        self.disk = make_disk(source=self.source)
        self.target_memory = MemoryImage(
            len(data), data if on_target is None else on_target
        )
        self.target_faults = Faulty(self.target_memory)
        self.target = Gate(self.target_faults)
        self.dirty = make_bits(len(data), granularity)
        self.copying = make_bits(len(data), granularity)
        self.mirror = self.disk.mirror = Mirror(
            len(data),
            granularity,
            self.dirty,
            self.copying,
            self.disk.requests,
            timeout,
        )
        # What writes that follow have told the target: (what, offset, length).
        self.told: list[tuple[str, int, int]] = []

    @property
    def requests(self) -> WatchedRequests:
        assert isinstance(self.disk.requests, WatchedRequests)
        return self.disk.requests

    @property
    def shown(self) -> str:
        """A `1` for each granule that is dirty, a `c` for each being copied."""
        dirty, copying = self.dirty.to01(), self.copying.to01()
        both = {"00": ".", "10": "1", "01": "c", "11": "C"}
        pairs = zip(dirty, copying, strict=True)
        return "".join(both[a + b] for a, b in pairs)[: self.mirror.count]

    @property
    def on_source(self) -> str:
        return letters(bytes(self.memory.data))

    @property
    def on_target(self) -> str:
        return letters(bytes(self.target_memory.data))

    def follow(self) -> None:
        """Let writes come to the target from now on."""
        with drained([self.disk]):
            self.mirror.follow(Sink(self._write, self._zero))

    def _write(self, data: memoryview, offset: int) -> None:
        self.told.append(("write", offset, len(data)))
        self.target.pwrite(data, offset)

    def _zero(self, length: int, offset: int) -> None:
        self.told.append(("zero", offset, length))
        self.target.zero(length, offset)

    # -- who copies

    def read(self, run: Run) -> bytes:
        """Return what a run of granules is on the source."""
        offset, end = self._extent(run)
        return self.source.pread(end - offset, offset)  # type: ignore[no-any-return]

    def bring(self, run: Run, data: bytes) -> None:
        """Write to the target what has been read."""
        self.target.pwrite(data, self._extent(run)[0])

    def copy(self, count: int = 1) -> Run | None:
        """Copy the next dirty run, of up to so many granules."""
        mirror = self.mirror
        run = mirror.claim(0, mirror.count, count)
        if run is None:
            return None
        self.bring(run, self.read(run))
        mirror.finish(*run)
        return run

    def copy_all(self) -> None:
        """Copy until nothing is dirty; nobody writes."""
        while self.copy(self.mirror.count):
            pass

    def _extent(self, run: Run) -> tuple[int, int]:
        shift = self.mirror.shift
        return run[0] << shift, min(run[1] << shift, self.mirror.size)

    # -- what has to hold

    def differing(self) -> list[int]:
        """Return the granules in which source and target differ."""
        return differing(self.memory, self.target_memory, self.mirror.granularity)

    def check_quiet(self) -> None:
        """Check what holds whenever nothing is in flight."""
        assert not self.requests.writes
        assert not self.copying.any()
        assert not self.mirror._following
        assert not self.dirty[self.mirror.count :].any()
        differing = self.differing()
        lost = [granule for granule in differing if not self.dirty[granule]]
        assert lost == [], "these differ, and are not dirty"
        if self.mirror.is_synced:
            assert differing == []

    def check_end(self) -> None:
        """Check that all comes to the target in the end."""
        self.check_quiet()
        self.copy_all()
        assert self.target_memory.data == self.memory.data
        assert self.mirror.left() == 0
        assert self.mirror.is_alike()


def differing(one: MemoryImage, other: MemoryImage, granularity: int) -> list[int]:
    """Return the granules in which two images differ."""
    return [
        at // granularity
        for at in range(0, one.size, granularity)
        if one.data[at : at + granularity] != other.data[at : at + granularity]
    ]


def restarted(scene: Mirrored) -> Mirror:
    """Return the mirror that another daemon has after ours died here."""
    mirror, bits = scene.mirror, (scene.dirty.copy(), scene.copying.copy())
    return Mirror(mirror.size, mirror.granularity, *bits, scene.requests)
