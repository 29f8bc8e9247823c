"""Daemons and keepers are killed, and their users feel a pause, or a clear end."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fleecefs.units import KiB, MiB
from tests.support.jobs import job_ids, job_of, output_of, start
from tests.support.killer import (
    DIED,
    Contents,
    Killer,
    Pulse,
    daemon_pid,
    kill,
    wait_generation,
)
from tests.support.mount import (
    FLEECEFS,
    PATIENCE,
    Mount,
    filesystem,
    loop_device,
    run,
    wait_until,
)
from tests.support.walk import CLUSTER, Walk, noise, write

SIZE = 16 * MiB

# How often daemons are killed at random; all together a hundred times at least.
KILLS = {"psync": 15, "libaio": 15, "io_uring": 15, "ext4": 20, "walk": 20, "jobs": 20}
WALKS = 3

GAVE_UP = "gave up"
CUT_OFF = "cut off whoever still uses"


class Fio:
    """fio that writes all of a disk and verifies it, again and again, in a `with`.

    `longest` is the longest any of its requests took, in seconds.
    """

    def __init__(self, path: Path, engine: str) -> None:
        self.longest = 0.0
        self.runs = 0
        self._path = path
        self._engine = engine
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
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._run_once()
                self.runs += 1
        except BaseException as e:
            self._error = e

    def _run_once(self) -> None:
        output = run(
            "fio",
            "--name=job",
            f"--filename={self._path}",
            f"--ioengine={self._engine}",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            f"--size={SIZE}",
            f"--iodepth={1 if self._engine == 'psync' else 16}",
            "--direct=1",
            "--fsync=256",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            f"--randseed={self.runs + 1}",
            "--allow_file_create=0",
            "--output-format=json",
        )
        (job,) = json.loads(output[output.index("{") :])["jobs"]
        assert job["error"] == 0
        assert job["read"]["io_bytes"] == job["write"]["io_bytes"] == SIZE
        for kind in "read", "write":
            self.longest = max(self.longest, job[kind]["lat_ns"]["max"] / 1e9)


class Busy:
    """A guest that overwrites random clusters of a disk until it fails or is stopped.

    `error` is what it failed with.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.error: OSError | None = None
        self.count = 0
        self._path = path
        self._size = size
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.count > 10, "a guest to be busy")
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.wait_ended()

    def wait_ended(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "a guest hangs"

    def _run(self) -> None:
        choice = random.Random(0)
        try:
            fd = os.open(self._path, os.O_WRONLY)
            try:
                while not self._stopped.is_set():
                    offset = choice.randrange(self._size // CLUSTER) * CLUSTER
                    os.pwrite(fd, choice.randbytes(CLUSTER), offset)
                    self.count += 1
            finally:
                os.close(fd)
        except OSError as e:
            self.error = e


def wait_gone(mount: Mount) -> None:
    """Return when nothing is mounted and nobody is left."""
    wait_until(lambda: not mount.is_mounted and not mount.processes(), "the end")


def start_with_snapshot(mounted: Any, *options: str) -> Mount:
    """Mount a disk of noise and overwrite half of it after snapshot "s"."""
    mount: Mount = mounted({"a.raw": noise(MiB)}, *options)
    mount.create("s")
    write(mount.live("a.raw"), noise(512 * KiB, "new"), 100)
    return mount


def check_snapshot(mount: Mount) -> None:
    """Compare with what `start_with_snapshot` did."""
    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)
    assert mount.snapshot_state("s", "a.raw") == ("good", None)
    live = mount.live("a.raw").read_bytes()
    assert live[100 : 100 + 512 * KiB] == noise(512 * KiB, "new")


# -- the daemon is killed at random, and nobody notices


def test_a_hundred_daemons_die():
    assert sum(KILLS.values()) + (WALKS - 1) * KILLS["walk"] >= 100


@pytest.mark.parametrize("engine", ["psync", "libaio", "io_uring"])
@pytest.mark.logs(DIED)
def test_fio_sees_only_a_pause(mounted, tell_stall, engine):
    content = noise(SIZE)
    mount = mounted({"a.raw": content}, "--ram-limit=4M")
    mount.create("s")
    contents = Contents(mount, "a.raw")
    live = mount.live("a.raw")

    with Fio(live, engine) as fio, Pulse(live) as pulse:
        with Killer(mount, KILLS[engine], seed=engine) as killer:
            while not killer.ended:
                contents.create()
        contents.check()

    assert killer.kills == KILLS[engine]
    assert fio.runs > 0
    contents.check()
    assert mount.snapshot("s", "a.raw").read_bytes() == content
    tell_stall(
        max(fio.longest, pulse.longest), f"{killer.kills} kills, {fio.runs} runs of fio"
    )


@pytest.mark.logs(DIED)
def test_a_file_system_sees_only_a_pause(mounted, tmp_path, tell_stall):
    files = tmp_path / "files"
    files.mkdir()
    for index in range(50):
        (files / str(index)).write_bytes(noise(index * 3000, index))
    mount = mounted({"a.raw": 64 * MiB})
    live = mount.live("a.raw")
    contents = Contents(mount, "a.raw")
    point = tmp_path / "point"

    with (
        loop_device(live, "--direct-io=on") as device,
        Pulse(live) as pulse,
        Killer(mount, KILLS["ext4"], seed=1) as killer,
    ):
        run("mkfs.ext4", "-q", device)
        with filesystem(device, point):
            copies = 0
            while not killer.ended or not copies:
                run("cp", "-a", files, point / str(copies))
                run("sync", "-f", point)
                contents.create()
                copies += 1
                if copies > 4:
                    run("rm", "-r", point / str(copies - 5))
            errors = Path("/sys/fs/ext4", device.name, "errors_count")
            assert errors.read_text() == "0\n"
        run("e2fsck", "-fn", device)
        with filesystem(device, point):
            for copy in range(max(0, copies - 4), copies):
                run("diff", "-r", files, point / str(copy))

    assert killer.kills == KILLS["ext4"]
    contents.check()
    tell_stall(pulse.longest, f"{killer.kills} kills, {copies} copies")


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        pytest.param([], 1, id="default"),
        pytest.param(["--ram-limit=300K"], 2, id="both-tiers"),
        pytest.param(["--ram-limit=0", "--cluster-size=16K"], 3, id="disk-tier"),
    ],
)
@pytest.mark.logs(DIED)
def test_random_operations_see_only_a_pause(mounted, tell_stall, options, seed):
    disks = {
        "full.raw": noise(MiB + 512),
        "holes.raw": MiB + 3 * 512,
        "mixed.raw": noise(300 * KiB) + bytes(400 * KiB) + noise(100 * KiB, "end"),
    }
    mount = mounted(disks, *options)
    walk = Walk(mount, seed)
    longest = 0.0
    steps = 0

    with contextlib.closing(walk):
        with walk.reading(), Killer(mount, KILLS["walk"], seed) as killer:
            while not killer.ended:
                begin = time.monotonic()
                walk.step()
                longest = max(longest, time.monotonic() - begin)
                steps += 1
                if steps % 200 == 0:
                    walk.check()
        walk.check()
        walk.remount()
        walk.check()

    assert killer.kills == KILLS["walk"]
    mount.umount()
    for name, model in walk.models.items():
        assert mount.sources[name].read_bytes() == model.data
    tell_stall(longest, f"{killer.kills} kills, {steps} operations")


