"""Mirrors: a target follows a disk until it is told to end, or to take its place.

First the bulk is copied, then what the guest overwrites meanwhile, over and over. When
the target has all, the mirror is ready, and stays so. `complete` moves the disk to the
target, a soft cancel keeps it where it is. Either way the target is what the disk was
at one instant.

An instant: the disk is drained, what is left by then is copied, the target is flushed.
It is tried when little is left, and given up when it takes too long: then the guest
goes on, and so does copying.
"""

import enum
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from fleecefs.block.disk import drained
from fleecefs.block.mirror import Sink
from fleecefs.errors import Busy, VerbRejected
from fleecefs.inventory import Inventory
from fleecefs.jobs.copy import RETRY_SECONDS
from fleecefs.jobs.held import in_thread
from fleecefs.jobs.job import Job
from fleecefs.jobs.mirrorcopy import MirrorCopier, Outcome
from fleecefs.jobs.options import CopyMode, MirrorOptions, OnError, Sync
from fleecefs.jobs.record import Record
from fleecefs.jobs.status import JobStatus, JobVerb, check_verb
from fleecefs.jobs.target import Target
from fleecefs.jobs.trend import Sample, Trend
from fleecefs.killpoint import reached
from fleecefs.state.mirrors import DiskMirror
from fleecefs.units import MiB

log = logging.getLogger(__name__)

# How often a mirror that is ready looks for what the guest has written.
TICK_SECONDS = 0.1

# How long nobody looks after all workers have found nothing to do.
_BREATH_SECONDS = 0.005

# How long the guest is held back while the rest is copied and the target is flushed: at
# first, and twice as long each time that was not enough, up to so many times. Guests
# give up after 30 s.
HELD_SECONDS_MAX = 1.0
_HELD_TIMES_MAX = 8
# What is little enough to be tried: so much, or what takes so long.
_REST_SIZE = 1 * MiB
_REST_SECONDS = 0.02

# After an instant that was given up the guest has some time to itself, ever more.
_AGAIN_SECONDS, _AGAIN_SECONDS_MAX = 0.1, 5.0

# How often what is left is counted: on a disk of 10 TiB that takes milliseconds.
_MEASURE_SECONDS = 0.25

# What closing a target may take until it is left to itself.
_CLOSE_SECONDS = 1.0

NOT_CONVERGING = "FLEECEFS_MIRROR_NOT_CONVERGING"


class Ending(enum.Enum):
    """What a mirror that is ready was told to come to."""

    COMPLETE = "complete"  # the disk moves to the target
    KEEP = "keep"  # the disk stays, the target is a copy of that moment


