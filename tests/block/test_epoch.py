"""What writes preserve, for whom, and what is left when snapshots go.

A letter is a cluster: a disk "abcd" has four. See test_interleavings.py for requests
that meet.
"""

import errno
from itertools import combinations

import pytest
from bitarray import bitarray

from fleecefs.block.epoch import Epoch, History
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget, Store
from fleecefs.errors import NoSpace, SnapshotLost
from tests.support.disks import (
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    CLUSTER,
    clusters,
    delete_snapshot,
    image_of,
    letters,
    make_bits,
    make_disk,
    make_epoch,
    make_tier,
    preserved,
    take_snapshot,
)
from tests.support.faulty import Faulty

SIZE = 4 * CLUSTER

policies = pytest.mark.parametrize(
    "policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE], ids=lambda policy: policy.value
)


class Story:
    """A disk "abcd", and snapshots of it that share a store of one budget."""

    def __init__(self, text="abcd", **options):
        self.broken = []
        self.memory = MemoryImage(len(text) * CLUSTER, clusters(text))
        self.source = Faulty(self.memory)
        self.disk = make_disk(
            source=self.source,
            broke=lambda epoch, reason: self.broken.append((epoch, reason)),
            **options,
        )
        self.budget = Budget(None, "disk")

    def take(self, *, on_cbw_error=BREAK_SNAPSHOT):
        image = Faulty(MemoryImage(self.disk.size))
        tier = make_tier(self.disk, image=image, budget=self.budget)
        return take_snapshot(self.disk, tier, on_cbw_error=on_cbw_error)

    def write(self, text, cluster=0):
        self.disk.write(clusters(text), cluster * CLUSTER)

    def delete(self, snapshot):
        delete_snapshot(self.disk, snapshot)

    @property
    def kept(self):
        """How many clusters all stores hold together."""
        return self.budget.used // CLUSTER

    @property
    def on_source(self):
        return letters(self.memory.data)


@pytest.fixture
def story():
    return Story()


def content(snapshot):
    return letters(snapshot.read(snapshot.size, 0))


def break_store(snapshot, count=1, code=errno.EIO):
    """Let the next writes to a snapshot's own store fail."""
    image_of(snapshot).arm("pwrite", count=count, code=code)


# -- what a write preserves


def test_nothing_is_preserved_without_a_snapshot(story):
    story.write("XXXX")

    assert story.disk.history.copied == 0
    assert story.disk.history.newest is None


def test_a_cluster_is_preserved_once(story):
    snapshot = story.take()

    story.write("X")
    story.write("Y")

    assert story.disk.history.copied == CLUSTER
    assert content(snapshot) == "abcd"
    assert story.on_source == "Ybcd"


def test_the_cost_of_a_write_does_not_grow_with_the_number_of_snapshots(story):
    snapshots = [story.take() for _ in range(20)]

    story.write("X")

    assert story.disk.history.copied == CLUSTER
    assert story.kept == 1
    assert {content(snapshot) for snapshot in snapshots} == {"abcd"}


def test_each_snapshot_keeps_its_own_past(story):
    snapshots = []
    for text in "123":
        snapshots.append(story.take())
        story.write(text)

    assert [content(snapshot) for snapshot in snapshots] == ["abcd", "1bcd", "2bcd"]
    assert story.kept == 3


@pytest.mark.parametrize(
    ("offset", "length", "bits"),
    [
        pytest.param(0, CLUSTER, "1000", id="aligned"),
        pytest.param(CLUSTER + 100, 200, "0100", id="inside one"),
        pytest.param(100, CLUSTER - 100, "1000", id="unaligned head"),
        pytest.param(CLUSTER, 1, "0100", id="unaligned tail"),
        pytest.param(2 * CLUSTER - 1, 2, "0110", id="across two by a byte"),
        pytest.param(1, SIZE - 2, "1111", id="both"),
        pytest.param(SIZE - 1, 1, "0001", id="last byte"),
        pytest.param(0, SIZE, "1111", id="all"),
    ],
)
def test_whole_clusters_are_preserved(story, offset, length, bits):
    snapshot = story.take()

    story.disk.write(b"x" * length, offset)

    assert preserved(snapshot) == bits
    assert content(snapshot) == "abcd"


