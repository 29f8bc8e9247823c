"""Backups that use dirty bitmaps: what they copy, and what the bitmap has afterwards.

The table is QEMU's. A job ends in every way there is, while the guest goes on, and the
next one has to find what is missing on the target, in the bitmap and nowhere else.
"""

import errno
import itertools
import os
import random
import shutil
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import trio

from fleecefs.bitmaps.steps import (
    Add,
    Clear,
    Copy,
    Disable,
    Enable,
    Merge,
    Remove,
    Set,
)
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import Busy, NotFound, NotUsable, Unsupported
from fleecefs.inventory import Inventory
from fleecefs.jobs import backup, copy
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BitmapMode, Format, Sync
from fleecefs.jobs.resume import resume_jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import Target
from fleecefs.units import KiB, MiB
from tests.jobs.test_backup import (
    NEVER,
    die,
    ended,
    go_on,
    go_on_quickly,
    hook,
    nothing_left,
    records,
    running,
    running_until_killed,
    start,
    wanted,
)
from tests.support.copying import wait_for
from tests.support.disks import clusters, letters
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.host import CLUSTER, Host
from tests.support.killed import killed_at
from tests.support.qemu import check_code, qemu_img, require_qemu

ON_SUCCESS, NEVER_ANEW, ALWAYS = BitmapMode

