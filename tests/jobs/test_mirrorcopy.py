"""Copying what a mirror's target lacks: what is read, written, punched, and when.

A letter is a granule: a disk "abcd" has four. What a mirror knows is shown as a text: a
`1` for a granule that is dirty, a `c` for one being copied.
"""

import errno
import random
import threading
import time
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.block.disk import drained
from fleecefs.block.memory import MemoryImage
from fleecefs.block.mirror import Mirror
from fleecefs.errors import Unsupported
from fleecefs.jobs import mirrorcopy
from fleecefs.jobs.copy import CHUNK_SIZE_MAX
from fleecefs.jobs.mirrorcopy import MirrorCopier, Outcome
from fleecefs.jobs.options import OnError
from fleecefs.jobs.target import Target
from fleecefs.units import GiB, KiB, MiB, TiB
from tests.jobs.fakes import FakeBackup, Heard
from tests.support.copying import wait_for
from tests.support.disks import CLUSTER, clusters, letters, make_bits, make_disk
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.mirrors import differing
from tests.support.running import Running

# Granules that a worker takes at a time.
CHUNK = CHUNK_SIZE_MAX // CLUSTER


class Copying:
    """A disk with a mirror that lacks all, or what `dirty` says, and its copier."""

    def __init__(
        self,
        source,
        target=None,
        *,
        dirty=None,
        granularity=CLUSTER,
        workers=3,
        buf_size=16 * MiB,
        **options,
    ):
        if isinstance(source, bytes):
            source = MemoryImage(len(source), source)
        size = source.size
        self.disk = make_disk(source=source)
        self.image = MemoryImage(size, b"o" * size) if target is None else target
        self.dirty = make_bits(size, granularity)
        self.copying = make_bits(size, granularity)
        self.mirror = self.disk.mirror = Mirror(
            size, granularity, self.dirty, self.copying, self.disk.requests
        )
        if dirty is None:
            self.mirror.mark_dirty(0, size)
        else:
            for granule, letter in enumerate(dirty):
                self.dirty[granule] = letter == "1"
        self.job = FakeBackup(**options)
        self.job.progress.remaining = self.mirror.left()
        self.heard = self.job.emit = Heard()
        self.copier = MirrorCopier(
            self.job,
            self.disk,
            self.mirror,
            Target(self.image),
            workers=workers,
            buf_size=buf_size,
        )

    @property
    def shown(self):
        letters = {(0, 0): ".", (1, 0): "1", (0, 1): "c", (1, 1): "C"}
        bits = zip(self.dirty, self.copying, strict=True)
        return "".join(letters[pair] for pair in bits)[: self.mirror.count]

    @property
    def result(self):
        image = self.image
        while hasattr(image, "image"):
            image = image.image
        return bytes(image.data)

    def write(self, text, granule):
        self.disk.write(clusters(text), granule * CLUSTER)

    @asynccontextmanager
    async def running(self):
        """Let it copy meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.copier.run)
            yield
            nursery.cancel_scope.cancel()

    async def wait_done(self):
        """Wait until nothing is dirty any more, and whoever copied has counted it."""
        await wait_for(
            lambda: not (self.dirty.any() or self.copying.any() or self.job.is_busy)
        )

    async def copy(self):
        """Copy all that is dirty."""
        async with self.running():
            await self.wait_done()

    async def wait_rested(self):
        """Wait until all workers have found nothing, or nothing that they may do."""
        # Whoever was woken has begun by then.
        await wait_all_tasks_blocked()
        await wait_for(lambda: self.copier._idle == self.copier._workers)


async def wait_arrived(*stays):
    for stay in stays:
        await trio.to_thread.run_sync(stay.wait_arrived)


class Recording:
    """An image that remembers what is done to it: (what, offset, length)."""

    def __init__(self, image):
        self.image = image
        self.done = []

    def pread_into(self, buffer, offset):
        self.done.append(("read", offset, len(buffer)))
        self.image.pread_into(buffer, offset)

    def pwrite(self, data, offset):
        self.done.append(("write", offset, len(data)))
        return self.image.pwrite(data, offset)

    def zero(self, length, offset):
        self.done.append(("zero", offset, length))
        self.image.zero(length, offset)

    def discard(self, length, offset):
        self.done.append(("discard", offset, length))
        self.image.discard(length, offset)

    def find_data(self, offset):
        self.done.append(("search", offset, 0))
        return self.image.find_data(offset)

    def of(self, *kinds):
        return sorted(each for each in self.done if each[0] in kinds)

    def __getattr__(self, name):
        return getattr(self.image, name)


class Bad:
    """A source of which some bytes can not be read."""

    def __init__(self, image, *places):
        self.image = image
        self.places = set(places)
        self.attempts = []

    def pread_into(self, buffer, offset):
        for place in self.places:
            if offset <= place < offset + len(buffer):
                self.attempts.append((offset, len(buffer)))
                raise OSError(errno.EIO, "injected into pread_into")
        self.image.pread_into(buffer, offset)

    def __getattr__(self, name):
        return getattr(self.image, name)


class Sparse:
    """A source of any size: data at some offsets, each of `length`, else a hole."""

    def __init__(self, size, places, length):
        self.size = size
        self.places = places
        self.length = length

    def pread_into(self, buffer, offset):
        buffer[:] = b"d" * len(buffer)

    def find_data(self, offset):
        for place in self.places:
            if offset < place + self.length:
                return max(offset, place)
        return self.size

    def pwrite(self, data, offset):
        return len(data)


class Forgetting:
    """A target that remembers what was written and keeps none of it."""

    data = b""

    def __init__(self, size):
        self.size = size
        self.written = []
        self.punched = []

    def pwrite(self, data, offset):
        self.written.append((offset, len(data)))
        return len(data)

    def discard(self, length, offset):
        self.punched.append((offset, length))


# -- what is copied


@pytest.mark.parametrize("granularity", [512, 4096, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("size", [1, 511, 4097, 70_000, 3 * MiB + 5, 4 * MiB])
@pytest.mark.parametrize("workers", [1, 5])
async def test_a_copy_is_exact(size, granularity, workers):
    data = random.Random(size).randbytes(size)
    copying = Copying(data, granularity=granularity, workers=workers)

    await copying.copy()

    assert copying.result == data
    assert copying.mirror.left() == 0
    assert (copying.job.progress.current, copying.job.progress.remaining) == (size, 0)
    assert copying.copier.has_written


@pytest.mark.parametrize("granularity", [512, 4096, 64 * KiB, 2 * MiB])
@pytest.mark.parametrize("is_zero", [False, True], ids=["old", "zero"])
@pytest.mark.parametrize("seed", range(3))
async def test_any_mixture_of_data_holes_and_zeroes_is_exact(
    granularity, is_zero, seed
):
    chance = random.Random(seed)
    size = 3 * MiB + 700
    source = MemoryImage(size)
    offset = 0
    while offset < size:
        length = min(chance.choice([512, 4096, 5000, 100_000, MiB]), size - offset)
        what = chance.choice(["data", "hole", "zero", "old"])
        if what != "hole":
            source.pwrite((b"d" if what == "data" else b"\0") * length, offset)
        offset += length
    target = MemoryImage(size, b"" if is_zero else b"o" * size)
    copying = Copying(source, target, granularity=granularity)
    if is_zero:
        copying.mirror.mark_zero()

    await copying.copy()

    assert copying.result == bytes(source.data)
    assert copying.job.progress.current == size


async def test_only_what_is_dirty_is_copied():
    copying = Copying(clusters("abcdefgh"), dirty="1..11..1")

    await copying.copy()

    assert letters(copying.result) == "aoodeooh"
    assert copying.job.progress.current == 4 * CLUSTER


async def test_a_last_granule_that_is_cut_short_is_copied_up_to_the_end():
    target = Recording(MemoryImage(CLUSTER + 100))
    copying = Copying(b"a" * (CLUSTER + 100), target, dirty=".1")

    await copying.copy()

    assert target.of("write") == [("write", CLUSTER, 100)]
    assert copying.job.progress.current == 100


async def test_a_granule_larger_than_a_chunk_is_copied_in_chunks():
    source = Recording(MemoryImage(4 * MiB, b"a" * (4 * MiB)))
    copying = Copying(source, granularity=2 * MiB, dirty=".1", buf_size=1)

    await copying.copy()

    assert source.of("read") == [("read", 2 * MiB, MiB), ("read", 3 * MiB, MiB)]
    assert copying.result == b"o" * (2 * MiB) + b"a" * (2 * MiB)


# -- holes and zeroes


def holed(text):
    """Return an image with a granule of each letter, `.` for a hole."""
    image = MemoryImage(len(text) * CLUSTER)
    for granule, letter in enumerate(text):
        if letter != ".":
            image.pwrite(clusters(letter.replace("0", ".")), granule * CLUSTER)
    return image


@pytest.mark.parametrize("hole", ".0")
async def test_holes_and_zeroes_become_holes(hole):
    source = holed("a" + hole * 300 + "b" + hole * 300)
    copying = Copying(source)

    await copying.copy()

    assert copying.result == bytes(source.data)
    assert copying.image.allocated() == 2 * CLUSTER


async def test_a_hole_is_neither_read_nor_written():
    source = Recording(holed("." * CHUNK + "a"))
    target = Recording(MemoryImage(source.size))
    copying = Copying(source, target, workers=1)

    await copying.copy()

    assert source.of("read") == [("read", CHUNK * CLUSTER, CLUSTER)]
    assert target.of("write") == [("write", CHUNK * CLUSTER, CLUSTER)]
    assert target.of("discard", "zero") == [("discard", 0, CHUNK * CLUSTER)]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("." * 600, id="a-hole"),
        pytest.param("." * 600 + "a", id="a-hole-and-data"),
        pytest.param("a" * CHUNK + "0" * 600 + "a", id="zeroes"),
        pytest.param("a" * CHUNK + "0a.a0a" * 80, id="mixture"),
    ],
)
async def test_where_the_target_is_zero_nothing_is_punched(text):
    source = holed(text)
    target = Recording(MemoryImage(source.size))
    copying = Copying(source, target, workers=1)
    copying.mirror.mark_zero()

    await copying.copy()

    assert target.of("discard", "zero") == []
    written = sum(length for _, _, length in target.of("write"))
    assert written == text.count("a") * CLUSTER
    assert copying.result == bytes(source.data)


async def test_where_the_target_is_zero_nothing_is_punched_in_the_first_chunk_either():
    source = holed("a0a")
    target = Recording(MemoryImage(source.size))
    copying = Copying(source, target, workers=1)
    copying.mirror.mark_zero()

    await copying.copy()

    assert target.of("discard", "zero") == []


async def test_where_the_target_is_not_zero_any_more_a_hole_is_punched():
    source = holed("a" * CHUNK + "....")
    target = Recording(MemoryImage(source.size))
    copying = Copying(source, target, workers=1)
    copying.mirror.mark_zero()
    async with copying.running():
        await copying.wait_done()
        copying.write("b", CHUNK + 1)
        copying.copier.wake()
        await copying.wait_done()

        copying.disk.discard(4 * CLUSTER, CHUNK * CLUSTER)
        copying.copier.wake()
        await copying.wait_done()

    # It may be all of them that are punched; one has to be.
    assert copying.result == bytes(source.data)
    assert target.of("discard") != []
    assert copying.mirror.is_zero(CHUNK, CHUNK + 4)


@pytest.mark.parametrize("granularity", [512, CLUSTER])
async def test_a_zero_granule_is_punched_whole_and_by_itself(granularity):
    letters = "a" * 8 + "." + "a" * 3 + ".." + "a" * 2
    source = MemoryImage(16 * granularity, clusters(letters, granularity))
    target = Recording(MemoryImage(source.size, b"o" * source.size))
    copying = Copying(source, target, granularity=granularity)

    await copying.copy()

    assert copying.result == bytes(source.data)
    punched = [
        at // granularity
        for _, offset, length in target.of("discard")
        for at in range(offset, offset + length, granularity)
    ]
    assert sorted(punched) == [8, 12, 13]


async def test_a_part_of_a_granule_is_punched_if_it_is_a_chunk():
    source = MemoryImage(2 * MiB)
    source.pwrite(b"a" * 10 + bytes(2 * MiB - 10), 0)
    target = Recording(MemoryImage(2 * MiB, b"o" * (2 * MiB)))
    copying = Copying(source, target, granularity=2 * MiB)

    await copying.copy()

    assert copying.result == bytes(source.data)
    assert target.of("discard") == [("discard", MiB, MiB)]
    assert not copying.mirror.is_zero(0, 1)


async def test_a_target_that_can_not_punch_gets_zeroes():
    class Plain(Recording):
        def discard(self, length, offset):
            raise Unsupported("no holes")

        def zero(self, length, offset):
            raise OSError(errno.EINVAL, "too small")

    source = holed("a.0")
    target = Plain(MemoryImage(source.size, b"o" * source.size))
    copying = Copying(source, target)

    await copying.copy()

    assert letters(copying.result) == "a.."


@pytest.mark.parametrize("is_zero", [False, True])
async def test_a_sparse_disk_of_a_tebibyte_takes_no_time(is_zero):
    places = [0, 5 * GiB, 700 * GiB, TiB - MiB]
    target = Forgetting(TiB)
    copying = Copying(Sparse(TiB, places, MiB), target, granularity=64 * KiB)
    if is_zero:
        copying.mirror.mark_zero()
    begin = time.monotonic()

    await copying.copy()

    assert time.monotonic() - begin < 10
    assert sorted(target.written) == [(place, MiB) for place in places]
    assert copying.job.progress.current == TiB
    punched = sum(length for _, length in target.punched)
    assert punched == (0 if is_zero else TiB - 4 * MiB)
    # Some chunks of each hole, and its rest.
    assert len(target.punched) <= 12


async def test_a_hole_that_is_filled_while_it_is_skipped_is_copied():
    """What a hole was thought to be is looked at again, run by run."""
    source = Gate(holed("." * (2 * CHUNK + 1)))
    target = Gate(MemoryImage(source.size, b"o" * source.size))
    copying = Copying(source, target, workers=1)
    first = target.hold("discard")
    async with copying.running():
        await wait_arrived(first)
        copying.write("b", CHUNK + 7)
        first.release()
        await copying.wait_done()

    assert copying.result == bytes(source.data)


async def test_a_hole_is_skipped_only_up_to_the_data_behind_it():
    source = Recording(holed("." * CHUNK + "..a.b"))
    target = Recording(MemoryImage(source.size, b"o" * source.size))
    copying = Copying(source, target, workers=1)

    await copying.copy()

    assert copying.result == bytes(source.data)
    assert target.of("discard")[:2] == [
        ("discard", 0, CHUNK * CLUSTER),
        ("discard", CHUNK * CLUSTER, 2 * CLUSTER),
    ]


async def test_a_hole_that_can_not_be_punched_is_dirty_again():
    source = holed("." * (2 * CHUNK))
    target = Faulty(MemoryImage(source.size, b"o" * source.size))
    target.arm("discard", nth=2)
    copying = Copying(source, target, workers=1)

    await copying.copy()

    # It was tried again by whoever took it next, and nobody had to hear of it.
    assert target.fired == 1
    assert copying.result == bytes(source.data)


async def test_a_hole_that_could_not_be_punched_is_not_taken_for_zeroes(monkeypatch):
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 0.0)
    target = Faulty(MemoryImage(4 * CLUSTER, clusters("oooo")))
    target.arm("discard")
    copying = Copying(holed("...."), target, on_target_error=OnError.IGNORE)
    copying.mirror.mark_zero()
    copying.mirror.set_zero(0, 4, is_zero=False)

    await copying.copy()

    assert target.fired == 1
    assert letters(copying.result) == "...."
    assert copying.mirror.is_zero(0, 4)


# -- what the file system shares


class Sharing:
    """What a file system does that shares, for so many times."""

    def __init__(self, copying, times=1 << 30):
        self.copying = copying
        self.times = times
        self.shared = []
        copying.copier._target.clone = self

    def __call__(self, source, length, offset):
        if len(self.shared) == self.times:
            raise Unsupported("not any more")
        self.shared.append((offset, length))
        self.copying.image.pwrite(source.pread(length, offset), offset)


async def test_what_is_on_the_source_is_shared_if_that_is_possible():
    source = Recording(MemoryImage(3 * MiB, b"a" * (3 * MiB)))
    copying = Copying(source)
    sharing = Sharing(copying)
    copying.mirror.mark_zero()

    await copying.copy()

    assert sorted(sharing.shared) == [(at * MiB, MiB) for at in range(3)]
    assert source.of("read") == []
    assert copying.result == bytes(source.data)
    assert not any(copying.mirror.is_zero(n, n + 1) for n in range(3 * CHUNK))


async def test_what_can_not_be_shared_is_read():
    data = random.Random(1).randbytes(3 * MiB)
    copying = Copying(data, workers=1)
    sharing = Sharing(copying, times=1)

    await copying.copy()

    assert len(sharing.shared) == 1
    assert copying.result == data


async def test_what_was_shared_in_part_is_not_taken_for_zeroes():
    """XFS clones as far as it comes, and then fails (ENOSPC, EDQUOT)."""
    copying = Copying(clusters("aaaa"), MemoryImage(4 * CLUSTER), workers=1)
    copying.mirror.mark_zero()

    def clone(source, length, offset):
        copying.image.pwrite(source.pread(2 * CLUSTER, offset), offset)
        copying.disk.discard(length, offset)
        raise OSError(errno.ENOSPC, "no space left")

    copying.copier._target.clone = clone

    await copying.copy()

    assert letters(copying.result) == "...."


async def test_less_than_a_block_is_not_shared():
    copying = Copying(clusters("aaaa"), granularity=512)
    sharing = Sharing(copying)

    await copying.copy()

    assert sharing.shared == []
    assert letters(copying.result) == "aaaa"


# -- the guest, meanwhile


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_what_is_overwritten_while_it_is_read_is_copied_again(after):
    source = Gate(MemoryImage(8 * CLUSTER, clusters("aaaaaaaa")))
    copying = Copying(source, workers=1)
    first, second = source.hold("pread", after=after), source.hold("pread")
    async with copying.running():
        await wait_arrived(first)
        copying.write("bb", 3)
        assert copying.shown == "cccCCccc"
        first.release()
        await wait_arrived(second)
        assert letters(copying.result) == ("aaaaaaaa" if after else "aaabbaaa")
        assert copying.shown == "...cc..."
        second.release()
        await copying.wait_done()

    assert letters(copying.result) == "aaabbaaa"


async def test_a_write_does_not_wait_for_who_copies():
    target = Gate(MemoryImage(8 * CLUSTER))
    copying = Copying(clusters("aaaaaaaa"), target)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)

        write = Running(copying.write, "bbbbbbbb", 0)
        assert not write.wait_waiting()
        assert copying.shown == "CCCCCCCC"

        stay.release()
        await copying.wait_done()
    assert letters(copying.result) == "bbbbbbbb"


async def test_who_copies_goes_on_where_he_was_and_begins_again_at_the_end():
    data = clusters("a" * 4 * CHUNK)
    target = Recording(Gate(MemoryImage(len(data))))
    copying = Copying(data, target, workers=1)
    first = target.image.hold("pwrite", after=True)
    second = target.image.hold("pwrite", after=True)
    async with copying.running():
        first.release()
        await wait_arrived(second)
        assert copying.copier.passes == 0
        copying.write("b", 3)
        second.release()
        await copying.wait_done()
        assert copying.copier.passes >= 1

    offsets = [offset // CLUSTER for _, offset, _ in target.done]
    assert offsets == [0, CHUNK, 2 * CHUNK, 3 * CHUNK, 3]


async def test_what_becomes_dirty_is_copied_once_somebody_says_so():
    copying = Copying(clusters("aaaa"), dirty="....", workers=2)
    async with copying.running():
        await copying.wait_rested()
        copying.write("b", 2)
        await wait_all_tasks_blocked()
        assert copying.shown == "..1."
        assert not copying.copier.has_written

        copying.copier.wake()
        await copying.wait_done()

    assert letters(copying.result) == "oobo"


async def test_workers_rest_when_there_is_nothing_to_do():
    copying = Copying(clusters("aaaa"), workers=4)
    async with copying.running():
        await copying.wait_rested()
        assert copying.shown == "...."
        assert copying.copier.rested.is_set()

        copying.copier.rested = trio.Event()
        copying.copier.wake()
        await copying.copier.rested.wait()


async def test_a_guest_that_writes_all_the_time_is_caught_up_with():
    data = bytes(200 * CLUSTER)
    copying = Copying(data, workers=4)
    has_ended = threading.Event()

    def guest():
        chance = random.Random(1)
        for _ in range(300):
            copying.write(chance.choice("abc.") * 2, chance.randrange(199))
            time.sleep(0.0002)
        has_ended.set()

    async with copying.running():
        running = Running(guest)
        while not has_ended.is_set():
            copying.copier.wake()
            await trio.sleep(0.001)
        running.result()
        copying.copier.wake()
        await copying.wait_done()

    assert copying.result == bytes(copying.disk.source.data)


# -- errors


async def test_of_a_run_that_can_not_be_read_only_the_bad_granules_stay_dirty():
    source = Bad(MemoryImage(8 * CLUSTER, clusters("abcdefgh")))
    source.places = {2 * CLUSTER + 5, 6 * CLUSTER}
    copying = Copying(source, workers=1, on_source_error=OnError.IGNORE)
    async with copying.running():
        await copying.wait_rested()

    assert copying.shown == "..1...1."
    assert letters(copying.result) == "abodefoh"
    assert copying.job.progress.current == 6 * CLUSTER
    errors = copying.heard.named("BLOCK_JOB_ERROR")
    # One for all of them.
    assert [each["operation"] for each in errors] == ["read"]


async def test_a_read_error_fails_a_copy_that_is_to_report_it():
    source = Bad(MemoryImage(8 * CLUSTER, clusters("abcdefgh")), 2 * CLUSTER)
    copying = Copying(source, on_source_error=OnError.REPORT)

    with pytest.raises(OSError) as e:
        await copying.copier.run()

    assert e.value.errno == errno.EIO
    assert copying.shown == "..1....."
    assert letters(copying.result) == "abodefgh"


@pytest.mark.parametrize("granularity", [512, 2 * MiB])
async def test_a_granule_of_any_size_stays_dirty_if_it_can_not_be_read(granularity):
    size = 4 * MiB
    source = Bad(MemoryImage(size, b"a" * size), 2 * MiB - 1)
    copying = Copying(
        source, granularity=granularity, on_source_error=OnError.IGNORE, workers=2
    )
    async with copying.running():
        await copying.wait_rested()

    assert copying.mirror.left() == granularity
    assert copying.dirty[(2 * MiB - 1) // granularity]
    memory = source.image
    bad = (2 * MiB - 1) // granularity
    assert differing(memory, copying.image, granularity) == [bad]


async def test_a_search_that_fails_is_a_read_error():
    source = Faulty(MemoryImage(4 * CLUSTER, clusters("abcd")))
    source.arm("find_data", count=2)
    copying = Copying(source, workers=1, on_source_error=OnError.IGNORE)
    async with copying.running():
        await copying.wait_rested()

    # Of the run, and of the first granule alone.
    assert copying.shown == "1..."


async def test_what_has_failed_is_not_tried_again_at_once(monkeypatch):
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 1000.0)
    source = Bad(MemoryImage(4 * CLUSTER, clusters("abcd")), CLUSTER)
    copying = Copying(source, workers=2, on_source_error=OnError.IGNORE)
    async with copying.running():
        await copying.wait_rested()
        attempts = len(source.attempts)
        assert copying.shown == ".1.."
        for _ in range(3):
            copying.write("XXXX", 0)
            copying.copier.wake()
            await copying.wait_rested()

        assert len(source.attempts) == attempts
        assert copying.shown == ".1.."
        assert letters(copying.result) == "XoXX"


async def test_what_has_failed_is_tried_again_later(monkeypatch):
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 0.001)
    source = Bad(MemoryImage(4 * CLUSTER, clusters("abcd")), CLUSTER)
    copying = Copying(source, workers=2, on_source_error=OnError.IGNORE)
    async with copying.running():
        await copying.wait_rested()
        source.places.clear()
        await trio.sleep(0.002)
        copying.copier.wake()
        await copying.wait_done()

    assert letters(copying.result) == "abcd"


async def test_what_could_not_be_written_is_dirty_and_comes_later(monkeypatch):
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 0.001)
    target = Faulty(MemoryImage(8 * CLUSTER, b"o" * 8 * CLUSTER))
    target.arm("pwrite", code=errno.ENOSPC)
    copying = Copying(
        clusters("abcdefgh"), target, workers=1, on_target_error=OnError.IGNORE
    )
    async with copying.running():
        await copying.wait_rested()
        assert copying.shown == "11111111"
        assert copying.job.progress.current == 0
        assert not copying.copier.has_written
        errors = copying.heard.named("BLOCK_JOB_ERROR")
        assert [each["operation"] for each in errors] == ["write"]

        await trio.sleep(0.002)
        copying.copier.wake()
        await copying.wait_done()
    assert letters(copying.result) == "abcdefgh"


@pytest.mark.parametrize(
    ("operation", "text"), [("pwrite", "abcd"), ("discard", "....")]
)
async def test_a_write_error_fails_a_copy_that_is_to_report_it(operation, text):
    target = Faulty(MemoryImage(4 * CLUSTER, b"o" * 4 * CLUSTER))
    target.arm(operation, code=errno.ENOSPC)
    copying = Copying(holed(text), target, on_target_error=OnError.REPORT)

    with pytest.raises(OSError) as e:
        await copying.copier.run()

    assert e.value.errno == errno.ENOSPC
    assert copying.shown == "1111"
    # It has ended: nobody copies any more.
    assert copying.copier._claim_some() == []


async def test_a_run_written_in_part_is_dirty_and_not_zero():
    target = Faulty(MemoryImage(4 * CLUSTER))
    target.arm("pwrite", nth=2)
    copying = Copying(holed("a0b0"), target, workers=1)
    copying.mirror.mark_zero()

    with pytest.raises(OSError):
        await copying.copier.run()

    assert copying.shown == "1111"
    assert letters(copying.result) == "a..."
    assert not copying.mirror.is_zero(0, 1)


@pytest.mark.logs("job job0 pauses")
async def test_a_copy_that_stops_for_an_error_goes_on_when_told_to(monkeypatch):
    monkeypatch.setattr(mirrorcopy, "RETRY_SECONDS", 0.0)
    target = Faulty(MemoryImage(4 * CLUSTER))
    target.arm("pwrite")
    copying = Copying(clusters("abcd"), target, on_target_error=OnError.STOP)
    async with copying.running():
        await wait_for(lambda: copying.job.is_user_paused)
        copying.copier.wake()
        await wait_all_tasks_blocked()
        assert copying.shown == "1111"

        copying.job.release()
        await copying.wait_done()
    assert letters(copying.result) == "abcd"


# -- how much at a time


@pytest.mark.parametrize(
    ("buf_size", "granularity", "in_flight"),
    [
        pytest.param(2 * MiB, CLUSTER, [MiB, MiB], id="two-chunks"),
        pytest.param(
            2 * MiB + 512 * KiB, 64 * KiB, [MiB, MiB, MiB // 2], id="and-half"
        ),
        pytest.param(64 * KiB, CLUSTER, [64 * KiB], id="less-than-a-chunk"),
        pytest.param(1, CLUSTER, [CLUSTER], id="one-granule-at-the-least"),
        pytest.param(MiB, 2 * MiB, [2 * MiB], id="a-large-granule"),
    ],
)
async def test_no_more_is_in_flight_than_the_buffer_has(
    buf_size, granularity, in_flight
):
    size = 4 * MiB
    target = Gate(MemoryImage(size))
    copying = Copying(
        b"a" * size, target, granularity=granularity, workers=8, buf_size=buf_size
    )
    stays = [target.hold("pwrite") for _ in range(len(in_flight) + 1)]
    *due, last = stays
    async with copying.running():
        await wait_arrived(*due)
        await wait_all_tasks_blocked()

        assert copying.copying.count() * granularity == sum(in_flight)
        assert not last.has_arrived

        for stay in stays:
            stay.release()
        # Those who lacked room are woken by those who give it back.
        await copying.wait_done()
    assert copying.result == b"a" * size


async def test_who_gives_back_room_wakes_who_lacked_it():
    target = Gate(Faulty(MemoryImage(2 * MiB)))
    target.image.arm("pwrite")
    copying = Copying(b"a" * (2 * MiB), target, workers=2, buf_size=MiB)
    stay = target.hold("pwrite")

    async def wait_for_people(error, *, is_read):
        await trio.sleep_forever()

    copying.job.on_error = wait_for_people
    async with copying.running():
        await wait_arrived(stay)
        await wait_all_tasks_blocked()
        stay.release()
        await wait_for(lambda: copying.job.progress.current == MiB)

    assert copying.result == bytes(MiB) + b"a" * MiB


async def test_as_many_chunks_are_copied_at_once_as_there_are_workers():
    size = 6 * MiB
    target = Gate(MemoryImage(size))
    copying = Copying(b"a" * size, target, workers=3)
    stays = [target.hold("pwrite") for _ in range(4)]
    async with copying.running():
        await wait_arrived(*stays[:3])
        await wait_all_tasks_blocked()
        assert copying.copying.count() == 3 * CHUNK
        assert not stays[3].has_arrived

        for stay in stays:
            stay.release()
        await copying.wait_done()


async def test_small_runs_are_copied_together():
    target = Gate(MemoryImage(8 * CLUSTER, b"o" * 8 * CLUSTER))
    copying = Copying(clusters("abcdefgh"), target, dirty="1.1.11.1", workers=1)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)

        assert copying.shown == "c.c.cc.c"

        stay.release()
        await copying.wait_done()
    assert letters(copying.result) == "aocoefoh"


async def test_at_one_byte_a_second_just_the_first_chunk_is_copied():
    data = b"a" * (4 * MiB)
    copying = Copying(data, workers=8, speed=1)
    async with copying.running():
        await wait_for(lambda: copying.job.progress.current)
        await wait_all_tasks_blocked()
        assert copying.job.progress.current == MiB
        assert copying.mirror.left() == 3 * MiB

        copying.job.limit.set_speed(0)
        await copying.wait_done()
    assert copying.result == data


async def test_a_job_that_is_held_copies_nothing():
    copying = Copying(clusters("aaaa"))
    copying.job.hold()
    async with copying.running():
        await wait_all_tasks_blocked()
        copying.copier.wake()
        await wait_all_tasks_blocked()
        assert copying.shown == "1111"

        copying.job.release()
        await copying.wait_done()


# -- its end


async def test_after_stop_nothing_more_is_begun():
    data = b"a" * (4 * MiB)
    target = Gate(MemoryImage(4 * MiB))
    copying = Copying(data, target, workers=1)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)
        copying.copier.stop()
        stay.release()
        await copying.wait_rested()
        copying.copier.wake()
        await copying.wait_rested()

        # What was being copied has come.
        assert copying.mirror.left() == 3 * MiB
        assert not copying.copying.any()
        assert copying.result == data[:MiB] + bytes(3 * MiB)


async def test_after_stop_what_was_taken_is_dirty_again():
    target = Gate(MemoryImage(8 * CLUSTER, b"o" * 8 * CLUSTER))
    copying = Copying(clusters("abcdefgh"), target, dirty="1.1.11.1", workers=1)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)
        copying.copier.stop()
        stay.release()
        await copying.wait_rested()

    assert copying.shown == "..1.11.1"
    assert letters(copying.result) == "aooooooo"


async def test_after_stop_a_hole_is_skipped_no_further():
    source = holed("." * (4 * CHUNK))
    target = Gate(MemoryImage(source.size, b"o" * source.size))
    copying = Copying(source, target, workers=1)
    stay = target.hold("discard")
    async with copying.running():
        await wait_arrived(stay)
        copying.copier.stop()
        stay.release()
        await copying.wait_rested()

    assert copying.mirror.left() == 3 * MiB


async def test_a_copy_that_is_cancelled_does_not_wait_for_a_target_that_hangs():
    target = Gate(MemoryImage(8 * CLUSTER, b"o" * 8 * CLUSTER))
    copying = Copying(clusters("abcdefgh"), target, dirty="1.1.11.1", workers=1)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)

    # Nobody copies what the thread has begun with, before it comes back.
    assert copying.shown == "c.1.11.1"
    assert copying.mirror.claim(0, 1, 1) is None
    stay.release()
    await wait_for(lambda: not copying.copying.any())
    assert copying.shown == "..1.11.1"


async def test_a_copy_that_is_cancelled_before_its_thread_has_begun_lets_go():
    copying = Copying(clusters("abcd"), workers=1)
    job = copying.job
    turn = job.turn

    async def turn_and_cancel():
        """Come back, as trio may have it, when another task has just cancelled."""
        await turn()
        scope.cancel()

    job.turn = turn_and_cancel
    with trio.CancelScope() as scope:
        await copying.copier.run()

    assert copying.shown == "1111"


async def test_threads_keep_the_target_open():
    target = Gate(MemoryImage(CLUSTER))
    target.image.close = lambda: closed.append(True)
    closed = []
    copying = Copying(clusters("a"), target)
    stay = target.hold("pwrite")
    async with copying.running():
        await wait_arrived(stay)
    copying.copier._target.close()
    assert closed == []

    stay.release()

    await wait_for(lambda: closed)
    assert letters(copying.result) == "a"


# -- the rest, while the disk is drained


def test_the_rest_is_copied():
    source = holed("ab.c0d" * 100 + "." * 1000)
    copying = Copying(source, MemoryImage(source.size, b"o" * source.size))
    outcome = Outcome()
    copying.copier.stop()

    with drained([copying.disk]):
        copying.copier.copy_rest(time.monotonic() + 100, outcome)

    assert outcome.error is None
    assert outcome.copied == source.size
    assert copying.mirror.is_alike()
    assert copying.result == bytes(source.data)


def test_the_rest_is_copied_only_until_the_deadline(monkeypatch):
    size = 4 * MiB

    class Slow(MemoryImage):
        def pwrite(self, data, offset):
            clock.now += 10.0
            return super().pwrite(data, offset)

    copying = Copying(b"a" * size, Slow(size))
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(mirrorcopy, "time", clock)
    outcome = Outcome()

    copying.copier.copy_rest(0.0, outcome)
    assert (outcome.copied, copying.mirror.left()) == (0, size)
    copying.copier.copy_rest(15.0, outcome)
    assert (outcome.copied, copying.mirror.left()) == (2 * MiB, 2 * MiB)
    copying.copier.copy_rest(100.0, outcome)
    assert (outcome.copied, copying.mirror.left()) == (size, 0)


@pytest.mark.parametrize("is_read", [True, False])
def test_the_rest_ends_with_the_first_error(is_read):
    size = 4 * MiB
    source, target = Faulty(MemoryImage(size, b"a" * size)), Faulty(MemoryImage(size))
    copying = Copying(source, target)
    if is_read:
        source.arm("pread", count=2)
    else:
        target.arm("pwrite")
    outcome = Outcome()

    copying.copier.copy_rest(time.monotonic() + 100, outcome)

    assert outcome.error.errno == errno.EIO
    assert outcome.is_read == is_read
    assert not copying.copying.any()
    # Of a run that can not be read, all but one granule came.
    failed = CLUSTER if is_read else MiB
    assert copying.mirror.left() == 3 * MiB + failed


def test_what_others_are_copying_is_no_part_of_the_rest():
    copying = Copying(clusters("abcd"))
    copying.mirror.claim(1, 2, 1)

    copying.copier.copy_rest(time.monotonic() + 100, Outcome())

    assert copying.shown == ".c.."
    assert letters(copying.result) == "aocd"
