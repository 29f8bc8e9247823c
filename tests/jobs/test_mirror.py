"""Mirrors of real files: how they follow, what goes wrong, how they end, crashes."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.bitmaps.steps import Add
from fleecefs.block.bitmap import LiveBits
from fleecefs.block.raw import RawImage
from fleecefs.errors import Abandoned, Busy, NotFound, NotUsable, VerbRejected
from fleecefs.inventory import Inventory
from fleecefs.jobs import mirror, mirrorcopy, trend
from fleecefs.jobs.mirrors import create_mirror
from fleecefs.jobs.options import (
    BackupOptions,
    CopyMode,
    MirrorOptions,
    OnError,
    Sync,
)
from fleecefs.jobs.progress import Progress
from fleecefs.jobs.record import Record
from fleecefs.jobs.resume import resume_jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import Target, busy_targets
from fleecefs.state.directory import StateDirectory
from fleecefs.units import KiB, MiB
from tests.jobs.test_backup import ended
from tests.jobs.test_backup import running as running_backups
from tests.support.copying import wait_for
from tests.support.disks import clusters, letters
from tests.support.gate import Gate
from tests.support.host import CLUSTER, Host
from tests.support.killed import killed_at

BACKGROUND, WRITE_BLOCKING = CopyMode

# A speed at which nothing follows the first chunk.
NEVER = 1

# Granules are copied one at a time, in the order of the disk.
ONE_BY_ONE = {"granularity": CLUSTER, "buf_size": CLUSTER, "workers": 1}

LETTERS = "abcdefghijklmnop"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Wait for nothing as long as people would."""
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(mirror, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(mirror, "_MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(mirror, "_BREATH_SECONDS", 0.001)
    monkeypatch.setattr(mirror, "_AGAIN_SECONDS", 0.005)
    monkeypatch.setattr(mirror, "_CLOSE_SECONDS", 0.2)


@pytest.fixture
def small(host):
    """A host with a disk of sixteen clusters."""
    host.add("web.raw", clusters(LETTERS))
    host.open()
    return host


def wanted(target, device="web.raw", **options):
    options.setdefault("job_id", device)
    options.setdefault("auto_dismiss", False)
    return MirrorOptions(device, target, **options)


running = partial(running_backups, resumes=True)


async def start(jobs, host, target, device="web.raw", **options):
    told = wanted(target, device, **options)
    create = partial(create_mirror, host.inventory, told)
    (job,) = await jobs.start([told.job_id], lambda: [create()])
    return job


async def begun(jobs, host, target, device="web.raw", **options):
    """Start a mirror that rests when it has copied a chunk."""
    job = await start(jobs, host, target, device, speed=NEVER, **options)
    await wait_for(lambda: job.progress.current)
    return job


async def ready(jobs, host, target, device="web.raw", **options):
    """Start a mirror, and return it when it is ready."""
    return await until_ready(await start(jobs, host, target, device, **options))


async def until_ready(job):
    await until(job, JobStatus.READY)
    return job


async def until(job, status):
    await wait_for(lambda: job.status is status or job.is_over)
    assert job.status is status, job.error


async def ended_well(job):
    await ended(job)
    assert job.error is None, job.error
    return job


async def completed(job):
    job.complete()
    return await ended_well(job)


def is_synced(job):
    return job.describe_job()["actively-synced"]


async def until_synced(job):
    await wait_for(lambda: is_synced(job) or job.is_over)
    assert not job.is_over, job.error


async def write(host, data, offset=0, device="web.raw"):
    """Write as a guest that may have to wait for an instant of the job."""
    await trio.to_thread.run_sync(host.write, device, data, offset)


def move(host, target, device="web.raw", **options):
    """Let a disk live on a target from now on."""

    async def run():
        async with running(host) as jobs:
            await completed(await ready(jobs, host, target, device, **options))

    trio.run(run)


def hook(job, wrap, *args, **kwargs):
    """Put an image around that of a job's target, and return it."""
    job._target._image = wrap(job._target._image, *args, **kwargs)
    return job._target._image


# -- what there is to see


def events(host, name):
    return [data for event, data in host.events if event == name]


def statuses(host, job_id="web.raw"):
    moves = events(host, "JOB_STATUS_CHANGE")
    return [move["status"] for move in moves if move["id"] == job_id]


def is_alike(host, target, device="web.raw"):
    return target.read_bytes() == host.live(device)


def source_of(host, device="web.raw"):
    """Return where a disk lives."""
    disks = host.inventory.describe_disks()
    return next(disk["source"] for disk in disks if disk["name"] == device)


def is_free(path):
    """Whether nobody has an image open any more, as the last reader of a disk may."""
    try:
        RawImage.open_source(path).close()
    except Busy:
        return False
    return True


def records(host):
    return [*host.state.glob("jobs/*"), *host.runtime.glob("*/jobs/*")]


def nothing_left(host):
    """Whether no trace of a job is left."""
    inventory = host.inventory
    kept = inventory.mirrors, inventory._state.mirrors, inventory.private
    is_mirrored = any(disk.mirror for disk in inventory.disks.values())
    return not (records(host) or any(kept) or is_mirrored or busy_targets())


class Writes:
    """What comes to targets: the letter of each cluster, and where it came."""

    def __init__(self, monkeypatch):
        self.all = []
        write = Target.write

        def recording(target, data, offset):
            self.all.append((offset // CLUSTER, letters(data)))
            write(target, data, offset)

        monkeypatch.setattr(Target, "write", recording)

    @property
    def indexes(self):
        return [index for index, _ in self.all]


class Looks:
    """How often a mirror looks at how things are, and holds the guest back for it."""

    def __init__(self, monkeypatch):
        self.count = self.drains = 0
        drained, measure = mirror.drained, mirror.MirrorJob._measure

        def draining(*args):
            self.drains += 1
            return drained(*args)

        def measuring(job):
            self.count += 1
            measure(job)

        monkeypatch.setattr(mirror, "drained", draining)
        monkeypatch.setattr(mirror.MirrorJob, "_measure", measuring)

    async def have_held(self):
        """Whether the next looks hold the guest back."""
        drains, count = self.drains, self.count
        await wait_for(lambda: self.count > count + 20)
        return self.drains > drains


class Breaking:
    """An operation of a class, which fails while it is told to.

    Only calls with these arguments do, if `is_meant` is given.
    """

    def __init__(self, monkeypatch, owner, name, is_meant=lambda *args: True):
        self.fired = 0
        self._left = 0
        self._code = errno.EIO
        self._lock = threading.Lock()
        call = getattr(owner, name)

        def breaking(*args):
            with self._lock:
                fires = self._left > 0 and is_meant(*args)
                self._left -= fires
                self.fired += fires
            if fires:
                raise OSError(self._code, "injected")
            return call(*args)

        monkeypatch.setattr(owner, name, breaking)

    def fail(self, count=10**9, code=errno.EIO):
        """Fail so many calls from now on."""
        with self._lock:
            self._left, self._code = count, code

    def mend(self):
        self.fail(0)


class Guest:
    """A guest that writes a number to both ends of its disk, then a larger one.

    At every instant the first end has the number of the last one, or the next. What it
    reads is what it has written.
    """

    def __init__(self, host, device="web.raw"):
        self.number = 0
        self._disk = host.inventory.disks[device]
        self._is_over = False
        self._error = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *what):
        self._is_over = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self):
        try:
            while not self._is_over:
                self.number += 1
                data = self.number.to_bytes(8, "big")
                for end in 0, self._disk.size - 8:
                    assert self._disk.write(data, end) == 8
                    assert self._disk.read(8, end) == data
        except BaseException as e:
            self._error = e


def number_of(data):
    """Return the number that a guest had written by the instant of which data is."""
    first, last = (int.from_bytes(each, "big") for each in (data[:8], data[-8:]))
    assert last <= first <= last + 1
    return last


# -- death


def dies(host, live, point=None, nth=1):
    """Let a daemon live `live(jobs)`, and be killed; then the next one is open.

    At a kill point, if one is given, when it is reached for the nth time.
    """

    async def run():
        async with running(host) as jobs:
            await live(jobs)
            if point is None:
                os.kill(os.getpid(), signal.SIGKILL)

    def call():
        if point is not None:
            _arm(point, nth)
        trio.run(run)

    # In a process of its own.
    assert killed_at(10**9, call) is not None, "it was not killed"
    host.crash()
    host.open()


def _arm(point, nth):
    times = itertools.count(1)

    def reached(name):
        if name == point and next(times) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    for name, module in list(sys.modules.items()):
        if name.startswith("fleecefs.") and hasattr(module, "reached"):
            module.reached = reached


def goes_on(host, then=ended_well, job_id="web.raw"):
    """Let a job of the daemon before go on, do `then(job)`, and return it."""

    async def run():
        async with running(host) as jobs:
            job = jobs.get(job_id)
            await then(job)
            return job

    return trio.run(run)


# -- what a mirror is


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("exists", [False, True])
async def test_it_becomes_ready_and_follows(web, content, target, exists, mode):
    if exists:
        target.write_bytes(b"o" * len(content))
    async with running(web) as jobs:
        job = await ready(jobs, web, target, copy_mode=mode)

        assert target.read_bytes() == content
        assert (job.progress.current, job.progress.remaining) == (3 * MiB, 0)
        web.write("web.raw", b"new" * 100_000, 1000)
        await wait_for(lambda: is_alike(web, target))
        web.write("web.raw", b"newer" * 100_000, 2 * MiB)
        await wait_for(lambda: is_alike(web, target))

        # It stays ready, whatever is written.
        assert statuses(web) == ["created", "running", "ready"]
        (event,) = events(web, "BLOCK_JOB_READY")
    assert event == {
        "type": "mirror",
        "device": "web.raw",
        "len": 3 * MiB,
        "offset": 3 * MiB,
        "speed": 0,
    }


async def test_the_target_is_durable_when_it_becomes_ready(web, target, monkeypatch):
    flushes = recorded_flushes(web, monkeypatch)
    async with running(web) as jobs:
        await ready(jobs, web, target)

        assert flushes == [("running", False)]


def recorded_flushes(host, monkeypatch):
    """Return a list of the job's status at each flush, and whether the disk stands."""
    flushes = []
    flush, requests = Target.flush, host.inventory.disks["web.raw"].requests

    def recording(target):
        flushes.append((statuses(host)[-1], requests.is_drained))
        flush(target)

    monkeypatch.setattr(Target, "flush", recording)
    return flushes


@pytest.mark.parametrize("ending", ["complete", "cancel_softly"])
async def test_the_target_is_durable_at_the_end(web, target, monkeypatch, ending):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        flushes = recorded_flushes(web, monkeypatch)
        web.write("web.raw", b"new", MiB)
        getattr(job, ending)()
        await ended_well(job)

    assert flushes == [("ready", False), ("ready", True)]


@pytest.mark.parametrize("mode", CopyMode)
async def test_completed_the_disk_lives_on_the_target(web, content, target, mode):
    async with running(web) as jobs:
        job = await ready(jobs, web, target, copy_mode=mode)
        web.write("web.raw", b"before", MiB)
        await completed(job)
        left = web.sources["web.raw"].read_bytes()
        web.write("web.raw", b"after", 2 * MiB)
        details = job.describe()

    before = content[:MiB] + b"before" + content[MiB + 6 :]
    after = before[: 2 * MiB] + b"after" + before[2 * MiB + 5 :]
    assert left == before
    assert web.sources["web.raw"].read_bytes() == before
    assert target.read_bytes() == after
    assert web.live("web.raw") == after
    assert source_of(web) == str(target)
    assert details["moved"]
    assert 0 < details["held"] < mirror.HELD_SECONDS_MAX
    assert statuses(web) == [
        "created",
        "running",
        "ready",
        "waiting",
        "pending",
        "concluded",
    ]
    (event,) = events(web, "BLOCK_JOB_COMPLETED")
    assert event["type"] == "mirror"
    assert "error" not in event
    assert nothing_left(web)


async def test_what_the_disk_has_left_is_free(web, target, tmpfs_path):
    async with running(web) as jobs:
        await completed(await ready(jobs, web, target))

        # Locked by nobody, and no target for anybody where the disk lives now.
        assert is_free(web.sources["web.raw"])
        assert not is_free(target)
        with pytest.raises(NotUsable, match="is the source of disk"):
            await start(jobs, web, target, job_id="2")


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("exists", [False, True])
async def test_cancelled_softly_the_target_is_a_copy(web, target, exists, mode):
    if exists:
        target.write_bytes(b"o" * (3 * MiB))
    async with running(web) as jobs:
        job = await ready(jobs, web, target, copy_mode=mode)
        web.write("web.raw", b"before", MiB)
        of_then = web.live("web.raw")
        job.cancel_softly()
        await ended_well(job)
        web.write("web.raw", b"after", MiB)

        assert target.read_bytes() == of_then
        assert source_of(web) == str(web.sources["web.raw"])
        assert web.sources["web.raw"].read_bytes() == web.live("web.raw") != of_then
        assert not job.is_cancelled
        assert not job.describe()["moved"]
        assert not events(web, "BLOCK_JOB_CANCELLED")
        (event,) = events(web, "BLOCK_JOB_COMPLETED")
        assert "error" not in event
        assert nothing_left(web)
        # And nobody has it any more.
        assert is_free(target)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("exists", [False, True])
async def test_cancelled_before_it_is_ready_it_is_cancelled(web, target, exists, force):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        job = await begun(jobs, web, target)
        job.cancel() if force else job.cancel_softly()
        await ended(job)

        assert job.is_cancelled
        assert target.exists() == exists
        assert len(events(web, "BLOCK_JOB_CANCELLED")) == 1
        assert not events(web, "BLOCK_JOB_COMPLETED")
        assert nothing_left(web)
        await ready(jobs, web, target, job_id="next")


@pytest.mark.parametrize("exists", [False, True])
async def test_cancelled_by_force_when_it_is_ready(web, content, target, exists):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.cancel()
        await ended(job)
        web.write("web.raw", b"later")

        assert job.error == "cancelled"
        assert target.exists() == exists
        if exists:
            assert target.read_bytes() == content
        assert source_of(web) == str(web.sources["web.raw"])
        assert len(events(web, "BLOCK_JOB_CANCELLED")) == 1
        assert nothing_left(web)


@pytest.mark.parametrize("when", ["bulk", "flush", "ready", "complete"])
async def test_cancel_does_not_wait_for_a_target_that_hangs(web, target, when):
    async with running(web) as jobs:
        if when in ("bulk", "flush"):
            job = await begun(jobs, web, target)
        else:
            job = await ready(jobs, web, target)
        operation = "pwrite" if when in ("bulk", "ready") else "flush"
        stay = hook(job, Gate).hold(operation)
        if when == "ready":
            web.write("web.raw", b"new")
        elif when == "complete":
            job.complete()
        else:
            job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await ended(job)

        assert job.is_cancelled
        assert busy_targets() == [str(target)]
        web.write("web.raw", b"later")
        assert not web.inventory.mirrors
        stay.release()
        await wait_for(lambda: nothing_left(web))


async def test_cancel_lets_go_of_a_guest_that_waits_for_the_target(web, target):
    async with running(web) as jobs, trio.open_nursery() as nursery:
        job = await ready(jobs, web, target, copy_mode=WRITE_BLOCKING)
        await until_synced(job)
        disk = web.inventory.disks["web.raw"]
        stay = hook(job, Gate).hold("pwrite")

        async def guest():
            with pytest.raises(Abandoned):
                await trio.to_thread.run_sync(disk.write, b"new", MiB)

        nursery.start_soon(guest)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await wait_for(lambda: disk.has_late(time.monotonic()) or job.is_over)
        # As a watcher of the data threads does all the time.
        disk.expire(time.monotonic())
        await ended(job)

        assert web.sources["web.raw"].read_bytes()[MiB:][:3] == b"new"
        web.write("web.raw", b"newer", MiB)
        stay.release()


# -- what people tell it


async def test_it_can_not_complete_before_it_is_ready(web, target):
    async with running(web) as jobs:
        job = await begun(jobs, web, target)

        with pytest.raises(VerbRejected, match="running: cannot complete"):
            job.complete()


async def test_told_to_complete_twice_it_completes(web, target):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.complete()
        job.complete()
        await ended_well(job)

        assert source_of(web) == str(target)
        with pytest.raises(VerbRejected, match="concluded: cannot complete"):
            job.complete()


async def test_who_is_cancelled_softly_can_not_complete(web, target):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.cancel_softly()
        with pytest.raises(VerbRejected, match="being cancelled"):
            job.complete()
        await ended_well(job)

    assert source_of(web) == str(web.sources["web.raw"])


async def test_who_is_completing_can_be_cancelled_softly(web, target):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.complete()
        job.cancel_softly()
        await ended_well(job)

    assert source_of(web) == str(web.sources["web.raw"])
    assert is_alike(web, target)


@pytest.mark.parametrize("mode", CopyMode)
@pytest.mark.parametrize("auto_finalize", [False, True])
async def test_before_a_disk_moves_all_of_it_is_copied(
    small, target, mode, auto_finalize
):
    """Also if only what is written was to be so far."""
    target.write_bytes(clusters("o" * 16))
    options = {"copy_mode": mode, "auto_finalize": auto_finalize, **ONE_BY_ONE}
    async with running(small) as jobs:
        job = await ready(jobs, small, target, sync=Sync.NONE, **options)
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        await wait_for(lambda: letters(target.read_bytes()) == "ooooonoooooooooo")
        job.complete()
        job.complete()
        await write(small, clusters("m"), 6 * CLUSTER)
        if not auto_finalize:
            await until(job, JobStatus.PENDING)
            await write(small, clusters("l"), 7 * CLUSTER)
            job.finalize()
        await ended_well(job)

    found = "abcdenmhijklmnop" if auto_finalize else "abcdenmlijklmnop"
    assert letters(target.read_bytes()) == found
    assert source_of(small) == str(target)
    assert letters(small.live("web.raw")) == found


async def test_a_backup_neither_completes_nor_changes(web, target):
    async with running(web) as jobs:
        told = BackupOptions("web.raw", target, "backup", speed=NEVER)
        (job,) = await jobs.start_backups([told])

        with pytest.raises(VerbRejected, match="cannot complete"):
            job.complete()
        with pytest.raises(VerbRejected, match="no copy mode"):
            job.change(WRITE_BLOCKING)
        assert "actively-synced" not in job.describe_job()


async def test_a_speed_is_one_of_the_bulk_and_of_what_follows(web, target):
    async with running(web) as jobs:
        job = await begun(jobs, web, target)
        await wait_all_tasks_blocked()
        assert (job.status, job.progress.current) == (JobStatus.RUNNING, MiB)
        with pytest.raises(NotUsable):
            job.set_speed(-1)
        job.set_speed(0)
        await until_ready(job)
        job.set_speed(NEVER)
        # The first goes, and nothing after it.
        web.write("web.raw", b"n" * (3 * MiB))
        await wait_for(lambda: job.progress.current == 4 * MiB)
        await wait_all_tasks_blocked()
        assert job.status is JobStatus.READY
        assert target.read_bytes().count(b"n") == MiB
        job.set_speed(0)
        await wait_for(lambda: is_alike(web, target))


async def test_progress_grows_with_what_the_guest_writes(web, target):
    async with running(web) as jobs:
        job = await begun(jobs, web, target)
        before = job.describe_job()
        web.write("web.raw", b"n" * 100_000)
        await wait_for(lambda: job.progress.total > 3 * MiB)
        grown = job.describe_job()
        job.set_speed(0)
        await until_ready(job)
        after = job.describe_block_job()

    assert (before["current-progress"], before["total-progress"]) == (MiB, 3 * MiB)
    assert grown["current-progress"] == MiB
    # In whole granules.
    assert grown["total-progress"] == 3 * MiB + 128 * KiB
    assert (after["offset"], after["len"]) == (3 * MiB + 128 * KiB,) * 2
    assert after["ready"]


async def test_what_is_left_is_never_less_than_nothing(small, target, monkeypatch):
    """What a worker has copied is known to be there before it has counted it."""
    in_thread, advance = mirrorcopy.MirrorCopier._in_thread, Progress.advance
    measure, measures = mirror.MirrorJob._measure, []
    left, is_late = [], trio.Event()

    async def late(copier, function):
        await in_thread(copier, function)
        await is_late.wait()

    def advancing(progress, length):
        advance(progress, length)
        left.append(progress.remaining)

    def measuring(job):
        measure(job)
        measures.append(job.progress.remaining)

    monkeypatch.setattr(mirror, "HELD_SECONDS_MAX", 0.02)
    monkeypatch.setattr(mirror.MirrorJob, "_measure", measuring)
    monkeypatch.setattr(mirrorcopy.MirrorCopier, "_in_thread", late)
    monkeypatch.setattr(Progress, "advance", advancing)
    async with running(small) as jobs:
        job = await start(jobs, small, target, granularity=CLUSTER)
        await wait_for(lambda: len(measures) >= 3)
        is_late.set()
        await until_ready(job)
        await wait_for(lambda: left)

        assert min(left) >= 0
        assert set(measures[:3]) == {16 * CLUSTER}
        (event,) = events(small, "BLOCK_JOB_READY")
        assert (event["offset"], event["len"]) == (16 * CLUSTER,) * 2


async def test_a_flush_that_takes_long_has_ever_more_time(web, target, monkeypatch):
    """A slow target is no reason never to come to an end."""
    flush = Target.flush

    def slow(image):
        time.sleep(0.1)
        flush(image)

    monkeypatch.setattr(Target, "flush", slow)
    monkeypatch.setattr(mirror, "HELD_SECONDS_MAX", 0.03)
    async with running(web) as jobs:
        await completed(await ready(jobs, web, target))

    assert source_of(web) == str(target)
    assert is_alike(web, target)


async def test_nobody_is_held_back_for_a_copy_that_hangs(small, target, monkeypatch):
    looks = Looks(monkeypatch)
    monkeypatch.setattr(mirrorcopy, "SLOW_SECONDS", 0.01)
    async with running(small) as jobs:
        job = await ready(jobs, small, target, **ONE_BY_ONE)
        stay = hook(job, Gate).hold("pwrite")
        small.write("web.raw", b"n")
        await trio.to_thread.run_sync(stay.wait_arrived)
        await wait_for(lambda: job._copier.is_slow)
        job.complete()
        has_held = await looks.have_held()
        stay.release()
        await ended_well(job)

    assert not has_held
    assert is_alike(small, target)


async def test_who_rests_for_the_end_of_the_daemon_does_not_follow_again(
    small, target, monkeypatch
):
    """It begins to just when it is told so."""
    gate, follow = Gate(None), mirror.MirrorJob._follow
    gate.image = SimpleNamespace(follow=follow)
    monkeypatch.setattr(mirror.MirrorJob, "_follow", lambda job: gate.follow(job))
    async with running(small) as jobs:
        job = await ready(jobs, small, target)
        stay = gate.hold("follow")
        job.change(WRITE_BLOCKING)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.rest()
        stay.release()
        await until(job, JobStatus.STANDBY)
        followed = job._mirror.mirror.is_following
        job.release()
        await until_synced(job)

    assert not followed


async def test_details_tell_what_it_does(web, target):
    async with running(web) as jobs:
        job = await begun(jobs, web, target, sync=Sync.TOP)
        during = job.describe()
        job.set_speed(0)
        job.change(WRITE_BLOCKING)
        await until_ready(job)
        await until_synced(job)
        web.write("web.raw", b"n")
        after = job.describe()

    assert during["target"] == str(target)
    assert (during["sync"], during["copy-mode"]) == ("top", "background")
    assert (during["moved"], during["converges"]) == (False, True)
    assert not during["actively-synced"]
    assert after["copy-mode"] == "write-blocking"
    assert after["actively-synced"]
    assert after["cost"]["waited"] == 1
    assert after["cost"]["longest-wait"] > 0


# -- which part of the disk


def sparse(path, text):
    with path.open("wb") as file:
        file.truncate(len(text) * CLUSTER)
        for index, letter in enumerate(text):
            if letter != ".":
                file.seek(index * CLUSTER)
                file.write(clusters(letter))


@pytest.fixture
def holey(host):
    """A host with a disk of which some is allocated, some of that zeroes."""
    sparse(host.add("web.raw", b""), "ab....cdef......")
    host.open()
    host.write("web.raw", bytes(CLUSTER), 7 * CLUSTER)
    return host


async def test_full_makes_all_of_the_target_alike(holey, target):
    target.write_bytes(clusters("o" * 16))
    async with running(holey) as jobs:
        await ready(jobs, holey, target, granularity=CLUSTER)

    assert letters(target.read_bytes()) == "ab....c.ef......"
    assert target.stat().st_blocks * 512 <= 6 * CLUSTER


async def test_a_sparse_disk_makes_a_sparse_file(holey, target):
    async with running(holey) as jobs:
        await ready(jobs, holey, target, granularity=CLUSTER)

        assert letters(target.read_bytes()) == "ab....c.ef......"
        assert target.stat().st_blocks * 512 == 5 * CLUSTER


@pytest.mark.parametrize("is_zero", [False, True])
async def test_who_says_so_has_a_target_of_zeroes(holey, target, monkeypatch, is_zero):
    target.write_bytes(clusters("." * 16))
    punched = []
    punch = Target.punch
    monkeypatch.setattr(
        Target, "punch", lambda *args: (punched.append(args), punch(*args))
    )
    async with running(holey) as jobs:
        job = await ready(jobs, holey, target, target_is_zero=is_zero, **ONE_BY_ONE)

        assert letters(target.read_bytes()) == "ab....c.ef......"
        assert bool(punched) is not is_zero
        # What comes there is zeroes no longer.
        holey.write("web.raw", clusters("nn"), 3 * CLUSTER)
        await wait_for(lambda: is_alike(holey, target))
        holey.inventory.disks["web.raw"].discard(2 * CLUSTER, 3 * CLUSTER)
        await wait_for(lambda: is_alike(holey, target))
        await completed(job)

    assert letters(target.read_bytes()) == "ab....c.ef......"


async def test_top_is_what_is_allocated_and_what_is_written(holey, target, monkeypatch):
    writes = Writes(monkeypatch)
    async with running(holey) as jobs:
        job = await ready(jobs, holey, target, sync=Sync.TOP, **ONE_BY_ONE)
        # Of what is allocated, the zeroes need no writing.
        assert sorted(writes.indexes) == [0, 1, 6, 8, 9]
        assert job.progress.total == 6 * CLUSTER
        holey.write("web.raw", clusters("n"), 15 * CLUSTER)
        holey.inventory.disks["web.raw"].discard(CLUSTER, 9 * CLUSTER)
        await wait_for(lambda: is_alike(holey, target))
        await completed(job)

    assert sorted(writes.indexes) == [0, 1, 6, 8, 9, 15]
    assert letters(target.read_bytes()) == "ab....c.e......n"
    assert source_of(holey) == str(target)


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP])
async def test_what_an_existing_target_has_in_holes_is_overwritten(holey, target, sync):
    """The disk may move there."""
    target.write_bytes(clusters("o" * 16))
    async with running(holey) as jobs:
        job = await ready(jobs, holey, target, sync=sync, granularity=CLUSTER)
        await completed(job)

    assert letters(target.read_bytes()) == "ab....c.ef......"


