"""fleecefs backup and fleecefs job, against a real control socket and fake jobs."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from fleecefs.cli import follow
from fleecefs.control.client import Client, ConnectionLost
from fleecefs.errors import NotFound
from fleecefs.jobs.options import OnError, Sync
from tests.cli.command import error_of, output_of, run
from tests.control.fakes import wait_until
from tests.jobs.fakes import SIZE

COST = "12 guest writes waited, the longest 3.2 ms"


@pytest.fixture(autouse=True)
def backups(daemon):
    """Jobs that end at once, unless a test slows them down."""
    daemon.backups.seconds = 0
    return daemon.backups


@pytest.fixture
def slow(backups):
    """Jobs that rest at their first chunk."""
    backups.seconds = 1000


def execute(daemon, command, **arguments):
    with Client(daemon.path) as client:
        return client.execute(command, **arguments)


def started(*words):
    output_of("backup", *words, "--detach")


def later(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def status_of(daemon, job_id="web.raw"):
    try:
        return execute(daemon, "fleecefs-job-show", id=job_id)["status"]
    except NotFound:
        return None


# -- backup


def test_a_backup_is_followed_to_its_end(backups):
    text = output_of("backup", "web.raw", "/backup/web.raw")

    assert text.startswith("job web.raw completed: 9.8 KiB in ")
    assert COST in text
    [[wanted]] = backups.wanted
    assert (wanted.device, str(wanted.target)) == ("web.raw", "/backup/web.raw")
    assert (wanted.sync, wanted.speed, wanted.workers) == (Sync.FULL, 0, 24)


def test_all_options_reach_the_job(backups):
    words = (
        "--sync top --speed 10MiB --on-source-error ignore --on-target-error auto"
        " --on-cbw-error break-guest-write --cbw-timeout 2.5 --workers 3"
        " --job-id night --no-auto-dismiss"
    )

    output_of("backup", "web.raw", "/backup/web.raw", *words.split())

    [[wanted]] = backups.wanted
    assert wanted.job_id == "night"
    assert (wanted.sync, wanted.speed) == (Sync.TOP, 10 << 20)
    assert wanted.on_source_error is OnError.IGNORE
    assert wanted.on_target_error is OnError.AUTO
    assert wanted.on_cbw_error.value == "break-guest-write"
    assert (wanted.cbw_timeout, wanted.workers) == (2.5, 3)
    assert (wanted.auto_finalize, wanted.auto_dismiss) == (True, False)
    assert "concluded" in output_of("job", "list")


def test_a_target_is_relative_to_where_the_user_is(backups, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    output_of("backup", "web.raw", "copy.raw")

    assert backups.wanted[0][0].target == tmp_path / "copy.raw"


@pytest.mark.usefixtures("slow")
def test_detach_prints_the_id_and_returns(daemon):
    text = output_of("backup", "web.raw", "/backup/web.raw", "--detach")

    assert text == "web.raw\n"
    assert status_of(daemon) in ("created", "running")


def test_json_is_a_line_a_second_and_the_result(backups):
    backups.seconds = 0.12

    text = output_of("backup", "web.raw", "/backup/web.raw", "--json")

    lines = [json.loads(line) for line in text.splitlines()]
    assert 2 <= len(lines) <= 4
    assert all(line["id"] == "web.raw" for line in lines)
    assert lines[0]["current"] < lines[-1]["current"] == SIZE
    assert (lines[-1]["status"], lines[-1]["error"]) == ("null", None)


@pytest.mark.logs("failed: Input/output error")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_a_backup_that_fails_is_exit_code_4(backups, options):
    backups.failing = {"work": OSError(5, "Input/output error")}

    result = run("backup", "web.raw", "/backup/web.raw", *options)

    assert result.exit_code == 4
    assert result.stderr == "fleecefs: job web.raw failed: Input/output error\n"
    assert bool(result.stdout) is bool(options)


@pytest.mark.usefixtures("slow")
def test_a_backup_that_is_cancelled_is_exit_code_4(daemon):
    def cancel():
        wait_until(lambda: status_of(daemon) == "running")
        execute(daemon, "job-cancel", id="web.raw")

    thread = later(cancel)
    code, text = error_of("backup", "web.raw", "/backup/web.raw")
    thread.join(10)

    assert (code, text) == (4, "job web.raw was cancelled")


@pytest.mark.usefixtures("slow")
def test_with_sync_none_cancel_is_the_normal_end(daemon):
    def cancel():
        wait_until(lambda: status_of(daemon) == "running")
        execute(daemon, "job-cancel", id="web.raw")

    thread = later(cancel)
    text = output_of("backup", "web.raw", "/backup/web.raw", "--sync", "none")
    thread.join(10)

    assert text.startswith("job web.raw ended: 0 B in ")


def test_one_that_waits_to_be_finalized_is_left(daemon):
    text = output_of("backup", "web.raw", "/b", "--no-auto-finalize")
    pending = status_of(daemon)
    output_of("job", "finalize", "web.raw")
    output_of("job", "wait", "web.raw")

    assert text == "job web.raw waits for 'fleecefs job finalize web.raw'\n"
    assert pending == "pending"
    assert status_of(daemon) == "null"


@pytest.mark.usefixtures("slow")
def test_ctrl_c_leaves_it_running_and_says_how_to_cancel(daemon):
    def interrupt():
        wait_until(lambda: status_of(daemon) == "running")
        wait_until(lambda: daemon.events._subscriptions)
        os.kill(os.getpid(), signal.SIGINT)

    thread = later(interrupt)
    result = run("backup", "web.raw", "/backup/web.raw")
    thread.join(10)

    assert result.exit_code == 130
    assert "fleecefs job cancel web.raw" in result.stderr
    assert status_of(daemon) == "running"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param([], "give DISK and TARGET", id="nothing"),
        pytest.param(["web.raw"], "give DISK and TARGET", id="no-target"),
        pytest.param(["--all", "/b", "web.raw"], "--all takes no DISK", id="both"),
        pytest.param(["--all", "/b", "--job-id", "x"], "--all takes no", id="id"),
        pytest.param(["a", "b", "--speed", "fast"], "is not a size", id="speed"),
        pytest.param(["a", "b", "--workers", "0"], "x>=1", id="workers"),
        pytest.param(["a", "b", "--cbw-timeout", "nan"], "seconds", id="timeout"),
        pytest.param(["a", "b", "--sync", "half"], "'full', 'top'", id="sync"),
        pytest.param(["a", "b", "--bitmap-mode", "x"], "'on-success'", id="mode"),
        pytest.param(["a", "b", "--format", "vmdk"], "'raw', 'qcow2'", id="format"),
        pytest.param(["a", "b", "--fallback", "top"], "'full'", id="fallback"),
        pytest.param(
            ["--all", "/b", "--format", "qcow2", "--backing", "/a"],
            "--all takes no",
            id="backing-of-all",
        ),
    ],
)
def test_wrong_usage(backups, words, text):
    code, error = error_of("backup", *words)

    assert code == 2
    assert text in error
    assert backups.wanted == []


def test_no_such_disk_is_exit_code_3():
    assert error_of("backup", "none.raw", "/b") == (3, "no disk 'none.raw'")


@pytest.mark.usefixtures("slow")
def test_a_job_of_that_disk_is_a_failure():
    started("web.raw", "/b")

    code, text = error_of("backup", "web.raw", "/b")

    assert code == 1
    assert "a job 'web.raw' exists" in text


# -- all disks


def test_all_disks_are_backed_up_together(backups):
    text = output_of("backup", "--all", "/backup", "--speed", "0")

    [wanted] = backups.wanted
    assert [(each.device, str(each.target)) for each in wanted] == [
        ("web.raw", "/backup/web.raw"),
        ("db.raw", "/backup/db.raw"),
    ]
    assert "job web.raw completed" in text
    assert "job db.raw completed" in text


@pytest.mark.logs("failed: Input/output error")
def test_if_one_fails_all_do(backups):
    backups.failing = {"prepare": OSError(5, "Input/output error")}

    result = run("backup", "--all", "/backup")

    assert result.exit_code == 4
    assert result.stderr.splitlines() == [
        "fleecefs: job web.raw failed: Input/output error",
        "fleecefs: job db.raw was cancelled, as job 'web.raw' failed",
    ]


# -- a daemon that comes and goes


def losing(monkeypatch, *numbers):
    """Lose the connection at these receives, counted from 1 over all clients."""
    receive = Client._receive
    count = 0

    def losing_receive(self):
        nonlocal count
        count += 1
        if count in numbers:
            raise ConnectionLost("the daemon is gone")
        return receive(self)

    monkeypatch.setattr(Client, "_receive", losing_receive)


@pytest.mark.parametrize("number", range(4, 12))
def test_a_lost_connection_is_made_again(monkeypatch, backups, number):
    # The first three start the job.
    losing(monkeypatch, number)
    backups.seconds = 0.02

    text = output_of("backup", "web.raw", "/backup/web.raw")

    assert "job web.raw completed" in text


def test_a_daemon_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(follow, "_LOST_SECONDS", 0.3)
    losing(monkeypatch, *range(4, 1000))

    assert error_of("backup", "web.raw", "/b") == (1, "the daemon is gone")


@pytest.mark.usefixtures("slow")
def test_a_mount_that_ends_ends_the_job(daemon, running):
    def end():
        wait_until(lambda: status_of(daemon) == "running")
        wait_until(lambda: daemon.events._subscriptions)
        execute(daemon, "quit")
        running.clear()

    thread = later(end)
    code, text = error_of("backup", "web.raw", "/b")
    thread.join(10)

    # Whoever tells: the daemon, while it can, or else its last event.
    assert code == 4
    assert text in (
        "job web.raw was cancelled, as the mount has ended",
        "job web.raw was cancelled",
    )


@pytest.mark.parametrize(
    ("events", "code", "text"),
    [
        pytest.param([], 4, "was cancelled, as the mount has ended", id="nothing"),
        pytest.param(
            [
                ("BLOCK_JOB_CANCELLED", {"device": "web.raw"}),
                ("JOB_STATUS_CHANGE", {"id": "web.raw", "status": "concluded"}),
            ],
            4,
            "job web.raw was cancelled",
            id="cancelled",
        ),
        pytest.param(
            [
                ("BLOCK_JOB_COMPLETED", {"device": "db.raw", "offset": 0, "len": 9}),
                ("BLOCK_JOB_COMPLETED", {"device": "web.raw", "offset": 9, "len": 9}),
                ("JOB_STATUS_CHANGE", {"id": "web.raw", "status": "null"}),
            ],
            0,
            "job web.raw completed: 9 B in",
            id="completed",
        ),
    ],
)
@pytest.mark.usefixtures("slow")
def test_events_tell_the_end_if_the_daemon_can_not(
    running, monkeypatch, events, code, text
):
    left = [{"event": name, "data": data} for name, data in events]

    def next_event(self, timeout):
        if running:
            running.clear()
            raise ConnectionLost("the daemon is gone")
        return left.pop(0) if left else None

    monkeypatch.setattr(Client, "next_event", next_event)

    result = run("backup", "web.raw", "/b")

    assert result.exit_code == code
    assert text in result.output


# -- a person watching


@pytest.fixture
def shown(daemon):
    started("web.raw", "/backup/web.raw")
    return execute(daemon, "fleecefs-job-show", id="web.raw")


def drawn(*jobs):
    console = Console(file=io.StringIO(), width=80)
    console.print(follow._render(list(jobs)))
    return console.file.getvalue()


def test_a_bar_has_all_a_person_asks_for(shown):
    running = {
        "status": "running",
        "current": 3 << 30,
        "total": 4 << 30,
        "speed-now": 100e6,
        "eta": 10.7,
    }

    text = drawn(shown | running)

    assert max(map(len, text.splitlines())) <= 80
    for word in ("3 GiB/4 GiB", "95.4 MiB/s", "0:11 left", COST):
        assert word in text
    assert "1 MiB in RAM (peak 3 MiB), 0 B on disk (peak 0 B)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"status": "running", "eta": None}, "- left"),
        ({"status": "running", "eta": 3723}, "1:02:03 left"),
        ({"status": "paused"}, "paused"),
        ({"status": "paused", "io-status": "nospace"}, "paused: no space in target"),
        ({"status": "paused", "io-status": "failed"}, "paused: I/O error"),
        ({"status": "waiting"}, "waiting"),
    ],
)
def test_a_bar_says_why_nothing_happens(shown, change, text):
    assert text in drawn(shown | change)


def test_a_terminal_gets_bars(daemon, backups):
    backups.seconds = 0.05
    here, there = pty.openpty()
    code = (
        "import sys; from unittest.mock import patch;"
        "from fleecefs.cli import main;"
        "from fleecefs.state.runtime import RunningMount;"
        f"mounts = [RunningMount({daemon.mount!r}, {daemon.path!r}, 0)];"
        "patch('fleecefs.state.runtime.running_mounts', lambda *_: mounts).start();"
        "main(sys.argv[1:])"
    )
    words = ["backup", "web.raw", "/backup/web.raw"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, *words], stdout=there, env=environment
    ) as process:
        os.close(there)
        text = b""
        while chunk := read(here):
            text += chunk
    os.close(here)

    assert process.returncode == 0
    assert "━" in text.decode()
    assert COST in text.decode()
    assert "job web.raw completed" in text.decode().splitlines()[-1]


def read(fd):
    try:
        return os.read(fd, 1000)
    except OSError:
        # EIO: nobody holds the other end.
        return b""


# -- job


@pytest.mark.usefixtures("slow")
def test_jobs_are_listed(daemon):
    started("web.raw", "/backup/web.raw")
    wait_until(lambda: status_of(daemon) == "running")

    text = output_of("job", "list")

    assert max(map(len, text.splitlines())) <= 80
    titles, row = text.splitlines()
    assert titles.split() == [
        *("JOB", "TYPE", "STATUS", "DONE", "OF", "SPEED", "TARGET"),
    ]
    assert row.split() == [
        *("web.raw", "backup", "running", "0", "B", "9.8", "KiB", "0", "B/s"),
        "/backup/web.raw",
    ]


@pytest.mark.usefixtures("slow")
def test_status_has_a_line_for_each_job_that_is_not_over(daemon, backups):
    started("web.raw", "/b/web")
    started("db.raw", "/b/db")
    backups.seconds = 0
    output_of("backup", "db.raw", "/b/old", "--job-id", "old", "--no-auto-dismiss")
    wait_until(lambda: status_of(daemon, "db.raw") == "running")
    backups.jobs["web.raw"].progress.current = 1234
    backups.jobs["web.raw"].progress.remaining = SIZE - 1234
    output_of("job", "pause", "db.raw")

    *_, titles, web, db = output_of("status").splitlines()
    as_json = json.loads(output_of("status", "--json"))["jobs"]

    assert titles.split() == ["JOB", "TYPE", "DONE", "PACE"]
    assert web.split()[:4] == ["web.raw", "backup", "12", "%"]
    assert "/s, " in web
    assert db.split()[:4] == ["db.raw", "backup", "0", "%"]
    assert [job["id"] for job in as_json] == ["web.raw", "db.raw", "old"]


@pytest.mark.usefixtures("slow")
def test_a_job_is_shown(daemon, backups):
    started("web.raw", "/backup/web.raw", "--speed", "1MiB")
    wait_until(lambda: status_of(daemon) == "running")
    backups.jobs["web.raw"].restarts = 2

    text = output_of("job", "show", "web.raw")

    lines = dict(line.split(None, 1) for line in text.splitlines())
    assert lines["job"].startswith("web.raw")
    assert lines["status"] == "running"
    assert lines["target"] == "/backup/web.raw"
    assert lines["limit"] == "1 MiB/s"
    assert lines["guest"] == COST
    assert lines["kept"].startswith("1 MiB in RAM (peak 3 MiB)")
    assert "job web.raw went on after a restart of the daemon, 2 times" in text


@pytest.mark.usefixtures("slow")
def test_json_of_jobs_is_the_daemons_answer(daemon):
    started("web.raw", "/backup/web.raw")
    wait_until(lambda: status_of(daemon) == "running")

    [listed] = json.loads(output_of("job", "list", "--json"))
    shown = json.loads(output_of("job", "show", "web.raw", "--json"))

    assert listed.keys() == shown.keys()
    assert (shown["id"], shown["cost"]["waited"]) == ("web.raw", 12)


def test_a_life_by_verbs(daemon):
    started(
        *("web.raw", "/b", "--speed", "1"),
        *("--no-auto-finalize", "--no-auto-dismiss"),
    )
    wait_until(lambda: status_of(daemon) == "running")
    statuses = []
    for words in (
        ["pause", "web.raw"],
        ["resume", "web.raw"],
        ["set-speed", "web.raw", "0"],
    ):
        assert output_of("job", *words) == ""
        statuses.append(status_of(daemon))
    wait_until(lambda: status_of(daemon) == "pending")
    output_of("job", "finalize", "web.raw")
    output_of("job", "wait", "web.raw")
    statuses.append(status_of(daemon))
    listed = output_of("job", "list")
    output_of("job", "dismiss", "web.raw")

    assert statuses[:2] == ["paused", "running"]
    assert statuses[3] == "concluded"
    assert "web.raw" in listed
    assert status_of(daemon) == "null"


@pytest.mark.usefixtures("slow")
def test_several_jobs_are_told_and_the_unknown_are_named(daemon):
    started("web.raw", "/b/web")
    started("db.raw", "/b/db")
    wait_until(lambda: status_of(daemon, "db.raw") == "running")

    code, text = error_of("job", "cancel", "web.raw", "none", "db.raw")

    assert (code, text) == (3, "no job 'none'")
    wait_until(lambda: json.loads(output_of("job", "list", "--json")) == [])


@pytest.mark.logs("failed")
def test_wait_tells_how_jobs_ended(backups):
    started("web.raw", "/b/web")
    good = output_of("job", "wait", "web.raw")
    backups.failing = {"work": OSError(28, "No space left on device")}
    started("db.raw", "/b/db")

    both = run("job", "wait", "web.raw", "db.raw")
    as_json = run("job", "wait", "web.raw", "db.raw", "--json")

    assert good.startswith("job web.raw completed")
    assert both.exit_code == as_json.exit_code == 4
    assert both.stderr == "fleecefs: job db.raw failed: No space left on device\n"
    assert both.stdout == good
    errors = [job["error"] for job in json.loads(as_json.stdout)]
    assert errors == [None, "No space left on device"]


def test_what_is_over_is_still_shown(daemon):
    started("web.raw", "/b")
    output_of("job", "wait", "web.raw")

    text = output_of("job", "show", "web.raw")

    assert "pace" not in text
    assert "null" in text


@pytest.mark.parametrize("verb", ["show", "wait", "pause", "cancel"])
def test_no_such_job_is_exit_code_3(verb):
    assert error_of("job", verb, "job7") == (3, "no job 'job7'")


@pytest.mark.usefixtures("slow")
def test_a_verb_that_is_refused_is_exit_code_1():
    started("web.raw", "/b")

    code, text = error_of("job", "dismiss", "web.raw")

    assert code == 1
    assert "cannot dismiss" in text


@pytest.mark.usefixtures("slow")
def test_ids_are_completed(daemon, monkeypatch):
    started("web.raw", "/b")
    monkeypatch.setenv("_FLEECEFS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "fleecefs job pause w")
    monkeypatch.setenv("COMP_CWORD", "3")

    assert run().stdout == "plain,web.raw\n"
