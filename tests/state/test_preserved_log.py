"""The log of what is preserved, durably."""

import errno
import os
import threading
from uuid import UUID

import pytest

from fleecefs.block.bitmap import PAGE, Owner
from fleecefs.errors import NotUsable
from fleecefs.state import preserved_log
from fleecefs.state.preserved_log import LOST, PRESERVED, PreservedLog, read_log
from tests.support.damage import (
    damage_end,
    damage_header,
    empty,
    make_older,
    overwrite,
    remove,
    truncate,
)

DISK = UUID("5f0c4b1e-6b0c-4d0e-9c6a-1f2e3d4c5b6a")
OWNER = Owner(DISK, 7, 1000)
RECORD = 32
FIRST_AT = PAGE + RECORD


@pytest.fixture
def path(tmp_path):
    return tmp_path / "preserved.log"


@pytest.fixture
def small_steps(monkeypatch):
    """Let a log have room for 3 records at first, and then for 131 more at a time."""
    step = PAGE + 4 * RECORD
    monkeypatch.setattr(preserved_log, "_STEP", step)
    return step


def preserved(path, owner=OWNER):
    """Return what the log says is preserved."""
    return [
        (first, stop)
        for kind, first, stop in read_log(path, owner)
        if kind == PRESERVED
    ]


def test_a_new_log_is_empty_and_private(path):
    PreservedLog.create(path, OWNER)

    assert list(read_log(path, OWNER)) == []
    assert path.stat().st_mode & 0o777 == 0o600


def test_space_is_allocated_ahead(path):
    PreservedLog.create(path, OWNER)

    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks * 512 >= 1 << 20


def test_what_is_appended_is_read(path):
    log = PreservedLog.create(path, OWNER)

    log.append(0, 1)
    log.append(3, 1000)

    assert preserved(path) == [(0, 1), (3, 1000)]


def test_the_largest_numbers_fit(path):
    log = PreservedLog.create(path, OWNER)

    log.append(2**64 - 2, 2**64 - 1)

    assert preserved(path) == [(2**64 - 2, 2**64 - 1)]


def test_what_is_lost_is_said_once(path):
    log = PreservedLog.create(path, OWNER)
    log.append(0, 1)

    log.mark_lost()
    log.mark_lost()

    kinds = [record.kind for record in read_log(path, OWNER)]
    assert kinds == [LOST, PRESERVED]


def test_a_log_grows(path, small_steps):
    log = PreservedLog.create(path, OWNER)

    for first in range(500):
        log.append(first, first + 1)

    assert preserved(path) == [(first, first + 1) for first in range(500)]
    assert path.stat().st_size == 5 * small_steps


def test_a_log_that_was_opened_goes_on_where_it_ended(path, small_steps):
    PreservedLog.create(path, OWNER)

    for first in range(100):
        PreservedLog.open(path, OWNER).append(first, first + 1)

    assert preserved(path) == [(first, first + 1) for first in range(100)]
    assert path.stat().st_size == 2 * small_steps


def test_a_log_that_was_opened_goes_on_behind_steps_without_records(path, small_steps):
    PreservedLog.create(path, OWNER).append(0, 1)
    os.truncate(path, 4 * small_steps)

    PreservedLog.open(path, OWNER).append(1, 2)

    assert preserved(path) == [(0, 1), (1, 2)]
    assert path.stat().st_size == 4 * small_steps


def test_a_log_that_was_opened_keeps_the_place_for_what_is_lost(path):
    PreservedLog.create(path, OWNER)

    log = PreservedLog.open(path, OWNER)
    log.append(0, 1)
    log.mark_lost()

    assert [record.kind for record in read_log(path, OWNER)] == [LOST, PRESERVED]


