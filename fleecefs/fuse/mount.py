"""Mounting and unmounting, through fusermount3: one way for root and for users.

Standard library only: the keeper does it.
"""

import array
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fleecefs.errors import Busy, NotFound, NotUsable, Refused

TYPE = "fuse.fleecefs"


def check_mountpoint(mountpoint: str) -> None:
    """Raise an error that says what is wrong with a mount point."""
    if mountpoint in mounts():
        if not _is_dead(mountpoint):
            raise Busy(f"mount point {mountpoint}: fleecefs is already mounted there")
        unmount(mountpoint, lazy=True)
    path = Path(mountpoint)
    try:
        is_empty = not any(path.iterdir())
    except FileNotFoundError:
        raise NotFound(f"mount point {path}: no such directory; make it") from None
    except NotADirectoryError:
        raise NotUsable(f"mount point {path}: not a directory") from None
    except OSError as e:
        raise NotUsable(f"mount point {path}: {e.strerror}") from None
    if not is_empty:
        raise NotUsable(f"mount point {path}: not empty; use an empty directory")


def check_outside(mountpoint: str, what: str, path: str) -> None:
    """Raise NotUsable if a path leads to where a mount is about to be.

    Its daemon would wait for itself. By identity: there are links and bind mounts.
    """
    where = os.stat(mountpoint)
    real = Path(os.path.realpath(path))
    for part in (real, *real.parents):
        try:
            found = part.stat()
        except OSError:
            continue  # it has to be made yet
        if os.path.samestat(found, where):
            raise _on_itself(what, path, mountpoint)
    # Nor on a loop device of a file there, which a mount before this one has left.
    for image in _loop_files(real):
        if _is_inside(image, mountpoint):
            raise _on_itself(what, path, mountpoint)


def _on_itself(what: str, path: str, mountpoint: str) -> NotUsable:
    return NotUsable(
        f"{what} {path}: would be on the mount itself, {mountpoint}; put it elsewhere"
    )


def _loop_files(path: Path) -> Iterator[str]:
    """Yield the files that a path lies on by loop devices, one under the other."""
    while True:
        while not path.exists():
            path = path.parent
        status = path.stat()
        is_device = stat.S_ISBLK(status.st_mode)
        device = status.st_rdev if is_device else status.st_dev
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        # A partition has its disk above it.
        for place in block, block.parent:
            if (place / "loop/backing_file").exists():
                image = (place / "loop/backing_file").read_text().rstrip("\n")
                yield image
                path = Path(image)
                break
        else:
            return


def _is_dead(mountpoint: str) -> bool:
    """Tell whether a mount has lost its daemon and keeper."""
    try:
        os.stat(mountpoint)
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False


def mounts() -> list[str]:
    """Return the mount points of all fleecefs mounts, in the order they were made."""
    found = []
    for line in _read("/proc/self/mounts").split("\n"):
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == TYPE:
            found.append(_unescape(fields[1]))
    return found


def mount(mountpoint: str, *, allow_other: bool) -> int:
    """Let fusermount3 mount, and return the /dev/fuse descriptor it hands over."""
    options = ["fsname=fleecefs", "subtype=fleecefs", "default_permissions"]
    if allow_other:
        options.append("allow_other")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [_fusermount(), "-o", ",".join(options), "--", mountpoint],
            env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            raise Refused(f"can not mount on {mountpoint}: {_complaint(done.stderr)}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2][:4])
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount; Busy if somebody uses it, naming whom. Fine if it is unmounted."""
    if mountpoint not in mounts():
        return
    done = subprocess.run(
        [_fusermount(), "-u", *(["-z"] if lazy else []), "--", mountpoint],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    if done.returncode and mountpoint in mounts():
        found = users(mountpoint)
        if found:
            raise Busy(
                f"{mountpoint} is in use by {', '.join(found)}; "
                "end that, or use --force"
            )
        raise Busy(f"can not unmount {mountpoint}: {_complaint(done.stderr)}")


def read_ahead(mountpoint: str) -> None:
    """Let the kernel read ahead as much of a snapshot as one request can bring.

    Only root may; for users it stays at the kernel's 128 KiB.
    """
    control = Path("/sys/class/bdi", _device(mountpoint), "read_ahead_kb")
    with contextlib.suppress(PermissionError):
        control.write_text("1024")


def _device(mountpoint: str) -> str:
    """Return the device number of a mount, MAJOR:MINOR."""
    for line in _read("/proc/self/mountinfo").rstrip("\n").split("\n"):
        fields = line.split(" ")
        if _unescape(fields[4]) == mountpoint and f" {TYPE} " in line:
            return fields[2]
    raise NotFound(f"nothing is mounted on {mountpoint}")


def users(mountpoint: str) -> list[str]:
    """Return who has files of a mount open: `qemu (pid 123)`, `/dev/loop0`.

    Looks at names in /proc and /sys only, so it can not hang on the mount.
    """
    found = []
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            if _uses(process, mountpoint):
                # The kernel cuts it after 15 bytes, also within a character.
                name = (process / "comm").read_bytes().decode(errors="replace").strip()
                found.append(f"{name} (pid {process.name})")
        except OSError:
            continue  # not ours to look at, or ended just now
    for backing in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            if _is_inside(_read(backing).removesuffix("\n"), mountpoint):
                found.append(f"/dev/{backing.parts[3]}")
        except OSError:
            continue  # detached just now
    for line in _read("/proc/self/mounts").split("\n"):
        where = _unescape(line.split(" ")[1]) if " " in line else ""
        if where != mountpoint and _is_inside(where, mountpoint):
            found.append(f"the mount on {where}")
    return found


def _uses(process: Path, mountpoint: str) -> bool:
    links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
    for link in links:
        try:
            if _is_inside(os.readlink(link), mountpoint):
                return True
        except OSError:
            continue  # closed just now
    return any(
        _is_inside(line.split(maxsplit=5)[5], mountpoint)
        for line in _read(process / "maps").split("\n")
        if mountpoint in line
    )


def _is_inside(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _read(path: str | Path) -> str:
    """Return a file of /proc or /sys, its lines ended by a newline and nothing else.

    Paths in it may be any bytes, and hold what Python takes for the end of a line.
    """
    return os.fsdecode(Path(path).read_bytes())


def _unescape(field: str) -> str:
    """Undo the octal escapes of /proc/mounts."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _fusermount() -> str:
    path = shutil.which("fusermount3")
    if path is None:
        raise NotFound("fusermount3 is missing: install the package fuse3")
    return path


def _complaint(stderr: bytes) -> str:
    """Return what fusermount3 said, without its own name."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("fusermount3: ") if lines else "no reason given"
