"""What is measured: the rows as data, and the measures that they name.

A row with two columns is judged by the ratio of their medians, a row with one column
by the median itself. A measure is given a source that is being served and returns one
number; what else it saw goes into `details`, for the reader.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench_fio import GiB, KiB, MiB, TiB, direction_of, fio_command, fio_numbers
from bench_processes import Failed, run, running
from bench_sides import Mounted

# Nothing here takes minutes, unless a side hangs.
PATIENCE_SECONDS = 600

# So many snapshots are created in one run under load.
CREATE_COUNT = 5

SPARSE_SIZE = 1 * TiB

# The rows on disk are about reading from the page cache: source, store and what the
# kernel caches of the snapshot's file have to fit.
DISK_SIZE_MAX = 2 * GiB


@dataclass(frozen=True)
class Sample:
    value: float
    details: dict[str, float] = field(default_factory=dict)


Measure = Callable[[Mounted, float], Sample]


@dataclass(frozen=True)
class Column:
    side: str
    snapshots: int = 0

    def __str__(self) -> str:
        if self.side == "ours" and self.snapshots > 1:
            return f"ours, {self.snapshots} snapshots"
        return self.side


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    unit: str
    columns: tuple[Column, ...]
    measure: Measure
    # With two columns the least ratio, with one the greatest value.
    goal: float
    # On tmpfs (fast), so that a disk's noise stays out; or on disk.
    place: str = "fast"
    # A disk of 1 TiB without data instead of a full one of --size.
    is_sparse: bool = False

    @property
    def is_ratio(self) -> bool:
        return len(self.columns) == 2

    def is_reached(self, value: float) -> bool:
        return value >= self.goal if self.is_ratio else value <= self.goal


# --- Reading and writing the live file ------------------------------------------


def timed(pattern: str, block: str, depth: int) -> Measure:
    """Return a measure that runs for a time, after a start that does not count."""

    def measure(mounted: Mounted, seconds: float) -> Sample:
        command = fio_command(
            mounted.live,
            mounted.size,
            rw=pattern,
            bs=block,
            iodepth=depth,
            time_based=1,
            runtime=f"{seconds * 1000:.0f}ms",
            ramp_time="500ms",
        )
        return rate(run(*command, timeout=PATIENCE_SECONDS), pattern, block)

    return measure


def overwriting(pattern: str, block: str, depth: int, part: float) -> Measure:
    """Return a measure that writes a part of the disk, no piece of it twice."""

    def measure(mounted: Mounted, seconds: float) -> Sample:
        command = fio_command(
            mounted.live,
            mounted.size,
            rw=pattern,
            bs=block,
            iodepth=depth,
            io_size=pieces(mounted.size * part),
            norandommap=0,
        )
        return rate(run(*command, timeout=PATIENCE_SECONDS), pattern, block)

    return measure


def pieces(length: float) -> int:
    """Round to whole MiB."""
    return max(1, round(length / MiB)) * MiB


def rate(output: str, pattern: str, block: str) -> Sample:
    numbers = fio_numbers(output, direction_of(pattern))
    return Sample(numbers["iops" if block == "4k" else "megabytes"])


# --- Reading a snapshot ---------------------------------------------------------


def read_with(command: Callable[[Path], list[str]], overwritten: float) -> Measure:
    """Return a measure that reads the newest snapshot once, in MB/s.

    `overwritten` is the part of the disk that is written before, in random 4 KiB.
    """

    def measure(mounted: Mounted, seconds: float) -> Sample:
        if overwritten:
            overwriting("randwrite", "4k", 16, overwritten)(mounted, seconds)
        warm(mounted.source)
        start = time.monotonic()
        count = run(*command(mounted.snapshots[-1]), timeout=PATIENCE_SECONDS)
        elapsed = time.monotonic() - start
        # dd prints nothing: it has read to the end or failed.
        if count and int(count) < mounted.size:
            raise Failed(f"only {int(count)} bytes came out of the snapshot")
        return Sample(mounted.size / 1e6 / elapsed)

    return measure


def warm(source: Path) -> None:
    """Have the source in the page cache, and no write-back while we measure."""
    os.sync()
    with source.open("rb", buffering=0) as file:
        while file.read(1 * MiB):
            pass


def dd(path: Path) -> list[str]:
    return ["dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none"]


def tar(path: Path) -> list[str]:
    # Through a pipe: GNU tar does not read when it writes to /dev/null. Its exit code
    # 1 means that a file looked different after reading, as the peer's does, whose
    # mtime is always now; a read that failed is 2.
    script = 'tar -cf - -C "$1" -- "$2" | wc -c; test "${PIPESTATUS[0]}" -le 1'
    return ["bash", "-c", script, "bash", str(path.parent), path.name]


# --- Snapshots of a sparse disk -------------------------------------------------


def load(mounted: Mounted, **limit: object) -> list[str]:
    # Without a random map, which at 1 TiB would take fio seconds to make.
    options = {"rw": "randwrite", "bs": "4k", "iodepth": 16, "norandommap": 1}
    return fio_command(mounted.live, mounted.size, **options, **limit)


def create_under_load(mounted: Mounted, seconds: float) -> dict[str, float]:
    """Return what fio and `snapshot create` report of several creations."""
    limit = {"time_based": 1, "runtime": f"{seconds * 1000:.0f}ms"}
    output = run(*load(mounted, **limit), timeout=PATIENCE_SECONDS)
    before = fio_numbers(output, "write")

    held = []
    with running(*load(mounted, **limit)) as fio:
        for index in range(CREATE_COUNT):
            time.sleep(seconds / (CREATE_COUNT + 1))
            created = mounted.command("snapshot", "create", f"load{index}", "--json")
            held.append(held_seconds(created) * 1000)
        during = fio_numbers(fio.output(PATIENCE_SECONDS), "write")
    return during | {
        "held_max_ms": max(held),
        "lat_max_before_ms": before["lat_max_ms"],
        "iops_before": before["iops"],
    }


def held_seconds(output: str) -> float:
    try:
        return float(json.loads(output)["held"])
    except (ValueError, KeyError, TypeError) as e:
        raise Failed(f"snapshot create --json has no 'held': {output[:80]!r}") from e


def longest(mounted: Mounted, seconds: float, *, of: str) -> Sample:
    numbers = create_under_load(mounted, seconds)
    return Sample(numbers[of], numbers)


def peak_memory(mounted: Mounted, seconds: float) -> Sample:
    """Return the peak RSS of the daemon in MiB, after writes and snapshot reads."""
    run(*load(mounted, io_size=64 * MiB), timeout=PATIENCE_SECONDS)
    for snapshot in mounted.snapshots:
        argv = fio_command(
            snapshot,
            mounted.size,
            rw="randread",
            bs="4k",
            iodepth=16,
            norandommap=1,
            io_size=16 * MiB,
        )
        run(*argv, timeout=PATIENCE_SECONDS)
        run(*dd(snapshot), "count=256", timeout=PATIENCE_SECONDS)
    status = json.loads(mounted.command("status", "--json"))
    try:
        memory = memory_of(int(status["pid"]))
        used = status["ram"]["used"] / MiB
    except (KeyError, TypeError) as e:
        raise Failed(f"status --json has no {e}") from e
    return Sample(memory["VmHWM"], memory | {"ram_tier_used": used})


def memory_of(pid: int) -> dict[str, float]:
    """Return the sizes of a process that proc(5) gives, in MiB."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"}:
            fields[name] = int(value.split()[0]) * KiB / MiB
    return fields


# --- The table ------------------------------------------------------------------

LIVE = (Column("ours"), Column("peer"))
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
)
