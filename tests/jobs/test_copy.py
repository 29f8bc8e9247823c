"""The copy engine: what it copies, in which order, past which errors."""

import errno
import random
import threading
import time

import pytest
import trio

from fleecefs.block.disk import Disk
from fleecefs.block.memory import MemoryImage
from fleecefs.errors import SnapshotLost
from fleecefs.jobs import copy
from fleecefs.jobs.copy import CHUNK_SIZE_MAX, Todo
from fleecefs.jobs.options import OnError, Sync
from fleecefs.jobs.status import JobStatus
from tests.support.copying import (
    CopyJob,
    preserved_now,
    take_private,
    tiers_of,
    wait_for,
)
from tests.support.disks import (
    CLUSTER,
    clusters,
    delete_snapshot,
    letters,
    make_disk,
    make_tier,
    take_snapshot,
)
from tests.support.faulty import Faulty, Full
from tests.support.gate import Gate
from tests.support.running import Running

pytestmark = pytest.mark.logs("job job0 (pauses|failed)")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Try again at once what is to be tried again."""
    monkeypatch.setattr(copy, "RETRY_SECONDS", 0.001)


def claims(todo):
    """Return all that can be claimed, in order: first and stop."""
    found = []
    while (chunk := todo.claim()) is not None:
        found.append((chunk.first, chunk.stop))
    return found


def todo_of(disk, snapshot, sync=Sync.FULL, *, is_urgent=False):
    """Return a Todo that hears of the guest's writes, all surveyed."""
    todo = Todo(snapshot, sync, lambda: is_urgent)
    todo.surveyed = todo.count
    disk.history.watch(todo.note)
    return todo


# -- what comes next


def test_clusters_are_claimed_once_and_in_order():
    disk = make_disk(clusters("a" * 600))

    todo = todo_of(disk, take_private(disk))

    assert claims(todo) == [(0, 256), (256, 512), (512, 600)]


def test_a_chunk_is_no_larger_than_a_cluster_that_is_large():
    disk = make_disk(bytes(5 << 20), cluster_size=2 << 20)

    todo = todo_of(disk, take_private(disk))

    assert claims(todo) == [(0, 1), (1, 2), (2, 3)]
    assert todo.size_of(2, 3) == 1 << 20


def test_the_disk_tier_comes_last():
    disk = make_disk(clusters("aaaaaaaa"))
    snapshot = take_private(disk, *tiers_of(disk, ram=0))
    todo = todo_of(disk, snapshot)
    disk.write(clusters("bb"), 0)
    disk.write(clusters("b"), 4 * CLUSTER)

    # With what lies among the clusters that come first; one chunk costs less than two.
    assert claims(todo) == [(2, 8), (0, 2)]


def test_ram_comes_in_its_turn_while_it_has_room():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)))
    disk.write(clusters("b"), 550 * CLUSTER)

    assert claims(todo) == [(0, 256), (256, 512), (512, 600)]


def test_ram_comes_first_when_it_fills():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), is_urgent=True)
    disk.write(clusters("bb"), 550 * CLUSTER)

    first = todo.claim()

    assert (first.first, first.stop) == (550, 552)
    assert first.is_urgent
    assert claims(todo) == [(0, 256), (256, 512), (512, 550), (552, 600)]


def test_neighbours_in_ram_make_one_chunk_though_written_one_by_one():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), is_urgent=True)
    for index in range(300, 310):
        disk.write(clusters("b"), index * CLUSTER)

    chunk = todo.claim()

    # And so many in RAM take the others of that MiB with them.
    assert (chunk.first, chunk.stop) == (300, 310)


def test_many_in_ram_take_what_is_between_with_them():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), is_urgent=True)
    for index in range(300, 600, 4):
        disk.write(clusters("b"), index * CLUSTER)

    chunk = todo.claim()

    assert (chunk.first, chunk.stop) == (300, 556)


