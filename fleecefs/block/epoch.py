"""Epochs: the past of a disk, each cluster kept once.

An epoch holds what was overwritten between one snapshot and the next. A guest write
preserves a cluster at most once, into the newest epoch, however many snapshots exist.
Snapshot k reads a cluster from the first epoch >= k that has it, otherwise from the
source.

Why a snapshot never sees new data (this is the whole proof):

1. A reader decides under the disk's lock: some epoch has the cluster -> it reads the
   store, which is never overwritten; none has it -> it registers, then reads the
   source.
2. A write first puts the old data into the store, then sets the bit under the lock,
   then waits for the readers registered by then, and only then overwrites the source.

So a reader that saw no bit is registered before the bit was set, and the write waits
for it; a reader that comes later sees the bit. Where preserving fails, the snapshots
that needed it are marked broken before the write goes on, and a reader looks at the
mark again after it has read.

A job reads without registering, so that no write waits for it: it reads the source, and
looks at the bits afterwards. Where there is none, no write has begun to overwrite;
where there is one, what it has read is replaced by what the store has.

An epoch whose snapshot is deleted or broken is *retired*: it stays while an older
snapshot needs its data. Then its bits come to include those of the epochs between, so
that a write never preserves what they have already.
"""

import enum
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from bitarray import bitarray

from fleecefs.block.image import Image
from fleecefs.block.requests import Copy, Requests
from fleecefs.block.store import COPY_SIZE_MAX, Store, runs
from fleecefs.errors import Abandoned, TimedOut
from fleecefs.killpoint import reached

# Of an epoch's counters.
WAITS, LONGEST = 0, 1


class OnCbwError(enum.Enum):
    """What happens when a cluster can not be preserved; QEMU's names."""

    BREAK_SNAPSHOT = "break-snapshot"  # the guest goes on, the snapshot is lost
    BREAK_GUEST_WRITE = "break-guest-write"  # the guest's write fails


class Epoch:
    """One epoch of one disk.

    number     never reused for this disk
    preserved  a bit a cluster: the store has it, or no snapshot needs it any more
    denied     clusters whose access was given up by a discard on the snapshot
    lost       why its snapshot can not be read any more; None while it is good
    timeout    for how long writes try to preserve for it; None is the mount's time
    has_holes  zeroes and holes are different things to its reader
    counters   WAITS: writes that had to copy or wait; LONGEST: of these, in ns
    """

    def __init__(
        self,
        number: int,
        preserved: bitarray,
        store: Store,
        *,
        on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
        commit: Callable[[int, int], None] = lambda first, stop: None,
        remember: Callable[[str], None] = lambda reason: None,
        confirm: Callable[[], None] = lambda: None,
        forget: Callable[[], None] = lambda: None,
        make_denied: Callable[[], bitarray] | None = None,
        lost: str | None = None,
        timeout: float | None = None,
        counters: "memoryview[int] | None" = None,
    ) -> None:
        self.number = number
        self.preserved = preserved
        self.store = store
        self.on_cbw_error = on_cbw_error
        self.denied: bitarray | None = None
        self.lost = lost
        self.timeout = timeout
        self.has_holes = False
        self.counters = [0, 0] if counters is None else counters
        self.make_denied = make_denied or self._denied_in_memory
        # Makes preserved clusters [first, stop) as durable as the epoch has to be.
        self.commit = commit
        # Makes it as durable that the snapshot is lost.
        self.confirm_lost = confirm
        self._remember = remember
        self._forget = forget

    def _denied_in_memory(self) -> bitarray:
        return bitarray(len(self.preserved), endian="little")

    def has_denied(self, first: int, stop: int, others: bitarray) -> bool:
        """Tell whether access to all of [first, stop) but `others` was given up."""
        return self.denied is not None and (self.denied[first:stop] | others).all()

    def lose(self, reason: str) -> None:
        """Mark the snapshot lost, first where it survives a crash of the daemon."""
        self._remember(reason)
        self.lost = reason

    def count_wait(self, seconds: float) -> None:
        """Count a write that was held back; hold the lock."""
        self.counters[WAITS] += 1
        self.counters[LONGEST] = max(self.counters[LONGEST], int(seconds * 1e9))

    def drop(self) -> None:
        """Give back everything the epoch occupies."""
        self.store.drop()
        self._forget()


