"""Dirty bitmaps when their log or a save fails, and when a job is gone."""

import errno
import os
import re
import threading

import pytest

from fleecefs.bitmaps import disk as bitmaps_of_disk
from fleecefs.bitmaps import mount as bitmaps_of_mount
from fleecefs.bitmaps.containers import OpenContainer
from fleecefs.bitmaps.steps import (
    Abort,
    Add,
    Clear,
    Enable,
    Freeze,
    Remove,
)
from fleecefs.errors import Refused
from tests.bitmaps.hosts import (
    CLUSTER,
    COUNT,
    WEB,
    change,
    check_nothing_leaks,
    described,
    dirty,
    held,
    log_of,
    make_host,
    reason,
    saved,
    write,
)
from tests.support.disks import letters
from tests.support.gate import PATIENCE, Stay
from tests.support.mount import wait_until
from tests.support.qemu import require_qemu
from tests.support.running import Running

FAILED = "its activity log failed: .*activity.log: Input/output error"
EVENT = "FLEECEFS_BITMAP_INCONSISTENT"


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    require_qemu()
    host = make_host(tmpfs_path, monkeypatch)
    host.open()
    yield host
    host.end()


def add(name, disk=WEB, **more):
    return Add(disk, name, granularity=CLUSTER, **more)


class LogStorage:
    """What the log of a disk is on: it fails and hangs when told to."""

    def __init__(self, host, monkeypatch):
        self._path = str(log_of(host))
        self.fails = self.void_fails = False
        self.stay: Stay | None = None
        self._pwrite, self._fdatasync = os.pwrite, os.fdatasync
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)

    def _is_ours(self, fd):
        return os.readlink(f"/proc/self/fd/{fd}") == self._path

    def pwrite(self, fd, data, offset):
        # The void marker is alone in its page.
        is_void = offset == 4096
        if self._is_ours(fd) and (self.void_fails if is_void else self.fails):
            raise OSError(errno.EIO, "Input/output error")
        return self._pwrite(fd, data, offset)

    def fdatasync(self, fd):
        if self._is_ours(fd) and self.stay is not None:
            stay, self.stay = self.stay, None
            stay.stay()
        self._fdatasync(fd)


@pytest.fixture
def storage(host, monkeypatch):
    return LogStorage(host, monkeypatch)


# -- the log fails


@pytest.mark.logs(FAILED)
@pytest.mark.parametrize("end", ["nothing", "kill", "host crash", "clean end"])
def test_guest_goes_on_when_the_log_fails(host, storage, end):
    change(host, add("daily"), add("off", recording=False))
    change(host, Add(WEB, "now", granularity=CLUSTER, persistent=False))
    storage.fails = True

    write(host, 1)
    write(host, 9)

    assert letters(host.live(WEB)) == "axaaaaaaaxaaaaaa"
    why = reason(host, "daily")
    assert re.fullmatch(FAILED, why)
    data = {"disk": WEB, "name": "daily", "reason": why}
    assert host.events == [(EVENT, data)]
    assert dirty(host, "now") == {1, 9}
    assert dirty(host, "off") == set()
    storage.fails = False
    come_back(host, end)
    # What was said is durable.
    assert why in reason(host, "daily")
    assert dirty(host, "off") == set()
    change(host, Clear(WEB, "daily"))
    write(host, 2)
    assert dirty(host, "daily") == {2}
    come_back(host, "host crash")
    assert dirty(host, "daily") == {0, 1, 2, 3}


def come_back(host, end):
    if end == "nothing":
        return
    if end == "clean end":
        host.close()
    else:
        host.crash()
        if end == "host crash":
            host.reboot()
    host.open()


def test_guest_is_told_when_not_even_that_can_be_said(host, storage):
    change(host, add("daily"))
    write(host, 1)
    storage.fails = storage.void_fails = True

    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            write(host, 5)

    assert letters(host.live(WEB)) == "axaaaaaaaaaaaaaa"
    # It is right: it has bits too many, and none too few.
    assert dirty(host, "daily") == {1, 5}
    assert host.events == []
    # What is in the log already is written to as ever.
    write(host, 2)
    storage.fails = storage.void_fails = False
    come_back(host, "host crash")
    assert dirty(host, "daily") >= {1, 2}