def test_what_is_urgent_gets_half_of_the_time():
    disk = make_disk(clusters("a" * 3000))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), is_urgent=True)
    for index in range(1000, 3000, 100):
        disk.write(clusters("b"), index * CLUSTER)
    kinds = []
    for _ in range(8):
        chunk = todo.claim()
        kinds.append("u" if chunk.is_urgent else "-")
        # An urgent chunk is quick, the other takes three times as long.
        chunk.seconds = 1 / 64 if chunk.is_urgent else 3 / 64
        todo.count_time(chunk)

    assert "".join(kinds) == "u-uuu-uu"


def test_of_sync_none_only_what_was_overwritten_is_claimed():
    disk = make_disk(clusters("aa.aaaaa"))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk, ram=CLUSTER)), Sync.NONE)
    assert todo.claim() is None

    disk.write(clusters("bb"), 5 * CLUSTER)
    disk.write(clusters("b"), 2 * CLUSTER)
    disk.write(clusters("b"), 2 * CLUSTER)

    assert claims(todo) == [(5, 7), (2, 3)]


def test_what_was_preserved_before_is_found():
    disk = make_disk(clusters("aaaaaaaa"))
    snapshot = take_private(disk, *tiers_of(disk))
    disk.write(clusters("b"), 6 * CLUSTER)
    disk.write(clusters("b"), 1 * CLUSTER)

    todo = todo_of(disk, snapshot, Sync.NONE)

    assert claims(todo) == [(1, 2), (6, 7)]


def test_nothing_is_forgotten_when_too_much_is_to_be_remembered(monkeypatch):
    monkeypatch.setattr(copy, "_NOTES_MAX", 4)
    disk = make_disk(clusters("a" * 64))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), Sync.NONE)
    for index in range(0, 64, 2):
        disk.write(clusters("b"), index * CLUSTER)

    found = []
    for index in range(1, 64, 4):
        found += [todo.claim(), todo.claim()]
        disk.write(clusters("b"), index * CLUSTER)
    spans = [(c.first, c.stop) for c in found if c] + claims(todo)

    claimed = [index for first, stop in spans for index in range(first, stop)]
    assert sorted(claimed) == sorted([*range(0, 64, 2), *range(1, 64, 4)])


def test_a_disk_tier_with_more_than_can_be_remembered_comes_last_too(monkeypatch):
    monkeypatch.setattr(copy, "_NOTES_MAX", 4)
    disk = make_disk(clusters("a" * 64))
    snapshot = take_private(disk, *tiers_of(disk, ram=0))
    for index in range(0, 64, 2):
        disk.write(clusters("b"), index * CLUSTER)

    spans = claims(todo_of(disk, snapshot))

    assert sorted(index for a, b in spans for index in range(a, b)) == [*range(64)]


def test_what_could_not_be_read_comes_last_and_in_halves():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk))
    bad = todo.claim()
    todo.postpone(bad)

    assert claims(todo) == [(256, 512), (512, 600), (0, 128), (128, 256)]


def batches(todo):
    """Claim everything, as workers do."""
    found = []
    while chunks := todo.claim_some():
        found.append([(chunk.first, chunk.stop) for chunk in chunks])
    return found


def test_small_chunks_come_together():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk, *tiers_of(disk)), is_urgent=True)
    disk.write(clusters("b"), 550 * CLUSTER)
    disk.write(clusters("b"), 580 * CLUSTER)

    assert batches(todo) == [
        [(550, 551), (580, 581), (0, 256)],
        [(256, 512)],
        [(512, 550), (551, 580), (581, 600)],
    ]


def test_what_is_tried_again_comes_alone():
    disk = make_disk(clusters("a" * 600))
    todo = todo_of(disk, take_private(disk))
    todo.postpone(todo.claim())

    assert batches(todo) == [[(256, 512)], [(512, 600)], [(0, 128)], [(128, 256)]]


# -- what is copied


SIZES = [1, 511, 512, 4095, 4096, 4097, 8192, 40_000, 3 * CHUNK_SIZE_MAX + 5]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("workers", [1, 3, 24])
async def test_a_copy_is_exact(size, workers):
    data = random.Random(size).randbytes(size)
    disk = make_disk(data)
    job = CopyJob(disk, workers=workers)

    await job.live()

    assert job.error is None
    assert job.result == data
    assert (job.progress.current, job.progress.remaining) == (size, 0)