async def test_top_does_not_miss_what_is_written_meanwhile(holey, target, monkeypatch):
    find_data, has_come = RawImage.find_data, threading.Event()

    def late(image, offset):
        if offset == 2 * CLUSTER and not has_come.is_set():
            has_come.set()
            holey.write("web.raw", clusters("n"), 0)
            holey.write("web.raw", clusters("m"), 4 * CLUSTER)
            holey.write("web.raw", clusters("l"), 14 * CLUSTER)
        return find_data(image, offset)

    monkeypatch.setattr(RawImage, "find_data", late)
    async with running(holey) as jobs:
        await ready(jobs, holey, target, sync=Sync.TOP, granularity=CLUSTER)

        assert letters(target.read_bytes()) == "nb..m.c.ef....l."


async def test_none_is_what_is_written_from_now_on(small, target, monkeypatch):
    writes = Writes(monkeypatch)
    target.write_bytes(clusters("o" * 16))
    async with running(small) as jobs:
        job = await ready(jobs, small, target, sync=Sync.NONE, granularity=CLUSTER)
        assert writes.all == []
        small.write("web.raw", clusters("nn"), 3 * CLUSTER)
        await wait_for(lambda: job.progress.current == 2 * CLUSTER)
        job.cancel_softly()
        await ended_well(job)

    assert letters(target.read_bytes()) == "ooonnooooooooooo"


