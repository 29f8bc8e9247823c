"""Daemons are killed while a guest writes: bitmaps lack nothing of it.

A guest writes at random all the time, through the mount. Meanwhile its daemon is killed
again and again, and backups are made of what one bitmap says. Each of them has to be
what a snapshot of the same time is.
"""

import json
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fleecefs.control.client import Client, CommandFailed, ConnectionLost
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.units import KiB, MiB
from tests.support.killer import DIED, Killer
from tests.support.mount import PATIENCE, Mount, wait_until
from tests.support.walk import noise

DISK = "a.raw"
SIZE = 16 * MiB
KILLS = 20


class Guest:
    """Writes, zeroes and discards at random; `paused` is a moment without requests."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._path = path
        self._turn = threading.Lock()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        if error is None:
            assert not self._thread.is_alive(), "the guest hangs"
            assert self._error is None

    @contextmanager
    def paused(self) -> Iterator[None]:
        with self._turn:
            yield

    def _run(self) -> None:
        choice = random.Random(0)
        try:
            fd = os.open(self._path, os.O_RDWR)
            try:
                while not self._stopped.wait(0.002):
                    with self._turn:
                        self._write(fd, choice)
            finally:
                os.close(fd)
        except BaseException as e:
            self._error = e

    def _write(self, fd: int, choice: random.Random) -> None:
        # Now here, now there: else all would be dirty soon.
        place = self.count // 100 * 977 * KiB % SIZE
        length = choice.choice([1, 512, 4 * KiB, 5000])
        offset = min(place + choice.randrange(300 * KiB), SIZE - length)
        assert os.pwrite(fd, choice.randbytes(length), offset) == length
        self.count += 1


class Control:
    """The control socket of a mount whose daemon may die at any time."""

    def __init__(self, mount: Mount) -> None:
        self._path = str(Path(mount.status()["runtime"], "control"))

    def execute(self, command: str, **arguments: object) -> Any:
        """Execute a command, again if the daemon died at it."""
        results: list[Any] = []

        def is_done() -> bool:
            try:
                with Client(self._path) as client:
                    results.append(client.execute(command, **arguments))
            except ConnectionLost:
                return False
            return True

        wait_until(is_done, command)
        return results[0]


def dirty_bits(mount: Mount, control: Control, path: Path) -> dict[str, Any]:
    """Return the granularity and the bits of all bitmaps, by name."""

    def is_exported() -> bool:
        path.unlink(missing_ok=True)
        try:
            control.execute("fleecefs-bitmap-export", node=DISK, file=str(path))
        except CommandFailed:
            # Whose daemon died may have written the file.
            return False
        return True

    wait_until(is_exported, "bitmaps")
    with path.open("rb") as opened:
        file = DescriptorFile(opened.fileno(), str(path))
        contents = read_contents(file)
        return {
            name: (entry.granularity, contents.bits(file, name))
            for name, entry in contents.entries.items()
        }


class Backups:
    """A backup that is brought up to date with what is dirty, again and again."""

    def __init__(self, mount: Mount, guest: Guest) -> None:
        self.count = 0
        self._mount = mount
        self._guest = guest
        self._target = mount.directory / "backup.raw"

    def back_up(self, sync: str) -> None:
        """Begin one, beside a snapshot; the target is what that is in the end."""
        job = f"backup{self.count}"
        command = (
            *("backup", DISK, self._target, f"--sync={sync}", "--bitmap=job"),
            *(f"--job-id={job}", "--no-auto-dismiss", "--detach"),
        )
        with self._guest.paused():
            wait_until(
                lambda: self._mount.cli(*command).returncode == 0 or self._has(job),
                "a job",
            )
            content = self._mount.live(DISK).read_bytes()
        wait_until(lambda: self._status(job) == "concluded", "the end of the job")
        assert self._target.read_bytes() == content, f"{job}: {sync}"
        wait_until(
            lambda: (
                self._mount.cli("job", "dismiss", job).returncode == 0
                or not self._has(job)
            ),
            "the job to be gone",
        )
        self.count += 1

    def _status(self, job: str) -> str | None:
        done = self._mount.cli("job", "list", "--json")
        if done.returncode != 0:
            return None
        found = {each["id"]: each for each in json.loads(done.stdout)}
        if job in found:
            assert found[job].get("error") is None, found[job]
            return str(found[job]["status"])
        # Over, and its result went with its daemon.
        return "concluded"

    def _has(self, job: str) -> bool:
        done = self._mount.cli("job", "list", "--json")
        return done.returncode == 0 and job in [
            each["id"] for each in json.loads(done.stdout)
        ]


@pytest.mark.logs(DIED)
def test_no_bit_is_missing_however_often_daemons_die(mounted, tmp_path):
    mount = mounted({DISK: noise(SIZE)})
    control = Control(mount)
    for name, granularity, is_persistent in (
        ("all", 4 * KiB, True),
        ("transient", 512, False),
        ("job", 64 * KiB, True),
    ):
        control.execute(
            "block-dirty-bitmap-add",
            node=DISK,
            name=name,
            granularity=granularity,
            persistent=is_persistent,
        )
    begin = mount.live(DISK).read_bytes()

    with Guest(mount.live(DISK)) as guest:
        backups = Backups(mount, guest)
        backups.back_up("full")
        with Killer(mount, KILLS, seed=1) as killer:
            while not killer.ended:
                backups.back_up("incremental")
                control.execute("fleecefs-bitmap-save")
        backups.back_up("incremental")
        with guest.paused():
            now = mount.live(DISK).read_bytes()
            found = dirty_bits(mount, control, tmp_path / "exported")

    assert killer.kills == KILLS
    assert guest.count > 100
    assert found.keys() == {"all", "transient", "job"}
    for name in "all", "transient":
        granularity, bits = found[name]
        missing = [
            at
            for at in range(0, SIZE, granularity)
            if begin[at : at + granularity] != now[at : at + granularity]
            and not bits[at // granularity]
        ]
        assert missing == [], name
        assert not bits.all(), "it tells nothing"
    listed = control.execute("fleecefs-bitmap-list", node=DISK)
    assert [each for each in listed if each["inconsistent"] or each["busy"]] == []
