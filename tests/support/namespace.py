"""A mount namespace of our own, for what depends on the whole machine.

In it /run is an empty tmpfs, so no other daemon is to be found, and anybody may use
/dev/fuse, as on a machine with udev. When its last process has ended, all that was
mounted in it is gone.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.mount import FLEECEFS, PATIENCE, require_mount, wait_until

NOBODY = 65534

_MARKER = "FLEECEFS_TEST"

# The first is for tests that run at the same time: copies of their mounts would keep
# these from ending.
_SETUP = """
umount --all --lazy --types fuse.fleecefs 2>/dev/null
set -e
mount -t tmpfs -o mode=755 none /run
mknod -m 666 /run/fuse c 10 229
mount --bind /run/fuse /dev/fuse
mkdir -m 700 /run/home
chown 65534:65534 /run/home
echo ready
exec sleep infinity
"""


class Namespace:
    """A context manager. Commands run in `home`, as root or as nobody."""

    home = Path("/run/home")

    def __init__(self) -> None:
        require_mount()
        self._marker = tempfile.mktemp(prefix="namespace-", dir="")

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation=slave", "sh", "-c", _SETUP],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=os.environ | {_MARKER: self._marker},
            text=True,
        )
        assert self._holder.stdout is not None
        with self._holder.stdout as answer:
            is_ready = answer.readline() == "ready\n"
        if not is_ready:
            self.__exit__(None, None, None)
        assert is_ready
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._holder.wait(PATIENCE)
        wait_until(lambda: not self.processes(), "the end of killed processes")

    @property
    def root(self) -> Path:
        """Return where its files can be reached from outside."""
        return Path(f"/proc/{self._holder.pid}/root")

    def processes(self) -> list[int]:
        marker = os.fsencode(f"{_MARKER}={self._marker}")
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if marker in path.read_bytes().split(b"\0"):
                    found.append(int(path.parts[2]))
        return found

    def command(self, *words: str | Path, user: bool = False) -> list[str]:
        """Return what runs a command in here."""
        enter = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        as_user = [
            "setpriv",
            f"--reuid={NOBODY}",
            f"--regid={NOBODY}",
            "--clear-groups",
        ]
        # nsenter leaves us in the root directory.
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', self.home]
        return [
            *map(str, [*enter, *(as_user if user else []), *inside, *words]),
        ]

    def environment(self, *, user: bool = False) -> dict[str, str]:
        """Return the environment of commands in here; no mount is chosen by it."""
        own = {_MARKER: self._marker, "HOME": str(self.home)}
        if user:
            own["XDG_RUNTIME_DIR"] = str(self.home)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("XDG_", "FLEECEFS_"))
        }
        return inherited | own

    def run(
        self, *words: str | Path, user: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in here and return how it ended."""
        return subprocess.run(
            self.command(*words, user=user),
            env=self.environment(user=user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def do(self, *words: str | Path, user: bool = False) -> str:
        """Run a command that has to succeed and return what it printed."""
        done = self.run(*words, user=user)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def cli(
        self, *arguments: str | Path, user: bool = False
    ) -> subprocess.CompletedProcess[str]:
        return self.run(FLEECEFS, *arguments, user=user)

    def mounts(self) -> list[str]:
        """Return where fleecefs is mounted in here."""
        table = Path(f"/proc/{self._holder.pid}/mounts").read_text()
        lines = [line.split(" ") for line in table.splitlines()]
        return [fields[1] for fields in lines if fields[2] == "fuse.fleecefs"]


def require_user(namespace: Namespace) -> None:
    """Skip where nobody can not even start fleecefs; in CI that is a failure."""
    done = namespace.cli("--version", user=True)
    if done.returncode == 0:
        return
    reason = f"nobody can not run {FLEECEFS}: {done.stderr.strip()}"
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)
