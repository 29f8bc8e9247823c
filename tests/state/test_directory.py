"""state.json and the directory around it: what is kept, and what is refused."""

import json
import os
import subprocess

import pytest

from fleecefs.errors import BadName, Busy, NameTooLong, NotUsable
from fleecefs.state.directory import (
    DiskRecord,
    EpochRecord,
    SnapshotFileRecord,
    SnapshotRecord,
    StateDirectory,
    check_name,
    default_path,
    new_state,
)


@pytest.fixture
def directory(tmp_path):
    directory = StateDirectory.open(tmp_path / "state")
    yield directory
    directory.close()


@pytest.fixture
def state():
    state = new_state("boot")
    state.disks.append(
        DiskRecord(
            name="web.raw",
            id="5f0c4b1e-6b0c-4d0e-9c6a-1f2e3d4c5b6a",
            inode=state.new_inode(),
            source="/images/web.raw",
            size=1 << 20,
            cluster_size=4096,
            source_inode=12,
            source_mtime_ns=1_700_000_000_123_456_789,
            next_epoch=2,
            epochs=[EpochRecord(1, "disks/web.raw/epochs/0001")],
        )
    )
    file = SnapshotFileRecord(
        disk="web.raw",
        inode=state.new_inode(),
        epoch=1,
        allocated=4096,
        on_cbw_error="break-snapshot",
    )
    state.snapshots.append(
        SnapshotRecord("one", state.new_inode(), 1, 2, [file], is_created=True)
    )
    return state


def document_of(directory):
    return json.loads((directory.path / "state.json").read_text())


def change(document, path, value):
    """Set what a path like `disks.0.name` leads to."""
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        document = document[part]
    document[last] = value


# -- round trips


def test_a_new_directory_has_no_state(directory):
    assert directory.load() is None
    assert directory.path.stat().st_mode & 0o777 == 0o700


def test_what_was_saved_is_loaded(directory, state):
    directory.save(state)

    assert directory.load() == state
    assert (directory.path / "state.json").stat().st_mode & 0o777 == 0o600


def test_a_broken_snapshot_keeps_its_reason(directory, state):
    state.snapshots[0].files[0].lost = "no space in the «store»"
    directory.save(state)

    assert directory.load().snapshots[0].files[0].lost == "no space in the «store»"


def test_a_source_that_is_no_text_is_kept(directory, state):
    state.disks[0].source = os.fsdecode(b"/images/\xff.raw")
    directory.save(state)

    assert os.fsencode(directory.load().disks[0].source) == b"/images/\xff.raw"


def test_a_save_that_fails_keeps_what_was_there(directory, state, monkeypatch):
    directory.save(state)

    def fail(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        state.snapshots.clear()
        with pytest.raises(OSError):
            directory.save(state)

    assert [snapshot.name for snapshot in directory.load().snapshots] == ["one"]


def test_inode_numbers_count_up_over_a_save(directory, state):
    first = state.new_inode()
    directory.save(state)

    assert directory.load().new_inode() == first + 1


# -- whose directory it is


def test_one_at_a_time(directory):
    with pytest.raises(Busy, match="in use by another fleecefs"):
        StateDirectory.open(directory.path)


def test_a_closed_directory_is_free(directory):
    second = directory.path.with_name("second")
    StateDirectory.open(second).close()

    StateDirectory.open(second).close()


def test_a_process_started_meanwhile_does_not_hold_the_lock(tmp_path):
    directory = StateDirectory.open(tmp_path / "state")
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        directory.close()

        StateDirectory.open(tmp_path / "state").close()

        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")

    with pytest.raises(NotUsable, match=r"not empty.*give an empty directory"):
        StateDirectory.open(tmp_path)

    assert os.listdir(tmp_path) == ["letter.txt"]


def test_a_directory_that_lost_its_state_is_refused(directory, state):
    directory.save(state)
    (directory.path / "disks").mkdir()
    (directory.path / "state.json").unlink()

    with pytest.raises(NotUsable, match=r"without a state\.json"):
        StateDirectory.open(directory.path)


@pytest.mark.parametrize("name", ["lock", "lost+found", "state.json.new"])
def test_traces_of_a_first_try_and_of_mkfs_are_no_obstacle(tmp_path, name):
    (tmp_path / name).touch()

    directory = StateDirectory.open(tmp_path)

    assert directory.load() is None
    directory.close()


def test_a_file_is_no_directory(tmp_path):
    path = tmp_path / "file"
    path.touch()

    with pytest.raises(NotUsable, match="not a directory"):
        StateDirectory.open(path)
    with pytest.raises(NotUsable, match=r"Not a directory.*that you can write to"):
        StateDirectory.open(path / "below")


# -- what is no state


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="open brace"),
        pytest.param("\0" * 4096, id="zeroes"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("9" * 10_000, id="huge number"),
        pytest.param("[]", id="array"),
        pytest.param("{}", id="empty object"),
        pytest.param("null", id="null"),
        pytest.param('"text"', id="string"),
        pytest.param('{"format": "another"}', id="another format"),
        pytest.param('{"format": "fleecefs-state"}', id="no version"),
        pytest.param('{"format": "fleecefs-state", "version": 1}', id="nothing else"),
    ],
)
def test_other_files_are_refused_by_name(directory, text):
    path = directory.path / "state.json"
    path.write_text(text)

    with pytest.raises(NotUsable) as e:
        directory.load()

    assert str(e.value).startswith(f"{path}: ")
    assert "restore it from a backup, or give another --state" in str(e.value)
    assert path.read_text() == text


