"""The commands about mirrors: arguments, QEMU's shapes, errors, a disk that moves."""

from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.jobs import MIRROR_ARGUMENTS
from fleecefs.control.session import Request
from fleecefs.control.transactions import WORKERS_MAX
from fleecefs.errors import NotUsable
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.options import (
    BUF_SIZE,
    MIRROR_WORKERS,
    CopyMode,
    MirrorOptions,
    OnError,
    Sync,
)
from fleecefs.jobs.registry import Jobs
from fleecefs.units import KiB, MiB
from tests.control.fakes import FakeInventory
from tests.jobs.fakes import FakeBackup, Heard, new_jobs
from tests.support.copying import wait_for
from tests.support.host import Host

TARGET = "/mirror/web.raw"

WEB = {"device": "web.raw", "target": TARGET, "sync": "full"}

# A speed at which nothing follows the first chunk.
NEVER = 1


class Session:
    """Commands, and the jobs behind them, that run."""

    def __init__(self, inventory, jobs, check_place=lambda path: None):
        self.jobs = jobs
        lifecycle = Lifecycle(dict, None, None, check_place)
        self.commands = Commands(inventory, jobs, lifecycle)

    async def __aenter__(self):
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        nursery.start_soon(self.jobs.run)
        return self

    async def __aexit__(self, *what):
        await self.jobs.close()
        return await self._manager.__aexit__(*what)

    async def execute(self, name, /, **arguments):
        arguments = {key.replace("_", "-"): v for key, v in arguments.items()}
        return await self.commands.answer(Request(name, arguments, {}))

    async def value(self, name, /, **arguments):
        reply = await self.execute(name, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    async def error(self, name, /, **arguments):
        reply = await self.execute(name, **arguments)
        assert "error" in reply, reply
        return reply["error"]


# -- arguments, for a mirror that does nothing


class Mirrors:
    """What is asked to create mirrors, and where they may not be."""

    def __init__(self, monkeypatch):
        self.wanted = []
        self.places = []
        monkeypatch.setattr("fleecefs.control.jobs.create_mirror", self)

    def __call__(self, inventory, options, check_place):
        self.wanted.append(options)
        self.places.append(check_place)
        job = FakeBackup(options.job_id, options.device, seconds=1000)
        job.type = "mirror"
        return job


@pytest.fixture
def mirrors(monkeypatch):
    return Mirrors(monkeypatch)


def check_place(path):
    """Raise for nothing: a place of its own, to be known again."""


@pytest.fixture
def session(mirrors):
    jobs, _ = new_jobs(Heard(), seconds=1000)
    return Session(FakeInventory(), jobs, check_place)


async def test_a_mirror_with_what_is_required(session, mirrors):
    async with session:
        answer = await session.value("blockdev-mirror", **WEB)

        assert answer == {}
        assert mirrors.wanted == [
            MirrorOptions(
                device="web.raw",
                target=Path(TARGET),
                job_id="web.raw",
                sync=Sync.FULL,
                speed=0,
                granularity=64 * KiB,
                buf_size=16 * MiB,
                on_source_error=OnError.REPORT,
                on_target_error=OnError.REPORT,
                copy_mode=CopyMode.BACKGROUND,
                is_auto=False,
                target_is_zero=False,
                workers=2,
                auto_finalize=True,
                auto_dismiss=True,
            )
        ]
        assert mirrors.places == [check_place]


async def test_a_mirror_with_everything(session, mirrors):
    everything = WEB | {
        "job-id": "move",
        "sync": "top",
        "speed": 1 << 20,
        "granularity": 4096,
        "buf-size": 1 << 20,
        "on-source-error": "ignore",
        "on-target-error": "enospc",
        "copy-mode": "write-blocking",
        "converge": "auto",
        "target-is-zero": True,
        "max-workers": 3,
        "auto-finalize": False,
        "auto-dismiss": False,
    }
    assert set(everything) == set(MIRROR_ARGUMENTS)
    async with session:
        await session.value("blockdev-mirror", **everything)

    assert mirrors.wanted == [
        MirrorOptions(
            device="web.raw",
            target=Path(TARGET),
            job_id="move",
            sync=Sync.TOP,
            speed=1 << 20,
            granularity=4096,
            buf_size=1 << 20,
            on_source_error=OnError.IGNORE,
            on_target_error=OnError.ENOSPC,
            copy_mode=CopyMode.WRITE_BLOCKING,
            is_auto=True,
            target_is_zero=True,
            workers=3,
            auto_finalize=False,
            auto_dismiss=False,
        )
    ]


async def test_nothing_is_as_much_as_not_told(session, mirrors):
    async with session:
        zero = {"granularity": 0, "buf-size": 0, "speed": 0}
        await session.value("blockdev-mirror", **WEB | zero)

    (wanted,) = mirrors.wanted
    assert (wanted.granularity, wanted.buf_size) == (64 * KiB, BUF_SIZE)
    assert wanted.workers == MIRROR_WORKERS


WRONG = [
    pytest.param({"sync": None}, "expected: string", id="sync-null"),
    pytest.param({"sync": "half"}, "does not accept value 'half'", id="sync"),
    pytest.param({"speed": -1}, "'speed' expects a value of at least 0", id="speed"),
    pytest.param({"speed": 0.5}, "expected: integer", id="half-a-speed"),
    pytest.param({"granularity": -1}, "'granularity' expects", id="granularity"),
    pytest.param({"granularity": "4k"}, "expected: integer", id="granularity-text"),
    pytest.param({"buf-size": -1}, "'buf-size' expects", id="buf-size"),
    pytest.param({"on-source-error": "panic"}, "does not accept", id="on-error"),
    pytest.param({"on-target-error": "panic"}, "does not accept", id="on-error-2"),
    pytest.param(
        {"copy-mode": "eager"}, "it takes background, write-blocking", id="copy-mode"
    ),
    pytest.param({"converge": "never"}, "it takes auto", id="converge"),
    pytest.param({"target-is-zero": 1}, "expected: boolean", id="target-is-zero"),
    pytest.param({"max-workers": 0}, f"from 1 to {WORKERS_MAX}", id="no-workers"),
    pytest.param({"max-workers": WORKERS_MAX + 1}, "from 1 to", id="many-workers"),
    pytest.param({"target": "web.raw"}, "expects an absolute path", id="relative"),
    pytest.param({"auto-finalize": 1}, "expected: boolean", id="auto-finalize"),
    pytest.param({"auto-dismiss": 1}, "expected: boolean", id="auto-dismiss"),
    # What QEMU has, and what only a backup has.
    pytest.param({"replaces": "x"}, "'replaces' is unexpected", id="replaces"),
    pytest.param({"bitmap": "daily"}, "'bitmap' is unexpected", id="bitmap"),
    pytest.param({"on-cbw-error": "break-snapshot"}, "unexpected", id="cbw"),
]


@pytest.mark.parametrize(("change", "desc"), WRONG)
async def test_a_wrong_argument_is_named(session, mirrors, change, desc):
    async with session:
        error = await session.error("blockdev-mirror", **WEB | change)

    assert error["class"] == "GenericError"
    assert desc in error["desc"]
    assert mirrors.wanted == []


@pytest.mark.parametrize("missing", WEB)
async def test_a_missing_argument_is_named(session, mirrors, missing):
    arguments = {name: value for name, value in WEB.items() if name != missing}
    async with session:
        error = await session.error("blockdev-mirror", **arguments)

    assert error["desc"] == f"Parameter '{missing}' is missing"
    assert mirrors.wanted == []


async def test_an_id_in_use(session, mirrors):
    async with session:
        await session.value("blockdev-backup", **WEB)
        error = await session.error("blockdev-mirror", **WEB)
        await session.value("blockdev-mirror", **WEB | {"job-id": "2"})

    assert "a job 'web.raw' exists" in error["desc"]
    assert [wanted.job_id for wanted in mirrors.wanted] == ["2"]


@pytest.mark.parametrize(
    ("mode", "desc"),
    [
        (
            "individual",
            "Parameter 'type' does not accept value 'blockdev-mirror': it takes "
            "blockdev-backup",
        ),
        (
            "grouped",
            "Action 'blockdev-mirror' does not support transaction property "
            "completion-mode = grouped",
        ),
    ],
)
async def test_a_mirror_is_no_action_of_a_transaction(session, mirrors, mode, desc):
    actions = [
        {"type": "blockdev-backup", "data": WEB | {"job-id": "backup"}},
        {"type": "blockdev-mirror", "data": WEB},
    ]
    async with session:
        error = await session.error(
            "transaction", actions=actions, properties={"completion-mode": mode}
        )

        assert error["class"] == "GenericError"
        assert error["desc"].startswith(desc)
        assert session.jobs.all() == []
    assert mirrors.wanted == []


@pytest.mark.parametrize(
    ("change", "desc"),
    [
        pytest.param({"id": None}, "expected: string", id="id"),
        pytest.param({"type": "backup"}, "it takes mirror", id="type"),
        pytest.param({"type": "commit"}, "it takes mirror", id="unknown-type"),
        pytest.param(
            {"copy-mode": "eager"}, "it takes background, write-blocking", id="mode"
        ),
        pytest.param({"speed": 1}, "'speed' is unexpected", id="unexpected"),
        pytest.param({"id": "job7"}, "no job 'job7'", id="no-such-job"),
    ],
)
async def test_a_wrong_change(session, change, desc):
    wanted = {"id": "web.raw", "type": "mirror", "copy-mode": "write-blocking"}
    async with session:
        await session.value("blockdev-mirror", **WEB)
        error = await session.error("block-job-change", **wanted | change)

    assert desc in error["desc"]


@pytest.mark.parametrize("missing", ["id", "type", "copy-mode"])
async def test_what_a_change_needs(session, missing):
    wanted = {"id": "web.raw", "type": "mirror", "copy-mode": "write-blocking"}
    del wanted[missing]
    async with session:
        error = await session.error("block-job-change", **wanted)

    assert error["desc"] == f"Parameter '{missing}' is missing"


# -- a life, of a real one


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """A host with a disk of three chunks."""
    host = Host(tmpfs_path, monkeypatch)
    host.add("web.raw", b"a" * (3 * MiB))
    host.open()
    yield host
    host.end()


@pytest.fixture
def real(host):
    jobs = Jobs(partial(create_backups, host.inventory), host._emit)
    return Session(host.inventory, jobs)


@pytest.fixture
def target(tmpfs_path):
    return tmpfs_path / "copy.raw"


def wanted(target, **options):
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return {"device": "web.raw", "target": str(target), "sync": "full"} | options


def events(host, name):
    return [data for event, data in host.events if event == name]


async def begun(real, target, **options):
    """Start a mirror that rests when it has copied a chunk."""
    await real.value("blockdev-mirror", **wanted(target, speed=NEVER, **options))
    await wait_for(lambda: real.jobs.get("web.raw").progress.current)


async def until_ready(host):
    await wait_for(lambda: events(host, "BLOCK_JOB_READY"))


async def until_gone(session):
    await wait_for(lambda: session.jobs.all() == [])


def source_of(host):
    return host.inventory.describe_disks()[0]["source"]


async def test_qemus_queries(host, real, target):
    async with real:
        await begun(real, target)
        running = await real.value("query-jobs")
        await real.value("block-job-set-speed", device="web.raw", speed=0)
        await until_ready(host)
        await wait_all_tasks_blocked()
        ready = await real.value("query-block-jobs")

    assert running == [
        {
            "id": "web.raw",
            "type": "mirror",
            "status": "running",
            "current-progress": MiB,
            "total-progress": 3 * MiB,
            "actively-synced": False,
        }
    ]
    assert ready == [
        {
            "type": "mirror",
            "device": "web.raw",
            "len": 3 * MiB,
            "offset": 3 * MiB,
            "speed": 0,
            "busy": False,
            "paused": False,
            "io-status": "ok",
            "ready": True,
            "status": "ready",
            "auto-finalize": True,
            "auto-dismiss": True,
            "actively-synced": False,
        }
    ]


async def test_who_follows_is_actively_synced(host, real, target):
    async def is_synced(query="query-jobs"):
        (job,) = await real.value(query)
        return job["actively-synced"]

    change = {"id": "web.raw", "type": "mirror"}
    async with real:
        await real.value("blockdev-mirror", **wanted(target))
        await until_ready(host)
        assert not await is_synced()
        await real.value("block-job-change", **change, copy_mode="background")
        assert not await is_synced()
        await real.value("block-job-change", **change, copy_mode="write-blocking")
        with trio.fail_after(30):
            while not await is_synced():
                await trio.lowlevel.checkpoint()
        assert await is_synced("query-block-jobs")
        await real.value("block-job-change", **change, copy_mode="write-blocking")
        error = await real.error("block-job-change", **change, copy_mode="background")

        text = "Change to copy mode 'background' is not implemented"
        assert error == {"class": "GenericError", "desc": text}
        shown = await real.value("fleecefs-job-show", id="web.raw")
        assert shown["copy-mode"] == "write-blocking"
        assert shown["actively-synced"]


async def test_only_a_mirror_changes_its_copy_mode(host, real, target):
    async with real:
        await real.value("blockdev-backup", **wanted(target, speed=NEVER))
        error = await real.error(
            "block-job-change", id="web.raw", type="mirror", copy_mode="background"
        )

    assert "is a backup job, not a mirror job" in error["desc"]


async def test_complete(host, real, target):
    async with real:
        await begun(real, target)
        early = await real.error("job-complete", id="web.raw")
        await real.value("block-job-set-speed", device="web.raw", speed=0)
        await until_ready(host)
        host.write("web.raw", b"new", MiB)
        await real.value("job-complete", id="web.raw")
        await until_gone(real)
        late = await real.error("job-complete", id="web.raw")
        shown = await real.value("fleecefs-job-show", id="web.raw")

    assert early == {
        "class": "GenericError",
        "desc": "job 'web.raw' is running: cannot complete",
    }
    assert late["class"] == "DeviceNotFound"
    assert (shown["status"], shown["error"]) == ("null", None)
    assert shown["moved"]
    assert source_of(host) == str(target)
    assert target.read_bytes() == host.live("web.raw")


async def test_a_backup_has_nothing_to_complete(host, real, target):
    async with real:
        await real.value("blockdev-backup", **wanted(target, speed=NEVER))
        error = await real.error("job-complete", id="web.raw")

    assert error["class"] == "GenericError"
    assert "cannot complete" in error["desc"]


@pytest.mark.parametrize("force", [None, False])
async def test_cancelled_without_force_it_ends_well(host, real, target, force):
    arguments = {} if force is None else {"force": force}
    async with real:
        await real.value("blockdev-mirror", **wanted(target))
        await until_ready(host)
        host.write("web.raw", b"new", MiB)
        await real.value("block-job-cancel", device="web.raw", **arguments)
        await until_gone(real)

    assert target.read_bytes() == host.live("web.raw")
    assert source_of(host) == str(host.sources["web.raw"])
    assert not events(host, "BLOCK_JOB_CANCELLED")
    (event,) = events(host, "BLOCK_JOB_COMPLETED")
    assert "error" not in event


@pytest.mark.parametrize("is_ready", [False, True])
@pytest.mark.parametrize("command", ["job-cancel", "block-job-cancel"])
async def test_cancelled_by_force_it_is_cancelled(
    host, real, target, command, is_ready
):
    if command == "job-cancel":
        arguments = {"id": "web.raw"}
    else:
        arguments = {"device": "web.raw", "force": True}
    async with real:
        await begun(real, target)
        if is_ready:
            await real.value("block-job-set-speed", device="web.raw", speed=0)
            await until_ready(host)
        await real.value(command, **arguments)
        await until_gone(real)

    assert len(events(host, "BLOCK_JOB_CANCELLED")) == 1
    assert not events(host, "BLOCK_JOB_COMPLETED")
    assert not target.exists()


async def test_cancelled_without_force_before_it_is_ready(host, real, target):
    async with real:
        await begun(real, target)
        await real.value("block-job-cancel", device="web.raw")
        await until_gone(real)

    assert len(events(host, "BLOCK_JOB_CANCELLED")) == 1


async def test_paused_it_is_cancelled_by_force_only(host, real, target):
    async with real:
        await real.value("blockdev-mirror", **wanted(target))
        await until_ready(host)
        await real.value("job-pause", id="web.raw")
        await wait_for(lambda: real.jobs.get("web.raw").status.value == "standby")
        error = await real.error("block-job-cancel", device="web.raw")
        (job,) = await real.value("query-block-jobs")
        await real.value("block-job-cancel", device="web.raw", force=True)
        await until_gone(real)

    assert "is paused" in error["desc"]
    assert (job["status"], job["paused"], job["ready"]) == ("standby", True, True)
    assert len(events(host, "BLOCK_JOB_CANCELLED")) == 1


async def test_a_cancelled_one_does_not_complete(host, real, target):
    async with real:
        await real.value("blockdev-mirror", **wanted(target))
        await until_ready(host)
        await real.value("job-pause", id="web.raw")
        await wait_for(lambda: real.jobs.get("web.raw").status.value == "standby")
        real.jobs.get("web.raw").cancel_softly()
        error = await real.error("job-complete", id="web.raw")
        await real.value("job-resume", id="web.raw")
        await until_gone(real)

    assert error["desc"] == "job 'web.raw' is being cancelled: can not complete"
    assert source_of(host) == str(host.sources["web.raw"])


async def test_a_life_by_commands(host, real, target):
    async with real:
        told = wanted(target, auto_finalize=False, auto_dismiss=False)
        await real.value("blockdev-mirror", **told)
        await until_ready(host)
        refused = await real.error("job-finalize", id="web.raw")
        await real.value("job-complete", id="web.raw")
        await wait_for(lambda: events(host, "BLOCK_JOB_PENDING"))
        before = source_of(host)
        await real.value("job-finalize", id="web.raw")
        await wait_for(lambda: real.jobs.get("web.raw").is_over)
        (job,) = await real.value("query-jobs")
        await real.value("job-dismiss", id="web.raw")

        assert "cannot finalize" in refused["desc"]
        assert before == str(host.sources["web.raw"])
        assert source_of(host) == str(target)
        assert (job["status"], job["actively-synced"]) == ("concluded", False)
        assert await real.value("query-jobs") == []


@pytest.mark.parametrize(
    ("change", "desc"),
    [
        pytest.param(
            {"sync": "incremental"}, "Sync mode 'incremental' not supported", id="sync"
        ),
        pytest.param({"sync": "bitmap"}, "Sync mode 'bitmap' not", id="sync-bitmap"),
        pytest.param({"granularity": 1000}, "power of two", id="granularity"),
        pytest.param({"granularity": 256}, "power of two from 512", id="small"),
        pytest.param({"device": "x.raw"}, "no disk 'x.raw'", id="device"),
    ],
)
async def test_what_is_refused_leaves_nothing(host, real, target, change, desc):
    async with real:
        error = await real.error("blockdev-mirror", **wanted(target) | change)

        assert desc in error["desc"]
        assert real.jobs.all() == []
    assert not target.exists()
    assert not host.inventory.mirrors


async def test_a_second_mirror_of_a_disk(host, real, target, tmpfs_path):
    other = tmpfs_path / "other.raw"
    async with real:
        await real.value("blockdev-mirror", **wanted(target))
        error = await real.error("blockdev-mirror", **wanted(other, job_id="2"))

        assert error["desc"] == "disk 'web.raw' is being mirrored already"
        assert [job["id"] for job in await real.value("query-jobs")] == ["web.raw"]
    assert not other.exists()


async def test_our_own_mount_is_no_place(host, target):
    def check_place(path):
        raise NotUsable("on the mount")

    jobs = Jobs(partial(create_backups, host.inventory), host._emit)
    async with Session(host.inventory, jobs, check_place) as session:
        error = await session.error("blockdev-mirror", **wanted(target))

    assert "is on the mount of its own source" in error["desc"]
    assert not target.exists()
