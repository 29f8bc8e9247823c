"""A job by itself, on a clock that jumps: verbs, rest, speed, errors."""

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.errors import NotUsable, VerbRejected
from fleecefs.jobs.job import BUG
from fleecefs.jobs.options import Action, OnError, action_on
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.transaction import Transaction
from tests.jobs.fakes import CHUNK, SIZE, FakeBackup, Heard

EIO = OSError(errno.EIO, "Input/output error")
ENOSPC = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def new_job(heard):
    def new_job(**options):
        job = FakeBackup(**options)
        job.emit = heard
        return job

    return new_job


@pytest.fixture
def job(new_job):
    return new_job()


class Running:
    """A job in its transaction, until the block is left."""

    def __init__(self, job):
        self._job = job

    async def __aenter__(self):
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        nursery.start_soon(Transaction([self._job]).run)
        await wait_all_tasks_blocked()
        return self._job

    async def __aexit__(self, *what):
        return await self._manager.__aexit__(*what)


# -- a life


async def test_a_job_goes_through_all_statuses(autojump_clock, job, heard):
    await Transaction([job]).run()

    assert heard.statuses() == ["running", "waiting", "pending", "concluded", "null"]
    assert job.steps == ["work", "prepare", "commit", "clean"]
    assert trio.current_time() == 10


async def test_the_end_is_told_before_it_is_dismissed(autojump_clock, job, heard):
    await Transaction([job]).run()

    names = [name for name, data in heard]
    assert names[-3:] == [
        "BLOCK_JOB_COMPLETED",
        "JOB_STATUS_CHANGE",
        "JOB_STATUS_CHANGE",
    ]
    assert heard.named("BLOCK_JOB_COMPLETED") == [
        {"type": "backup", "device": "job0", "len": SIZE, "offset": SIZE, "speed": 0}
    ]


async def test_without_auto_dismiss_it_is_kept(autojump_clock, new_job, heard):
    job = new_job(auto_dismiss=False)
    await Transaction([job]).run()
    kept = job.status

    job.dismiss()

    assert kept is JobStatus.CONCLUDED
    assert heard.statuses()[-2:] == ["concluded", "null"]
    with pytest.raises(VerbRejected):
        job.dismiss()


async def test_without_auto_finalize_it_waits_to_be_told(
    autojump_clock, new_job, heard
):
    async with Running(new_job(auto_finalize=False)) as job:
        await trio.sleep(1000)
        waiting, steps = job.status, list(job.steps)

        job.finalize()

    assert waiting is JobStatus.PENDING
    assert steps == ["work"]
    assert job.steps == ["work", "prepare", "commit", "clean"]
    assert heard.named("BLOCK_JOB_PENDING") == [{"type": "backup", "id": "job0"}]


async def test_what_must_be_remembered_is_saved(autojump_clock, job):
    counts = [job.saves]
    async with Running(job):
        for change in (job.pause, job.resume, lambda: job.set_speed(5), job.cancel):
            change()
            counts.append(job.saves)

    assert counts == sorted(set(counts))


async def test_a_job_can_be_described_at_any_time(autojump_clock, job):
    before = job.describe_job(), job.describe_block_job(), job.describe()
    async with Running(job):
        await trio.sleep(4.5)
        during = job.describe_block_job()
        more = job.describe()
    after = job.describe_block_job()

    assert before[0] == {
        "id": "job0",
        "type": "backup",
        "status": "created",
        "current-progress": 0,
        "total-progress": SIZE,
    }
    assert during == {
        "type": "backup",
        "device": "job0",
        "len": SIZE,
        "offset": 4 * CHUNK,
        "speed": 0,
        "busy": True,
        "paused": False,
        "io-status": "ok",
        "ready": False,
        "status": "running",
        "auto-finalize": True,
        "auto-dismiss": True,
    }
    assert more["disk"] == "web.raw"
    assert more["speed-now"] == pytest.approx(4 * CHUNK / 4.5)
    assert more["eta"] == pytest.approx(6 * CHUNK / more["speed-now"])
    assert more["target"] == "/backup/web.raw"
    assert (after["status"], after["busy"], after["offset"]) == ("null", False, SIZE)


# -- rest


