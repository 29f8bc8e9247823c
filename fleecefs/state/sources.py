"""The sources of a mount's disks: where each disk lives, and whether it is unchanged.

A mirror that is completed moves its disk to another source. From then on the record of
the disk says where it lives: told to mount one of the sources it lived on before, the
one it lives on now is taken.
"""

import os
import stat
from pathlib import Path
from uuid import UUID

from fleecefs.block.raw import RawImage
from fleecefs.errors import describe
from fleecefs.state import runtime
from fleecefs.state.directory import DiskRecord, State


class Sources:
    """The open and locked sources, by the id of their disk."""

    def __init__(self) -> None:
        self._images: dict[UUID, RawImage] = {}

    def open(self, path: Path, record: DiskRecord | None) -> tuple[Path, RawImage]:
        """Open the source of a disk; the error names what is wrong with the path."""
        if record is None or not _has_left(record, path):
            return path, RawImage.open_source(path)
        try:
            source = RawImage.open_source(Path(record.source))
        except OSError as e:
            reason = f"disk {record.name!r} was moved from {path} by a mirror: "
            raise OSError(e.errno, reason + describe(e)) from None
        return Path(record.source), source

    def add(self, record: DiskRecord, source: RawImage) -> None:
        """Keep the source of a disk."""
        if record.source_size == source.size:
            # A larger device that the disk was moved to.
            source.size = record.size
        self._images[UUID(record.id)] = source

    def status(self, disk_id: UUID) -> os.stat_result:
        """Return fstat(2) of the file or device that a disk lives on."""
        return self._images[disk_id].status()

    def is_changed(self, record: DiskRecord, state: State) -> bool:
        """Tell whether a source is not what it was when it was last served.

        A device node has another inode and other times after a boot: then only the
        size is compared. After an unclean end the times are those of our own writes.
        """
        source = self._images[UUID(record.id)]
        status = source.status()
        if record.size != source.size:
            return True
        if stat.S_ISBLK(status.st_mode) and state.boot_id != runtime.boot_id():
            return False
        if record.source_inode != status.st_ino:
            return True
        is_same_time = record.source_mtime_ns == status.st_mtime_ns
        return state.is_clean and not is_same_time

    def settle(self, record: DiskRecord) -> None:
        """Make all of a source durable, and remember what it looks like.

        Times too: they tell whether it changes from now on. OSError if that fails.
        """
        source = self._images[UUID(record.id)]
        try:
            os.fsync(source.fd)
        finally:
            self._remember(record, source)

    def move(self, record: DiskRecord, path: Path, source: RawImage) -> None:
        """Say in a record that its disk lives on another source; it is not kept yet."""
        former = [each for each in record.former_sources if each != str(path)]
        record.former_sources = [*former, record.source]
        record.source = str(path)
        found = os.lseek(source.fd, 0, os.SEEK_END)
        record.source_size = found if found != record.size else 0
        self._remember(record, source)

    def replace(self, disk_id: UUID, source: RawImage) -> None:
        """Keep another source of a disk. The one before closes with its last reader."""
        self._images[disk_id] = source

    @staticmethod
    def _remember(record: DiskRecord, source: RawImage) -> None:
        status = source.status()
        record.source_inode = status.st_ino
        record.source_mtime_ns = status.st_mtime_ns

    def close(self) -> None:
        for source in self._images.values():
            source.close()


def _has_left(record: DiskRecord, path: Path) -> bool:
    """Tell whether a disk lived there before, and does no more."""
    real = os.path.realpath(path)
    if real == os.path.realpath(record.source):
        return False
    return real in map(os.path.realpath, record.former_sources)
