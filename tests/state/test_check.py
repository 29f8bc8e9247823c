"""`fleecefs check`: what is wrong with a state, and nothing else is touched."""

import hashlib
import json
import os
import shutil

import pytest
from click.testing import CliRunner

from fleecefs.cli import main
from fleecefs.errors import Busy, NotFound, NotUsable
from fleecefs.state.check import Finding, check
from tests.support.damage import (
    damage_end,
    damage_header,
    empty,
    make_older,
    overwrite,
    remove,
    truncate,
)
from tests.support.disks import clusters, letters
from tests.support.host import CLUSTER, Host


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    host = Host(tmpfs_path, monkeypatch)
    host.add("web.raw", clusters("aaaaaaaa"))
    host.add("db.raw", clusters("dd"))
    yield host
    host.end()


@pytest.fixture
def clean(host):
    """A state with two snapshots, unmounted."""
    tell(host)
    host.close()
    return host


def tell(host, **options):
    host.open(**options)
    host.inventory.create_snapshot("one")
    host.write("web.raw", clusters("b"))
    host.inventory.create_snapshot("two", ["web.raw"])
    host.write("web.raw", clusters("cc"))


def epoch(host, number=1, disk="web.raw"):
    return host.state / f"disks/{disk}/epochs/{number:04}"


def orphan(host, place="disks/web.raw/epochs/0099"):
    """Make what a crash may leave: an epoch that no snapshot needs."""
    path = host.state / place
    path.mkdir(parents=True)
    (path / "store.raw").write_bytes(b"x" * 10000)
    return path


def tree(host):
    """Return all there is in a state: names, modes, times and content."""
    digest = hashlib.sha256()
    for path in sorted([host.state, *host.state.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        facts = status.st_mode, status.st_mtime_ns, status.st_ino, content
        digest.update(repr((str(path), *facts)).encode())
    return digest.hexdigest()


def findings(host, *, repair=False):
    """Check, and return what was found; without `repair` nothing may change."""
    before = tree(host)
    try:
        return check(host.state, repair=repair)
    finally:
        if not repair:
            assert tree(host) == before


# -- nothing is wrong


def test_a_clean_state_has_nothing_wrong(clean):
    assert findings(clean) == []


def test_a_clean_state_that_survives_the_host_has_nothing_wrong(host):
    tell(host, survives_host=True)
    host.close()

    assert findings(host) == []


def test_a_state_without_snapshots_has_nothing_wrong(host):
    host.open()
    host.close()

    assert findings(host) == []


def test_given_up_parts_are_not_wrong(host):
    tell(host)
    host.inventory.snapshots["one"].snapshots["web.raw"].discard(CLUSTER, 0)
    host.close()

    assert findings(host) == []


def test_repairing_what_is_right_changes_nothing(clean):
    before = tree(clean)

    assert findings(clean, repair=True) == []

    assert tree(clean) == before


# -- how it ended


def test_a_crash_of_the_daemon_is_told(host):
    tell(host)
    host.crash()

    assert findings(host) == [
        Finding(
            str(host.state),
            "not unmounted cleanly: the daemon and its keeper crashed",
            False,
        )
    ]


def test_a_crash_of_the_host_is_told(host):
    tell(host)
    host.crash()
    host.reboot()

    assert findings(host) == [
        Finding(str(host.state), "not unmounted cleanly: the host crashed", False)
    ]


@pytest.mark.parametrize("is_reboot", [False, True])
def test_the_next_mount_is_not_disturbed(host, is_reboot):
    tell(host, survives_host=True)
    host.crash()
    if is_reboot:
        host.reboot()

    findings(host, repair=True)

    host.open()
    assert letters(host.read("one", "web.raw")) == "aaaaaaaa"
    assert letters(host.read("two", "web.raw")) == "baaaaaaa"


@pytest.mark.logs("is broken: the host went down")
def test_a_broken_snapshot_is_told_with_its_reason(host):
    tell(host)
    host.crash()
    host.reboot()
    host.open()
    host.close()

    reason = "is broken: the host went down without unmounting"
    assert findings(host) == [
        Finding("snapshot one of web.raw", reason, False),
        Finding("snapshot one of db.raw", reason, False),
        Finding("snapshot two of web.raw", reason, False),
    ]
    assert findings(host, repair=True) == findings(host)


# -- files


@pytest.mark.parametrize("name", ["preserved.bits", "disk.bits"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "is missing"),
        (empty, "not a file of bits"),
        (truncate, "damaged or truncated"),
        (overwrite, "not a file of bits"),
        (damage_header, "header is damaged"),
        (make_older, "has version 7"),
        (damage_end, "damaged or truncated"),
    ],
)
def test_damaged_bits_are_named(clean, name, damage, says):
    path = epoch(clean, 2) / name
    damage(path)

    (found,) = findings(clean)

    assert found.what == "epoch 2 of web.raw"
    assert found.problem.startswith(str(path))
    assert says in found.problem
    assert not found.can_repair
    before = tree(clean)
    assert findings(clean, repair=True) == [found]
    assert tree(clean) == before


def test_bits_of_another_epoch_are_named(clean):
    path = epoch(clean, 2) / "preserved.bits"
    shutil.copy(epoch(clean, 1) / "preserved.bits", path)

    (found,) = findings(clean)

    assert found.problem == f"{path}: belongs to another disk or epoch"


def test_damaged_bits_of_what_was_given_up_are_named(host):
    tell(host)
    host.inventory.snapshots["one"].snapshots["web.raw"].discard(CLUSTER, 0)
    host.close()
    path = epoch(host) / "denied.bits"
    damage_end(path)

    (found,) = findings(host)

    assert found.problem == f"{path}: bits are damaged or truncated"


@pytest.mark.parametrize("end", ["close", "crash"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "is missing"),
        (empty, "not a file of bits"),
        (truncate, "is truncated"),
        (damage_header, "header is damaged"),
        (damage_end, "a record is damaged"),
    ],
)
def test_a_damaged_log_is_named(host, end, damage, says):
    tell(host, survives_host=True)
    getattr(host, end)()
    path = epoch(host) / "preserved.log"
    damage(path)

    *_, found = findings(host)

    assert found.what == "epoch 1 of web.raw"
    assert found.problem.startswith(str(path))
    assert says in found.problem


