"""Every kill point: the daemon dies there, and nobody can tell afterwards.

The names come from the source: a kill point that no scenario passes fails its test.
"""

import itertools
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import fleecefs
from fleecefs.control.client import Client, ConnectionLost
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.file import DescriptorFile
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

# Where bitmaps have something to lose; elsewhere they would only take time.
WITH_BITMAPS = re.compile(
    r"activity|bitmap|job\.committed|end|start|replace|write|overwrite"
)

# The same for mirrors.
WITH_MIRRORS = re.compile(r"mirror|move|replace|start")

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


class Recorded(NamedTuple):
    """What a bitmap has to have.

    That is where the disk is not what it was when the bitmap began, and what it had
    when it was disabled: then `base` is None.
    """

    granularity: int
    base: bytes | None
    fixed: frozenset[int] = frozenset()

    def must(self, content: bytes) -> frozenset[int]:
        if self.base is None:
            return self.fixed
        unit, base = self.granularity, self.base
        return self.fixed | {
            at // unit
            for at in range(0, len(base), unit)
            if content[at : at + unit] != base[at : at + unit]
        }


class Bitmaps:
    """The dirty bitmaps of disk a.raw, beside what each has to have.

    A command whose daemon dies has happened or not; so a bitmap may have to have one of
    several things, and if None is among them, it may be missing.
    """

    COUNT_MAX = 4
    DISK = "a.raw"

    def __init__(self, mount: Mount, choice: random.Random) -> None:
        self._mount = mount
        self._random = choice
        self._control = str(Path(mount.status()["runtime"], "control"))
        self._numbers = itertools.count(1)
        self.wanted: dict[str, tuple[Recorded | None, ...]] = {}
        self.transient: set[str] = set()

    def change(self, content: bytes) -> None:
        """Do some of all that can be done to bitmaps, while the guest rests."""
        changes: list[Callable[[bytes], None]] = [self.add, self.clear]
        changes += self._random.sample([self.toggle, self.merge, self.keep], 2)
        self._random.shuffle(changes)
        while not self.wanted:
            self.add(content)
            self.check(content)
        for change in changes:
            change(content)
            self.check(content)
        while len(self.wanted) > self.COUNT_MAX:
            name = self._random.choice(sorted(self.wanted))
            self._do("block-dirty-bitmap-remove", name, None)
            self.check(content)
        self._execute("fleecefs-bitmap-save")

    def add(self, content: bytes) -> None:
        name = f"b{next(self._numbers)}"
        granularity = self._random.choice([512, 4 * KiB, 64 * KiB])
        is_persistent = self._random.random() < 0.7
        self.wanted[name] = (None,)
        if not is_persistent:
            self.transient.add(name)
        self._do(
            "block-dirty-bitmap-add",
            name,
            Recorded(granularity, content),
            granularity=granularity,
            persistent=is_persistent,
        )

    def clear(self, content: bytes) -> None:
        name, found = self._choose()
        base = None if found.base is None else content
        self._do("block-dirty-bitmap-clear", name, Recorded(found.granularity, base))

    def toggle(self, content: bytes) -> None:
        """Disable a bitmap, or enable it again."""
        name, found = self._choose()
        must = found.must(content)
        if found.base is None:
            after = Recorded(found.granularity, content, must)
            self._do("block-dirty-bitmap-enable", name, after)
        else:
            after = Recorded(found.granularity, None, must)
            self._do("block-dirty-bitmap-disable", name, after)

    def merge(self, content: bytes) -> None:
        """Add to a bitmap what another of its granularity has."""
        name, found = self._choose()
        other, source = self._choose()
        if source.granularity == found.granularity:
            after = found._replace(fixed=found.fixed | source.must(content))
            self._do(
                "block-dirty-bitmap-merge", None, after, target=name, bitmaps=[other]
            )

    def keep(self, content: bytes) -> None:
        """Let a bitmap be persistent, or not any more."""
        name, found = self._choose()
        is_persistent = name in self.transient
        # Whatever comes of it.
        self.transient.add(name)
        is_done = self._do("fleecefs-bitmap-set", name, found, persistent=is_persistent)
        if is_done and is_persistent:
            self.transient.remove(name)

    def _choose(self) -> tuple[str, Recorded]:
        name = self._random.choice(sorted(self.wanted))
        (found,) = self.wanted[name]
        assert found is not None
        return name, found

    def _do(
        self,
        command: str,
        name: str | None,
        after: Recorded | None,
        **arguments: object,
    ) -> bool:
        """Execute a command about a bitmap; tell whether it was answered."""
        key = str(name or arguments["target"])
        before = self.wanted[key]
        self.wanted[key] = (*before, after)
        arguments["name"] = name
        if self._execute(command, node=self.DISK, **arguments) is None:
            return False
        self.wanted[key] = (after,)
        self._forget_missing()
        return True

    def _forget_missing(self) -> None:
        self.wanted = {n: w for n, w in self.wanted.items() if w != (None,)}
        self.transient &= self.wanted.keys()

    def _execute(self, command: str, **arguments: object) -> object:
        """Return what a command returns; None if its daemon died at it."""
        while True:
            try:
                with Client(self._control) as client:
                    try:
                        return client.execute(command, **arguments)
                    except ConnectionLost:
                        return None
            except ConnectionLost:
                wait_until(self._answers, "a daemon")

    def _answers(self) -> bool:
        try:
            with Client(self._control):
                return True
        except ConnectionLost:
            return False

    def ended(self) -> None:
        """What is transient goes with a mount, unless its daemon dies at the end."""
        for name in self.transient:
            self.wanted[name] = (None, *self.wanted[name])

    def replace(self, name: str, *after: Recorded | None) -> None:
        self.wanted[name] = after

    def persistent(self) -> str | None:
        """Return one that is there for certain, and records."""
        found = [
            name
            for name, wanted in self.wanted.items()
            if name not in self.transient and wanted[0] and wanted[0].base is not None
        ]
        return self._random.choice(found) if found else None

    def check(self, content: bytes) -> None:
        """Check that no bit is missing, and find out what has happened."""
        content = bytes(content)
        listed = None
        while listed is None:
            listed = self._execute("fleecefs-bitmap-list", node=self.DISK)
        assert isinstance(listed, list)
        assert [each for each in listed if each["inconsistent"]] == []
        recording = {each["name"]: each["recording"] for each in listed}
        dirty = self._export() if listed else {}
        assert recording.keys() == dirty.keys()
        assert dirty.keys() <= self.wanted.keys()
        for name, wanted in self.wanted.items():
            if name not in dirty:
                assert None in wanted, name
                self.wanted[name] = (None,)
                continue
            granularity, bits = dirty[name]
            good = [
                each
                for each in wanted
                if each is not None
                and each.granularity == granularity
                and (each.base is not None) == recording[name]
                and each.must(content) <= bits
            ]
            assert good, f"{name} lacks a bit"
            # Of several, the one that asks for the least: it is sure.
            self.wanted[name] = (min(good, key=lambda each: len(each.must(content))),)
        self._forget_missing()

    def _export(self) -> dict[str, tuple[int, frozenset[int]]]:
        """Return granularity and dirty bits of each bitmap, by name."""
        while True:
            path = self._mount.directory / f"export{next(self._numbers)}"
            done = self._execute(
                "fleecefs-bitmap-export", node=self.DISK, file=str(path)
            )
            if done is not None:
                break
        with path.open("rb") as opened:
            file = DescriptorFile(opened.fileno(), str(path))
            contents = read_contents(file)
            return {
                name: (
                    entry.granularity,
                    frozenset(contents.bits(file, name).search(1)),
                )
                for name, entry in contents.entries.items()
            }


