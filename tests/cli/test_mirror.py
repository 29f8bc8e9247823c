"""fleecefs mirror, and what fleecefs job says of it, in front of a real mount."""

import io
import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import pytest
from rich.console import Console

from fleecefs.cli import follow
from fleecefs.control.client import Client
from fleecefs.units import MiB
from tests.cli.command import error_of, output_of, run
from tests.support.mount import Mount, filesystem, require_mount, wait_until
from tests.support.walk import noise, write

WEB = "web.raw"
SIZE = 4 * MiB

pytestmark = pytest.mark.usefixtures("mount")

# The first chunk of 1 MiB goes at once, and the next one in days.
HARDLY = "--speed=1"


DISKS = {WEB: noise(SIZE), "db.raw": MiB}
FAILED = f"job {WEB} failed: No space left on device"


@pytest.fixture(scope="module")
def shared():
    """One mount for all that leave its disks where they are."""
    require_mount()
    directory = Path(tempfile.mkdtemp(prefix="fleecefs-", dir="/dev/shm"))
    with Mount(directory, DISKS, expected_logs=[FAILED]) as mount:
        yield mount
    shutil.rmtree(directory)


@pytest.fixture
def mount(shared, monkeypatch):
    """The mount that all commands find; what they do is done in our process."""
    monkeypatch.setenv("FLEECEFS_MOUNT", str(shared.point))
    yield shared
    there = "--mount", str(shared.point)
    for job in json.loads(output_of("job", "list", "--json", *there)):
        run("job", "cancel", "--force", job["id"], *there)
        run("job", "wait", job["id"], *there)


@pytest.fixture
def alone(mount, mounted, monkeypatch):
    """A mount of its own, which all commands find instead."""
    mount = mounted(DISKS)
    monkeypatch.setenv("FLEECEFS_MOUNT", str(mount.point))
    return mount


@pytest.fixture
def target(tmpfs_path):
    return tmpfs_path / "new.raw"


def job_of(job_id=WEB):
    return json.loads(output_of("job", "show", job_id, "--json"))


def start(*words):
    assert output_of("mirror", WEB, *map(str, words), "--detach") == f"{WEB}\n"


def start_ready(*words):
    start(*words)
    output_of("job", "wait", "--ready", WEB)


def wait_status(status):
    wait_until(lambda: job_of()["status"] == status, f"a {status} job")


def later(mount, command, **arguments):
    """Tell the daemon something in a thread, once there is a job."""

    def tell():
        with Client(f"{mount.status()['runtime']}/control") as client:
            wait_until(lambda: client.execute("fleecefs-job-list"), "a job")
            client.execute(command, **arguments)

    thread = threading.Thread(target=tell)
    thread.start()
    return thread


def ready_line(target):
    return (
        f"job {WEB} is ready, {target} follows the disk: next is"
        f" 'fleecefs job complete {WEB}' or 'fleecefs job cancel {WEB}'\n"
    )


# -- where a disk lives


def test_a_disk_that_has_moved_is_found_when_told_where_it_was(alone, target):
    start_ready(target)
    output_of("job", "complete", WEB)
    output_of("job", "wait", WEB)
    alone.umount()

    told = alone.try_mount()
    alone.umount()
    target.rename(target.with_suffix(".away"))
    lost = alone.try_mount()

    assert (told.returncode, told.stdout) == (0, "")
    assert told.stderr == (
        f"note: disk '{WEB}' was moved by a mirror: it lives on {target}\n"
    )
    assert lost.returncode != 0
    assert (
        f"disk '{WEB}' was moved from {alone.sources[WEB]} by a mirror: " in lost.stderr
    )
    assert str(target) in lost.stderr


