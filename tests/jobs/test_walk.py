"""Random walks: people tell jobs of a transaction anything at any time."""

import errno
import random

import pytest
import trio

from fleecefs.errors import VerbRejected
from fleecefs.jobs.options import CopyMode, OnError
from fleecefs.jobs.status import ACCEPTS, JobStatus, JobVerb
from fleecefs.jobs.transaction import Transaction
from tests.jobs.fakes import SIZE, FakeBackup, Heard

EIO = OSError(errno.EIO, "Input/output error")

TELL = {
    JobVerb.CANCEL: lambda job, chance: job.cancel(),
    JobVerb.PAUSE: lambda job, chance: job.pause(),
    JobVerb.RESUME: lambda job, chance: job.resume(),
    JobVerb.SET_SPEED: lambda job, chance: job.set_speed(chance.choice([0, 1, 500])),
    JobVerb.CHANGE: lambda job, chance: job.change(chance.choice(list(CopyMode))),
    JobVerb.COMPLETE: lambda job, chance: job.complete(),
    JobVerb.FINALIZE: lambda job, chance: job.finalize(),
    JobVerb.DISMISS: lambda job, chance: job.dismiss(),
}

# Cancel is one verb of many, or few walks would see anything else.
VERBS = [verb for verb in JobVerb if verb is not JobVerb.CANCEL] * 5 + [JobVerb.CANCEL]

STEPS = 60


def new_job(number, chance, heard):
    job = FakeBackup(
        f"job{number}",
        seconds=chance.choice([0, 1, 20]),
        speed=chance.choice([0, 0, 500]),
        on_source_error=chance.choice(list(OnError)),
        on_target_error=chance.choice(list(OnError)),
        auto_finalize=chance.random() < 0.6,
        auto_dismiss=chance.random() < 0.6,
    )
    job.emit = heard
    job.faults = [(chance.random() < 0.5, EIO) for _ in range(chance.choice([0, 0, 2]))]
    for step in ("prepare", "abort", "clean"):
        if chance.random() < 0.05:
            job.failing[step] = EIO
    return job


def tell(job, chance):
    """Tell a job something, and check whether it was accepted by the table."""
    verb = chance.choice(VERBS)
    status = job.status
    try:
        TELL[verb](job, chance)
    except VerbRejected:
        return
    assert status in ACCEPTS[verb]


async def lead_to_the_end(jobs):
    """Tell jobs whatever it takes."""
    while not all(job.is_over for job in jobs):
        for job in jobs:
            if job.is_user_paused:
                job.resume()
            if job.limit.speed and job.status in ACCEPTS[JobVerb.SET_SPEED]:
                job.set_speed(0)
            if job.status is JobStatus.PENDING:
                try:
                    job.finalize()
                except VerbRejected:
                    assert not job.is_good
        await trio.sleep(1)


@pytest.mark.logs("pauses|failed|could not clean up")
@pytest.mark.parametrize("seed", range(100))
async def test_all_commit_or_all_abort(autojump_clock, seed):
    chance = random.Random(seed)
    heard = Heard()
    jobs = [new_job(number, chance, heard) for number in range(chance.randint(1, 4))]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Transaction(jobs).run)
        for _ in range(chance.choice([0, 5, STEPS])):
            await trio.sleep(chance.choice([0, 0.1, 1, 7]))
            tell(chance.choice(jobs), chance)
        await lead_to_the_end(jobs)

    outcomes = {("commit" in job.steps, "abort" in job.steps) for job in jobs}
    assert outcomes in ({(True, False)}, {(False, True)})
    committed = outcomes == {(True, False)}
    for job in jobs:
        assert job.steps[-1] == "clean"
        assert len(job.steps) == len(set(job.steps))
        assert job.is_good is committed
        if committed:
            assert job.progress.current == SIZE
        check_events(job, heard)


def check_events(job, heard):
    """There is one end, of the right kind, and nothing after it but the dismissal."""
    ends = [
        name
        for name, data in heard
        if name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        and data["device"] == job.id
    ]
    was_running = "running" in heard.statuses(job.id)
    kind = "BLOCK_JOB_CANCELLED" if job.is_cancelled else "BLOCK_JOB_COMPLETED"
    assert ends == ([kind] if was_running else [])
    last = heard.statuses(job.id)[-2:]
    assert last[-1] == "concluded" or last == ["concluded", "null"]