@pytest.mark.parametrize("is_blank", [True, False])
@pytest.mark.parametrize("size", [4097, 16 * 4096, 70_000])
async def test_holes_become_holes(size, is_blank):
    source = MemoryImage(size)
    source.pwrite(b"x" * min(size - 4096, 4096), 4096)
    disk = make_disk(source=source)
    target = MemoryImage(size, b"" if is_blank else (b"old" * size)[:size])
    job = CopyJob(disk, target, is_blank=is_blank)

    await job.live()

    assert job.result == bytes(source.data)
    # A last page that is cut short is not known to be a hole.
    assert target.allocated() <= 2 * 4096


async def test_zeroes_become_holes():
    disk = make_disk(clusters("." * 300 + "a" * 300))
    job = CopyJob(disk)

    await job.live()

    assert job.image.find_data(0) == 256 * CLUSTER
    assert job.result == clusters("." * 300 + "a" * 300)


async def test_nothing_is_read_where_there_is_a_hole():
    source = MemoryImage(64 << 20)
    source.pwrite(b"x", 5 << 20)
    gate = Reading(source)
    disk = make_disk(source=gate)
    job = CopyJob(disk, Writing(64 << 20), is_blank=True)

    await job.live()

    assert gate.length == 4096
    assert job.image.written == [(5 << 20, 4096)]


@pytest.mark.parametrize("sync", [Sync.FULL, Sync.TOP])
async def test_a_hole_that_is_a_part_of_a_cluster_is_copied_with_it(sync):
    source = MemoryImage(8 * 16384)
    for page in (0, 7, 8, 13, 31):
        source.pwrite(b"x" * 4096, page * 4096)
    disk = make_disk(source=source, cluster_size=16384)
    job = CopyJob(disk, MemoryImage(disk.size, b"o" * disk.size), sync=sync)

    await job.live()

    data = bytes(source.data)
    if sync is Sync.TOP:
        # Clusters 4, 5 and 6 have no data.
        data = data[: 4 * 16384] + b"o" * (3 * 16384) + data[7 * 16384 :]
    assert job.result == data


class Sharing:
    """What a file system does that shares; `meanwhile` comes before it is done."""

    def __init__(self, job):
        self.job = job
        self.shared = 0
        self.meanwhile = []
        job.target.clone = self

    def __call__(self, source, length, offset):
        for call in self.meanwhile:
            call()
        self.meanwhile = []
        self.job.image.pwrite(source.pread(length, offset), offset)
        self.shared += length


async def test_what_is_on_the_source_is_shared_if_that_is_possible():
    disk = make_disk(clusters("a" * 600 + "..bb"))
    job = CopyJob(disk)
    disk.write(clusters("nn"), 300 * CLUSTER)
    sharing = Sharing(job)

    await job.live()

    assert job.result == clusters("a" * 600 + "..bb")
    # At least all chunks without what was overwritten.
    assert 300 * CLUSTER <= sharing.shared <= disk.size - 2 * CLUSTER


@pytest.mark.parametrize("letter", "a.")
async def test_what_was_overwritten_before_it_was_shared_is_copied_again(letter):
    disk = make_disk(clusters(letter * 600))
    job = CopyJob(disk, workers=1)
    sharing = Sharing(job)
    # Also where it was zeroes and the target would not need any.
    sharing.meanwhile = [lambda: disk.write(clusters("nn"), 10 * CLUSTER)]

    await job.live()

    assert job.result == clusters(letter * 600)


class Reading:
    """An image that counts what is read of it."""

    def __init__(self, image):
        self.image = image
        self.length = 0

    def pread_into(self, buffer, offset):
        self.length += len(buffer)
        self.image.pread_into(buffer, offset)

    def __getattr__(self, name):
        return getattr(self.image, name)


