"""What one mount holds: its disks and their snapshots, kept in the state directory.

Both ways to a snapshot come here: mkdir on the mount and the control socket. What is
said to exist has been saved before: state.json is written ahead of every step that a
crash must not make untrue (state/directory.py).

`_control` serialises everything that changes the inventory. It is held across I/O, but
never by a data thread.
"""

import logging
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

from bitarray import bitarray

from fleecefs.bitmaps.mount import MountBitmaps
from fleecefs.bitmaps.steps import Step
from fleecefs.bitmaps.transfer import Import, export_bitmaps
from fleecefs.block.bitmap import LiveBits, Owner
from fleecefs.block.disk import (
    CLUSTER_SIZE_MAX,
    CLUSTER_SIZE_MIN,
    Disk,
    default_cluster_size,
    drained,
    freeze,
)
from fleecefs.block.epoch import Epoch, History, OnCbwError
from fleecefs.block.extent import Mapped
from fleecefs.block.raw import RawImage
from fleecefs.block.requests import Requests
from fleecefs.block.snapshot import Snapshot
from fleecefs.block.store import Budget
from fleecefs.errors import Busy, NameTaken, NoSpace, NotFound, NotUsable, describe
from fleecefs.killpoint import reached
from fleecefs.state import runtime
from fleecefs.state.directory import (
    DiskRecord,
    EpochRecord,
    MirrorRecord,
    PrivateRecord,
    SnapshotFileRecord,
    SnapshotRecord,
    State,
    StateDirectory,
    check_name,
    new_state,
)
from fleecefs.state.epochs import Budgets, End, EpochFiles, gone
from fleecefs.state.mirrors import DiskMirror, create_mirror, load_mirror
from fleecefs.state.sources import Sources
from fleecefs.units import MiB, format_size

log = logging.getLogger(__name__)

SNAPSHOTS_INODE = 2

# Named snapshots live for hours: the RAM tier takes the first burst of a busy guest.
RAM_LIMIT = 128 * MiB

# The guest is held back while a disk that is to move waits for its turn.
_MOVE_SECONDS = 0.05

_CHANGED = "the source was changed while it was not mounted"

Emit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Options:
    """How a mount treats its snapshots; what `fleecefs mount` was told."""

    store: Path | None = None
    store_limit: int | None = None
    ram_limit: int = RAM_LIMIT
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    cbw_timeout: float = 10.0
    cluster_size: int | None = None
    survives_host: bool = False
    # Whether persistent dirty bitmaps are loaded.
    has_bitmaps: bool = True


@dataclass(frozen=True)
class PrivateOptions:
    """A private snapshot of a disk. `key` names what keeps it over a crash, jobs/KEY.

    What is None is as the mount has it. `has_holes`: holes are told from zeroes.
    """

    disk: str
    key: str
    on_cbw_error: OnCbwError | None = None
    cbw_timeout: float | None = None
    has_holes: bool = False


class PrivateSnapshot:
    """A snapshot of one disk that only a job sees, and what it holds of the tiers.

    `broke` is called, in any thread, with the reason when it breaks.
    """

    def __init__(
        self, record: PrivateRecord, disk: Disk, snapshot: Snapshot, budgets: Budgets
    ) -> None:
        self.record = record
        self.disk = disk
        self.snapshot = snapshot
        self.budgets = budgets
        self.broke: Callable[[str], None] = lambda reason: None


class SnapshotGroup:
    """A snapshot as people see it: one instant of some disks."""

    def __init__(self, record: SnapshotRecord, snapshots: dict[str, Snapshot]) -> None:
        self.record = record
        self.name = record.name
        self.inode = record.inode
        self.created_ns = record.created_ns
        self.snapshots = snapshots
        self.inodes = {file.disk: file.inode for file in record.files}

    @property
    def state(self) -> str:
        is_good = all(s.lost is None for s in self.snapshots.values())
        return "good" if is_good else "broken"


