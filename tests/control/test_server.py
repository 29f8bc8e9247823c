"""The control socket itself: who may come in, what clients can not do to each other."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import trio
import trio.testing
from qemu.qmp import ExecuteError, QMPClient

from fleecefs.control import server
from fleecefs.control.address import PATH_MAX, address
from fleecefs.control.qmp import LINE_MAX
from fleecefs.control.server import CONNECTIONS_MAX, is_allowed
from tests.control.fakes import FakeDaemon

NOBODY = 65534


@pytest.fixture
def daemon(tmp_path):
    return FakeDaemon(tmp_path / "control")


@pytest.fixture(autouse=True)
def closed_peers():
    """Close what a test has opened, also when it has failed."""
    yield
    while Peer.opened:
        Peer.opened.pop().close()


class Peer:
    """A raw client: lines out, messages in."""

    opened: ClassVar = []

    def __init__(self, path):
        connection = socket.socket(socket.AF_UNIX)
        self.opened.append(connection)
        connection.connect(path)
        connection.setblocking(False)
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
        self._buffer = b""

    @classmethod
    async def greeted(cls, path):
        peer = cls(path)
        assert "QMP" in await peer.receive()
        return peer

    @classmethod
    async def ready(cls, path):
        peer = await cls.greeted(path)
        assert await peer.ask("qmp_capabilities") == {"return": {}}
        return peer

    async def receive(self):
        """Return the next message, or None at the end."""
        with trio.fail_after(20):
            while b"\n" not in self._buffer:
                try:
                    data = await self.stream.receive_some()
                except trio.BrokenResourceError:
                    data = b""
                if not data:
                    return None
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def send(self, data):
        await self.stream.send_all(data)

    async def ask(self, command, **arguments):
        request = {"execute": command, "arguments": arguments}
        await self.send(json.dumps(request).encode() + b"\n")
        return await self.receive()

    async def close(self):
        await self.stream.aclose()


def independently(path, talk):
    """Let the qemu.qmp library talk with the daemon at path."""

    async def connected():
        client = QMPClient("test")
        await client.connect(path)
        try:
            return await talk(client)
        finally:
            await client.disconnect()

    return asyncio.run(connected())


async def in_thread(function, *arguments):
    with trio.fail_after(20):
        return await trio.to_thread.run_sync(function, *arguments)


async def test_the_library_of_qemu_connects_and_asks(daemon):
    async def talk(client):
        version = await client.execute("query-version")
        commands = await client.execute("query-commands")
        return client.greeting.QMP.version, version, commands

    async with daemon.serving():
        greeted, version, commands = await in_thread(independently, daemon.path, talk)

    assert greeted == version
    assert set(version["qemu"]) == {"major", "minor", "micro"}
    assert {"name": "fleecefs-status"} in commands


async def test_the_library_of_qemu_hears_events_and_errors(daemon):
    async def talk(client):
        arguments = {"name": "nightly"}
        created = await client.execute("fleecefs-snapshot-create", arguments)
        event = await client.events.get()
        with pytest.raises(ExecuteError) as e:
            await client.execute("fleecefs-snapshot-show", {"name": "x"})
        return created, event, e.value.error_class

    async with daemon.serving():
        created, event, error_class = await in_thread(independently, daemon.path, talk)

    assert created["name"] == "nightly"
    assert event["event"] == "FLEECEFS_SNAPSHOT_CREATED"
    assert event["data"]["disks"] == ["db.raw", "web.raw"]
    assert error_class == "DeviceNotFound"


async def test_the_socket_is_the_owners(daemon, tmp_path):
    async with daemon.serving():
        mode = os.stat(daemon.path).st_mode

        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert os.listdir(tmp_path) == ["control"]

    assert os.listdir(tmp_path) == []


async def test_the_socket_of_a_dead_daemon_is_replaced(daemon):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(daemon.path)

    async with daemon.serving():
        await Peer.ready(daemon.path)


async def test_the_socket_of_the_next_daemon_is_left_alone(daemon):
    after = FakeDaemon(daemon.path)

    async with after.serving():
        async with daemon.serving():
            pass
        assert not os.path.exists(daemon.path)
    async with daemon.serving(), after.serving():
        os.stat(after.path)
        # The first to end is the one whose socket was replaced.
        with socket.socket(socket.AF_UNIX) as newest:
            os.unlink(after.path)
            newest.bind(after.path)
    assert os.path.exists(daemon.path)


async def test_a_path_longer_than_a_sockets_address(tmp_path):
    directory = tmp_path / ("d" * PATH_MAX)
    directory.mkdir()
    daemon = FakeDaemon(directory / "control")

    async with daemon.serving():
        with address(daemon.path) as short:
            peer = await Peer.ready(short)
        assert "return" in await peer.ask("query-version")


async def test_only_the_owner_and_root_are_allowed(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert is_allowed(1000)
    assert is_allowed(0)
    assert not is_allowed(1001)
    assert not is_allowed(NOBODY)


@pytest.mark.logs("control connection of uid")
async def test_a_connection_of_another_user_is_refused(daemon, monkeypatch, caplog):
    monkeypatch.setattr(server, "is_allowed", lambda uid: uid != os.getuid())

    async with daemon.serving():
        peer = Peer(daemon.path)
        refusal = await peer.receive()
        end = await peer.receive()

    assert "may connect" in refusal["error"]["desc"]
    assert end is None
    assert f"uid {os.getuid()} refused" in caplog.text


CONNECT = f"""
import os, socket, sys
os.setuid({NOBODY})
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
print(s.makefile().readline())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.logs("control connection of uid")
async def test_another_user_is_refused_by_the_kernels_word(caplog):
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        os.chmod(directory, 0o755)
        daemon = FakeDaemon(Path(directory, "control"))
        async with daemon.serving():
            # Without its first guard.
            os.chmod(daemon.path, 0o666)
            done = await in_thread(
                lambda: subprocess.run(
                    [sys.executable, "-c", CONNECT, daemon.path],
                    capture_output=True,
                    check=True,
                )
            )

    assert "only uid 0 and root" in json.loads(done.stdout)["error"]["desc"]
    assert f"uid {NOBODY} refused" in caplog.text


