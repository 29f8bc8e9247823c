"""The dirty bitmaps of one disk, and their files.

    RUNTIME/disks/NAME/bitmaps/0007.bits   the bits in use
    STATE/disks/NAME/bitmaps/              bitmaps.qcow2, the container of those that
                                           have no other; activity.log

In use, the bits of the runtime directory count. Persistent bitmaps are saved now and
then, and at a clean end; as long as they are in use their container says so, for other
programs. What was written since they were saved last is in the activity log, in areas:
after a crash of the host a bitmap is what was saved, and all of those areas.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bitarray import bitarray

from fleecefs.bitmaps.containers import Containers, OpenContainer
from fleecefs.block.bitmap import LiveBits, Owner, make_directory
from fleecefs.block.dirty import DirtyBitmap, Recorder
from fleecefs.block.disk import Disk
from fleecefs.errors import Busy, NameTaken, NotFound, NotUsable, describe
from fleecefs.killpoint import reached
from fleecefs.qcow2.bitmaps import Entry
from fleecefs.qcow2.container import Bitmap
from fleecefs.state.activity_log import AREA_SIZE, ActivityLog
from fleecefs.state.directory import BitmapRecord, DiskRecord
from fleecefs.state.epochs import End

log = logging.getLogger(__name__)

_LEFT_IN_USE = "was in use when its file was left"
_NOT_LOADED = "the disk was mounted with --bitmaps no"
_VOID = "another program has changed its file without the bitmaps"

# Of the numbers that are kept with the bits in use.
_UNLOGGED = 0

# How long a write waits until a log that has failed says so durably.
_VOID_SECONDS = 5.0


class HeldBitmap:
    """A bitmap, what the state says of it, and where its bits are."""

    def __init__(
        self,
        record: BitmapRecord,
        bitmap: DirtyBitmap,
        live: LiveBits,
        container: OpenContainer | None = None,
    ) -> None:
        self.record = record
        self.bitmap = bitmap
        self.live = live
        self.frozen: LiveBits | None = None
        self.container = container
        # A step that is prepared will give it other bits.
        self.is_swapping = False

    @property
    def is_stored(self) -> bool:
        """Whether its container is to say what it is."""
        return self.container is not None and self.bitmap.inconsistent is None

    @property
    def is_unlogged(self) -> bool:
        """Whether it has bits that neither its container nor the log may have."""
        return bool(self.live.counters[_UNLOGGED])

    @is_unlogged.setter
    def is_unlogged(self, value: bool) -> None:
        self.live.counters[_UNLOGGED] = value

    def lose(self, reason: str | None) -> None:
        """Say that writes may be missing, or not any more; it survives the daemon."""
        self.live.note = reason or ""
        self.record.inconsistent = self.bitmap.inconsistent = reason


class Saved(NamedTuple):
    """A container, and what happened to the disk since bitmaps were saved there.

    changed     why writes may have been missed, or None
    areas       what was written before a crash of the host, in areas, if that is known
    log_error   why it is not
    """

    container: OpenContainer
    place: str
    end: End = End.CLEAN
    changed: str | None = None
    areas: bitarray | None = None
    log_error: str | None = None

    def problem(self, entry: Entry, was_recording: bool) -> str | None:
        """Return why a bitmap may lack writes, or None."""
        if self.end is End.CLEAN and entry.is_in_use:
            return _LEFT_IN_USE
        return self.log_error or self.changed if was_recording else None


class DiskBitmaps:
    """All bitmaps of one disk. What changes them runs in one thread at a time.

    `save_state` makes durable what the records say. `lost` is called, in any thread,
    with a name and a reason when one has become inconsistent.
    """

    def __init__(
        self,
        record: DiskRecord,
        disk: Disk,
        *,
        runtime: Path,
        state: Path,
        containers: Containers,
        timeout: float,
        save_state: Callable[[], None],
        lost: Callable[[str, str], None] = lambda name, reason: None,
    ) -> None:
        self.disk = disk
        self.held: dict[str, HeldBitmap] = {}
        self._record = record
        self._runtime = runtime / "disks" / record.name / "bitmaps"
        self._state = state
        self._place = Path("disks", record.name, "bitmaps")
        self._containers = containers
        self._open: dict[str, OpenContainer] = {}
        # Those that are being removed; that may come to nothing.
        self._leaving: list[HeldBitmap] = []
        self._timeout = timeout
        self._save_state = save_state
        self._lost = lost
        # What removes files, once the state that does without them is saved.
        self.garbage: list[Callable[[], None]] = []
        self._log: ActivityLog | None = None
        # Of which a command that was cut short may have left less in a container than
        # there is.
        self._cut_short: list[HeldBitmap] = []
        self._saving = threading.Lock()
        self._voiding = threading.Lock()

    # -- begin and end

    def load(
        self, end: End, jobs: Collection[str], *, changed: str | None, autoload: bool
    ) -> None:
        """Take over the bitmaps of the daemon before; what can not be used says so.

        `jobs` are the keys of those that go on; `changed` is why writes to the disk may
        have been missed, or None. The disk is not served yet: before it is,
        `mark_in_use` has to be called.
        """
        # Without a container it was to be added only.
        self._record.bitmaps = [
            b for b in self._record.bitmaps if b.container or not b.persistent
        ]
        if end is End.PROCESS_CRASHED:
            for record in self._record.bitmaps:
                if record.is_loaded:
                    self._load_live(record, jobs, changed)
            self._open_for_strays()
            if self._open:
                self._go_on()
        else:
            self._record.bitmaps = [b for b in self._record.bitmaps if b.persistent]
            self._load_saved(end, changed, autoload=autoload)
            if any(each.is_stored for each in list(self.held.values())):
                self.provide_log()
        reached("bitmaps.loaded")
        self.update_recorder()

    def _open_for_strays(self) -> None:
        """Open our container also if no bitmap of ours is known to be in it.

        The first one may have come there by a command that was cut short.
        """
        place = self._place_of(None)
        if place in self._open or not (self._state / place).exists():
            return
        with contextlib.suppress(OSError):
            container = self.container(place)
            self._remove_strays(container, self._persistent())
            self._release_unused()

    def _load_live(
        self, record: BitmapRecord, jobs: Collection[str], changed: str | None
    ) -> None:
        reason, live, frozen = record.inconsistent, None, None
        if record.recording:
            reason = reason or changed
        try:
            live = self._open_bits(record.number, record.granularity)
            if record.frozen is not None:
                frozen = self._open_bits(record.frozen, record.granularity)
        except OSError as e:
            reason = reason or describe(e)
        if live is None:
            live = self.create_bits(record)
        held = self._hold(record, live, reason or live.note)
        if frozen is not None:
            held.frozen, held.bitmap.frozen = frozen, frozen.bits
            if record.job not in jobs:
                self.thaw(held, is_copied=False)
        if frozen is not None or held.is_unlogged:
            self._cut_short.append(held)
        if record.persistent:
            self._attach(held)
        else:
            # Where it was about to be when a command was cut short.
            record.container = ""

    def _attach(self, held: HeldBitmap) -> None:
        """Open the container of a bitmap that is in use already."""
        try:
            container = self.container(held.record.container)
        except OSError as e:
            held.lose(self._unusable(held.record.container, e))
            return
        held.container = container
        container.claimed.add(held.record.name)
        if held.record.name not in container.entries:
            self._cut_short.append(held)

    def _load_saved(self, end: End, changed: str | None, *, autoload: bool) -> None:
        logged = self._logged(end)
        known = {(b.container, b.name): b for b in self._record.bitmaps}
        self._record.bitmaps = []
        places = {place for place, _ in known}
        taken = {name for _, name in known}
        default = self._place_of(None)
        if (self._state / default).exists():
            places.add(default)
        for place in sorted(places):
            mine = {name: b for (at, name), b in known.items() if at == place}
            try:
                container = self.container(place)
            except Busy:
                # Nothing has been written yet: whoever mounts can see to it.
                raise
            except OSError as e:
                reason = self._unusable(place, e)
                for record in mine.values():
                    self._lose_unread(record, reason)
                continue
            if place == default and end is not End.CLEAN:
                self._remove_strays(container, mine)
            names = list(container.entries) if place == default else list(mine)
            # Of the same name as one elsewhere: there it is used, and not here.
            hidden = [n for n in names if n in taken and n not in mine]
            names = [n for n in names if n not in hidden]
            self._leave(container, hidden, "another one of that name is used")
            if container.was_void:
                for record in mine.values():
                    self._lose_unread(record, _VOID)
            elif autoload:
                saved = Saved(container, place, end, changed, *logged)
                for name in dict.fromkeys([*mine, *names]):
                    self._load_entry(saved, name, mine.get(name))
            else:
                self._leave(container, names, _NOT_LOADED)
                for name in dict.fromkeys([*mine, *names]):
                    self._keep_unloaded(container, place, name, mine.get(name))
        self._release_unused()

    def _persistent(self) -> set[str]:
        return {record.name for record in self._record.bitmaps if record.persistent}

    @staticmethod
    def _remove_strays(container: OpenContainer, known: Collection[str]) -> None:
        """Remove what a command has left that a crash cut short."""
        with container.lock:
            strays = [
                name
                for name, entry in container.entries.items()
                if name not in known and entry.is_in_use and not entry.is_foreign
            ]
            if strays:
                container.update(remove=strays)

    def _logged(self, end: End) -> tuple[bitarray | None, str | None]:
        """Return the areas written before a crash of the host, or why nobody knows."""
        if end is not End.HOST_CRASHED:
            return None, None
        try:
            self._log = self._open_log()
        except FileNotFoundError:
            return None, "its activity log is missing"
        except OSError as e:
            return None, describe(e)
        reason = self._log.void_reason
        return (None, reason) if reason is not None else (self._log.areas, None)

    def _unusable(self, place: str, error: OSError) -> str:
        """Return why a container is not used; make way for a new one if it is ours."""
        if place != self._place_of(None) or not isinstance(error, NotUsable):
            return describe(error)
        path = self._state / place
        aside = path.with_name(path.name + ".unusable")
        path.rename(aside)
        return f"{describe(error)}; it is {aside.name} now"

    def _lose_unread(self, record: BitmapRecord, reason: str) -> None:
        """Keep the name of a bitmap that can not be read, until it is removed."""
        log.error("bitmap %s of %s: %s", record.name, self.disk.name, reason)
        record.frozen = record.job = None
        record.number = self.new_number()
        self._record.bitmaps.append(record)
        self._hold(record, self.create_bits(record), reason)

    def _leave(
        self, container: OpenContainer, names: Iterable[str], reason: str
    ) -> None:
        """Say that bitmaps which should record what is written now will not."""
        entries = container.entries
        missing = [n for n in names if n in entries and entries[n].is_auto]
        container.mark_in_use(n for n in missing if not entries[n].is_in_use)
        for name in missing:
            log.warning(
                "bitmap %s of %s is inconsistent: %s", name, self.disk.name, reason
            )

    def _keep_unloaded(
        self,
        container: OpenContainer,
        place: str,
        name: str,
        record: BitmapRecord | None,
    ) -> None:
        """Remember a bitmap for a later mount, and that it has missed writes."""
        entry = container.entries.get(name)
        if entry is None or entry.is_foreign:
            return
        if record is None:
            record = BitmapRecord(
                name, 0, entry.granularity, entry.is_auto, True, container=place
            )
        record.is_loaded = False
        record.frozen = record.job = None
        if record.recording or entry.is_auto:
            record.inconsistent = record.inconsistent or _NOT_LOADED
        self._record.bitmaps.append(record)

    def _load_entry(
        self, saved: "Saved", name: str, record: BitmapRecord | None
    ) -> None:
        """Take over a bitmap from its container; what it is by now, `saved` tells."""
        container = saved.container
        entry = container.entries.get(name)
        if entry is None:
            log.warning(
                "bitmap %s of %s is not in %s any more",
                name,
                self.disk.name,
                container.path,
            )
            return
        if entry.is_foreign or (record is None and name in container.claimed):
            # Not ours to use; it stays as it is.
            return
        if record is None:
            reason = _LEFT_IN_USE if entry.is_in_use else None
            was_recording = entry.is_auto
            record = BitmapRecord(
                name, 0, entry.granularity, False, True, container=saved.place
            )
        else:
            # Also one that had just been disabled, if it was saved before.
            was_recording = record.recording or entry.is_auto
            reason = record.inconsistent or saved.problem(entry, was_recording)
        is_clean = saved.end is End.CLEAN
        is_auto = entry.is_auto if is_clean else record.recording and record.auto
        record.recording = is_auto
        record.is_loaded = True
        record.granularity = entry.granularity
        record.frozen = record.job = None
        record.number = self.new_number()
        live = self.create_bits(record)
        try:
            bits = container.bits(name) if reason is None else None
        except OSError as e:
            reason, bits = describe(e), None
        held = self._hold(record, live, reason)
        self._record.bitmaps.append(record)
        held.container = container
        container.claimed.add(name)
        if bits is None:
            log.error("bitmap %s of %s: %s", name, self.disk.name, reason)
            return
        live.bits[: len(bits)] = bits
        if is_clean:
            held.bitmap.take_unsaved()
        elif was_recording and saved.areas is not None:
            held.bitmap.add(saved.areas, AREA_SIZE)

    def _go_on(self) -> None:
        """Do as `mark_in_use`, for users who are there already and come first."""
        try:
            default = self._open.get(self._place_of(None))
            if default is not None:
                self._remove_strays(default, self._persistent())
            self.mark_in_use()
            if self._log is None:
                with contextlib.suppress(FileNotFoundError, NotUsable):
                    self._log = self._open_log()
            if not self._has_log or self._cut_short:
                # What was in it is in the containers first; so is what only the bits in
                # use have, since a command was cut short.
                self._update_containers(is_in_use=True)
            self.provide_log()
            for each in self._cut_short:
                each.is_unlogged = False
            self._cut_short = []
        except OSError as e:
            self._lose_recording(f"can not be protected: {describe(e)}")

    def mark_in_use(self) -> None:
        """Say in containers that from now on writes are recorded here only.

        The state has to say so first: what it takes for a clean end must not leave
        a bitmap in use. OSError if it can not be said.
        """
        for container in self._open.values():
            with container.lock:
                entries = container.entries
                ours = [
                    each.record.name
                    for each in list(self.held.values())
                    if each.container is container
                ]
                container.mark_in_use(
                    name
                    for name in ours
                    if name in entries and not entries[name].is_in_use
                )
        reached("bitmaps.marked")

    @property
    def _has_log(self) -> bool:
        return self._log is not None and self._log.void_reason is None

    def _open_log(self) -> ActivityLog:
        return ActivityLog.open(self._log_path, self.disk.id, self.disk.size)

    @property
    def _log_path(self) -> Path:
        return self._state / self._place / "activity.log"

    def close(self) -> None:
        """Save all that is persistent; nobody reads or writes any more."""
        with self._saving:
            try:
                self._update_containers(is_in_use=False)
            except OSError as e:
                log.error(
                    "bitmaps of %s could not be saved: %s", self.disk.name, describe(e)
                )
        self.close_files()

    def close_files(self) -> None:
        """Let go of everything."""
        for container in self._open.values():
            self._containers.release(container)
        self._open = {}
        if self._log is not None:
            self._log.close()
            self._log = None

    # -- saving

    @property
    def has_unsaved(self) -> bool:
        """Whether there is something that only the activity log has."""
        return any(
            e.is_stored and not e.bitmap.is_saved for e in list(self.held.values())
        )

    def save(self) -> None:
        """Save what has changed of all persistent bitmaps; durable on return.

        If it fails, nothing is lost: the activity log still has it.
        """
        with self._saving:
            activity = self._log if self._has_log else None
            if activity is not None:
                activity.rotate()
            reached("bitmaps.rotated")
            self._update_containers(is_in_use=True)
            reached("bitmaps.saved")
            if activity is not None:
                activity.settle()
            reached("bitmaps.settled")

    def _update_containers(self, *, is_in_use: bool) -> None:
        error = None
        for container in list(self._open.values()):
            try:
                self._update_container(container, is_in_use=is_in_use)
            except OSError as e:
                # The others have nothing to do with it.
                error = error or e
        if error is not None:
            raise error

    def _update_container(self, container: OpenContainer, *, is_in_use: bool) -> None:
        with container.lock:
            stored = [
                each
                for each in [*self.held.values(), *self._leaving]
                if each.container is container and each.is_stored
            ]
            try:
                bitmaps = [
                    _as_stored(each, container, is_in_use=is_in_use) for each in stored
                ]
                if bitmaps:
                    container.update(bitmaps)
            except BaseException:
                for each in stored:
                    each.bitmap.keep_unsaved()
                raise

    # -- what the inventory's steps are made of

    def new_number(self) -> int:
        """Return a number that no bits of this disk have had."""
        self._record.next_bitmap += 1
        return self._record.next_bitmap - 1

    def create_bits(self, record: BitmapRecord) -> LiveBits:
        """Make clear bits for a bitmap, by its number; OSError if there is no room."""
        make_directory(self._runtime)
        path = self._bits_path(record.number)
        return LiveBits.create(path, self._owner(record.number, record.granularity))

    def _open_bits(self, number: int, granularity: int) -> LiveBits:
        try:
            owner = self._owner(number, granularity)
            return LiveBits.open(self._bits_path(number), owner)
        except FileNotFoundError as e:
            raise NotUsable(f"{e.filename}: is missing") from None

    def _bits_path(self, number: int) -> Path:
        return self._runtime / f"{number:04}.bits"

    def _owner(self, number: int, granularity: int) -> Owner:
        return Owner(self.disk.id, number, -(-self.disk.size // granularity))

    def check_new(self, name: str) -> None:
        """Raise NameTaken if the disk has a bitmap of that name, loaded or not."""
        if name in self.held:
            raise NameTaken(f"Bitmap already exists: {name}")
        if any(record.name == name for record in self._record.bitmaps):
            raise NameTaken(
                f"Bitmap already exists: {name}; it is not loaded, as the disk is "
                "mounted with --bitmaps no"
            )

    def add(self, record: BitmapRecord, live: LiveBits) -> HeldBitmap:
        """Have one more bitmap, which does not record yet."""
        held = self._hold(record, live, None)
        held.bitmap.recording = False
        self._record.bitmaps.append(record)
        return held

    def _hold(
        self, record: BitmapRecord, live: LiveBits, reason: str | None
    ) -> HeldBitmap:
        bitmap = DirtyBitmap(
            record.name,
            self.disk.size,
            record.granularity,
            live.bits,
            recording=record.recording,
        )
        held = self.held[record.name] = HeldBitmap(record, bitmap, live)
        if reason is not None:
            held.lose(reason)
        return held

    def reach(self, held: HeldBitmap) -> None:
        """Open the container of one that could not be read, if that is possible now.

        What is left in ours the next mount would believe: OSError if nobody can tell.
        """
        place, name = held.record.container, held.record.name
        if held.container is not None or place != self._place_of(None):
            return
        try:
            container = self.container(place)
        except (FileNotFoundError, NotUsable):
            return
        if name not in container.claimed:
            container.claimed.add(name)
            held.container = container

    def let_go(self, held: HeldBitmap) -> None:
        """Have a bitmap no more, but see to it until it is `gone`, or restored."""
        self._leaving.append(held)
        self.forget(held)

    def restore(self, held: HeldBitmap) -> None:
        """Have one again that was let go."""
        self.held[held.record.name] = held
        self._record.bitmaps.append(held.record)
        self._leaving.remove(held)

    def gone(self, held: HeldBitmap) -> None:
        """Remove the bits of one that was let go, and what its container has of it."""
        self._leaving.remove(held)
        self.garbage.append(held.live.drop)
        self.unstore(held)

    def forget(self, held: HeldBitmap) -> None:
        """Have a bitmap no more; its files are still there."""
        del self.held[held.record.name]
        self._record.bitmaps.remove(held.record)

    def thaw(self, held: HeldBitmap, *, is_copied: bool) -> None:
        """Forget what was frozen, or take it back; the disk is drained."""
        frozen = held.frozen
        assert frozen is not None
        if is_copied:
            held.bitmap.abdicate()
        else:
            held.bitmap.reclaim()
        held.frozen = held.record.frozen = held.record.job = None
        self.garbage.append(frozen.drop)

    def collect(self) -> None:
        """Remove files of which the state, as it is saved, does not know any more."""
        while self.garbage:
            self.garbage.pop(0)()

    def container(self, place: str, *, create: bool = False) -> OpenContainer:
        """Return a container, open for this disk, by its place in the records."""
        if place not in self._open:
            if create:
                make_directory(self._state / self._place)
            self._open[place] = self._containers.use(
                self._state / place, self.disk.size, create=create
            )
        return self._open[place]

    def store(self, held: HeldBitmap, path: Path | None) -> None:
        """Give a bitmap its place in a container, where it is in use from now on.

        The container is made if it is missing; None is the disk's own. What can not be
        stored there is refused here, and not when it is too late.
        """
        try:
            self._reserve(held, self._place_of(path))
        except BaseException:
            self._release_unused()
            raise

    def store_again(self, held: HeldBitmap) -> None:
        """Do so for an inconsistent one, whatever is there in its place."""
        self._reserve(held, held.record.container or self._place_of(None))

    def _place_of(self, path: Path | None) -> str:
        return str(self._place / "bitmaps.qcow2") if path is None else str(path)

    def _reserve(self, held: HeldBitmap, place: str) -> None:
        name, bitmap = held.record.name, held.bitmap
        container = self.container(place, create=True)
        with container.lock:
            entry = container.entries.get(name)
            # One that was in use when it was left is of no use: the name is free.
            is_taken = entry is not None and not entry.is_in_use
            if held.container is None and (
                name in container.claimed
                or (is_taken and bitmap.inconsistent is None)
                or (entry is not None and entry.is_foreign)
            ):
                raise NameTaken(f"Bitmap already exists: {name}, in {container.path}")
            self.provide_log()
            container.update(
                [
                    Bitmap(
                        name,
                        bitmap.granularity,
                        bitmap.to_save(),
                        is_auto=held.record.recording,
                        is_in_use=True,
                    )
                ]
            )
            container.claimed.add(name)
        held.container, held.record.container = container, place

    def unstore(self, held: HeldBitmap) -> None:
        """Take a bitmap out of its container, if it is in one."""
        container, held.container = held.container, None
        held.record.container = ""
        if container is None:
            return
        with container.lock:
            container.claimed.discard(held.record.name)
            if held.record.name in container.entries:
                container.update(remove=[held.record.name])
        self._release_unused()

    def settle_past(self) -> None:
        """Make durable what the guest wrote before a bitmap began, after it has.

        What a guest has not flushed, a crash of the host may undo. That changes the
        disk as a write does: a bitmap which no longer has that write would lack it.
        """
        self.disk.flush()

    def save_if_stored(self, held: HeldBitmap) -> None:
        """Save now what was asked for, if it is to last."""
        if held.is_stored:
            self.save()

    def attach(self, path: Path, names: Sequence[str]) -> list[str]:
        """Use bitmaps of a container, all that nobody uses or some; return which."""
        place = self._place_of(path)
        container = self.container(place)
        attached: list[str] = []
        try:
            with container.lock:
                entries = container.entries
                for name in names or list(entries):
                    is_free = name not in container.claimed
                    if not names and (entries[name].is_foreign or not is_free):
                        continue
                    self._check_attachable(container, name)
                    self._load_entry(Saved(container, place), name, None)
                    attached.append(name)
                if not attached:
                    raise NotUsable(f"container {path}: has no bitmap to attach")
                self.provide_log()
                # First: after a crash they are ours, and not just left in use.
                self._save_state()
                to_mark = [n for n in attached if not entries[n].is_in_use]
                container.mark_in_use(to_mark)
        except BaseException:
            self.detach(attached)
            raise
        return attached

    def _check_attachable(self, container: OpenContainer, name: str) -> None:
        if name not in container.entries:
            raise NotFound(f"Dirty bitmap '{name}' not found in {container.path}")
        self.check_new(name)
        if name in container.claimed:
            raise NameTaken(f"Bitmap already exists: {name}")
        if container.entries[name].is_foreign:
            raise NotUsable(
                f"container {container.path}: bitmap {name!r} is of a kind that "
                "fleecefs does not know"
            )

    def detach(self, names: Collection[str]) -> None:
        """Let go of bitmaps, and leave them in their container as they are now."""
        for container in self._open.values():
            with container.lock, contextlib.suppress(OSError):
                left = [
                    _as_stored(self.held[name], container, is_in_use=False)
                    for name in names
                    if self.held[name].container is container
                    and self.held[name].is_stored
                ]
                if left:
                    container.update(left)
        for name in names:
            held = self.held[name]
            self.forget(held)
            held.live.drop()
            if held.container is not None:
                held.container.claimed.discard(name)
        self.update_recorder()
        self._release_unused()

    def _release_unused(self) -> None:
        """Close containers that have none of our bitmaps any more."""
        held = [*self.held.values(), *self._leaving]
        used = [each.container for each in held]
        for place, container in list(self._open.items()):
            if container not in used:
                del self._open[place]
                self._containers.release(container)

    def provide_log(self) -> None:
        """Have an activity log that works, durably, before a bitmap relies on it."""
        if self._has_log:
            return
        # Who makes the log void has then said so in the records, too.
        with self._voiding:
            held = list(self.held.values())
        if any(each.bitmap.inconsistent is not None for each in held):
            # What the log before has said, or would have, only the state says now.
            self._save_state()
        make_directory(self._log_path.parent)
        # Not closed before: a guest may be about to write to it.
        before = self._log
        self._log = ActivityLog.create(self._log_path, self.disk.id, self.disk.size)
        if before is not None:
            before.close()

    def update_recorder(self) -> None:
        """Let writes be recorded in what there is now; the disk is drained."""
        held = [
            each
            for each in list(self.held.values())
            if each.bitmap.recording and each.bitmap.inconsistent is None
        ]
        if not held:
            self.disk.recorder = None
            return
        is_logged = any(each.container is not None for each in held)
        self.disk.recorder = Recorder(
            self.disk.size,
            [each.bitmap for each in held],
            self._commit if is_logged else None,
        )

    # -- for writers

    def _commit(self, offset: int, end: int) -> None:
        """Make it durable that something in these areas is dirty."""
        activity = self._log
        assert activity is not None
        first, stop = offset // AREA_SIZE, (end - 1) // AREA_SIZE + 1
        try:
            activity.ensure(first, stop, time.monotonic() + self._timeout)
        except OSError as e:
            self._void(activity, e)

    def _void(self, activity: ActivityLog, error: OSError) -> None:
        """Give the bitmaps up, durably, so that the guest can go on; or raise.

        An error for the guest is the lesser evil: a bitmap that lacks a write would be
        believed after a crash of the host.
        """
        with self._voiding:
            if activity.void_reason is not None:
                return
            reason = f"its activity log failed: {describe(error)}"
            activity.mark_void(reason, time.monotonic() + _VOID_SECONDS)
            self._lose_recording(reason)

    def _lose_recording(self, reason: str) -> None:
        for each in [*self.held.values(), *self._leaving]:
            if each.is_stored and each.bitmap.recording:
                each.lose(reason)
                log.error(
                    "bitmap %s of %s: %s", each.record.name, self.disk.name, reason
                )
                self._lost(each.record.name, reason)


def _as_stored(
    held: HeldBitmap, container: OpenContainer, *, is_in_use: bool
) -> Bitmap:
    bitmap, record = held.bitmap, held.record
    # In use it says that bits are missing which were set since: see `_load_entry`.
    is_auto = bitmap.recording and (record.auto or is_in_use)
    changed = bitmap.take_unsaved()
    return Bitmap(
        record.name,
        bitmap.granularity,
        bitmap.to_save(),
        is_auto=is_auto,
        is_in_use=is_in_use,
        changed=changed if container.has(record.name, bitmap.granularity) else None,
    )