@pytest.mark.parametrize("offset", [0, 1, CLUSTER, SIZE - 1, SIZE])
def test_writing_nothing_preserves_nothing(story, offset):
    snapshot = story.take()

    assert story.disk.write(b"", offset) == 0

    assert preserved(snapshot) == "0000"
    assert story.disk.history.copied == 0


def test_neighbours_are_copied_in_one_run(story):
    snapshot = story.take()
    calls = []
    pread = story.memory.pread
    story.memory.pread = lambda *args: calls.append(args) or pread(*args)

    story.write("WXYZ")

    assert calls == [(SIZE, 0)]
    assert content(snapshot) == "abcd"


def test_a_run_is_copied_in_pieces_of_a_limited_size(story):
    snapshot = story.take()
    story.disk.history._copy_clusters_max = 3
    calls = []
    pread = story.memory.pread
    story.memory.pread = lambda *args: calls.append(args) or pread(*args)

    story.write("WXYZ")

    assert calls == [(3 * CLUSTER, 0), (CLUSTER, 3 * CLUSTER)]
    assert content(snapshot) == "abcd"


def test_what_is_preserved_already_is_left_out():
    story = Story("abcdefgh")
    snapshot = story.take()
    story.write("X", 2)
    story.write("X", 5)

    story.write("YYYYYYYY")

    assert story.disk.history.copied == 8 * CLUSTER
    assert content(snapshot) == "abcdefgh"
    assert story.kept == 8


def test_the_last_partial_cluster_is_preserved():
    disk = make_disk(clusters("ab") + b"c" * 700)
    snapshot = take_snapshot(disk)

    disk.write(b"X", disk.size - 1)

    assert preserved(snapshot) == "001"
    assert snapshot.read(CLUSTER, 2 * CLUSTER) == b"c" * 700


def test_zeroes_are_preserved_without_being_kept():
    story = Story("a..d")
    snapshot = story.take()

    story.write("WXYZ")

    assert story.kept == 2
    assert content(snapshot) == "a..d"


def test_old_data_is_in_the_store_before_its_bit_is_set_and_overwritten_after(story):
    snapshot = story.take()
    steps = []
    put, pwrite = snapshot.epoch.store.put, story.memory.pwrite

    def recording_put(*args):
        steps.append(("copy", preserved(snapshot), story.on_source))
        put(*args)

    def recording_pwrite(*args):
        steps.append(("overwrite", preserved(snapshot), story.on_source))
        return pwrite(*args)

    snapshot.epoch.store.put = recording_put
    story.memory.pwrite = recording_pwrite
    story.write("X")

    assert steps == [("copy", "0000", "abcd"), ("overwrite", "1000", "abcd")]


def test_a_copy_is_committed_when_it_is_stored_and_before_it_is_marked(story):
    snapshot = story.take()
    story.write("X", 1)
    found = []
    snapshot.epoch.commit = lambda first, stop: found.append(
        (first, stop, story.kept, preserved(snapshot), story.on_source)
    )

    story.write("YYY")

    assert found == [(0, 3, 3, "0100", "aXcd")]


# -- when that fails


FAILURES = [
    pytest.param("source", errno.EIO, id="source EIO"),
    pytest.param("store", errno.EIO, id="store EIO"),
    pytest.param("store", errno.ENOSPC, id="store ENOSPC"),
]


def fail(story, snapshot, where, code):
    if where == "source":
        story.source.arm("pread", code=code)
    else:
        break_store(snapshot, code=code)


@pytest.mark.parametrize(("where", "code"), FAILURES)
def test_a_failed_copy_fails_the_write_and_keeps_the_snapshot(story, where, code):
    snapshot = story.take(on_cbw_error=BREAK_GUEST_WRITE)
    fail(story, snapshot, where, code)

    with pytest.raises(OSError, match="injected") as e:
        story.write("X")

    assert e.value.errno == code
    assert story.on_source == "abcd"
    assert content(snapshot) == "abcd"
    assert not story.broken
    story.write("X")
    assert content(snapshot) == "abcd"


