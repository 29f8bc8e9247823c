"""The live disk: reading, writing, its end, its flushes."""

import errno

import pytest

from fleecefs.block import disk as disk_module
from fleecefs.block.disk import default_cluster_size, drained, freeze
from fleecefs.block.memory import MemoryImage
from fleecefs.errors import FlushFailed, NoSpace, Unsupported
from fleecefs.units import GiB, KiB, MiB, TiB
from tests.support.disks import (
    CLUSTER,
    clusters,
    letters,
    make_disk,
    make_epoch,
    preserved,
    snapshot_of,
    take_snapshot,
)
from tests.support.faulty import Faulty, Full

SIZE = 4 * CLUSTER + 300


@pytest.fixture
def memory():
    return MemoryImage(SIZE, clusters("abcde")[:SIZE])


@pytest.fixture
def source(memory):
    return Faulty(memory)


@pytest.fixture
def disk(source):
    return make_disk(source=source)


RANGES = [
    pytest.param(0, SIZE, id="all"),
    pytest.param(0, CLUSTER, id="aligned"),
    pytest.param(10, CLUSTER, id="unaligned"),
    pytest.param(CLUSTER - 1, 2, id="across two by a byte"),
    pytest.param(SIZE - 1, 1, id="last byte"),
    pytest.param(SIZE - 300, 300, id="last partial cluster"),
    pytest.param(5, 0, id="nothing"),
]


@pytest.mark.parametrize(
    ("size", "cluster_size"),
    [
        pytest.param(512, 4 * KiB, id="smallest"),
        pytest.param(256 * GiB, 4 * KiB, id="256 GiB"),
        pytest.param(256 * GiB + 512, 8 * KiB, id="a bit more"),
        pytest.param(1 * TiB, 16 * KiB, id="1 TiB"),
        pytest.param(64 * TiB, 1 * MiB, id="64 TiB"),
    ],
)
def test_clusters_grow_with_the_disk(size, cluster_size):
    assert default_cluster_size(size) == cluster_size


# -- reading and writing


@pytest.mark.parametrize("has_snapshot", [True, False])
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_what_is_written_is_read(disk, memory, offset, length, has_snapshot):
    before = bytes(memory.data)
    if has_snapshot:
        take_snapshot(disk)

    assert disk.write(b"x" * length, offset) == length

    assert disk.read(length, offset) == b"x" * length
    assert (
        bytes(memory.data)
        == before[:offset] + b"x" * length + before[offset + length :]
    )


@pytest.mark.parametrize("has_snapshot", [True, False])
@pytest.mark.parametrize("operation", ["zero", "discard"])
@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_what_is_zeroed_or_discarded_is_zeroes(
    disk, memory, operation, offset, length, has_snapshot
):
    before = bytes(memory.data)
    if has_snapshot:
        take_snapshot(disk)

    getattr(disk, operation)(length, offset)

    expected = before[:offset] + bytes(length) + before[offset + length :]
    assert bytes(memory.data) == expected


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        pytest.param(SIZE - 10, 100, 10, id="across the end"),
        pytest.param(SIZE, 1, 0, id="at the end"),
        pytest.param(SIZE + 100, 10, 0, id="past the end"),
    ],
)
def test_the_end_cuts_a_read(disk, offset, length, expected):
    assert disk.read(length, offset) == b"e" * expected


def test_a_write_across_the_end_is_short(disk, memory):
    snapshot = take_snapshot(disk)

    assert disk.write(b"x" * 100, SIZE - 10) == 10

    assert len(memory.data) == SIZE
    assert disk.read(11, SIZE - 11) == b"e" + b"x" * 10
    assert preserved(snapshot) == "00001"


@pytest.mark.parametrize("offset", [SIZE, SIZE + 1, SIZE + CLUSTER])
def test_a_write_past_the_end_is_refused(disk, memory, offset):
    with pytest.raises(NoSpace) as e:
        disk.write(b"x", offset)

    assert e.value.errno == errno.ENOSPC
    assert len(memory.data) == SIZE


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE - 1, 2), (SIZE, 1), (0, SIZE + 1)]
)
def test_zeroes_across_the_end_change_nothing(disk, memory, offset, length):
    before = bytes(memory.data)

    with pytest.raises(NoSpace):
        disk.zero(length, offset)

    assert bytes(memory.data) == before