class Inventory:
    """The disks and snapshots of one mount. Blocking and thread-safe."""

    def __init__(
        self,
        directory: StateDirectory,
        state: State,
        options: Options,
        emit: Emit,
    ) -> None:
        self.options = options
        self.state_path = directory.path
        self.runtime_path = runtime.mount_directory(UUID(state.id))
        self._runtime_lock = runtime.lock(self.runtime_path)
        self.store_path = options.store or directory.path
        self.budgets = Budgets(
            Budget(options.ram_limit, "ram"), Budget(options.store_limit, "disk")
        )
        self.bitmaps = MountBitmaps(
            self.runtime_path,
            directory.path,
            _limit(options.cbw_timeout),
            lambda: directory.save(state),
            self._bitmap_lost,
        )
        self.disks: dict[str, Disk] = {}
        self.inodes: dict[str, int] = {}
        self.snapshots: dict[str, SnapshotGroup] = {}
        self.private: dict[str, PrivateSnapshot] = {}
        # What the data threads serve, by inode number.
        self.files: dict[int, Disk | Snapshot] = {}
        self.changed_ns = time.time_ns()
        # Makes the kernel forget what it has cached of a snapshot's file.
        self.invalidate: Callable[[int], None] = lambda inode: None
        self._directory = directory
        self._state = state
        self._end = _end_before(state)
        self._emit = emit
        self._control = threading.Lock()
        self._has_closed = False
        # Disks whose sources somebody else has changed.
        self._changed: set[str] = set()
        self.sources = Sources()
        # What who mounts should know.
        self.notes: list[str] = []
        # By the key of their job.
        self.mirrors: dict[str, DiskMirror] = {}
        self._epoch_files: dict[Epoch, EpochFiles] = {}
        # Snapshots that broke under a guest's write; None ends the thread.
        self._broken: queue.SimpleQueue[tuple[Disk, Epoch, str] | None]
        self._broken = queue.SimpleQueue()
        # A daemon thread: nobody is left to end it if the daemon fails.
        self._recorder = threading.Thread(
            target=self._record_broken, name="recorder", daemon=True
        )

    # -- begin and end

    @classmethod
    def open(
        cls,
        state_path: Path,
        sources: dict[str, Path],
        options: Options,
        emit: Emit = lambda name, data: None,
    ) -> Self:
        """Lock and load everything; an error names what can not be used."""
        for name in sources:
            check_name(name, "disk")
            if name == "snapshots":
                raise NotUsable("a disk can not be called 'snapshots': use NAME=SOURCE")
        _check_cluster_size(options.cluster_size)
        if options.store is not None and not options.store.is_dir():
            raise NotUsable(f"store {options.store}: no such directory; make it")
        directory = StateDirectory.open(state_path)
        try:
            state = directory.load() or new_state(runtime.boot_id())
            self = cls(directory, state, options, emit)
        except BaseException:
            directory.close()
            raise
        try:
            self._load(sources)
        except BaseException:
            self.bitmaps.close_files()
            self._close_files()
            # The bits of a daemon that crashed are kept there.
            if self._state.is_clean:
                runtime.remove(self.runtime_path)
            raise
        self._recorder.start()
        self.bitmaps.save_from_now_on()
        return self

    def _load(self, sources: dict[str, Path]) -> None:
        state = self._state
        state.snapshots = [entry for entry in state.snapshots if entry.is_created]
        state.private = [p for p in state.private if self._is_kept(p, sources)]
        state.mirrors = [
            m for m in state.mirrors if self._has_job(m.key, m.disk, sources)
        ]
        lost = set(self._lost_files())
        self._forget_disks(set(sources))
        for name, path in sources.items():
            self._add_disk(name, path)
        for record in state.disks:
            self._load_epochs(record)
        for snapshot in state.snapshots:
            self._add_group(snapshot)
        for private in state.private:
            self._add_private(private)
        for mirror in list(state.mirrors):
            self._load_mirror(mirror)
        for record in state.disks:
            self._load_bitmaps(record)
        for name, disk_name, reason in set(self._lost_files()) - lost:
            log.error("snapshot %s of %s is broken: %s", name, disk_name, reason)
        reached("start.loaded")
        state.is_clean = False
        state.boot_id = runtime.boot_id()
        self._save()
        reached("start.saved")
        try:
            self.bitmaps.mark_in_use()
        except OSError:
            self._undo_start()
            raise
        for disk in self.disks.values():
            self._collect(disk)
        reached("start.collected")
        self._remove_orphans()

    def _undo_start(self) -> None:
        """Say again that the end was a clean one, if it was: nobody was served."""
        if self._end is End.CLEAN:
            self._directory.save(replace(self._state, is_clean=True))
            self._state.is_clean = True

    def _load_bitmaps(self, record: DiskRecord) -> None:
        self.bitmaps.load(
            record,
            self.disks[record.name],
            self._end,
            {private.key for private in self._state.private},
            changed=_CHANGED if record.name in self._changed else None,
            autoload=self.options.has_bitmaps,
        )

    def _is_kept(self, private: PrivateRecord, disks: Iterable[str]) -> bool:
        """Tell whether a job needs this snapshot to go on."""
        if self._end is End.HOST_CRASHED:
            # What was given up by then is not known any more.
            private.lost = private.lost or "the host went down"
        return private.is_created and self._has_job(private.key, private.disk, disks)

    def _has_job(self, key: str, disk: str, disks: Iterable[str]) -> bool:
        """Tell whether there is a job that goes on, if its disk is mounted."""
        return disk in disks and (self.state_path / "jobs" / f"{key}.json").exists()

    def _lost_files(self) -> Iterable[tuple[str, str, str]]:
        """Yield each broken part of a snapshot: snapshot, disk and reason."""
        for snapshot in self._state.snapshots:
            for file in snapshot.files:
                if file.lost is not None:
                    yield snapshot.name, file.disk, file.lost

    def _remove_orphans(self) -> None:
        """Remove epochs of which the state knows nothing: a crash left them."""
        known = {
            (record.name, f"{entry.number:04}")
            for record in self._state.disks
            for entry in record.epochs
        }
        for base in {self.state_path, self.runtime_path, self._store_base}:
            for path in base.glob("disks/*/epochs/*"):
                if (path.parts[-3], path.name) not in known:
                    shutil.rmtree(path, ignore_errors=True)
        for record in self._state.disks:
            numbers = {n for b in record.bitmaps for n in (b.number, b.frozen)}
            for path in self.runtime_path.glob(f"disks/{record.name}/bitmaps/*.bits"):
                if int(path.stem) not in numbers:
                    path.unlink()
        # Nor is what was counted of a disk that is left out: it comes back as another.
        for path in self.runtime_path.glob("disks/*"):
            if path.name not in self.disks:
                shutil.rmtree(path, ignore_errors=True)

    def _forget_disks(self, names: set[str]) -> None:
        """Drop disks of the state that are not mounted now, if nothing is lost."""
        for record in list(self._state.disks):
            if record.name in names:
                continue
            users = [
                f"snapshot {snapshot.name!r}"
                for snapshot in self._state.snapshots
                if any(file.disk == record.name for file in snapshot.files)
            ] + [f"bitmap {b.name!r}" for b in record.bitmaps if b.persistent]
            if record.former_sources:
                # Mounted again from where it was, it would be what it was then.
                users.append("its move by a mirror")
            if users:
                raise NotUsable(
                    f"state {self.state_path}: {users[0]} needs disk "
                    f"{record.name!r}: add --disk {record.name}={record.source}, "
                    "or give another --state directory"
                )
            self._state.disks.remove(record)

    def _add_disk(self, name: str, path: Path) -> None:
        record = self._disk_record(name)
        told = path
        path, source = self.sources.open(path, record)
        if path != told:
            note = f"disk {name!r} was moved by a mirror: it lives on {path}"
            self.notes.append(note)
            log.info(note)
        if record is None:
            record = self._new_record(name, path, source)
        self.sources.add(record, source)
        if self.sources.is_changed(record, self._state):
            self._lose_all(name, _CHANGED)
            self._changed.add(name)
        if record.size != source.size:
            record.epochs.clear()
            record.size = source.size
            record.source_size = 0
        wanted = self.options.cluster_size
        if wanted is not None and wanted != record.cluster_size:
            if record.epochs:
                raise NotUsable(
                    f"disk {name!r} has snapshots with a cluster size of "
                    f"{format_size(record.cluster_size)}: delete them, or mount "
                    "without --cluster-size"
                )
            record.cluster_size = wanted
        elif not record.epochs and wanted is None:
            record.cluster_size = default_cluster_size(source.size)
        record.source = str(path)
        record.source_inode = source.status().st_ino
        history = History(
            source,
            Requests(),
            record.cluster_size,
            timeout=_limit(self.options.cbw_timeout),
            broke=lambda epoch, reason: self._snapshot_broke(disk, epoch, reason),
        )
        live = self._live_counters(record)
        disk = Disk(name, UUID(record.id), source, history, live)
        self.disks[name] = disk
        self.inodes[name] = record.inode
        self.files[record.inode] = disk

    def _live_counters(self, record: DiskRecord) -> LiveBits:
        """Return what is counted of a disk, over a crash of the daemon."""
        path = self.runtime_path / "disks" / record.name / "counters"
        owner = Owner(UUID(record.id), 0, 0)
        if self._end is End.PROCESS_CRASHED and path.exists():
            return LiveBits.open(path, owner)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return LiveBits.create(path, owner)

    def _disk_record(self, name: str) -> DiskRecord | None:
        return next((disk for disk in self._state.disks if disk.name == name), None)

    def _new_record(self, name: str, path: Path, source: RawImage) -> DiskRecord:
        status = source.status()
        record = DiskRecord(
            name=name,
            id=str(uuid4()),
            inode=self._state.new_inode(),
            source=str(path),
            size=source.size,
            cluster_size=default_cluster_size(source.size),
            source_inode=status.st_ino,
            source_mtime_ns=status.st_mtime_ns,
        )
        self._state.disks.append(record)
        return record

    def _lose_all(self, disk: str, reason: str) -> None:
        for file in self._file_records(disk):
            file.lost = file.lost or reason

    def _file_records(self, disk: str) -> Iterable[SnapshotFileRecord | PrivateRecord]:
        for snapshot in self._state.snapshots:
            for file in snapshot.files:
                if file.disk == disk:
                    yield file
        for private in self._state.private:
            if private.disk == disk:
                yield private

    def _load_epochs(self, record: DiskRecord) -> None:
        """Open the epochs of a disk, and retire again what a crash left unretired.

        A snapshot reads its own epoch and all later ones: where one can not be opened,
        it and all older ones are lost.
        """
        reason = None
        snapshots = {file.epoch: file for file in self._file_records(record.name)}
        epochs: list[Epoch] = []
        for entry in reversed(record.epochs):
            file = snapshots.get(entry.number)
            is_private = isinstance(file, PrivateRecord)
            files = self._files_of(record, entry, is_private=is_private)
            policy = (
                OnCbwError(file.on_cbw_error) if file else self.options.on_cbw_error
            )
            if reason is None:
                try:
                    epoch = files.load(policy, self._end)
                except OSError as e:
                    reason = describe(e)
            if reason is not None:
                # It keeps its place until it is retired with its snapshot.
                epoch = gone(entry.number, reason, files.remove)
            if isinstance(file, PrivateRecord):
                epoch.timeout = _limit(file.cbw_timeout)
                epoch.has_holes = file.has_holes
            if file is None:
                epoch.lost = epoch.lost or "deleted"
            else:
                epoch.lost = file.lost = file.lost or epoch.lost
            self._epoch_files[epoch] = files
            epochs.insert(0, epoch)
        self.disks[record.name].history.load(epochs)

    def _files_of(
        self, record: DiskRecord, entry: EpochRecord, *, is_private: bool = False
    ) -> EpochFiles:
        place = Path("disks", record.name, "epochs", f"{entry.number:04}")
        return EpochFiles(
            disk_id=UUID(record.id),
            number=entry.number,
            size=record.size,
            cluster_size=record.cluster_size,
            runtime=self.runtime_path / place,
            state=self.state_path / place,
            store=self.state_path / entry.store,
            budgets=self.budgets.within() if is_private else self.budgets,
            survives_host=entry.durability == "host",
            is_private=is_private,
        )

    def stop(self) -> None:
        """Finish what is being changed, and change nothing any more."""
        self._control.acquire()

    def close(self) -> None:
        """Save everything; nobody reads or writes any more."""
        self._broken.put(None)
        self._recorder.join()
        with self._control:
            self._has_closed = True
            # Whose jobs have not ended: they do not go on.
            for private in list(self.private.values()):
                self._drop_private(private)
            for mirror in list(self.mirrors.values()):
                self._drop_mirror(mirror)
            self.bitmaps.close()
            reached("end.bitmaps")
            for epoch, files in list(self._epoch_files.items()):
                try:
                    files.save(epoch)
                except OSError as e:
                    self._lose_at_end(epoch, describe(e))
                reached("end.epoch")
            for record in self._state.disks:
                self._settle_source(record)
                reached("end.settled")
            self._state.is_clean = True
            try:
                self._save()
                reached("end.saved")
                runtime.remove(self.runtime_path)
                reached("end.removed")
            except OSError as e:
                # As after a crash: what is in the runtime directory counts.
                log.error(
                    "could not be saved: %s; snapshots last until the host goes down",
                    describe(e),
                )
            self._close_files()

    def _settle_source(self, record: DiskRecord) -> None:
        try:
            try:
                self.disks[record.name].flush()
            finally:
                self.sources.settle(record)
        except OSError as e:
            log.error("disk %s: %s", record.name, describe(e))

    def _lose_at_end(self, epoch: Epoch, reason: str) -> None:
        for disk in self.disks.values():
            if epoch in disk.history.epochs:
                # Older snapshots read from this epoch too.
                for other in disk.history.epochs:
                    if other.number <= epoch.number and other.lost is None:
                        other.lose(f"could not be saved: {reason}")
                self._note_lost(disk)
                log.error("disk %s: a snapshot is lost: %s", disk.name, reason)

    def _close_files(self) -> None:
        self.sources.close()
        os.close(self._runtime_lock)
        self._directory.close()

    def _save(self) -> None:
        for record in self._state.disks:
            live = {epoch.number for epoch in self.disks[record.name].history.epochs}
            record.epochs = [e for e in record.epochs if e.number in live]
        self._directory.save(self._state)
        self.bitmaps.collect()

    def _save_gone(self) -> None:
        """Save that epochs or snapshots are gone, if possible.

        They are gone in any case: who loads a state that still has them finds no files.
        """
        try:
            self._save()
        except OSError as e:
            log.error("could not be saved: %s", describe(e))

    # -- snapshots

    def create_snapshot(
        self,
        name: str,
        disks: Sequence[str] | None = None,
        steps: Sequence[Step] = (),
    ) -> SnapshotGroup:
        """Freeze all or some disks at one instant, under a new name.

        `steps` are what happens to bitmaps at the same instant. Raises BadName,
        NameTaken, NotFound for a disk, OSError if there is no room.
        """
        check_name(name, "snapshot")
        with self._control:
            if name in self.snapshots:
                raise NameTaken(f"snapshot {name!r} exists")
            chosen = self._choose(disks)
            record = SnapshotRecord(name, self._state.new_inode(), 0, 0, [])
            epochs = []
            prepared: list[Step] = []
            try:
                self._prepare(steps, prepared)
                for disk in chosen:
                    epochs.append(self._prepare_epoch(disk, record))
                    reached("create.prepared")
                self._state.snapshots.append(record)
                # Ahead of the instant: what is overwritten afterwards may be kept in
                # these epochs only, also for older snapshots.
                self._directory.save(self._state)
                reached("create.saved")
                begin = time.monotonic_ns()
                freeze(chosen, epochs, _disks_of(steps), partial(_apply, steps))
                reached("create.frozen")
                record.held_ns = time.monotonic_ns() - begin
                record.created_ns = time.time_ns()
                for disk, epoch in zip(chosen, epochs, strict=True):
                    if self._epoch_files[epoch].survives_host:
                        # What nobody overwrites stays on the source: it has to last.
                        disk.flush()
                reached("create.flushed")
                record.is_created = True
                self._save()
                reached("create.recorded")
            except BaseException:
                _undo(prepared)
                self._undo_create(chosen, epochs, record)
                raise
            group = self._add_group(record)
            self._finish(steps)
        self._emit(
            "FLEECEFS_SNAPSHOT_CREATED",
            {
                "name": name,
                "disks": [disk.name for disk in chosen],
                "created": record.created_ns / 1e9,
                "held": record.held_ns / 1e9,
            },
        )
        log.info(
            "snapshot %s of %d disks created, writers held for %.1f ms",
            name,
            len(chosen),
            record.held_ns / 1e6,
        )
        return group

    @property
    def _store_base(self) -> Path:
        """Where this state's directories are in the store."""
        if self.options.store is None:
            return self.state_path
        return self.options.store / self._state.id

    def _choose(self, names: Sequence[str] | None) -> list[Disk]:
        if names is None:
            return list(self.disks.values())
        if not names:
            raise NotUsable("a snapshot of no disk")
        return [self.find_disk(name) for name in dict.fromkeys(names)]

    def find_disk(self, name: str) -> Disk:
        """Return a disk by name; NotFound if there is none."""
        if name not in self.disks:
            raise NotFound(
                f"no disk {name!r}; there are {', '.join(sorted(self.disks))}"
            )
        return self.disks[name]

    def own_places(self) -> list[Path]:
        """Return the directories that only we write to."""
        return [self.state_path, self.runtime_path, self._store_base]

    def _prepare_epoch(self, disk: Disk, snapshot: SnapshotRecord) -> Epoch:
        epoch = self._create_epoch(disk, self.options.on_cbw_error)
        snapshot.files.append(
            SnapshotFileRecord(
                disk.name,
                self._state.new_inode(),
                epoch.number,
                disk.allocated(),
                epoch.on_cbw_error.value,
            )
        )
        return epoch

    def _create_epoch(
        self,
        disk: Disk,
        on_cbw_error: OnCbwError,
        *,
        is_private: bool = False,
    ) -> Epoch:
        record = self._record_of(disk)
        place = Path("disks", disk.name, "epochs", f"{record.next_epoch:04}")
        # Relative if it is in the state directory, which may move or be copied.
        store = place if self.options.store is None else self._store_base / place
        survives_host = self._has_to_survive_host(record, is_private=is_private)
        durability = "host" if survives_host else "process"
        entry = EpochRecord(record.next_epoch, str(store), durability)
        record.next_epoch += 1
        files = self._files_of(record, entry, is_private=is_private)
        try:
            epoch = files.create(on_cbw_error)
            if is_private:
                # Now, so that there is room for it later.
                epoch.denied = epoch.make_denied()
        except OSError as e:
            files.remove()
            raise OSError(e.errno, f"no new snapshot: {describe(e)}") from None
        record.epochs.append(entry)
        self._epoch_files[epoch] = files
        return epoch

    def _has_to_survive_host(self, record: DiskRecord, *, is_private: bool) -> bool:
        """Tell what a new epoch has to survive; older snapshots read it too.

        But no private one does: what was given up of it is not known afterwards.
        """
        durable = {e.number for e in record.epochs if e.durability == "host"}
        return (self.options.survives_host and not is_private) or any(
            file.epoch in durable and file.lost is None
            for file in self._file_records(record.name)
            if not isinstance(file, PrivateRecord)
        )

    def _undo_create(
        self, disks: list[Disk], epochs: list[Epoch], record: SnapshotRecord
    ) -> None:
        if record in self._state.snapshots:
            self._state.snapshots.remove(record)
        self._undo_epochs(disks, epochs)

    def _undo_epochs(self, disks: list[Disk], epochs: list[Epoch]) -> None:
        for disk, epoch in zip(disks, epochs, strict=False):
            if epoch in disk.history.epochs:
                disk.history.retire(epoch, "never created")
                self._collect(disk)
            else:
                epoch.drop()
                self._epoch_files.pop(epoch, None)
        self._save_gone()

    def _add_group(self, record: SnapshotRecord) -> SnapshotGroup:
        snapshots = {}
        for file in record.files:
            disk = self.disks[file.disk]
            epoch = next(
                (e for e in disk.history.epochs if e.number == file.epoch), None
            )
            if epoch is None:
                epoch = _nothing_left(file)
            file.lost = file.lost or epoch.lost
            snapshots[file.disk] = Snapshot(
                disk.id,
                disk.history,
                epoch,
                size=disk.size,
                created_ns=record.created_ns,
                allocated=file.allocated,
            )
            self.files[file.inode] = snapshots[file.disk]
        group = SnapshotGroup(record, snapshots)
        self.snapshots[record.name] = group
        self.changed_ns = time.time_ns()
        return group

    def delete_snapshot(self, name: str) -> None:
        """Delete a snapshot; whoever still reads it gets EIO. NotFound if none."""
        with self._control:
            group = self.snapshots.get(name)
            if group is None:
                raise NotFound(f"no snapshot {name!r}")
            # Out of the state before any of its data goes.
            self._state.snapshots.remove(group.record)
            try:
                self._directory.save(self._state)
            except OSError:
                self._state.snapshots.append(group.record)
                raise
            reached("delete.saved")
            del self.snapshots[name]
            for file in group.record.files:
                del self.files[file.inode]
                disk = self.disks[file.disk]
                epoch = group.snapshots[file.disk].epoch
                disk.history.retire(epoch, "the snapshot has been deleted")
                self.invalidate(file.inode)
                reached("delete.retired")
                self._collect(disk)
                reached("delete.collected")
            self._save_gone()
            self.changed_ns = time.time_ns()
        self._emit("FLEECEFS_SNAPSHOT_DELETED", {"name": name})
        log.info("snapshot %s deleted", name)

    # -- private snapshots

    def create_private(
        self, wanted: Sequence[PrivateOptions], steps: Sequence[Step] = ()
    ) -> list[PrivateSnapshot]:
        """Freeze disks at one instant, each for a job; nobody else sees it.

        `steps` are what happens to bitmaps at the same instant. Raises NotFound for a
        disk, OSError if there is no room; then nothing is left. Over a crash of the
        daemon a snapshot is kept if its job is (jobs/KEY.json).
        """
        with self._control:
            self.check_open()
            disks: list[Disk] = []
            epochs: list[Epoch] = []
            records: list[PrivateRecord] = []
            before = list(self._state.private)
            prepared: list[Step] = []
            try:
                self._prepare(steps, prepared)
                for options in wanted:
                    disk = self.find_disk(options.disk)
                    disks.append(disk)
                    epochs.append(self._create_private_epoch(disk, options))
                    reached("private.prepared")
                    records.append(self._private_record(disk, epochs[-1], options.key))
                self._state.private = before + records
                # Ahead of the instant, as for all snapshots.
                self._directory.save(self._state)
                reached("private.saved")
                freeze(disks, epochs, _disks_of(steps), partial(_apply, steps))
                reached("private.frozen")
                now = time.time_ns()
                for record in records:
                    record.created_ns = now
                    record.is_created = True
                self._save()
                reached("private.recorded")
            except BaseException:
                self._state.private = before
                _undo(prepared)
                self._undo_epochs(disks, epochs)
                raise
            self._finish(steps)
            return [self._add_private(record) for record in records]

    def check_open(self) -> None:
        """Raise Busy once the end has begun."""
        if self._has_closed:
            raise Busy("the mount is ending")

    def _create_private_epoch(self, disk: Disk, options: PrivateOptions) -> Epoch:
        on_cbw_error = options.on_cbw_error or self.options.on_cbw_error
        epoch = self._create_epoch(disk, on_cbw_error, is_private=True)
        seconds = options.cbw_timeout
        if seconds is None:
            seconds = self.options.cbw_timeout
        epoch.timeout = _limit(seconds)
        epoch.has_holes = options.has_holes
        return epoch

    def _private_record(self, disk: Disk, epoch: Epoch, key: str) -> PrivateRecord:
        assert epoch.timeout is not None
        return PrivateRecord(
            key=key,
            disk=disk.name,
            epoch=epoch.number,
            created_ns=0,
            allocated=disk.allocated(),
            on_cbw_error=epoch.on_cbw_error.value,
            cbw_timeout=0.0 if math.isinf(epoch.timeout) else float(epoch.timeout),
            has_holes=epoch.has_holes,
        )

    def _add_private(self, record: PrivateRecord) -> PrivateSnapshot:
        disk = self.disks[record.disk]
        epoch = next((e for e in disk.history.epochs if e.number == record.epoch), None)
        if epoch is None:
            epoch = gone(record.epoch, record.lost or "its epoch is missing")
        record.lost = record.lost or epoch.lost
        snapshot = Snapshot(
            disk.id,
            disk.history,
            epoch,
            size=disk.size,
            created_ns=record.created_ns,
            allocated=record.allocated,
        )
        files = self._epoch_files.get(epoch)
        budgets = files.budgets if files is not None else self.budgets.within()
        private = PrivateSnapshot(record, disk, snapshot, budgets)
        self.private[record.key] = private
        return private

    def delete_private(self, private: PrivateSnapshot) -> None:
        """Delete a private snapshot; no-op if that has been done."""
        with self._control:
            if self._has_closed or private.record.key not in self.private:
                return
            self._drop_private(private)
            self._save_gone()

    def _drop_private(self, private: PrivateSnapshot) -> None:
        del self.private[private.record.key]
        self._thaw(private.record.key, is_copied=False)
        self._state.private.remove(private.record)
        # Out of the state before any of its data goes.
        self._save_gone()
        reached("private.forgotten")
        private.disk.history.retire(private.snapshot.epoch, "its job has ended")
        self._collect(private.disk)
        reached("private.dropped")

    # -- mirrors

    def create_mirror(
        self, name: str, key: str, granularity: int, *, lacks_all: bool
    ) -> DiskMirror:
        """Record from now on what the target of a mirror lacks, for the job KEY.

        All, or only what is written from now on. Raises NotFound for a disk, Busy if it
        has a mirror, OSError if there is no room; then nothing is left.
        """
        with self._control:
            self.check_open()
            record = MirrorRecord(key, name, granularity)
            disk, timeout = self.find_disk(name), _limit(self.options.cbw_timeout)
            mirror = create_mirror(record, disk, self.runtime_path, timeout)
            if lacks_all:
                mirror.mirror.mark_dirty(0, disk.size)
            self._state.mirrors.append(record)
            try:
                mirror.begin()
                reached("mirror.begun")
                self._directory.save(self._state)
                reached("mirror.saved")
            except BaseException:
                self._state.mirrors.remove(record)
                mirror.end()
                raise
            self.mirrors[key] = mirror
            return mirror

    def _load_mirror(self, record: MirrorRecord) -> None:
        timeout = _limit(self.options.cbw_timeout)
        disk, mirror = self.disks[record.disk], None
        # Another source, or another boot: the bits say nothing any more.
        if self._end is End.PROCESS_CRASHED and record.disk not in self._changed:
            mirror = load_mirror(record, disk, self.runtime_path, timeout)
        if mirror is None:
            self._state.mirrors.remove(record)
        else:
            self.mirrors[record.key] = mirror

    def end_mirror(self, mirror: DiskMirror) -> None:
        """Record no longer for a mirror; no-op if that has been done."""
        with self._control:
            if not self._has_closed and mirror.record.key in self.mirrors:
                self._drop_mirror(mirror)
                self._save_gone()

    def _drop_mirror(self, mirror: DiskMirror) -> None:
        del self.mirrors[mirror.record.key]
        self._state.mirrors.remove(mirror.record)
        mirror.end()

    def move_disk(self, mirror: DiskMirror, target: RawImage, path: Path) -> None:
        """Let a disk live on the target of its mirror from now on.

        The disk is drained, both are alike, and the target is durable. The state says
        on which side the disk is, and that the mirror has ended, in one step: killed
        before it, the disk is where it was, and afterwards on the target. Busy if the
        inventory is being changed for too long, and whatever saving raises: then the
        disk is where it was.
        """
        if not self._control.acquire(timeout=_MOVE_SECONDS):
            raise Busy("the inventory is being changed")
        try:
            self.check_open()
            disk, record = mirror.disk, self._record_of(mirror.disk)
            before = replace(record)
            self.sources.move(record, path, target)
            self._state.mirrors.remove(mirror.record)
            try:
                self._directory.save(self._state)
            except OSError as e:
                # What the next daemon would find decides.
                if not self._has_saved_source(record):
                    vars(record).update(vars(before))
                    self._state.mirrors.append(mirror.record)
                    raise
                log.error("%s; a crash of the host may undo the move", describe(e))
            reached("move.saved")
            disk.move(target)
            self.sources.replace(disk.id, target)
            del self.mirrors[mirror.record.key]
            mirror.end()
            reached("move.done")
        finally:
            self._control.release()
        log.info(
            "disk %s lives on %s now, moved from %s", disk.name, path, before.source
        )

    def _has_saved_source(self, record: DiskRecord) -> bool:
        try:
            state = self._directory.load()
        except OSError:
            return False
        return state is not None and any(
            disk.id == record.id and disk.source == record.source
            for disk in state.disks
        )

    def lives_on(self, name: str, path: Path) -> bool:
        """Tell whether a path is that of a disk's source."""
        disk = self.disks.get(name)
        if disk is None:
            return False
        source = self._record_of(disk).source
        return os.path.realpath(source) == os.path.realpath(path)

    def forget_job(self, key: str) -> None:
        """Let go of what is kept for a job that does not go on."""
        if key in self.private:
            self.delete_private(self.private[key])
        if key in self.mirrors:
            self.end_mirror(self.mirrors[key])

    # -- dirty bitmaps

    def change_bitmaps(self, steps: Sequence[Step]) -> None:
        """Do things to bitmaps, all at one instant, or nothing; see bitmaps/steps.py.

        An error after the instant says what could not be made durable; the bitmaps are
        right nevertheless.
        """
        with self._control:
            self.check_open()
            prepared: list[Step] = []
            try:
                self._prepare(steps, prepared)
                self._save()
                reached("bitmaps.prepared")
                with drained(_disks_of(steps)):
                    _apply(steps)
                reached("bitmaps.applied")
            except BaseException:
                _undo(prepared)
                self._save_gone()
                raise
            error = self._finish(steps)
        if error is not None:
            raise error

    def save_bitmaps(self, disks: Sequence[str]) -> None:
        """Save the persistent bitmaps of these disks now; OSError if that fails."""
        with self._control:
            self.check_open()
            for disk in disks:
                self.bitmaps.find(disk).save()

    def export_bitmaps(
        self, disk: str, path: Path, names: Sequence[str] | None = None
    ) -> list[str]:
        """Write bitmaps of a disk to a new file, for another host; return which.

        It is of use as long as nobody writes to the disk.
        """
        self.bitmaps.containers.check_place(str(path))
        with self._control:
            self.check_open()
            return export_bitmaps(self.bitmaps.find(disk), path, names)

    def import_bitmaps(
        self, disk: str, path: Path, names: Sequence[str] | None = None
    ) -> list[str]:
        """Add the bitmaps that were exported where the disk was before; return which.

        NotUsable if it is another disk, or has been written to since.
        """
        self.bitmaps.containers.check_place(str(path))
        record = self._record_of(self.find_disk(disk))
        others = {UUID(r.id): r.name for r in self._state.disks if r is not record}
        step = Import(record, path, names, others)
        self.change_bitmaps([step])
        return step.names

    def _prepare(self, steps: Sequence[Step], prepared: list[Step]) -> None:
        for step in steps:
            step.prepare(self.bitmaps.find)
            prepared.append(step)

    def _finish(self, steps: Sequence[Step]) -> OSError | None:
        """Make durable what steps have done; return what went wrong first."""
        error = None
        for step in steps:
            try:
                step.finish()
            except OSError as e:
                log.error("bitmaps could not be saved: %s", describe(e))
                error = error or e
        if steps:
            reached("bitmaps.finished")
            self._save_gone()
            self.bitmaps.save_from_now_on()
        return error

    def settle_bitmap(self, key: str) -> None:
        """Do what may fail before a job lets its bitmap begin anew; OSError if it does.

        The source is flushed, which may take long. No-op for a job without a bitmap.
        """
        found = self.bitmaps.find_frozen(key)
        if found is not None and found[1].is_stored:
            found[0].settle_past()

    def end_bitmap(self, key: str, left: bitarray | None) -> None:
        """End a job's use of its bitmap: all is copied but `left`, in clusters.

        None is what it had before: nothing counts as copied. Where something does,
        `settle_bitmap` has come before. No-op for a job without a bitmap, or if that
        has been done.
        """
        with self._control:
            if self._has_closed:
                return
            self._thaw(key, is_copied=left is not None, left=left)
            self._save_gone()

    def _thaw(self, key: str, *, is_copied: bool, left: bitarray | None = None) -> None:
        found = self.bitmaps.find_frozen(key)
        if found is None:
            return
        bitmaps, held = found
        if left is not None and left.any():
            held.bitmap.add(left, bitmaps.disk.cluster_size)
            try:
                # The log knows what was written, and not what was not copied.
                bitmaps.save_if_stored(held)
            except OSError as e:
                log.error("bitmaps could not be saved: %s", describe(e))
        bitmaps.thaw(held, is_copied=is_copied)
        reached("bitmap.thawed")

    def _bitmap_lost(self, disk: str, name: str, reason: str) -> None:
        self._emit(
            "FLEECEFS_BITMAP_INCONSISTENT",
            {"disk": disk, "name": name, "reason": reason},
        )

    def _collect(self, disk: Disk) -> None:
        disk.history.collect()
        for epoch in list(self._epoch_files):
            if not any(epoch in d.history.epochs for d in self.disks.values()):
                del self._epoch_files[epoch]

    def _snapshot_broke(self, disk: Disk, epoch: Epoch, reason: str) -> None:
        """Let readers see it before the guest's write goes on; record it soon."""
        for inode, file in list(self.files.items()):
            if isinstance(file, Snapshot) and file.epoch is epoch:
                self.invalidate(inode)
        for private in list(self.private.values()):
            if private.snapshot.epoch is epoch:
                private.broke(reason)
        self._broken.put((disk, epoch, reason))

    def _record_broken(self) -> None:
        """Record snapshots that broke and free what they held, as they break."""
        while (item := self._broken.get()) is not None:
            disk, epoch, reason = item
            with self._control:
                name = self._note_lost(disk, epoch)
                self._save_gone()
                reached("break.saved")
                self._collect(disk)
            if name is not None:
                log.error("snapshot %s of %s is broken: %s", name, disk.name, reason)
                self._emit(
                    "FLEECEFS_SNAPSHOT_BROKEN",
                    {"name": name, "disk": disk.name, "reason": reason},
                )

    def _note_lost(self, disk: Disk, epoch: Epoch | None = None) -> str | None:
        """Copy brokenness into the records; return the snapshot of an epoch."""
        found = None
        for group in self.snapshots.values():
            snapshot = group.snapshots.get(disk.name)
            if snapshot is None:
                continue
            for file in group.record.files:
                if file.disk == disk.name:
                    file.lost = snapshot.lost
            if snapshot.epoch is epoch:
                found = group.name
        for private in self.private.values():
            private.record.lost = private.snapshot.lost
        return found

    def check_end(self) -> None:
        """Raise NoSpace if ending now would lose a snapshot for want of space.

        What is in the RAM tier moves to the disk tier at a clean end.
        """
        needed = self.budgets.ram.used
        found = os.statvfs(self.store_path)
        free = found.f_bavail * found.f_frsize
        limit, used = self.budgets.disk.limit, self.budgets.disk.used
        if limit is not None:
            free = min(free, limit - used)
        if needed > free:
            raise NoSpace(
                f"the store {self.store_path} has {format_size(max(0, free))} left, "
                f"and {format_size(needed)} of snapshots are in RAM: make room, delete "
                "a snapshot, or use --force and lose them"
            )

    # -- what people and programs want to know

    def sorted_snapshots(self) -> list[SnapshotGroup]:
        return sorted(self.snapshots.values(), key=lambda group: group.created_ns)

    def disk_by_id(self, disk_id: UUID) -> Disk:
        return next(disk for disk in self.disks.values() if disk.id == disk_id)

    def describe_disks(self) -> list[dict[str, Any]]:
        return [
            {
                "name": disk.name,
                "source": self._record_of(disk).source,
                "size": disk.size,
                "cluster-size": disk.cluster_size,
                "id": str(disk.id),
                "flush-error": disk.flush_error,
                "snapshots": sum(
                    disk.name in group.snapshots for group in self.snapshots.values()
                ),
                "reads": disk.reads,
                "writes": disk.writes,
            }
            for disk in list(self.disks.values())
        ]

    def _record_of(self, disk: Disk) -> DiskRecord:
        record = self._disk_record(disk.name)
        assert record is not None
        return record

    def describe_snapshots(self) -> list[dict[str, Any]]:
        return [self._describe(group) for group in self.sorted_snapshots()]

    def describe_snapshot(self, name: str) -> dict[str, Any]:
        group = self.snapshots.get(name)
        if group is None:
            raise NotFound(f"no snapshot {name!r}")
        return self._describe(group)

    def _describe(self, group: SnapshotGroup) -> dict[str, Any]:
        return {
            "name": group.name,
            "created": group.created_ns / 1e9,
            "state": group.state,
            "held": group.record.held_ns / 1e9,
            "disks": [
                _describe_file(name, snapshot)
                for name, snapshot in sorted(group.snapshots.items())
            ],
        }

    def map(self, path: str, offset: int = 0, count: int = 10000) -> dict[str, Any]:
        """Return up to `count` extents of a file, named as on the mount."""
        file = self._find(path)
        extents: list[Mapped] = []
        end = offset
        for mapped in file.map(offset, file.size):
            if extents and extents[-1].where == mapped.where:
                last = extents.pop()
                mapped = Mapped(last.offset, last.length + mapped.length, last.where)
            elif len(extents) == count:
                break
            extents.append(mapped)
            end = mapped.end
        return {
            "size": file.size,
            "extents": [
                {
                    "start": mapped.offset,
                    "length": mapped.length,
                    "data": mapped.is_data,
                    "where": mapped.where,
                }
                for mapped in extents
            ],
            "next": end if end < file.size else None,
        }

    def _find(self, path: str) -> Disk | Snapshot:
        match path.strip("/").split("/"):
            case [name] if name in self.disks:
                return self.disks[name]
            case ["snapshots", group, name] if group in self.snapshots:
                if name in self.snapshots[group].snapshots:
                    return self.snapshots[group].snapshots[name]
        raise NotFound(f"no disk or snapshot file {path!r}")


