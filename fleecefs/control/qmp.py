"""QMP's wire protocol without I/O: bytes <-> messages, and the rules of a session.

One JSON object a line, in both directions, as in QEMU's docs/interop/qmp-spec. The
limits are ours and tighter than QEMU's, because Python's JSON parser recurses and
its integers grow without end. Whatever a peer sends, the one error that leaves this
module is QmpError.

    phase         accepts                  a command gets otherwise
    negotiating   qmp_capabilities         CommandNotFound
    ready         all but that             CommandNotFound
"""

import enum
import json
import math
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

from fleecefs.errors import Error
from fleecefs.units import MiB

Message = dict[str, object]

LINE_MAX = 1 * MiB
NESTING_MAX = 32
# QAPI's widest types: int64 below zero, uint64 above.
INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**64 - 1

HANDSHAKE = "qmp_capabilities"


class ErrorClass(enum.StrEnum):
    """QMP's error classes, as far as we have a use for them."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"
    DEVICE_NOT_FOUND = "DeviceNotFound"


class QmpError(Error):
    """What a peer sent, or asked for, is answered with an error."""

    def __init__(self, desc: str, error_class: ErrorClass = ErrorClass.GENERIC) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class LineTooLong(QmpError):
    """A line has no end within the limit: where the next one begins is unknown."""


# Bytes to messages


class Decoder:
    """Bytes in, messages out, however the bytes are cut into pieces."""

    def __init__(self, line_max: int = LINE_MAX) -> None:
        self._line_max = line_max
        self._buffer = bytearray()
        # So many bytes of the buffer are known to hold no newline: without this,
        # a long line that comes byte by byte would take quadratic time.
        self._searched = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take data and return the messages that are complete with it.

        A bad line raises QmpError and is gone; `feed(b"")` goes on with the lines
        after it. LineTooLong is final: every later call raises it again.
        """
        self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        while (line := self._next_line()) is not None:
            if line.strip():
                yield decode(line)

    def _next_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched)
        self._searched = len(self._buffer) if end < 0 else end
        if self._searched > self._line_max:
            raise LineTooLong(f"a line is longer than {self._line_max} bytes")
        if end < 0:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line


def decode(line: bytes) -> Message:
    """Return the object on a line, or raise QmpError."""
    _check_nesting(line)
    try:
        value = _JSON.decode(line.decode())
    except UnicodeDecodeError:
        raise QmpError("input is not valid UTF-8") from None
    except json.JSONDecodeError as e:
        raise QmpError(f"invalid JSON at column {e.colno}: {e.msg}") from None
    if not isinstance(value, dict):
        raise QmpError("expected a JSON object")
    return value


# Strings are skipped whole; one without an end reaches to the end of the line, so
# that no byte is looked at twice. The JSON parser refuses that one later.
_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


def _check_nesting(line: bytes) -> None:
    """Refuse a deep line before the JSON parser recurses into it."""
    depth = 0
    for bracket in _BRACKET.finditer(line):
        depth += bracket.start(1) >= 0
        depth -= bracket.start(2) >= 0
        if depth > NESTING_MAX:
            raise QmpError(f"JSON is nested deeper than {NESTING_MAX}")


def _object(pairs: list[tuple[str, object]]) -> Message:
    value: Message = {}
    for key, member in pairs:
        if key in value:
            raise QmpError(f"key {key!r} occurs twice")
        value[key] = member
    return value


def _integer(text: str) -> int:
    # By length first: int() of a million digits takes its time.
    if len(text) <= len(str(INTEGER_MIN)):
        value = int(text)
        if INTEGER_MIN <= value <= INTEGER_MAX:
            return value
    raise QmpError("an integer does not fit in 64 bits")


def _number(text: str) -> float:
    value = float(text)
    if math.isfinite(value):
        return value
    raise QmpError("a number is out of range")


def _constant(text: str) -> float:
    raise QmpError(f"{text} is not JSON")


_JSON = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_number,
    parse_constant=_constant,
)


# Messages to bytes


def encode(message: Message) -> bytes:
    """Return the line that carries a message.

    Plain ASCII, so that a path which is not UTF-8 gets through as escapes.
    """
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def greeting(version: Message) -> Message:
    """Return the first message of a server; see `version`."""
    return {"QMP": {"version": version, "capabilities": []}}


def version(text: str) -> Message:
    """Return a version like 1.2.3 in the shape that QMP gives QEMU's."""
    major, minor, micro = map(int, re.findall(r"\d+", text)[:3])
    return {
        "qemu": {"major": major, "minor": minor, "micro": micro},
        "package": f"fleecefs {text}",
    }


def success(value: object, tag: Message) -> Message:
    """Return the reply to a command that was carried out; for `tag` see Request."""
    return {"return": value, **tag}


def failure(error: QmpError, tag: Message) -> Message:
    """Return the reply to a command that was not."""
    return {"error": {"class": error.error_class, "desc": error.desc}, **tag}


def event(name: str, data: Message) -> Message:
    """Return an event that happens now."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    return {
        "event": name,
        "data": data,
        "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
    }


# A session, from the server's side


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
