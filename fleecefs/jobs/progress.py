"""How far a job is, how fast, and how long it may still take."""

from collections import deque

import trio

# Long enough for a steady number, short enough to follow a change.
WINDOW = 10.0
_SAMPLE_SECONDS = 0.5


class Progress:
    """Bytes done and bytes to do. In trio's thread only."""

    def __init__(self, remaining: int = 0) -> None:
        self.current = 0
        self.remaining = remaining
        # (time, current), at least half a second apart, the oldest first.
        self._samples: deque[tuple[float, int]] = deque()

    @property
    def total(self) -> int:
        """Return what 100 % are; it may grow."""
        return self.current + self.remaining

    def start(self) -> None:
        """Count speed from now on."""
        self._samples = deque([(trio.current_time(), self.current)])

    def advance(self, length: int) -> None:
        """Count what has been done, out of what remains."""
        self.current += length
        self.remaining -= length
        now = trio.current_time()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_SECONDS:
            self._samples.append((now, self.current))
        self._forget(now)

    def speed(self) -> float:
        """Return bytes a second, over the last seconds."""
        now = trio.current_time()
        self._forget(now)
        if not self._samples:
            return 0.0
        since, before = self._samples[0]
        return (self.current - before) / (now - since) if now > since else 0.0

    def eta(self) -> float | None:
        """Return the seconds that it takes if it goes on like this, if it does."""
        speed = self.speed()
        return self.remaining / speed if speed > 0 else None

    def _forget(self, now: float) -> None:
        """Drop samples that are too old; the last of those is where we count from."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= now - WINDOW:
            samples.popleft()
