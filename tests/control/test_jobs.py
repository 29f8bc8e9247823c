"""The commands about jobs: arguments, QEMU's shapes, errors."""

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.block.epoch import OnCbwError
from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.jobs import VERIFY_ARGUMENTS
from fleecefs.control.session import Request
from fleecefs.control.transactions import BACKUP_ARGUMENTS, WORKERS_MAX
from fleecefs.jobs.options import (
    BackupOptions,
    BitmapMode,
    Format,
    OnError,
    Sync,
    VerifyOptions,
)
from tests.control.fakes import FakeInventory
from tests.jobs.fakes import SIZE, FakeBackup, Heard, new_jobs

TARGET = "/backup/web.raw"

WEB = {"device": "web.raw", "target": TARGET, "sync": "full"}


class Session:
    """Commands, and the jobs behind them, that run."""

    def __init__(self):
        self.heard = Heard()
        self.jobs, self.backups = new_jobs(self.heard, seconds=1000)
        lifecycle = Lifecycle(dict, None, None)
        self.commands = Commands(FakeInventory(), self.jobs, lifecycle)

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
        reply = await self.commands.answer(Request(name, arguments, {}))
        await wait_all_tasks_blocked()
        return reply

    async def value(self, name, /, **arguments):
        reply = await self.execute(name, **arguments)
        assert "return" in reply, reply
        return reply["return"]

    async def error(self, name, /, **arguments):
        return (await self.execute(name, **arguments))["error"]


@pytest.fixture
def session():
    return Session()


async def test_a_backup_with_what_is_required(session):
    async with session:
        answer = await session.value("blockdev-backup", **WEB)

        assert answer == {}
        assert session.backups.wanted == [
            [BackupOptions("web.raw", Path(TARGET), "web.raw")]
        ]


async def test_a_backup_with_everything(session):
    everything = WEB | {
        "job-id": "night",
        "sync": "top",
        "speed": 1 << 20,
        "on-source-error": "ignore",
        "on-target-error": "enospc",
        "on-cbw-error": "break-guest-write",
        "cbw-timeout": 2.5,
        "max-workers": 3,
        "auto-finalize": False,
        "auto-dismiss": False,
        "bitmap": "daily",
        "bitmap-mode": "always",
        "format": "qcow2",
        "backing": "/backup/before.raw",
        "backing-format": "raw",
        "fallback": "full",
    }
    assert set(everything) == set(BACKUP_ARGUMENTS)
    async with session:
        await session.value("blockdev-backup", **everything)

        [[wanted]] = session.backups.wanted
        assert wanted == BackupOptions(
            device="web.raw",
            target=Path(TARGET),
            job_id="night",
            sync=Sync.TOP,
            speed=1 << 20,
            on_source_error=OnError.IGNORE,
            on_target_error=OnError.ENOSPC,
            on_cbw_error=OnCbwError.BREAK_GUEST_WRITE,
            cbw_timeout=2.5,
            workers=3,
            auto_finalize=False,
            auto_dismiss=False,
            bitmap="daily",
            bitmap_mode=BitmapMode.ALWAYS,
            format=Format.QCOW2,
            backing=Path("/backup/before.raw"),
            backing_format=Format.RAW,
            fallback=True,
        )


WRONG = [
    pytest.param({"sync": None}, "expected: string", id="sync-null"),
    pytest.param(
        {"sync": "half"},
        "Parameter 'sync' does not accept value 'half':"
        " it takes full, top, none, incremental, bitmap",
        id="sync",
    ),
    pytest.param({"speed": -1}, "Parameter 'speed' expects a value of", id="speed"),
    pytest.param({"speed": 1.5}, "expected: integer", id="half-a-speed"),
    pytest.param({"on-source-error": "panic"}, "does not accept", id="on-error"),
    pytest.param({"on-target-error": "panic"}, "does not accept", id="on-error-2"),
    pytest.param({"on-cbw-error": "report"}, "does not accept", id="on-cbw-error"),
    pytest.param({"cbw-timeout": -0.1}, "of at least 0", id="cbw-timeout"),
    pytest.param({"cbw-timeout": True}, "expected: number", id="cbw-timeout-bool"),
    pytest.param({"max-workers": 0}, f"from 1 to {WORKERS_MAX}", id="no-workers"),
    pytest.param({"max-workers": WORKERS_MAX + 1}, "from 1 to", id="many-workers"),
    pytest.param({"target": "web.raw"}, "expects an absolute path", id="relative"),
    pytest.param({"target": "/\udcff"}, "not valid Unicode", id="no-text"),
    pytest.param({"auto-dismiss": 1}, "expected: boolean", id="auto-dismiss"),
    pytest.param({"format": "vmdk"}, "it takes raw, qcow2", id="format"),
    pytest.param({"backing": "web.raw"}, "expects an absolute path", id="backing"),
    pytest.param({"backing-format": "vmdk"}, "raw, qcow2", id="backing-format"),
    pytest.param({"bitmap": 1}, "expected: string", id="bitmap"),
    pytest.param({"bitmap-mode": "maybe"}, "on-success, never, always", id="mode"),
    pytest.param({"fallback": "top"}, "it takes full", id="fallback"),
    pytest.param({"compress": True}, "'compress' is unexpected", id="unexpected"),
]


