"""Dirty bitmaps over ends, crashes and reboots, and what makes them inconsistent."""

import errno
import os

import pytest
from bitarray import bitarray

from fleecefs.bitmaps.containers import OpenContainer
from fleecefs.bitmaps.steps import (
    Add,
    Clear,
    Disable,
    Fill,
    Remove,
    Set,
)
from fleecefs.errors import Busy, NameTaken
from fleecefs.qcow2.bitmaps import Entry
from tests.bitmaps.hosts import (
    AREA,
    CLUSTER,
    DB,
    SIZE,
    WEB,
    change,
    check_nothing_leaks,
    container,
    described,
    dirty,
    held,
    log_of,
    make_host,
    names,
    reason,
    record,
    saved,
    stored,
    write,
)
from tests.support.disks import clusters
from tests.support.host import failing
from tests.support.qemu import dirty_extents, qemu_img, require_qemu

EIO = OSError(errno.EIO, "Input/output error")


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    require_qemu()
    host = make_host(tmpfs_path, monkeypatch)
    host.open()
    yield host
    host.end()


def add(name, disk=WEB, **more):
    return Add(disk, name, granularity=more.pop("granularity", CLUSTER), **more)


def come_back(host, end, **options):
    if end == "clean end":
        host.close()
    else:
        host.crash()
        if end == "host crash":
            host.reboot()
    host.open(**options)


each_end = pytest.mark.parametrize("end", ["clean end", "kill", "host crash"])


# -- ends


