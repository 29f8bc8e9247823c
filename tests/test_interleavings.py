"""Requests that meet, in every order that matters: forced with gates, never slept for.

A letter is a cluster: a disk "abcd" has four. `Gate.hold` makes an operation of an
image stay away; `wait_waiting` returns when a thread waits for somebody else's request.
"""

import errno
import threading
import time

import pytest

from fleecefs.block import requests as requests_module
from fleecefs.block.disk import freeze
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.errors import Abandoned, Busy, FlushFailed, SnapshotLost, TimedOut
from tests.support.disks import (
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    CLUSTER,
    clusters,
    delete_snapshot,
    image_of,
    letters,
    make_disk,
    make_epoch,
    make_tier,
    preserved,
    snapshot_of,
    take_snapshot,
)
from tests.support.faulty import Faulty
from tests.support.gate import PATIENCE, Gate
from tests.support.running import Running

SIZE = 4 * CLUSTER

# A time at which every copy that is under way is over its limit.
LATER = 1000.0


class Scene:
    """A disk "abcd" with gates in front of its source and of its snapshot's store."""

    def __init__(self, *, on_cbw_error=BREAK_SNAPSHOT, timeout=10.0):
        self.broken = []
        self.memory = MemoryImage(SIZE, clusters("abcd"))
        self.source = Gate(self.memory)
        self.disk = make_disk(
            source=self.source,
            timeout=timeout,
            broke=lambda epoch, reason: self.broken.append(epoch),
        )
        self.store_memory = MemoryImage(SIZE)
        self.store_faults = Faulty(self.store_memory)
        self.store = Gate(self.store_faults)
        self.budget = Budget(None, "disk")
        tier = make_tier(self.disk, image=self.store, budget=self.budget)
        self.snapshot = take_snapshot(self.disk, tier, on_cbw_error=on_cbw_error)

    def write(self, text, cluster=0):
        """Start writing clusters in a thread."""
        return Running(self.disk.write, clusters(text), cluster * CLUSTER)

    def read(self, snapshot=None, cluster=0, count=1):
        """Start reading clusters of a snapshot in a thread."""
        snapshot = snapshot or self.snapshot
        return Running(snapshot.read, count * CLUSTER, cluster * CLUSTER)

    def wait_waiting(self, running):
        self.disk.requests.wait_waiting(running)

    @property
    def on_source(self):
        return letters(self.memory.data)

    def expire(self):
        return self.disk.history.expire(time.monotonic() + LATER)

    def assert_nothing_is_left(self):
        requests = self.disk.requests
        assert not requests.writes
        assert not requests.copies
        assert not requests.readers
        assert not requests.is_drained


@pytest.fixture
def scene():
    return Scene()


@pytest.fixture(
    params=[BREAK_SNAPSHOT, BREAK_GUEST_WRITE], ids=lambda policy: policy.value
)
def either(request):
    return Scene(on_cbw_error=request.param)


def content(snapshot):
    return letters(snapshot.read(SIZE, 0))


# -- a writer and a snapshot reader of the same cluster


def test_a_write_waits_for_a_reader_that_came_first(scene):
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    writer = scene.write("X")

    scene.wait_waiting(writer)
    assert scene.on_source == "abcd"
    read.release()
    assert letters(reader.result()) == "a"
    assert writer.result() == CLUSTER
    assert scene.on_source == "Xbcd"
    assert content(scene.snapshot) == "abcd"
    scene.assert_nothing_is_left()


def test_a_reader_that_comes_second_reads_the_store(scene):
    overwrite = scene.source.hold("pwrite")
    writer = scene.write("X")
    overwrite.wait_arrived()
    read = scene.source.hold("pread")

    found = scene.read().result()

    assert letters(found) == "a"
    assert not read.has_arrived
    overwrite.release()
    assert writer.result() == CLUSTER
    read.release()
    assert content(scene.snapshot) == "abcd"


def test_a_reader_that_comes_during_the_copy_holds_the_write(scene):
    copy = scene.store.hold("pwrite")
    writer = scene.write("X")
    copy.wait_arrived()
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    copy.release()

    scene.wait_waiting(writer)
    assert scene.on_source == "abcd"
    read.release()
    assert letters(reader.result()) == "a"
    assert writer.result() == CLUSTER


