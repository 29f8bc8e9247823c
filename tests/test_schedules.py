"""Two requests, the one interrupted by the other before each of its lines in turn.

The disk is "abcd"; snapshot "old" was taken of it, then b was overwritten; snapshot
"new" was taken, then c was overwritten. So every way to find a cluster is there: on the
source, in a snapshot's own epoch, in a later one.
"""

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.errors import SnapshotLost
from tests.support.disks import (
    BREAK_GUEST_WRITE,
    BREAK_SNAPSHOT,
    CLUSTER,
    clusters,
    delete_snapshot,
    letters,
    make_disk,
    make_tier,
    take_snapshot,
)
from tests.support.running import WatchedLock
from tests.support.schedule import schedules

SIZE = 4 * CLUSTER


class World:
    """The disk of this page, its snapshots, and what each of them should hold."""

    def __init__(self, *, on_cbw_error=BREAK_SNAPSHOT, disk_limit=None):
        self.on_cbw_error = on_cbw_error
        self.memory = MemoryImage(SIZE, clusters("abcd"))
        self.disk = make_disk(source=self.memory)
        # One cluster in RAM, the others on disk.
        self.ram = Budget(CLUSTER, "ram")
        self.store = Budget(disk_limit, "disk")
        self._watch(self.ram)
        self._watch(self.store)
        self.snapshots = {}
        self.take("old")
        self.disk.write(clusters("B"), 1 * CLUSTER)
        self.take("new")
        self.disk.write(clusters("C"), 2 * CLUSTER)

    def take(self, name):
        tiers = [
            make_tier(self.disk, "ram", budget=self.ram),
            make_tier(self.disk, "disk", budget=self.store),
        ]
        for tier in tiers:
            self._watch(tier)
        self.snapshots[name] = take_snapshot(
            self.disk, *tiers, on_cbw_error=self.on_cbw_error
        )

    @staticmethod
    def _watch(owner):
        owner._lock = WatchedLock()

    def delete(self, name):
        delete_snapshot(self.disk, self.snapshots[name])

    def read(self, name, cluster=0, count=4):
        data = self.snapshots[name].read(count * CLUSTER, cluster * CLUSTER)
        return name, cluster, letters(data)

    def search(self, name):
        mapped = list(self.snapshots[name].map(0, SIZE))
        assert all(part.length > 0 for part in mapped)
        assert [part.offset for part in mapped[1:]] == [p.end for p in mapped[:-1]]
        return name, 0, "abcd" if all(part.is_data for part in mapped) else "a.cd"


def overwritten(state, text, cluster):
    return state[:cluster] + text + state[cluster + len(text) :]


class Step(NamedTuple):
    """A request, and what it does to the live disk."""

    act: Callable[[World], Any]
    effect: Callable[[str], str] = lambda state: state


def write(text, cluster):
    return Step(
        lambda world: world.disk.write(clusters(text), cluster * CLUSTER) and None,
        lambda state: overwritten(state, text, cluster),
    )


def discard(cluster, count):
    return Step(
        lambda world: world.disk.discard(count * CLUSTER, cluster * CLUSTER),
        lambda state: overwritten(state, "." * count, cluster),
    )


def step(method, *args):
    return Step(lambda world: getattr(world, method)(*args))


def give_up(name, cluster):
    return Step(
        lambda world: world.snapshots[name].discard(CLUSTER, cluster * CLUSTER)
    )


REQUESTS = {
    "read all of old": [step("read", "old")],
    "read all of new": [step("read", "new")],
    "read a of old": [step("read", "old", 0, 1)],
    "read b of old": [step("read", "old", 1, 1)],
    "map old": [step("search", "old")],
    "write a": [write("X", 0)],
    "write b": [write("Y", 1)],
    "write all": [write("ZZZZ", 0)],
    "discard bcd": [discard(1, 3)],
    "take": [step("take", "newest")],
    "take, write all": [step("take", "newest"), write("TTTT", 0)],
    "delete old": [step("delete", "old")],
    "delete new": [step("delete", "new")],
    "delete new, old": [step("delete", "new"), step("delete", "old")],
    "give up b of old": [give_up("old", 1)],
    "give up a of old": [give_up("old", 0)],
}

