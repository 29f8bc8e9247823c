"""Reading a disk as it was: from the source, from stores, from both at once."""

import errno
from itertools import pairwise

import pytest

from fleecefs.block import snapshot as snapshot_module
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.errors import ReadOnly, SnapshotLost
from tests.support.disks import (
    CLUSTER,
    clusters,
    delete_snapshot,
    image_of,
    letters,
    make_disk,
    make_tier,
    preserved,
    take_snapshot,
)
from tests.support.faulty import Faulty
from tests.support.model import DiskModel

# Five clusters and a bit.
TAIL = 700
SIZE = 5 * CLUSTER + TAIL
DATA = bytes(range(1, 252)) * 90


@pytest.fixture
def source():
    return Faulty(MemoryImage(SIZE, DATA[:SIZE]))


@pytest.fixture
def disk(source):
    return make_disk(source=source)


@pytest.fixture
def snapshot(disk):
    tiers = [
        make_tier(disk, "ram", budget=Budget(CLUSTER, "ram")),
        make_tier(disk, "disk", image=Faulty(MemoryImage(SIZE))),
    ]
    return take_snapshot(disk, *tiers)


RANGES = [
    pytest.param(0, SIZE, id="all"),
    pytest.param(0, CLUSTER, id="aligned"),
    pytest.param(CLUSTER + 1, CLUSTER - 1, id="unaligned head"),
    pytest.param(CLUSTER, 100, id="unaligned tail"),
    pytest.param(CLUSTER + 10, 3 * CLUSTER, id="both"),
    pytest.param(2 * CLUSTER - 1, 2, id="across two by a byte"),
    pytest.param(3 * CLUSTER + 5, 1, id="one byte"),
    pytest.param(5 * CLUSTER, TAIL, id="last partial cluster"),
    pytest.param(SIZE - 1, 1, id="last byte"),
]

# What is overwritten before reading: the patterns of QEMU's fleecing tests.
OVERWRITES = [
    pytest.param([], id="nothing"),
    pytest.param([(0, SIZE)], id="everything"),
    pytest.param([(CLUSTER, CLUSTER)], id="full"),
    pytest.param([(CLUSTER, 100)], id="partial left"),
    pytest.param([(2 * CLUSTER - 100, 100)], id="partial right"),
    pytest.param([(2 * CLUSTER, 10), (CLUSTER, CLUSTER)], id="adjacent left"),
    pytest.param([(0, CLUSTER), (2 * CLUSTER, CLUSTER)], id="every other"),
    pytest.param([(SIZE - 1, 1)], id="last byte"),
    pytest.param([(4 * CLUSTER + 5, CLUSTER)], id="into the last partial cluster"),
]


# -- reading


@pytest.mark.parametrize("overwrites", OVERWRITES)
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_snapshot_is_what_the_disk_was(disk, snapshot, overwrites, offset, length):
    for start, count in overwrites:
        disk.write(b"\xff" * count, start)

    found = snapshot.read(length, offset)

    assert found == DATA[offset : offset + length]


@pytest.mark.parametrize("operation", ["zero", "discard"])
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_zeroing_and_discarding_are_writes(disk, snapshot, operation, offset, length):
    getattr(disk, operation)(length, offset)

    assert snapshot.read(SIZE, 0) == DATA[:SIZE]
    assert disk.read(length, offset) == bytes(length)


def test_every_snapshot_of_many_is_what_the_disk_was(disk):
    model = DiskModel(DATA[:SIZE])
    snapshots = {}
    for number in range(8):
        name = str(number)
        snapshots[name] = take_snapshot(disk)
        model.freeze(name)
        data = bytes([number]) * (number * 999 + 1)
        assert disk.write(data, number * 2111) == model.write(data, number * 2111)

    found = {name: snapshots[name].read(SIZE, 0) for name in snapshots}

    assert found == model.snapshots


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        pytest.param(SIZE - 10, 100, 10, id="across the end"),
        pytest.param(SIZE, 1, 0, id="at the end"),
        pytest.param(SIZE + CLUSTER, 10, 0, id="past the end"),
        pytest.param(100, 0, 0, id="nothing"),
    ],
)
@pytest.mark.parametrize("is_preserved", [True, False])
def test_the_end_cuts_a_read(disk, snapshot, offset, length, expected, is_preserved):
    if is_preserved:
        disk.write(b"x" * SIZE, 0)

    found = snapshot.read(length, offset)

    assert found == DATA[offset : offset + expected]
    assert len(found) == expected


def test_the_source_is_read_in_one_go(disk, snapshot, source):
    disk.write(b"x", 1 * CLUSTER)
    disk.write(b"x", 3 * CLUSTER)
    calls = []
    pread_into = source.image.pread_into
    source.image.pread_into = lambda part, offset: (
        calls.append((len(part), offset)) or pread_into(part, offset)
    )

    assert snapshot.read(SIZE, 0) == DATA[:SIZE]

    assert calls == [(SIZE, 0)]


def test_preserved_clusters_are_not_read_from_the_source(disk, snapshot, source):
    disk.write(b"x" * 2 * CLUSTER, 0)
    source.arm("pread")

    assert snapshot.read(2 * CLUSTER, 0) == DATA[: 2 * CLUSTER]

    assert source.fired == 0


