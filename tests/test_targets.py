"""Backups to targets that are slow, fail or hang, and a guest that does not care.

nbdkit's filters behind nbdfuse are such targets: to the kernel, a file system whose
server answers late, with an error, or not at all.
"""

import fcntl
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleecefs.units import MiB
from tests.support.jobs import (
    check_nothing_is_left,
    error_of,
    job_ids,
    job_of,
    output_of,
    start,
    wait_begun,
    wait_status,
)
from tests.support.mount import filesystem, loop_device, run, wait_until
from tests.support.nbd import NbdTarget, require_nbd
from tests.support.walk import noise

SIZE = 6 * MiB

# 5 MB/s; without this what comes in the first two seconds is not counted.
SLOW = "rate", "rate=40M", "burstiness=0.1"

# What fails is told when it is to fail.
FAILING = "error", "error-pwrite-rate=100%", "error-pwrite-file={failing}"


@pytest.fixture
def mount(mounted):
    return mounted({"web.raw": noise(SIZE)})


@pytest.fixture
def targets(tmpfs_path):
    """A function that serves a target, until the end of the test."""
    require_nbd()
    with ExitStack() as stack:

        def targets(*words):
            target = NbdTarget(tmpfs_path / "nbd", SIZE, *words)
            return stack.enter_context(target)

        yield targets


def overwrite(mount):
    """Let the guest write all of the disk; return what it holds now."""
    content = noise(SIZE, "new")
    with open(mount.live("web.raw"), "r+b", 0) as live:
        for offset in range(0, SIZE, MiB):
            assert live.write(content[offset : offset + MiB]) == MiB
        os.fsync(live.fileno())
    return content


def check_copies(mount, target):
    """Compare a target with the disk as it was before it was overwritten."""
    assert target.path.read_bytes() == noise(SIZE)
    check_nothing_is_left(mount)


def holders(mount, path):
    """Return how many descriptors the daemon has of a file."""
    links = Path(f"/proc/{mount.pid}/fd").iterdir()
    return sum(os.readlink(link) == str(path) for link in links)


# -- slow


def test_the_guest_does_not_wait_for_a_slow_target(mount, targets):
    target = targets(*SLOW)

    start(mount, "web.raw", target.path)
    wait_begun(mount)
    content = overwrite(mount)
    job = job_of(mount)
    output_of(mount, "job", "wait", "web.raw")

    # Most of it was still to be copied when the guest had written all of it.
    assert job["status"] == "running"
    assert job["current"] < SIZE / 2
    assert job["cost"]["ram"] > SIZE / 2
    assert mount.live("web.raw").read_bytes() == content
    check_copies(mount, target)


def test_the_guest_does_not_wait_for_a_slow_target_when_daemons_change(mount, targets):
    target = targets(*SLOW)

    start(mount, "web.raw", target.path)
    wait_begun(mount)
    output_of(mount, "restart")
    output_of(mount, "job", "wait", "web.raw")

    # It let the job rest first: a process ends when all it has asked for is answered.
    paused, ending = "job web.raw is paused", "ending for the next daemon"
    assert mount.read_log().index(paused) < mount.read_log().index(ending)
    assert job_of(mount)["restarts"] == 1
    check_copies(mount, target)


# -- failing


@pytest.mark.parametrize(
    ("code", "policy", "io_status"),
    [
        pytest.param("EIO", "stop", "failed", id="stop-failed"),
        pytest.param("ENOSPC", "enospc", "nospace", id="enospc-full"),
    ],
)
@pytest.mark.logs("job web.raw pauses: write failed")
def test_a_job_pauses_for_an_error_and_goes_on(mount, targets, code, policy, io_status):
    target = targets(*FAILING, f"error-pwrite={code}")
    target.failing.touch()

    with mount.events() as events:
        start(mount, "web.raw", target.path, f"--on-target-error={policy}")
        wait_status(mount, "paused")
        paused = job_of(mount)
        listed = output_of(mount, "job", "list")
        content = overwrite(mount)
        # It may pause again, for the same reason.
        output_of(mount, "job", "resume", "web.raw")
        wait_status(mount, "paused")
        target.failing.unlink()
        output_of(mount, "job", "resume", "web.raw")
        output_of(mount, "job", "wait", "web.raw")

    assert paused["io-status"] == io_status
    assert "job web.raw is paused: " in listed
    errors = events.named("BLOCK_JOB_ERROR")
    assert {tuple(error.items()) for error in errors} == {
        (("device", "web.raw"), ("operation", "write"), ("action", "stop"))
    }
    moves = [move["status"] for move in events.named("JOB_STATUS_CHANGE")]
    assert moves == [
        *("created", "running", "paused", "running", "paused", "running"),
        *("waiting", "pending", "concluded", "null"),
    ]
    assert job_of(mount)["io-status"] == "ok"
    assert mount.live("web.raw").read_bytes() == content
    check_copies(mount, target)


