"""Disks that a mirror has moved, mounted again: where they live, and what they have."""

import errno
from pathlib import Path

import pytest

from fleecefs.bitmaps.steps import Add
from fleecefs.block.raw import RawImage
from fleecefs.errors import NotUsable, describe
from fleecefs.jobs.resume import resume_jobs
from tests.jobs.test_mirror import is_alike, is_free, move, nothing_left, source_of
from tests.support.disks import clusters, letters
from tests.support.host import CLUSTER, Host

LETTERS = "abcdefghijklmnop"


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """A host with a disk of sixteen clusters."""
    host = Host(tmpfs_path, monkeypatch)
    host.add("web.raw", clusters(LETTERS))
    host.open()
    yield host
    host.end()


@pytest.fixture
def old(host):
    return host.sources["web.raw"]


@pytest.fixture
def new(tmpfs_path):
    return tmpfs_path / "new.raw"


def close(host):
    host.close()


def crash(host):
    host.crash()


def reboot(host):
    host.crash()
    host.reboot()


ENDS = [close, crash, reboot]


def told(host, how, old, new):
    """Let the mount be told where its disk is."""
    path = new if how.startswith("new") else old
    if how.endswith("link"):
        link = old.with_name("link.raw")
        link.symlink_to(path)
        path = link
    elif how.endswith("dots"):
        path = path.parent / "." / ".." / path.parent.name / path.name
    host.sources["web.raw"] = path


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["old", "old-link", "old-dots", "new", "new-link"])
def test_it_lives_where_it_was_moved_to(host, old, new, end, how):
    move(host, new)
    host.write("web.raw", clusters("A"), 0)
    end(host)
    told(host, how, old, new)
    host.open()
    host.write("web.raw", clusters("B"), CLUSTER)

    assert Path(source_of(host)).resolve() == new
    assert letters(host.live("web.raw")) == "ABcdefghijklmnop"
    assert letters(new.read_bytes()) == "ABcdefghijklmnop"
    assert letters(old.read_bytes()) == LETTERS
    assert is_free(old)
    assert resume_jobs(host.inventory) == []
    assert nothing_left(host)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["old", "old-link", "new", "new-link"])
def test_moved_back_it_lives_where_it_was(host, old, new, end, how):
    move(host, new)
    host.write("web.raw", clusters("A"), 0)
    move(host, old)
    host.write("web.raw", clusters("B"), CLUSTER)
    end(host)
    told(host, how, old, new)
    host.open()
    host.write("web.raw", clusters("C"), 2 * CLUSTER)

    assert Path(source_of(host)).resolve() == old
    assert letters(old.read_bytes()) == "ABCdefghijklmnop"
    assert letters(new.read_bytes()) == "Abcdefghijklmnop"
    assert is_free(new)


@pytest.mark.parametrize("end", ENDS)
def test_moved_on_it_lives_at_the_last_place(host, old, new, end, tmpfs_path):
    third = tmpfs_path / "third.raw"
    for path in new, third:
        move(host, path)
    for path in old, new, third:
        end(host)
        host.sources["web.raw"] = path
        host.open()
        host.write("web.raw", path.name.encode())
        assert source_of(host) == str(third)

    assert third.read_bytes().startswith(b"third.raw")
    assert letters(old.read_bytes()) == letters(new.read_bytes()) == LETTERS


def test_its_state_says_so_once(host, old, new):
    for path in new, old, new:
        move(host, path)

    (record,) = host.inventory._state.disks
    assert record.source == str(new)
    assert record.former_sources == [str(old)]
    assert record.source_inode == new.stat().st_ino


def test_moved_through_a_link_it_lives_there(host, old, new):
    new.write_bytes(bytes(16 * CLUSTER))
    link = new.with_name("link.raw")
    link.symlink_to(new)
    move(host, link)
    host.write("web.raw", clusters("A"), 0)
    host.close()
    host.open()

    assert letters(new.read_bytes()) == "A" + LETTERS[1:]
    assert is_alike(host, new)
    assert is_free(old)


def test_the_old_place_may_be_gone(host, old, new):
    move(host, new)
    old.unlink()
    host.close()
    host.open()

    assert source_of(host) == str(new)
    assert letters(host.live("web.raw")) == LETTERS


def test_the_old_place_may_lead_to_the_new_one(host, old, new):
    """As an administrator lets it, who does not want to tell anybody."""
    move(host, new)
    host.close()
    old.unlink()
    old.symlink_to(new)
    host.open()
    host.write("web.raw", clusters("A"), 0)

    assert letters(new.read_bytes()) == "A" + LETTERS[1:]


def test_what_is_at_the_old_place_may_be_another_disk(host, old, new):
    move(host, new)
    host.close()
    host.sources = {"web.raw": old, "copy.raw": old}
    host.open()
    host.write("web.raw", clusters("A"), 0)
    host.write("copy.raw", clusters("B"), 0)

    assert letters(new.read_bytes()) == "A" + LETTERS[1:]
    assert letters(old.read_bytes()) == "B" + LETTERS[1:]