class Writing:
    """A target that remembers what was written and keeps none of it."""

    def __init__(self, size):
        self.size = size
        self.written = []
        self.punched = []
        self.data = b""

    def pwrite(self, data, offset):
        self.written.append((offset, len(data)))
        return len(data)

    def discard(self, length, offset):
        self.punched.append((offset, length))


class Sparse:
    """A source of any size: data at some offsets, each of `length`, else a hole."""

    def __init__(self, size, places, length):
        self.size = size
        self.places = places
        self.length = length

    def pread_into(self, buffer, offset):
        buffer[:] = b"d" * len(buffer)

    def pread(self, length, offset):
        return b"d" * length

    def pwrite(self, data, offset):
        return len(data)

    def find_data(self, offset):
        for place in self.places:
            if offset < place + self.length:
                return max(offset, place)
        return self.size

    def find_hole(self, offset):
        for place in self.places:
            if place <= offset < place + self.length:
                return place + self.length
        return offset

    def allocated(self):
        return len(self.places) * self.length


@pytest.mark.parametrize("is_blank", [True, False])
async def test_a_sparse_disk_of_a_tebibyte_takes_no_time(is_blank):
    size = 1 << 40
    places = [0, 5 << 30, 700 << 30, size - (1 << 20)]
    disk = make_disk(source=Sparse(size, places, 1 << 20), cluster_size=16384)
    tier = make_tier(disk, image=Writing(size))
    job = CopyJob(
        disk, Writing(size), is_blank=is_blank, snapshot=take_private(disk, tier)
    )
    begin = time.monotonic()

    await job.live()

    assert time.monotonic() - begin < 5
    assert sorted(job.image.written) == [(place, 1 << 20) for place in places]
    assert job.progress.current == size
    punched = sum(length for _, length in job.image.punched)
    assert punched == (0 if is_blank else size - (4 << 20))


async def test_top_leaves_alone_what_is_not_allocated():
    source = MemoryImage(8 * CLUSTER)
    source.pwrite(clusters("a"), 2 * CLUSTER)
    source.pwrite(clusters("."), 5 * CLUSTER)
    disk = make_disk(source=source)
    job = CopyJob(disk, MemoryImage(disk.size, clusters("oooooooo")), sync=Sync.TOP)

    await job.live()

    assert letters(job.result) == "ooaoo.oo"
    assert (job.progress.current, job.progress.total) == (2 * CLUSTER, 2 * CLUSTER)


async def test_top_is_of_the_instant():
    source = MemoryImage(8 * CLUSTER)
    source.pwrite(clusters("a"), 2 * CLUSTER)
    disk = make_disk(source=source)
    job = CopyJob(disk, MemoryImage(disk.size, clusters("oooooooo")), sync=Sync.TOP)
    source.pwrite(bytes(CLUSTER), 6 * CLUSTER)
    disk.discard(CLUSTER, 2 * CLUSTER)
    take_snapshot(disk)
    disk.write(clusters("bb"), 6 * CLUSTER)

    await job.live()

    # One was zeroes and one was a hole: what overwrites them knows.
    assert letters(job.result) == "ooaooo.o"


