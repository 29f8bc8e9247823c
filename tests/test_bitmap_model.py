"""Random walks of a disk's dirty bitmaps, beside a model that knows every bit.

Guests write, bitmaps are added, changed and removed, backups use them and end in every
way, the daemon crashes, the host goes down. After every step each bitmap has exactly
what it should have; only after a crash of the host it may have more, as far as that is
in the log. And where a backup that was kept up with a bitmap differs from its disk,
the bitmap is dirty.

    FLEECEFS_EXAMPLES=500 python -m pytest tests/test_bitmap_model.py     walks longer
"""

import contextlib
import os
import random
import shutil

import pytest
import trio

from fleecefs.bitmaps import disk as bitmaps_disk
from fleecefs.bitmaps.steps import (
    Abort,
    Add,
    Clear,
    Copy,
    Disable,
    Enable,
    Merge,
    Remove,
    Set,
)
from fleecefs.errors import Busy, Refused, VerbRejected
from fleecefs.jobs import backup, copy
from fleecefs.jobs.options import BitmapMode, Sync
from fleecefs.jobs.status import JobStatus
from fleecefs.state import activity_log
from fleecefs.units import KiB
from tests.jobs.test_backup import (
    NEVER,
    die,
    hook,
    running,
    running_until_killed,
    start,
    wanted,
)
from tests.support.copying import wait_for
from tests.support.faulty import Faulty
from tests.support.host import CLUSTER, Host

WALKS = int(os.environ.get("FLEECEFS_EXAMPLES", "24"))
STEPS = 120

# Five areas, the last one cut short; no whole clusters or sectors.
AREA = 64 * KiB
SIZE = 4 * AREA + 5 * CLUSTER + 77

DISK = "web.raw"


