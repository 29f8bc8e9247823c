"""The state directory: what a mount consists of, in state.json.

One JSON document, replaced as a whole and made durable before what it says is true
elsewhere: an epoch is in it before the first cluster is preserved there, and a snapshot
is out of it before any of its data goes. docs/formats.md describes every field.
"""

import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints
from uuid import UUID, uuid4

from fleecefs.block.bitmap import make_directory, replace_file
from fleecefs.block.epoch import OnCbwError
from fleecefs.errors import BadName, Busy, NameTooLong, NotUsable

_FORMAT = "fleecefs-state"
_VERSION = 1

# Inode 1 is the root, 2 the snapshots.
_FIRST_INODE = 16

# What is in a directory that was never used: traces of a mount that failed, and what
# mkfs makes.
_BEFORE_STATE = {"lock", "state.json.new", "lost+found"}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NAME_MAX = 63


@dataclass
class EpochRecord:
    """An epoch: where its store is, from the state directory.

    `durability` is what it survives: of the daemon ("process"), or also of the host.
    """

    number: int
    store: str
    durability: str = "process"


@dataclass
class BitmapRecord:
    """A dirty bitmap of a disk.

    `number` is that of its bits in use, `frozen` of those it had when it began anew for
    the job `job`. `container` is the file it is saved in, from the state directory, if
    it is persistent. One that is not loaded waits for another mount.
    """

    name: str
    number: int
    granularity: int
    recording: bool
    persistent: bool
    auto: bool = True
    container: str = ""
    frozen: int | None = None
    job: str | None = None
    inconsistent: str | None = None
    is_loaded: bool = True


@dataclass
class DiskRecord:
    """A disk: which source it was, the epochs of its past, oldest first, its bitmaps.

    `former_ids` are what it was called on other hosts, by `bitmap import`. Where it
    lived before mirrors moved it is in `former_sources`. A device that it was moved to
    may be larger: then `source_size` says so, otherwise 0.
    """

    name: str
    id: str
    inode: int
    source: str
    size: int
    cluster_size: int
    source_inode: int
    source_mtime_ns: int
    next_epoch: int = 1
    epochs: list[EpochRecord] = field(default_factory=list)
    next_bitmap: int = 1
    bitmaps: list[BitmapRecord] = field(default_factory=list)
    former_ids: list[str] = field(default_factory=list)
    former_sources: list[str] = field(default_factory=list)
    source_size: int = 0


@dataclass
class SnapshotFileRecord:
    """A disk in a snapshot."""

    disk: str
    inode: int
    epoch: int
    allocated: int
    on_cbw_error: str
    lost: str | None = None


@dataclass
class SnapshotRecord:
    """A snapshot of one or more disks; not to be shown while it is being created."""

    name: str
    inode: int
    created_ns: int
    held_ns: int
    files: list[SnapshotFileRecord]
    is_created: bool = False


@dataclass
class PrivateRecord:
    """A snapshot of one disk that only a job sees: that of jobs/KEY.json."""

    key: str
    disk: str
    epoch: int
    created_ns: int
    allocated: int
    on_cbw_error: str
    cbw_timeout: float
    has_holes: bool
    lost: str | None = None
    is_created: bool = False


@dataclass
class MirrorRecord:
    """A disk that is being mirrored by the job of jobs/KEY.json."""

    key: str
    disk: str
    granularity: int


@dataclass
class State:
    """All of state.json."""

    id: str
    boot_id: str
    is_clean: bool
    next_inode: int = _FIRST_INODE
    disks: list[DiskRecord] = field(default_factory=list)
    snapshots: list[SnapshotRecord] = field(default_factory=list)
    private: list[PrivateRecord] = field(default_factory=list)
    mirrors: list[MirrorRecord] = field(default_factory=list)

    def new_inode(self) -> int:
        """Return an inode number that was never used in this state."""
        self.next_inode += 1
        return self.next_inode - 1


