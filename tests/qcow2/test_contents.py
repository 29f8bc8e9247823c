"""What is read of a file, and what is wrong with one that is refused."""

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import EXTRA_DATA_COMPATIBLE, IN_USE
from fleecefs.qcow2.contents import read_contents
from tests.qcow2.damage import (
    COUNT,
    DAILY,
    WEEKLY,
    container_file,
    put_directory,
    put_entry,
    put_header,
    put_table,
)
from tests.qcow2.files import MemoryFile, bits, is_there, stored


def read_all(file):
    contents = read_contents(file)
    return {name: contents.bits(file, name) for name in contents.entries}


def test_reading_returns_what_was_stored():
    file = container_file(DAILY, WEEKLY)

    assert stored(file) == {"daily": is_there(DAILY), "weekly": is_there(WEEKLY)}
    assert list(read_contents(file).entries) == ["daily", "weekly"]


def test_reading_writes_nothing():
    file = container_file()

    read_all(file)

    assert file.history == []


def test_bits_are_read_when_they_are_asked_for():
    file = container_file(WEEKLY)
    contents = read_contents(file)
    before = file.reads

    contents.bits(file, "weekly")

    assert file.reads - before == COUNT // 8


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("magic", 0, "is no qcow2 file"),
        ("version", 2, "qcow2 of version 2, not 3"),
        ("version", 4, "version 4"),
        ("cluster bits", 8, "clusters of"),
        ("cluster bits", 22, "clusters of"),
        ("cluster bits", 2**32 - 1, "clusters of"),
        ("size", 0, "disk size"),
        ("size", 1000, "disk size"),
        ("size", 2**63, "disk size"),
        ("L1 count", 2**22 + 1, "L1 table has"),
        ("L1 count", 4200, "refcount table at .* overlaps"),
        ("L1 offset", 100, "L1 table at 100 does not begin with a cluster"),
        ("L1 offset", 0, "L1 table at 0 overlaps"),
        ("L1 offset", 2**63, "L1 table at 9223372036854775808 is not within"),
        ("refcount table clusters", 2**14 + 1, "refcount table has"),
        ("refcount table clusters", 2**14, "not within the file"),
        ("refcount table offset", 2**40, "not within the file"),
        ("refcount table offset", 0, "overlaps"),
        ("snapshot count", 2**16 + 1, "65537 snapshots"),
        ("snapshot count", 1, "snapshot table at 0 overlaps"),
        ("incompatible", 2, "marked as corrupt"),
        ("incompatible", 32, "features that fleecefs does not know"),
        ("refcount order", 7, "reference counts of"),
        ("header length", 96, "header has a length of 96"),
        ("header length", 108, "header has a length of 108"),
        ("header length", 520, "header has a length of 520"),
        ("extension length", 25, "bitmaps extension has 25 bytes"),
        ("extension length", 401, "longer than its place"),
        ("extension type", 0x12345678, "should have one bitmaps extension"),
        ("bitmap count", 0, "has 0 bitmaps"),
        ("bitmap count", 1, "not as long as its entries"),
        ("bitmap count", 3, "not as long as its entries"),
        ("bitmap count", 1025, "up to 1024"),
        ("reserved", 1, "of a kind"),
        ("directory length", 2**20 + 1, "bitmap directory has 1048577 bytes"),
        ("directory length", 2**20, "not within the file"),
        ("directory length", 56, "not as long as its entries"),
        ("directory offset", 2**62, "not within the file"),
        ("end", 0x23852875, "should have one"),
    ],
)
def test_a_header_is_refused(field, value, reason):
    file = container_file()

    put_header(file, field, value)

    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        read_contents(file)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("table offset", 512, "bitmap table at 512 overlaps"),
        ("table offset", 520, "does not begin with a cluster"),
        ("table offset", 2**63, "not within the file"),
        ("table count", 0, "bitmap 'daily' has no table"),
        ("table count", 2, "bitmap 'daily' has a table of 2 entries, not 1"),
        ("flags", 8, "bitmap 'daily' has flags"),
        ("flags", 2**31, "bitmap 'daily' has flags"),
        ("granularity", 8, "bitmap 'daily' has a granularity of"),
        ("granularity", 32, "bitmap 'daily' has a granularity of"),
        ("name length", 0, "not as long as its entries"),
        ("name length", 400, "not as long as its entries"),
        ("extra length", 2**32 - 1, "not as long as its entries"),
        ("name", 0xFF, "not UTF-8"),
        ("name", 7, "can not be printed"),
    ],
)
def test_an_entry_is_refused(field, value, reason):
    file = container_file()

    put_entry(file, field, value)

    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        read_contents(file)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (2, "entry 0x2"),
        (512 + 1, "entry 0x201"),
        (1 << 56, "entry 0x100"),
        (1 << 63, "entry 0x800"),
        (1 << 50, "cluster of bits at .* not within the file"),
        (512, "cluster of bits at 512 overlaps"),
    ],
)
def test_a_table_is_refused(value, reason):
    file = container_file()

    put_table(file, 0, value)

    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        read_contents(file)