@pytest.mark.logs("job web.raw failed: Input/output error")
def test_a_job_fails_for_an_error(mount, targets):
    target = targets(*FAILING, "error-pwrite=EIO")
    target.failing.touch()

    with mount.events() as events:
        told = error_of(
            mount, "backup", "web.raw", target.path, "--on-target-error=enospc"
        )

    assert told == (4, "job web.raw failed: Input/output error")
    assert events.named("BLOCK_JOB_ERROR")[0]["action"] == "report"
    assert events.wait("BLOCK_JOB_COMPLETED")["error"] == "Input/output error"
    check_nothing_is_left(mount)
    wait_until(lambda: not holders(mount, target.path), "the end of all threads")


def test_an_error_that_is_ignored_is_tried_again_until_it_is_none(mount, targets):
    target = targets(*FAILING, "error-pwrite=EIO")
    target.failing.touch()

    with mount.events() as events:
        start(mount, "web.raw", target.path, "--on-target-error=ignore")
        assert events.wait("BLOCK_JOB_ERROR")["action"] == "ignore"
        overwrite(mount)
        running = job_of(mount)
        target.failing.unlink()
        output_of(mount, "job", "wait", "web.raw")

    assert (running["status"], running["io-status"]) == ("running", "ok")
    check_copies(mount, target)


@pytest.mark.logs("job web.raw pauses: write failed: No space left on device")
def test_a_full_file_system_is_made_larger(mount, tmpfs_path):
    point = tmpfs_path / "small"
    target = point / "web.raw"
    with filesystem("none", point, "-t", "tmpfs", "-o", f"size={SIZE // 3}"):
        start(mount, "web.raw", target, "--on-target-error=enospc")
        wait_status(mount, "paused")
        paused = job_of(mount)
        overwrite(mount)
        run("mount", "-o", f"remount,size={2 * SIZE}", point)
        output_of(mount, "job", "resume", "web.raw")
        output_of(mount, "job", "wait", "web.raw")

        assert paused["io-status"] == "nospace"
        assert 0 < paused["current"] < SIZE / 2
        assert target.read_bytes() == noise(SIZE)
    check_nothing_is_left(mount)


# -- hanging


@pytest.fixture
def hanging(mount, targets):
    """A target that hangs while a job is in the middle of it."""
    target = targets(*SLOW)
    start(mount, "web.raw", target.path)
    wait_begun(mount)
    target.hang()
    return target


def test_cancel_returns_while_the_target_hangs(mount, hanging):
    content = overwrite(mount)

    output_of(mount, "job", "cancel", "web.raw")
    waited = error_of(mount, "job", "wait", "web.raw")

    assert waited == (4, "job web.raw was cancelled")
    assert job_ids(mount) == []
    check_nothing_is_left(mount)
    assert mount.live("web.raw").read_bytes() == content
    # Only those who hang know the target still, until they come back.
    assert holders(mount, hanging.path) > 0
    hanging.go_on()
    wait_until(lambda: not holders(mount, hanging.path), "the end of all threads")


def test_after_a_target_that_hangs_the_next_one_is_served(mount, hanging, tmpfs_path):
    other = tmpfs_path / "other"
    output_of(mount, "job", "cancel", "web.raw")
    error_of(mount, "job", "wait", "web.raw")

    busy = error_of(mount, "backup", "web.raw", hanging.path)
    output_of(mount, "backup", "web.raw", other)

    assert busy[0] == 1
    assert "in use by another job" in busy[1]
    assert other.read_bytes() == noise(SIZE)


def test_a_job_whose_target_hangs_is_paused_when_it_comes_back(mount, hanging):
    output_of(mount, "job", "pause", "web.raw")
    status = job_of(mount)["status"]
    overwrite(mount)
    hanging.go_on()
    wait_status(mount, "paused")
    output_of(mount, "job", "resume", "web.raw")
    output_of(mount, "job", "wait", "web.raw")

    assert status == "running"
    check_copies(mount, hanging)


