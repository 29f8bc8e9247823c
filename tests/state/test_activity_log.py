"""The log of areas: what a crash of the host leaves has all that was asked for."""

import errno
import os
import random
import re
import threading
import time
from itertools import count
from uuid import UUID

import pytest
from bitarray import bitarray
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fleecefs.block import bitmap
from fleecefs.errors import NotUsable, TimedOut
from fleecefs.state import activity_log
from fleecefs.state.activity_log import AREA_SIZE, ActivityLog
from fleecefs.units import GiB, MiB, TiB
from tests.support.damage import (
    damage_end,
    damage_header,
    empty,
    make_older,
    overwrite,
    truncate,
)
from tests.support.gate import PATIENCE, Stay
from tests.support.killed import killed_at
from tests.support.power import Power
from tests.support.running import Running

DISK = UUID("5f0c4b1e-6b0c-4d0e-9c6a-1f2e3d4c5b6a")
SIZE = 1 * GiB  # 16 areas
SECTOR = 512
AREAS = 3808  # in a sector
VOID_AT = 4096
AREAS_AT = 8192

each_size = pytest.mark.parametrize(
    ("size", "areas"),
    [
        pytest.param(1, 1, id="one byte"),
        pytest.param(64 * MiB, 1, id="one area"),
        pytest.param(64 * MiB + 1, 2, id="a byte more"),
        pytest.param(AREAS * AREA_SIZE, AREAS, id="one sector"),
        pytest.param(AREAS * AREA_SIZE + 1, AREAS + 1, id="two sectors"),
        pytest.param(10 * TiB, 163840, id="10 TiB"),
    ],
)


def soon():
    return time.monotonic() + PATIENCE


def numbers(areas):
    return set(areas.search(bitarray("1")))


def read(data, size=SIZE):
    """Return the areas in a log, and why it is void."""
    areas, reason = activity_log._read_log(bytes(data), DISK, size, "log")
    return numbers(areas), reason


class Storage:
    """What the log is on: it counts, hangs and fails when told to.

    `durable` is what was synced, `pending` the sectors written since. When a sync
    fails, they stay in the page cache, and no later one writes them.
    """

    def __init__(self, path, patch):
        self.path = path
        self.writes, self.syncs = 0, 0
        self.stays = []
        self.write_error = self.sync_error = None
        self.durable, self.pending = b"", []
        self.dirty = set()
        self._pwrite, self._fdatasync = os.pwrite, os.fdatasync
        patch.setattr(os, "pwrite", self.pwrite)
        patch.setattr(os, "fdatasync", self.fdatasync)
        if path.exists():
            self.settle()

    def hold(self, *, after=False):
        """Hold the next sync."""
        stay = Stay(after)
        self.stays.append(stay)
        return stay

    def _is_ours(self, fd):
        return os.readlink(f"/proc/self/fd/{fd}") == str(self.path)

    def pwrite(self, fd, data, offset):
        if not self._is_ours(fd):
            return self._pwrite(fd, data, offset)
        self.writes += 1
        if self.write_error is not None:
            raise self.write_error
        for at in range(0, len(data), SECTOR):
            self.pending.append((offset + at, bytes(data[at : at + SECTOR])))
            self.dirty.add(offset + at)
        return self._pwrite(fd, data, offset)

    def fdatasync(self, fd):
        if not self._is_ours(fd):
            self._fdatasync(fd)
            return
        stay = self.stays.pop(0) if self.stays else None
        if stay is not None and not stay.is_after:
            stay.stay()
        self.syncs += 1
        if self.sync_error is not None:
            self.dirty.clear()
            raise self.sync_error
        content = self.path.read_bytes()
        durable = bytearray(self.durable)
        for at in self.dirty:
            durable[at : at + SECTOR] = content[at : at + SECTOR]
        self.pending = [each for each in self.pending if each[0] not in self.dirty]
        self.dirty.clear()
        self.durable = bytes(durable)
        if stay is not None and stay.is_after:
            stay.stay()

    def settle(self):
        """Take the file as durable."""
        self.durable, self.pending = self.path.read_bytes(), []
        self.dirty.clear()

    def crash(self, is_kept=lambda: False):
        """Let the host go down, with any of the sectors that are not durable."""
        content = bytearray(self.durable)
        for at, sector in self.pending:
            if is_kept():
                content[at : at + SECTOR] = sector
        self.path.write_bytes(content)
        self.settle()

    def left(self, size=SIZE):
        """Return the areas that are durable."""
        return read(self.durable, size)[0]


class Waiting(threading.Condition):
    """A condition that tells how many wait for it."""

    def __init__(self, lock):
        super().__init__(lock)
        self._waiting = 0
        self._told = threading.Condition()

    def wait(self, timeout=None):
        self._count(1)
        try:
            return super().wait(timeout)
        finally:
            self._count(-1)

    def _count(self, number):
        with self._told:
            self._waiting += number
            self._told.notify_all()

    def wait_waiting(self, number):
        with self._told:
            came = self._told.wait_for(lambda: self._waiting == number, PATIENCE)
            assert came, f"{self._waiting} wait"