def _disks_of(steps: Iterable[Step]) -> list[Disk]:
    concerned = [bitmaps.disk for step in steps for bitmaps in step.concerned()]
    return list(dict.fromkeys(concerned))


def _apply(steps: Iterable[Step]) -> None:
    for step in steps:
        step.apply()
        reached("bitmap.applied")


def _undo(prepared: Sequence[Step]) -> None:
    for step in reversed(prepared):
        step.undo()


def _end_before(state: State) -> End:
    """Return how the daemon that saved a state ended."""
    if state.is_clean:
        return End.CLEAN
    is_same_boot = state.boot_id == runtime.boot_id()
    return End.PROCESS_CRASHED if is_same_boot else End.HOST_CRASHED


def _limit(seconds: float) -> float:
    """Return how long a cbw-timeout is: as in QEMU, 0 is no limit."""
    return seconds or math.inf


def _check_cluster_size(size: int | None) -> None:
    if size is None:
        return
    if size & (size - 1) or not CLUSTER_SIZE_MIN <= size <= CLUSTER_SIZE_MAX:
        raise NotUsable(
            f"cluster size of {size} bytes: has to be a power of two from "
            f"{format_size(CLUSTER_SIZE_MIN)} to {format_size(CLUSTER_SIZE_MAX)}"
        )


def _nothing_left(file: SnapshotFileRecord) -> Epoch:
    """Return a stand-in for the epoch of a broken snapshot, which is gone."""
    return gone(file.epoch, file.lost or "its epoch is missing")


def _describe_file(name: str, snapshot: Snapshot) -> dict[str, Any]:
    epoch = snapshot.epoch
    used = {"ram": 0, "disk": 0, **epoch.store.used()} if epoch.lost is None else {}
    preserved = 0 if epoch.lost is not None else epoch.preserved.count()
    return {
        "name": name,
        "state": "good" if snapshot.lost is None else "broken",
        "reason": snapshot.lost,
        "size": snapshot.size,
        "preserved": preserved * snapshot.cluster_size,
        "ram": used.get("ram", 0),
        "disk": used.get("disk", 0),
    }
