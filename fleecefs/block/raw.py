"""A raw file or block device as an image."""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from pathlib import Path
from typing import Self

from fleecefs.errors import Busy, Error, NotUsable, Unsupported

# linux/falloc.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10

# struct flock of fcntl(2): a write lock from 0, length 0 (to the end), no process id.
_WHOLE_FILE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)

# Zeroes for devices that know no other way; one buffer, written many times.
_ZEROES = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call fallocate(2), which Python's os module does not have."""
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class RawImage:
    """An open raw file or block device. Its format is never probed."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    @classmethod
    def open_source(cls, path: Path) -> Self:
        """Open and lock a source; the error names what is wrong with the path.

        Locked with flock(2), an open file description lock (fcntl(2)), which
        QEMU's tools respect, and O_EXCL for a device (open(2): EBUSY if mounted).
        """
        try:
            # O_NONBLOCK: a FIFO must not make us wait before we see what it is.
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise _named(e, f"source {path}: {e.strerror}") from None
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISBLK(mode):
                exclusive = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_EXCL)
                os.close(fd)
                fd = exclusive
            elif not stat.S_ISREG(mode):
                raise NotUsable(f"source {path}: not a regular file or block device")
            lock_whole(
                fd,
                f"source {path}: in use by another program (locked); "
                "a disk can be served by one fleecefs only",
            )
            size = os.lseek(fd, 0, os.SEEK_END)
            if size == 0:
                raise NotUsable(f"source {path}: is empty; a disk has a size")
            return cls(fd, size)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.close(fd)
            if isinstance(e, Error):
                raise
            if e.errno == errno.EBUSY:
                raise Busy(
                    f"source {path}: in use by the system: mounted, used as swap, or "
                    "part of another device"
                ) from None
            raise _named(e, f"source {path}: {e.strerror}") from None

    @classmethod
    def create(cls, path: Path, size: int) -> Self:
        """Make an empty sparse file of that size; one that is there is emptied."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, size)
        return cls(fd, size)

    @classmethod
    def open(cls, path: Path, size: int) -> Self:
        """Open a file of ours; EINVAL if it has not the size it was made with."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        found = os.fstat(fd).st_size
        if found != size:
            os.close(fd)
            raise NotUsable(f"{path}: is {found} bytes long, not {size}")
        return cls(fd, size)

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise _too_short()
        return data

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        if os.preadv(self.fd, (buffer,), offset) != len(buffer):
            raise _too_short()

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(self.fd, data, offset)

    def zero(self, length: int, offset: int) -> None:
        # A punched hole reads as zeroes too; tmpfs knows only that.
        for mode in (ZERO_RANGE | KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE):
            try:
                return fallocate(self.fd, mode, offset, length)
            except OSError as e:
                # EINVAL: less than a device's sectors.
                if e.errno not in (errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL):
                    raise
        end = offset + length
        while offset < end:
            data = memoryview(_ZEROES)[: end - offset]
            offset += os.pwrite(self.fd, data, offset)

    def discard(self, length: int, offset: int) -> None:
        try:
            fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENODEV):
                raise Unsupported("the storage below can not discard") from None
            if e.errno != errno.EINVAL:
                raise
            self.zero(length, offset)

    def flush(self) -> None:
        os.fdatasync(self.fd)

    def find_data(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_DATA, offset)

    def find_hole(self, offset: int) -> int:
        return self._seek(offset, os.SEEK_HOLE, self.size)

    def _seek(self, offset: int, whence: int, without: int) -> int:
        """lseek(2); `without` is the answer where storage knows of no holes."""
        if self._is_device:
            return without
        try:
            return min(os.lseek(self.fd, offset, whence), self.size)
        except OSError as e:
            if e.errno == errno.ENXIO:
                # The end of the file. No hole begins there if it has been cut short.
                if os.fstat(self.fd).st_size < self.size:
                    raise _too_short() from None
                return self.size
            if e.errno == errno.EINVAL:
                return without
            raise

    def allocated(self) -> int:
        if self._is_device:
            return self.size
        return os.fstat(self.fd).st_blocks * 512

    def status(self) -> os.stat_result:
        """Return fstat(2) of the file or device node."""
        return os.fstat(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # The last reader may hold an image whose epoch is gone already (see epoch.py).
    __del__ = close


def lock_whole(fd: int, message: str) -> None:
    """Lock a file until it is closed; Busy with that message if somebody else has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise Busy(message) from None
        raise


def _too_short() -> OSError:
    return OSError(errno.EIO, "image is shorter than its size")


def _named(error: OSError, message: str) -> OSError:
    return OSError(error.errno, message)
