"""Disks in memory, with the snapshots and stores a test wants."""

import itertools
from collections.abc import Callable
from uuid import uuid4

from bitarray import bitarray

from fleecefs.block.disk import Disk, freeze
from fleecefs.block.epoch import Epoch, History, OnCbwError
from fleecefs.block.image import Image
from fleecefs.block.memory import MemoryImage
from fleecefs.block.snapshot import Snapshot
from fleecefs.block.store import Budget, Store, Tier
from tests.support.running import WatchedRequests

CLUSTER = 4096

BREAK_SNAPSHOT = OnCbwError.BREAK_SNAPSHOT
BREAK_GUEST_WRITE = OnCbwError.BREAK_GUEST_WRITE

_numbers = itertools.count(1)


def clusters(letters: str, cluster_size: int = CLUSTER) -> bytes:
    """Return a cluster full of each letter; `.` is a cluster of zeroes."""
    return b"".join(
        (b"\0" if letter == "." else letter.encode()) * cluster_size
        for letter in letters
    )


def letters(data: bytes | memoryview, cluster_size: int = CLUSTER) -> str:
    """Return what `clusters` was given; `?` for a cluster that is not all one byte."""
    data = bytes(data)
    found = ""
    for at in range(0, len(data), cluster_size):
        cluster = data[at : at + cluster_size]
        is_whole = cluster.count(cluster[:1]) == len(cluster)
        found += cluster[:1].decode("latin-1") if is_whole else "?"
    return found.replace("\0", ".")


def make_bits(size: int, cluster_size: int = CLUSTER) -> bitarray:
    """Return clear bits, in whole words as those in use are."""
    count = -(-size // cluster_size)
    return bitarray(-(-count // 64) * 64, endian="little")


def make_disk(
    data: bytes = b"",
    *,
    source: Image | None = None,
    cluster_size: int = CLUSTER,
    timeout: float = 10.0,
    broke: Callable[[Epoch, str], None] = lambda epoch, reason: None,
    name: str = "disk",
) -> Disk:
    """Return a disk in memory that holds `data`, or one over another source."""
    if source is None:
        source = MemoryImage(len(data), data)
    history = History(
        source, WatchedRequests(), cluster_size, timeout=timeout, broke=broke
    )
    return Disk(name, uuid4(), source, history)


def make_tier(
    disk: Disk,
    name: str = "disk",
    image: Image | None = None,
    budget: Budget | None = None,
) -> Tier:
    return Tier(
        name,
        image or MemoryImage(disk.size),
        make_bits(disk.size, disk.cluster_size),
        budget or Budget(None, name),
        disk.cluster_size,
    )


def make_epoch(
    disk: Disk, *tiers: Tier, on_cbw_error: OnCbwError = BREAK_SNAPSHOT
) -> Epoch:
    """Return an epoch for a disk; its store is one tier without a limit, or `tiers`."""
    return Epoch(
        next(_numbers),
        make_bits(disk.size, disk.cluster_size),
        Store(list(tiers) or [make_tier(disk)], disk.cluster_size, disk.size),
        on_cbw_error=on_cbw_error,
    )


def snapshot_of(disk: Disk, epoch: Epoch) -> Snapshot:
    return Snapshot(
        disk.id,
        disk.history,
        epoch,
        size=disk.size,
        created_ns=0,
        allocated=disk.allocated(),
    )


def take_snapshot(
    disk: Disk, *tiers: Tier, on_cbw_error: OnCbwError = BREAK_SNAPSHOT
) -> Snapshot:
    """Freeze one disk."""
    epoch = make_epoch(disk, *tiers, on_cbw_error=on_cbw_error)
    freeze([disk], [epoch])
    return snapshot_of(disk, epoch)


def delete_snapshot(disk: Disk, snapshot: Snapshot) -> None:
    """Delete a snapshot and give back its space."""
    disk.history.retire(snapshot.epoch, "deleted")
    disk.history.collect()


def image_of(snapshot: Snapshot, tier: int = 0) -> Image:
    """Return the file of one tier of a snapshot's own store."""
    return snapshot.epoch.store.tiers[tier].image


def preserved(snapshot: Snapshot) -> str:
    """Return a `1` for each cluster that the snapshot's own epoch has."""
    count = -(-snapshot.size // CLUSTER)
    return snapshot.epoch.preserved[:count].to01()
