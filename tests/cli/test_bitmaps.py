"""fleecefs bitmap, and backups with bitmaps, on real disks that nobody has mounted."""

import json
from functools import partial

import pytest

from fleecefs.control.client import Client
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.options import BitmapMode, Format, Sync
from fleecefs.state.runtime import RunningMount
from fleecefs.units import KiB, MiB
from tests.cli.command import error_of, output_of, run
from tests.control.fakes import bitmap, running_daemon
from tests.support.host import Host
from tests.support.qemu import qemu_img, require_qemu

SIZE = 4 * MiB
DIRTY = 64 * KiB


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """Two disks, web.raw and db.raw."""
    host = Host(tmpfs_path, monkeypatch)
    for name in "web.raw", "db.raw":
        host.add(name, bytes(SIZE))
    host.open()
    yield host
    host.end()


@pytest.fixture
def live(host, tmp_path, running):
    """A daemon that serves them to the command line."""
    backups = partial(create_backups, host.inventory)
    with running_daemon(tmp_path / "live", host.inventory, backups) as daemon:
        running.append(RunningMount(daemon.mount, daemon.path, 0))
        yield daemon


@pytest.fixture
def backups(daemon):
    """Jobs that end at once, and remember what they were told."""
    daemon.backups.seconds = 0
    return daemon.backups


def bitmaps(*words):
    """Return what the daemon says of bitmaps, by name."""
    listed = json.loads(output_of("bitmap", "list", *words, "--json"))
    return {each["name"]: each for each in listed}


def is_silent(*words):
    return output_of("bitmap", *words) == ""


def write(host, offset=0, disk="web.raw"):
    host.write(disk, b"x" * 4096, offset)


def lose(host, name="daily", reason="its log is unreadable"):
    host.inventory.bitmaps.find("web.raw").held[name].lose(reason)


# -- list


@pytest.mark.usefixtures("live")
def test_a_table_of_bitmaps(host):
    output_of("bitmap", "add", "web.raw", "daily")
    output_of("bitmap", "add", "web.raw", "fine", "--granularity", "4K", "--transient")
    output_of("bitmap", "add", "db.raw", "off", "--disabled")
    output_of("bitmap", "set", "db.raw", "off", "--no-auto")
    write(host, 100_000)
    lose(host)

    text = output_of("bitmap", "list")

    titles, daily, fine, off, problem = text.splitlines()
    assert titles.split() == [
        *("BITMAP", "DISK", "DIRTY", "GRANULARITY", "STATE", "PERSISTENT"),
    ]
    assert daily.split() == [
        "daily",
        "web.raw",
        "-",
        "64",
        "KiB",
        "inconsistent",
        "yes",
    ]
    assert fine.split() == [
        *("fine", "web.raw", "8", "KiB", "4", "KiB", "recording", "no"),
    ]
    assert off.split()[-6:] == ["64", "KiB", "disabled", "yes,", "no", "auto"]
    assert problem == (
        "bitmap daily of web.raw is inconsistent: its log is unreadable;"
        " make a full backup with --fallback full, or remove it"
    )
    assert "off" not in output_of("bitmap", "list", "web.raw")


def test_what_a_job_uses_is_busy(daemon):
    daemon.inventory.bitmaps.all = [bitmap(busy=True)]

    *_, row = output_of("bitmap", "list").splitlines()

    assert row.split()[-2:] == ["busy", "yes"]


def test_status_tells_of_inconsistent_bitmaps_only(daemon):
    lost = bitmap("lost", inconsistent=True, reason="left in use")
    daemon.inventory.bitmaps.all = [bitmap(), lost]

    text = output_of("status")

    assert "bitmap lost of web.raw is inconsistent: left in use; " in text
    assert "daily" not in text


@pytest.mark.usefixtures("live")
def test_json_of_bitmaps_is_the_daemons_answer(host):
    output_of("bitmap", "add", "web.raw", "daily")
    write(host)

    assert bitmaps()["daily"] == bitmap(
        count=DIRTY,
        container=str(host.state / "disks/web.raw/bitmaps/bitmaps.qcow2"),
    )


# -- a file, without a daemon


@pytest.mark.usefixtures("live")
def test_a_container_in_use_is_listed(host, tmp_path):
    path = tmp_path / "c.qcow2"
    output_of("bitmap", "add", "web.raw", "daily", "--container", str(path))
    write(host)
    output_of("bitmap", "save", "web.raw")

    text = output_of("bitmap", "list", "--container", str(path))

    titles, row, note = text.splitlines()
    assert titles.split() == ["BITMAP", "DIRTY", "OF", "GRANULARITY", "FLAGS"]
    assert " ".join(row.split()) == "daily 64 KiB 4 MiB 64 KiB in use, auto"
    assert note.startswith("in use: ")


