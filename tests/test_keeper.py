"""The keeper by itself: its daemons are small programs that do what a test says."""

import json
import os
import signal
import sys
import time

import pytest

from fleecefs import keeper
from fleecefs.errors import Busy
from fleecefs.keeper import Keeper, LaunchFailed, launch

# What a daemon does, by its generation; the last line is for all that follow. Words:
#   ready           report that it serves
#   old             the same, on a kernel that can not send requests again
#   says:TEXT       report that it can not
#   wait:SECONDS    do something for a while
#   tell:SIGNAL     send a signal to the keeper
#   expect:SIGNAL   wait until one comes
#   exit:CODE       end
#   kill            die of SIGKILL
#   hang            do nothing, for ever
DAEMON = r"""
import json, os, signal, sys, time

_, _, fuse_fd, report_fd = sys.argv
settings = json.load(sys.stdin)
directory = os.path.dirname(sys.argv[0])
with open(directory + "/plan") as file:
    lines = file.read().splitlines()
line = lines[min(settings["generation"], len(lines) - 1)]
status = os.fstat(int(fuse_fd))
with open(directory + "/lives", "a") as file:
    life = {"pid": os.getpid(), "device": [status.st_dev, status.st_ino], **settings}
    file.write(json.dumps(life) + "\n")


def report(**what):
    os.write(int(report_fd), json.dumps(what).encode() + b"\n")


watched = set()
for word in line.split():
    if word.startswith("expect:"):
        watched.add(getattr(signal, word[7:]))
for word in line.split():
    verb, _, argument = word.partition(":")
    if verb == "ready":
        # Blocked, a signal waits for us; before, it would kill us.
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        report(ready=True, resend=True, runtime=directory + "/runtime")
    elif verb == "old":
        report(ready=True, resend=False, runtime=directory + "/runtime")
    elif verb == "says":
        report(error=argument)
    elif verb == "wait":
        time.sleep(float(argument))
    elif verb == "tell":
        os.kill(settings["keeper"], getattr(signal, argument))
    elif verb == "expect":
        signal.sigwait({getattr(signal, argument)})
    elif verb == "exit":
        os._exit(int(argument))
    elif verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "hang":
        while True:
            time.sleep(60)
    else:
        raise ValueError(word)
"""

NOT_MOUNTED = {"state": "state", "store": None, "disks": [], "allow_other": False}


class Stage:
    """A keeper in this process, a directory for its daemons, and what became of it."""

    def __init__(self, directory):
        self.directory = directory
        self.log = directory / "log"
        self.unmounted = []
        self.told = None
        (directory / "runtime").mkdir()
        (directory / "mount").mkdir()
        (directory / "daemon").write_text(DAEMON)

    def run(self, *lives):
        """Let daemons live as told; return the keeper's exit code."""
        (self.directory / "plan").write_text("\n".join(lives) + "\n")
        read, write = os.pipe()
        settings = NOT_MOUNTED | {
            "mount": str(self.directory / "mount"),
            "log": str(self.log),
        }
        try:
            return Keeper(settings, write).run()
        finally:
            # Closed by the keeper once it has told something.
            with open(read, "rb") as file:
                os.set_blocking(read, False)
                self.told = file.read()

    def answer(self):
        """Return what the launcher heard."""
        assert self.told.endswith(b"\n")
        return json.loads(self.told)

    def lives(self):
        """Return one dictionary for each daemon there was."""
        path = self.directory / "lives"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def last_words(self):
        path = self.directory / "runtime" / keeper.LAST_WORDS
        return path.read_text() if path.exists() else None

    def read_log(self):
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    stage = Stage(tmp_path)
    python = [sys.executable, "-S", "-E", str(tmp_path / "daemon")]
    monkeypatch.setattr(keeper, "_PYTHON", python)
    monkeypatch.setattr(keeper, "mount", lambda point, **options: os.open("/", 0))
    monkeypatch.setattr(
        keeper, "unmount", lambda point, **options: stage.unmounted.append(point)
    )
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield stage
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for life in stage.lives() if (tmp_path / "lives").exists() else ():
        assert not os.path.exists(f"/proc/{life['pid']}"), "a daemon is left behind"


# -- the beginning


def test_a_daemon_that_ends_well_is_the_end(stage):
    assert stage.run("ready exit:0") == 0

    assert stage.answer()["ready"] is True
    assert stage.unmounted == [str(stage.directory / "mount")]
    assert len(stage.lives()) == 1
    assert stage.read_log() == ""
    assert stage.last_words() is None


