"""Who lets daemons and keepers of a mount die, and what their users feel of it."""

import contextlib
import itertools
import mmap
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.mount import Mount, wait_until

# What the keeper logs of every death.
DIED = r"WARNING keeper: the daemon died"

# Five daemons in a row that died within half a second after they were ready are given
# up: no more than so many at once, and then one that lives longer.
_QUICK_MAX = 3
_SETTLED_SECONDS = 0.7

_BLOCK = 4096


def generation(mount: Mount) -> int:
    """Return which daemon since the mount serves it; -1 before the first is ready."""
    begun = mount.read_log().rpartition("INFO daemon 0 serves")
    found = re.findall(r"INFO daemon (\d+) serves", "".join(begun[1:]))
    return int(found[-1]) if found else -1


def wait_generation(mount: Mount, wanted: int) -> None:
    """Return when a daemon of that generation, or a later one, is ready."""
    wait_until(lambda: generation(mount) >= wanted, f"daemon {wanted}")


def daemon_pid(mount: Mount) -> int:
    """Return the process id of the daemon, found without asking it."""
    found = []

    def is_found() -> bool:
        found[:] = [pid for pid in mount.processes() if _is_daemon(pid)]
        return len(found) == 1

    wait_until(is_found, "a daemon")
    return found[0]


def _is_daemon(pid: int) -> bool:
    try:
        return b"fleecefs.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def kill(*pids: int) -> None:
    """Kill -9, all that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Killer:
    """Kills the daemon `count` times, at random moments, in a thread of its own.

    Some die as they begin to serve, most under way. It has `ended` when the last
    victim's successor is ready.
    """

    def __init__(self, mount: Mount, count: int, seed: int = 0) -> None:
        self.kills = 0
        self._mount = mount
        self._count = count
        self._random = random.Random(seed)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._first = generation(self._mount)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stopped.set()
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            for quick in self._plan():
                wait_generation(self._mount, self._first + self.kills)
                settled = 0 if quick else _SETTLED_SECONDS
                self._stopped.wait(settled + self._random.uniform(0, 0.2))
                if self._stopped.is_set():
                    return
                kill(daemon_pid(self._mount))
                self.kills += 1
            wait_generation(self._mount, self._first + self.kills)
        except BaseException as e:
            self._error = e

    def _plan(self) -> list[bool]:
        """Return for each kill whether it comes quickly."""
        plan: list[bool] = []
        for _ in range(self._count):
            is_enough = all(plan[-_QUICK_MAX:]) and len(plan) >= _QUICK_MAX
            plan.append(not is_enough and self._random.random() < 0.6)
        return plan


class Pulse:
    """Reads the first block of a live disk all the time; `longest` tells the stall."""

    def __init__(self, path: Path) -> None:
        self.longest = 0.0
        self.count = 0
        self._path = path
        self._errors: list[BaseException] = []
        self._stopped = threading.Event()
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
        self._thread.join()
        if error is None:
            assert self._errors == []

    def _run(self) -> None:
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, _BLOCK) as block:
                while not self._stopped.wait(0.002):
                    begin = time.monotonic()
                    assert os.preadv(fd, [block], 0) == _BLOCK
                    self.longest = max(self.longest, time.monotonic() - begin)
                    self.count += 1
        except BaseException as e:
            self._errors.append(e)
        finally:
            os.close(fd)


class Contents:
    """What snapshots showed when they were new, and have to show for ever."""

    def __init__(self, mount: Mount, disk: str) -> None:
        self._mount = mount
        self._disk = disk
        self._names = (f"n{index}" for index in itertools.count())
        self._contents: dict[str, bytes] = {}

    def create(self) -> None:
        """Take a snapshot, and delete the oldest but some."""
        name = next(self._names)
        self._mount.create(name)
        self._contents[name] = self._path(name).read_bytes()
        if len(self._contents) > 4:
            oldest = next(iter(self._contents))
            del self._contents[oldest]
            self._mount.delete(oldest)

    def check(self) -> None:
        for name, content in self._contents.items():
            assert self._path(name).read_bytes() == content, name

    def _path(self, name: str) -> Path:
        return self._mount.snapshot(name, self._disk)
