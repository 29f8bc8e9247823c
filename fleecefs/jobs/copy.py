"""Copying a private snapshot to a target while the guest goes on.

A cluster's life: *left* to copy; claimed by a worker; read; written to the target;
released. Released means discarded from the snapshot: it is not preserved any more, its
space is free, and, as the bits of that live in the runtime directory (block/bitmap.py),
a later daemon knows that it is on the target. So what is released is the whole memory
of a copy, and nothing else has to be kept in step with it. Killed between writing and
releasing, a cluster is copied once more, from what is still preserved.

The order (design.md, §5):

1. what is in the RAM tier, once that is half full, for half of the time: it makes room
2. what is not preserved yet: it will never have to be
3. the rest of the RAM tier
4. the disk tier
5. what could not be read, if that is to be tried again

The guest awaits nothing that a worker could bring: its writes wait for their own copy
into RAM only, as workers read without registering (block/epoch.py). While the RAM tier
has room it costs nothing, and a cluster copied from the source costs the guest least.

Everything but `Todo.note` and what runs in threads belongs to trio's thread. A thread
that hangs in the target is abandoned when the copy ends. It finds that out when it
comes back, and does nothing more.
"""

import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from fleecefs.block.bitmap import next_clear
from fleecefs.block.epoch import History
from fleecefs.block.extent import Mapped
from fleecefs.block.snapshot import Snapshot
from fleecefs.block.store import runs
from fleecefs.errors import SnapshotLost
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import Sync
from fleecefs.jobs.target import Target
from fleecefs.killpoint import reached
from fleecefs.units import MiB

# Beyond it storage gains nothing, and a chunk is what may be done twice after a crash.
CHUNK_SIZE_MAX = 1 * MiB

# How soon what failed is tried again, if errors are to be ignored.
RETRY_SECONDS = 1.0

# Preserved runs that are remembered; what is forgotten is found by a look at the bits.
_NOTES_MAX = 65536

# Above one in so many clusters in RAM, what lies between them is copied with them.
_DENSE = 8

# How long one kind of chunk may have had no time, and has it in one go.
_FAIR_SECONDS_MAX = 0.1

# A survey of holes stops after this time, or so much data, to say what it has found.
_SURVEY_SECONDS = 0.02
_SURVEY_DATA = 256 * MiB

_ZEROES = bytes(CHUNK_SIZE_MAX)


class Chunk:
    """Clusters [first, stop) that a worker copies, and what it has read of them."""

    __slots__ = (
        "buffer",
        "first",
        "is_retry",
        "is_spoiled",
        "is_urgent",
        "length",
        "offset",
        "seconds",
        "stop",
    )

    def __init__(self, first: int, stop: int, offset: int, length: int) -> None:
        self.first, self.stop = first, stop
        self.offset, self.length = offset, length
        # Kept until it is on the target: a write that failed is tried again with it.
        self.buffer: bytearray | None = None
        self.is_retry = False
        # It was taken to make room in the RAM tier.
        self.is_urgent = False
        # The target may hold newer data here: zeroes have to be written too.
        self.is_spoiled = False
        # How long it took to copy.
        self.seconds = 0.0