async def test_a_paused_job_finishes_what_is_in_flight_first(
    autojump_clock, job, heard
):
    async with Running(job):
        await trio.sleep(2.5)
        job.pause()
        at_once = job.status, job.describe_block_job()["paused"]
        await trio.sleep(100)
        resting = job.status, job.progress.current, job.describe_block_job()["busy"]
        job.resume()
        resumed = job.status

    assert at_once == (JobStatus.RUNNING, True)
    assert resting == (JobStatus.PAUSED, 3 * CHUNK, False)
    assert resumed is JobStatus.RUNNING
    assert heard.statuses()[:3] == ["running", "paused", "running"]
    assert trio.current_time() == pytest.approx(2.5 + 100 + 7)


async def test_a_job_that_is_resumed_in_time_never_rests(autojump_clock, job, heard):
    async with Running(job):
        await trio.sleep(2.5)
        job.pause()
        job.resume()

    assert "paused" not in heard.statuses()
    assert trio.current_time() == 10


async def test_a_job_can_be_paused_before_it_starts(autojump_clock, job, heard):
    job.pause()
    async with Running(job):
        await trio.sleep(100)
        resting = job.status, job.progress.current
        job.resume()

    assert resting == (JobStatus.PAUSED, 0)
    assert heard.statuses()[:3] == ["running", "paused", "running"]


async def test_a_pause_is_not_counted_and_a_hold_is(autojump_clock, job):
    async with Running(job):
        job.hold()
        job.hold()
        job.pause()
        with pytest.raises(VerbRejected, match="already"):
            job.pause()
        await trio.sleep(100)
        for end in (job.resume, job.release, job.release):
            assert job.status is JobStatus.PAUSED
            end()

        assert job.status is JobStatus.RUNNING
        with pytest.raises(VerbRejected, match="has not been told to pause"):
            job.resume()


async def test_a_hold_is_not_for_people_to_resume(autojump_clock, job):
    async with Running(job):
        job.hold()
        await trio.sleep(10)

        with pytest.raises(VerbRejected):
            job.resume()

        job.release()


async def test_a_ready_job_stands_by_instead(autojump_clock, job, heard):
    async def work():
        job.converge()
        await job.turn()
        job.pause()
        await job.turn()

    job.work = work
    async with Running(job):
        resting = job.status
        job.resume()

    assert resting is JobStatus.STANDBY
    assert heard.statuses()[:4] == ["running", "ready", "standby", "ready"]
    assert heard.named("BLOCK_JOB_READY")[0]["device"] == "job0"


# -- speed


async def test_speed_is_kept_and_changed_at_once(autojump_clock, new_job):
    job = new_job(seconds=0, speed=1)
    async with Running(job):
        await trio.sleep(300)
        slow = job.progress.current
        job.set_speed(CHUNK)
        await trio.sleep(5)
        faster = job.progress.current
        job.set_speed(0)

    assert slow == CHUNK
    assert faster == pytest.approx(6 * CHUNK, abs=CHUNK)
    assert trio.current_time() == 305


async def test_a_pause_reaches_who_waits_for_the_speed(autojump_clock, new_job):
    job = new_job(seconds=0, speed=1)
    async with Running(job):
        job.pause()
        paused = job.status
        job.set_speed(0)
        await wait_all_tasks_blocked()
        copied = job.progress.current
        job.resume()

    assert paused is JobStatus.PAUSED
    assert copied == CHUNK


async def test_a_speed_is_not_negative(job):
    with pytest.raises(NotUsable):
        job.set_speed(-1)


# -- cancel


async def test_cancel_ends_a_job_at_once(autojump_clock, job, heard):
    async with Running(job):
        await trio.sleep(2.5)
        job.cancel()

    assert trio.current_time() == 2.5
    assert job.steps == ["abort", "clean"]
    assert heard.statuses() == ["running", "aborting", "concluded", "null"]
    assert heard.named("BLOCK_JOB_CANCELLED") == [
        {
            "type": "backup",
            "device": "job0",
            "len": SIZE,
            "offset": 2 * CHUNK,
            "speed": 0,
        }
    ]
    assert heard.named("BLOCK_JOB_COMPLETED") == []
    assert job.error == "cancelled"


