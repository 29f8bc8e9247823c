"""Open containers: the qcow2 files that dirty bitmaps are saved in.

A container is open and locked as long as a bitmap in it is in use. QEMU's tools may
read it meanwhile, but not write: of its lock bytes we hold those that say "nobody else
writes" (101 and 103 are "writes" and "resizes", 201 and 203 "let nobody do that"; as
QEMU's file driver has them).
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from bitarray import bitarray

from fleecefs.block.bitmap import sync_directory
from fleecefs.errors import Busy, NotUsable
from fleecefs.qcow2.bitmaps import Entry, table_count
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.qcow2.contents import Contents, read_contents
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.qcow2.header import SECTOR
from fleecefs.units import format_size

_WRITES = (101, 103)
_NO_WRITES_BY_OTHERS = (201, 203)
_FLOCK = struct.Struct("hhqqi4x")


class OpenContainer:
    """A locked container. Its lock is held while it is changed, across I/O."""

    def __init__(self, path: Path, fd: int, container: Container) -> None:
        self.path = path
        self.lock = threading.Lock()
        # The bitmaps in it that are in use, of whatever disk.
        self.claimed: set[str] = set()
        # How many disks have it open.
        self.users = 0
        self._fd = fd
        self._container: Container | None = container

    @classmethod
    def open(cls, path: Path, size: int, *, create: bool) -> Self:
        """Open and lock a container, or make one for a disk of that size.

        NotUsable if it is none; Busy if somebody else writes to it.
        """
        if create and not path.exists():
            return cls._create(path, size)
        fd = _open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _lock(fd, path)
            file = DescriptorFile(fd, str(path))
            is_new = create and not file.size()
            container = Container.create(file, size) if is_new else Container.open(file)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, container)

    @classmethod
    def _create(cls, path: Path, size: int) -> Self:
        """Make one under another name first: a part of one would be in the way."""
        made = path.with_name(path.name + ".new")
        if not path.parent.is_dir():
            raise NotUsable(
                f"container {path}: there is no directory {path.parent}; make it"
            )
        fd = _open(made, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_CREAT)
        try:
            _lock(fd, path)
            if os.fstat(fd).st_size:
                os.ftruncate(fd, 0)
            container = Container.create(DescriptorFile(fd, str(path)), size)
            made.rename(path)
            sync_directory(path.parent)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, container)

    def check_size(self, size: int) -> None:
        """Raise NotUsable if it is not for disks of that size; `lock` is held."""
        has = self._usable().contents.size
        if has != -(-size // SECTOR) * SECTOR:
            raise NotUsable(
                f"container {self.path}: is for a disk of {has} bytes "
                f"({format_size(has)}), not of {size} ({format_size(size)})"
            )

    @property
    def entries(self) -> dict[str, Entry]:
        """What is in it, by name; `lock` is held."""
        return self._usable().contents.entries

    def has(self, name: str, granularity: int) -> bool:
        """Tell whether a bitmap is in it whose bits can be changed in part."""
        entry = self.entries.get(name)
        contents = self._usable().contents
        return (
            entry is not None
            and not entry.is_foreign
            and entry.granularity == granularity
            and entry.table_count
            == table_count(contents.size, granularity, contents.header.cluster_size)
        )

    @property
    def was_void(self) -> bool:
        """Whether bitmaps were dropped when it was opened (see Container)."""
        return self._usable().was_void

    def bits(self, name: str) -> bitarray:
        return self._usable().bits(name)

    def mark_in_use(self, names: Iterable[str]) -> None:
        names = list(names)
        if names:
            with self._changing() as container:
                container.mark_in_use(names)

    def update(
        self, bitmaps: Iterable[Bitmap] = (), remove: Iterable[str] = ()
    ) -> None:
        """See Container.update."""
        with self._changing() as container:
            container.update(bitmaps, remove)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Container]:
        container = self._usable()
        try:
            yield container
        except NotUsable:
            raise
        except OSError as e:
            # It has the old bitmaps or the new ones: the next time we look.
            self._container = None
            raise OSError(e.errno, f"container {self.path}: {e.strerror}") from None

    def _usable(self) -> Container:
        if self._container is None:
            self._container = Container.open(DescriptorFile(self._fd, str(self.path)))
        return self._container

    def close(self) -> None:
        # A save may be at it.
        with self.lock:
            os.close(self._fd)


class Containers:
    """The containers that are open, each once: several disks may share one."""

    def __init__(self) -> None:
        # Raises NotUsable for a path that leads to our own mount: who waits for a file
        # there waits for himself.
        self.check_place: Callable[[str], None] = lambda path: None
        self._open: dict[tuple[int, int], OpenContainer] = {}

    def use(self, path: Path, size: int, *, create: bool = False) -> OpenContainer:
        """Return it open, for one disk more, of that size. See OpenContainer.open."""
        self.check_place(str(path))
        container = self._find(path)
        if container is None:
            container = OpenContainer.open(path, size, create=create)
            found = path.stat()
            self._open[found.st_dev, found.st_ino] = container
        container.users += 1
        try:
            with container.lock:
                container.check_size(size)
        except BaseException:
            self.release(container)
            raise
        return container

    def _find(self, path: Path) -> OpenContainer | None:
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
        return self._open.get((found.st_dev, found.st_ino))

    def release(self, container: OpenContainer) -> None:
        """Close it if no other disk uses it."""
        container.users -= 1
        if container.users == 0:
            self._open = {k: c for k, c in self._open.items() if c is not container}
            container.close()


def read_container(path: Path) -> tuple[Contents, DescriptorFile, int]:
    """Read a container that may be in use; the descriptor is the caller's to close."""
    fd = _open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        file = DescriptorFile(fd, str(path))
        return read_contents(file), file, fd
    except BaseException:
        os.close(fd)
        raise


def _open(path: Path, flags: int) -> int:
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as e:
        raise OSError(e.errno, f"container {path}: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotUsable(f"container {path}: not a regular file")
    return fd


def _lock(fd: int, path: Path) -> None:
    busy = Busy(f"container {path}: in use by another program; end that first")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise busy from None
        raise
    for byte in _NO_WRITES_BY_OTHERS:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, byte, 1, 0))
    for byte in _WRITES:
        wanted = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted)
        if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
            raise busy