def test_a_reader_of_a_mixed_range_holds_writes_of_its_source_part(scene):
    scene.disk.write(clusters("X"), 0)
    read = scene.source.hold("pread")
    reader = scene.read(count=4)
    read.wait_arrived()

    writer = scene.write("Y", 2)

    scene.wait_waiting(writer)
    read.release()
    assert letters(reader.result()) == "abcd"
    assert writer.result() == CLUSTER


def test_a_reader_of_a_mixed_range_does_not_hold_writes_of_its_preserved_part(scene):
    scene.disk.write(clusters("X"), 1 * CLUSTER)
    read = scene.source.hold("pread")
    reader = scene.read(count=4)
    read.wait_arrived()

    scene.write("Y", 1).result()

    assert scene.on_source == "aYcd"
    read.release()
    assert letters(reader.result()) == "abcd"


def test_a_write_does_not_wait_for_a_reader_of_other_clusters(scene):
    read = scene.source.hold("pread")
    reader = scene.read(cluster=0, count=2)
    read.wait_arrived()

    scene.write("X", 2).result()

    read.release()
    assert letters(reader.result()) == "ab"


def test_a_second_write_waits_for_the_reader_that_the_first_one_waits_for(scene):
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()
    first = scene.write("X")
    scene.wait_waiting(first)

    second = scene.write("Y")

    scene.wait_waiting(second)
    assert scene.on_source == "abcd"
    read.release()
    assert letters(reader.result()) == "a"
    first.result()
    second.result()
    assert content(scene.snapshot) == "abcd"


@pytest.mark.parametrize("operation", ["find_data", "find_hole"])
def test_a_search_for_holes_in_a_snapshot_does_not_hold_writes(scene, operation):
    search = scene.source.hold(operation)
    searcher = Running(scene.snapshot.find_hole, 0)
    search.wait_arrived()

    scene.disk.discard(CLUSTER, 0)

    assert scene.on_source == ".bcd"
    search.release()
    assert searcher.result() == SIZE


def test_a_search_for_data_in_a_snapshot_does_not_see_what_is_written_meanwhile(scene):
    scene.disk.discard(SIZE, 0)
    snapshot = take_snapshot(scene.disk)
    search = scene.source.hold("find_data")
    searcher = Running(snapshot.find_data, 0)
    search.wait_arrived()

    scene.write("X", 2).result()

    assert scene.on_source == "..X."
    search.release()
    assert searcher.result() == SIZE


def test_a_reader_of_a_deleted_snapshot_does_not_hold_writes(scene):
    second = take_snapshot(scene.disk)
    read = scene.source.hold("pread")
    reader = scene.read(second)
    read.wait_arrived()
    writer = scene.write("X")
    scene.wait_waiting(writer)

    delete_snapshot(scene.disk, second)

    writer.result()
    read.release()
    assert isinstance(reader.error(), SnapshotLost)
    assert content(scene.snapshot) == "abcd"


# -- two writers in one cluster


def test_a_second_writer_waits_for_the_copy_of_the_first_and_copies_nothing(scene):
    copy = scene.store.hold("pwrite")
    first = Running(scene.disk.write, b"1" * 100, 0)
    copy.wait_arrived()

    second = Running(scene.disk.write, b"2" * 100, 100)

    scene.wait_waiting(second)
    assert scene.on_source == "abcd"
    copy.release()
    assert first.result() == second.result() == 100
    assert scene.disk.history.copied == CLUSTER
    assert bytes(scene.memory.data[:201]) == b"1" * 100 + b"2" * 100 + b"a"
    assert content(scene.snapshot) == "abcd"
    scene.assert_nothing_is_left()


def test_a_second_writer_copies_only_what_the_first_did_not(scene):
    copy = scene.store.hold("pwrite")
    first = scene.write("XX", 0)
    copy.wait_arrived()

    second = scene.write("YY", 1)

    scene.wait_waiting(second)
    copy.release()
    first.result()
    second.result()
    assert scene.disk.history.copied == 3 * CLUSTER
    assert content(scene.snapshot) == "abcd"


def test_writers_of_different_clusters_copy_at_the_same_time(scene):
    copy = scene.store.hold("pwrite")
    first = scene.write("X", 0)
    copy.wait_arrived()

    scene.write("Y", 1).result()

    assert scene.on_source == "aYcd"
    copy.release()
    first.result()
    assert content(scene.snapshot) == "abcd"


