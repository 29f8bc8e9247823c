"""Backups of real files: what is refused, what is made, ends, crashes."""

import contextlib
import errno
import gc
import itertools
import json
import os
import random
import shutil
from functools import partial

import pytest
import trio

from fleecefs.block.bitmap import LiveBits
from fleecefs.block.epoch import History, OnCbwError
from fleecefs.block.raw import RawImage
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import Busy, NotFound, NotUsable
from fleecefs.inventory import Inventory
from fleecefs.jobs import backup, copy
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.options import BackupOptions, OnError, Sync
from fleecefs.jobs.record import Record
from fleecefs.jobs.registry import Jobs
from fleecefs.jobs.resume import resume_jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import Target
from fleecefs.state.directory import StateDirectory
from fleecefs.units import MiB
from tests.support.copying import wait_for
from tests.support.disks import clusters, letters
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.host import CLUSTER, Host

# A speed at which nothing follows the first chunk.
NEVER = 1


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Wait for nothing as long as people would."""
    monkeypatch.setattr(copy, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(backup, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(backup, "_LAST_SECONDS", 0.5)


def wanted(target, device="web.raw", **options):
    options.setdefault("job_id", device)
    options.setdefault("auto_dismiss", False)
    return BackupOptions(device, target, **options)


@contextlib.asynccontextmanager
async def running(host, *, resumes=False):
    """The jobs of a daemon, which are cancelled at the end."""
    jobs = Jobs(
        partial(create_backups, host.inventory),
        host._emit,
        None,
        partial(resume_jobs, host.inventory) if resumes else tuple,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await jobs.wait_resumed()
        try:
            yield jobs
        finally:
            await jobs.close()


async def start(jobs, *wanted, grouped=False):
    return await jobs.start_backups(wanted, grouped=grouped)


async def ended(job):
    await wait_for(lambda: job.is_over)
    return job


def records(host):
    return [*host.state.glob("jobs/*"), *host.runtime.glob("*/jobs/*")]


def nothing_left(host):
    """Whether no trace of a job is left."""
    return not records(host) and not host.inventory.private and not epochs_of(host)


def epochs_of(host):
    disks = host.inventory.disks.values()
    return [epoch for disk in disks for epoch in disk.history.epochs]


# -- what a backup is


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP])
@pytest.mark.parametrize("exists", [False, True])
async def test_a_backup_is_the_disk_of_its_instant(web, content, target, sync, exists):
    if exists:
        target.write_bytes(b"o" * len(content))
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, sync=sync, speed=NEVER))
        web.write("web.raw", b"new" * 100_000, 1000)
        job.set_speed(0)
        await ended(job)

        assert job.error is None
        assert target.read_bytes() == content
        assert nothing_left(web)


async def test_it_has_the_instant_of_its_creation_not_of_its_start(web, target):
    content = web.live("web.raw")
    jobs = create_backups(web.inventory, [wanted(target)])
    web.write("web.raw", b"new", 0)

    assert jobs[0].status is JobStatus.CREATED
    async with running(web) as registry:
        registry.add(jobs)
        await ended(jobs[0])

    assert target.read_bytes() == content


async def test_a_sparse_disk_makes_a_sparse_file(host, target):
    path = host.add("web.raw", b"")
    with path.open("r+b") as file:
        file.truncate(64 * MiB)
        file.seek(40 * MiB)
        file.write(b"x" * 10_000)
    host.open()
    target.write_bytes(b"o" * (64 * MiB))
    async with running(host) as jobs:
        (job,) = await start(jobs, wanted(target))
        await ended(job)

    assert target.read_bytes() == path.read_bytes()
    assert target.stat().st_blocks <= path.stat().st_blocks


async def test_top_leaves_the_rest_of_the_target_alone(host, target):
    path = host.add("web.raw", b"")
    with path.open("r+b") as file:
        file.truncate(8 * CLUSTER)
        file.seek(2 * CLUSTER)
        file.write(clusters("xx"))
    host.open()
    target.write_bytes(clusters("oooooooo"))
    async with running(host) as jobs:
        (job,) = await start(jobs, wanted(target, sync=Sync.TOP))
        await ended(job)

    assert letters(target.read_bytes()) == "ooxxoooo"


async def test_none_is_cancelled_with_all_that_was_overwritten(web, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, sync=Sync.NONE))
        web.write("web.raw", b"n" * 5000, MiB - 100)
        web.write("web.raw", b"n" * MiB, 2 * MiB)
        job.cancel()
        await ended(job)

        assert job.error == "cancelled"
        assert nothing_left(web)
    found = target.read_bytes()
    assert found[MiB - CLUSTER : MiB + 2 * CLUSTER] == b"a" * 4096 + b"b" * 8192
    assert found[2 * MiB :] == b"c" * MiB
    assert not any(found[: MiB - CLUSTER])


@pytest.mark.logs("not all that was overwritten has come to the target")
async def test_the_end_of_none_does_not_wait_for_a_target_that_hangs(web, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, sync=Sync.NONE))
        gate = hook(job, Gate)
        stays = [gate.hold("pwrite"), gate.hold("pwrite")]
        web.write("web.raw", b"n", 0)
        await trio.to_thread.run_sync(stays[0].wait_arrived)
        job.cancel()
        await ended(job)

        assert nothing_left(web)
        for stay in stays:
            stay.release()


def hook(job, wrap, *args, **kwargs):
    """Put an image around that of a job's target, and return it."""
    job._target._image = wrap(job._target._image, *args, **kwargs)
    return job._target._image