def test_bytes_that_are_no_text_are_refused(directory):
    (directory.path / "state.json").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(NotUsable, match="damaged"):
        directory.load()


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_named(directory, state, version):
    directory.save(state)
    document = document_of(directory)
    document["version"] = version
    (directory.path / "state.json").write_text(json.dumps(document))

    with pytest.raises(NotUsable) as e:
        directory.load()

    assert f"has version {version}, this fleecefs reads version 1" in str(e.value)


def test_every_truncation_is_refused(directory, state):
    directory.save(state)
    path = directory.path / "state.json"
    whole = path.read_bytes()

    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        with pytest.raises(NotUsable):
            directory.load()

    path.write_bytes(whole)
    assert directory.load() == state


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("id", "no uuid"),
        ("id", 5),
        ("is_clean", 1),
        ("next_inode", "17"),
        ("next_inode", True),
        ("disks", {}),
        ("disks", None),
        ("disks.0", "web.raw"),
        ("disks.0.id", "web"),
        ("disks.0.name", "../../etc"),
        ("disks.0.name", "n" * 64),
        ("disks.0.name", None),
        ("disks.0.size", 1.5),
        ("disks.0.epochs", {"number": 1}),
        ("disks.0.epochs.0", [1, "store"]),
        ("disks.0.epochs.0.number", "0001"),
        ("disks.0.surprise", 1),
        ("snapshots.0.name", "a/b"),
        ("snapshots.0.files.0.disk", "db.raw"),
        ("snapshots.0.files.0.on_cbw_error", "panic"),
        ("snapshots.0.files.0.lost", 0),
        ("snapshots.0.files", None),
        ("surprise", 1),
    ],
)
def test_damage_is_refused(directory, state, path, value):
    directory.save(state)
    document = document_of(directory)
    change(document, path, value)
    (directory.path / "state.json").write_text(json.dumps(document))

    with pytest.raises(NotUsable, match=r"state\.json: is damaged; restore"):
        directory.load()


@pytest.mark.parametrize("path", ["id", "disks", "disks.0.size", "snapshots.0.inode"])
def test_a_missing_field_is_refused(directory, state, path):
    directory.save(state)
    document = document_of(directory)
    *way, last = path.split(".")
    part = document
    for step in way:
        part = part[int(step) if step.isdigit() else step]
    del part[last]
    (directory.path / "state.json").write_text(json.dumps(document))

    with pytest.raises(NotUsable, match="is damaged"):
        directory.load()


# -- names


@pytest.mark.parametrize("name", ["a", "0", "web.raw", "a-b_c.d", "x" * 63])
def test_names_that_can_be_used(name):
    assert check_name(name, "disk") is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", BadName),
        (".", BadName),
        ("..", BadName),
        ("../x", BadName),
        ("a/b", BadName),
        ("a\n", BadName),
        ("-a", BadName),
        ("_a", BadName),
        ("é", BadName),
        ("\udcff", BadName),
        ("x" * 64, NameTooLong),
        ("é" * 32, NameTooLong),
    ],
)
def test_names_that_can_not_be_used(name, kind):
    with pytest.raises(kind) as e:
        check_name(name, "disk")

    assert str(e.value).startswith("disk name ")


# -- where it is if nobody says


@pytest.mark.parametrize(
    ("variable", "mountpoint", "expected"),
    [
        ("/xdg", "/mnt/live", "/xdg/fleecefs/mnt-live"),
        ("/xdg", "/mnt/my-disks", r"/xdg/fleecefs/mnt-my\x2ddisks"),
        (None, "/mnt/live", "/var/lib/fleecefs/mnt-live"),
    ],
)
def test_the_default_is_made_of_the_mount_point(
    monkeypatch, variable, mountpoint, expected
):
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_STATE_HOME", variable)

    assert str(default_path(mountpoint)) == expected


def test_the_default_of_a_user_is_at_home(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/ann")

    assert str(default_path("/mnt/live")) == (
        "/home/ann/.local/state/fleecefs/mnt-live"
    )


@pytest.mark.parametrize(
    "other", ["/mnt-live", "/mnt/live-", r"/mnt\x2dlive", "/mnt/live/x"]
)
def test_other_mount_points_have_other_defaults(other):
    assert default_path("/mnt/live") != default_path(other)
