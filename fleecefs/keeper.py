"""The keeper: a tiny parent that owns the /dev/fuse descriptor.

It mounts, starts the daemon with the descriptor, and waits. When the daemon dies it
starts the next one, which gets every unanswered request again: the mount's users see a
pause. It never touches its own mount. Standard library only, no threads: it has to stay
alive when all else fails.

It gives up when that can not help: five daemons in a row that died as soon as they
served, within 30 s (a request may be the reason), 60 s without a daemon, or a kernel
that can not send requests again (before 6.9). Then it closes the descriptor, which
frees whoever waits, unmounts, and says why.

`launch` is what `fleecefs mount` calls. The settings come on stdin as JSON; the daemon
reports in lines of JSON on a pipe, and the keeper passes the first one to the launcher.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import syslog
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fleecefs.errors import Error, describe
from fleecefs.fuse.mount import (
    check_mountpoint,
    check_no_loop,
    check_outside,
    mount,
    unmount,
)

# -P: a file of the current directory must not be taken for a module of ours.
_PYTHON = [sys.executable, "-P", "-m"]

# Instead of a log file: the journal, or whoever reads /dev/log (logs.py).
JOURNAL = "journal"

# A daemon that ends so wants the next one to take over: an upgrade.
RESTART = 75

# Where the keeper says why it gave up, in the runtime directory (state/runtime.py).
LAST_WORDS = "gave-up"

_CRASHES_MAX = 5
_CRASHES_SECONDS = 30.0
# A daemon that has served for so long did not die of what the one before it died of.
_SETTLED_SECONDS = 0.5
_WITHOUT_DAEMON_SECONDS = 60.0


class LaunchFailed(Error):
    """The mount did not become usable."""


def launch(settings: dict[str, Any]) -> list[str]:
    """Start a keeper; return what people should know when the mount is usable.

    Raises LaunchFailed with what the keeper or the daemon said.
    """
    ours, theirs = os.pipe()
    keeper = subprocess.Popen(
        [*_PYTHON, "fleecefs.keeper", str(theirs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs],
        start_new_session=True,
        cwd="/",
    )
    os.close(theirs)
    assert keeper.stdin is not None
    with keeper.stdin:
        keeper.stdin.write(json.dumps(settings).encode())
    with open(ours, "rb") as reports:
        line = reports.readline()
    if not line:
        raise LaunchFailed(f"the daemon ended as it started; see {settings['log']}")
    said = json.loads(line)
    if "error" in said:
        keeper.wait()
        raise LaunchFailed(said["error"])
    notes: list[str] = said["notes"]
    return notes


def stay(settings: dict[str, Any]) -> NoReturn:
    """Become the keeper: for the foreground, where a supervisor looks at us."""
    read, write = os.pipe()
    os.write(write, json.dumps(settings).encode())
    os.close(write)
    os.dup2(read, 0)
    os.chdir("/")
    os.execv(sys.executable, [*_PYTHON, "fleecefs.keeper", "-1"])


class Keeper:
    """One mount and the daemon that serves it."""

    def __init__(self, settings: dict[str, Any], launcher_fd: int) -> None:
        self._settings = settings
        self._mountpoint: str = settings["mount"]
        self._launcher_fd = launcher_fd
        self._is_told = False
        self._fuse_fd = -1
        self._daemon: subprocess.Popen[bytes] | None = None
        self._generation = 0
        self._crashes: list[float] = []
        # What the daemon said when it became ready; None before.
        self._ready: dict[str, Any] | None = None
        # Signals that came, and when: a daemon is told when it is ready for them, and
        # the next one too if it died of something else meanwhile.
        self._asked: dict[signal.Signals, float] = {}
        self._takes_signals = False

    def run(self) -> int:
        """Mount, and keep a daemon running until it is unmounted."""
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, self._pass_on)
        try:
            self._check_places(check_no_loop)
            check_mountpoint(self._mountpoint)
            self._check_places(check_outside)
            self._fuse_fd = mount(
                self._mountpoint, allow_other=self._settings["allow_other"]
            )
        except OSError as e:
            self._tell_launcher({"error": describe(e)})
            return 1
        reason = self._keep_running()
        # Frees whoever still waits for an answer.
        os.close(self._fuse_fd)
        unmount(self._mountpoint, lazy=True)
        if reason is None:
            return 0
        if self._ready is None:
            self._tell_launcher({"error": reason})
        else:
            self._say(reason, Path(self._ready["runtime"]))
        return 1

    def _check_places(self, check: Callable[[str, str, str], None]) -> None:
        """Raise NotUsable if something the daemon needs would be on its own mount."""
        settings = self._settings
        places = {what: settings[what] for what in ("state", "store", "log")}
        for what, path in places.items():
            if path is not None and path != JOURNAL:
                check(self._mountpoint, what, path)
        for disk in settings["disks"]:
            check(self._mountpoint, "source", disk["source"])

    def _keep_running(self) -> str | None:
        """Start daemons until one ends well; return why the keeper gave up, or None."""
        without_since = time.monotonic()
        while True:
            reports = self._start()
            ready_at = self._wait_ready(reports, without_since)
            if ready_at is None and self._is_overdue(without_since):
                assert self._daemon is not None
                self._daemon.kill()
                self._daemon.wait()
                return f"no daemon for {_WITHOUT_DAEMON_SECONDS:g} s"
            code = self._wait_end(reports)
            if code == 0:
                return None
            if self._ready is None:
                return "the daemon could not start"
            self._generation += 1
            if ready_at is not None:
                without_since = time.monotonic()
            if code == RESTART:
                continue
            reason = self._reason_to_give_up(ready_at, code)
            if reason is not None:
                return reason

    def _start(self) -> int:
        """Start a daemon; return the descriptor its reports come from."""
        reports, theirs = os.pipe()
        settings = self._settings | {
            "generation": self._generation,
            "keeper": os.getpid(),
        }
        self._daemon = subprocess.Popen(
            [*_PYTHON, "fleecefs.daemon", str(self._fuse_fd), str(theirs)],
            stdin=subprocess.PIPE,
            pass_fds=[self._fuse_fd, theirs],
        )
        os.close(theirs)
        assert self._daemon.stdin is not None
        with self._daemon.stdin, contextlib.suppress(BrokenPipeError):
            self._daemon.stdin.write(json.dumps(settings).encode())
        return reports

    def _wait_ready(self, reports: int, since: float) -> float | None:
        """Wait for the daemon's report; return when it became ready, None if never."""
        assert self._daemon is not None
        # Not select(2), which knows 1024 descriptors.
        poller = select.poll()
        poller.register(reports, select.POLLIN)
        data = b""
        while not data.endswith(b"\n"):
            left = since + _WITHOUT_DAEMON_SECONDS - time.monotonic()
            if not poller.poll(max(0, left) * 1000):
                return None
            part = os.read(reports, 65536)
            if not part:
                return None
            data += part
        said: dict[str, Any] = json.loads(data)
        self._tell_launcher(said)
        if "ready" not in said:
            if self._ready is not None:
                self._log("ERROR", said["error"])
            return None
        self._ready = said
        self._takes_signals = True
        for number, when in list(self._asked.items()):
            if time.monotonic() - when < _WITHOUT_DAEMON_SECONDS:
                self._daemon.send_signal(number)
        return time.monotonic()

    def _wait_end(self, reports: int) -> int:
        assert self._daemon is not None
        try:
            return self._daemon.wait()
        finally:
            self._takes_signals = False
            os.close(reports)

    def _is_overdue(self, since: float) -> bool:
        return time.monotonic() - since >= _WITHOUT_DAEMON_SECONDS

    def _reason_to_give_up(self, ready_at: float | None, code: int) -> str | None:
        assert self._ready is not None
        now = time.monotonic()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not self._ready["resend"]:
            return (
                f"the daemon died ({how}), and this kernel can not send requests again"
            )
        if ready_at is not None and now - ready_at >= _SETTLED_SECONDS:
            self._crashes.clear()
        self._crashes.append(now)
        if (
            len(self._crashes) >= _CRASHES_MAX
            and now - self._crashes[-_CRASHES_MAX] <= _CRASHES_SECONDS
        ):
            return f"{_CRASHES_MAX} daemons in a row died as they started ({how})"
        self._log("WARNING", f"the daemon died ({how}); starting the next one")
        return None

    def _pass_on(self, number: int, frame: object) -> None:
        """Let the daemon end, or open its log again."""
        number = signal.SIGHUP if number == signal.SIGHUP else signal.SIGTERM
        self._asked[number] = time.monotonic()
        if self._takes_signals:
            assert self._daemon is not None
            self._daemon.send_signal(number)

    # -- what people hear

    def _tell_launcher(self, said: dict[str, Any]) -> None:
        """Pass on, once, how the start went, to whoever waits for that."""
        if self._is_told:
            return
        self._is_told = True
        if self._launcher_fd >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._launcher_fd, json.dumps(said).encode() + b"\n")
            os.close(self._launcher_fd)
        elif "error" in said:
            print(f"fleecefs: {said['error']}", file=sys.stderr)

    def _say(self, reason: str, runtime: Path) -> None:
        """Say why the keeper gave up: in the log, and for `fleecefs status`."""
        self._log("ERROR", f"gave up {self._mountpoint}: {reason}")
        with contextlib.suppress(FileNotFoundError):
            (runtime / LAST_WORDS).write_text(reason)

    def _log(self, level: str, text: str) -> None:
        milliseconds = int(time.time() * 1000) % 1000
        now = time.strftime("%Y-%m-%d %H:%M:%S") + f",{milliseconds:03}"
        line = f"{now} {level} keeper: {text}\n"
        path = self._settings["log"]
        if path is None:
            sys.stderr.write(line)
            return
        if path == JOURNAL:
            syslog.openlog("fleecefs", syslog.LOG_PID)
            syslog.syslog(f"{level} keeper: {text}")
            return
        with contextlib.suppress(OSError), open(path, "a") as file:
            file.write(line)


def main() -> int:
    settings = json.load(sys.stdin)
    return Keeper(settings, int(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