async def test_the_target_is_durable_before_the_job_completes(web, target, monkeypatch):
    seen = []
    flush = Target.flush
    monkeypatch.setattr(
        Target, "flush", lambda self: (seen.append(statuses(web)[-1]), flush(self))
    )
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target))
        await ended(job)

    assert seen == ["running"]


def statuses(host, job_id="web.raw"):
    return [
        data["status"]
        for name, data in host.events
        if name == "JOB_STATUS_CHANGE" and data["id"] == job_id
    ]


@pytest.mark.logs("failed: Input/output error")
async def test_a_target_that_can_not_be_flushed_is_no_backup(web, target):
    async with running(web) as jobs:
        options = wanted(target, on_target_error=OnError.IGNORE, speed=NEVER)
        (job,) = await start(jobs, options)
        job._target.flush = failing_flush
        job.set_speed(0)
        await ended(job)

        assert "Input/output error" in job.error
        assert not target.exists()
        assert nothing_left(web)


def failing_flush():
    raise OSError(errno.EIO, "Input/output error")


async def test_details_tell_what_it_costs(web, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        await wait_for(lambda: job.progress.current == MiB)
        web.write("web.raw", b"n" * 10_000, 2 * MiB)
        during = job.describe()
        job.set_speed(0)
        await ended(job)
        after = job.describe()

    assert during["target"] == str(target)
    assert (during["sync"], during["restarts"]) == ("full", 0)
    assert (during["current"], during["total"]) == (MiB, 3 * MiB)
    cost = during["cost"]
    assert cost["waited"] == 1
    assert 0 < cost["longest-wait"] < 5
    assert (cost["ram"], cost["ram-peak"]) == (3 * CLUSTER, 3 * CLUSTER)
    assert (cost["disk"], cost["disk-peak"]) == (0, 0)
    assert after["cost"] == {**cost, "ram": 0}
    assert web.inventory.budgets.ram.used == 0


async def test_guests_spill_to_the_disk_tier(host, target):
    host.add("web.raw", b"a" * (2 * MiB))
    host.open(ram_limit=2 * CLUSTER)
    async with running(host) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        host.write("web.raw", b"n" * (MiB), MiB)
        assert job.details()["cost"]["disk"] == MiB
        job.set_speed(0)
        await ended(job)

    assert target.read_bytes() == b"a" * (2 * MiB)
    assert host.inventory.budgets.disk.used == 0


# -- what is refused


@pytest.mark.parametrize("reason", ["source", "state", "store", "size", "directory"])
def test_a_refused_target_leaves_nothing(host, tmpfs_path, reason):
    host.add("web.raw", clusters("aa"))
    store = tmpfs_path / "store"
    store.mkdir()
    inventory = host.open(store=store)
    path = tmpfs_path / "t.raw"
    if reason == "source":
        path = host.sources["web.raw"]
    elif reason == "state":
        path = host.state / "t.raw"
    elif reason == "store":
        path = store / inventory._state.id / "t.raw"
        path.parent.mkdir(exist_ok=True)
    elif reason == "size":
        path.write_bytes(b"1")
    else:
        path.mkdir()
    first = tmpfs_path / "first.raw"
    files = sorted(tmpfs_path.rglob("*"))

    with pytest.raises(NotUsable):
        create_backups(inventory, [wanted(first), wanted(path, job_id="b")])

    assert sorted(tmpfs_path.rglob("*")) == files
    assert nothing_left(host)


def test_an_unknown_disk_is_refused(web, target):
    with pytest.raises(NotFound, match=r"no disk 'x\.raw'"):
        create_backups(web.inventory, [wanted(target), wanted(target, "x.raw")])

    assert not target.exists()


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"speed": -1}, {"cbw_timeout": -0.1}]
)
def test_bad_options_are_refused(web, target, options):
    with pytest.raises(NotUsable):
        create_backups(web.inventory, [wanted(target, **options)])

    assert not target.exists()


