"""Random walks of one and of two disks, against a model that can not go wrong.

After every step every live snapshot is read again, whole and in parts: it is exact, or
it was lost, then and for ever. What may be lost, and which write may fail, is known
too: a snapshot that does not need a cluster does not break for it.

    FLEECEFS_EXAMPLES=5000 python -m pytest tests/test_model.py    walks longer
"""

import errno
import os
from contextlib import contextmanager, suppress
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fleecefs.block import disk as disk_module
from fleecefs.block.disk import freeze
from fleecefs.block.epoch import History, OnCbwError
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.errors import NoSpace, SnapshotLost
from tests.support.disks import (
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    make_disk,
    make_epoch,
    make_tier,
    snapshot_of,
)
from tests.support.faulty import Faulty
from tests.support.model import DiskModel
from tests.support.running import WatchedRequests

# In which the images of these tests allocate.
PAGE = 4096

SIZE_MAX = 40_000
SNAPSHOTS_MAX = 5

sizes = st.one_of(
    st.integers(1, SIZE_MAX), st.sampled_from([4096, 8192, 24576, 8191, 8193])
)
# In 64ths of a disk, and some bytes more or less: near clusters' ends, past the end.
places = st.tuples(st.integers(0, 66), st.integers(-2, 2))
limits = st.sampled_from([None, 0, 4096, 10_000, 20_000, 30_000])
faults = st.tuples(
    st.sampled_from(["pread", "pwrite", "pwrite", "zero", "discard"]),
    st.integers(1, 4),
    st.sampled_from([errno.EIO, errno.ENOSPC]),
    st.sampled_from([1, 1, 2, 100]),
)


class Frozen:
    """One disk of one snapshot, and what is known of it."""

    def __init__(self, snapshot, data, policy):
        self.snapshot = snapshot
        self.data = data
        self.policy = policy
        self.lost = None
        self.denied = set()
        # Clusters that were overwritten since: nothing of them is needed any more.
        self.written = set()

    def needs(self, clusters):
        """Tell whether any of these clusters may have to be preserved for it."""
        return self.lost is None and bool(clusters - self.written - self.denied)


