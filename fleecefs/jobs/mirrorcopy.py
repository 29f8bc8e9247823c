"""Copying to the target of a mirror what it lacks, while the guest goes on.

Workers take dirty granules in the order of the disk, over and over. What they take is
*copying* until the target has it, or it is dirty again (block/mirror.py), so nothing
here has to be kept over a crash. Holes and zeroes are not written: where the target may
hold something else they are punched.

Everything but what runs in threads belongs to trio's thread. A thread that hangs in the
target is abandoned when the job ends; nobody copies what it is copying before it comes
back.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import trio

from fleecefs.block.disk import Disk
from fleecefs.block.mirror import Mirror, Run
from fleecefs.errors import Unsupported
from fleecefs.jobs.copy import CHUNK_SIZE_MAX, RETRY_SECONDS
from fleecefs.jobs.job import Job
from fleecefs.jobs.target import Target
from fleecefs.killpoint import reached

# Zeroes to compare with, and the most that is read at a time.
_ZEROES = bytes(CHUNK_SIZE_MAX)

# Nobody is held back for a target that takes longer for up to 1 MiB.
SLOW_SECONDS = 0.2

# How long a thread copies on by itself, if there is no limit: it takes 0.1 ms and more
# to come to trio's thread and back, and not much longer to copy 1 MiB.
_STINT_SECONDS = 0.02

# Of those the file system can share (ioctl_ficlonerange(2)).
_BLOCK_SIZE = 4096


class Outcome:
    """What has come of copying some runs: bytes, and the first error."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.copied = 0
        self.error: OSError | None = None
        self.is_read = False
        self.failed: list[Run] = []

    def add_failed(self, run: Run, error: OSError, *, is_read: bool) -> None:
        if self.error is None:
            self.error, self.is_read = error, is_read
        self.failed.append(run)