# -- help


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        pytest.param(
            ["mirror"],
            [
                "Copy DISK to TARGET while it is in use",
                "'fleecefs job complete' moves the disk to TARGET",
                "'fleecefs job cancel' leaves TARGET a copy",
                "Ctrl-C leaves the job running",
                "--sync [full|top|none]",
                "--copy-mode [background|write-blocking]",
                "--converge [auto]",
                "--target-is-zero",
                "[default: 64 KiB]",
                "[default: 16 MiB]",
                "fleecefs mirror web.raw /newstore/web.raw",
            ],
            id="mirror",
        ),
        pytest.param(
            ["job", "complete"],
            ["Move the disks of mirrors that are ready to their targets."],
            id="complete",
        ),
        pytest.param(
            ["job", "cancel"],
            ["A mirror that is ready ends with one", "--force", "At once"],
            id="cancel",
        ),
        pytest.param(
            ["job", "change"],
            ["from background to write-blocking", "[required]"],
            id="change",
        ),
        pytest.param(["job", "wait"], ["--ready", "exit status is 4"], id="wait"),
    ],
)
def test_help(words, phrases):
    text = output_of(*words, "--help")

    assert max(map(len, text.splitlines())) <= 80
    flowing = " ".join(text.split())
    assert [phrase for phrase in phrases if phrase not in flowing] == []


def test_mirror_is_among_the_commands():
    assert "mirror" in output_of("--help")
    assert "complete" in output_of("job", "--help")


# -- followed until it is ready, and to its end


def test_a_mirror_is_followed_until_it_is_ready(target):
    text = output_of("mirror", WEB, str(target))

    assert text == ready_line(target)
    assert job_of()["status"] == "ready"


@pytest.mark.usefixtures("alone")
def test_complete_moves_the_disk_and_wait_says_so(target):
    start_ready(target)

    told = output_of("job", "complete", WEB)
    text = output_of("job", "wait", WEB)

    assert told == ""
    moved = f"the disk lives on {target} now"
    assert text.startswith(f"job {WEB} completed: {moved}, writes were held for ")
    assert "; 4 MiB in " in text
    assert text.endswith("; no guest write waited\n")
    assert text.count("\n") == 1
    assert str(target) in "".join(output_of("status").split())


def test_cancel_leaves_a_copy_and_wait_says_so(mount, target):
    start_ready(target)

    told = output_of("job", "cancel", WEB)
    text = output_of("job", "wait", WEB)

    assert told == ""
    assert text.startswith(f"job {WEB} completed: {target} is a copy, writes were ")
    assert "; 4 MiB in " in text
    assert target.read_bytes() == mount.live(WEB).read_bytes()


def test_a_forced_cancel_is_an_end_without_a_result(target):
    start_ready(target)

    told = output_of("job", "cancel", "--force", WEB)

    assert told == ""
    assert error_of("job", "wait", WEB) == (4, f"job {WEB} was cancelled")
    assert not target.exists()


def test_a_target_is_relative_to_where_the_user_is(mount, monkeypatch, tmpfs_path):
    monkeypatch.chdir(tmpfs_path)

    text = output_of("mirror", WEB, "new.raw", "--job-id=move")

    assert text.startswith(f"job move is ready, {tmpfs_path}/new.raw follows the disk")


def test_detach_prints_the_id_and_returns(target):
    text = output_of("mirror", WEB, str(target), HARDLY, "--job-id=move", "--detach")

    assert text == "move\n"
    assert job_of("move")["status"] in ("created", "running")


def test_json_is_lines_until_it_is_ready(target):
    text = output_of("mirror", WEB, str(target), "--json", "--speed=8MiB")

    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["id"], line["type"]) for line in lines] == [
        (WEB, "mirror") for _ in lines
    ]
    last = lines[-1]
    assert (last["status"], last["error"], last["moved"]) == ("ready", None, False)
    assert (last["current"], last["total"]) == (SIZE, SIZE)
    assert last["copy-mode"] == "background"
    assert (last["actively-synced"], last["converges"]) == (False, True)
    assert last["target"] == str(target)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_one_that_is_cancelled_before_it_is_ready_is_exit_code_4(
    mount, target, options
):
    thread = later(mount, "job-cancel", id=WEB)
    result = run("mirror", WEB, str(target), HARDLY, *options)
    thread.join(10)

    assert result.exit_code == 4
    assert result.stderr == f"fleecefs: job {WEB} was cancelled\n"
    assert bool(result.stdout) is bool(options)
    assert not target.exists()