def test_a_file_of_qemu_is_listed_without_a_daemon(running, tmp_path, monkeypatch):
    require_qemu()
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "c.qcow2", SIZE)
    qemu_img("bitmap", "--add", "-g", "32768", "c.qcow2", "theirs")
    qemu_img("bitmap", "--add", "--disable", "c.qcow2", "off")

    text = output_of("bitmap", "list", "--container", "c.qcow2")
    listed = json.loads(output_of("bitmap", "list", "--container", "c.qcow2", "--json"))

    assert "in use" not in text
    assert listed == [
        {
            "name": name,
            "granularity": granularity,
            "count": 0,
            "in-use": False,
            "auto": is_auto,
            "foreign": False,
            "size": SIZE,
        }
        for name, granularity, is_auto in [
            ("theirs", 32 * KiB, True),
            ("off", 64 * KiB, False),
        ]
    ]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param(None, "container {}: No such file or directory", id="missing"),
        pytest.param(b"", "{}: ", id="empty"),
        pytest.param(b"raw" * 999, "{}: is no qcow2 file", id="raw"),
    ],
)
def test_a_file_that_is_no_container(running, tmp_path, content, text):
    path = tmp_path / "c.qcow2"
    if content is not None:
        path.write_bytes(content)

    code, error = error_of("bitmap", "list", "--container", str(path))

    assert code == 1
    assert error.startswith(text.format(path))


def test_a_directory_is_no_container(running, tmp_path):
    code, error = error_of("bitmap", "list", "--container", str(tmp_path))

    assert (code, error) == (1, f"container {tmp_path}: not a regular file")


# -- what is done to bitmaps


@pytest.mark.usefixtures("live")
def test_a_life_by_commands(host):
    assert is_silent("add", "web.raw", "daily")
    write(host)
    assert is_silent("copy", "web.raw", "daily", "kept")
    assert is_silent("clear", "web.raw", "daily")
    assert is_silent("disable", "web.raw", "daily")
    write(host, DIRTY)
    disabled = bitmaps("web.raw")
    assert is_silent("enable", "web.raw", "daily")
    write(host, 2 * DIRTY)
    assert is_silent("merge", "web.raw", "daily", "kept")
    merged = bitmaps("web.raw")["daily"]
    assert is_silent("save")
    assert is_silent("remove", "web.raw", "daily", "kept")

    assert (disabled["daily"]["count"], disabled["daily"]["recording"]) == (0, False)
    kept = disabled["kept"]
    assert (kept["count"], kept["recording"], kept["persistent"]) == (
        *(DIRTY, False, False),
    )
    assert (merged["count"], merged["recording"]) == (2 * DIRTY, True)
    assert bitmaps() == {}


@pytest.mark.usefixtures("live")
def test_add_with_everything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    words = ["--granularity", "1M", "--disabled", "--container", "here.qcow2"]
    output_of("bitmap", "add", "web.raw", "daily", *words)

    assert bitmaps()["daily"] == bitmap(
        count=0,
        granularity=MiB,
        recording=False,
        container=str(tmp_path / "here.qcow2"),
    )


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        pytest.param("--transient", {"persistent": False}, id="transient"),
        pytest.param("--no-auto", {"persistent": True, "auto": False}, id="no-auto"),
        pytest.param("--persistent --auto", {"persistent": True, "auto": True}, id="+"),
    ],
)
def test_set(words, changes):
    output_of("bitmap", "add", "web.raw", "daily")

    output_of("bitmap", "set", "web.raw", "daily", *words.split())

    assert bitmaps()["daily"].items() >= changes.items()


@pytest.mark.usefixtures("live")
def test_set_takes_a_container(tmp_path):
    path = str(tmp_path / "c.qcow2")
    output_of("bitmap", "add", "web.raw", "daily", "--transient")

    output_of("bitmap", "set", "web.raw", "daily", "--persistent", "--container", path)

    assert bitmaps()["daily"]["container"] == path