def test_what_the_first_daemon_complains_of_is_told(stage):
    assert stage.run("says:nothing_works exit:1") == 1

    assert stage.answer() == {"error": "nothing_works"}
    assert len(stage.lives()) == 1
    assert len(stage.unmounted) == 1


@pytest.mark.parametrize("end", ["exit:1", "exit:75", "kill"])
def test_a_first_daemon_that_never_serves_has_no_successor(stage, end):
    assert stage.run(end) == 1

    assert "error" in stage.answer()
    assert len(stage.lives()) == 1
    assert len(stage.unmounted) == 1


@pytest.mark.parametrize("name", ["check_mountpoint", "mount"])
def test_a_mount_point_that_can_not_be_used_is_told(stage, monkeypatch, name):
    def refuse(*args, **options):
        raise Busy("something is there")

    monkeypatch.setattr(keeper, name, refuse)

    assert stage.run("ready exit:0") == 1

    assert stage.answer() == {"error": "something is there"}
    assert not (stage.directory / "lives").exists()


def test_a_launcher_that_is_gone_does_not_matter(stage):
    (stage.directory / "plan").write_text("ready exit:0\n")
    read, write = os.pipe()
    os.close(read)
    settings = NOT_MOUNTED | {"mount": str(stage.directory / "mount"), "log": None}

    assert Keeper(settings, write).run() == 0


# -- the next daemon


def test_the_next_daemon_gets_the_same_descriptor_and_settings(stage):
    assert stage.run("ready kill", "ready exit:3", "ready exit:0") == 0

    lives = stage.lives()
    assert [life.pop("generation") for life in lives] == [0, 1, 2]
    assert len({life.pop("pid") for life in lives}) == 3
    assert lives[0] == lives[1] == lives[2]
    assert lives[0]["keeper"] == os.getpid()
    assert stage.read_log().count("WARNING keeper: the daemon died") == 2
    assert "the daemon died (signal 9)" in stage.read_log()
    assert "the daemon died (exit code 3)" in stage.read_log()


def test_daemons_that_make_room_for_the_next_are_no_crashes(stage):
    lives = ["ready exit:75"] * 12

    assert stage.run(*lives, "ready exit:0") == 0

    assert len(stage.lives()) == 13
    assert stage.read_log() == ""


def test_a_later_daemon_that_can_not_serve_is_tried_again(stage):
    assert stage.run("ready kill", "says:not_yet exit:1", "ready exit:0") == 0

    assert "ERROR keeper: not_yet" in stage.read_log()
    assert len(stage.lives()) == 3


# -- giving up


def check_gave_up(stage, reason):
    assert reason in stage.last_words()
    assert f"gave up {stage.directory / 'mount'}: " in stage.read_log()
    assert reason in stage.read_log()
    assert len(stage.unmounted) == 1


@pytest.mark.parametrize("life", ["ready kill", "kill", "says:no exit:1"])
def test_five_crashes_in_a_row_are_the_end(stage, life):
    assert stage.run("ready kill", life) == 1

    assert len(stage.lives()) == 5
    check_gave_up(stage, "5 daemons in a row died as they started")