class Scenario:
    """A guest, its snapshots and all that can happen to a mount, beside its model."""

    def __init__(self, mount: Mount, point: str, durability: str) -> None:
        self.mount = mount
        self.has_bitmaps = WITH_BITMAPS.match(point) is not None
        self.has_mirrors = WITH_MIRRORS.match(point) is not None
        self.durability = durability
        self.random = random.Random(point)
        self.walk = Walk(mount, self.random.randrange(1 << 32))
        self.walk.SNAPSHOTS_MAX = SNAPSHOTS_MAX
        # The disk whose snapshots break.
        self.c = self.walk.models.pop("c.raw")
        self.walk.handles.pop("c.raw").close()
        self.broken: set[str] = set()
        self.bitmaps = Bitmaps(mount, self.random)
        # Which bitmap has what was written since this backup, and what that is.
        self.backup: tuple[str, bytes] | None = None
        self._targets = itertools.count(1)

    @property
    def a(self) -> bytes:
        return bytes(self.walk.models["a.raw"].data)

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
        self.bitmaps.ended()
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

    def change_bitmaps(self) -> None:
        self.bitmaps.change(self.a)

    def back_up_dirty(self) -> None:
        """Bring a backup up to date with what is dirty since it was made."""
        name = self.bitmaps.persistent()
        if name is None:
            return
        target = self.mount.directory / f"{name}.raw"
        (before,) = self.bitmaps.wanted[name]
        assert before is not None
        is_full = self.backup != (name, before.base)
        if is_full:
            target.unlink(missing_ok=True)
        sync = "full" if is_full else "incremental"
        generation_before = generation(self.mount)
        done = self.mount.cli(
            "backup", "a.raw", target, f"--sync={sync}", f"--bitmap={name}"
        )
        wait_until(self._has_no_job, "the job to end")
        after = Recorded(before.granularity, self.a)
        if done.returncode == 0:
            assert target.read_bytes() == self.a
            self.backup = name, self.a
            self.bitmaps.replace(name, after)
        else:
            assert generation(self.mount) > generation_before, done.stderr
            self.backup = None
            self.bitmaps.replace(name, before, after)
        self.bitmaps.check(self.a)

    def mirror(self) -> None:
        """Mirror a disk while its guest writes; then it moves, or it stays."""
        target = self.mount.directory / f"mirror{next(self._targets)}.raw"
        mode = self.random.choice(["background", "write-blocking"])
        while not self._jobs():
            self.mount.cli(
                "mirror",
                "a.raw",
                target,
                "--granularity=4K",
                f"--copy-mode={mode}",
                "--detach",
            )
        self.write()
        self._wait_job("ready")
        self.write()
        verb = self.random.choice(["complete", "complete", "cancel"])
        source = target if verb == "complete" else self._source()
        # Whose daemon dies may not have heard it; who has, may have ended.
        while self.mount.cli("job", verb, "a.raw").returncode == 1:
            pass
        wait_until(self._has_no_job, "the mirror to end")
        assert self._source() == source
        assert target.read_bytes() == self.a
        assert self.mount.live("a.raw").read_bytes() == self.a

    def _source(self) -> Path:
        while (done := self.mount.cli("status", "--json")).returncode != 0:
            pass
        disks = json.loads(done.stdout)["disks"]
        return Path(next(d["source"] for d in disks if d["name"] == "a.raw"))

    def _jobs(self) -> list[str]:
        """Return the statuses of jobs that go on."""
        while (done := self.mount.cli("job", "list", "--json")).returncode != 0:
            pass
        return [job["status"] for job in json.loads(done.stdout)]

    def _wait_job(self, status: str) -> None:
        wait_until(lambda: self._jobs() == [status], f"a {status} job")

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
            if step in self.BITMAP_STEPS and not self.has_bitmaps:
                continue
            if step is Scenario.mirror and not self.has_mirrors:
                continue
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
        change_bitmaps,
        write,
        back_up_dirty,
        mirror,
        delete,
        write,
        back_up_dirty,
        overwrite_all,
        crash,
        write,
        restart,
        remount,
    )

    BITMAP_STEPS = (change_bitmaps, back_up_dirty)

    def _state(self, snapshot: str) -> str:
        path = self.mount.snapshot(snapshot, "c.raw")
        return os.getxattr(path, "user.fleecefs.state").decode()

    # -- what has to be true

    def check(self) -> None:
        self.walk.check()
        self.bitmaps.check(self.a)
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
