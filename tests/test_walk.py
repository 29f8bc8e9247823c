"""Disks and snapshots through the kernel: every byte against a model, every errno."""

import contextlib
import errno
import itertools
import mmap
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from fleecefs.block.raw import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from fleecefs.units import KiB, MiB
from tests.support.model import DiskModel
from tests.support.mount import (
    Mount,
    filesystem,
    loop_device,
    run,
    wait_until,
)
from tests.support.walk import (
    CLUSTER,
    Walk,
    data_extents,
    noise,
    opened,
    page_aligned,
    read,
    read_sparse,
    write,
)

BROKEN = r"snapshot \S+ of \S+ is broken: could not preserve"


def refusal(call: Callable[[], object]) -> str:
    """Return the name of the errno a call fails with."""
    with pytest.raises(OSError) as e:
        call()
    assert e.value.errno is not None
    return errno.errorcode[e.value.errno]


# -- random operations


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="default"),
        pytest.param(["--ram-limit=0"], id="disk-tier"),
        pytest.param(["--ram-limit=300K"], id="both-tiers"),
        pytest.param(["--cluster-size=64K"], id="large-clusters"),
        pytest.param(
            ["--on-cbw-error=break-guest-write", "--cbw-timeout=30"], id="guest-last"
        ),
    ],
)
def test_random_operations(mounted, options, seed):
    disks = {
        "full.raw": noise(MiB + 512, "full"),
        "holes.raw": MiB + 3 * 512,
        "mixed.raw": noise(300 * KiB) + bytes(400 * KiB) + noise(100 * KiB, "end"),
    }
    mount = mounted(disks, *options)
    walk = Walk(mount, seed)

    with contextlib.closing(walk):
        for _ in range(3):
            with walk.reading():
                for index in range(200):
                    walk.step()
                    if index % 40 == 0:
                        walk.check()
            walk.check()
            walk.remount()
            walk.check()

    mount.umount()
    for name, model in walk.models.items():
        assert mount.sources[name].read_bytes() == model.data


def test_64_snapshots_alive_at_once(mounted):
    size = 256 * KiB
    mount = mounted({"a.raw": noise(size), "b.raw": size})
    models = {"a.raw": DiskModel(noise(size)), "b.raw": DiskModel(bytes(size))}

    for index in range(64):
        mount.create(f"s{index}")
        for name, model in models.items():
            model.freeze(f"s{index}")
            for step in range(3):
                offset = (index * 7 + step * 23) % 64 * CLUSTER - step
                data = noise(3000 + step * 2000, (index, step))
                data = data[: size - max(0, offset)]
                write(mount.live(name), data, max(0, offset))
                model.write(data, max(0, offset))

    assert len(os.listdir(mount.snapshots)) == 64
    for name, model in models.items():
        assert mount.live(name).read_bytes() == model.data
        for snapshot, content in model.snapshots.items():
            assert mount.snapshot(snapshot, name).read_bytes() == content


def test_snapshot_is_exact_while_its_clusters_are_overwritten(mounted):
    mount = mounted({"a.raw": noise(MiB, 0)})
    live = mount.live("a.raw")
    content = noise(MiB, 0)

    for index in range(1, 41):
        mount.create("s")
        new = noise(MiB, index)
        with opened(mount.snapshot("s", "a.raw"), os.O_RDONLY | os.O_DIRECT) as fd:
            # From the end, which a read of all comes to last.
            writers = [
                threading.Thread(target=write_backwards, args=(live, new, half))
                for half in (0, 1)
            ]
            for writer in writers:
                writer.start()
            with page_aligned(bytes(MiB)) as buffer:
                while any(writer.is_alive() for writer in writers):
                    assert os.preadv(fd, [buffer], 0) == MiB
                    assert buffer[:] == content
            for writer in writers:
                writer.join()
        mount.delete("s")
        content = new
        assert live.read_bytes() == content


def write_backwards(live: Path, data: bytes, half: int) -> None:
    """Write every second cluster, each by a request of its own."""
    with opened(live, os.O_WRONLY) as fd:
        for offset in range(len(data) - (half + 1) * CLUSTER, -1, -2 * CLUSTER):
            os.pwrite(fd, data[offset : offset + CLUSTER], offset)


def test_deletion_in_any_order_keeps_the_others_exact(mounted):
    size = 16 * CLUSTER
    mount = mounted({"a.raw": noise(size)})
    live = mount.live("a.raw")

    for order in itertools.permutations("abcd"):
        model = DiskModel(live.read_bytes())
        for index, name in enumerate("abcd"):
            mount.create(name)
            model.freeze(name)
            data = noise(7 * CLUSTER, (order, name))
            write(live, data, index * 3 * CLUSTER)
            model.write(data, index * 3 * CLUSTER)
        for name in order:
            mount.delete(name)
            model.forget(name)
            for snapshot, content in model.snapshots.items():
                found = mount.snapshot(snapshot, "a.raw").read_bytes()
                assert found == content, (order, name, snapshot)
        assert live.read_bytes() == model.data

    assert mount.status()["ram"]["used"] == 0


