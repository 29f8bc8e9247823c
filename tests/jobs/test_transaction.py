"""Jobs that end together, on a clock that jumps."""

import errno

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.transaction import Transaction
from tests.jobs.fakes import FakeBackup, Heard

EIO = OSError(errno.EIO, "Input/output error")

DONE = ["work", "prepare", "commit", "clean"]


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def journal():
    """The steps of all jobs, in their order."""
    return []


@pytest.fixture
def new_jobs(heard, journal):
    def new_jobs(**options):
        """Two jobs: "a" takes 10 seconds, "b" a hundred."""
        jobs = [
            FakeBackup("a", seconds=1, **options),
            FakeBackup("b", seconds=10, **options),
        ]
        for job in jobs:
            job.emit = heard
            step = job._step

            def noted(name, job=job, step=step):
                journal.append(f"{job.id} {name}")
                step(name)

            job._step = noted
        return jobs

    return new_jobs


async def run_until_waiting(jobs, nursery):
    """Run them until the first waits for the second."""
    nursery.start_soon(Transaction(jobs).run)
    await trio.sleep(15)
    assert [job.status for job in jobs] == [JobStatus.WAITING, JobStatus.RUNNING]


async def test_a_job_waits_for_the_others(autojump_clock, new_jobs, journal):
    a, b = new_jobs()
    async with trio.open_nursery() as nursery:
        await run_until_waiting([a, b], nursery)

    assert trio.current_time() == 100
    assert journal == [
        "a work",
        "b work",
        "a prepare",
        "b prepare",
        "a commit",
        "a clean",
        "b commit",
        "b clean",
    ]


async def test_by_itself_a_job_does_not_wait(autojump_clock, new_jobs):
    a, b = new_jobs()
    async with trio.open_nursery() as nursery:
        for job in (a, b):
            nursery.start_soon(Transaction([job]).run)
        await trio.sleep(15)

        assert (a.steps, a.status) == (DONE, JobStatus.NULL)
        assert b.status is JobStatus.RUNNING


@pytest.mark.logs("job b failed: Input/output error")
async def test_a_failure_aborts_all(autojump_clock, new_jobs, heard):
    a, b = new_jobs()
    async with trio.open_nursery() as nursery:
        await run_until_waiting([a, b], nursery)
        b.faults = [(True, EIO)]

    assert (a.steps, b.steps) == (["work", "abort", "clean"], ["abort", "clean"])
    assert heard.statuses("a")[-4:] == ["waiting", "aborting", "concluded", "null"]
    assert [e["device"] for e in heard.named("BLOCK_JOB_CANCELLED")] == ["a"]
    [completed] = heard.named("BLOCK_JOB_COMPLETED")
    assert (completed["device"], completed["error"]) == ("b", "Input/output error")
    assert a.error == "cancelled, as job 'b' failed"


@pytest.mark.logs("job a failed: Input/output error")
async def test_a_failure_ends_those_that_still_work_at_once(autojump_clock, new_jobs):
    a, b = new_jobs()
    a.faults = [(True, EIO)]

    await Transaction([a, b]).run()

    assert trio.current_time() == 0
    assert b.is_cancelled


@pytest.mark.parametrize("index", [0, 1], ids=["that waits", "that works"])
async def test_cancel_of_one_cancels_all(autojump_clock, new_jobs, heard, index):
    jobs = new_jobs()
    async with trio.open_nursery() as nursery:
        await run_until_waiting(jobs, nursery)
        jobs[index].cancel()

    assert trio.current_time() == 15
    cancelled = heard.named("BLOCK_JOB_CANCELLED")
    assert {event["device"] for event in cancelled} == {"a", "b"}
    assert all(job.steps[-2:] == ["abort", "clean"] for job in jobs)
    assert jobs[index].error == "cancelled"


async def test_a_paused_job_is_cancelled_with_the_others(autojump_clock, new_jobs):
    a, b = new_jobs()
    async with trio.open_nursery() as nursery:
        await run_until_waiting([a, b], nursery)
        b.pause()
        await trio.sleep(30)
        assert b.status is JobStatus.PAUSED

        a.cancel()

    assert b.is_cancelled


@pytest.mark.logs("job b failed: Input/output error")
async def test_a_failure_to_prepare_commits_none(autojump_clock, new_jobs, journal):
    a, b = new_jobs()
    b.failing["prepare"] = EIO

    await Transaction([a, b]).run()

    assert journal[2:] == [
        "a prepare",
        "b prepare",
        "a abort",
        "a clean",
        "b abort",
        "b clean",
    ]


async def test_cancel_while_others_prepare_commits_none(
    autojump_clock, new_jobs, journal
):
    a, b = new_jobs()

    async def prepare():
        await trio.sleep(10)

    b.prepare = prepare
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Transaction([a, b]).run)
        await trio.sleep(105)
        assert a.status is b.status is JobStatus.PENDING
        a.cancel()

    assert not any(step.endswith("commit") for step in journal)
    assert journal[-4:] == ["a abort", "a clean", "b abort", "b clean"]


async def test_one_that_wants_to_be_finalized_holds_all(
    autojump_clock, new_jobs, heard
):
    a, b = new_jobs()
    b.auto_finalize = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Transaction([a, b]).run)
        await trio.sleep(500)
        assert a.status is b.status is JobStatus.PENDING

        a.finalize()

    assert a.steps == b.steps == DONE
    assert heard.named("BLOCK_JOB_PENDING") == [{"type": "backup", "id": "b"}]


async def test_cancel_of_pending_jobs(autojump_clock, new_jobs):
    a, b = new_jobs(auto_finalize=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Transaction([a, b]).run)
        await trio.sleep(500)
        b.cancel()

    assert a.steps == b.steps == ["work", "abort", "clean"]


@pytest.mark.logs("job b could not clean up")
async def test_all_are_aborted_even_if_one_can_not_be(autojump_clock, new_jobs):
    b, a = reversed(new_jobs())
    b.failing["abort"] = EIO
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Transaction([b, a]).run)
        await wait_all_tasks_blocked()
        a.cancel()

    assert a.steps == b.steps == ["abort", "clean"]


async def test_the_end_of_everything_ends_a_transaction(autojump_clock, new_jobs):
    a, b = new_jobs()
    with trio.move_on_after(3) as ended:
        await Transaction([a, b]).run()

    assert ended.cancelled_caught
