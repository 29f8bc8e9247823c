"""The command line, against a real control socket with a fake behind it."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from click.testing import CliRunner

import fleecefs
from fleecefs.cli import main
from fleecefs.cli.daemons import resolve
from fleecefs.control.client import Client
from fleecefs.errors import NotFound, Refused
from fleecefs.state.runtime import RunningMount
from tests.cli.command import error_of, output_of, run
from tests.control.fakes import SIZE, running_daemon, wait_until

# -- what is printed


def test_help_has_an_example_and_the_exit_codes():
    text = output_of("--help")

    assert "fleecefs mount --disk" in text
    assert "130 interrupted" in text
    assert max(map(len, text.splitlines())) <= 80


def test_version():
    assert output_of("--version") == f"fleecefs {fleecefs.__version__}\n"


def test_a_snapshots_life(daemon):
    created = output_of("snapshot", "create", "nightly")
    listed = output_of("snapshot", "list")
    shown = output_of("snapshot", "show", "nightly")
    deleted = output_of("snapshot", "delete", "nightly")

    assert created == "snapshot nightly of db.raw, web.raw; writers were held 2.0 ms\n"
    assert "nightly" in listed
    assert "3 MiB" in listed
    assert "2023-11-1" in shown
    assert "1.5 MiB" in shown
    assert deleted == ""
    assert daemon.inventory.snapshots == {}


def test_a_snapshot_of_chosen_disks(daemon):
    output_of("snapshot", "create", "nightly", "db.raw")

    assert daemon.inventory.snapshots == {"nightly": ["db.raw"]}


def test_status_fits_a_terminal(daemon):
    output_of("snapshot", "create", "nightly")
    daemon.inventory.disks["a-long-name.raw"] = "/very" * 20 + "/long/source.raw"
    daemon.inventory.reasons["nightly"] = "the store is full"

    text = output_of("status")

    assert max(map(len, text.splitlines())) <= 80
    for word in ("/mnt/live", "break-snapshot", "web.raw", "8 GiB", "nightly"):
        assert word in text
    assert "nightly/web.raw is broken: the store is full" in text
    assert "\x1b" not in text


def test_status_says_that_a_timeout_of_zero_is_none(daemon):
    limited = output_of("status")
    daemon.cbw_timeout = 0.0

    assert "break-snapshot, after 10 s; snapshots" in limited
    assert "break-snapshot, no time limit; snapshots" in output_of("status")


def test_names_are_not_markup_and_cannot_move_the_cursor(daemon):
    daemon.inventory.disks["[red]x[/red]"] = "/a\x1b[2Jb\udcff"

    text = output_of("status")

    assert "[red]x[/red]" in text
    assert "\\x1b[2Jb\\udcff" in text


def test_map_has_all_extents(daemon):
    lines = output_of("map", "web.raw").splitlines()

    assert lines[0].split() == ["OFFSET", "LENGTH", "DATA", "WHERE"]
    assert [line.split() for line in lines[1:]] == [
        ["0x0", "0x1000", "yes", "source"],
        ["0x1000", "0x1000", "yes", "ram"],
        ["0x2000", hex(SIZE - 8192), "no", "none"],
    ]


def test_map_takes_a_path_on_the_mount(daemon):
    by_path = output_of("map", "/mnt/live/snapshots/nightly/web.raw")

    assert by_path == output_of("map", "snapshots/nightly/web.raw")


def test_json_is_the_daemons_answer(daemon):
    created = json.loads(output_of("snapshot", "create", "nightly", "--json"))
    listed = json.loads(output_of("snapshot", "list", "--json"))
    shown = json.loads(output_of("snapshot", "show", "--json", "nightly"))
    status = json.loads(output_of("status", "--json"))
    mapped = json.loads(output_of("map", "--json", "web.raw"))

    assert created == shown == daemon.inventory.describe_snapshot("nightly")
    assert listed == [created]
    assert status == daemon.status() | {"jobs": []}
    assert mapped == {"size": SIZE, "extents": daemon.inventory.extents, "next": None}


def listening_to_events(daemon, *words):
    """Run `events`, make two of them, then end the daemon."""

    def happen():
        wait_until(lambda: daemon.events._subscriptions)
        daemon.inventory.create_snapshot("nightly")
        daemon.inventory.delete_snapshot("nightly")
        with Client(daemon.path) as client:
            client.execute("quit")

    thread = threading.Thread(target=happen)
    thread.start()
    text = output_of("events", *words)
    thread.join(10)
    return text.splitlines()


def test_events_are_lines_until_the_daemon_ends(daemon):
    created, deleted, end = listening_to_events(daemon)

    assert created.endswith(
        "FLEECEFS_SNAPSHOT_CREATED name=nightly disks=db.raw,web.raw held=0.002"
    )
    assert deleted.endswith("FLEECEFS_SNAPSHOT_DELETED name=nightly")
    assert end.endswith("SHUTDOWN")


def test_events_as_json_are_an_object_a_line(daemon):
    lines = listening_to_events(daemon, "--json")

    events = [json.loads(line) for line in lines]
    assert events[0]["data"]["name"] == "nightly"
    assert [set(event) for event in events] == [{"event", "data", "timestamp"}] * 3


# -- exit codes and errors


def test_a_snapshot_that_exists_is_a_failure(daemon):
    output_of("snapshot", "create", "nightly")

    code, text = error_of("snapshot", "create", "nightly")

    assert code == 1
    assert text == "snapshot 'nightly' exists"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("snapshot show x", "no snapshot 'x'", id="show"),
        pytest.param("snapshot delete x", "no snapshot 'x'", id="delete"),
        pytest.param("snapshot create x y.raw", "no disk 'y.raw'", id="create"),
        pytest.param("map y.raw", "no disk or snapshot file 'y.raw'", id="map"),
        pytest.param("status -m /mnt/other", "no daemon serves /mnt/other", id="mount"),
        pytest.param("umount /mnt/other", "no daemon serves /mnt/other", id="umount"),
    ],
)
def test_what_is_not_there_is_exit_code_3(daemon, words, text):
    code, message = error_of(*words.split())

    assert code == 3
    assert message.startswith(text)


def test_deleting_goes_on_after_one_that_is_not_there(daemon):
    output_of("snapshot", "create", "a")
    output_of("snapshot", "create", "b")

    code, text = error_of("snapshot", "delete", "a", "x", "b")

    assert (code, text) == (3, "no snapshot 'x'")
    assert daemon.inventory.snapshots == {}


@pytest.mark.parametrize(
    "words", ["status", "events", "snapshot list", "snapshot create x", "map web.raw"]
)
def test_without_a_daemon_is_exit_code_3(running, words):
    code, text = error_of(*words.split())

    assert code == 3
    assert "fleecefs mount" in text


def test_a_daemon_that_ended_just_now_is_exit_code_3(running, tmp_path):
    running.append(RunningMount("/mnt/live", str(tmp_path / "control"), 0))

    code, text = error_of("status")

    assert code == 3
    assert text.startswith("no daemon answers")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("frobnicate", "No such command", id="command"),
        pytest.param("snapshot frobnicate", "No such command", id="subcommand"),
        pytest.param("status --frob", "No such option", id="option"),
        pytest.param("snapshot create", "Missing argument", id="argument"),
        pytest.param("snapshot delete", "Missing argument", id="no-names"),
        pytest.param("mount /mnt/live", "Missing option '--disk'", id="no-disk"),
        pytest.param(
            "mount --disk a.raw --disk /x/a.raw m",
            "two disks are named 'a.raw'",
            id="2",
        ),
        pytest.param("mount --disk =a m", "lacks a name", id="no-name"),
        pytest.param("mount --disk a= m", "lacks a name", id="no-source"),
        pytest.param("mount --disk / m", "lacks a name", id="root-as-source"),
        pytest.param(
            "mount --disk a --store-limit many m", "'many' is not a size", id="size"
        ),
        pytest.param("mount --disk a --cbw-timeout nan m", "seconds", id="nan"),
        pytest.param("mount --disk a --cbw-timeout inf m", "seconds", id="infinity"),
        pytest.param("mount --disk a --cbw-timeout -1 m", "seconds", id="negative"),
        pytest.param(
            "mount --disk a --on-cbw-error x m", "break-snapshot", id="policy"
        ),
        pytest.param("mount --disk a --bitmaps some m", "'auto', 'no'", id="bitmaps"),
        pytest.param("completion tcsh", "'tcsh'", id="shell"),
    ],
)
def test_wrong_usage_is_exit_code_2(running, words, text):
    code, message = error_of(*words.split())

    assert code == 2
    assert text in message
    assert "--help" in message


def test_no_command_shows_the_help():
    result = run()

    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_ctrl_c_is_exit_code_130(daemon):
    def interrupt():
        wait_until(lambda: daemon.events._subscriptions)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run("events")
    thread.join(10)

    assert result.exit_code == 130
    assert result.stdout == ""


def started(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "fleecefs", *words],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_reader_that_has_seen_enough_is_no_reason_to_complain():
    reader, writer = os.pipe()
    os.close(reader)

    with started("--help", stdout=writer) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=20)

    assert errors == ""
    assert process.returncode == 1


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full, started("--help", stdout=full) as process:
        _, errors = process.communicate(timeout=20)

    assert errors == "fleecefs: No space left on device\n"
    assert process.returncode == 1


# -- which daemon


@pytest.fixture
def other(tmp_path, daemon, running):
    with running_daemon(tmp_path / "other") as other:
        other.mount = "/mnt/other"
        running.append(RunningMount(other.mount, other.path, 0))
        yield other


def test_of_several_daemons_one_is_to_be_chosen(daemon, other):
    code, text = error_of("status")

    assert code == 2
    assert "--mount: /mnt/live, /mnt/other" in text


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("-m /mnt/other snapshot create x", id="before"),
        pytest.param("snapshot -m /mnt/other create x", id="between"),
        pytest.param("snapshot create -m /mnt/other x", id="after"),
        pytest.param("snapshot create x --mount=/mnt/../mnt/other/", id="at-the-end"),
        pytest.param("-m /mnt/live snapshot create x -m /mnt/other", id="last-wins"),
    ],
)
def test_a_daemon_is_chosen_by_an_option(daemon, other, words):
    output_of(*words.split())

    assert list(other.inventory.snapshots) == ["x"]
    assert daemon.inventory.snapshots == {}


def test_a_daemon_is_chosen_by_the_environment(daemon, other, monkeypatch):
    monkeypatch.setenv("FLEECEFS_MOUNT", "/mnt/other")

    output_of("snapshot", "create", "x")
    output_of("snapshot", "create", "x", "-m", "/mnt/live")

    assert list(other.inventory.snapshots) == ["x"]
    assert list(daemon.inventory.snapshots) == ["x"]


def test_a_mount_point_is_found_through_links(tmp_path):
    (tmp_path / "real" / "live").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to(tmp_path / "link" / "live")
    (tmp_path / "round").symlink_to("round")
    real = str(tmp_path / "real" / "live")

    assert resolve(str(tmp_path / "link" / "live")) == real
    assert resolve(str(tmp_path / "direct") + "/") == real
    assert resolve(str(tmp_path / "round")) == str(tmp_path / "round")


# -- mount and umount


@pytest.fixture
def launched(monkeypatch):
    """The settings the keeper would have been started with."""
    calls = []

    def launch(settings):
        calls.append((settings, False))
        return []

    monkeypatch.setattr("fleecefs.keeper.launch", launch)
    monkeypatch.setattr(
        "fleecefs.keeper.stay", lambda settings: calls.append((settings, True))
    )
    return calls


def test_mount_with_all_defaults(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    output_of("mount", "--disk", "images/web.raw", "live")

    ((settings, foreground),) = launched
    state = settings.pop("state")
    assert os.path.isabs(state)
    assert not foreground
    assert settings == {
        "mount": str(tmp_path / "live"),
        "disks": [{"name": "web.raw", "source": str(tmp_path / "images/web.raw")}],
        "store": None,
        "store_limit": None,
        "ram_limit": None,
        "on_cbw_error": "break-snapshot",
        "cbw_timeout": 10.0,
        "cluster_size": None,
        "durability": "process",
        "bitmaps": "auto",
        "allow_other": False,
        "log": f"{state}/fleecefs.log",
    }


def test_in_the_foreground_the_log_goes_to_stderr(launched):
    output_of("mount", "--disk", "a", "--foreground", "/m")

    ((settings, foreground),) = launched
    assert foreground
    assert settings["log"] is None


def test_mount_with_everything(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    words = """mount --disk a=b --state s --store t --store-limit 10GiB
        --ram-limit 64M --on-cbw-error break-guest-write --cbw-timeout 2.5
        --cluster-size 64K --durability host --bitmaps no --foreground --allow-other
        --log l /m"""
    output_of(*words.split())

    ((settings, foreground),) = launched
    assert foreground
    assert settings == {
        "mount": "/m",
        "disks": [{"name": "a", "source": str(tmp_path / "b")}],
        "state": str(tmp_path / "s"),
        "store": str(tmp_path / "t"),
        "store_limit": 10 << 30,
        "ram_limit": 64 << 20,
        "on_cbw_error": "break-guest-write",
        "cbw_timeout": 2.5,
        "cluster_size": 65536,
        "durability": "host",
        "bitmaps": "no",
        "allow_other": True,
        "log": str(tmp_path / "l"),
    }


@pytest.mark.parametrize(
    ("text", "name", "source"),
    [
        pytest.param("/x/web.raw", "web.raw", "/x/web.raw", id="path"),
        pytest.param("db.raw=/x/web.raw", "db.raw", "/x/web.raw", id="named"),
        pytest.param("/x/a=b", "a=b", "/x/a=b", id="equals-after-slash"),
        pytest.param("a=/x/b=c", "a", "/x/b=c", id="two-equals"),
        pytest.param("/x//y/../web.raw", "web.raw", "/x/web.raw", id="normal"),
    ],
)
def test_a_disk_has_a_name_and_a_source(launched, text, name, source):
    output_of("mount", "--disk", text, "/m")

    assert launched[0][0]["disks"] == [{"name": name, "source": source}]


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        pytest.param(Refused("not\nthat"), "not that", 1, id="refused"),
        pytest.param(NotFound("no disk"), "no disk", 3, id="not-found"),
        pytest.param(OSError(13, "No", "/x"), "/x: No", 1, id="the-kernels"),
        pytest.param(OSError("odd"), "odd", 1, id="without-errno"),
        pytest.param(Refused("a\x1b[2Jb"), "a\\x1b[2Jb", 1, id="escape"),
    ],
)
def test_a_failed_mount_is_one_line(monkeypatch, error, text, code):
    def launch(settings):
        raise error

    monkeypatch.setattr("fleecefs.keeper.launch", launch)

    assert error_of("mount", "--disk", "a", "/m") == (code, text)


def test_umount_ends_the_daemon(daemon, tmp_path):
    output_of("umount", "/mnt/live")

    wait_until(lambda: not (tmp_path / "control").exists())


def test_umount_waits_for_the_daemons_process(daemon):
    with subprocess.Popen(["sleep", "0.3"]) as process:
        daemon.pid = process.pid

        output_of("umount", "/mnt/live")

        assert process.poll() is not None


def test_umount_does_not_wait_for_ever(daemon, monkeypatch):
    monkeypatch.setattr(sys.modules["fleecefs.cli.umount"], "END_TIMEOUT", 0.2)
    daemon.pid = os.getpid()

    code, text = error_of("umount", "/mnt/live")

    assert code == 1
    assert f"process {os.getpid()} of /mnt/live has not ended" in text


def test_a_busy_mount_is_refused_unless_forced(daemon):
    daemon.users = "qemu (17)"

    code, text = error_of("umount", "/mnt/live")
    output_of("umount", "--force", "/mnt/live")

    assert code == 1
    assert "qemu (17)" in text


@pytest.fixture
def abandoned(monkeypatch, running, tmp_path):
    """Mounts without a daemon, and a fusermount3 that writes down its arguments."""
    monkeypatch.setattr("fleecefs.fuse.mount.mounts", lambda: ["/mnt/dead"])
    script = tmp_path / "bin" / "fusermount3"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    return script


@pytest.mark.parametrize(
    ("force", "arguments"),
    [
        pytest.param([], "-u -- /mnt/dead\n", id="plain"),
        pytest.param(["--force"], "-u -z -- /mnt/dead\n", id="force"),
    ],
)
def test_a_mount_without_its_daemon_is_unmounted(abandoned, tmp_path, force, arguments):
    text = output_of("umount", *force, "/mnt/dead")

    assert text == "/mnt/dead had lost its daemon, and is unmounted now\n"
    assert (tmp_path / "arguments").read_text() == arguments


def test_a_mount_without_its_daemon_can_be_busy(abandoned):
    abandoned.write_text("#!/bin/sh\necho 'fusermount3: busy' >&2\nexit 1\n")

    code, text = error_of("umount", "/mnt/dead")

    assert code == 1
    assert text.startswith("/mnt/dead has lost its daemon")
    assert "busy" in text


def test_other_commands_say_that_the_daemon_is_lost(abandoned):
    code, text = error_of("status", "-m", "/mnt/dead")

    assert code == 3
    assert text == "/mnt/dead has lost its daemon: use 'fleecefs umount /mnt/dead'"


# -- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(shell):
    assert f"_FLEECEFS_COMPLETE={shell}_complete" in output_of("completion", shell)


def completions(line):
    environment = {
        "_FLEECEFS_COMPLETE": "bash_complete",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split()) - (not line.endswith(" "))),
    }
    result = CliRunner().invoke(main, prog_name="fleecefs", env=environment)
    assert result.exit_code == 0
    assert result.stderr == ""
    # TYPE,NAME each; none at all is an empty line.
    return [each.partition(",")[2] for each in result.stdout.split()]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        pytest.param("fleecefs snapshot show ", ["nightly", "weekly"], id="show"),
        pytest.param("fleecefs snapshot delete n", ["nightly"], id="delete"),
        pytest.param("fleecefs snapshot create x ", ["web.raw", "db.raw"], id="create"),
        pytest.param("fleecefs map w", ["web.raw"], id="map"),
        pytest.param("fleecefs map snapshots/w", ["snapshots/weekly/db.raw"], id="in"),
        pytest.param("fleecefs umount ", ["/mnt/live"], id="umount"),
        pytest.param("fleecefs status -m ", ["/mnt/live"], id="mount"),
        pytest.param("fleecefs -m /mnt/other snapshot show ", [], id="other"),
        pytest.param("fleecefs snapshot show -m /mnt/other ", [], id="other-after"),
        pytest.param("fleecefs mount --on-cbw-error break-g", ["break-guest-write"]),
    ],
)
def test_names_are_completed(daemon, line, found):
    daemon.inventory.create_snapshot("nightly")
    daemon.inventory.create_snapshot("weekly", ["db.raw"])

    assert completions(line) == found


def test_without_a_daemon_nothing_is_completed(running):
    assert completions("fleecefs snapshot show ") == []
    assert completions("fleecefs umount ") == []