# -- the size of a disk


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(lambda p: os.truncate(p, 0), "EPERM", id="to-zero"),
        pytest.param(
            lambda p: (p.open("r+b").close(), os.truncate(p, 0)),
            "EPERM",
            id="to-zero-after-use",
        ),
        pytest.param(lambda p: os.truncate(p, MiB + 1), "EPERM", id="larger"),
        pytest.param(lambda p: os.truncate(p, MiB), None, id="same"),
        pytest.param(
            lambda p: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)), None, id="open"
        ),
        pytest.param(
            lambda p: os.close(os.open(p, os.O_RDWR | os.O_CREAT | os.O_TRUNC)),
            None,
            id="open-as-a-shell-does",
        ),
    ],
)
def test_truncate_by_name(mounted, call, expected):
    content = noise(MiB)
    live = mounted({"a.raw": content}).live("a.raw")

    if expected is None:
        call(live)
    else:
        assert refusal(lambda: call(live)) == expected

    assert live.stat().st_size == MiB
    assert live.read_bytes() == content


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(0, "EPERM", id="to-zero"),
        pytest.param(MiB - 1, "EPERM", id="smaller"),
        pytest.param(MiB + 1, "EPERM", id="larger"),
        pytest.param(MiB, None, id="same"),
    ],
)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(os.O_RDWR, id="opened"),
        pytest.param(os.O_RDWR | os.O_TRUNC, id="opened-with-O_TRUNC"),
    ],
)
def test_truncate_by_handle(mounted, flags, size, expected):
    content = noise(MiB)
    live = mounted({"a.raw": content}).live("a.raw")

    with opened(live, flags) as fd:
        if expected is None:
            os.ftruncate(fd, size)
        else:
            assert refusal(lambda: os.ftruncate(fd, size)) == expected

    assert live.stat().st_size == MiB
    assert live.read_bytes() == content


@pytest.mark.parametrize(
    ("offset", "length", "written"),
    [
        pytest.param(MiB - 4096, 4096, 4096, id="up-to-the-end"),
        pytest.param(MiB - 4096, 8192, 4096, id="straddling"),
        pytest.param(MiB - 1, 2 * MiB, 1, id="all-but-one-byte-beyond"),
        pytest.param(MiB, 1, None, id="at-the-end"),
        pytest.param(MiB + 4096, 4096, None, id="past-the-end"),
        pytest.param(1 << 40, 512, None, id="far-past-the-end"),
    ],
)
def test_write_near_the_end(mounted, offset, length, written):
    model = DiskModel(noise(MiB))
    live = mounted({"a.raw": bytes(model.data)}).live("a.raw")
    data = noise(length, "new")

    with opened(live, os.O_WRONLY) as fd:
        if written is None:
            assert refusal(lambda: os.pwrite(fd, data, offset)) == "ENOSPC"
        else:
            assert os.pwrite(fd, data, offset) == written

    model.write(data, offset)
    assert live.stat().st_size == MiB
    assert live.read_bytes() == model.data


def test_append_finds_no_space(mounted):
    live = mounted({"a.raw": MiB}).live("a.raw")

    with opened(live, os.O_WRONLY | os.O_APPEND) as fd:
        assert refusal(lambda: os.write(fd, b"more")) == "ENOSPC"

    assert live.stat().st_size == MiB


def test_read_past_the_end_is_empty(mounted):
    live = mounted({"a.raw": b"x" * 4096}).live("a.raw")

    assert read(live, 10, 4096) == b""
    assert read(live, 10, 1 << 40) == b""
    assert read(live, 8192, 4095) == b"x"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        pytest.param(0, "ENOTSUP", id="allocate"),
        pytest.param(KEEP_SIZE, "ENOTSUP", id="allocate-keep-size"),
        pytest.param(0x08, "ENOTSUP", id="collapse"),
        pytest.param(0x20, "ENOTSUP", id="insert"),
    ],
)
def test_fallocate_refuses(mounted, mode, expected):
    content = noise(MiB)
    live = mounted({"a.raw": content}).live("a.raw")

    with opened(live, os.O_RDWR) as fd:
        assert refusal(lambda: fallocate(fd, mode, 0, CLUSTER)) == expected

    assert live.read_bytes() == content


def test_zeroing_beyond_the_end_does_not_grow_a_disk(mounted):
    live = mounted({"a.raw": noise(MiB)}).live("a.raw")

    with opened(live, os.O_RDWR) as fd:
        beyond = MiB - CLUSTER, 2 * CLUSTER
        assert refusal(lambda: fallocate(fd, ZERO_RANGE, *beyond)) == "ENOSPC"
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, *beyond)

    assert live.stat().st_size == MiB
    assert read(live, CLUSTER, MiB - CLUSTER) == bytes(CLUSTER)


# -- holes