def test_two_jobs_do_not_share_a_target(web, target):
    with pytest.raises(Busy, match="in use by another job"):
        create_backups(web.inventory, [wanted(target), wanted(target, job_id="b")])

    assert not target.exists()
    (job,) = create_backups(web.inventory, [wanted(target)])
    with pytest.raises(Busy, match="in use by another job"):
        create_backups(web.inventory, [wanted(target, job_id="b")])
    job._target.close()


def test_our_own_mount_is_refused(web, target):
    def check_place(path):
        raise NotUsable("on the mount")

    with pytest.raises(NotUsable, match="on the mount of its own source"):
        create_backups(web.inventory, [wanted(target)], check_place)


@pytest.mark.parametrize("has_snapshot", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (StateDirectory, "save"),
        (LiveBits, "create"),
        (RawImage, "create"),
        (Record, "create"),
        (History, "append"),
    ],
)
def test_who_could_not_be_created_leaves_nothing(
    host, tmpfs_path, monkeypatch, owner, name, nth, has_snapshot
):
    host.add("web.raw", clusters("aaaa"))
    host.add("db.raw", clusters("bb"))
    inventory = host.open()
    if has_snapshot:
        inventory.create_snapshot("old")
    inventory._save()
    targets = [tmpfs_path / "1.raw", tmpfs_path / "2.raw"]
    before = sorted(tmpfs_path.rglob("*"))
    real, calls = getattr(owner, name), itertools.count(1)

    def failing(*args):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(owner, name, failing)
    jobs = []
    with contextlib.suppress(OSError):
        jobs = create_backups(
            inventory, [wanted(targets[0]), wanted(targets[1], "db.raw")]
        )
    for job in jobs:
        # So many calls there were not.
        job._target.close()
        return

    assert not records(host)
    assert not inventory.private
    assert not any(target.exists() for target in targets)
    host.write("web.raw", clusters("cccc"))
    if has_snapshot:
        assert letters(host.read("old", "web.raw")) == "aaaa"
        inventory.delete_snapshot("old")
    assert not epochs_of(host)
    assert {p for p in tmpfs_path.rglob("*") if p.is_file()} <= set(before)


# -- several


async def test_all_disks_are_of_one_instant(host, tmpfs_path):
    """Whoever writes first to one disk, then to the other, is never seen half."""
    host.add("1.raw", bytes(CLUSTER))
    host.add("2.raw", bytes(CLUSTER))
    inventory = host.open()
    is_over = False

    def guest():
        for number in itertools.count(1):
            if is_over:
                return
            for disk in "1.raw", "2.raw":
                inventory.disks[disk].write(number.to_bytes(8, "big"), 0)

    async with trio.open_nursery() as nursery, running(host) as jobs:
        nursery.start_soon(trio.to_thread.run_sync, guest)
        pairs = []
        for turn in range(10):
            targets = [tmpfs_path / f"{turn}.{disk}" for disk in (1, 2)]
            started = await start(
                jobs,
                *(
                    wanted(t, f"{n}.raw", job_id=t.name, auto_dismiss=True)
                    for n, t in enumerate(targets, 1)
                ),
                grouped=True,
            )
            for job in started:
                await ended(job)
            pairs.append([int.from_bytes(t.read_bytes()[:8], "big") for t in targets])
        is_over = True

    for first, second in pairs:
        assert second <= first <= second + 1