class Bits:
    """What a bitmap should be. `seen` is what it had since it was saved last."""

    def __init__(self, granularity, *, persistent, recording):
        self.granularity = granularity
        self.persistent = persistent
        self.recording = recording
        self.bits = set()
        self.frozen = None
        self.seen = set()

    def granules(self, offset, end):
        return set(range(offset // self.granularity, -(-end // self.granularity)))

    def extents(self, bits=None):
        for bit in self.bits if bits is None else bits:
            offset = bit * self.granularity
            yield offset, min(offset + self.granularity, SIZE)

    def add(self, extents):
        for offset, end in extents:
            self.bits |= self.granules(offset, end)

    @property
    def all(self):
        return self.bits | (self.frozen or set())


class Walk:
    def __init__(self, host, directory, seed):
        self.host = host
        self.directory = directory
        self.random = random.Random(seed)
        self.bitmaps = {}
        # Backups that are as the disk where their bitmap is clean, by its name.
        self.targets = {}
        # Areas written to since all was saved.
        self.areas = set()
        self.numbers = 0
        host.add(DISK, self.random.randbytes(SIZE))
        host.open()

    @property
    def inventory(self):
        return self.host.inventory

    def step(self):
        action = self.random.choice(self.ACTIONS)
        action(self)
        self.check()
        return action.__name__

    def check(self):
        held = self.inventory.bitmaps.find(DISK).held
        assert set(held) == set(self.bitmaps)
        for name, model in self.bitmaps.items():
            bitmap = held[name].bitmap
            assert bitmap.inconsistent is None, name
            assert set(bitmap.to_save().search(1)) == model.all, name
            assert bitmap.recording == model.recording, name
            assert bitmap.busy == (model.frozen is not None), name
            assert held[name].record.persistent == model.persistent, name
            model.seen |= model.all
        self.check_targets()

    def check_targets(self):
        live = self.host.live(DISK)
        for name, path in self.targets.items():
            found, model = path.read_bytes(), self.bitmaps[name]
            size = model.granularity
            for bit in range(-(-SIZE // size)):
                at = slice(bit * size, (bit + 1) * size)
                assert bit in model.all or found[at] == live[at], (name, bit)

    def pick(self, *, is_free=True):
        """Return the name of some bitmap, or None."""
        names = [n for n, m in self.bitmaps.items() if not (is_free and m.frozen)]
        free = [n for n in names if not is_free or self.bitmaps[n].frozen is None]
        return self.random.choice(free) if free else None

    def do(self, *steps):
        self.inventory.change_bitmaps(steps)

    # -- guests

    def extent(self):
        length = self.random.choice([1, 511, 512, CLUSTER, 5000, 40_000])
        offset = self.random.randrange(SIZE)
        if self.random.random() < 0.3:
            offset -= offset % CLUSTER
        elif self.random.random() < 0.1:
            offset = SIZE - 1
        return offset, min(length, SIZE - offset)

    def write(self):
        offset, length = self.extent()
        disk = self.inventory.disks[DISK]
        match self.random.choice("wwwzd"):
            case "w":
                disk.write(self.random.randbytes(length), offset)
            case "z":
                disk.zero(length, offset)
            case _:
                disk.discard(length, offset)
        end = offset + length
        self.areas |= set(range(offset // AREA, -(-end // AREA)))
        for model in self.bitmaps.values():
            if model.recording:
                model.add([(offset, end)])

    # -- commands

    def new_name(self):
        self.numbers += 1
        return f"b{self.numbers}"

    def add(self):
        if len(self.bitmaps) == 5:
            return self.remove()
        granularity = self.random.choice([512, 4 * KiB, 16 * KiB, 128 * KiB])
        options = {
            "persistent": self.random.random() < 0.7,
            "recording": self.random.random() < 0.8,
        }
        name = self.new_name()
        self.do(Add(DISK, name, granularity=granularity, **options))
        self.bitmaps[name] = Bits(granularity, **options)
        return None

    def remove(self):
        if (name := self.pick()) is not None:
            self.do(Remove(DISK, name))
            self.forget(name)

    def forget(self, name):
        del self.bitmaps[name]
        self.targets.pop(name, None)

    def clear(self):
        if (name := self.pick()) is not None:
            self.do(Clear(DISK, name))
            self.bitmaps[name].bits = set()
            self.targets.pop(name, None)

    def enable(self):
        if (name := self.pick()) is not None:
            self.do(Enable(DISK, name))
            self.bitmaps[name].recording = True

    def disable(self):
        if (name := self.pick()) is not None:
            self.do(Disable(DISK, name))
            self.bitmaps[name].recording = False
            self.targets.pop(name, None)

    def merge(self):
        target, source = self.pick(), self.pick()
        if target is None or source is None:
            return
        self.do(Merge(DISK, target, [(DISK, source)]))
        self.bitmaps[target].add(list(self.bitmaps[source].extents()))

    def copy(self):
        if len(self.bitmaps) == 5 or (name := self.pick()) is None:
            return
        persistent, target = self.random.random() < 0.5, self.new_name()
        self.do(Copy(DISK, name, target, persistent=persistent))
        source = self.bitmaps[name]
        copied = Bits(source.granularity, persistent=persistent, recording=False)
        copied.bits = set(source.bits)
        self.bitmaps[target] = copied

    def set(self):
        if (name := self.pick()) is not None:
            persistent = self.random.random() < 0.7
            self.do(Set(DISK, name, persistent=persistent))
            self.bitmaps[name].persistent = persistent

    def be_refused(self):
        """Nothing has changed if one of several steps refuses."""
        name = self.pick()
        steps = [Add(DISK, "new"), Abort()]
        if name is not None:
            step = self.random.choice([Remove, Clear, Enable])
            steps.insert(1, step(DISK, name))
        with pytest.raises(Refused):
            self.do(*steps)

    def be_busy(self):
        for name, model in self.bitmaps.items():
            if model.frozen is not None:
                step = self.random.choice([Remove, Clear, Enable, Disable])
                with pytest.raises(Busy):
                    self.do(step(DISK, name))

    def save(self):
        self.inventory.save_bitmaps([DISK])
        self.areas = set()
        for model in self.bitmaps.values():
            model.seen = set(model.all)

    # -- ends and crashes

    def reopen(self):
        self.host.close()
        self.host.open()
        self.keep_persistent()
        self.save_seen()

    def crash(self):
        die(self.host)
        self.host.open()

    def reboot(self):
        """Lose what is on tmpfs, with or without a crash before."""
        if self.random.random() < 0.3:
            self.host.close()
            self.host.reboot()
            self.host.open()
            self.keep_persistent()
            self.save_seen()
            return
        die(self.host)
        self.host.reboot()
        self.host.open()
        self.keep_persistent()
        for name, model in self.bitmaps.items():
            self.take_over(name, model)
        self.save()

    def keep_persistent(self):
        for name, model in list(self.bitmaps.items()):
            if not model.persistent:
                self.forget(name)

    def save_seen(self):
        self.areas = set()
        for model in self.bitmaps.values():
            model.seen = set(model.all)

    def take_over(self, name, model):
        """Check that it has enough, and not too much, and go on from there."""
        bitmap = self.inventory.bitmaps.find(DISK).held[name].bitmap
        found = set(bitmap.to_save().search(1))
        missing = model.all - found
        assert not missing, (name, missing)
        bound = set(model.seen | model.all)
        for area in self.areas:
            end = min((area + 1) * AREA, SIZE)
            bound |= model.granules(area * AREA, end)
        assert found <= bound, (name, found - bound)
        model.bits, model.frozen = found, None

    # -- backups

    def back_up(self):
        if (name := self.pick()) is None:
            return
        model = self.bitmaps[name]
        sync = self.random.choice([Sync.INCREMENTAL, Sync.BITMAP, Sync.FULL])
        modes = list(BitmapMode)
        if sync is Sync.FULL:
            modes.remove(BitmapMode.NEVER)
        mode = None if sync is Sync.INCREMENTAL else self.random.choice(modes)
        path = self.targets.get(name) or self.directory / f"{name}.raw"
        if name not in self.targets:
            path.unlink(missing_ok=True)
        Attempt(self, name, model, path, sync, mode).run()

    ACTIONS = (
        *(write,) * 8,
        *(back_up,) * 5,
        *(add, copy, merge, save) * 2,
        *(remove, clear, enable, enable, disable, set, be_refused),
        *(reopen, crash, reboot),
    )


class Attempt:
    """One backup, up to whatever end."""

    def __init__(self, walk, name, model, path, sync, mode):
        self.walk, self.name, self.model = walk, name, model
        self.path, self.sync, self.mode = path, sync, mode
        self.is_over = False

    def run(self):
        end = self.walk.random.choice(
            [
                "succeed",
                "succeed",
                "cancel",
                "fail",
                "go_on",
                "orphan",
                "umount",
                "host",
            ]
        )
        is_killed = end in ("go_on", "orphan", "host")
        trio.run(self.begin, end, is_killed)
        if is_killed:
            die(self.walk.host)
            getattr(self, end)()
        elif end == "umount":
            self.walk.reopen()

    async def begin(self, end, is_killed):
        walk, context = self.walk, running_until_killed if is_killed else running
        async with context(walk.host) as jobs:
            (job,) = await start(
                jobs,
                wanted(
                    self.path,
                    sync=self.sync,
                    bitmap=self.name,
                    bitmap_mode=self.mode,
                    auto_finalize=False,
                    speed=NEVER,
                    workers=walk.random.randint(1, 3),
                ),
            )
            self.snapshot = job._private.snapshot
            self.model.frozen, self.model.bits = self.model.bits, set()
            await wait_for(
                lambda: job.progress.current or job.status is JobStatus.PENDING
            )
            self.meanwhile()
            if is_killed:
                return
            await getattr(self, end)(job)
        if not self.is_over:
            # It was cancelled as the context ended.
            self.has_failed()

    def meanwhile(self):
        walk = self.walk
        for _ in range(walk.random.randrange(6)):
            action = walk.random.choice(
                [Walk.write, Walk.write, Walk.write, Walk.be_busy, Walk.save, Walk.add]
            )
            action(walk)
            walk.check()

    # -- how it may end

    async def succeed(self, job):
        with contextlib.suppress(VerbRejected):
            job.set_speed(0)
        await wait_for(lambda: job.is_over or job.status is JobStatus.PENDING)
        if job.status is JobStatus.PENDING:
            job.finalize()
        await wait_for(lambda: job.is_over)
        self.is_over = True
        if job.error is None:
            self.has_succeeded()
        else:
            self.has_failed()

    async def fail(self, job):
        hook(job, Faulty, on="pwrite")
        await self.succeed(job)

    async def cancel(self, job):
        job.cancel()
        await wait_for(lambda: job.is_over)
        self.is_over = True
        self.has_failed()

    async def umount(self, job):
        pass

    def go_on(self):
        """Let the next daemon go on, and bring it to a good end or another."""
        walk = self.walk
        walk.host.open()
        walk.check()
        walk.write()
        walk.check()

        async def run():
            async with running(walk.host, resumes=True) as jobs:
                job = jobs.get(DISK)
                self.snapshot = job._private.snapshot
                await (self.cancel if walk.random.random() < 0.3 else self.succeed)(job)

        trio.run(run)

    def orphan(self):
        """Have no job any more that could go on."""
        shutil.rmtree(self.walk.host.state / "jobs")
        self.walk.host.open()
        self.model.bits, self.model.frozen = self.model.all, None

    def host(self):
        """Go down with the host."""
        walk = self.walk
        walk.host.reboot()
        walk.host.open()
        trio.run(self.let_fail)
        walk.keep_persistent()
        for name, model in walk.bitmaps.items():
            walk.take_over(name, model)
        walk.save()

    async def let_fail(self):
        async with running(self.walk.host, resumes=True) as jobs:
            await wait_for(lambda: all(job.is_over for job in jobs.all()))

    # -- what has become of the bitmap, and of the target

    def has_succeeded(self):
        model, targets = self.model, self.walk.targets
        if self.mode is BitmapMode.NEVER:
            model.bits |= model.frozen
        model.frozen = None
        if self.sync is Sync.FULL and model.recording:
            targets[self.name] = self.path

    def has_failed(self):
        model = self.model
        if self.mode is BitmapMode.ALWAYS:
            count = -(-SIZE // CLUSTER)
            left = (~self.snapshot.epoch.denied[:count]).search(1)
            model.add((at * CLUSTER, min((at + 1) * CLUSTER, SIZE)) for at in left)
            if self.sync is Sync.FULL and model.recording:
                self.walk.targets[self.name] = self.path
        else:
            model.bits |= model.frozen
        model.frozen = None


@pytest.mark.logs("job web.raw failed: (injected|its snapshot is broken: the host)")
@pytest.mark.parametrize("seed", range(WALKS))
def test_bitmaps_are_exact(tmpfs_path, monkeypatch, seed):
    monkeypatch.setattr(copy, "CHUNK_SIZE_MAX", 2 * CLUSTER)
    monkeypatch.setattr(copy, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(backup, "_CLOSE_SECONDS", 0.2)
    for module in bitmaps_disk, activity_log:
        monkeypatch.setattr(module, "AREA_SIZE", AREA)
    host = Host(tmpfs_path, monkeypatch)
    walk = Walk(host, tmpfs_path, seed)
    for _ in range(3):
        walk.add()

    steps = []
    try:
        for _ in range(STEPS):
            steps.append(walk.step())
    except BaseException:
        print(*steps)
        raise
    finally:
        host.end()
