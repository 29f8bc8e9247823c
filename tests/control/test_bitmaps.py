"""The commands about dirty bitmaps, and transactions with them, on real disks."""

from functools import partial

import pytest
import trio

from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.session import Request
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.registry import Jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.units import KiB, MiB
from tests.control.fakes import bitmap
from tests.support.host import Host

SIZE = 4 * MiB
DAILY = {"node": "web.raw", "name": "daily"}


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    host = Host(tmpfs_path, monkeypatch)
    for name in "web.raw", "db.raw":
        host.add(name, bytes(SIZE))
    host.open()
    yield host
    host.end()


class Session:
    """Commands on the disks of a host, and the jobs behind them."""

    def __init__(self, host):
        self.host = host
        self.jobs = Jobs(
            partial(create_backups, host.inventory), lambda name, data: None
        )
        lifecycle = Lifecycle(dict, None, None)
        self.commands = Commands(host.inventory, self.jobs, lifecycle)
        self._is_running = False

    async def value(self, name, /, **arguments):
        reply = await self.commands.answer(Request(name, arguments, {}))
        assert "return" in reply, reply
        return reply["return"]

    async def error(self, name, /, **arguments):
        reply = await self.commands.answer(Request(name, arguments, {}))
        return reply["error"]["class"], reply["error"]["desc"]

    async def transact(self, *actions, **properties):
        """Ask for a transaction of (type, data)."""
        if not self._is_running:
            # Until the end of the test.
            trio.lowlevel.spawn_system_task(self.jobs.run)
            self._is_running = True
        actions = [{"type": kind, "data": data} for kind, data in actions]
        request = Request(
            "transaction", {"actions": actions, "properties": properties}, {}
        )
        reply = await self.commands.answer(request)
        return reply["return"] if "return" in reply else reply["error"]["desc"]

    async def add(self, name="daily", node="web.raw", **options):
        options = {key.replace("_", "-"): value for key, value in options.items()}
        await self.value("block-dirty-bitmap-add", node=node, name=name, **options)

    async def listed(self, **arguments):
        found = await self.value("fleecefs-bitmap-list", **arguments)
        return {(each["disk"], each["name"]): each for each in found}

    async def finalize(self, job_id):
        """Let a job end that waits for it."""
        job = self.jobs.get(job_id)
        while job.status is not JobStatus.PENDING:
            await trio.sleep(0.001)
        await self.value("job-finalize", id=job_id)
        while self.jobs.all():
            await trio.sleep(0.001)


@pytest.fixture
def session(host):
    return Session(host)


# -- one command


async def test_as_in_qemu_a_bitmap_is_transient_unless_asked(session):
    await session.add()
    await session.add("kept", persistent=True, disabled=True, granularity=4096)

    found = await session.listed()

    assert found["web.raw", "daily"] == bitmap(count=0, persistent=False)
    kept = found["web.raw", "kept"]
    assert (kept["persistent"], kept["recording"], kept["granularity"]) == (
        *(True, False, 4096),
    )
    assert kept["container"].endswith("state/disks/web.raw/bitmaps/bitmaps.qcow2")


async def test_a_life_by_commands(session, host):
    await session.add()
    host.write("web.raw", b"x", MiB)
    await session.value("fleecefs-bitmap-copy", **DAILY, target="copy")
    await session.value("block-dirty-bitmap-clear", **DAILY)
    await session.value("block-dirty-bitmap-disable", **DAILY)
    host.write("web.raw", b"x", 0)
    await session.value("block-dirty-bitmap-enable", **DAILY)
    cleared = (await session.listed())["web.raw", "daily"]
    await session.add("coarse", granularity=MiB, disabled=True)
    await session.value(
        "block-dirty-bitmap-merge",
        node="web.raw",
        target="coarse",
        bitmaps=["daily", {"node": "web.raw", "name": "copy"}],
    )
    await session.value("block-dirty-bitmap-remove", **DAILY)

    assert (cleared["count"], cleared["recording"]) == (0, True)
    found = await session.listed()
    assert {name: each["count"] for (_, name), each in found.items()} == {
        "copy": 64 * KiB,
        "coarse": MiB,
    }