async def test_written_between_creation_and_start_it_is_copied(small, target):
    options = wanted(target, sync=Sync.NONE, granularity=CLUSTER)

    def create():
        job = create_mirror(small.inventory, options)
        small.write("web.raw", clusters("n"), 3 * CLUSTER)
        assert job.status is JobStatus.CREATED
        return [job]

    async with running(small) as jobs:
        (job,) = await jobs.start([options.job_id], create)
        await until_ready(job)

        assert letters(target.read_bytes()) == "...n............"


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP, Sync.NONE])
@pytest.mark.parametrize("size", [1, 511, 5 * CLUSTER + 1, 200_001])
@pytest.mark.parametrize("granularity", [512, 4 * KiB, 64 * MiB])
async def test_sizes(host, target, size, granularity, sync):
    host.add("web.raw", random.Random(size).randbytes(size))
    host.open()
    async with running(host) as jobs:
        job = await ready(jobs, host, target, sync=sync, granularity=granularity)
        host.write("web.raw", b"n", size - 1)
        host.write("web.raw", b"m", size // 2)
        await wait_for(lambda: job.progress.remaining == 0 and job.progress.current)
        await wait_for(lambda: target.read_bytes()[size // 2 :][:1] == b"m")
        await completed(job)
        assert job.progress.remaining == 0
        assert is_alike(host, target)
        assert target.stat().st_size == size


@pytest.mark.parametrize("is_known", [False, True])
async def test_granules_larger_than_what_is_read_at_a_time(host, target, is_known):
    """Zeroes are found in parts of them, and the rest is written."""
    parts = b"a" * MiB, bytes(MiB), b"b" * MiB, bytes(MiB), bytes(MiB), b"c" * 1000
    host.add("web.raw", b"".join(parts))
    host.open()
    target.write_bytes(bytes(5 * MiB + 1000) if is_known else b"o" * (5 * MiB + 1000))
    options = {"granularity": 2 * MiB, "target_is_zero": is_known}
    async with running(host) as jobs:
        job = await ready(jobs, host, target, **options)
        assert is_alike(host, target)
        host.write("web.raw", b"n" * 10, 3 * MiB)
        host.inventory.disks["web.raw"].zero(MiB, 2 * MiB)
        await wait_for(lambda: job.progress.remaining == 0 and is_alike(host, target))
        assert job.progress.total == 5 * MiB + 1000 + 2 * MiB


# -- at an instant


@pytest.mark.parametrize("mode", CopyMode)
async def test_a_disk_moves_to_and_fro_under_its_guest(web, target, mode):
    old, new = web.sources["web.raw"], target
    async with running(web) as jobs:
        with Guest(web) as guest:
            for turn in range(6):
                told = {"job_id": str(turn), "copy_mode": mode}
                job = await ready(jobs, web, new, **told)
                number = guest.number
                await wait_for(lambda number=number: guest.number > number + 2)
                await completed(job)
                assert number_of(old.read_bytes()) > number
                old, new = new, old
                await wait_for(partial(is_free, new))
        assert number_of(web.live("web.raw")) == guest.number

    assert source_of(web) == str(web.sources["web.raw"])
    assert is_alike(web, web.sources["web.raw"])


@pytest.mark.parametrize("mode", CopyMode)
async def test_a_copy_is_of_one_instant_whatever_the_guest_does(web, tmpfs_path, mode):
    async with running(web) as jobs:
        with Guest(web) as guest:
            for turn in range(4):
                target = tmpfs_path / f"{turn}.raw"
                told = {"job_id": str(turn), "copy_mode": mode}
                job = await ready(jobs, web, target, **told)
                number = guest.number
                job.cancel_softly()
                await ended_well(job)
                # No older than it was told to end.
                assert number - 1 <= number_of(target.read_bytes()) <= guest.number


@pytest.mark.parametrize("operation", ["pwrite", "flush"])
async def test_an_instant_that_takes_too_long_is_given_up(
    web, target, monkeypatch, operation
):
    monkeypatch.setattr(mirror, "HELD_SECONDS_MAX", 0.02)
    disk = web.inventory.disks["web.raw"]
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        gate = hook(job, Gate)
        # The first flush is one while the guest goes on.
        stays = [gate.hold(operation) for _ in range(1 if operation == "pwrite" else 2)]
        if operation == "flush":
            stays[0].release()
        else:
            job.pause()
            await until(job, JobStatus.STANDBY)
            web.write("web.raw", b"n", MiB)
            # Nothing is copied but at an instant.
            monkeypatch.setattr(mirrorcopy.MirrorCopier, "_claim_some", lambda s: [])
            job.resume()
        job.complete()
        await trio.to_thread.run_sync(stays[-1].wait_arrived)
        assert disk.requests.is_drained
        await write(web, b"meanwhile", 2 * MiB)
        assert source_of(web) == str(web.sources["web.raw"])
        stays[-1].release()
        await ended_well(job)

    assert source_of(web) == str(target)
    assert target.read_bytes()[2 * MiB :][:9] == b"meanwhile"


# -- what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sync": Sync.INCREMENTAL}, "Sync mode 'incremental' not supported"),
        ({"sync": Sync.BITMAP}, "Sync mode 'bitmap' not supported"),
        ({"granularity": 0}, "power of two from 512 to 64 MiB"),
        ({"granularity": -4096}, "power of two"),
        ({"granularity": 256}, "power of two from 512"),
        ({"granularity": 4097}, "power of two"),
        ({"granularity": 3 * 4096}, "power of two"),
        ({"granularity": 128 * MiB}, "power of two"),
        ({"buf_size": 0}, "buf-size of 0"),
        ({"buf_size": -1}, "buf-size of -1"),
        ({"workers": 0}, "0 workers"),
        ({"speed": -1}, "a speed is not negative"),
    ],
)
def test_what_makes_no_sense_is_refused(web, target, options, text):
    with pytest.raises(NotUsable) as e:
        create_mirror(web.inventory, wanted(target, **options))

    assert text in str(e.value)
    assert not target.exists()
    assert nothing_left(web)


def test_an_unknown_disk_is_refused(web, target):
    with pytest.raises(NotFound, match=r"no disk 'x\.raw'"):
        create_mirror(web.inventory, wanted(target, "x.raw"))

    assert not target.exists()


@pytest.mark.parametrize(
    "reason", ["source", "other", "state", "smaller", "larger", "directory", "link"]
)
def test_a_refused_target_leaves_nothing(host, tmpfs_path, reason):
    host.add("web.raw", clusters("aa"))
    host.add("db.raw", clusters("bb"))
    inventory = host.open()
    path = tmpfs_path / "t.raw"
    if reason == "source":
        path.symlink_to(host.sources["web.raw"])
    elif reason == "other":
        path = host.sources["db.raw"]
    elif reason == "state":
        path = host.state / "t.raw"
    elif reason == "smaller":
        path.write_bytes(b"1")
    elif reason == "larger":
        path.write_bytes(clusters("ooo"))
    elif reason == "link":
        path.symlink_to(tmpfs_path / "nowhere")
    else:
        path.mkdir()
    files = sorted(tmpfs_path.rglob("*"))

    with pytest.raises(NotUsable):
        create_mirror(inventory, wanted(path))

    assert sorted(tmpfs_path.rglob("*")) == files
    assert nothing_left(host)


def test_our_own_mount_is_refused(web, target):
    def check_place(path):
        raise NotUsable("on the mount")

    with pytest.raises(NotUsable, match="on the mount of its own source"):
        create_mirror(web.inventory, wanted(target), check_place)


async def test_a_disk_has_one_mirror_at_a_time(web, target, tmpfs_path):
    other = tmpfs_path / "other.raw"
    async with running(web) as jobs:
        job = await begun(jobs, web, target)
        kept = sorted(records(web))

        with pytest.raises(Busy, match=r"disk 'web\.raw' is being mirrored already"):
            await start(jobs, web, other, job_id="2")

        assert not other.exists()
        assert sorted(records(web)) == kept
        assert [each.device for each in jobs.all()] == ["web.raw"]
        # The first has not been disturbed.
        web.write("web.raw", b"new")
        job.set_speed(0)
        await until_ready(job)
        await wait_for(lambda: is_alike(web, target))
        job.cancel()
        await ended(job)
        second = await ready(jobs, web, other, job_id="2")
        await completed(second)

    assert source_of(web) == str(other)
    assert nothing_left(web)


async def test_two_disks_have_a_mirror_each_and_no_target_in_common(host, tmpfs_path):
    targets = [tmpfs_path / "1.raw", tmpfs_path / "2.raw"]
    host.add("web.raw", clusters(LETTERS))
    host.add("db.raw", clusters(LETTERS.upper()))
    host.open()
    async with running(host) as jobs:
        first = await ready(jobs, host, targets[0])
        with pytest.raises(Busy, match="in use by another job"):
            await start(jobs, host, targets[0], "db.raw")
        second = await ready(jobs, host, targets[1], "db.raw")
        host.write("db.raw", b"db", 5000)
        host.write("web.raw", b"web", 5000)
        await completed(second)
        await completed(first)

        assert source_of(host, "db.raw") == str(targets[1])
        assert is_alike(host, targets[0], "web.raw")
        assert is_alike(host, targets[1], "db.raw")
        assert nothing_left(host)


def test_who_comes_when_the_mount_ends_is_refused(web, target):
    inventory = web.inventory
    web.close()

    with pytest.raises(Busy, match="the mount is ending"):
        create_mirror(inventory, wanted(target))

    assert not target.exists()


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (StateDirectory, "save", 1),
        (LiveBits, "create", 1),
        (LiveBits, "create", 2),
        (Record, "create", 1),
    ],
)
def test_who_could_not_be_created_leaves_nothing(
    small, target, monkeypatch, owner, name, nth, exists
):
    if exists:
        target.write_bytes(clusters("o" * 16))
    real, calls = getattr(owner, name), itertools.count(1)

    def failing(*args):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OSError, match="No space left"):
            create_mirror(small.inventory, wanted(target))

    assert nothing_left(small)
    assert target.exists() == exists
    if exists:
        assert letters(target.read_bytes()) == "o" * 16
    small.write("web.raw", b"later")
    move(small, target)
    assert source_of(small) == str(target)


