"""The blocking client, against a real server and against bad ones."""

import contextlib
import errno
import socket
import threading

import pytest

from fleecefs.control.client import Client, CommandFailed, ConnectionLost, NoSuchDevice
from fleecefs.errors import NotFound
from tests.control.fakes import running_daemon, wait_until

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'
READY = b'{"return": {}, "id": 1}\n'


@pytest.fixture
def daemon(tmp_path):
    with running_daemon(tmp_path / "control") as daemon:
        yield daemon


@contextlib.contextmanager
def answering(path, *answers):
    """Serve one client: each answer but the first after hearing something."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    done = threading.Event()

    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answers[0])
            for answer in answers[1:]:
                connection.recv(1000)
                connection.sendall(answer)
            done.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield done
    finally:
        done.set()
        thread.join(10)
        listener.close()


def test_commands_return_their_values(daemon):
    with Client(daemon.path) as client:
        created = client.execute("fleecefs-snapshot-create", name="a", disks=None)

        assert created["name"] == "a"
        assert client.execute("fleecefs-snapshot-list") == [created]


def test_an_error_is_the_daemons(daemon):
    with Client(daemon.path) as client:
        with pytest.raises(CommandFailed) as e:
            client.execute("stop")
        assert e.value.error_class == "CommandNotFound"
        assert "'stop'" in e.value.strerror

        with pytest.raises(NoSuchDevice) as missing:
            client.execute("fleecefs-snapshot-show", name="a")
        assert missing.value.errno == errno.ENOENT
        assert isinstance(missing.value, NotFound)


def test_events_are_kept_while_commands_run(daemon):
    with Client(daemon.path) as client:
        client.execute("fleecefs-snapshot-create", name="a")
        client.execute("fleecefs-snapshot-delete", name="a")

        events = client.events()

        assert next(events)["event"] == "FLEECEFS_SNAPSHOT_CREATED"
        assert next(events)["event"] == "FLEECEFS_SNAPSHOT_DELETED"


def test_events_end_with_the_daemon(daemon):
    with Client(daemon.path) as client:
        client.execute("quit")

        assert [event["event"] for event in client.events()] == ["SHUTDOWN"]


def test_closing_is_waited_for(daemon, tmp_path):
    with Client(daemon.path) as client:
        client.execute("quit")

        client.wait_closed()

    wait_until(lambda: not (tmp_path / "control").exists())


def test_no_socket_is_no_daemon(tmp_path):
    with pytest.raises(NotFound), Client(str(tmp_path / "control")):
        pass


def test_a_socket_nobody_listens_to_is_no_daemon(tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control"))

    with pytest.raises(NotFound), Client(str(tmp_path / "control")):
        pass


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        pytest.param([b""], "within 0.2 s", id="silent"),
        pytest.param([GREETING, b""], "within 0.2 s", id="silent-later"),
        pytest.param([b"SSH-2.0\r\n"], "unexpected", id="not-json"),
        pytest.param([b"{}\n"], "not a fleecefs control socket", id="not-qmp"),
        pytest.param([GREETING, b'{"return": {}, "id": 7}\n'], "unexpected", id="id"),
        pytest.param(
            [b'{"error": {"class": "GenericError", "desc": "too many"}}\n'],
            "too many",
            id="refused",
        ),
    ],
)
def test_a_bad_server_is_one_clear_error(tmp_path, answers, words):
    path = tmp_path / "control"

    with (
        answering(path, *answers),
        pytest.raises((ConnectionLost, CommandFailed), match=words),
        Client(str(path), timeout=0.2),
    ):
        pass


def test_a_daemon_that_goes_away_is_one_clear_error(tmp_path):
    path = tmp_path / "control"

    with (
        answering(path, GREETING, READY) as done,
        Client(str(path)) as client,
    ):
        done.set()

        with pytest.raises(ConnectionLost, match="the daemon is gone"):
            client.execute("fleecefs-status")


def test_the_next_event_is_waited_for_only_so_long(daemon):
    with Client(daemon.path) as client:
        none = client.next_event(0.01)
        daemon.inventory.create_snapshot("a")
        created = client.next_event(10)
        daemon.inventory.create_snapshot("b")
        client.execute("query-version")
        kept = client.next_event(10)

        assert none is None
        assert (created["data"]["name"], kept["data"]["name"]) == ("a", "b")


def test_half_an_event_is_waited_for(tmp_path):
    event = b'{"event": "X", "data": {}}\n'
    path = tmp_path / "c"
    with (
        answering(path, GREETING, READY + event + event[:9]),
        Client(str(path)) as client,
    ):
        assert client.next_event(1)["event"] == "X"
        assert client.next_event(0.01) is None