@pytest.mark.logs("failed: Input/output error")
async def test_of_a_group_nothing_is_left_if_one_fails(host, tmpfs_path):
    host.add("web.raw", b"a" * MiB)
    host.add("db.raw", b"b" * MiB)
    host.open()
    targets = [tmpfs_path / "1.raw", tmpfs_path / "2.raw"]
    async with running(host) as jobs:
        first, second = await start(
            jobs,
            wanted(targets[0]),
            wanted(targets[1], "db.raw", speed=NEVER),
            grouped=True,
        )
        await wait_for(lambda: first.status is JobStatus.WAITING)
        hook(second, Faulty, on="pwrite")
        second._target.flush = failing_flush
        second.set_speed(0)
        await ended(first)
        await ended(second)

        assert first.error == "cancelled, as job 'db.raw' failed"
        assert not any(target.exists() for target in targets)
        assert nothing_left(host)


async def test_two_backups_of_one_disk_at_once(web, content, tmpfs_path):
    inventory = web.inventory
    inventory.create_snapshot("old")
    first, second = tmpfs_path / "1.raw", tmpfs_path / "2.raw"
    async with running(web) as jobs:
        web.write("web.raw", b"1" * 5000, 100)
        between = web.live("web.raw")
        (one,) = await start(jobs, wanted(first, speed=NEVER))
        web.write("web.raw", b"2" * 5000, MiB)
        inventory.create_snapshot("middle")
        web.write("web.raw", b"3" * 5000, 5000)
        later = web.live("web.raw")
        (two,) = await start(jobs, wanted(second, job_id="two", speed=NEVER))
        web.write("web.raw", b"4" * (2 * MiB), 0)
        one.set_speed(0)
        web.write("web.raw", b"5" * MiB, 2 * MiB)
        two.set_speed(0)
        await ended(one)
        await ended(two)

    assert first.read_bytes() == between
    assert second.read_bytes() == later
    assert web.read("old", "web.raw") == content
    inventory.delete_snapshot("middle")
    inventory.delete_snapshot("old")
    assert inventory.budgets.ram.used == inventory.budgets.disk.used == 0


async def test_two_of_one_instant(web, content, tmpfs_path):
    targets = [tmpfs_path / "1.raw", tmpfs_path / "2.raw"]
    async with running(web) as jobs:
        started = await start(
            jobs, *(wanted(t, job_id=t.name, speed=NEVER) for t in targets)
        )
        web.write("web.raw", b"n" * MiB, MiB)
        for job in started:
            job.set_speed(0)
            await ended(job)

    assert [t.read_bytes() for t in targets] == [content, content]
    assert web.inventory.budgets.ram.used == 0


async def test_nobody_sees_private_snapshots(web, target):
    async with running(web) as jobs:
        await start(jobs, wanted(target, speed=NEVER))

        assert web.inventory.describe_snapshots() == []
        assert web.inventory.describe_disks()[0]["snapshots"] == 0
        assert set(web.inventory.files) == set(web.inventory.inodes.values())


# -- how it ends


@pytest.mark.logs("failed: its snapshot is broken")
async def test_a_broken_snapshot_fails_the_job_at_once(host, target):
    host.add("web.raw", b"a" * (2 * MiB))
    host.open(ram_limit=0, store_limit=0)
    async with running(host) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        job.pause()
        host.write("web.raw", b"n", MiB)
        await ended(job)

        assert job.error.startswith("its snapshot is broken: could not preserve: ")
        assert not target.exists()
        assert nothing_left(host)


@pytest.mark.logs("failed: its snapshot is broken")
async def test_a_snapshot_that_broke_before_the_start_fails_the_job(host, target):
    host.add("web.raw", b"a" * (2 * MiB))
    inventory = host.open(ram_limit=0, store_limit=0)
    created = create_backups(inventory, [wanted(target)])
    host.write("web.raw", b"n", MiB)

    async with running(host) as jobs:
        jobs.add(created)
        await ended(created[0])

    assert "its snapshot is broken" in created[0].error


async def test_a_guest_may_fail_instead_of_the_job(host, target):
    host.add("web.raw", b"a" * (2 * MiB))
    inventory = host.open(ram_limit=0, store_limit=0)
    async with running(host) as jobs:
        policy = OnCbwError.BREAK_GUEST_WRITE
        (job,) = await start(jobs, wanted(target, speed=NEVER, on_cbw_error=policy))
        with pytest.raises(OSError, match="limit"):
            inventory.disks["web.raw"].write(b"n", MiB)
        job.set_speed(0)
        await ended(job)

    assert job.error is None
    assert target.read_bytes() == b"a" * (2 * MiB)


async def test_the_time_limit_is_the_jobs_own(web, target):
    assert web.inventory.disks["web.raw"].history.timeout == 10
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER, cbw_timeout=45.0))
        assert web.inventory.disks["web.raw"].history.timeout == 45
        job.cancel()
        await ended(job)

    assert web.inventory.disks["web.raw"].history.timeout == 10


