"""Requests in flight on one disk, and who waits for whom.

    writes    every guest write, zero and discard while it runs
    copies    clusters that a write is preserving right now
    readers   what snapshot readers are reading *from the source* right now

Everything here is guarded by `lock`, the one lock of a disk, which is never held
across I/O: a range in use is registered instead. A thread runs one request at a time,
so its identity is the key.

* A write waits while the disk is drained, for copies of its clusters by other writes,
  and for readers of its clusters.
* A copy waits for nothing, a reader waits for nothing: there is no cycle.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fleecefs.errors import Busy

if TYPE_CHECKING:
    from fleecefs.block.epoch import Epoch

# How long a drain may hold back the guest before it is given up. Running requests are
# one I/O each, so more than this is a storage problem that a snapshot must not worsen.
DRAIN_SECONDS_MAX = 5.0


def drain_deadline(seconds: float = DRAIN_SECONDS_MAX) -> float:
    """Return until when a drain that begins now may wait, on the monotonic clock."""
    return time.monotonic() + seconds


class Copy:
    """Clusters [first, stop) on their way to an epoch's store, until a deadline."""

    __slots__ = ("abandoned", "deadline", "first", "stop", "thread", "unneeded")

    def __init__(self, first: int, stop: int, deadline: float) -> None:
        self.first = first
        self.stop = stop
        self.deadline = deadline
        self.thread = threading.get_ident()
        # Set when the deadline passed: the thread may come back whenever it likes, but
        # may not set a bit, write to the source or answer the guest.
        self.abandoned = False
        # Runs that nobody needs any more since it began: to be freed when it has ended.
        self.unneeded: list[tuple[int, int]] = []


class Requests:
    """The in-flight requests of one disk. Hold `lock` to look or change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._waiting = 0
        self.writes: dict[int, tuple[int, int]] = {}
        self.copies: dict[int, Copy] = {}
        # Runs (first cluster, stop), and the epoch whose snapshot is being read.
        self.readers: dict[int, tuple[list[tuple[int, int]], Epoch]] = {}
        self._drains = 0

    @property
    def is_drained(self) -> bool:
        return self._drains > 0

    def wait_opened(self) -> None:
        """Wait until nobody drains the disk; the lock is held before and after."""
        self._waiting += 1
        try:
            while self._drains:
                self._changed.wait()
        finally:
            self._waiting -= 1

    def wait_changed(self, deadline: float) -> bool:
        """Wait for something to end; False once the deadline has passed."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        self._waiting += 1
        try:
            self._changed.wait(min(left, threading.TIMEOUT_MAX))
        finally:
            self._waiting -= 1
        return True

    def changed(self) -> None:
        """Wake whoever waits; call after taking a request out."""
        if self._waiting:
            self._changed.notify_all()

    def find_copy(self, first: int, stop: int) -> Copy | None:
        """Return a copy of any of these clusters that is under way."""
        for copy in self.copies.values():
            if copy.first < stop and first < copy.stop:
                return copy
        return None

    def find_readers(self, first: int, stop: int) -> list[Epoch]:
        """Return the epochs whose snapshots are being read from these clusters.

        Not those that are lost: such a reader gets an error, whatever it has read.
        """
        return [
            epoch
            for runs, epoch in self.readers.values()
            if epoch.lost is None
            and any(start < stop and first < end for start, end in runs)
        ]

    @contextmanager
    def drained(self, deadline: float) -> Iterator[None]:
        """Hold new writes back and wait for running ones; Busy after the deadline."""
        with self.lock:
            self._drains += 1
        try:
            with self.lock:
                while self.writes:
                    if not self.wait_changed(deadline):
                        raise Busy(
                            f"{len(self.writes)} writes did not end in time: the "
                            "storage of a source hangs"
                        )
            yield
        finally:
            with self.lock:
                self._drains -= 1
                self.changed()
