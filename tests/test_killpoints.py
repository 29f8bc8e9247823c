"""Every kill point: the daemon dies there, and nobody can tell afterwards.

The names come from the source: a kill point that no scenario passes fails its test.
"""

import itertools
import json
import os
import random
import re
from pathlib import Path

import pytest

import fleecefs
from fleecefs.units import KiB, MiB
from tests.support.killer import DIED, daemon_pid, generation, kill, wait_generation
from tests.support.mount import Mount, wait_until
from tests.support.walk import Walk, noise, read, write

PACKAGE = Path(fleecefs.__file__).parent
POINTS = sorted(
    {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'\breached\("([^"]+)"\)', path.read_text())
    }
)

KILLS = 3
# With each durability: some kill points belong to one of them.
ROUNDS_MAX = 5

# What the guest of disk c.raw overwrites does not fit into the store; all of the other
# disks' snapshots take far less.
LIMITS = ["--ram-limit=64K", "--store-limit=7M"]
C_SIZE = 8 * MiB
OTHERS_MAX = 5 * MiB
SNAPSHOTS_MAX = 4


class Trap:
    """The file that says how often daemons die at the kill point (killpoint.py)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._armed = 0
        self._set(0)

    def _set(self, number: int) -> None:
        # In one step: daemons read it at any time.
        temporary = self.path.with_suffix(".new")
        temporary.write_text(str(number))
        temporary.rename(self.path)

    def arm(self) -> None:
        self._armed += 1
        self._set(1)

    @property
    def is_armed(self) -> bool:
        return self.path.read_text() != "0"

    @property
    def sprung(self) -> int:
        """How often it has killed."""
        return self._armed - self.is_armed


class Scenario:
    """A guest, its snapshots and all that can happen to a mount, beside its model."""

    def __init__(self, mount: Mount, seed: str, durability: str) -> None:
        self.mount = mount
        self.durability = durability
        self.random = random.Random(seed)
        self.walk = Walk(mount, self.random.randrange(1 << 32))
        self.walk.SNAPSHOTS_MAX = SNAPSHOTS_MAX
        # The disk whose snapshots break.
        self.c = self.walk.models.pop("c.raw")
        self.walk.handles.pop("c.raw").close()
        self.broken: set[str] = set()

    def write(self) -> None:
        for _ in range(6):
            self.walk.do(self.random.choice(Walk.WRITES))

    def create(self) -> None:
        before = set(self.walk.snapshots)
        self.walk.do(Walk.create)
        for name in self.walk.snapshots - before:
            self.c.freeze(name)

    def delete(self) -> None:
        self.walk.do(Walk.delete)
        self.broken &= self.walk.snapshots
        for name in set(self.c.snapshots) - self.walk.snapshots:
            self.c.forget(name)

    def overwrite_all(self) -> None:
        """Break what snapshots have of disk c."""
        live = self.mount.live("c.raw")
        for offset in range(0, C_SIZE, 64 * KiB):
            data = self.random.randbytes(64 * KiB)
            write(live, data, offset)
            self.c.write(data, offset)
        self.broken |= self.walk.snapshots
        wait_until(
            lambda: all(self._state(name) == "broken" for name in self.broken),
            "snapshots to break",
        )
        # Otherwise the next write might break the snapshots of its disk too.
        wait_until(
            lambda: self.mount.status()["store"]["used"] < OTHERS_MAX,
            "space to come back",
        )

    def crash(self) -> None:
        before = generation(self.mount)
        kill(daemon_pid(self.mount))
        wait_generation(self.mount, before + 1)

    def restart(self) -> None:
        done = self.mount.cli("restart")
        assert done.returncode == 0, done.stderr

    def remount(self) -> None:
        self.walk.close()
        self.mount.umount()
        durability = f"--durability={self.durability}"
        # A daemon that dies as it begins to serve a mount is no mount at all.
        tries = 0
        while (done := self.mount.try_mount(durability)).returncode != 0:
            tries += 1
            assert tries <= KILLS, done.stderr
            assert "the daemon could not start" in done.stderr
            wait_until(lambda: not self.mount.processes(), "the end of the keeper")
        self.walk.open()
        self.walk.handles.pop("c.raw", None)

    def delete_all(self) -> None:
        while self.walk.snapshots:
            self.delete()

    def back_up(self) -> None:
        """Copy a disk while its guest rests: the copy is what the disk is."""
        before = generation(self.mount)
        target = self.mount.directory / "copy.raw"
        target.unlink(missing_ok=True)
        done = self.mount.cli("backup", "a.raw", target)
        wait_until(self._has_no_job, "the job to end")
        if done.returncode == 0:
            assert target.read_bytes() == self.walk.models["a.raw"].data
        else:
            # Whose daemon dies before the job is there may start it again.
            assert generation(self.mount) > before, done.stderr

    def _has_no_job(self) -> bool:
        done = self.mount.cli("job", "list", "--json")
        # Or the daemon has died just now.
        return done.returncode == 0 and all(
            job["status"] in ("concluded", "null") for job in json.loads(done.stdout)
        )

    def go_on(self, trap: Trap) -> None:
        """Do everything again and again, until the trap has killed enough."""
        for step in itertools.chain(*[self.STEPS] * ROUNDS_MAX):
            if trap.sprung == KILLS:
                break
            # Not each time, so that it happens here and there.
            if not trap.is_armed and self.random.random() < 0.7:
                trap.arm()
            step(self)
            if step is Scenario.remount:
                self.check()

    STEPS = (
        write,
        create,
        write,
        create,
        write,
        back_up,
        delete,
        write,
        overwrite_all,
        crash,
        write,
        restart,
        remount,
    )

    def _state(self, snapshot: str) -> str:
        path = self.mount.snapshot(snapshot, "c.raw")
        return os.getxattr(path, "user.fleecefs.state").decode()

    # -- what has to be true

    def check(self) -> None:
        self.walk.check()
        assert self.mount.live("c.raw").read_bytes() == self.c.data
        assert set(os.listdir(self.mount.snapshots)) == self.walk.snapshots
        for name, content in self.c.snapshots.items():
            path = self.mount.snapshot(name, "c.raw")
            if name in self.broken:
                assert self._state(name) == "broken"
                with pytest.raises(OSError, match="Input/output error"):
                    read(path, 1, 0)
            else:
                assert path.read_bytes() == content, path


def test_there_are_kill_points():
    assert len(POINTS) > 30


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.logs(DIED)
@pytest.mark.logs("is broken: could not preserve")
def test_death_at(mounted, tmpfs_path, monkeypatch, point):
    trap = Trap(tmpfs_path / "kills")
    monkeypatch.setenv("FLEECEFS_KILL", f"{point}:1:{trap.path}")
    disks = {"a.raw": noise(200 * KiB), "b.raw": 250 * KiB, "c.raw": noise(C_SIZE)}
    first, second = random.Random(point).sample(["process", "host"], 2)
    mount = mounted(disks, *LIMITS, f"--durability={first}")
    scenario = Scenario(mount, point, first)

    scenario.go_on(trap)
    if trap.sprung < KILLS:
        # What a snapshot that survives the host needs does so too.
        scenario.delete_all()
        scenario.durability = second
        scenario.remount()
        scenario.go_on(trap)

    assert trap.sprung == KILLS, "nobody came there"
    scenario.check()
    scenario.remount()
    scenario.check()
    scenario.delete_all()
    scenario.walk.close()
    check_nothing_is_left(mount)


def check_nothing_is_left(mount: Mount) -> None:
    """Without snapshots no space is in use, not even what a crash left behind."""
    mount.remount()
    status = mount.status()
    assert (status["ram"]["used"], status["store"]["used"]) == (0, 0)
    for base in mount.state, Path(status["runtime"]):
        assert list(base.glob("disks/*/epochs/*")) == []
