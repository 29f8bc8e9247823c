"""The commands: their arguments, results and errors."""

import errno

import pytest

from fleecefs.control.commands import MAP_COUNT_MAX, Commands, Lifecycle
from fleecefs.control.session import Request
from fleecefs.errors import Refused
from tests.control.fakes import FakeDaemon, FakeInventory
from tests.jobs.fakes import new_jobs

TAG = {"id": 7}


@pytest.fixture
def inventory():
    return FakeInventory()


@pytest.fixture
def forced():
    return []


@pytest.fixture
def commands(inventory, forced):
    async def umount(force):
        forced.append(force)

    async def restart():
        raise Refused("this kernel can not send requests again")

    lifecycle = Lifecycle(lambda: {"mount": "/mnt/live"}, umount, restart)
    jobs, _ = new_jobs()
    return Commands(inventory, jobs, lifecycle)


async def value_of(commands, name, /, **arguments):
    reply = await commands.answer(Request(name, arguments, TAG))
    assert reply["id"] == 7
    return reply["return"]


async def error_of(commands, name, /, **arguments):
    reply = await commands.answer(Request(name, arguments, TAG))
    assert reply["id"] == 7
    return reply["error"]


async def test_an_unknown_command_is_not_found(commands):
    error = await error_of(commands, "stop")

    assert error == {"class": "CommandNotFound", "desc": "there is no command 'stop'"}


@pytest.mark.parametrize(
    ("name", "arguments", "desc"),
    [
        pytest.param(
            "fleecefs-snapshot-show", {}, "Parameter 'name' is missing", id="missing"
        ),
        pytest.param(
            "fleecefs-snapshot-show",
            {"name": "x", "nmae": "y"},
            "Parameter 'nmae' is unexpected",
            id="unexpected",
        ),
        pytest.param(
            "query-version", {"a": 1}, "Parameter 'a' is unexpected", id="takes-none"
        ),
        pytest.param(
            "fleecefs-snapshot-show",
            {"name": None},
            "Invalid parameter type for 'name', expected: string",
            id="null-for-string",
        ),
        pytest.param(
            "fleecefs-snapshot-create",
            {"name": "x", "disks": "web.raw"},
            "Invalid parameter type for 'disks', expected: array of strings",
            id="string-for-array",
        ),
        pytest.param(
            "fleecefs-snapshot-create",
            {"name": "x", "disks": ["web.raw", 1]},
            "Invalid parameter type for 'disks', expected: array of strings",
            id="number-in-array",
        ),
        pytest.param(
            "fleecefs-map",
            {"file": "web.raw", "offset": True},
            "Invalid parameter type for 'offset', expected: integer",
            id="boolean-for-integer",
        ),
        pytest.param(
            "fleecefs-map",
            {"file": "web.raw", "offset": 1.0},
            "Invalid parameter type for 'offset', expected: integer",
            id="float-for-integer",
        ),
        pytest.param(
            "fleecefs-umount",
            {"force": 1},
            "Invalid parameter type for 'force', expected: boolean",
            id="integer-for-boolean",
        ),
        pytest.param(
            "fleecefs-map",
            {"file": "web.raw", "offset": -1},
            "Parameter 'offset' expects a value of at least 0",
            id="negative-offset",
        ),
        pytest.param(
            "fleecefs-map",
            {"file": "web.raw", "count": 0},
            f"Parameter 'count' expects a value from 1 to {MAP_COUNT_MAX}",
            id="no-count",
        ),
        pytest.param(
            "fleecefs-map",
            {"file": "web.raw", "count": MAP_COUNT_MAX + 1},
            f"Parameter 'count' expects a value from 1 to {MAP_COUNT_MAX}",
            id="large-count",
        ),
        pytest.param(
            "fleecefs-snapshot-create",
            {"name": "\udcff"},
            "Parameter 'name' is not valid Unicode",
            id="half-a-surrogate-pair",
        ),
        pytest.param(
            "fleecefs-snapshot-create",
            {"name": "x", "disks": ["\udcff"]},
            "Parameter 'disks' is not valid Unicode",
            id="half-a-surrogate-pair-in-array",
        ),
    ],
)
async def test_wrong_arguments_are_named(commands, inventory, name, arguments, desc):
    error = await error_of(commands, name, **arguments)

    assert error == {"class": "GenericError", "desc": desc}
    assert inventory.snapshots == {}