@pytest.mark.parametrize("is_mixed", [True, False], ids=["mixed", "untouched"])
def test_an_error_of_the_source_is_the_readers(disk, snapshot, source, is_mixed):
    if is_mixed:
        disk.write(b"x", 0)
    source.arm("pread")

    with pytest.raises(OSError, match="injected") as e:
        snapshot.read(SIZE, 0)

    assert e.value.errno == errno.EIO
    assert not disk.requests.readers
    assert snapshot.read(SIZE, 0) == DATA[:SIZE]


def test_an_error_of_the_store_is_the_readers(disk, snapshot):
    disk.write(b"x" * 2 * CLUSTER, 0)
    image_of(snapshot, 1).arm("pread")

    with pytest.raises(OSError, match="injected"):
        snapshot.read(SIZE, 0)

    assert not disk.requests.readers
    assert snapshot.lost is None
    assert snapshot.read(SIZE, 0) == DATA[:SIZE]


# -- what it tells of itself


def test_a_snapshot_keeps_what_was_allocated_at_its_instant():
    disk = make_disk(clusters("a"))
    snapshot = take_snapshot(disk)

    disk.discard(CLUSTER, 0)

    assert snapshot.allocated() == CLUSTER
    assert disk.allocated() == 0
    assert snapshot.cluster_size == CLUSTER


@pytest.mark.parametrize("call", ["read", "map", "find_data", "find_hole", "discard"])
def test_nothing_can_be_done_with_a_lost_snapshot(disk, snapshot, call):
    delete_snapshot(disk, snapshot)
    calls = {
        "read": lambda: snapshot.read(1, 0),
        "map": lambda: next(snapshot.map(0, SIZE)),
        "find_data": lambda: snapshot.find_data(0),
        "find_hole": lambda: snapshot.find_hole(0),
        "discard": lambda: snapshot.discard(SIZE, 0),
    }

    with pytest.raises(SnapshotLost, match="deleted"):
        calls[call]()

    assert snapshot.lost == "deleted"


def test_a_snapshot_can_not_be_written(snapshot):
    with pytest.raises(ReadOnly) as e:
        snapshot.write(memoryview(b"x"), 0)

    assert e.value.errno == errno.EROFS


def test_there_is_nothing_to_flush(snapshot):
    snapshot.flush()


# -- where data and holes are


def mapped(image, offset=0, end=None):
    return [tuple(m) for m in image.map(offset, image.size if end is None else end)]


def test_an_untouched_snapshot_maps_like_its_source():
    source = MemoryImage(4 * CLUSTER)
    source.pwrite(clusters("a"), 0)
    source.pwrite(clusters("d"), 3 * CLUSTER)
    disk = make_disk(source=source)
    snapshot = take_snapshot(disk)

    assert mapped(snapshot) == [
        (0, CLUSTER, "source"),
        (CLUSTER, 2 * CLUSTER, "none"),
        (3 * CLUSTER, CLUSTER, "source"),
    ]


def test_a_map_tells_where_everything_is(disk, snapshot):
    # The first goes to RAM, which has room for one, the others to disk.
    disk.write(b"x", 2 * CLUSTER)
    disk.write(b"x" * (CLUSTER + 1), 3 * CLUSTER)

    assert mapped(snapshot) == [
        (0, 2 * CLUSTER, "source"),
        (2 * CLUSTER, CLUSTER, "ram"),
        (3 * CLUSTER, 2 * CLUSTER, "disk"),
        (5 * CLUSTER, TAIL, "source"),
    ]


def test_a_hole_is_preserved_as_one():
    disk = make_disk(source=MemoryImage(3 * CLUSTER))
    snapshot = take_snapshot(disk)

    disk.write(clusters("x"), CLUSTER)

    assert [m for m in mapped(snapshot) if m[2] != "none"] == []
    assert snapshot.find_data(0) == snapshot.size
    assert disk.find_data(0) == CLUSTER


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_map_of_a_part_stays_in_it(disk, snapshot, offset, length):
    disk.write(b"x", CLUSTER)
    disk.discard(CLUSTER, 3 * CLUSTER)

    found = mapped(snapshot, offset, offset + length)

    assert found[0][0] == offset
    assert sum(part[1] for part in found) == length
    assert all(a[0] + a[1] == b[0] for a, b in pairwise(found))


def test_a_map_ends_at_the_end(snapshot):
    assert mapped(snapshot, 0, SIZE + CLUSTER) == [(0, SIZE, "source")]
    assert mapped(snapshot, SIZE, SIZE + 1) == []


def test_a_search_looks_at_a_part_at_a_time(snapshot, monkeypatch):
    monkeypatch.setattr(snapshot_module, "_SEARCH_SIZE_MAX", CLUSTER)

    assert mapped(snapshot, 0, 2 * CLUSTER) == [
        (0, CLUSTER, "source"),
        (CLUSTER, CLUSTER, "source"),
    ]


