"""Dirty bitmaps: what was written is in all of them, and nothing says more."""

import errno
import threading

import pytest
from bitarray import bitarray
from bitarray.util import zeros
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from fleecefs.block.dirty import DirtyBitmap, Recorder, scaled
from fleecefs.block.disk import drained
from fleecefs.block.memory import MemoryImage
from fleecefs.errors import NoSpace
from fleecefs.units import KiB, MiB
from tests.support.disks import make_disk
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.running import Running

# Not a multiple of any granularity.
SIZE = 1 * MiB + 3 * KiB + 100
UNIT = 1 << 15


def make_bitmap(size=SIZE, granularity=4 * KiB, name="daily"):
    """Return one over clear bits, padded as those in use are."""
    count = -(-size // granularity)
    bits = zeros(-(-count // 64) * 64, endian="little")
    return DirtyBitmap(name, size, granularity, bits, recording=True)


def fresh(bitmap):
    return zeros(len(bitmap.bits), endian="little")


def dirty(bitmap):
    """Return the numbers of the bits that are set."""
    return set(bitmap.to_save().search(1))


def units(first, stop, granularity):
    return set(range(first // granularity, (stop - 1) // granularity + 1))


def bits_of(numbers, count):
    bits = zeros(count, endian="little")
    for number in numbers:
        bits[number] = 1
    return bits


# -- one bitmap


@pytest.mark.parametrize(
    ("offset", "end", "expected"),
    [
        pytest.param(0, 1, {0}, id="first byte"),
        pytest.param(4095, 4096, {0}, id="last byte of a bit"),
        pytest.param(4096, 8192, {1}, id="aligned"),
        pytest.param(4095, 4097, {0, 1}, id="two bytes, two bits"),
        pytest.param(1, 12289, {0, 1, 2, 3}, id="unaligned head and tail"),
        pytest.param(SIZE - 1, SIZE, {256}, id="very last byte"),
        pytest.param(4096, 4096, set(), id="nothing"),
    ],
)
def test_set_rounds_outward(offset, end, expected):
    bitmap = make_bitmap()

    bitmap.set(offset, end)

    assert dirty(bitmap) == expected
    assert bitmap.count == len(expected) * 4096


@pytest.mark.parametrize("granularity", [512, 4 * KiB, 64 * KiB, 1 * MiB, 2 * MiB])
def test_whole_disk_is_all_bits_and_no_more(granularity):
    bitmap = make_bitmap(granularity=granularity)

    bitmap.set(0, SIZE)

    assert bitmap.bit_count == -(-SIZE // granularity)
    assert bitmap.bits.count() == bitmap.bit_count
    assert bitmap.count == bitmap.bit_count * granularity


def test_frozen_bits_are_what_a_job_is_about():
    bitmap = make_bitmap()
    bitmap.set(0, 8192)

    bitmap.freeze(fresh(bitmap))
    bitmap.set(4096, 4097)

    assert bitmap.busy
    assert bitmap.count == 8192
    assert set(bitmap.frozen.search(1)) == {0, 1}
    assert set(bitmap.bits.search(1)) == {1}
    assert dirty(bitmap) == {0, 1}


def test_abdicated_bitmap_has_what_was_written_since():
    bitmap = make_bitmap()
    bitmap.set(0, 8192)
    bitmap.freeze(fresh(bitmap))
    bitmap.set(16384, 16385)

    bitmap.abdicate()

    assert not bitmap.busy
    assert dirty(bitmap) == {4}
    assert bitmap.count == 4096


def test_reclaimed_bitmap_has_both():
    bitmap = make_bitmap()
    bitmap.set(0, 8192)
    bitmap.freeze(fresh(bitmap))
    bitmap.set(16384, 16385)

    bitmap.reclaim()

    assert not bitmap.busy
    assert dirty(bitmap) == {0, 1, 4}


@pytest.mark.parametrize(
    ("granularity", "numbers", "target", "expected"),
    [
        pytest.param(4096, {0, 3}, 4096, {0, 3}, id="the same"),
        pytest.param(512, {0, 8, 9}, 4096, {0, 1}, id="fine to coarse"),
        pytest.param(512, {7, 8}, 4096, {0, 1}, id="one run across two bits"),
        pytest.param(65536, {1}, 4096, set(range(16, 32)), id="coarse to fine"),
        pytest.param(65536, {16}, 4096, {256}, id="coarse to fine, cut at the end"),
        pytest.param(2 * MiB, {0}, 65536, set(range(17)), id="one bit is the disk"),
        pytest.param(512, {2054}, 4096, {256}, id="the very last byte"),
    ],
)
def test_bits_are_added_in_another_granularity(granularity, numbers, target, expected):
    bitmap = make_bitmap(granularity=target)

    bitmap.add(bits_of(numbers, -(-SIZE // granularity)), granularity)

    assert dirty(bitmap) == expected
    # Nor is there anything beyond the end.
    assert bitmap.bits.count() == len(expected)


def test_bits_are_added_to_what_there_is():
    bitmap, other = make_bitmap(), make_bitmap()
    bitmap.set(0, 1)
    other.set(8192, 8193)

    bitmap.add(other.bits, 4096)
    bitmap.add(bitmap.bits, 4096)

    assert dirty(bitmap) == {0, 2}
    assert dirty(other) == {2}


def test_scaled_runs_cover_all_that_is_set():
    bits = bits_of({0, 1, 5, 9}, 10)

    assert list(scaled(bits, 4096, 4096)) == [(0, 2), (5, 6), (9, 10)]
    assert list(scaled(bits, 4096, 8192)) == [(0, 1), (2, 3), (4, 5)]
    assert list(scaled(bits, 4096, 2048)) == [(0, 4), (10, 12), (18, 20)]


# -- what is to be saved


def make_large():
    """Return a bitmap of three units, the last one in part."""
    return make_bitmap(512 * (2 * UNIT + 5), 512)


def test_new_bitmap_is_to_be_saved_whole():
    bitmap = make_large()

    assert not bitmap.is_saved
    assert bitmap.take_unsaved() == [(0, 2 * UNIT + 5)]
    assert bitmap.is_saved
    assert bitmap.take_unsaved() == []


@pytest.mark.parametrize(
    ("first", "stop", "expected"),
    [
        pytest.param(0, 1, [(0, UNIT)], id="first bit"),
        pytest.param(UNIT - 1, UNIT, [(0, UNIT)], id="last bit of a unit"),
        pytest.param(UNIT - 1, UNIT + 1, [(0, 2 * UNIT)], id="across two"),
        pytest.param(
            2 * UNIT + 4, 2 * UNIT + 5, [(2 * UNIT, 2 * UNIT + 5)], id="very last bit"
        ),
    ],
)
def test_only_changed_units_are_to_be_saved(first, stop, expected):
    bitmap = make_large()
    bitmap.take_unsaved()

    bitmap.set(first * 512, stop * 512)

    assert not bitmap.is_saved
    assert bitmap.take_unsaved() == expected


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda b: b.keep_unsaved(), id="a save that failed"),
        pytest.param(lambda b: b.add(fresh(b), b.granularity), id="add"),
        pytest.param(lambda b: b.freeze(fresh(b)), id="freeze"),
        pytest.param(lambda b: (b.freeze(fresh(b)), b.abdicate()), id="abdicate"),
        pytest.param(lambda b: (b.freeze(fresh(b)), b.reclaim()), id="reclaim"),
    ],
)
def test_what_changes_the_whole_is_to_be_saved_whole(change):
    bitmap = make_large()
    bitmap.take_unsaved()

    change(bitmap)

    assert bitmap.take_unsaved() == [(0, 2 * UNIT + 5)]


def test_bit_that_was_set_has_its_unit_saved_all_the_same():
    # Whoever has set it may not have come to say so: a save in between lacks it.
    bitmap = make_large()
    recorder = Recorder(512 * (2 * UNIT + 5), [bitmap])
    bitmap.take_unsaved()
    bitmap.bits[7] = 1

    recorder.record(7 * 512, 8 * 512)

    assert bitmap.take_unsaved() == [(0, UNIT)]


def test_what_is_to_be_saved_is_a_copy():
    bitmap = make_bitmap()
    copy = bitmap.to_save()

    bitmap.set(0, 1)

    assert len(copy) == bitmap.bit_count
    assert not copy.any()


def test_save_while_a_job_ends_sees_all_or_nothing_of_it():
    bitmap = make_bitmap()
    ending = threading.Event()

    def look():
        while not ending.is_set():
            # What was written since is there, and what was frozen as a whole.
            assert dirty(bitmap) in ({9}, {1, 2, 9})
            assert bitmap.count in (4096, 8192, 12288)

    bitmap.set(9 * 4096, 10 * 4096)
    running = Running(look)
    for _ in range(300):
        frozen = bits_of({9}, len(bitmap.bits))
        bitmap.set(4096, 12288)
        bitmap.freeze(frozen)
        bitmap.abdicate()
    ending.set()

    running.result()


# -- the recorder


def test_each_bitmap_has_the_write_in_its_own_granularity():
    bitmaps = [make_bitmap(granularity=g) for g in (512, 4 * KiB, 64 * KiB, 2 * MiB)]
    recorder = Recorder(SIZE, bitmaps)

    recorder.record(65535, 65537)

    assert [dirty(b) for b in bitmaps] == [{127, 128}, {15, 16}, {0, 1}, {0}]


def test_write_that_is_covered_is_not_logged_again():
    logged = []
    recorder = Recorder(SIZE, [make_bitmap()], lambda *extent: logged.append(extent))

    for offset, end in [(0, 1), (5, 4096), (0, 8192), (4096, 8192), (SIZE - 1, SIZE)]:
        recorder.record(offset, end)

    assert logged == [(0, 1), (0, 8192), (SIZE - 1, SIZE)]


def test_write_whose_log_fails_is_logged_next_time():
    bitmap = make_bitmap()
    errors = [OSError(errno.EIO, "the log is gone")]

    def commit(offset, end):
        if errors:
            raise errors.pop()
        logged.append((offset, end))

    logged = []
    recorder = Recorder(SIZE, [bitmap], commit)

    with pytest.raises(OSError, match="the log is gone"):
        recorder.record(0, 1)
    assert dirty(bitmap) == {0}
    recorder.record(0, 1)

    assert logged == [(0, 1)]


def test_bits_are_set_before_they_are_logged():
    bitmap = make_bitmap()
    seen = []
    recorder = Recorder(SIZE, [bitmap], lambda *_: seen.append(dirty(bitmap)))

    recorder.record(4096, 12288)

    assert seen == [{1, 2}]


def test_write_of_nothing_says_nothing_at_a_boundary():
    bitmap = make_bitmap()
    recorder = Recorder(SIZE, [bitmap])

    recorder.record(0, 0)
    recorder.record(8192, 8192)

    assert dirty(bitmap) == set()


class Recording(RuleBasedStateMachine):
    """Bitmaps that come and go, beside sets of the bytes that were written."""

    SIZE = 40 * KiB + 77

    @initialize()
    def begin(self):
        self.bitmaps = []
        self.model = {}
        self.recorder = None

    def _replace(self):
        chosen = [b for b in self.bitmaps if b.recording]
        self.recorder = Recorder(self.SIZE, chosen) if chosen else None

    @rule(granularity=st.sampled_from([512, 1024, 4096, 16384, 65536]))
    def add(self, granularity):
        bitmap = make_bitmap(self.SIZE, granularity)
        self.bitmaps.append(bitmap)
        # What it has, what is frozen, what is saved.
        self.model[bitmap] = [set(), None, set()]
        self._replace()

    @rule(offset=st.integers(0, SIZE - 1), length=st.integers(1, 20 * KiB))
    def write(self, offset, length):
        end = min(offset + length, self.SIZE)
        if self.recorder is not None:
            self.recorder.record(offset, end)
        for bitmap in self.bitmaps:
            if bitmap.recording:
                self.model[bitmap][0] |= units(offset, end, bitmap.granularity)

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data())
    def toggle(self, data):
        bitmap = data.draw(st.sampled_from(self.bitmaps))
        bitmap.recording = not bitmap.recording
        self._replace()

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data(), end=st.sampled_from(["abdicate", "reclaim"]))
    def freeze_or_thaw(self, data, end):
        bitmap = data.draw(st.sampled_from(self.bitmaps))
        model = self.model[bitmap]
        if not bitmap.busy:
            bitmap.freeze(fresh(bitmap))
            model[:2] = set(), model[0]
            self._replace()
        elif end == "abdicate":
            bitmap.abdicate()
            model[1] = None
        else:
            bitmap.reclaim()
            model[:2] = model[0] | model[1], None

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data())
    def merge(self, data):
        target = data.draw(st.sampled_from(self.bitmaps))
        source = data.draw(st.sampled_from(self.bitmaps))
        if target.busy or source.busy:
            return
        target.add(source.bits, source.granularity)
        for number in list(self.model[source][0]):
            at = number * source.granularity
            end = min(at + source.granularity, self.SIZE)
            self.model[target][0] |= units(at, end, target.granularity)

    @precondition(lambda self: self.bitmaps)
    @rule(data=st.data())
    def save(self, data):
        bitmap = data.draw(st.sampled_from(self.bitmaps))
        changed = bitmap.take_unsaved()
        bits, saved = dirty(bitmap), self.model[bitmap][2]
        for first, stop in changed:
            saved -= set(range(first, stop))
            saved |= bits & set(range(first, stop))
        # What was not said to have changed has not.
        assert saved == bits

    @invariant()
    def bitmaps_are_as_modelled(self):
        for bitmap in self.bitmaps:
            now, frozen, _ = self.model[bitmap]
            assert dirty(bitmap) == now | (frozen or set())
            assert set(bitmap.bits.search(1)) == now

    @invariant()
    def covered_never_says_more(self):
        if self.recorder is None:
            return
        size = 1 << self.recorder._shift
        for number in self.recorder._covered.search(bitarray("1")):
            at = number * size
            for bitmap in self.bitmaps:
                if bitmap.recording:
                    end = min(at + size, self.SIZE)
                    needed = units(at, end, bitmap.granularity)
                    assert needed <= set(bitmap.bits.search(1))


Recording.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None
)
TestRecording = Recording.TestCase


# -- the disk


def recorded_disk(source=None, granularity=4 * KiB):
    disk = make_disk(source=source or MemoryImage(SIZE))
    bitmap = make_bitmap(disk.size, granularity)
    disk.recorder = Recorder(disk.size, [bitmap])
    return disk, bitmap


def overwrite(disk, operation, offset, length):
    if operation == "pwrite":
        return disk.write(b"x" * length, offset)
    return {"zero": disk.zero, "discard": disk.discard}[operation](length, offset)


each_operation = pytest.mark.parametrize("operation", ["pwrite", "zero", "discard"])


@each_operation
def test_bits_are_set_before_the_source_changes(operation):
    gate = Gate(MemoryImage(SIZE, b"o" * SIZE))
    disk, bitmap = recorded_disk(gate)
    stay = gate.hold(operation)

    running = Running(overwrite, disk, operation, 4095, 2)
    stay.wait_arrived()

    assert dirty(bitmap) == {0, 1}
    assert gate.image.pread(2, 4095) == b"oo"
    stay.release()
    running.result()
    assert gate.image.pread(2, 4095) != b"oo"


@each_operation
def test_bits_are_set_when_the_write_fails(operation):
    disk, bitmap = recorded_disk(Faulty(MemoryImage(SIZE), on=operation))

    with pytest.raises(OSError, match="injected"):
        overwrite(disk, operation, 0, 4097)

    assert dirty(bitmap) == {0, 1}


@each_operation
def test_write_whose_bits_can_not_be_logged_changes_nothing(operation):
    disk, bitmap = recorded_disk(MemoryImage(SIZE, b"o" * SIZE))

    def commit(offset, end):
        raise OSError(errno.EIO, "the log is gone")

    disk.recorder = Recorder(SIZE, [bitmap], commit)

    with pytest.raises(OSError, match="the log is gone"):
        overwrite(disk, operation, 0, 4096)

    assert disk.read(4096, 0) == b"o" * 4096
    # And it does not stay in flight.
    with drained([disk]):
        assert dirty(bitmap) == {0}


def test_write_of_nothing_changes_no_bit():
    disk, bitmap = recorded_disk()

    assert disk.write(b"", 0) == 0
    assert disk.write(b"", 4096) == 0

    assert dirty(bitmap) == set()


def test_write_beyond_the_end_sets_no_bit():
    disk, bitmap = recorded_disk()

    for offset in SIZE, SIZE + 1, 10 * SIZE:
        with pytest.raises(NoSpace):
            disk.write(b"x", offset)
    with pytest.raises(NoSpace):
        disk.zero(2, SIZE - 1)

    assert dirty(bitmap) == set()


@pytest.mark.parametrize("operation", ["pwrite", "discard"])
def test_write_across_the_end_sets_the_last_bit(operation):
    disk, bitmap = recorded_disk()

    overwrite(disk, operation, SIZE - 1, 64 * KiB)

    assert dirty(bitmap) == {256}


@each_operation
def test_write_that_waits_for_a_drained_disk_is_recorded_afterwards(operation):
    disk, before = recorded_disk()
    after = make_bitmap()

    with drained([disk]):
        running = Running(overwrite, disk, operation, 0, 4096)
        disk.requests.wait_waiting(running)
        disk.recorder = Recorder(disk.size, [after])
    running.result()

    assert dirty(before) == set()
    assert dirty(after) == {0}


@each_operation
def test_write_in_flight_is_recorded_before_the_instant(operation):
    gate = Gate(MemoryImage(SIZE))
    disk, before = recorded_disk(gate)
    after = make_bitmap()
    stay = gate.hold(operation)
    writing = Running(overwrite, disk, operation, 0, 4096)
    stay.wait_arrived()

    def instant():
        with drained([disk]):
            disk.recorder = Recorder(disk.size, [after])

    running = Running(instant)
    disk.requests.wait_waiting(running)
    stay.release()
    writing.result()
    running.result()

    assert dirty(before) == {0}
    assert dirty(after) == set()
