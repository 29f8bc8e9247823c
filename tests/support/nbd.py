"""A slow, failing or hanging target: nbdkit's filters behind nbdfuse.

For the daemon it is a file on a file system of somebody else, whose server may do what
it likes: answer in time, late, with an error, or not at all.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.support.mount import run, wait_until

TOOLS = "nbdkit", "nbdfuse"


def require_nbd() -> None:
    """Skip a test where there is no nbdkit; in CI that is a failure instead."""
    if not all(map(shutil.which, TOOLS)) and "CI" not in os.environ:
        pytest.skip("needs nbdkit and nbdfuse")


class NbdTarget:
    """A file of `size` bytes in memory, at `path`; gone at the end of the `with`.

    `filters` are nbdkit's, with their parameters among `parameters`.
    """

    def __init__(
        self, directory: Path, size: int, filters: str = "", *parameters: str
    ) -> None:
        directory.mkdir()
        self.point = directory / "nbd"
        self.point.mkdir()
        self.path = self.point / "target.raw"
        # While it is there, the error filter fails what it is told to.
        self.failing = directory / "failing"
        self._control = directory / "pause"
        self._command = [
            *("nbdkit", "--foreground", "--exit-with-parent", "--filter=pause"),
            *(f"--filter={name}" for name in filters.split()),
            *("memory", str(size), f"pause-control={self._control}"),
            *(each.format(failing=self.failing) for each in parameters),
        ]

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            ["nbdfuse", self.path, "[", *self._command, "]"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(self._is_served, "nbdfuse")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def hang(self) -> None:
        """Answer nothing any more; what is answered just now, still is."""
        self._tell(b"p", b"P")

    def go_on(self) -> None:
        self._tell(b"r", b"R")

    def _tell(self, letter: bytes, answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self._control))
            control.sendall(letter)
            assert control.recv(1) == answer

    def _is_served(self) -> bool:
        assert self._server.poll() is None, "nbdfuse has ended"
        return self.path.exists()

    def _end(self) -> None:
        # nbdfuse with its nbdkit, which would not end while it answers nothing. What
        # hangs fails as soon as nobody serves it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()
        with contextlib.suppress(AssertionError):
            run("fusermount3", "-u", "-z", self.point)
