"""Jobs of a real daemon, told what to do by the command line, over its restarts."""

import contextlib
import os
import signal
import subprocess

import pytest

from fleecefs.units import MiB
from tests.support.jobs import error_of, job_ids, job_of, output_of, wait_status
from tests.support.mount import FLEECEFS, PATIENCE, wait_until

SIZE = 16 * MiB

# So that a job is still there when the test looks: it takes 16 seconds.
SLOW = "--speed=1MiB"

died = pytest.mark.logs("the daemon died")


@pytest.fixture
def content():
    return os.urandom(SIZE)


@pytest.fixture
def mount(mounted, content):
    return mounted({"web.raw": content, "db.raw": SIZE})


@pytest.fixture
def target(mount):
    return mount.directory / "copy.raw"


@contextlib.contextmanager
def following(mount, *words):
    """Run a command that follows a job, once the job is there."""
    process = subprocess.Popen(
        [str(FLEECEFS), *map(str, words)],
        env=mount.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: job_ids(mount), "a job")
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process):
    out, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, out, errors.removeprefix("fleecefs: ").rstrip()


def test_a_backup_is_the_disk_of_its_instant(mount, target, content):
    text = output_of(mount, "backup", "web.raw", target)

    assert text.startswith("job web.raw completed: 16 MiB in ")
    assert target.read_bytes() == content


def test_events_are_qemus(mount, target):
    with mount.events() as events:
        output_of(mount, "backup", "web.raw", target)
        events.wait("BLOCK_JOB_COMPLETED")
        wait_until(lambda: len(events.named("JOB_STATUS_CHANGE")) == 6, "the end")

    assert [move["status"] for move in events.named("JOB_STATUS_CHANGE")] == [
        *("created", "running", "waiting", "pending", "concluded", "null")
    ]
    assert events.named("BLOCK_JOB_COMPLETED") == [
        {"type": "backup", "device": "web.raw", "len": SIZE, "offset": SIZE, "speed": 0}
    ]


@died
def test_a_job_and_its_follower_outlive_daemons(mount, target, content):
    with following(mount, "backup", "web.raw", target, SLOW) as follower:
        with open(mount.live("web.raw"), "r+b") as live:
            live.seek(8 * MiB)
            live.write(bytes(MiB))
        output_of(mount, "restart")
        os.kill(mount.pid, signal.SIGKILL)
        wait_until(lambda: mount.status()["generation"] == 2, "the next daemon")
        shown = output_of(mount, "job", "list")
        output_of(mount, "job", "set-speed", "web.raw", "0")
        code, out, _ = ended(follower)

    assert code == 0
    assert out.startswith("job web.raw completed: 16 MiB in ")
    assert "job web.raw went on after a restart of the daemon, 2 times" in shown
    assert job_of(mount)["restarts"] == 2
    assert target.read_bytes() == content


@died
def test_what_people_said_outlives_the_daemon(mount, target, content):
    output_of(mount, "backup", "web.raw", target, SLOW, "--detach")
    output_of(mount, "job", "set-speed", "web.raw", "2MiB")
    output_of(mount, "job", "pause", "web.raw")
    wait_status(mount, "paused")

    os.kill(mount.pid, signal.SIGKILL)
    # It is "created" until its first step.
    wait_status(mount, "paused")
    after = job_of(mount)
    output_of(mount, "job", "set-speed", "web.raw", "0")
    output_of(mount, "job", "resume", "web.raw")
    output_of(mount, "job", "wait", "web.raw")

    assert (after["status"], after["speed"]) == ("paused", 2 * MiB)
    assert target.read_bytes() == content