async def test_none_copies_what_is_overwritten_and_never_ends():
    disk = make_disk(clusters("aaa.aaaa"))
    job = CopyJob(disk, MemoryImage(disk.size, clusters("oooooooo")), sync=Sync.NONE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        disk.write(clusters("b"), 0)
        await wait_for(lambda: letters(job.result) == "aooooooo")

        disk.write(clusters("bb"), 2 * CLUSTER)
        await wait_for(lambda: letters(job.result) == "aoa.oooo")
        assert preserved_now(job.snapshot) == 0
        await wait_for(lambda: not job._in_flight)
        assert job.status is JobStatus.RUNNING
        job.cancel()

    assert job.is_cancelled


async def test_the_last_of_none_can_be_brought_after_its_end():
    disk = make_disk(clusters("aaaaaaaa"))
    job = CopyJob(disk, sync=Sync.NONE, speed=1)
    disk.write(clusters("bbbbbb"), 0)

    await job.make_copier(is_last=True).run()

    assert letters(job.result) == "aaaaaa.."


# -- what it costs


async def test_what_is_copied_is_preserved_no_more():
    disk = make_disk(clusters("a" * 512))
    job = CopyJob(disk)
    disk.write(clusters("b"), 100 * CLUSTER)
    assert preserved_now(job.snapshot) == CLUSTER

    await job.live()

    assert preserved_now(job.snapshot) == 0
    disk.write(clusters("c" * 512), 0)
    assert preserved_now(job.snapshot) == 0
    assert disk.history.copied == CLUSTER


async def test_ram_is_given_back_while_copying():
    disk = make_disk(clusters("a" * 1024))
    gate = Gate(MemoryImage(disk.size))
    ram, store = tiers_of(disk)
    job = CopyJob(disk, gate, snapshot=take_private(disk, ram, store), workers=1)
    disk.write(clusters("b"), 10 * CLUSTER)
    disk.write(clusters("b"), 600 * CLUSTER)
    stay = gate.hold("pwrite")
    last = gate.hold("pwrite")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)
        assert ram.used == 2 * CLUSTER
        stay.release()

        await trio.to_thread.run_sync(last.wait_arrived)

        assert ram.used == CLUSTER
        last.release()
    assert job.result == clusters("a" * 1024)


async def test_the_guest_never_waits_for_the_target():
    disk = make_disk(clusters("a" * 512))
    gate = Gate(MemoryImage(disk.size))
    job = CopyJob(disk, gate, workers=2)
    stays = [gate.hold("pwrite"), gate.hold("pwrite")]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        for stay in stays:
            await trio.to_thread.run_sync(stay.wait_arrived)

        # Every cluster, also those that are on their way to the target just now.
        write = Running(disk.write, clusters("b" * 512), 0)
        assert not write.wait_waiting()
        assert write.result() == 512 * CLUSTER

        for stay in stays:
            stay.release()
    assert job.result == clusters("a" * 512)


async def test_the_guest_does_not_wait_for_a_worker_that_reads():
    gate = Gate(MemoryImage(8 * CLUSTER, clusters("aaaaaaaa")))
    disk = make_disk(source=gate)
    job = CopyJob(disk, workers=1)
    stay = gate.hold("pread")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)

        write = Running(disk.write, clusters("bb"), 3 * CLUSTER)
        assert not write.wait_waiting()
        write.result()

        stay.release()
    # The worker has read new data, and did not take it.
    assert letters(job.result) == "aaaaaaaa"


async def test_what_a_worker_read_before_it_was_overwritten_is_good():
    gate = Gate(MemoryImage(8 * CLUSTER, clusters("aaaaaaaa")))
    disk = make_disk(source=gate)
    job = CopyJob(disk, workers=1)
    stay = gate.hold("pread", after=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)
        disk.write(clusters("bb"), 3 * CLUSTER)
        stay.release()

    assert letters(job.result) == "aaaaaaaa"


async def test_ram_is_given_back_when_a_copy_came_too_late():
    """A cluster is released while a guest's write is preserving it."""
    gate = Gate(MemoryImage(8 * CLUSTER, clusters("aaaaaaaa")))
    disk = make_disk(source=gate)
    ram, store = tiers_of(disk)
    snapshot = take_private(disk, ram, store)
    stay = gate.hold("pread", after=True)
    write = Running(disk.write, clusters("bb"), 3 * CLUSTER)
    await trio.to_thread.run_sync(stay.wait_arrived)
    job = CopyJob(disk, snapshot=snapshot)

    await job.live()
    stay.release()
    write.result()

    assert letters(job.result) == "aaaaaaaa"
    assert ram.used == 0


# -- rest, speed, end


async def test_a_paused_job_preserves_and_does_not_copy():
    disk = make_disk(clusters("a" * 2048))
    gate = Gate(MemoryImage(disk.size))
    job = CopyJob(disk, gate, workers=1)
    stay = gate.hold("pwrite")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.pause()
        assert job.status is JobStatus.RUNNING
        stay.release()
        await wait_for(lambda: job.status is JobStatus.PAUSED)

        before = job.result
        disk.write(clusters("b" * 2048), 0)
        assert job.result == before
        assert preserved_now(job.snapshot) == 7 << 20
        job.resume()

    assert job.result == clusters("a" * 2048)