def test_one_that_fails_is_exit_code_4(mount, tmpfs_path):
    point = tmpfs_path / "small"
    with filesystem("none", point, "-t", "tmpfs", "-o", "size=1M"):
        told = error_of("mirror", WEB, str(point / WEB))
        waited = error_of("job", "wait", "--ready", WEB)

        assert told == waited == (4, FAILED)
        assert os.listdir(point) == []


def test_ctrl_c_leaves_it_running_and_says_how_to_go_on(mount, target):
    def interrupt():
        wait_until(lambda: mount.json("job", "list"), "a job")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run("mirror", WEB, str(target), HARDLY)
    thread.join(10)

    assert result.exit_code == 130
    assert result.stderr.count("\n") == 1
    assert f"job {WEB} goes on" in result.stderr
    assert f"fleecefs job cancel {WEB}" in result.stderr
    assert job_of()["status"] == "running"


@pytest.mark.usefixtures("alone")
def test_one_that_waits_to_be_finalized_says_so(target):
    start_ready(target, "--no-auto-finalize", "--no-auto-dismiss")
    output_of("job", "complete", WEB)

    ready = output_of("job", "wait", "--ready", WEB)
    wait_status("pending")
    listed = output_of("job", "list")
    output_of("job", "finalize", WEB)
    ended = output_of("job", "wait", WEB)
    concluded = output_of("job", "list")
    output_of("job", "dismiss", WEB)

    waits = f"job {WEB} waits for 'fleecefs job finalize {WEB}'"
    assert ready in (ready_line(target), f"{waits}\n")
    assert listed.splitlines()[-1] == waits
    assert "the disk lives on" in ended
    assert "concluded" in concluded
    assert output_of("job", "list").count("\n") == 1


# -- wait


def test_wait_ready_returns_when_it_is(mount, target):
    start(target, HARDLY)
    thread = later(mount, "block-job-set-speed", device=WEB, speed=0)

    text = output_of("job", "wait", "--ready", WEB)

    thread.join(10)
    assert text == ready_line(target)


def test_wait_ready_of_several_is_a_line_for_each(mount, target, tmpfs_path):
    start(target)
    output_of("mirror", "db.raw", str(tmpfs_path / "db.raw"), "--detach")

    text = output_of("job", "wait", "--ready", WEB, "db.raw")
    as_json = json.loads(output_of("job", "wait", "--ready", WEB, "db.raw", "--json"))

    assert [line.split()[1] for line in text.splitlines()] == [WEB, "db.raw"]
    assert [job["status"] for job in as_json] == ["ready", "ready"]


def test_wait_ready_of_one_that_is_cancelled_is_exit_code_4(mount, target):
    start(target, HARDLY)
    thread = later(mount, "job-cancel", id=WEB)

    told = error_of("job", "wait", "--ready", WEB)

    thread.join(10)
    assert told == (4, f"job {WEB} was cancelled")


# -- wrong


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param([], "Missing argument 'DISK'", id="nothing"),
        pytest.param([WEB], "Missing argument 'TARGET'", id="no-target"),
        pytest.param([WEB, "x", "--speed=fast"], "is not a size", id="speed"),
        pytest.param([WEB, "x", "--granularity=4Q"], "is not a size", id="granularity"),
        pytest.param([WEB, "x", "--copy-mode=active"], "'background'", id="copy-mode"),
        pytest.param([WEB, "x", "--sync=incremental"], "'full', 'top'", id="sync"),
        pytest.param([WEB, "x", "--converge=yes"], "'auto'", id="converge"),
        pytest.param([WEB, "x", "--workers=0"], "x>=1", id="workers"),
        pytest.param([WEB, "x", "--on-target-error=x"], "'report'", id="on-error"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, text):
    code, error = error_of("mirror", *words)

    assert code == 2
    assert text in error
    assert error.endswith("see 'fleecefs mirror --help'")