# Called with clusters [first, stop).
Watch = Callable[[int, int], None]

# The bits of some clusters: those on the source, and those that an epoch has.
Split = tuple[bitarray, list[tuple[Epoch, bitarray]]]


class Loss(NamedTuple):
    """Epochs marked lost, because [first, stop) can not be preserved in the newest."""

    epochs: list[Epoch]
    newest: Epoch | None
    first: int
    stop: int


class History:
    """The epochs of one disk, oldest first; guarded by the lock of its requests.

    `broke` is called, without the lock, with each epoch whose snapshot broke and why.
    """

    def __init__(
        self,
        source: Image,
        requests: Requests,
        cluster_size: int,
        *,
        timeout: float = 10.0,
        broke: Callable[[Epoch, str], None] = lambda epoch, reason: None,
    ) -> None:
        self.source = source
        self.requests = requests
        self.cluster_size = cluster_size
        self.timeout = timeout
        self.broke = broke
        # Replaced as a whole: writes call them without the lock.
        self._watchers: tuple[Watch, ...] = ()
        self.epochs: list[Epoch] = []
        # Where writes preserve to; None while no snapshot needs them to.
        self.newest: Epoch | None = None
        self.copied = 0
        # Marked lost, but not yet where it survives what the epochs do.
        self._breaking: list[Epoch] = []
        self._timeout_default = timeout
        self._has_holes = False
        self._shift = cluster_size.bit_length() - 1
        self._copy_clusters_max = max(1, COPY_SIZE_MAX >> self._shift)
        self._garbage: list[Callable[[], None]] = []

    # -- for writers

    def preserve(self, offset: int, end: int) -> None:
        """Return when [offset, end) of the source may be overwritten.

        Raises the copy's error under break-guest-write; Abandoned if the copy hung and
        `expire` gave the guest's request to somebody else.
        """
        if offset == end:
            return
        first, stop = offset >> self._shift, ((end - 1) >> self._shift) + 1
        begin = time.monotonic()
        while (copy := self._claim(first, stop, begin)) is not None:
            if self._copy(copy, begin):
                return

    def _claim(self, first: int, stop: int, begin: float) -> Copy | None:
        """Register the clusters still to copy, or return None if there are none."""
        requests = self.requests
        deadline = begin + self.timeout
        has_waited = False
        with requests.lock:
            while (newest := self.newest) is not None:
                missing = newest.preserved.find(0, first, stop)
                if missing >= 0:
                    if requests.find_copy(missing, stop) is None:
                        copy = Copy(missing, stop, deadline)
                        requests.copies[copy.thread] = copy
                        return copy
                elif not requests.readers or not requests.find_readers(first, stop):
                    if has_waited:
                        self._count_wait(begin)
                    return None
                has_waited = True
                if not requests.wait_changed(deadline):
                    break
            else:
                return None
        # Waited too long for a copy by somebody else, or for a reader.
        self._outwait(first, stop)
        return self._claim(first, stop, begin)

    def _count_wait(self, begin: float) -> None:
        """Count a write that was held back since then, for whom it may have been."""
        seconds = time.monotonic() - begin
        for epoch in self.epochs:
            if epoch.lost is None:
                epoch.count_wait(seconds)

    def _copy(self, copy: Copy, begin: float) -> bool:
        """Preserve what was claimed; True if nothing is left to wait for."""
        failure = None
        requests = self.requests
        try:
            self._copy_runs(copy)
        except OSError as e:
            failure = e
        except BaseException:
            # A bug, or no memory; nobody may wait for this copy for ever.
            with requests.lock:
                requests.copies.pop(copy.thread, None)
                requests.changed()
            raise
        with requests.lock:
            if copy.abandoned:
                raise Abandoned
            del requests.copies[copy.thread]
            requests.changed()
            if failure is None:
                newest = self.newest
                if newest is not None:
                    newest.preserved[copy.first : copy.stop] = 1
                reached("copy.marked")
                is_done = not requests.readers
                if is_done:
                    self._count_wait(begin)
        if failure is not None:
            self._fail(copy.first, copy.stop, failure)
            return False
        for watch in self._watchers:
            watch(copy.first, copy.stop)
        if newest is not None:
            for first, stop in copy.unneeded:
                newest.store.free(first, stop)
        return is_done

    def _copy_runs(self, copy: Copy) -> None:
        """Put the missing clusters of a claimed copy into the newest epoch's store."""
        newest = self.newest
        first, stop = copy.first, copy.stop
        while newest is not None and first < stop:
            found = newest.preserved.find(1, first, stop)
            end = min(found if found >= 0 else stop, first + self._copy_clusters_max)
            offset = first << self._shift
            length = min(end << self._shift, self.source.size) - offset
            data = self.source.pread(length, offset)
            # Data read in time is old data: whoever overwrites these clusters waits
            # for this copy, or for `expire` to abandon it.
            if copy.abandoned:
                return
            reached("copy.read")
            if self._has_holes:
                newest.store.put(data, first, self._is_hole)
            else:
                newest.store.put(data, first)
            reached("copy.stored")
            self.copied += length
            found = newest.preserved.find(0, end, stop)
            first = found if found >= 0 else stop
        if newest is not None:
            newest.commit(copy.first, copy.stop)

    def _is_hole(self, cluster: int) -> bool:
        offset = cluster << self._shift
        end = min(offset + self.cluster_size, self.source.size)
        return self.source.find_data(offset) >= end

    def has_late(self, now: float) -> bool:
        """Tell whether `expire` has something to do."""
        copies = list(self.requests.copies.values())
        return any(copy.deadline < now for copy in copies)

    def expire(self, now: float) -> dict[int, OSError | None]:
        """Give up copies that hang beyond their deadline; return whose they were.

        Those threads end in Abandoned whenever they come back, and must not answer the
        guest. The caller does: with the error, or, for None, by serving the request
        again, which then finds the snapshot broken and goes on.
        """
        requests, error = self.requests, self._too_late()
        outcome: dict[int, OSError | None] = {}
        losses = []
        with requests.lock:
            late = [copy for copy in requests.copies.values() if copy.deadline < now]
            for copy in late:
                copy.abandoned = True
                del requests.copies[copy.thread]
                requests.writes.pop(copy.thread, None)
                outcome[copy.thread] = None
                # At once: a snapshot that begins from here on has lost nothing.
                try:
                    needing = self._needing(copy.first, copy.stop)
                    losses.append(self._lose(needing, copy.first, copy.stop, error))
                except TimedOut:
                    outcome[copy.thread] = error
            requests.changed()
        for loss in losses:
            self._break(loss)
        return outcome

    def _too_late(self) -> TimedOut:
        return TimedOut(f"took longer than cbw-timeout, {self.timeout:g} s")

    def _fail(self, first: int, stop: int, error: OSError) -> None:
        """Break the snapshots that need any of [first, stop) from the source, or raise.

        Afterwards the newest epoch has all of these clusters, or there is none.
        """
        with self.requests.lock:
            loss = self._lose(self._needing(first, stop), first, stop, error)
        self._break(loss)

    def _outwait(self, first: int, stop: int) -> None:
        """Break also the snapshots being read from there just now, or raise.

        Such a reader looks at the mark before it answers.
        """
        with self.requests.lock:
            needing = self._needing(first, stop)
            for epoch in self.requests.find_readers(first, stop):
                if epoch not in needing:
                    needing.append(epoch)
            loss = self._lose(needing, first, stop, self._too_late())
        self._break(loss)

    def _lose(
        self, needing: list[Epoch], first: int, stop: int, error: OSError
    ) -> Loss:
        """Mark the snapshots of these epochs lost, or raise; hold the lock."""
        guest_fails = OnCbwError.BREAK_GUEST_WRITE
        if any(epoch.on_cbw_error is guest_fails for epoch in needing):
            raise error
        for epoch in needing:
            epoch.lose(f"could not preserve: {error.strerror or error}")
            reached("break.marked")
        self._breaking += needing
        return Loss(needing, self.newest, first, stop)

    def _break(self, loss: Loss) -> None:
        """Let go of what was marked lost, and let others overwrite its clusters."""
        # Before anybody goes on: what another thread has just marked, too. It has not
        # come so far as to say so yet.
        for epoch in list(self._breaking):
            epoch.confirm_lost()
        with self.requests.lock:
            for epoch in loss.epochs:
                self._breaking.remove(epoch)
                # It may have gone already, with one before it.
                if epoch in self.epochs:
                    self._retire(epoch)
            if loss.newest is not None:
                # Who was there and is still good has them, or has given them up. Not
                # in the newest of now: it may have begun since then, and need them.
                loss.newest.preserved[loss.first : loss.stop] = 1
            self.requests.changed()
        for epoch in loss.epochs:
            self.broke(epoch, epoch.lost or "")

    def _needing(self, first: int, stop: int) -> list[Epoch]:
        """Return the epochs whose good snapshots read any of these from the source."""
        held = bitarray(stop - first, endian="little")
        needing = []
        for epoch in reversed(self.epochs):
            held |= epoch.preserved[first:stop]
            if held.all():
                break
            if epoch.lost is None and not epoch.has_denied(first, stop, held):
                needing.append(epoch)
        return needing

    # -- for readers

    def watch(self, watch: Watch) -> None:
        """Call it with the clusters [first, stop) that each write has preserved."""
        with self.requests.lock:
            self._watchers = (*self._watchers, watch)

    def unwatch(self, watch: Watch) -> None:
        """Call it no more, once writes that are calling it have done so."""
        with self.requests.lock:
            self._watchers = tuple(w for w in self._watchers if w != watch)

    def chain(self, epoch: Epoch) -> list[Epoch]:
        """Return the epochs a snapshot reads from, in order; hold the lock."""
        return self.epochs[self.epochs.index(epoch) :]

    @staticmethod
    def holder(chain: list[Epoch], cluster: int, stop: int) -> tuple[Epoch | None, int]:
        """Return the first epoch that has a cluster, and where that run ends."""
        for epoch in chain:
            if epoch.preserved[cluster]:
                found = epoch.preserved.find(0, cluster, stop)
                return epoch, found if found >= 0 else stop
            found = epoch.preserved.find(1, cluster, stop)
            if found >= 0:
                stop = found
        return None, stop

    @staticmethod
    def split(chain: list[Epoch], first: int, stop: int) -> Split:
        """Return who has which of the clusters, the source and epochs, as bits."""
        on_source = ~chain[0].preserved[first:stop]
        parts = [(chain[0], ~on_source)]
        for epoch in chain[1:]:
            found = epoch.preserved[first:stop] & on_source
            parts.append((epoch, found))
            on_source &= ~found
        return on_source, [(epoch, bits) for epoch, bits in parts if bits.any()]

    # -- for the control path

    def append(self, epoch: Epoch) -> None:
        """Begin an epoch: a snapshot of this instant. The disk is drained."""
        with self.requests.lock:
            self.epochs.append(epoch)
            self.newest = epoch
            self._adapt()

    def retire(self, epoch: Epoch, reason: str) -> None:
        """End a snapshot: its readers get EIO, its data goes unless others need it."""
        with self.requests.lock:
            if epoch.lost is None:
                epoch.lose(reason)
                self._retire(epoch)
                self.requests.changed()

    def load(self, epochs: list[Epoch]) -> None:
        """Take over the epochs of an earlier daemon; `lost` ones are retired again."""
        with self.requests.lock:
            self.epochs = list(epochs)
            self.newest = epochs[-1] if epochs else None
            for epoch in epochs:
                if epoch.lost is not None and epoch in self.epochs:
                    # Its bits are about to say more than the store holds.
                    epoch.lose(epoch.lost)
                    self._retire(epoch)
            for epoch in self.epochs:
                if epoch.denied is not None:
                    # What was given up may not have been freed yet.
                    free = self._shed(epoch, 0, len(epoch.preserved))
                    self._garbage.append(free)
            self._adapt()

    def _adapt(self) -> None:
        """Let writes do as the most patient and the most exact snapshot wants."""
        default = self._timeout_default
        good = [epoch for epoch in self.epochs if epoch.lost is None]
        times = [default if e.timeout is None else e.timeout for e in good]
        self.timeout = max(times, default=default)
        self._has_holes = any(epoch.has_holes for epoch in good)

    def _retire(self, epoch: Epoch) -> None:
        self._adapt()
        index = self.epochs.index(epoch)
        if all(self._is_retired(older) for older in self.epochs[:index]):
            self._drop_until_good(index)
            return
        # The epoch before was retired and has come to include the others, or it is
        # good, or is breaking: then the rest follows when it retires.
        held = self.epochs[index - 1].preserved
        for retired in self._retired_from(index):
            duplicates = held & retired.preserved
            self._garbage.append(partial(_free, retired.store, duplicates))
            retired.preserved |= held
            reached("retire.merged")
            held = retired.preserved

    def _retired_from(self, index: int) -> Iterator[Epoch]:
        return takewhile(self._is_retired, self.epochs[index:])

    def _is_retired(self, epoch: Epoch) -> bool:
        return epoch.lost is not None and epoch not in self._breaking

    def _drop_until_good(self, index: int) -> None:
        """Drop the oldest epochs, all retired, up to the first good one."""
        while index < len(self.epochs) and self._is_retired(self.epochs[index]):
            index += 1
        for epoch in self.epochs[:index]:
            self._garbage.append(epoch.drop)
        del self.epochs[:index]
        if not self.epochs:
            self.newest = None

    def give_up(self, epoch: Epoch, first: int, stop: int) -> Callable[[], None]:
        """Preserve no longer for one snapshot what no other needs; hold the lock.

        Returns what gives the space back: to be called without the lock.
        """
        free = self._shed(epoch, first, stop)
        self.requests.changed()
        return free

    def _shed(self, since: Epoch, first: int, stop: int) -> Callable[[], None]:
        """Find what epochs need not have any more, as one of them gave it up."""
        needed = bitarray(stop - first, endian="little")
        shed: list[tuple[Store, bitarray]] = []
        is_concerned = False
        for epoch in self.epochs:
            # One that is breaking may be good again after a crash of the host.
            if not self._is_retired(epoch):
                if epoch.denied is None:
                    needed.setall(1)
                else:
                    needed |= ~epoch.denied[first:stop]
            is_concerned = is_concerned or epoch is since
            if is_concerned and not needed.all():
                unneeded = ~needed
                # What is not preserved is not in the store, or on its way there.
                shed.append((epoch.store, unneeded & epoch.preserved[first:stop]))
                epoch.preserved[first:stop] |= unneeded
                if epoch is self.newest:
                    self._shed_copies(unneeded, first)
            needed &= ~epoch.preserved[first:stop]

        def free() -> None:
            for store, unneeded in shed:
                for start, end in runs(unneeded, 0, len(unneeded)):
                    store.free(first + start, first + end)

        return free

    def _shed_copies(self, unneeded: bitarray, offset: int) -> None:
        """Let copies under way free what they bring in vain."""
        stop = offset + len(unneeded)
        for copy in self.requests.copies.values():
            if copy.first < stop and offset < copy.stop:
                start = max(0, copy.first - offset)
                found = runs(unneeded, start, min(stop, copy.stop) - offset)
                copy.unneeded += [(offset + a, offset + b) for a, b in found]

    def collect(self) -> None:
        """Give back the space of what was retired, once the state knows of it.

        Readers that still use it keep its files open, and look at `lost` afterwards.
        """
        while free := self._next_garbage():
            free()

    def _next_garbage(self) -> Callable[[], None] | None:
        with self.requests.lock:
            return self._garbage.pop(0) if self._garbage else None


def _free(store: Store, clusters: bitarray) -> None:
    for first, stop in runs(clusters, 0, len(clusters)):
        store.free(first, stop)