@pytest.mark.parametrize(
    ("offset", "length", "zeroes"),
    [
        pytest.param(SIZE - 10, 100, 10, id="across the end"),
        pytest.param(SIZE, 1, 0, id="at the end"),
        pytest.param(SIZE + 100, 10, 0, id="past the end"),
        pytest.param(0, 1 << 62, SIZE, id="everything"),
    ],
)
def test_the_end_cuts_a_discard(disk, memory, offset, length, zeroes):
    before = bytes(memory.data)

    disk.discard(length, offset)

    assert bytes(memory.data) == before[: SIZE - zeroes] + bytes(zeroes)


def test_a_buffer_that_is_used_again_can_be_written(disk):
    buffer = bytearray(b"one")

    disk.write(memoryview(buffer), 0)
    buffer[:] = b"two"

    assert disk.read(3, 0) == b"one"


@pytest.mark.parametrize("operation", ["zero", "discard"])
def test_large_ranges_are_overwritten_in_pieces(disk, source, operation, monkeypatch):
    monkeypatch.setattr(disk_module, "_PIECE_SIZE", 2 * CLUSTER)
    snapshot = take_snapshot(disk)
    found = []
    call = getattr(source.image, operation)

    def recording(length, offset):
        found.append((length, offset, preserved(snapshot)))
        call(length, offset)

    setattr(source.image, operation, recording)
    getattr(disk, operation)(SIZE - CLUSTER, CLUSTER)

    assert found == [
        (CLUSTER, CLUSTER, "01000"),
        (2 * CLUSTER, 2 * CLUSTER, "01110"),
        (300, 4 * CLUSTER, "01111"),
    ]
    assert snapshot.read(SIZE, 0) == clusters("abcde")[:SIZE]


def test_reads_and_writes_are_counted(disk):
    disk.write(b"x", 0)
    disk.write(b"x", 0)
    disk.read(1, 0)

    assert (disk.reads, disk.writes) == (1, 2)


# -- errors of the source


FAILURES = [
    pytest.param("pwrite", lambda disk: disk.write(b"x", 0), id="write"),
    pytest.param("zero", lambda disk: disk.zero(CLUSTER, 0), id="zero"),
    pytest.param("discard", lambda disk: disk.discard(CLUSTER, 0), id="discard"),
    pytest.param("pread", lambda disk: disk.read(1, 0), id="read"),
]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(("operation", "request_"), FAILURES)
def test_an_error_of_the_source_is_the_guests(disk, source, operation, request_, code):
    source.arm(operation, code=code)

    with pytest.raises(OSError, match="injected") as e:
        request_(disk)

    assert e.value.errno == code
    assert not disk.requests.writes
    request_(disk)


def test_a_failed_write_costs_a_snapshot_nothing(disk, source):
    snapshot = take_snapshot(disk)
    source.arm("pwrite")

    with pytest.raises(OSError, match="injected"):
        disk.write(b"x", 0)

    disk.write(b"y", 0)
    assert snapshot.read(SIZE, 0) == clusters("abcde")[:SIZE]
    assert disk.history.copied == CLUSTER


def test_a_source_that_fills_up_makes_a_write_short():
    disk = make_disk(source=Full(MemoryImage(SIZE), 100))

    assert disk.write(b"x" * 150, 0) == 100

    with pytest.raises(OSError) as e:
        disk.write(b"x" * 50, 100)
    assert e.value.errno == errno.ENOSPC


def test_a_source_that_can_not_discard_says_so(disk, memory):
    def discard(length, offset):
        raise Unsupported("the storage below can not discard")

    memory.discard = discard

    with pytest.raises(Unsupported):
        disk.discard(CLUSTER, 0)

    assert disk.read(1, 0) == b"a"


# -- flushing


def test_what_was_written_before_a_flush_is_durable(disk, memory):
    disk.write(b"x", 0)
    assert memory.durable[:1] == b"\0"

    disk.flush()

    assert memory.durable == memory.data