def test_punched_hole_is_a_hole_and_still_data_in_the_snapshot(mounted):
    content = noise(MiB)
    mount = mounted({"a.raw": content})
    mount.create("before")

    with opened(mount.live("a.raw"), os.O_RDWR) as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 256 * KiB, 256 * KiB)
        live = list(data_extents(fd, MiB))
    mount.create("after")

    assert live == [(0, 256 * KiB), (512 * KiB, MiB)]
    with opened(mount.snapshot("after", "a.raw")) as fd:
        assert list(data_extents(fd, MiB)) == live
    before = mount.snapshot("before", "a.raw")
    assert read_sparse(before) == before.read_bytes() == content


def test_hole_of_the_source_stays_a_hole_in_the_snapshot(mounted):
    mount = mounted({"a.raw": MiB})
    mount.create("s")

    write(mount.live("a.raw"), noise(128 * KiB), 64 * KiB)

    snapshot = mount.snapshot("s", "a.raw")
    with opened(snapshot) as fd:
        assert list(data_extents(fd, MiB)) == []
    assert snapshot.read_bytes() == bytes(MiB)
    assert mount.status()["ram"]["used"] == 0


@pytest.mark.parametrize(
    ("whence", "offset", "expected"),
    [
        pytest.param(os.SEEK_DATA, MiB, "ENXIO", id="data-at-the-end"),
        pytest.param(os.SEEK_HOLE, MiB, "ENXIO", id="hole-at-the-end"),
        pytest.param(os.SEEK_DATA, 512 * KiB, "ENXIO", id="data-in-the-last-hole"),
        pytest.param(os.SEEK_HOLE, 0, 512 * KiB, id="hole-after-data"),
        pytest.param(os.SEEK_HOLE, 700 * KiB, 700 * KiB, id="hole-in-a-hole"),
        pytest.param(os.SEEK_DATA, 5, 5, id="data-in-data"),
    ],
)
@pytest.mark.parametrize("where", ["live", "snapshot"], ids=["live", "snapshot"])
def test_seek(mounted, where, whence, offset, expected):
    mount = mounted({"a.raw": MiB})
    write(mount.live("a.raw"), noise(512 * KiB), 0)
    mount.create("s")
    # The snapshot has some of it in its store and some on the source.
    write(mount.live("a.raw"), noise(100 * KiB, "new"), 50 * KiB)
    path = mount.live("a.raw") if where == "live" else mount.snapshot("s", "a.raw")

    with opened(path) as fd:
        if isinstance(expected, str):
            assert refusal(lambda: os.lseek(fd, offset, whence)) == expected
        else:
            assert os.lseek(fd, offset, whence) == expected


# -- durable writes


DURABLE_OFFSET = 5 * CLUSTER


@pytest.mark.parametrize(
    ("flags", "per_write", "is_durable"),
    [
        pytest.param(0, 0, False, id="plain"),
        pytest.param(0, os.RWF_DSYNC, True, id="RWF_DSYNC"),
        pytest.param(0, os.RWF_SYNC, True, id="RWF_SYNC"),
        pytest.param(os.O_DSYNC, 0, True, id="O_DSYNC"),
        pytest.param(os.O_SYNC, 0, True, id="O_SYNC"),
        pytest.param(os.O_DSYNC | os.O_DIRECT, 0, True, id="O_DSYNC-O_DIRECT"),
    ],
)
def test_durable_write_is_flushed_before_its_answer(
    mounted, tmp_path, flags, per_write, is_durable
):
    mount = mounted({"a.raw": MiB})

    with (
        opened(mount.live("a.raw"), os.O_RDWR | flags) as fd,
        page_aligned(b"x" * 4096) as data,
        traced(mount.pid, tmp_path) as calls,
    ):
        assert os.pwritev(fd, [data], DURABLE_OFFSET, per_write) == 4096

    # pwrite64 of the source, fdatasync of it, write of the answer to /dev/fuse.
    begin = next(i for i, c in enumerate(calls) if f", {DURABLE_OFFSET}) = " in c)
    answer = next(i for i, c in enumerate(calls[begin:]) if c.startswith("write("))
    flushes = [c for c in calls[begin : begin + answer] if c.startswith("fdatasync(")]
    assert len(flushes) == is_durable
    assert all(c.endswith("= 0") for c in flushes)


@pytest.mark.parametrize("flush", [os.fsync, os.fdatasync])
def test_fsync_of_a_live_disk_flushes_its_source(mounted, tmp_path, flush):
    mount = mounted({"a.raw": MiB})

    with opened(mount.live("a.raw"), os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 4096, 0)
        with traced(mount.pid, tmp_path) as calls:
            flush(fd)

    assert [c for c in calls if c.startswith(("fdatasync(", "fsync("))] != []


@contextmanager
def traced(pid: int, directory: Path) -> Iterator[list[str]]:
    """Collect the system calls of a process, thread by thread, in a list."""
    calls: list[str] = []
    prefix = directory / "trace"
    trace = "trace=pwrite64,pwritev,fdatasync,fsync,write"
    with subprocess.Popen(
        ["strace", "-ff", "-p", str(pid), "-e", trace, "-o", str(prefix)],
        stderr=subprocess.DEVNULL,
    ) as strace:
        try:
            wait_until(lambda: is_traced(pid, strace.pid), "strace to attach")
            yield calls
        finally:
            strace.terminate()
    for path in sorted(directory.glob("trace.*")):
        calls += path.read_text().splitlines()