class Backups:
    """Backs up a disk that fio does not touch, again and again, and checks each."""

    def __init__(self, mount: Mount, disk: str) -> None:
        self.count = 0
        self._mount = mount
        self._disk = disk
        self._content = mount.live(disk).read_bytes()

    def back_up(self) -> None:
        live = self._mount.live(self._disk)
        target = self._mount.directory / f"{self.count}.raw"
        self._start(target)
        write(live, noise(self.count * 10 * KiB + 1, self.count), 100 * KiB)
        done = self._mount.cli("job", "wait", self._disk)
        assert done.returncode == 0, done.stderr
        assert target.read_bytes() == self._content, self.count
        target.unlink()
        self._content = live.read_bytes()
        self.count += 1

    def _start(self, target: Path) -> None:
        """Start a job; a daemon that dies before it answers may have done it."""
        command = ["backup", self._disk, target, "--speed=8MiB", "--detach"]
        wait_until(
            lambda: self._mount.cli(*command).returncode == 0 or self._has_job(),
            "a job",
        )

    def _has_job(self) -> bool:
        done = self._mount.cli("job", "list", "--json")
        return done.returncode == 0 and self._disk in [
            job["id"] for job in json.loads(done.stdout)
        ]


@pytest.mark.logs(DIED)
def test_jobs_see_only_a_pause(mounted, tmpfs_path, tell_stall):
    # Each daemon copies a chunk of 1 MiB at once: more than all of them will.
    content = noise(2 * SIZE + 8 * MiB)
    mount = mounted({"a.raw": content, "b.raw": noise(4 * MiB)}, "--ram-limit=4M")
    live = mount.live("a.raw")
    slow = {}
    for name in "one", "two":
        target = tmpfs_path / name
        start(mount, "a.raw", target, "--speed=256KiB", f"--job-id={name}")
        slow[target] = live.read_bytes()
        write(live, noise(2 * MiB, name), 5 * MiB + 1)
    contents = Contents(mount, "a.raw")
    backups = Backups(mount, "b.raw")

    with Fio(live, "libaio") as fio, Pulse(live) as pulse:
        with Killer(mount, KILLS["jobs"], seed="jobs") as killer:
            while not killer.ended:
                backups.back_up()
                contents.create()
        shown = [job_of(mount, name) for name in ("one", "two")]
        listed = output_of(mount, "job", "list")
        for name in "one", "two":
            output_of(mount, "job", "set-speed", name, "0")
        output_of(mount, "job", "wait", "one", "two")

    assert killer.kills == KILLS["jobs"]
    for job in shown:
        assert job["status"] == "running"
        # A daemon may die before it has come to its jobs.
        assert killer.kills / 2 < job["restarts"] <= killer.kills
        assert f"job {job['id']} went on after a restart of the daemon, " in listed
    for target, content in slow.items():
        assert target.read_bytes() == content
    contents.check()
    assert job_ids(mount) == []
    tell_stall(
        max(fio.longest, pulse.longest),
        f"{killer.kills} kills, {backups.count} backups",
    )


