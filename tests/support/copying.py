"""Jobs that copy a disk in memory, and a guest beside them."""

import time

import trio

from fleecefs.block.disk import freeze
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.jobs.copy import Copier
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import Sync
from fleecefs.jobs.target import Target
from fleecefs.jobs.transaction import Transaction
from tests.support.disks import make_epoch, make_tier, snapshot_of
from tests.support.gate import PATIENCE


def take_private(disk, *tiers, **options):
    """Freeze one disk for a job."""
    epoch = make_epoch(disk, *tiers, **options)
    epoch.denied = epoch.make_denied()
    freeze([disk], [epoch])
    return snapshot_of(disk, epoch)


def tiers_of(disk, *, ram=None, store=None, image=None):
    """Return a RAM tier and a disk tier of some bytes at most."""
    return [
        make_tier(disk, "ram", budget=Budget(ram, "ram")),
        make_tier(disk, "disk", image=image, budget=Budget(store, "disk")),
    ]


class CopyJob(Job):
    """Copies a private snapshot of a disk to an image; `target` is what it holds."""

    type = "backup"

    def __init__(
        self,
        disk,
        target=None,
        *,
        sync=Sync.FULL,
        workers=24,
        snapshot=None,
        is_blank=None,
        is_urgent=lambda: False,
        **options,
    ):
        super().__init__("job0", disk.name, **options)
        self.disk = disk
        self.sync = sync
        self.workers = workers
        self.is_urgent = is_urgent
        self.snapshot = snapshot or take_private(disk, *tiers_of(disk))
        self.snapshot.epoch.has_holes = sync is Sync.TOP
        disk.history._adapt()
        self.image = MemoryImage(disk.size) if target is None else target
        is_blank = target is None if is_blank is None else is_blank
        self.target = Target(self.image, is_blank=is_blank)
        self.events = []
        self.emit = lambda name, data: self.events.append((name, data))
        self.copier = None

    def make_copier(self, *, is_last=False):
        self.copier = Copier(
            self,
            self.snapshot,
            self.disk.history,
            self.target,
            sync=self.sync,
            workers=self.workers,
            is_urgent=self.is_urgent,
            is_last=is_last,
        )
        return self.copier

    async def work(self):
        self.progress.remaining = self.disk.size
        await self.make_copier().run()

    @property
    def result(self):
        image = self.image
        while hasattr(image, "image"):
            image = image.image
        return bytes(image.data)

    def errors(self):
        return [data for name, data in self.events if name == "BLOCK_JOB_ERROR"]

    async def live(self):
        await Transaction([self]).run()


async def wait_for(condition):
    """Return when it holds; other tasks and threads go on meanwhile."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        await trio.sleep(0.001)


def preserved_now(snapshot):
    """Return the bytes that the snapshot's own store holds."""
    return sum(snapshot.epoch.store.used().values())
