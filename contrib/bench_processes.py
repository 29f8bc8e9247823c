"""Processes that the benchmark starts, and mounts that they leave.

Nothing here touches a file system that one of them serves: were it stuck, we would be
stuck in it, and no Ctrl-C would get us out.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# In the environment of everything that we start, so that a daemon which has detached
# itself can still be told from somebody else's.
MARK = f"FLEECEFS_BENCH={os.getpid()}-{time.monotonic_ns()}"

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Nothing here takes minutes, unless a side hangs.
PATIENCE_SECONDS = 600

START_SECONDS = 15
END_SECONDS = 10


class Failed(Exception):
    """A side could not do what a row asks for; the message says why, in one line."""


class Running:
    """A process that we have started; its output goes to files, so it never waits."""

    def __init__(self, argv: list[str], stdout: IO[str], stderr: IO[str]) -> None:
        self._name = Path(argv[0]).name
        self._stdout, self._stderr = stdout, stderr
        name, value = MARK.split("=")
        try:
            # A session of its own: a Ctrl-C goes to us alone, and we end our
            # processes in the order that is good for them.
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=os.environ | {name: value},
                start_new_session=True,
            )
        except OSError as e:
            raise Failed(f"{argv[0]}: {e.strerror}") from e

    def output(self, timeout: float) -> str:
        """Wait for the end and return what was printed."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self._name} took more than {timeout:.0f} s") from None
        if code != 0:
            raise Failed(f"{self._name}: {self._complaint() or f'exit code {code}'}")
        self._stdout.seek(0)
        return self._stdout.read()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for what a daemon shall bring about; raise Failed if it ends before."""
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            if self._process.poll() is not None:
                raise Failed(self._complaint() or "it ended at once")
            if time.monotonic() > deadline:
                raise Failed(f"not mounted after {START_SECONDS} s")
            time.sleep(0.02)

    def stop(self) -> None:
        """End what runs until it is told to; raise Failed if it has ended before."""
        if self._process.poll() is not None:
            raise Failed(f"{self._name}: {self._complaint() or 'it ended too early'}")
        self.end()

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)

    def _complaint(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().strip().splitlines()
        return lines[-1].strip().removeprefix(f"{self._name}: ") if lines else ""


@contextlib.contextmanager
def running(*argv: str | Path) -> Iterator[Running]:
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        process = Running([str(word) for word in argv], stdout, stderr)
        try:
            yield process
        finally:
            with undisturbed():
                process.end()


def run(*argv: str | Path, timeout: float = 60) -> str:
    """Return what a command printed; raise Failed with its last error line."""
    with running(*argv) as process:
        return process.output(timeout)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let a Ctrl-C wait until something has been cleaned up."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_mounted(path: Path) -> bool:
    wanted = str(path.absolute())
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        return any(unescape(line.split()[4]) == wanted for line in file)


def unescape(field: str) -> str:
    """Undo the octal escapes of proc(5)."""
    for code in ("\\040", "\\011", "\\012", "\\134"):
        field = field.replace(code, chr(int(code[1:], 8)))
    return field


def unmount_lazily(path: Path) -> None:
    """Take a mount away whose daemon is gone."""
    if is_mounted(path):
        with contextlib.suppress(Failed):
            run("fusermount3", "-u", "-z", "--", path)


def marked_processes() -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            # Gone in between, or somebody else's.
            with contextlib.suppress(OSError):
                if MARK.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
    return pids


def end_marked() -> None:
    """Wait for the daemons that we have started, and end those that stay."""
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_SECONDS
        for pid in marked_processes():
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        while marked_processes():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return


def touch_memory(size: int) -> None:
    """Have so much free memory that has been touched.

    A virtual machine gives free memory back to its host after some seconds, and pays
    for that when it is used again. So this has to come right before what is measured.
    """
    zeroes = bytes(1 << 20)
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, len(zeroes)):
            end = min(start + len(zeroes), size)
            memory[start:end] = zeroes[: end - start]
