"""What is measured: the rows as data.

A row with two columns is judged by the ratio of their medians, a row with one column,
or with a second one only beside it, by the median itself.
"""

from dataclasses import dataclass
from functools import partial

from bench_backup import backup, backup_under_load, memory_of_backup, slow_backup
from bench_fio import GiB, TiB, direction_of
from bench_measures import (
    Measure,
    dd,
    longest,
    overwriting,
    peak_memory,
    read_with,
    save_bitmap,
    tar,
    timed,
)
from bench_mirror import complete_under_load, mirror, mirror_under_load

SPARSE_SIZE = 1 * TiB

# The rows on disk are about reading from the page cache: source, store and what the
# kernel caches of the snapshot's file have to fit.
DISK_SIZE_MAX = 2 * GiB


@dataclass(frozen=True)
class Column:
    side: str
    snapshots: int = 0
    bitmaps: int = 0
    # The disk of a sparse row, and how much of it is data.
    size: int = SPARSE_SIZE
    data: int = 0

    def __str__(self) -> str:
        if self.side == "ours" and self.snapshots > 1:
            return f"ours, {self.snapshots} snapshots"
        if self.bitmaps:
            return f"ours, {self.bitmaps} bitmaps"
        if self.data:
            return f"{self.side}, {self.data // GiB} of {self.size // GiB} GiB"
        return self.side


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    unit: str
    columns: tuple[Column, ...]
    measure: Measure
    # The least ratio, or the greatest value.
    goal: float
    # On tmpfs (fast), so that a disk's noise stays out; or on disk.
    place: str = "fast"
    # Disks as the columns say instead of a full one of --size.
    is_sparse: bool = False
    # The second column is there to be looked at; the goal is about the first.
    is_beside: bool = False

    @property
    def judged(self) -> tuple[Column, ...]:
        return self.columns[:1] if self.is_beside else self.columns

    @property
    def is_ratio(self) -> bool:
        return len(self.judged) == 2

    def is_reached(self, value: float) -> bool:
        return value >= self.goal if self.is_ratio else value <= self.goal


# --- The table ------------------------------------------------------------------

LIVE = (Column("ours"), Column("peer"))
MIRROR = (Column("ours"), Column("peer-nbd"))
SNAPSHOT = (Column("ours", snapshots=1), Column("peer", snapshots=1))