async def test_cancel_of_a_paused_job_resumes_it_to_end(autojump_clock, job, heard):
    async with Running(job):
        job.pause()
        await trio.sleep(10)
        job.cancel()

    assert heard.statuses()[:4] == ["running", "paused", "running", "aborting"]
    assert job.steps == ["abort", "clean"]


async def test_cancel_of_one_that_waits_for_its_speed(autojump_clock, new_job):
    job = new_job(seconds=0, speed=1)
    async with Running(job):
        job.cancel()

    assert trio.current_time() == 0


async def test_cancel_before_the_start(autojump_clock, job, heard):
    transaction = Transaction([job])
    job.cancel()

    await transaction.run()

    assert heard.statuses() == ["aborting", "concluded", "null"]
    assert heard.named("BLOCK_JOB_CANCELLED") == []
    assert job.steps == ["abort", "clean"]


async def test_a_cancelled_job_that_is_done_nevertheless_is_cancelled(
    autojump_clock, job
):
    async def work():
        with trio.CancelScope(shield=True):
            await trio.sleep(5)

    job.work = work
    async with Running(job):
        job.cancel()

    assert trio.current_time() == 5
    assert (job.is_cancelled, job.steps) == (True, ["abort", "clean"])


async def test_cancel_while_pending(autojump_clock, new_job, heard):
    async with Running(new_job(auto_finalize=False)) as job:
        await trio.sleep(20)
        job.cancel()
        with pytest.raises(VerbRejected):
            job.finalize()

    assert job.steps == ["work", "abort", "clean"]
    assert heard.statuses()[-4:] == ["pending", "aborting", "concluded", "null"]


async def test_too_late_to_cancel(autojump_clock, job):
    committing = trio.Event()
    go_on = trio.Event()

    async def commit():
        committing.set()
        await go_on.wait()

    job.commit = commit
    async with Running(job):
        await committing.wait()

        with pytest.raises(VerbRejected, match="too late"):
            job.cancel()

        go_on.set()
    assert job.error is None


async def test_a_job_that_follows_nothing_is_not_completed(autojump_clock, job):
    async with Running(job):
        with pytest.raises(VerbRejected):
            job.complete()


# -- errors


