"""All jobs of a mount: ids, ends, and what is remembered."""

import contextlib
import errno
import threading
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.block.memory import MemoryImage
from fleecefs.errors import BadName, Busy, NameTaken, NotFound
from fleecefs.jobs import registry
from fleecefs.jobs.options import BackupOptions
from fleecefs.jobs.registry import ENDED_MAX, Jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import Target
from tests.jobs.fakes import FakeBackup, FakeBackups, Heard


@pytest.fixture
def heard():
    return Heard()


@pytest.fixture
def backups():
    return FakeBackups()


@pytest.fixture
def jobs(backups, heard):
    return Jobs(backups, heard)


def of(device="web.raw", **options):
    options.setdefault("job_id", device)
    return BackupOptions(device, Path(f"/backup/{device}"), **options)


async def started(jobs, *options, grouped=False):
    return await jobs.start_backups(options, grouped=grouped)


async def test_a_job_lives_until_it_is_dismissed(jobs, heard, backups):
    backups.seconds = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of(auto_dismiss=False))
        while not job.is_over:
            await trio.sleep(0)
        kept = jobs.get("web.raw"), jobs.all()
        job.dismiss()

        assert kept == (job, [job])
        assert jobs.all() == []
        with pytest.raises(NotFound, match=r"no job 'web\.raw'"):
            jobs.get("web.raw")
        assert heard.statuses("web.raw")[0] == "created"
        await jobs.close()


async def test_what_became_of_a_job_is_remembered(jobs, backups):
    backups.seconds = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        while not job.is_over:
            await trio.sleep(0)

        known = jobs.describe("web.raw")

        assert (known["status"], known["error"]) == ("null", None)
        with pytest.raises(NotFound):
            jobs.describe("db.raw")
        await jobs.close()


async def test_a_new_job_hides_an_old_one_of_its_id(jobs, backups):
    backups.seconds = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        while not job.is_over:
            await trio.sleep(0)
        backups.seconds = 1000
        await started(jobs, of())

        assert jobs.describe("web.raw")["status"] != "null"
        await jobs.close()


async def test_the_next_daemon_remembers(backups, heard, tmp_path):
    path = tmp_path / "ended.json"
    backups.seconds = 0
    jobs = Jobs(backups, heard, path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        while not job.is_over:
            await trio.sleep(0)
        nursery.cancel_scope.cancel()

    again = Jobs(backups, heard, path)

    assert again.describe("web.raw") == jobs.describe("web.raw")


async def test_kept_until_dismissed_also_by_the_next_daemon(backups, heard, tmp_path):
    path = tmp_path / "ended.json"
    backups.seconds = 0
    jobs = Jobs(backups, heard, path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of(auto_dismiss=False))
        while not job.is_over:
            await trio.sleep(0)
        nursery.cancel_scope.cancel()

    again = Jobs(backups, heard, path)
    kept = again.get("web.raw")

    assert kept.status is JobStatus.CONCLUDED
    assert kept.describe() == job.describe() | {"elapsed": kept.describe()["elapsed"]}
    assert kept.describe_block_job() == job.describe_block_job()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        await again.check_end()
        await again.close()
    kept.dismiss()
    assert again.all() == []
    assert Jobs(backups, heard, path).all() == []


@pytest.mark.parametrize("auto_dismiss", [True, False])
async def test_how_a_job_ends_is_kept_before_it_cleans_up(
    backups, heard, tmp_path, auto_dismiss
):
    path = tmp_path / "ended.json"
    backups.seconds = 0
    jobs = Jobs(backups, heard, path)
    found = []

    async def clean():
        # A daemon that dies here has nothing left to go on with.
        found.append(Jobs(backups, heard, path))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of(auto_dismiss=auto_dismiss))
        job.clean = clean
        while not job.is_over:
            await trio.sleep(0)
        nursery.cancel_scope.cancel()

    (again,) = found
    told = again.describe("web.raw")
    assert told["status"] == ("null" if auto_dismiss else "concluded")
    assert told["error"] is None
    # It died a bit earlier: the job goes on, and hides what was said of it.
    job = FakeBackup("web.raw")
    again.add([job])
    assert again.all() == [job]


@pytest.mark.logs("forgot what became of jobs")
@pytest.mark.parametrize("content", ["", "[1", "[]", '{"a": 1}', '{"a": {}}'])
def test_a_file_that_makes_no_sense_is_forgotten(backups, heard, tmp_path, content):
    path = tmp_path / "ended.json"
    path.write_text(content)

    assert Jobs(backups, heard, path).all() == []