# -- what else it has


@pytest.mark.parametrize("how", ["old", "new"])
@pytest.mark.parametrize("end", [close, crash])
def test_its_snapshots_are_what_they_were(host, old, new, end, how):
    inventory = host.inventory
    host.write("web.raw", clusters("A"), 0)
    inventory.create_snapshot("before")
    host.write("web.raw", clusters("B"), CLUSTER)
    move(host, new)
    host.write("web.raw", clusters("C"), 2 * CLUSTER)
    inventory.create_snapshot("after")
    host.write("web.raw", clusters("D"), 3 * CLUSTER)
    old.write_bytes(clusters("x" * 16))
    end(host)
    told(host, how, old, new)
    host.open()
    host.write("web.raw", clusters("EE"), 4 * CLUSTER)

    assert host.lost("before", "web.raw") is None
    assert letters(host.read("before", "web.raw")) == "Abcdefghijklmnop"
    assert letters(host.read("after", "web.raw")) == "ABCdefghijklmnop"
    assert letters(host.live("web.raw")) == "ABCDEEghijklmnop"
    for name in "before", "after":
        host.inventory.delete_snapshot(name)
    host.check_space()


def test_snapshots_that_survive_the_host_do_so_over_a_move(host, old, new):
    host.close()
    host.open(survives_host=True)
    host.inventory.create_snapshot("before")
    host.write("web.raw", clusters("A"), 0)
    move(host, new)
    host.write("web.raw", clusters("B"), CLUSTER)
    host.crash()
    host.reboot()
    host.open(survives_host=True)

    assert source_of(host) == str(new)
    assert letters(host.read("before", "web.raw")) == LETTERS
    assert letters(host.live("web.raw")) == "ABcdefghijklmnop"


@pytest.mark.parametrize("end", [close, crash])
def test_its_bitmaps_have_all_that_was_written(host, old, new, end):
    add = Add("web.raw", "daily", granularity=CLUSTER, persistent=True)
    host.inventory.change_bitmaps([add])
    host.write("web.raw", b"A", 0)
    move(host, new)
    host.write("web.raw", b"B", CLUSTER)
    end(host)
    host.open()
    host.write("web.raw", b"C", 2 * CLUSTER)

    held = host.inventory.bitmaps.find("web.raw").held["daily"]
    assert held.bitmap.inconsistent is None
    assert list(held.bitmap.to_save().search(1)) == [0, 1, 2]


@pytest.mark.logs("snapshot before of web.raw is broken: the source was changed")
def test_who_changes_the_new_source_breaks_its_snapshots(host, old, new):
    host.inventory.create_snapshot("before")
    move(host, new)
    host.close()
    new.write_bytes(clusters("x" * 16))
    host.open()

    assert "was changed" in host.lost("before", "web.raw")


def test_who_changes_the_old_source_breaks_nothing(host, old, new):
    host.inventory.create_snapshot("before")
    move(host, new)
    host.close()
    old.write_bytes(clusters("x"))
    host.open()

    assert host.lost("before", "web.raw") is None
    assert letters(host.read("before", "web.raw")) == LETTERS


# -- what is refused


def test_a_new_source_that_is_gone_is_named_beside_the_old_one(host, old, new):
    move(host, new)
    host.close()
    kept = new.rename(new.with_name("kept.raw"))

    with pytest.raises(FileNotFoundError) as e:
        host.open()

    assert e.value.strerror == (
        f"disk 'web.raw' was moved from {old} by a mirror: source {new}: "
        "No such file or directory"
    )
    # Nothing has been changed: it comes back with its source.
    kept.rename(new)
    host.open()
    assert source_of(host) == str(new)
    assert letters(host.live("web.raw")) == LETTERS


def test_a_new_source_in_use_is_named_beside_the_old_one(host, old, new):
    move(host, new)
    host.close()
    other = RawImage.open_source(new)

    with pytest.raises(OSError) as e:
        host.open()

    other.close()
    assert e.value.errno == errno.EBUSY
    text = describe(e.value)
    assert text.startswith(f"disk 'web.raw' was moved from {old} by a mirror: source ")
    assert f"{new}: in use by another program" in text


def test_it_is_not_left_out_of_the_mount(host, old, new, tmpfs_path):
    move(host, new)
    host.close()
    host.add("db.raw", clusters("d"))

    with pytest.raises(NotUsable) as e:
        host.open(["db.raw"])

    assert "its move by a mirror needs disk 'web.raw'" in str(e.value)
    assert f"--disk web.raw={new}" in str(e.value)
    host.open()
    assert source_of(host) == str(new)


def test_another_source_is_what_it_is_told_to_be(host, old, new, tmpfs_path):
    """One where it never lived is no mistake."""
    third = tmpfs_path / "third.raw"
    third.write_bytes(clusters("t" * 16))
    move(host, new)
    host.close()
    host.sources["web.raw"] = third
    host.open()

    assert source_of(host) == str(third)
    assert letters(host.live("web.raw")) == "t" * 16
