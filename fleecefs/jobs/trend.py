"""Whether a mirror converges: what its guest makes dirty, against what is copied."""

from collections import deque
from typing import NamedTuple

from fleecefs.jobs.copy import CHUNK_SIZE_MAX
from fleecefs.jobs.progress import WINDOW

# So many times in a row, each so long, the guest has made dirty nearly as much as was
# copied, or more: then a mirror does not converge.
TREND_SECONDS = 1.0
TREND_COUNT = 3
_NEARLY = 0.9


class Sample(NamedTuple):
    """When, the bytes copied by then, and the bytes that were left to copy."""

    time: float
    copied: int
    left: int

    def dirtied_since(self, before: "Sample") -> int:
        """Return how many bytes have become dirty, in whole granules."""
        return self.copied - before.copied + self.left - before.left


class Trend:
    """Samples of the last seconds, and how often they said that nothing is gained."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()
        self._last = Sample(0.0, 0, 0)
        self.stuck_count = 0

    def add(self, sample: Sample, *, is_catching_up: bool) -> None:
        """Take a sample; it counts while a mirror tries to have less left."""
        self._samples.append(sample)
        while len(self._samples) > 2 and self._samples[1].time <= sample.time - WINDOW:
            self._samples.popleft()
        last = self._last
        if sample.time - last.time < TREND_SECONDS:
            return
        self._last = sample
        dirtied, copied = sample.dirtied_since(last), sample.copied - last.copied
        # A chunk may have come just now, or not yet.
        is_stuck = dirtied > 0 and dirtied >= _NEARLY * copied - CHUNK_SIZE_MAX
        self.stuck_count = self.stuck_count + 1 if is_stuck and is_catching_up else 0

    @property
    def is_stuck(self) -> bool:
        return self.stuck_count >= TREND_COUNT

    @property
    def dirty_rate(self) -> float:
        """How many bytes a second become dirty."""
        if not self._samples:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        seconds = last.time - first.time
        return max(0.0, last.dirtied_since(first) / seconds) if seconds else 0.0