# -- errors

REPORT, IGNORE, STOP, ENOSPC, AUTO = OnError

POLICIES = [
    pytest.param(REPORT, errno.EIO, "report", id="report"),
    pytest.param(IGNORE, errno.EIO, "ignore", id="ignore"),
    pytest.param(STOP, errno.EIO, "stop", id="stop"),
    pytest.param(STOP, errno.ENOSPC, "stop", id="stop-full"),
    pytest.param(ENOSPC, errno.EIO, "report", id="enospc-failed"),
    pytest.param(ENOSPC, errno.ENOSPC, "stop", id="enospc-full"),
    pytest.param(AUTO, errno.ENOSPC, "stop", id="auto-full"),
]


@pytest.fixture(params=["read", "write"])
def broken(request, monkeypatch):
    """What copying does, which can be broken."""
    if request.param == "read":
        broken = Breaking(monkeypatch, RawImage, "pread_into")
    else:
        broken = Breaking(monkeypatch, Target, "write")
    broken.operation = request.param
    return broken


@pytest.mark.logs("job web.raw (failed|pauses)")
@pytest.mark.parametrize("count", [1, 10**9], ids=["once", "for-long"])
@pytest.mark.parametrize("was_ready", [False, True], ids=["bulk", "ready"])
@pytest.mark.parametrize(("policy", "code", "action"), POLICIES)
async def test_errors(small, target, broken, policy, code, action, was_ready, count):
    """The guest is never told, and what failed is copied in the end."""
    policies = {
        "on_source_error": policy if broken.operation == "read" else REPORT,
        "on_target_error": policy if broken.operation == "write" else REPORT,
    }
    async with running(small) as jobs:
        job = await begun(jobs, small, target, **policies, **ONE_BY_ONE)
        if was_ready:
            job.set_speed(0)
            await until_ready(job)
        broken.fail(count, code)
        small.write("web.raw", clusters("nm"), 5 * CLUSTER)
        job.set_speed(0)
        if action == "report":
            await is_reported(small, target, job)
        else:
            if action == "stop":
                await is_stopped(small, job, broken, code, was_ready)
            else:
                await wait_for(lambda: broken.fired == count or broken.fired > 20)
            await write(small, clusters("l"), 9 * CLUSTER)
            broken.mend()
            await until_ready(job)
            await wait_for(lambda: is_alike(small, target))
            assert job.io_status == "ok"
            await completed(job)
            assert source_of(small) == str(target)
            assert len(events(small, "BLOCK_JOB_READY")) == 1

    assert letters(small.live("web.raw"))[5:7] == "nm"
    found = events(small, "BLOCK_JOB_ERROR")
    # At an instant it is left to those who copy while the guest goes on.
    assert 0 < len(found) <= broken.fired
    assert found[0] == {
        "device": "web.raw",
        "operation": broken.operation,
        "action": action,
    }


async def is_reported(host, target, job):
    await ended(job)
    host.write("web.raw", clusters("l"), 9 * CLUSTER)
    assert "injected" in job.error
    assert not job.is_cancelled
    (event,) = events(host, "BLOCK_JOB_COMPLETED")
    assert event["error"] == job.error
    assert not target.exists()
    assert source_of(host) == str(host.sources["web.raw"])
    assert nothing_left(host)


async def is_stopped(host, job, broken, code, was_ready):
    """Check that it has stopped, and resume it: twice, if it fails again."""
    rest = JobStatus.STANDBY if was_ready else JobStatus.PAUSED
    await until(job, rest)
    fired = broken.fired
    assert job.is_user_paused
    assert job.io_status == ("nospace" if code == errno.ENOSPC else "failed")
    host.write("web.raw", clusters("k"), 10 * CLUSTER)
    await wait_all_tasks_blocked()
    assert (job.status, broken.fired) == (rest, fired)
    if broken._left:
        job.resume()
        await wait_for(lambda: broken.fired > fired)
        await until(job, rest)
    broken.mend()
    job.resume()


@pytest.mark.parametrize("operation", ["read", "write"])
async def test_one_bad_place_does_not_hold_up_the_rest(
    small, target, monkeypatch, operation
):
    owner, name = (RawImage, "pread_into") if operation == "read" else (Target, "write")

    def is_meant(image, data, offset):
        return offset <= 5 * CLUSTER < offset + len(data)

    bad = Breaking(monkeypatch, owner, name, is_meant)
    bad.fail()
    options = {"on_source_error": IGNORE, "on_target_error": IGNORE}
    async with running(small) as jobs:
        # Reads are tried again in parts: with one granule that is bad, it is one.
        count = 16 if operation == "read" else 1
        options |= {"granularity": CLUSTER, "buf_size": count * CLUSTER}
        job = await start(jobs, small, target, **options)
        await wait_for(
            lambda: letters(target.read_bytes()) == LETTERS.replace("f", ".")
        )
        fired = bad.fired
        await wait_for(lambda: bad.fired > fired + 3)
        assert job.status is JobStatus.RUNNING
        assert job.progress.remaining == CLUSTER
        bad.mend()
        await until_ready(job)

        assert letters(target.read_bytes()) == LETTERS


async def test_it_is_not_completed_while_something_fails(small, target, monkeypatch):
    bad = Breaking(monkeypatch, Target, "write")
    async with running(small) as jobs:
        job = await ready(
            jobs, small, target, on_target_error=IGNORE, granularity=CLUSTER
        )
        bad.fail()
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        job.complete()
        await wait_for(lambda: bad.fired > 20)
        await write(small, clusters("m"), 9 * CLUSTER)
        assert job.status is JobStatus.READY
        assert source_of(small) == str(small.sources["web.raw"])
        bad.mend()
        await ended_well(job)

    assert source_of(small) == str(target)
    assert letters(target.read_bytes()) == "abcdenghimklmnop"


@pytest.mark.logs("job web.raw (failed|pauses)")
@pytest.mark.parametrize("policy", [REPORT, IGNORE, STOP])
async def test_what_could_not_be_flushed_is_copied_again(
    small, target, monkeypatch, policy
):
    writes = Writes(monkeypatch)
    flush = Breaking(monkeypatch, Target, "flush")
    flush.fail(1)
    async with running(small) as jobs:
        job = await start(jobs, small, target, on_target_error=policy, **ONE_BY_ONE)
        if policy is REPORT:
            await is_reported(small, target, job)
            return
        if policy is STOP:
            await until(job, JobStatus.PAUSED)
            assert job.io_status == "failed"
            assert writes.indexes == list(range(16))
            job.resume()
        await until_ready(job)

        assert sorted(writes.indexes) == sorted([*range(16), *range(16)])
        assert len(events(small, "BLOCK_JOB_ERROR")) == 1


@pytest.mark.logs("job web.raw (failed|pauses)")
@pytest.mark.parametrize("nth", [1, 2], ids=["before", "held"])
@pytest.mark.parametrize("policy", [REPORT, IGNORE, STOP])
async def test_a_flush_that_fails_when_it_completes(
    small, target, monkeypatch, policy, nth
):
    calls = itertools.count(1)
    flush = Breaking(monkeypatch, Target, "flush", lambda *args: next(calls) == nth)
    async with running(small) as jobs:
        job = await ready(jobs, small, target, on_target_error=policy, **ONE_BY_ONE)
        writes = Writes(monkeypatch)
        calls = itertools.count(1)
        flush.fail(1)
        job.complete()
        if policy is REPORT:
            await is_reported(small, target, job)
            return
        if policy is STOP:
            await until(job, JobStatus.STANDBY)
            await write(small, clusters("n"), 5 * CLUSTER)
            assert source_of(small) == str(small.sources["web.raw"])
            job.resume()
        await ended_well(job)

    assert set(writes.indexes) == set(range(16))
    assert source_of(small) == str(target)
    assert is_alike(small, target)


@pytest.mark.logs("job web.raw (failed|pauses)")
@pytest.mark.parametrize("policy", [REPORT, IGNORE, STOP])
async def test_an_error_of_a_target_that_follows_is_not_the_guests(
    small, target, monkeypatch, policy
):
    bad = Breaking(monkeypatch, Target, "write")
    options = {"copy_mode": WRITE_BLOCKING, "on_target_error": policy, **ONE_BY_ONE}
    async with running(small) as jobs:
        job = await ready(jobs, small, target, **options)
        await until_synced(job)
        bad.fail(1)
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        assert not is_synced(job)
        assert letters(target.read_bytes()) == LETTERS
        if policy is REPORT:
            await is_reported(small, target, job)
            return
        if policy is STOP:
            await until(job, JobStatus.STANDBY)
            small.write("web.raw", clusters("m"), 6 * CLUSTER)
            await wait_all_tasks_blocked()
            assert letters(target.read_bytes()) == LETTERS
            job.resume()
        await until_synced(job)

        assert is_alike(small, target)
        # It follows again: what is written is there at once.
        small.write("web.raw", clusters("l"), 7 * CLUSTER)
        assert is_alike(small, target)
        assert is_synced(job)
        assert events(small, "BLOCK_JOB_ERROR") == [
            {"device": "web.raw", "operation": "write", "action": policy.value}
        ]


@pytest.mark.parametrize("mode", CopyMode)
async def test_a_write_that_has_failed_half_comes_to_the_target(
    small, target, monkeypatch, mode
):
    """What the source has of it by then."""
    disk = small.inventory.disks["web.raw"]
    pwrite = RawImage.pwrite

    def failing(image, data, offset):
        if image is not disk.source or len(data) != 3 * CLUSTER:
            return pwrite(image, data, offset)
        pwrite(image, data[:CLUSTER], offset)
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(RawImage, "pwrite", failing)
    async with running(small) as jobs:
        job = await ready(jobs, small, target, copy_mode=mode, **ONE_BY_ONE)
        if mode is WRITE_BLOCKING:
            await until_synced(job)
        with pytest.raises(OSError, match="injected"):
            disk.write(clusters("nnn"), 5 * CLUSTER)
        assert not is_synced(job)
        assert letters(small.live("web.raw")) == "abcdenghijklmnop"
        await wait_for(lambda: is_alike(small, target))
        if mode is WRITE_BLOCKING:
            await until_synced(job)
        assert not events(small, "BLOCK_JOB_ERROR")