# Which bitmap and which mode; what is as in QEMU is not told.
INCREMENT = {"sync": Sync.INCREMENTAL, "bitmap": "b"}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Wait for nothing as long as people would."""
    monkeypatch.setattr(copy, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(backup, "_CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(backup, "_LAST_SECONDS", 0.5)


def bitmap_of(host, name="b", disk="web.raw"):
    return host.inventory.bitmaps.find(disk).held[name].bitmap


def dirty(host, name="b", disk="web.raw"):
    """Return which bits of a bitmap are set."""
    bitmap = bitmap_of(host, name, disk)
    assert not bitmap.bits[bitmap.bit_count :].any()
    return set(bitmap.to_save().search(1))


def add(host, name="b", disk="web.raw", **options):
    options.setdefault("granularity", CLUSTER)
    host.inventory.change_bitmaps([Add(disk, name, **options)])


def chunks_of(monkeypatch, size):
    """Let jobs copy so much at a time."""
    monkeypatch.setattr(copy, "CHUNK_SIZE_MAX", size)


async def begun(jobs, *options, **more):
    """Start a backup that rests when it has copied a chunk."""
    (job,) = await start(jobs, wanted(*options, speed=NEVER, **more))
    await wait_for(lambda: job.progress.current)
    return job


async def finished(jobs, *options, **more):
    """Do a backup that ends well."""
    (job,) = await start(jobs, wanted(*options, **more))
    await ended(job)
    assert job.error is None, job.error
    return job


def finish(host, *options, **more):
    async def run():
        async with running(host) as jobs:
            return await finished(jobs, *options, **more)

    return trio.run(run)


# -- the table


class Shape(NamedTuple):
    """A disk of 16 units, the last one cut by the end of the disk."""

    granularity: int
    cluster_size: int = CLUSTER
    unit: int = CLUSTER

    @property
    def size(self):
        return 16 * self.unit - 100

    def bits(self, extents):
        """Return the bits of a bitmap that extents have in common with it."""
        found = set()
        for offset, length in extents:
            first = offset // self.granularity
            found |= set(range(first, -(-(offset + length) // self.granularity)))
        return found

    def part(self, unit):
        """Return some bytes in a unit, the very last one of the disk in its last."""
        return (self.size - 1, 1) if unit == 15 else (unit * self.unit + 700, 100)

    def clusters(self, indexes):
        """Return the extents of clusters."""
        size = self.cluster_size
        return [(i * size, min(size, self.size - i * size)) for i in indexes]


SHAPES = [
    pytest.param(Shape(512), id="512"),
    pytest.param(Shape(4 * KiB), id="4K"),
    pytest.param(Shape(64 * KiB, unit=64 * KiB), id="64K"),
    pytest.param(Shape(1 * MiB, unit=256 * KiB), id="1M"),
    pytest.param(Shape(4 * KiB, 64 * KiB, unit=64 * KiB), id="4K-of-64K-clusters"),
]

MODES = [
    pytest.param(Sync.INCREMENTAL, None, id="incremental"),
    *(
        pytest.param(Sync.BITMAP, mode, id=f"bitmap-{mode.value}")
        for mode in BitmapMode
    ),
    *(
        pytest.param(sync, mode, id=f"{sync.value}-{mode.value}")
        for sync in (Sync.FULL, Sync.TOP)
        for mode in (ON_SUCCESS, ALWAYS)
    ),
]

# For ends that have to do with what becomes of bits in files, not with their size.
FEW = [SHAPES[0], SHAPES[-1]]

OLD, NEW = (2, 3, 9, 13, 15), (3, 9, 12)


class Story:
    """A disk with a bitmap, a target that was like it, and a job in the middle."""

    def __init__(self, host, target, shape, sync, mode, **mounted):
        self.host, self.target, self.shape = host, target, shape
        self.sync, self.mode = sync, mode
        base = random.Random(1).randbytes(shape.size)
        host.add("web.raw", base)
        host.open(cluster_size=shape.cluster_size, **mounted)
        self.mounted = {"cluster_size": shape.cluster_size, **mounted}
        target.write_bytes(base)
        add(host, granularity=shape.granularity)
        self.write(OLD, b"o")
        self.instant = host.live("web.raw")
        self.snapshot = None

    def write(self, units, letter):
        for unit in units:
            offset, length = self.shape.part(unit)
            self.host.write("web.raw", letter * length, offset)

    @property
    def options(self):
        return {
            "sync": self.sync,
            "bitmap": "b",
            "bitmap_mode": self.mode,
            "workers": 1,
        }

    async def begin(self, jobs):
        job = await begun(jobs, self.target, **self.options)
        self.snapshot = job._private.snapshot
        return job

    def bits(self, units):
        return self.shape.bits(self.shape.part(unit) for unit in units)

    def left(self):
        """Return the clusters that were not copied; the others are."""
        count = -(-self.shape.size // self.shape.cluster_size)
        left = set((~self.snapshot.epoch.denied[:count]).search(1))
        found = self.target.read_bytes()
        for offset, length in self.shape.clusters(set(range(count)) - left):
            at = slice(offset, offset + length)
            assert found[at] == self.instant[at], offset
        return left

    def check_success(self):
        assert self.target.read_bytes() == self.instant
        has_begun_anew = self.mode is not NEVER_ANEW
        wanted = self.bits(NEW) | (set() if has_begun_anew else self.bits(OLD))
        assert dirty(self.host) == wanted

    def check_failure(self, *, has_kept=True):
        wanted = self.bits(NEW) | self.bits(OLD)
        if self.mode is ALWAYS and has_kept:
            left = self.left()
            assert left
            wanted = self.bits(NEW) | self.shape.bits(self.shape.clusters(left))
        elif self.mode is ALWAYS and not self.sync.is_of_bitmap:
            wanted = self.shape.bits([(0, self.shape.size)])
        assert dirty(self.host) == wanted

    def check_next(self):
        """What is missing comes with the next increment."""
        assert not bitmap_of(self.host).busy
        assert nothing_left(self.host)
        finish(self.host, self.target, job_id="next", **INCREMENT)
        assert self.target.read_bytes() == self.host.live("web.raw")
        assert dirty(self.host) == set()


@pytest.fixture(params=SHAPES)
def shape(request, monkeypatch):
    shape = request.param
    chunks_of(monkeypatch, max(2 * shape.cluster_size, shape.unit // 2))
    return shape


@pytest.mark.parametrize(("sync", "mode"), MODES)
def test_after_success(host, target, shape, sync, mode):
    story = Story(host, target, shape, sync, mode)

    async def run():
        async with running(host) as jobs:
            job = await story.begin(jobs)
            story.write(NEW, b"n")
            assert bitmap_of(host).busy
            job.set_speed(0)
            await ended(job)
            assert job.error is None

    trio.run(run)

    story.check_success()
    story.check_next()


async def fail_target(job):
    hook(job, Faulty, on="pwrite")
    job.set_speed(0)


async def fail_source(job):
    def fail(buffer, offset):
        raise OSError(errno.EIO, "injected into read_into")

    job._private.snapshot.read_into = fail
    job.set_speed(0)


async def cancel(job):
    job.cancel()


async def cancel_paused(job):
    job.pause()
    await wait_for(lambda: job.status is JobStatus.PAUSED)
    job.cancel()


@pytest.mark.parametrize(("sync", "mode"), MODES)
@pytest.mark.parametrize("end", [fail_target, fail_source, cancel, cancel_paused])
@pytest.mark.logs("injected into")
def test_after_failure(host, target, shape, sync, mode, end):
    story = Story(host, target, shape, sync, mode)

    async def run():
        async with running(host) as jobs:
            job = await story.begin(jobs)
            story.write(NEW, b"n")
            await end(job)
            await ended(job)
            assert job.error is not None

    trio.run(run)

    story.check_failure()
    story.check_next()


@pytest.mark.parametrize("shape", FEW, indirect=True)
@pytest.mark.parametrize(("sync", "mode"), MODES)
@pytest.mark.parametrize("dies", [False, True], ids=["", "dies-too"])
@pytest.mark.logs("its snapshot is broken")
def test_after_the_snapshot_broke(host, target, shape, sync, mode, dies, monkeypatch):
    story = Story(host, target, shape, sync, mode, ram_limit=0, store_limit=0)
    if dies:
        monkeypatch.setattr(Job, "fail", lambda self, error: None)

    async def run():
        async with running_until_killed(host) as jobs:
            job = await story.begin(jobs)
            story.write(NEW, b"n")
            if not dies:
                await ended(job)

    trio.run(run)
    if dies:
        die(host)
        host.open(**story.mounted)
        assert trio.run(go_on, host).error.startswith("its snapshot is broken")

    # What was copied, the daemon that saw it break was the last to know.
    story.check_failure(has_kept=not dies)
    story.check_next()


def begin_and_die(story):
    async def begin():
        async with running_until_killed(story.host) as jobs:
            await story.begin(jobs)
            story.write(NEW[:2], b"n")

    trio.run(begin)
    die(story.host)


@pytest.mark.parametrize("shape", FEW, indirect=True)
@pytest.mark.parametrize(("sync", "mode"), MODES)
def test_after_the_daemon_died_and_the_job_went_on(host, target, shape, sync, mode):
    story = Story(host, target, shape, sync, mode)
    begin_and_die(story)
    host.open(**story.mounted)
    story.write(NEW[2:], b"n")
    assert bitmap_of(host).busy
    job = trio.run(go_on_quickly, host)

    assert job.error is None
    story.check_success()
    story.check_next()


@pytest.mark.parametrize("shape", FEW, indirect=True)
@pytest.mark.parametrize(("sync", "mode"), MODES)
@pytest.mark.logs("failed: target .*: No such file")
def test_after_the_daemon_died_and_the_target_is_gone(host, target, shape, sync, mode):
    story = Story(host, target, shape, sync, mode)
    begin_and_die(story)
    away = target.rename(target.with_suffix(".away"))
    host.open(**story.mounted)
    story.write(NEW[2:], b"n")
    job = trio.run(go_on, host)
    away.rename(target)

    assert "No such file" in job.error
    story.check_failure(has_kept=False)
    story.check_next()


@pytest.mark.parametrize("shape", FEW, indirect=True)
@pytest.mark.parametrize(("sync", "mode"), MODES)
@pytest.mark.logs("the host went down")
def test_after_a_crash_of_the_host(host, target, shape, sync, mode):
    story = Story(host, target, shape, sync, mode)
    begin_and_die(story)
    host.reboot()
    host.open(**story.mounted)
    story.write(NEW[2:], b"n")
    job = trio.run(go_on, host)

    assert "the host went down" in job.error
    # It was written in the one area of the log that there is.
    assert dirty(host) == shape.bits([(0, shape.size)])
    story.check_next()


@pytest.mark.parametrize("shape", FEW, indirect=True)
@pytest.mark.parametrize(("sync", "mode"), MODES)
def test_after_the_end_of_the_mount(host, target, shape, sync, mode):
    story = Story(host, target, shape, sync, mode)

    async def run():
        async with running(host) as jobs:
            await story.begin(jobs)
            story.write(NEW, b"n")

    trio.run(run)
    host.close()
    host.open(**story.mounted)

    story.check_failure()
    story.check_next()


# -- what counts as copied


@pytest.fixture
def web(host, monkeypatch):
    """A disk with clusters `a` to `p`, of which some are dirty, and small chunks."""
    chunks_of(monkeypatch, 2 * CLUSTER)
    host.add("web.raw", clusters("abcdefghijklmnop"))
    host.open()
    add(host)
    for cluster, letter in {1: "B", 2: "C", 6: "G", 15: "P"}.items():
        host.write("web.raw", clusters(letter), cluster * CLUSTER)
    return host


def filled(target, text="abcdefghijklmnop"):
    target.write_bytes(clusters(text))
    return target


async def test_only_what_is_dirty_is_written(web, target):
    filled(target, "................")
    async with running(web) as jobs:
        job = await finished(jobs, target, **INCREMENT)

    assert letters(target.read_bytes()) == ".BC...G........P"
    assert (job.progress.current, job.progress.remaining) == (4 * CLUSTER, 0)


def fail_flushes(job, nth, *, count=1):
    hook(job, Faulty, on="flush", nth=nth, count=count)


@pytest.mark.logs("nothing counts as copied|failed: injected into flush")
@pytest.mark.parametrize("sync", [Sync.BITMAP, Sync.FULL])
@pytest.mark.parametrize("exists", [False, True])
async def test_what_could_not_be_flushed_is_not_copied(web, target, sync, exists):
    """The kernel tells once that it has lost something; the next flush succeeds."""
    if exists:
        filled(target)
    async with running(web) as jobs:
        options = {"sync": sync, "bitmap": "b", "bitmap_mode": ALWAYS}
        job = await begun(jobs, target, **options)
        fail_flushes(job, 1)
        job.set_speed(0)
        await ended(job)

        assert "injected into flush" in job.error
    is_all = sync is Sync.FULL
    assert dirty(web) == (set(range(16)) if is_all else {1, 2, 6, 15})
    # A file that the job has made holds nothing that counts.
    assert target.exists() == exists


@pytest.mark.logs("nothing counts as copied: injected into flush")
async def test_a_flush_that_fails_when_it_is_cancelled_keeps_nothing(web, target):
    async with running(web) as jobs:
        job = await begun(
            jobs, filled(target), sync=Sync.BITMAP, bitmap="b", bitmap_mode=ALWAYS
        )
        fail_flushes(job, 1)
        job.cancel()
        await ended(job)

    assert dirty(web) == {1, 2, 6, 15}


@pytest.mark.logs("nothing counts as copied: the target does not answer")
async def test_a_flush_that_hangs_when_it_is_cancelled_keeps_nothing(web, target):
    async with running(web) as jobs:
        job = await begun(
            jobs, filled(target), sync=Sync.BITMAP, bitmap="b", bitmap_mode=ALWAYS
        )
        stay = hook(job, Gate).hold("flush")
        job.cancel()
        await ended(job)
        stay.release()

    assert dirty(web) == {1, 2, 6, 15}


@pytest.mark.logs("nothing counts as copied: an earlier flush")
async def test_cancelled_while_it_flushes_it_has_kept_nothing(web, target):
    """Whether that flush has failed, nobody gets to know."""
    async with running(web) as jobs:
        job = await begun(
            jobs, filled(target), sync=Sync.BITMAP, bitmap="b", bitmap_mode=ALWAYS
        )
        stay = hook(job, Gate).hold("flush")
        job.set_speed(0)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await ended(job)
        stay.release()

    assert dirty(web) == {1, 2, 6, 15}


@pytest.mark.logs("nothing counts as copied|failed: injected into flush")
def test_the_next_daemon_does_not_trust_a_flush_either(web, target, monkeypatch):
    filled(target)

    async def begin():
        async with running_until_killed(web) as jobs:
            job = await begun(
                jobs, target, sync=Sync.BITMAP, bitmap="b", bitmap_mode=ALWAYS
            )
            fail_flushes(job, 1)
            patch.setattr(job, "abort", trio.sleep_forever)
            job.set_speed(0)
            await wait_for(lambda: job.status is JobStatus.ABORTING)

    with pytest.MonkeyPatch.context() as patch:
        trio.run(begin)
    die(web)
    web.open()
    trio.run(go_on, web)

    assert dirty(web) == {1, 2, 6, 15}


# -- what is read, preserved and punched


async def test_what_is_clean_is_not_read(web, target, monkeypatch):
    seen = set()
    read_into = Snapshot.read_into

    def reading(self, buffer, offset):
        seen.update(range(offset // CLUSTER, -(-(offset + len(buffer)) // CLUSTER)))
        read_into(self, buffer, offset)

    monkeypatch.setattr(Snapshot, "read_into", reading)
    monkeypatch.setattr(Target, "clone", Mock(side_effect=Unsupported("not here")))
    async with running(web) as jobs:
        await finished(jobs, filled(target), **INCREMENT)

    assert seen == {1, 2, 6, 15}


async def test_what_is_clean_is_not_preserved(web, target):
    async with running(web) as jobs:
        job = await begun(jobs, filled(target), **INCREMENT)
        history = web.inventory.disks["web.raw"].history
        copied = history.copied
        web.write("web.raw", clusters("xxx"), 3 * CLUSTER)
        # Released already.
        web.write("web.raw", clusters("xx"), CLUSTER)
        assert history.copied == copied
        web.write("web.raw", clusters("x"), 6 * CLUSTER)
        assert history.copied == copied + CLUSTER
        assert job.details()["cost"]["waited"] == 1
        job.set_speed(0)
        await ended(job)

    assert letters(target.read_bytes()) == "aBCdefGhijklmnoP"


def test_who_dies_before_it_is_restricted_copies_no_more(web, target, monkeypatch):
    filled(target, "................")
    monkeypatch.setattr(backup.BackupJob, "restrict", fail_once(monkeypatch))
    with pytest.raises(KeyboardInterrupt):
        create_backups(web.inventory, [wanted(target, **INCREMENT)])
    die(web)
    web.open()
    job = trio.run(go_on, web)

    assert job.error is None
    assert letters(target.read_bytes()) == ".BC...G........P"


def fail_once(monkeypatch):
    restrict = backup.BackupJob.restrict

    def restricting(self):
        monkeypatch.setattr(backup.BackupJob, "restrict", restrict)
        raise KeyboardInterrupt

    return restricting


async def test_space_that_can_not_be_given_back_is_no_reason_to_fail(
    web, target, monkeypatch
):
    restrict = Snapshot.restrict

    def failing(self, wanted):
        restrict(self, wanted)
        raise OSError(errno.EIO, "no punching here")

    monkeypatch.setattr(Snapshot, "restrict", failing)
    async with running(web) as jobs:
        await finished(jobs, filled(target), **INCREMENT)

    assert letters(target.read_bytes()) == "aBCdefGhijklmnoP"


@pytest.mark.parametrize("format", Format)
async def test_holes_and_zeroes_are_punched(web, tmpfs_path, format):
    disk = web.inventory.disks["web.raw"]
    disk.discard(2 * CLUSTER, 4 * CLUSTER)
    web.write("web.raw", bytes(CLUSTER), 9 * CLUSTER)
    previous, target = filled(tmpfs_path / "0.raw"), tmpfs_path / "1"
    options = {"format": format, "backing": previous}
    if format is Format.RAW:
        target, options = previous, {}
    async with running(web) as jobs:
        await finished(jobs, target, **INCREMENT, **options)

    if format is Format.QCOW2:
        require_qemu()
        assert check_code(target) == 0
        found = restored(target)
    else:
        found = target.read_bytes()
        # Two that were holes, and one of zeroes.
        assert target.stat().st_blocks == 13 * CLUSTER // 512
    assert letters(found) == "aBCd..Ghi.klmnoP"


# -- bitmaps in use


async def test_a_bitmap_in_use_is_busy(web, target):
    add(web, "other")
    inventory = web.inventory
    async with running(web) as jobs:
        job = await begun(jobs, filled(target), **INCREMENT)
        described = {
            each["name"]: each for each in inventory.bitmaps.describe("web.raw")
        }
        commands = [
            Remove("web.raw", "b"),
            Clear("web.raw", "b"),
            Enable("web.raw", "b"),
            Disable("web.raw", "b"),
            Merge("web.raw", "b", [("web.raw", "other")]),
            Merge("web.raw", "other", [("web.raw", "b")]),
            Copy("web.raw", "b", "copy"),
            Set("web.raw", "b", persistent=False),
        ]
        for command in commands:
            with pytest.raises(Busy, match="Bitmap 'b' is currently in use by another"):
                inventory.change_bitmaps([command])
        with pytest.raises(Busy, match="Bitmap 'b' is currently in use by another"):
            await start(jobs, wanted(target.with_name("2"), job_id="2", **INCREMENT))

        assert (described["b"]["busy"], described["other"]["busy"]) == (True, False)
        assert described["b"]["count"] == 4 * CLUSTER
        assert described["b"]["recording"]
        job.set_speed(0)
        await ended(job)
    assert not inventory.bitmaps.describe("web.raw")[0]["busy"]
    assert set(inventory.bitmaps.find("web.raw").held) == {"b", "other"}
    inventory.change_bitmaps([Remove("web.raw", "b")])


async def test_two_jobs_do_not_share_a_bitmap(web, tmpfs_path):
    targets = [tmpfs_path / "1", tmpfs_path / "2"]
    with pytest.raises(Busy, match="Bitmap 'b' is currently in use"):
        create_backups(
            web.inventory,
            [wanted(t, job_id=t.name, **INCREMENT) for t in targets],
        )

    assert not any(t.exists() for t in targets)
    assert nothing_left(web)
    assert not bitmap_of(web).busy
    assert dirty(web) == {1, 2, 6, 15}


async def test_two_bitmaps_of_one_disk(web, tmpfs_path):
    add(web, "c", granularity=512)
    web.write("web.raw", b"x" * 512, 5 * CLUSTER)
    first, second = filled(tmpfs_path / "1"), filled(tmpfs_path / "2")
    async with running(web) as jobs:
        one = await begun(jobs, first, job_id="1", **INCREMENT)
        web.write("web.raw", clusters("6"), 6 * CLUSTER)
        two = await begun(jobs, second, job_id="2", sync=Sync.INCREMENTAL, bitmap="c")
        web.write("web.raw", clusters("7"), 7 * CLUSTER)
        one.set_speed(0)
        await ended(one)
        two.cancel()
        await ended(two)

    assert letters(first.read_bytes()[6 * CLUSTER :]) == "GhijklmnoP"
    assert dirty(web) == {6, 7}
    assert dirty(web, "c") == {5 * 8, *range(6 * 8, 8 * 8)}


async def test_a_bitmap_may_begin_with_a_full_backup(web, target):
    async with running(web) as jobs:
        (job,) = await start(
            jobs,
            Add("web.raw", "new", granularity=CLUSTER),
            wanted(target, speed=NEVER, sync=Sync.FULL),
        )
        web.write("web.raw", clusters("x"), 3 * CLUSTER)
        job.set_speed(0)
        await ended(job)
        await finished(jobs, target, job_id="2", sync=Sync.INCREMENTAL, bitmap="new")

    assert target.read_bytes() == web.live("web.raw")
    assert dirty(web, "new") == set()


async def test_a_bitmap_may_be_added_and_used_at_one_instant(web, target):
    options = {"sync": Sync.FULL, "bitmap": "new", "bitmap_mode": ON_SUCCESS}
    async with running(web) as jobs:
        (job,) = await start(
            jobs,
            Add("web.raw", "new", granularity=CLUSTER),
            wanted(target, speed=NEVER, **options),
        )
        web.write("web.raw", clusters("x"), 3 * CLUSTER)
        job.set_speed(0)
        await ended(job)

    assert dirty(web, "new") == {3}


async def test_a_disabled_bitmap_stays_disabled(web, target):
    async with running(web) as jobs:
        (job,) = await start(
            jobs,
            Disable("web.raw", "b"),
            wanted(filled(target), speed=NEVER, **INCREMENT),
        )
        web.write("web.raw", clusters("x"), 3 * CLUSTER)
        job.set_speed(0)
        await ended(job)
        web.write("web.raw", clusters("x"), 4 * CLUSTER)

    assert letters(target.read_bytes()) == "aBCdefGhijklmnoP"
    assert dirty(web) == set()
    assert not bitmap_of(web).recording


@pytest.mark.parametrize("name", ["b", "b2"])
async def test_a_bitmap_in_another_container(web, target, name):
    container = target.with_name("bitmaps.qcow2")
    if name == "b":
        web.inventory.change_bitmaps([Remove("web.raw", "b")])
    add(web, name, container=container)
    web.write("web.raw", clusters("x"), 3 * CLUSTER)
    async with running(web) as jobs:
        await finished(jobs, filled(target), sync=Sync.INCREMENTAL, bitmap=name)
        web.write("web.raw", clusters("y"), 4 * CLUSTER)
    web.close()
    web.open()

    assert letters(target.read_bytes()[3 * CLUSTER : 5 * CLUSTER]) == "xe"
    assert dirty(web, name) == {4}


# -- several disks


@pytest.fixture
def pair(web, tmpfs_path):
    """Two disks, each with a dirty bitmap and a target."""
    web.close()
    web.add("db.raw", clusters("abcd"))
    web.open()
    add(web, disk="db.raw")
    web.write("db.raw", clusters("D"), 3 * CLUSTER)
    filled(tmpfs_path / "web")
    filled(tmpfs_path / "db", "abcd")
    return web


def both(host, directory, **options):
    """Return what a backup of both disks is told."""
    return [
        wanted(directory / "web", **INCREMENT, **options),
        wanted(directory / "db", "db.raw", **INCREMENT, **options),
    ]


def dirties(host):
    return dirty(host), dirty(host, disk="db.raw")


BEFORE, AFTER = ({1, 2, 6, 15}, {3}), (set(), set())


@pytest.mark.logs("job db.raw failed")
@pytest.mark.parametrize("grouped", [True, False])
async def test_of_a_group_no_bitmap_moves_if_one_job_fails(pair, tmpfs_path, grouped):
    async with running(pair) as jobs:
        options = both(pair, tmpfs_path, speed=NEVER)
        first, second = await start(jobs, *options, grouped=grouped)
        second._target.flush = failing_flush
        for job in first, second:
            job.set_speed(0)
        await ended(first)
        await ended(second)

    assert dirties(pair) == (BEFORE if grouped else (AFTER[0], BEFORE[1]))


def failing_flush():
    raise OSError(errno.EIO, "Input/output error")


async def test_of_a_group_all_bitmaps_move(pair, tmpfs_path):
    async with running(pair) as jobs:
        for job in await start(jobs, *both(pair, tmpfs_path), grouped=True):
            await ended(job)

    assert dirties(pair) == AFTER
    assert (tmpfs_path / "web").read_bytes() == pair.live("web.raw")
    assert (tmpfs_path / "db").read_bytes() == pair.live("db.raw")


class Dead(BaseException):
    """The daemon dies here."""


def die_in(host, owner, name, nth, run, *, after=False):
    """Run an async function; the daemon dies at the nth call of something."""
    calls = itertools.count(1)
    real = getattr(owner, name)

    def dying(*args, **kwargs):
        number = next(calls)
        if number > nth or (number == nth and not after):
            raise Dead
        result = real(*args, **kwargs)
        if number == nth:
            raise Dead
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(BaseExceptionGroup):
            trio.run(run)
    die(host)


@pytest.mark.logs("job")
@pytest.mark.parametrize("auto_finalize", [True, False])
@pytest.mark.parametrize("loses_target", [False, True])
@pytest.mark.parametrize(
    ("name", "nth", "after"),
    [
        pytest.param("end_bitmap", 1, False, id="before-the-first"),
        pytest.param("end_bitmap", 1, True, id="after-the-first"),
        pytest.param("delete_private", 1, False, id="first-forgotten"),
        pytest.param("end_bitmap", 2, False, id="before-the-second"),
        pytest.param("end_bitmap", 2, True, id="after-the-second"),
    ],
)
def test_all_or_none_when_the_daemon_dies_between_two_commits(
    pair, tmpfs_path, name, nth, after, auto_finalize, loses_target
):
    async def begin():
        async with running_until_killed(pair) as jobs:
            options = both(pair, tmpfs_path, auto_finalize=auto_finalize)
            started = await start(jobs, *options, grouped=True)
            if not auto_finalize:
                await wait_for(lambda: started[1].status is JobStatus.PENDING)
                started[1].finalize()
            await trio.sleep_forever()

    die_in(pair, Inventory, name, nth, begin, after=after)
    if loses_target:
        (tmpfs_path / "db").unlink()
    pair.open()

    async def go():
        async with running(pair, resumes=True) as jobs:
            for job in jobs.all():
                if not job.is_over:
                    with pytest.raises(OSError, match="too late"):
                        job.cancel()
            # And what ends the mount does not cancel them.

    trio.run(go)
    # The first was about to commit, so all of them had said that they can.
    assert dirties(pair) == AFTER
    assert nothing_left(pair)


def test_none_commits_unless_all_were_told_to(pair, tmpfs_path):
    """The daemon died after one job was told so, and the other one's target is gone."""

    async def begin():
        async with running_until_killed(pair) as jobs:
            await start(jobs, *both(pair, tmpfs_path), grouped=True)
            await trio.sleep_forever()

    die_in(pair, Job, "begin_commit", 2, begin)
    pair.open()
    (group,) = resume_jobs(pair.inventory)

    assert [job.is_committing for job in group] == [False, False]
    for job in group:
        job._target.close()