class Subject:
    """A disk, its model, and its snapshots."""

    def __init__(self, size, cluster_size, copy_clusters_max, data):
        self.memory = MemoryImage(size)
        for at in range(0, size, 8192):
            self.memory.pwrite(data[at : min(at + 4096, size)], at)
        self.source = Faulty(self.memory)
        self.disk = make_disk(source=self.source, cluster_size=cluster_size)
        self.disk.history._copy_clusters_max = copy_clusters_max
        self.model = DiskModel(bytes(self.memory.data))
        self.frozen = {}
        self.images = [self.source]

    @property
    def good(self):
        return {n: f for n, f in self.frozen.items() if f.lost is None}

    def clusters(self, offset, end):
        end = min(end, self.disk.size)
        size = self.disk.cluster_size
        return set(range(offset // size, -(-end // size))) if offset < end else set()

    def place(self, place):
        part, more = place
        return max(0, self.disk.size * part // 64 + more)


class DisksAndSnapshots(RuleBasedStateMachine):
    count = 1

    def __init__(self):
        super().__init__()
        # Also a small disk is zeroed in several pieces.
        self.patch = mock.patch.object(disk_module, "_PIECE_SIZE", 16384)
        self.patch.start()
        self.steps = 0

    @initialize(
        sizes=st.tuples(sizes, sizes),
        cluster_size=st.sampled_from([512, 4096, 8192]),
        copy_clusters_max=st.sampled_from([1, 2, 256]),
        ram=limits,
        disk=limits,
    )
    def begin(self, sizes, cluster_size, copy_clusters_max, ram, disk):
        data = bytes(range(1, 256)) * (SIZE_MAX // 255 + 1)
        self.subjects = [
            Subject(size, cluster_size, copy_clusters_max, data)
            for size in sizes[: self.count]
        ]
        self.ram, self.disk_budget = Budget(ram, "ram"), Budget(disk, "disk")

    def teardown(self):
        if hasattr(self, "subjects"):
            self.pause(True)
            for name in self.names():
                self.delete_all(name)
            assert self.ram.used == self.disk_budget.used == 0
        self.patch.stop()

    def names(self):
        return list(dict.fromkeys(n for s in self.subjects for n in s.frozen))

    def pick(self, number):
        return self.subjects[number % len(self.subjects)]

    # -- what a guest does

    @rule(number=st.integers(0, 1), place=places, length=st.integers(0, 20_000))
    def read(self, number, place, length):
        subject = self.pick(number)
        offset = subject.place(place)

        with self.may_fail(subject, set(), "pread"):
            found = subject.disk.read(length, offset)
            assert found == subject.model.read(length, offset)

    @rule(
        number=st.integers(0, 1),
        place=places,
        length=st.one_of(st.integers(0, 20_000), st.sampled_from([1, 512, 4096])),
        is_zero=st.sampled_from([False, False, False, True]),
        durable=st.booleans(),
    )
    def write(self, number, place, length, is_zero, durable):
        subject = self.pick(number)
        offset = subject.place(place)
        data = bytes([0 if is_zero else self.steps % 255 + 1]) * length
        size = subject.disk.size
        if offset + length > size and offset >= size:
            with pytest.raises(NoSpace, match="beyond the end"):
                subject.disk.write(data, offset)
            return

        touched = subject.clusters(offset, offset + length)
        with self.may_fail(subject, touched, "pwrite"):
            written = subject.disk.write(data, offset, durable)
            assert written == subject.model.write(data, offset)
        if durable and self.error is None:
            assert subject.memory.durable == subject.memory.data

    @rule(number=st.integers(0, 1), place=places, length=st.integers(0, SIZE_MAX))
    def zero(self, number, place, length):
        subject = self.pick(number)
        offset = subject.place(place)
        if offset + length > subject.disk.size:
            with pytest.raises(NoSpace, match="beyond the end"):
                subject.disk.zero(length, offset)
            return

        self.make_zeroes(subject, offset, length, "zero")

    @rule(number=st.integers(0, 1), place=places, length=st.integers(0, SIZE_MAX))
    def discard(self, number, place, length):
        subject = self.pick(number)
        self.make_zeroes(subject, subject.place(place), length, "discard")

    def make_zeroes(self, subject, offset, length, operation):
        before = bytes(subject.model.data)
        touched = subject.clusters(offset, offset + length)
        with self.may_fail(subject, touched, operation):
            getattr(subject.disk, operation)(length, offset)
        subject.model.zero(length, offset)
        if self.error is not None:
            # Some pieces were done, in order, each of them whole.
            self.adopt_pieces(subject, before, offset)

    def adopt_pieces(self, subject, before, offset):
        after = subject.model.data
        piece = disk_module._PIECE_SIZE
        states = [before]
        for cut in range(offset // piece * piece + piece, subject.disk.size, piece):
            states.append(bytes(after[:cut]) + before[cut:])
        found = bytes(subject.memory.data)
        assert found in states
        subject.model.data[:] = found

    @contextmanager
    def may_fail(self, subject, touched, operation):
        """Check how a request on the live disk ends; `error` is what it raised."""
        self.error = None
        fired = self.fired()
        source_fired = subject.source.fired
        armed_on = subject.source._on
        room = self.has_room(subject, touched)
        copied = subject.disk.history.copied
        good = subject.good
        try:
            yield
        except OSError as e:
            self.error = e
        has_fired = self.fired() > fired
        is_source = subject.source.fired > source_fired and armed_on == operation
        may_break = has_fired or not room
        if self.error is not None:
            assert self.error.errno in (errno.EIO, errno.ENOSPC)
            must_not_break = any(
                frozen.policy is BREAK_GUEST_WRITE and frozen.needs(touched)
                for frozen in good.values()
            )
            assert is_source or (may_break and must_not_break), self.error
        for frozen in good.values():
            if frozen.snapshot.lost is not None:
                assert may_break
                assert frozen.policy is BREAK_SNAPSHOT
                assert frozen.needs(touched)
                frozen.lost = frozen.snapshot.lost
            if self.error is None:
                frozen.written |= touched
        size = subject.disk.cluster_size
        assert subject.disk.history.copied - copied <= len(touched) * size
        self.collect(subject)

    def has_room(self, subject, touched):
        """Tell whether there is room to preserve all of these clusters on disk."""
        limit, used = self.disk_budget.limit, self.disk_budget.used
        needed = len(touched) * subject.disk.cluster_size
        return limit is None or used + needed <= limit

    # -- what an operator does

    @precondition(lambda self: len(self.names()) < SNAPSHOTS_MAX)
    @rule(
        which=st.sampled_from([(0,), (1,), (0, 1), (1, 0)]),
        policy=st.sampled_from(OnCbwError),
    )
    def take(self, which, policy):
        subjects = list({id(s): s for s in map(self.pick, which)}.values())
        name = f"snapshot{self.steps}"
        epochs = []
        for subject in subjects:
            tiers = []
            for tier, budget in (("ram", self.ram), ("disk", self.disk_budget)):
                image = Faulty(MemoryImage(subject.disk.size))
                subject.images.append(image)
                tiers.append(make_tier(subject.disk, tier, image, budget))
            epochs.append(make_epoch(subject.disk, *tiers, on_cbw_error=policy))

        freeze([subject.disk for subject in subjects], epochs)

        for subject, epoch in zip(subjects, epochs, strict=True):
            subject.model.freeze(name)
            snapshot = snapshot_of(subject.disk, epoch)
            data = subject.model.snapshots[name]
            subject.frozen[name] = Frozen(snapshot, data, policy)

    @precondition(lambda self: self.names())
    @rule(index=st.integers(0, SNAPSHOTS_MAX))
    def delete(self, index):
        names = self.names()
        self.delete_all(names[index % len(names)])

    def delete_all(self, name):
        for subject in self.subjects:
            frozen = subject.frozen.pop(name, None)
            if frozen is None:
                continue
            subject.disk.history.retire(frozen.snapshot.epoch, "deleted")
            self.collect(subject)
            subject.model.forget(name)
            with pytest.raises(SnapshotLost):
                frozen.snapshot.read(1, 0)

    def collect(self, subject):
        """Give space back; what can not be punched out is given back all the same."""
        while True:
            try:
                return subject.disk.history.collect()
            except OSError as e:
                self.check_injected(e, "discard")

    @precondition(lambda self: self.names())
    @rule(
        index=st.integers(0, SNAPSHOTS_MAX),
        number=st.integers(0, 1),
        place=places,
        length=st.integers(0, SIZE_MAX),
    )
    def give_up(self, index, number, place, length):
        names = self.names()
        subject = self.pick(number)
        frozen = subject.frozen.get(names[index % len(names)])
        if frozen is None:
            return
        offset = subject.place(place)
        try:
            frozen.snapshot.discard(length, offset)
        except SnapshotLost:
            assert frozen.lost is not None
            return
        except OSError as e:
            self.check_injected(e, "discard")
        size, cluster_size = subject.disk.size, subject.disk.cluster_size
        end = min(offset + length, size)
        stop = -(-end // cluster_size) if end == size else end // cluster_size
        if frozen.lost is None:
            frozen.denied |= set(range(-(-offset // cluster_size), stop))

    @precondition(lambda self: self.names())
    @rule(
        index=st.integers(0, SNAPSHOTS_MAX),
        number=st.integers(0, 1),
        place=places,
        length=st.integers(0, SIZE_MAX),
    )
    def read_snapshot(self, index, number, place, length):
        """Also while something fails."""
        names = self.names()
        subject = self.pick(number)
        frozen = subject.frozen.get(names[index % len(names)])
        if frozen is None:
            return
        offset = subject.place(place)
        touched = subject.clusters(offset, offset + length)
        fired = self.fired()
        try:
            found = frozen.snapshot.read(length, offset)
        except SnapshotLost:
            assert frozen.lost is not None or touched & frozen.denied
        except OSError as e:
            self.check_injected(e, "pread")
            assert self.fired() > fired
        else:
            assert found == frozen.data[offset : offset + length]
            assert not touched & frozen.denied

    @rule(number=st.integers(0, 1), index=st.integers(0, 12), fault=faults)
    def fail_later(self, number, index, fault):
        subject = self.pick(number)
        # The newest ones: what is written goes there.
        images = [subject.source, *subject.images[:-5:-1]]
        on, nth, code, count = fault
        images[index % len(images)].arm(on, nth=nth, code=code, count=count)

    @rule()
    def fail_no_more(self):
        for subject in self.subjects:
            for image in subject.images:
                image.disarm()

    @rule(number=st.integers(0, 1), is_clean=st.booleans())
    def restart(self, number, is_clean):
        """Load the epochs into a new history, as a new daemon does."""
        subject = self.pick(number)
        old = subject.disk.history
        if is_clean:
            for epoch in old.epochs:
                try:
                    epoch.store.settle()
                except OSError:
                    break
        new = History(old.source, WatchedRequests(), old.cluster_size)
        new._copy_clusters_max = old._copy_clusters_max
        new.load(old.epochs)
        subject.disk.history, subject.disk.requests = new, new.requests
        for frozen in subject.frozen.values():
            frozen.snapshot = snapshot_of(subject.disk, frozen.snapshot.epoch)
        self.collect(subject)

    @staticmethod
    def check_injected(error, operation):
        assert f"injected into {operation}" in error.strerror

    # -- what holds after every step

    def fired(self):
        return sum(image.fired for s in self.subjects for image in s.images)

    def pause(self, is_paused):
        for subject in self.subjects:
            for image in subject.images:
                image.is_paused = is_paused

    @invariant()
    def everything_is_as_in_the_model(self):
        self.steps += 1
        self.pause(True)
        for subject in self.subjects:
            disk = subject.disk
            assert disk.read(disk.size, 0) == subject.model.data
            self.check_requests(disk)
            for frozen in subject.frozen.values():
                if frozen.lost is None:
                    self.check_good(subject, frozen)
                else:
                    self.check_lost(frozen)
            if not subject.good:
                assert not disk.history.epochs
                assert disk.history.newest is None
        self.check_budgets()
        self.pause(False)

    def check_requests(self, disk):
        assert not disk.requests.writes
        assert not disk.requests.copies
        assert not disk.requests.readers
        assert not disk.requests.is_drained

    def check_lost(self, frozen):
        assert frozen.snapshot.lost == frozen.lost
        for call in (frozen.snapshot.find_data, lambda at: frozen.snapshot.read(1, at)):
            with pytest.raises(SnapshotLost):
                call(0)

    def check_good(self, subject, frozen):
        assert frozen.snapshot.lost is None
        size = subject.disk.size
        position = self.steps * 997 % size
        for first, stop, is_denied in self.runs(subject, frozen):
            offset = first * subject.disk.cluster_size
            end = min(stop * subject.disk.cluster_size, size)
            if is_denied:
                for at in (offset, end - 1):
                    with pytest.raises(SnapshotLost):
                        frozen.snapshot.read(1, at)
                with pytest.raises(SnapshotLost):
                    next(frozen.snapshot.map(offset, end))
                continue
            found = frozen.snapshot.read(end - offset, offset)
            assert found == frozen.data[offset:end]
            if offset <= position < end:
                found = frozen.snapshot.read(end - position, position)
                assert found == frozen.data[position:end]
            self.check_map(frozen, offset, end)

    def runs(self, subject, frozen):
        """Return runs of clusters, and whether their access was given up."""
        runs = []
        for cluster in range(-(-subject.disk.size // subject.disk.cluster_size)):
            is_denied = cluster in frozen.denied
            if runs and runs[-1][2] == is_denied:
                runs[-1] = runs[-1][0], cluster + 1, is_denied
            else:
                runs.append((cluster, cluster + 1, is_denied))
        return runs

    def check_map(self, frozen, offset, end):
        """Check the map of a part that is followed by a denied one, or by the end."""
        parts = []
        with suppress(SnapshotLost):
            parts.extend(frozen.snapshot.map(offset, len(frozen.data)))
        assert [part.offset for part in parts] == [offset, *(p.end for p in parts[:-1])]
        assert parts[-1].end == end
        for part in parts:
            assert part.length > 0
            assert part.is_data or not any(frozen.data[part.offset : part.end])
        data = next((part.offset for part in parts if part.is_data), end)
        hole = next((part.offset for part in parts if not part.is_data), end)
        if frozen.snapshot.cluster_size < PAGE:
            # What is written next to a hole may have made data of it since.
            with suppress(SnapshotLost):
                assert not any(frozen.data[offset : frozen.snapshot.find_data(offset)])
            with suppress(SnapshotLost):
                found = frozen.snapshot.find_hole(offset)
                assert not any(frozen.data[found : found + 1])
            return
        if data < end:
            assert frozen.snapshot.find_data(offset) == data
        if hole < end:
            assert frozen.snapshot.find_hole(offset) == hole

    def check_budgets(self):
        epochs = [e for s in self.subjects for e in s.disk.history.epochs]
        for index, budget in enumerate((self.ram, self.disk_budget)):
            used = sum(epoch.store.tiers[index].used for epoch in epochs)
            assert budget.used == used
            assert budget.limit is None or used <= budget.limit


class GroupsOfDisks(DisksAndSnapshots):
    count = 2


EXAMPLES = int(os.environ.get("FLEECEFS_EXAMPLES", "300"))

LIMITS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestOneDisk = DisksAndSnapshots.TestCase
TestOneDisk.settings = LIMITS
TestTwoDisks = GroupsOfDisks.TestCase
TestTwoDisks.settings = LIMITS
