"""fleecefs verify, through a real mount: what it finds, says and exits with."""

import contextlib
import json
import os
import signal
import subprocess

import pytest

from fleecefs.control.client import Client
from fleecefs.units import KiB, MiB
from tests.support.jobs import (
    check_nothing_is_left,
    error_of,
    job_of,
    output_of,
    wait_begun,
)
from tests.support.mount import FLEECEFS, PATIENCE, loop_device, wait_until
from tests.support.qemu import qemu_img, require_qemu
from tests.support.walk import noise

SIZE = 4 * MiB + 512


@pytest.fixture
def mount(mounted):
    return mounted({"web.raw": noise(SIZE)})


@pytest.fixture
def target(tmpfs_path):
    return tmpfs_path / "backup.raw"


def execute(mount, command, **arguments):
    arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
    control = os.path.join(mount.status()["runtime"], "control")
    with Client(control) as client:
        return client.execute(command, **arguments)


def back_up(mount, target, **options):
    """Make a backup of web.raw and wait for its end."""
    options = {"sync": "full", **options}
    execute(mount, "blockdev-backup", device="web.raw", target=str(target), **options)
    output_of(mount, "job", "wait", "web.raw")


def back_up_with_bitmap(mount, target, **options):
    """Make one with which a bitmap begins."""
    execute(mount, "block-dirty-bitmap-add", node="web.raw", name="daily")
    options = {"bitmap": "daily", "bitmap_mode": "on-success", **options}
    back_up(mount, target, **options)


def write(mount, data, offset):
    with open(mount.live("web.raw"), "r+b", 0) as live:
        live.seek(offset)
        assert live.write(data) == len(data)


def corrupt(path, offset):
    with open(path, "r+b", 0) as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 0xFF]), offset)


def test_a_backup_is_the_same(mount, target):
    back_up(mount, target)

    assert output_of(mount, "verify", "web.raw", target) == (
        f"web.raw and {target} are the same\n"
    )
    check_nothing_is_left(mount)


@pytest.mark.logs("failed: differs from")
def test_a_byte_that_was_corrupted_is_shown(mount, target):
    back_up(mount, target)
    corrupt(target, 1)
    corrupt(target, SIZE - 1)

    done = mount.cli("verify", "web.raw", target)

    assert done.returncode == 1
    assert done.stdout == (
        "OFFSET            LENGTH\n0x0               0x200\n0x400000          0x200\n"
    )
    assert done.stderr == f"fleecefs: web.raw and {target} differ in 1 KiB\n"
    check_nothing_is_left(mount)


@pytest.mark.logs("failed: differs from")
def test_not_all_extents_are_shown(mount, target):
    back_up(mount, target)
    for at in range(25):
        corrupt(target, at * 64 * KiB)

    done = mount.cli("verify", "web.raw", target)
    lines = done.stdout.splitlines()
    shown = mount.cli("verify", "web.raw", target, "--json").stdout.splitlines()

    assert (done.returncode, len(lines), lines[-1]) == (1, 22, "and 5 more")
    last = json.loads(shown[-1])
    assert (last["extent-count"], len(last["extents"])) == (25, 25)
    assert (last["differs"], last["extents"][24]) == (25 * 512, [24 * 64 * KiB, 512])


def test_a_bitmap_is_proved_right(mount, target):
    back_up_with_bitmap(mount, target)
    write(mount, b"n" * 5000, MiB - 100)
    write(mount, b"n", SIZE - 1)

    text = output_of(mount, "verify", "web.raw", target, "--bitmap", "daily")

    assert text == (
        f"web.raw and {target} are the same outside bitmap 'daily'"
        " (6 KiB differ within, 192 KiB dirty)\n"
    )


@pytest.mark.logs("failed: differs from")
def test_a_bitmap_that_missed_a_write_is_found_out(mount, target):
    back_up_with_bitmap(mount, target)
    write(mount, b"n", 0)
    execute(mount, "block-dirty-bitmap-disable", node="web.raw", name="daily")
    write(mount, b"n" * 4096, 2 * MiB)

    done = mount.cli("verify", "web.raw", target, "--bitmap", "daily")

    assert done.returncode == 1
    assert done.stdout.splitlines()[1:] == [f"{2 * MiB:<#18x}0x1000"]
    assert done.stderr == (
        f"fleecefs: web.raw and {target} differ outside bitmap 'daily' in 4 KiB"
        " (512 B differ within, 64 KiB dirty)\n"
    )


@pytest.mark.logs("failed: differs from")
def test_a_source_changed_behind_our_back_is_found_out(mount, target):
    """No bitmap sees who writes to the image file."""
    back_up_with_bitmap(mount, target)
    corrupt(mount.sources["web.raw"], 3 * MiB)

    assert mount.cli("verify", "web.raw", target, "--bitmap=daily").returncode == 1


