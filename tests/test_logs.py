"""Where the log goes: a file, the journal, stderr. One line an event."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fleecefs.units import MiB
from tests.support.killer import DIED, daemon_pid, generation, kill, wait_generation
from tests.support.mount import FLEECEFS, Mount, require_mount, wait_until
from tests.support.namespace import Namespace

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) (keeper: )?\S.*"
)


def in_python(code):
    """Run code in an interpreter of its own; its stderr may become a log."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )


# -- the functions


def test_what_was_logged_early_comes_first(tmp_path):
    path = tmp_path / "log"

    done = in_python(f"""if 1:
        import logging
        from fleecefs import logs
        logs.hold()
        logging.getLogger("fleecefs.x").info("early %d", 1)
        logging.getLogger("fleecefs.x").error("early %d", 2)
        logs.open_log({str(path)!r})
        logging.getLogger("fleecefs.y").warning("late")
    """)

    lines = path.read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO early 1",
        "ERROR early 2",
        "WARNING late",
    ]
    assert all(LINE.fullmatch(line) for line in lines)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_python_itself_says_is_in_the_file(tmp_path):
    path = tmp_path / "log"

    done = in_python(f"""if 1:
        from fleecefs import logs
        logs.open_log({str(path)!r})
        raise SystemError("a bug")
    """)

    assert "SystemError: a bug" in path.read_text()
    assert done.stderr == ""


def test_without_a_file_it_is_stderr():
    done = in_python("""if 1:
        import logging
        from fleecefs import logs
        logs.hold()
        logging.getLogger("fleecefs.x").info("early")
        logs.open_log(None)
        logging.getLogger("fleecefs.x").info("late")
    """)

    lines = done.stderr.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO early", "INFO late"]
    assert done.stdout == ""


def test_what_was_logged_early_survives_a_file_that_can_not_be_opened(tmp_path):
    done = in_python(f"""if 1:
        import logging
        from fleecefs import logs
        logs.hold()
        logging.getLogger("fleecefs.x").info("early")
        try:
            logs.open_log({str(tmp_path / "missing" / "log")!r})
        except OSError as e:
            logs.open_log(None)
            logging.getLogger("fleecefs.x").error("%s", e)
    """)

    assert [line.split(" ", 2)[2] for line in done.stderr.splitlines()] == [
        "INFO early",
        f"ERROR log {tmp_path}/missing/log: No such file or directory",
    ]


# -- a file


def test_it_is_in_the_state_directory_if_nobody_says_otherwise(tmpfs_path):
    require_mount()
    mount = Mount(tmpfs_path / "live", {"web.raw": MiB})
    try:
        source = f"--disk={mount.sources['web.raw']}"
        done = mount.cli("mount", source, f"--state={mount.state}", mount.point)
        assert done.returncode == 0, done.stderr

        text = (mount.state / "fleecefs.log").read_text()

        assert f"INFO daemon 0 serves {mount.point}\n" in text
        assert (mount.state / "fleecefs.log").stat().st_mode & 0o777 == 0o600
        mount.umount()
        # Beside a log it is still a state.
        assert mount.cli("check", mount.state).returncode == 0
    finally:
        mount.kill()


def test_it_is_appended_to(mounted):
    mount = mounted({"web.raw": MiB})
    first = mount.read_log()

    mount.remount()

    assert mount.read_log().startswith(first)
    assert mount.read_log().count("serves") == 2


@pytest.mark.logs(DIED)
def test_every_line_is_an_event(mounted):
    mount = mounted({"web.raw": MiB})
    mount.create("one")
    kill(daemon_pid(mount))
    wait_generation(mount, 1)
    mount.delete("one")
    assert mount.cli("restart").returncode == 0
    mount.umount()

    lines = mount.read_log().splitlines()

    assert [line for line in lines if not LINE.fullmatch(line)] == []
    said = [line.split(" ", 2)[2] for line in lines]
    for what in (
        f"INFO daemon 0 serves {mount.point}",
        "WARNING keeper: the daemon died (signal 9); starting the next one",
        f"INFO daemon 1 serves {mount.point}",
        "INFO snapshot one deleted",
        f"INFO daemon 2 serves {mount.point}",
        f"INFO unmounted {mount.point}",
    ):
        assert said.count(what) == 1, what


# -- rotation


def rotate(mount, number, pid):
    """Do as logrotate(8) does, and return the old log."""
    old = mount.log.rename(mount.directory / f"log.{number}")
    os.kill(pid, signal.SIGHUP)
    wait_until(mount.log.exists, "the new log")
    return old


def holders(mount, path):
    """Return which processes of a mount have a file open."""
    status = path.stat()
    found = []
    for pid in mount.processes():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if link.exists() and os.path.samestat(link.stat(), status):
                found.append(pid)
    return found


def test_sighup_to_the_keeper_rotates(mounted):
    """Nothing is lost, and nobody holds on to the old log."""
    mount = mounted({"web.raw": MiB})
    logs = []
    for number in range(5):
        mount.create(f"s{number}")
        logs.append(rotate(mount, number, mount.keeper_pid))
    mount.create("last")

    assert [path for path in logs if holders(mount, path)] == []
    texts = [*(path.read_text() for path in logs), mount.read_log()]
    for number, text in enumerate(texts):
        created = re.findall(r"snapshot (\w+) of 1 disks created", text)
        assert created == [f"s{number}" if number < 5 else "last"]


