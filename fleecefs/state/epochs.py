"""The files of an epoch.

    RUNTIME/disks/NAME/epochs/0007/   preserved.bits ram.bits disk.bits [denied.bits]
                                      ram.raw, the RAM tier
    STATE/disks/NAME/epochs/0007/     the same bits, saved at a clean end
    STORE/ID/disks/NAME/epochs/0007/  store.raw, the disk tier (in STATE by default)

In use, the bits of the runtime directory count. After a clean end there are only the
saved ones, and all data is in the disk tier. After a crash of the host the bits are
gone: then the snapshots are broken, not guessed; unless their epochs were to survive
the host, for the price of two syncs a copy: then STATE/…/0007/preserved.log has all.
"""

import enum
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from bitarray import bitarray

from fleecefs.block.bitmap import LiveBits, Owner, make_directory, sync_directory
from fleecefs.block.epoch import Epoch, OnCbwError
from fleecefs.block.raw import RawImage
from fleecefs.block.store import Budget, Store, Tier
from fleecefs.errors import FlushFailed, NotUsable, Unsupported
from fleecefs.killpoint import reached
from fleecefs.state.preserved_log import LOST, PRESERVED, PreservedLog, read_log

log = logging.getLogger(__name__)


class End(enum.Enum):
    """How the daemon before this one ended."""

    CLEAN = enum.auto()
    PROCESS_CRASHED = enum.auto()
    HOST_CRASHED = enum.auto()


class Budgets(NamedTuple):
    """What all stores of a mount may hold together."""

    ram: Budget
    disk: Budget

    def within(self) -> "Budgets":
        """Return budgets that count a part of these, which have the limits."""
        ram, disk = self
        return Budgets(
            Budget(ram.limit, "ram", within=ram),
            Budget(disk.limit, "disk", within=disk),
        )