@pytest.mark.logs("failed: differs from")
def test_a_chain_of_qcow2_files(mount, tmpfs_path):
    require_qemu()
    full, increment = tmpfs_path / "0.qcow2", tmpfs_path / "1.qcow2"
    back_up_with_bitmap(mount, full, format="qcow2")
    write(mount, b"n" * 70_000, MiB)
    back_up(
        mount,
        increment,
        sync="incremental",
        bitmap="daily",
        format="qcow2",
        backing=str(full),
    )
    write(mount, b"m", 2 * MiB)

    assert "backing file: " in qemu_img("info", "-f", "qcow2", increment)
    text = output_of(mount, "verify", "web.raw", increment, "--bitmap", "daily")
    assert text.endswith("(512 B differ within, 64 KiB dirty)\n")
    # What the increment has is not in the bitmap any more.
    older = mount.cli("verify", "web.raw", full, "--bitmap", "daily", "--format=qcow2")
    assert older.returncode == 1
    assert older.stdout.splitlines()[1] == f"{MiB:<#18x}{-(-70_000 // 512) * 512:#x}"
    assert job_of(mount, "verify-web.raw")["format"] == "qcow2"


def test_a_device_may_be_larger(mount, tmpfs_path):
    file = tmpfs_path / "device.img"
    file.write_bytes(bytes(8 * MiB))
    write(mount, b"QFI\xfb", 0)
    with loop_device(file) as device:
        back_up(mount, device)
        unsure = error_of(mount, "verify", "web.raw", device)
        text = output_of(mount, "verify", "web.raw", device, "--format=raw")

    assert unsure == (
        1,
        f"target {device}: may be raw or qcow2: say which with --format",
    )
    assert text == f"web.raw and {device} are the same\n"


def test_detached_it_goes_on(mount, target):
    back_up(mount, target)

    text = output_of(mount, "verify", "web.raw", target, "--speed=1", "--detach")
    wait_begun(mount, "verify-web.raw")
    listed = output_of(mount, "job", "list")
    shown = output_of(mount, "job", "show", "verify-web.raw")
    code, complaint = error_of(mount, "verify", "web.raw", target)
    output_of(mount, "job", "cancel", "verify-web.raw")

    assert text == "verify-web.raw\n"
    assert "verify-web.raw  verify  running" in listed
    assert shown.startswith("job      verify-web.raw, verify\n")
    assert (code, complaint) == (
        1,
        "a job 'verify-web.raw' exists: give another job id",
    )
    wait_until(lambda: not mount.json("job", "list"), "the end")


def test_one_that_is_cancelled_is_exit_code_4(mount, target):
    back_up(mount, target)
    output_of(mount, "verify", "web.raw", target, "--speed=1", "--detach")
    output_of(mount, "job", "cancel", "verify-web.raw")

    assert error_of(mount, "job", "wait", "verify-web.raw") == (
        4,
        "job verify-web.raw was cancelled",
    )


def test_what_it_can_not_compare_with_is_refused(mount, target):
    target.write_bytes(b"short")

    code, text = error_of(mount, "verify", "web.raw", target)
    assert (code, "has 5 bytes" in text) == (1, True)
    code, text = error_of(mount, "verify", "web.raw", mount.live("web.raw"))
    assert (code, "is on the mount of its own source" in text) == (1, True)
    assert error_of(mount, "verify", "x", target)[0] == 3


def test_a_restart_ends_it(mount, target):
    back_up(mount, target)
    output_of(mount, "verify", "web.raw", target, "--speed=1", "--detach")
    wait_begun(mount, "verify-web.raw")

    output_of(mount, "restart")

    assert error_of(mount, "job", "wait", "verify-web.raw") == (
        4,
        "job verify-web.raw was cancelled, as the daemon was restarted",
    )
    check_nothing_is_left(mount)


@contextlib.contextmanager
def following(mount, *words):
    """Run a command that follows a job, once it has begun."""
    process = subprocess.Popen(
        [str(FLEECEFS), *map(str, words)],
        env=mount.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: mount.json("job", "list"), "a job")
        wait_begun(mount, "verify-web.raw")
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process):
    out, errors = process.communicate(timeout=PATIENCE)
    assert out == ""
    return process.returncode, errors.removeprefix("fleecefs: ").rstrip()


@pytest.mark.logs("the daemon died")
@pytest.mark.parametrize("end", ["dies", "restarts"])
def test_who_follows_it_is_told_of_the_end_of_the_daemon(mount, target, end):
    back_up(mount, target)
    with following(mount, "verify", "web.raw", target, "--speed=1") as follower:
        if end == "dies":
            os.kill(mount.pid, signal.SIGKILL)
        else:
            output_of(mount, "restart")
        code, complaint = ended(follower)

    reason = "its daemon has died" if end == "dies" else "the daemon was restarted"
    assert code == 4
    assert complaint == f"job verify-web.raw was cancelled, as {reason}"
    check_nothing_is_left(mount)


def test_ctrl_c_leaves_it_running(mount, target):
    back_up(mount, target)
    with following(mount, "verify", "web.raw", target, "--speed=1") as follower:
        follower.send_signal(signal.SIGINT)
        code, complaint = ended(follower)

        assert code == 130
        assert "goes on" in complaint
        assert job_of(mount, "verify-web.raw")["status"] == "running"
        output_of(mount, "job", "cancel", "verify-web.raw")
