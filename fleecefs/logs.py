"""Where the log goes: stderr, a file, or the journal. One line an event."""

import logging
import logging.handlers
import os

from fleecefs.errors import NotUsable

# Given as the log file: the journal, or whoever else reads /dev/log.
JOURNAL = "journal"

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def open_log(path: str | None) -> None:
    """Begin to log there, again after a rotation; NotUsable if it can not be opened.

    What Python itself says on stderr goes to the file too.
    """
    early = _held()
    if path == JOURNAL:
        if not os.path.exists("/dev/log"):
            raise NotUsable(f"log {path}: there is no /dev/log: give a file")
        handler = logging.handlers.SysLogHandler("/dev/log")
        handler.ident = f"fleecefs[{os.getpid()}]: "
        logging.basicConfig(
            format="%(levelname)s %(message)s",
            level=logging.INFO,
            handlers=[handler],
            force=True,
        )
    elif path is not None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as e:
            raise NotUsable(f"log {path}: {e.strerror}") from None
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    if path != JOURNAL:
        logging.basicConfig(format=_FORMAT, level=logging.INFO, force=True)
    for record in early:
        logging.getLogger().handle(record)


def hold() -> None:
    """Keep what is logged from now on, until there is a place for it: open_log."""
    logging.basicConfig(
        level=logging.INFO,
        handlers=[logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL)],
        force=True,
    )


def _held() -> list[logging.LogRecord]:
    handlers = logging.getLogger().handlers
    held = [h for h in handlers if isinstance(h, logging.handlers.MemoryHandler)]
    return [record for handler in held for record in handler.buffer]
