"""Random operations on the disks of a mount, each done to its model too."""

import errno
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fleecefs.block.raw import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from fleecefs.units import KiB
from tests.support.model import DiskModel
from tests.support.mount import Mount

CLUSTER = 4096


def noise(size: int, seed: object = 0) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def page_aligned(data: bytes) -> mmap.mmap:
    """Return a buffer that O_DIRECT takes."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def write(path: Path, data: bytes, offset: int) -> None:
    with opened(path, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)


def read(path: Path, length: int, offset: int) -> bytes:
    with opened(path) as fd:
        return os.pread(fd, length, offset)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of everything that lseek(2) calls data."""
    offset = 0
    while offset < size:
        try:
            begin = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            return
        end = os.lseek(fd, begin, os.SEEK_HOLE)
        assert offset <= begin < end <= size
        yield begin, end
        offset = end


def read_sparse(path: Path) -> bytes:
    """Read a file as a sparse copy does: holes are not read."""
    size = path.stat().st_size
    content = bytearray(size)
    with opened(path) as fd:
        for begin, end in data_extents(fd, size):
            content[begin:end] = os.pread(fd, end - begin, begin)
    return bytes(content)


# -- random operations


def describe_difference(found: bytes, expected: bytes) -> str:
    """Return "" if they are equal, else what differs, in a few words."""
    if found == expected:
        return ""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    first, last = wrong[0], wrong[-1]
    part = found[first : last + 1]
    zeroes = " all zeroes" if not any(part) else ""
    return f"{len(wrong)} bytes between {first} and {last} differ{zeroes}"


class Handles:
    """One live disk, opened in every way a program might."""

    def __init__(self, path: Path) -> None:
        self.buffered = os.open(path, os.O_RDWR)
        self.direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.durable = os.open(path, os.O_RDWR | os.O_DSYNC)
        self.memory = mmap.mmap(self.buffered, 0)

    def close(self) -> None:
        self.memory.close()
        for fd in self.buffered, self.direct, self.durable:
            os.close(fd)