@pytest.mark.parametrize("exists", [False, True])
async def test_a_cancelled_backup_leaves_no_part_of_itself(web, target, exists):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        await wait_for(lambda: job.progress.current)
        job.cancel()
        await ended(job)

        # What was there before the job stays, with whatever it holds now.
        assert target.exists() == exists
        assert nothing_left(web)
        await start(jobs, wanted(target, job_id="next"))


async def test_cancel_does_not_wait_for_a_target_that_hangs(web, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        await wait_for(lambda: job.progress.current)
        gate = hook(job, Gate)
        stay = gate.hold("pwrite")
        job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await ended(job)

        assert nothing_left(web)
        stay.release()


async def test_a_flush_that_hangs_can_be_cancelled(web, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        gate = hook(job, Gate)
        stay = gate.hold("flush")
        job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        assert job.status is JobStatus.RUNNING
        job.cancel()
        await ended(job)
        stay.release()

        assert job.is_cancelled


@pytest.mark.logs("job web.raw failed: injected into pwrite")
async def test_whose_target_failed_lets_go_of_it(web, content, target):
    target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        await wait_for(lambda: job.progress.current)
        file = job._target._raw
        stay = hook(job, Gate).hold("pwrite")
        hook(job, Faulty, on="pwrite", nth=2)
        job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        await ended(job)
        # One of its threads is still in the target.
        with pytest.raises(Busy, match="in use by another job"):
            await start(jobs, wanted(target, job_id="early"))
        stay.release()
        await wait_for(lambda: file.fd < 0)
        await ended((await start(jobs, wanted(target, job_id="next")))[0])

    assert target.read_bytes() == content


async def test_until_finalized_it_costs_nothing(web, content, target):
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, auto_finalize=False))
        await wait_for(lambda: job.status is JobStatus.PENDING)
        before = web.inventory.disks["web.raw"].history.copied
        web.write("web.raw", b"n" * MiB, MiB)
        assert web.inventory.disks["web.raw"].history.copied == before
        job.finalize()
        await ended(job)

    assert target.read_bytes() == content


async def test_a_clean_end_of_the_mount_cancels_and_forgets(web, target):
    web.inventory.create_snapshot("old")
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(target, speed=NEVER))
        web.write("web.raw", b"n" * MiB, MiB)
        await wait_for(lambda: job.progress.current)
    web.close()
    web.open()

    # Its epoch has what the older snapshot needs.
    assert not records(web)
    assert not web.inventory.private
    assert web.read("old", "web.raw")[MiB : 2 * MiB] == b"b" * MiB
    assert resume_jobs(web.inventory) == []


def test_a_private_snapshot_nobody_ended_goes_with_the_mount(web, target):
    web.inventory.create_snapshot("old")
    (job,) = create_backups(web.inventory, [wanted(target)])
    web.write("web.raw", b"n" * MiB, MiB)
    job._target.close()

    web.close()
    web.open()

    assert not web.inventory.private
    assert web.read("old", "web.raw")[MiB : 2 * MiB] == b"b" * MiB
    closed = web.inventory
    web.close()
    with pytest.raises(Busy):
        create_backups(closed, [wanted(target)])


# -- going on


class Killed(BaseException):
    """The daemon dies here."""


class Killer:
    """Kills the daemon around the nth of the steps that leave something behind."""

    STEPS = (
        (StateDirectory, "save"),
        (LiveBits, "create"),
        (RawImage, "create"),
        (History, "append"),
        (History, "retire"),
        (Record, "create"),
        (Record, "save"),
        (Record, "remove"),
        (Target, "empty"),
        (Target, "write"),
        (Target, "punch"),
        (Target, "flush"),
        (Target, "remove"),
        (Snapshot, "discard"),
        (Inventory, "delete_private"),
        (shutil, "rmtree"),
    )

    def __init__(self, patch, nth, *, after):
        self.is_dead = False
        self._nth, self._after = nth, after
        self._steps = itertools.count(1)
        for owner, name in self.STEPS:
            patch.setattr(owner, name, self._step(getattr(owner, name)))

    def _step(self, call):
        def step(*args, **kwargs):
            is_nth = next(self._steps) == self._nth
            self.is_dead |= is_nth and not self._after
            if self.is_dead:
                raise Killed
            result = call(*args, **kwargs)
            self.is_dead |= is_nth
            if self.is_dead:
                raise Killed
            return result

        return step


