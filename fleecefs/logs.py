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
    if path == JOURNAL:
        try:
            handler = logging.handlers.SysLogHandler("/dev/log")
        except OSError as e:
            raise NotUsable(f"log {path}: /dev/log: {e.strerror}") from None
        handler.ident = f"fleecefs[{os.getpid()}]: "
        logging.basicConfig(
            format="%(levelname)s %(message)s",
            level=logging.INFO,
            handlers=[handler],
            force=True,
        )
        return
    if path is not None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as e:
            raise NotUsable(f"log {path}: {e.strerror}") from None
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
    logging.basicConfig(format=_FORMAT, level=logging.INFO, force=True)
