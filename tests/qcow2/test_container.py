"""Containers: what is kept, what is refused, what is written."""

import errno
import time

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import EXTRA_DATA_COMPATIBLE
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.qcow2.contents import read_contents
from fleecefs.units import GiB, KiB, MiB, TiB
from tests.qcow2.damage import (
    COUNT,
    DAILY,
    GRANULARITY,
    SIZE,
    WEEKLY,
    container_file,
    put,
    put_directory,
    put_header,
)
from tests.qcow2.files import MemoryFile, bits, check, is_there, stored

NEW = DAILY._replace(bits=bits(COUNT, 1, -1))


def written(file):
    return sum(len(event[1]) for event in file.history if event)


def test_a_new_container_has_no_bitmaps():
    file = MemoryFile()

    container = Container.create(file, SIZE)

    assert container.contents.entries == {}
    assert container.contents.size == SIZE
    assert read_contents(file) == container.contents
    assert check(file.content) == (0, 0)


@pytest.mark.parametrize("size", [0, 4 * 1024 * TiB])
def test_a_disk_that_has_no_bitmaps_has_no_container(size):
    file = MemoryFile()

    with pytest.raises(NotUsable, match=r"^c.qcow2: a disk of \d+ bytes"):
        Container.create(file, size)

    assert file.history == []


def test_a_container_is_made_of_an_empty_file_only():
    file = MemoryFile(b"precious")

    with pytest.raises(NotUsable, match="is not empty"):
        Container.create(file, SIZE)

    assert file.content == b"precious"


def test_bitmaps_are_added_replaced_and_removed_at_once():
    file = container_file(DAILY, WEEKLY)
    container = Container.open(file)

    container.update([NEW, DAILY._replace(name="new")], remove=["weekly"])

    assert stored(file) == {"daily": is_there(NEW), "new": is_there(DAILY)}
    assert read_contents(file) == container.contents
    assert check(file.content) == (0, 0)