ROWS = (
    *(
        Row(
            name=f"live-{pattern}-qd{depth}",
            title=f"live, 4 KiB random {direction_of(pattern)}, qd {depth}",
            unit="IOPS",
            columns=LIVE,
            measure=timed(pattern, "4k", depth),
            goal=1.5,
        )
        for pattern in ("randread", "randwrite")
        for depth in (1, 16)
    ),
    *(
        Row(
            name=f"live-{pattern}-1m",
            title=f"live, 1 MiB sequential {pattern}",
            unit="MB/s",
            columns=LIVE,
            measure=timed(pattern, "1m", 1),
            goal=1.2,
        )
        for pattern in ("read", "write")
    ),
    Row(
        name="bitmaps-randwrite",
        title="live, 4 KiB random write, qd 16, with 4 bitmaps / with none (both ours)",
        unit="IOPS",
        columns=(Column("ours", bitmaps=4), Column("ours")),
        measure=timed("randwrite", "4k", 16),
        goal=0.95,
    ),
    Row(
        name="bitmaps-first",
        title="same, each write the first one in its granule, mostly",
        unit="IOPS",
        columns=(Column("ours", bitmaps=4), Column("ours")),
        measure=overwriting("randwrite", "4k", 16, part=1 / 32),
        goal=0.9,
    ),
    Row(
        name="bitmaps-save",
        title="save the bitmap of 10 TiB after 100 writes all over it",
        unit="ms",
        columns=(Column("ours", bitmaps=1, size=10 * TiB),),
        measure=save_bitmap,
        goal=1000,
        place="disk",
        is_sparse=True,
    ),
    Row(
        name="cbw-randwrite",
        title="fresh snapshot, 4 KiB random write, qd 16, 1/32 of the disk",
        unit="IOPS",
        columns=SNAPSHOT,
        measure=overwriting("randwrite", "4k", 16, part=1 / 32),
        goal=2.0,
    ),
    Row(
        name="cbw-8-snapshots",
        title="same, with 8 snapshots / with 1 (both ours)",
        unit="IOPS",
        columns=(Column("ours", snapshots=8), Column("ours", snapshots=1)),
        measure=overwriting("randwrite", "4k", 16, part=1 / 32),
        goal=0.9,
    ),
    Row(
        name="cbw-write-1m",
        title="fresh snapshot, 1 MiB sequential overwrite of the disk",
        unit="MB/s",
        columns=SNAPSHOT,
        measure=overwriting("write", "1m", 1, part=1),
        goal=1.0,
    ),
    *(
        Row(
            name=f"snapshot-{state}-{program.__name__}",
            title=f"read a snapshot, {part} overwritten, by {program.__name__}",
            unit="MB/s",
            columns=SNAPSHOT,
            measure=read_with(program, overwritten),
            goal=1.2,
            place="disk",
        )
        for state, part, overwritten in (
            ("untouched", "nothing", 0.0),
            ("overwritten", "30 %", 0.3),
        )
        for program in (dd, tar)
    ),
    Row(
        name="create-write",
        title="snapshot create, 1 TiB, under load: longest guest write",
        unit="ms",
        columns=(Column("ours"),),
        measure=partial(longest, of="lat_max_ms"),
        goal=50,
        is_sparse=True,
    ),
    Row(
        name="create-held",
        title="snapshot create, 1 TiB, under load: longest hold",
        unit="ms",
        columns=(Column("ours"),),
        measure=partial(longest, of="held_max_ms"),
        goal=50,
        is_sparse=True,
    ),
    Row(
        name="memory",
        title="daemon's peak RSS, 1 TiB, 3 snapshots",
        unit="MiB",
        columns=(Column("ours", snapshots=3),),
        measure=peak_memory,
        goal=120,
        is_sparse=True,
    ),
    Row(
        name="backup-idle",
        title="backup, idle guest",
        unit="MB/s",
        columns=LIVE,
        measure=backup,
        goal=1.2,
    ),
    Row(
        name="backup-cp",
        title="same, against cp --sparse=never and fsync",
        unit="MB/s",
        columns=(Column("ours"), Column("cp")),
        measure=backup,
        goal=0.8,
    ),
    Row(
        name="backup-sparse",
        title="backup of 1 GiB in a disk of 1 TiB / of 1 GiB (both ours)",
        unit="MB/s",
        columns=(
            Column("ours", size=1 * TiB, data=1 * GiB),
            Column("ours", size=1 * GiB, data=1 * GiB),
        ),
        measure=backup,
        # 1.2 times as long.
        goal=0.83,
        is_sparse=True,
    ),
    Row(
        name="backup-busy",
        title="backup, guest writes random 4 KiB, qd 4: the backup",
        unit="MB/s",
        columns=LIVE,
        measure=partial(backup_under_load, of="megabytes"),
        goal=1.0,
    ),
    Row(
        name="backup-busy-guest",
        title="same: the guest, during the backup",
        unit="IOPS",
        columns=LIVE,
        measure=partial(backup_under_load, of="iops"),
        goal=1.5,
    ),
    Row(
        name="backup-slow-p99",
        title="backup to 5 MB/s, 4 KiB random write, qd 1: p99 / without",
        unit="times",
        columns=LIVE,
        measure=slow_backup,
        goal=3,
        is_beside=True,
    ),
    Row(
        name="mirror-idle",
        title="mirror until it is ready, idle guest",
        unit="MB/s",
        columns=MIRROR,
        measure=mirror,
        goal=1.0,
    ),
    Row(
        name="mirror-busy",
        title="same, guest writes 50 MB/s, 16 KiB here and there",
        unit="MB/s",
        columns=MIRROR,
        measure=mirror_under_load,
        goal=1.0,
    ),
    Row(
        name="mirror-complete",
        title="same guest, the disk moves: longest write",
        unit="ms",
        columns=MIRROR,
        measure=complete_under_load,
        goal=100,
        is_beside=True,
    ),
    Row(
        name="backup-memory",
        title="backups under load: growth of daemon's peak RSS and RAM tier",
        unit="MiB",
        columns=(Column("ours"),),
        measure=memory_of_backup,
        # The limit of the RAM tier, 128 MiB by default, and 64 MiB.
        goal=192,
    ),
)
