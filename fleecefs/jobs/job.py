"""One job: a trio task with a status, and what people can tell it.

Its transaction runs it: `run` from created to waiting or aborting, `finish` from there
to concluded. A kind of job is a subclass that overrides the hooks at the end. All of it
belongs to trio's thread; only the constructor may be called anywhere.

The rule for rest: a job is paused when it has been told to and nothing is in flight.
So a worker asks before each chunk and then, without waiting for anything in between,
takes the chunk:

    await job.turn()
    extent = next extent to copy                # sync
    job.limit.charge(extent.length)
    try:
        with job.in_flight():
            await trio.to_thread.run_sync(copy, extent, abandon_on_cancel=True)
        job.progress.advance(extent.length)
    except OSError as e:
        await job.on_error(e, is_read=...)      # raises, or returns: then try again
"""

import contextlib
import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import trio

from fleecefs.errors import NotUsable, VerbRejected, describe
from fleecefs.jobs.limit import RateLimit
from fleecefs.jobs.options import Action, CopyMode, OnError, action_on
from fleecefs.jobs.progress import Progress
from fleecefs.jobs.status import (
    MOVES,
    OVER,
    RESTED,
    RESTING,
    WORKING,
    JobStatus,
    JobVerb,
    check_verb,
)
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.jobs.transaction import Transaction

log = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]

BUG = "internal error: the daemon's log tells more"