@pytest.mark.usefixtures("live")
def test_attach_says_what_it_has_found(tmp_path):
    require_qemu()
    path = str(tmp_path / "c.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    for name in "one", "two", "three":
        qemu_img("bitmap", "--add", path, name)

    some = output_of("bitmap", "attach", "web.raw", "--container", path, "two")
    rest = output_of(
        *("bitmap", "attach", "db.raw", "--container", path, "one", "three", "--json")
    )

    assert some == "attached to web.raw: two\n"
    assert json.loads(rest) == ["one", "three"]
    assert bitmaps()["two"]["recording"]


@pytest.mark.usefixtures("live")
def test_bitmaps_are_exported_and_imported(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output_of("bitmap", "add", "web.raw", "daily")
    output_of("bitmap", "add", "web.raw", "fine", "--granularity", "4K")
    write(host)

    exported = output_of("bitmap", "export", "web.raw", "moved.qcow2")
    output_of("bitmap", "remove", "web.raw", "daily", "fine")
    one = output_of("bitmap", "import", "web.raw", "moved.qcow2", "daily")
    other = output_of("bitmap", "import", "web.raw", "moved.qcow2", "fine", "--json")
    again = error_of("bitmap", "export", "web.raw", "moved.qcow2")

    assert exported == "exported from web.raw: daily, fine\n"
    assert one == "imported to web.raw: daily\n"
    assert json.loads(other) == ["fine"]
    assert {name: each["count"] for name, each in bitmaps().items()} == {
        "daily": DIRTY,
        "fine": 4096,
    }
    assert again[0] == 1
    assert again[1].endswith("moved.qcow2: exists; give the name of a new one")


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize("verb", ["remove", "clear", "enable", "disable"])
def test_one_that_is_not_there_stops_no_other(verb):
    output_of("bitmap", "add", "web.raw", "a", "--disabled")
    output_of("bitmap", "add", "web.raw", "b")

    code, error = error_of("bitmap", verb, "web.raw", "a", "none", "b")

    assert (code, error) == (3, "Dirty bitmap 'none' not found")
    found = {name: each["recording"] for name, each in bitmaps().items()}
    assert (
        found
        == {
            "remove": {},
            "clear": {"a": False, "b": True},
            "enable": {"a": True, "b": True},
            "disable": {"a": False, "b": False},
        }[verb]
    )


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        pytest.param("add web.raw daily", 1, "Bitmap already exists: daily", id="name"),
        pytest.param("add none.raw x", 3, "no disk 'none.raw'; ", id="disk"),
        pytest.param("add web.raw x --granularity 1000", 1, "Granularity", id="odd"),
        pytest.param("add web.raw x --granularity 4G", 1, "Granularity", id="large"),
        pytest.param(
            "add web.raw x --granularity 99E", 1, "an integer does not", id="larger"
        ),
        pytest.param(
            "add web.raw x --transient --container /x", 1, "a transient", id="both"
        ),
        pytest.param(
            "add web.raw x --container /none/x", 1, "container /none/x", id="where"
        ),
        pytest.param("list none.raw", 3, "no disk 'none.raw'", id="list"),
        pytest.param("save none.raw", 3, "no disk 'none.raw'", id="save"),
        pytest.param("merge web.raw daily x", 3, "Dirty bitmap 'x'", id="merge"),
        pytest.param("merge web.raw x daily", 3, "Dirty bitmap 'x'", id="merge-2"),
        pytest.param("copy web.raw x y", 3, "Dirty bitmap 'x' not found", id="copy"),
        pytest.param("copy web.raw daily daily", 1, "Bitmap already", id="copy-2"),
        pytest.param("set web.raw x --auto", 3, "Dirty bitmap 'x'", id="set"),
        pytest.param(
            "attach web.raw --container /none/x", 1, "container /none/x: ", id="attach"
        ),
        pytest.param("export web.raw /x none", 3, "Dirty bitmap 'none'", id="export"),
        pytest.param("import web.raw /none/x", 1, "container /none/x: ", id="import"),
    ],
)
def test_what_is_refused(words, code, text):
    output_of("bitmap", "add", "web.raw", "daily")

    found = error_of("bitmap", *words.split())

    assert found[0] == code
    assert found[1].startswith(text)
    assert list(bitmaps()) == ["daily"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param("add web.raw", "Missing argument 'NAME'", id="no-name"),
        pytest.param(
            "add web.raw x --granularity few", "'few' is not a size", id="few"
        ),
        pytest.param("remove web.raw", "Missing argument 'NAME...'", id="no-names"),
        pytest.param("merge web.raw x", "Missing argument 'SOURCE...'", id="no-source"),
        pytest.param("copy web.raw x", "Missing argument 'NEWNAME'", id="no-new-name"),
        pytest.param("set web.raw x", "give --persistent, --transient", id="nothing"),
        pytest.param(
            "set web.raw x --transient --container /c", "--container needs", id="where"
        ),
        pytest.param("set x --auto", "Missing argument 'NAME'", id="no-disk"),
        pytest.param("attach web.raw", "Missing option '--container'", id="attach"),
        pytest.param("export web.raw", "Missing argument 'FILE'", id="export"),
        pytest.param("list web.raw --container /c", "not both", id="list"),
    ],
)
def test_wrong_usage(running, words, text):
    code, error = error_of("bitmap", *words.split())

    assert code == 2
    assert text in error


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param("bitmap remove web.raw ", ["daily", "weekly"], id="of-disk"),
        pytest.param("bitmap remove web.raw w", ["weekly"], id="begun"),
        pytest.param("bitmap remove db.raw ", ["daily"], id="of-the-other"),
        pytest.param("backup --bitmap ", ["daily", "weekly"], id="of-all"),
        pytest.param("bitmap list d", ["db.raw"], id="disk"),
    ],
)
def test_names_are_completed(monkeypatch, words, found):
    for disk, name in ("web.raw", "daily"), ("web.raw", "weekly"), ("db.raw", "daily"):
        output_of("bitmap", "add", disk, name)
    monkeypatch.setenv("_FLEECEFS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"fleecefs {words}")
    monkeypatch.setenv("COMP_CWORD", str(1 + words.count(" ")))

    completed = run().stdout

    assert completed == "".join(f"plain,{name}\n" for name in found)


# -- backups


@pytest.mark.usefixtures("live")
def test_a_full_backup_and_an_increment(host, tmp_path):
    target = tmp_path / "web.raw"
    output_of("bitmap", "add", "web.raw", "daily")
    write(host)

    full = output_of("backup", "web.raw", str(target), "--bitmap", "daily")
    write(host, MiB)
    words = ["--bitmap", "daily", "--sync", "incremental"]
    increment = output_of("backup", "web.raw", str(target), *words)

    assert full.startswith("job web.raw completed: 4 MiB in ")
    assert increment.startswith("job web.raw completed: 64 KiB in ")
    assert target.read_bytes() == host.live("web.raw")
    assert bitmaps()["daily"]["count"] == 0


@pytest.mark.usefixtures("live")
def test_a_chain_of_qcow2_files(host, tmp_path, monkeypatch):
    require_qemu()
    monkeypatch.chdir(tmp_path)
    output_of("bitmap", "add", "web.raw", "daily")
    words = ["--bitmap", "daily", "--format", "qcow2"]

    output_of("backup", "web.raw", "full.qcow2", *words)
    write(host, MiB)
    output_of(
        *("backup", "web.raw", "mon.qcow2", *words),
        *("--sync", "incremental", "--backing", "full.qcow2"),
        "--no-auto-dismiss",
    )
    shown = output_of("job", "show", "web.raw")
    qemu_img("convert", "-O", "raw", "mon.qcow2", "restored.raw")

    assert (tmp_path / "restored.raw").read_bytes() == host.live("web.raw")
    lines = dict(line.split(None, 1) for line in shown.splitlines())
    assert lines["format"] == "qcow2"
    assert lines["backing"] == str(tmp_path / "full.qcow2")
    assert lines["bitmap"] == "daily, on-success"


def test_all_options_of_bitmaps_reach_the_job(backups):
    words = (
        "--sync bitmap --bitmap daily --bitmap-mode always --format qcow2"
        " --backing /b/full.raw --backing-format raw --fallback full"
    )

    output_of("backup", "web.raw", "/b/web.qcow2", *words.split())

    [[wanted]] = backups.wanted
    assert (wanted.sync, wanted.bitmap) == (Sync.BITMAP, "daily")
    assert wanted.bitmap_mode is BitmapMode.ALWAYS
    assert (wanted.format, wanted.backing_format) == (Format.QCOW2, Format.RAW)
    assert str(wanted.backing) == "/b/full.raw"
    assert wanted.fallback


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        pytest.param("", None, id="no-bitmap"),
        pytest.param("--bitmap daily", BitmapMode.ON_SUCCESS, id="full"),
        pytest.param("--bitmap daily --sync incremental", None, id="incremental"),
        pytest.param(
            "--bitmap daily --sync bitmap", BitmapMode.ON_SUCCESS, id="bitmap"
        ),
    ],
)
def test_a_mode_is_given_where_one_is_needed(backups, words, mode):
    run("backup", "web.raw", "/b/web.raw", *words.split())

    assert backups.wanted[0][0].bitmap_mode is mode


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        ("--bitmap daily", ["/b/web.raw", "/b/db.raw"]),
        ("--bitmap daily --format qcow2", ["/b/web.raw.qcow2", "/b/db.raw.qcow2"]),
    ],
)
def test_a_bitmap_of_each_disk(backups, words, targets):
    output_of("backup", "--all", "/b", *words.split())

    [wanted] = backups.wanted
    assert [each.bitmap for each in wanted] == ["daily", "daily"]
    assert [str(each.target) for each in wanted] == targets


