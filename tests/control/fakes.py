"""A daemon without disks: the real control socket before an inventory of names."""

import contextlib
import threading
import time
from types import SimpleNamespace

import trio

from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.events import Events
from fleecefs.control.server import serving
from fleecefs.errors import Busy, NameTaken, NotFound, Refused
from fleecefs.jobs.registry import Jobs
from tests.jobs.fakes import FakeBackups

SIZE = 8 << 30
# Beyond the largest pid_max: nobody has it.
NO_PID = 2**22 + 1
CREATED = 1_700_000_000.25


class FakeBitmaps:
    """Bitmaps that are what they say of themselves (control/results.py)."""

    def __init__(self):
        self.all = []

    def describe(self, disk):
        return [each for each in self.all if each["disk"] == disk]


def bitmap(name="daily", disk="web.raw", **changes):
    """Return what a daemon says of a bitmap."""
    return {
        "disk": disk,
        "name": name,
        "count": 3 << 16,
        "granularity": 1 << 16,
        "recording": True,
        "busy": False,
        "persistent": True,
        "inconsistent": False,
        "auto": True,
        "reason": None,
        "container": None,
    } | changes


class FakeInventory:
    """Two disks, snapshots that are names only, and what bitmaps are told."""

    def __init__(self, emit=lambda name, data: None):
        self.disks = {"web.raw": "/images/web.raw", "db.raw": "/dev/loop7"}
        self.snapshots = {}
        self.reasons = {}
        self.bitmaps = FakeBitmaps()
        # The steps of each instant.
        self.steps = []
        self.extents = [
            {"start": 0, "length": 4096, "data": True, "where": "source"},
            {"start": 4096, "length": 4096, "data": True, "where": "ram"},
            {"start": 8192, "length": SIZE - 8192, "data": False, "where": "none"},
        ]
        self._emit = emit

    def find_disk(self, name):
        if name not in self.disks:
            raise NotFound(f"no disk {name!r}")
        return SimpleNamespace(name=name)

    def change_bitmaps(self, steps):
        self.steps.append(list(steps))

    def create_snapshot(self, name, disks=None, steps=()):
        if name in self.snapshots:
            raise NameTaken(f"snapshot {name!r} exists")
        for disk in disks or ():
            if disk not in self.disks:
                raise NotFound(f"no disk {disk!r}")
        if steps:
            self.steps.append(list(steps))
        self.snapshots[name] = sorted(disks or self.disks)
        data = {"name": name, "disks": self.snapshots[name], "held": 0.002}
        self._emit("FLEECEFS_SNAPSHOT_CREATED", data)

    def delete_snapshot(self, name):
        if self.snapshots.pop(name, None) is None:
            raise NotFound(f"no snapshot {name!r}")
        self._emit("FLEECEFS_SNAPSHOT_DELETED", {"name": name})

    def describe_snapshots(self):
        return [self.describe_snapshot(name) for name in self.snapshots]

    def describe_snapshot(self, name):
        if name not in self.snapshots:
            raise NotFound(f"no snapshot {name!r}")
        reason = self.reasons.get(name)
        state = "good" if reason is None else "broken"
        disks = [
            {
                "name": disk,
                "state": state,
                "reason": reason,
                "size": SIZE,
                "preserved": 1536 << 10,
                "ram": 1 << 20,
                "disk": 512 << 10,
            }
            for disk in self.snapshots[name]
        ]
        return {
            "name": name,
            "created": CREATED,
            "state": state,
            "held": 0.002,
            "disks": disks,
        }

    def describe_disks(self):
        return [
            {
                "name": name,
                "source": source,
                "size": SIZE,
                "cluster-size": 4096,
                "id": "0" * 32,
                "flush-error": None,
                "snapshots": len(self.snapshots),
                "reads": 12,
                "writes": 34,
            }
            for name, source in self.disks.items()
        ]

    def map(self, path, offset, count):
        if path.rpartition("/")[2] not in self.disks:
            raise NotFound(f"no disk or snapshot file {path!r}")
        found = [extent for extent in self.extents if extent["start"] >= offset]
        # At most two, so that a reader has to come again.
        page, rest = found[: min(count, 2)], found[min(count, 2) :]
        next_offset = rest[0]["start"] if rest else None
        return {"size": SIZE, "extents": page, "next": next_offset}


class FakeDaemon:
    """The control socket at a path, with nothing behind it that could be mounted."""

    def __init__(self, path, inventory=None, backups=None):
        self.path = str(path)
        self.mount = "/mnt/live"
        self.pid = NO_PID
        self.users = None
        self.cbw_timeout = 10.0
        self.events = Events()
        self.inventory = inventory or FakeInventory(self.events.emit)
        self.backups = backups or FakeBackups()
        self._ended = trio.Event()

    def status(self):
        return {
            "mount": self.mount,
            "state": "/var/lib/fleecefs/live",
            "runtime": "/run/fleecefs/live",
            "version": "0.1.0",
            "pid": self.pid,
            "keeper-pid": None,
            "generation": 1,
            "started": CREATED,
            "policy": {
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": self.cbw_timeout,
                "durability": "process",
            },
            "disks": self.inventory.describe_disks(),
            "snapshots": self.inventory.describe_snapshots(),
            "bitmaps": [
                bitmap
                for disk in self.inventory.disks
                for bitmap in self.inventory.bitmaps.describe(disk)
            ],
            "store": {
                "directory": "/var/lib/fleecefs/live",
                "limit": None,
                "used": 1 << 20,
                "peak": 3 << 20,
            },
            "ram": {"limit": 128 << 20, "used": 0, "peak": 1 << 20},
        }

    async def umount(self, force):
        if self.users and not force:
            raise Busy(f"{self.mount} is in use by {self.users}: close it or --force")
        self._ended.set()

    async def restart(self):
        raise Refused("this kernel can not")

    @contextlib.asynccontextmanager
    async def serving(self):
        self.events.start(trio.lowlevel.current_trio_token())
        lifecycle = Lifecycle(self.status, self.umount, self.restart)
        jobs = Jobs(self.backups, self.events.emit)
        # Not in a nursery: what is raised in the block leaves it bare.
        trio.lowlevel.spawn_system_task(jobs.run)
        commands = Commands(self.inventory, jobs, lifecycle)
        async with serving(self.path, commands, self.events):
            yield self
            await jobs.close()

    async def run(self, started):
        async with self.serving():
            started()
            await self._ended.wait()


@contextlib.contextmanager
def running_daemon(path, inventory=None, backups=None):
    """Run a FakeDaemon in a thread, for clients that block."""
    daemon = FakeDaemon(path, inventory, backups)
    started = threading.Event()
    thread = threading.Thread(target=trio.run, args=(daemon.run, started.set))
    thread.start()
    assert started.wait(10)
    token = daemon.events._token
    try:
        yield daemon
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(daemon._ended.set)
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition):
    """Wait for what another thread is about to do."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
