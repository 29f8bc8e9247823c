"""The keeper: a tiny parent that owns the /dev/fuse descriptor.

It mounts, starts the daemon with the descriptor, and waits. It never touches its own
mount. Standard library only, no threads: it has to stay alive when all else fails.

`launch` is what `fleecefs mount` calls: it starts a keeper and waits until the mount is
usable. The keeper is told on stdin what to mount, and reports one line of JSON.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

from fleecefs.errors import Error
from fleecefs.fuse.mount import check_mountpoint, mount, unmount

# -P: a file of the current directory must not be taken for a module of ours.
_PYTHON = [sys.executable, "-P", "-m"]


class LaunchFailed(Error):
    """The mount did not become usable."""


def launch(settings: dict[str, Any], foreground: bool) -> None:
    """Start a keeper and return when the mount is usable, or, in the foreground, ended.

    Raises LaunchFailed with what the keeper or the daemon said.
    """
    ours, theirs = os.pipe()
    output = None if foreground else subprocess.DEVNULL
    keeper = subprocess.Popen(
        [*_PYTHON, "fleecefs.keeper", str(theirs)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=[theirs],
        start_new_session=not foreground,
        cwd="/",
    )
    os.close(theirs)
    assert keeper.stdin is not None
    with keeper.stdin:
        keeper.stdin.write(json.dumps(settings).encode())
    with open(ours, "rb") as reports:
        line = reports.readline()
    if not line:
        raise LaunchFailed(
            f"the daemon ended while it started; see {settings['log'] or 'above'}"
        )
    said = json.loads(line)
    if "error" in said:
        keeper.wait()
        raise LaunchFailed(said["error"])
    if foreground:
        _wait_in_foreground(keeper)


def _wait_in_foreground(keeper: subprocess.Popen[bytes]) -> None:
    """Wait for the keeper; Ctrl-C reaches it by itself, as it is in our group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: keeper.terminate())
    if keeper.wait():
        raise LaunchFailed("the daemon failed, and the mount is gone")


class Keeper:
    """One mount and the daemon that serves it."""

    def __init__(self, settings: dict[str, Any], report_fd: int) -> None:
        self._settings = settings
        self._mountpoint: str = settings["mount"]
        self._report_fd = report_fd
        self._fuse_fd = -1
        self._daemon: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Mount, and keep a daemon running until it is unmounted."""
        for number in signal.SIGTERM, signal.SIGINT:
            signal.signal(number, self._pass_on)
        try:
            check_mountpoint(self._mountpoint)
            self._fuse_fd = mount(
                self._mountpoint, allow_other=self._settings["allow_other"]
            )
        except OSError as e:
            self._report(str(e))
            return 1
        self._start()
        os.close(self._report_fd)
        assert self._daemon is not None
        code = self._daemon.wait()
        # Frees whoever still waits for an answer.
        os.close(self._fuse_fd)
        unmount(self._mountpoint, lazy=True)
        return 1 if code else 0

    def _start(self) -> None:
        self._daemon = subprocess.Popen(
            [*_PYTHON, "fleecefs.daemon", str(self._fuse_fd), str(self._report_fd)],
            stdin=subprocess.PIPE,
            pass_fds=[self._fuse_fd, self._report_fd],
        )
        assert self._daemon.stdin is not None
        with self._daemon.stdin, contextlib.suppress(BrokenPipeError):
            self._daemon.stdin.write(json.dumps(self._settings).encode())

    def _pass_on(self, number: int, frame: object) -> None:
        """Let the daemon end: it finishes what is running and unmounts."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)

    def _report(self, error: str) -> None:
        os.write(self._report_fd, json.dumps({"error": error}).encode() + b"\n")


def main() -> int:
    settings = json.load(sys.stdin)
    return Keeper(settings, int(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