async def test_until_it_is_finalized_nothing_has_happened(web, target):
    async with running(web) as jobs:
        (job,) = await start(
            jobs, wanted(filled(target), auto_finalize=False, **INCREMENT)
        )
        await wait_for(lambda: job.status is JobStatus.PENDING)
        web.write("web.raw", clusters("x"), 3 * CLUSTER)
        assert bitmap_of(web).busy
        # As if it had failed.
        assert dirty(web) == {1, 2, 3, 6, 15}
        job.finalize()
        await ended(job)

    assert dirty(web) == {3}


def test_pending_it_outlives_the_daemon(web, target):
    filled(target)

    async def begin():
        async with running_until_killed(web) as jobs:
            (job,) = await start(jobs, wanted(target, auto_finalize=False, **INCREMENT))
            await wait_for(lambda: job.status is JobStatus.PENDING)

    trio.run(begin)
    die(web)
    web.open()
    web.write("web.raw", clusters("x"), 3 * CLUSTER)

    async def go():
        async with running(web, resumes=True) as jobs:
            job = jobs.get("web.raw")
            await wait_for(lambda: job.status is JobStatus.PENDING)
            assert bitmap_of(web).busy
            job.cancel()
            await ended(job)

    trio.run(go)
    assert dirty(web) == {1, 2, 3, 6, 15}