def test_two_bitmaps_can_not_have_the_same_bits():
    file = container_file()
    tables = read_contents(file).tables

    put_table(file, 0, tables["weekly"][0])

    with pytest.raises(NotUsable, match="overlaps"):
        read_contents(file)


def test_two_bitmaps_can_not_have_the_same_name():
    file = container_file()
    daily, weekly = read_contents(file).entries.values()

    put_directory(file, [daily, weekly._replace(name="daily")])

    with pytest.raises(NotUsable, match="two bitmaps of the same name"):
        read_contents(file)


def test_a_file_that_is_cut_short_is_refused():
    file = container_file()
    whole = bytes(file.content)
    # What lies behind is free, and does not matter.
    end = read_contents(file).clusters(len(whole)).used.find(1, right=True) * 512

    for length in [*range(0, end, 256), end, end + 1]:
        cut = MemoryFile(whole[:length])
        with pytest.raises(NotUsable):
            read_contents(cut)


def test_a_cluster_of_ones_is_read():
    file = container_file(DAILY)

    put_table(file, 0, 1)

    assert read_all(file) == {"daily": bits(COUNT, slice(None))}


def test_ones_end_with_the_disk():
    file = container_file()

    put_header(file, "size", 15 * 1024 * 1024 + 512)
    put_table(file, 0, 1)

    contents = read_contents(file)
    assert contents.bits(file, "daily") == bits(15 * 256 + 1, slice(None))


def test_bits_beyond_the_disk_are_refused():
    file = container_file()

    put_header(file, "size", 15 * 1024 * 1024)

    contents = read_contents(file)
    assert contents.bits(file, "daily").any()
    with pytest.raises(
        NotUsable, match=r"^c.qcow2: bitmap 'weekly' has .* beyond the end of the disk"
    ):
        contents.bits(file, "weekly")


def test_bitmaps_that_another_program_has_outdated_are_not_there():
    file = container_file()

    put_header(file, "autoclear", 0)

    contents = read_contents(file)
    assert contents.header.is_void
    assert contents.entries == {}


def test_bitmaps_that_are_outdated_may_be_damaged():
    file = container_file()
    put_header(file, "autoclear", 0)

    put_header(file, "bitmap count", 2**32 - 1)

    assert read_contents(file).header.is_void


def test_what_we_do_not_know_is_listed_and_not_used():
    file = container_file()
    daily, weekly = read_contents(file).entries.values()
    odd = daily._replace(kind=77, granularity_bits=5)
    more = weekly._replace(extra_data=b"important")

    put_directory(file, [odd, more])

    contents = read_contents(file)
    assert list(contents.entries.values()) == [odd, more]
    for name in "daily", "weekly":
        assert contents.entries[name].is_foreign
        with pytest.raises(NotUsable, match=f"bitmap '{name}' is of a kind"):
            contents.bits(file, name)


def test_extra_data_that_does_not_matter_does_no_harm():
    file = container_file()
    daily, weekly = read_contents(file).entries.values()
    flags = daily.flags | EXTRA_DATA_COMPATIBLE

    put_directory(file, [daily._replace(extra_data=b"x", flags=flags), weekly])

    assert read_all(file) == {"daily": DAILY.bits, "weekly": WEEKLY.bits}


def test_one_in_use_may_be_of_another_disk_size():
    file = container_file()
    daily, weekly = read_contents(file).entries.values()
    put_directory(file, [daily._replace(flags=IN_USE), weekly._replace(flags=IN_USE)])

    put_header(file, "size", 1024 * 1024 * 1024)

    contents = read_contents(file)
    assert [each.is_in_use for each in contents.entries.values()] == [True, True]
    with pytest.raises(NotUsable, match="another disk size"):
        contents.bits(file, "daily")
