"""Two requests, the one interrupted by the other before each of its lines in turn.

The disk is "abcd"; snapshot "old" was taken of it, then b was overwritten; snapshot
"new" was taken, then c was overwritten. So every way to find a cluster is there: on the
source, in a snapshot's own epoch, in a later one.
"""

import errno
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest

from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.errors import Abandoned, SnapshotLost
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
from tests.support.gate import Gate
from tests.support.running import Running, WatchedLock
from tests.support.schedule import schedules

SIZE = 4 * CLUSTER


def watch(*owners):
    for owner in owners:
        owner._lock = WatchedLock()


class World:
    """The disk of this page, its snapshots, and what each of them should hold."""

    def __init__(self, *, on_cbw_error=BREAK_SNAPSHOT, disk_limit=None):
        self.on_cbw_error = on_cbw_error
        # Names of snapshots.
        self.may_break = {"old", "new", "newest"} if disk_limit is not None else set()
        self.memory = MemoryImage(SIZE, clusters("abcd"))
        self.disk = make_disk(source=self.memory)
        # One cluster in RAM, the others on disk.
        self.ram = Budget(CLUSTER, "ram")
        self.store = Budget(disk_limit, "disk")
        watch(self.memory, self.ram, self.store)
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
        watch(*tiers, *(tier.image for tier in tiers))
        self.snapshots[name] = take_snapshot(
            self.disk, *tiers, on_cbw_error=self.on_cbw_error
        )

    def delete(self, name):
        delete_snapshot(self.disk, self.snapshots[name])

    def read(self, name, cluster=0, count=4):
        data = self.snapshots[name].read(count * CLUSTER, cluster * CLUSTER)
        return name, cluster, letters(data)

    def search(self, name):
        mapped = list(self.snapshots[name].map(0, SIZE))
        assert [m.offset for m in mapped] == [0, *(m.end for m in mapped[:-1])]
        assert mapped[-1].end == SIZE
        assert all(m.length > 0 and m.is_data for m in mapped)

    def look(self, name, requests):
        """Return what a snapshot holds: `!` where it was given up, None if lost."""
        snapshot = self.snapshots[name]
        if snapshot.lost is not None:
            is_deleted = any("delete" in r and name in r for r in requests)
            is_broken = name in self.may_break and self.on_cbw_error is BREAK_SNAPSHOT
            assert is_deleted or is_broken, snapshot.lost
            return None
        text = ""
        for cluster in range(4):
            try:
                text += letters(snapshot.read(CLUSTER, cluster * CLUSTER))
            except SnapshotLost:
                assert f"give up {'abcd'[cluster]} of {name}" in requests
                text += "!"
        return text

    def check_end(self):
        requests = self.disk.requests
        assert not requests.writes
        assert not requests.copies
        assert not requests.readers
        assert not requests.is_drained
        for name in self.snapshots:
            self.delete(name)
        assert not self.disk.history.epochs
        assert self.ram.used == self.store.used == 0


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
    return Step(lambda world: world.snapshots[name].discard(CLUSTER, cluster * CLUSTER))


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
WRITING = [name for name in REQUESTS if "write" in name or "discard" in name]


def pairs(kind):
    """Return the pairs of requests that can show something in a world."""
    for first, second in itertools.product(REQUESTS, REQUESTS):
        if first in READING and second in READING:
            continue
        if "take" in first and "take" in second:
            continue
        # Only a write finds out that a store is full; this one stands for all.
        if kind != "roomy" and "write all" not in (first, second):
            continue
        yield pytest.param(kind, first, second, id=f"{first} / {second}, {kind}")


def states_of(orders):
    """Return what the live disk holds after the steps of each of these orders."""
    states = set()
    for steps in orders:
        state = "aBCd"
        for step in steps:
            state = step.effect(state)
        states.add(state)
    return states


def run(steps, world):
    return [found for step in steps if (found := step.act(world)) is not None]


@pytest.mark.parametrize(
    ("kind", "first", "second"), [p for kind in WORLDS for p in pairs(kind)]
)
def test_a_request_is_interrupted_by_another_one(kind, first, second):
    worlds = []

    def make():
        world = World(**WORLDS[kind])
        worlds.append(world)
        calls = [partial(run, REQUESTS[name], world) for name in (first, second)]
        return world.disk.requests, *calls

    for schedule, *outcomes in schedules(make):
        try:
            check(worlds.pop(), [first, second], outcomes)
        except AssertionError as e:
            e.add_note(f"the second came at {schedule.where}, line {schedule.line}")
            raise