def test_a_missing_store_is_named(clean):
    path = epoch(clean, 1, "db.raw") / "store.raw"
    path.unlink()

    assert findings(clean) == [
        Finding("epoch 1 of db.raw", f"{path} is missing", False)
    ]


@pytest.mark.parametrize("damage", [empty, truncate, overwrite])
def test_a_store_of_another_size_is_named(clean, damage):
    path = epoch(clean) / "store.raw"
    damage(path)

    assert findings(clean) == [
        Finding("epoch 1 of web.raw", f"{path} has not the size of the disk", False)
    ]


def test_a_store_elsewhere_is_looked_at(host, tmpfs_path):
    store = tmpfs_path / "store"
    store.mkdir()
    tell(host, store=store)
    host.close()
    assert findings(host) == []
    (path,) = store.glob("*/disks/web.raw/epochs/0002/store.raw")
    path.unlink()

    assert findings(host) == [
        Finding("epoch 2 of web.raw", f"{path} is missing", False)
    ]


def test_a_missing_source_is_named(clean):
    clean.sources["db.raw"].unlink()

    assert findings(clean) == [
        Finding("disk db.raw", f"{clean.sources['db.raw']} is missing", False)
    ]


def test_everything_wrong_is_found_at_once(clean):
    remove(epoch(clean, 1) / "store.raw")
    remove(epoch(clean, 2) / "disk.bits")
    clean.sources["db.raw"].unlink()
    orphan(clean)

    assert len(findings(clean)) == 4


# -- what belongs to no snapshot


ORPHANS = [
    "disks/web.raw/epochs/0099",
    "disks/gone.raw/epochs/0001",
    # Made by hand, but certainly no epoch of ours.
    "disks/web.raw/epochs/lost+found",
]


@pytest.mark.parametrize("place", ORPHANS)
def test_what_belongs_to_no_snapshot_is_told(clean, place):
    path = orphan(clean, place)

    assert findings(clean) == [Finding(str(path), "belongs to no snapshot", True)]


@pytest.mark.parametrize("place", ORPHANS)
def test_what_belongs_to_no_snapshot_is_removed_only_with_repair(clean, place):
    before = {path.name for path in clean.state.rglob("*")}
    path = orphan(clean, place)

    found = findings(clean, repair=True)

    assert found == [Finding(str(path), "belongs to no snapshot", True, True)]
    assert not path.exists()
    assert {path.name for path in clean.state.rglob("*")} - before <= {"gone.raw"}
    assert findings(clean) == []
    clean.open()
    assert letters(clean.read("one", "web.raw")) == "aaaaaaaa"
    assert letters(clean.read("two", "web.raw")) == "baaaaaaa"


def test_what_belongs_to_no_snapshot_is_found_in_a_store_elsewhere(host, tmpfs_path):
    store = tmpfs_path / "store"
    store.mkdir()
    tell(host, store=store)
    host.close()
    (known,) = store.glob("*/disks/web.raw/epochs/0001")
    path = known.with_name("0099")
    path.mkdir()
    others = store / "something/disks/web.raw/epochs/0099"
    others.mkdir(parents=True)

    found = findings(host, repair=True)

    assert found == [Finding(str(path), "belongs to no snapshot", True, True)]
    assert others.exists()
    assert known.exists()