# -- restarted on purpose


def test_restart_under_load(mounted, tell_stall):
    content = noise(SIZE)
    mount = mounted({"a.raw": content})
    mount.create("s")
    live = mount.live("a.raw")
    keeper = mount.keeper_pid

    with Fio(live, "libaio") as fio, Pulse(live) as pulse:
        for number in range(1, 21):
            done = mount.cli("restart")
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(f"daemon {number} has taken over")

    assert mount.keeper_pid == keeper
    assert mount.status()["generation"] == 20
    assert "unmounted" not in mount.read_log()
    assert mount.snapshot("s", "a.raw").read_bytes() == content
    tell_stall(max(fio.longest, pulse.longest), "20 restarts")


# -- the keeper is killed


@pytest.mark.logs(CUT_OFF)
def test_a_daemon_without_a_keeper_saves_and_ends(mounted):
    mount = start_with_snapshot(mounted)

    with Busy(mount.live("a.raw"), 50 * KiB) as busy:
        kill(mount.keeper_pid)
        wait_gone(mount)
        busy.wait_ended()

    assert busy.error is not None
    assert busy.error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert mount.read_log().count("unmounted") == 1
    mount.mount()
    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)
    assert mount.snapshot_state("s", "a.raw") == ("good", None)


def test_keeper_and_daemon_killed_and_mounted_again(mounted):
    size = MiB
    mount = mounted({"a.raw": noise(size), "b.raw": size, "busy.raw": noise(size)})
    walk = Walk(mount, seed=1)
    walk.models.pop("busy.raw")
    walk.handles.pop("busy.raw").close()
    contents = Contents(mount, "busy.raw")

    for _ in range(20):
        with Busy(mount.live("busy.raw"), size) as busy:
            for _ in range(25):
                walk.step()
            contents.create()
            # Whoever has files open there gets errors from close(2) too.
            walk.close()
            kill_both(mount)
            busy.wait_ended()
        assert busy.error is not None
        assert busy.error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        wait_until(lambda: not mount.processes(), "the end of the killed")
        # Nobody has unmounted it.
        assert mount.is_mounted
        mount.mount()
        walk.open()
        walk.handles.pop("busy.raw", None)
        contents.check()
        walk.check()

    walk.close()
    mount.remount()
    contents.check()