@pytest.mark.parametrize(
    ("verb", "words", "text"),
    [
        pytest.param("change", [WEB], "--copy-mode", id="change-to-what"),
        pytest.param(
            "change", [WEB, "--copy-mode=x"], "'background'", id="change-to-x"
        ),
        pytest.param("complete", [], "Missing argument 'ID...'", id="complete-what"),
    ],
)
def test_wrong_usage_of_a_verb_is_exit_code_2(verb, words, text):
    code, error = error_of("job", verb, *words)

    assert code == 2
    assert text in error


def test_what_can_not_be_is_one_line(mount, target, tmpfs_path):
    live, source = mount.live(WEB), mount.sources[WEB]
    has = "target {}: has {} bytes ({} MiB), and the disk 4194304 (4 MiB)"
    small, large = tmpfs_path / "small", tmpfs_path / "large"
    small.write_bytes(bytes(3 * MiB))
    large.write_bytes(bytes(5 * MiB))
    missing = tmpfs_path / "missing/new.raw"
    wrong = [
        (small, [], has.format(small, 3 * MiB, 3)),
        (large, [], has.format(large, 5 * MiB, 5)),
        (source, [], f"target {source}: is the source of disk '{WEB}'"),
        (
            mount.sources["db.raw"],
            [],
            f"target {mount.sources['db.raw']}: is the source of disk 'db.raw'",
        ),
        (
            live,
            [],
            f"target {live}: is on the mount of its own source; put it elsewhere",
        ),
        (
            missing,
            [],
            f"target {missing}: there is no directory {missing.parent}; make it",
        ),
        (
            target,
            ["--granularity=5000"],
            "granularity of 5000 bytes: has to be a power of two from 512 to 64 MiB",
        ),
        (
            target,
            ["--granularity=128M"],
            "granularity of 134217728 bytes: has to be a power of two from 512 to "
            "64 MiB",
        ),
    ]

    for path, options, text in wrong:
        assert error_of("mirror", WEB, str(path), *options) == (1, text)

    assert error_of("mirror", "none", str(target)) == (
        3,
        f"no disk 'none'; there are db.raw, {WEB}",
    )
    assert not target.exists()
    assert json.loads(output_of("job", "list", "--json")) == []


def test_a_disk_that_is_mirrored_is_refused(target, tmpfs_path):
    start(target, HARDLY)
    other = str(tmpfs_path / "other.raw")

    assert error_of("mirror", WEB, other) == (
        1,
        f"a job '{WEB}' exists: give another job id",
    )
    assert error_of("mirror", WEB, other, "--job-id=x") == (
        1,
        f"disk '{WEB}' is being mirrored already",
    )
    assert error_of("mirror", "db.raw", str(target)) == (
        1,
        f"target {target}: in use by another job or program",
    )


def test_verbs_come_at_their_time(mount, target):
    start(target, HARDLY)
    wait_status("running")
    early = error_of("job", "complete", WEB)
    output_of("job", "change", WEB, "--copy-mode=write-blocking")
    same = output_of("job", "change", WEB, "--copy-mode=write-blocking")
    back = error_of("job", "change", WEB, "--copy-mode=background")
    output_of("job", "set-speed", WEB, "0")
    output_of("job", "wait", "--ready", WEB)
    output_of("job", "pause", WEB)
    wait_status("standby")
    paused = error_of("job", "cancel", WEB)
    output_of("job", "resume", WEB)
    output_of("job", "cancel", WEB)
    output_of("job", "wait", WEB)
    gone = error_of("job", "complete", WEB)

    assert early == (1, f"job '{WEB}' is running: cannot complete")
    assert same == ""
    assert back == (1, "Change to copy mode 'background' is not implemented")
    assert paused == (1, f"job '{WEB}' is paused: resume it, or use force")
    assert gone == (3, f"no job '{WEB}'")


@pytest.mark.parametrize("verb", ["complete", "change"])
def test_what_only_mirrors_can_is_refused_to_a_backup(mount, target, verb):
    output_of("backup", WEB, str(target), HARDLY, "--detach")
    options = ["--copy-mode=write-blocking"] if verb == "change" else []

    refused = error_of("job", verb, WEB, *options)
    unknown = error_of("job", verb, "none", *options)

    assert refused[0] == 1
    assert f"'{WEB}' is " in refused[1]
    assert unknown == (3, "no job 'none'")