@each_end
def test_bitmaps_come_back_without_a_missing_bit(host, end):
    change(host, add("daily"), add("fine", granularity=512), add("off", DB))
    write(host, 1)
    write(host, 2, disk=DB)
    change(host, Disable(DB, "off"))
    host.inventory.save_bitmaps([WEB, DB])
    write(host, 1, 5, 6)
    write(host, 3, disk=DB)
    come_back(host, end)

    # Of the area from 4 to 7 a crash of the host leaves no more than that.
    areas = {4, 5, 6, 7} if end == "host crash" else {5, 6}
    assert dirty(host, "daily") == {1} | areas
    assert {bit // 8 for bit in dirty(host, "fine")} == {1} | areas
    assert dirty(host, "off", DB) == {2}
    assert not described(host, "off", DB)["recording"]
    write(host, 15)
    assert dirty(host, "daily") == {1, 15} | areas
    assert container(host).exists()
    check_nothing_leaks(host)
    # And once more, exactly.
    host.close()
    assert dirty_extents(container(host), "daily")[0][0] == CLUSTER
    host.open()
    assert dirty(host, "daily") == {1, 15} | areas


@each_end
def test_transient_bitmaps_live_as_long_as_the_bits_in_use(host, end):
    change(host, Add(WEB, "now", granularity=CLUSTER, persistent=False))
    write(host, 1)
    come_back(host, end)

    assert names(host) == ({"now"} if end == "kill" else set())
    if end == "kill":
        write(host, 2)
        assert dirty(host, "now") == {1, 2}
    check_nothing_leaks(host)


def test_host_crash_costs_no_more_than_the_areas_written_since_the_save(host):
    change(host, add("daily"))
    write(host, 0, 4, 8, 12)
    host.inventory.save_bitmaps([WEB])
    write(host, 0, 4)  # these bits are not new
    write(host, 9)
    come_back(host, "host crash")

    assert dirty(host, "daily") == {0, 4, 12} | {8, 9, 10, 11}
    # The log is kept until that is saved.
    come_back(host, "host crash")
    assert dirty(host, "daily") == {0, 4, 12} | {8, 9, 10, 11}
    host.inventory.save_bitmaps([WEB])
    come_back(host, "host crash")
    assert dirty(host, "daily") == {0, 4, 12} | {8, 9, 10, 11}


@pytest.mark.parametrize("granularity", [512, AREA // 2, AREA, 2 * AREA, 2**31])
def test_areas_are_dirty_in_any_granularity(host, granularity):
    change(host, add("daily", granularity=granularity))
    host.write(WEB, b"x", SIZE - 1)
    come_back(host, "host crash")

    numbers = range((SIZE - AREA) // granularity, (SIZE - 1) // granularity + 1)
    assert dirty(host, "daily") == set(numbers)


def test_size_that_is_no_multiple_of_anything(host):
    host.close()
    host.add("odd.raw", b"o" * (3 * CLUSTER + 1))
    host.open()
    change(host, add("daily", "odd.raw"))
    host.write("odd.raw", b"x", 3 * CLUSTER)
    for end in "kill", "clean end", "host crash":
        come_back(host, end)
        assert dirty(host, "daily", "odd.raw") == {3}


@pytest.mark.logs("could not be saved: for a test|was in use when its file was left")
def test_end_that_can_not_save_is_told_and_bitmaps_are_not_believed(
    host, monkeypatch, caplog
):
    change(host, add("daily"), add("db", DB))
    write(host, 1)
    write(host, 1, disk=DB)
    with monkeypatch.context() as patch:
        patch.setattr(OpenContainer, "update", failing_for(WEB, OpenContainer.update))
        host.close()
    assert f"bitmaps of {WEB} could not be saved: for a test" in caplog.text
    host.open()

    assert reason(host, "daily") == "was in use when its file was left"
    assert dirty(host, "db", DB) == {1}


def failing_for(disk, call):
    def wrapper(self, *args, **kwargs):
        if disk in str(self.path):
            raise OSError(errno.ENOSPC, "for a test")
        return call(self, *args, **kwargs)

    return wrapper


@pytest.mark.logs("could not be saved")
def test_container_that_fails_takes_no_other_along(host, tmpfs_path, monkeypatch):
    other = tmpfs_path / "broken.qcow2"
    change(host, add("one", container=other), add("two"))
    write(host, 1)
    with monkeypatch.context() as patch:
        update = failing_for("broken", OpenContainer.update)
        patch.setattr(OpenContainer, "update", update)
        with pytest.raises(OSError, match="for a test"):
            host.inventory.save_bitmaps([WEB])

    assert saved(host, "two") == {1}
    assert host.inventory.bitmaps.find(WEB).has_unsaved


@pytest.mark.logs("daily of web.raw|web.raw is inconsistent")
@pytest.mark.parametrize("end", ["clean end", "kill", "host crash"])
def test_source_that_was_changed_behind_our_back(host, end):
    change(host, add("daily"), add("off", recording=False))
    write(host, 1)
    if end == "clean end":
        host.close()
    else:
        host.crash()
    if end == "host crash":
        host.reboot()
    # Another file, as a restore from a backup makes it.
    host.sources[WEB].unlink()
    host.add(WEB, clusters("z" * 16))
    host.open()

    assert reason(host, "daily") == "the source was changed while it was not mounted"
    # What does not record has not missed anything.
    assert dirty(host, "off") == set()
    change(host, Clear(WEB, "daily"))
    write(host, 2)
    assert dirty(host, "daily") == {2}


@pytest.mark.logs("bitmap daily of web.raw")
@pytest.mark.parametrize("end", ["clean end", "kill", "host crash"])
def test_disk_with_another_size(host, end):
    change(host, add("daily"))
    if end == "clean end":
        host.close()
    else:
        host.crash()
    if end == "host crash":
        host.reboot()
    with host.sources[WEB].open("ab") as file:
        file.write(clusters("b"))
    host.open()

    assert reason(host, "daily")
    change(host, Remove(WEB, "daily"))
    change(host, add("daily"))
    write(host, 16)
    assert dirty(host, "daily") == {16}


# -- containers as they are found


@pytest.mark.parametrize("follow_up", [Clear, Fill, Remove])
@pytest.mark.logs("was in use when its file was left")
def test_bitmap_that_another_program_left_in_use_does_not_block_its_name(
    host, follow_up
):
    change(host, add("daily"))
    write(host, 1)
    host.close()
    mark_in_use(container(host), "daily")
    host.open()

    assert reason(host, "daily") == "was in use when its file was left"
    change(host, follow_up(WEB, "daily"))
    if follow_up is Remove:
        change(host, add("daily"))
    write(host, 2)
    assert dirty(host, "daily") == (set(range(16)) if follow_up is Fill else {2})
    host.close()
    assert stored(host) == {"daily": {"auto"}}
    host.open()
    assert 2 in dirty(host, "daily")


def mark_in_use(path, name):
    opened = OpenContainer.open(path, SIZE, create=False)
    opened.mark_in_use([name])
    opened.close()


@pytest.mark.logs("another program has changed its file")
def test_container_that_was_changed_without_its_bitmaps(host):
    change(host, add("daily"))
    host.close()
    clear_autoclear(container(host))
    host.open()

    text = "another program has changed its file without the bitmaps"
    assert reason(host, "daily") == text
    change(host, Clear(WEB, "daily"))
    write(host, 2)
    host.close()
    host.open()
    assert dirty(host, "daily") == {2}


def clear_autoclear(path):
    with path.open("r+b") as file:
        file.seek(88)
        file.write(bytes(8))


def damage(path):
    with path.open("r+b") as file:
        file.write(b"no qcow2")


@pytest.mark.logs("bitmap daily of web.raw")
@each_end
@pytest.mark.parametrize("what", [damage, os.unlink])
def test_container_that_can_not_be_read(host, end, what):
    change(host, add("daily"))
    write(host, 1)
    if end == "clean end":
        host.close()
    else:
        host.crash()
    if end == "host crash":
        host.reboot()
    what(container(host))
    host.open()

    assert "bitmaps.qcow2: " in reason(host, "daily")
    aside = container(host).with_name("bitmaps.qcow2.unusable")
    is_aside = what is damage
    assert aside.exists() == is_aside
    assert ("it is bitmaps.qcow2.unusable now" in reason(host, "daily")) == is_aside
    change(host, Clear(WEB, "daily"))
    write(host, 2)
    host.close()
    host.open()
    assert dirty(host, "daily") == {2}


@pytest.mark.logs("bitmap .* of .*: Input/output error")
def test_bits_that_can_not_be_read(host, monkeypatch):
    change(host, add("daily"), add("db", DB))
    write(host, 1)
    host.close()
    with monkeypatch.context() as patch:
        bits = failing(OpenContainer.bits, 2, EIO, after=False)
        patch.setattr(OpenContainer, "bits", bits)
        host.open(names=[DB, WEB])

    reasons = described(host, "daily")["reason"], described(host, "db", DB)["reason"]
    assert sorted(map(str, reasons)) == ["Input/output error", "None"]


@pytest.mark.logs("bitmap daily of web.raw: Input/output error")
def test_bitmap_that_could_not_be_read_does_not_come_back_when_it_is_removed(
    host, monkeypatch
):
    change(host, add("daily"))
    write(host, 1)
    host.close()
    opening = failing(OpenContainer.open, 1, EIO, after=False)
    with monkeypatch.context() as patch:
        patch.setattr(OpenContainer, "open", opening)
        host.open()
    assert reason(host, "daily") == "Input/output error"
    # As long as nobody can tell what is there, it stays.
    with monkeypatch.context() as patch:
        opening = failing(OpenContainer.open, 1, EIO, after=False)
        patch.setattr(OpenContainer, "open", opening)
        with pytest.raises(OSError, match="Input/output error"):
            change(host, Remove(WEB, "daily"))
    assert reason(host, "daily") == "Input/output error"
    change(host, Remove(WEB, "daily"))
    write(host, 9)
    host.close()
    host.open()

    assert names(host) == set()
    change(host, add("daily"))


def test_container_that_another_program_has_open_is_told_before_anything_happens(host):
    change(host, add("daily"))
    write(host, 1)
    host.close()
    other = OpenContainer.open(container(host), SIZE, create=False)

    with pytest.raises(Busy, match="in use by another program"):
        host.open()

    other.close()
    host.inventory = None
    host.open()
    assert dirty(host, "daily") == {1}


def test_bitmap_that_qemu_has_made_is_loaded(host):
    change(host, add("daily"))
    host.close()
    path = container(host)
    qemu_img("bitmap", "--add", "-g", "4096", path, "theirs")
    qemu_img("bitmap", "--add", "-g", "65536", path, "off")
    qemu_img("bitmap", "--disable", path, "off")
    host.open()
    write(host, 3)

    assert dirty(host, "theirs") == {3}
    assert dirty(host, "off") == set()
    assert not described(host, "off")["recording"]
    host.close()
    qemu_img("bitmap", "--add", "-g", "4096", path, "sum")
    qemu_img("bitmap", "--merge", "theirs", path, "sum")
    assert dirty_extents(path, "sum") == [(3 * CLUSTER, CLUSTER)]


def test_foreign_entries_are_kept_and_their_names_taken(host, monkeypatch):
    change(host, add("daily"), add("theirs"))
    host.close()
    make_foreign(container(host), "theirs")
    before = entries(container(host))["theirs"]
    host.open()

    assert names(host) == {"daily"}
    with pytest.raises(OSError, match="exists: theirs"):
        change(host, add("theirs"))
    change(host, Clear(WEB, "daily"), add("other"))
    host.close()
    after = entries(container(host))
    assert after["theirs"] == before
    assert set(after) == {"daily", "other", "theirs"}


def entries(path):
    opened = OpenContainer.open(path, SIZE, create=False)
    try:
        return dict(opened.entries)
    finally:
        opened.close()


def make_foreign(path, name):
    """Give a bitmap a kind that nobody knows."""
    opened = OpenContainer.open(path, SIZE, create=False)
    contents = opened._usable().contents
    at = contents.header.directory.offset
    for each in contents.entries.values():
        if each.name == name:
            break
        at += each.length
    opened.close()
    with path.open("r+b") as file:
        file.seek(at + 16)
        file.write(b"\x07")
    assert isinstance(each, Entry)


@pytest.mark.logs("inconsistent: another one of that name is used")
def test_bitmap_that_is_hidden_by_one_elsewhere_is_not_believed(host, tmpfs_path):
    change(host, add("daily", container=tmpfs_path / "other.qcow2"), add("x"))
    host.close()
    qemu_img("bitmap", "--add", "-g", "4096", container(host), "daily")
    host.open()
    write(host, 1)

    assert dirty(host, "daily") == {1}
    host.close()
    assert "in-use" in stored(host)["daily"]
    host.open()
    assert dirty(host, "daily") == {1}


@pytest.mark.logs("mounted with --bitmaps no")
@pytest.mark.parametrize("end", ["close", "crash", "reboot"])
def test_bitmaps_that_are_not_loaded_are_not_believed_later(host, tmpfs_path, end):
    elsewhere = Add(
        WEB, "elsewhere", granularity=CLUSTER, container=tmpfs_path / "c.qcow2"
    )
    change(host, add("daily"), add("off", recording=False), add("gone"), elsewhere)
    change(host, Remove(WEB, "gone"), Set(WEB, "off", auto=False))
    write(host, 1)
    host.close()
    host.open(has_bitmaps=False)
    write(host, 2)

    assert names(host) == set()
    with pytest.raises(NameTaken, match="not loaded"):
        change(host, add("daily"))
    if end == "close":
        host.close()
    else:
        host.crash()
    if end == "reboot":
        host.reboot()
    elif end == "crash":
        # The next daemon of the same mount.
        host.open(has_bitmaps=False)
        assert names(host) == set()
        host.close()
    host.open()
    assert names(host) == {"daily", "off", "elsewhere"}
    lost = "the disk was mounted with --bitmaps no"
    assert reason(host, "daily") == reason(host, "elsewhere") == lost
    assert dirty(host, "off") == set()
    assert not held(host, "off").record.auto


@pytest.mark.logs("is not in .* any more")
def test_bitmap_that_somebody_has_removed_is_gone(host):
    change(host, add("daily"), add("other"))
    write(host, 1)
    host.close()
    qemu_img("bitmap", "--remove", container(host), "daily")
    host.open()

    assert names(host) == {"other"}
    assert record(host, "daily") is None
    change(host, add("daily"))


# -- logs as they are found


def damage_log(path):
    with path.open("r+b") as file:
        file.seek(600)
        file.seek(8192 + 100)
        file.write(b"x")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        pytest.param(os.unlink, "its activity log is missing", id="missing"),
        pytest.param(damage_log, "activity.log: sector 16 is damaged", id="damaged"),
    ],
)
@pytest.mark.logs("bitmap daily of web.raw")
def test_log_that_can_not_be_read_after_a_host_crash(host, what, text):
    change(host, add("daily"), add("off", recording=False))
    write(host, 1)
    host.crash()
    host.reboot()
    what(log_of(host))
    host.open()

    assert text in reason(host, "daily")
    assert dirty(host, "off") == set()
    change(host, Clear(WEB, "daily"))
    write(host, 9)
    come_back(host, "host crash")
    assert dirty(host, "daily") == {8, 9, 10, 11}


@pytest.mark.parametrize("what", [os.unlink, damage_log])
def test_log_that_can_not_be_read_after_a_kill_is_made_anew(host, what):
    change(host, add("daily"))
    write(host, 1)
    host.crash()
    what(log_of(host))
    host.open()
    assert dirty(host, "daily") == {1}
    write(host, 5)
    come_back(host, "host crash")

    assert dirty(host, "daily") == {1, 4, 5, 6, 7}


def test_numbers_of_areas_are_those_of_the_log(host):
    change(host, add("daily"))
    write(host, 5)

    log = host.inventory.bitmaps.find(WEB)._log
    assert log.areas is not None
    host.crash()
    with log_of(host).open("rb") as file:
        areas = bitarray(endian="little")
        areas.frombytes(file.read()[8192 + 32 :][:1])
    assert set(areas.search(1)) == {1}
    host.open()
