"""Backups through a real mount: exact, of one instant, and all or none.

What a disk was at the instant is a copy of the live file, made by cp while its guest
rested; then the guest goes on, and overwrites what is not yet copied.
"""

import asyncio
import os
import random
import threading
from contextlib import contextmanager

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from fleecefs.units import GiB, MiB, TiB
from tests.support.jobs import (
    check_nothing_is_left,
    error_of,
    job_ids,
    job_of,
    output_of,
    start,
    wait_status,
)
from tests.support.mount import filesystem, loop_device, run, wait_until
from tests.support.walk import noise, read, write

SIZE = 8 * MiB

# So that most of a disk is overwritten before it is copied.
SLOW = "--speed=1MiB"


def copy_of(mount, name):
    """Return the path of a copy of a disk as it is now."""
    path = mount.directory / f"{name}.now"
    run("cp", "--sparse=always", mount.live(name), path)
    return path


def check_identical(target, copy):
    """Compare with cmp, and by the eyes of QEMU."""
    run("cmp", f"--bytes={copy.stat().st_size}", target, copy)
    compared = run("qemu-img", "compare", "-f", "raw", "-F", "raw", target, copy)
    assert "Images are identical" in compared


def overwrite(path, size, seed=0, count=400):
    """Write noise of all lengths, adjacent and overlapping, here and there."""
    choice = random.Random(seed)
    offset = 0
    with open(path, "r+b", 0) as live:
        for _ in range(count):
            if choice.random() < 0.5:
                offset = choice.randrange(size)
            length = min(choice.choice([1, 512, 4096, 5000, 65536]), size - offset)
            live.seek(offset)
            offset = (offset + live.write(choice.randbytes(length))) % size


@contextmanager
def guest(path, size, seed=0):
    """Overwrite meanwhile, and make sure that it was done at least once."""
    ended = threading.Event()
    turns = []

    def work():
        while not ended.is_set():
            overwrite(path, size, seed=f"{seed} {len(turns)}", count=50)
            turns.append(None)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
        wait_until(lambda: turns, "a guest")
    finally:
        ended.set()
        thread.join()


def go_fast(mount, *ids):
    for each in ids:
        output_of(mount, "job", "set-speed", each, "0")
    output_of(mount, "job", "wait", *ids)


# -- exact


@pytest.mark.parametrize(
    ("content", "options"),
    [
        pytest.param(noise(SIZE), [], id="full"),
        pytest.param(
            bytes(MiB) + noise(MiB) + bytes(5 * MiB + 512),
            ["--ram-limit=256K", "--cluster-size=64K"],
            id="holes-both-tiers",
        ),
    ],
)
def test_a_backup_is_identical_to_a_copy_of_the_instant(
    mounted, tmpfs_path, content, options
):
    mount = mounted({"web.raw": content}, *options)
    # What the guest does before the instant is in it.
    overwrite(mount.live("web.raw"), len(content), seed=1, count=20)
    copy = copy_of(mount, "web.raw")
    target = tmpfs_path / "web.raw"

    start(mount, "web.raw", target, SLOW)
    with guest(mount.live("web.raw"), len(content)):
        overwrite(mount.live("web.raw"), len(content))
        assert job_of(mount)["status"] == "running"
        go_fast(mount, "web.raw")

    check_identical(target, copy)
    check_nothing_is_left(mount)


@pytest.mark.parametrize("size", [1, 9 * 512, 4097])
def test_a_disk_of_few_bytes(mounted, tmpfs_path, size):
    mount = mounted({"web.raw": noise(size)})
    target = tmpfs_path / "web.raw"

    for turn in range(3):
        overwrite(mount.live("web.raw"), size, seed=turn, count=10)
        copy = copy_of(mount, "web.raw")
        start(mount, "web.raw", target, "--no-auto-finalize")
        overwrite(mount.live("web.raw"), size, seed=f"then {turn}", count=10)
        wait_status(mount, "pending")
        output_of(mount, "job", "finalize", "web.raw")
        output_of(mount, "job", "wait", "web.raw")

        check_identical(target, copy)
        copy.unlink()


def test_a_sparse_disk_of_a_tebibyte(mounted, tmpfs_path):
    mount = mounted({"web.raw": TiB})
    live, target = mount.live("web.raw"), tmpfs_path / "web.raw"
    for offset in 0, 300 * GiB + 5, TiB - MiB:
        write(live, noise(MiB, offset), offset)

    start(mount, "web.raw", target, SLOW)
    for offset in 0, 300 * GiB, 700 * GiB, TiB - MiB:
        write(live, noise(MiB, "new"), offset)
    go_fast(mount, "web.raw")

    assert target.stat().st_size == TiB
    assert target.stat().st_blocks * 512 < 5 * MiB
    for offset in 0, 300 * GiB + 5, TiB - MiB:
        assert read(target, MiB, offset) == noise(MiB, offset)
    check_nothing_is_left(mount)