async def test_the_guest_goes_on_while_the_target_fails(small, target, monkeypatch):
    bad = Breaking(monkeypatch, Target, "write")
    options = {"copy_mode": WRITE_BLOCKING, "on_target_error": IGNORE, **ONE_BY_ONE}
    async with running(small) as jobs:
        job = await ready(jobs, small, target, **options)
        await until_synced(job)
        bad.fail()
        for index in range(8):
            small.write("web.raw", clusters("n"), index * CLUSTER)
            await wait_for(lambda index=index: bad.fired > 3 * index + 3)
        assert letters(target.read_bytes()) == LETTERS
        bad.mend()
        await until_synced(job)

        assert is_alike(small, target)


async def test_nobody_waits_for_a_target_before_it_works_again(
    small, target, monkeypatch
):
    """It does not, as long as what has failed is being copied."""
    bad = Breaking(monkeypatch, Target, "write")
    set_following, looks = mirror.MirrorJob._set_following, []

    async def counted(job):
        await set_following(job)
        looks.append(job._mirror.mirror.is_following)

    monkeypatch.setattr(mirror.MirrorJob, "_set_following", counted)
    options = {"copy_mode": WRITE_BLOCKING, "on_target_error": IGNORE, **ONE_BY_ONE}
    async with running(small) as jobs:
        job = await ready(jobs, small, target, **options)
        await until_synced(job)
        stay = hook(job, Gate).hold("pwrite")
        bad.fail(1)
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        await trio.to_thread.run_sync(stay.wait_arrived)
        looks.clear()
        await wait_for(lambda: len(looks) >= 3)
        has_followed = any(looks)
        stay.release()
        await until_synced(job)

        assert not has_followed
        assert is_alike(small, target)


@pytest.mark.logs("job web.raw failed")
async def test_a_target_that_hangs_under_a_guests_write(small, target, monkeypatch):
    looks = Looks(monkeypatch)
    disk = small.inventory.disks["web.raw"]
    options = {"copy_mode": WRITE_BLOCKING, "on_target_error": IGNORE, **ONE_BY_ONE}
    async with running(small) as jobs, trio.open_nursery() as nursery:
        job = await ready(jobs, small, target, **options)
        await until_synced(job)
        stay = hook(job, Gate).hold("pwrite")

        async def guest():
            with pytest.raises(Abandoned):
                await trio.to_thread.run_sync(disk.write, clusters("n"), 5 * CLUSTER)

        nursery.start_soon(guest)
        await trio.to_thread.run_sync(stay.wait_arrived)
        assert disk.expire(time.monotonic()) == {}
        assert list(disk.expire(time.monotonic() + 11).values()) == [None]
        assert not is_synced(job)
        await wait_for(lambda: events(small, "BLOCK_JOB_ERROR"))
        # Others go on, and so does copying, but not what the thread may still write.
        small.write("web.raw", clusters("m"), 6 * CLUSTER)
        small.write("web.raw", clusters("l"), 5 * CLUSTER)
        await wait_for(lambda: letters(target.read_bytes())[6] == "m")
        # Nor is anybody held back for that.
        job.complete()
        has_held = await looks.have_held()
        assert not is_synced(job)
        stay.release()
        await ended_well(job)

        assert not has_held
        assert letters(small.live("web.raw")) == "abcdelmhijklmnop"
        assert is_alike(small, target)


@pytest.mark.logs("job web.raw (failed|pauses)")
@pytest.mark.parametrize("policy", [REPORT, IGNORE, STOP])
async def test_what_is_allocated_can_not_be_found_out(
    holey, target, monkeypatch, policy
):
    bad = Breaking(monkeypatch, RawImage, "find_data")
    bad.fail(1)
    async with running(holey) as jobs:
        job = await start(
            jobs,
            holey,
            target,
            sync=Sync.TOP,
            on_source_error=policy,
            granularity=CLUSTER,
        )
        if policy is REPORT:
            await is_reported(holey, target, job)
            return
        if policy is STOP:
            await until(job, JobStatus.PAUSED)
            job.resume()
        await until_ready(job)

        assert letters(target.read_bytes()) == "ab....c.ef......"
    (event,) = events(holey, "BLOCK_JOB_ERROR")
    assert event["operation"] == "read"


# -- the copy mode


async def test_write_blocking_brings_each_write_before_it_is_answered(small, target):
    disk = small.inventory.disks["web.raw"]
    async with running(small) as jobs:
        job = await ready(
            jobs, small, target, copy_mode=WRITE_BLOCKING, granularity=CLUSTER
        )
        await until_synced(job)
        for number in range(20):
            small.write("web.raw", f"{number:04}".encode() * 100, 4000 + 777 * number)
            assert is_alike(small, target)
        disk.zero(CLUSTER + 10, 3 * CLUSTER + 5)
        assert is_alike(small, target)
        disk.discard(2 * CLUSTER, 10 * CLUSTER)
        assert is_alike(small, target)
        assert is_synced(job)
        assert job.describe_block_job()["actively-synced"]
        assert job.progress.remaining == 0
        await completed(job)
        assert not is_synced(job)

    assert is_alike(small, target)


async def test_in_the_background_it_is_never_actively_synced(small, target):
    async with running(small) as jobs:
        job = await ready(jobs, small, target)
        await wait_all_tasks_blocked()

        assert not is_synced(job)


async def test_it_follows_from_the_beginning(small, target):
    """Of what is not copied yet nothing is written twice."""
    async with running(small) as jobs:
        job = await begun(jobs, small, target, copy_mode=WRITE_BLOCKING, **ONE_BY_ONE)
        await wait_for(lambda: job._mirror.mirror.is_following)
        small.write("web.raw", clusters("n"), 0)
        small.write("web.raw", clusters("m"), 5 * CLUSTER)

        assert letters(target.read_bytes()) == "n" + "." * 15
        assert not is_synced(job)
        job.set_speed(0)
        await until_synced(job)

        assert letters(target.read_bytes()) == "nbcdemghijklmnop"


@pytest.mark.parametrize("was_ready", [False, True])
async def test_the_copy_mode_changes_to_write_blocking(small, target, was_ready):
    async with running(small) as jobs:
        job = await begun(jobs, small, target, **ONE_BY_ONE)
        if was_ready:
            job.set_speed(0)
            await until_ready(job)
        job.change(BACKGROUND)
        assert job.describe()["copy-mode"] == "background"
        job.change(WRITE_BLOCKING)
        assert job.describe()["copy-mode"] == "write-blocking"
        await wait_for(lambda: job._mirror.mirror.is_following)
        small.write("web.raw", clusters("n"), 0)
        assert letters(target.read_bytes())[0] == "n"
        job.change(WRITE_BLOCKING)
        with pytest.raises(VerbRejected) as e:
            job.change(BACKGROUND)
        job.set_speed(0)
        await until_synced(job)

        text = "Change to copy mode 'background' is not implemented"
        assert str(e.value) == text
        assert job.describe()["copy-mode"] == "write-blocking"
        job.cancel()
        await ended(job)
        with pytest.raises(VerbRejected, match="concluded: cannot change"):
            job.change(WRITE_BLOCKING)


def is_outrun(monkeypatch, job):
    """Let all that is copied be written again at once, while nothing follows."""
    monkeypatch.setattr(trend, "TREND_SECONDS", 0.05)
    # However little is left, it is too much for an instant.
    monkeypatch.setattr(mirror, "_REST_SIZE", 0)
    monkeypatch.setattr(mirror, "_REST_SECONDS", 0.0)
    copied = Target.write

    def outrun(target, data, offset):
        copied(target, data, offset)
        if job().copy_mode is BACKGROUND:
            found = job()._mirror
            found.disk.source.pwrite(b"n", offset)
            found.mirror.mark_dirty(offset, offset + 1)

    monkeypatch.setattr(Target, "write", outrun)


@pytest.mark.parametrize("is_auto", [False, True])
async def test_who_does_not_converge_says_so(small, target, monkeypatch, is_auto):
    async with running(small) as jobs:
        is_outrun(monkeypatch, lambda: job)
        (job,) = [
            create_mirror(
                small.inventory, wanted(target, is_auto=is_auto, **ONE_BY_ONE)
            )
        ]
        jobs.add([job])
        await wait_for(lambda: events(small, mirror.NOT_CONVERGING))
        (event,) = events(small, mirror.NOT_CONVERGING)
        assert event["id"] == "web.raw"
        assert event["dirty-rate"] > 0
        assert event["copy-rate"] > 0
        if is_auto:
            await until_ready(job)
            await until_synced(job)
            assert job.describe()["copy-mode"] == "write-blocking"
            assert is_alike(small, target)
            return
        assert not job.describe()["converges"]
        passes = job._copier.passes
        await wait_for(lambda: job._copier.passes > passes + 50)
        assert job.status is JobStatus.RUNNING
        assert job.describe()["copy-mode"] == "background"
        # Once, and not again and again.
        assert len(events(small, mirror.NOT_CONVERGING)) == 1


async def test_who_converges_does_not_change_its_mode(small, target, monkeypatch):
    monkeypatch.setattr(trend, "TREND_SECONDS", 0.001)
    async with running(small) as jobs:
        with Guest(small):
            job = await ready(jobs, small, target, is_auto=True, **ONE_BY_ONE)
        await completed(job)

    assert job.copy_mode is BACKGROUND
    assert not events(small, mirror.NOT_CONVERGING)


# -- pause


async def test_paused_it_copies_nothing(small, target):
    async with running(small) as jobs:
        job = await begun(jobs, small, target, **ONE_BY_ONE)
        job.pause()
        await until(job, JobStatus.PAUSED)
        job.set_speed(0)
        await wait_all_tasks_blocked()
        assert letters(target.read_bytes()) == "a" + "." * 15
        with pytest.raises(VerbRejected, match="been told to pause already"):
            job.pause()
        job.resume()
        await until_ready(job)
        job.pause()
        await until(job, JobStatus.STANDBY)
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        await wait_all_tasks_blocked()
        assert letters(target.read_bytes()) == LETTERS
        assert job.describe_block_job()["paused"]
        assert job.describe_block_job()["ready"]
        job.resume()
        await wait_for(lambda: is_alike(small, target))

    assert len(events(small, "BLOCK_JOB_READY")) == 1


@pytest.mark.parametrize("was_ready", [False, True])
async def test_paused_it_follows_all_the_same(small, target, was_ready):
    async with running(small) as jobs:
        job = await begun(jobs, small, target, copy_mode=WRITE_BLOCKING, **ONE_BY_ONE)
        await wait_for(lambda: job._mirror.mirror.is_following)
        if was_ready:
            job.set_speed(0)
            await until_ready(job)
            await until_synced(job)
        job.pause()
        await until(job, JobStatus.STANDBY if was_ready else JobStatus.PAUSED)
        small.write("web.raw", clusters("n"), 0)

        assert letters(target.read_bytes())[0] == "n"
        assert is_synced(job) is was_ready


@pytest.mark.parametrize("ending", ["complete", "cancel_softly"])
async def test_paused_it_does_not_end_before_it_is_resumed(web, target, ending):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.pause()
        await until(job, JobStatus.STANDBY)
        web.write("web.raw", b"new")
        getattr(job, ending)()
        await wait_all_tasks_blocked()
        assert job.status is JobStatus.STANDBY
        web.write("web.raw", b"newer")
        job.resume()
        await ended_well(job)

    assert is_alike(web, target)


async def test_paused_it_can_be_cancelled(web, target):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        job.pause()
        await until(job, JobStatus.STANDBY)
        job.cancel()
        await ended(job)

        assert job.is_cancelled
        assert nothing_left(web)


async def test_told_to_pause_when_it_is_about_to_be_ready(small, target):
    async with running(small) as jobs:
        job = await begun(jobs, small, target, **ONE_BY_ONE)
        stay = hook(job, Gate).hold("flush")
        job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.pause()
        stay.release()
        await wait_for(
            lambda: job.status in (JobStatus.PAUSED, JobStatus.STANDBY) or job.is_over
        )
        assert not job.is_over, job.error
        job.resume()
        await until_ready(job)