# -- when a bitmap can not be used


FALLBACK = {**INCREMENT, "fallback": True}


def make_missing(host):
    host.inventory.change_bitmaps([Remove("web.raw", "b")])
    return "there was no bitmap"


def make_inconsistent(host):
    host.inventory.bitmaps.find("web.raw").held["b"].lose("a test wants it")
    host.inventory.bitmaps.find("web.raw").update_recorder()
    return "a test wants it"


@pytest.mark.logs("is a full one")
@pytest.mark.parametrize("spoil", [make_missing, make_inconsistent])
async def test_a_bitmap_that_can_not_be_used_makes_it_full(web, target, spoil):
    reason = spoil(web)
    options = {**FALLBACK, "speed": NEVER}
    async with running(web) as jobs:
        (job,) = await start(jobs, wanted(filled(target, "." * 16), **options))
        web.write("web.raw", b"x", 3 * CLUSTER)
        job.set_speed(0)
        await ended(job)

        assert reason in job.details()["fell-back"]
        assert (job.details()["sync"], job.details()["bitmap-mode"]) == (
            "full",
            "on-success",
        )
        assert letters(target.read_bytes()) == "aBCdefGhijklmnoP"
        bitmap = bitmap_of(web)
        assert dirty(web) == {3 * CLUSTER // bitmap.granularity}
        await finished(jobs, target, job_id="next", **FALLBACK)
        assert jobs.get("next").details()["fell-back"] is None
    assert target.read_bytes() == web.live("web.raw")


@pytest.mark.logs("is a full one")
@pytest.mark.parametrize("spoil", [make_missing, make_inconsistent])
@pytest.mark.parametrize("dies", [False, True])
def test_all_is_dirty_if_a_full_one_in_its_place_fails(web, target, spoil, dies):
    spoil(web)
    filled(target, "." * 16)

    async def run():
        async with running_until_killed(web) as jobs:
            job = await begun(jobs, target, **FALLBACK)
            if not dies:
                job.cancel()
                await ended(job)

    trio.run(run)
    if dies:
        die(web)
        shutil.rmtree(web.state / "jobs")
        web.open()
    bitmap = bitmap_of(web)
    assert dirty(web) == set(range(bitmap.bit_count))
    web.write("web.raw", b"x", 3 * CLUSTER)
    job = finish(web, target, job_id="next", **FALLBACK)

    assert job.details()["fell-back"] is None
    assert target.read_bytes() == web.live("web.raw")
    assert dirty(web) == set()


@pytest.mark.logs("is a full one: target .* was new")
async def test_an_increment_of_nothing_is_a_full_backup(web, target):
    async with running(web) as jobs:
        job = await finished(jobs, target, **FALLBACK)

    assert job.details()["fell-back"].endswith("was new")
    assert target.read_bytes() == web.live("web.raw")
    assert dirty(web) == set()


@pytest.mark.logs("is a full one: target .* was new|No such file")
def test_a_part_that_could_not_be_removed_is_not_taken_for_a_backup(web, target):
    """The target was out of reach when the job failed, and is back for the next."""

    async def begin():
        async with running_until_killed(web) as jobs:
            await begun(jobs, target, **FALLBACK)

    trio.run(begin)
    die(web)
    away = target.rename(target.with_suffix(".away"))
    web.open()
    trio.run(go_on, web)
    away.rename(target)
    assert dirty(web) == set(range(16))
    finish(web, target, job_id="next", **FALLBACK)

    assert target.read_bytes() == web.live("web.raw")


@pytest.mark.logs("is a full one")
async def test_never_is_never(web, target):
    """Others may have been made since the same instant: it would lie to the next."""
    options = {"sync": Sync.BITMAP, "bitmap_mode": NEVER_ANEW, "fallback": True}
    async with running(web) as jobs:
        await finished(jobs, target, bitmap="b", **options)

    assert target.read_bytes() == web.live("web.raw")
    assert dirty(web) == {1, 2, 6, 15}


async def test_a_busy_bitmap_is_no_reason_for_a_full_one(web, tmpfs_path):
    async with running(web) as jobs:
        await begun(jobs, filled(tmpfs_path / "1"), **INCREMENT)
        with pytest.raises(Busy, match="Bitmap 'b' is currently in use"):
            await start(jobs, wanted(tmpfs_path / "2", job_id="2", **FALLBACK))

    assert not (tmpfs_path / "2").exists()


def test_without_a_fallback_it_is_refused(web, target):
    reason = make_inconsistent(web)
    with pytest.raises(NotUsable, match=f"'b' is inconsistent .*{reason}"):
        create_backups(web.inventory, [wanted(target, **INCREMENT)])
    make_missing(web)
    with pytest.raises(NotFound, match="Dirty bitmap 'b' not found"):
        create_backups(web.inventory, [wanted(target, **INCREMENT)])

    assert not target.exists()
    assert not records(web)


# -- what is refused


REFUSED = [
    pytest.param(
        {"sync": Sync.INCREMENTAL},
        "must provide a valid bitmap name for 'incremental' sync mode",
        id="incremental-of-nothing",
    ),
    pytest.param(
        {"sync": Sync.BITMAP, "bitmap_mode": ALWAYS},
        "must provide a valid bitmap name for 'bitmap' sync mode",
        id="bitmap-of-nothing",
    ),
    *(
        pytest.param(
            {"sync": Sync.INCREMENTAL, "bitmap": "b", "bitmap_mode": mode},
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
            id=f"incremental-{mode.value}",
        )
        for mode in (NEVER_ANEW, ALWAYS)
    ),
    *(
        pytest.param(
            {"sync": sync, "bitmap": "b"},
            "Bitmap sync mode must be given when providing a bitmap",
            id=f"{sync.value}-without-mode",
        )
        for sync in (Sync.BITMAP, Sync.FULL, Sync.TOP, Sync.NONE)
    ),
    pytest.param(
        {"sync": Sync.FULL, "bitmap_mode": ALWAYS},
        "Cannot specify bitmap sync mode without a bitmap",
        id="mode-without-bitmap",
    ),
    *(
        pytest.param(
            {"sync": Sync.NONE, "bitmap": "b", "bitmap_mode": mode},
            "sync mode 'none' does not produce meaningful bitmap outputs",
            id=f"none-{mode.value}",
        )
        for mode in BitmapMode
    ),
    *(
        pytest.param(
            {"sync": sync, "bitmap": "b", "bitmap_mode": NEVER_ANEW},
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync "
            f"mode '{sync.value}'",
            id=f"{sync.value}-never",
        )
        for sync in (Sync.FULL, Sync.TOP)
    ),
    pytest.param(
        {"fallback": True}, "a fallback is for a backup with a bitmap", id="fallback"
    ),
    pytest.param(
        {"format": Format.QCOW2, "sync": Sync.NONE},
        "sync mode 'none' needs a raw target",
        id="qcow2-none",
    ),
    pytest.param(
        {"backing": "0"}, "a raw target has no backing file", id="raw-backing"
    ),
    pytest.param(
        {"format": Format.QCOW2, "backing": "0", "sync": Sync.TOP},
        "sync mode 'top' has no backing file",
        id="top-backing",
    ),
    pytest.param(
        {"format": Format.QCOW2, "backing_format": Format.RAW},
        "a backing format is for a backing file",
        id="backing-format",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_what_makes_no_sense_is_refused(web, target, options, text):
    with pytest.raises(NotUsable) as e:
        create_backups(web.inventory, [wanted(target, **options)])

    assert e.value.strerror.startswith(text)
    assert not target.exists()
    assert not records(web)
    assert dirty(web) == {1, 2, 6, 15}


@pytest.mark.parametrize("name", ["create_private", "_create_epoch"])
def test_who_could_not_be_created_leaves_the_bitmap_as_it_was(
    web, target, name, monkeypatch
):
    def failing(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Inventory, name, failing)
    with pytest.raises(OSError, match="No space left"):
        create_backups(web.inventory, [wanted(target, **INCREMENT)])
    web.write("web.raw", clusters("x"), 3 * CLUSTER)

    assert not bitmap_of(web).busy
    assert dirty(web) == {1, 2, 3, 6, 15}
    assert not records(web)
    assert not target.exists()


# -- qcow2


QCOW2 = {"format": Format.QCOW2}


def restored(path):
    """Return what `qemu-img convert` makes of an image."""
    output = path.with_name(f"{path.name}.restored")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, output)
    data = output.read_bytes()
    output.unlink()
    return data


def check_image(path, content):
    """Compare with QEMU's eyes; its disks end with a sector."""
    assert check_code(path) == 0
    found = restored(path)
    assert found[: len(content)] == content
    assert len(found) - len(content) == -len(content) % 512
    assert not any(found[len(content) :])


@pytest.fixture
def odd(host, tmpfs_path, monkeypatch):
    """A disk of no whole clusters, with holes, and a full backup of it."""
    require_qemu()
    chunks_of(monkeypatch, 2 * CLUSTER)
    content = random.Random(5).randbytes(300_001)
    host.add("web.raw", content)
    host.open()
    host.inventory.disks["web.raw"].discard(5 * CLUSTER, 10 * CLUSTER)
    add(host, granularity=512)
    (tmpfs_path / "0.raw").write_bytes(host.live("web.raw"))
    return host


def change(host, seed):
    """Write, zero and discard here and there, and the last byte."""
    choice, disk = random.Random(seed), host.inventory.disks["web.raw"]
    for _ in range(4):
        offset = choice.randrange(disk.size)
        length = min(choice.choice([1, 512, 5000, 70_000]), disk.size - offset)
        what = choice.choice("wwzd")
        if what == "w":
            disk.write(choice.randbytes(length), offset)
        elif what == "z":
            disk.zero(length, offset)
        else:
            disk.discard(length, offset)
    disk.write(b"%d" % (seed % 10), disk.size - 1)


async def test_increments_make_a_chain(odd, tmpfs_path):
    previous, made = tmpfs_path / "0.raw", []
    async with running(odd) as jobs:
        for number in range(1, 5):
            change(odd, number)
            content, path = odd.live("web.raw"), tmpfs_path / f"{number}.qcow2"
            job = await begun(
                jobs,
                path,
                job_id=f"{number}",
                backing=previous,
                workers=number,
                **INCREMENT,
                **QCOW2,
            )
            change(odd, number + 100)
            job.set_speed(0)
            await ended(job)
            assert job.error is None
            made.append((path, content))
            previous = path

    for path, content in made:
        check_image(path, content)


async def test_parts_are_whole_clusters_of_the_target(odd, tmpfs_path):
    """Of a cluster that the new file has, nothing comes from the one before."""
    odd.write("web.raw", b"x", 100_000)
    path = tmpfs_path / "1.qcow2"
    async with running(odd) as jobs:
        job = await finished(
            jobs, path, backing=tmpfs_path / "0.raw", **INCREMENT, **QCOW2
        )

    assert job.progress.current == 64 * KiB
    check_image(path, odd.live("web.raw"))


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP])
async def test_a_full_one_has_no_backing_file(odd, tmpfs_path, sync):
    path = tmpfs_path / "full.qcow2"
    async with running(odd) as jobs:
        await finished(
            jobs, path, sync=sync, bitmap="b", bitmap_mode=ON_SUCCESS, **QCOW2
        )

    assert "backing" not in qemu_img("info", path)
    check_image(path, odd.live("web.raw"))


