"""Every schedule of two calls in which one of them is interrupted once by the other.

The first call runs in a thread that is traced: before its nth line in fleecefs/block
the second call runs, until it has ended or waits for the first one. Then the first goes
on. With n from 0 to the end, that is every schedule with one preemption: nothing in
fleecefs/block is shared at a finer grain than a line without being atomic.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fleecefs.block
from tests.support.running import Running, WatchedRequests

_BLOCK = str(Path(fleecefs.block.__file__).parent)


class Schedule:
    """Two calls, the second of which comes before a certain line of the first."""

    def __init__(self, requests: WatchedRequests, line: int) -> None:
        self.requests = requests
        self.line = line
        self.has_come = False
        self.where = "after its end"
        self._lines = 0

    def run(
        self, first: Callable[[], Any], second: Callable[[], Any]
    ) -> tuple[Running, Running]:
        """Return both, ended."""
        self._second: Running | None = None
        self._start = lambda: Running(second)
        running = Running(self._traced, first)
        running.error()
        if self._second is None:
            self._second = self._start()
        self._second.error()
        return running, self._second

    def _traced(self, first: Callable[[], Any]) -> Any:
        sys.settrace(self._trace)
        try:
            return first()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename.startswith(_BLOCK):
            return self._trace_line
        return None

    def _trace_line(self, frame: FrameType, event: str, argument: object) -> Any:
        # With the lock held by the first, the second would wait for it right away.
        if event == "line" and not self.has_come and not self.requests.lock.locked():
            if self._lines == self.line:
                self.has_come = True
                name = Path(frame.f_code.co_filename).name
                self.where = f"{name}:{frame.f_lineno}"
                self._second = self._start()
                self._second.wait_stuck()
            self._lines += 1
        return self._trace_line


def schedules(
    make: Callable[[], tuple[WatchedRequests, Callable[[], Any], Callable[[], Any]]],
) -> Iterator[tuple[Schedule, Running, Running]]:
    """Run all schedules of the two calls that `make` makes anew for each of them."""
    for line in itertools.count():
        requests, first, second = make()
        schedule = Schedule(requests, line)
        yield schedule, *schedule.run(first, second)
        if not schedule.has_come:
            return