async def test_told_to_pause_when_it_is_about_to_complete(small, target):
    async with running(small) as jobs:
        job = await ready(jobs, small, target, **ONE_BY_ONE)
        stay = hook(job, Gate).hold("flush")
        job.complete()
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.pause()
        stay.release()
        await wait_for(lambda: job.status is JobStatus.STANDBY or job.is_over)
        if not job.is_over:
            job.resume()
        await ended_well(job)

    assert source_of(small) == str(target)


async def test_at_rest_it_does_not_follow(small, target):
    """For a restart of the daemon: nobody is in a target then."""
    async with running(small) as jobs:
        job = await ready(jobs, small, target, copy_mode=WRITE_BLOCKING, **ONE_BY_ONE)
        await until_synced(job)
        await jobs.rest()
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        assert letters(target.read_bytes()) == LETTERS
        assert not is_synced(job)
        # If there was none.
        job.release()
        await until_synced(job)

        assert is_alike(small, target)


# -- told to finalize


@pytest.mark.parametrize("mode", CopyMode)
async def test_it_does_not_move_before_it_is_finalized(web, target, mode):
    async with running(web) as jobs:
        job = await ready(jobs, web, target, auto_finalize=False, copy_mode=mode)
        job.complete()
        await until(job, JobStatus.PENDING)
        assert events(web, "BLOCK_JOB_PENDING") == [{"type": "mirror", "id": "web.raw"}]
        await write(web, b"pending", MiB)
        assert source_of(web) == str(web.sources["web.raw"])
        assert web.sources["web.raw"].read_bytes() == web.live("web.raw")
        job.finalize()
        await ended_well(job)
        left = web.sources["web.raw"].read_bytes()
        web.write("web.raw", b"later", 2 * MiB)

    assert source_of(web) == str(target)
    assert is_alike(web, target)
    assert left == web.sources["web.raw"].read_bytes()
    assert left[MiB:][:7] == b"pending"
    assert nothing_left(web)


@pytest.mark.parametrize("mode", CopyMode)
async def test_a_copy_is_of_the_instant_at_which_it_was_told(web, target, mode):
    async with running(web) as jobs:
        job = await ready(jobs, web, target, auto_finalize=False, copy_mode=mode)
        of_then = web.live("web.raw")
        job.cancel_softly()
        await until(job, JobStatus.PENDING)
        await write(web, b"pending", MiB)
        job.finalize()
        await ended_well(job)

    assert target.read_bytes() == of_then
    assert source_of(web) == str(web.sources["web.raw"])


@pytest.mark.parametrize("softly", [False, True])
@pytest.mark.parametrize("exists", [False, True])
async def test_pending_it_can_be_cancelled(web, target, exists, softly):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        job = await ready(jobs, web, target, auto_finalize=False)
        job.complete()
        await until(job, JobStatus.PENDING)
        job.cancel_softly() if softly else job.cancel()
        await ended(job)

        assert job.is_cancelled
        assert target.exists() == exists
        assert source_of(web) == str(web.sources["web.raw"])
        assert nothing_left(web)


@pytest.mark.logs("job web.raw failed: injected")
@pytest.mark.parametrize("name", ["write", "flush"])
async def test_what_fails_when_it_is_finalized_fails_it(web, target, monkeypatch, name):
    bad = Breaking(monkeypatch, Target, name)
    async with running(web) as jobs:
        options = {"auto_finalize": False, "on_target_error": IGNORE}
        job = await ready(jobs, web, target, **options)
        job.complete()
        await until(job, JobStatus.PENDING)
        bad.fail()
        await write(web, b"pending")
        job.finalize()
        await is_reported(web, target, job)


HANGING = [
    pytest.param(["pwrite"], id="copying"),
    pytest.param(["flush"], id="flushing"),
    pytest.param(["flush", "flush"], id="held"),
]


async def hanging_in_the_end(jobs, host, target, operations):
    """Return a mirror whose target hangs once it was finalized, and how it goes on."""
    job = await ready(jobs, host, target, auto_finalize=False)
    job.complete()
    await until(job, JobStatus.PENDING)
    gate = hook(job, Gate)
    *passing, stay = [gate.hold(operation) for operation in operations]
    for each in passing:
        each.release()
    await write(host, b"pending")
    job.finalize()
    await trio.to_thread.run_sync(stay.wait_arrived)
    return job, stay


@pytest.mark.parametrize("operations", HANGING)
async def test_finalized_it_can_be_cancelled_while_the_target_hangs(
    web, target, operations
):
    async with running(web) as jobs:
        job, stay = await hanging_in_the_end(jobs, web, target, operations)
        job.cancel()
        with trio.move_on_after(2 * mirror.HELD_SECONDS_MAX):
            await ended(job)
        has_ended = job.is_over
        stay.release()
        await ended(job)

        assert has_ended, "it waits for the target"
        assert job.is_cancelled


@pytest.mark.parametrize("operations", HANGING)
async def test_cancelled_while_it_is_finalized_the_disk_stays(web, target, operations):
    async with running(web) as jobs:
        job, stay = await hanging_in_the_end(jobs, web, target, operations)
        job.cancel()
        stay.release()
        await ended(job)
        web.write("web.raw", b"later", MiB)

        assert job.is_cancelled
        assert source_of(web) == str(web.sources["web.raw"])
        assert is_alike(web, web.sources["web.raw"])
        assert not target.exists()


@pytest.mark.parametrize("auto_finalize", [False, True])
async def test_cancelled_at_the_last_moment_the_disk_stays(
    web, target, monkeypatch, auto_finalize
):
    """When it has nothing to wait for any more before the disk moves."""
    flush, disk = mirror.MirrorJob._flush, web.inventory.disks["web.raw"]

    async def cancelling(job):
        is_flushed = await flush(job)
        if disk.requests.is_drained:
            job.cancel()
        return is_flushed

    async with running(web) as jobs:
        job = await ready(jobs, web, target, auto_finalize=auto_finalize)
        monkeypatch.setattr(mirror.MirrorJob, "_flush", cancelling)
        job.complete()
        if not auto_finalize:
            await until(job, JobStatus.PENDING)
            job.finalize()
        await ended(job)
        web.write("web.raw", b"later")

        assert job.is_cancelled
        assert source_of(web) == str(web.sources["web.raw"])
        assert is_alike(web, web.sources["web.raw"])
        assert nothing_left(web)


@pytest.mark.logs("job web.raw failed")
@pytest.mark.parametrize("place", ["nothing", "another", "directory-gone"])
async def test_a_disk_does_not_move_to_a_file_that_has_left_its_place(
    web, tmpfs_path, place
):
    """The next mount would not find it."""
    target = tmpfs_path / "new" / "copy.raw"
    target.parent.mkdir()
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        target.rename(tmpfs_path / "kept.raw")
        if place == "another":
            target.write_bytes(bytes(3 * MiB))
        elif place == "directory-gone":
            target.parent.rmdir()
        job.complete()
        await ended(job)
        await write(web, b"later")

    if place == "directory-gone":
        # Nor could it be flushed.
        assert job.error == f"{target.parent}: No such file or directory"
    else:
        assert (
            job.error == f"target {target}: is not there any more, or another file is"
        )
    assert source_of(web) == str(web.sources["web.raw"])
    assert is_alike(web, web.sources["web.raw"])
    assert nothing_left(web)


@pytest.mark.parametrize("auto_finalize", [False, True])
async def test_while_the_disk_moves_it_is_too_late_to_cancel(
    web, target, monkeypatch, auto_finalize
):
    gate, move_disk = Gate(None), Inventory.move_disk
    gate.image = SimpleNamespace(move=lambda *args: move_disk(*args))
    stay = gate.hold("move")
    monkeypatch.setattr(Inventory, "move_disk", lambda *args: gate.move(*args))
    async with running(web) as jobs:
        job = await ready(jobs, web, target, auto_finalize=auto_finalize)
        job.complete()
        if not auto_finalize:
            await until(job, JobStatus.PENDING)
            job.finalize()
        await trio.to_thread.run_sync(stay.wait_arrived)
        with pytest.raises(VerbRejected, match="too late"):
            job.cancel()
        with pytest.raises(VerbRejected, match="too late"):
            job.cancel_softly()
        stay.release()
        await ended_well(job)

    assert source_of(web) == str(target)
    assert is_alike(web, target)


# -- what else the disk has


async def test_snapshots_stay_what_they_are(small, target):
    inventory = small.inventory
    small.write("web.raw", clusters("A"), 0)
    old = letters(small.live("web.raw"))
    inventory.create_snapshot("old")
    small.write("web.raw", clusters("B"), CLUSTER)
    async with running(small) as jobs:
        job = await begun(jobs, small, target, **ONE_BY_ONE)
        small.write("web.raw", clusters("C"), 2 * CLUSTER)
        middle = letters(small.live("web.raw"))
        inventory.create_snapshot("middle")
        small.write("web.raw", clusters("DD"), 2 * CLUSTER)
        job.set_speed(0)
        await until_ready(job)
        small.write("web.raw", clusters("E"), 4 * CLUSTER)
        await completed(job)
        assert letters(small.read("old", "web.raw")) == old
        assert letters(small.read("middle", "web.raw")) == middle
        late = letters(small.live("web.raw"))
        inventory.create_snapshot("late")
        small.write("web.raw", clusters("FGHIJK"), 3 * CLUSTER)
        # Nobody needs what the disk has left.
        small.sources["web.raw"].write_bytes(clusters("x" * 16))

    assert letters(small.read("old", "web.raw")) == old
    assert letters(small.read("middle", "web.raw")) == middle
    assert letters(small.read("late", "web.raw")) == late
    for name in "middle", "old", "late":
        inventory.delete_snapshot(name)
    assert inventory.budgets.ram.used == inventory.budgets.disk.used == 0
    small.check_space()


async def test_who_reads_a_snapshot_when_the_disk_moves(small, target, monkeypatch):
    """It reads from the source that the disk leaves, and nobody closes that."""
    inventory = small.inventory
    inventory.create_snapshot("old")
    disk = inventory.disks["web.raw"]
    stay = None
    async with running(small) as jobs, trio.open_nursery() as nursery:
        job = await ready(jobs, small, target, **ONE_BY_ONE)
        gate = Gate(disk.history.source)
        monkeypatch.setattr(disk.history, "source", gate)
        stay = gate.hold("pread")
        found = []

        async def read():
            found.append(await trio.to_thread.run_sync(small.read, "old", "web.raw"))

        nursery.start_soon(read)
        await trio.to_thread.run_sync(stay.wait_arrived)
        await completed(job)
        stay.release()

    assert letters(found[0]) == LETTERS
    assert disk.history.source is disk.source
    assert disk.source.status().st_ino == target.stat().st_ino


async def test_bitmaps_go_on_recording(small, target):
    steps = [
        Add("web.raw", "lasting", granularity=CLUSTER, persistent=True),
        Add("web.raw", "passing", granularity=CLUSTER),
    ]
    small.inventory.change_bitmaps(steps)
    async with running(small) as jobs:
        small.write("web.raw", b"n", 0)
        job = await ready(jobs, small, target, **ONE_BY_ONE)
        small.write("web.raw", b"n", CLUSTER)
        await completed(job)
        small.write("web.raw", b"n", 2 * CLUSTER)

    held = small.inventory.bitmaps.find("web.raw").held
    for name in "lasting", "passing":
        assert list(held[name].bitmap.to_save().search(1)) == [0, 1, 2]
    small.close()
    small.open()
    held = small.inventory.bitmaps.find("web.raw").held
    assert list(held["lasting"].bitmap.to_save().search(1)) == [0, 1, 2]


async def test_a_backup_over_the_move_is_exact(web, content, target, tmpfs_path):
    backup = tmpfs_path / "backup.raw"
    async with running(web) as jobs:
        told = BackupOptions("web.raw", backup, "backup", speed=NEVER)
        (slow,) = await jobs.start_backups([told])
        await wait_for(lambda: slow.progress.current)
        web.write("web.raw", b"1" * 5000, MiB - 100)
        job = await ready(jobs, web, target)
        web.write("web.raw", b"2" * 5000, 2 * MiB - 100)
        await completed(job)
        web.write("web.raw", b"3" * 5000, 3 * MiB - 5000)
        web.write("web.raw", b"4" * 5000, MiB + 1000)
        slow.set_speed(0)
        await ended_well(slow)

        assert backup.read_bytes() == content
        # And what comes after.
        of_then = web.live("web.raw")
        (next_one,) = await jobs.start_backups(
            [BackupOptions("web.raw", tmpfs_path / "next.raw", "next", speed=NEVER)]
        )
        web.write("web.raw", b"5" * MiB, MiB)
        next_one.set_speed(0)
        await ended_well(next_one)

    assert (tmpfs_path / "next.raw").read_bytes() == of_then
    assert nothing_left(web)