def kill_both(mount: Mount) -> None:
    """Kill the keeper and the daemon before one can do anything about the other."""
    keeper, daemon = mount.keeper_pid, daemon_pid(mount)
    os.kill(daemon, signal.SIGSTOP)
    kill(keeper, daemon)


# -- the keeper gives up


def check_gave_up(mount: Mount, reason: str) -> None:
    """Check that all is gone, and that everybody hears why."""
    wait_gone(mount)
    assert os.listdir(mount.point) == []
    told = mount.cli("status", "-m", mount.point)
    assert told.returncode == 3
    assert "its keeper gave up" in told.stderr
    assert reason in told.stderr
    assert f"ERROR keeper: gave up {mount.point}: " in mount.read_log()
    assert reason in mount.read_log()


@pytest.mark.logs(DIED)
@pytest.mark.logs(GAVE_UP)
def test_a_request_that_kills_every_daemon_fails(mounted, tmp_path, monkeypatch):
    kills = tmp_path / "kills"
    kills.write_text("0")
    with monkeypatch.context() as patch:
        patch.setenv("FLEECEFS_KILL", f"write.preserved:1:{kills}")
        mount = start_with_snapshot(mounted)

        kills.write_text("99")
        fd = os.open(mount.live("a.raw"), os.O_RDWR)
        with pytest.raises(OSError) as e:
            os.pwrite(fd, b"poison", 800 * KiB)
        check_gave_up(mount, "5 daemons in a row died as they started (signal 9)")
        for call in lambda: os.pread(fd, 10, 0), lambda: os.close(fd):
            with pytest.raises(OSError, match="not connected"):
                call()

    assert e.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    # And the fifth one.
    assert mount.read_log().count("the daemon died") == 4
    mount.mount()
    check_snapshot(mount)
    assert mount.cli("status").returncode == 0


@pytest.mark.logs(DIED)
@pytest.mark.logs(GAVE_UP)
def test_five_quick_crashes_are_the_end(mounted):
    mount = start_with_snapshot(mounted)

    with Busy(mount.live("a.raw"), 50 * KiB) as busy:
        for number in range(5):
            wait_generation(mount, number)
            kill(daemon_pid(mount))
        check_gave_up(mount, "5 daemons in a row died as they started (signal 9)")
        busy.wait_ended()

    assert busy.error is not None
    mount.mount()
    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)


@pytest.mark.logs(GAVE_UP)
def test_a_kernel_that_can_not_send_requests_again(mounted, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("FLEECEFS_NO_RESEND", "1")
        mount = start_with_snapshot(mounted)
        refused = mount.cli("restart")

        check_snapshot(mount)
        with Busy(mount.live("a.raw"), 50 * KiB) as busy:
            kill(daemon_pid(mount))
            check_gave_up(mount, "this kernel can not send requests again")
            busy.wait_ended()

    assert refused.returncode == 1
    assert "this kernel can not send requests again" in refused.stderr
    assert busy.error is not None
    mount.mount()
    assert mount.snapshot("s", "a.raw").read_bytes() == noise(MiB)


# -- the end


@pytest.mark.logs(DIED)
def test_killed_while_it_unmounts(mounted):
    mount = start_with_snapshot(mounted)
    choice = random.Random(0)

    for _ in range(12):
        pid = daemon_pid(mount)
        with started_umount(mount) as umount:
            # The command takes a tenth of a second to come to the point.
            with contextlib.suppress(subprocess.TimeoutExpired):
                umount.wait(choice.uniform(0.02, 0.25))
            kill(pid)
        wait_gone(mount)
        mount.mount()
        check_snapshot(mount)


@contextmanager
def started_umount(mount: Mount) -> Iterator["subprocess.Popen[str]"]:
    """Unmount meanwhile; it has succeeded in the end."""
    with subprocess.Popen(
        [FLEECEFS, "umount", mount.point],
        env=mount.environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        _, complaint = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, complaint


@pytest.mark.logs(DIED)
def test_sigterm_between_two_daemons_is_a_clean_umount(mounted):
    mount = start_with_snapshot(mounted)
    choice = random.Random(0)

    for _ in range(8):
        keeper = mount.keeper_pid
        kill(daemon_pid(mount))
        time.sleep(choice.uniform(0, 0.15))
        os.kill(keeper, signal.SIGTERM)
        wait_gone(mount)
        mount.mount()
        check_snapshot(mount)