@pytest.mark.parametrize(("change", "desc"), WRONG)
async def test_a_wrong_argument_is_named(session, change, desc):
    async with session:
        error = await session.error("blockdev-backup", **WEB | change)

        assert error["class"] == "GenericError"
        assert desc in error["desc"]
        assert session.backups.wanted == []


@pytest.mark.parametrize(("change", "desc"), WRONG)
async def test_so_it_is_in_a_transaction(session, change, desc):
    actions = [
        {"type": "blockdev-backup", "data": WEB | {"job-id": "good"}},
        {"type": "blockdev-backup", "data": WEB | change},
    ]
    async with session:
        error = await session.error("transaction", actions=actions)

        assert desc in error["desc"]
        assert session.backups.wanted == []


async def test_a_backup_of_no_disk(session):
    async with session:
        error = await session.error("blockdev-backup", **WEB | {"device": "none.raw"})

        assert error == {"class": "DeviceNotFound", "desc": "no disk 'none.raw'"}


async def test_an_id_in_use(session):
    async with session:
        await session.value("blockdev-backup", **WEB)

        error = await session.error("blockdev-backup", **WEB)

        assert "a job 'web.raw' exists" in error["desc"]


def actions_of(*disks):
    return [
        {
            "type": "blockdev-backup",
            "data": {"device": disk, "target": f"/backup/{disk}", "sync": "full"},
        }
        for disk in disks
    ]


@pytest.mark.parametrize("mode", [None, "individual", "grouped"])
async def test_a_transaction(session, mode):
    properties = None if mode is None else {"completion-mode": mode}
    arguments = {} if properties is None else {"properties": properties}
    async with session:
        answer = await session.value(
            "transaction", actions=actions_of("web.raw", "db.raw"), **arguments
        )
        await session.value("job-cancel", id="db.raw")

        left = [job["id"] for job in await session.value("query-jobs")]

        assert answer == {}
        assert [len(wanted) for wanted in session.backups.wanted] == [2]
        assert left == ([] if mode == "grouped" else ["web.raw"])


@pytest.mark.parametrize(
    ("arguments", "desc"),
    [
        pytest.param({}, "'actions' is missing", id="nothing"),
        pytest.param({"actions": [1]}, "expected: array of objects", id="number"),
        pytest.param({"actions": [{"type": "x"}]}, "'data' is missing", id="no-data"),
        pytest.param(
            {"actions": [{"type": "drive-backup", "data": {}}]},
            "Parameter 'type' does not accept value 'drive-backup'",
            id="type",
        ),
        pytest.param(
            {"actions": [], "properties": {"completion-mode": "both"}},
            "'completion-mode' does not accept value 'both'",
            id="mode",
        ),
        pytest.param(
            {"actions": actions_of("web.raw", "web.raw")}, "exists", id="twice"
        ),
    ],
)
async def test_a_wrong_transaction(session, arguments, desc):
    async with session:
        error = await session.error("transaction", **arguments)

        assert desc in error["desc"]
        assert session.jobs.all() == []


async def test_an_empty_transaction_does_nothing(session):
    async with session:
        assert await session.value("transaction", actions=[]) == {}
        assert session.backups.wanted == []


async def test_qemus_queries(session):
    async with session:
        await session.value("blockdev-backup", **WEB | {"speed": 5})

        assert await session.value("query-jobs") == [
            {
                "id": "web.raw",
                "type": "backup",
                "status": "running",
                "current-progress": 0,
                "total-progress": SIZE,
            }
        ]
        assert await session.value("query-block-jobs") == [
            {
                "type": "backup",
                "device": "web.raw",
                "len": SIZE,
                "offset": 0,
                "speed": 5,
                "busy": True,
                "paused": False,
                "io-status": "ok",
                "ready": False,
                "status": "running",
                "auto-finalize": True,
                "auto-dismiss": True,
            }
        ]


async def test_a_life_by_commands(session):
    session.backups.seconds = 0
    async with session:
        await session.value(
            "blockdev-backup",
            **WEB | {"speed": 1, "auto-finalize": False, "auto-dismiss": False},
        )
        statuses = []
        for command, arguments in [
            ("job-pause", {"id": "web.raw"}),
            ("job-resume", {"id": "web.raw"}),
            ("block-job-set-speed", {"device": "web.raw", "speed": 0}),
            ("job-finalize", {"id": "web.raw"}),
        ]:
            assert await session.value(command, **arguments) == {}
            [job] = await session.value("fleecefs-job-list")
            statuses.append(job["status"])
            assert job.keys() >= {"disk", "target", "cost", "eta", "speed-now"}
        await session.value("job-dismiss", id="web.raw")

        assert statuses == ["paused", "running", "pending", "concluded"]
        assert await session.value("fleecefs-job-list") == []
        shown = await session.value("fleecefs-job-show", id="web.raw")
        assert shown["status"] == "null"