def test_a_block_device_gets_the_disk_and_keeps_its_end(mounted, tmpfs_path):
    mount = mounted({"web.raw": noise(SIZE)})
    backing = tmpfs_path / "device"
    backing.write_bytes(b"o" * (SIZE + 3 * MiB))
    with loop_device(backing) as device:
        start(mount, "web.raw", device, SLOW)
        overwrite(mount.live("web.raw"), SIZE)
        busy = error_of(mount, "backup", "web.raw", device, "--job-id=other")
        go_fast(mount, "web.raw")

    assert busy == (1, f"target {device}: in use by another job or program")
    assert backing.read_bytes() == noise(SIZE) + b"o" * 3 * MiB
    check_nothing_is_left(mount)


# -- beside others


def test_two_backups_of_one_disk_beside_snapshots(mounted, tmpfs_path):
    mount = mounted({"web.raw": noise(SIZE)}, "--ram-limit=1M")
    live = mount.live("web.raw")
    copies, targets = {}, {}

    def take(name, act):
        copy = copies[name] = copy_of(mount, "web.raw").rename(tmpfs_path / name)
        act()
        overwrite(live, SIZE, seed=name)
        return copy

    def back_up(name):
        targets[name] = tmpfs_path / f"{name}.raw"
        start(mount, "web.raw", targets[name], SLOW, f"--job-id={name}")

    take("old", lambda: mount.create("old"))
    take("one", lambda: back_up("one"))
    take("between", lambda: mount.create("between"))
    take("two", lambda: back_up("two"))
    take("new", lambda: mount.create("new"))
    mount.delete("between")
    assert job_ids(mount) == ["one", "two"]
    with guest(live, SIZE):
        go_fast(mount, "one", "two")

    for name in "one", "two":
        check_identical(targets[name], copies[name])
    for name in "old", "new":
        found = mount.snapshot(name, "web.raw").read_bytes()
        assert found == copies[name].read_bytes()


# -- all or none


@pytest.fixture
def group(mounted):
    return mounted({"a.raw": noise(SIZE), "b.raw": noise(MiB), "c.raw": MiB})


def test_all_disks_are_of_one_instant(group, tmpfs_path):
    ended = threading.Event()
    length = 4096

    def count():
        """Write a number to each disk in turn."""
        number = 0
        while not ended.is_set():
            number += 1
            for name in "a.raw", "b.raw", "c.raw":
                write(group.live(name), number.to_bytes(8, "little") * 512, 0)

    thread = threading.Thread(target=count)
    thread.start()
    found = []
    try:
        for turn in range(5):
            directory = tmpfs_path / str(turn)
            directory.mkdir()
            wait_until(lambda: read(group.live("c.raw"), 1, 0), "a guest")
            output_of(group, "backup", "--all", directory)
            blocks = [
                (directory / name).read_bytes()[:length]
                for name in ("a.raw", "b.raw", "c.raw")
            ]
            assert all(block == block[:8] * 512 for block in blocks[1:])
            found.append([int.from_bytes(block[:8], "little") for block in blocks])
    finally:
        ended.set()
        thread.join()

    for numbers in found:
        # No disk is of another time than the one before it.
        assert sorted(numbers, reverse=True) == numbers
        assert numbers[0] - numbers[-1] <= 1


@pytest.mark.logs("job a.raw failed: No space left on device")
def test_of_a_group_nothing_is_left_if_the_target_is_full(group, tmpfs_path):
    point = tmpfs_path / "small"
    with filesystem("none", point, "-t", "tmpfs", "-o", "size=4M"):
        done = group.cli("backup", "--all", point)

        assert done.returncode == 4
        assert sorted(done.stderr.splitlines()) == [
            "fleecefs: job a.raw failed: No space left on device",
            "fleecefs: job b.raw was cancelled, as job 'a.raw' failed",
            "fleecefs: job c.raw was cancelled, as job 'a.raw' failed",
        ]
        assert os.listdir(point) == []
    check_nothing_is_left(group)


