"""Random walks of backups of one disk, step by step, beside its guest and snapshots.

What a worker does in one go is done here in its steps: claim, read, write, release.
Between any two of them, and within a read, there may be anything: guests' writes, other
workers, other jobs, a pause, a cancel, snapshots, errors, a crash of the daemon. After
every step what a job has released is on its target, exactly as it was at its instant;
in the end all is, and nothing is left preserved.

    FLEECEFS_EXAMPLES=5000 python -m pytest tests/test_backup_model.py    walks longer
"""

import errno
import os
from functools import partial
from unittest import mock

from bitarray import bitarray
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget
from fleecefs.jobs import copy
from fleecefs.jobs.copy import Copier
from fleecefs.jobs.options import Sync
from fleecefs.jobs.target import Target
from tests.jobs.fakes import FakeBackup
from tests.support.copying import take_private
from tests.support.disks import (
    BREAK_GUEST_WRITE,
    CLUSTER,
    delete_snapshot,
    make_disk,
    make_tier,
    take_snapshot,
)
from tests.support.faulty import Faulty

COUNT = 24
JOBS_MAX = 3
WORKERS_MAX = 4

places = st.tuples(st.integers(0, COUNT), st.integers(-2, 2))
lengths = st.one_of(st.integers(0, 5 * CLUSTER), st.sampled_from([1, CLUSTER]))
numbers = st.integers(0, 100)


def is_injected(error):
    """Whether it is one that the walk has asked for."""
    return error.errno in (errno.EIO, errno.ENOSPC) and error.strerror.startswith(
        "injected"
    )


class Interrupted:
    """A source in whose reads something else may come, before or after the read.

    Workers use `pread_into`, guests' writes that preserve use `pread`.
    """

    def __init__(self, image):
        self.image = image
        self.before = self.after = self.preserving = None

    def pread(self, length, offset):
        data = self.image.pread(length, offset)
        preserving, self.preserving = self.preserving, None
        if preserving is not None:
            preserving()
        return data

    def pread_into(self, buffer, offset):
        before, after = self.before, self.after
        self.before = self.after = None
        if before is not None:
            before()
        self.image.pread_into(buffer, offset)
        if after is not None:
            after()

    def __getattr__(self, name):
        return getattr(self.image, name)


class Walked:
    """A job, its workers' chunks by what they wait for, and what it has to bring."""

    def __init__(self, machine, sync, is_blank, is_urgent):
        disk = machine.disk
        tiers = [
            make_tier(disk, "ram", budget=Budget(None, "ram", within=machine.ram)),
            make_tier(disk, "disk", budget=Budget(None, "d", within=machine.store)),
        ]
        self.machine = machine
        self.sync = sync
        self.is_urgent = is_urgent
        self.is_paused = False
        self.data = bytes(machine.memory.data)
        self.allocated = allocated(machine.memory)
        self.snapshot = take_private(disk, *tiers, on_cbw_error=BREAK_GUEST_WRITE)
        self.snapshot.epoch.has_holes = sync is Sync.TOP
        disk.history._adapt()
        self.old = bytes(disk.size) if is_blank else b"o" * disk.size
        self.image = MemoryImage(disk.size, b"" if is_blank else self.old)
        self.target = Faulty(self.image)
        self.is_blank = is_blank
        self.begin()

    def begin(self):
        """Have a new daemon's Copier, and no worker in the middle of anything."""
        job = FakeBackup()
        job.progress.remaining = 0
        history = self.machine.disk.history
        self.copier = Copier(
            job,
            self.snapshot,
            history,
            Target(self.target, is_blank=self.is_blank),
            sync=self.sync,
            workers=WORKERS_MAX,
            is_urgent=lambda: self.is_urgent,
        )
        self.copier._can_clone = self.machine.clones
        self.copier._target.clone = self.clone
        self.note = self.copier.todo.note
        history.watch(self.note)
        self.claimed, self.read, self.written = [], [], []

    def clone(self, source, length, offset):
        """Share a range, as some file systems do; the guest may come in between."""
        buffer = memoryview(bytearray(length))
        source.pread_into(buffer, offset)
        self.image.pwrite(buffer, offset)

    def die(self):
        self.machine.disk.history.unwatch(self.note)
        # What is on the target may be more than what is known to be there.
        self.is_blank = False
        self.begin()

    def end(self):
        self.machine.disk.history.unwatch(self.note)
        delete_snapshot(self.machine.disk, self.snapshot)

    @property
    def in_flight(self):
        return len(self.claimed) + len(self.read) + len(self.written)

    def check(self):
        """What is released is on the target; the rest is what it was, or on its way."""
        denied = self.snapshot.epoch.denied
        for cluster in denied.search(bitarray("1")):
            if cluster < self.copier.todo.count:
                self.check_cluster(cluster)

    def check_cluster(self, cluster):
        at = slice(cluster * CLUSTER, (cluster + 1) * CLUSTER)
        found = bytes(self.image.data[at])
        if self.sync is Sync.TOP and cluster not in self.allocated:
            # Left alone.
            assert found == self.old[at], cluster
        else:
            assert found == self.data[at], cluster