async def test_a_part_of_an_image_is_made_whole_by_the_next(odd, tmpfs_path):
    change(odd, 7)
    part, rest = tmpfs_path / "1.qcow2", tmpfs_path / "2.qcow2"
    options = {"sync": Sync.BITMAP, "bitmap": "b", "bitmap_mode": ALWAYS, **QCOW2}
    async with running(odd) as jobs:
        job = await begun(jobs, part, backing=tmpfs_path / "0.raw", **options)
        change(odd, 8)
        job.cancel()
        await ended(job)
        assert check_code(part) == 0
        await finished(jobs, rest, job_id="2", backing=part, **options)

    check_image(rest, odd.live("web.raw"))
    assert dirty(odd) == set()


@pytest.mark.logs("failed: injected|nothing counts")
@pytest.mark.parametrize("mode", [ON_SUCCESS, ALWAYS])
async def test_what_is_no_image_is_removed(odd, tmpfs_path, mode):
    change(odd, 7)
    before, path = dirty(odd), tmpfs_path / "1.qcow2"
    options = {"sync": Sync.BITMAP, "bitmap": "b", "bitmap_mode": mode, **QCOW2}
    async with running(odd) as jobs:
        job = await begun(jobs, path, backing=tmpfs_path / "0.raw", **options)
        fail_flushes(job, 1, count=1000)
        job.set_speed(0)
        await ended(job)

    assert not path.exists()
    assert dirty(odd) == before