def test_of_a_group_nothing_is_begun_if_a_target_is_refused(group, tmpfs_path):
    directory = tmpfs_path / "all"
    directory.mkdir()
    existing = directory / "b.raw"
    existing.write_bytes(b"o" * 4096)

    code, text = error_of(group, "backup", "--all", directory)

    assert code == 1
    assert text.startswith(f"target {existing}: has 4096 bytes (4 KiB), and the disk")
    assert job_ids(group) == []
    assert os.listdir(directory) == ["b.raw"]
    assert existing.read_bytes() == b"o" * 4096
    check_nothing_is_left(group)


# -- QEMU's own client


def talking(mount, talk):
    """Run a coroutine with QEMU's client and all events; return what it returns."""

    async def connected():
        client = QMPClient("test")
        heard = EventListener()
        client.register_listener(heard)
        await client.connect(f"{mount.status()['runtime']}/control")
        try:
            return await talk(client, heard)
        finally:
            await client.disconnect()

    return asyncio.run(connected())


async def status_becomes(heard, job_id, status):
    """Return the events until a job has come to a status."""
    events = []
    async for event in heard:
        events.append((event["event"], event["data"]))
        wanted = ("JOB_STATUS_CHANGE", {"id": job_id, "status": status})
        if events[-1] == wanted:
            return events
    raise AssertionError("the connection was lost")


def test_qemus_client_leads_a_backup_through_its_life(mounted, tmpfs_path):
    mount = mounted({"web.raw": noise(SIZE)})
    target = tmpfs_path / "web.raw"

    async def talk(client, heard):
        async def tell(name, **arguments):
            return await client.execute(name, arguments)

        await client.execute(
            "blockdev-backup",
            {
                "job-id": "j",
                "device": "web.raw",
                "target": str(target),
                "sync": "full",
                "speed": 1,
                "auto-finalize": False,
                "auto-dismiss": False,
            },
        )
        await status_becomes(heard, "j", "running")
        await tell("job-pause", id="j")
        await status_becomes(heard, "j", "paused")
        [job] = await tell("query-jobs")
        [block_job] = await tell("query-block-jobs")
        with pytest.raises(ExecuteError, match="cannot dismiss"):
            await tell("job-dismiss", id="j")
        await tell("block-job-set-speed", device="j", speed=0)
        await tell("job-resume", id="j")
        events = await status_becomes(heard, "j", "pending")
        await tell("job-finalize", id="j")
        events += await status_becomes(heard, "j", "concluded")
        await tell("job-dismiss", id="j")
        events += await status_becomes(heard, "j", "null")
        return job, block_job, events, await tell("query-jobs")

    job, block_job, events, left = talking(mount, talk)

    assert job.keys() == {
        *("id", "type", "status", "current-progress", "total-progress")
    }
    assert (job["id"], job["type"], job["status"]) == ("j", "backup", "paused")
    assert job["total-progress"] == SIZE
    assert block_job == {
        "type": "backup",
        "device": "j",
        "len": SIZE,
        "offset": job["current-progress"],
        "speed": 1,
        "busy": False,
        "paused": True,
        "io-status": "ok",
        "ready": False,
        "status": "paused",
        "auto-finalize": False,
        "auto-dismiss": False,
    }
    named = {"type": "backup", "device": "j", "len": SIZE, "offset": SIZE, "speed": 0}
    assert [event for event in events if event[0] != "JOB_STATUS_CHANGE"] == [
        ("BLOCK_JOB_PENDING", {"type": "backup", "id": "j"}),
        ("BLOCK_JOB_COMPLETED", named),
    ]
    moves = [data["status"] for name, data in events if name == "JOB_STATUS_CHANGE"]
    assert moves == ["running", "waiting", "pending", "concluded", "null"]
    assert left == []
    assert target.read_bytes() == noise(SIZE)


def test_qemus_client_cancels_a_group(group, tmpfs_path):
    async def talk(client, heard):
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "device": name,
                    "target": str(tmpfs_path / name),
                    "sync": "full",
                    "speed": 1,
                },
            }
            for name in ("a.raw", "b.raw")
        ]
        properties = {"completion-mode": "grouped"}
        arguments = {"actions": actions, "properties": properties}
        await client.execute("transaction", arguments)
        await status_becomes(heard, "a.raw", "running")
        await client.execute("job-cancel", {"id": "a.raw"})
        return await status_becomes(heard, "b.raw", "null")

    events = talking(group, talk)

    ends = {data["device"] for name, data in events if name == "BLOCK_JOB_CANCELLED"}
    assert ends == {"a.raw", "b.raw"}
    assert not (tmpfs_path / "a.raw").exists()
    assert not (tmpfs_path / "b.raw").exists()
    check_nothing_is_left(group)
