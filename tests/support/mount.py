"""Mounts that are always undone: of fleecefs, of loop devices, of file systems.

Whatever a test does and however it fails, no daemon and no mount stays behind. All
processes of a mount have its directory in their environment, so that also a daemon that
was never heard of is found; one that hangs is killed, which ends every request that
waits for it.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from fleecefs.fuse.mount import mounts

FLEECEFS = Path(sys.executable).with_name("fleecefs")

# Long enough for a busy machine; a command that needs it has failed.
PATIENCE = 60.0

# A request that waits for a daemon which hangs can not be ended by its own test: after
# so many seconds the daemon is killed.
LIFE_SECONDS_MAX = 240.0

_MARKER = "FLEECEFS_TEST"


def require_mount() -> None:
    """Skip a test where nothing can be mounted; in CI that is a failure instead."""
    can_mount = os.getuid() == 0 and Path("/dev/fuse").exists()
    if not can_mount and "CI" not in os.environ:
        pytest.skip("needs root and /dev/fuse")


def run(*command: str | Path, timeout: float = PATIENCE) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_until(
    condition: Callable[[], object], what: str, patience: float = PATIENCE
) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(0.005)


def remove_leftovers() -> None:
    """Take down the dead mounts that test runs have left which were killed.

    mkfs.btrfs asks every loop device of the machine what it stands on, and fails where
    one stands on a dead mount.
    """
    for point in mounts():
        if "/fleecefs-" not in point or not _is_dead(point):
            continue
        for device in Path("/dev").glob("loop[0-9]*"):
            if (_backing(device) or "").startswith(f"{point}/"):
                # Not every one is mounted.
                subprocess.run(["umount", "--lazy", device], capture_output=True)
                run("losetup", "--detach", device)
        run("fusermount3", "-u", "-z", point)


def _is_dead(point: str) -> bool:
    try:
        os.stat(point)
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False


class Mount:
    """A fleecefs mount with its sources and its state, all in one directory.

    A context manager: mounted inside, gone afterwards. A disk is given as its bytes,
    as the size of an empty one, or as the path of a source that is there. A daemon that
    logged a warning, or worse, that matches none of `expected_logs` fails the test.
    """

    def __init__(
        self,
        directory: Path,
        disks: Mapping[str, bytes | int | Path],
        *options: str | Path,
        expected_logs: Iterable[str] = (),
    ) -> None:
        self.directory = directory
        self.point = directory / "mount"
        self.state = directory / "state"
        self.log = directory / "fleecefs.log"
        self.options = [str(option) for option in options]
        self.sources: dict[str, Path] = {}
        self._expected = list(expected_logs)
        self._life = threading.Timer(LIFE_SECONDS_MAX, self.kill)
        self._life.daemon = True
        self.point.mkdir(parents=True)
        (directory / "sources").mkdir()
        for name, content in disks.items():
            self.add_disk(name, content)

    def __enter__(self) -> Self:
        self._life.start()
        try:
            self.mount()
        except BaseException:
            self._life.cancel()
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        complaint = None
        try:
            if self.is_mounted:
                complaint = self._end()
        finally:
            self._life.cancel()
            self.kill()
        if error is None:
            assert complaint is None, f"had to be killed: {complaint}"
            unexpected = self.unexpected_log()
            assert not unexpected, "logged, and not expected: " + "\n".join(unexpected)

    def _end(self) -> str | None:
        """Unmount, and return why that did not do, if so."""
        complaint = ""
        try:
            complaint = self.cli("umount", self.point).stderr
            # A keeper whose daemon was killed by the test may be about to end.
            wait_until(lambda: not self.is_mounted and not self.processes(), "end", 5)
        except (AssertionError, subprocess.TimeoutExpired) as e:
            return complaint or str(e)
        return None

    # -- its life

    def mount(self, *options: str | Path) -> None:
        """Mount, again or for the first time; the test's options come last."""
        done = self.try_mount(*options)
        assert done.returncode == 0, f"not mounted: {done.stderr}{self.read_log()}"

    def try_mount(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        disks = [f"--disk={name}={source}" for name, source in self.sources.items()]
        return self.cli(
            "mount",
            *disks,
            f"--state={self.state}",
            f"--log={self.log}",
            *self.options,
            *options,
            self.point,
        )

    def umount(self) -> None:
        """Unmount; the daemon and the keeper have ended on return."""
        done = self.cli("umount", self.point)
        assert done.returncode == 0, f"not unmounted: {done.stderr}{self.read_log()}"
        assert not self.is_mounted

    def remount(self, *options: str | Path) -> None:
        self.umount()
        self.mount(*options)

    def kill(self) -> None:
        """Leave nothing behind, not even what hangs."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(self._is_unmounted, "the end of the mount")
        wait_until(lambda: not self.processes(), "the end of killed processes")
        for directory in _runtime_directories(self.point):
            shutil.rmtree(directory, ignore_errors=True)

    def _is_unmounted(self) -> bool:
        if self.is_mounted:
            # It may fail: who was killed was unmounting, too.
            words = ["fusermount3", "-u", "-z", str(self.point)]
            subprocess.run(words, capture_output=True)
        return not self.is_mounted

    @property
    def is_mounted(self) -> bool:
        return str(self.point) in mounts()

    def processes(self) -> list[int]:
        """Return the process ids of all that was started for this mount."""
        marker = os.fsencode(f"{_MARKER}={self.directory}")
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if marker in path.read_bytes().split(b"\0"):
                    found.append(int(path.parts[2]))
        return found

    # -- its files

    def add_disk(self, name: str, content: bytes | int | Path) -> None:
        """Make a source, or name one, for the next time it is mounted."""
        if isinstance(content, Path):
            self.sources[name] = content
            return
        source = self.directory / "sources" / name
        if isinstance(content, int):
            source.touch()
            os.truncate(source, content)
        else:
            source.write_bytes(content)
        self.sources[name] = source

    def live(self, name: str) -> Path:
        return self.point / name

    @property
    def snapshots(self) -> Path:
        return self.point / "snapshots"

    def snapshot(self, name: str, disk: str) -> Path:
        return self.snapshots / name / disk

    def create(self, name: str) -> None:
        """Take a snapshot of all disks."""
        (self.snapshots / name).mkdir()

    def delete(self, name: str) -> None:
        (self.snapshots / name).rmdir()

    # -- what it says

    def environment(self) -> dict[str, str]:
        """Return the environment of this mount's commands."""
        return os.environ | {
            "FLEECEFS_MOUNT": str(self.point),
            _MARKER: str(self.directory),
        }

    def cli(
        self, *arguments: str | Path, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run fleecefs; it finds this mount by itself."""
        return subprocess.run(
            [str(FLEECEFS), *(str(argument) for argument in arguments)],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=self.directory,
        )

    def json(self, *arguments: str | Path) -> Any:
        """Run fleecefs with --json and return what it printed."""
        done = self.cli(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def events(self) -> "Events":
        """Collect the events of the daemon, in a `with`."""
        return Events(Path(self.status()["runtime"], "control"))

    def status(self) -> Any:
        return self.json("status")

    @property
    def pid(self) -> int:
        return int(self.status()["pid"])

    @property
    def keeper_pid(self) -> int:
        return int(self.status()["keeper-pid"])

    def snapshot_state(self, name: str, disk: str) -> tuple[str, str | None]:
        """Return the state of a disk in a snapshot, and why it is broken."""
        shown = self.json("snapshot", "show", name)
        return next(
            (d["state"], d["reason"]) for d in shown["disks"] if d["name"] == disk
        )

    # -- what it logged

    def read_log(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def unexpected_log(self) -> list[str]:
        """Return the lines of the log that are neither harmless nor expected."""
        return [
            line
            for line in self.read_log().splitlines()
            if not re.match(r"\S+ \S+ (INFO|DEBUG) ", line)
            and not any(re.search(pattern, line) for pattern in self._expected)
        ]


class Events:
    """The events of a daemon, from the beginning of the context on."""

    def __init__(self, control: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._control = control
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._socket.connect(str(self._control))
        self._socket.sendall(b'{"execute": "qmp_capabilities"}\n')
        self._reader.start()
        # Who has got the answer is subscribed.
        wait_until(lambda: len(self._lines) >= 2, "greeting and answer")
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(PATIENCE)
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("r") as lines:
            for line in lines:
                self._lines.append(line)

    def named(self, name: str) -> list[Any]:
        """Return the data of all events of that name until now."""
        messages = [json.loads(line) for line in list(self._lines)]
        return [m["data"] for m in messages if m.get("event") == name]

    def wait(self, name: str) -> Any:
        """Return the data of the first event of that name, once it is there."""
        wait_until(lambda: self.named(name), f"event {name}")
        return self.named(name)[0]


def _runtime_directories(point: Path) -> list[Path]:
    """Return what a killed daemon has left on tmpfs."""
    found = []
    for base in Path("/run/fleecefs"), Path("/dev/shm/fleecefs"):
        for path in base.glob("*/mount.json"):
            with contextlib.suppress(OSError, ValueError):
                if json.loads(path.read_text())["mount"] == str(point):
                    found.append(path.parent)
    return found


@contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """Attach a file to a loop device; options are those of losetup(8)."""
    device = Path(run("losetup", "--find", "--show", *options, path).strip())
    try:
        yield device
    except BaseException:
        run("losetup", "--detach", device)
        raise
    run("losetup", "--detach", device)
    # The kernel detaches when the last user has closed it.
    wait_until(lambda: _backing(device) != str(path), f"the end of {device}")


def _backing(device: Path) -> str | None:
    try:
        text = Path("/sys/block", device.name, "loop/backing_file").read_bytes()
    except OSError:
        return None
    return os.fsdecode(text.removesuffix(b"\n"))


@contextmanager
def filesystem(device: Path, point: Path, *options: str) -> Iterator[Path]:
    """Mount a file system; options are those of mount(8)."""
    point.mkdir(parents=True, exist_ok=True)
    run("mount", *options, device, point)
    try:
        yield point
    except BaseException:
        # What failed may still have files open there.
        run("umount", "--lazy", point)
        raise
    run("umount", point)