def only_killed(group):
    if isinstance(group, BaseExceptionGroup):
        return all(only_killed(error) for error in group.exceptions)
    return group is None or isinstance(group, Killed | trio.Cancelled)


def run_until_killed(host, task, *, nth, after):
    """Run an async function until the daemon is killed; return whether it was."""
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, nth, after=after)
        error = None
        try:
            trio.run(task)
        except BaseException as e:
            error = e
    assert only_killed(error), error
    if killer.is_dead:
        die(host)
    return killer.is_dead


def die(host):
    """Let go of what a kill lets go of."""
    for thing in gc.get_objects():
        if isinstance(thing, Target) and hasattr(thing, "_image"):
            thing.close()
    host.crash()


LETTERS = "aabb..ccdd.eff.."


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.logs("job")
def test_killed_at_any_step_it_goes_on(
    tmpfs_path, monkeypatch, sync, exists, after, caplog
):
    monkeypatch.setattr(copy, "CHUNK_SIZE_MAX", 2 * CLUSTER)
    for nth in itertools.count(1):
        directory = tmpfs_path / str(nth)
        directory.mkdir()
        host = Host(directory, monkeypatch)
        path = host.add("web.raw", b"")
        sparse(path, LETTERS)
        target = directory / "copy.raw"
        if exists:
            sparse(target, "o" * len(LETTERS))
        was_killed = story(host, target, sync, nth, after=after)
        host.end()
        shutil.rmtree(directory)
        if not was_killed:
            break
    assert nth > 20
    caplog.clear()


def sparse(path, text):
    with path.open("wb") as file:
        file.truncate(len(text) * CLUSTER)
        for index, letter in enumerate(text):
            if letter != ".":
                file.seek(index * CLUSTER)
                file.write(clusters(letter))


def story(host, target, sync, nth, *, after):
    host.open()
    host.inventory.create_snapshot("old")
    is_killed = run_until_killed(
        host, partial(back_up, host, target, sync), nth=nth, after=after
    )
    if not is_killed:
        return False
    host.open()
    # The guest goes on before anybody looks after jobs.
    host.write("web.raw", clusters("yy"), 0)
    host.write("web.raw", clusters("yyy"), 13 * CLUSTER)
    found = trio.run(go_on, host)
    if found is not None:
        assert found.error is None, found.error
        assert is_exact(target, sync), letters(target.read_bytes())
        assert found.restarts == 1
    elif target.exists():
        # It never began, or all was done. Of the first moments an empty file may stay.
        assert letters(target.read_bytes()) in ("o" * 16, "." * 16) or is_exact(
            target, sync
        )
    assert letters(host.read("old", "web.raw")) == LETTERS
    host.inventory.delete_snapshot("old")
    assert nothing_left(host)
    assert host.inventory.budgets.ram.used == host.inventory.budgets.disk.used == 0
    return True


def is_exact(target, sync):
    """Whether a target holds all there was to copy; top leaves alone what is not."""
    found = letters(target.read_bytes())
    if sync is Sync.FULL:
        return found == LETTERS
    pairs = zip(found, LETTERS, strict=True)
    return all(f == w or (w == "." and f in "o.") for f, w in pairs)


async def back_up(host, target, sync):
    async with running_until_killed(host) as jobs:
        (job,) = await start(jobs, wanted(target, sync=sync, workers=2))
        host.write("web.raw", clusters("zz"), 6 * CLUSTER)
        host.write("web.raw", clusters("z"), 4 * CLUSTER)
        await ended(job)