@pytest.mark.logs(DIED)
def test_after_a_rotation_keeper_and_next_daemon_use_the_new_log(mounted):
    mount = mounted({"web.raw": MiB})
    old = rotate(mount, 0, mount.keeper_pid)
    before = old.read_text()

    kill(daemon_pid(mount))
    wait_until(lambda: "daemon 1 serves" in mount.read_log(), "the next daemon")

    assert "WARNING keeper: the daemon died" in mount.read_log()
    assert old.read_text() == before


def test_a_rotation_does_not_disturb_who_uses_the_mount(mounted):
    mount = mounted({"web.raw": MiB})
    with mount.live("web.raw").open("r+b", buffering=0) as file:
        for number in range(20):
            os.kill(mount.keeper_pid, signal.SIGHUP)
            assert os.pwrite(file.fileno(), bytes([number]) * 512, 0) == 512
            assert os.pread(file.fileno(), 512, 0) == bytes([number]) * 512

    assert generation(mount) == 0


# -- the journal


@pytest.fixture
def journal():
    """A Journal in a namespace that has a /dev of its own."""
    with Namespace() as namespace:
        namespace.do(
            "sh",
            "-ec",
            "mkdir /run/dev; mount -t tmpfs none /run/dev; mkdir /run/dev/shm;"
            "cp -a /dev/null /dev/zero /dev/urandom /run/dev;"
            "mknod /run/dev/fuse c 10 229; ln -s /proc/self/fd /run/dev/fd;"
            "mount --rbind /run/dev /dev",
        )
        assert not (namespace.root / "dev/log").exists()
        journal = Journal(namespace)
        yield journal
        journal.close()


class Journal:
    """What journald is to others: whoever reads /dev/log."""

    def __init__(self, namespace):
        self.namespace = namespace
        self._path = namespace.root / "dev/log"
        self._lines = []
        self._begin()

    def _begin(self):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))

    def close(self):
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def restart(self):
        self.read()
        self.close()
        self._begin()

    def read(self):
        """Return all lines until now."""
        while True:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return list(self._lines)
            self._lines.append(data.decode().removesuffix("\0"))

    def wait(self, pattern):
        """Return the first line that looks so, once it is there."""

        def found():
            return [line for line in self.read() if re.search(pattern, line)]

        wait_until(found, f"the line {pattern}")
        return found()[0]

    # -- who writes to it

    def mount(self):
        self.namespace.do("mkdir", "-p", "mnt")
        self.namespace.do("truncate", "--size=1M", "web.raw")
        return self.namespace.cli(
            "mount", "--disk=web.raw", "--state=state", "--log=journal", "mnt"
        )

    def pids(self):
        """Return the keeper's process id, and the daemon's."""
        status = json.loads(self.namespace.do(FLEECEFS, "status", "--json"))
        return status["keeper-pid"], status["pid"]


def test_the_journal_gets_a_line_an_event(journal):
    """With the priority that it has: INFO is 6, of facility user, which is 1."""
    assert journal.mount().returncode == 0
    _, daemon = journal.pids()
    journal.namespace.do(FLEECEFS, "snapshot", "create", "one")

    serves = journal.wait("serves")
    created = journal.wait("snapshot one of 1 disks created")

    mountpoint = journal.namespace.home / "mnt"
    assert serves == f"<14>fleecefs[{daemon}]: INFO daemon 0 serves {mountpoint}"
    assert created.startswith(f"<14>fleecefs[{daemon}]: INFO snapshot one")
    journal.namespace.do(FLEECEFS, "umount", "mnt")
    journal.wait(f"INFO unmounted {mountpoint}$")
    assert all(line.startswith("<14>fleecefs[") for line in journal.read())


def test_the_journal_hears_of_a_crash_from_the_keeper(journal):
    assert journal.mount().returncode == 0
    keeper, daemon = journal.pids()

    kill(daemon)

    line = journal.wait("the daemon died")
    assert re.fullmatch(
        rf"<\d+>.* fleecefs\[{keeper}\]: WARNING keeper: the daemon died "
        r"\(signal 9\); starting the next one",
        line,
    )
    journal.wait("INFO daemon 1 serves")
    journal.namespace.do(FLEECEFS, "umount", "mnt")


def test_the_journal_may_be_restarted(journal):
    assert journal.mount().returncode == 0
    journal.restart()

    journal.namespace.do(FLEECEFS, "snapshot", "create", "one")

    journal.wait("snapshot one of 1 disks created")
    journal.namespace.do(FLEECEFS, "umount", "mnt")


def test_without_a_journal_it_goes_on(journal):
    """Also when the daemon dies, and the next one finds none."""
    assert journal.mount().returncode == 0
    _, daemon = journal.pids()
    journal.close()

    journal.namespace.do(FLEECEFS, "snapshot", "create", "one")
    kill(daemon)
    journal.namespace.do(FLEECEFS, "snapshot", "delete", "one")
    journal.namespace.do(FLEECEFS, "umount", "mnt")


def test_without_a_journal_it_does_not_begin(journal):
    journal.close()

    done = journal.mount()

    assert done.returncode == 1
    assert done.stderr == "fleecefs: log journal: there is no /dev/log: give a file\n"
    assert journal.namespace.mounts() == []


def test_sighup_means_nothing_to_the_journal(journal):
    assert journal.mount().returncode == 0
    keeper, daemon = journal.pids()

    os.kill(keeper, signal.SIGHUP)
    journal.wait("INFO got SIGHUP")
    journal.namespace.do(FLEECEFS, "snapshot", "create", "one")

    journal.wait("snapshot one of 1 disks created")
    assert journal.pids() == (keeper, daemon)
    journal.namespace.do(FLEECEFS, "umount", "mnt")