async def test_a_merge_from_another_disk(session, host):
    await session.add()
    await session.add("other", "db.raw")
    host.write("db.raw", b"x")

    await session.value(
        "block-dirty-bitmap-merge",
        node="web.raw",
        target="daily",
        bitmaps=[{"node": "db.raw", "name": "other"}],
    )

    assert (await session.listed(node="web.raw"))["web.raw", "daily"]["count"] > 0


async def test_set_save_attach_export_and_import(session, host, tmp_path):
    container, file = str(tmp_path / "c.qcow2"), str(tmp_path / "moved.qcow2")
    await session.add()
    await session.value(
        "fleecefs-bitmap-set", **DAILY, persistent=True, container=container
    )
    host.write("web.raw", b"x")
    await session.value("fleecefs-bitmap-save")
    await session.value("fleecefs-bitmap-set", **DAILY, auto=False)

    exported = await session.value("fleecefs-bitmap-export", node="web.raw", file=file)
    await session.value("block-dirty-bitmap-remove", **DAILY)
    attach = {"node": "web.raw", "container": container}
    missing = await session.error("fleecefs-bitmap-attach", **attach, names=["daily"])
    imported = await session.value(
        "fleecefs-bitmap-import", node="web.raw", file=file, names=["daily"]
    )

    assert exported == imported == ["daily"]
    assert missing[0] == "DeviceNotFound"
    assert (await session.listed())["web.raw", "daily"]["count"] == 64 * KiB


@pytest.mark.parametrize(
    ("command", "arguments", "desc"),
    [
        pytest.param("add", {"granularity": "64K"}, "expected: integer", id="text"),
        pytest.param("add", {"granularity": 1000}, "power of 2", id="odd"),
        pytest.param("add", {"granularity": 256}, "at least 512", id="small"),
        pytest.param("add", {"granularity": 4 << 30}, "at most 2 GiB", id="large"),
        pytest.param("add", {"granularity": -512}, "power of 2", id="negative"),
        pytest.param("add", {"persistent": 1}, "expected: boolean", id="persistent"),
        pytest.param(
            "add",
            {"persistent": True, "container": "c.qcow2"},
            "Parameter 'container' expects an absolute path",
            id="relative",
        ),
        pytest.param("add", {"container": "/c"}, "is in no container", id="transient"),
        pytest.param("add", {"name": ""}, "cannot be empty", id="empty"),
        pytest.param("add", {"name": "x" * 1024}, "longer than 1023", id="long"),
        pytest.param("add", {"name": "a\nb"}, "can not be printed", id="newline"),
        pytest.param("add", {"name": "\udcff"}, "not valid Unicode", id="no-text"),
        pytest.param("add", {"name": "old"}, "already exists: old", id="taken"),
        pytest.param("add", {"bitmap": "x"}, "'bitmap' is unexpected", id="unknown"),
        pytest.param("clear", {"name": None}, "expected: string", id="null"),
        pytest.param("merge", {"target": "old"}, "'bitmaps' is missing", id="no-list"),
        pytest.param(
            "merge",
            {"target": "old", "bitmaps": [1]},
            "expected: array of strings or objects",
            id="number",
        ),
        pytest.param(
            "merge",
            {"target": "old", "bitmaps": [{"node": "web.raw"}]},
            "'name' is missing",
            id="half-an-object",
        ),
    ],
)
async def test_a_wrong_argument_is_named(session, command, arguments, desc):
    await session.add("old")
    given = {"node": "web.raw"} if command == "merge" else DAILY

    error = await session.error(f"block-dirty-bitmap-{command}", **given | arguments)

    assert error[0] == "GenericError"
    assert desc in error[1]
    assert list(await session.listed()) == [("web.raw", "old")]