class Walk:
    """Random operations on all disks of a mount, each done to its model too."""

    SNAPSHOTS_MAX = 8

    def __init__(self, mount: Mount, seed: int) -> None:
        self.mount = mount
        self.random = random.Random(seed)
        self.models = {n: DiskModel(p.read_bytes()) for n, p in mount.sources.items()}
        self.snapshots: set[str] = set()
        self._names = (f"s{index}" for index in itertools.count())
        self.open()

    def open(self) -> None:
        self.handles = {name: Handles(self.mount.live(name)) for name in self.models}

    def close(self) -> None:
        for handles in self.handles.values():
            handles.close()
        self.handles = {}

    def remount(self) -> None:
        self.close()
        self.mount.remount()
        self.open()

    def step(self) -> None:
        """Do one operation."""
        operations = list(self.OPERATIONS)
        self.do(self.random.choices(operations, self.OPERATIONS.values())[0])

    def do(self, operation: "Operation") -> None:
        """Do a certain operation, on some disk."""
        name = self.random.choice(sorted(self.models))
        operation(self, self.models[name], self.handles[name], self.mount.live(name))

    def check(self) -> None:
        """Read all that there is."""
        for name, model in self.models.items():
            assert self.mount.live(name).read_bytes() == model.data
            for snapshot, content in model.snapshots.items():
                path = self.mount.snapshot(snapshot, name)
                assert path.read_bytes() == content, path
                assert read_sparse(path) == content, path

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read snapshots in another thread meanwhile."""
        ended = threading.Event()
        errors: list[BaseException] = []

        def read_snapshots() -> None:
            choice = random.Random(0)
            try:
                while not ended.wait(0.001):
                    if names := sorted(self.snapshots):
                        self._read_snapshot(choice, choice.choice(names))
            except BaseException as e:
                errors.append(e)

        thread = threading.Thread(target=read_snapshots)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        for error in errors:
            raise error

    def _read_snapshot(self, choice: random.Random, snapshot: str) -> None:
        name = choice.choice(sorted(self.models))
        model = self.models[name]
        offset = choice.randrange(model.size)
        length = choice.randrange(1, 256 * KiB)
        try:
            expected = model.snapshots[snapshot]
            found = read(self.mount.snapshot(snapshot, name), length, offset)
        except (KeyError, OSError):
            # Deleted meanwhile: only that is an excuse.
            if snapshot in self.snapshots:
                raise
            return
        expected = expected[offset : offset + length]
        if len(found) < len(expected) and snapshot not in self.snapshots:
            # Deleted under way: read(2) returns what it had until then.
            return
        difference = describe_difference(found, expected)
        assert not difference, f"{snapshot}/{name}, {length} at {offset}: {difference}"

    # -- what an operation works on

    def _extent(self, size: int, unit: int = 1) -> tuple[int, int]:
        """Return offset and length, near the bounds of clusters more often than not."""
        lengths = [1, 511, 512, CLUSTER, CLUSTER + 1, 3 * CLUSTER, 64 * KiB, 200_000]
        length = min(self.random.choice(lengths), size)
        offset = self.random.randrange(size - length + 1)
        if self.random.random() < 0.5:
            offset -= offset % CLUSTER
        length = max(unit, length - length % unit)
        return offset - offset % unit, length

    def _data(self, length: int) -> bytes:
        return bytes(length) if self.random.random() < 0.1 else noise(length, length)

    # -- operations

    def write_buffered(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        data = self._data(length)
        assert os.pwrite(handles.buffered, data, offset) == model.write(data, offset)

    def write_direct(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size, 512)
        data = self._data(length)
        with page_aligned(data) as buffer:
            assert os.pwrite(handles.direct, buffer, offset) == length
        model.write(data, offset)

    def write_durable(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        data = self._data(length)
        assert os.pwrite(handles.durable, data, offset) == length
        model.write(data, offset)

    def write_memory(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        data = self._data(length)
        handles.memory[offset : offset + length] = data
        handles.memory.flush()
        model.write(data, offset)

    def write_vector(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        data = self._data(length)
        parts = [data[: length // 3], data[length // 3 :]]
        written = os.pwritev(handles.buffered, parts, offset, os.RWF_DSYNC)
        assert written == model.write(data, offset)

    def punch(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        fallocate(handles.buffered, PUNCH_HOLE | KEEP_SIZE, offset, length)
        model.zero(length, offset)

    def zero(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        mode = self.random.choice([ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
        fallocate(handles.buffered, mode, offset, length)
        model.zero(length, offset)

    def flush(self, model: DiskModel, handles: Handles, path: Path) -> None:
        self.random.choice([os.fsync, os.fdatasync])(handles.buffered)

    def read_live(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size)
        expected = model.read(length, offset)
        assert os.pread(handles.buffered, length, offset) == expected
        assert handles.memory[offset : offset + length] == expected

    def read_live_direct(self, model: DiskModel, handles: Handles, path: Path) -> None:
        offset, length = self._extent(model.size, 512)
        with page_aligned(bytes(length)) as buffer:
            assert os.preadv(handles.direct, [buffer], offset) == length
            assert buffer[:] == model.read(length, offset)

    def read_live_sparse(self, model: DiskModel, handles: Handles, path: Path) -> None:
        assert read_sparse(path) == model.data

    def truncate_same(self, model: DiskModel, handles: Handles, path: Path) -> None:
        os.ftruncate(handles.buffered, model.size)
        os.truncate(path, model.size)

    def truncate_open(self, model: DiskModel, handles: Handles, path: Path) -> None:
        with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
            assert os.fstat(fd).st_size == model.size

    def create(self, model: DiskModel, handles: Handles, path: Path) -> None:
        if len(self.snapshots) >= self.SNAPSHOTS_MAX:
            return
        name = next(self._names)
        self.mount.create(name)
        for each in self.models.values():
            each.freeze(name)
        self.snapshots.add(name)

    def delete(self, model: DiskModel, handles: Handles, path: Path) -> None:
        if not self.snapshots:
            return
        name = self.random.choice(sorted(self.snapshots))
        self.snapshots.remove(name)
        self.mount.delete(name)
        for each in self.models.values():
            each.forget(name)

    def read_snapshot(self, model: DiskModel, handles: Handles, path: Path) -> None:
        for snapshot in self.snapshots:
            self._read_snapshot(self.random, snapshot)

    WRITES = (
        write_buffered,
        write_direct,
        write_durable,
        write_memory,
        write_vector,
        punch,
        zero,
    )
    OPERATIONS = {  # noqa: RUF012
        write_buffered: 12,
        write_direct: 12,
        write_durable: 6,
        write_memory: 6,
        write_vector: 3,
        punch: 6,
        zero: 6,
        flush: 2,
        read_live: 8,
        read_live_direct: 4,
        read_live_sparse: 1,
        truncate_same: 1,
        truncate_open: 1,
        create: 4,
        delete: 3,
        read_snapshot: 8,
    }


Operation = Callable[[Walk, DiskModel, Handles, Path], None]