@pytest.mark.parametrize(
    "policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE], ids=lambda policy: policy.value
)
@pytest.mark.parametrize("name", WRITING)
def test_a_request_expires_and_all_is_overwritten_before_it_comes_back(name, policy):
    worlds = []
    rest = [write("VVVV", 0), step("take", "last"), write("WWWW", 0)]

    def make():
        world = World(on_cbw_error=policy)
        world.may_break = {"old", "new", "newest"}
        worlds.append(world)

        def expire():
            world.disk.history.expire(float("inf"))
            return run(rest, world)

        return world.disk.requests, partial(run, REQUESTS[name], world), expire

    for schedule, request, later in schedules(make):
        world = worlds.pop()
        try:
            is_abandoned = isinstance(request.error(), Abandoned)
            assert is_abandoned or request.result() == []
            assert later.result() == []
            steps = [] if is_abandoned else REQUESTS[name]
            expected = states_of([[*rest, *steps], [*steps, *rest]])
            assert letters(world.memory.data) in expected
            check_snapshots(world, [name], [*REQUESTS[name], *rest])
            world.check_end()
        except AssertionError as e:
            e.add_note(f"it expired at {schedule.where}, line {schedule.line}")
            raise


@pytest.mark.parametrize(
    "policy", [BREAK_SNAPSHOT, BREAK_GUEST_WRITE], ids=lambda policy: policy.value
)
@pytest.mark.parametrize(
    "name",
    [
        "take",
        "take, write all",
        "write all",
        "delete old",
        "delete new",
        "read all of old",
    ],
)
def test_an_expiry_is_interrupted(name, policy):
    """A write of `a` hangs in its copy; it expires, and is made again."""
    hung = []
    retry = write("X", 0)

    def make():
        world = World(on_cbw_error=policy)
        world.may_break = {"old", "new"}
        tier = world.snapshots["new"].epoch.store.tiers[1]
        tier.image = Gate(tier.image)
        copy = tier.image.hold("pwrite")
        late = Running(run, [retry], world)
        copy.wait_arrived()
        hung.append((world, copy, late))

        def expire():
            (error,) = world.disk.history.expire(float("inf")).values()
            return run([] if error else [retry], world)

        return world.disk.requests, expire, partial(run, REQUESTS[name], world)

    for schedule, expiry, other in schedules(make):
        world, copy, late = hung.pop()
        copy.release()
        try:
            assert isinstance(late.error(), Abandoned)
            assert expiry.result() == []
            check_outcomes(world, [name], [other])
            steps = [*REQUESTS[name], retry]
            assert letters(world.memory.data) in states_of(any_orders(steps))
            check_snapshots(world, [name], steps)
            world.check_end()
        except AssertionError as e:
            e.add_note(f"the second came at {schedule.where}, line {schedule.line}")
            raise


def check(world, names, outcomes):
    """Check what two requests and the world tell after they have met."""
    check_outcomes(world, names, outcomes)
    first, second = (REQUESTS[name] for name in names)
    steps = [*first, *second]
    any_order = any_orders(steps) if world.may_break else [steps, [*second, *first]]
    assert letters(world.memory.data) in states_of(any_order)
    check_snapshots(world, names, steps)
    world.check_end()


def any_orders(steps):
    """Return all orders of some steps, and of some of them."""
    counts = range(len(steps) + 1)
    return [order for n in counts for order in itertools.permutations(steps, n)]


def check_snapshots(world, names, steps):
    found = {name: world.look(name, names) for name in world.snapshots}
    for name, text in found.items():
        if name in INSTANTS and text is not None:
            assert matches(text, INSTANTS[name])
        elif text is not None:
            assert text in states_of(any_orders(steps))
    # They stay what they are.
    if not world.may_break:
        world.disk.write(clusters("...."), 0)
        assert {name: world.look(name, names) for name in world.snapshots} == found


def check_outcomes(world, names, outcomes):
    may_be_lost = any(word in name for name in names for word in ("delete", "give up"))
    for outcome in outcomes:
        match outcome.error():
            case None:
                for name, cluster, text in outcome.result():
                    instant = INSTANTS.get(name, "")
                    assert instant[cluster : cluster + len(text)] == text
            case SnapshotLost():
                assert may_be_lost or world.may_break
            case error:
                assert isinstance(error, OSError), error
                assert error.errno == errno.ENOSPC
                assert world.may_break
                assert world.on_cbw_error is BREAK_GUEST_WRITE


def matches(text, instant):
    """Compare but for what was given up, which is `!`."""
    return all(a in (b, "!") for a, b in zip(text, instant, strict=True))