def refused(host, target, **options):
    with pytest.raises(OSError) as e:
        create_backups(host.inventory, [wanted(target, **INCREMENT, **options)])
    assert not records(host)
    assert not bitmap_of(host).busy
    return e.value.strerror


def test_wrong_files_are_refused(odd, tmpfs_path):
    path, previous = tmpfs_path / "1.qcow2", tmpfs_path / "0.raw"
    exists = tmpfs_path / "exists"
    exists.write_bytes(b"mine")
    short = tmpfs_path / "short"
    short.write_bytes(b"x")
    other = tmpfs_path / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", other, "1M")

    assert "exists; a qcow2 backup is a new file" in refused(odd, exists, **QCOW2)
    assert exists.read_bytes() == b"mine"
    missing = tmpfs_path / "missing"
    assert refused(odd, path, backing=missing, **QCOW2).endswith(
        "No such file or directory"
    )
    assert "has 1 bytes" in refused(odd, path, backing=short, **QCOW2)
    assert "is of a disk of 1048576 bytes" in refused(odd, path, backing=other, **QCOW2)
    source = odd.sources["web.raw"]
    assert "is the source of disk" in refused(odd, path, backing=source, **QCOW2)
    own = odd.state / "disks/web.raw/bitmaps/bitmaps.qcow2"
    assert "lies among the files" in refused(odd, path, backing=own, **QCOW2)
    assert "not a regular file" in refused(odd, path, backing=tmpfs_path, **QCOW2)
    raw = {"backing": previous, "backing_format": Format.QCOW2}
    assert "backing" in refused(odd, path, **raw, **QCOW2)
    # And nothing is left of any of them.
    assert not path.exists()