class Job:
    """What all kinds of jobs have in common."""

    type: str
    # What it does to bytes, when it has done so.
    has_done = "copied"
    # Whether the next daemon goes on with it.
    outlives_daemon = True

    def __init__(
        self,
        job_id: str,
        device: str,
        *,
        speed: int = 0,
        on_source_error: OnError = OnError.REPORT,
        on_target_error: OnError = OnError.REPORT,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        self.id = job_id
        # The name of the disk it works on.
        self.device = device
        self.on_source_error = on_source_error
        self.on_target_error = on_target_error
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = JobStatus.CREATED
        self.progress = Progress()
        self.limit = RateLimit(speed)
        # "ok", or why it paused by itself: "failed" or "nospace".
        self.io_status = "ok"
        # Why it did not do what it was started for.
        self.error: str | None = None
        self.is_cancelled = False
        self.is_user_paused = False
        # How many daemons it has outlived.
        self.restarts = 0
        self.created = time.time()
        self.ended: float | None = None
        # Set by those who keep it: where events go, and who is told of each move.
        self.emit: Emit = lambda name, data: None
        self.moved: Callable[[Job], None] = lambda job: None
        # Told how it ends, before it forgets what the next daemon would go on with.
        self.decided: Callable[[Job], None] = lambda job: None
        self.transaction: Transaction | None = None
        # The ids of those it ends with, until its transaction knows.
        self.group = [self.id]
        self._holds = 0
        self._in_flight = 0
        self._is_started = False
        self.is_committing = False
        self._resumed = trio.Event()
        self._scope = trio.CancelScope()

    # -- what people can tell it: VerbRejected in a status that does not accept it

    def pause(self) -> None:
        """Rest as soon as nothing is in flight, until told to resume."""
        check_verb(self.id, self.status, JobVerb.PAUSE)
        if self.is_user_paused:
            raise VerbRejected(f"job {self.id!r} has been told to pause already")
        self._pause()

    def resume(self) -> None:
        """Go on after a pause, also after one for an error: that is tried again."""
        check_verb(self.id, self.status, JobVerb.RESUME)
        if not self.is_user_paused:
            raise VerbRejected(f"job {self.id!r} has not been told to pause")
        self.is_user_paused = False
        self.io_status = "ok"
        self.release()
        self.save()

    def set_speed(self, speed: int) -> None:
        """Copy that many bytes a second from now on; 0 is no limit."""
        check_verb(self.id, self.status, JobVerb.SET_SPEED)
        if speed < 0:
            raise NotUsable("a speed is not negative")
        self.limit.set_speed(speed)
        self.save()

    def cancel(self) -> None:
        """End without a result, together with the rest of its transaction.

        Returns at once; a paused job goes on, to end.
        """
        check_verb(self.id, self.status, JobVerb.CANCEL)
        if self.is_committing:
            raise VerbRejected(f"job {self.id!r} is being finalized: too late")
        self.stop("cancelled")
        if self.transaction is not None:
            self.transaction.give_up(self)

    def cancel_softly(self) -> None:
        """End with a result what follows its source, at that moment; else cancel."""
        self.cancel()

    def change(self, copy_mode: CopyMode) -> None:
        """Change when what the guest writes is copied."""
        check_verb(self.id, self.status, JobVerb.CHANGE)
        raise VerbRejected(f"a {self.type} job has no copy mode to change")

    def complete(self) -> None:
        """End with a result what would follow its source for ever."""
        check_verb(self.id, self.status, JobVerb.COMPLETE)
        raise VerbRejected(f"a {self.type} job can not be told to complete")

    def finalize(self) -> None:
        """Let its transaction commit, which waits to be told so."""
        check_verb(self.id, self.status, JobVerb.FINALIZE)
        if self.is_committing or self.is_cancelled:
            raise VerbRejected(f"job {self.id!r} is ending already")
        assert self.transaction is not None
        self.transaction.finalize()

    def dismiss(self) -> None:
        """Forget it."""
        check_verb(self.id, self.status, JobVerb.DISMISS)
        self._move(JobStatus.NULL)

    # -- what its work asks for

    async def turn(self) -> None:
        """Wait until the next chunk may be copied: not paused, and within the speed."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._holds:
                await self._resumed.wait()
            elif self.limit.delay() > 0:
                await self.limit.wait()
            else:
                return

    async def pause_point(self) -> None:
        """Wait while the job is to rest; to be called with nothing in flight."""
        await trio.lowlevel.checkpoint()
        while self._holds:
            await self._resumed.wait()

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """Say that something is being read or written: the job is not at rest."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            self._settle()

    def hold(self) -> None:
        """Rest for a reason of our own, until released; counted, unlike `pause`."""
        self._holds += 1
        if self._holds == 1:
            self._resumed = trio.Event()
        self._settle()

    def release(self) -> None:
        """End one hold; a job that ends has none left."""
        self._holds = max(0, self._holds - 1)
        if self._holds == 0:
            self._resumed.set()
        self._settle()

    def rest(self) -> None:
        """Hold, and let nobody else be in its target for it: the daemon ends."""
        self.hold()

    async def on_error(self, error: OSError, *, is_read: bool) -> None:
        """Do what the policy says: raise the error, or return to try again.

        With the policy ignore it returns at once, and "again" should not be soon. To be
        called with nothing in flight: a job that stops for an error is paused.
        """
        policy = self.on_source_error if is_read else self.on_target_error
        action = action_on(error, policy)
        operation = "read" if is_read else "write"
        self.emit(
            "BLOCK_JOB_ERROR",
            {"device": self.id, "operation": operation, "action": action.value},
        )
        if action is Action.REPORT:
            raise error
        if action is Action.STOP:
            if self.io_status == "ok":
                is_full = error.errno == errno.ENOSPC
                self.io_status = "nospace" if is_full else "failed"
            if not self.is_user_paused:
                log.warning(
                    "job %s pauses: %s failed: %s", self.id, operation, describe(error)
                )
                self._pause()
        await self.pause_point()

    def fail(self, error: OSError) -> None:
        """End with this error, at once, also while paused; no-op if it has done all."""
        if self.status in WORKING and not self.is_cancelled and self.error is None:
            self.error = describe(error)
            self.save()
            self._end_work()

    def converge(self) -> None:
        """Say that the target is like the source, and follows it from now on."""
        if self.status is JobStatus.PAUSED:
            # Told just now; it rests on as one that is ready.
            self._move(JobStatus.RUNNING)
        self._move(JobStatus.READY)
        self.emit("BLOCK_JOB_READY", self._summary())
        self._settle()

    # -- what its transaction does

    @property
    def is_good(self) -> bool:
        """Whether it has done, or still may do, what it was started for."""
        return self.error is None

    @property
    def is_busy(self) -> bool:
        """Whether something is being read or written."""
        return self._in_flight > 0

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    async def run(self) -> None:
        """Work; end waiting if all is done, or aborting."""
        if self.is_good:
            self._start()
            with self._scope:
                await self._guard(self.work)
            self._leave_rest()
        self._move(JobStatus.WAITING if self.is_good else JobStatus.ABORTING)

    def stop(self, reason: str) -> None:
        """Cancel this job alone; one that has failed or commits stays as it is."""
        if self.is_good and not self.is_committing:
            self.is_cancelled = True
            self.error = reason
            self.save()
            self._end_work()

    def wait_for_finalize(self) -> None:
        """Become pending, and say so if people have to finalize."""
        self._move(JobStatus.PENDING)
        if not self.auto_finalize:
            self.emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.id})

    async def try_prepare(self) -> None:
        """Do the part of the end that may fail."""
        await self._guard(self.prepare)

    def begin_commit(self) -> None:
        """Pass the point from which it can not be cancelled."""
        self.is_committing = True
        self.save()

    async def finish(self) -> None:
        """Commit if all is good, abort if not; conclude in any case."""
        if self.is_good:
            await self._guard(self.commit)
        else:
            if self.status is not JobStatus.ABORTING:
                self._move(JobStatus.ABORTING)
            await self._guard(self.abort)
        self.ended = time.time()
        self.decided(self)
        await self._guard(self.clean)
        self.ended = time.time()
        self._emit_end()
        self._move(JobStatus.CONCLUDED)
        if self.auto_dismiss:
            self._move(JobStatus.NULL)

    # -- what there is to know

    def describe_block_job(self) -> dict[str, Any]:
        """Return what QEMU's query-block-jobs tells."""
        return {
            **self._summary(),
            "busy": self.is_busy,
            "paused": self._holds > 0,
            "io-status": self.io_status,
            "ready": self.status in (JobStatus.READY, JobStatus.STANDBY),
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
            **self._error_member(),
            **self.qemu_details(),
        }

    def describe_job(self) -> dict[str, Any]:
        """Return what QEMU's query-jobs tells."""
        return {
            "id": self.id,
            "type": self.type,
            "status": self.status.value,
            "current-progress": self.progress.current,
            "total-progress": self.progress.total,
            **self._error_member(),
            **self.qemu_details(),
        }

    def describe(self) -> dict[str, Any]:
        """Return all that is known, for people (control/results.py, Job)."""
        is_copying = self.status in (JobStatus.RUNNING, JobStatus.READY)
        return {
            "id": self.id,
            "type": self.type,
            "disk": self.device,
            "status": self.status.value,
            "current": self.progress.current,
            "total": self.progress.total,
            "speed": self.limit.speed,
            "speed-now": self.progress.speed() if is_copying else 0.0,
            "eta": self.eta() if is_copying else None,
            "user-paused": self.is_user_paused,
            "io-status": self.io_status,
            "cancelled": self.is_cancelled,
            "error": self.error,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
            "created": self.created,
            "elapsed": (self.ended or time.time()) - self.created,
            "restarts": self.restarts,
            **self.details(),
        }

    def _summary(self) -> dict[str, Any]:
        # QEMU's `device` is the job's id; the default of that is the device.
        return {
            "type": self.type,
            "device": self.id,
            "len": self.progress.total,
            "offset": self.progress.current,
            "speed": self.limit.speed,
        }

    def _error_member(self) -> dict[str, str]:
        return {} if self.error is None else {"error": self.error}

    # -- moves

    def _start(self) -> None:
        self._is_started = True
        self.progress.start()
        self._move(JobStatus.RUNNING)
        self._settle()

    def _pause(self) -> None:
        self.is_user_paused = True
        self.hold()
        self.save()

    def _settle(self) -> None:
        """Move to rest or back to work, whichever is due."""
        if self._holds and not self._in_flight:
            wanted = RESTING.get(self.status)
        elif not self._holds:
            wanted = RESTED.get(self.status)
        else:
            wanted = None
        if wanted is not None:
            self._move(wanted)

    def _leave_rest(self) -> None:
        self.is_user_paused = False
        self._holds = 0
        self._resumed.set()
        self._settle()

    def _end_work(self) -> None:
        if self._is_started and self.status in WORKING:
            self._leave_rest()
        self._scope.cancel()

    def _move(self, status: JobStatus) -> None:
        assert status in MOVES[self.status], f"{self.status} -> {status}"
        self.status = status
        if status is JobStatus.CONCLUDED:
            log.log(*self._conclusion())
        else:
            log.info("job %s is %s", self.id, status.value)
        self.save()
        self.emit("JOB_STATUS_CHANGE", {"id": self.id, "status": status.value})
        self.moved(self)

    def _conclusion(self) -> tuple[int, str]:
        done = format_size(self.progress.current)
        assert self.ended is not None
        text = f"{done} {self.has_done} in {self.ended - self.created:.0f} s"
        if self.is_good or self.is_cancelled:
            text = text if self.is_good else f"{self.error}, {text}"
            return logging.INFO, f"job {self.id} concluded: {text}"
        return logging.ERROR, f"job {self.id} failed: {self.error}; {text}"

    def _emit_end(self) -> None:
        if not self._is_started and self.restarts == 0:
            return
        if self.is_cancelled:
            self.emit("BLOCK_JOB_CANCELLED", self._summary())
        else:
            self.emit(
                "BLOCK_JOB_COMPLETED", {**self._summary(), **self._error_member()}
            )

    async def _guard(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step; what goes wrong becomes the job's error, unless it has one."""
        try:
            await step()
        except OSError as e:
            error = describe(e)
        except Exception:
            log.exception("job %s: a bug", self.id)
            error = BUG
        else:
            return
        if step in (self.abort, self.clean):
            # Its result stays what it is.
            log.error("job %s could not clean up: %s", self.id, error)
        elif self.is_good:
            self.error = error

    # -- hooks

    async def work(self) -> None:
        """Do it; return when all is done, raise OSError to fail.

        Cancelled by trio when the job is to end.
        """
        raise NotImplementedError

    async def prepare(self) -> None:
        """Do what may still fail, once all of the transaction have done their work."""

    async def commit(self) -> None:
        """Keep the result. Too late to fail: the others have committed, too."""

    async def abort(self) -> None:
        """Undo what must not stay, after a failure or cancel."""

    async def clean(self) -> None:
        """Let go of everything, after commit or abort."""

    def save(self) -> None:
        """Remember what has to outlive the daemon; called when it has changed."""

    def eta(self) -> float | None:
        """Return the seconds that it takes if it goes on like this, if it does."""
        return self.progress.eta()

    def details(self) -> dict[str, Any]:
        """Return what this kind of job tells people besides (control/results.py)."""
        return {}

    def qemu_details(self) -> dict[str, Any]:
        """Return what QEMU's queries tell of this kind of job besides."""
        return {}
