"""What is in flight, and who waits. Whole requests meet in test_interleavings.py."""

import time

import pytest

from fleecefs.block import requests as requests_module
from fleecefs.block.requests import Copy, drain_deadline
from fleecefs.errors import Busy
from tests.support.disks import CLUSTER, clusters, make_disk, make_epoch
from tests.support.running import Running, WatchedRequests

FOREVER = float("inf")


@pytest.fixture
def requests():
    return WatchedRequests()


@pytest.fixture
def epoch():
    return make_epoch(make_disk(clusters("a")))


OVERLAPS = [
    pytest.param(10, 20, True, id="the same"),
    pytest.param(5, 11, True, id="first cluster"),
    pytest.param(19, 30, True, id="last cluster"),
    pytest.param(12, 13, True, id="inside"),
    pytest.param(0, 100, True, id="around"),
    pytest.param(0, 10, False, id="just before"),
    pytest.param(20, 30, False, id="just after"),
]


@pytest.mark.parametrize(("first", "stop", "found"), OVERLAPS)
def test_copies_are_found_by_their_clusters(requests, first, stop, found):
    copy = Copy(10, 20, FOREVER)
    requests.copies[copy.thread] = copy

    assert (requests.find_copy(first, stop) is copy) == found


@pytest.mark.parametrize(("first", "stop", "found"), OVERLAPS)
def test_readers_are_found_by_their_clusters(requests, epoch, first, stop, found):
    requests.readers[1] = ([(0, 0), (10, 20), (200, 300)], epoch)

    assert (requests.find_readers(first, stop) == [epoch]) == found


def test_readers_are_not_found_between_their_runs(requests, epoch):
    requests.readers[1] = ([(0, 10), (20, 30)], epoch)

    assert requests.find_readers(10, 20) == []


def test_readers_of_lost_snapshots_are_not_found(requests, epoch):
    requests.readers[1] = ([(0, 10)], epoch)

    epoch.lose("broken")

    assert requests.find_readers(0, 10) == []


def test_a_drain_of_a_quiet_disk_does_not_wait(requests):
    with requests.drained(drain_deadline()):
        assert requests.is_drained

    assert not requests.is_drained


def test_a_disk_is_open_when_the_last_drain_ends(requests):
    with requests.drained(drain_deadline()):
        with requests.drained(drain_deadline()):
            pass
        assert requests.is_drained

    assert not requests.is_drained


def test_a_failure_inside_a_drain_opens_the_disk(requests):
    with pytest.raises(ZeroDivisionError), requests.drained(drain_deadline()):
        _ = 1 / 0

    assert not requests.is_drained


def test_a_drain_waits_until_no_write_is_left(requests):
    requests.writes.update({1: (0, 1), 2: (5, 6)})

    def drain():
        with requests.drained(drain_deadline()):
            return dict(requests.writes)

    running = Running(drain)
    requests.wait_waiting(running)
    for thread in (1, 2):
        with requests.lock:
            del requests.writes[thread]
            requests.changed()

    assert running.result() == {}


def test_a_drain_that_takes_too_long_opens_the_disk(requests, monkeypatch):
    monkeypatch.setattr(requests_module, "DRAIN_SECONDS_MAX", 0.01)
    requests.writes.update({1: (0, 1), 2: (5, 6)})

    with pytest.raises(Busy, match="2 writes"), requests.drained(drain_deadline()):
        pass

    assert not requests.is_drained


def test_what_waits_for_the_end_of_a_drain_goes_on_after_it(requests):
    def wait():
        with requests.lock:
            requests.wait_opened()
            return requests.is_drained

    with requests.drained(drain_deadline()):
        running = Running(wait)
        requests.wait_waiting(running)

    assert running.result() is False


def test_waiting_ends_at_the_deadline(requests):
    with requests.lock:
        assert requests.wait_changed(time.monotonic() + 0.01)
        assert not requests.wait_changed(time.monotonic())
        assert not requests.wait_changed(time.monotonic() - 1)


def test_a_thread_is_the_key_of_its_write():
    disk = make_disk(clusters("ab"))
    found = {}
    pwrite = disk.source.pwrite
    disk.source.pwrite = lambda *args: (
        found.update(disk.requests.writes) or pwrite(*args)
    )

    running = Running(disk.write, b"x" * 10, CLUSTER - 5)
    running.result()

    assert found == {running.ident: (CLUSTER - 5, CLUSTER + 5)}
    assert not disk.requests.writes