def test_who_looks_like_an_image_has_to_be_named(odd, tmpfs_path):
    """A guest can write a header of its own to its disk, and name files of ours."""
    forged = tmpfs_path / "forged.qcow2"
    qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "/etc/passwd",
        "-F",
        "raw",
        forged,
        "300032",
    )
    content = bytearray(odd.live("web.raw"))
    content[: 64 * KiB] = forged.read_bytes()[: 64 * KiB]
    previous, path = tmpfs_path / "0.raw", tmpfs_path / "1.qcow2"
    previous.write_bytes(content)

    assert "may be raw or qcow2" in refused(odd, path, backing=previous, **QCOW2)
    options = {"backing": previous, "backing_format": Format.RAW, **QCOW2, **INCREMENT}
    finish(odd, path, **options)
    assert "backing file format: raw" in qemu_img("info", path)
    check_image(path, bytes(content))


def test_the_mount_is_no_place(odd, tmpfs_path):
    def check_place(path):
        if path.endswith("0.raw"):
            raise NotUsable("on the mount")

    options = wanted(
        tmpfs_path / "1.qcow2", backing=tmpfs_path / "0.raw", **INCREMENT, **QCOW2
    )
    with pytest.raises(NotUsable, match=r"backing .*: is on the mount"):
        create_backups(odd.inventory, [options], check_place)

    assert not options.target.exists()