@pytest.mark.logs("ended.json: No such file or directory")
async def test_what_can_not_be_saved_is_no_reason_to_fail(backups, heard, tmp_path):
    jobs = Jobs(backups, heard, tmp_path / "gone" / "ended.json")
    jobs.add([FakeBackup("a")])
    jobs.get("a").cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await jobs.close()

    assert jobs.describe("a")["cancelled"]


async def test_not_all_is_remembered(jobs):
    for number in range(ENDED_MAX + 1):
        jobs.add([FakeBackup(f"job{number}")])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await jobs.close()

    known = 0
    for number in range(ENDED_MAX + 1):
        with contextlib.suppress(NotFound):
            known += jobs.describe(f"job{number}")["cancelled"]
    assert known == ENDED_MAX


async def test_an_id_is_taken_once(jobs, backups):
    await started(jobs, of())

    with pytest.raises(NameTaken, match=r"a job 'web\.raw' exists"):
        await started(jobs, of())
    with pytest.raises(NameTaken):
        await started(jobs, of("db.raw", job_id="x"), of(job_id="x"))
    await started(jobs, of(job_id="other"))

    assert [job.id for job in jobs.all()] == ["web.raw", "other"]
    assert len(backups.wanted) == 2


@pytest.mark.parametrize("job_id", ["", "a\nb", "x" * 256], ids=["", "line", "long"])
async def test_an_id_is_a_short_word(jobs, job_id):
    with pytest.raises(BadName):
        await started(jobs, of(job_id=job_id))


async def test_nothing_is_left_of_what_can_not_be_created(jobs):
    with pytest.raises(NotFound):
        await started(jobs, of(), of("none.raw"))

    assert jobs.all() == []
    await started(jobs, of())


async def test_a_group_is_asked_for_at_once_and_ends_together(jobs, backups, heard):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await started(jobs, of(), of("db.raw"), grouped=True)
        jobs.get("db.raw").cancel()
        await jobs.close()

    assert [len(wanted) for wanted in backups.wanted] == [2]
    assert backups.jobs["web.raw"].error == "cancelled, as job 'db.raw' was cancelled"


async def test_individuals_have_one_instant_and_end_alone(jobs, backups):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        web, db = await started(jobs, of(), of("db.raw"))
        db.cancel()
        while not db.is_over:
            await trio.sleep(0)

        assert [len(wanted) for wanted in backups.wanted] == [2]
        assert web.status is JobStatus.RUNNING
        await jobs.close()


async def test_jobs_of_the_daemon_before_run_when_we_do(jobs, backups):
    job = FakeBackup("web.raw", seconds=0)
    jobs.add([job])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        while not job.is_over:
            await trio.sleep(0)
        await jobs.close()

    assert job.steps == ["work", "prepare", "commit", "clean"]


async def test_jobs_of_the_daemon_before_are_waited_for(backups, heard):
    going_on = threading.Event()

    def resume():
        assert going_on.wait(10)
        return [[FakeBackup("web.raw"), FakeBackup("db.raw")], [FakeBackup("x")]]

    jobs = Jobs(backups, heard, resume=resume)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        nursery.start_soon(trio.to_thread.run_sync, going_on.set)

        await jobs.wait_resumed()
        jobs.get("db.raw").cancel()
        while not jobs.get("web.raw").is_cancelled:
            await trio.sleep(0)

        assert not jobs.get("x").is_cancelled
        await jobs.close()


async def test_targets_that_hang_in_resuming_hold_nobody_for_ever(
    backups, heard, monkeypatch
):
    monkeypatch.setattr(registry, "RESUME_SECONDS", 0.01)
    hanging = threading.Event()
    jobs = Jobs(backups, heard, resume=lambda: hanging.wait(10) and [])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        await wait_all_tasks_blocked()

        with pytest.raises(Busy, match="try again"):
            await jobs.wait_resumed()
        # Nor does the mount end under jobs that nobody knows yet.
        with pytest.raises(Busy, match="try again"):
            await jobs.check_end()

        await jobs.close()
        hanging.set()


