"""Guests, copies and everything else that happens to a mirror, in any order.

Random walks: whoever does something is an actor, a thread that runs only when it is
given a turn, and hands it back between any two instructions of the mirror, halfway
through a read or write, and while it waits. So a walk is told by its seed. After every
turn what the module promises is checked: where source and target differ, a granule is
dirty, or it is being copied, or a write to it has not been answered. In the end all
that is dirty is copied, and both are what a plain bytearray is.

    FLEECEFS_EXAMPLES=500 python -m pytest tests/test_mirror_model.py    walks more

Schedules: a call is interrupted once by another one, before each of its lines in turn
(support/schedule.py).
"""

import errno
import itertools
import os
import random
import sys
import threading
from functools import partial
from uuid import uuid4

import pytest

from fleecefs.block import disk as disk_module
from fleecefs.block import mirror as mirror_module
from fleecefs.block.disk import Disk, drained
from fleecefs.block.epoch import History
from fleecefs.block.memory import MemoryImage
from fleecefs.block.mirror import Mirror, Sink
from fleecefs.block.requests import Requests
from fleecefs.errors import Abandoned, Busy
from fleecefs.jobs import mirrorcopy
from fleecefs.jobs.mirrorcopy import MirrorCopier, Outcome
from fleecefs.jobs.target import Target
from tests.jobs.fakes import FakeBackup
from tests.support.disks import CLUSTER, clusters, make_bits
from tests.support.gate import PATIENCE
from tests.support.mirrors import Mirrored
from tests.support.running import WatchedLock
from tests.support.schedule import schedules

WALKS = int(os.environ.get("FLEECEFS_EXAMPLES", 30))
TURNS = 1000

# Where actors hand their turns back.
TRACED = {disk_module.__file__, mirror_module.__file__, mirrorcopy.__file__}
FOREVER = float("inf")


# -- actors


class Killed(BaseException):
    """The daemon died: the thread ends wherever it is."""


class Actor:
    """A call in a thread that runs only in its turns."""

    _current = threading.local()

    def __init__(self, call, chance, share):
        self._call = call
        self._chance = chance
        # How often it hands its turn back, of all instructions.
        self._share = share
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_killed = False
        self.is_over = False
        self.result = self.error = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ident(self):
        return self._thread.ident

    def go(self):
        """Let it run until it hands its turn back."""
        self._turn.release()
        assert self._back.acquire(timeout=PATIENCE), "it neither pauses nor ends"

    def kill(self):
        self._is_killed = True
        while not self.is_over:
            self.go()
        self._thread.join()

    @classmethod
    def pause(cls):
        """Hand the turn back, if we are an actor."""
        actor = getattr(cls._current, "actor", None)
        if actor is not None:
            actor._back.release()
            actor._turn.acquire()
            if actor._is_killed:
                raise Killed

    def _run(self):
        self._current.actor = self
        self._turn.acquire()
        try:
            if not self._is_killed:
                sys.settrace(self._trace if self._share else None)
                self.result = self._call()
        except BaseException as e:
            self.error = e
        finally:
            sys.settrace(None)
            self.is_over = True
            self._back.release()

    def _trace(self, frame, event, argument):
        if frame.f_code.co_filename not in TRACED:
            return None
        # Nothing that a mirror shares is larger than an instruction.
        if frame.f_code.co_filename == mirror_module.__file__:
            frame.f_trace_opcodes = True
        return self._trace_step

    def _trace_step(self, frame, event, argument):
        if event in ("line", "opcode") and self._chance.random() < self._share:
            self.pause()
        return self._trace_step


class TurnLock:
    """A lock for actors."""

    def __init__(self):
        self._lock = threading.Lock()
        self.locked = self._lock.locked

    def __enter__(self):
        while not self._lock.acquire(blocking=False):
            Actor.pause()

    def __exit__(self, *args):
        # It is free already if the daemon died while somebody waited for a change.
        if self._lock.locked():
            self._lock.release()


class TurnRequests(Requests):
    """Requests of actors; some lose their patience."""

    def __init__(self, chance, impatience):
        super().__init__()
        self.lock = TurnLock()
        self._chance = chance
        self._impatience = impatience

    def wait_opened(self):
        while self._drains:
            self._wait()

    def wait_changed(self, deadline):
        if self._chance.random() < self._impatience:
            return False
        self._wait()
        return True

    def _wait(self):
        self.lock.__exit__()
        Actor.pause()
        self.lock.__enter__()