def is_traced(pid: int, tracer: int) -> bool:
    statuses = Path(f"/proc/{pid}/task").glob("*/status")
    return all(f"TracerPid:\t{tracer}\n" in path.read_text() for path in statuses)


# -- copying inside the kernel


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("a.raw", "b.raw", id="live-to-live"),
        pytest.param("snapshots/s/a.raw", "b.raw", id="snapshot-to-live"),
        pytest.param("a.raw", "a.raw", id="within-a-disk"),
        pytest.param("a.raw", None, id="live-to-file"),
        pytest.param("snapshots/s/a.raw", None, id="snapshot-to-file"),
        pytest.param(None, "b.raw", id="file-to-live"),
    ],
)
def test_copy_file_range_copies_or_lets_the_caller_fall_back(
    mounted, tmp_path, source, target
):
    content = noise(MiB)
    mount = mounted({"a.raw": content, "b.raw": MiB})
    mount.create("s")
    ordinary = tmp_path / "ordinary"
    ordinary.write_bytes(content if source is None else bytes(MiB))
    from_path = ordinary if source is None else mount.point / source
    to_path = ordinary if target is None else mount.point / target

    with opened(from_path) as from_fd, opened(to_path, os.O_RDWR) as to_fd:
        try:
            copied = os.copy_file_range(from_fd, to_fd, 64 * KiB, 0, 512 * KiB)
        except OSError as e:
            # Between file systems of different types, as everywhere in Linux.
            if e.errno != errno.EXDEV or None not in (source, target):
                raise
            copied = os.sendfile(to_fd, from_fd, 0, 64 * KiB)

    assert 0 < copied <= 64 * KiB
    offset = 512 * KiB if to_path != ordinary and from_path != ordinary else 0
    assert read(to_path, copied, offset) == content[:copied]


def test_cp_copies_a_snapshot_over_a_live_disk(mounted):
    mount = mounted({"a.raw": noise(MiB), "b.raw": noise(MiB, "b")})
    mount.create("s")
    write(mount.live("a.raw"), b"new" * 1000, 0)

    run("cp", mount.snapshot("s", "a.raw"), mount.live("b.raw"))

    assert mount.live("b.raw").read_bytes() == noise(MiB)
    assert mount.snapshot("s", "b.raw").read_bytes() == noise(MiB, "b")


# -- names and attributes


def test_directories_list_what_can_be_opened(mounted):
    mount = mounted({"a.raw": MiB, "b.raw": 2 * MiB})
    mount.create("one")
    mount.create("two")

    found = {
        str(path.relative_to(mount.point)): path.stat()
        for path in mount.point.rglob("*")
    }

    assert {name: s.st_size for name, s in found.items() if name.endswith("raw")} == {
        "a.raw": MiB,
        "b.raw": 2 * MiB,
        "snapshots/one/a.raw": MiB,
        "snapshots/one/b.raw": 2 * MiB,
        "snapshots/two/a.raw": MiB,
        "snapshots/two/b.raw": 2 * MiB,
    }
    inodes = [status.st_ino for status in found.values()]
    assert len(set(inodes)) == len(inodes)
    for directory in mount.point, mount.snapshots, mount.snapshots / "one":
        for entry in os.scandir(directory):
            status = os.stat(entry.path)
            assert entry.inode() == status.st_ino
            assert entry.is_dir() == os.path.isdir(entry.path)
    assert [
        found[n].st_mode & 0o222 for n in found if n.startswith("snapshots/one/")
    ] == [0, 0]


def test_a_deleted_name_gives_another_file_when_taken_again(mounted):
    mount = mounted({"a.raw": noise(MiB)})
    mount.create("s")
    before = mount.snapshot("s", "a.raw").stat().st_ino
    mount.delete("s")
    write(mount.live("a.raw"), b"new", 0)

    mount.create("s")

    assert mount.snapshot("s", "a.raw").stat().st_ino != before
    assert read(mount.snapshot("s", "a.raw"), 3, 0) == b"new"


def test_mtime_and_attributes_of_a_snapshot_tell_its_instant(mounted):
    mount = mounted({"a.raw": noise(MiB)}, "--cluster-size=16K")
    before = time.time()
    mount.create("s")
    after = time.time()
    write(mount.live("a.raw"), b"later", 0)

    snapshot = mount.snapshot("s", "a.raw")

    created = mount.json("snapshot", "show", "s")["created"]
    assert before <= created <= after
    assert abs(snapshot.stat().st_mtime - created) < 1e-5
    assert abs((mount.snapshots / "s").stat().st_mtime - created) < 1e-5
    attributes = {
        name: os.getxattr(snapshot, name).decode() for name in os.listxattr(snapshot)
    }
    instant = attributes.pop("user.fleecefs.created")
    assert abs(datetime.fromisoformat(instant).timestamp() - created) < 1e-5
    assert attributes == {
        "user.fleecefs.state": "good",
        "user.fleecefs.disk": "a.raw",
        "user.fleecefs.cluster-size": "16384",
    }