class MirrorJob(Job):
    """Makes a target like a disk, and lets it follow."""

    type = "mirror"

    def __init__(
        self,
        inventory: Inventory,
        mirror: DiskMirror | None,
        target: Target | None,
        options: MirrorOptions,
        record: Record,
        *,
        has_begun: bool,
    ) -> None:
        super().__init__(
            options.job_id,
            options.device,
            speed=options.speed,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        self.options = options
        self.copy_mode = options.copy_mode
        self._inventory = inventory
        self._record = record
        self._has_cleaned = False
        # None once it has been let go of; from the beginning, if the daemon before has
        # moved the disk.
        self._mirror = mirror
        self._has_moved = mirror is None
        # Whether the target is what it was told to become.
        self._is_decided = self._has_moved
        self._target = target
        # Why there is none, for a job that goes on.
        self.target_error: OSError | None = None
        self._copier: MirrorCopier | None = None
        # Whether all that is to be copied has been marked.
        self._has_begun = has_begun
        self._was_ready = False
        self._ending: Ending | None = None
        # A flush that failed, maybe long after nobody waited for it any more.
        self._flush_error: OSError | None = None
        self._is_flushing = False
        # For how long the guest was held back at instants, at the most.
        self._held = 0.0
        # How many times HELD_SECONDS_MAX it may be.
        self._held_times = 1
        self._next_instant = 0.0
        self._pause_after = _AGAIN_SECONDS
        self._measure_due = 0.0
        self._trend = Trend()
        self._waits = (0, 0.0)
        # Nobody is to be in the target for it: the daemon ends.
        self._is_leaving_target = False
        self._told = trio.Event()
        self._preparing = trio.CancelScope()

    # -- what people can tell it

    def complete(self) -> None:
        """Move the disk to the target as soon as both are alike; no-op if told so."""
        check_verb(self.id, self.status, JobVerb.COMPLETE)
        if self._ending is Ending.KEEP:
            raise VerbRejected(f"job {self.id!r} is being cancelled: can not complete")
        if self.options.sync is Sync.NONE and self._ending is None:
            # The disk can not move to what lacks the rest of it.
            assert self._mirror is not None
            self._mirror.mirror.redo()
        self._end_as(Ending.COMPLETE)

    def cancel_softly(self) -> None:
        """End with a target that is a copy of this moment; cancel if not ready."""
        if self.status not in (JobStatus.READY, JobStatus.STANDBY):
            self.cancel()
            return
        if self.is_committing:
            raise VerbRejected(f"job {self.id!r} is completing: too late")
        self._end_as(Ending.KEEP)

    def change(self, copy_mode: CopyMode) -> None:
        """Let writes of the guest come to the target before they are answered."""
        check_verb(self.id, self.status, JobVerb.CHANGE)
        if copy_mode is self.copy_mode:
            return
        if copy_mode is not CopyMode.WRITE_BLOCKING:
            raise VerbRejected(
                f"Change to copy mode '{copy_mode.value}' is not implemented"
            )
        self.copy_mode = copy_mode
        self.save()
        self._told.set()

    def resume(self) -> None:
        super().resume()
        self._told.set()

    def stop(self, reason: str) -> None:
        super().stop(reason)
        if not self.is_good:
            self._unfollow()
            self._preparing.cancel()

    def rest(self) -> None:
        self._is_leaving_target = True
        self._unfollow()
        super().rest()

    def release(self) -> None:
        self._is_leaving_target = False
        super().release()

    def _unfollow(self) -> None:
        """Let no write of the guest wait for the target."""
        if self._mirror is not None and not self._has_moved:
            self._mirror.mirror.unfollow()

    def _end_as(self, ending: Ending) -> None:
        self._ending = ending
        self.save()
        self._told.set()

    # -- its life

    def count_progress(self) -> None:
        """Find out how much there is to copy."""
        if self._mirror is not None:
            self.progress.remaining = self._mirror.mirror.left()

    async def work(self) -> None:
        if self._has_moved:
            return
        if self.target_error is not None:
            raise self.target_error
        await self._run(self._lead)

    async def prepare(self) -> None:
        # Told to complete, and only now to finalize: nothing can be tried again.
        if not self._is_decided:
            self.on_source_error = self.on_target_error = OnError.REPORT
            with self._preparing:
                await self._run(self._lead_to_end)

    async def _run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Copy, and decide what comes of it, until that is decided."""
        mirror, target = self._mirror, self._target
        assert mirror is not None
        assert target is not None
        copier = self._copier = MirrorCopier(
            self,
            mirror.disk,
            mirror.mirror,
            target,
            workers=self.options.workers,
            buf_size=self.options.buf_size,
        )
        error: OSError | None = None

        async def leading() -> None:
            nonlocal error
            try:
                await lead()
            except OSError as e:
                error = e
            nursery.cancel_scope.cancel()

        async def copying() -> None:
            nonlocal error
            try:
                await copier.run()
            except OSError as e:
                error = error or e
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copying)
            nursery.start_soon(leading)
        if error is not None and not self._is_decided:
            raise error

    async def _lead(self) -> None:
        if not self._has_begun:
            await self._mark_allocated()
        if self._was_ready:
            self.converge()
        while not self._is_ready:
            await self._look()
            if await self._at_instant() and await self._flush():
                self._measure()
                self._was_ready = True
                self.converge()
        await self._lead_to_end(is_final=self.auto_finalize)

    async def _lead_to_end(self, *, is_final: bool = True) -> None:
        """Follow until the target is told to be what the disk is, and is it.

        If it is not final, the disk does not move yet.
        """
        while self.is_good:
            await self._look()
            act: Callable[[], Awaitable[bool]] | None
            if self._ending is Ending.KEEP:
                act = self._keep
            elif self._ending is Ending.COMPLETE:
                act = self._move_disk if is_final else None
            else:
                continue
            if await self._at_instant(act):
                return

    @property
    def _is_ready(self) -> bool:
        return self.status in (JobStatus.READY, JobStatus.STANDBY)

    async def _mark_allocated(self) -> None:
        """Say that the target lacks what is allocated in the source."""
        mirror = self._mirror
        assert mirror is not None
        disk, at = mirror.disk, 0
        while at < disk.size:
            await self.turn()
            try:
                with self.in_flight():
                    data = await trio.to_thread.run_sync(disk.find_data, at)
                    end = disk.size
                    if data < end:
                        end = await trio.to_thread.run_sync(disk.find_hole, data)
            except OSError as e:
                await self.on_error(e, is_read=True)
                await trio.sleep(RETRY_SECONDS)
                continue
            if data < end:
                mirror.mirror.mark_dirty(data, end)
            at = end
            self.count_progress()
        self._has_begun = True
        self.save()

    # -- from time to time

    async def _look(self) -> None:
        """Wait until there may be something to decide, and do what has to be done."""
        copier, mirror = self._copier, self._mirror
        assert copier is not None
        assert mirror is not None
        with trio.move_on_after(TICK_SECONDS):
            if self._is_ready and self._ending is None:
                await self._told.wait()
            else:
                if not copier.is_resting:
                    await copier.rested.wait()
                # Not at once: what is dirty by then may be all that can be, or fail.
                await trio.sleep(_BREATH_SECONDS)
        self._told = trio.Event()
        copier.rested = trio.Event()
        await self.pause_point()
        if trio.current_time() >= self._measure_due:
            self._measure()
        await self._heed_failures()
        await self._set_following()
        if self.copy_mode is CopyMode.WRITE_BLOCKING and not mirror.mirror.is_synced:
            mirror.mirror.mark_synced()
        if mirror.mirror.is_dirty:
            copier.wake()

    async def _heed_failures(self) -> None:
        """Do what the policy says about errors that nobody was waiting for."""
        mirror = self._mirror
        assert mirror is not None
        flush_error, self._flush_error = self._flush_error, None
        if flush_error is not None:
            # The kernel has let go of what it could not write, whatever that was.
            mirror.mirror.redo()
            await self.on_error(flush_error, is_read=False)
            await trio.sleep(RETRY_SECONDS)
        failure = mirror.mirror.take_failure()
        if failure is not None:
            assert self._copier is not None
            self._copier.has_written = False
            await self.on_error(failure, is_read=False)

    async def _set_following(self) -> None:
        """Let writes go to the target if they are to, and it does not fail just now."""
        mirror, copier = self._mirror, self._copier
        assert mirror is not None
        assert copier is not None
        if (
            self.copy_mode is not CopyMode.WRITE_BLOCKING
            or mirror.mirror.is_following
            or mirror.mirror.is_hanging
            or self._is_leaving_target
            or not (copier.has_written or mirror.mirror.is_alike())
        ):
            return
        with self.in_flight():
            try:
                await trio.to_thread.run_sync(self._follow)
            except Busy as e:
                log.warning("job %s does not follow yet: %s", self.id, e.strerror)
        if self._is_leaving_target:
            # Told so just now.
            self._unfollow()

    def _follow(self) -> None:
        mirror, target = self._mirror, self._target
        assert mirror is not None
        assert target is not None

        def write(data: memoryview, offset: int) -> None:
            with target.used():
                target.write(data, offset)

        def zero(length: int, offset: int) -> None:
            with target.used():
                target.punch(length, offset)

        with drained([mirror.disk]):
            mirror.mirror.follow(Sink(write, zero))
        reached("mirror.following")

    # -- instants

    async def _at_instant(
        self, act: Callable[[], Awaitable[bool]] | None = None
    ) -> bool:
        """Make the target what the disk is, and act before the disk changes again.

        False if it did not work this time.
        """
        copier, mirror = self._copier, self._mirror
        assert copier is not None
        assert mirror is not None
        if not self._may_try():
            return False
        # Most of it while the guest goes on.
        if act is not None and not await self._flush():
            return False
        try:
            with self.in_flight():
                hold = await trio.to_thread.run_sync(
                    partial(drained, [mirror.disk], HELD_SECONDS_MAX)
                )
        except Busy:
            self._try_again_later()
            return False
        begin = time.monotonic()
        try:
            seconds = HELD_SECONDS_MAX * self._held_times
            with self.in_flight(), trio.move_on_after(seconds) as limit:
                is_alike = await self._copy_rest(copier)
                if is_alike and (act is None or (await self._flush() and await act())):
                    self._pause_after = _AGAIN_SECONDS
                    return True
        finally:
            hold.close()
            self._held = max(self._held, time.monotonic() - begin)
        if limit.cancelled_caught:
            self._held_times = min(2 * self._held_times, _HELD_TIMES_MAX)
        self._try_again_later()
        return False

    def _may_try(self) -> bool:
        mirror, copier = self._mirror, self._copier
        assert mirror is not None
        assert copier is not None
        if trio.current_time() < self._next_instant:
            return False
        if copier.is_slow or mirror.mirror.is_hanging:
            return False
        if mirror.mirror.is_alike():
            return True
        size = max(_REST_SIZE, self.progress.speed() * _REST_SECONDS)
        is_limited = self.limit.delay() > 0
        return copier.passes > 0 and not is_limited and mirror.mirror.left() <= size

    def _try_again_later(self) -> None:
        self._next_instant = trio.current_time() + self._pause_after
        self._pause_after = min(2 * self._pause_after, _AGAIN_SECONDS_MAX)

    async def _copy_rest(self, copier: MirrorCopier) -> bool:
        """Copy what is left while the disk is drained; tell whether both are alike."""
        mirror, target, outcome = self._mirror, self._target, Outcome()
        assert mirror is not None
        assert target is not None
        until = time.monotonic() + HELD_SECONDS_MAX * self._held_times
        while not mirror.mirror.is_alike() or copier.is_busy:
            await in_thread(target.users, partial(copier.copy_rest, until, outcome))
            self.progress.advance(outcome.copied)
            if outcome.error is not None:
                # The workers meet it again, when the guest is not held back.
                return False
            outcome = Outcome()
            # What workers have begun to copy ends soon.
            await trio.sleep(_BREATH_SECONDS / 5)
        return True

    async def _flush(self) -> bool:
        """Make the target durable; False if it is not, for now."""
        target = self._target
        assert target is not None
        if self._is_flushing or self._flush_error is not None:
            return False
        with self.in_flight():
            await in_thread(target.users, partial(self._flush_in_thread, target))
        reached("mirror.flushed")
        return self._flush_error is None

    def _flush_in_thread(self, target: Target) -> None:
        """Flush; an error is kept, as there may be nobody left to wait for it."""
        self._is_flushing = True
        try:
            target.flush()
        except OSError as e:
            self._flush_error = e
        finally:
            self._is_flushing = False

    async def _move_disk(self) -> bool:
        """Let the disk live on the target: it is drained, and both are alike."""
        mirror, target, copier = self._mirror, self._target, self._copier
        assert mirror is not None
        assert target is not None
        assert copier is not None
        move = partial(self._inventory.move_disk, mirror)

        def hand_over() -> None:
            target.hand_over(lambda image: move(image, self.options.target))

        if not self.is_good:
            # Cancelled just now, and not waited since.
            return False
        # From here on nobody can cancel it.
        self.is_committing = True
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(hand_over)
            except Busy:
                self.is_committing = False
                return False
            except BaseException:
                self.is_committing = False
                raise
        copier.stop()
        self._has_moved = self._is_decided = True
        return True

    async def _keep(self) -> bool:
        """Let the target stay as it is: the disk is drained, and both are alike."""
        mirror, copier = self._mirror, self._copier
        assert mirror is not None
        assert copier is not None
        copier.stop()
        mirror.mirror.unfollow()
        self._is_decided = True
        return True

    # -- its end

    async def abort(self) -> None:
        self._unfollow()
        target = self._target
        if target is not None:
            # Nobody shall take it for a copy.
            with trio.move_on_after(_CLOSE_SECONDS):
                await in_thread(target.users, target.remove)

    async def clean(self) -> None:
        if self._has_cleaned:
            return
        self._has_cleaned = True
        mirror, target = self._mirror, self._target
        if mirror is not None:
            self._waits = mirror.mirror.waited, mirror.mirror.longest_wait
            self.progress.remaining = mirror.mirror.left() if not self.is_good else 0
        self._mirror = self._target = self._copier = None
        # First: a mirror without a job is dropped, whatever happens next.
        await trio.to_thread.run_sync(self._record.remove)
        reached("mirror.forgotten")
        if mirror is not None:
            await trio.to_thread.run_sync(self._inventory.end_mirror, mirror)
        if target is not None:
            with trio.move_on_after(_CLOSE_SECONDS):
                await in_thread(target.users, target.close)

    def save(self) -> None:
        if self._has_cleaned:
            return
        self._record.save(
            {
                "speed": self.limit.speed,
                "user-paused": self.is_user_paused,
                "restarts": self.restarts,
                "error": self.error,
                "cancelled": self.is_cancelled,
                "io-status": self.io_status,
                "copied": self.progress.current,
                "begun": self._has_begun,
                "ready": self._was_ready,
                "ending": None if self._ending is None else self._ending.value,
                "copy-mode": self.copy_mode.value,
            }
        )

    def go_on(self, now: dict[str, Any]) -> None:
        """Be as the job of the daemon before was, before anything runs."""
        self.restarts = int(now.get("restarts", 0)) + 1
        self.limit.speed = int(now.get("speed", self.limit.speed))
        self.io_status = str(now.get("io-status", self.io_status))
        self.progress.current = int(now.get("copied", 0))
        if self._mirror is not None and self.options.sync is Sync.FULL:
            done = self._mirror.disk.size - self._mirror.mirror.left()
            self.progress.current = max(done, self.progress.current)
        self._has_begun = bool(now.get("begun", self._has_begun))
        self._was_ready = bool(now.get("ready"))
        ending = now.get("ending")
        self._ending = None if ending is None else Ending(ending)
        self.copy_mode = CopyMode(now.get("copy-mode", self.copy_mode.value))
        self.count_progress()
        if self._has_moved:
            self.is_committing = True
        elif now.get("error"):
            # It was about to end.
            self.error = str(now["error"])
            self.is_cancelled = bool(now.get("cancelled"))
        elif now.get("user-paused"):
            self.pause()
        self.save()

    # -- how fast it is, and the guest

    def _measure(self) -> None:
        """Find out what is left, and whether that becomes less."""
        assert self._mirror is not None
        mirror, now = self._mirror.mirror, trio.current_time()
        self._measure_due = now + _MEASURE_SECONDS
        left = mirror.left()
        if self._copier is not None:
            left += self._copier.uncounted()
        self.progress.remaining = left
        has_passed = self._copier is not None and self._copier.passes > 0
        was_stuck = self._trend.is_stuck
        self._trend.add(
            Sample(now, self.progress.current, left),
            is_catching_up=has_passed and not (self._is_ready or mirror.is_following),
        )
        if self._trend.is_stuck and not was_stuck:
            self._tell_stuck()

    def _tell_stuck(self) -> None:
        rates = {
            "dirty-rate": self._trend.dirty_rate,
            "copy-rate": self.progress.speed(),
        }
        self.emit(NOT_CONVERGING, {"id": self.id, **rates})
        log.info(
            "job %s does not converge: the guest writes %.0f bytes a second, "
            "%.0f are copied",
            self.id,
            rates["dirty-rate"],
            rates["copy-rate"],
        )
        if self.options.is_auto:
            self.copy_mode = CopyMode.WRITE_BLOCKING
            self.save()

    @property
    def _is_stuck(self) -> bool:
        if self._is_ready or self.is_over or self._mirror is None:
            return False
        is_following = self._mirror.mirror.is_following
        return self._trend.is_stuck and not is_following

    def eta(self) -> float | None:
        """Return the seconds until it is ready, if it comes to that."""
        if self._is_ready:
            return None
        speed = self.progress.speed() - self._trend.dirty_rate
        return self.progress.remaining / speed if speed > 0 else None

    def details(self) -> dict[str, Any]:
        mirror = self._mirror
        if mirror is not None:
            self._waits = mirror.mirror.waited, mirror.mirror.longest_wait
        waited, longest = self._waits
        return {
            "target": str(self.options.target),
            "sync": self.options.sync.value,
            "format": "raw",
            "backing": None,
            "bitmap": None,
            "bitmap-mode": None,
            "fell-back": None,
            "copy-mode": self.copy_mode.value,
            **self.qemu_details(),
            "dirty-rate": self._trend.dirty_rate if mirror is not None else 0.0,
            "converges": not self._is_stuck,
            "held": self._held,
            "moved": self._has_moved,
            "cost": {
                "waited": waited,
                "longest-wait": longest,
                "ram": 0,
                "ram-peak": 0,
                "disk": 0,
                "disk-peak": 0,
            },
        }

    def qemu_details(self) -> dict[str, Any]:
        mirror = self._mirror
        is_synced = mirror is not None and mirror.mirror.is_synced
        return {"actively-synced": is_synced}
