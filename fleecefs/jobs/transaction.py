"""Jobs that end together: all commit, or none does.

A job that has done its work waits for the others. When all have, they prepare; when
all have prepared, they commit. If one fails or is cancelled before that, the others
are cancelled, and each of them aborts. A job by itself is a transaction of one.
"""

from collections.abc import Iterable

import trio

from fleecefs.jobs.job import Job


class Transaction:
    """Some jobs, and the task that runs them."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self.jobs = tuple(jobs)
        # Told to finalize, or that there is nothing to finalize any more.
        self._decided = trio.Event()
        for job in self.jobs:
            assert job.transaction is None
            job.transaction = self

    async def run(self) -> None:
        """Run all jobs until they have concluded."""
        async with trio.open_nursery() as nursery:
            for job in self.jobs:
                nursery.start_soon(self._run, job)
        if self._is_good:
            await self._wait_finalize()
        if self._is_good:
            await self._prepare()
        if self._is_good:
            for job in self.jobs:
                job.begin_commit()
        for job in self.jobs:
            await job.finish()

    def finalize(self) -> None:
        """Commit now; all jobs are pending."""
        self._decided.set()

    def give_up(self, cause: Job) -> None:
        """Cancel all jobs, because one of them has failed or was cancelled."""
        fate = "was cancelled" if cause.is_cancelled else "failed"
        for job in self.jobs:
            job.stop(f"cancelled, as job {cause.id!r} {fate}")
        self._decided.set()

    @property
    def _is_good(self) -> bool:
        return all(job.is_good for job in self.jobs)

    async def _run(self, job: Job) -> None:
        await job.run()
        if not job.is_good:
            self.give_up(job)

    async def _wait_finalize(self) -> None:
        for job in self.jobs:
            job.wait_for_finalize()
        # Some may have committed already, under the daemon before.
        if not all(job.auto_finalize or job.is_committing for job in self.jobs):
            await self._decided.wait()

    async def _prepare(self) -> None:
        for job in self.jobs:
            await job.try_prepare()
            if not job.is_good:
                self.give_up(job)
                return