@pytest.mark.parametrize(("where", "code"), FAILURES)
def test_a_failed_copy_breaks_the_snapshot_and_the_write_goes_on(story, where, code):
    snapshot = story.take()
    fail(story, snapshot, where, code)

    story.write("X")

    assert story.on_source == "Xbcd"
    reason = "could not preserve: injected into " + (
        "pread" if where == "source" else "pwrite"
    )
    assert snapshot.lost == reason
    assert story.broken == [(snapshot.epoch, reason)]
    for _ in range(2):
        with pytest.raises(SnapshotLost, match="injected") as e:
            snapshot.read(CLUSTER, 3 * CLUSTER)
        assert e.value.errno == errno.EIO


@policies
def test_a_commit_that_fails_is_a_failed_copy(story, policy):
    snapshot = story.take(on_cbw_error=policy)

    def commit(first, stop):
        raise OSError(errno.EIO, "no sync")

    snapshot.epoch.commit = commit

    if policy is BREAK_GUEST_WRITE:
        with pytest.raises(OSError, match="no sync"):
            story.write("X")
        assert preserved(snapshot) == "0000"
        assert content(snapshot) == "abcd"
    else:
        story.write("X")
        assert snapshot.lost == "could not preserve: no sync"


def test_a_broken_snapshot_is_confirmed_lost_before_the_source_is_overwritten(story):
    snapshot = story.take()
    found = []
    snapshot.epoch.confirm_lost = lambda: found.append(
        (snapshot.lost, story.on_source, list(story.broken))
    )
    break_store(snapshot)

    story.write("X")

    assert found == [("could not preserve: injected into pwrite", "abcd", [])]


def test_a_broken_snapshot_costs_nothing_any_more(story):
    snapshot = story.take()
    story.write("XX", 2)
    break_store(snapshot)

    story.write("X")
    story.disk.history.collect()

    assert story.kept == 0
    assert story.disk.history.newest is None
    assert not story.disk.history.epochs


def test_a_full_store_breaks_the_snapshot(story):
    story.budget.limit = 2 * CLUSTER
    snapshot = story.take()
    story.write("WX")

    story.write("Y", 2)

    assert snapshot.lost == "could not preserve: the store has reached its limit"
    assert story.on_source == "WXYd"


def test_a_full_store_fails_the_write(story):
    story.budget.limit = 2 * CLUSTER
    snapshot = story.take(on_cbw_error=BREAK_GUEST_WRITE)
    story.write("WX")

    with pytest.raises(NoSpace):
        story.write("Y", 2)

    story.write("YZ")
    assert story.on_source == "YZcd"
    assert content(snapshot) == "abcd"


def test_what_a_failed_copy_brought_is_not_counted_again(story):
    snapshot = story.take(on_cbw_error=BREAK_GUEST_WRITE)
    story.disk.history._copy_clusters_max = 1
    image_of(snapshot).arm("pwrite", nth=3)
    with pytest.raises(OSError, match="injected"):
        story.write("WXYZ")

    story.write("WXYZ")

    assert story.kept == 4
    assert content(snapshot) == "abcd"
    story.delete(snapshot)
    assert story.kept == 0


def test_only_the_snapshots_that_need_the_cluster_break(story):
    older = story.take()
    story.write("X")
    newer = story.take()
    break_store(newer)

    story.write("Y")

    assert content(older) == "abcd"
    assert newer.lost is not None
    assert story.on_source == "Ybcd"


def test_all_snapshots_that_need_the_cluster_break(story):
    oldest = story.take()
    story.write("X")
    snapshots = [story.take() for _ in range(3)]
    break_store(snapshots[-1])

    story.write("Y")

    assert [epoch for epoch, _ in story.broken] == [s.epoch for s in snapshots[::-1]]
    assert content(oldest) == "abcd"
    story.delete(oldest)
    assert story.kept == 0


def test_one_snapshot_that_must_not_break_is_enough_to_fail_the_write(story):
    older = story.take(on_cbw_error=BREAK_GUEST_WRITE)
    newer = story.take()
    break_store(newer)

    with pytest.raises(OSError, match="injected"):
        story.write("X")

    assert content(older) == content(newer) == "abcd"


def test_a_snapshot_that_must_not_break_does_not_matter_if_it_has_the_cluster(story):
    older = story.take(on_cbw_error=BREAK_GUEST_WRITE)
    story.write("X")
    newer = story.take()
    break_store(newer)

    story.write("Y")

    assert content(older) == "abcd"
    assert newer.lost is not None


