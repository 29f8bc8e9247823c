"""Where a backup or mirror goes to, checked, locked and opened.

A raw file or a block device, or a new qcow2 file, which may add to another backup.

Everything here may block for as long as the target's storage likes to.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from fleecefs.block.bitmap import sync_directory
from fleecefs.block.image import Image
from fleecefs.block.raw import RawImage, lock_whole
from fleecefs.errors import Busy, Error, NotUsable, Unsupported
from fleecefs.qcow2.backing import Backing, find_backing_format
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.qcow2.image import NewImage
from fleecefs.qcow2.imagefile import OpenFile
from fleecefs.units import MiB, format_size

_ZEROES = bytes(1 * MiB)

# ioctl_ficlonerange(2): struct file_clone_range, and _IOW(0x94, 13, …).
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
# Of file systems that can not, of two, of what is no file, or lies across blocks.
_NOT_CLONED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL)

# linux/fs.h: _IO(0x12, 94)
_BLKROGET = 0x125E


# Those of targets that threads are busy with. A process can not end before they have
# come back, not even when it is killed: the kernel waits for the storage.
_busy: set["Users"] = set()


def busy_targets() -> list[str]:
    """Return the paths of targets that threads are busy with, also abandoned ones."""
    return [str(users.path) for users in list(_busy)]


class Users:
    """The `count` threads that are busy with a target, also abandoned ones."""

    def __init__(self, path: Path | None, close: Callable[[], None]) -> None:
        self.path = path
        self._close = close
        self._lock = threading.Lock()
        self.count = 0
        self._is_closing = False

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Keep it open meanwhile: for a thread that may hang in it."""
        with self._lock:
            if self._is_closing:
                raise OSError(errno.EBADF, "the target is closed")
            self.count += 1
            _busy.add(self)
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1
                if not self.count:
                    _busy.discard(self)
                is_last = self._is_closing and not self.count
            if is_last:
                self._close()

    def keep_open(self) -> None:
        """Let nobody close it: it belongs to somebody else from now on."""
        with self._lock:
            self._close = lambda: None

    def close(self) -> None:
        """Let go of it; the last thread that is busy with it closes it."""
        with self._lock:
            self._is_closing = True
            is_unused = not self.count
        if is_unused:
            self._close()