def test_a_write_of_a_preserved_cluster_waits_for_no_copy_around_it(scene):
    scene.disk.write(clusters("X"), 1 * CLUSTER)
    copy = scene.store.hold("pwrite")
    first = scene.write("YYY", 0)
    copy.wait_arrived()

    scene.write("Z", 1).result()

    copy.release()
    first.result()
    assert content(scene.snapshot) == "abcd"


# -- a snapshot is created while writes are in flight


def test_a_new_snapshot_waits_for_a_write_in_flight_and_contains_it(scene):
    overwrite = scene.source.hold("pwrite")
    writer = scene.write("X")
    overwrite.wait_arrived()

    creation = Running(take_snapshot, scene.disk)

    scene.wait_waiting(creation)
    overwrite.release()
    writer.result()
    assert content(creation.result()) == "Xbcd"
    assert content(scene.snapshot) == "abcd"


def test_a_new_snapshot_waits_for_a_write_in_its_copy_for_an_older_one(scene):
    copy = scene.store.hold("pwrite")
    writer = scene.write("X")
    copy.wait_arrived()

    creation = Running(take_snapshot, scene.disk)

    scene.wait_waiting(creation)
    copy.release()
    writer.result()
    newer = creation.result()
    assert content(newer) == "Xbcd"
    assert content(scene.snapshot) == "abcd"
    assert preserved(scene.snapshot) == "1000"
    assert preserved(newer) == "0000"


def test_a_write_that_comes_while_a_snapshot_is_created_is_not_in_it(scene):
    overwrite = scene.source.hold("pwrite")
    first = scene.write("X", 0)
    overwrite.wait_arrived()
    creation = Running(take_snapshot, scene.disk)
    scene.wait_waiting(creation)

    second = scene.write("Y", 1)

    scene.wait_waiting(second)
    overwrite.release()
    first.result()
    second.result()
    assert content(creation.result()) == "Xbcd"
    assert scene.on_source == "XYcd"


def test_a_discard_that_comes_while_a_snapshot_is_created_is_not_in_it(scene):
    overwrite = scene.source.hold("pwrite")
    first = scene.write("X", 0)
    overwrite.wait_arrived()
    creation = Running(take_snapshot, scene.disk)
    scene.wait_waiting(creation)

    second = Running(scene.disk.discard, CLUSTER, CLUSTER)

    scene.wait_waiting(second)
    overwrite.release()
    first.result()
    second.result()
    assert content(creation.result()) == "Xbcd"


def test_a_snapshot_of_two_disks_holds_both_until_both_stand_still(scene):
    first, last = sorted([scene, Scene()], key=lambda scene: scene.disk.id)
    overwrite = last.source.hold("pwrite")
    in_flight = last.write("X")
    overwrite.wait_arrived()
    disks = [scene.disk for scene in (last, first)]
    epochs = [make_epoch(disk) for disk in disks]
    creation = Running(freeze, disks, epochs)
    last.wait_waiting(creation)

    to_first, to_last = first.write("Y"), last.write("Y", 1)

    first.wait_waiting(to_first)
    last.wait_waiting(to_last)
    overwrite.release()
    creation.result()
    for writer in (in_flight, to_first, to_last):
        writer.result()
    assert content(snapshot_of(last.disk, epochs[0])) == "Xbcd"
    assert content(snapshot_of(first.disk, epochs[1])) == "abcd"


@pytest.mark.parametrize(
    "late", [pytest.param(0, id="first"), pytest.param(1, id="last")]
)
def test_a_snapshot_of_two_disks_waits_for_a_write_to_either(scene, late):
    scenes = sorted([scene, Scene()], key=lambda scene: scene.disk.id)
    overwrite = scenes[late].source.hold("pwrite")
    in_flight = scenes[late].write("X")
    overwrite.wait_arrived()
    epochs = [make_epoch(scene.disk) for scene in scenes]

    creation = Running(freeze, [scene.disk for scene in scenes], epochs)

    scenes[late].wait_waiting(creation)
    assert not any(scene.disk.history.newest in epochs for scene in scenes)
    overwrite.release()
    in_flight.result()
    creation.result()
    assert content(snapshot_of(scenes[late].disk, epochs[late])) == "Xbcd"


def test_a_drain_gives_up_and_releases_the_guest(scene, monkeypatch):
    monkeypatch.setattr(requests_module, "DRAIN_SECONDS_MAX", 0.05)
    overwrite = scene.source.hold("pwrite")
    hung = scene.write("X")
    overwrite.wait_arrived()

    with pytest.raises(Busy, match="1 writes did not end"):
        take_snapshot(scene.disk)

    scene.write("Y", 1).result()
    assert scene.disk.history.newest is scene.snapshot.epoch
    overwrite.release()
    hung.result()
    scene.assert_nothing_is_left()