def test_a_store_that_fails_for_ever_does_not_hold_the_guest(story):
    """Several snapshots break at once, and one older has what they need."""
    oldest = story.take()
    story.write("X")
    story.take()
    newest = story.take()
    break_store(newest, count=3)

    story.write("Y")
    story.write("Z")

    assert story.on_source == "Zbcd"
    assert content(oldest) == "abcd"
    assert image_of(newest).fired == 1


def test_writes_of_other_clusters_are_preserved_after_a_break(story):
    oldest = story.take()
    story.write("X")
    newest = story.take()
    break_store(newest)
    story.write("Y")

    story.write("Z", 1)

    assert newest.lost is not None
    assert content(oldest) == "abcd"
    story.delete(oldest)
    assert story.kept == 0


def test_the_mark_is_remembered_before_it_is_seen(story):
    epoch = make_epoch(story.disk)
    lost = []
    epoch._remember = lambda reason: lost.append((reason, epoch.lost))

    epoch.lose("no space")

    assert lost == [("no space", None)]
    assert epoch.lost == "no space"


def test_who_is_told_of_a_break_may_look_at_the_disk(story):
    found = []
    story.disk.history.broke = lambda epoch, reason: found.append(
        (story.disk.requests.lock.locked(), story.on_source)
    )
    break_store(story.take())

    story.write("X")

    assert found == [(False, "abcd")]


def test_a_bug_in_a_copy_leaves_nothing_to_wait_for(story):
    snapshot = story.take()

    def put(data, first):
        raise ZeroDivisionError

    put, snapshot.epoch.store.put = snapshot.epoch.store.put, put
    with pytest.raises(ZeroDivisionError):
        story.write("X")
    snapshot.epoch.store.put = put

    assert not story.disk.requests.copies
    story.write("Y")
    assert content(snapshot) == "abcd"


# -- deleting


def test_deleting_the_only_snapshot_ends_preserving(story):
    snapshot = story.take()
    story.write("X")

    story.delete(snapshot)

    assert story.kept == 0
    story.write("YY")
    assert story.disk.history.copied == CLUSTER
    with pytest.raises(SnapshotLost, match="deleted"):
        snapshot.read(1, 0)


@pytest.mark.parametrize(
    "order", ["012", "021", "102", "120", "201", "210"], ids=lambda order: order
)
@pytest.mark.parametrize("more", ["", "Z"], ids=["quiet", "written between"])
def test_snapshots_can_be_deleted_in_any_order(story, order, more):
    snapshots = []
    for text in ("1", "22", "333"):
        snapshots.append(story.take())
        story.write(text)
    instants = ["abcd", "1bcd", "22cd"]
    alive = [0, 1, 2]

    for index in map(int, order):
        story.delete(snapshots[index])
        alive.remove(index)
        for cluster in range(4 if more else 0):
            story.write(more, cluster)

        assert [content(snapshots[i]) for i in alive] == [instants[i] for i in alive]

    assert story.kept == 0
    assert not story.disk.history.epochs


def test_the_past_that_an_older_snapshot_needs_stays(story):
    older, newer = story.take(), story.take()
    story.write("XY")

    story.delete(newer)

    assert story.kept == 2
    assert content(older) == "abcd"


def test_the_past_that_an_older_snapshot_has_itself_goes(story):
    older = story.take()
    story.write("X")
    newer = story.take()
    story.write("YY")
    assert story.kept == 3

    story.delete(newer)

    assert story.kept == 2
    assert content(older) == "abcd"


def test_the_past_that_a_deleted_one_before_has_goes(story):
    older, middle = story.take(), story.take()
    story.write("X")
    newer = story.take()
    story.write("Y")
    story.delete(middle)

    story.delete(newer)

    assert story.kept == 1
    assert content(older) == "abcd"


def test_the_past_goes_when_one_before_is_deleted_later(story):
    """The newest was deleted first, and had to keep what the middle one needed."""
    older = story.take()
    story.write("X")
    middle, newest = story.take(), story.take()
    story.write("Y")
    story.delete(newest)
    assert story.kept == 2
    assert content(middle) == "Xbcd"

    story.delete(middle)

    assert story.kept == 1
    assert content(older) == "abcd"


