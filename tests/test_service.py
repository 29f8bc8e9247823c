"""As a service: the systemd unit, and what it hears by sd_notify(3)."""

import configparser
import os
import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleecefs.units import MiB
from tests.support.killer import daemon_pid, kill
from tests.support.mount import (
    FLEECEFS,
    PATIENCE,
    Mount,
    require_mount,
    run,
    wait_until,
)

UNIT = Path(__file__).parent.parent / "contrib/systemd/fleecefs@.service"


# -- the unit


def unit():
    """Return the sections of the unit."""
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit_can_be_parsed_and_says_what_it_has_to():
    service = unit()["Service"]

    assert service["Type"] == "notify"
    # The daemon says that it is ready, and the keeper is the main process.
    assert service["NotifyAccess"] == "all"
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "on-failure"
    assert service["LimitCORE"] == "0"
    assert int(service["OOMScoreAdjust"]) < 0
    assert unit()["Install"]["WantedBy"] == "multi-user.target"


def test_the_watchdog_waits_longer_than_a_next_daemon_may_take():
    """And the end longer than a guest's write may wait for a copy."""
    service = unit()["Service"]

    assert int(service["WatchdogSec"]) >= 60
    assert int(service["TimeoutStopSec"]) > 10


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/usr/local/bin/fleecefs", "/bin/true"))

    done = subprocess.run(
        ["systemd-analyze", "--man=no", "verify", path],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    assert done.returncode == 0, done.stderr
    # Other units of this machine may have faults.
    assert [line for line in done.stderr.splitlines() if "fleecefs" in line] == []


def test_the_unit_s_commands_are_ours():
    command = unit()["Service"]["ExecStart"].split()

    assert command[:3] == ["/usr/local/bin/fleecefs", "mount", "--foreground"]
    text = run(FLEECEFS, "mount", "--help")
    options = [word for word in command[1:] if word.startswith("--")]
    assert all(option in text for option in options)
    reload = unit()["Service"]["ExecReload"].split()
    assert reload == ["/bin/kill", "-HUP", "$MAINPID"]


# -- what it hears


class Supervisor:
    """Starts a mount as systemd does, and hears what it says."""

    def __init__(self, mount, **environment):
        self.mount = mount
        self.messages = []
        self._path = mount.directory / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        self._environment = {"NOTIFY_SOCKET": str(self._path), **environment}

    def start(self, *options):
        mount = self.mount
        words = [FLEECEFS, "mount", "--foreground", f"--state={mount.state}"]
        words += [f"--disk={mount.sources['web.raw']}", *options, mount.point]
        with (mount.directory / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                words,
                env=mount.environment() | self._environment,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def close(self):
        self.mount.kill()
        self.process.wait(PATIENCE)
        self._socket.close()

    def hear(self):
        """Take what has been said until now."""
        while True:
            try:
                data = self._socket.recv(4096, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            self.messages.append(data.decode())

    def wait(self, message, count=1):
        def has_said():
            self.hear()
            return self.messages.count(message) >= count

        wait_until(has_said, f"{message!r}, {count} times")

    def said(self):
        return (self.mount.directory / "stderr").read_text()


@pytest.fixture
def supervised(tmpfs_path):
    """A function that makes a Supervisor of a mount that has been started."""
    require_mount()
    with ExitStack() as stack:

        def supervised(*options, **environment):
            mount = Mount(tmpfs_path / "live", {"web.raw": b"a" * MiB})
            supervisor = Supervisor(mount, **environment)
            supervisor.start(*options)
            stack.callback(supervisor.close)
            return supervisor

        yield supervised


def serves(generation):
    return f"READY=1\nSTATUS=daemon {generation} serves"


def test_it_is_ready_when_its_files_can_be_used(supervised):
    supervisor = supervised()
    supervisor.wait(serves(0))

    assert supervisor.mount.live("web.raw").read_bytes() == b"a" * MiB
    assert supervisor.process.poll() is None
    assert supervisor.mount.keeper_pid == supervisor.process.pid
    assert supervisor.messages[0] == serves(0)


def test_it_shows_that_it_lives(supervised):
    supervisor = supervised(WATCHDOG_USEC="200000")

    begin = time.monotonic()
    supervisor.wait("WATCHDOG=1", count=6)

    # Half of the time is what sd_watchdog_enabled(3) recommends.
    assert time.monotonic() - begin >= 5 * 0.1
    assert set(supervisor.messages) == {serves(0), "WATCHDOG=1"}


def test_without_a_watchdog_it_does_not_repeat_itself(supervised):
    supervisor = supervised()
    supervisor.wait("WATCHDOG=1")

    supervisor.mount.create("one")
    supervisor.hear()

    assert supervisor.messages.count("WATCHDOG=1") == 1


def test_a_daemon_that_hangs_is_silent(supervised):
    supervisor = supervised(WATCHDOG_USEC="100000")
    supervisor.wait("WATCHDOG=1", count=2)
    daemon = daemon_pid(supervisor.mount)

    os.kill(daemon, signal.SIGSTOP)
    wait_until(lambda: is_stopped(daemon), "the daemon to stop")
    supervisor.hear()
    before = len(supervisor.messages)
    # Ten times what it has.
    time.sleep(0.5)
    supervisor.hear()

    assert len(supervisor.messages) == before
    os.kill(daemon, signal.SIGCONT)
    supervisor.wait("WATCHDOG=1", count=before + 1)


def is_stopped(pid):
    return ") T " in Path(f"/proc/{pid}/stat").read_text()


def test_the_next_daemon_speaks_for_the_one_that_died(supervised):
    supervisor = supervised(WATCHDOG_USEC="200000")
    supervisor.wait("WATCHDOG=1")

    kill(daemon_pid(supervisor.mount))
    supervisor.wait(serves(1))
    supervisor.hear()
    count = supervisor.messages.count("WATCHDOG=1")
    supervisor.wait("WATCHDOG=1", count=count + 3)

    assert supervisor.process.poll() is None
    assert supervisor.mount.live("web.raw").read_bytes() == b"a" * MiB


def test_what_happened_is_on_stderr_a_line_an_event(supervised):
    supervisor = supervised()
    supervisor.wait(serves(0))
    kill(daemon_pid(supervisor.mount))
    supervisor.wait(serves(1))

    lines = supervisor.said().splitlines()

    assert [re.sub(r"^[-\d]+ [:,\d]+ ", "", line) for line in lines] == [
        f"INFO daemon 0 serves {supervisor.mount.point}",
        "WARNING keeper: the daemon died (signal 9); starting the next one",
        f"INFO daemon 1 serves {supervisor.mount.point}",
    ]


def test_a_restart_on_purpose_is_heard_too(supervised):
    supervisor = supervised()
    supervisor.wait(serves(0))

    assert supervisor.mount.cli("restart").returncode == 0

    supervisor.wait(serves(1))
    assert supervisor.process.poll() is None


def test_what_stop_does_is_a_clean_end(supervised):
    """KillMode=mixed: SIGTERM to the main process."""
    supervisor = supervised()
    supervisor.wait(serves(0))
    supervisor.mount.create("one")

    supervisor.process.terminate()

    assert supervisor.process.wait(PATIENCE) == 0
    assert not supervisor.mount.is_mounted
    assert supervisor.mount.cli("check", supervisor.mount.state).returncode == 0


def test_what_a_watchdog_does_leaves_nothing_mounted(supervised):
    """SIGABRT to the main process; the daemon without a keeper ends."""
    supervisor = supervised()
    supervisor.wait(serves(0))

    supervisor.process.send_signal(signal.SIGABRT)

    assert supervisor.process.wait(PATIENCE) == -signal.SIGABRT
    wait_until(lambda: not supervisor.mount.processes(), "the end of the daemon")
    assert not supervisor.mount.is_mounted


def test_what_can_not_start_is_never_ready(supervised):
    supervisor = supervised("--store=/nowhere")

    assert supervisor.process.wait(PATIENCE) == 1
    supervisor.hear()
    assert supervisor.messages == []
    assert supervisor.said() == (
        "fleecefs: store /nowhere: no such directory; make it\n"
    )


def test_nobody_has_to_listen(supervised):
    supervisor = supervised(NOTIFY_SOCKET="/nowhere/notify", WATCHDOG_USEC="100000")
    wait_until(lambda: "daemon 0 serves" in supervisor.said(), "the mount")

    supervisor.mount.create("one")

    assert supervisor.process.poll() is None