@pytest.mark.logs(FAILED)
def test_guest_goes_on_as_soon_as_it_can_be_said(host, storage):
    change(host, add("daily"))
    storage.fails = storage.void_fails = True
    with pytest.raises(OSError, match="Input/output error"):
        write(host, 5)
    storage.void_fails = False

    write(host, 5)

    assert re.fullmatch(FAILED, reason(host, "daily"))


@pytest.mark.logs("the storage does not answer")
def test_log_that_hangs_is_given_up_after_the_time_limit(host, storage):
    host.close()
    host.open(cbw_timeout=0.01)
    change(host, add("daily"))
    stay = storage.stay = Stay(False)
    log = host.inventory.bitmaps.find(WEB)._log

    running = Running(write, host, 1)
    stay.wait_arrived()
    wait_until(lambda: log._voids, "the write to give the log up")
    assert letters(host.live(WEB)) == "a" * COUNT
    stay.release()
    running.result()

    assert "the storage does not answer" in reason(host, "daily")


def test_log_that_hangs_for_good_fails_the_write_and_comes_back(
    host, storage, monkeypatch
):
    monkeypatch.setattr(bitmaps_of_disk, "_VOID_SECONDS", 0.01)
    host.close()
    host.open(cbw_timeout=0.01)
    change(host, add("daily"))
    stay = storage.stay = Stay(False)

    with pytest.raises(OSError, match="the storage does not answer") as error:
        write(host, 1)

    assert error.value.errno == errno.ETIMEDOUT
    assert stay.has_arrived
    stay.release()
    host.inventory.bitmaps.find(WEB)._timeout = PATIENCE
    write(host, 1)
    assert dirty(host, "daily") == {1}


@pytest.mark.logs(FAILED)
def test_write_finds_a_log_while_another_is_made(host, storage, monkeypatch):
    change(host, add("daily"))
    storage.fails = True
    write(host, 1)
    storage.fails = False
    stay = Stay(False)
    create = bitmaps_of_disk.ActivityLog.create

    def creating(*args):
        stay.stay()
        return create(*args)

    monkeypatch.setattr(bitmaps_of_disk.ActivityLog, "create", creating)

    running = Running(change, host, add("other"))
    stay.wait_arrived()
    # `daily` was not taken from the recorder: nobody waits for a drained disk then.
    write(host, 9)
    stay.release()
    running.result()

    write(host, 2)
    assert dirty(host, "other") == {2}


@pytest.mark.logs(FAILED)
def test_bitmap_that_is_enabled_after_the_log_failed_is_protected(host, storage):
    change(host, add("daily"), add("off", recording=False))
    storage.fails = True
    write(host, 1)
    storage.fails = False

    change(host, Enable(WEB, "off"))
    write(host, 5)
    change(host, add("other"))
    come_back(host, "host crash")

    assert dirty(host, "off") == {4, 5, 6, 7}


# -- saving


def test_save_writes_what_has_changed_and_lets_the_log_begin_anew(host):
    change(host, add("daily"), add("other"))
    write(host, 1)
    bitmaps = host.inventory.bitmaps.find(WEB)
    assert bitmaps.has_unsaved

    bitmaps.save()

    assert saved(host, "daily") == saved(host, "other") == {1}
    assert not bitmaps.has_unsaved
    write(host, 1)
    assert not bitmaps.has_unsaved
    write(host, 2)
    assert bitmaps.has_unsaved
    come_back(host, "host crash")
    assert dirty(host, "daily") == {0, 1, 2, 3}


def failing_update(host, monkeypatch):
    """Let saves fail until the function that is returned is called."""
    patch = pytest.MonkeyPatch()

    def update(self, *args):
        raise OSError(errno.ENOSPC, "for a test")

    patch.setattr(OpenContainer, "update", update)
    return patch.undo


def test_save_that_fails_loses_nothing_and_works_later(host, monkeypatch):
    change(host, add("daily"))
    write(host, 1)
    mend = failing_update(host, monkeypatch)

    with pytest.raises(OSError, match="for a test"):
        host.inventory.save_bitmaps([WEB])

    mend()
    assert host.inventory.bitmaps.find(WEB).has_unsaved
    come_back(host, "host crash")
    assert dirty(host, "daily") == {0, 1, 2, 3}
    host.inventory.save_bitmaps([WEB])
    assert saved(host, "daily") == {0, 1, 2, 3}


