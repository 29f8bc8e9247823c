"""Mirrors through a real mount: a disk moves while it is in use, and nobody notices.

What the guest has in its files decides: what a target has to be is what the live file
was at one instant, and after a move the live file is what the guest has written,
wherever that was.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from click.testing import CliRunner

from fleecefs.cli import main
from fleecefs.units import KiB, MiB
from tests.support.jobs import (
    check_nothing_is_left,
    complete,
    error_of,
    job_ids,
    job_of,
    keep,
    output_of,
    source_of,
    start,
    start_mirror,
    wait_begun,
    wait_ready,
    wait_status,
)
from tests.support.killer import DIED, Killer, daemon_pid, generation, kill
from tests.support.killer import wait_generation as wait_daemon
from tests.support.mount import (
    PATIENCE,
    Mount,
    filesystem,
    loop_device,
    run,
    wait_until,
)
from tests.support.nbd import NbdTarget, require_nbd
from tests.support.walk import (
    Handles,
    Walk,
    noise,
    opened,
    page_aligned,
    read_sparse,
    write,
)

WEB = "web.raw"
SIZE = 16 * MiB
# The last granule of it is not whole, nor is its last page.
ODD_SIZE = 8 * MiB + 4 * KiB + 512

MODES = ["background", "write-blocking"]
# Whoever is forced to end may be told that there are users, also if there are none.
CUT_OFF = "cut off whoever still uses"

each_mode = pytest.mark.parametrize("copy_mode", MODES)


@pytest.fixture
def mounted(mounted):
    """As everywhere, but commands run in our own process: there are so many of them."""

    def quick(*arguments, **options):
        mount = mounted(*arguments, **options)
        start_process = mount.cli

        def cli(*words, **options):
            if words[0] in ("mount", "umount"):
                return start_process(*words, **options)
            result = CliRunner(env={"FLEECEFS_MOUNT": str(mount.point)}).invoke(
                main, [str(word) for word in words], prog_name="fleecefs"
            )
            if not isinstance(result.exception, SystemExit | None):
                raise result.exception
            return subprocess.CompletedProcess(
                words, result.exit_code, result.stdout, result.stderr
            )

        mount.cli = cli
        return mount

    return quick


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def space(path: Path) -> int:
    """Return how many bytes of a file are allocated."""
    return path.stat().st_blocks * 512


def move(mount: Mount, target: Path, *options: str) -> str:
    """Mirror a disk and move it; return what is said of it."""
    start_mirror(mount, WEB, target, *options)
    wait_ready(mount)
    return complete(mount)


def check_moved(mount: Mount, target: Path) -> None:
    """Check that a disk, which rests, lives on a target, and nothing is left over."""
    assert source_of(mount) == target
    run("cmp", f"--bytes={mount.live(WEB).stat().st_size}", target, mount.live(WEB))
    check_nothing_is_left(mount)


class Fio:
    """One fio that writes to a live file and verifies that, all the time, in a `with`.

    It has the file open from beginning to end, and may not see an error.
    """

    def __init__(self, mount: Mount, *options: str, size: int = SIZE) -> None:
        self._mount = mount
        self._stop = mount.directory / "stop"
        self._stop.unlink(missing_ok=True)
        self._command = [
            "fio",
            "--name=job",
            f"--filename={mount.live(WEB)}",
            f"--size={size}",
            "--ioengine=libaio",
            "--iodepth=8",
            "--direct=1",
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=32",
            "--randseed=1",
            "--allow_file_create=0",
            "--time_based",
            f"--runtime={PATIENCE:.0f}",
            f"--trigger-file={self._stop}",
            "--output-format=json",
            *options,
        ]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where fio leaves what it knows of a run.
            cwd=self._mount.directory,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        was_running = self._process.poll() is None
        self._stop.touch()
        try:
            output, complaint = self._process.communicate(timeout=PATIENCE)
        finally:
            self._process.kill()
        if error is not None:
            return
        assert self._process.returncode == 0, output + complaint
        assert was_running, "fio has ended early"
        (job,) = json.loads(output[output.index("{") :])["jobs"]
        assert job["error"] == 0
        # It verifies all but the last it has written.
        assert job["read"]["io_bytes"] > job["write"]["io_bytes"] / 2 > 0

    def go_on(self, count: int = 200) -> None:
        """Return when it has written and read that often since."""
        before = self._count()
        wait_until(lambda: self._count() >= before + count, "fio to go on")

    def _count(self) -> int:
        assert self._process.poll() is None, "fio has ended"
        (disk,) = self._mount.status()["disks"]
        return int(disk["writes"])


class Guest:
    """Does something over and over, told how often before, in a thread and a `with`.

    It may not fail; `longest` is how long it took at the most.
    """

    def __init__(self, act: Callable[[int], object]) -> None:
        self.count = 0
        self.longest = 0.0
        self._act = act
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        if error is None:
            assert not self._thread.is_alive(), "a guest hangs"
            if self._error is not None:
                raise self._error

    def go_on(self, count: int = 1) -> None:
        """Return when it was done that often from beginning to end since."""
        wanted = self.count + 1 + count
        wait_until(lambda: self.count >= wanted or self._error, "a guest to go on")

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                begin = time.monotonic()
                self._act(self.count)
                self.longest = max(self.longest, time.monotonic() - begin)
                self.count += 1
        except BaseException as e:
            self._error = e


# -- moves under load


@each_mode
def test_a_disk_moves_there_and_back_while_fio_verifies(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: noise(SIZE)})
    old, new = mount.sources[WEB], tmpfs_path / "new.raw"
    option = f"--copy-mode={copy_mode}"

    with Fio(mount) as fio:
        fio.go_on()
        move(mount, new, option)
        old_then = checksum(old)
        fio.go_on()
        old_later = checksum(old)
        move(mount, old, option)
        new_then = checksum(new)
        fio.go_on()

    assert old_later == old_then
    assert checksum(new) == new_then
    check_moved(mount, old)
    # Told the last place it has left, which was mounted never yet.
    content = checksum(mount.live(WEB))
    mount.sources[WEB] = new
    mount.remount()
    assert source_of(mount) == old
    assert checksum(mount.live(WEB)) == content


@each_mode
def test_a_file_system_moves_while_files_are_written(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: 64 * MiB})
    old, new, point = mount.sources[WEB], tmpfs_path / "new.raw", tmpfs_path / "point"
    files = tmpfs_path / "files"
    files.mkdir()
    for index in range(30):
        (files / str(index)).write_bytes(noise(index * 3000, index))

    def copy(index):
        run("cp", "-a", files, point / str(index))
        run("sync", "-f", point)
        if index >= 4:
            run("rm", "-r", point / str(index - 4))

    with loop_device(mount.live(WEB), "--direct-io=on") as device:
        run("mkfs.ext4", "-q", device)
        with filesystem(device, point):
            with Guest(copy) as guest:
                guest.go_on()
                move(mount, new, f"--copy-mode={copy_mode}")
                old_then = checksum(old)
                guest.go_on()
            errors = Path("/sys/fs/ext4", device.name, "errors_count").read_text()
        run("e2fsck", "-fn", device)
        with filesystem(device, point):
            for index in range(guest.count - 4, guest.count):
                run("diff", "-r", files, point / str(index))

    assert errors == "0\n"
    assert checksum(old) == old_then
    check_moved(mount, new)


def test_a_disk_moves_when_that_is_finalized(mounted, tmpfs_path):
    mount = mounted({WEB: noise(SIZE)})
    old, new = mount.sources[WEB], tmpfs_path / "new.raw"

    with Fio(mount) as fio:
        start_mirror(mount, WEB, new, "--no-auto-finalize")
        wait_ready(mount)
        output_of(mount, "job", "complete", WEB)
        wait_status(mount, "pending")
        fio.go_on()
        before = source_of(mount)
        output_of(mount, "job", "finalize", WEB)
        output_of(mount, "job", "wait", WEB)
        old_then = checksum(old)
        fio.go_on()

    assert before == old
    assert checksum(old) == old_then
    check_moved(mount, new)


def test_a_disk_moves_to_a_file_that_shares_its_blocks(mounted, tmpfs_path):
    disk = tmpfs_path / "disk"
    disk.touch()
    os.truncate(disk, 320 * MiB)
    run("mkfs.xfs", "-q", "-m", "reflink=1", disk)
    point = tmpfs_path / "point"

    with loop_device(disk) as device, filesystem(device, point):
        old, new = point / "old.raw", point / "new.raw"
        old.write_bytes(noise(SIZE))
        mount = mounted({WEB: old})
        with Fio(mount) as fio:
            fio.go_on()
            move(mount, new)
            old_then = checksum(old)
            fio.go_on()
        shared = run("filefrag", "-v", new)
        check_moved(mount, new)
        mount.umount()

        assert checksum(old) == old_then
        assert "shared" in shared


# -- copies of one instant

BLOCK = 4096
# In granules of their own, next to each other, and from one granule into the next.
PLACES = [
    offset + at
    for offset in range(0, SIZE - MiB, 2 * MiB)
    for at in (0, BLOCK, 320 * KiB, 640 * KiB - 2048)
]


@each_mode
def test_a_copy_is_of_one_instant(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: noise(SIZE)})
    target = tmpfs_path / "copy.raw"
    ranges = []

    def count(number):
        """Write a number everywhere, one after the other."""
        block = number.to_bytes(8, "little") * (BLOCK // 8)
        for place in PLACES:
            assert os.pwrite(fd, block, place) == BLOCK

    with (
        opened(mount.live(WEB), os.O_WRONLY | os.O_DSYNC) as fd,
        Guest(count) as guest,
    ):
        for _ in range(3):
            guest.go_on()
            start_mirror(mount, WEB, target, f"--copy-mode={copy_mode}")
            wait_ready(mount)
            before = guest.count
            text = keep(mount)
            after = guest.count
            content = target.read_bytes()
            blocks = [content[place : place + BLOCK] for place in PLACES]
            numbers = [int.from_bytes(block[:8], "little") for block in blocks]
            assert f"{target} is a copy" in text
            assert all(block == block[:8] * (BLOCK // 8) for block in blocks)
            # No place is of another time than the one before it.
            assert sorted(numbers, reverse=True) == numbers
            assert numbers[0] - numbers[-1] <= 1
            # And all are of the moment that it was told.
            assert before - 1 <= numbers[-1] <= numbers[0] <= after
            ranges.append((numbers[-1], numbers[0]))

    assert ranges == sorted(set(ranges))
    assert source_of(mount) == mount.sources[WEB]
    check_nothing_is_left(mount)


@each_mode
def test_a_copy_of_a_disk_that_rests_is_identical(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: noise(ODD_SIZE)})
    target = tmpfs_path / "copy.raw"
    start_mirror(mount, WEB, target, f"--copy-mode={copy_mode}")
    wait_ready(mount)
    # Beyond the page, and within granules.
    write(mount.live(WEB), b"new", ODD_SIZE - 3)
    write(mount.live(WEB), noise(MiB, "new"), 12345)

    keep(mount)

    run("cmp", target, mount.live(WEB))
    run("cmp", target, mount.sources[WEB])
    write(mount.live(WEB), b"later", 0)
    assert target.read_bytes()[:5] == noise(ODD_SIZE)[:5]
    check_nothing_is_left(mount)


def test_without_a_bulk_only_what_is_written_is_copied(mounted, tmpfs_path):
    mount = mounted({WEB: noise(SIZE)})
    target = tmpfs_path / "copy.raw"
    target.write_bytes(noise(SIZE))

    start_mirror(mount, WEB, target, "--sync=none")
    wait_ready(mount)
    write(mount.live(WEB), noise(MiB, "new"), 4 * MiB + 1)
    keep(mount)
    copied = job_of(mount)["current"]

    run("cmp", target, mount.live(WEB))
    # The kernel may write it in parts, and between two it may be copied.
    assert MiB <= copied < 2 * MiB


# -- what people have open, and what was there before


def test_a_file_that_is_open_moves_with_its_disk(mounted, tmpfs_path):
    mount = mounted({WEB: noise(SIZE)})
    live, old = mount.live(WEB), mount.sources[WEB]
    content = bytearray(noise(SIZE))
    handles = Handles(live)

    def write_all(seed):
        """Write by all the descriptors there are."""
        for index, fd in enumerate((handles.buffered, handles.direct, handles.durable)):
            data, offset = noise(64 * KiB, (seed, index)), (3 * index + 1) * MiB
            with page_aligned(data) as buffer:
                assert os.pwrite(fd, buffer, offset) == len(data)
            content[offset : offset + len(data)] = data
        data, offset = noise(10_000, (seed, "mmap")), 12 * MiB + 5
        handles.memory[offset : offset + len(data)] = data
        handles.memory.flush()
        content[offset : offset + len(data)] = data

    try:
        write_all("before")
        start_mirror(mount, WEB, tmpfs_path / "new.raw")
        wait_ready(mount)
        write_all("ready")
        then = bytes(content)
        complete(mount)
        write_all("after")

        found = {
            fd: os.pread(fd, SIZE, 0) for fd in (handles.buffered, handles.durable)
        }
        with page_aligned(bytes(SIZE)) as buffer:
            assert os.preadv(handles.direct, [buffer], 0) == SIZE
            found[handles.direct] = buffer[:]
        found[-1] = handles.memory[:]
    finally:
        handles.close()
    assert [each == content for each in found.values()] == [True] * 4
    assert old.read_bytes() == then
    check_moved(mount, tmpfs_path / "new.raw")


def crash(mount: Mount) -> None:
    """Kill the keeper and the daemon, and mount again."""
    keeper, daemon = mount.keeper_pid, daemon_pid(mount)
    os.kill(daemon, signal.SIGSTOP)
    kill(keeper, daemon)
    wait_until(lambda: not mount.processes(), "the end of the killed")
    mount.mount()


def test_a_disk_that_has_moved_is_mounted_by_its_old_name(mounted, tmpfs_path):
    mount = mounted({WEB: noise(SIZE)})
    live, old, new = mount.live(WEB), mount.sources[WEB], tmpfs_path / "new.raw"
    content = bytearray(noise(SIZE))

    def overwrite(seed, offset):
        data = noise(2 * MiB, seed)
        write(live, data, offset)
        content[offset : offset + len(data)] = data

    mount.create("s")
    overwrite("before", 100)
    move(mount, new)
    then = bytes(content)
    overwrite("after", MiB)
    overwrite("elsewhere", 9 * MiB + 1)
    snapshots = [mount.snapshot("s", WEB).read_bytes()]
    # Told where it was, after a crash too, and where it is.
    crash(mount)
    for path in old, new:
        mount.sources[WEB] = path
        mount.remount()
        assert source_of(mount) == new
        assert live.read_bytes() == content
        snapshots.append(mount.snapshot("s", WEB).read_bytes())
    overwrite("remounted", 5 * MiB + 7)
    snapshots.append(mount.snapshot("s", WEB).read_bytes())

    assert [each == noise(SIZE) for each in snapshots] == [True] * 4
    assert old.read_bytes() == then
    assert live.read_bytes() == content
    assert new.read_bytes() == content


# -- daemons that die


@pytest.mark.logs(DIED)
def test_daemons_die_while_the_bulk_is_copied(mounted, tmpfs_path):
    # Each daemon copies at once what may be in flight: less than all of it.
    size = 48 * MiB
    mount = mounted({WEB: noise(size)})
    target = tmpfs_path / "new.raw"

    with Fio(mount, size=size) as fio:
        start_mirror(mount, WEB, target, "--speed=1MiB", "--buf-size=2MiB")
        wait_begun(mount)
        with Killer(mount, 4, seed="bulk") as killer:
            pass
        wait_status(mount, "running")
        shown = job_of(mount)
        fio.go_on()
        output_of(mount, "job", "set-speed", WEB, "0")
        wait_ready(mount)
    keep(mount)

    assert killer.kills == 4
    # A daemon may die before it has come to its jobs.
    assert 1 <= shown["restarts"] <= killer.kills
    run("cmp", target, mount.live(WEB))
    check_nothing_is_left(mount)


@each_mode
@pytest.mark.logs(DIED)
def test_daemons_die_when_a_mirror_is_ready(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: noise(SIZE)})
    old, new = mount.sources[WEB], tmpfs_path / "new.raw"

    with Fio(mount) as fio:
        start_mirror(mount, WEB, new, f"--copy-mode={copy_mode}")
        wait_ready(mount)
        fio.go_on()
        with Killer(mount, 4, seed=copy_mode) as killer:
            pass
        output_of(mount, "restart")
        # Once ready, it stays so.
        wait_status(mount, "ready")
        shown = job_of(mount)
        fio.go_on()
        complete(mount)
        old_then = checksum(old)
        fio.go_on()

    assert killer.kills == 4
    assert shown["copy-mode"] == copy_mode
    assert 1 <= shown["restarts"] <= killer.kills + 1
    assert checksum(old) == old_then
    check_moved(mount, new)


@pytest.mark.logs(DIED)
def test_daemons_die_when_they_are_told_to_complete(mounted, tmpfs_path):
    mount = mounted({WEB: noise(SIZE)})
    files = [mount.sources[WEB], tmpfs_path / "new.raw"]
    choice = random.Random(0)

    with Fio(mount) as fio:
        for turn in range(4):
            before, target = files[turn % 2], files[1 - turn % 2]
            start_mirror(mount, WEB, target)
            wait_ready(mount)
            number = generation(mount)
            pid = daemon_pid(mount)
            output_of(mount, "job", "complete", WEB)
            # Anywhere on its way, or when all is over.
            time.sleep(choice.uniform(0, 0.02))
            kill(pid)
            wait_daemon(mount, number + 1)
            told = output_of(mount, "job", "wait", WEB)
            then = checksum(before)
            fio.go_on()
            assert f"the disk lives on {target} now" in told
            assert source_of(mount) == target
            assert checksum(before) == then

    check_moved(mount, target)


# What a daemon that dies before them leaves is the same, to whoever uses it.
@pytest.mark.parametrize("point", ["move.saved", "mirror.forgotten"])
@pytest.mark.logs(DIED)
def test_a_daemon_dies_at_the_move(mounted, tmp_path, tmpfs_path, monkeypatch, point):
    kills = tmp_path / "kills"
    kills.write_text("0")
    with monkeypatch.context() as patch:
        patch.setenv("FLEECEFS_KILL", f"{point}:1:{kills}")
        mount = mounted({WEB: noise(SIZE)})
    old, new = mount.sources[WEB], tmpfs_path / "new.raw"

    with Fio(mount) as fio:
        start_mirror(mount, WEB, new)
        wait_ready(mount)
        kills.write_text("1")
        output_of(mount, "job", "complete", WEB)
        wait_daemon(mount, 1)
        told = mount.cli("job", "wait", WEB)
        then = checksum(old)
        fio.go_on()

    assert kills.read_text() == "0"
    assert told.returncode == 0, told.stderr
    assert checksum(old) == then
    check_moved(mount, new)


# -- all that a guest can do


@pytest.mark.parametrize(
    ("granularity", "copy_mode"),
    [
        pytest.param("512", "write-blocking", id="512-write-blocking"),
        pytest.param("4K", "background", id="4K-background"),
        pytest.param("1M", "write-blocking", id="1M-write-blocking"),
    ],
)
def test_random_operations_while_a_disk_moves(
    mounted, tmpfs_path, granularity, copy_mode
):
    """Let some of all come before, during and after each part of a mirror."""
    mount = mounted({WEB: noise(2 * MiB) + bytes(3 * MiB) + noise(ODD_SIZE - 5 * MiB)})
    old, target = mount.sources[WEB], tmpfs_path / "new.raw"
    walk = Walk(mount, f"{granularity} {copy_mode}")
    options = f"--granularity={granularity}", f"--copy-mode={copy_mode}"

    def steps(count):
        for _ in range(count):
            walk.step()

    try:
        steps(50)
        start_mirror(mount, WEB, target, *options, "--speed=2MiB")
        steps(150)
        bulk = job_of(mount)["status"]
        output_of(mount, "job", "set-speed", WEB, "0")
        steps(50)
        wait_ready(mount)
        steps(150)
        ready = job_of(mount)["status"]
        output_of(mount, "job", "complete", WEB)
        while job_ids(mount):
            steps(20)
        then = checksum(old)
        steps(150)
        walk.check()
        assert target.read_bytes() == walk.models[WEB].data
        assert read_sparse(target) == walk.models[WEB].data
        walk.remount()
        walk.check()
    finally:
        walk.close()

    assert (bulk, ready) == ("running", "ready")
    assert source_of(mount) == target
    assert checksum(old) == then


@each_mode
def test_small_writes_within_granules_that_are_dirty(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: noise(ODD_SIZE)})
    live, target = mount.live(WEB), tmpfs_path / "copy.raw"
    choice = random.Random(copy_mode)
    options = f"--copy-mode={copy_mode}", "--granularity=1M", "--buf-size=1M"

    def write_some(count):
        """Write a few bytes, also where a granule ends, and the last of all."""
        for _ in range(count):
            offset = choice.randrange(ODD_SIZE)
            if choice.random() < 0.3:
                offset = max(0, offset // MiB * MiB - 3)
            length = min(choice.choice([1, 7, 511, 5000]), ODD_SIZE - offset)
            write(live, choice.randbytes(length), offset)
        write(live, choice.randbytes(100), ODD_SIZE - 100)

    start_mirror(mount, WEB, target, "--speed=2MiB", *options)
    write_some(200)
    left = job_of(mount)
    output_of(mount, "job", "set-speed", WEB, "0")
    write_some(100)
    wait_ready(mount)
    write_some(200)
    keep(mount)

    assert left["status"] == "running"
    run("cmp", target, live)


def punch(live: Path, offset: int, length: int) -> None:
    run("fallocate", "--punch-hole", f"--offset={offset}", f"--length={length}", live)


def zero(live: Path, offset: int, length: int) -> None:
    run("fallocate", "--zero-range", f"--offset={offset}", f"--length={length}", live)


@each_mode
def test_what_is_discarded_or_zeroed_is_a_hole_of_the_target(
    mounted, tmpfs_path, copy_mode
):
    mount = mounted({WEB: noise(ODD_SIZE)})
    live, target = mount.live(WEB), tmpfs_path / "new.raw"

    def drop(begin):
        """Drop 2 MiB, and some bytes that fill no block."""
        punch(live, begin, MiB)
        zero(live, begin + MiB, MiB)
        punch(live, begin + 2 * MiB + 100, 5000)
        zero(live, begin + 2 * MiB + 300 * KiB + 1, 70_000)

    start_mirror(mount, WEB, target, "--speed=2MiB", f"--copy-mode={copy_mode}")
    wait_begun(mount)
    drop(MiB)
    status = job_of(mount)["status"]
    output_of(mount, "job", "set-speed", WEB, "0")
    wait_ready(mount)
    drop(5 * MiB)
    # As far as a page that is not whole, and again over what has data again.
    punch(live, 8 * MiB, ODD_SIZE - 8 * MiB)
    write(live, b"again", 5 * MiB + 12345)
    zero(live, 5 * MiB, 64 * KiB)
    complete(mount)

    assert status == "running"
    run("cmp", target, live)
    run("cmp", target, mount.sources[WEB])
    assert space(target) <= 4 * MiB + 128 * KiB
    check_moved(mount, target)


SPARSE = noise(MiB) + bytes(9 * MiB) + noise(512 * KiB, 1) + bytes(6 * MiB + 4 * KiB)


@pytest.mark.parametrize(
    "existing",
    [
        pytest.param(None, id="new"),
        pytest.param(b"o", id="old-data"),
        pytest.param(b"\0", id="zeroes"),
    ],
)
def test_a_sparse_disk_stays_sparse(mounted, tmpfs_path, existing):
    source = tmpfs_path / "sparse.raw"
    source.write_bytes(SPARSE)
    run("fallocate", "--dig-holes", source)
    mount = mounted({WEB: source})
    target = tmpfs_path / "new.raw"
    if existing is not None:
        target.write_bytes(existing * len(SPARSE))

    move(mount, target)

    assert space(source) <= space(target) <= space(source) + 128 * KiB
    check_moved(mount, target)


def test_a_target_of_zeroes_is_not_punched_where_the_disk_has_them(mounted, tmpfs_path):
    source = tmpfs_path / "sparse.raw"
    source.write_bytes(SPARSE)
    run("fallocate", "--dig-holes", source)
    mount = mounted({WEB: source})
    target = tmpfs_path / "new.raw"
    # Allocated, for whoever wants it so.
    target.write_bytes(bytes(len(SPARSE)))

    start_mirror(mount, WEB, target, "--target-is-zero")
    wait_ready(mount)
    write(mount.live(WEB), b"new", 3 * MiB)
    punch(mount.live(WEB), 0, 256 * KiB)
    complete(mount)

    assert space(target) > space(source) + 10 * MiB
    check_moved(mount, target)


# -- devices


@pytest.mark.parametrize("more", [0, 3 * MiB + 512], ids=["same-size", "larger"])
def test_a_disk_moves_to_a_device_and_keeps_its_size(mounted, tmpfs_path, more):
    size = ODD_SIZE
    mount = mounted({WEB: noise(size)})
    live, old = mount.live(WEB), mount.sources[WEB]
    backing = tmpfs_path / "device"
    backing.write_bytes(b"o" * (size + more))
    content = bytearray(noise(size))

    def overwrite(seed, offset):
        data = noise(MiB, seed)
        write(live, data, offset)
        content[offset : offset + len(data)] = data

    back = tmpfs_path / "back.raw"
    with loop_device(backing) as device:
        mount.create("s")
        start_mirror(mount, WEB, device)
        wait_ready(mount)
        overwrite("ready", size - MiB)
        complete(mount)
        overwrite("moved", 100)
        sizes, contents, snapshots = [], [], []
        for path in old, device:
            sizes.append(live.stat().st_size)
            contents.append(live.read_bytes())
            snapshots.append(mount.snapshot("s", WEB).read_bytes())
            mount.sources[WEB] = path
            mount.remount()
            assert source_of(mount) == device
        overwrite("remounted", 3 * MiB)
        snapshots.append(mount.snapshot("s", WEB).read_bytes())
        then = bytes(content)
        move(mount, back)
        overwrite("back", 0)
        snapshots.append(mount.snapshot("s", WEB).read_bytes())
        mount.remount()
        assert source_of(mount) == back
        mount.umount()

    assert sizes == [size] * 2
    assert contents[0] == contents[1]
    assert old.read_bytes() == noise(size)[:-MiB] + noise(MiB, "ready")
    assert [each == noise(size) for each in snapshots] == [True] * 4
    assert backing.read_bytes() == then + b"o" * more
    assert back.read_bytes() == content


def test_a_device_that_is_too_small_is_refused(mounted, tmpfs_path):
    mount = mounted({WEB: noise(ODD_SIZE)})
    backing = tmpfs_path / "device"
    backing.write_bytes(b"o" * (ODD_SIZE - 512))
    with loop_device(backing) as device:
        code, text = error_of(mount, "mirror", WEB, device)

    assert (code, job_ids(mount)) == (1, [])
    assert text.startswith(f"target {device}: has {ODD_SIZE - 512} bytes")
    assert backing.read_bytes() == b"o" * (ODD_SIZE - 512)
    check_nothing_is_left(mount)


# -- targets that hang


@pytest.fixture
def target(tmpfs_path):
    """A target that can be told to hang."""
    require_nbd()
    with ExitStack() as stack:
        yield stack.enter_context(NbdTarget(tmpfs_path / "nbd", 8 * MiB))


@pytest.fixture
def impatient(mounted):
    """A mount whose guest waits a second for a target at the most."""
    return mounted({WEB: noise(8 * MiB)}, "--cbw-timeout=1")


def rewriting(mount: Mount) -> Guest:
    """Return a guest that writes 4 KiB everywhere, and reads them again."""
    live = mount.live(WEB)

    def rewrite(number: int) -> None:
        offset = number * 37 % 2048 * 4096
        data = noise(4096, number)
        with opened(live, os.O_RDWR) as fd:
            assert os.pwrite(fd, data, offset) == len(data)
            assert os.pread(fd, len(data), offset) == data

    return Guest(rewrite)


# As long as it may wait for a target, and what a busy machine may add to it.
LONGEST = 1.0 + 4.0


@pytest.mark.parametrize("told", ["nothing", "complete"])
@each_mode
def test_a_forced_cancel_returns_while_the_target_hangs(
    target, impatient, copy_mode, told
):
    mount = impatient
    options = f"--copy-mode={copy_mode}", "--on-target-error=ignore"
    start_mirror(mount, WEB, target.path, *options)
    wait_ready(mount)

    with rewriting(mount) as guest:
        guest.go_on(20)
        target.hang()
        guest.go_on(5)
        if told == "complete":
            output_of(mount, "job", "complete", WEB)
            guest.go_on(20)
        begin = time.monotonic()
        output_of(mount, "job", "cancel", "--force", WEB)
        ended = error_of(mount, "job", "wait", WEB)
        seconds = time.monotonic() - begin
        guest.go_on(20)

    assert ended == (4, f"job {WEB} was cancelled")
    assert seconds < LONGEST
    assert guest.longest < LONGEST
    assert job_ids(mount) == []
    assert source_of(mount) == mount.sources[WEB]
    check_nothing_is_left(mount)
    run("cmp", mount.live(WEB), mount.sources[WEB])
    target.go_on()


def test_a_cancel_returns_while_the_bulk_hangs(target, impatient):
    start_mirror(impatient, WEB, target.path, "--speed=1MiB")
    wait_begun(impatient)
    target.hang()

    with rewriting(impatient) as guest:
        guest.go_on(20)
        output_of(impatient, "job", "cancel", WEB)
        ended = error_of(impatient, "job", "wait", WEB)
        guest.go_on(20)

    assert ended == (4, f"job {WEB} was cancelled")
    assert guest.longest < LONGEST
    check_nothing_is_left(impatient)
    target.go_on()


@pytest.mark.logs("failed: .*longer than 1 s")
def test_who_hangs_too_long_is_not_followed_any_more(target, impatient):
    start_mirror(impatient, WEB, target.path, "--copy-mode=write-blocking")
    wait_ready(impatient)

    with rewriting(impatient) as guest:
        guest.go_on(20)
        target.hang()
        ended = error_of(impatient, "job", "wait", WEB)
        guest.go_on(20)

    assert ended[0] == 4
    assert "the target took longer than 1 s for a write" in ended[1]
    assert 0.5 < guest.longest < LONGEST
    run("cmp", impatient.live(WEB), impatient.sources[WEB])
    check_nothing_is_left(impatient)
    target.go_on()


@each_mode
def test_a_target_that_answers_again_is_followed_again(target, impatient, copy_mode):
    mount = impatient
    options = f"--copy-mode={copy_mode}", "--on-target-error=ignore"
    start_mirror(mount, WEB, target.path, *options)
    wait_ready(mount)

    with rewriting(mount) as guest:
        guest.go_on(20)
        target.hang()
        guest.go_on(50)
        target.go_on()
        guest.go_on(50)
        if copy_mode == "write-blocking":
            wait_until(lambda: job_of(mount)["actively-synced"], "all in sync")
    keep(mount)

    assert guest.longest < LONGEST
    run("cmp", target.path, mount.live(WEB))
    run("cmp", target.path, mount.sources[WEB])
    check_nothing_is_left(mount)


# -- targets that are full


@pytest.mark.logs(f"job {WEB} pauses: write failed: No space left on device")
def test_a_target_on_a_full_file_system_waits_for_room(mounted, tmpfs_path):
    mount = mounted({WEB: noise(8 * MiB)})
    point = tmpfs_path / "small"
    target = point / WEB

    with filesystem("none", point, "-t", "tmpfs", "-o", "size=3M"):
        with rewriting(mount) as guest:
            start_mirror(mount, WEB, target, "--on-target-error=enospc")
            wait_status(mount, "paused")
            paused = job_of(mount)
            listed = output_of(mount, "job", "list")
            guest.go_on(50)
            run("mount", "-o", "remount,size=12M", point)
            output_of(mount, "job", "resume", WEB)
            wait_ready(mount)
            guest.go_on(50)
            complete(mount)
            guest.go_on(50)
        check_moved(mount, target)
        mount.umount()

    assert paused["io-status"] == "nospace"
    assert f"job {WEB} is paused: no space in target" in listed


@each_mode
@pytest.mark.logs(f"job {WEB} pauses: write failed: No space left on device")
def test_a_target_that_becomes_full_when_ready(mounted, tmpfs_path, copy_mode):
    mount = mounted({WEB: 8 * MiB})
    point = tmpfs_path / "small"
    target = point / WEB
    options = f"--copy-mode={copy_mode}", "--on-target-error=enospc"

    with filesystem("none", point, "-t", "tmpfs", "-o", "size=3M"):
        start_mirror(mount, WEB, target, *options)
        wait_ready(mount)
        with rewriting(mount) as guest:
            wait_status(mount, "standby")
            paused = job_of(mount)
            guest.go_on(50)
            run("mount", "-o", "remount,size=12M", point)
            output_of(mount, "job", "resume", WEB)
            wait_status(mount, "ready")
            guest.go_on(50)
            complete(mount)
            guest.go_on(50)
        check_moved(mount, target)
        mount.umount()

    assert paused["io-status"] == "nospace"


# -- beside others


def overwrite_all(mount: Mount, seed: object, size: int = 8 * MiB) -> None:
    content = noise(size, seed)
    for offset in range(0, size, MiB):
        write(mount.live(WEB), content[offset : offset + MiB], offset)


def test_a_mirror_beside_snapshots_and_backups(mounted, tmpfs_path):
    mount = mounted({WEB: noise(8 * MiB)})
    copy, other = tmpfs_path / "backup.raw", tmpfs_path / "other.raw"
    new = tmpfs_path / "new.raw"

    mount.create("before")
    start_mirror(mount, WEB, new, "--speed=1MiB")
    overwrite_all(mount, 1)
    mount.create("meanwhile")
    start(mount, WEB, copy, "--speed=1MiB", "--job-id=backup")
    overwrite_all(mount, 2)
    jobs = job_ids(mount)
    output_of(mount, "job", "set-speed", WEB, "0")
    wait_ready(mount)
    overwrite_all(mount, 3)
    mount.create("ready")
    start(mount, WEB, other, "--speed=1MiB", "--job-id=other")
    overwrite_all(mount, 4)
    complete(mount)
    mount.create("moved")
    overwrite_all(mount, 5)
    for each in "backup", "other":
        output_of(mount, "job", "set-speed", each, "0")
    output_of(mount, "job", "wait", "backup", "other")

    assert jobs == [WEB, "backup"]
    assert copy.read_bytes() == noise(8 * MiB, 1)
    assert other.read_bytes() == noise(8 * MiB, 3)
    for name, seed in ("before", 0), ("meanwhile", 1), ("ready", 3), ("moved", 4):
        assert mount.snapshot(name, WEB).read_bytes() == noise(8 * MiB, seed), name
    assert mount.live(WEB).read_bytes() == new.read_bytes() == noise(8 * MiB, 5)
    assert mount.sources[WEB].read_bytes() == noise(8 * MiB, 4)


def test_a_disk_has_one_mirror(mounted, tmpfs_path):
    mount = mounted({WEB: noise(8 * MiB)})
    start_mirror(mount, WEB, tmpfs_path / "new.raw", "--speed=1MiB")

    same = error_of(mount, "mirror", WEB, tmpfs_path / "other.raw")
    another = error_of(mount, "mirror", WEB, tmpfs_path / "other.raw", "--job-id=other")

    assert same == (1, f"a job '{WEB}' exists: give another job id")
    assert another == (1, f"disk '{WEB}' is being mirrored already")
    assert not (tmpfs_path / "other.raw").exists()
    assert job_ids(mount) == [WEB]
    output_of(mount, "job", "cancel", WEB)


def test_a_bitmap_moves_with_its_disk(mounted, tmpfs_path):
    mount = mounted({WEB: noise(8 * MiB)})
    live, backup = mount.live(WEB), tmpfs_path / "backup.raw"
    said = []

    def verify(*words):
        said.append(output_of(mount, "verify", WEB, backup, *words))

    def write_more(seed):
        write(live, noise(300_000, seed), (seed * 1234567) % (7 * MiB))

    output_of(mount, "bitmap", "add", WEB, "daily")
    output_of(mount, "backup", WEB, backup, "--bitmap=daily")
    write_more(1)
    start_mirror(mount, WEB, tmpfs_path / "new.raw")
    write_more(2)
    wait_ready(mount)
    write_more(3)
    complete(mount)
    verify("--bitmap=daily")
    write_more(4)
    verify("--bitmap=daily")
    # Told the old path.
    mount.remount()
    write_more(5)
    verify("--bitmap=daily")
    output_of(*(mount, "backup", WEB, backup, "--bitmap=daily", "--sync=incremental"))
    verify()

    assert [" are the same" in each for each in said] == [True] * 4
    run("cmp", backup, live)


# -- ends


@pytest.mark.logs(CUT_OFF)
def test_an_umount_does_not_end_a_mirror_unless_forced(mounted, tmpfs_path):
    mount = mounted({WEB: noise(8 * MiB)})
    new, kept = tmpfs_path / "new.raw", tmpfs_path / "kept.raw"
    kept.write_bytes(noise(8 * MiB))

    for target in new, kept:
        start_mirror(mount, WEB, target, "--speed=1MiB")
        wait_begun(mount)
        refused = error_of(mount, "umount", mount.point)
        still = job_of(mount)["status"]
        output_of(mount, "umount", "--force", mount.point)
        is_mounted = mount.is_mounted
        mount.mount()

        assert refused[0] == 1
        assert f"job '{WEB}' has not ended" in refused[1]
        assert still == "running"
        assert not is_mounted
        assert job_ids(mount) == []
        assert source_of(mount) == mount.sources[WEB]
    # What the job has made goes with it, and what was there stays.
    assert not new.exists()
    assert kept.stat().st_size == 8 * MiB
    check_nothing_is_left(mount)


@pytest.mark.logs(CUT_OFF)
def test_an_umount_does_not_end_a_mirror_that_is_ready_unless_forced(
    mounted, tmpfs_path
):
    mount = mounted({WEB: noise(8 * MiB)})
    start_mirror(mount, WEB, tmpfs_path / "new.raw")
    wait_ready(mount)
    write(mount.live(WEB), b"new", 5)

    code, text = error_of(mount, "umount", mount.point)
    still = job_of(mount)["status"]
    output_of(mount, "umount", "--force", mount.point)
    mount.mount()

    assert code == 1
    assert f"job '{WEB}' " in text
    assert still == "ready"
    assert job_ids(mount) == []
    assert source_of(mount) == mount.sources[WEB]
    assert mount.live(WEB).read_bytes()[5:8] == b"new"


# -- a guest that is faster


@pytest.fixture
def busy(mounted):
    """A mount, and a guest that makes all dirty again in a moment."""
    mount = mounted({WEB: noise(SIZE)})
    live = mount.live(WEB)

    def dirty(number):
        # Another granule each time.
        write(live, number.to_bytes(8, "little") * 64, number % 64 * 256 * KiB)

    with Guest(dirty) as guest:
        yield mount
        guest.go_on(100)


# Half a second for all of the disk.
SLOW = "--speed=32MiB", "--granularity=256K"


def test_a_mirror_that_does_not_converge_says_so(busy, tmpfs_path):
    mount, target = busy, tmpfs_path / "new.raw"

    with mount.events() as events:
        start_mirror(mount, WEB, target, *SLOW)
        wait_until(lambda: not job_of(mount)["converges"], "a trend")
        shown = job_of(mount)
        texts = [
            output_of(mount, *words)
            for words in (["job", "show", WEB], ["status"], ["job", "list"])
        ]
        told = events.wait("FLEECEFS_MIRROR_NOT_CONVERGING")
        output_of(mount, "job", "change", WEB, "--copy-mode=write-blocking")
        wait_ready(mount)
        wait_until(lambda: job_of(mount)["actively-synced"], "all in sync")
        complete(mount)

    assert (shown["status"], shown["copy-mode"]) == ("running", "background")
    assert shown["dirty-rate"] > 16 * MiB
    assert shown["eta"] is None or shown["eta"] > 0
    assert ["does not converge" in text for text in texts] == [True] * 3
    assert told["id"] == WEB
    assert told["dirty-rate"] > 0.9 * told["copy-rate"] > 0
    assert source_of(mount) == target


def test_a_mirror_that_does_not_converge_lets_the_guest_wait(busy, tmpfs_path):
    mount, target = busy, tmpfs_path / "new.raw"

    start_mirror(mount, WEB, target, *SLOW, "--converge=auto")
    before = job_of(mount)["copy-mode"]
    wait_ready(mount)
    shown = job_of(mount)
    said = keep(mount)

    assert before == "background"
    assert shown["copy-mode"] == "write-blocking"
    assert "guest writes waited, the longest " in said
    assert target.stat().st_size == SIZE