@pytest.mark.parametrize(
    "command", ["remove", "clear", "enable", "disable", "copy", "set"]
)
async def test_what_is_not_there_is_a_device_not_found(session, command):
    ours = command in ("copy", "set")
    name = f"fleecefs-bitmap-{command}" if ours else f"block-dirty-bitmap-{command}"
    more = {"copy": {"target": "new"}, "set": {"auto": True}}.get(command, {})

    no_bitmap = await session.error(name, **DAILY, **more)
    no_disk = await session.error(name, node="none.raw", name="daily", **more)

    assert no_bitmap == ("DeviceNotFound", "Dirty bitmap 'daily' not found")
    assert no_disk[0] == "DeviceNotFound"
    assert "no disk 'none.raw'" in no_disk[1]


@pytest.mark.parametrize("command", ["attach", "export", "import"])
async def test_a_file_is_an_absolute_path(session, command):
    key = "container" if command == "attach" else "file"

    error = await session.error(
        f"fleecefs-bitmap-{command}", node="web.raw", **{key: "c.qcow2"}
    )

    assert error == ("GenericError", f"Parameter '{key}' expects an absolute path")


async def test_an_inconsistent_one_says_why_and_can_be_cleared(session, host):
    await session.add()
    host.inventory.bitmaps.find("web.raw").held["daily"].lose("the log is torn")

    lost = (await session.listed())["web.raw", "daily"]
    refused = await session.error("block-dirty-bitmap-enable", **DAILY)
    await session.value("block-dirty-bitmap-clear", **DAILY)

    assert lost["inconsistent"]
    assert (lost["reason"], lost["recording"], lost["count"]) == (
        *("the log is torn", False, 0),
    )
    assert "is inconsistent and cannot be used: the log is torn" in refused[1]
    assert (await session.listed())["web.raw", "daily"]["reason"] is None


# -- QEMU's queries


async def test_qemus_queries(session, host):
    await session.add(persistent=True)
    await session.add("off", disabled=True)
    host.inventory.bitmaps.find("web.raw").held["off"].lose("lost")
    host.write("web.raw", b"x")

    nodes = await session.value("query-named-block-nodes")
    blocks = await session.value("query-block")

    source = str(host.sources["web.raw"])
    assert nodes[0] == {
        "node-name": "web.raw",
        "drv": "raw",
        "file": source,
        "ro": False,
        "image": {"filename": source, "format": "raw", "virtual-size": SIZE},
        "dirty-bitmaps": [
            {
                "name": "daily",
                "count": 64 * KiB,
                "granularity": 64 * KiB,
                "recording": True,
                "busy": False,
                "persistent": True,
            },
            {
                "name": "off",
                "count": 0,
                "granularity": 64 * KiB,
                "recording": False,
                "busy": False,
                "persistent": False,
                "inconsistent": True,
            },
        ],
    }
    assert [(each["device"], each["inserted"]) for each in blocks] == [
        ("web.raw", nodes[0]),
        ("db.raw", nodes[1]),
    ]


# -- transactions


async def test_all_actions_at_one_instant(session, host):
    await session.add()
    host.write("web.raw", b"x")

    answer = await session.transact(
        ("fleecefs-bitmap-copy", DAILY | {"target": "kept"}),
        ("block-dirty-bitmap-add", {"node": "db.raw", "name": "new"}),
        ("block-dirty-bitmap-disable", {"node": "db.raw", "name": "new"}),
        ("block-dirty-bitmap-enable", {"node": "db.raw", "name": "new"}),
        (
            "block-dirty-bitmap-merge",
            {"node": "web.raw", "target": "kept", "bitmaps": ["daily"]},
        ),
        ("fleecefs-bitmap-set", DAILY | {"persistent": True}),
        ("block-dirty-bitmap-clear", DAILY),
    )

    assert answer == {}
    found = await session.listed()
    assert found["web.raw", "kept"]["count"] == 64 * KiB
    assert found["web.raw", "daily"].items() >= {"count": 0, "persistent": True}.items()
    assert found["db.raw", "new"]["recording"]


