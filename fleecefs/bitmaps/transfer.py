"""Bitmaps that move to another host, with their disk.

A file of exported bitmaps is a container that also says of which disk they are: by
the disk's id, and by a fingerprint of what it held. The other host knows the disk by
another id; so the fingerprint decides whether it is that disk, as it was. It is made
of samples: it tells another disk, or one that was put to use again, but not a change of
some bytes.
"""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from bitarray import bitarray

from fleecefs.bitmaps.containers import read_container
from fleecefs.bitmaps.disk import DiskBitmaps
from fleecefs.bitmaps.steps import CUT_SHORT, Add, FindDisk, find_good
from fleecefs.block.bitmap import sync_directory
from fleecefs.block.disk import Disk, drained
from fleecefs.block.extent import clip
from fleecefs.errors import NotFound, NotUsable
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.qcow2.contents import Contents
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.qcow2.header import SECTOR
from fleecefs.state.directory import DiskRecord
from fleecefs.units import KiB, MiB

# File systems and partitions begin here, and say when they were used last.
_BEGIN = 1 * MiB
_SAMPLES = 255
_SAMPLE_SIZE = 4 * KiB


class Identity(NamedTuple):
    """Which disk it is, and what it holds, as 48 bytes."""

    disk: UUID
    fingerprint: bytes

    def encode(self) -> bytes:
        return self.disk.bytes + self.fingerprint


def decode_identity(data: bytes | None) -> Identity | None:
    if data is None or len(data) != 48:
        return None
    return Identity(UUID(bytes=data[:16]), data[16:])


def fingerprint(disk: Disk) -> bytes:
    """Return a digest of the disk's beginning, and of samples of the rest of it."""
    digest = hashlib.sha256(disk.size.to_bytes(8, "little"))
    digest.update(disk.read(_BEGIN, 0))
    step = max(_SAMPLE_SIZE, disk.size // _SAMPLES)
    for offset in range(step, disk.size, step):
        digest.update(disk.read(clip(offset, _SAMPLE_SIZE, disk.size), offset))
    return digest.digest()


def export_bitmaps(
    bitmaps: DiskBitmaps, path: Path, names: Sequence[str] | None
) -> list[str]:
    """Write bitmaps to a new file, all good ones or some; return which."""
    if names is None:
        held = [e for e in bitmaps.held.values() if e.bitmap.inconsistent is None]
    else:
        held = [find_good(bitmaps, name) for name in names]
    if not held:
        raise NotFound(f"disk {bitmaps.disk.name!r} has no bitmap to export")
    identity = Identity(bitmaps.disk.id, fingerprint(bitmaps.disk))
    with drained([bitmaps.disk]):
        stored = [
            Bitmap(
                each.record.name,
                each.bitmap.granularity,
                each.bitmap.to_save(),
                is_auto=each.bitmap.recording,
            )
            for each in held
        ]
    _write(path, bitmaps.disk.size, identity, stored)
    return [each.name for each in stored]


def _write(path: Path, size: int, identity: Identity, stored: list[Bitmap]) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise NotUsable(f"file {path}: exists; give the name of a new one") from None
    except OSError as e:
        raise OSError(e.errno, f"file {path}: {e.strerror}") from None
    try:
        file = DescriptorFile(fd, str(path))
        Container.create(file, size, identity=identity.encode()).update(stored)
        sync_directory(path.parent)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


class Import:
    """Add bitmaps that were exported; `others` are the other disks here, by id."""

    def __init__(
        self,
        record: DiskRecord,
        path: Path,
        names: Sequence[str] | None,
        others: Mapping[UUID, str],
    ) -> None:
        self._record = record
        self._path = path
        self._wanted = names
        self._others = others
        self._ids_before = list(record.former_ids)
        self._steps: list[Add] = []
        self.names: list[str] = []

    def prepare(self, find: FindDisk) -> None:
        self._bitmaps = find(self._record.name)
        disk = self._bitmaps.disk
        contents, file, fd = read_container(self._path)
        try:
            identity = self._check(contents, disk)
            self.names = list(self._find_names(contents))
            self._check_content(identity, disk)
            try:
                for name in self.names:
                    self._prepare(find, name, contents, contents.bits(file, name))
                # They record, and then comes the look that counts: nothing that is
                # written after it is missing.
                with drained([disk]):
                    for step in self._steps:
                        step.apply()
                self._check_content(identity, disk)
            except BaseException:
                self.undo()
                raise
        finally:
            os.close(fd)

    def _check(self, contents: Contents, disk: Disk) -> Identity:
        if contents.size != -(-disk.size // SECTOR) * SECTOR:
            raise NotUsable(
                f"{self._path}: is of a disk of {contents.size} bytes, and "
                f"{disk.name!r} has {disk.size}"
            )
        identity = decode_identity(contents.header.identity)
        if identity is None:
            raise NotUsable(
                f"{self._path}: does not say of which disk it is; 'fleecefs bitmap "
                "export' writes what does, 'bitmap attach' uses a file as it is"
            )
        if identity.disk in self._others:
            raise NotUsable(
                f"{self._path}: is of disk {self._others[identity.disk]!r}, not of "
                f"{disk.name!r}"
            )
        return identity

    def _check_content(self, identity: Identity, disk: Disk) -> None:
        if identity.fingerprint != fingerprint(disk):
            raise NotUsable(
                f"{self._path}: disk {disk.name!r} is another one, or it was written "
                "to since the export"
            )
        known = {self._record.id, *self._record.former_ids}
        if str(identity.disk) not in known:
            self._record.former_ids.append(str(identity.disk))

    def _find_names(self, contents: Contents) -> Collection[str]:
        for name in self._wanted or ():
            if name not in contents.entries:
                raise NotFound(f"Dirty bitmap '{name}' not found in {self._path}")
        names = self._wanted or list(contents.entries)
        for name in names:
            if contents.entries[name].is_in_use:
                raise NotUsable(f"{self._path}: bitmap '{name}' was left in use")
        return names

    def _prepare(
        self, find: FindDisk, name: str, contents: Contents, bits: bitarray
    ) -> None:
        entry = contents.entries[name]
        step = Add(
            self._record.name,
            name,
            granularity=entry.granularity,
            recording=entry.is_auto,
            bits=bits,
        )
        step.prepare(find)
        self._steps.append(step)
        # Until it is known to be of this disk.
        self._bitmaps.held[name].record.inconsistent = CUT_SHORT

    def apply(self) -> None:
        for name in self.names:
            self._bitmaps.held[name].record.inconsistent = None

    def finish(self) -> None:
        pass

    def undo(self) -> None:
        self._record.former_ids[:] = self._ids_before
        for step in reversed(self._steps):
            step.undo()

    def concerned(self) -> Sequence[DiskBitmaps]:
        return [self._bitmaps]
