"""The control socket: who may connect, and how a connection lives and ends.

Each connection has a task that answers its requests in their order, and one that
sends it events; a client that does not read stops only these two. What a client sends
can end its own connection and nothing else: parsing is in session and qmp, and all
that goes wrong here ends in `Server.serve`.
"""

import contextlib
import logging
import math
import os
import socket
import struct
from collections.abc import AsyncIterator

import trio

from fleecefs import __version__
from fleecefs.control import qmp
from fleecefs.control.address import address
from fleecefs.control.commands import Commands
from fleecefs.control.events import Events, Subscription
from fleecefs.control.qmp import Message, QmpError
from fleecefs.control.session import Phase, Request, Session

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 32
# A client that only connects must not keep one of the 32 places.
FIRST_LINE_TIMEOUT = 10.0
# At the end, for clients to read what has been sent to them.
FAREWELL_TIMEOUT = 1.0
RECEIVE_SIZE_MAX = 64 * 1024


@contextlib.asynccontextmanager
async def serving(path: str, commands: Commands, events: Events) -> AsyncIterator[None]:
    """Serve the control socket at path, in a directory of mode 0700.

    Leaving the block says SHUTDOWN to the clients, lets running commands end, and
    closes the connections; leaving it by an exception only closes them. The socket
    of a daemon before us is replaced, and one of a daemon after us is left alone.
    """
    listener = _listen(path)
    inode = os.stat(path).st_ino
    server = Server(commands, events)
    error = None
    async with trio.open_nursery() as nursery:
        accepting = trio.CancelScope()
        nursery.start_soon(_accept, listener, server, accepting, nursery)
        try:
            yield
            accepting.cancel()
            _unlink(path, inode)
            await server.say_goodbye()
            nursery.cancel_scope.deadline = trio.current_time() + FAREWELL_TIMEOUT
        except Exception as e:
            # Raised below, bare: a nursery would wrap it in a group.
            error = e
            nursery.cancel_scope.cancel()
        finally:
            _unlink(path, inode)
    if error is not None:
        raise error


async def _accept(
    listener: socket.socket,
    server: "Server",
    accepting: trio.CancelScope,
    connections: trio.Nursery,
) -> None:
    with accepting:
        await trio.serve_listeners(
            server.serve,
            [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
            handler_nursery=connections,
        )


def _listen(path: str) -> socket.socket:
    """Return a socket that appears at path with its mode set and listening."""
    new = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with address(new) as name:
            listener.bind(name)
        os.chmod(new, 0o600)
        listener.listen()
        os.rename(new, path)
    except BaseException:
        listener.close()
        raise
    return listener


def _unlink(path: str, inode: int) -> None:
    with contextlib.suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


class Server:
    """All connections, and what they share."""

    def __init__(self, commands: Commands, events: Events) -> None:
        self._commands = commands
        self._events = events
        self._streams: set[trio.SocketStream] = set()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Talk with a client until either side has enough."""
        try:
            async with stream:
                refusal = self._find_refusal(stream)
                if refusal is not None:
                    await _send(stream, qmp.failure(refusal, {}))
                    return
                self._streams.add(stream)
                try:
                    await Connection(stream, self._commands, self._events).run()
                finally:
                    self._streams.discard(stream)
        except Exception:
            log.exception("a control connection failed")

    async def say_goodbye(self) -> None:
        """Let every connection end by itself, after what it is doing now."""
        self._events.emit("SHUTDOWN", {})
        await self._events.close()
        for stream in self._streams:
            # As if the client had: what it has sent is answered, then comes the end.
            with contextlib.suppress(OSError):
                stream.socket.shutdown(socket.SHUT_RD)

    def _find_refusal(self, stream: trio.SocketStream) -> QmpError | None:
        uid = peer_uid(stream)
        if not is_allowed(uid):
            log.warning("control connection of uid %d refused", uid)
            return QmpError(f"only uid {os.geteuid()} and root may connect")
        if len(self._streams) >= CONNECTIONS_MAX:
            log.warning("control connection refused: %d are open", CONNECTIONS_MAX)
            return QmpError(f"{CONNECTIONS_MAX} connections are open: close one first")
        return None


def peer_uid(stream: trio.SocketStream) -> int:
    """Return who was at the other end when it connected (SO_PEERCRED, unix(7))."""
    ucred = struct.Struct("iII")
    credentials = stream.socket.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, ucred.size
    )
    uid: int = ucred.unpack(credentials)[1]
    return uid


def is_allowed(uid: int) -> bool:
    """Whether this user may connect: the socket's mode is not the only guard."""
    return uid in (0, os.geteuid())


class Connection:
    """One client."""

    def __init__(
        self, stream: trio.SocketStream, commands: Commands, events: Events
    ) -> None:
        self._stream = stream
        self._commands = commands
        self._events = events
        self._session = Session()
        self._subscription: Subscription | None = None
        self._sending = trio.Lock()

    async def run(self) -> None:
        """Greet, then answer requests until the client or we close."""
        await self._send(qmp.greeting(qmp.version(__version__)))
        async with trio.open_nursery() as nursery:
            try:
                await self._answer_requests(nursery)
            finally:
                if self._subscription is not None:
                    self._events.unsubscribe(self._subscription)

    async def _answer_requests(self, nursery: trio.Nursery) -> None:
        deadline = trio.current_time() + FIRST_LINE_TIMEOUT
        while self._session.phase is not Phase.CLOSED:
            data = None
            with trio.move_on_at(deadline):
                data = await self._receive()
            if data is None:
                error = QmpError(f"nothing was said for {FIRST_LINE_TIMEOUT:.0f} s")
                await self._send(qmp.failure(error, {}))
                return
            if not data:
                return
            for item in self._session.feed(data):
                deadline = math.inf
                await self._answer(item, nursery)

    async def _answer(self, item: Request | Message, nursery: trio.Nursery) -> None:
        if isinstance(item, Request):
            item = await self._commands.answer(item)
        if self._session.phase is Phase.READY and self._subscription is None:
            # Before the client learns that it will be told events: it misses none.
            self._subscription = self._events.subscribe()
            await self._send(item)
            nursery.start_soon(self._send_events, self._subscription)
            return
        await self._send(item)

    async def _send_events(self, subscription: Subscription) -> None:
        async for event in subscription:
            await self._send(event)

    async def _send(self, message: Message) -> None:
        async with self._sending:
            await _send(self._stream, message)

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(RECEIVE_SIZE_MAX))
        except trio.BrokenResourceError:
            return b""


async def _send(stream: trio.SocketStream, message: Message) -> None:
    # A client that has gone needs no answer; that it has gone, reading tells.
    with contextlib.suppress(trio.BrokenResourceError):
        await stream.send_all(qmp.encode(message))
