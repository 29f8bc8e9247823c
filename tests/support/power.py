"""What a power failure leaves of files.

`Power` watches a process at work: every write to a file, and every sync. At each of
them the power may fail. Then a file is what was synced of it, and any part of what was
written since, in pieces of 512 bytes; a directory has the names that were synced, and
perhaps those that have changed since.
"""

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fleecefs.block import raw
from fleecefs.block.raw import PUNCH_HOLE
from fleecefs.state import preserved_log

SECTOR = 512
_PAGE = 4096

# So many of the writes that were not synced are combined in every way.
_COMBINED_MAX = 3

_pwrite, _ftruncate = os.pwrite, os.ftruncate
_fsync, _fdatasync = os.fsync, os.fdatasync
_fallocate = raw.fallocate

# Of a directory: each name with the inode it stands for.
Names = dict[int, dict[str, int]]


class Change(NamedTuple):
    """A write to a file, or that its size has become `size`."""

    inode: int
    offset: int
    data: bytes
    size: int | None = None

    def apply(self, content: bytearray) -> None:
        if self.size is not None:
            content.extend(bytes(self.size - len(content)))
        # Where the size was not kept, what lies beyond can not be seen.
        data = self.data[: max(0, len(content) - self.offset)]
        content[self.offset : self.offset + len(data)] = data

    def torn(self) -> Iterator["Change"]:
        """Yield what may be left of it: its beginning or its end, in sectors."""
        bounds = range(SECTOR - self.offset % SECTOR, len(self.data), SECTOR)
        for at in sorted({*bounds[:1], *bounds[len(bounds) // 2 :][:1], *bounds[-1:]}):
            yield self._part(0, at)
            yield self._part(at, len(self.data))

    def _part(self, start: int, stop: int) -> "Change":
        return self._replace(offset=self.offset + start, data=self.data[start:stop])


@dataclass
class Point:
    """A moment at which the power may fail, and what had to hold just then."""

    label: str
    expected: Any
    synced_names: Names
    names: Names
    contents: dict[int, bytes]
    pending: list[Change]
    times: dict[int, int]


class Failure(NamedTuple):
    """What a power failure leaves: a choice of what was not synced."""

    point: Point
    names: Names
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        kept = ", ".join(
            f"{change.inode}@{change.offset}+{len(change.data)}"
            for change in self.changes
        )
        return f"{self.point.label}; kept of what was not synced: {kept or 'nothing'}"


@dataclass
class Power:
    """Records what happens below a directory, but for what is volatile.

    `expected` is asked at each point. A file that is `in_place` keeps its inode when
    it is restored.
    """

    root: Path
    volatile: Path
    in_place: list[Path]
    expected: Callable[[], Any] = lambda: None
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names: Names = {}
        self._contents: dict[int, bytes] = {}
        self._pending: list[Change] = []
        self._times: dict[int, int] = {}
        # What breaks a snapshot is recorded by a thread of its own.
        self._lock = threading.RLock()
        for path in [self.root, *self.root.rglob("*")]:
            self._settle(path)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Record from now on, until the patch is undone."""
        patch.setattr(os, "pwrite", self._pwrite)
        patch.setattr(os, "ftruncate", self._ftruncate)
        patch.setattr(os, "fsync", lambda fd: self._sync(_fsync, fd))
        patch.setattr(os, "fdatasync", lambda fd: self._sync(_fdatasync, fd))
        for module in raw, preserved_log:
            patch.setattr(module, "fallocate", self._fallocate)

    # -- what is recorded

    def _pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        with self._changing(fd, offset, data):
            return _pwrite(fd, data, offset)

    def _ftruncate(self, fd: int, size: int) -> None:
        with self._changing(fd, 0, b""):
            _ftruncate(fd, size)

    def _fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        data = bytes(length) if mode & PUNCH_HOLE else b""
        with self._changing(fd, offset, data):
            _fallocate(fd, mode, offset, length)

    @contextmanager
    def _changing(
        self, fd: int, offset: int, data: bytes | memoryview
    ) -> Iterator[None]:
        path = self._path_of(fd)
        if path is None:
            yield
            return
        with self._lock:
            before = os.fstat(fd)
            yield
            size = os.fstat(fd).st_size
            assert size >= before.st_size, "nothing of ours becomes shorter"
            has_grown = size if size > before.st_size else None
            change = Change(before.st_ino, offset, bytes(data), has_grown)
            self._pending.append(change)
            self._point(f"a write of {path.name} at {offset}")

    def _sync(self, call: Callable[[int], None], fd: int) -> None:
        with self._lock:
            call(fd)
            path = self._path_of(fd)
            if path is not None:
                self._settle(path)
                self._point(f"a sync of {path.name}")

    def _path_of(self, fd: int) -> Path | None:
        """Return which file it is, None if it does not matter here."""
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_relative_to(self.root) and not path.is_relative_to(self.volatile):
            return path
        return None

    def _settle(self, path: Path) -> None:
        """Take what a file or directory is just now as safe."""
        inode = path.stat().st_ino
        if path.is_dir():
            self._names[inode] = _list(path)
            return
        self._contents[inode] = path.read_bytes()
        self._times[inode] = path.stat().st_mtime_ns
        self._pending = [each for each in self._pending if each.inode != inode]

    def _point(self, what: str) -> None:
        names = {
            path.stat().st_ino: _list(path)
            for path in [self.root, *self.root.rglob("*")]
            if path.is_dir() and not path.is_relative_to(self.volatile)
        }
        self.points.append(
            Point(
                f"point {len(self.points)}: after {what}",
                self.expected(),
                dict(self._names),
                names,
                dict(self._contents),
                list(self._pending),
                dict(self._times),
            )
        )

    # -- what may be left

    def failures(self) -> Iterator[Failure]:
        """Yield each different thing that can be left, at each of the points."""
        seen = set()
        for point in self.points:
            for failure in _failures(point):
                key = (repr(point.expected), repr(_tree(failure, _inode(self.root))))
                if key not in seen:
                    seen.add(key)
                    yield failure

    def restore(self, failure: Failure) -> None:
        """Make the files what a power failure has left of them."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in self.in_place:
                path.unlink()
        self._restore(failure, self.root, _inode(self.root))

    def _restore(self, failure: Failure, directory: Path, inode: int) -> None:
        for name, child in failure.names.get(inode, {}).items():
            path = directory / name
            if path == self.volatile:
                continue
            if _is_directory(failure, child):
                path.mkdir(mode=0o700)
                self._restore(failure, path, child)
            else:
                _write_sparse(path, _content(failure, child))
                time = failure.point.times.get(child, 0)
                os.utime(path, ns=(time, time))


def _failures(point: Point) -> Iterator[Failure]:
    # What has changed in directories is all there, or not at all.
    synced = {i: point.synced_names.get(i, {}) for i in point.names}
    synced |= point.synced_names
    for names in point.names, synced:
        for changes in _choices(point.pending):
            yield Failure(point, names, changes)


def _choices(pending: list[Change]) -> Iterator[tuple[Change, ...]]:
    yield tuple(pending)
    for count in range(min(_COMBINED_MAX, len(pending)) + 1):
        yield from itertools.combinations(pending, count)
    for index, change in enumerate(pending):
        for part in change.torn():
            yield (part,)
            yield (*pending[:index], part, *pending[index + 1 :])


def _is_directory(failure: Failure, inode: int) -> bool:
    return inode in failure.point.names or inode in failure.point.synced_names


def _content(failure: Failure, inode: int) -> bytes:
    content = bytearray(failure.point.contents.get(inode, b""))
    for change in failure.changes:
        if change.inode == inode:
            change.apply(content)
    return bytes(content)


def _write_sparse(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), _PAGE):
            page = content[at : at + _PAGE]
            if any(page):
                file.seek(at)
                file.write(page)


def _tree(failure: Failure, inode: int) -> list[Any]:
    """Return all that is in a directory, to be compared."""
    return [
        (
            name,
            _tree(failure, child)
            if _is_directory(failure, child)
            else hash(_content(failure, child)),
        )
        for name, child in sorted(failure.names.get(inode, {}).items())
    ]


def _list(directory: Path) -> dict[str, int]:
    return {entry.name: entry.inode() for entry in os.scandir(directory)}


def _inode(path: Path) -> int:
    return path.stat().st_ino