@pytest.mark.logs("can not end before target")
@pytest.mark.logs("cut off whoever still uses")
def test_unmounting_saves_all_while_the_target_hangs(mount, hanging):
    mount.create("s")
    content = overwrite(mount)

    ending = threading.Thread(
        target=output_of, args=(mount, "umount", "--force", mount.point)
    )
    ending.start()
    wait_until(lambda: "unmounted" in mount.read_log(), "the end of the mount")
    still = mount.is_mounted
    # Its process can not end earlier.
    hanging.go_on()
    ending.join()
    mount.mount()

    assert not still
    assert mount.live("web.raw").read_bytes() == content
    assert mount.snapshot("s", "web.raw").read_bytes() == noise(SIZE)
    assert job_ids(mount) == []


# -- refused


def refused_targets(mount, elsewhere):
    """Make targets that are wrong; return what is said of them."""
    elsewhere.mkdir()
    runtime = Path(mount.status()["runtime"])
    ours = "lies among the files of fleecefs"
    our_mount = "is on the mount of its own source"
    wrong = {
        mount.sources["web.raw"]: "is the source of disk 'web.raw'",
        mount.sources["db.raw"]: "is the source of disk 'db.raw'",
        mount.state / "copy.raw": ours,
        runtime / "copy.raw": ours,
        mount.live("web.raw"): our_mount,
        mount.live("new.raw"): our_mount,
        mount.snapshot("s", "web.raw"): our_mount,
    }
    for index, (path, text) in enumerate(list(wrong.items())):
        link = elsewhere / f"link{index}"
        link.symlink_to(path)
        wrong[link] = text
    kinds = {
        "hard-link": "is the source of disk 'web.raw'",
        "directory": f"is a directory; give a file, new or of {SIZE} bytes, or a block",
        "fifo": "is not a regular file; give a file",
        "smaller": f"has {SIZE - 1} bytes",
        "larger": f"has {SIZE + 1} bytes",
        "dangling": "is a link that leads nowhere",
        "smaller/x": "Not a directory",
        "missing/x": f"there is no directory {elsewhere}/missing; make it",
        "locked": "in use by another job or program",
    }
    wrong |= {elsewhere / name: text for name, text in kinds.items()}
    (elsewhere / "hard-link").hardlink_to(mount.sources["web.raw"])
    (elsewhere / "directory").mkdir()
    os.mkfifo(elsewhere / "fifo")
    (elsewhere / "smaller").write_bytes(b"o" * (SIZE - 1))
    (elsewhere / "larger").write_bytes(b"o" * (SIZE + 1))
    (elsewhere / "dangling").symlink_to("nothing")
    (elsewhere / "locked").write_bytes(b"o" * SIZE)
    return wrong


def tree(*directories):
    """Return all that is in some directories, and what is known of it."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for directory in directories
        for path in directory.rglob("*")
    }


def test_wrong_targets_are_refused_and_nothing_is_changed(mounted, tmpfs_path):
    mount = mounted({"web.raw": noise(SIZE), "db.raw": MiB})
    mount.create("s")
    elsewhere = tmpfs_path / "elsewhere"
    wrong = refused_targets(mount, elsewhere)
    before = tree(elsewhere, mount.state, mount.directory / "sources")

    with open(elsewhere / "locked") as locked:
        fcntl.flock(locked, fcntl.LOCK_SH)
        for path, text in wrong.items():
            done = mount.cli("backup", "web.raw", path)

            assert (done.returncode, done.stdout) == (1, ""), path
            assert done.stderr.startswith(f"fleecefs: target {path}: "), path
            assert text in done.stderr
            assert done.stderr.count("\n") == 1

    assert tree(elsewhere, mount.state, mount.directory / "sources") == before
    assert mount.snapshot("s", "web.raw").read_bytes() == noise(SIZE)
    assert job_ids(mount) == []


def test_a_read_only_target_is_refused(mount, tmpfs_path):
    existing = tmpfs_path / "point" / "web.raw"
    with filesystem("none", existing.parent, "-t", "tmpfs", "-o", "size=8M"):
        existing.write_bytes(b"o" * SIZE)
        run("mount", "-o", "remount,ro", existing.parent)
        for path in existing, existing.with_name("new.raw"):
            told = error_of(mount, "backup", "web.raw", path)

            assert told == (1, f"target {path}: Read-only file system")
    check_nothing_is_left(mount)


def test_a_read_only_device_is_refused(mount, tmpfs_path):
    backing = tmpfs_path / "device"
    backing.write_bytes(bytes(SIZE))
    with loop_device(backing, "--read-only") as device:
        told = error_of(mount, "backup", "web.raw", device)

    assert told == (1, f"target {device}: is a read-only device")
    check_nothing_is_left(mount)