def allocated(memory):
    """Return the clusters of an image that are no holes."""
    size = memory.size
    ends = {at: min(at + CLUSTER, size) for at in range(0, size, CLUSTER)}
    return {at // CLUSTER for at, end in ends.items() if memory.find_data(at) < end}


class Backups(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        # Chunks of four clusters.
        self.patch = mock.patch.object(copy, "CHUNK_SIZE_MAX", 4 * CLUSTER)
        self.patch.start()
        self.steps = 0

    @initialize(
        size=st.sampled_from([COUNT * CLUSTER, COUNT * CLUSTER - 1, 4097, 1]),
        holes=st.sets(st.integers(0, COUNT - 1)),
        zeroes=st.sets(st.integers(0, COUNT - 1)),
        ram=st.sampled_from([None, 0, 3 * CLUSTER]),
        clones=st.booleans(),
        sync=st.sampled_from(Sync),
        is_blank=st.booleans(),
        is_urgent=st.booleans(),
    )
    def begin(self, size, holes, zeroes, ram, clones, sync, is_blank, is_urgent):
        self.memory = MemoryImage(size)
        for cluster in range(-(-size // CLUSTER)):
            if cluster not in holes:
                letter = 0 if cluster in zeroes else 65 + cluster
                length = min(CLUSTER, size - cluster * CLUSTER)
                self.memory.pwrite(bytes([letter]) * length, cluster * CLUSTER)
        self.source = Faulty(self.memory)
        self.interrupted = Interrupted(self.source)
        self.disk = make_disk(source=self.interrupted)
        self.ram, self.store = Budget(ram, "ram"), Budget(None, "disk")
        self.clones = clones
        self.jobs = []
        self.snapshots = []
        self.jobs.append(Walked(self, sync, is_blank, is_urgent))

    def teardown(self):
        if hasattr(self, "jobs"):
            self.source.disarm()
            while self.jobs:
                self.finish(self.jobs.pop(0))
            for snapshot, _ in self.snapshots:
                delete_snapshot(self.disk, snapshot)
            assert self.ram.used == self.store.used == 0
            assert self.disk.history.epochs == []
        self.patch.stop()

    def pick(self, number):
        return self.jobs[number % len(self.jobs)]

    def place(self, place):
        cluster, more = place
        return min(max(0, cluster * CLUSTER + more), self.disk.size)

    # Weighed: what a walk is made of, most of all. Names of methods below.
    ACTIONS = (
        *("guest",) * 6,
        *("read", "write", "release") * 5,
        *("survey", "claim") * 3,
        *("start", "break_source", "break_target", "go_on") * 2,
        *("take", "delete", "pause", "resume", "cancel", "complete", "crash"),
    )

    @rule(action=st.sampled_from(ACTIONS), draw=st.data())
    def act(self, action, draw):
        if not self.jobs:
            action = "start"
        getattr(self, action)(draw.draw)

    # -- guests and snapshots

    def guest(self, draw):
        place, length, how = (
            draw(places),
            draw(lengths),
            draw(st.sampled_from("wwwwzd")),
        )
        meanwhile = draw(st.one_of(st.none(), st.none(), numbers))
        if meanwhile is not None and self.jobs:
            # While it preserves, a job gets on.
            self.interrupted.preserving = lambda: self.get_on(self.pick(meanwhile))
        self.overwrite(place, length, how)
        self.interrupted.preserving = None

    def overwrite(self, place, length, how):
        self.steps += 1
        offset = self.place(place)
        length = min(length, self.disk.size - offset)
        data = bytes([self.steps % 200 + 56 if how == "w" else 0]) * length
        try:
            if how == "d":
                self.disk.discard(length, offset)
            elif length:
                self.disk.write(data, offset)
        except OSError as e:
            # The source was told to fail; the snapshots stay good.
            if not is_injected(e):
                raise

    def take(self, draw):
        if len(self.snapshots) == 2:
            return
        tiers = [make_tier(self.disk, budget=self.store)]
        snapshot = take_snapshot(self.disk, *tiers, on_cbw_error=BREAK_GUEST_WRITE)
        self.snapshots.append((snapshot, bytes(self.memory.data)))

    def delete(self, draw):
        if not self.snapshots:
            return
        number = draw(numbers)
        snapshot, _ = self.snapshots.pop(number % len(self.snapshots))
        delete_snapshot(self.disk, snapshot)

    def break_source(self, draw):
        on = draw(st.sampled_from(["", "pread", "find_data"]))
        nth, count = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        self.source.arm(on, nth=nth, count=count)

    # -- jobs

    def start(self, draw):
        if len(self.jobs) == JOBS_MAX:
            return
        sync, is_blank = draw(st.sampled_from(Sync)), draw(st.booleans())
        is_urgent = draw(st.booleans())
        self.jobs.append(Walked(self, sync, is_blank, is_urgent))

    def pause(self, draw):
        self.pick(draw(numbers)).is_paused = True

    def resume(self, draw):
        self.pick(draw(numbers)).is_paused = False

    def cancel(self, draw):
        number = draw(numbers)
        job = self.pick(number)
        self.jobs.remove(job)
        job.end()

    def complete(self, draw):
        number = draw(numbers)
        self.source.disarm()
        job = self.pick(number)
        self.jobs.remove(job)
        self.finish(job)

    def crash(self, draw):
        for job in self.jobs:
            job.die()

    def break_target(self, draw):
        number, nth = draw(numbers), draw(st.integers(1, 2))
        on = draw(st.sampled_from(["pwrite", "discard"]))
        code = draw(st.sampled_from([errno.EIO, errno.ENOSPC]))
        self.pick(number).target.arm(on, nth=nth, code=code)

    def survey(self, draw):
        number = draw(numbers)
        job = self.pick(number)
        if not job.is_paused and not job.copier._survey.is_done:
            self.try_survey(job)

    def try_survey(self, job):
        try:
            job.copier._survey.step()
        except OSError as e:
            if not is_injected(e):
                raise

    def claim(self, draw):
        number = draw(numbers)
        job = self.pick(number)
        self.try_claim(job)

    def try_claim(self, job):
        if job.is_paused or job.in_flight == WORKERS_MAX:
            return
        chunk = job.copier.todo.claim()
        if chunk is not None:
            job.claimed.append(chunk)

    def read(self, draw):
        number, which = draw(numbers), draw(numbers)
        job = self.pick(number)
        if not job.claimed:
            self.try_claim(job)
        if not job.claimed:
            return
        chunk = job.claimed.pop(which % len(job.claimed))
        for when in draw(st.sampled_from([(), ("before",), ("after",)])):
            # In the chunk, most likely.
            place = (
                draw(st.integers(chunk.first, chunk.stop)),
                draw(st.integers(-2, 2)),
            )
            write = partial(self.overwrite, place, draw(lengths), "w")
            setattr(self.interrupted, when, write)
        self.try_read(job, chunk)
        self.interrupted.before = self.interrupted.after = None

    def try_read(self, job, chunk):
        copier = job.copier
        try:
            if copier._can_clone and copier._clone(chunk):
                return
            chunk.buffer = copier._read(chunk)
        except OSError as e:
            if not is_injected(e):
                raise
            copier.todo.postpone(chunk)
        else:
            job.read.append(chunk)

    def write(self, draw):
        number, which = draw(numbers), draw(numbers)
        job = self.pick(number)
        if job.read:
            self.try_write(job, job.read[which % len(job.read)])

    def try_write(self, job, chunk):
        try:
            job.copier._write(chunk.buffer, chunk)
        except OSError as e:
            if not is_injected(e):
                raise
            return
        job.read.remove(chunk)
        job.written.append(chunk)

    def release(self, draw):
        number, which = draw(numbers), draw(numbers)
        job = self.pick(number)
        if job.written:
            chunk = job.written.pop(which % len(job.written))
            job.copier._release(chunk.first, chunk.stop)
            job.copier._buffers.append(chunk.buffer)

    def go_on(self, draw):
        number = draw(numbers)
        job = self.pick(number)
        if not job.is_paused:
            self.get_on(job)

    def get_on(self, job):
        """Take each chunk that a worker has as far as it comes, and one more."""
        copier = job.copier
        if not copier._survey.is_done:
            self.try_survey(job)
        chunk = copier.todo.claim()
        if chunk is not None:
            job.claimed.append(chunk)
        for chunk in [*job.claimed]:
            job.claimed.remove(chunk)
            self.try_read(job, chunk)
        for chunk in [*job.read]:
            self.try_write(job, chunk)
        for chunk in [*job.written]:
            job.written.remove(chunk)
            copier._release(chunk.first, chunk.stop)

    def finish(self, job):
        """Let a job come to its end."""
        copier = job.copier
        for _ in range(10_000):
            self.get_on(job)
            if copier._survey.is_done and not job.in_flight:
                chunk = copier.todo.claim()
                if chunk is None:
                    break
                job.claimed.append(chunk)
        else:
            raise AssertionError("it does not end")
        job.check()
        denied = job.snapshot.epoch.denied[: copier.todo.count]
        if job.sync is not Sync.NONE:
            assert denied.all()
        assert not any(job.snapshot.preserved_runs(~denied))
        job.end()

    # -- always

    @invariant()
    def what_is_released_is_on_the_target(self):
        for job in getattr(self, "jobs", []):
            assert job.snapshot.lost is None
            job.check()

    @invariant()
    def snapshots_are_exact(self):
        if not getattr(self, "snapshots", []):
            return
        on, self.source._on = self.source._on, ""
        for snapshot, data in self.snapshots:
            assert snapshot.read(self.disk.size, 0) == data
        self.source._on = on

    @invariant()
    def what_no_one_needs_is_not_kept(self):
        if hasattr(self, "jobs") and not self.jobs and not self.snapshots:
            assert self.ram.used == self.store.used == 0


TestBackups = Backups.TestCase
TestBackups.settings = settings(
    max_examples=int(os.environ.get("FLEECEFS_EXAMPLES", "100")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