@died
def test_what_became_of_a_job_outlives_the_daemon(mount, target):
    output_of(mount, "backup", "db.raw", mount.directory / "db.copy")
    output_of(mount, "backup", "web.raw", target, SLOW, "--detach", "--no-auto-dismiss")
    output_of(mount, "job", "cancel", "web.raw")
    code, text = error_of(mount, "job", "wait", "web.raw")

    os.kill(mount.pid, signal.SIGKILL)
    kept = mount.json("job", "list")
    waited = error_of(mount, "job", "wait", "web.raw")
    output_of(mount, "job", "dismiss", "web.raw")

    assert (code, text) == (4, "job web.raw was cancelled")
    assert [(job["id"], job["status"]) for job in kept] == [("web.raw", "concluded")]
    assert waited == (code, text)
    assert job_ids(mount) == []
    assert job_of(mount, "db.raw")["error"] is None


@died
def test_a_group_stays_one_over_a_crash(mount, tmpfs_path):
    directory = tmpfs_path / "all"
    directory.mkdir()
    output_of(mount, "backup", "--all", directory, SLOW, "--detach")

    os.kill(mount.pid, signal.SIGKILL)
    assert set(job_ids(mount)) == {"web.raw", "db.raw"}
    output_of(mount, "job", "cancel", "web.raw")
    waited = error_of(mount, "job", "wait", "db.raw")

    assert waited == (4, "job db.raw was cancelled, as job 'web.raw' was cancelled")
    assert os.listdir(directory) == []


@died
def test_one_that_waits_to_be_finalized_still_does(mount, target, content):
    output_of(mount, "backup", "web.raw", target, "--no-auto-finalize")

    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: job_of(mount)["status"] == "pending", "pending again")
    output_of(mount, "job", "finalize", "web.raw")
    output_of(mount, "job", "wait", "web.raw")

    assert target.read_bytes() == content


@pytest.mark.logs("cut off whoever still uses")
def test_a_mount_with_a_job_is_not_unmounted_unless_forced(mount, target):
    with following(mount, "backup", "web.raw", target, SLOW) as follower:
        code, text = error_of(mount, "umount", mount.point)
        still = mount.is_mounted
        output_of(mount, "umount", "--force", mount.point)
        end = ended(follower)

    assert code == 1
    assert "fleecefs job wait web.raw" in text
    assert still
    assert end[0] == 4
    assert end[2].startswith("job web.raw was cancelled")
    assert not target.exists()


def test_a_signal_to_end_cancels_jobs(mount, target):
    with following(mount, "backup", "web.raw", target, SLOW) as follower:
        os.kill(mount.keeper_pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted, "the end")
        code, _, text = ended(follower)

    assert code == 4
    assert text.startswith("job web.raw was cancelled")
    assert not target.exists()


@pytest.mark.logs("going on: ")
def test_a_signal_leaves_jobs_of_a_mount_in_use(mount, target):
    output_of(mount, "backup", "web.raw", target, SLOW, "--detach")
    with open(mount.live("web.raw"), "rb"):
        os.kill(mount.keeper_pid, signal.SIGTERM)
        wait_until(lambda: "going on" in mount.read_log(), "a refusal")
        assert job_of(mount)["status"] == "running"

    output_of(mount, "job", "cancel", "web.raw")
    assert error_of(mount, "job", "wait", "web.raw")[0] == 4


def test_ctrl_c_leaves_the_job(mount, target):
    with following(mount, "backup", "web.raw", target, SLOW) as follower:
        follower.send_signal(signal.SIGINT)
        code, _, text = ended(follower)

    assert code == 130
    assert "fleecefs job cancel web.raw" in text
    assert job_of(mount)["status"] == "running"
    output_of(mount, "job", "cancel", "web.raw")
    assert error_of(mount, "job", "wait", "web.raw")[0] == 4


@pytest.mark.parametrize("name", ["web.raw", "db.raw", "new.raw", "snapshots/x/y"])
def test_a_target_on_the_mount_itself_is_refused(mount, name):
    code, text = error_of(mount, "backup", "web.raw", mount.point / name)

    assert code == 1
    assert "is on the mount of its own source" in text
    assert job_ids(mount) == []