class Todo:
    """Which clusters are left to copy, and which come next."""

    def __init__(
        self,
        snapshot: Snapshot,
        sync: Sync,
        is_urgent: Callable[[], bool] = lambda: False,
    ) -> None:
        self._snapshot = snapshot
        self._sync = sync
        self._is_urgent = is_urgent
        self._cluster_size = snapshot.cluster_size
        self._clusters_max = max(1, CHUNK_SIZE_MAX // self._cluster_size)
        self.count = -(-snapshot.size // self._cluster_size)
        denied = snapshot.epoch.denied
        assert denied is not None
        # Not released, and claimed by nobody.
        self.left = ~denied[: self.count]
        # Clusters before this are known to be no holes.
        self.surveyed = 0
        self._preserved: deque[tuple[int, int]] = deque(maxlen=_NOTES_MAX)
        self._has_forgotten = True
        self._postponed: deque[tuple[int, int]] = deque()
        # Seconds that urgent chunks have had more than others.
        self._urgent_seconds = 0.0
        self._cursor = 0
        self._last_cursor = 0
        # Woken when there is more to do; called in any thread.
        self.wake: Callable[[], None] = lambda: None

    def note(self, first: int, stop: int) -> None:
        """Remember that a guest's write has preserved clusters. In any thread."""
        if len(self._preserved) == _NOTES_MAX:
            self._forget()
        self._preserved.append((first, stop))
        self.wake()

    def _forget(self) -> None:
        """Look at the bits again later, if nothing else will come to what is lost."""
        self._has_forgotten = self._sync is Sync.NONE

    @property
    def is_noted(self) -> bool:
        """Whether there may be preserved clusters that were not looked at."""
        return bool(self._preserved) or self._has_forgotten

    def size_of(self, first: int, stop: int) -> int:
        """Return the bytes of clusters; the disk's end cuts the last one."""
        size = self._cluster_size
        return min(stop * size, self._snapshot.size) - first * size

    def claim_some(self) -> list[Chunk]:
        """Take what one thread is to copy in one go; nothing if there is nothing.

        Small chunks come together, as it takes longer to reach a thread than to copy
        one. What is tried again comes alone.
        """
        chunks: list[Chunk] = []
        room = CHUNK_SIZE_MAX
        while room > 0:
            chunk = self.claim(also_postponed=not chunks)
            if chunk is None:
                break
            chunks.append(chunk)
            if chunk.is_retry:
                break
            room -= chunk.length
        return chunks

    def claim(self, *, also_postponed: bool = True) -> Chunk | None:
        """Take what is to be copied next; None if there is nothing just now.

        Raises SnapshotLost if the snapshot is broken.
        """
        if self._sync is Sync.NONE:
            chunk = self._claim_preserved(also_on_disk=True)
        else:
            chunk = (
                self._claim_urgent()
                or self._claim_next()
                or self._claim_preserved()
                or self._claim_last()
            )
        if chunk is None and also_postponed and self._postponed:
            return self._claim_postponed()
        return chunk

    def _claim_urgent(self) -> Chunk | None:
        if self._urgent_seconds > 0 or not self.is_noted or not self._is_urgent():
            return None
        chunk = self._claim_preserved()
        if chunk is not None:
            chunk.is_urgent = True
        return chunk

    def count_time(self, chunk: Chunk) -> None:
        """Let what is urgent, and the rest, have as much time as the other."""
        change = chunk.seconds if chunk.is_urgent else -chunk.seconds
        bound = _FAIR_SECONDS_MAX
        self._urgent_seconds = min(bound, max(-bound, self._urgent_seconds + change))

    def _claim_preserved(self, *, also_on_disk: bool = False) -> Chunk | None:
        while self.is_noted:
            if not self._preserved:
                self._look_for_preserved()
                continue
            noted, noted_stop = self._preserved.popleft()
            first = self.left.find(1, noted, noted_stop)
            if first < 0:
                continue
            limit = min(first + self._clusters_max, self.count)
            where, stop = self._snapshot.locate(first, limit)
            if stop < noted_stop:
                if len(self._preserved) == _NOTES_MAX:
                    self._forget()
                self._preserved.appendleft((stop, noted_stop))
            if where == "ram" or (also_on_disk and where != "source"):
                return self._take(first, self._with_others(first, stop, limit))
        return None

    def _with_others(self, first: int, stop: int, limit: int) -> int:
        """Return the end of clusters in RAM, or of more if many of those are in RAM.

        Many small chunks take longer than one large chunk.
        """
        # Beyond the survey there may be holes.
        limit = min(limit, self.surveyed)
        if self._sync is Sync.NONE or limit <= stop:
            return stop
        limit = next_clear(self.left, first, limit)
        dense = _DENSE * self._snapshot.count_in_ram(first, limit) >= limit - first
        return limit if dense else stop

    def _look_for_preserved(self) -> None:
        """Find what there was before we looked, or was forgotten since."""
        self._has_forgotten = False
        for found in self._snapshot.preserved_runs(self.left):
            if len(self._preserved) == _NOTES_MAX:
                self._forget()
                return
            self._preserved.append(found)

    def _claim_next(self) -> Chunk | None:
        """Take the next data that is on the source, with what is among it."""
        while (first := self.left.find(1, self._cursor, self.surveyed)) >= 0:
            limit = min(first + self._clusters_max, self.surveyed)
            where, stop = self._snapshot.locate(first, limit)
            if where != "disk":
                chunk = self._take(first, limit)
                self._cursor = chunk.stop
                return chunk
            self._cursor = stop
        self._cursor = max(self._cursor, self.surveyed)
        return None

    def _claim_last(self) -> Chunk | None:
        first = self.left.find(1, self._last_cursor, self.surveyed)
        if first < 0:
            return None
        chunk = self._take(first, min(first + self._clusters_max, self.surveyed))
        self._last_cursor = chunk.stop
        return chunk

    def _claim_postponed(self) -> Chunk:
        chunk = self._chunk(*self._postponed.popleft())
        chunk.is_retry = True
        return chunk

    def _take(self, first: int, limit: int) -> Chunk:
        stop = next_clear(self.left, first, limit)
        self.left[first:stop] = 0
        return self._chunk(first, stop)

    def _chunk(self, first: int, stop: int) -> Chunk:
        offset = first * self._cluster_size
        return Chunk(first, stop, offset, self.size_of(first, stop))

    def postpone(self, chunk: Chunk) -> None:
        """Put back what could not be read, in halves: one of them may be good."""
        first, stop = chunk.first, chunk.stop
        middle = (first + stop + 1) // 2
        self._postponed.append((first, middle))
        if middle < stop:
            self._postponed.append((middle, stop))


class Survey:
    """Finds the holes there were at the instant, ahead of the workers.

    A hole of the instant stays one, whatever the guest does: what it overwrites is
    preserved, as a hole. Blocking; what `step` raises can be tried again.
    """

    def __init__(
        self, snapshot: Snapshot, todo: Todo, hole: Callable[[int, int], None]
    ) -> None:
        self._snapshot = snapshot
        self._todo = todo
        self._hole = hole
        self._cluster_size = snapshot.cluster_size
        # Bytes of holes that were found and not counted yet.
        self.found = 0
        # Whether an error was one of the source.
        self.is_reading = True

    @property
    def is_done(self) -> bool:
        return self._todo.surveyed >= self._todo.count

    def step(self) -> None:
        """Look at some of what is left."""
        todo = self._todo
        begin, until = todo.surveyed, time.monotonic() + _SURVEY_SECONDS
        data = 0
        for first, stop in runs(todo.left, todo.surveyed, todo.count):
            end = first * self._cluster_size + todo.size_of(first, stop)
            try:
                for mapped in self._snapshot.map(first * self._cluster_size, end):
                    self._add(mapped)
                    data += mapped.length if mapped.is_data else 0
                    is_enough = data > _SURVEY_DATA or time.monotonic() > until
                    if is_enough and todo.surveyed > begin:
                        return
            except SnapshotLost:
                if self._snapshot.lost is not None:
                    raise
                # A worker has released a part of it meanwhile: look again.
                return
        todo.surveyed = todo.count

    def _add(self, mapped: Mapped) -> None:
        size, todo = self._cluster_size, self._todo
        stop = mapped.end // size
        if mapped.end == self._snapshot.size:
            stop = todo.count
        first = -(-mapped.offset // size)
        if not mapped.is_data and first < stop:
            self.is_reading = False
            self._hole(first, stop)
            self.is_reading = True
            self.found += todo.size_of(first, stop)
            todo.left[first:stop] = 0
        todo.surveyed = max(todo.surveyed, stop)


class Copier:
    """Copies what a Todo says, with some workers, for a job."""

    def __init__(
        self,
        job: Job,
        snapshot: Snapshot,
        history: History,
        target: Target,
        *,
        sync: Sync,
        workers: int,
        is_urgent: Callable[[], bool] = lambda: False,
        is_last: bool = False,
    ) -> None:
        self._job = job
        self._snapshot = snapshot
        self._history = history
        self._target = target
        self._sync = sync
        self._workers = workers
        # Ends when all that is preserved is copied, and does not rest.
        self._is_last = is_last
        self.todo = Todo(snapshot, sync, is_urgent)
        self._survey = Survey(snapshot, self.todo, self._release_hole)
        if sync is Sync.NONE:
            self.todo.surveyed = self.todo.count
        self._in_flight = 0
        self._error: OSError | None = None
        self._scope = trio.CancelScope()
        self._changed = trio.Event()
        self._is_idle = False
        self._has_ended = False
        self._can_clone = sync is not Sync.NONE
        # Of our own: threads that hang take nothing from anybody else.
        self._limiter = trio.CapacityLimiter(workers + 1)
        self._buffers: list[bytearray] = []

    async def run(self) -> None:
        """Copy until nothing is left, with Sync.NONE for ever; raise what failed."""
        token = trio.lowlevel.current_trio_token()
        self.todo.wake = lambda: self._wake_from_thread(token)
        self._history.watch(self.todo.note)
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._guard, self._find_holes)
                for _ in range(self._workers):
                    nursery.start_soon(self._guard, self._work)
        finally:
            self._has_ended = True
            self._history.unwatch(self.todo.note)
        if self._error is not None:
            raise self._error

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        """Keep the first error, and end all tasks."""
        try:
            await task()
        except OSError as e:
            self._error = self._error or e
            self._scope.cancel()

    # -- workers

    async def _work(self) -> None:
        while True:
            await self._turn()
            chunks = self.todo.claim_some()
            if chunks:
                await self._copy(chunks)
            elif self._is_done:
                self._wake()
                return
            else:
                await self._wait_changed()

    async def _turn(self) -> None:
        if self._is_last:
            await trio.lowlevel.checkpoint()
        else:
            await self._job.turn()

    @property
    def _is_done(self) -> bool:
        if self._sync is Sync.NONE and not self._is_last:
            return False
        return self._survey.is_done and not self._in_flight

    async def _wait_changed(self) -> None:
        changed = self._changed
        # First this, then a look: whoever notes does it the other way round.
        self._is_idle = True
        if self._sync is Sync.NONE and self.todo.is_noted:
            return
        await changed.wait()

    def _wake_from_thread(self, token: trio.lowlevel.TrioToken) -> None:
        if self._is_idle:
            self._is_idle = False
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._is_idle = False
        self._changed.set()
        self._changed = trio.Event()

    async def _copy(self, chunks: list[Chunk]) -> None:
        """Copy some chunks, as often as the policies for errors want it."""
        job, is_retry = self._job, chunks[0].is_retry
        length = sum(chunk.length for chunk in chunks)
        self._in_flight += 1
        try:
            if self._sync is Sync.NONE and not is_retry:
                job.progress.remaining += length
            if is_retry:
                await trio.sleep(RETRY_SECONDS)
                await self._turn()
            job.limit.charge(length)
            while not await self._try(chunks):
                await trio.sleep(RETRY_SECONDS)
                await self._turn()
        finally:
            self._in_flight -= 1
            if not self._in_flight or is_retry:
                self._wake()

    async def _try(self, chunks: list[Chunk]) -> bool:
        """Copy; what can not be read comes later. False if a write is due again."""
        while chunks:
            done: list[Chunk] = []
            try:
                with self._job.in_flight():
                    await self._in_thread(partial(self._copy_chunks, chunks, done))
            except SnapshotLost:
                raise
            except OSError as e:
                self._count(done)
                is_read = chunks[0].buffer is None
                await self._on_error(e, is_read=is_read)
                if not is_read:
                    return False
                self.todo.postpone(chunks.pop(0))
                self._wake()
            else:
                self._count(done)
        return True

    def _count(self, done: list[Chunk]) -> None:
        for chunk in done:
            self.todo.count_time(chunk)
            self._job.progress.advance(chunk.length)

    async def _on_error(self, error: OSError, *, is_read: bool) -> None:
        if self._is_last:
            raise error
        await self._job.on_error(error, is_read=is_read)

    async def _in_thread(self, function: Callable[[], object]) -> None:
        def run() -> None:
            with self._target.used():
                function()

        await trio.to_thread.run_sync(
            run, abandon_on_cancel=True, limiter=self._limiter
        )

    # -- in threads

    def _copy_chunks(self, chunks: list[Chunk], done: list[Chunk]) -> None:
        """Copy, and move what is copied to `done`; what fails stays the first."""
        while chunks and not self._has_ended:
            chunk = chunks[0]
            begin = time.monotonic()
            self._copy_chunk(chunk)
            chunk.seconds = time.monotonic() - begin
            done.append(chunks.pop(0))

    def _copy_chunk(self, chunk: Chunk) -> None:
        if chunk.buffer is None:
            if self._can_clone and self._clone(chunk):
                return
            chunk.buffer = self._read(chunk)
        if self._has_ended:
            return
        reached("job.read")
        self._write(chunk.buffer, chunk)
        if self._has_ended:
            return
        reached("job.written")
        self._release(chunk.first, chunk.stop)
        reached("job.released")
        self._buffers.append(chunk.buffer)
        chunk.buffer = None

    def _read(self, chunk: Chunk) -> bytearray:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray(CHUNK_SIZE_MAX)
        data = memoryview(buffer)[: chunk.length]
        self._snapshot.read_into(data, chunk.offset)
        return buffer

    def _write(self, buffer: bytearray, chunk: Chunk) -> None:
        target, length = self._target, chunk.length
        if not buffer.startswith(memoryview(_ZEROES)[:length]):
            target.write(memoryview(buffer)[:length], chunk.offset)
        elif chunk.is_spoiled or not target.is_blank:
            target.punch(length, chunk.offset)

    def _clone(self, chunk: Chunk) -> bool:
        """Let the file system copy, if all is on the source until the end of it."""
        snapshot, source = self._snapshot, self._history.source
        if chunk.is_spoiled or chunk.length % snapshot.cluster_size:
            return False
        if not snapshot.is_on_source(chunk.first, chunk.stop):
            return False
        try:
            self._target.clone(source, chunk.length, chunk.offset)
        except OSError:
            # It is copied: if something is wrong with the target, that is seen then.
            self._can_clone = False
            return False
        if not snapshot.is_on_source(chunk.first, chunk.stop):
            # The guest may have overwritten it before it was cloned.
            chunk.is_spoiled = True
            return False
        self._release(chunk.first, chunk.stop)
        return True

    def _release(self, first: int, stop: int) -> None:
        offset = first * self._snapshot.cluster_size
        try:
            self._snapshot.discard(self.todo.size_of(first, stop), offset)
        except SnapshotLost:
            raise
        except OSError:
            # Space that could not be given back comes back with the snapshot.
            pass

    def _release_hole(self, first: int, stop: int) -> None:
        if self._sync is not Sync.TOP and not self._target.is_blank:
            offset = first * self._snapshot.cluster_size
            self._target.punch(self.todo.size_of(first, stop), offset)
        if not self._has_ended:
            self._release(first, stop)

    # -- the survey

    async def _find_holes(self) -> None:
        survey, progress = self._survey, self._job.progress
        while not survey.is_done:
            await self._job.pause_point()
            try:
                with self._job.in_flight():
                    await self._in_thread(survey.step)
            except SnapshotLost:
                raise
            except OSError as e:
                await self._on_error(e, is_read=survey.is_reading)
                await trio.sleep(RETRY_SECONDS)
            finally:
                found, survey.found = survey.found, 0
                if self._sync is Sync.TOP:
                    # Not there to be copied.
                    progress.remaining -= found
                elif found:
                    progress.advance(found)
            self._wake()