NEW = (
    "note: {} is new: it gets only what is dirty in 'daily', the rest of it is holes\n"
)


@pytest.mark.parametrize(
    ("words", "is_noted"),
    [
        pytest.param("--sync incremental", True, id="incremental"),
        pytest.param("--sync bitmap", True, id="bitmap"),
        pytest.param("--sync full", False, id="full"),
        pytest.param("--sync incremental --fallback full", False, id="fallback"),
        pytest.param("--sync incremental --format qcow2", False, id="qcow2"),
    ],
)
def test_an_increment_in_a_new_file_is_noted(backups, tmp_path, words, is_noted):
    target = tmp_path / "new.raw"

    result = run("backup", "web.raw", str(target), "--bitmap", "daily", *words.split())

    assert result.exit_code == 0
    assert result.stderr == (NEW.format(target) if is_noted else "")


@pytest.mark.usefixtures("backups")
def test_an_increment_in_a_file_that_is_there_is_not_noted(tmp_path):
    target = tmp_path / "old.raw"
    target.touch()

    output_of("backup", "web.raw", str(target), "--bitmap=daily", "--sync=incremental")


HINT = "; or make a full backup with --fallback full"


@pytest.mark.usefixtures("live")
def test_a_bitmap_that_is_missing_is_hinted_at(tmp_path):
    target = tmp_path / "web.raw"
    target.write_bytes(bytes(SIZE))

    found = error_of(
        "backup", "web.raw", str(target), "--bitmap=daily", "--sync=incremental"
    )

    assert found == (3, f"Dirty bitmap 'daily' not found{HINT}")