def test_attributes_of_a_live_disk(mounted):
    live = mounted({"a.raw": MiB}).live("a.raw")

    assert os.getxattr(live, "user.fleecefs.state") == b"live"
    assert os.getxattr(live, "user.fleecefs.disk") == b"a.raw"
    assert refusal(lambda: os.getxattr(live, "user.other")) == "ENODATA"
    assert refusal(lambda: os.getxattr(live, "security.capability")) == "ENODATA"
    assert refusal(lambda: os.setxattr(live, "user.other", b"x")) == "EPERM"


def test_blocks_tell_what_is_allocated(mounted):
    mount = mounted({"a.raw": 64 * MiB})
    mount.create("empty")
    write(mount.live("a.raw"), noise(MiB), 0)
    mount.create("full")

    assert mount.snapshot("empty", "a.raw").stat().st_blocks == 0
    assert mount.snapshot("full", "a.raw").stat().st_blocks * 512 == MiB
    wait_until(
        lambda: mount.live("a.raw").stat().st_blocks * 512 == MiB, "fresh attributes"
    )


def test_statfs_tells_of_the_store(mounted, tmp_path):
    with tmpfs(tmp_path / "store", "size=8M") as store:
        mount = mounted({"a.raw": MiB}, f"--store={store}")

        found = os.statvfs(mount.point)

        assert found.f_blocks * found.f_frsize == 8 * MiB
        assert 0 < found.f_bavail <= found.f_blocks
        mount.umount()


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    with filesystem(Path("tmpfs"), path, "-t", "tmpfs", "-o", options):
        yield path


# -- memory maps


def test_shared_map_of_a_live_disk_reaches_the_source(mounted):
    mount = mounted({"a.raw": noise(MiB)})
    mount.create("s")

    with opened(mount.live("a.raw"), os.O_RDWR) as fd, mmap.mmap(fd, 0) as memory:
        memory[5000:5003] = b"new"
        memory.flush()
        assert mount.sources["a.raw"].read_bytes()[5000:5003] == b"new"
        os.pwrite(fd, b"newer", 9000)
        assert memory[9000:9005] == b"newer"

    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)


def test_map_of_a_snapshot_shows_its_instant(mounted):
    mount = mounted({"a.raw": noise(MiB)})
    mount.create("s")

    with (
        opened(mount.snapshot("s", "a.raw")) as fd,
        mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory,
    ):
        first = memory[: 64 * KiB]
        write(mount.live("a.raw"), bytes(MiB), 0)
        assert first + memory[64 * KiB :] == noise(MiB)


# -- what is refused


def make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def set_times(path: Path) -> None:
    os.utime(path, (0, 0))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        pytest.param(lambda p: make_file(p / "new"), "EPERM", id="create"),
        pytest.param(lambda p: (p / "new").mkdir(), "EPERM", id="mkdir"),
        pytest.param(lambda p: os.symlink("x", p / "new"), "EPERM", id="symlink"),
        pytest.param(lambda p: os.mkfifo(p / "new"), "EPERM", id="fifo"),
        pytest.param(lambda p: os.link(p / "a.raw", p / "new"), "EPERM", id="link"),
        pytest.param(lambda p: (p / "a.raw").unlink(), "EPERM", id="unlink"),
        pytest.param(lambda p: (p / "a.raw").rename(p / "b"), "EPERM", id="rename"),
        pytest.param(
            lambda p: (p / "a.raw").rename(p / "b.raw"), "EPERM", id="rename-over"
        ),
        pytest.param(lambda p: (p / "snapshots").rmdir(), "EPERM", id="rmdir"),
        pytest.param(lambda p: (p / "a.raw").chmod(0o777), "EPERM", id="chmod"),
        pytest.param(lambda p: os.chown(p / "a.raw", 1, 1), "EPERM", id="chown"),
        pytest.param(
            lambda p: make_file(p / "snapshots/new"), "EPERM", id="create-in-snapshots"
        ),
        pytest.param(
            lambda p: (p / "snapshots/s").rename(p / "snapshots/t"),
            "EPERM",
            id="rename-a-snapshot",
        ),
        pytest.param(
            lambda p: (p / "snapshots/s").mkdir(), "EEXIST", id="mkdir-that-is-there"
        ),
        pytest.param(
            lambda p: (p / "snapshots/t").rmdir(), "ENOENT", id="rmdir-of-nothing"
        ),
        pytest.param(
            lambda p: (p / "snapshots/.t").mkdir(), "EINVAL", id="mkdir-of-a-bad-name"
        ),
    ],
)
def test_names_that_are_refused(mounted, call, expected):
    mount = mounted({"a.raw": MiB, "b.raw": MiB})
    mount.create("s")

    assert refusal(lambda: call(mount.point)) == expected

    assert sorted(os.listdir(mount.point)) == ["a.raw", "b.raw", "snapshots"]
    assert os.listdir(mount.snapshots) == ["s"]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda p: make_file(p / "new"), id="create"),
        pytest.param(lambda p: (p / "new").mkdir(), id="mkdir"),
        pytest.param(lambda p: os.symlink("x", p / "new"), id="symlink"),
        pytest.param(lambda p: os.link(p / "a.raw", p / "new"), id="link"),
        pytest.param(lambda p: (p / "a.raw").unlink(), id="unlink"),
        pytest.param(lambda p: (p / "a.raw").rename(p / "b.raw"), id="rename"),
        pytest.param(lambda p: (p / "a.raw").chmod(0o777), id="chmod"),
        pytest.param(lambda p: set_times(p / "a.raw"), id="utime"),
        pytest.param(lambda p: os.truncate(p / "a.raw", 0), id="truncate"),
        pytest.param(lambda p: os.truncate(p / "a.raw", MiB), id="truncate-to-same"),
        pytest.param(lambda p: os.open(p / "a.raw", os.O_WRONLY), id="open-to-write"),
        pytest.param(lambda p: os.open(p / "a.raw", os.O_RDWR), id="open-read-write"),
        pytest.param(
            lambda p: os.open(p / "a.raw", os.O_RDONLY | os.O_TRUNC), id="open-trunc"
        ),
        pytest.param(
            lambda p: os.setxattr(p / "a.raw", "user.x", b"y"), id="set-attribute"
        ),
        pytest.param(
            lambda p: os.removexattr(p / "a.raw", "user.fleecefs.state"),
            id="remove-attribute",
        ),
    ],
)
def test_a_snapshot_is_read_only(mounted, call):
    mount = mounted({"a.raw": noise(MiB)})
    mount.create("s")

    assert refusal(lambda: call(mount.snapshots / "s")) == "EROFS"

    assert os.listdir(mount.snapshots / "s") == ["a.raw"]
    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)