def test_a_drain_of_two_disks_that_gives_up_releases_both(scene, monkeypatch):
    monkeypatch.setattr(requests_module, "DRAIN_SECONDS_MAX", 0.05)
    first, last = sorted([scene, Scene()], key=lambda scene: scene.disk.id)
    overwrite = last.source.hold("pwrite")
    hung = last.write("X")
    overwrite.wait_arrived()
    disks = [first.disk, last.disk]

    # The error is kept, and with it the frames that it passed.
    with pytest.raises(Busy) as e:
        freeze(disks, [make_epoch(disk) for disk in disks])

    assert e.value.errno == errno.EBUSY
    first.write("Y", 1).result()
    last.write("Y", 1).result()
    assert first.disk.history.newest is first.snapshot.epoch
    overwrite.release()
    hung.result()
    first.assert_nothing_is_left()
    last.assert_nothing_is_left()


# -- the copy fails


def test_a_failed_copy_with_a_second_writer_waiting_fails_both_or_breaks(either):
    copy = either.store.hold("pwrite")
    either.store_faults.arm("pwrite", count=2)
    first = either.write("X")
    copy.wait_arrived()
    second = either.write("Y")
    either.wait_waiting(second)

    copy.release()

    outcomes = [first.error(), second.error()]
    if either.snapshot.epoch.on_cbw_error is BREAK_GUEST_WRITE:
        assert [e.errno for e in outcomes] == [errno.EIO, errno.EIO]
        assert either.on_source == "abcd"
        assert content(either.snapshot) == "abcd"
        assert not either.broken
    else:
        assert outcomes == [None, None]
        assert either.on_source[0] in "XY"
        assert either.snapshot.lost is not None
        assert either.broken == [either.snapshot.epoch]
    either.assert_nothing_is_left()


def test_a_second_writer_may_succeed_where_the_first_one_failed():
    scene = Scene(on_cbw_error=BREAK_GUEST_WRITE)
    copy = scene.store.hold("pwrite")
    scene.store_faults.arm("pwrite", code=errno.ENOSPC)
    first = scene.write("X")
    copy.wait_arrived()
    second = scene.write("Y")
    scene.wait_waiting(second)

    copy.release()

    assert first.error().errno == errno.ENOSPC
    assert second.result() == CLUSTER
    assert scene.on_source == "Ybcd"
    assert content(scene.snapshot) == "abcd"


def test_a_second_writer_never_gives_a_broken_snapshot_new_data(scene):
    copy = scene.store.hold("pwrite")
    scene.store_faults.arm("pwrite")
    first = scene.write("X")
    copy.wait_arrived()
    second = scene.write("Y")
    scene.wait_waiting(second)

    copy.release()

    first.result()
    second.result()
    # Either the second copy came in time, or the snapshot is lost.
    if scene.snapshot.lost is None:
        assert content(scene.snapshot) == "abcd"


def test_a_reader_on_the_source_gets_no_data_of_a_snapshot_that_breaks(scene):
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()
    scene.store_faults.arm("pwrite")

    # It does not wait for the reader either.
    scene.write("X").result()

    assert scene.on_source == "Xbcd"
    assert scene.snapshot.lost == "could not preserve: injected into pwrite"
    read.release()
    assert isinstance(reader.error(), SnapshotLost)
    scene.assert_nothing_is_left()


def test_a_snapshot_is_lost_before_the_source_is_overwritten(scene):
    scene.store_faults.arm("pwrite")
    overwrite = scene.source.hold("pwrite")

    writer = scene.write("X")

    overwrite.wait_arrived()
    assert scene.snapshot.lost is not None
    assert scene.broken == [scene.snapshot.epoch]
    overwrite.release()
    writer.result()


def test_a_reader_in_the_store_gets_no_data_of_a_snapshot_that_breaks(scene):
    scene.write("X").result()
    read = scene.store.hold("pread")
    reader = scene.read()
    read.wait_arrived()
    scene.store_faults.arm("pwrite")

    scene.write("Y", 1).result()

    read.release()
    assert isinstance(reader.error(), SnapshotLost)