@pytest.mark.usefixtures("live")
def test_so_is_an_inconsistent_one(host, tmp_path):
    output_of("bitmap", "add", "web.raw", "daily")
    lose(host)

    code, text = error_of("backup", "web.raw", str(tmp_path / "b"), "--bitmap=daily")

    assert code == 1
    assert "its log is unreadable" in text
    assert text.endswith(HINT)


def test_a_busy_one_is_not(backups, daemon):
    daemon.inventory.bitmaps.all = [bitmap(busy=True)]
    backups.refusal = OSError(16, "Bitmap 'daily' is in use")

    found = error_of("backup", "web.raw", "/b", "--bitmap=daily")

    assert found == (1, "Bitmap 'daily' is in use")


def test_another_error_is_not(backups):
    backups.refusal = OSError(2, "target /b: there is no directory")

    assert HINT not in error_of("backup", "web.raw", "/b", "--bitmap=daily")[1]


@pytest.mark.logs("is a full one")
@pytest.mark.usefixtures("live")
def test_a_fallback_says_so(host, tmp_path):
    target = tmp_path / "web.raw"
    words = "--bitmap daily --sync incremental --fallback full --no-auto-dismiss"

    text = output_of("backup", "web.raw", str(target), *words.split())
    shown = output_of("job", "show", "web.raw")

    reason = "a full backup, because there was no bitmap 'daily'"
    assert text.endswith(f"; {reason}\n")
    assert f"job web.raw is {reason}" in shown
    assert target.read_bytes() == host.live("web.raw")
    assert bitmaps()["daily"]["count"] == 0


@pytest.mark.usefixtures("live")
@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--sync incremental", "must provide a valid bitmap name"),
        ("--bitmap-mode never", "without a bitmap"),
        ("--bitmap daily --bitmap-mode never", "no meaningful effect"),
        ("--bitmap daily --sync none", "meaningful bitmap outputs"),
        ("--fallback full", "a fallback is for"),
        ("--backing /b", "use format qcow2"),
    ],
)
def test_what_makes_no_sense_together(tmp_path, words, text):
    output_of("bitmap", "add", "web.raw", "daily")

    code, error = error_of("backup", "web.raw", str(tmp_path / "b"), *words.split())

    assert code == 1
    assert text in error
    assert not (tmp_path / "b").exists()


# -- snapshots


@pytest.mark.parametrize("disks", [["web.raw"], ["db.raw", "web.raw"]])
def test_a_snapshot_starts_bitmaps(live, disks):
    words = [] if len(disks) == 2 else disks

    output_of("snapshot", "create", "nightly", *words, "--bitmap", "since")

    with Client(live.path) as client:
        listed = client.execute("fleecefs-bitmap-list")
    assert sorted(each["disk"] for each in listed) == disks
    assert all(each["recording"] and each["persistent"] for each in listed)