class Halting:
    """An image on which everything takes two turns, and whatever is told may fail."""

    def __init__(self, image, chance, faults):
        self.image = image
        self.size = image.size
        self._chance = chance
        # How often, of all calls.
        self.faults = faults

    def pread_into(self, buffer, offset):
        for at, length in self._halves(len(buffer)):
            self.image.pread_into(buffer[at : at + length], offset + at)

    def pwrite(self, data, offset):
        for at, length in self._halves(len(data)):
            self.image.pwrite(data[at : at + length], offset + at)
        if len(data) > 1 and self._chance.random() < self.faults:
            # What is cut short is written in part, or not known any more.
            self.image.pwrite(data, offset)
            return len(data) // 2
        return len(data)

    def zero(self, length, offset):
        for at, part in self._halves(length):
            self.image.zero(part, offset + at)

    discard = zero

    def _halves(self, length):
        for at, part in ((0, length // 2), (length // 2, length - length // 2)):
            Actor.pause()
            if self._chance.random() < self.faults:
                raise OSError(errno.EIO, "injected")
            yield at, part
        Actor.pause()

    def __getattr__(self, name):
        return getattr(self.image, name)


# -- walks


class Guest:
    """A request of the guest; the thread that serves it may be another one by now."""

    def __init__(self, kind, offset, data):
        self.kind, self.offset, self.data = kind, offset, data
        self.end = offset + len(data)
        self.actor = None
        self.is_relieved = False

    def again(self):
        return Guest(self.kind, self.offset, self.data)

    def serve(self, disk):
        try:
            if self.kind == "write":
                return disk.write(self.data, self.offset)
            getattr(disk, self.kind)(len(self.data), self.offset)
            return len(self.data)
        except Abandoned:
            while not self.is_relieved:
                Actor.pause()
            raise


class Walk:
    """A disk with a mirror and what happens to it."""

    def __init__(self, seed):
        self.chance = chance = random.Random(seed)
        self.granularity = chance.choice([512, 1024, 4096])
        self.size = self.granularity * chance.randint(1, 12) - chance.choice(
            [0, 1, 300]
        )
        self.share = chance.choice([0, 0.002, 0.01, 0.05])
        self.impatience = chance.choice([0, 0.01])
        self.memory = MemoryImage(self.size, chance.randbytes(self.size))
        old = chance.choice([b"o" * self.size, b"", bytes(self.memory.data)])
        self.target_memory = MemoryImage(self.size, old)
        self.source = Halting(self.memory, chance, chance.choice([0, 0.05]))
        self.target = Halting(self.target_memory, chance, chance.choice([0, 0.05]))
        self.model = bytearray(self.memory.data)
        self.dirty = make_bits(self.size, self.granularity)
        self.copying = make_bits(self.size, self.granularity)
        self.begin()
        if old != self.memory.data:
            self.mirror.mark_dirty(0, self.size)
        if not old:
            self.mirror.mark_zero()

    def begin(self):
        """Be a daemon that has just begun."""
        requests = TurnRequests(self.chance, self.impatience)
        history = History(
            self.source, requests, CLUSTER, timeout=10.0, broke=lambda epoch, why: None
        )
        self.disk = Disk("disk", uuid4(), self.source, history)
        self.disk.requests = history.requests = requests
        self.mirror = self.disk.mirror = Mirror(
            self.size, self.granularity, self.dirty, self.copying, requests, 10.0
        )
        job = FakeBackup()
        self.copier = MirrorCopier(
            job, self.disk, self.mirror, Target(self.target), workers=1, buf_size=4096
        )
        self.guests = []
        # Those that are not guests, and those of guests that were given up.
        self.others = []
        self.hanging = []

    # -- who does something

    def actor(self, call):
        return Actor(call, self.chance, self.share)

    def begin_request(self):
        offset = self.chance.randrange(self.size)
        length_max = self.chance.choice([1, self.granularity, 3 * self.granularity])
        length = min(self.chance.randint(1, length_max), self.size - offset)
        if any(g.offset < offset + length and offset < g.end for g in self.guests):
            # What comes of that is up to chance.
            return
        kind = self.chance.choice(["write", "write", "zero", "discard"])
        is_data = kind == "write" and self.chance.random() < 0.9
        data = self.chance.randbytes(length) if is_data else bytes(length)
        self.serve(Guest(kind, offset, data))

    def serve(self, guest):
        guest.actor = self.actor(partial(guest.serve, self.disk))
        self.guests.append(guest)

    def copy(self):
        """Copy a run from anywhere on, as a worker does."""
        mirror = self.mirror
        start = self.chance.randrange(mirror.count)
        run = mirror.claim(start, mirror.count, self.chance.randint(1, 4))
        if run is not None:
            self.copier._copy_run(run, Outcome())

    def follow(self):
        target = Target(self.target)
        try:
            with drained([self.disk]):
                self.mirror.follow(Sink(target.write, target.punch))
        except Busy:
            pass

    def expire(self):
        for ident, error in self.disk.expire(FOREVER).items():
            assert error is None
            (guest,) = (g for g in self.guests if g.actor.ident == ident)
            guest.is_relieved = True
            self.guests.remove(guest)
            self.hanging.append(guest)
            self.serve(guest.again())

    def die(self):
        """Let the daemon die, and another one serve what was not answered."""
        self.dirty, self.copying = self.dirty.copy(), self.copying.copy()
        unanswered = self.guests
        for actor in [*self.others, *(g.actor for g in [*self.guests, *self.hanging])]:
            actor.kill()
        self.begin()
        for guest in unanswered:
            self.serve(guest.again())

    def forget(self):
        """Let the target lose what it had got: a flush has failed."""
        for granule in range(self.mirror.count):
            # Of zeroes that are lost: block/test_mirror.py.
            if self.chance.random() < 0.5 and not self.mirror.is_zero(
                granule, granule + 1
            ):
                at = self.extent(granule)
                self.target_memory.data[at] = b"f" * len(self.target_memory.data[at])
        self.mirror.redo()

    # -- a turn

    def turn(self):
        actors = self.actors()
        what = self.chance.random()
        if what < 0.001:
            self.die()
        elif what < 0.002 and not self.disk.requests.lock.locked():
            self.forget()
        elif what < 0.1 and len(self.guests) < 4:
            self.begin_request()
        elif what < 0.16 and len(self.others) < 3:
            self.others.append(self.actor(self.copy))
        elif what < 0.2 and len(self.others) < 5:
            self.others.append(self.actor(self.control()))
        elif actors:
            self.let_go_on(self.chance.choice(actors))
        self.check()

    def control(self):
        mirror = self.mirror
        calls = {
            self.follow: 6,
            mirror.mark_synced: 4,
            mirror.unfollow: 1,
            self.expire: 2,
            mirror.take_failure: 1,
            mirror.is_alike: 1,
        }
        return self.chance.choices(list(calls), list(calls.values()))[0]

    def actors(self):
        guests = [guest.actor for guest in self.guests + self.hanging]
        return guests + self.others

    def let_go_on(self, actor):
        actor.go()
        if not actor.is_over:
            return
        if actor in self.others:
            self.others.remove(actor)
            if actor.error is not None:
                raise actor.error
        for guest in self.hanging:
            if guest.actor is actor:
                assert isinstance(actor.error, Abandoned), actor.error
                self.hanging.remove(guest)
                return
        for guest in self.guests:
            if guest.actor is actor:
                self.answer(guest)
                return

    def answer(self, guest):
        actor = guest.actor
        self.guests.remove(guest)
        at = slice(guest.offset, guest.end)
        match actor.error:
            case None:
                written = guest.offset + actor.result
                self.model[guest.offset : written] = guest.data[: actor.result]
                if actor.result < len(guest.data):
                    # Halting has written more than it said.
                    self.model[at] = self.memory.data[at]
            case OSError() as e:
                assert e.strerror == "injected", "a guest heard of the target"
                self.model[at] = self.memory.data[at]
            case error:
                raise error

    # -- what has to hold after each turn

    def check(self):
        answered = [g for g in self.uncovered(self.guests) if self.differs(g)]
        lost = [g for g in answered if not (self.dirty[g] or self.copying[g])]
        assert lost == [], "these differ, and nobody knows"
        if self.mirror.is_synced:
            assert answered == [], "these differ, though the target has all"
        mirror = self.mirror
        assert mirror.left() >= 0
        for granule in self.uncovered(self.guests + self.hanging):
            if mirror.is_zero(granule, granule + 1) and not self.copying[granule]:
                at = self.extent(granule)
                assert not any(self.target_memory.data[at]), "it is not zero"

    def extent(self, granule):
        return slice(granule * self.granularity, (granule + 1) * self.granularity)

    def differs(self, granule):
        at = self.extent(granule)
        return self.memory.data[at] != self.target_memory.data[at]

    def uncovered(self, guests):
        """Return the granules that none of these requests writes to."""
        covered = set()
        for guest in guests:
            first, last = guest.offset, guest.end - 1
            covered.update(
                range(first // self.granularity, last // self.granularity + 1)
            )
        return [g for g in range(self.mirror.count) if g not in covered]

    def end(self):
        """Let all go on to their end, copy the rest, and compare."""
        self.source.faults = self.target.faults = 0
        for _ in range(200_000):
            actors = self.actors()
            if not actors:
                break
            self.let_go_on(self.chance.choice(actors))
            self.check()
        assert not self.actors(), "some wait for ever"
        mirror, requests = self.mirror, self.disk.requests
        assert not requests.writes
        assert not requests.is_drained
        assert not requests.lock.locked()
        assert not mirror._following
        assert not self.copying.any()
        assert not mirror.is_hanging
        assert self.memory.data == self.model

        outcome = Outcome()
        self.copier.copy_rest(FOREVER, outcome)

        assert outcome.error is None
        assert self.target_memory.data == self.memory.data
        assert mirror.left() == 0
        mirror.mark_synced()
        assert mirror.is_synced == mirror.is_following


# A daemon that dies here ends its threads by exceptions, in places that expect none.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seed", range(WALKS))
def test_whatever_happens_the_target_becomes_what_the_disk_is(seed):
    walk = Walk(seed)
    try:
        for _ in range(TURNS):
            walk.turn()
        walk.end()
    finally:
        for actor in walk.actors():
            actor.kill()


# -- schedules


def write(scene, text, offset):
    scene.disk.write(text.encode() * 100, offset)


def write_granules(scene, text, granule):
    scene.disk.write(clusters(text), granule * CLUSTER)


def write_to_bad_target(scene):
    scene.target_faults.arm("pwrite")
    write_granules(scene, "BB", 1)
    scene.target_faults.disarm()


class Torn:
    """A source that writes E, and says that it could not."""

    def __init__(self, image):
        self.image = image

    def pwrite(self, data, offset):
        written = self.image.pwrite(data, offset)
        if data[:1] == b"E":
            raise OSError(errno.EIO, "injected")
        return written

    def __getattr__(self, name):
        return getattr(self.image, name)


def write_in_vain(scene):
    with pytest.raises(OSError):
        write_granules(scene, "EE", 1)


def copy(scene, count):
    scene.copy(count)


def fail(scene):
    run = scene.mirror.claim(0, 4, 2)
    if run is not None:
        scene.mirror.fail(*run)


WRITES = {
    "write a": lambda scene: write_granules(scene, "A", 0),
    "write bc": lambda scene: write_granules(scene, "XY", 1),
    "write a to b": lambda scene: write(scene, "Z", CLUSTER - 50),
    "discard cd": lambda scene: scene.disk.discard(2 * CLUSTER, 2 * CLUSTER),
    "write bc in vain": write_in_vain,
}

COPIES = {
    "copy b": lambda scene: copy(scene, 1),
    "copy all": lambda scene: [copy(scene, 4), copy(scene, 4)],
    "fail": fail,
}

# While the mirror follows, or to let it.
CONTROLS = {
    "follow": Mirrored.follow,
    "unfollow": lambda scene: scene.mirror.unfollow(),
    "unfollow, write bc": lambda scene: [
        scene.mirror.unfollow(),
        WRITES["write bc"](scene),
    ],
    "unfollow, follow": lambda scene: [scene.mirror.unfollow(), scene.follow()],
    "mark synced": lambda scene: scene.mirror.mark_synced(),
    "write to bad target": write_to_bad_target,
}

CALLS = WRITES | COPIES | CONTROLS


def pairs():
    """Return the pairs of calls that can meet."""
    # One write of one granule is as good as one of two, and a failed one as any.
    firsts = [name for name in WRITES if name != "write a"]
    seconds = [name for name in WRITES if name not in ("write a", "write bc in vain")]
    meeting = itertools.chain(
        itertools.product(firsts, CALLS), itertools.product(COPIES | CONTROLS, seconds)
    )
    for first, second in meeting:
        for is_following in (False, True):
            if not is_following and {first, second} & (set(CONTROLS) - {"follow"}):
                continue
            mode = "following" if is_following else "background"
            yield pytest.param(
                first, second, is_following, id=f"{first}/{second}/{mode}"
            )


def make_scene(is_following):
    """Return a scene in which b and d are dirty, and differ."""
    scene = Mirrored(clusters("abcd"), clusters("a.c."))
    scene.source.image = Torn(scene.memory)
    for owner in (scene.memory, scene.target_memory):
        owner._lock = WatchedLock()
    for granule in (1, 3):
        scene.mirror.mark_dirty(granule * CLUSTER, (granule + 1) * CLUSTER)
    if is_following:
        scene.follow()
    return scene


def explain(error, schedule):
    error.add_note(f"the second came at {schedule.where}, line {schedule.line}")


@pytest.mark.parametrize(("first", "second", "is_following"), list(pairs()))
def test_a_call_is_interrupted_by_another_one(first, second, is_following):
    scenes = []
    states = [
        after(is_following, first, second),
        after(is_following, second, first),
    ]

    def make():
        scene = make_scene(is_following)
        scenes.append(scene)
        return scene.requests, *(
            partial(CALLS[name], scene) for name in (first, second)
        )

    for schedule, *outcomes in schedules(make):
        scene = scenes.pop()
        try:
            for outcome in outcomes:
                outcome.result()
            assert scene.on_source in states
            scene.check_end()
        except BaseException as e:
            explain(e, schedule)
            raise


def after(is_following, *names):
    """Return what is on the source after some calls, one after the other."""
    scene = make_scene(is_following)
    for name in names:
        CALLS[name](scene)
    return scene.on_source


@pytest.mark.parametrize("name", [name for name in WRITES if "vain" not in name])
def test_a_write_expires_and_all_is_overwritten_before_it_comes_back(name):
    scenes = []

    def make():
        scene = make_scene(is_following=True)
        scenes.append(scene)

        def expire():
            late = scene.disk.expire(FOREVER)
            if late:
                WRITES[name](scene)
            write_granules(scene, "VVVV", 0)
            copy(scene, 4)
            return len(late)

        return scene.requests, partial(WRITES[name], scene), expire

    hung = 0
    for schedule, request, expiry in schedules(make):
        scene = scenes.pop()
        try:
            late = expiry.result()
            hung += late
            assert isinstance(request.error(), Abandoned) == bool(late)
            if not late:
                request.result()
            assert not scene.mirror.is_hanging
            scene.check_end()
        except BaseException as e:
            explain(e, schedule)
            raise
    assert hung


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("is_following", [False, True])
def test_the_daemon_dies_while_a_write_or_a_copy_is_under_way(name, is_following):
    """Both stand where they are; what they were doing is found by the next daemon."""
    found = []

    def make():
        scene = make_scene(is_following)

        def look():
            """Copy a run in part, and look at the bits as the next daemon does."""
            run = scene.mirror.claim(0, 4, 1)
            if run is not None:
                scene.bring(run, b"?" * 10)
            known = scene.dirty | scene.copying
            found.append(
                [granule for granule in scene.differing() if not known[granule]]
            )
            if run is not None:
                scene.mirror.fail(*run)

        return scene.requests, partial(WRITES[name], scene), look

    for schedule, *outcomes in schedules(make):
        for outcome in outcomes:
            outcome.result()
        assert found.pop() == [], f"these differ at {schedule.where}, and nobody knows"


@pytest.mark.parametrize("is_following", [False, True])
@pytest.mark.parametrize("name", ["write a", "discard cd"])
def test_a_mirror_ends_during_a_write(name, is_following):
    scenes = []

    def make():
        scene = make_scene(is_following)
        scenes.append(scene)

        def end():
            scene.disk.mirror = None
            scene.mirror.unfollow()

        return scene.requests, partial(WRITES[name], scene), end

    for schedule, *outcomes in schedules(make):
        scene = scenes.pop()
        try:
            for outcome in outcomes:
                outcome.result()
            assert scene.on_source == after(is_following, name)
        except BaseException as e:
            explain(e, schedule)
            raise