def test_a_search_in_a_snapshot_that_breaks_finds_nothing(scene):
    search = scene.source.hold("find_data")
    searcher = Running(scene.snapshot.find_hole, 0)
    search.wait_arrived()
    scene.store_faults.arm("pwrite")
    Running(scene.disk.discard, CLUSTER, 0).result()

    search.release()

    assert isinstance(searcher.error(), SnapshotLost)


def test_a_reader_keeps_its_snapshot_when_another_ones_copy_fails(scene):
    """The reader's range spans a cluster that its own snapshot has preserved."""
    scene.write("X", 1).result()
    newer = take_snapshot(
        scene.disk, make_tier(scene.disk, image=Faulty(MemoryImage(SIZE), on="pwrite"))
    )
    read = scene.source.hold("pread")
    reader = scene.read(count=4)
    read.wait_arrived()

    scene.write("Y", 1).result()

    assert newer.lost is not None
    assert scene.snapshot.lost is None
    read.release()
    assert letters(reader.result()) == "abcd"


# -- a snapshot is deleted under its reader, or under a copy


def test_a_reader_on_the_source_gets_no_data_of_a_snapshot_deleted_meanwhile(scene):
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    delete_snapshot(scene.disk, scene.snapshot)

    scene.write("X").result()
    read.release()
    assert isinstance(reader.error(), SnapshotLost)
    scene.assert_nothing_is_left()


def test_a_reader_in_the_store_gets_no_data_of_a_snapshot_deleted_meanwhile(scene):
    scene.write("X").result()
    read = scene.store.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    delete_snapshot(scene.disk, scene.snapshot)

    assert scene.budget.used == 0
    read.release()
    assert isinstance(reader.error(), SnapshotLost)


def test_a_reader_of_an_older_snapshot_keeps_the_data_of_a_deleted_newer_one(scene):
    gate = Gate(MemoryImage(SIZE))
    newer = take_snapshot(scene.disk, make_tier(scene.disk, image=gate))
    scene.write("X").result()
    read = gate.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    delete_snapshot(scene.disk, newer)

    scene.write("Y").result()
    read.release()
    assert letters(reader.result()) == "a"
    assert content(scene.snapshot) == "abcd"


def test_the_only_snapshot_is_deleted_under_a_copy(scene):
    copy = scene.store.hold("pwrite")
    writer = scene.write("X")
    copy.wait_arrived()

    delete_snapshot(scene.disk, scene.snapshot)

    copy.release()
    assert writer.result() == CLUSTER
    assert scene.on_source == "Xbcd"
    assert scene.budget.used == 0


def test_the_only_snapshot_is_deleted_under_a_copy_that_fails(either):
    copy = either.store.hold("pwrite")
    either.store_faults.arm("pwrite")
    writer = either.write("X")
    copy.wait_arrived()

    delete_snapshot(either.disk, either.snapshot)

    copy.release()
    assert writer.result() == CLUSTER
    assert not either.broken
    assert either.budget.used == 0


def test_the_newest_snapshot_is_deleted_under_a_copy_that_an_older_one_needs(scene):
    gate, budget = Gate(MemoryImage(SIZE)), Budget(None, "disk")
    newest = take_snapshot(scene.disk, make_tier(scene.disk, image=gate, budget=budget))
    copy = gate.hold("pwrite")
    writer = scene.write("X")
    copy.wait_arrived()

    delete_snapshot(scene.disk, newest)

    copy.release()
    writer.result()
    assert content(scene.snapshot) == "abcd"
    delete_snapshot(scene.disk, scene.snapshot)
    assert budget.used == 0


def test_the_newest_snapshot_is_deleted_under_a_copy_that_nobody_else_needs(scene):
    scene.write("X").result()
    gate, budget = Gate(MemoryImage(SIZE)), Budget(None, "disk")
    newest = take_snapshot(scene.disk, make_tier(scene.disk, image=gate, budget=budget))
    copy = gate.hold("pwrite")
    writer = scene.write("YY")
    copy.wait_arrived()

    delete_snapshot(scene.disk, newest)

    copy.release()
    writer.result()
    assert content(scene.snapshot) == "abcd"
    delete_snapshot(scene.disk, scene.snapshot)
    assert budget.used == 0


