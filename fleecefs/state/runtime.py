"""The runtime directory: what lives as long as the boot.

One directory for each user on tmpfs, and in it one for each mount, named by the id of
its state: the control socket, what is mounted, and the live bits and RAM tiers of
epochs (state/epochs.py). It survives the daemon and the keeper, not a reboot.
"""

import fcntl
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from fleecefs.block.bitmap import replace_file
from fleecefs.errors import Busy, NotUsable

# Where a keeper that gives up says why (keeper.py).
LAST_WORDS = "gave-up"

# Kernel-wide; another one after each boot (random(4)).
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


# How long a keeper may need to start the next daemon, when somebody asks for it.
_RESTART_SECONDS = 10.0


class RunningMount(NamedTuple):
    """A mount that a daemon serves; `pid` is the keeper's."""

    mount: str
    socket: str
    pid: int


def boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def base_directory() -> Path:
    """Return the user's runtime directory; it has to be on tmpfs."""
    user_directory = os.environ.get("XDG_RUNTIME_DIR")
    if os.getuid() == 0:
        candidates = [Path("/run/fleecefs"), Path("/dev/shm/fleecefs")]
    else:
        candidates = [Path(f"/dev/shm/fleecefs-{os.getuid()}")]
        if user_directory:
            candidates.insert(0, Path(user_directory) / "fleecefs")
    for path in candidates:
        if _file_system(path.parent) == "tmpfs":
            return path
    raise NotUsable(
        "no tmpfs for the bits in use: mount one on "
        + " or ".join(str(path.parent) for path in candidates)
    )


def mount_directory(state_id: UUID) -> Path:
    """Make the runtime directory of one mount if it is not there; nobody else's."""
    path = base_directory()
    for directory in path, path / str(state_id):
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        is_private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
        if not is_private or found.st_uid != os.getuid():
            raise NotUsable(
                f"{directory}: has to be a directory of yours with mode 0700; "
                "remove it or mend it"
            )
    return path / str(state_id)


def lock(directory: Path) -> int:
    """Return a descriptor that keeps other daemons out; Busy if there is one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Busy(
            f"{directory}: in use by the daemon of a copy of this state directory; "
            "end that one first"
        ) from None
    return fd


def announce(directory: Path, mountpoint: str) -> None:
    """Record what this runtime directory belongs to, for running_mounts."""
    (directory / LAST_WORDS).unlink(missing_ok=True)
    what = {"mount": mountpoint, "pid": os.getppid()}
    replace_file(directory / "mount.json", json.dumps(what).encode())


def control_socket(directory: Path) -> Path:
    return directory / "control"


def running_mounts(wanted: Collection[str] | None = None) -> list[RunningMount]:
    """Return the mounts of this user that a daemon serves, or some of them, sorted."""
    try:
        base = base_directory()
    except NotUsable:
        return []
    found = []
    for path in base.glob("*/mount.json"):
        try:
            what = json.loads(path.read_text())
            mount = RunningMount(
                what["mount"], str(control_socket(path.parent)), what["pid"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # ended just now
        if (wanted is None or mount.mount in wanted) and _is_served(mount):
            found.append(mount)
    return sorted(found)


def _is_served(mount: RunningMount) -> bool:
    """Tell whether a daemon answers; between two daemons, wait for the next one."""
    deadline = time.monotonic() + _RESTART_SECONDS
    while not _answers(mount.socket):
        if not _is_keeper(mount.pid) or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _is_keeper(pid: int) -> bool:
    try:
        return b"fleecefs.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def last_words(mountpoint: str) -> str | None:
    """Return why the keeper of a mount gave up, if it did and nobody came after it."""
    try:
        base = base_directory()
    except NotUsable:
        return None
    for path in base.glob(f"*/{LAST_WORDS}"):
        try:
            what = json.loads((path.parent / "mount.json").read_text())
            if what["mount"] == mountpoint:
                return path.read_text()
        except (OSError, ValueError, KeyError):
            continue  # another mount has just begun
    return None


def remove(directory: Path) -> None:
    """Remove the runtime directory of a mount that has ended cleanly."""
    shutil.rmtree(directory, ignore_errors=True)


def _answers(path: str) -> bool:
    directory, name = os.path.split(path)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
            try:
                # A socket's address holds 107 bytes only (unix(7)).
                probe.connect(f"/proc/self/fd/{fd}/{name}")
            finally:
                os.close(fd)
        except OSError:
            return False
    return True


def _file_system(path: Path) -> str:
    """Return the type of the file system a directory is on, "" if there is none."""
    if not path.is_dir():
        return ""
    wanted = os.stat(path).st_dev
    text = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    # As bytes, and not splitlines: a path may hold what Python takes for the end of a
    # line.
    for line in text.rstrip("\n").split("\n"):
        # 36 35 98:0 /root /mount options - type source options   (proc(5))
        fields, _, rest = line.partition(" - ")
        major, minor = fields.split(" ")[2].split(":")
        if os.makedev(int(major), int(minor)) == wanted:
            return rest.split()[0]
    return ""