@pytest.mark.parametrize("error", [EIO, ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("policy", OnError, ids=lambda policy: policy.value)
def test_policy(policy, error):
    is_full = error is ENOSPC
    expected = {
        OnError.REPORT: Action.REPORT,
        OnError.IGNORE: Action.IGNORE,
        OnError.STOP: Action.STOP,
        OnError.ENOSPC: Action.STOP if is_full else Action.REPORT,
        OnError.AUTO: Action.STOP if is_full else Action.REPORT,
    }

    assert action_on(error, policy) is expected[policy]


@pytest.mark.logs("job job0 failed: Input/output error")
@pytest.mark.parametrize("is_read", [True, False], ids=["read", "write"])
async def test_report_fails_the_job(autojump_clock, job, heard, is_read):
    job.faults = [(is_read, EIO)]

    await Transaction([job]).run()

    assert job.steps == ["abort", "clean"]
    assert heard.named("BLOCK_JOB_ERROR") == [
        {
            "device": "job0",
            "operation": "read" if is_read else "write",
            "action": "report",
        }
    ]
    [completed] = heard.named("BLOCK_JOB_COMPLETED")
    assert completed["error"] == "Input/output error"
    assert heard.named("BLOCK_JOB_CANCELLED") == []


async def test_ignore_goes_on(autojump_clock, new_job, heard):
    job = new_job(on_source_error=OnError.IGNORE)
    job.faults = [(True, EIO), (True, EIO)]

    await Transaction([job]).run()

    assert [e["action"] for e in heard.named("BLOCK_JOB_ERROR")] == ["ignore"] * 2
    assert job.error is None
    assert job.progress.current == SIZE


@pytest.mark.logs("job job0 pauses: write failed")
@pytest.mark.parametrize(
    ("error", "status"), [(EIO, "failed"), (ENOSPC, "nospace")], ids=["EIO", "ENOSPC"]
)
async def test_stop_pauses_until_resumed(autojump_clock, new_job, heard, error, status):
    job = new_job(on_target_error=OnError.STOP)
    job.faults = [(False, error), (False, error)]
    async with Running(job):
        for _ in range(2):
            await trio.sleep(100)
            stopped = job.describe_block_job()
            assert (stopped["status"], stopped["io-status"]) == ("paused", status)
            job.resume()
            assert job.io_status == "ok"

    assert [e["action"] for e in heard.named("BLOCK_JOB_ERROR")] == ["stop"] * 2
    assert job.progress.current == SIZE
    assert job.error is None


@pytest.mark.logs("pauses|failed")
@pytest.mark.parametrize("policy", [OnError.ENOSPC, OnError.AUTO])
async def test_enospc_stops_and_the_rest_is_reported(autojump_clock, new_job, policy):
    job = new_job(on_target_error=policy)
    job.faults = [(False, ENOSPC), (False, EIO)]
    async with Running(job):
        await trio.sleep(100)
        stopped = job.status
        job.resume()

    assert stopped is JobStatus.PAUSED
    assert job.error == "Input/output error"


@pytest.mark.logs("job job0 pauses: write failed: No space")
async def test_errors_of_several_workers_are_one_pause(
    autojump_clock, new_job, heard, caplog
):
    job = new_job(on_target_error=OnError.STOP)
    passed = []

    async def worker(error):
        await job.on_error(error, is_read=False)
        passed.append(trio.current_time())

    async def work():
        async with trio.open_nursery() as nursery:
            for error in (ENOSPC, EIO, EIO):
                nursery.start_soon(worker, error)
                await wait_all_tasks_blocked()

    job.work = work
    async with Running(job):
        await trio.sleep(50)
        status = job.io_status
        job.resume()

    assert status == "nospace"
    assert passed == [50, 50, 50]
    assert len(heard.named("BLOCK_JOB_ERROR")) == 3
    assert caplog.text.count("pauses") == 1


@pytest.mark.logs("pauses")
async def test_cancel_of_one_that_stopped_for_an_error(autojump_clock, new_job):
    job = new_job(on_target_error=OnError.STOP)
    job.faults = [(False, EIO)]
    async with Running(job):
        await trio.sleep(10)
        job.cancel()

    assert job.is_cancelled


@pytest.mark.logs("job job0 failed: the snapshot is broken")
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
async def test_a_job_can_be_told_to_fail(autojump_clock, job, heard, paused):
    async with Running(job):
        if paused:
            job.pause()
        await trio.sleep(2.5)
        job.fail(OSError(errno.EIO, "the snapshot is broken"))
        job.fail(OSError(errno.EIO, "again"))

    assert trio.current_time() == 2.5
    [completed] = heard.named("BLOCK_JOB_COMPLETED")
    assert completed["error"] == "the snapshot is broken"
    assert job.steps == ["abort", "clean"]


async def test_one_that_has_all_does_not_fail_any_more(autojump_clock, new_job):
    async with Running(new_job(auto_finalize=False)) as job:
        await trio.sleep(20)
        job.fail(EIO)
        job.finalize()

    assert job.error is None


@pytest.mark.logs("a bug|failed: internal error")
async def test_a_bug_ends_the_job_and_nothing_else(autojump_clock, job, caplog):
    async def work():
        raise ZeroDivisionError("secret")

    job.work = work
    await Transaction([job]).run()

    assert job.error == BUG
    assert "ZeroDivisionError: secret" in caplog.text
    assert job.steps == ["abort", "clean"]


@pytest.mark.logs("job job0 failed: Input/output error")
async def test_a_failure_of_prepare_aborts(autojump_clock, job, heard):
    job.failing["prepare"] = EIO

    await Transaction([job]).run()

    assert job.steps == ["work", "prepare", "abort", "clean"]
    assert heard.statuses()[-4:] == ["pending", "aborting", "concluded", "null"]


@pytest.mark.logs("job job0 failed: Input/output error")
async def test_a_failure_of_commit_is_told(autojump_clock, job, heard):
    job.failing["commit"] = EIO

    await Transaction([job]).run()

    assert job.steps == ["work", "prepare", "commit", "clean"]
    assert heard.named("BLOCK_JOB_COMPLETED")[0]["error"] == "Input/output error"


@pytest.mark.logs("job job0 could not clean up: Input/output error")
async def test_a_failure_to_clean_up_is_logged_and_the_result_stays(
    autojump_clock, job
):
    job.failing["clean"] = EIO

    await Transaction([job]).run()

    assert job.error is None
    assert job.is_over