def test_the_newest_snapshot_is_deleted_under_a_copy_that_fails(either):
    newest = take_snapshot(
        either.disk,
        make_tier(either.disk, image=Gate(Faulty(MemoryImage(SIZE), on="pwrite"))),
    )
    copy = image_of(newest).hold("pwrite")
    writer = either.write("X")
    copy.wait_arrived()

    delete_snapshot(either.disk, newest)

    copy.release()
    if either.snapshot.epoch.on_cbw_error is BREAK_GUEST_WRITE:
        assert writer.error().errno == errno.EIO
        assert content(either.snapshot) == "abcd"
    else:
        writer.result()
        assert either.snapshot.lost is not None


def test_a_new_snapshot_after_all_were_deleted_under_a_copy_is_exact(scene):
    copy = scene.store.hold("pwrite")
    writer = scene.write("X")
    copy.wait_arrived()
    delete_snapshot(scene.disk, scene.snapshot)
    creation = Running(take_snapshot, scene.disk)
    scene.wait_waiting(creation)

    copy.release()

    writer.result()
    newer = creation.result()
    assert preserved(newer) == "0000"
    scene.write("Y").result()
    assert content(newer) == "Xbcd"


# -- a snapshot's part is discarded under its reader, or under a copy


def test_a_reader_in_the_store_gets_no_zeroes_for_what_is_discarded_meanwhile(scene):
    scene.write("X").result()
    read = scene.store.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    scene.snapshot.discard(CLUSTER, 0)

    read.release()
    assert isinstance(reader.error(), SnapshotLost)


def test_a_map_does_not_call_a_hole_what_is_discarded_meanwhile(scene):
    scene.write("X").result()
    tier = scene.snapshot.epoch.store.tiers[0]
    locate = scene.snapshot.epoch.store.locate

    def locate_later(*args):
        scene.snapshot.discard(CLUSTER, 0)
        return locate(*args)

    scene.snapshot.epoch.store.locate = locate_later

    with pytest.raises(SnapshotLost):
        next(scene.snapshot.map(0, CLUSTER))
    assert not tier.bits.any()


def test_a_reader_on_the_source_gets_nothing_of_what_is_discarded_meanwhile(scene):
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    scene.snapshot.discard(CLUSTER, 0)

    read.release()
    assert isinstance(reader.error(), SnapshotLost)


def test_two_discards_of_one_part_give_its_space_back_once(scene):
    scene.write("X").result()
    punch = scene.store.hold("discard")
    first = Running(scene.snapshot.discard, CLUSTER, 0)
    punch.wait_arrived()

    scene.snapshot.discard(CLUSTER, 0)

    punch.release()
    first.result()
    assert scene.budget.used == 0


# -- cbw-timeout: the storage hangs


def assert_outcome(scene, running, outcome):
    """What expire says of the only copy there is, by the policy."""
    assert list(outcome) == [running.ident]
    if scene.snapshot.epoch.on_cbw_error is BREAK_GUEST_WRITE:
        assert isinstance(outcome[running.ident], TimedOut)
        assert scene.snapshot.lost is None
        assert not scene.broken
    else:
        assert outcome[running.ident] is None
        assert "cbw-timeout, 10 s" in scene.snapshot.lost
        assert scene.broken == [scene.snapshot.epoch]


def test_a_copy_that_is_not_late_does_not_expire(either):
    copy = either.store.hold("pwrite")
    writer = either.write("X")
    copy.wait_arrived()

    assert either.disk.history.expire(time.monotonic()) == {}

    copy.release()
    assert writer.result() == CLUSTER
    assert content(either.snapshot) == "abcd"


def test_a_copy_that_hangs_in_the_store_expires_and_changes_nothing(either):
    copy = either.store.hold("pwrite")
    late = either.write("X")
    copy.wait_arrived()

    outcome = either.expire()

    assert_outcome(either, late, outcome)
    either.assert_nothing_is_left()
    before = preserved(either.snapshot)
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert either.on_source == "abcd"
    assert preserved(either.snapshot) == before
    assert either.snapshot.lost is not None or before == "0000"
    either.assert_nothing_is_left()
    delete_snapshot(either.disk, either.snapshot)
    assert either.budget.used == 0


def test_a_copy_that_hangs_reading_the_source_expires_and_changes_nothing(either):
    copy = either.source.hold("pread")
    late = either.write("X")
    copy.wait_arrived()

    outcome = either.expire()

    assert_outcome(either, late, outcome)
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert either.on_source == "abcd"
    assert either.budget.used == 0


def test_a_copy_that_hangs_and_then_fails_expires_all_the_same(either):
    copy = either.store.hold("pwrite")
    either.store_faults.arm("pwrite")
    late = either.write("X")
    copy.wait_arrived()

    outcome = either.expire()

    assert_outcome(either, late, outcome)
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert either.on_source == "abcd"