async def test_close_cancels_and_waits_until_all_is_clean(jobs, heard):
    cleaned = []

    async def clean():
        await trio.sleep(0.01)
        cleaned.append(True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        job.clean = clean
        await wait_all_tasks_blocked()
        with pytest.raises(Busy, match=r"fleecefs job wait web\.raw"):
            await jobs.check_end()

        await jobs.close()

        assert cleaned == [True]
        await jobs.check_end()
        with pytest.raises(Busy):
            await started(jobs, of())
    assert heard.named("BLOCK_JOB_CANCELLED")[0]["device"] == "web.raw"


async def test_close_ends_those_that_wait_to_be_finalized(jobs, backups):
    backups.seconds = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of(auto_finalize=False))
        while job.status is not JobStatus.PENDING:
            await trio.sleep(0)

        await jobs.close()

    assert job.steps == ["work", "abort", "clean"]


async def test_close_before_anything(jobs):
    await jobs.close()


@pytest.mark.logs("failed")
async def test_failed_jobs_do_not_hold_the_end(jobs, backups):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of(auto_dismiss=False))
        job.fail(OSError(errno.EIO, "Input/output error"))
        while not job.is_over:
            await trio.sleep(0)

        await jobs.check_end()
        await jobs.close()


class HangingBackups(FakeBackups):
    """A target that hangs while it is opened, until told otherwise."""

    def __init__(self):
        super().__init__()
        self.opening = threading.Event()
        self.opened = threading.Event()

    def __call__(self, wanted):
        if wanted[0].device == "db.raw":
            self.opening.set()
            assert self.opened.wait(10)
        return super().__call__(wanted)


@pytest.fixture
def hanging():
    hanging = HangingBackups()
    yield hanging
    hanging.opened.set()


async def test_a_target_that_hangs_holds_up_nobody_else(heard, hanging):
    jobs = Jobs(hanging, heard)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        async with trio.open_nursery() as starting:
            starting.start_soon(started, jobs, of("db.raw"))
            await trio.to_thread.run_sync(hanging.opening.wait)

            await started(jobs, of())
            with pytest.raises(NameTaken):
                await started(jobs, of("db.raw"))
            hanging.opened.set()

        assert {job.id for job in jobs.all()} == {"web.raw", "db.raw"}
        await jobs.close()


async def test_a_target_that_hangs_does_not_hold_the_end(heard, hanging):
    jobs = Jobs(hanging, heard)
    refused = []

    async def start():
        try:
            await started(jobs, of("db.raw"))
        except Busy as e:
            refused.append(str(e))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        nursery.start_soon(start)
        await trio.to_thread.run_sync(hanging.opening.wait)

        await jobs.close()
        hanging.opened.set()

    assert refused == ["the mount is ending"]
    assert jobs.all() == []


# -- rest, for the next daemon


async def test_jobs_rest_when_nothing_is_in_flight(autojump_clock, jobs, heard):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        await trio.sleep(0.5)
        await jobs.rest()

        assert (job.status, job.is_user_paused) == (JobStatus.PAUSED, False)
        assert not job.is_busy
        await jobs.close()


async def test_jobs_go_on_if_a_target_hangs(autojump_clock, jobs):
    target = Target(MemoryImage(4096), Path("/backup/hangs"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        await trio.sleep(0.5)
        with target.used(), pytest.raises(Busy, match="target /backup/hangs does not"):
            await jobs.rest()

        assert job.status is JobStatus.RUNNING
        await jobs.rest()
        assert job.status is JobStatus.PAUSED
        await jobs.close()


async def test_jobs_that_do_not_outlive_a_daemon_end_when_all_rest(
    autojump_clock, jobs
):
    mortal = FakeBackup("verify-web.raw")
    mortal.outlives_daemon = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        [job] = await started(jobs, of())
        jobs.add([mortal])
        await trio.sleep(0.5)
        await jobs.rest()

        assert job.status is JobStatus.PAUSED
        assert mortal.is_over
        known = jobs.describe("verify-web.raw")
        assert known["error"] == "cancelled, as the daemon was restarted"
        await jobs.close()


async def test_they_go_on_if_a_target_hangs(autojump_clock, jobs):
    mortal = FakeBackup("verify-web.raw")
    mortal.outlives_daemon = False
    target = Target(MemoryImage(4096), Path("/backup/hangs"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        jobs.add([mortal])
        await trio.sleep(0.5)
        with target.used(), pytest.raises(Busy):
            await jobs.rest()

        assert mortal.status is JobStatus.RUNNING
        await jobs.close()
