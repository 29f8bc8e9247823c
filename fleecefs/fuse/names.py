"""Requests about names, by pyfuse3: the tree, attributes, mkdir and rmdir.

/                    the live disks
/snapshots           mkdir makes a snapshot of all disks, rmdir deletes it
/snapshots/NAME      its files, read-only
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, InodeT

from fleecefs.block.disk import Disk
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import NameTaken, NotFound, ReadOnly, Refused
from fleecefs.inventory import SNAPSHOTS_INODE, Inventory, SnapshotGroup

log = logging.getLogger(__name__)

ROOT_INODE = pyfuse3.ROOT_INODE

# Seconds the kernel may remember. Disks have the same name and size for ever; snapshots
# come and go by the control socket, of which the kernel hears nothing.
_DISK_SECONDS = 1.0
_SNAPSHOT_SECONDS = 0.0

P = ParamSpec("P")
R = TypeVar("R")


def replies_errno(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Answer every failure with an errno; pyfuse3 stops on anything but FUSEError."""

    @functools.wraps(handler)
    async def replying(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except OSError as e:
            raise FUSEError(e.errno or errno.EIO) from e
        except Exception:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return replying


class Names(pyfuse3.Operations):
    """The tree of one mount.

    `resent` has the names whose MKDIR or RMDIR may have been carried out by an earlier
    daemon; `opened_by(pid, inode)` is DataThreads'.
    """

    def __init__(
        self,
        inventory: Inventory,
        resent: set[tuple[int, bytes]],
        opened_by: Callable[[int, int], bool],
    ) -> None:
        super().__init__()
        self._inventory = inventory
        self._resent = resent
        self._opened_by = opened_by

    @contextmanager
    def relayed(self, names_fd: int) -> Iterator[None]:
        """Connect pyfuse3 with the relay's end; `serve` has to be run inside."""
        pyfuse3.init(self, f"/dev/fd/{names_fd}", {"fsname=fleecefs"})
        try:
            yield
        finally:
            pyfuse3.close(unmount=False)

    async def serve(self) -> None:
        """Answer requests until `end` is called."""
        await pyfuse3.main()

    def end(self) -> None:
        pyfuse3.terminate()

    # -- looking

    @replies_errno
    async def lookup(
        self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        if name == b".":
            return self._attributes(parent)
        if name == b"..":
            return self._attributes(self._parent(parent))
        for child, inode in self._children(parent):
            if os.fsencode(child) == name:
                return self._attributes(inode)
        raise NotFound(os.fsdecode(name))

    @replies_errno
    async def getattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        return self._attributes(inode)

    def _children(self, inode: int) -> list[tuple[str, int]]:
        """Return the names in a directory and their inodes."""
        inventory = self._inventory
        if inode == ROOT_INODE:
            live = sorted(inventory.inodes.items())
            return [*live, ("snapshots", SNAPSHOTS_INODE)]
        if inode == SNAPSHOTS_INODE:
            return [(g.name, g.inode) for g in inventory.sorted_snapshots()]
        return sorted(self._group(inode).inodes.items())

    def _group(self, inode: int) -> SnapshotGroup:
        for group in list(self._inventory.snapshots.values()):
            if group.inode == inode:
                return group
        raise NotFound(f"inode {inode}")

    def _parent(self, inode: int) -> int:
        return ROOT_INODE if inode in (ROOT_INODE, SNAPSHOTS_INODE) else SNAPSHOTS_INODE

    def _attributes(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.st_blksize = 4096
        file = self._inventory.files.get(inode)
        if isinstance(file, Disk):
            self._fill_disk(entry, file)
        elif isinstance(file, Snapshot):
            self._fill_snapshot(entry, file)
        else:
            self._fill_directory(entry, inode)
        return entry

    def _fill_disk(self, entry: EntryAttributes, disk: Disk) -> None:
        status = self._inventory.sources.status(disk.id)
        entry.st_mode = stat.S_IFREG | (status.st_mode & 0o666)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
        entry.st_size = disk.size
        entry.st_blocks = disk.allocated() // 512
        entry.st_atime_ns = status.st_atime_ns
        entry.st_mtime_ns = status.st_mtime_ns
        entry.st_ctime_ns = status.st_ctime_ns
        entry.entry_timeout = entry.attr_timeout = _DISK_SECONDS

    def _fill_snapshot(self, entry: EntryAttributes, snapshot: Snapshot) -> None:
        status = self._inventory.sources.status(snapshot.disk_id)
        entry.st_mode = stat.S_IFREG | (status.st_mode & 0o444)
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
        entry.st_size = snapshot.size
        entry.st_blocks = snapshot.allocated() // 512
        # cmp and others read in these units.
        entry.st_blksize = 1 << 20
        _fill_times(entry, snapshot.created_ns)
        entry.entry_timeout = entry.attr_timeout = _DISK_SECONDS

    def _fill_directory(self, entry: EntryAttributes, inode: int) -> None:
        entry.st_mode = stat.S_IFDIR | 0o755
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_size = 0
        entry.st_blocks = 0
        if inode in (ROOT_INODE, SNAPSHOTS_INODE):
            entry.st_nlink = 2 + (len(self._inventory.snapshots) or 1)
            _fill_times(entry, self._inventory.changed_ns)
            entry.entry_timeout = _DISK_SECONDS
        else:
            entry.st_nlink = 2
            _fill_times(entry, self._group(inode).created_ns)
            entry.entry_timeout = _SNAPSHOT_SECONDS
        entry.attr_timeout = _SNAPSHOT_SECONDS

    @replies_errno
    async def opendir(self, inode: InodeT, ctx: pyfuse3.RequestContext) -> InodeT:
        self._children(inode)
        return inode

    @replies_errno
    async def readdir(
        self, fh: InodeT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        entries = [(".", fh), ("..", self._parent(fh)), *self._children(fh)]
        for index, (name, inode) in enumerate(entries[start_id:], start_id + 1):
            try:
                attributes = self._attributes(inode)
            except NotFound:
                continue  # deleted just now
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, index):
                break

    async def releasedir(self, fh: InodeT) -> None:
        pass

    @replies_errno
    async def fsyncdir(self, fh: InodeT, datasync: bool) -> None:
        pass

    @replies_errno
    async def access(
        self, inode: InodeT, mode: int, ctx: pyfuse3.RequestContext
    ) -> bool:
        return True  # default_permissions: the kernel has checked

    @replies_errno
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = await trio.to_thread.run_sync(os.statvfs, self._inventory.store_path)
        data = pyfuse3.StatvfsData()
        data.f_bsize, data.f_frsize = found.f_bsize, found.f_frsize
        data.f_blocks, data.f_bfree = found.f_blocks, found.f_bfree
        data.f_bavail = found.f_bavail
        data.f_files, data.f_ffree = found.f_files, found.f_ffree
        data.f_favail, data.f_namemax = found.f_favail, 63
        return data

    # -- snapshots come and go

    @replies_errno
    async def mkdir(
        self, parent: InodeT, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        if parent != SNAPSHOTS_INODE:
            self._refuse(parent)
        try:
            group = await trio.to_thread.run_sync(
                self._inventory.create_snapshot, os.fsdecode(name), None
            )
        except NameTaken:
            if not self._was_done(parent, name):
                raise
            group = self._inventory.snapshots[os.fsdecode(name)]
        return self._attributes(group.inode)

    def _was_done(self, parent: int, name: bytes) -> bool:
        """Tell, once, whether an earlier daemon did this and could not say so."""
        was_resent = (parent, name) in self._resent
        self._resent.discard((parent, name))
        return was_resent

    @replies_errno
    async def rmdir(
        self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        if parent != SNAPSHOTS_INODE:
            self._refuse(parent)
        try:
            await trio.to_thread.run_sync(
                self._inventory.delete_snapshot, os.fsdecode(name)
            )
        except NotFound:
            if not self._was_done(parent, name):
                raise

    # -- what a mount of disks refuses

    def _refuse(self, parent: int) -> None:
        if parent in (ROOT_INODE, SNAPSHOTS_INODE):
            raise Refused("only snapshots can be made and removed here")
        raise ReadOnly("a snapshot is read-only")

    @replies_errno
    async def create(
        self,
        parent: InodeT,
        name: bytes,
        mode: int,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, EntryAttributes]:
        self._refuse(parent)
        raise AssertionError

    @replies_errno
    async def mknod(
        self,
        parent: InodeT,
        name: bytes,
        mode: int,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        self._refuse(parent)
        raise AssertionError

    @replies_errno
    async def symlink(
        self,
        parent: InodeT,
        name: bytes,
        target: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        self._refuse(parent)
        raise AssertionError

    @replies_errno
    async def link(
        self,
        inode: InodeT,
        new_parent: InodeT,
        new_name: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        self._refuse(new_parent)
        raise AssertionError

    @replies_errno
    async def unlink(
        self, parent: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse(parent)

    @replies_errno
    async def rename(
        self,
        parent_old: InodeT,
        name_old: bytes,
        parent_new: InodeT,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self._refuse(parent_old)

    @replies_errno
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        file = self._inventory.files.get(inode)
        if not isinstance(file, Disk):
            self._refuse(inode)
            raise AssertionError
        if fields.update_size and attr.st_size != file.size:
            is_open = fh is None and attr.st_size == 0
            if not (is_open and self._opened_by(ctx.pid, inode)):
                raise Refused("a disk has a fixed size")
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise Refused("owner and mode are those of the source")
        # Times are the source's; a write has changed them already.
        return self._attributes(inode)

    # -- extended attributes: what a script wants to know of one file

    @replies_errno
    async def getxattr(
        self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> bytes:
        value = self._xattrs(inode).get(os.fsdecode(name))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    @replies_errno
    async def listxattr(
        self, inode: InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[bytes]:
        return [name.encode() for name in self._xattrs(inode)]

    @replies_errno
    async def setxattr(
        self, inode: InodeT, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse_attributes(inode)

    @replies_errno
    async def removexattr(
        self, inode: InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        self._refuse_attributes(inode)

    def _refuse_attributes(self, inode: int) -> None:
        if isinstance(self._inventory.files.get(inode), Disk):
            raise Refused("extended attributes are read-only")
        self._refuse(inode)

    def _xattrs(self, inode: int) -> dict[str, str]:
        file = self._inventory.files.get(inode)
        if isinstance(file, Disk):
            found = {
                "state": "live",
                "disk": file.name,
                "cluster-size": str(file.cluster_size),
            }
        elif isinstance(file, Snapshot):
            found = {
                "state": "good" if file.lost is None else "broken",
                "created": _iso(file.created_ns),
                "disk": self._inventory.disk_by_id(file.disk_id).name,
                "cluster-size": str(file.cluster_size),
            }
            if file.lost is not None:
                found["reason"] = file.lost
        elif inode in (ROOT_INODE, SNAPSHOTS_INODE):
            found = {}
        else:
            group = self._group(inode)
            found = {
                "state": group.state,
                "created": _iso(group.created_ns),
                "disks": " ".join(sorted(group.inodes)),
            }
        return {f"user.fleecefs.{name}": value for name, value in found.items()}


def _fill_times(entry: EntryAttributes, time_ns: int) -> None:
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = time_ns


def _iso(time_ns: int) -> str:
    """Return a time as ISO 8601 in UTC, to the microsecond."""
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat().replace("+00:00", "Z")