def test_other_files_are_left_alone(clean):
    notes = clean.state / "notes.txt"
    notes.write_text("mine")
    (clean.state / "fleecefs.log").write_text("log")

    assert findings(clean, repair=True) == []

    assert notes.read_text() == "mine"


# -- what can not be checked


def test_a_state_in_use_is_not_looked_at(host):
    tell(host)

    with pytest.raises(Busy, match="in use by another fleecefs"):
        findings(host)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_no_state_is_not_made(host, kind):
    if kind == "empty":
        host.state.mkdir()
    elif kind == "file":
        host.state.touch()

    with pytest.raises(NotFound, match=f"no state in {host.state}"):
        check(host.state, repair=True)

    assert kind != "missing" or not host.state.exists()
    assert kind != "empty" or os.listdir(host.state) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": "fleecefs-state", "version": 1}',
        '{"format": "fleecefs-state", "version": 9}',
        '{"format": "other", "version": 1}',
    ],
)
def test_a_damaged_state_is_named_and_left_alone(clean, text):
    orphan(clean)
    path = clean.state / "state.json"
    path.write_text(text)
    before = tree(clean)

    with pytest.raises(NotUsable, match=str(path)):
        findings(clean, repair=True)

    assert tree(clean) == before


def test_a_checked_state_is_free_again(clean):
    findings(clean)

    clean.open()


# -- the command


def run(*words):
    result = CliRunner().invoke(main, ["check", *map(str, words)], prog_name="fleecefs")
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def test_the_command_says_that_nothing_is_wrong(clean):
    result = run(clean.state)

    assert (result.exit_code, result.stdout) == (0, "nothing is wrong\n")


def test_the_command_finds_a_state_by_a_relative_path(clean, monkeypatch):
    monkeypatch.chdir(clean.state.parent)

    assert run("state").exit_code == 0


def test_the_command_tells_what_it_finds_a_line_each(clean):
    path = orphan(clean)
    store = epoch(clean) / "store.raw"
    store.unlink()

    result = run(clean.state)

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"epoch 1 of web.raw: {store} is missing",
        f"{path}: belongs to no snapshot; --repair removes it",
    ]
    assert path.exists()


def test_the_command_tells_what_it_repaired(clean):
    path = orphan(clean)

    result = run(clean.state, "--repair")

    assert result.exit_code == 0
    assert result.stdout == f"{path}: belongs to no snapshot; removed\n"
    assert run(clean.state).stdout == "nothing is wrong\n"


def test_the_command_fails_if_something_is_left(clean):
    orphan(clean)
    remove(epoch(clean) / "store.raw")

    assert run(clean.state, "--repair").exit_code == 1
    assert run(clean.state).exit_code == 1


def test_the_command_prints_json(clean):
    path = orphan(clean)

    found = run(clean.state, "--json")
    repaired = run(clean.state, "--json", "--repair")
    nothing = run(clean.state, "--json")

    finding = {
        "what": str(path),
        "problem": "belongs to no snapshot",
        "can-repair": True,
        "repaired": False,
    }
    assert (found.exit_code, json.loads(found.stdout)) == (1, [finding])
    assert json.loads(repaired.stdout) == [finding | {"repaired": True}]
    assert (repaired.exit_code, nothing.exit_code) == (0, 0)
    assert json.loads(nothing.stdout) == []


def test_the_command_says_that_a_state_is_in_use(host):
    host.open()

    result = run(host.state, "--repair")

    assert result.exit_code == 1
    assert (
        result.stderr == f"fleecefs: state {host.state}: in use by another fleecefs\n"
    )


def test_the_command_says_that_there_is_no_state(host):
    result = run(host.state)

    assert result.exit_code == 3
    assert result.stderr == f"fleecefs: no state in {host.state}\n"
    assert result.stdout == ""


def test_the_command_says_that_a_state_is_damaged(clean):
    path = clean.state / "state.json"
    path.write_text("{")

    result = run(clean.state)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"fleecefs: {path}: is damaged or truncated")
    assert result.stderr.count("\n") == 1


def test_the_command_does_not_repeat_escape_sequences(clean):
    orphan(clean, "disks/web.raw/epochs/\x1b[31m")

    result = run(clean.state)

    assert "\x1b" not in result.stdout


def test_the_command_beside_a_mount(mounted):
    """In use while it is mounted, clean afterwards."""
    mount = mounted({"web.raw": 1 << 20})
    mount.create("one")

    busy = mount.cli("check", mount.state)
    mount.umount()
    clean = mount.cli("check", mount.state)

    assert busy.returncode == 1
    assert "in use by another fleecefs" in busy.stderr
    assert (clean.returncode, clean.stdout) == (0, "nothing is wrong\n")