@pytest.mark.parametrize("mode", CopyMode)
async def test_a_disk_comes_back_to_where_it_was(web, target, mode):
    source = web.sources["web.raw"]
    async with running(web) as jobs:
        await completed(await ready(jobs, web, target, copy_mode=mode))
        web.write("web.raw", b"there", MiB)
        job = await ready(jobs, web, source, job_id="back", copy_mode=mode)
        web.write("web.raw", b"still", MiB + 10)
        await completed(job)
        there = target.read_bytes()
        web.write("web.raw", b"here", MiB + 20)

    assert source_of(web) == str(source)
    assert is_alike(web, source)
    assert target.read_bytes() == there
    assert there[MiB:][:15] == b"therebbbbbstill"
    assert nothing_left(web)


# -- when it can not move


async def test_while_the_inventory_changes_it_does_not_move(web, target, monkeypatch):
    tries = []
    move_disk = Inventory.move_disk

    def counted(*args):
        tries.append(len(tries))
        move_disk(*args)

    monkeypatch.setattr(Inventory, "move_disk", counted)
    monkeypatch.setattr("fleecefs.inventory._MOVE_SECONDS", 0.002)
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        with web.inventory._control:
            job.complete()
            await wait_for(lambda: len(tries) == 3)
            await write(web, b"meanwhile", MiB)
            assert job.status is JobStatus.READY
            assert source_of(web) == str(web.sources["web.raw"])
            # A move that was tried is no end: it can be cancelled.
            await wait_for(lambda: not job.is_committing)
        await ended_well(job)
        web.write("web.raw", b"later")

    assert source_of(web) == str(target)
    assert is_alike(web, target)
    assert target.read_bytes()[MiB:][:9] == b"meanwhile"


@pytest.mark.logs("job web.raw failed: .*No space left")
@pytest.mark.parametrize("exists", [False, True])
async def test_a_move_that_can_not_be_saved_fails_the_job(
    web, target, monkeypatch, exists
):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        web.write("web.raw", b"before", MiB)
        with monkeypatch.context() as patch:
            patch.setattr(StateDirectory, "save", fail_to_save)
            # It is asked for no more than the move.
            patch.setattr(Inventory, "_save_gone", lambda self: None)
            job.complete()
            await ended(job)
        web.write("web.raw", b"after", MiB + 10)

        assert "No space left" in job.error
        assert source_of(web) == str(web.sources["web.raw"])
        assert web.sources["web.raw"].read_bytes()[MiB:][:15] == b"beforebbbbafter"
        assert target.exists() == exists
        assert nothing_left(web)
    before = web.live("web.raw")
    web.close()
    web.open()
    assert source_of(web) == str(web.sources["web.raw"])
    assert web.live("web.raw") == before


def fail_to_save(self, state):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.logs("No space left")
async def test_what_has_been_saved_counts_though_saving_has_failed(
    web, target, monkeypatch
):
    save = StateDirectory.save

    def saving(self, state):
        save(self, state)
        fail_to_save(self, state)

    async with running(web) as jobs:
        job = await ready(jobs, web, target)
        with monkeypatch.context() as patch:
            patch.setattr(StateDirectory, "save", saving)
            await completed(job)
        web.write("web.raw", b"after")

    assert source_of(web) == str(target)
    assert is_alike(web, target)


async def test_a_clean_end_of_the_mount_cancels_and_forgets(web, target):
    async with running(web) as jobs:
        job = await ready(jobs, web, target)
    web.write("web.raw", b"later")
    assert job.error == "cancelled, as the mount has ended"
    web.close()
    web.open()

    assert not target.exists()
    assert nothing_left(web)
    assert resume_jobs(web.inventory) == []
    assert source_of(web) == str(web.sources["web.raw"])


def test_a_mirror_nobody_ended_goes_with_the_mount(web, target):
    job = create_mirror(web.inventory, wanted(target))
    web.write("web.raw", b"later")
    job._target.close()
    web.close()
    web.open()

    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)
    # It was never used.
    assert not target.exists()


# -- going on


def test_what_is_copied_is_not_copied_again(small, target, monkeypatch):
    async def live(jobs):
        job = await begun(jobs, small, target, **ONE_BY_ONE)
        for _ in range(4):
            job.set_speed(0)
            job.set_speed(NEVER)
            current = job.progress.current
            await wait_for(lambda current=current: job.progress.current > current)
        small.write("web.raw", clusters("n"), CLUSTER)

    dies(small, live)
    small.write("web.raw", clusters("m"), 2 * CLUSTER)
    writes = Writes(monkeypatch)

    async def then(job):
        assert job.describe()["restarts"] == 1
        assert job.limit.speed == NEVER
        assert job.progress.total >= 16 * CLUSTER
        job.set_speed(0)
        await until_ready(job)
        await completed(job)

    goes_on(small, then)
    assert sorted(set(writes.indexes)) == [1, 2, *range(5, 16)]
    assert letters(target.read_bytes()) == "anmdefghijklmnop"
    assert source_of(small) == str(target)
    assert nothing_left(small)


@pytest.mark.parametrize("crashes", [2, 5])
@pytest.mark.parametrize("mode", CopyMode)
def test_it_outlives_many_daemons(web, target, crashes, mode):
    rng = random.Random(crashes)

    async def live(jobs):
        if jobs.all():
            job = jobs.get("web.raw")
            await wait_for(lambda: job.progress.remaining < 3 * MiB)
        else:
            await begun(jobs, web, target, copy_mode=mode)
        await write(web, rng.randbytes(9000), rng.randrange(3 * MiB - 9000))

    for _ in range(crashes):
        dies(web, live)
        web.write("web.raw", rng.randbytes(9000), rng.randrange(3 * MiB - 9000))

    async def then(job):
        job.set_speed(0)
        await until_ready(job)
        await completed(job)

    job = goes_on(web, then)
    assert job.restarts == crashes
    assert is_alike(web, target)
    assert source_of(web) == str(target)


@pytest.mark.parametrize("mode", CopyMode)
def test_who_was_ready_is_ready_at_once(web, target, mode):
    async def live(jobs):
        job = await ready(jobs, web, target, copy_mode=mode)
        job.set_speed(NEVER)

    dies(web, live)
    web.write("web.raw", b"n" * (3 * MiB))

    async def then(job):
        await until_ready(job)
        # Though there is more to copy than may be by now.
        await wait_for(lambda: job.progress.remaining)
        assert not is_synced(job)
        assert len(events(web, "BLOCK_JOB_READY")) == 1
        job.set_speed(0)
        await wait_for(lambda: is_alike(web, target))
        if mode is WRITE_BLOCKING:
            await until_synced(job)
            web.write("web.raw", b"m", MiB)
            assert is_alike(web, target)
        await completed(job)

    goes_on(web, then)
    assert source_of(web) == str(target)
    assert statuses(web)[:3] == ["created", "running", "ready"]


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.NONE])
@pytest.mark.parametrize("ending", ["complete", "cancel_softly"])
def test_what_it_was_told_it_still_does(web, target, ending, sync):
    # What lacks nothing by then may be kept, also if only new writes come to it.
    target.write_bytes(bytes(3 * MiB) if ending == "complete" else web.live("web.raw"))

    async def live(jobs):
        job = await ready(jobs, web, target, sync=sync)
        getattr(job, ending)()

    dies(web, live)
    web.write("web.raw", b"between")
    goes_on(web)

    source = web.sources["web.raw"]
    assert source_of(web) == str(target if ending == "complete" else source)
    assert is_alike(web, target)
    (event,) = events(web, "BLOCK_JOB_COMPLETED")
    assert "error" not in event
    assert nothing_left(web)


def test_its_copy_mode_is_the_last_one(small, target):
    async def live(jobs):
        job = await ready(jobs, small, target, **ONE_BY_ONE)
        job.change(WRITE_BLOCKING)

    dies(small, live)

    async def then(job):
        await until_synced(job)
        small.write("web.raw", clusters("n"), 5 * CLUSTER)
        assert is_alike(small, target)

    goes_on(small, then)


def test_what_comes_while_a_daemon_that_followed_is_dead(small, target):
    """All that was not answered by then, and all before jobs go on."""

    async def live(jobs):
        options = {"copy_mode": WRITE_BLOCKING, **ONE_BY_ONE}
        await until_synced(await ready(jobs, small, target, **options))
        small.write("web.raw", clusters("n"), 5 * CLUSTER)

    dies(small, live)
    assert letters(target.read_bytes()) == "abcdenghijklmnop"
    small.write("web.raw", clusters("m"), 6 * CLUSTER)
    assert letters(target.read_bytes()) == "abcdenghijklmnop"

    async def then(job):
        await until_synced(job)
        assert is_alike(small, target)

    goes_on(small, then)


@pytest.mark.parametrize("was_ready", [False, True])
def test_a_paused_job_is_still_paused(web, target, was_ready):
    rest = JobStatus.STANDBY if was_ready else JobStatus.PAUSED

    async def live(jobs):
        job = await begun(jobs, web, target)
        if was_ready:
            job.set_speed(0)
            await until_ready(job)
        job.pause()
        await until(job, rest)

    dies(web, live)
    web.write("web.raw", b"between")

    async def then(job):
        await until(job, rest)
        assert job.is_user_paused
        job.set_speed(0)
        job.resume()
        await until_ready(job)
        await wait_for(lambda: is_alike(web, target))

    goes_on(web, then)


def test_who_stopped_for_an_error_is_still_paused(small, target, monkeypatch):
    async def live(jobs):
        bad = Breaking(monkeypatch, Target, "write")
        bad.fail(code=errno.ENOSPC)
        job = await start(jobs, small, target, on_target_error=STOP, **ONE_BY_ONE)
        await until(job, JobStatus.PAUSED)

    dies(small, live)
    small.write("web.raw", clusters("n"), 5 * CLUSTER)

    async def then(job):
        await until(job, JobStatus.PAUSED)
        assert (job.is_user_paused, job.io_status) == (True, "nospace")
        job.resume()
        await until_ready(job)
        assert job.io_status == "ok"
        assert is_alike(small, target)

    goes_on(small, then)


@pytest.mark.parametrize("mode", CopyMode)
def test_a_restart_of_the_daemon_is_no_pause(small, target, mode):
    async def live(jobs):
        await ready(jobs, small, target, copy_mode=mode, **ONE_BY_ONE)
        await jobs.rest()
        small.write("web.raw", clusters("n"), 5 * CLUSTER)

    dies(small, live)
    assert letters(target.read_bytes()) == LETTERS

    async def then(job):
        await until_ready(job)
        await wait_for(lambda: is_alike(small, target))
        await completed(job)

    goes_on(small, then)


@pytest.mark.parametrize("exists", [False, True])
def test_cancelled_under_the_next_daemon(web, target, exists):
    if exists:
        target.write_bytes(bytes(3 * MiB))
    dies(web, lambda jobs: begun(jobs, web, target))

    async def then(job):
        job.cancel()
        await ended(job)

    job = goes_on(web, then)
    assert job.is_cancelled
    assert target.exists() == exists
    assert nothing_left(web)


def test_a_cancelled_job_does_not_come_back(web, target):
    async def live(jobs):
        job = await ready(jobs, web, target)
        job.cancel()

    dies(web, live)
    job = goes_on(web, ended)

    assert job.is_cancelled
    assert not target.exists()
    assert nothing_left(web)