@pytest.mark.parametrize(
    ("action", "desc"),
    [
        pytest.param(
            ("abort", {}), "Transaction aborted using Abort action", id="abort"
        ),
        pytest.param(
            ("block-dirty-bitmap-clear", {"node": "web.raw", "name": "none"}),
            "Dirty bitmap 'none' not found",
            id="missing",
        ),
        pytest.param(
            ("block-dirty-bitmap-clear", {"node": "web.raw"}),
            "Parameter 'name' is missing",
            id="argument",
        ),
        pytest.param(
            ("block-dirty-bitmap-frob", DAILY), "does not accept value", id="type"
        ),
        pytest.param(("abort", {"x": 1}), "'x' is unexpected", id="abort-argument"),
    ],
)
async def test_if_one_is_refused_nothing_has_changed(session, host, action, desc):
    await session.add()
    host.write("web.raw", b"x")
    before = await session.listed()

    answer = await session.transact(
        ("block-dirty-bitmap-disable", DAILY),
        ("block-dirty-bitmap-add", {"node": "web.raw", "name": "new"}),
        ("block-dirty-bitmap-clear", DAILY),
        action,
    )

    assert desc in answer
    assert await session.listed() == before


async def test_a_backup_with_bitmaps_of_the_same_instant(session, host, tmp_path):
    await session.add()
    host.write("web.raw", b"x")
    backup = {
        "device": "web.raw",
        "target": str(tmp_path / "web.raw"),
        "sync": "full",
        "bitmap": "daily",
        "bitmap-mode": "on-success",
        "auto-finalize": False,
    }

    answer = await session.transact(
        ("block-dirty-bitmap-add", {"node": "web.raw", "name": "since"}),
        ("blockdev-backup", backup),
    )
    busy = (await session.listed())["web.raw", "daily"]["busy"]
    refused = await session.error("block-dirty-bitmap-clear", **DAILY)
    host.write("web.raw", b"y", MiB)
    await session.finalize("web.raw")

    assert (answer, busy) == ({}, True)
    assert "currently in use" in refused[1]
    found = await session.listed()
    assert {name: each["count"] for (_, name), each in found.items()} == {
        "daily": 64 * KiB,
        "since": 64 * KiB,
    }
    assert (tmp_path / "web.raw").read_bytes()[MiB] == 0


async def test_a_snapshot_with_bitmaps_of_the_same_instant(session, host):
    await session.add()
    host.write("web.raw", b"x")

    answer = await session.transact(
        ("block-dirty-bitmap-clear", DAILY),
        ("fleecefs-snapshot-create", {"name": "nightly", "bitmap": "since"}),
    )

    assert answer == {}
    assert list(host.inventory.snapshots) == ["nightly"]
    assert list(await session.listed()) == [
        ("web.raw", "daily"),
        ("web.raw", "since"),
        ("db.raw", "since"),
    ]


async def test_a_snapshot_that_is_refused_begins_no_bitmap(session, host):
    host.inventory.create_snapshot("nightly")

    error = await session.error(
        "fleecefs-snapshot-create", name="nightly", bitmap="since"
    )

    assert error[1] == "snapshot 'nightly' exists"
    assert await session.listed() == {}


BACKUP = {"device": "web.raw", "target": "/none/web.raw", "sync": "full"}
SNAPSHOT = ("fleecefs-snapshot-create", {"name": "nightly"})


@pytest.mark.parametrize(
    ("actions", "desc"),
    [
        pytest.param(
            [SNAPSHOT, ("blockdev-backup", BACKUP)], "not both", id="and-a-backup"
        ),
        pytest.param([SNAPSHOT, SNAPSHOT], "has one snapshot", id="two"),
    ],
)
async def test_snapshots_do_not_go_with_everything(session, host, actions, desc):
    assert desc in await session.transact(*actions)
    assert host.inventory.snapshots == {}


@pytest.mark.parametrize(
    "action",
    [
        SNAPSHOT,
        ("abort", {}),
        ("block-dirty-bitmap-add", DAILY),
        ("fleecefs-bitmap-set", DAILY | {"auto": True}),
    ],
    ids=lambda action: action[0],
)
async def test_only_backups_are_grouped(session, host, action):
    answer = await session.transact(action, **{"completion-mode": "grouped"})

    assert answer == (
        f"Action '{action[0]}' does not support transaction property completion-mode"
        " = grouped"
    )
    assert await session.listed() == {}
    assert host.inventory.snapshots == {}
