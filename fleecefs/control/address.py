"""A Unix socket at a path of any length.

A socket's address holds 107 bytes of path (unix(7)), and a runtime directory can be
deeper than that. Its directory's descriptor is a shorter way to the same place.
"""

import contextlib
import os
from collections.abc import Iterator

PATH_MAX = 107


@contextlib.contextmanager
def address(path: str) -> Iterator[str]:
    """Yield what bind(2) and connect(2) take for path, valid inside the block."""
    if len(os.fsencode(path)) <= PATH_MAX:
        yield path
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)