def watched(log):
    log.waiting = log._ended = Waiting(log._lock)
    # The thread of the log, when it has nothing to do.
    log.resting = log._needed = Waiting(log._lock)
    return log


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "activity.log"


@pytest.fixture
def log(path):
    log = watched(ActivityLog.create(path, DISK, SIZE))
    yield log
    log.close()


@pytest.fixture
def storage(log, path, monkeypatch):
    return Storage(path, monkeypatch)


def ensured(log, first, stop=None):
    log.ensure(first, first + 1 if stop is None else stop, soon())


def ensuring(log, first, stop=None):
    return Running(ensured, log, first, stop)


def held(log, storage, first):
    """Return a sync that is held, and who waits for it."""
    stay = storage.hold()
    running = ensuring(log, first)
    stay.wait_arrived()
    log.waiting.wait_waiting(1)
    return stay, running


def opened(path, size=SIZE, disk=DISK):
    """Return what a log has when it is opened."""
    log = ActivityLog.open(path, disk, size)
    log.close()
    return numbers(log.areas), log.void_reason


# -- what is in it


@each_size
def test_a_new_log_is_empty_private_and_written_in_full(path, size, areas):
    log = ActivityLog.create(path, DISK, size)
    log.close()

    assert len(log.areas) == areas
    assert opened(path, size) == (set(), None)
    assert path.stat().st_mode & 0o777 == 0o600
    length = AREAS_AT + SECTOR * -(-areas // AREAS)
    assert path.stat().st_size == length <= path.stat().st_blocks * 512


@each_size
def test_the_first_and_the_last_area_are_read(path, size, areas):
    log = ActivityLog.create(path, DISK, size)
    for area in {0, areas - 1}:
        ensured(log, area)
    log.close()

    assert opened(path, size) == ({0, areas - 1}, None)


@each_size
def test_all_areas_at_once_are_read(path, size, areas):
    log = ActivityLog.create(path, DISK, size)
    ensured(log, 0, areas)
    log.close()

    assert opened(path, size) == (set(range(areas)), None)


def test_a_range_over_two_sectors_is_one_write(path, monkeypatch):
    size = 3 * AREAS * AREA_SIZE
    log = ActivityLog.create(path, DISK, size)
    storage = Storage(path, monkeypatch)

    ensured(log, AREAS - 2, AREAS + 2)
    log.close()

    assert (storage.writes, storage.syncs) == (1, 1)
    assert opened(path, size)[0] == set(range(AREAS - 2, AREAS + 2))


def test_a_new_log_replaces_what_is_there(path, log):
    ensured(log, 3)
    path.with_name("activity.log.new").write_text("left by a crash")

    ActivityLog.create(path, UUID(int=1), 10 * TiB).close()

    assert opened(path, 10 * TiB, UUID(int=1)) == (set(), None)


def test_what_was_in_it_when_it_was_opened_is_current(path, log, monkeypatch):
    ensured(log, 3, 6)
    again = ActivityLog.open(path, DISK, SIZE)
    storage = Storage(path, monkeypatch)

    ensured(again, 3, 6)
    assert storage.writes == 0
    ensured(again, 5, 7)
    again.close()

    assert opened(path)[0] == {3, 4, 5, 6}


def test_what_was_in_it_when_it_was_opened_is_dropped_by_a_save(path, log):
    ensured(log, 3)
    again = ActivityLog.open(path, DISK, SIZE)

    again.rotate()
    again.settle()
    again.close()

    assert opened(path)[0] == set()


def test_nothing_to_ensure_is_nothing_to_do(log, storage):
    ensured(log, 5, 5)

    assert storage.writes == 0
    assert log._thread is None


def test_a_range_beyond_the_end_is_a_bug(log):
    with pytest.raises(AssertionError):
        ensured(log, 16)


# -- who waits for what


def test_what_is_current_takes_neither_io_nor_lock(log, storage):
    ensured(log, 2, 9)
    writes = storage.writes

    with log._lock:
        ensuring(log, 2, 9).result()
        ensuring(log, 4).result()

    assert storage.writes == writes


def test_ensure_waits_for_the_sync(log, storage):
    stay, first = held(log, storage, 3)

    assert storage.left() == set()
    stay.release()
    first.result()

    assert storage.left() == {3}


def test_all_who_wait_at_a_moment_share_a_sync(log, storage):
    stay, first = held(log, storage, 0)
    others = [ensuring(log, area % 16) for area in range(1, 40)]
    log.waiting.wait_waiting(40)
    stay.release()

    for each in [first, *others]:
        each.result()

    assert (storage.writes, storage.syncs) == (2, 2)
    assert storage.left() == set(range(16))


def test_who_wants_what_is_on_its_way_waits_for_that(log, storage):
    stay, first = held(log, storage, 0)
    second = ensuring(log, 0)
    log.waiting.wait_waiting(2)
    stay.release()

    first.result()
    second.result()

    assert storage.syncs == 1


def test_ensure_gives_up_at_its_deadline(log, storage, path):
    stay = storage.hold()

    with pytest.raises(TimedOut, match=re.escape(f"{path}: the storage does not")):
        log.ensure(0, 1, time.monotonic() + 0.02)
    with pytest.raises(TimedOut):
        log.ensure(1, 2, time.monotonic())

    # It was late, not lost.
    stay.release()
    ensured(log, 0, 2)
    assert storage.left() == {0, 1}


def test_while_storage_hangs_what_is_durable_does_not_wait(log, storage):
    ensured(log, 7)
    log.rotate()
    stay, first = held(log, storage, 0)

    ensured(log, 7)

    stay.release()
    first.result()


def test_the_lock_is_free_while_storage_hangs(log, storage):
    stay, first = held(log, storage, 0)

    assert log._lock.acquire(timeout=PATIENCE)
    log._lock.release()
    log.rotate()

    stay.release()
    first.result()


# -- failures


@pytest.mark.parametrize("on", ["write_error", "sync_error"])
def test_a_failure_is_for_ever(log, storage, path, on):
    ensured(log, 7)
    setattr(storage, on, OSError(errno.EIO, "injected"))
    with pytest.raises(OSError, match="injected"):
        ensured(log, 0)
    log.resting.wait_waiting(1)
    setattr(storage, on, None)
    writes = storage.writes

    for call in (
        lambda: ensured(log, 0),
        lambda: ensured(log, 1),
        lambda: ensured(log, 6, 8),
        log.settle,
    ):
        with pytest.raises(OSError, match=re.escape(str(path))) as e:
            call()
        assert e.value.errno == errno.EIO

    log.resting.wait_waiting(1)
    assert storage.writes == writes
    # What is durable stays so.
    ensured(log, 7)
    log.rotate()
    ensured(log, 7)
    assert storage.left() == {7}


def test_all_who_wait_are_told_of_a_failure(log, storage):
    storage.sync_error = OSError(errno.ENOSPC, "injected")
    stay, first = held(log, storage, 0)
    second = ensuring(log, 1)
    third = Running(log.settle)
    log.waiting.wait_waiting(3)
    stay.release()

    errors = [each.error() for each in (first, second, third)]

    assert [error.errno for error in errors] == [errno.ENOSPC] * 3
    assert len({id(error) for error in errors}) == 3


def test_a_write_that_is_cut_short_is_an_error(log, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 5)

    with pytest.raises(OSError) as e:
        ensured(log, 0)

    assert e.value.errno == errno.ENOSPC


def test_a_settle_that_failed_leaves_what_is_in_both(log, storage):
    ensured(log, 0, 4)
    log.rotate()
    ensured(log, 2)
    storage.sync_error = OSError(errno.EIO, "injected")

    with pytest.raises(OSError, match="injected"):
        log.settle()

    ensured(log, 2)
    with pytest.raises(OSError, match="injected"):
        ensured(log, 3)
    for kept in True, False:
        storage.crash(lambda kept=kept: kept)
        assert 2 in storage.left()


def test_what_a_failed_sync_left_in_the_page_cache_is_durable_once_opened(
    log, storage, path
):
    storage.sync_error = OSError(errno.EIO, "injected")
    with pytest.raises(OSError, match="injected"):
        ensured(log, 5)
    log.close()
    storage.sync_error = None

    again = ActivityLog.open(path, DISK, SIZE)
    ensured(again, 5)
    again.close()

    assert 5 in storage.left()


def test_its_name_is_durable_once_opened(log, path, monkeypatch):
    synced = []
    monkeypatch.setattr(activity_log, "sync_directory", synced.append)

    opened(path)

    assert synced == [path.parent]


def test_a_log_that_can_not_be_made_durable_is_not_opened(log, storage, path):
    storage.sync_error = OSError(errno.EIO, "injected")
    fds = os.listdir("/proc/self/fd")

    with pytest.raises(OSError, match="injected"):
        ActivityLog.open(path, DISK, SIZE)

    assert os.listdir("/proc/self/fd") == fds


def test_without_a_thread_the_next_one_tries_again(log, storage, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(OSError, match="can't start new thread"):
            ensured(log, 0)
    ensured(log, 0)

    assert storage.left() == {0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_a_bug_nobody_waits(log, monkeypatch):
    def broken(fd, data, offset):
        raise ZeroDivisionError

    monkeypatch.setattr(os, "pwrite", broken)

    with pytest.raises(OSError, match="its thread has ended"):
        ensured(log, 0)
    with pytest.raises(OSError, match="its thread has ended"):
        log.settle()
    with pytest.raises(OSError, match="its thread has ended"):
        log.mark_void("a bug", soon())


# -- the void marker


def test_a_void_log_says_why_and_nobody_waits(log, storage, path):
    ensured(log, 3)
    log.mark_void("the storage hangs", soon())
    writes = storage.writes

    with log._lock:
        ensuring(log, 0, 16).result()

    assert storage.writes == writes
    assert read(storage.durable) == ({3}, "the storage hangs")
    assert log.void_reason == "the storage hangs"
    assert opened(path) == ({3}, "the storage hangs")


def test_void_is_for_ever_and_has_one_reason(log, storage, path):
    log.mark_void("one", soon())
    log.mark_void("two", soon())
    log.rotate()
    log.settle()

    assert log.void_reason == "one"
    assert storage.writes == 1
    again = ActivityLog.open(path, DISK, SIZE)
    again.mark_void("three", soon())
    again.ensure(0, 16, time.monotonic())
    again.close()
    assert opened(path) == (set(), "one")


@pytest.mark.parametrize("on", ["write_error", "sync_error"])
def test_the_void_marker_is_written_after_a_failure(log, storage, on):
    setattr(storage, on, OSError(errno.EIO, "injected"))
    with pytest.raises(OSError, match="injected"):
        ensured(log, 3)
    setattr(storage, on, None)

    log.mark_void("could not log", soon())

    ensured(log, 3)
    assert read(storage.durable)[1] == "could not log"
    assert {offset for offset, _ in storage.pending} <= {AREAS_AT}


def test_a_void_marker_that_failed_may_be_tried_again(log, storage):
    storage.sync_error = OSError(errno.EIO, "injected")
    for _ in range(2):
        with pytest.raises(OSError, match="injected"):
            log.mark_void("could not log", soon())
    assert log.void_reason is None
    storage.sync_error = None

    log.mark_void("could not log", soon())

    assert read(storage.durable)[1] == "could not log"


def test_a_failed_void_marker_fails_the_log(log, storage):
    storage.sync_error = OSError(errno.EIO, "injected")
    with pytest.raises(OSError, match="injected"):
        log.mark_void("could not log", soon())
    storage.sync_error = None

    with pytest.raises(OSError, match="injected"):
        ensured(log, 0)


def test_void_lets_go_those_who_wait(log, storage):
    stay, first = held(log, storage, 0)
    second = ensuring(log, 1)
    void = Running(log.mark_void, "the storage hangs", soon())
    log.waiting.wait_waiting(3)
    third = storage.hold(after=True)
    fourth = storage.hold()
    stay.release()
    third.wait_arrived()
    third.release()

    void.result()
    second.result()
    first.result()

    assert read(storage.durable) == ({0}, "the storage hangs")
    fourth.release()


def test_who_gave_up_does_not_make_the_log_void(log, storage):
    stay, first = held(log, storage, 0)

    with pytest.raises(TimedOut):
        log.mark_void("the storage hangs", time.monotonic())
    stay.release()
    first.result()
    ensured(log, 1)

    assert read(storage.durable) == ({0, 1}, None)


@pytest.mark.parametrize(
    ("reason", "read"),
    [
        pytest.param("x", "x", id="short"),
        pytest.param("x" * 5000, "x" * 472, id="too long"),
        pytest.param("x" + "ü" * 5000, "x" + "ü" * 235, id="too long, cut in a letter"),
        pytest.param("a\udc80b", "a?b", id="not UTF-8"),
    ],
)
def test_a_reason_is_cut_to_what_fits(log, path, reason, read):
    log.mark_void(reason, soon())

    assert opened(path)[1] == read


def test_no_reason_is_a_bug(log):
    with pytest.raises(AssertionError):
        log.mark_void("", soon())


# -- damage


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture
def full(path):
    """A log of two sectors with some areas, and void; return its size."""
    size = (AREAS + 100) * AREA_SIZE
    log = ActivityLog.create(path, DISK, size)
    ensured(log, 3, AREAS + 50)
    log.mark_void("it was so", soon())
    log.close()
    return size


def test_a_damaged_byte_is_noticed_or_does_not_matter(path, full, monkeypatch):
    monkeypatch.setattr(os, "fdatasync", lambda fd: None)
    monkeypatch.setattr(activity_log, "sync_directory", lambda path: None)
    before = opened(path, full)
    harmless = set()

    for at in range(path.stat().st_size):
        flip(path, at)
        try:
            assert opened(path, full) == before
            harmless.add(at)
        except NotUsable:
            pass
        flip(path, at)

    gaps = {*range(SECTOR, VOID_AT), *range(VOID_AT + SECTOR, AREAS_AT)}
    assert harmless == gaps


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (empty, "not of an activity log"),
        (overwrite, "not of an activity log"),
        (damage_header, "sector 0 is damaged"),
        (make_older, "has version 7, not 1"),
        (truncate, "has 9215 bytes, not 9216"),
        (damage_end, "sector 17 is damaged"),
    ],
)
def test_a_damaged_log_is_refused_by_name_and_kept(path, full, damage, says):
    damage(path)
    before = path.read_bytes()
    fds = os.listdir("/proc/self/fd")

    with pytest.raises(NotUsable, match=rf"{path}: .*{says}"):
        ActivityLog.open(path, DISK, full)

    assert path.read_bytes() == before
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("length", [1, 511, 512, 4096, 8192, 8704, 9215, 9217, 20000])
def test_a_log_of_another_length_is_refused(path, full, length):
    os.truncate(path, length)

    with pytest.raises(NotUsable, match=r"bytes, not 9216|not of an activity log"):
        ActivityLog.open(path, DISK, full)


def test_sectors_that_have_changed_places_are_noticed(path, full):
    data = path.read_bytes()
    one, two = data[AREAS_AT:][:SECTOR], data[AREAS_AT + SECTOR :]
    path.write_bytes(data[:AREAS_AT] + two + one)

    with pytest.raises(NotUsable, match="sector 16 is damaged"):
        ActivityLog.open(path, DISK, full)


def test_a_sector_of_another_disk_is_noticed(path, full):
    data = path.read_bytes()
    ActivityLog.create(path, UUID(int=1), full).close()
    path.write_bytes(data[:AREAS_AT] + path.read_bytes()[AREAS_AT:])

    with pytest.raises(NotUsable, match="belongs to another disk"):
        ActivityLog.open(path, DISK, full)


@pytest.mark.parametrize("size", [1, SIZE - 1, SIZE + 1, 2 * SIZE, 10 * TiB])
def test_the_log_of_a_disk_of_another_size_is_refused(path, log, size):
    with pytest.raises(NotUsable, match="belongs to a disk of another size"):
        ActivityLog.open(path, DISK, size)


def test_the_log_of_another_disk_is_refused(path, log):
    with pytest.raises(NotUsable, match="belongs to another disk"):
        ActivityLog.open(path, UUID(int=1), SIZE)


def test_a_log_of_areas_of_another_size_is_refused(path, log, monkeypatch):
    monkeypatch.setattr(activity_log, "AREA_SIZE", 32 * MiB)

    with pytest.raises(NotUsable, match="another size"):
        ActivityLog.open(path, DISK, SIZE)


def test_a_missing_log_is_not_made(path):
    with pytest.raises(FileNotFoundError):
        ActivityLog.open(path, DISK, SIZE)

    assert not path.exists()


# -- saves


def test_a_save_drops_what_was_asked_for_before_it(log, storage):
    ensured(log, 0, 4)

    log.rotate()
    assert storage.left() == {0, 1, 2, 3}
    log.settle()

    assert storage.left() == set()


def test_what_is_asked_for_during_a_save_is_kept(log, storage):
    ensured(log, 0, 4)
    log.rotate()
    ensured(log, 8)
    log.settle()

    assert storage.left() == {8}


def test_what_is_asked_for_again_during_a_save_is_kept_without_io(log, storage):
    ensured(log, 0, 4)
    log.rotate()
    writes = storage.writes

    ensured(log, 1, 3)
    assert storage.writes == writes
    log.settle()

    assert storage.left() == {1, 2}


def test_what_came_after_the_deadline_does_not_hide_what_is_asked_for_again(
    log, storage
):
    ensured(log, 0)
    log.rotate()
    stay = storage.hold()
    with pytest.raises(TimedOut):
        log.ensure(8, 9, time.monotonic())
    stay.wait_arrived()
    stay.release()
    log.resting.wait_waiting(1)

    ensured(log, 0)
    log.settle()

    assert storage.left() == {0, 8}


def test_what_was_dropped_is_logged_anew(log, storage):
    ensured(log, 0)
    log.rotate()
    log.settle()

    ensured(log, 0)

    assert storage.left() == {0}


def test_a_save_with_nothing_to_drop_takes_no_io(log, storage):
    log.rotate()
    log.settle()
    ensured(log, 0)
    log.settle()

    assert storage.writes == 1


def test_after_a_save_that_failed_the_next_one_drops_all(log, storage):
    ensured(log, 0)
    log.rotate()
    ensured(log, 1)

    log.rotate()
    ensured(log, 2)
    assert storage.left() == {0, 1, 2}
    log.settle()

    assert storage.left() == {2}


def test_settle_returns_when_it_is_durable(log, storage):
    ensured(log, 0)
    log.rotate()
    stay = storage.hold()
    settling = Running(log.settle)
    stay.wait_arrived()
    log.waiting.wait_waiting(1)

    assert storage.left() == {0}
    stay.release()
    settling.result()

    assert storage.left() == set()


def test_while_settle_writes_what_it_drops_waits_for_a_write_of_its_own(log, storage):
    ensured(log, 0, 4)
    log.rotate()
    ensured(log, 1)
    stay, second = storage.hold(after=True), storage.hold()
    settling = Running(log.settle)
    stay.wait_arrived()
    ensured(log, 1)
    again = ensuring(log, 0, 2)
    log.waiting.wait_waiting(2)

    stay.release()
    settling.result()
    second.wait_arrived()
    assert storage.left() == {1}
    log.waiting.wait_waiting(1)
    second.release()
    again.result()

    assert storage.left() == {0, 1}


def test_what_is_asked_for_before_settle_begins_to_write_is_kept(log, storage):
    ensured(log, 0, 4)
    log.rotate()
    stay, first = held(log, storage, 8)
    settling = Running(log.settle)
    log.waiting.wait_waiting(2)

    ensured(log, 2)
    stay.release()
    first.result()
    settling.result()

    assert storage.left() == {2, 8}


def test_settle_does_not_take_the_round_before_it_for_its_own(log, storage):
    ensured(log, 0)
    log.rotate()
    stay, first = held(log, storage, 8)
    second = storage.hold()
    settling = Running(log.settle)
    log.waiting.wait_waiting(2)

    stay.release()
    first.result()
    second.wait_arrived()
    assert storage.left() == {0, 8}
    log.waiting.wait_waiting(1)
    second.release()
    settling.result()

    assert storage.left() == {8}


def test_who_waits_during_rotate_is_kept_until_settle(log, storage):
    stay, first = held(log, storage, 3)

    log.rotate()
    stay.release()
    first.result()

    # He has looked again, after `rotate`.
    log.settle()
    assert storage.left() == {3}


def test_who_waits_during_a_whole_save_gets_what_he_waits_for(log, storage):
    ensured(log, 7)
    stay, first = held(log, storage, 3)
    log.rotate()
    second = storage.hold(after=True)
    settling = Running(log.settle)
    log.waiting.wait_waiting(2)

    stay.release()
    second.wait_arrived()
    second.release()
    settling.result()
    first.result()
    ensured(log, 3)

    assert storage.left() == {3}


def test_rotate_during_settle_takes_nothing_from_the_next_save(log, storage):
    ensured(log, 0)
    log.rotate()
    ensured(log, 1)
    stay = storage.hold()
    settling = Running(log.settle)
    stay.wait_arrived()

    log.rotate()
    stay.release()
    settling.result()
    assert storage.left() == {1}
    log.settle()

    assert storage.left() == set()


def test_rotate_before_settle_writes_takes_nothing_from_the_next_save(log, storage):
    ensured(log, 0)
    log.rotate()
    stay, first = held(log, storage, 1)
    settling = Running(log.settle)
    log.waiting.wait_waiting(2)

    log.rotate()
    stay.release()
    first.result()
    settling.result()

    assert storage.left() == {1}


def test_each_bit_is_in_a_save_or_its_area_in_the_log(log, storage):
    # A bit of each writer in each area, with a number, so that each is a new one.
    bits, saves = {}, [{}]
    ends = threading.Event()

    def write(seed):
        chance = random.Random(seed)
        for number in range(1, 301):
            area = chance.randrange(16)
            bits[seed, area] = number
            ensured(log, area)
            # In this order: what is no longer in the log is in the save before.
            is_logged = area in storage.left()
            assert is_logged or saves[-1].get((seed, area), 0) >= number

    def save():
        while not ends.is_set():
            log.rotate()
            saves.append(bits.copy())
            log.settle()

    writers = [Running(write, seed) for seed in range(4)]
    saver = Running(save)
    for writer in writers:
        writer.result()
    ends.set()
    saver.result()

    assert storage.syncs > 10


# -- the end


def test_close_ends_the_thread_and_closes_the_file(path):
    fds = os.listdir("/proc/self/fd")
    log = ActivityLog.create(path, DISK, SIZE)
    assert log._thread is None
    ensured(log, 0)
    assert log._thread.daemon

    log.close()
    log.close()

    assert not log._thread.is_alive()
    assert os.listdir("/proc/self/fd") == fds


def test_close_closes_the_file_once_if_there_is_no_thread(path):
    fds = os.listdir("/proc/self/fd")
    log = ActivityLog.create(path, DISK, SIZE)

    log.close()
    other = os.open(path, os.O_RDONLY)
    log.close()
    os.close(other)

    assert os.listdir("/proc/self/fd") == fds


def test_a_closed_log_fails_those_who_come(log, path):
    log.close()

    for call in (
        lambda: ensured(log, 0),
        lambda: log.mark_void("late", soon()),
        log.settle,
    ):
        with pytest.raises(OSError, match="is closed"):
            call()
    assert log._thread is None


def test_close_does_not_wait_for_storage_that_hangs(log, storage, monkeypatch):
    monkeypatch.setattr(activity_log, "_CLOSE_SECONDS_MAX", 0.01)
    stay, first = held(log, storage, 0)
    void = Running(log.mark_void, "the storage hangs", soon())
    settling = Running(log.settle)
    log.waiting.wait_waiting(3)

    log.close()

    for each in first, void, settling:
        with pytest.raises(OSError, match="is closed"):
            each.result()
    # Its number is not free for other files until the thread has let it go.
    assert os.readlink(f"/proc/self/fd/{log._fd}") == str(storage.path)
    stay.release()
    log._thread.join(PATIENCE)
    assert not log._thread.is_alive()


# -- any sequence


class Walk(RuleBasedStateMachine):
    """A log beside two sets: what it must have, and what it may have."""

    names = count()

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.path = self.directory / f"{next(self.names)}.log"
        self.size = 2 * AREAS * AREA_SIZE
        self.log = ActivityLog.create(self.path, DISK, self.size)
        self.storage = Storage(self.path, self.patch)
        self.must, self.may = set(), set()
        # What it must have that was asked for before `rotate`, and what may be there
        # of what was asked for since.
        self.earlier, self.since = set(), set()
        self.has_failed = False
        self.reason = None

    def teardown(self):
        self.log.close()
        self.patch.undo()
        self.path.unlink()

    @rule(
        first=st.sampled_from([0, 5, AREAS - 2, 2 * AREAS - 6]),
        length=st.integers(0, 6),
    )
    def ensure(self, first, length):
        if self.reason is None:
            self.may.update(range(first, first + length))
            self.since.update(range(first, first + length))
        try:
            self.log.ensure(first, first + length, soon())
        except OSError:
            assert self.has_failed or self.storage.sync_error
            self.has_failed = True
            return
        if self.reason is None:
            self.must.update(range(first, first + length))
            self.earlier.difference_update(range(first, first + length))

    @rule()
    def rotate(self):
        self.log.rotate()
        self.earlier, self.since = self.must.copy(), set()

    @rule()
    def settle(self):
        dropped, self.earlier = self.earlier, set()
        self.must -= dropped
        try:
            self.log.settle()
        except OSError:
            assert self.has_failed or self.storage.sync_error
            self.has_failed = True
            return
        assert not self.has_failed
        self.may = self.since.copy()

    @rule()
    def fail(self):
        self.storage.sync_error = OSError(errno.EIO, "injected")

    @rule()
    def mend(self):
        self.storage.sync_error = None

    @rule()
    def void(self):
        try:
            self.log.mark_void("void", soon())
            self.reason = "void"
        except OSError:
            assert self.storage.sync_error
            self.has_failed = True

    @precondition(lambda self: self.storage.sync_error is None)
    @rule()
    def daemon_crash(self):
        self._reopen()
        # What failed may be there.
        assert self.must <= numbers(self.log.areas) <= self.may

    @precondition(lambda self: self.storage.sync_error is None)
    @rule(chance=st.randoms(use_true_random=False))
    def host_crash(self, chance):
        self.storage.crash(lambda: chance.random() < 0.5)
        self._reopen()
        assert self.must <= numbers(self.log.areas) <= self.may
        if self.reason is not None:
            assert self.log.void_reason == self.reason

    def _reopen(self):
        self.log.close()
        self.log = ActivityLog.open(self.path, DISK, self.size)
        self.must = numbers(self.log.areas)
        self.earlier, self.since = set(), self.must.copy()
        self.has_failed = False
        self.reason = self.log.void_reason

    @invariant()
    def durable_has_what_it_must(self):
        assert self.must <= self.storage.left(self.size) <= self.may


def test_any_sequence(tmpfs_path):
    walk = type("WalkHere", (Walk,), {"directory": tmpfs_path})

    walk.TestCase.settings = settings(
        max_examples=150,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )

    walk.TestCase("runTest").runTest()


# -- crashes at each step


class Model:
    """What a log must have, and what it may have, at each moment."""

    def __init__(self, log):
        self.log = log
        self.must, self.may, self.since = set(), set(), set()
        self.reasons = {None}
        self.is_new = False

    def expected(self):
        return frozenset(self.must), frozenset(self.may), frozenset(self.reasons)

    def ensure(self, first, stop):
        areas = set(range(first, stop))
        self.may |= areas
        ensured(self.log, first, stop)
        self.must |= areas
        self.since |= areas

    def rotate(self):
        self.log.rotate()
        self.since = set()

    def settle(self):
        self.must = set(self.since)
        self.log.settle()
        self.may = set(self.since)

    def void(self):
        self.reasons = {None, "void"}
        self.log.mark_void("void", soon())
        self.reasons = {"void"}


BIG = 5 * AREAS * AREA_SIZE


def save_and_void(model):
    model.ensure(1, 2)
    model.ensure(AREAS - 1, AREAS + 1)
    model.rotate()
    model.ensure(0, 2)
    model.ensure(3 * AREAS, 4 * AREAS + 7)
    model.settle()
    model.ensure(AREAS, AREAS + 1)
    model.void()


def saves_in_a_row(model):
    for number in range(3):
        model.ensure(number * AREAS, (number + 2) * AREAS)
        model.rotate()
        model.ensure(number, number + 1)
        model.settle()


def failed_saves(model):
    model.ensure(0, 5 * AREAS)
    model.rotate()
    model.ensure(7, 8)
    model.rotate()
    model.ensure(2 * AREAS, 2 * AREAS + 1)
    model.settle()
    model.ensure(0, 5 * AREAS)


@pytest.mark.parametrize("story", [save_and_void, saves_in_a_row, failed_saves])
def test_what_a_crash_at_any_step_leaves_has_what_it_must(
    tmpfs_path, monkeypatch, story
):
    path = tmpfs_path / "state" / "activity.log"
    path.parent.mkdir()
    model = Model(ActivityLog.create(path, DISK, BIG))
    power = Power(path.parent, tmpfs_path / "none", [], model.expected)

    with pytest.MonkeyPatch.context() as patch:
        power.watch(patch)
        story(model)
        power._point("the end")
        model.log.close()

    failures = list(power.failures())
    for failure in failures:
        power.restore(failure)
        areas, reason = opened(path, BIG)
        must, may, reasons = failure.point.expected
        assert must <= areas <= may, failure
        assert reason in reasons, failure
    assert len(failures) > 15


def test_what_a_crash_leaves_with_many_writers_has_what_it_must(tmpfs_path):
    path = tmpfs_path / "state" / "activity.log"
    path.parent.mkdir()
    log = ActivityLog.create(path, DISK, BIG)
    must, lock = set(), threading.Lock()

    def expected():
        with lock:
            return frozenset(must)

    def write(seed):
        chance = random.Random(seed)
        for _ in range(10):
            area = chance.randrange(5 * AREAS)
            ensured(log, area)
            with lock:
                must.add(area)

    power = Power(path.parent, tmpfs_path / "none", [], expected)
    with pytest.MonkeyPatch.context() as patch:
        power.watch(patch)
        for each in [Running(write, seed) for seed in range(4)]:
            each.result()
        power._point("the end")
        log.close()

    for failure in power.failures():
        power.restore(failure)
        assert failure.point.expected <= opened(path, BIG)[0], failure


@pytest.mark.parametrize("was_there", [False, True])
def test_a_crash_while_it_is_made_leaves_the_old_one_or_the_new_one(
    tmpfs_path, monkeypatch, was_there
):
    path = tmpfs_path / "state" / "activity.log"
    path.parent.mkdir()
    if was_there:
        old = ActivityLog.create(path, DISK, SIZE)
        ensured(old, 3)
        old.close()
    is_made = False
    power = Power(path.parent, tmpfs_path / "none", [], lambda: is_made)

    with pytest.MonkeyPatch.context() as patch:
        power.watch(patch)
        patch.setattr(bitmap, "reached", power._point)
        ActivityLog.create(path, DISK, SIZE).close()
        is_made = True
        power._point("the end")

    found = set()
    for failure in power.failures():
        power.restore(failure)
        try:
            areas, _ = opened(path)
            found.add(frozenset(areas))
        except FileNotFoundError:
            areas = None
            found.add(None)
        if failure.point.expected:
            assert areas == set(), failure
    assert found == {frozenset({3}) if was_there else None, frozenset()}


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_who_is_killed_while_it_is_made_leaves_the_old_one_or_the_new_one(path, nth):
    old = ActivityLog.create(path, DISK, SIZE)
    ensured(old, 3)
    old.close()

    point = killed_at(nth, ActivityLog.create, path, DISK, SIZE)

    left = opened(path)[0]
    assert left == ({3} if point == "replace.written" else set())
    assert (point is None) == (nth == 3)


def saved(path):
    model = Model(ActivityLog.open(path, DISK, BIG))
    save_and_void(model)


def test_who_is_killed_at_any_step_leaves_a_log_that_is_whole(path):
    passed = []
    for nth in count(1):
        ActivityLog.create(path, DISK, BIG).close()
        point = killed_at(nth, saved, path)
        areas, reason = opened(path, BIG)
        if point is None:
            break
        passed.append(point)

    assert set(passed) == {"activity.written", "activity.synced"}
    assert reason == "void"
    assert {AREAS, 3 * AREAS} <= areas