def test_open_handle_of_a_deleted_snapshot_fails(mounted):
    mount = mounted({"a.raw": noise(MiB)})
    mount.create("s")

    with opened(mount.snapshot("s", "a.raw")) as fd:
        assert os.pread(fd, 10, 0) == noise(MiB)[:10]
        mount.delete("s")
        assert refusal(lambda: os.pread(fd, 10, 0)) == "EIO"
        assert refusal(lambda: os.pread(fd, 10, 512 * KiB)) == "EIO"
        assert refusal(lambda: os.lseek(fd, 0, os.SEEK_DATA)) == "EIO"

    assert refusal(lambda: mount.snapshot("s", "a.raw").stat()) == "ENOENT"


# -- unmounted and mounted again


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="default"),
        pytest.param(["--ram-limit=0"], id="disk-tier"),
        pytest.param(["--ram-limit=100K"], id="both-tiers"),
        pytest.param(["--cluster-size=64K"], id="large-clusters"),
    ],
)
def test_snapshots_are_exact_after_a_remount(mounted, options):
    mount = mounted({"a.raw": noise(MiB), "b.raw": MiB}, *options)
    overwrite_between_snapshots(mount, mount.remount)


def test_snapshots_of_a_block_device_are_exact_after_a_remount(mounted, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(noise(MiB))
    with loop_device(image) as device:
        mount = mounted({"dev.raw": device}, "--ram-limit=64K")

        overwrite_between_snapshots(mount, mount.remount)

        live = mount.live("dev.raw").read_bytes()
        mount.umount()
        assert device.read_bytes() == live


def overwrite_between_snapshots(mount: Mount, remount: Callable[[], None]) -> None:
    """Take snapshots and delete some, remount now and then, and check them all."""
    models = {n: DiskModel(mount.live(n).read_bytes()) for n in mount.sources}
    for index in range(6):
        mount.create(f"s{index}")
        for name, model in models.items():
            model.freeze(f"s{index}")
            data = noise(200 * KiB, index)
            write(mount.live(name), data, index * 100_000)
            model.write(data, index * 100_000)
        if index % 2:
            mount.delete(f"s{index - 1}")
            for model in models.values():
                model.forget(f"s{index - 1}")
            remount()
        for name, model in models.items():
            assert mount.live(name).read_bytes() == model.data
            for snapshot, content in model.snapshots.items():
                path = mount.snapshot(snapshot, name)
                assert path.read_bytes() == content
                assert os.getxattr(path, "user.fleecefs.state") == b"good"
    assert sorted(os.listdir(mount.snapshots)) == ["s1", "s3", "s5"]


def rewrite_in_place(path: Path) -> None:
    write(path, b"another guest", 4096)


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + MiB)


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512 * KiB)


@pytest.mark.parametrize("change", [rewrite_in_place, replace, grow, shrink])
@pytest.mark.logs("changed while it was not mounted")
def test_source_changed_in_between_breaks_its_snapshots_only(mounted, change):
    mount = mounted({"a.raw": noise(MiB), "b.raw": noise(MiB)})
    mount.create("s")
    for name in "a.raw", "b.raw":
        write(mount.live(name), b"overwritten", 0)
    mount.umount()
    change(mount.sources["a.raw"])
    content = mount.sources["a.raw"].read_bytes()

    mount.mount()

    state, reason = mount.snapshot_state("s", "a.raw")
    assert state == "broken"
    assert "changed while it was not mounted" in reason
    path = mount.snapshot("s", "a.raw")
    assert refusal(lambda: read(path, 10, 0)) == "EIO"
    assert refusal(lambda: read(path, 10, 256 * KiB)) == "EIO"
    assert os.getxattr(path, "user.fleecefs.reason").decode() == reason
    assert mount.snapshot("s", "b.raw").read_bytes() == noise(MiB)
    assert mount.live("a.raw").read_bytes() == content
    mount.delete("s")
    mount.create("next")
    assert mount.snapshot("next", "a.raw").read_bytes() == content