def test_a_durable_write_is_durable_when_it_returns(disk, memory):
    disk.write(b"x", 0)
    disk.write(b"y", 1, durable=True)

    assert memory.durable == memory.data


@pytest.mark.logs("disk disk: a flush failed: injected into flush")
def test_a_failed_flush_is_for_ever(disk, source):
    source.arm("flush")
    with pytest.raises(OSError, match="injected"):
        disk.flush()

    with pytest.raises(FlushFailed, match="a flush failed: injected") as e:
        disk.flush()

    assert e.value.errno == errno.EIO
    assert disk.flush_error is not None
    assert source.fired == 1


@pytest.mark.logs("a flush failed")
def test_no_durable_write_succeeds_after_a_failed_flush(disk, source):
    source.arm("flush")
    with pytest.raises(OSError, match="injected"):
        disk.write(b"x", 0, durable=True)

    with pytest.raises(FlushFailed):
        disk.write(b"y", 1, durable=True)

    assert disk.write(b"z", 2) == 1
    assert not disk.requests.writes


# -- where data and holes are


def test_data_and_holes_are_found(memory, disk):
    disk.discard(2 * CLUSTER, CLUSTER)

    assert list(disk.map(0, SIZE)) == [
        (0, CLUSTER, "source"),
        (CLUSTER, 2 * CLUSTER, "none"),
        (3 * CLUSTER, CLUSTER + 300, "source"),
    ]
    assert disk.find_data(CLUSTER) == 3 * CLUSTER
    assert disk.find_hole(0) == CLUSTER
    assert disk.find_hole(3 * CLUSTER) == SIZE
    assert disk.allocated() == memory.allocated() == 3 * CLUSTER


def test_a_map_stays_in_its_range(disk):
    assert list(disk.map(10, 20)) == [(10, 10, "source")]
    assert list(disk.map(SIZE - 1, SIZE + 100)) == [(SIZE - 1, 1, "source")]
    assert list(disk.map(SIZE, SIZE + 100)) == []


def test_a_map_has_no_empty_parts_when_a_hole_is_made_meanwhile(disk, memory):
    find_hole = memory.find_hole

    def find_hole_later(offset):
        memory.find_hole = find_hole
        memory.discard(CLUSTER, 0)
        return find_hole(offset)

    memory.find_hole = find_hole_later

    assert list(disk.map(0, 2 * CLUSTER)) == [
        (0, CLUSTER, "none"),
        (CLUSTER, CLUSTER, "source"),
    ]


# -- all disks at one instant


def test_nothing_is_in_flight_while_disks_are_drained():
    disks = [make_disk(clusters("a")), make_disk(clusters("b"))]

    with drained(disks):
        assert all(disk.requests.is_drained for disk in disks)

    assert not any(disk.requests.is_drained for disk in disks)


def test_disks_are_drained_in_the_order_of_their_ids():
    disks = [make_disk(clusters("a")) for _ in range(5)]
    order = []
    for disk in disks:
        disk.requests.drained = (
            lambda deadline, disk=disk, drain=disk.requests.drained: (
                order.append(disk.id) or drain(deadline)
            )
        )

    with drained(disks):
        pass
    with drained(disks[::-1]):
        pass

    assert order == sorted(order[:5]) * 2


def test_freezing_begins_an_epoch_on_each_disk():
    disks = [make_disk(clusters("ab")), make_disk(clusters("cd"))]
    epochs = [make_epoch(disk) for disk in disks]

    freeze(disks, epochs)

    snapshots = [
        snapshot_of(disk, epoch) for disk, epoch in zip(disks, epochs, strict=True)
    ]
    for disk in disks:
        disk.write(clusters("XX"), 0)
    assert [letters(s.read(2 * CLUSTER, 0)) for s in snapshots] == ["ab", "cd"]


def test_a_disk_can_be_frozen_without_the_others():
    disks = [make_disk(clusters("ab")), make_disk(clusters("cd"))]

    take_snapshot(disks[0])

    assert disks[1].history.newest is None
