"""What the file of a new image has to be able to do, and an open file that can."""

import os
from typing import Protocol

from fleecefs.errors import Unsupported
from fleecefs.qcow2.file import File


class ImageFile(File, Protocol):
    """A file that may be written by many threads, with what else an image needs.

    A read beyond its end has no bytes.
    """

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """Write, and return how much: less than all if space ran out midway."""

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes, as a hole if there are any."""

    def allocated(self) -> int:
        """Return the bytes of storage the file occupies."""

    def close(self) -> None:
        """Nothing else may be called afterwards."""


class Storage(Protocol):
    """What block/raw.py's RawImage is, as far as it is needed here.

    This package stands on its own, so it is handed one, whose size does not matter.
    """

    fd: int

    def pwrite(self, data: bytes | memoryview, offset: int) -> int: ...

    def zero(self, length: int, offset: int) -> None: ...

    def discard(self, length: int, offset: int) -> None: ...

    def flush(self) -> None: ...

    def allocated(self) -> int: ...

    def close(self) -> None: ...


class OpenFile:
    """A regular file as an ImageFile, and its owner: only `close` may close it."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.fd = storage.fd
        self.name = name
        self._storage = storage
        self.pwrite = storage.pwrite
        self.flush = storage.flush
        self.allocated = storage.allocated
        self.close = storage.close

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def zero(self, length: int, offset: int) -> None:
        try:
            self._storage.discard(length, offset)
        except Unsupported:
            self._storage.zero(length, offset)