@pytest.mark.logs("control connection refused")
async def test_one_connection_too_many_is_told_so(daemon, caplog):
    async with daemon.serving():
        peers = [await Peer.ready(daemon.path) for _ in range(CONNECTIONS_MAX)]

        late = Peer(daemon.path)
        refusal = await late.receive()
        end = await late.receive()
        still = await peers[0].ask("query-version")
        await peers.pop().close()
        await trio.testing.wait_all_tasks_blocked()
        later = await Peer.ready(daemon.path)

        assert f"{CONNECTIONS_MAX} connections" in refusal["error"]["desc"]
        assert end is None
        assert "return" in still
        assert "return" in await later.ask("query-version")
    assert "refused: 32 are open" in caplog.text


async def test_bad_lines_get_errors_and_the_connection_goes_on(daemon):
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)
        for bad in (b"garbage\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"{}\n"):
            await peer.send(bad)
            assert (await peer.receive())["error"]["class"] == "GenericError"

        assert "return" in await peer.ask("query-version")


async def test_a_line_that_is_too_long_ends_its_connection_only(daemon):
    async with daemon.serving():
        other = await Peer.ready(daemon.path)
        peer = await Peer.ready(daemon.path)

        async def flood():
            with pytest.raises(trio.BrokenResourceError):
                await peer.send(b"x" * (LINE_MAX * 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            error = await peer.receive()
            end = await peer.receive()

        assert "longer than" in error["error"]["desc"]
        assert end is None
        assert "return" in await other.ask("query-version")


async def test_a_client_that_says_nothing_is_sent_away(daemon, autojump_clock):
    async with daemon.serving():
        silent = Peer(daemon.path)
        slow = Peer(daemon.path)
        start = trio.current_time()
        await slow.send(b'{"exec')

        assert "QMP" in await silent.receive()
        assert "10 s" in (await silent.receive())["error"]["desc"]
        assert await silent.receive() is None
        assert "QMP" in await slow.receive()
        assert "error" in await slow.receive()
        assert trio.current_time() - start == pytest.approx(10)


async def test_a_client_that_has_spoken_may_be_silent(daemon, autojump_clock):
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)

        await trio.sleep(1000)

        assert "return" in await peer.ask("query-version")


async def test_requests_are_answered_in_their_order(daemon):
    lines = [b'{"execute": "query-version", "id": %d}\n' % i for i in range(50)]
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)

        await peer.send(b"".join(lines))

        assert [(await peer.receive())["id"] for _ in lines] == list(range(50))


async def test_a_client_that_stops_sending_gets_all_answers(daemon):
    async with daemon.serving():
        peer = Peer(daemon.path)
        await peer.send(
            b'{"execute": "qmp_capabilities"}\n{"execute": "fleecefs-status"}\n'
        )
        await peer.stream.send_eof()

        messages = [await peer.receive() for _ in range(4)]

    assert "QMP" in messages[0]
    assert messages[2]["return"]["mount"] == daemon.mount
    assert messages[3] is None


async def test_a_client_that_does_not_read_stops_nobody_else(daemon, autojump_clock):
    asked = b'{"execute": "query-commands"}\n' * 5000
    async with daemon.serving():
        greedy = await Peer.ready(daemon.path)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(greedy.send, asked)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(300):
                daemon.events.emit("A", {"filler": "x" * 1000})
            other = await Peer.ready(daemon.path)
            assert "return" in await other.ask("query-version")
            nursery.cancel_scope.cancel()


async def test_events_come_only_after_negotiation(daemon):
    async with daemon.serving():
        early = await Peer.greeted(daemon.path)
        other = await Peer.ready(daemon.path)
        await other.ask("fleecefs-snapshot-create", name="a")

        assert await early.ask("qmp_capabilities") == {"return": {}}
        daemon.inventory.delete_snapshot("a")

        assert (await early.receive())["event"] == "FLEECEFS_SNAPSHOT_DELETED"


async def test_a_client_may_hang_up_during_its_command(daemon):
    entered, released = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def create(name, disks, steps):
        token.run_sync_soon(entered.set)
        assert released.wait(20)

    daemon.inventory.create_snapshot = create
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)
        await peer.send(
            b'{"execute": "fleecefs-snapshot-create", "arguments": {"name": "a"}}\n'
        )
        await entered.wait()

        await peer.close()
        released.set()

        other = await Peer.ready(daemon.path)
        assert "return" in await other.ask("query-version")