@pytest.mark.parametrize("failing", ["has", "_usable"])
def test_save_that_fails_before_it_writes_loses_nothing(host, monkeypatch, failing):
    change(host, add("daily"), add("other"))
    host.inventory.save_bitmaps([WEB])
    write(host, 1)
    calls = []

    def fail(self, *args):
        calls.append(1)
        if len(calls) < 2:
            return original(self, *args)
        raise OSError(errno.EIO, "for a test")

    original = getattr(OpenContainer, failing)
    with monkeypatch.context() as patch:
        patch.setattr(OpenContainer, failing, fail)
        with pytest.raises(OSError, match="for a test"):
            host.inventory.save_bitmaps([WEB])

    host.inventory.save_bitmaps([WEB])
    assert saved(host, "daily") == saved(host, "other") == {1}


@pytest.mark.logs("bitmaps of web.raw can not be saved now: for a test")
def test_bitmaps_are_saved_in_the_background(host, monkeypatch, caplog):
    host.close()
    monkeypatch.setattr(bitmaps_of_mount, "SAVE_SECONDS", 0.001)
    host.open()
    change(host, add("daily"))
    write(host, 1)
    wait_until(lambda: saved(host, "daily") == {1}, "a save")

    tries = threading.Semaphore(0)
    update = OpenContainer.update
    with monkeypatch.context() as patch:

        def fail(self, *args):
            tries.release()
            raise OSError(errno.ENOSPC, "for a test")

        patch.setattr(OpenContainer, "update", fail)
        write(host, 2)
        for _ in range(3):
            assert tries.acquire(timeout=PATIENCE)
    assert OpenContainer.update is update
    wait_until(lambda: saved(host, "daily") == {1, 2}, "a save that works")

    # It is told once.
    assert len(caplog.records) == 1


def test_bitmap_that_is_being_removed_is_saved_until_it_is_gone(host, monkeypatch):
    change(host, add("daily"))
    write(host, 1)

    class Save(Abort):
        def prepare(self, find):
            find(WEB).save()
            super().prepare(find)

    with pytest.raises(Refused):
        change(host, Remove(WEB, "daily"), Save())
    come_back(host, "host crash")

    assert dirty(host, "daily") == {1}


@pytest.mark.logs(FAILED)
def test_bitmap_that_is_being_removed_is_given_up_with_the_others(host, storage):
    change(host, add("daily"))

    class Write(Abort):
        def prepare(self, find):
            storage.fails = True
            write(host, 1)
            super().prepare(find)

    with pytest.raises(Refused):
        change(host, Remove(WEB, "daily"), Write())

    assert re.fullmatch(FAILED, reason(host, "daily"))


def test_save_and_changes_of_containers_do_not_disturb_each_other(host, tmpfs_path):
    change(host, add("daily"))
    ending = threading.Event()

    def save():
        while not ending.is_set():
            host.inventory.bitmaps.find(WEB).save()

    running = Running(save)
    for number in range(30):
        write(host, number % COUNT)
        change(host, add("short", container=tmpfs_path / f"{number}.qcow2"))
        change(host, Remove(WEB, "short"))
    ending.set()
    running.result()

    assert dirty(host, "daily") == set(range(COUNT))
    assert saved(host, "daily") <= set(range(COUNT))
    check_nothing_leaks(host)


# -- jobs


@pytest.mark.parametrize("end", ["kill", "host crash", "clean end"])
def test_frozen_bitmap_of_a_job_that_is_gone_is_taken_back(host, end):
    change(host, add("daily"))
    write(host, 1)
    host.inventory.save_bitmaps([WEB])
    change(host, Freeze(WEB, "daily", "job"))
    write(host, 5)
    assert described(host, "daily")["count"] == CLUSTER
    come_back(host, end)

    assert not described(host, "daily")["busy"]
    assert dirty(host, "daily") == {1} | ({4, 5, 6, 7} if end == "host crash" else {5})
    check_nothing_leaks(host)


def test_bitmap_of_a_job_that_was_copied_has_what_was_written_since(host):
    change(host, add("daily"))
    write(host, 1, 2)
    change(host, Freeze(WEB, "daily", "job"))
    write(host, 5)
    left = held(host, "daily").bitmap.to_save()
    left.setall(0)
    left[2] = 1

    host.inventory.end_bitmap("job", left)

    assert dirty(host, "daily") == {2, 5}
    check_nothing_leaks(host)
    # What was copied is not in the container any more once that is saved.
    host.inventory.save_bitmaps([WEB])
    come_back(host, "host crash")
    assert dirty(host, "daily") == {2, 5}