# -- a store that is full


@contextmanager
def small_tmpfs(directory: Path) -> Iterator[list[str]]:
    with tmpfs(directory / "store", "size=512K") as store:
        yield [f"--store={store}"]


@contextmanager
def small_ext4(directory: Path) -> Iterator[list[str]]:
    with ext4(directory, 8 * MiB) as store:
        # Leave a little only.
        free = os.statvfs(store).f_bavail * os.statvfs(store).f_frsize
        (store / "ballast").write_bytes(noise(free - 512 * KiB))
        yield [f"--store={store}"]


@contextmanager
def limited(directory: Path) -> Iterator[list[str]]:
    yield ["--store-limit=512K"]


@contextmanager
def ext4(directory: Path, size: int) -> Iterator[Path]:
    """Make and mount a small file system."""
    image = directory / "store.img"
    image.touch()
    os.truncate(image, size)
    run("mkfs.ext4", "-q", "-m", "0", image)
    with loop_device(image) as device, filesystem(device, directory / "store") as point:
        yield point


full_stores = pytest.mark.parametrize(
    "make_store",
    [
        pytest.param(limited, id="limit"),
        pytest.param(small_tmpfs, id="tmpfs"),
        pytest.param(small_ext4, id="ext4"),
    ],
)


@full_stores
@pytest.mark.logs(BROKEN)
def test_full_store_breaks_the_snapshots_and_the_guest_goes_on(
    mounted, tmp_path, make_store
):
    size = 4 * MiB
    with make_store(tmp_path) as options:
        mount = mounted({"a.raw": noise(size)}, "--ram-limit=0", *options)
        for name in "old", "new":
            mount.create(name)
        paths = [mount.snapshot(name, "a.raw") for name in ("old", "new")]

        with mount.events() as events, opened(paths[0]) as old, opened(paths[1]) as new:
            assert os.pread(old, 10, 0) == noise(size)[:10]
            write(mount.live("a.raw"), bytes(size), 0)
            assert refusal(lambda: os.pread(old, 10, 0)) == "EIO"
            assert refusal(lambda: os.pread(new, 10, size - 10)) == "EIO"
            wait_until(
                lambda: len(events.named("FLEECEFS_SNAPSHOT_BROKEN")) == 2, "events"
            )
            broken = events.named("FLEECEFS_SNAPSHOT_BROKEN")

        assert mount.live("a.raw").read_bytes() == bytes(size)
        assert {(e["name"], e["disk"]) for e in broken} == {
            ("old", "a.raw"),
            ("new", "a.raw"),
        }
        assert mount.cli("status").stdout.count("is broken: could not preserve") == 2
        wait_until(lambda: mount.status()["store"]["used"] == 0, "free space")
        mount.remount()
        for path in paths:
            assert refusal(lambda: read(path, 10, 0)) == "EIO"  # noqa: B023
            assert os.getxattr(path, "user.fleecefs.state") == b"broken"
            state, reason = mount.snapshot_state(path.parent.name, "a.raw")
            assert (state, bool(re.search("limit|[Nn]o space", reason))) == (
                "broken",
                True,
            )
        mount.create("next")
        write(mount.live("a.raw"), noise(64 * KiB), 0)
        assert mount.snapshot("next", "a.raw").read_bytes() == bytes(size)
        mount.umount()


@full_stores
def test_full_store_fails_the_guests_write_and_keeps_the_snapshots(
    mounted, tmp_path, make_store
):
    model = DiskModel(noise(4 * MiB))
    with make_store(tmp_path) as options:
        mount = mounted(
            {"a.raw": bytes(model.data)},
            "--ram-limit=0",
            "--on-cbw-error=break-guest-write",
            *options,
        )
        mount.create("old")
        model.freeze("old")
        assert overwrite(mount.live("a.raw"), model, 3) == (3, 0)
        mount.create("new")
        model.freeze("new")
        written, refused = overwrite(mount.live("a.raw"), model)

        assert written > 0
        assert refused > 0
        assert mount.live("a.raw").read_bytes() == model.data
        for name in "old", "new":
            path = mount.snapshot(name, "a.raw")
            assert path.read_bytes() == model.snapshots[name]
            assert mount.snapshot_state(name, "a.raw") == ("good", None)
        mount.remount()
        for name in "old", "new":
            path = mount.snapshot(name, "a.raw")
            assert path.read_bytes() == model.snapshots[name]
            mount.delete(name)
        assert overwrite(mount.live("a.raw"), model) == (64, 0)
        assert mount.live("a.raw").read_bytes() == model.data
        mount.umount()