async def test_at_the_end_running_commands_and_events_arrive(daemon):
    entered, released = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def create(name, disks, steps):
        token.run_sync_soon(entered.set)
        assert released.wait(20)
        daemon.inventory.snapshots[name] = ["web.raw"]

    daemon.inventory.create_snapshot = create
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)
        await peer.send(
            b'{"execute": "fleecefs-snapshot-create", "arguments": {"name": "a"}}\n'
        )
        await entered.wait()
        token.run_sync_soon(released.set)

    first, second = await peer.receive(), await peer.receive()
    assert {"SHUTDOWN", None} == {first.get("event"), second.get("event")}
    assert {"return"} < first.keys() | second.keys()
    assert await peer.receive() is None


async def test_the_end_does_not_wait_for_a_client_that_does_not_read(
    daemon, autojump_clock
):
    async with daemon.serving():
        peer = await Peer.ready(daemon.path)
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(1):
                await peer.send(b'{"execute": "query-commands"}\n' * 50_000)
            nursery.cancel_scope.cancel()
        start = trio.current_time()

    assert trio.current_time() - start == pytest.approx(server.FAREWELL_TIMEOUT)


async def test_an_error_of_the_daemon_leaves_bare(daemon, tmp_path):
    async def fail():
        async with daemon.serving():
            await Peer.ready(daemon.path)
            raise OSError("the daemon's own")

    with pytest.raises(OSError, match="the daemon's own"):
        await fail()

    assert os.listdir(tmp_path) == []


async def test_a_daemon_can_be_cancelled(daemon, tmp_path):
    with trio.CancelScope() as scope:
        async with daemon.serving():
            peer = await Peer.ready(daemon.path)
            scope.cancel()
            await trio.sleep_forever()

    assert await peer.receive() is None
    assert os.listdir(tmp_path) == []
