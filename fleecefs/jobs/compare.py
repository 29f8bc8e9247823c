"""Comparing a private snapshot with a backup while the guest goes on.

Some workers read both, chunk by chunk in the order of the disk, and release what they
have compared: it is not preserved any more. Where neither has anything, nothing is
read.

Everything but what runs in threads belongs to trio's thread. A thread that hangs in the
backup is abandoned when the comparison ends. It finds that out when it comes back, and
does nothing more.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import trio

from fleecefs.block.extent import Extent
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import SnapshotLost
from fleecefs.jobs.differences import Differences, Run, find_runs
from fleecefs.jobs.held import in_thread
from fleecefs.jobs.job import Job
from fleecefs.jobs.openbackup import OpenBackup
from fleecefs.units import MiB

# Whole clusters, whatever their size.
CHUNK_SIZE = 1 * MiB

# Both sides are read at a time by each; more than that takes the guest's time.
WORKERS = 4

# After a search for what there is, so much is taken to be there.
_DATA_SIZE = 64 * MiB

# How far others may be ahead of a worker that is slow: what they find is kept so long.
_AHEAD_MAX = 64 * MiB

_Result = TypeVar("_Result")


class Buffers:
    """What one worker reads into."""

    def __init__(self) -> None:
        self.ours, self.theirs = bytearray(CHUNK_SIZE), bytearray(CHUNK_SIZE)


class Comparer:
    """Compares all of a snapshot with a backup, for a job."""

    def __init__(
        self,
        job: Job,
        snapshot: Snapshot,
        backup: OpenBackup,
        differences: Differences,
    ) -> None:
        self._job = job
        self._snapshot = snapshot
        self._backup = backup
        self._differences = differences
        self._claiming = trio.Lock()
        # What comes next, and until where something is taken to be there.
        self._cursor = self._data_end = 0
        # Until where all is told, and what was found beyond: its end, and the runs.
        self._told = 0
        self._found: dict[int, tuple[int, list[Run]]] = {}
        self._changed = trio.Event()
        self._error: OSError | None = None
        self._scope = trio.CancelScope()
        self._has_ended = False

    async def run(self) -> None:
        """Compare until nothing is left; raise what failed."""
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                for _ in range(WORKERS):
                    nursery.start_soon(self._work)
        finally:
            self._has_ended = True
        if self._error is not None:
            raise self._error

    async def _work(self) -> None:
        """Compare chunks; keep the first error, and end all workers."""
        buffers = Buffers()
        try:
            while (chunk := await self._claim()) is not None:
                await self._compare(chunk, buffers)
        except OSError as e:
            self._error = self._error or e
            self._scope.cancel()

    async def _claim(self) -> Extent | None:
        """Take the next chunk that has something; None if there is none."""
        size = self._snapshot.size
        async with self._claiming:
            while True:
                while self._cursor - self._told >= _AHEAD_MAX:
                    await self._changed.wait()
                await self._job.turn()
                if self._cursor == size:
                    return None
                if self._cursor < self._data_end:
                    break
                await self._skip_holes()
            chunk = Extent(self._cursor, min(CHUNK_SIZE, size - self._cursor))
            self._cursor = chunk.end
            self._job.limit.charge(chunk.length)
            return chunk

    async def _skip_holes(self) -> None:
        begin = self._cursor
        end = await self._try(partial(self._pass_holes, begin))
        self._cursor, self._data_end = end, end + _DATA_SIZE
        if end > begin:
            self._tell(Extent(begin, end - begin), [])

    async def _compare(self, chunk: Extent, buffers: Buffers) -> None:
        runs = await self._try(partial(self._find, chunk, buffers))
        self._tell(chunk, runs)

    async def _try(self, function: Callable[[], _Result]) -> _Result:
        try:
            with self._job.in_flight():
                return await in_thread(self._backup.users, function)
        except SnapshotLost:
            raise
        except OSError as e:
            await self._job.on_error(e, is_read=True)
            raise

    def _tell(self, extent: Extent, runs: list[Run]) -> None:
        """Count what was found there, after all that lies before."""
        self._job.progress.advance(extent.length)
        self._found[extent.offset] = extent.end, runs
        while self._told in self._found:
            self._told, runs = self._found.pop(self._told)
            for run in runs:
                self._differences.add(*run)
        self._changed.set()
        self._changed = trio.Event()

    # -- in threads

    def _pass_holes(self, offset: int) -> int:
        """Return the chunk, at or after offset, where one of the two has something."""
        size = self._snapshot.size
        found = min(self._snapshot.find_data(offset), self._backup.find_data(offset))
        end = size if found == size else found // CHUNK_SIZE * CHUNK_SIZE
        self._release(offset, end)
        return end

    def _find(self, chunk: Extent, buffers: Buffers) -> list[Run]:
        ours, theirs = buffers.ours, buffers.theirs
        offset, length = chunk
        self._snapshot.read_into(memoryview(ours)[:length], offset)
        self._backup.pread_into(memoryview(theirs)[:length], offset)
        runs = find_runs(ours, theirs, length)
        self._release(offset, chunk.end)
        return [(offset + begin, offset + end) for begin, end in runs]

    def _release(self, offset: int, end: int) -> None:
        if self._has_ended or end == offset:
            return
        try:
            self._snapshot.discard(end - offset, offset)
        except SnapshotLost:
            raise
        except OSError:
            # Space that could not be given back comes back with the snapshot.
            pass
