"""QMP's wire protocol without I/O: bytes <-> messages.

One JSON object a line, in both directions, as in QEMU's docs/interop/qmp-spec; some
clients leave out the newline. The limits are ours and tighter than QEMU's, because
Python's JSON parser recurses and its integers grow without end. Whatever a peer
sends, the one error that leaves this module is QmpError.
"""

import enum
import json
import math
import re
import time
from collections.abc import Iterator

from fleecefs.errors import Error
from fleecefs.units import MiB

Message = dict[str, object]

LINE_MAX = 1 * MiB
NESTING_MAX = 32
# QAPI's widest types: int64 below zero, uint64 above.
INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**64 - 1


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


NEWLINE, QUOTE, BACKSLASH = b'\n"\\'
OPENING = b"[{"

# What matters for the end of a message, outside of strings and inside.
_OUTSIDE = re.compile(rb'["\[{\]}\n]')
_INSIDE = re.compile(rb'["\n]|\\[^\n]?')


class Decoder:
    """Bytes in, messages out, however the bytes are cut into pieces.

    A message ends where its outermost bracket closes, as some clients (the library
    qemu.qmp is one) send no newlines; or else at the end of the line, so that
    whatever went wrong on one line is over on the next.
    """

    def __init__(self, line_max: int = LINE_MAX) -> None:
        self._line_max = line_max
        self._buffer = bytearray()
        # How far the buffer has been searched for an end, and what was found open
        # there: a long line that comes byte by byte is not searched again.
        self._position = 0
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take data and return the messages that are complete with it.

        A bad line raises QmpError and is gone; `feed(b"")` goes on with what comes
        after it. LineTooLong is final: every later call raises it again.
        """
        self._buffer += data
        return self._messages()

    def _messages(self) -> Iterator[Message]:
        while (line := self._next_line()) is not None:
            if line.strip():
                yield decode(line)

    def _next_line(self) -> bytes | None:
        end = self._find_end()
        length = len(self._buffer) if end is None else end
        if length and self._buffer[length - 1] == NEWLINE:
            length -= 1
        if length > self._line_max:
            raise LineTooLong(f"a line is longer than {self._line_max} bytes")
        if end is None:
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._position = self._depth = 0
        self._in_string = False
        return line

    def _find_end(self) -> int | None:
        """Return the index after the first message in the buffer."""
        while True:
            pattern = _INSIDE if self._in_string else _OUTSIDE
            match = pattern.search(self._buffer, self._position)
            if match is None:
                self._position = len(self._buffer)
                return None
            if match[0] == b"\\" and match.end() == len(self._buffer):
                # What it escapes is still to come.
                self._position = match.start()
                return None
            self._position = match.end()
            if self._is_end(self._buffer[match.start()]):
                return self._position

    def _is_end(self, byte: int) -> bool:
        if byte == NEWLINE:
            return True
        if byte == QUOTE:
            self._in_string = not self._in_string
        elif byte in OPENING:
            self._depth += 1
        elif byte != BACKSLASH and self._depth > 0:
            self._depth -= 1
            return self._depth == 0
        return False


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
    """Return the reply to a command that was carried out, with the tag of its id."""
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
