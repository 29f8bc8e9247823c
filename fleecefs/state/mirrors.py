"""The mirrors of a mount's disks: what their targets lack, over a crash of the daemon.

    RUNTIME/jobs/KEY.dirty      the granules that the target lacks
    RUNTIME/jobs/KEY.copying    those that were being copied

A mirror records from before the state says that it exists until after its job is
forgotten, or until the instant at which the disk moves to the target. So what the job
of the next daemon finds is complete. Neither file survives the host, nor does the job.
"""

from pathlib import Path

from fleecefs.block.bitmap import LiveBits, Owner
from fleecefs.block.disk import Disk, drained
from fleecefs.block.mirror import Mirror
from fleecefs.errors import Busy, NotUsable
from fleecefs.state.directory import MirrorRecord

# Owners of bits are told apart by the number of an epoch, which begins at 1.
_NO_EPOCH = 0


class DiskMirror:
    """The mirror of a disk, and the bits that it has."""

    def __init__(
        self, record: MirrorRecord, disk: Disk, mirror: Mirror, bits: list[LiveBits]
    ) -> None:
        self.record = record
        self.disk = disk
        self.mirror = mirror
        self._bits = bits

    def begin(self) -> None:
        """Record writes from now on; Busy if the disk has a mirror."""
        with drained([self.disk]):
            if self.disk.mirror is not None:
                raise Busy(f"disk {self.disk.name!r} is being mirrored already")
            self.disk.mirror = self.mirror

    def end(self) -> None:
        """Record nothing any more. Not drained: a write that does so harms nobody."""
        if self.disk.mirror is self.mirror:
            self.disk.mirror = None
        self.mirror.unfollow()
        for bits in self._bits:
            bits.drop()


def create_mirror(
    record: MirrorRecord, disk: Disk, runtime: Path, timeout: float
) -> DiskMirror:
    """Return a mirror that does not record yet; ENOSPC if tmpfs is full."""
    directory = runtime / "jobs"
    directory.mkdir(mode=0o700, exist_ok=True)
    made: list[LiveBits] = []
    try:
        for path in _paths(directory, record.key):
            made.append(LiveBits.create(path, _owner(record, disk)))
    except OSError:
        for bits in made:
            bits.drop()
        raise
    return _mirror_of(record, disk, made, timeout)


def load_mirror(
    record: MirrorRecord, disk: Disk, runtime: Path, timeout: float
) -> DiskMirror | None:
    """Let a mirror of the daemon before record again; None if its bits are lost."""
    try:
        found = [
            LiveBits.open(path, _owner(record, disk))
            for path in _paths(runtime / "jobs", record.key)
        ]
    except (FileNotFoundError, NotUsable):
        return None
    loaded = _mirror_of(record, disk, found, timeout)
    loaded.begin()
    return loaded


def _mirror_of(
    record: MirrorRecord, disk: Disk, bits: list[LiveBits], timeout: float
) -> DiskMirror:
    dirty, copying = bits
    mirror = Mirror(
        disk.size, record.granularity, dirty.bits, copying.bits, disk.requests, timeout
    )
    return DiskMirror(record, disk, mirror, bits)


def _paths(directory: Path, key: str) -> tuple[Path, Path]:
    return directory / f"{key}.dirty", directory / f"{key}.copying"


def _owner(record: MirrorRecord, disk: Disk) -> Owner:
    return Owner(disk.id, _NO_EPOCH, -(-disk.size // record.granularity))