def test_a_map_of_what_is_overwritten_here_and_there_asks_the_source_once(
    disk, snapshot, monkeypatch
):
    asked = []
    find_hole = disk.source.image.find_hole
    monkeypatch.setattr(
        disk.source.image,
        "find_hole",
        lambda offset: asked.append(offset) or find_hole(offset),
    )
    disk.write(clusters("X"), CLUSTER)
    disk.discard(CLUSTER, 3 * CLUSTER)

    found = [where for _, _, where in mapped(snapshot, 0, SIZE)]

    assert len(found) > 3
    assert "none" not in found
    assert found.count("source") > 1
    # And once behind the hole that there is now.
    assert asked == [0, 4 * CLUSTER]


def test_searches_find_data_and_holes():
    source = MemoryImage(6 * CLUSTER)
    source.pwrite(clusters("bc"), CLUSTER)
    disk = make_disk(source=source)
    snapshot = take_snapshot(disk)
    # Both the data and the hole are elsewhere now.
    disk.write(clusters("x....x"), 0)

    assert snapshot.find_data(0) == CLUSTER
    assert snapshot.find_data(CLUSTER + 7) == CLUSTER + 7
    assert snapshot.find_hole(CLUSTER + 7) == 3 * CLUSTER
    assert snapshot.find_data(3 * CLUSTER) == 6 * CLUSTER
    assert snapshot.find_hole(0) == 0
    assert snapshot.find_hole(6 * CLUSTER) == 6 * CLUSTER


# -- discarding parts of it


def readable(snapshot):
    """Return the clusters of a snapshot, `!` for those that are denied."""
    text = ""
    for offset in range(0, snapshot.size, CLUSTER):
        try:
            text += letters(snapshot.read(CLUSTER, offset))
        except SnapshotLost:
            text += "!"
    return text


@pytest.mark.parametrize(
    ("offset", "length", "left"),
    [
        pytest.param(0, CLUSTER, "!bcdef", id="aligned"),
        pytest.param(100, 2 * CLUSTER, "a!cdef", id="rounded inward"),
        pytest.param(100, CLUSTER, "abcdef", id="less than one"),
        pytest.param(CLUSTER, 0, "abcdef", id="nothing"),
        pytest.param(4 * CLUSTER, CLUSTER + TAIL, "abcd!!", id="to the end"),
        pytest.param(5 * CLUSTER, TAIL - 1, "abcdef", id="less than the last"),
        pytest.param(5 * CLUSTER - 1, 1 << 40, "abcde!", id="across the end"),
        pytest.param(SIZE + CLUSTER, 100, "abcdef", id="past the end"),
        pytest.param(0, SIZE, "!!!!!!", id="all"),
    ],
)
@pytest.mark.parametrize("is_preserved", [True, False], ids=["store", "source"])
def test_a_discarded_part_is_denied(offset, length, left, is_preserved):
    disk = make_disk(clusters("abcdef")[:SIZE])
    snapshot = take_snapshot(disk)
    if is_preserved:
        disk.write(b"x" * SIZE, 0)

    snapshot.discard(length, offset)

    assert readable(snapshot) == left
    disk.write(b"y" * SIZE, 0)
    assert readable(snapshot) == left


def test_what_is_discarded_is_neither_data_nor_hole():
    disk = make_disk(clusters("abcd"))
    snapshot = take_snapshot(disk)
    disk.write(clusters("x"), 2 * CLUSTER)
    snapshot.discard(2 * CLUSTER, CLUSTER)

    with pytest.raises(SnapshotLost, match="discarded"):
        list(snapshot.map(0, snapshot.size))

    assert next(snapshot.map(0, snapshot.size)) == (0, CLUSTER, "source")
    assert mapped(snapshot, 3 * CLUSTER) == [(3 * CLUSTER, CLUSTER, "source")]
    with pytest.raises(SnapshotLost):
        snapshot.find_hole(0)
    assert snapshot.find_data(0) == 0


def test_a_map_ends_where_a_discarded_part_begins():
    """Also where that is still on the source, since an older snapshot needs it."""
    disk = make_disk(clusters("abcd"))
    take_snapshot(disk)
    snapshot = take_snapshot(disk)
    snapshot.discard(CLUSTER, 2 * CLUSTER)

    with pytest.raises(SnapshotLost, match="discarded"):
        list(snapshot.map(0, snapshot.size))

    assert next(snapshot.map(0, snapshot.size)) == (0, 2 * CLUSTER, "source")
    assert snapshot.find_data(CLUSTER) == CLUSTER


def test_discarding_twice_is_once(disk, snapshot):
    snapshot.discard(2 * CLUSTER, 0)
    snapshot.discard(2 * CLUSTER, CLUSTER)

    assert preserved(snapshot) == "111000"


def test_a_range_that_touches_a_discarded_part_can_not_be_read(disk, snapshot):
    snapshot.discard(CLUSTER, CLUSTER)

    for offset, length in ((0, SIZE), (CLUSTER - 1, 2), (2 * CLUSTER - 1, 1)):
        with pytest.raises(SnapshotLost, match="discarded"):
            snapshot.read(length, offset)
    assert snapshot.read(CLUSTER, 0) == DATA[:CLUSTER]
    assert snapshot.lost is None