@pytest.mark.parametrize(
    "command",
    ["pause", "resume", "cancel", "complete", "finalize", "dismiss"],
)
async def test_no_such_job(session, command):
    async with session:
        error = await session.error(f"job-{command}", id="job7")

        assert error == {"class": "DeviceNotFound", "desc": "no job 'job7'"}


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("job-complete", {"id": "web.raw"}),
        ("job-finalize", {"id": "web.raw"}),
        ("job-dismiss", {"id": "web.raw"}),
        ("job-resume", {"id": "web.raw"}),
        ("block-job-set-speed", {"device": "web.raw", "speed": -1}),
    ],
)
async def test_a_verb_that_is_refused(session, command, arguments):
    async with session:
        await session.value("blockdev-backup", **WEB)

        error = await session.error(command, **arguments)

        assert error["class"] == "GenericError"
        assert len(await session.value("query-jobs")) == 1


@pytest.mark.parametrize("command", ["job-cancel", "block-job-cancel"])
async def test_cancel(session, command):
    argument = "id" if command == "job-cancel" else "device"
    async with session:
        await session.value("blockdev-backup", **WEB)

        await session.value(command, **{argument: "web.raw"})

        assert session.jobs.all() == []
        assert session.heard.named("BLOCK_JOB_CANCELLED")[0]["device"] == "web.raw"


async def test_a_paused_job_is_cancelled_by_force_only(session):
    session.backups.seconds = 0
    async with session:
        await session.value("blockdev-backup", **WEB | {"speed": 1})
        await session.value("job-pause", id="web.raw")

        error = await session.error("block-job-cancel", device="web.raw")
        still = len(session.jobs.all())
        await session.value("block-job-cancel", device="web.raw", force=True)

        assert "is paused" in error["desc"]
        assert (still, session.jobs.all()) == (1, [])


class Verifies:
    """What is asked to create comparisons, and where they may not be."""

    def __init__(self, monkeypatch):
        self.wanted = []
        monkeypatch.setattr("fleecefs.control.jobs.create_verify", self)

    def __call__(self, inventory, options, check_place):
        self.wanted.append(options)
        return FakeBackup(options.job_id, options.device, seconds=1000)


async def test_a_comparison_runs_beside_a_backup_of_its_disk(session, monkeypatch):
    verifies = Verifies(monkeypatch)
    async with session:
        await session.value("blockdev-backup", **WEB)

        answer = await session.value("fleecefs-verify", device="web.raw", target="/b")

        assert answer == {}
        assert verifies.wanted == [
            VerifyOptions("web.raw", Path("/b"), "verify-web.raw")
        ]
        ids = [job["id"] for job in await session.value("query-jobs")]
        assert ids == ["web.raw", "verify-web.raw"]


async def test_a_comparison_with_everything(session, monkeypatch):
    verifies = Verifies(monkeypatch)
    everything = {
        "device": "web.raw",
        "target": TARGET,
        "job-id": "v",
        "bitmap": "daily",
        "format": "qcow2",
        "speed": 1 << 20,
        "auto-dismiss": False,
    }
    assert set(everything) == set(VERIFY_ARGUMENTS)
    async with session:
        await session.value("fleecefs-verify", **everything)

    assert verifies.wanted == [
        VerifyOptions(
            device="web.raw",
            target=Path(TARGET),
            job_id="v",
            bitmap="daily",
            format=Format.QCOW2,
            speed=1 << 20,
            auto_dismiss=False,
        )
    ]


async def test_a_comparison_whose_id_is_taken_is_not_created(session, monkeypatch):
    verifies = Verifies(monkeypatch)
    wanted = {"device": "web.raw", "target": TARGET, "job-id": "web.raw"}
    async with session:
        await session.value("blockdev-backup", **WEB)

        error = await session.error("fleecefs-verify", **wanted)

        assert "a job 'web.raw' exists" in error["desc"]
        assert verifies.wanted == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param({"target": "web.raw"}, "expects an absolute path", id="relative"),
        pytest.param({"format": "vmdk"}, "it takes raw, qcow2", id="format"),
        pytest.param({"sync": "full"}, "'sync' is unexpected", id="sync"),
    ],
)
async def test_a_wrong_comparison_is_refused(session, change, text):
    async with session:
        wanted = {"device": "web.raw", "target": TARGET} | change

        assert text in (await session.error("fleecefs-verify", **wanted))["desc"]