async def test_cancel_does_not_wait_for_a_target_that_hangs():
    disk = make_disk(clusters("a" * 2048))
    gate = Gate(MemoryImage(disk.size))
    job = CopyJob(disk, gate, workers=3)
    stays = [gate.hold("pwrite") for _ in range(3)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        for stay in stays:
            await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await wait_for(lambda: job.is_over)
        assert job.copier._target.users.count == 3

    denied = job.snapshot.epoch.denied.copy()
    for stay in stays:
        stay.release()
    await wait_for(lambda: not job.copier._target.users.count)
    # They came back, and did nothing more.
    assert job.snapshot.epoch.denied == denied
    assert not denied.any()


async def test_cancel_does_not_wait_for_a_source_that_hangs():
    gate = Gate(MemoryImage(8 * CLUSTER, clusters("aaaaaaaa")))
    disk = make_disk(source=gate)
    job = CopyJob(disk, Gate(MemoryImage(disk.size)))
    stay = gate.hold("pread")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
    stay.release()
    await wait_for(lambda: not job.copier._target.users.count)

    assert letters(job.result) == "........"


async def test_speed_is_limited():
    disk = make_disk(clusters("a" * 2048))
    job = CopyJob(disk, speed=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await wait_for(lambda: job.progress.current == CHUNK_SIZE_MAX)
        await trio.sleep(0.05)
        assert job.progress.current == CHUNK_SIZE_MAX

        job.set_speed(0)

    assert job.result == clusters("a" * 2048)


async def test_a_snapshot_that_breaks_ends_the_copy():
    disk = make_disk(clusters("a" * 1024))
    gate = Gate(MemoryImage(disk.size))
    job = CopyJob(
        disk,
        gate,
        workers=1,
        snapshot=take_private(disk, *tiers_of(disk, ram=0, store=0)),
        on_source_error=OnError.IGNORE,
        on_target_error=OnError.IGNORE,
    )
    stay = gate.hold("pwrite")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await trio.to_thread.run_sync(stay.wait_arrived)
        disk.write(clusters("b"), 900 * CLUSTER)
        stay.release()

    assert "could not preserve" in job.error
    assert job.errors() == []


# -- errors


def failing(letters, on, policy, **fault):
    """Return a job over a source or to a target that fails."""
    memory = MemoryImage(len(letters) * CLUSTER, clusters(letters))
    for index, letter in enumerate(letters):
        if letter == ".":
            memory.discard(CLUSTER, index * CLUSTER)
    source = Faulty(memory)
    disk = make_disk(source=source)
    target = Faulty(MemoryImage(disk.size, b"o" * disk.size))
    job = CopyJob(
        disk, target, on_source_error=policy, on_target_error=policy, workers=3
    )
    where = source if on in ("pread", "find_data") else target
    where.arm(on, **fault)
    return job, where


PLACES = ["pread", "pwrite", "discard", "find_data"]
LETTERS = "a" * 600 + "." * 8 + "b" * 600


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.ENOSPC, OnError.AUTO])
async def test_an_error_is_reported(on, policy):
    job, _faulty = failing(LETTERS, on, policy, count=1000)

    await job.live()

    assert job.error == f"injected into {faulty_name(on)}"
    operation = "read" if on in ("pread", "find_data") else "write"
    assert job.errors()[0] == {
        "device": "job0",
        "operation": operation,
        "action": "report",
    }
    assert job.io_status == "ok"


def faulty_name(on):
    return "pread_into" if on == "pread" else on


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 30])
async def test_an_error_that_is_ignored_leaves_nothing_out(on, nth, count):
    job, faulty = failing(LETTERS, on, OnError.IGNORE, nth=nth, count=count)

    await job.live()

    assert job.error is None
    assert job.result == clusters(LETTERS)
    assert len(job.errors()) == faulty.fired
    assert {error["action"] for error in job.errors()} <= {"ignore"}
    assert (job.progress.current, job.progress.remaining) == (job.disk.size, 0)


