"""The shapes of what the commands return, for those who read them.

As on the wire: hyphens in the keys, sizes in bytes, times in seconds since 1970,
durations in seconds.
"""

from typing import NotRequired, TypedDict


class SnapshotDisk(TypedDict):
    """One disk of a snapshot."""

    name: str
    state: str
    # Why it is broken.
    reason: str | None
    size: int
    # What has been overwritten since, and in which tier it lies.
    preserved: int
    ram: int
    disk: int


class Snapshot(TypedDict):
    """fleecefs-snapshot-create, -show and, in a list, -list."""

    name: str
    created: float
    state: str
    # How long writers were held at the instant.
    held: float
    disks: list[SnapshotDisk]


Disk = TypedDict(
    "Disk",
    {
        "name": str,
        "source": str,
        "size": int,
        "cluster-size": int,
        "id": object,
        "flush-error": str | None,
        "snapshots": int,
        "reads": int,
        "writes": int,
    },
)

Policy = TypedDict(
    "Policy", {"on-cbw-error": str, "cbw-timeout": float, "durability": str}
)


class StoreUse(TypedDict):
    """The disk tiers of all snapshots together."""

    directory: str
    limit: int | None
    used: int
    peak: int


class RamUse(TypedDict):
    """The RAM tiers of all snapshots together."""

    limit: int | None
    used: int
    peak: int


Cost = TypedDict(
    "Cost",
    {
        # Guest writes that waited for the job to preserve what they overwrote, and
        # how long the slowest did.
        "waited": int,
        "longest-wait": float,
        # What is preserved for the job now, and was at the most, in each tier.
        "ram": int,
        "ram-peak": int,
        "disk": int,
        "disk-peak": int,
    },
)


class DirtyBitmap(TypedDict):
    """What is known of a dirty bitmap."""

    disk: str
    name: str
    # Dirty bytes, in whole bits; of a busy one, what its job is about.
    count: int
    granularity: int
    recording: bool
    # A job uses it.
    busy: bool
    persistent: bool
    inconsistent: bool
    # Whether it records from when the disk is mounted.
    auto: bool
    # Why it is inconsistent.
    reason: str | None
    # The qcow2 file that it is saved in.
    container: str | None


Job = TypedDict(
    "Job",
    {
        "id": str,
        "type": str,
        # The name of the disk.
        "disk": str,
        "status": str,
        # Bytes done, and what 100 % are: an estimate.
        "current": int,
        "total": int,
        # The limit, 0 for none, and what it is now, in bytes a second.
        "speed": int,
        "speed-now": float,
        # Seconds to go, if that can be told.
        "eta": float | None,
        "user-paused": bool,
        "io-status": str,
        "cancelled": bool,
        # Why it failed, or that it was cancelled.
        "error": str | None,
        "auto-finalize": bool,
        "auto-dismiss": bool,
        "created": float,
        "elapsed": float,
        # How many daemons it has outlived.
        "restarts": int,
        "target": str,
        "format": str,
        # Of a backup.
        "sync": str | None,
        "backing": str | None,
        # What a backup has begun anew, or where a comparison expects differences.
        "bitmap": str | None,
        "bitmap-mode": str | None,
        # Why it is a full backup instead of an increment.
        "fell-back": str | None,
        "cost": Cost,
        # From here on of a comparison. The bytes that differ outside the bitmap and
        # within, and how many extents are outside; None until all is compared.
        "differs": NotRequired[int | None],
        "differs-dirty": NotRequired[int | None],
        "extent-count": NotRequired[int | None],
        # The first of those: offset and length.
        "extents": NotRequired[list[list[int]]],
        # The bytes that are dirty in the bitmap, in whole bits.
        "dirty": NotRequired[int | None],
        # From here on of a mirror.
        "copy-mode": NotRequired[str],
        # Whether the target has every write before it is answered.
        "actively-synced": NotRequired[bool],
        # What the guest makes dirty, in bytes a second of whole granules.
        "dirty-rate": NotRequired[float],
        # False: the guest writes faster than is copied.
        "converges": NotRequired[bool],
        # For how long writers were held at instants, at the most.
        "held": NotRequired[float],
        # Whether the disk lives on the target now.
        "moved": NotRequired[bool],
    },
)


Status = TypedDict(
    "Status",
    {
        "mount": str,
        "state": str,
        "runtime": str,
        "version": str,
        "pid": int,
        "keeper-pid": int | None,
        "generation": int,
        "started": float,
        "policy": Policy,
        "disks": list[Disk],
        "snapshots": list[Snapshot],
        "bitmaps": list[DirtyBitmap],
        "store": StoreUse,
        "ram": RamUse,
        "jobs": list[Job],
    },
)


class MapExtent(TypedDict):
    """A part of a file whose bytes all lie in one place."""

    start: int
    length: int
    # False: reads as zeroes and takes no space.
    data: bool
    where: str


class Map(TypedDict):
    """fleecefs-map; `next` is where to go on if there are more extents."""

    size: int
    extents: list[MapExtent]
    next: int | None