class EpochFiles:
    """Where one epoch of one disk keeps its bits and clusters."""

    def __init__(
        self,
        *,
        disk_id: UUID,
        number: int,
        size: int,
        cluster_size: int,
        runtime: Path,
        state: Path,
        store: Path,
        budgets: Budgets,
        survives_host: bool = False,
        is_private: bool = False,
    ) -> None:
        self.number = number
        self.store = store
        self.budgets = budgets
        self._owner = Owner(disk_id, number, -(-size // cluster_size))
        self._size = size
        self._cluster_size = cluster_size
        self._runtime = runtime
        self._state = state
        self.survives_host = survives_host
        self._is_private = is_private
        self._log: PreservedLog | None = None
        self._live: dict[str, LiveBits] = {}
        self._sync_error: str | None = None

    def create(self, on_cbw_error: OnCbwError) -> Epoch:
        """Make an empty epoch; OSError if there is no room for its bits."""
        for directory in {self._runtime, self._state, self.store}:
            make_directory(directory)
        for name in self._names():
            self._live[name] = LiveBits.create(self._bits_path(name), self._owner)
        reached("create.bits")
        disk = RawImage.create(self.store / "store.raw", self._size)
        if self.survives_host:
            # Its size and its name, which no later flush needs to bring.
            disk.flush()
            sync_directory(self.store)
            self._log = PreservedLog.create(self._log_path, self._owner)
        return self._epoch(disk, self._create_ram(), on_cbw_error)

    def load(self, on_cbw_error: OnCbwError, end: End) -> Epoch:
        """Open an epoch of an earlier daemon; NotUsable names what is wrong."""
        if end is End.HOST_CRASHED and not self.survives_host:
            raise NotUsable("the host went down without unmounting")
        try:
            disk = RawImage.open(self.store / "store.raw", self._size)
            if end is End.CLEAN:
                ram = self._load_saved()
            elif end is End.PROCESS_CRASHED:
                ram = self._load_live()
            else:
                ram = None
                self._load_log(disk)
            if self.survives_host:
                self._log = PreservedLog.open(self._log_path, self._owner)
        except FileNotFoundError as e:
            raise NotUsable(f"{e.filename}: is missing") from None
        return self._epoch(disk, ram, on_cbw_error)

    def _load_saved(self) -> RawImage | None:
        self._runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = self._names()
        if (self._state / "denied.bits").exists():
            names.append("denied")
        for name in names:
            self._live[name] = LiveBits.create(self._bits_path(name), self._owner)
            if name != "ram":
                self._live[name].load(self._state / f"{name}.bits")
        return self._create_ram()

    def _load_live(self) -> RawImage | None:
        names = ["preserved", "disk"]
        # As it was, whatever the limits are now.
        has_ram = self._bits_path("ram").exists()
        if has_ram:
            names.append("ram")
        if self._bits_path("denied").exists():
            names.append("denied")
        for name in names:
            self._live[name] = LiveBits.open(self._bits_path(name), self._owner)
        # A crash may have come between the bit of a tier and the epoch's.
        for name in {"ram", "disk"} & set(names):
            self._live[name].bits &= self._live["preserved"].bits
            reached("start.mended")
        if not has_ram:
            return None
        return RawImage.open(self._runtime / "ram.raw", self._size)

    def _load_log(self, disk: RawImage) -> None:
        """Make the bits anew from the log; the disk tier has all data."""
        self._runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in "preserved", "disk":
            self._live[name] = LiveBits.create(self._bits_path(name), self._owner)
        for kind, first, stop in read_log(self._log_path, self._owner):
            if kind == PRESERVED:
                self._live["preserved"].bits[first:stop] = 1
            elif kind == LOST:
                self._remember("it broke before the host went down")
        # Clusters of zeroes are in no tier: the store has holes there.
        offset = disk.find_data(0)
        while offset < self._size:
            end = disk.find_hole(offset)
            first, stop = offset // self._cluster_size, -(-end // self._cluster_size)
            self._live["disk"].bits[first:stop] = 1
            offset = disk.find_data(end)
        self._live["disk"].bits &= self._live["preserved"].bits

    def _epoch(
        self, disk: RawImage, ram: RawImage | None, on_cbw_error: OnCbwError
    ) -> Epoch:
        size, live = self._cluster_size, self._live
        tiers = [Tier("disk", disk, live["disk"].bits, self.budgets.disk, size)]
        if ram is not None:
            tiers.insert(0, Tier("ram", ram, live["ram"].bits, self.budgets.ram, size))
        epoch = Epoch(
            self.number,
            live["preserved"].bits,
            Store(tiers, size, self._size),
            on_cbw_error=on_cbw_error,
            commit=partial(self._commit, disk) if self.survives_host else _nothing,
            remember=self._remember,
            confirm=self._confirm_lost,
            forget=self.remove,
            make_denied=self._make_denied,
            lost=live["preserved"].note,
            counters=live["preserved"].counters,
        )
        if "denied" in live:
            epoch.denied = live["denied"].bits
        return epoch

    def _names(self) -> list[str]:
        has_ram = self.budgets.ram.limit != 0 and not self.survives_host
        return ["preserved", "disk", *(["ram"] if has_ram else [])]

    def _create_ram(self) -> RawImage | None:
        if "ram" not in self._live:
            return None
        return RawImage.create(self._runtime / "ram.raw", self._size)

    def _remember(self, reason: str) -> None:
        self._live["preserved"].note = reason

    def _commit(self, disk: RawImage, first: int, stop: int) -> None:
        """Make clusters survive the host: first the data, then that it is there."""
        assert self._log is not None
        self._sync(disk.flush)
        reached("copy.synced")
        self._log.append(first, stop)
        self._sync(self._log.sync)
        reached("copy.logged")

    def _sync(self, flush: Callable[[], None]) -> None:
        """Make durable what was written. A failure is for ever, as in Disk.flush.

        What the kernel then drops may be of another thread's copy too.
        """
        if self._sync_error is None:
            try:
                flush()
            except OSError as e:
                self._sync_error = e.strerror
                raise
        if self._sync_error is not None:
            raise FlushFailed(f"a sync of the store failed: {self._sync_error}")

    def _confirm_lost(self) -> None:
        if self._log is None:
            return
        try:
            self._log.mark_lost()
            self._log.sync()
        except OSError as e:
            # The guest comes first; state.json is another place that will say it.
            log.error("%s: %s", self._log_path, e.strerror)

    def _make_denied(self) -> bitarray:
        # A private one does not survive it, whatever its epoch does for older ones.
        if self.survives_host and not self._is_private:
            raise Unsupported("a snapshot that survives the host keeps all of its past")
        self._live["denied"] = LiveBits.create(self._bits_path("denied"), self._owner)
        return self._live["denied"].bits

    @property
    def _log_path(self) -> Path:
        return self._state / "preserved.log"

    def _bits_path(self, name: str) -> Path:
        return self._runtime / f"{name}.bits"

    def save(self, epoch: Epoch) -> None:
        """Make everything durable, before a clean end; NoSpace if it does not fit."""
        epoch.store.settle()
        for name, live in self._live.items():
            if name != "ram":
                live.save(self._state / f"{name}.bits")
        sync_directory(self.store)

    def remove(self) -> None:
        """Remove all files: the epoch is gone."""
        for directory in {self._runtime, self._state, self.store}:
            shutil.rmtree(directory, ignore_errors=True)
            reached("remove.removed")


def _nothing(first: int, stop: int) -> None:
    """Commit of an epoch that only has to survive the daemon: it does already."""


def gone(number: int, reason: str, forget: Callable[[], None] = lambda: None) -> Epoch:
    """Return a stand-in for an epoch that can not be opened; its snapshot is lost."""
    bits = bitarray(endian="little")
    return Epoch(number, bits, Store([], 1, 0), forget=forget, lost=reason)
