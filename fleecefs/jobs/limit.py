"""How fast a job may copy: QEMU's rule, in slices of 100 ms.

A slice has a quota of bytes. The limit is looked at before a chunk and charged after
it has been taken, so the first chunk always goes; one that is larger than the quota
makes its slice longer in proportion. So at one byte a second nothing follows the
first chunk for days: "never proceed", as tests like to say it.
"""

import trio

SLICE = 0.1


class RateLimit:
    """Lets chunks pass at a number of bytes a second; 0 is no limit.

    Who has been let pass charges before it waits for anything else: then one chunk
    passes at a time, however many tasks wait.
    """

    def __init__(self, speed: int = 0) -> None:
        self.speed = speed
        self._begin = self._end = 0.0
        self._charged = 0
        # Until when nothing may pass: the end of a slice with nothing left.
        self._closed_until = 0.0
        self._changed = trio.Event()

    def delay(self) -> float:
        """Return for how many seconds nothing may pass."""
        if self.speed == 0:
            return 0.0
        return max(0.0, self._closed_until - trio.current_time())

    async def wait(self) -> None:
        """Return when a chunk may pass; a new speed counts at once."""
        await trio.lowlevel.checkpoint()
        while (delay := self.delay()) > 0:
            with trio.move_on_after(delay):
                await self._changed.wait()

    def charge(self, length: int) -> None:
        """Count bytes that pass, also those that did not ask (copy-before-write)."""
        now = trio.current_time()
        if now >= self._end:
            self._begin, self._end, self._charged = now, now + SLICE, 0
        self._charged += length
        if self.speed and self._charged >= self._quota:
            self._closed_until = self._end = self._begin + self._slice_seconds()

    def set_speed(self, speed: int) -> None:
        """Change the speed. Who waits goes on earlier if it is higher, never later."""
        was, self.speed = self.speed, speed
        if was and speed:
            until = self._begin + self._slice_seconds()
            self._closed_until = min(self._closed_until, until)
            self._end = min(self._end, max(until, self._begin + SLICE))
        else:
            # What passed without a limit is not held against a later one.
            self._closed_until = self._end = 0.0
        self._changed.set()
        self._changed = trio.Event()

    @property
    def _quota(self) -> float:
        return self.speed * SLICE

    def _slice_seconds(self) -> float:
        return SLICE * self._charged / self._quota