def test_a_daemon_that_has_served_begins_a_new_row(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_SETTLED_SECONDS", 0.1)
    row = [*["ready kill"] * 3, "ready wait:0.2 kill"]

    # Its own death is the first of the new row.
    assert stage.run("ready kill", *row, *row, *row, "ready exit:0") == 0

    assert len(stage.lives()) == 14


def test_crashes_over_a_long_time_are_not_the_end(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_CRASHES_SECONDS", 0.0)

    assert stage.run(*["ready kill"] * 8, "ready exit:0") == 0

    assert len(stage.lives()) == 9


def test_without_resending_the_first_crash_is_the_end(stage):
    assert stage.run("old kill") == 1

    assert len(stage.lives()) == 1
    check_gave_up(stage, "this kernel can not send requests again")


@pytest.mark.parametrize("life", ["hang", "wait:0.1 hang"])
def test_a_daemon_that_hangs_in_its_start_is_given_up(stage, monkeypatch, life):
    monkeypatch.setattr(keeper, "_WITHOUT_DAEMON_SECONDS", 0.5)
    begin = time.monotonic()

    assert stage.run("ready kill", life) == 1

    assert 0.5 <= time.monotonic() - begin < 10
    assert len(stage.lives()) == 2
    check_gave_up(stage, "no daemon for 0.5 s")


def test_a_first_daemon_that_hangs_in_its_start_is_given_up(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_WITHOUT_DAEMON_SECONDS", 0.5)

    assert stage.run("hang") == 1

    assert "error" in stage.answer()
    assert len(stage.unmounted) == 1


def test_the_time_without_a_daemon_is_that_of_all_tries_together(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_WITHOUT_DAEMON_SECONDS", 0.5)
    monkeypatch.setattr(keeper, "_CRASHES_MAX", 1000)

    assert stage.run("ready kill", "wait:0.1 exit:1") == 1

    assert 2 <= len(stage.lives()) <= 6
    check_gave_up(stage, "no daemon for 0.5 s")


def test_a_daemon_that_serves_for_long_is_not_missed(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_WITHOUT_DAEMON_SECONDS", 1.0)

    assert stage.run("ready wait:1.1 kill", "ready exit:0") == 0


# -- signals


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_end_reaches_the_daemon_as_sigterm(stage, number):
    assert stage.run(f"ready tell:{number} expect:SIGTERM exit:0") == 0

    assert len(stage.lives()) == 1


def test_sighup_reaches_the_daemon(stage):
    assert stage.run("ready tell:SIGHUP expect:SIGHUP exit:0") == 0


def test_a_signal_waits_until_a_daemon_is_ready_for_it(stage):
    assert stage.run("tell:SIGTERM wait:0.1 ready expect:SIGTERM exit:0") == 0

    assert len(stage.lives()) == 1


def test_a_signal_that_a_daemon_died_over_reaches_the_next_one(stage):
    lives = ["ready tell:SIGTERM kill", "ready expect:SIGTERM exit:0"]

    assert stage.run(*lives) == 0

    assert len(stage.lives()) == 2


def test_a_signal_of_long_ago_does_not_reach_the_next_daemon(stage, monkeypatch):
    monkeypatch.setattr(keeper, "_WITHOUT_DAEMON_SECONDS", 1.0)
    # One that was refused because somebody used the mount.
    first = "ready tell:SIGTERM expect:SIGTERM wait:1.1 kill"

    assert stage.run(first, "ready wait:0.1 exit:0") == 0


# -- where it says so


def test_without_a_log_file_it_writes_to_stderr(stage, capfd):
    settings = NOT_MOUNTED | {"mount": str(stage.directory / "mount"), "log": None}
    (stage.directory / "plan").write_text("ready kill\nready exit:0\n")

    assert Keeper(settings, -1).run() == 0

    assert "WARNING keeper: the daemon died (signal 9)" in capfd.readouterr().err


def test_with_the_journal_it_writes_there(stage, monkeypatch):
    lines = []
    monkeypatch.setattr(keeper.syslog, "syslog", lines.append)
    stage.log = keeper.JOURNAL
    (stage.directory / "plan").write_text("old kill\n")
    settings = NOT_MOUNTED | {
        "mount": str(stage.directory / "mount"),
        "log": keeper.JOURNAL,
    }

    assert Keeper(settings, -1).run() == 1

    assert len(lines) == 1
    assert lines[0].startswith("ERROR keeper: gave up ")


def test_a_log_that_can_not_be_written_does_not_matter(stage):
    stage.log = stage.directory / "missing" / "log"

    assert stage.run("ready kill", "ready exit:0") == 0


def test_a_runtime_directory_that_is_gone_does_not_matter(stage):
    (stage.directory / "runtime").rmdir()

    assert stage.run("old kill") == 1

    assert "gave up" in stage.read_log()


# -- what starts it


KEEPER = r"""
import json, os, sys

settings = json.load(sys.stdin)
if settings["say"]:
    os.write(int(sys.argv[2]), json.dumps(settings["say"]).encode() + b"\n")
"""


@pytest.fixture
def fake_keeper(tmp_path, monkeypatch):
    path = tmp_path / "keeper"
    path.write_text(KEEPER)
    python = [sys.executable, "-S", "-E", str(path)]
    monkeypatch.setattr(keeper, "_PYTHON", python)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_launching_returns_when_it_is_usable(fake_keeper):
    said = {"ready": True, "notes": ["a"]}

    assert launch({"say": said, "log": None}) == ["a"]


@pytest.mark.parametrize(
    ("say", "expected"),
    [
        pytest.param({"error": "no disk"}, "no disk", id="with a reason"),
        pytest.param(None, "see the.log", id="without one"),
    ],
)
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_launching_fails_with_what_is_said(fake_keeper, say, expected):
    with pytest.raises(LaunchFailed, match=expected):
        launch({"say": say, "log": "the.log"})