@pytest.mark.parametrize("where", ["source", "store"])
@pytest.mark.parametrize("is_before", [True, False], ids=["retry first", "late first"])
def test_a_retry_of_an_expired_write_works(either, where, is_before):
    held = (
        either.source.hold("pread")
        if where == "source"
        else either.store.hold("pwrite")
    )
    late = either.write("X")
    held.wait_arrived()
    either.expire()

    if is_before:
        retry = either.write("X")
        retry.result()
    held.release()
    assert isinstance(late.error(), Abandoned)
    if not is_before:
        retry = either.write("X")

    assert retry.result() == CLUSTER
    assert either.on_source == "Xbcd"
    if either.snapshot.lost is None:
        assert content(either.snapshot) == "abcd"
    delete_snapshot(either.disk, either.snapshot)
    assert either.budget.used == 0


def test_a_late_copy_does_not_go_on_with_the_next_run():
    scene = Scene(on_cbw_error=BREAK_GUEST_WRITE)
    scene.disk.history._copy_clusters_max = 1
    copy = scene.store.hold("pwrite")
    late = scene.write("XY")
    copy.wait_arrived()
    scene.expire()
    scene.write("ZZ").result()

    copy.release()

    assert isinstance(late.error(), Abandoned)
    assert scene.on_source == "ZZcd"
    assert content(scene.snapshot) == "abcd"


def test_a_write_that_waits_for_a_copy_goes_on_when_that_expires(either):
    copy = either.store.hold("pwrite")
    late = either.write("X")
    copy.wait_arrived()
    second = either.write("Y")
    either.wait_waiting(second)

    either.expire()

    assert second.result() == CLUSTER
    assert either.on_source == "Ybcd"
    copy.release()
    assert isinstance(late.error(), Abandoned)
    if either.snapshot.lost is None:
        assert content(either.snapshot) == "abcd"


def test_a_late_copy_does_not_reach_a_snapshot_created_meanwhile(either):
    copy = either.source.hold("pread")
    late = either.write("X")
    copy.wait_arrived()
    either.expire()
    newer = take_snapshot(either.disk)

    either.write("Y").result()
    copy.release()

    assert isinstance(late.error(), Abandoned)
    assert content(newer) == "abcd"
    assert either.on_source == "Ybcd"
    if either.snapshot.lost is None:
        assert content(either.snapshot) == "abcd"


def test_expiry_breaks_only_the_snapshots_that_need_the_cluster(scene):
    scene.write("X").result()
    gate = Gate(MemoryImage(SIZE))
    newer = take_snapshot(scene.disk, make_tier(scene.disk, image=gate))
    copy = gate.hold("pwrite")
    late = scene.write("Y")
    copy.wait_arrived()

    outcome = scene.expire()

    assert outcome == {late.ident: None}
    assert newer.lost is not None
    assert content(scene.snapshot) == "abcd"
    scene.write("Z").result()
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert content(scene.snapshot) == "abcd"


def test_a_discard_expires_like_a_write(either):
    copy = either.store.hold("pwrite")
    late = Running(either.disk.discard, CLUSTER, 0)
    copy.wait_arrived()

    outcome = either.expire()

    assert_outcome(either, late, outcome)
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert either.on_source == "abcd"


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE])
def test_a_reader_that_hangs_holds_a_write_no_longer_than_the_timeout(policy):
    scene = Scene(on_cbw_error=policy, timeout=0.05)
    read = scene.source.hold("pread")
    reader = scene.read()
    read.wait_arrived()

    writer = scene.write("X")

    if policy is BREAK_GUEST_WRITE:
        assert isinstance(writer.error(), TimedOut)
        assert scene.on_source == "abcd"
        read.release()
        assert letters(reader.result()) == "a"
        assert content(scene.snapshot) == "abcd"
    else:
        assert writer.result() == CLUSTER
        assert scene.on_source == "Xbcd"
        assert scene.snapshot.lost is not None
        read.release()
        assert isinstance(reader.error(), SnapshotLost)
    scene.assert_nothing_is_left()


