"""What can be measured of live files and snapshots; backups have their own module.

A measure is given a source that is being served and returns one number; what else it
saw goes into `details`, for the reader.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench_fio import KiB, MiB, direction_of, fio_command, fio_numbers
from bench_processes import PATIENCE_SECONDS, Failed, run, running, touch_memory
from bench_sides import Mounted

# So many snapshots are created in one run under load.
CREATE_COUNT = 5


@dataclass(frozen=True)
class Sample:
    value: float
    details: dict[str, float] = field(default_factory=dict)


Measure = Callable[[Mounted, float], Sample]


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
        # What the kernel caches of the snapshot.
        touch_memory(mounted.size)
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
    pid, used = daemon_of(mounted)
    memory = memory_of(pid)
    return Sample(memory["VmHWM"], memory | {"ram_tier_used": used})


def save_bitmap(mounted: Mounted, seconds: float) -> Sample:
    """Return how long it takes to save what 100 writes have changed, in ms."""
    run(*load(mounted, io_size=100 * 4 * KiB), timeout=PATIENCE_SECONDS)
    began = time.monotonic()
    mounted.command("bitmap", "save")
    took = time.monotonic() - began
    began = time.monotonic()
    # What the command takes by itself.
    mounted.command("bitmap", "list")
    return Sample(took * 1000, {"command_ms": (time.monotonic() - began) * 1000})


def daemon_of(mounted: Mounted) -> tuple[int, float]:
    """Return the process that serves the mount, and the MiB in its RAM tier."""
    status = json.loads(mounted.command("status", "--json"))
    try:
        return int(status["pid"]), status["ram"]["used"] / MiB
    except (KeyError, TypeError) as e:
        raise Failed(f"status --json has no {e}") from e


def memory_of(pid: int) -> dict[str, float]:
    """Return the sizes of a process that proc(5) gives, in MiB."""
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in {"VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem"}:
            fields[name] = int(value.split()[0]) * KiB / MiB
    return fields