# -- list and show


def test_a_mirror_is_listed(target):
    start(target, HARDLY)
    wait_until(lambda: job_of()["current"] == MiB, "a chunk")

    text = output_of("job", "list")

    assert max(map(len, text.splitlines())) <= 80
    titles, row, *folded = text.splitlines()
    assert titles.split()[:3] == ["JOB", "TYPE", "STATUS"]
    assert row.split()[:7] == [WEB, "mirror", "running", "1", "MiB", "4", "MiB"]
    assert str(target).endswith("".join([row.split()[-1], *map(str.strip, folded)]))


def shown():
    """Return what `job show` says, by its titles."""
    text = output_of("job", "show", WEB)
    return dict(line.split(None, 1) for line in text.splitlines())


def test_a_mirror_is_shown(mount, target):
    start(target, "--speed=1KiB")
    wait_until(lambda: job_of()["current"] == MiB, "a chunk")
    running = shown()
    output_of("job", "set-speed", WEB, "0")
    output_of("job", "wait", "--ready", WEB)
    ready = shown()
    output_of("job", "change", WEB, "--copy-mode=write-blocking")
    wait_until(lambda: job_of()["actively-synced"], "all in sync")
    write(mount.live(WEB), b"new", 0)
    synced = shown()

    assert running["job"] == f"{WEB}, mirror, sync full"
    assert running["status"] == "running"
    assert (running["disk"], running["target"]) == (WEB, str(target))
    assert running["done"] == "1 MiB of 4 MiB"
    assert running["limit"] == "1 KiB/s"
    assert running["guest"] == "no guest write waited"
    assert running["writes"] == "0 B/s become dirty, background"
    assert (ready["status"], ready["limit"]) == ("ready", "none")
    assert ready["pace"].startswith("ready, ")
    assert synced["guest"].startswith("1 guest write waited, the longest ")
    assert synced["writes"].endswith("become dirty, actively synced")


def test_status_has_a_line_for_it(target):
    start(target, HARDLY)
    wait_until(lambda: job_of()["current"] == MiB, "a chunk")
    running = output_of("status").splitlines()[-1]
    output_of("job", "set-speed", WEB, "0")
    output_of("job", "wait", "--ready", WEB)
    ready = output_of("status").splitlines()[-1]

    assert running.split()[:4] == [WEB, "mirror", "25", "%"]
    assert ready.split()[:4] == [WEB, "mirror", "100", "%"]
    assert "ready, " in ready


def test_a_bar_says_how_it_goes(target):
    start_ready(target)
    job = job_of()

    for change, text in (
        ({"status": "running", "eta": 10.7}, "0:11 left"),
        ({"status": "running", "converges": False}, "does not converge"),
        ({"status": "ready"}, "ready, "),
        ({"status": "standby"}, "standby"),
        ({"status": "paused", "io-status": "nospace"}, "paused: no space in target"),
        ({"status": "standby", "io-status": "failed"}, "standby: I/O error"),
        ({"dirty-rate": 3e6}, "2.9 MiB/s become dirty, background"),
        ({"actively-synced": True}, "actively synced"),
    ):
        console = Console(file=io.StringIO(), width=80)
        console.print(follow._render([job | change]))
        drawn = console.file.getvalue()

        assert max(map(len, drawn.splitlines())) <= 80
        assert text in drawn


def test_an_umount_that_is_refused_says_what_to_do(mount, target):
    start_ready(target)

    code, text = error_of("umount", str(mount.point))

    assert code == 1
    assert text.startswith(f"job '{WEB}' has not ended: ")
    assert text.endswith("or use --force")


def test_ids_of_mirrors_are_completed(target, monkeypatch):
    start_ready(target)

    with monkeypatch.context() as patch:
        patch.setenv("_FLEECEFS_COMPLETE", "bash_complete")
        patch.setenv("COMP_WORDS", "fleecefs job complete w")
        patch.setenv("COMP_CWORD", "3")
        text = run().stdout

    assert text == f"plain,{WEB}\n"