WORLDS = {
    "roomy": {},
    "full, break-snapshot": {"disk_limit": 2 * CLUSTER},
    "full, break-guest-write": {
        "disk_limit": 2 * CLUSTER,
        "on_cbw_error": BREAK_GUEST_WRITE,
    },
}

# What a snapshot has to hold. "newest" is checked against the states of the live disk.
INSTANTS = {"old": "abcd", "new": "aBcd"}

READING = {name for name in REQUESTS if name.startswith(("read", "map"))}
# Two of these would show nothing: they do not change what the other one sees.
PAIRS = [
    (first, second)
    for first, second in itertools.product(REQUESTS, REQUESTS)
    if not (first in READING and second in READING)
    and not ("take" in first and "take" in second)
]


def live_states(first, second):
    """Return what the live disk may hold at any time, with any step failing."""
    states = {"aBCd"}
    for count in range(1, len(first) + len(second) + 1):
        for steps in itertools.permutations([*first, *second], count):
            state = "aBCd"
            for one in steps:
                state = one.effect(state)
            states.add(state)
    return states


def final_states(first, second):
    """Return what the live disk may hold in the end, with no step failing."""
    states = set()
    for order in ([*first, *second], [*second, *first]):
        state = "aBCd"
        for one in order:
            state = one.effect(state)
        states.add(state)
    return states


def check(world, names, outcomes, is_full):
    """Check what two requests and the world tell after they have met."""
    first, second = (REQUESTS[name] for name in names)
    may_lose = is_full or any("delete" in name for name in names)
    may_deny = any("give up" in name for name in names)
    for error in [outcome.error() for outcome in outcomes]:
        if isinstance(error, SnapshotLost):
            assert may_lose or may_deny
        elif error is not None:
            assert is_full, error
            assert world.on_cbw_error is BREAK_GUEST_WRITE, error
            assert error.errno == errno.ENOSPC, error
    for outcome in outcomes:
        for name, cluster, found in outcome.error() is None and outcome.result() or []:
            if name in INSTANTS:
                assert found == INSTANTS[name][cluster : cluster + len(found)]
    live = letters(world.memory.data)
    if is_full:
        assert live in live_states(first, second)
    else:
        assert live in final_states(first, second)
    check_snapshots(world, names, live_states(first, second), is_full)
    check_end(world)


def check_snapshots(world, names, states, is_full):
    for name, snapshot in world.snapshots.items():
        if snapshot.lost is not None:
            is_deleted = any("delete" in n and name in n for n in names)
            is_broken = is_full and world.on_cbw_error is BREAK_SNAPSHOT
            assert is_deleted or is_broken, snapshot.lost
            continue
        found = ""
        for cluster in range(4):
            try:
                found += letters(snapshot.read(CLUSTER, cluster * CLUSTER))
            except SnapshotLost:
                assert f"give up {'abcd'[cluster]} of {name}" in names
                found += "!"
        if name in INSTANTS:
            assert all(
                a in (b, "!") for a, b in zip(found, INSTANTS[name], strict=True)
            )
        else:
            assert found in states
        # What no epoch has is still on the source.
        world.disk.write(clusters("...."), 0) if not is_full else None


def check_end(world):
    requests = world.disk.requests
    assert not requests.writes
    assert not requests.copies
    assert not requests.readers
    assert not requests.is_drained
    for name in world.snapshots:
        world.delete(name)
    assert not world.disk.history.epochs
    assert world.ram.used == world.store.used == 0


def run(steps):
    def call(world):
        return [r for s in steps if (r := s.act(world)) is not None]

    return call


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize(
    ("first", "second"), [pytest.param(a, b, id=f"{a} / {b}") for a, b in PAIRS]
)
def test_requests_that_interrupt_each_other(kind, first, second):
    worlds = []

    def make():
        world = World(**WORLDS[kind])
        worlds.append(world)
        a, b = run(REQUESTS[first]), run(REQUESTS[second])
        return world.disk.requests, lambda: a(world), lambda: b(world)

    for schedule, *outcomes in schedules(make):
        try:
            check(worlds.pop(), (first, second), outcomes, kind != "roomy")
        except AssertionError as e:
            e.add_note(f"the second came at {schedule.where}, line {schedule.line}")
            raise