@pytest.mark.parametrize("on", PLACES)
@pytest.mark.parametrize(
    ("policy", "code", "io_status"),
    [
        (OnError.STOP, errno.EIO, "failed"),
        (OnError.STOP, errno.ENOSPC, "nospace"),
        (OnError.ENOSPC, errno.ENOSPC, "nospace"),
        (OnError.AUTO, errno.ENOSPC, "nospace"),
    ],
)
async def test_a_job_stops_for_an_error_and_tries_again(on, policy, code, io_status):
    job, faulty = failing(LETTERS, on, policy, code=code, count=10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        if faulty.fired == 0:
            await wait_for(lambda: job.status is JobStatus.PAUSED)
        assert job.io_status == io_status
        fired = faulty.fired
        assert fired

        # Nothing is tried while it rests, and once more it fails.
        await trio.sleep(0.02)
        assert faulty.fired == fired
        job.resume()
        await wait_for(lambda: job.status is JobStatus.PAUSED)
        assert faulty.fired > fired
        faulty.disarm()
        job.resume()

    assert job.error is None
    assert job.result == clusters(LETTERS)


async def test_a_stopped_job_can_be_cancelled():
    job, _ = failing(LETTERS, "pwrite", OnError.STOP, count=10_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await wait_for(lambda: job.status is JobStatus.PAUSED)
        job.cancel()

    assert job.is_cancelled


async def test_a_write_is_tried_again_without_reading():
    source = Reading(MemoryImage(512 * CLUSTER, clusters("a" * 512)))
    disk = make_disk(source=source)
    target = Faulty(MemoryImage(disk.size), on="pwrite", count=20)
    job = CopyJob(disk, target, on_target_error=OnError.IGNORE, workers=2)

    await job.live()

    assert job.result == clusters("a" * 512)
    assert source.length == 512 * CLUSTER


async def test_a_target_that_is_full_goes_on_when_there_is_room():
    disk = make_disk(clusters("a" * 2048))
    full = Full(MemoryImage(disk.size), 3_000_000)
    job = CopyJob(disk, full, on_target_error=OnError.ENOSPC)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await wait_for(lambda: job.status is JobStatus.PAUSED)
        assert job.io_status == "nospace"
        assert full.room == 0
        disk.write(clusters("b" * 2048), 0)
        full.room = 1 << 30
        job.resume()

    assert job.result == clusters("a" * 2048)


async def test_a_bad_cluster_does_not_hold_up_the_good_ones():
    class Bad(MemoryImage):
        is_bad = True

        def pread_into(self, buffer, offset):
            if self.is_bad and offset <= 300 * CLUSTER < offset + len(buffer):
                raise OSError(errno.EIO, "bad sector")
            super().pread_into(buffer, offset)

    source = Bad(2048 * CLUSTER, clusters("a" * 2048))
    disk = make_disk(source=source)
    job = CopyJob(disk, on_source_error=OnError.IGNORE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(job.live)
        await wait_for(lambda: job.progress.remaining == CLUSTER)
        source.is_bad = False

    assert job.error is None
    assert job.result == clusters("a" * 2048)


async def test_a_bug_ends_the_job(caplog):
    class Buggy(MemoryImage):
        def pwrite(self, data, offset):
            raise ZeroDivisionError

    disk = make_disk(clusters("aa"))
    job = CopyJob(disk, Buggy(disk.size), is_blank=True)

    await job.live()

    assert "internal error" in job.error
    caplog.clear()


test_a_bug_ends_the_job = pytest.mark.logs("a bug")(test_a_bug_ends_the_job)


# -- with other snapshots, and two at once


async def test_older_and_newer_snapshots_stay_exact():
    disk = make_disk(clusters("a" * 600))
    older = take_snapshot(disk)
    disk.write(clusters("b"), 0)
    job = CopyJob(disk)
    disk.write(clusters("c"), 1 * CLUSTER)
    newer = take_snapshot(disk)
    disk.write(clusters("d" * 4), 0)

    await job.live()

    assert letters(job.result) == "b" + "a" * 599
    assert letters(older.read(disk.size, 0)) == "a" * 600
    assert letters(newer.read(disk.size, 0)) == "bc" + "a" * 598
    disk.write(clusters("e" * 600), 0)
    assert letters(older.read(disk.size, 0)) == "a" * 600
    assert letters(newer.read(disk.size, 0)) == "bc" + "a" * 598
    with pytest.raises(SnapshotLost):
        job.snapshot.read(1, 0)


async def test_two_at_once_free_what_neither_needs():
    disk = make_disk(clusters("a" * 600))
    first = CopyJob(disk)
    disk.write(clusters("b"), 0)
    second = CopyJob(disk)
    disk.write(clusters("c" * 2), 0)
    disk.write(clusters("c"), 500 * CLUSTER)

    await second.live()

    # The older one needs them still.
    assert letters(second.result) == "b" + "a" * 599
    assert preserved_now(second.snapshot) == 2 * CLUSTER
    await first.live()
    assert letters(first.result) == "a" * 600
    assert preserved_now(first.snapshot) == preserved_now(second.snapshot) == 0
    before = disk.history.copied
    disk.write(clusters("d" * 600), 0)
    assert disk.history.copied == before


async def test_the_older_of_two_first():
    disk = make_disk(clusters("a" * 600))
    first, second = CopyJob(disk), CopyJob(disk)
    disk.write(clusters("c"), 500 * CLUSTER)

    await first.live()

    assert preserved_now(second.snapshot) == CLUSTER
    await second.live()
    assert preserved_now(second.snapshot) == 0
    assert first.result == second.result == clusters("a" * 600)


async def test_a_deleted_one_leaves_what_an_older_snapshot_needs():
    disk = make_disk(clusters("a" * 600))
    older = take_snapshot(disk)
    job = CopyJob(disk)
    disk.write(clusters("b" * 300), 0)
    await job.live()

    delete_snapshot(disk, job.snapshot)

    assert letters(older.read(disk.size, 0)) == "a" * 600
    delete_snapshot(disk, older)


# -- all at once


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ram", [0, 40_000, None])
async def test_a_copy_beside_a_busy_guest_is_exact(seed, ram):
    rng = random.Random(seed)
    size = 3 * CHUNK_SIZE_MAX + 5
    data = rng.randbytes(size)
    disk = make_disk(data)
    tiers = tiers_of(disk, ram=ram)
    job = CopyJob(
        disk,
        snapshot=take_private(disk, *tiers),
        workers=rng.choice([1, 2, 24]),
        is_urgent=lambda: rng.random() < 0.5,
    )
    ended = threading.Event()

    def guest(seed):
        rng = random.Random(seed)
        while not ended.is_set():
            length = rng.choice([1, 512, 4096, 5000, 100_000])
            offset = rng.randrange(size)
            if rng.random() < 0.1:
                disk.discard(length, offset)
            else:
                disk.write(b"n" * length, offset)

    guests = [Running(guest, seed * 10 + number) for number in range(3)]
    try:
        await job.live()
    finally:
        ended.set()
    for one in guests:
        one.result()

    assert job.error is None
    assert job.result == data
    assert all(tier.used == 0 for tier in tiers)


def test_waits_are_counted():
    disk = make_disk(clusters("aaaa"))
    snapshot = take_private(disk)

    disk.write(clusters("bb"), 0)
    disk.write(clusters("bb"), 0)
    disk.write(clusters("b"), CLUSTER * 2)

    waits, longest = snapshot.epoch.counters
    assert waits == 2
    assert 0 < longest < 5e9


def test_writes_are_as_patient_as_the_most_patient_snapshot():
    disk: Disk = make_disk(clusters("aaaa"), timeout=10)
    assert disk.history.timeout == 10

    quick = take_private(disk)
    quick.epoch.timeout = 1
    slow = take_private(disk)
    slow.epoch.timeout = 45
    take_private(disk)

    assert disk.history.timeout == 45
    disk.history.retire(slow.epoch, "over")
    assert disk.history.timeout == 10