class Target:
    """An image that a job fills, and what is there already.

    is_new    the job has made the file
    is_blank  what the job has not written reads as zeroes
    unit      of what the job writes it has to write all; 1 if it may write any bytes
    """

    def __init__(
        self,
        image: Image | NewImage,
        path: Path | None = None,
        *,
        is_new: bool = False,
        is_blank: bool = False,
    ) -> None:
        self.size = image.size
        self.path = path
        self.unit = image.cluster_size if isinstance(image, NewImage) else 1
        self.is_new = is_new
        self.is_blank = is_blank
        self._image = image
        backing = image.backing if isinstance(image, NewImage) else None
        self.backing_format = None if backing is None else backing.format
        self._raw = image if isinstance(image, RawImage) else None
        # What has a descriptor of its own.
        self._fd: int | None = None
        if isinstance(image, RawImage):
            self._fd = image.fd
        elif isinstance(image, NewImage) and isinstance(image.file, OpenFile):
            self._fd = image.file.fd
        self.users = Users(path, lambda: self._image.close())

    def used(self) -> contextlib.AbstractContextManager[None]:
        """Keep it open meanwhile: for a thread that may hang in it."""
        return self.users.busy()

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of it, or raise: written twice, it is the same."""
        while data:
            written = self._image.pwrite(data, offset)
            data, offset = data[written:], offset + written

    def punch(self, length: int, offset: int) -> None:
        """Make a range read as zeroes, as a hole if there are any."""
        try:
            return self._image.discard(length, offset)
        except Unsupported:
            pass
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
        try:
            return self._image.zero(length, offset)
        except OSError as e:
            # A device that has larger blocks than the source.
            if e.errno != errno.EINVAL:
                raise
        end = offset + length
        for at in range(offset, end, len(_ZEROES)):
            self.write(memoryview(_ZEROES)[: end - at], at)

    def empty(self) -> None:
        """Drop what an existing raw file holds, if it can have holes."""
        if self.is_blank or self._is_device or self.unit > 1:
            return
        with contextlib.suppress(Unsupported):
            self._image.discard(self.size, 0)
            self.is_blank = True

    def clone(self, source: Image, length: int, offset: int) -> None:
        """Let the file system share a range of the source.

        Unsupported if it can not; after another OSError a part may be shared.
        """
        if self._raw is None or not isinstance(source, RawImage):
            raise Unsupported("only files are shared")
        what = _CLONE_RANGE.pack(source.fd, offset, length, offset)
        try:
            fcntl.ioctl(self._raw.fd, _FICLONERANGE, what)
        except OSError as e:
            if e.errno in _NOT_CLONED:
                raise Unsupported(f"is not shared: {e.strerror}") from None
            raise

    @property
    def identity(self) -> str:
        """Which file or device it is, as long as the host is up."""
        assert self._fd is not None
        found = os.fstat(self._fd)
        if self._is_device:
            return f"device {found.st_rdev}"
        return f"file {found.st_dev}:{found.st_ino}"

    @property
    def _is_device(self) -> bool:
        return self._fd is not None and stat.S_ISBLK(os.fstat(self._fd).st_mode)

    def flush(self) -> None:
        """Make everything durable: data, size, and the name."""
        self._image.flush()
        if self._fd is None or self.path is None:
            return
        os.fsync(self._fd)
        if not self._is_device:
            sync_directory(self.path.resolve().parent)

    def remove(self) -> None:
        """Remove the file if the job has made it, and it still is at its place."""
        if self.is_new and self.path is not None and self._is_in_place():
            self.path.unlink(missing_ok=True)
            sync_directory(self.path.parent)

    def _is_in_place(self) -> bool:
        """Tell whether the path leads to it, and not to nothing or another file."""
        if self.path is None or self._fd is None:
            return False
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def remove_unused(self) -> None:
        """Remove the file if the job has made it, and nothing is in it."""
        if not self._image.allocated():
            self.remove()

    def hand_over(self, take: Callable[[RawImage], None]) -> None:
        """Let somebody take the raw image who keeps it open, unless `take` fails.

        NotUsable if nobody would find it by its path.
        """
        assert self._raw is not None
        if not self._is_in_place():
            raise NotUsable(
                f"target {self.path}: is not there any more, or another file is"
            )
        take(self._raw)
        self.users.keep_open()

    def close(self) -> None:
        """Let go of it; the last thread that is busy with it closes it."""
        self.users.close()


class Surroundings:
    """What a target must not be: our own.

    sources       the status of each disk's source, by the disk's name
    places        directories with files of ours
    check_place   raises NotUsable for a path that leads to our mount
    """

    def __init__(
        self,
        sources: Mapping[str, os.stat_result],
        places: Sequence[Path],
        check_place: Callable[[str], None] = lambda path: None,
    ) -> None:
        self._sources = sources
        self._places = places
        self._check_place = check_place

    def check_path(self, path: Path, what: str = "target") -> None:
        """Raise NotUsable before a path is opened."""
        if not path.is_absolute():
            raise NotUsable(f"{what} {path}: give an absolute path")
        try:
            self._check_place(str(path))
        except NotUsable:
            raise NotUsable(
                f"{what} {path}: is on the mount of its own source; put it elsewhere"
            ) from None
        real = Path(os.path.realpath(path))
        for place in self._places:
            if _is_within(real, place):
                raise NotUsable(
                    f"{what} {path}: lies among the files of fleecefs in {place}; "
                    "put it elsewhere"
                )

    def check_status(
        self, path: Path, found: os.stat_result, what: str = "target"
    ) -> None:
        """Raise NotUsable for the source of a disk."""
        for name, source in self._sources.items():
            if _is_same(found, source) or _is_loop_of(found, source):
                raise NotUsable(f"{what} {path}: is the source of disk {name!r}")


def open_target(path: Path, size: int, surroundings: Surroundings) -> Target:
    """Open and lock a target for a source of that size, or make it.

    The error says what is wrong with it; then nothing has been changed.
    """
    with _naming("target", path):
        surroundings.check_path(path)
        try:
            found = path.stat()
        except FileNotFoundError:
            return _create(path, size)
        surroundings.check_status(path, found)
        return _open(path, size, found)


def create_qcow2(
    path: Path, size: int, surroundings: Surroundings, backing: Backing | None
) -> Target:
    """Make a qcow2 file, which is none until it is complete; errors as open_target."""
    with _naming("target", path):
        surroundings.check_path(path)
        if path.exists():
            raise NotUsable(
                f"target {path}: exists; a qcow2 backup is a new file: give another "
                "name"
            )
        fd = _create_file(path)
        image = NewImage.create(_as_file(fd, path), size, backing)
        target = Target(image, path, is_new=True, is_blank=backing is None)
        return _settle_new(target, fd)


def find_backing(
    path: Path, told: str | None, size: int, target: Path, surroundings: Surroundings
) -> Backing:
    """Return how a new qcow2 target has an earlier backup as its backing file."""
    with _naming("backing", path):
        surroundings.check_path(path, "backing")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise NotUsable(f"backing {path}: not a regular file")
            surroundings.check_status(path, os.fstat(fd), "backing")
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"backing {path}: a job still writes to it") from None
            file = DescriptorFile(fd, f"backing {path}")
            format = find_backing_format(file, size, told)
        finally:
            os.close(fd)
    return record_backing(path, format, target)


def record_backing(path: Path, format: str, target: Path) -> Backing:
    """Return it as it is recorded: files of one directory may move together."""
    real, directory = (
        Path(os.path.realpath(path)),
        Path(os.path.realpath(target.parent)),
    )
    name = str(real)
    if real.parent == directory:
        name = f"./{real.name}" if ":" in real.name else real.name
    backing = Backing(name, format)
    backing.check()
    return backing


def reopen_target(path: Path, size: int, *, is_new: bool, identity: str) -> Target:
    """Open a target again, for a job that goes on; NotUsable if it is another file."""
    with _naming("target", path):
        target = _open(path, size, path.stat())
    if target.identity != identity:
        target.close()
        raise NotUsable(f"target {path}: was replaced by another file")
    target.is_new = is_new
    return target


def reopen_qcow2(path: Path, size: int, backing: Backing | None) -> Target:
    """Open the qcow2 file of a job that goes on."""
    with _naming("target", path):
        file = _as_file(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK), path)
        try:
            lock_whole(file.fd, str(_in_use(path)))
            image = NewImage.resume(file, size, backing)
        except BaseException:
            file.close()
            raise
    return Target(image, path, is_new=True, is_blank=backing is None)


@contextlib.contextmanager
def _naming(what: str, path: Path) -> Iterator[None]:
    """Let an error of the system say which file it is about."""
    try:
        yield
    except Error:
        raise
    except OSError as e:
        raise OSError(e.errno, f"{what} {path}: {e.strerror}") from None


def _open(path: Path, size: int, found: os.stat_result) -> Target:
    is_device = stat.S_ISBLK(found.st_mode)
    if not is_device and not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise NotUsable(
            f"target {path}: is {kind}; give a file, new or of "
            f"{size} bytes, or a block device"
        )
    # Of a device only its one user can have it so (open(2)).
    exclusive = os.O_EXCL if is_device else 0
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | exclusive)
    except OSError as e:
        if is_device and e.errno == errno.EBUSY:
            raise _in_use(path) from None
        raise
    try:
        if not os.path.samestat(os.fstat(fd), found):
            raise NotUsable(f"target {path}: was replaced just now")
        if is_device and _is_read_only(fd):
            raise NotUsable(f"target {path}: is a read-only device")
        lock_whole(fd, str(_in_use(path)))
        has = os.lseek(fd, 0, os.SEEK_END)
        if has < size or (has > size and not is_device):
            raise NotUsable(
                f"target {path}: has {has} bytes ({format_size(has)}), and the disk "
                f"{size} ({format_size(size)})"
            )
    except BaseException:
        os.close(fd)
        raise
    return Target(RawImage(fd, size), path)


def _is_read_only(fd: int) -> bool:
    """Tell whether a device, which is open for writing, is read-only all the same."""
    return struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4))) != (0,)


def _create(path: Path, size: int) -> Target:
    fd = _create_file(path)
    target = Target(RawImage(fd, size), path, is_new=True, is_blank=True)
    return _settle_new(target, fd, length=size)


def _create_file(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise NotUsable(
            f"target {path}: there is no directory {path.parent}; make it"
        ) from None
    except FileExistsError:
        raise NotUsable(f"target {path}: is a link that leads nowhere") from None


def _as_file(fd: int, path: Path) -> OpenFile:
    # Its size is not asked for: the file grows.
    return OpenFile(RawImage(fd, 0), str(path))


def _settle_new(target: Target, fd: int, *, length: int = 0) -> Target:
    """Lock a file that was just made, and make it durable that it is there."""
    assert target.path is not None
    try:
        lock_whole(fd, str(_in_use(target.path)))
        os.ftruncate(fd, length)
        os.fsync(fd)
        sync_directory(target.path.parent)
    except BaseException:
        target.remove()
        target.close()
        raise
    return target


def _in_use(path: Path) -> Busy:
    return Busy(f"target {path}: in use by another job or program")


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def _is_loop_of(found: os.stat_result, source: os.stat_result) -> bool:
    """Tell whether it is a loop device that shows the source."""
    if not stat.S_ISBLK(found.st_mode):
        return False
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    backing = Path("/sys/dev/block", number, "loop/backing_file")
    try:
        image = os.stat(os.fsdecode(backing.read_bytes()).removesuffix("\n"))
    except OSError:
        return False
    return os.path.samestat(image, source)


def _is_within(path: Path, directory: Path) -> bool:
    """Tell whether a path leads into a directory, by identity."""
    try:
        wanted = directory.stat()
    except FileNotFoundError:
        return False
    for part in (path, *path.parents):
        with contextlib.suppress(OSError):
            if os.path.samestat(part.stat(), wanted):
                return True
    return False