def test_a_bitmap_gets_another_granularity():
    file = container_file(DAILY)
    fine = Bitmap("daily", 512, bits(SIZE // 512, 5, -1))

    Container.open(file).update([fine])

    assert stored(file) == {"daily": is_there(fine)}


def test_the_last_bitmap_takes_the_extension_with_it():
    file = container_file(DAILY)

    Container.open(file).update(remove=["daily"])

    header = read_contents(file).header
    assert (header.directory, header.autoclear, header.is_void) == (None, 0, False)
    assert check(file.content) == (0, 0)


def test_marks_are_in_the_file_and_keep_the_bits():
    file = container_file(DAILY, WEEKLY)
    container = Container.open(file)
    file.forget()

    container.mark_in_use(["weekly"])

    assert stored(file) == {
        "daily": is_there(DAILY),
        "weekly": is_there(WEEKLY._replace(is_in_use=True)),
    }
    assert container.contents == read_contents(file)
    assert [event and len(event[1]) for event in file.history] == [4, None]


def test_only_clusters_with_changes_are_written():
    disk = 64 * GiB
    daily = Bitmap("daily", 64 * KiB, bits(disk // (64 * KiB), slice(None)))
    file = container_file()
    file = MemoryFile()
    container = Container.create(file, disk, 4 * KiB)
    container.update([daily])
    before = container.contents.tables["daily"]
    file.forget()

    daily.bits[5] = daily.bits[100_000] = 0
    container.update([daily._replace(changed=[(5, 6), (100_000, 100_001)])])

    after = container.contents.tables["daily"]
    assert [i for i in range(32) if before[i] != after[i]] == [0, 3]
    assert container.bits("daily") == daily.bits
    # Two clusters of bits, table, directory, a sector, some counts.
    assert 4 * 4 * KiB < written(file) < 5 * 4 * KiB


def test_changes_may_be_flags_only():
    file = container_file(DAILY)
    container = Container.open(file)
    before = container.contents.entries["daily"].table_offset

    container.update([DAILY._replace(is_auto=False, changed=[])])

    assert stored(file)["daily"] == (GRANULARITY, False, False, DAILY.bits)
    assert container.contents.entries["daily"].table_offset == before


def test_zeroes_take_no_cluster():
    file = container_file(DAILY)
    container = Container.open(file)

    container.update([DAILY._replace(bits=bits(COUNT))])

    assert set(container.contents.tables["daily"]) == {0}
    assert stored(file)["daily"][3] == bits(COUNT)


def test_space_is_used_again():
    file = container_file(DAILY)
    container = Container.open(file)
    container.update([WEEKLY])
    container.update([WEEKLY])
    before = file.size()

    for _ in range(20):
        container.update([WEEKLY])

    assert file.size() == before


def test_a_file_grows_beyond_its_refcount_table():
    disk = 64 * MiB
    file = MemoryFile()
    container = Container.create(file, disk, 512)
    large = Bitmap("large", 512, bits(disk // 512, slice(None)))
    many = [large._replace(name=f"{number}") for number in range(600)]

    container.update(many)
    for turn in range(2):
        container.update(many[turn::2])
        container = Container.open(file)

    # With clusters of 512 bytes, one of the table has the counts of 8 MiB.
    assert container.contents.header.refcount_table_clusters > 1
    assert file.size() > 8 * MiB
    assert check(file.content) == (0, 0)
    assert container.bits("599") == large.bits


def test_what_we_do_not_know_stays_as_it_is():
    file = container_file(DAILY, WEEKLY)
    daily, weekly = read_contents(file).entries.values()
    put_directory(
        file, [daily._replace(kind=2), weekly._replace(extra_data=b"important")]
    )
    before = read_contents(file)

    container = Container.open(file)
    container.update([NEW._replace(name="new")])
    container.mark_in_use(["new"])
    container.update(remove=["new"])

    after = read_contents(file)
    assert after.entries == before.entries
    assert after.tables == before.tables
    for offset in [*after.tables["daily"], *after.tables["weekly"]]:
        assert file.content[offset : offset + 512] == file.before[offset : offset + 512]
    with pytest.raises(NotUsable, match="bitmap 'daily' is of a kind"):
        container.update([NEW])
    container.update(remove=["daily"])
    assert check(file.content) == (0, 0)


def test_extra_data_that_does_not_matter_is_kept():
    file = container_file(DAILY)
    (daily,) = read_contents(file).entries.values()
    flags = daily.flags | EXTRA_DATA_COMPATIBLE
    put_directory(file, [daily._replace(extra_data=b"kept", flags=flags)])

    container = Container.open(file)
    container.update([NEW])

    assert container.contents.entries["daily"].extra_data == b"kept"
    assert container.contents.entries["daily"].flags == flags
    assert container.bits("daily") == NEW.bits


def test_bitmaps_that_are_outdated_are_removed():
    file = container_file()
    put_header(file, "autoclear", 0)

    container = Container.open(file)

    assert container.was_void
    assert not read_contents(file).header.is_void
    assert check(file.content) == (0, 0)
    container.update([NEW])
    assert stored(file) == {"daily": is_there(NEW)}


def test_opening_clears_bits_of_others_in_autoclear():
    file = container_file(DAILY)
    put_header(file, "autoclear", 0b111)

    Container.open(file)

    assert read_contents(file).header.autoclear == 1


def test_damaged_counts_are_repaired():
    file = container_file()
    block = read_contents(file).blocks[0]
    file.content[block : block + 512] = bytes(range(256)) * 2

    Container.open(file)

    assert check(file.content) == (0, 0)


def test_counts_that_are_missing_are_left_to_qemu():
    file = container_file()
    put(file, 0, read_contents(file).header.refcount_table_offset, 8)
    before = bytes(file.content)

    with pytest.raises(NotUsable, match=r"^c.qcow2: has damaged counts: try `qemu-img"):
        Container.open(file)

    assert file.content == before


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("backing file offset", 512, "a backing file"),
        ("crypt method", 2, "encryption"),
        ("incompatible", 1, "features that only its owner can change"),
        ("incompatible", 4, "features that only its owner can change"),
        ("incompatible", 16, "features that only its owner can change"),
        ("end", 0x44415441, "header extensions that fleecefs does not know"),
    ],
)
def test_what_writing_could_damage_is_only_read(field, value, reason):
    file = container_file()
    put_header(file, field, value)
    before = bytes(file.content)

    assert list(read_contents(file).entries) == ["daily", "weekly"]
    with pytest.raises(NotUsable, match=f"^c.qcow2: has {reason}, so it can only be"):
        Container.open(file)

    assert file.content == before


def test_guest_data_is_left_alone():
    file = container_file()
    l1_offset = read_contents(file).header.l1_offset
    put(file, 1 << 63 | 512, l1_offset + 8, 8)
    before = bytes(file.content)

    with pytest.raises(NotUsable, match=r"^c.qcow2: has guest data, so it can only"):
        Container.open(file)

    assert file.content == before


@pytest.mark.parametrize(
    ("bitmaps", "reason"),
    [
        pytest.param([NEW._replace(name="")], "empty or too long", id="no name"),
        pytest.param([NEW._replace(name="x" * 1024)], "too long", id="long name"),
        pytest.param([NEW._replace(name="a\nb")], "can not be printed", id="newline"),
        pytest.param(
            [Bitmap("b", 256, bits(SIZE // 256))], "a granularity of", id="256 bytes"
        ),
        pytest.param([Bitmap("b", 4 * GiB, bits(1))], "granularity", id="4 GiB"),
        pytest.param(
            [NEW._replace(name=f"{i}") for i in range(1024)],
            "1025 bitmaps; fleecefs takes up to 1024",
            id="too many",
        ),
        pytest.param(
            [NEW._replace(name=f"{i:01020}") for i in range(1010)],
            "bytes of directory",
            id="long directory",
        ),
    ],
)
def test_bitmaps_beyond_the_limits_are_refused_before_anything_is_written(
    bitmaps, reason
):
    file = container_file(DAILY)
    container = Container.open(file)
    file.forget()

    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        container.update(bitmaps)

    assert file.history == []
    container.update([NEW])


def test_bits_beyond_the_limits_are_refused():
    disk = 33 * TiB
    container = Container.create(MemoryFile(), disk)
    large = bits(disk // (128 * KiB))

    with pytest.raises(NotUsable, match="'b' has more than 67108864 bytes of bits"):
        container.update([Bitmap("b", 64 * KiB, bits(disk // (64 * KiB)))])
    with pytest.raises(NotUsable, match="bytes of bits; fleecefs takes up to"):
        container.update([Bitmap(f"{i}", 128 * KiB, large) for i in range(8)])

    container.update([Bitmap(f"{i}", 128 * KiB, large) for i in range(7)])


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda c: c.update([NEW]), id="update"),
        pytest.param(lambda c: c.mark_in_use(["daily", "weekly"]), id="mark"),
    ],
)
def test_after_a_failure_the_file_is_opened_again(act):
    file = container_file()
    container = Container.open(file)
    file.forget()
    act(container)
    events = len(file.history)

    for kill_at in range(events):
        file = container_file()
        container = Container.open(file)
        file.forget()
        file.error = OSError(errno.ENOSPC, "no space left")
        file.kill_at = kill_at
        with pytest.raises(OSError, match="no space left"):
            act(container)
        file.kill_at = None
        with pytest.raises(NotUsable, match="failed; open it again"):
            container.update([WEEKLY])

        container = Container.open(file)

        assert check(file.content) == (0, 0)
        assert container.bits("daily") in (DAILY.bits, NEW.bits)
        assert container.bits("weekly") == WEEKLY.bits


class Slow(MemoryFile):
    """Writes 300 bytes at a time, and nothing beyond `room`."""

    room = 1 << 30

    def pwrite(self, data, offset):
        data = data[: min(300, max(0, self.room - offset))]
        return super().pwrite(data, offset) if data else 0


def test_short_writes_are_continued():
    file = Slow()

    Container.create(file, SIZE, 512).update([DAILY, WEEKLY])

    assert stored(file) == {"daily": is_there(DAILY), "weekly": is_there(WEEKLY)}


def test_a_write_of_nothing_means_there_is_no_space():
    file = Slow()
    container = Container.create(file, SIZE, 512)
    file.room = file.size() + 500

    with pytest.raises(OSError) as e:
        container.update([DAILY])

    assert e.value.errno == errno.ENOSPC
    assert Container.open(file).contents.entries == {}


def test_marks_take_no_space():
    file = Slow(container_file().content)
    file.room = file.size()

    Container.open(file).mark_in_use(["daily", "weekly"])

    assert all(entry[2] for entry in stored(file).values())


def test_a_large_disk_with_few_changes_is_stored_at_once():
    disk = 10 * TiB
    daily = Bitmap("daily", 64 * KiB, bits(disk // (64 * KiB), slice(None)))
    file = MemoryFile()
    container = Container.create(file, disk)
    container.update([daily])
    file.forget()
    places = range(0, len(daily.bits), len(daily.bits) // 10)
    for place in places:
        daily.bits[place] = 0

    start = time.perf_counter()
    container.update([daily._replace(changed=[(at, at + 1) for at in places])])
    seconds = time.perf_counter() - start

    assert container.bits("daily") == daily.bits
    assert written(file) < 1 * MiB
    assert seconds < 0.5