@pytest.mark.parametrize(
    "order", [(1, 2), (2, 1)], ids=["middle first", "newest first"]
)
def test_what_an_older_snapshot_has_is_never_preserved_for_deleted_ones(story, order):
    oldest = story.take()
    story.write("X")
    snapshots = [oldest, story.take(), story.take()]
    for index in order:
        story.delete(snapshots[index])

    story.write("Y")

    assert story.disk.history.copied == CLUSTER
    assert story.kept == 1
    assert content(oldest) == "abcd"


def test_deleting_the_oldest_drops_all_deleted_ones_after_it(story):
    oldest, *middle, newest = [story.take() for _ in range(4)]
    story.write("X")
    for snapshot in middle:
        story.delete(snapshot)

    story.delete(oldest)

    assert story.disk.history.epochs == [newest.epoch]
    assert content(newest) == "abcd"


def test_a_dropped_epoch_is_forgotten_once(story):
    forgotten = []
    snapshots = [story.take(), story.take()]
    for number, snapshot in enumerate(snapshots):
        snapshot.epoch._forget = lambda number=number: forgotten.append(number)

    story.delete(snapshots[1])
    assert forgotten == []
    story.delete(snapshots[0])
    story.delete(snapshots[0])

    assert forgotten == [0, 1]


def test_space_comes_back_when_it_is_collected(story):
    snapshot = story.take()
    story.write("X")

    story.disk.history.retire(snapshot.epoch, "deleted")
    assert story.kept == 1

    story.disk.history.collect()
    assert story.kept == 0


def test_retiring_a_broken_snapshot_keeps_its_reason(story):
    snapshot = story.take()
    break_store(snapshot)
    story.write("X")

    story.delete(snapshot)

    assert "injected" in snapshot.lost


# -- giving up parts of it


def test_a_discard_gives_space_back_and_ends_preserving(story):
    snapshot = story.take()
    story.write("X")

    snapshot.discard(2 * CLUSTER, 0)

    assert story.kept == 0
    story.write("YY")
    assert story.kept == 0
    assert letters(snapshot.read(2 * CLUSTER, 2 * CLUSTER)) == "cd"


def test_a_discard_keeps_what_an_older_snapshot_needs(story):
    older = story.take()
    newer = story.take()
    story.write("X")

    newer.discard(2 * CLUSTER, 0)

    story.write("YY")
    assert content(older) == "abcd"
    assert story.kept == 2


def test_a_discard_frees_what_an_older_snapshot_has_itself(story):
    older = story.take()
    story.write("XX")
    newer = story.take()
    story.write("Y")

    newer.discard(2 * CLUSTER, 0)

    story.write("ZZ")
    assert story.kept == 2
    assert content(older) == "abcd"


def test_a_discard_frees_some_of_its_range(story):
    older = story.take()
    story.write("X", 1)
    newer = story.take()
    story.write("YYYY")

    newer.discard(SIZE, 0)

    assert story.kept == 4
    assert content(older) == "abcd"
    story.delete(older)
    story.delete(newer)
    assert story.kept == 0


def test_a_discard_keeps_what_a_newer_snapshot_needs(story):
    older, newer = story.take(), story.take()
    story.write("X")

    older.discard(2 * CLUSTER, 0)

    story.write("YY")
    assert content(newer) == "abcd"


def test_a_discard_frees_what_deleted_snapshots_kept_for_it(story):
    older, newer = story.take(), story.take()
    story.write("X")
    story.delete(newer)

    older.discard(2 * CLUSTER, 0)

    assert story.kept == 0
    story.write("YY")
    assert story.kept == 0


@policies
def test_a_snapshot_does_not_need_what_it_gave_up(story, policy):
    older = story.take()
    given_up = story.take(on_cbw_error=policy)
    given_up.discard(CLUSTER, 0)
    break_store(given_up, count=3)

    # Copied for the older one, which breaks.
    story.write("X")

    assert image_of(given_up).fired == 1
    assert older.lost is not None
    assert given_up.lost is None
    assert letters(given_up.read(3 * CLUSTER, CLUSTER)) == "bcd"
    assert [epoch for epoch, _ in story.broken] == [older.epoch]
    story.write("Y")
    assert story.on_source == "Ybcd"