def test_many_threads_append_at_once(path, small_steps):
    log = PreservedLog.create(path, OWNER)

    def append(thread):
        for first in range(100):
            log.append(100 * thread + first, 100 * thread + first + 1)

    threads = [threading.Thread(target=append, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(preserved(path)) == [(first, first + 1) for first in range(400)]


def test_missing_records_are_skipped_and_stay_missing(path):
    log = PreservedLog.create(path, OWNER)
    for first in range(3):
        log.append(first, first + 1)

    with path.open("r+b") as file:
        file.seek(FIRST_AT + RECORD)
        file.write(bytes(RECORD))
    PreservedLog.open(path, OWNER).append(7, 8)

    assert preserved(path) == [(0, 1), (2, 3), (7, 8)]


def test_no_space_for_a_new_log_leaves_no_file_open(path, monkeypatch):
    def full(fd, mode, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preserved_log, "fallocate", full)
    fds = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        PreservedLog.create(path, OWNER)

    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("at", range(RECORD))
def test_a_damaged_record_is_noticed_wherever_the_damage_is(path, at):
    log = PreservedLog.create(path, OWNER)
    log.append(0x0101010101010101, 0x0202020202020202)
    with path.open("r+b") as file:
        file.seek(FIRST_AT + at)
        byte = file.read(1)[0]
        file.seek(FIRST_AT + at)
        file.write(bytes([byte ^ 0x10]))

    with pytest.raises(NotUsable, match=r"preserved\.log: a record is damaged"):
        list(read_log(path, OWNER))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (empty, "not a file of bits"),
        (overwrite, "not a file of bits"),
        (damage_header, "header is damaged"),
        (make_older, "has version 7"),
        (truncate, "is truncated"),
        (damage_end, "a record is damaged"),
    ],
)
def test_a_damaged_log_is_refused_by_name(path, damage, says):
    PreservedLog.create(path, OWNER).append(0, 1)
    damage(path)

    with pytest.raises(NotUsable, match=rf"{path}: .*{says}"):
        list(read_log(path, OWNER))


@pytest.mark.parametrize(
    "size", [PAGE, FIRST_AT, FIRST_AT + RECORD, FIRST_AT + RECORD + 5, (1 << 20) - PAGE]
)
def test_a_log_that_was_cut_short_is_refused(path, size):
    PreservedLog.create(path, OWNER).append(0, 1)
    os.truncate(path, size)

    with pytest.raises(NotUsable, match="is truncated"):
        list(read_log(path, OWNER))
    with pytest.raises(NotUsable, match="is truncated"):
        PreservedLog.open(path, OWNER)


@pytest.mark.parametrize("damage", [empty, overwrite, damage_header, make_older])
def test_a_damaged_log_is_not_appended_to(path, damage):
    PreservedLog.create(path, OWNER)
    damage(path)
    before = path.read_bytes()
    fds = os.listdir("/proc/self/fd")

    with pytest.raises(NotUsable):
        PreservedLog.open(path, OWNER)

    assert path.read_bytes() == before
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(Owner(UUID(int=1), 7, 1000), id="disk"),
        pytest.param(Owner(DISK, 8, 1000), id="epoch"),
        pytest.param(Owner(DISK, 7, 999), id="count of clusters"),
    ],
)
def test_the_log_of_another_is_refused(path, other):
    PreservedLog.create(path, OWNER).append(0, 1)

    with pytest.raises(NotUsable, match="belongs to another"):
        list(read_log(path, other))
    with pytest.raises(NotUsable, match="belongs to another"):
        PreservedLog.open(path, other)


def test_a_missing_log_is_not_made(path):
    PreservedLog.create(path, OWNER)
    remove(path)

    with pytest.raises(FileNotFoundError):
        PreservedLog.open(path, OWNER)
    with pytest.raises(FileNotFoundError):
        list(read_log(path, OWNER))

    assert not path.exists()


def test_without_space_nothing_is_appended_but_that_it_is_lost(
    path, small_steps, monkeypatch
):
    log = PreservedLog.create(path, OWNER)
    for first in range(3):
        log.append(first, first + 1)

    def full(fd, mode, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preserved_log, "fallocate", full)
    with pytest.raises(OSError) as e:
        log.append(3, 4)
    log.mark_lost()
    log.sync()

    assert e.value.errno == errno.ENOSPC
    assert [record.kind for record in read_log(path, OWNER)] == [LOST, *[PRESERVED] * 3]


def test_with_space_again_it_goes_on(path, small_steps):
    log = PreservedLog.create(path, OWNER)
    for first in range(3):
        log.append(first, first + 1)

    def full(fd, mode, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserved_log, "fallocate", full)
        with pytest.raises(OSError):
            log.append(3, 4)
    log.append(3, 4)

    assert preserved(path) == [(first, first + 1) for first in range(4)]


def test_a_write_that_is_cut_short_is_an_error(path, monkeypatch):
    log = PreservedLog.create(path, OWNER)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 5)

    with pytest.raises(OSError) as e:
        log.append(0, 1)

    assert e.value.errno == errno.ENOSPC


def test_it_is_durable_when_it_is_made_and_after_each_sync(path, monkeypatch):
    synced = []
    for name in "fsync", "fdatasync":
        call = getattr(os, name)

        def sync(fd, call=call):
            call(fd)
            synced.append(os.readlink(f"/proc/self/fd/{fd}"))

        monkeypatch.setattr(os, name, sync)

    log = PreservedLog.create(path, OWNER)
    assert synced == [str(path), str(path.parent)]
    log.append(0, 1)
    log.sync()

    assert synced[2:] == [str(path)]