class StateDirectory:
    """A locked state directory."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Lock a state directory, made if it is missing; Busy if another has it."""
        try:
            make_directory(path)
            names = {entry.name for entry in path.iterdir()}
            if "state.json" not in names and names - _BEFORE_STATE:
                raise NotUsable(
                    f"state {path}: not empty, and without a state.json of fleecefs; "
                    "give an empty directory, or a new one"
                )
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except NotUsable:
            raise
        except FileExistsError:
            raise NotUsable(f"state {path}: not a directory") from None
        except OSError as e:
            raise NotUsable(
                f"state {path}: {e.strerror}; give a --state directory that you can "
                "write to"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Busy(f"state {path}: in use by another fleecefs") from None
        return cls(path, fd)

    def load(self) -> State | None:
        """Return what was saved, None for a new directory; NotUsable if damaged."""
        path = self.path / "state.json"
        try:
            document = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except OSError as e:
            raise NotUsable(f"{path}: {e.strerror}") from None
        except (ValueError, RecursionError):
            raise NotUsable(f"{path}: is damaged or truncated; {_HINT}") from None
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise NotUsable(f"{path}: not a state file of fleecefs; {_HINT}")
        if document.get("version") != _VERSION:
            raise NotUsable(
                f"{path}: has version {document.get('version')}, this fleecefs reads "
                f"version {_VERSION}; {_HINT}"
            )
        del document["format"], document["version"]
        try:
            state: State = _parse(State, document)
            _check(state)
        except (KeyError, TypeError, ValueError, BadName):
            raise NotUsable(f"{path}: is damaged; {_HINT}") from None
        return state

    def save(self, state: State) -> None:
        """Replace state.json; durable on return. OSError names the directory."""
        document = {"format": _FORMAT, "version": _VERSION, **asdict(state)}
        text = json.dumps(document, indent=1) + "\n"
        try:
            replace_file(self.path / "state.json", text.encode())
        except OSError as e:
            raise OSError(e.errno, f"state {self.path}: {e.strerror}") from None

    def close(self) -> None:
        os.close(self._lock_fd)


_HINT = "restore it from a backup, or give another --state directory"


def _parse(kind: Any, value: Any) -> Any:
    """Return what JSON made of a record; TypeError or KeyError if it is none."""
    if isinstance(kind, type) and is_dataclass(kind):
        types = get_type_hints(kind)
        return kind(**{name: _parse(types[name], value[name]) for name in value})
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise TypeError(value)
        return [_parse(get_args(kind)[0], element) for element in value]
    # To Python a bool is an int.
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise TypeError(value)
    return value


def _check(state: State) -> None:
    """Raise ValueError or BadName for what no state of ours can say."""
    UUID(state.id)
    for disk in state.disks:
        UUID(disk.id)
        check_name(disk.name, "disk")
        for bitmap in disk.bitmaps:
            if bitmap.granularity.bit_count() != 1:
                raise ValueError(bitmap.granularity)
    names = {disk.name for disk in state.disks}
    for snapshot in state.snapshots:
        check_name(snapshot.name, "snapshot")
        for file in snapshot.files:
            OnCbwError(file.on_cbw_error)
            if file.disk not in names:
                raise ValueError(file.disk)
    for private in state.private:
        OnCbwError(private.on_cbw_error)
        if private.disk not in names:
            raise ValueError(private.disk)
    for mirror in state.mirrors:
        if mirror.disk not in names or mirror.granularity.bit_count() != 1:
            raise ValueError(mirror)


def new_state(boot_id: str) -> State:
    return State(id=str(uuid4()), boot_id=boot_id, is_clean=True)


def default_path(mountpoint: str) -> Path:
    """Return where the state of a mount point is if nobody says otherwise."""
    home = os.environ.get("XDG_STATE_HOME")
    if home:
        base = Path(home)
    elif os.getuid() == 0:
        base = Path("/var/lib")
    else:
        base = Path.home() / ".local/state"
    # As systemd-escape(1) --path, so that /a/b and /a-b are two.
    name = mountpoint.strip("/").replace("\\", "\\x5c").replace("-", "\\x2d")
    return base / "fleecefs" / name.replace("/", "-")


def check_name(name: str, what: str) -> None:
    """Raise BadName unless a disk or snapshot can be called so."""
    if len(os.fsencode(name)) > _NAME_MAX:
        raise NameTooLong(f"{what} name of {len(name)} characters: {_NAME_MAX} at most")
    if not _NAME.fullmatch(name):
        raise BadName(
            f"{what} name {name!r}: use letters, digits, '.', '_' and '-', "
            "and begin with a letter or digit"
        )
