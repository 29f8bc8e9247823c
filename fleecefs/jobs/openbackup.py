"""An earlier backup, opened to be read: a raw file or device, or a chain of files.

Nobody writes to any of its files meanwhile who locks what he writes to, as jobs do.
Everything here may block for as long as the storage of the backup likes to.
"""

import fcntl
import os
import stat
from contextlib import ExitStack
from pathlib import Path

from fleecefs.block.raw import RawImage
from fleecefs.errors import Busy, NotUsable
from fleecefs.jobs.options import Format
from fleecefs.jobs.target import Surroundings, Users
from fleecefs.qcow2.backing import find_backing_format, is_qcow2
from fleecefs.qcow2.chain import Chain
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.qcow2.header import MAGIC
from fleecefs.units import format_size

# What says how to read a file that may be of either format.
_OPTION = "--format"


class OpenBackup:
    """A backup of a disk. Any number of threads may read it; the last one closes it.

    `held` closes its files.
    """

    def __init__(
        self,
        path: Path,
        format: Format,
        chain: Chain,
        raw: RawImage | None,
        held: ExitStack,
    ) -> None:
        self.format = format
        self.users = Users(path, held.close)
        self._chain = chain
        self._raw = raw

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer."""
        self._chain.pread_into(buffer, offset)

    def find_data(self, offset: int) -> int:
        """Return the first byte at or after offset that is not in a hole, or the size.

        Nobody looks for holes in a chain.
        """
        return offset if self._raw is None else self._raw.find_data(offset)


def open_backup(
    path: Path, size: int, told: Format | None, surroundings: Surroundings
) -> OpenBackup:
    """Open a backup of a disk of that size; the error says what is wrong with it."""
    with ExitStack() as held:
        fd = _open(path, "target", surroundings)
        held.callback(os.close, fd)
        format = told or _find_format(fd, path, size)
        if format is Format.RAW:
            _check_size(fd, path, size)
        chain = Chain.open(path, size, format.value)
        held.callback(chain.close)
        for backing in chain.paths[1:]:
            held.callback(os.close, _open(backing, "backing", surroundings))
        raw = None
        if format is Format.RAW:
            raw = RawImage(os.dup(fd), size)
            held.callback(raw.close)
        return OpenBackup(path, format, chain, raw, held.pop_all())


def _open(path: Path, what: str, surroundings: Surroundings) -> int:
    """Open a file, and keep jobs from writing to it while it is open."""
    surroundings.check_path(path, what)
    found = path.stat()
    # Before it is opened: with some devices opening alone does something.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISBLK(found.st_mode):
        raise NotUsable(f"{what} {path}: not a regular file or block device")
    surroundings.check_status(path, found, what)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(f"{what} {path}: a job still writes to it") from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _find_format(fd: int, path: Path, size: int) -> Format:
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        file = DescriptorFile(fd, f"target {path}")
        return Format(find_backing_format(file, size, None, option=_OPTION))
    # The length of a device says nothing, and what it begins with the guest decides.
    if is_qcow2(os.pread(fd, len(MAGIC), 0)):
        raise NotUsable(f"target {path}: may be raw or qcow2: say which with {_OPTION}")
    return Format.RAW


def _check_size(fd: int, path: Path, size: int) -> None:
    has = os.lseek(fd, 0, os.SEEK_END)
    is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    if has < size or (has > size and not is_device):
        raise NotUsable(
            f"target {path}: has {has} bytes ({format_size(has)}), and the disk "
            f"{size} ({format_size(size)})"
        )
