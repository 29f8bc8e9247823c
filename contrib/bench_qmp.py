"""The little of QMP that the benchmark needs to drive its peer."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_processes import PATIENCE_SECONDS, Failed

Message = dict[str, Any]


class Monitor:
    """The two directions of a QMP socket; events wait until somebody asks for them."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lines = connection.makefile("rb")
        self._events: list[Message] = []
        self._next()
        self.execute("qmp_capabilities", {})

    def execute(self, command: str, arguments: Message) -> None:
        request = json.dumps({"execute": command, "arguments": arguments})
        self._socket.sendall(request.encode())
        while "return" not in (answer := self._next()):
            if "error" in answer:
                raise Failed(f"{command}: {answer['error']['desc']}")
            self._events.append(answer)

    def event(self, name: str, **data: str) -> Message:
        """Return the next event of that name and with that in its data."""
        while True:
            event = self._events.pop(0) if self._events else self._next()
            if event["event"] == name and data.items() <= event["data"].items():
                return event

    def _next(self) -> Message:
        line = self._lines.readline()
        if not line:
            raise Failed("QMP: the connection has ended")
        message: Message = json.loads(line)
        return message


@contextlib.contextmanager
def connected(path: Path) -> Iterator[Monitor]:
    """Connect to a QMP socket; nothing on it waits for longer than our patience."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_SECONDS)
            connection.connect(str(path))
            yield Monitor(connection)
    except OSError as e:
        raise Failed(f"QMP: {e}") from e


def time_of(event: Message) -> float:
    """Return when an event happened, in seconds since 1970."""
    stamp = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)