class MirrorCopier:
    """Copies what is dirty in a mirror of a disk, for a job."""

    def __init__(
        self,
        job: Job,
        disk: Disk,
        mirror: Mirror,
        target: Target,
        *,
        workers: int,
        buf_size: int,
    ) -> None:
        self._job = job
        self._disk = disk
        self._mirror = mirror
        self._target = target
        self._workers = workers
        self._granules_max = max(1, min(CHUNK_SIZE_MAX, buf_size) >> mirror.shift)
        # In granules: one is in flight at least.
        self._room = max(self._granules_max, -(-buf_size // mirror.granularity))
        # Guards what threads claim next.
        self._claiming = threading.Lock()
        # What is copied next, and how often all has been looked at.
        self._cursor = 0
        self.passes = 0
        # Whether something has come to the target since somebody asked.
        self.has_written = False
        # What failed, and until when nobody tries it again.
        self._postponed: list[tuple[float, Run]] = []
        self._lacks_room = False
        self._idle = 0
        self._woken = trio.Event()
        # What threads have copied, or are copying, and nobody has counted yet.
        self._uncounted: list[Outcome] = []
        # Of threads that are copying, also abandoned ones.
        self._running: list[Outcome] = []
        # Set whenever all workers have nothing to do.
        self.rested = trio.Event()
        self._error: OSError | None = None
        self._scope = trio.CancelScope()
        self._has_stopped = False
        self._can_clone = mirror.granularity >= _BLOCK_SIZE
        # Of our own: threads that hang take nothing from anybody else.
        self._limiter = trio.CapacityLimiter(workers + 1)
        self._buffers: list[bytearray] = []

    async def run(self) -> None:
        """Copy until cancelled; raise what failed."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                for _ in range(self._workers):
                    nursery.start_soon(self._work)
        finally:
            self.stop()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Begin to copy nothing more, at once; only `copy_rest` does."""
        self._has_stopped = True

    def wake(self) -> None:
        """Look again for something to copy."""
        self._woken.set()
        self._woken = trio.Event()

    # -- workers

    async def _work(self) -> None:
        try:
            while True:
                await self._job.turn()
                found = self._claim_some()
                if found:
                    await self._copy(found)
                else:
                    await self._wait_woken()
        except OSError as e:
            self._error = self._error or e
            self._scope.cancel()

    async def _wait_woken(self) -> None:
        self._idle += 1
        if self.is_resting:
            self.rested.set()
        try:
            await self._woken.wait()
        finally:
            self._idle -= 1

    def _claim_some(self) -> list[Run]:
        """Take what one thread is to copy in one go: one large run, or small ones."""
        found: list[Run] = []
        room = min(self._granules_max, self._room)
        self._lacks_room = self._lacks_room or room <= 0
        while room > 0 and not self._has_stopped:
            run = self._claim(room)
            if run is None:
                break
            found.append(run)
            room -= run[1] - run[0]
            self._room -= run[1] - run[0]
        return found

    def _claim(self, count: int) -> Run | None:
        """Take the next run, of up to `count` granules."""
        mirror = self._mirror
        with self._claiming:
            excluded = self._resting()
            run = mirror.claim(self._cursor, mirror.count, count, excluded)
            if run is None:
                self.passes += 1
                run = mirror.claim(0, self._cursor, count, excluded)
            self._cursor = 0 if run is None else run[1]
        return run

    def _resting(self) -> list[Run]:
        if self._postponed:
            now = time.monotonic()
            self._postponed = [each for each in self._postponed if each[0] > now]
        return [run for _, run in self._postponed]

    async def _copy(self, found: list[Run]) -> None:
        """Copy some runs, and do what the policy says about what has failed."""
        job, outcome = self._job, Outcome()
        self._uncounted.append(outcome)
        count = sum(stop - first for first, stop in found)
        job.limit.charge(count * self._mirror.granularity)
        try:
            with job.in_flight():
                await self._in_thread(partial(self._copy_runs, found, count, outcome))
        finally:
            # What a thread has not begun with: it is not to come any more.
            while (run := _take(found)) is not None:
                self._mirror.fail(*run)
            self._room += count
            self.count(outcome)
            if self._lacks_room:
                self._lacks_room = False
                self.wake()
        self.has_written |= outcome.copied > 0
        if outcome.error is not None:
            until = time.monotonic() + RETRY_SECONDS
            with self._claiming:
                self._postponed += [(until, run) for run in outcome.failed]
            await job.on_error(outcome.error, is_read=outcome.is_read)

    def count(self, outcome: Outcome) -> None:
        """Count what was copied as progress, once."""
        self._job.progress.advance(outcome.copied)
        self._uncounted.remove(outcome)

    @property
    def is_resting(self) -> bool:
        """Whether all workers have found nothing to do."""
        return self._idle == self._workers

    @property
    def is_busy(self) -> bool:
        """Whether workers are copying, or have not counted it yet."""
        return bool(self._uncounted)

    @property
    def is_slow(self) -> bool:
        """Whether a thread takes so long that nobody is to be held back for it."""
        since = time.monotonic() - SLOW_SECONDS
        return any(outcome.begun < since for outcome in list(self._running))

    def uncounted(self) -> int:
        """Return the bytes that were copied, but are not counted yet."""
        return sum(outcome.copied for outcome in self._uncounted)

    async def _in_thread(self, function: Callable[[], object]) -> None:
        def run() -> None:
            with self._target.used():
                function()

        await trio.to_thread.run_sync(
            run, abandon_on_cancel=True, limiter=self._limiter
        )

    # -- in threads

    def copy_rest(self, until: float, outcome: Outcome) -> None:
        """Copy what is left while the disk is drained, until then at the most."""
        mirror = self._mirror
        with self._copying(outcome):
            while not outcome.error and time.monotonic() < until:
                run = mirror.claim(0, mirror.count, self._granules_max)
                if run is None:
                    return
                self._copy_run(run, outcome)

    def _copy_runs(self, found: list[Run], count: int, outcome: Outcome) -> None:
        """Copy what was claimed, and more, of at most `count` granules at a time."""
        job, until = self._job, time.monotonic() + _STINT_SECONDS
        with self._copying(outcome):
            while not self._has_stopped and (run := _take(found)) is not None:
                self._copy_run(run, outcome)
            while not (self._has_stopped or outcome.error or job.limit.speed):
                if time.monotonic() > until:
                    return
                run = self._claim(count)
                if run is None:
                    return
                self._copy_run(run, outcome)

    @contextlib.contextmanager
    def _copying(self, outcome: Outcome) -> Iterator[None]:
        self._running.append(outcome)
        try:
            yield
        finally:
            self._running.remove(outcome)

    def _copy_run(self, run: Run, outcome: Outcome) -> None:
        """Copy a claimed run; what fails is dirty again."""
        mirror, (first, stop) = self._mirror, run
        offset, end = self._extent(run)
        is_read = True
        try:
            data = self._disk.source.find_data(offset)
            if data >= end:
                is_read = False
                self._punch(run)
            elif not self._clone(run):
                for at in range(offset, end, CHUNK_SIZE_MAX):
                    is_read = True
                    length = min(CHUNK_SIZE_MAX, end - at)
                    buffer = self._read(length, at)
                    reached("mirror.read")
                    is_read = False
                    self._write(buffer, length, at)
                    self._buffers.append(buffer)
        except OSError as e:
            if is_read and stop - first > 1:
                # Some of it may be good.
                for granule in range(first, stop):
                    self._copy_run((granule, granule + 1), outcome)
                return
            mirror.fail(first, stop)
            outcome.add_failed(run, e, is_read=is_read)
            return
        reached("mirror.written")
        mirror.finish(first, stop)
        outcome.copied += end - offset
        if data > end:
            self._skip_hole(stop, data, outcome)

    def _extent(self, run: Run) -> tuple[int, int]:
        """Return where a run begins and ends; the end of the disk cuts it."""
        shift = self._mirror.shift
        return run[0] << shift, min(run[1] << shift, self._mirror.size)

    def _read(self, length: int, offset: int) -> bytearray:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray(CHUNK_SIZE_MAX)
        self._disk.source.pread_into(memoryview(buffer)[:length], offset)
        return buffer

    def _write(self, buffer: bytearray, length: int, offset: int) -> None:
        """Write what was read, but for granules of zeroes, which are punched."""
        mirror, view = self._mirror, memoryview(buffer)
        step = min(mirror.granularity, CHUNK_SIZE_MAX)
        begin = 0
        for at in range(0, length, step):
            end = min(at + step, length)
            if not buffer.startswith(memoryview(_ZEROES)[: end - at], at):
                continue
            self._write_data(view[begin:at], offset + begin)
            granule = (offset + at) >> mirror.shift
            if step < mirror.granularity:
                # A part of a granule: others may have data.
                self._target.punch(end - at, offset + at)
            else:
                self._punch((granule, granule + 1))
            begin = end
        self._write_data(view[begin:length], offset + begin)

    def _write_data(self, data: memoryview, offset: int) -> None:
        if data:
            shift, end = self._mirror.shift, offset + len(data)
            first, stop = offset >> shift, ((end - 1) >> shift) + 1
            self._mirror.set_zero(first, stop, is_zero=False)
            self._target.write(data, offset)

    def _punch(self, run: Run) -> None:
        """Let a run read as zeroes on the target."""
        if not self._mirror.is_zero(*run):
            offset, end = self._extent(run)
            self._target.punch(end - offset, offset)
            self._mirror.set_zero(*run, is_zero=True)

    def _clone(self, run: Run) -> bool:
        """Let the file system copy, if it can: then it is done at once."""
        if not self._can_clone:
            return False
        offset, end = self._extent(run)
        was_zero = self._mirror.is_zero(*run)
        self._mirror.set_zero(*run, is_zero=False)
        try:
            self._target.clone(self._disk.source, end - offset, offset)
        except OSError as e:
            # It is copied: if something is wrong with the target, that is seen then.
            self._can_clone = False
            if isinstance(e, Unsupported):
                self._mirror.set_zero(*run, is_zero=was_zero)
        return self._can_clone

    def _skip_hole(self, first: int, data: int, outcome: Outcome) -> None:
        """Punch what is dirty from there on, up to where data was found.

        That may be an hour ago, so each run is looked at when nobody else has it.
        """
        mirror = self._mirror
        stop = mirror.count if data >= mirror.size else data >> mirror.shift
        while not self._has_stopped:
            run = mirror.claim(first, stop, stop - first)
            if run is None:
                return
            offset, end = self._extent(run)
            try:
                is_hole = self._disk.source.find_data(offset) >= end
                if is_hole:
                    self._punch(run)
            except OSError:
                # Whoever copies it meets that again.
                is_hole = False
            if not is_hole:
                mirror.fail(*run)
                return
            mirror.finish(*run)
            outcome.copied += end - offset
            first = run[1]


def _take(found: list[Run]) -> Run | None:
    """Take the next one; each goes to one taker, in whatever thread."""
    try:
        return found.pop(0)
    except IndexError:
        return None