def overwrite(live: Path, model: DiskModel, count: int = 64) -> tuple[int, int]:
    """Write to parts of a disk; return for how many there was space, and not."""
    written = refused = 0
    with opened(live, os.O_WRONLY) as fd:
        for offset in range(0, count * 64 * KiB, 64 * KiB):
            data = noise(64 * KiB, offset)
            try:
                assert os.pwrite(fd, data, offset) == len(data)
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
                refused += 1
            else:
                model.write(data, offset)
                written += 1
    return written, refused


# -- a store that hangs


@contextmanager
def frozen(point: Path) -> Iterator[None]:
    """Let every write to a file system hang meanwhile."""
    run("fsfreeze", "--freeze", point)
    try:
        yield
    finally:
        run("fsfreeze", "--unfreeze", point)


class Writers:
    """Threads that each write to a disk once, all at the same time."""

    def __init__(self, live: Path, writes: dict[int, bytes]) -> None:
        self.errors: dict[int, str | None] = {}
        self._threads = [
            threading.Thread(target=self._write, args=(live, offset, data))
            for offset, data in writes.items()
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, live: Path, offset: int, data: bytes) -> None:
        try:
            write(live, data, offset)
        except OSError as e:
            self.errors[offset] = errno.errorcode[e.errno or 0]
        else:
            self.errors[offset] = None

    def wait(self, seconds: float) -> list[str | None]:
        """Return each one's errno, None if it succeeded."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
            assert not thread.is_alive(), "a guest's write hangs"
        return [self.errors[offset] for offset in sorted(self.errors)]


hanging_parts = pytest.mark.parametrize("part", ["store", "all"])

# More than there are data threads at first.
OFFSETS = [index * 64 * KiB for index in range(12)]


def mount_on(mounted, point: Path, tmpfs_path: Path, part: str, *options: str) -> Mount:
    """Mount with the store, or with all but the source, on a file system."""
    source = tmpfs_path / "a.raw"
    source.write_bytes(noise(MiB))
    where = {"store": tmpfs_path, "all": point}[part]
    options = (*options, "--ram-limit=0", "--cbw-timeout=1")
    if part == "store":
        options = (*options, f"--store={point}")
    return mounted({"a.raw": source}, *options, directory=where)


@hanging_parts
@pytest.mark.logs(BROKEN)
def test_hanging_store_breaks_the_snapshot_and_the_guest_goes_on(
    mounted, tmp_path, tmpfs_path, part
):
    with ext4(tmp_path, 32 * MiB) as point:
        mount = mount_on(mounted, point, tmpfs_path, part)
        mount.create("s")
        model = DiskModel(noise(MiB))
        writes = {offset: noise(5000, offset) for offset in OFFSETS}
        live, path = mount.live("a.raw"), mount.snapshot("s", "a.raw")

        with opened(path) as fd, frozen(point):
            assert os.pread(fd, 10, 0) == noise(MiB)[:10]
            writers = Writers(live, writes)
            assert read(live, 100, MiB - 100) == model.data[-100:]
            assert writers.wait(10) == [None] * len(OFFSETS)
            for offset, data in writes.items():
                model.write(data, offset)
            assert refusal(lambda: os.pread(fd, 10, 0)) == "EIO"
            write(live, b"quick", 900 * KiB)
            model.write(b"quick", 900 * KiB)
            assert live.read_bytes() == model.data

        wait_until(
            lambda: mount.snapshot_state("s", "a.raw")[0] == "broken", "broken snapshot"
        )
        assert "cbw-timeout" in mount.snapshot_state("s", "a.raw")[1]
        mount.delete("s")
        mount.create("next")
        write(live, bytes(MiB), 0)
        assert mount.snapshot("next", "a.raw").read_bytes() == model.data
        mount.umount()
        assert mount.sources["a.raw"].read_bytes() == bytes(MiB)
        assert mount.unexpected_log() == []


@hanging_parts
def test_hanging_store_fails_the_guests_write_and_keeps_the_snapshot(
    mounted, tmp_path, tmpfs_path, part
):
    with ext4(tmp_path, 32 * MiB) as point:
        policy = "--on-cbw-error=break-guest-write"
        mount = mount_on(mounted, point, tmpfs_path, part, policy)
        mount.create("s")
        writes = {offset: noise(5000, offset) for offset in OFFSETS}
        live, path = mount.live("a.raw"), mount.snapshot("s", "a.raw")

        with frozen(point):
            writers = Writers(live, writes)
            assert read(live, 100, MiB - 100) == noise(MiB)[-100:]
            assert path.read_bytes() == noise(MiB)
            assert writers.wait(10) == ["ETIMEDOUT"] * len(OFFSETS)
            assert live.read_bytes() == noise(MiB)

        assert Writers(live, writes).wait(10) == [None] * len(OFFSETS)
        model = DiskModel(noise(MiB))
        for offset, data in writes.items():
            model.write(data, offset)
        assert live.read_bytes() == model.data
        assert path.read_bytes() == noise(MiB)
        mount.remount()
        assert path.read_bytes() == noise(MiB)
        mount.umount()
        assert mount.unexpected_log() == []
