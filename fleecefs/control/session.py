"""The server's half of a session, without I/O: bytes in, requests and replies out.

What a command gets depends on the phase; whatever is not accepted, CommandNotFound:

    negotiating   accepts qmp_capabilities, and is ready then
    ready         accepts all but that
    closed        a line was too long: where the next one begins is unknown
"""

import enum
from collections.abc import Iterator
from typing import NamedTuple

from fleecefs.control.qmp import (
    Decoder,
    ErrorClass,
    LineTooLong,
    Message,
    QmpError,
    failure,
    success,
)

HANDSHAKE = "qmp_capabilities"


class Request(NamedTuple):
    """A command to carry out."""

    name: str
    arguments: Message
    # {"id": ...} as the client sent it, or {}: null is an id, too.
    tag: Message


class Phase(enum.Enum):
    """How far a session has come."""

    NEGOTIATING = "negotiating"  # greeted; the client has not agreed yet
    READY = "ready"  # taking commands
    CLOSED = "closed"  # the stream can not be understood any more


REFUSALS = {
    Phase.NEGOTIATING: f"send {HANDSHAKE!r} first, to negotiate capabilities",
    Phase.READY: "capabilities have been negotiated already",
}


class Session:
    """What one client has said so far decides what its next line means."""

    def __init__(self) -> None:
        self.phase = Phase.NEGOTIATING
        self._decoder = Decoder()

    def feed(self, data: bytes) -> Iterator[Request | Message]:
        """Yield a Request for every command to carry out, and ready replies.

        In the order of the client's lines; a bad line has an error as its reply.
        """
        messages = self._decoder.feed(data)
        while self.phase is not Phase.CLOSED:
            try:
                for message in messages:
                    yield self._accept(message)
                return
            except QmpError as e:
                if isinstance(e, LineTooLong):
                    self.phase = Phase.CLOSED
                yield failure(e, {})
            messages = self._decoder.feed(b"")

    def _accept(self, message: Message) -> Request | Message:
        tag = {"id": message["id"]} if "id" in message else {}
        try:
            request = _request(message, tag)
            is_handshake = request.name == HANDSHAKE
            if is_handshake is not (self.phase is Phase.NEGOTIATING):
                raise QmpError(REFUSALS[self.phase], ErrorClass.COMMAND_NOT_FOUND)
            if not is_handshake:
                return request
            _check_capabilities(request.arguments)
        except QmpError as e:
            return failure(e, tag)
        self.phase = Phase.READY
        return success({}, tag)


def _request(message: Message, tag: Message) -> Request:
    for member in message:
        if member not in ("execute", "arguments", "id"):
            raise QmpError(f"member {member!r} is unexpected")
    if "execute" not in message:
        raise QmpError("member 'execute' is missing")
    name = message["execute"]
    if not isinstance(name, str):
        raise QmpError("member 'execute' is not a string")
    arguments = message.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("member 'arguments' is not an object")
    return Request(name, arguments, tag)


def _check_capabilities(arguments: Message) -> None:
    for name in arguments:
        if name != "enable":
            raise QmpError(f"Parameter {name!r} is unexpected")
    if arguments.get("enable", []) != []:
        raise QmpError("there are no capabilities to enable")
