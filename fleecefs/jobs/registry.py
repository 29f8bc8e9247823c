"""All jobs of a mount, by id, and what became of the last ones that are gone."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fleecefs.bitmaps.steps import Step
from fleecefs.block.bitmap import replace_file
from fleecefs.errors import BadName, Busy, NameTaken, NotFound
from fleecefs.jobs.job import Emit, Job
from fleecefs.jobs.options import BackupOptions
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import busy_targets
from fleecefs.jobs.transaction import Transaction

log = logging.getLogger(__name__)

# Who follows a job asks every second; a job that is gone was among the last.
ENDED_MAX = 100
ID_LENGTH_MAX = 255
# Each may hang with its target.
CREATORS_MAX = 16
# A client waits a minute for an answer, and this is a better one than none.
RESUME_SECONDS = 30.0
# What is in flight when jobs are to rest ends in that time, or hangs: a slow target may
# need some seconds for 24 chunks of 1 MiB.
REST_SECONDS = 10.0
_POLL_SECONDS = 0.01

# Blocking; returns a job for each, all of one instant, or raises OSError and has
# left nothing behind.
CreateBackups = Callable[[Sequence[BackupOptions | Step]], Sequence[Job]]
Create = Callable[[], Sequence[Job]]

# Blocking; returns the jobs of the daemon before us that go on, by transaction.
Resume = Callable[[], Sequence[Sequence[Job]]]


class Jobs:
    """Jobs live here from their creation until they are dismissed. In trio only.

    Those of the daemon before us are resumed when `run` begins. Their targets may hang,
    so nobody who serves the guest waits for that; who asks about jobs does, with
    `wait_resumed`.
    """

    def __init__(
        self,
        create_backups: CreateBackups,
        emit: Emit,
        ended_path: Path | None = None,
        resume: Resume = tuple,
    ) -> None:
        self._create_backups = create_backups
        self._resume = resume
        self._emit = emit
        # For the next daemon: who follows a job asks it.
        self._ended_path = ended_path
        self._ended = _load(ended_path)
        self._jobs: dict[str, Job] = {}
        for known in self._ended.values():
            if known["status"] == JobStatus.CONCLUDED.value:
                self._keep(Remembered(known))
        # Added before `run`.
        self._early: list[Transaction] = []
        self._nursery: trio.Nursery | None = None
        self._resuming = trio.CancelScope()
        self._resumed = trio.Event()
        # The ids of jobs that are being created. A target may hang while it is opened:
        # that must hold up nobody else.
        self._reserved: set[str] = set()
        self._creators = trio.CapacityLimiter(CREATORS_MAX)
        self._is_closing = False
        self._closing = trio.Event()
        self._closed = trio.Event()

    async def run(self) -> None:
        """Run the jobs there are and those to come, until `close`."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for transaction in self._early:
                    nursery.start_soon(transaction.run)
                await self._resume_jobs()
                await self._closing.wait()
        finally:
            self._closed.set()

    async def wait_resumed(self) -> None:
        """Wait until the jobs of the daemon before us are there; Busy if they hang."""
        with trio.move_on_after(RESUME_SECONDS):
            await self._resumed.wait()
        if not self._resumed.is_set():
            raise Busy("jobs of the daemon before are still being resumed: try again")

    async def close(self) -> None:
        """Cancel all jobs, and return when they have cleaned up."""
        self._is_closing = True
        self._resuming.cancel()
        for job in self._jobs.values():
            job.stop("cancelled, as the mount has ended")
        for job in self._jobs.values():
            if job.transaction is not None:
                job.transaction.give_up(job)
        self._closing.set()
        if self._nursery is not None:
            await self._closed.wait()

    async def rest(self) -> None:
        """Return when all jobs rest and nobody is in a target; Busy if one hangs.

        For the end of a daemon whose guests shall not wait for that. Jobs that the next
        one does not go on with have ended then.
        """
        resting = [job for job in self._jobs.values() if not job.is_over]
        for job in resting:
            job.rest()
        try:
            with trio.move_on_after(REST_SECONDS):
                while busy_targets() or any(job.is_busy for job in resting):
                    await trio.sleep(_POLL_SECONDS)
            if busy := busy_targets():
                raise Busy(
                    f"target {busy[0]} does not answer, and a process that waits for "
                    "it can not end: try again when it does"
                )
            await self._end_mortal(resting)
        except BaseException:
            for job in resting:
                job.release()
            raise

    async def _end_mortal(self, resting: list[Job]) -> None:
        ending = [job for job in resting if not job.outlives_daemon]
        for job in ending:
            job.stop("cancelled, as the daemon was restarted")
        while not all(job.is_over for job in ending):
            await trio.sleep(_POLL_SECONDS)

    async def check_end(self) -> None:
        """Raise Busy while a job would be cancelled by an end of the mount."""
        await self.wait_resumed()
        for job in self._jobs.values():
            if job.is_over:
                continue
            way = f"wait for it with 'fleecefs job wait {job.id}'"
            if job.status in (JobStatus.READY, JobStatus.STANDBY):
                way = f"complete it with 'fleecefs job complete {job.id}'"
            raise Busy(
                f"job {job.id!r} has not ended: {way}, cancel it, or use --force"
            )

    async def start_backups(
        self, wanted: Sequence[BackupOptions | Step], *, grouped: bool = False
    ) -> list[Job]:
        """Start backups of one instant; raise OSError, and then none is started.

        Steps happen to bitmaps at the same instant. Grouped, all backups end well or
        none does.
        """
        ids = [each.job_id for each in wanted if isinstance(each, BackupOptions)]
        create = partial(self._create_backups, list(wanted))
        return await self.start(ids, create, grouped=grouped)

    async def start(
        self, ids: Sequence[str], create: Create, *, grouped: bool = False
    ) -> list[Job]:
        """Start the jobs of these ids that are created; errors as `start_backups`."""
        self._check_closing()
        self._check_ids(ids)
        self._reserved.update(ids)
        try:
            jobs = await trio.to_thread.run_sync(
                create, abandon_on_cancel=True, limiter=self._creators
            )
        finally:
            self._reserved.difference_update(ids)
        # What they hold goes with the mount.
        self._check_closing()
        for group in [jobs] if grouped else [[job] for job in jobs]:
            self.add(group)
        return list(jobs)

    def add(self, group: Sequence[Job]) -> None:
        """Run jobs that exist already, as one transaction."""
        transaction = Transaction(group)
        for job in group:
            self._keep(job)
            self._emit("JOB_STATUS_CHANGE", {"id": job.id, "status": job.status.value})
        if self._nursery is None:
            self._early.append(transaction)
        else:
            self._nursery.start_soon(transaction.run)

    def get(self, job_id: str) -> Job:
        """Return a job that has not been dismissed; NotFound if there is none."""
        job = self._jobs.get(job_id)
        if job is None:
            raise NotFound(f"no job {job_id!r}")
        return job

    def all(self) -> list[Job]:
        """Return the jobs in the order of their creation."""
        return list(self._jobs.values())

    def describe(self, job_id: str) -> dict[str, Any]:
        """Return what is known of a job, also of one that is gone."""
        if job_id not in self._jobs and job_id in self._ended:
            return self._ended[job_id]
        return self.get(job_id).describe()

    async def _resume_jobs(self) -> None:
        with self._resuming:
            groups = await trio.to_thread.run_sync(
                self._resume, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
            for group in groups:
                self.add(group)
        self._resumed.set()

    def _check_closing(self) -> None:
        if self._is_closing:
            raise Busy("the mount is ending")

    def _check_ids(self, ids: Iterable[str]) -> None:
        seen = self._reserved | set(self._jobs)
        for job_id in ids:
            if job_id in seen:
                raise NameTaken(f"a job {job_id!r} exists: give another job id")
            if not 0 < len(job_id) <= ID_LENGTH_MAX or not job_id.isprintable():
                raise BadName(f"{job_id!r} can not be the id of a job")
            seen.add(job_id)

    def _keep(self, job: Job) -> None:
        # The daemon before may have said how it ends, and then not come to the end.
        assert isinstance(self._jobs.get(job.id), Remembered | None)
        self._jobs[job.id] = job
        job.emit = self._emit
        job.moved = self._moved
        job.decided = self._decided

    def _decided(self, job: Job) -> None:
        status = JobStatus.NULL if job.auto_dismiss else JobStatus.CONCLUDED
        self._remember({**job.describe(), "status": status.value})

    def _moved(self, job: Job) -> None:
        if job.status is JobStatus.NULL:
            del self._jobs[job.id]
        elif job.status is not JobStatus.CONCLUDED or job.auto_dismiss:
            return
        self._remember(job.describe())

    def _remember(self, known: dict[str, Any]) -> None:
        # The last to end comes last.
        self._ended.pop(known["id"], None)
        self._ended[known["id"]] = known
        while len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        self._save_ended()

    def _save_ended(self) -> None:
        if self._ended_path is None:
            return
        try:
            replace_file(self._ended_path, json.dumps(self._ended).encode())
        except OSError as e:
            log.warning("%s: %s", self._ended_path, e.strerror)


class Remembered(Job):
    """A job that concluded under a daemon before us, and was not dismissed."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__(
            known["id"],
            known["disk"],
            speed=known["speed"],
            auto_finalize=known["auto-finalize"],
            auto_dismiss=known["auto-dismiss"],
        )
        self.type = known["type"]
        self.status = JobStatus.CONCLUDED
        self.progress.current = known["current"]
        self.progress.remaining = known["total"] - known["current"]
        self.io_status = known["io-status"]
        self.error = known["error"]
        self.is_cancelled = known["cancelled"]
        self.created = known["created"]
        self.ended = known["created"] + known["elapsed"]
        self.restarts = known["restarts"]
        self._known = known

    def details(self) -> dict[str, Any]:
        return {k: v for k, v in self._known.items() if k not in _CHANGEABLE}


# What dismissing a job changes of what is known of it.
_CHANGEABLE = {"status"}


def _load(path: Path | None) -> dict[str, dict[str, Any]]:
    """Return what the daemon before us has saved, if it has."""
    if path is None:
        return {}
    try:
        ended: dict[str, dict[str, Any]] = json.loads(path.read_text())
        for known in ended.values():
            Remembered(known)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        # What became of old jobs is not worth an end of the mount.
        log.warning("forgot what became of jobs: %s: %r", path, e)
        return {}
    return ended