async def test_what_a_job_still_writes_is_no_backing_file(odd, tmpfs_path):
    change(odd, 1)
    first, second = tmpfs_path / "1.qcow2", tmpfs_path / "2.qcow2"
    add(odd, "c")
    options = {"sync": Sync.INCREMENTAL, "bitmap": "c", **QCOW2}
    async with running(odd) as jobs:
        job = await begun(
            jobs, first, backing=tmpfs_path / "0.raw", **INCREMENT, **QCOW2
        )
        with pytest.raises(Busy, match="a job still writes to it"):
            await start(jobs, wanted(second, job_id="2", backing=first, **options))
        job.set_speed(0)
        await ended(job)
        await finished(jobs, second, job_id="2", backing=first, **options)


# -- killed anywhere


KILLED = [
    pytest.param({"format": Format.RAW}, id="raw"),
    pytest.param({"format": Format.QCOW2, "backing": True}, id="qcow2"),
]


@pytest.mark.parametrize("mode", BitmapMode)
@pytest.mark.parametrize("options", KILLED)
@pytest.mark.logs("job")
def test_killed_at_any_point_it_is_exact(
    tmpfs_path, monkeypatch, mode, options, caplog
):
    """Resumed or never begun: the target and the bitmap have it all between them."""
    require_qemu()
    chunks_of(monkeypatch, 8 * CLUSTER)
    stride = 1 if "FLEECEFS_EXAMPLES" in os.environ else 3
    points = set()
    for nth in itertools.count(1 + list(BitmapMode).index(mode), stride):
        directory = tmpfs_path / str(nth)
        directory.mkdir()
        point = live_and_die(
            Host(directory, monkeypatch), directory, nth, mode, options
        )
        shutil.rmtree(directory)
        caplog.clear()
        if point is None:
            break
        points.add(point)
    assert len(points) > 5


def live_and_die(host, directory, nth, mode, options):
    content = random.Random(5).randbytes(200_001)
    host.add("web.raw", content)
    host.open()
    add(host, granularity=4 * KiB)
    host.inventory.disks["web.raw"].discard(5 * CLUSTER, 10 * CLUSTER)
    host.write("web.raw", b"o" * 5000, 150_000)
    host.write("web.raw", b"o", 200_000)
    instant = host.live("web.raw")
    previous = directory / "0.raw"
    previous.write_bytes(content)
    target = previous
    if options["format"] is Format.QCOW2:
        target = directory / "1.qcow2"
        options = {**options, "backing": previous}
    told = wanted(target, sync=Sync.BITMAP, bitmap="b", bitmap_mode=mode, **options)

    point = killed_at(nth, back_up, host, told)
    host.crash()
    host.open()
    disk = host.inventory.disks["web.raw"]
    disk.write(b"later", 100_000)
    job = trio.run(go_on, host)

    old = {10, 11, 12, 13, 14, 36, 37, 48}
    late = {100_000 // 4096}
    assert not bitmap_of(host).busy
    assert nothing_left(host)
    found = dirty(host)
    if job is not None:
        assert job.error is None, job.error
    has_all = job is not None or not found >= old
    if has_all:
        assert found - late == (old if mode is NEVER_ANEW else set())
        check_target(target, instant, options)
    elif target.exists() and options["format"] is Format.RAW:
        assert target.read_bytes() in (content, instant)
    host.close()
    return point


def check_target(target, instant, options):
    if options["format"] is Format.RAW:
        assert target.read_bytes() == instant
    else:
        check_image(target, instant)


def back_up(host, told):
    async def run():
        async with running_until_killed(host) as jobs:
            (job,) = await start(jobs, told)
            await ended(job)

    trio.run(run)


@pytest.mark.logs("failed")
async def test_a_source_that_can_not_be_flushed_keeps_its_bitmap(
    web, target, monkeypatch
):
    def fail():
        raise OSError(errno.EIO, "injected into flush")

    web.write("web.raw", b"x", 3 * CLUSTER)
    bitmap = web.inventory.bitmaps.find("web.raw").held["b"].bitmap
    before = bitmap.count
    monkeypatch.setattr(web.inventory.disks["web.raw"], "flush", fail)
    async with running(web) as jobs:
        options = {**FALLBACK, "fallback": False}
        (job,) = await start(jobs, wanted(filled(target, "." * 16), **options))
        await ended(job)

    assert job.error is not None
    assert "injected" in job.error
    assert bitmap.count == before > 0
    monkeypatch.undo()