@policies
def test_a_snapshot_needs_the_rest_of_what_it_gave_up_a_part_of(story, policy):
    story.take()
    snapshot = story.take(on_cbw_error=policy)
    snapshot.discard(CLUSTER, 0)
    break_store(snapshot)

    if policy is BREAK_GUEST_WRITE:
        with pytest.raises(OSError, match="injected"):
            story.write("XX")
        assert story.on_source == "abcd"
    else:
        story.write("XX")
        assert snapshot.lost is not None


# -- after a restart


def reload(story, snapshots):
    """Return a history made of the same epochs, as a new daemon makes it."""
    history = History(story.disk.source, story.disk.requests, CLUSTER)
    history.load([snapshot.epoch for snapshot in snapshots])
    history.collect()
    return history


def test_loaded_epochs_go_on(story):
    snapshots = [story.take(), story.take()]
    story.write("X")

    history = reload(story, snapshots)

    assert history.newest is snapshots[1].epoch
    assert history.epochs == [snapshot.epoch for snapshot in snapshots]


def test_nothing_loaded_is_no_epoch(story):
    history = reload(story, [])

    assert history.newest is None


@pytest.mark.parametrize("lost", ["0", "1", "2", "01", "12", "02", "012"])
def test_what_a_crash_left_unretired_is_retired(story, lost):
    """The mark was made, and then the daemon died."""
    snapshots = []
    for text in ("1", "22", "333"):
        snapshots.append(story.take())
        story.write(text)
    for index in lost:
        snapshots[int(index)].epoch.lost = "deleted"

    history = reload(story, snapshots)

    good = [s for s in snapshots if s.lost is None]
    assert [e for e in history.epochs if e.lost is None] == [s.epoch for s in good]
    assert (history.newest is None) == (not good)
    if not good:
        assert story.kept == 0
    # As if nothing had happened.
    expected = {0: "abcd", 1: "1bcd", 2: "22cd"}
    for index, snapshot in enumerate(snapshots):
        snapshot._history = history
        if snapshot.lost is None:
            assert content(snapshot) == expected[index]


def test_loading_makes_retired_epochs_include_what_others_have(story):
    oldest = story.take()
    story.write("X")
    middle, newest = story.take(), story.take()
    middle.epoch.lost = newest.epoch.lost = "deleted"

    history = reload(story, [oldest, middle, newest])

    history.preserve(0, CLUSTER)
    assert history.copied == 0


@pytest.mark.parametrize(
    ("before", "freed"),
    [
        pytest.param("", 0, id="needed by an older one"),
        pytest.param("X", 1, id="an older one has it"),
    ],
)
def test_loading_frees_what_a_crash_left_of_what_was_given_up(story, before, freed):
    older = story.take()
    story.write(before)
    newer = story.take()
    story.write("YY")
    kept = story.kept
    newer.epoch.denied = newer.epoch.make_denied()
    newer.epoch.denied[:1] = 1

    reload(story, [older, newer])

    assert story.kept == kept - freed
    assert content(older) == "abcd"


# -- searches


def test_the_holder_is_the_first_epoch_that_has_a_cluster():
    texts = ["01000000", "01100011", "00010000"]
    chain = [
        Epoch(number, bitarray(text, endian="little"), Store([], 1, 0))
        for number, text in enumerate(texts)
    ]
    history = make_disk(clusters("a")).history
    holders = [None, 0, 1, 2, None, None, 1, 1]

    for first, stop in combinations(range(9), 2):
        found = [None] * (stop - first)
        on_source, parts = history.split(chain, first, stop)
        for epoch, bits in parts:
            assert bits.any()
            for cluster in bits.search(1):
                assert found[cluster] is None
                found[cluster] = epoch.number

        assert found == holders[first:stop]
        assert [number is None for number in found] == [bit == 1 for bit in on_source]
        epoch, end = history.holder(chain, first, stop)
        assert (epoch and epoch.number) == holders[first]
        assert set(holders[first:end]) == {holders[first]}
        assert end == stop or holders[end] != holders[first]


def test_nothing_expires_where_nothing_is_copied(story):
    story.take()

    assert story.disk.history.expire(float("inf")) == {}


def test_denied_clusters_are_kept_in_memory_where_nobody_says_otherwise():
    bits = make_bits(SIZE)

    epoch = Epoch(1, bits, Store([], 1, 0))

    assert epoch.denied is None
    assert len(epoch.make_denied()) == len(bits)