@pytest.mark.parametrize("policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE])
def test_a_copy_that_hangs_holds_another_write_no_longer_than_the_timeout(policy):
    scene = Scene(on_cbw_error=policy, timeout=0.05)
    copy = scene.store.hold("pwrite")
    first = scene.write("X")
    copy.wait_arrived()

    second = scene.write("Y")

    if policy is BREAK_GUEST_WRITE:
        assert isinstance(second.error(), TimedOut)
        assert scene.on_source == "abcd"
    else:
        assert second.result() == CLUSTER
        assert scene.on_source == "Ybcd"
        assert scene.snapshot.lost is not None
    copy.release()
    # Nobody expired the first one: it is late, but it is the guest's write.
    assert first.result() == CLUSTER
    assert scene.on_source == "Xbcd"
    if scene.snapshot.lost is None:
        assert content(scene.snapshot) == "abcd"


# -- it takes a while until it is durable that a snapshot is lost


class Confirmations:
    """What confirms that a snapshot is lost, in any thread, when it is told to."""

    def __init__(self, snapshot):
        self._arrivals = threading.Semaphore(0)
        self._released = threading.Event()
        snapshot.epoch.confirm_lost = self._confirm

    def _confirm(self):
        self._arrivals.release()
        assert self._released.wait(PATIENCE)

    def wait_arrived(self):
        assert self._arrivals.acquire(timeout=PATIENCE)

    def release(self):
        self._released.set()


def test_no_write_goes_on_before_it_is_confirmed_that_its_snapshot_is_lost(scene):
    confirmations = Confirmations(scene.snapshot)
    scene.store_faults.arm("pwrite", count=100)
    first = scene.write("X")
    confirmations.wait_arrived()

    second = scene.write("Y")

    confirmations.wait_arrived()
    assert isinstance(scene.read().error(), SnapshotLost)
    assert scene.on_source == "abcd"
    confirmations.release()
    first.result()
    second.result()
    assert scene.broken == [scene.snapshot.epoch]


def test_the_end_of_an_older_snapshot_does_not_let_writes_go_on_earlier(scene):
    scene.write("XX").result()
    store = Faulty(MemoryImage(SIZE), on="pwrite", count=100)
    broken = take_snapshot(scene.disk, make_tier(scene.disk, image=store))
    confirmations = Confirmations(broken)
    first = scene.write("Y")
    confirmations.wait_arrived()

    delete_snapshot(scene.disk, scene.snapshot)

    others = [scene.write("Z"), scene.write("Z", 1)]
    for _ in others:
        confirmations.wait_arrived()
    assert scene.on_source == "XXcd"
    confirmations.release()
    for writer in (first, *others):
        writer.result()
    assert not scene.disk.history.epochs
    assert scene.disk.history.newest is None


def test_a_newer_snapshot_goes_while_an_older_one_is_confirmed_to_be_lost(scene):
    confirmations = Confirmations(scene.snapshot)
    newer = take_snapshot(scene.disk, make_tier(scene.disk, budget=scene.budget))
    newer.discard(CLUSTER, 0)
    image_of(newer).pwrite = Faulty(MemoryImage(SIZE), on="pwrite").pwrite
    first = scene.write("X")
    confirmations.wait_arrived()

    delete_snapshot(scene.disk, newer)

    assert scene.disk.history.newest is not None
    confirmations.release()
    first.result()
    assert not scene.disk.history.epochs
    scene.disk.history.collect()
    assert scene.budget.used == 0


def test_a_snapshot_created_before_an_expiry_is_confirmed_is_exact(scene):
    confirmations = Confirmations(scene.snapshot)
    copy = scene.store.hold("pwrite")
    late = scene.write("X")
    copy.wait_arrived()
    expiry = Running(scene.expire)
    confirmations.wait_arrived()

    newer = take_snapshot(scene.disk)

    confirmations.release()
    assert expiry.result() == {late.ident: None}
    assert scene.snapshot.lost is not None
    scene.write("Y").result()
    assert content(newer) == "abcd"
    copy.release()
    assert isinstance(late.error(), Abandoned)
    assert content(newer) == "abcd"


# -- flushes


@pytest.mark.logs("a flush failed")
def test_a_flush_that_ends_after_another_one_failed_fails_too(scene):
    """The kernel tells only one of them that pages were lost."""
    flush = scene.source.hold("flush", after=True)
    second = Running(scene.disk.flush)
    flush.wait_arrived()
    scene.source.image = Faulty(scene.memory, on="flush")
    with pytest.raises(OSError):
        scene.disk.flush()

    flush.release()

    assert isinstance(second.error(), FlushFailed)