@pytest.mark.parametrize("sync", [Sync.TOP, Sync.NONE])
def test_a_part_of_a_disk_goes_on(holey, target, sync):
    target.write_bytes(clusters("o" * 16))

    async def live(jobs):
        options = {"sync": sync, **ONE_BY_ONE}
        job = await start(jobs, holey, target, speed=NEVER, **options)
        holey.write("web.raw", clusters("n"), 3 * CLUSTER)
        await wait_for(lambda: job.progress.current)

    dies(holey, live)
    holey.write("web.raw", clusters("m"), 4 * CLUSTER)

    async def then(job):
        job.set_speed(0)
        await until_ready(job)
        job.cancel_softly()
        await ended_well(job)

    goes_on(holey, then)
    found = "ab.nm.c.ef......" if sync is Sync.TOP else "ooonmooooooooooo"
    assert letters(target.read_bytes()) == found


def test_killed_before_all_that_is_allocated_is_known_it_looks_again(holey, target):
    async def live(jobs):
        find_data = RawImage.find_data

        def dying(image, offset):
            if offset == 2 * CLUSTER:
                os.kill(os.getpid(), signal.SIGKILL)
            return find_data(image, offset)

        RawImage.find_data = dying
        await ready(jobs, holey, target, sync=Sync.TOP, granularity=CLUSTER)

    dies(holey, live)
    goes_on(holey, until_ready)

    assert letters(holey.live("web.raw")) == "ab....c.ef......"


def test_pending_it_outlives_the_daemon(web, target):
    async def live(jobs):
        job = await ready(jobs, web, target, auto_finalize=False)
        job.complete()
        await until(job, JobStatus.PENDING)

    dies(web, live)
    web.write("web.raw", b"between")

    async def then(job):
        await until(job, JobStatus.PENDING)
        assert source_of(web) == str(web.sources["web.raw"])
        job.finalize()
        await ended_well(job)

    goes_on(web, then)
    assert source_of(web) == str(target)
    assert is_alike(web, target)


@pytest.mark.parametrize("told", ["old", "new", "link"])
@pytest.mark.parametrize("point", ["move.saved", "move.done", "mirror.forgotten"])
def test_killed_after_the_disk_has_moved_it_has_moved(web, target, point, told):
    async def live(jobs):
        job = await ready(jobs, web, target)
        web.write("web.raw", b"before", MiB)
        await completed(job)

    old = web.sources["web.raw"]
    if told == "new":
        web.sources["web.raw"] = target
    elif told == "link":
        web.sources["web.raw"] = old.with_name("link")
        web.sources["web.raw"].symlink_to(target)
    dies(web, live_at(old, web, live), point)
    left = old.read_bytes()
    web.write("web.raw", b"after", MiB + 10)

    assert left[MiB:][:6] == b"before"
    assert target.read_bytes()[MiB:][:15] == b"beforebbbbafter"
    assert is_alike(web, target)
    assert old.read_bytes() == left
    if point != "mirror.forgotten":
        job = goes_on(web)
        assert job.describe()["moved"]
        assert job.restarts == 1
        (event,) = events(web, "BLOCK_JOB_COMPLETED")
        assert "error" not in event
    else:
        assert resume_jobs(web.inventory) == []
    web.write("web.raw", b"later", MiB + 20)
    assert old.read_bytes() == left
    assert is_alike(web, target)
    assert nothing_left(web)


def live_at(old, host, live):
    """The daemon that is killed lives where the disk was, whatever is told later."""
    assert host.live("web.raw") == old.read_bytes()
    return live


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("point", ["mirror.begun", "mirror.saved", "mirror.created"])
def test_killed_when_it_is_created_it_is_there_or_was_never(
    small, target, point, exists
):
    if exists:
        target.write_bytes(clusters("o" * 16))
    dies(small, lambda jobs: ready(jobs, small, target), point)
    small.write("web.raw", clusters("n"), 0)

    if point == "mirror.begun":
        assert resume_jobs(small.inventory) == []
        assert target.exists() == exists
        if exists:
            assert letters(target.read_bytes()) == "o" * 16
    else:

        async def then(job):
            await until_ready(job)
            await completed(job)

        goes_on(small, then)
        assert is_alike(small, target)
    assert nothing_left(small)


@pytest.mark.parametrize("is_ready", [False, True])
def test_no_job_survives_the_host(web, content, target, is_ready):
    async def live(jobs):
        job = await begun(jobs, web, target)
        if is_ready:
            job.set_speed(0)
            await until_ready(job)

    dies(web, live)
    web.write("web.raw", b"later")
    before = web.live("web.raw")
    web.crash()
    web.reboot()
    web.open()

    assert resume_jobs(web.inventory) == []
    assert source_of(web) == str(web.sources["web.raw"])
    assert web.live("web.raw") == before
    assert nothing_left(web)
    # Nobody shall take it for a copy.
    assert not target.exists()
    move(web, target)
    assert is_alike(web, target)


def test_what_was_known_before_the_host_went_down_is_not_used(web, target):
    """It may never have come to a disk that has a runtime directory."""
    dies(web, lambda jobs: begun(jobs, web, target))
    web.crash()
    web._boot()
    web.open()

    assert list(web.runtime.glob("*/jobs/*.dirty"))
    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)


@pytest.mark.parametrize("point", ["move.saved", "move.done", None])
def test_a_move_survives_the_host(web, target, point):
    async def live(jobs):
        await completed(await ready(jobs, web, target))

    dies(web, live, point)
    web.write("web.raw", b"later")
    web.crash()
    web.reboot()
    web.open()

    assert source_of(web) == str(target)
    assert web.live("web.raw")[:5] == b"later"
    if point is not None:
        goes_on(web)
    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)


@pytest.mark.logs("failed: target .*copy.raw: No such file")
@pytest.mark.parametrize("is_ready", [False, True])
def test_a_target_that_is_gone_fails_the_job(web, target, is_ready):
    async def live(jobs):
        job = await begun(jobs, web, target)
        if is_ready:
            job.set_speed(0)
            await until_ready(job)
            job.complete()

    dies(web, live)
    target.unlink()
    web.write("web.raw", b"later")
    job = goes_on(web, ended)

    assert "copy.raw" in job.error
    assert source_of(web) == str(web.sources["web.raw"])
    assert web.sources["web.raw"].read_bytes() == web.live("web.raw")
    assert nothing_left(web)


@pytest.mark.logs("failed: target .*copy.raw: has 1 bytes")
def test_a_target_that_became_another_fails_the_job(web, target):
    dies(web, lambda jobs: begun(jobs, web, target))
    target.write_bytes(b"1")
    job = goes_on(web, ended)

    assert "has 1 bytes" in job.error
    assert nothing_left(web)


@pytest.mark.logs("job web.raw failed")
def test_a_disk_does_not_move_to_a_file_that_has_taken_the_place(web, target):
    """One of the same size, which has not what the daemon before has copied."""
    content = web.live("web.raw")
    dies(web, lambda jobs: ready(jobs, web, target))
    target.rename(target.with_name("kept.raw"))
    target.write_bytes(bytes(3 * MiB))

    async def then(job):
        await wait_for(lambda: job.status is JobStatus.READY or job.is_over)
        if not job.is_over:
            job.complete()
        await ended(job)

    job = goes_on(web, then)
    assert web.live("web.raw") == content
    if job.error is not None:
        assert source_of(web) == str(web.sources["web.raw"])
    assert nothing_left(web)


@pytest.mark.logs("does not go on")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "fleecefs-job"}'])
def test_a_damaged_record_is_the_end_of_its_job(web, target, text):
    dies(web, lambda jobs: begun(jobs, web, target))
    (path,) = (web.state / "jobs").glob("*.json")
    path.write_text(text)

    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)


def test_without_its_record_a_mirror_is_forgotten(web, target):
    dies(web, lambda jobs: begun(jobs, web, target))
    shutil.rmtree(web.state / "jobs")
    web.crash()
    web.open()

    assert not web.inventory.mirrors
    assert web.inventory.disks["web.raw"].mirror is None
    assert json.loads((web.state / "state.json").read_text())["mirrors"] == []


@pytest.mark.parametrize("what", ["content", "bits"])
def test_of_what_is_not_known_any_more_nothing_goes_on(web, target, what):
    dies(web, lambda jobs: begun(jobs, web, target))
    web.crash()
    if what == "content":
        source = web.sources["web.raw"]
        data = source.read_bytes()
        source.rename(source.with_name("kept"))
        source.write_bytes(data)
    else:
        next(web.runtime.glob("*/jobs/*.copying")).unlink()
    web.open()

    assert resume_jobs(web.inventory) == []
    assert nothing_left(web)
    move(web, target)
    assert is_alike(web, target)


def test_a_disk_that_is_not_mounted_any_more_has_no_mirror(host, target):
    host.add("web.raw", clusters(LETTERS))
    host.add("db.raw", clusters("d"))
    host.open()
    dies(host, lambda jobs: begun(jobs, host, target))
    host.crash()
    host.open(["db.raw"])

    with contextlib.suppress(NotFound):
        assert resume_jobs(host.inventory) == []
    assert not host.inventory.mirrors


# -- killed anywhere


STORIES = [
    pytest.param(Sync.FULL, BACKGROUND, "complete", id="complete"),
    pytest.param(Sync.FULL, WRITE_BLOCKING, "complete", id="complete-blocking"),
    pytest.param(Sync.FULL, BACKGROUND, "cancel_softly", id="keep"),
    pytest.param(Sync.FULL, WRITE_BLOCKING, "cancel_softly", id="keep-blocking"),
    pytest.param(Sync.NONE, BACKGROUND, "complete", id="none"),
]


@pytest.mark.parametrize(("sync", "mode", "ending"), STORIES)
@pytest.mark.logs("job")
def test_killed_at_any_point_nothing_is_lost(
    tmpfs_path, monkeypatch, sync, mode, ending, caplog
):
    """The disk lives on one side or on the other, with every write that was told."""
    stride = 1 if "FLEECEFS_EXAMPLES" in os.environ else 5
    first = 1 + 2 * list(CopyMode).index(mode) + (ending == "complete")
    told = {"sync": sync, "copy_mode": mode}
    points = set()
    for nth in itertools.count(first, stride):
        directory = tmpfs_path / str(nth)
        directory.mkdir()
        host = Host(directory, monkeypatch)
        point = live_and_die(host, directory / "copy.raw", nth, ending, **told)
        host.end()
        shutil.rmtree(directory)
        caplog.clear()
        if point is None:
            break
        points.add(point)
    assert len(points) > 5


def live_and_die(host, target, nth, ending, **told):
    source = host.add("web.raw", clusters(LETTERS))
    host.open()
    host.inventory.create_snapshot("old")

    async def live():
        async with running(host) as jobs:
            job = await start(jobs, host, target, speed=NEVER, **told, **ONE_BY_ONE)
            host.write("web.raw", clusters("A"), 0)
            await wait_for(lambda: job.progress.current)
            await write(host, clusters("B"), 5 * CLUSTER)
            job.set_speed(0)
            await until_ready(job)
            host.write("web.raw", clusters("CD"), 9 * CLUSTER)
            getattr(job, ending)()
            await ended_well(job)
            await write(host, clusters("E"), 12 * CLUSTER)

    point = killed_at(nth, trio.run, live)
    host.crash()
    host.open()
    # One at a time, as written; the last of them may not have been answered.
    found = letters(host.live("web.raw"))
    assert found in (
        LETTERS,
        "Abcdefghijklmnop",
        "AbcdeBghijklmnop",
        "AbcdeBghiCDlmnop",
        "AbcdeBghiCDlEnop",
    ), found
    host.write("web.raw", clusters("F"), 13 * CLUSTER)
    live = host.live("web.raw")
    host.write("web.raw", b"F", 13 * CLUSTER)
    moved = source_of(host) == str(target)
    job = trio.run(go_on, host, ending)
    if job is not None:
        assert job.error is None, job.error
        moved = ending == "complete"
        if not moved:
            assert target.read_bytes() == live
    assert source_of(host) == str(target if moved else source)
    assert host.live("web.raw") == live
    assert letters(host.read("old", "web.raw")) == LETTERS
    host.write("web.raw", clusters("G"), 14 * CLUSTER)
    assert is_alike(host, target if moved else source)
    assert nothing_left(host)
    host.close()
    return point


async def go_on(host, ending):
    async with running(host) as jobs:
        if not jobs.all():
            return None
        job = jobs.get("web.raw")
        job.set_speed(0)
        if job._ending is None and not job._has_moved:
            await until_ready(job)
            getattr(job, ending)()
        await ended(job)
        return job
