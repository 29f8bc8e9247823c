"""A blocking client of the control socket, for the CLI.

Every wait has a limit, except the one for events: a CLI that asks about a daemon in
trouble must not join it.
"""

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from fleecefs.control import qmp
from fleecefs.control.address import address
from fleecefs.control.qmp import ErrorClass, Message
from fleecefs.control.session import HANDSHAKE
from fleecefs.errors import Error, NotFound
from fleecefs.units import MiB

# Deleting a large snapshot, or finishing the requests of a busy guest, takes time.
TIMEOUT = 60.0
# Other than a server we need not fear whom we called; a status can be long.
REPLY_MAX = 64 * MiB
RECEIVE_SIZE_MAX = 64 * 1024


class CommandFailed(Error):
    """The daemon answered with an error."""

    def __init__(self, error_class: str, desc: str) -> None:
        super().__init__(desc)
        self.error_class = error_class
        self.desc = desc


class NoSuchDevice(CommandFailed, NotFound):
    """The daemon knows no disk or snapshot of that name."""

    code = errno.ENOENT


class ConnectionLost(Error):
    """The daemon went away, did not answer, or talks another language."""

    code = errno.ECONNRESET


class NoDaemon(ConnectionLost, NotFound):
    """Nobody listens: the daemon has ended, or died just now."""

    code = errno.ENOENT


class Client:
    """A connection with a daemon; as a context manager it is ready for commands."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout
        self._decoder = qmp.Decoder(REPLY_MAX)
        self._messages: deque[Message] = deque()
        self._events: deque[Message] = deque()
        self._count = 0

    def __enter__(self) -> "Client":
        self._socket = self._connect()
        try:
            self._negotiate()
        except BaseException:
            self._socket.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def execute(self, command: str, /, **arguments: object) -> object:
        """Return what the command returns, or raise CommandFailed.

        Arguments that are None are left out.
        """
        given = {name: v for name, v in arguments.items() if v is not None}
        self._count += 1
        self._send({"execute": command, "arguments": given, "id": self._count})
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif message.get("id") == self._count and "return" in message:
                return message["return"]
            elif "error" in message:
                raise _failure(message["error"])
            else:
                raise ConnectionLost(f"unexpected answer of the daemon to {command}")

    def events(self) -> Iterator[Message]:
        """Yield events as they happen, until the daemon ends."""
        self._socket.settimeout(None)
        while True:
            yield from self._take_events()
            try:
                message = self._receive()
            except ConnectionLost:
                return
            if "event" in message:
                self._events.append(message)

    def next_event(self, timeout: float) -> Message | None:
        """Return the next event, or None if none comes within these seconds."""
        deadline = time.monotonic() + timeout
        while not self._events:
            if not self._messages and not self._wait_readable(deadline):
                return None
            message = self._receive()
            if "event" in message:
                self._events.append(message)
        return self._events.popleft()

    def _wait_readable(self, deadline: float) -> bool:
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        left = max(0.0, deadline - time.monotonic())
        return bool(waiting.poll(left * 1000))

    def wait_closed(self) -> None:
        """Wait until the daemon has closed the connection, as it does at its end."""
        try:
            while self._socket.recv(RECEIVE_SIZE_MAX):
                pass
        except ConnectionError:
            return
        except TimeoutError:
            raise self._timed_out() from None

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout)
        try:
            with address(self._path) as name:
                connection.connect(name)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            raise NoDaemon(f"no daemon answers at {self._path}") from None
        except TimeoutError:
            connection.close()
            raise self._timed_out() from None
        except OSError as e:
            connection.close()
            raise ConnectionLost(f"{self._path}: {e.strerror}") from None
        return connection

    def _negotiate(self) -> None:
        greeting = self._receive()
        if "error" in greeting:
            raise _failure(greeting["error"])
        if "QMP" not in greeting:
            raise ConnectionLost(f"{self._path} is not a fleecefs control socket")
        self.execute(HANDSHAKE)

    def _send(self, message: Message) -> None:
        try:
            self._socket.sendall(qmp.encode(message))
        except TimeoutError:
            raise self._timed_out() from None
        except OSError as e:
            # Not as it is: a BrokenPipeError would be taken for one of stdout.
            raise ConnectionLost(f"the daemon is gone: {e.strerror}") from None

    def _receive(self) -> Message:
        while not self._messages:
            try:
                data = self._socket.recv(RECEIVE_SIZE_MAX)
                self._messages.extend(self._decoder.feed(data))
            except TimeoutError:
                raise self._timed_out() from None
            except qmp.QmpError as e:
                raise ConnectionLost(f"unexpected answer of the daemon: {e}") from None
            except OSError as e:
                raise ConnectionLost(f"the daemon is gone: {e.strerror}") from None
            if not data:
                raise ConnectionLost("the daemon is gone: it closed the connection")
        return self._messages.popleft()

    def _take_events(self) -> Iterator[Message]:
        while self._events:
            yield self._events.popleft()

    def _timed_out(self) -> ConnectionLost:
        return ConnectionLost(f"the daemon did not answer within {self._timeout:g} s")


def _failure(error: object) -> CommandFailed:
    assert isinstance(error, dict)
    error_class, desc = str(error["class"]), str(error["desc"])
    if error_class == ErrorClass.DEVICE_NOT_FOUND:
        return NoSuchDevice(error_class, desc)
    return CommandFailed(error_class, desc)