@contextlib.asynccontextmanager
async def running_until_killed(host):
    """As `running`, without a clean end."""
    jobs = Jobs(partial(create_backups, host.inventory), host._emit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        yield jobs
        nursery.cancel_scope.cancel()


async def go_on(host):
    """Let the jobs of the daemon before go on to their end; return the only one."""
    groups = await trio.to_thread.run_sync(resume_jobs, host.inventory)
    if not groups:
        return None
    ((job,),) = groups
    jobs = Jobs(partial(create_backups, host.inventory), host._emit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        jobs.add([job])
        await ended(job)
        await jobs.close()
    return job


def crash_in_the_middle(host, target, **options):
    """Start a backup, copy one chunk, overwrite something, and die."""

    async def begin():
        async with running_until_killed(host) as jobs:
            started = await start(jobs, wanted(target, speed=NEVER, **options))
            await wait_for(lambda: started[0].progress.current)
            host.write("web.raw", b"n" * 5000, 0)
            host.write("web.raw", b"n" * 5000, 2 * MiB + 3)

    trio.run(begin)
    die(host)


def test_what_is_copied_is_not_copied_again(web, content, target, monkeypatch):
    crash_in_the_middle(web, target)
    web.open()
    written = []
    write = Target.write
    monkeypatch.setattr(
        Target,
        "write",
        lambda self, data, offset: (
            written.append(len(data)),
            write(self, data, offset),
        ),
    )

    async def go():
        ((job,),) = await trio.to_thread.run_sync(resume_jobs, web.inventory)
        assert (job.progress.current, job.progress.remaining) == (MiB, 2 * MiB)
        assert job.limit.speed == NEVER
        assert job.describe()["restarts"] == 1
        assert job.describe()["cost"]["ram"] == 2 * CLUSTER
        assert job.describe()["cost"]["waited"] == 1
        async with running_until_killed(web) as jobs:
            jobs.add([job])
            job.set_speed(0)
            await ended(job)

    trio.run(go)
    assert sum(written) == 2 * MiB
    assert target.read_bytes() == content
    assert nothing_left(web)


def test_what_is_half_shared_when_the_daemon_dies_is_made_good(host, target):
    """A clone took newer data, where there was a hole, and nobody could tell."""
    path = host.add("web.raw", b"")
    with path.open("r+b") as file:
        file.truncate(8 * CLUSTER)
    host.open()
    (job,) = create_backups(host.inventory, [wanted(target)])
    host.write("web.raw", clusters("n"), CLUSTER)
    job._target.write(memoryview(clusters("n")), CLUSTER)
    die(host)
    host.open()

    trio.run(go_on, host)

    assert target.read_bytes() == bytes(8 * CLUSTER)


@pytest.mark.parametrize("crashes", [2, 5])
def test_it_outlives_many_daemons(web, content, target, crashes):
    crash_in_the_middle(web, target)
    rng = random.Random(crashes)
    for _ in range(crashes):
        web.open()
        ((job,),) = resume_jobs(web.inventory)
        web.write("web.raw", rng.randbytes(9000), rng.randrange(3 * MiB - 9000))
        die(web)
    web.open()
    job = trio.run(go_on_quickly, web)

    assert job.restarts == crashes + 1
    assert target.read_bytes() == content


async def go_on_quickly(host):
    for path in host.runtime.glob("*/jobs/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"speed": 0}))
    return await go_on(host)


def test_a_paused_job_is_still_paused(web, target):
    async def begin():
        async with running_until_killed(web) as jobs:
            (job,) = await start(jobs, wanted(target, speed=NEVER))
            await wait_for(lambda: job.progress.current)
            job.pause()
            await wait_for(lambda: job.status is JobStatus.PAUSED)

    trio.run(begin)
    die(web)
    web.open()

    async def go():
        async with running(web, resumes=True) as jobs:
            job = jobs.get("web.raw")
            await wait_for(lambda: job.status is JobStatus.PAUSED)
            assert job.is_user_paused
            job.resume()
            job.set_speed(0)
            await ended(job)

    trio.run(go)


def test_a_cancelled_job_does_not_come_back(web, target):
    async def begin():
        async with running_until_killed(web) as jobs:
            (job,) = await start(jobs, wanted(target, speed=NEVER))
            await wait_for(lambda: job.progress.current)
            monkey.setattr(job, "abort", trio.sleep_forever)
            job.cancel()
            await wait_for(lambda: job.status is JobStatus.ABORTING)

    with pytest.MonkeyPatch.context() as monkey:
        trio.run(begin)
    die(web)
    web.open()
    job = trio.run(go_on, web)

    assert job.is_cancelled
    assert not target.exists()
    assert nothing_left(web)


def test_a_group_stays_a_group(host, tmpfs_path):
    host.add("web.raw", b"a" * (2 * MiB))
    host.add("db.raw", b"b" * (2 * MiB))
    host.open()
    targets = [tmpfs_path / "1.raw", tmpfs_path / "2.raw"]

    async def begin():
        async with running_until_killed(host) as jobs:
            started = await start(
                jobs,
                wanted(targets[0], speed=NEVER),
                wanted(targets[1], "db.raw", speed=NEVER),
                grouped=True,
            )
            for job in started:
                await wait_for(lambda job=job: job.progress.current)

    trio.run(begin)
    die(host)
    host.open()
    groups = resume_jobs(host.inventory)

    assert [[job.id for job in group] for group in groups] == [["web.raw", "db.raw"]]
    for job in groups[0]:
        job._target.close()


def test_none_goes_on(web, target):
    async def begin():
        async with running_until_killed(web) as jobs:
            (job,) = await start(jobs, wanted(target, sync=Sync.NONE))
            web.write("web.raw", b"n", 0)
            await wait_for(lambda: job.progress.current == CLUSTER)
            job.pause()
            await wait_for(lambda: job.status is JobStatus.PAUSED)
            web.write("web.raw", b"n", MiB)

    trio.run(begin)
    die(web)
    web.open()
    web.write("web.raw", b"n", 2 * MiB)

    async def go():
        async with running(web, resumes=True) as jobs:
            job = jobs.get("web.raw")
            job.resume()
            await wait_for(lambda: job.progress.current == 3 * CLUSTER)
            job.cancel()
            await ended(job)

    trio.run(go)
    found = target.read_bytes()
    for index, letter in enumerate(b"abc"):
        assert set(found[index * MiB : index * MiB + CLUSTER]) == {letter}
        assert not any(found[index * MiB + CLUSTER : (index + 1) * MiB])


@pytest.mark.logs("failed: its snapshot is broken: the host went down")
def test_no_job_survives_the_host(web, target):
    crash_in_the_middle(web, target)
    web.reboot()
    web.open()
    job = trio.run(go_on, web)

    assert "the host went down" in job.error
    assert nothing_left(web)


@pytest.mark.logs("failed: target .*copy.raw: No such file")
def test_a_target_that_is_gone_fails_the_job(web, target):
    crash_in_the_middle(web, target)
    target.unlink()
    web.open()
    job = trio.run(go_on, web)

    assert "copy.raw" in job.error
    assert nothing_left(web)


@pytest.mark.logs("does not go on")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "fleecefs-job"}'])
def test_a_damaged_record_is_the_end_of_its_job(web, target, text):
    crash_in_the_middle(web, target)
    (path,) = (web.state / "jobs").glob("*.json")
    path.write_text(text)
    web.open()

    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)


def test_without_its_record_a_private_snapshot_is_an_orphan(web, target):
    crash_in_the_middle(web, target)
    shutil.rmtree(web.state / "jobs")
    web.open()

    assert not web.inventory.private
    assert not epochs_of(web)
    assert web.epoch_directories() == []


def test_a_crash_after_releasing_leaves_nothing_preserved(web, target, monkeypatch):
    """Killed when access had ended and nothing was freed, as a kill can do it."""
    (job,) = create_backups(web.inventory, [wanted(target)])
    web.write("web.raw", b"n" * MiB, MiB)
    snapshot = job._private.snapshot
    snapshot.epoch.denied[256:512] = 1
    assert web.inventory.budgets.ram.used == MiB
    die(web)

    web.open()

    assert web.inventory.budgets.ram.used == 0
    assert web.inventory.disks["web.raw"].history.newest.preserved[256:512].all()


@pytest.mark.parametrize("older", [False, True])
def test_durable_snapshots_stay_durable_beside_a_job(host, target, older):
    host.add("web.raw", clusters("aaaaaaaa"))
    inventory = host.open(survives_host=True)
    if older:
        inventory.create_snapshot("old")
    (job,) = create_backups(inventory, [wanted(target)])
    inventory.create_snapshot("new")
    private = job._private
    host.write("web.raw", clusters("b"), 0)
    private.snapshot.discard(CLUSTER, 0)
    die(host)

    host.reboot()
    host.open(survives_host=True)

    if older:
        assert letters(host.read("old", "web.raw")) == "aaaaaaaa"
    assert letters(host.read("new", "web.raw")) == "aaaaaaaa"
    assert private.record.key in {p.record.key for p in host.inventory.private.values()}
    (job,) = (one for group in resume_jobs(host.inventory) for one in group)
    assert job._private.snapshot.lost == "the host went down"
    job._target.close()


def test_record_names_are_safe(web, target):
    (job,) = create_backups(web.inventory, [wanted(target, job_id="../../x y/é")])

    (path,) = (web.state / "jobs").iterdir()
    assert path.name == f"{job._record.key}.json"
    assert os.stat(path).st_mode & 0o077 == 0
    job._target.close()
