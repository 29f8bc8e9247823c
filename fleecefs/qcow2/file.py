"""The one narrow interface through which a qcow2 file is read and changed.

It is block/image.py's, for a file that may grow. Who opens a file also locks it, and
sees to it that only one thread at a time changes it.
"""

import errno
import os
from typing import Protocol


class File(Protocol):
    """Bytes at offsets. Errors are OSErrors; `name` is how messages call the file."""

    name: str

    def pread(self, length: int, offset: int) -> bytes:
        """Return `length` bytes, or less if the file ends before."""

    def pwrite(self, data: bytes, offset: int) -> int:
        """Write, and return how much: less than all if space ran out midway.

        A write within one sector of 512 bytes is done as a whole or not at all.
        """

    def flush(self) -> None:
        """Make everything written durable."""

    def size(self) -> int:
        """Return the bytes of the file; writing beyond makes it longer."""


class DescriptorFile:
    """An open file descriptor as a File; closing it remains the caller's."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def pwrite(self, data: bytes, offset: int) -> int:
        return os.pwrite(self.fd, data, offset)

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def size(self) -> int:
        return os.fstat(self.fd).st_size


def write_all(file: File, data: bytes, offset: int) -> None:
    """Write all of it, or raise what hinders."""
    while data:
        written = file.pwrite(data, offset)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[written:], offset + written