async def test_every_command_is_listed(commands):
    listed = await value_of(commands, "query-commands")

    assert {"name": "query-commands"} in listed
    assert {each["name"] for each in listed} == set(commands.table)


async def test_version_is_three_numbers(commands):
    found = await value_of(commands, "query-version")

    assert set(found["qemu"]) == {"major", "minor", "micro"}
    assert found["package"].startswith("fleecefs ")


async def test_status_is_the_daemons(commands):
    status = await value_of(commands, "fleecefs-status")

    assert status == {"mount": "/mnt/live", "jobs": []}


async def test_a_snapshot_is_created_shown_listed_and_deleted(commands):
    created = await value_of(commands, "fleecefs-snapshot-create", name="x")
    shown = await value_of(commands, "fleecefs-snapshot-show", name="x")
    listed = await value_of(commands, "fleecefs-snapshot-list")
    deleted = await value_of(commands, "fleecefs-snapshot-delete", name="x")

    assert [disk["name"] for disk in created["disks"]] == ["db.raw", "web.raw"]
    assert shown == created
    assert listed == [created]
    assert deleted == {}
    assert await value_of(commands, "fleecefs-snapshot-list") == []


async def test_a_snapshot_of_chosen_disks(commands):
    created = await value_of(
        commands, "fleecefs-snapshot-create", name="x", disks=["db.raw"]
    )

    assert [disk["name"] for disk in created["disks"]] == ["db.raw"]


async def test_a_map_goes_on_where_it_stopped(commands):
    first = await value_of(commands, "fleecefs-map", file="web.raw")
    rest = await value_of(
        commands, "fleecefs-map", file="web.raw", offset=first["next"], count=1
    )

    assert [extent["start"] for extent in first["extents"]] == [0, 4096]
    assert [extent["start"] for extent in rest["extents"]] == [8192]
    assert rest["next"] is None


async def test_umount_and_quit(commands, forced):
    await value_of(commands, "fleecefs-umount", force=True)
    await value_of(commands, "fleecefs-umount")
    await value_of(commands, "quit")

    assert forced == [True, False, False]


def raising(error):
    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "desc"),
    [
        pytest.param(Refused("not today"), "not today", id="ours"),
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device",
            id="the-kernels",
        ),
        pytest.param(
            OSError(errno.ENOSPC, "No space left on device", "/store"),
            "/store: No space left on device",
            id="with-a-file",
        ),
        pytest.param(OSError("odd"), "odd", id="without-errno"),
    ],
)
async def test_a_failure_is_told(commands, inventory, error, desc):
    inventory.create_snapshot = raising(error)

    found = await error_of(commands, "fleecefs-snapshot-create", name="x")

    assert found == {"class": "GenericError", "desc": desc}


async def test_what_is_missing_is_a_device_not_found(commands):
    found = await error_of(commands, "fleecefs-snapshot-delete", name="x")

    assert found == {"class": "DeviceNotFound", "desc": "no snapshot 'x'"}


@pytest.mark.logs("snapshot-create failed")
async def test_a_bug_is_logged_and_not_told(commands, inventory, caplog):
    inventory.create_snapshot = raising(ValueError("secret"))

    found = await error_of(commands, "fleecefs-snapshot-create", name="x")

    assert found["class"] == "GenericError"
    assert "internal error" in found["desc"]
    assert "secret" not in found["desc"]
    assert "ValueError: secret" in caplog.text


async def test_a_busy_mount_names_its_users(tmp_path):
    daemon = FakeDaemon(tmp_path / "control")
    daemon.users = "qemu (17)"
    lifecycle = Lifecycle(daemon.status, daemon.umount, daemon.restart)
    commands = Commands(daemon.inventory, new_jobs()[0], lifecycle)

    found = await error_of(commands, "fleecefs-umount")

    assert found["class"] == "GenericError"
    assert "qemu (17)" in found["desc"]


async def test_a_restart_that_is_refused_is_told(commands):
    reply = await commands.answer(Request("fleecefs-restart", {}, TAG))

    assert reply["error"]["desc"] == "this kernel can not send requests again"
