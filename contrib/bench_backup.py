"""What can be measured of backups: how fast they are, and what they cost the guest.

Speed is that of what is done for the user: from the command to its end, when all is
durable. What the guest does is counted only while the job runs.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from bench_fio import MiB, fio_command, fio_numbers
from bench_measures import Sample, daemon_of, load, memory_of
from bench_processes import (
    PATIENCE_SECONDS,
    Failed,
    is_mounted,
    run,
    running,
    touch_memory,
    undisturbed,
    unmount_lazily,
)
from bench_sides import Mounted, Period

# What is allocated besides a target: preserved data, processes.
EXTRA_SIZE = 512 * MiB

# fio starts in less than half of it, and so does a job.
GUEST_START_SECONDS = JOB_START_SECONDS = 1.0

# Of its log: each line has the rate of so long, if there was something.
LOG_MILLISECONDS = 20

# 5 MB/s.
SLOW_BITS_PER_SECOND = "40M"

# Twice what the RAM tier takes.
OVERFLOW_SIZE = 256 * MiB


# --- Speed ----------------------------------------------------------------------


def backup(mounted: Mounted, seconds: float) -> Sample:
    """Return the speed of a full backup to a new file, in MB/s of data."""
    numbers, _ = timed_backup(mounted)
    return Sample(numbers["megabytes"], numbers)


def timed_backup(mounted: Mounted) -> tuple[dict[str, float], Period]:
    """Back up to a new file; return what that took as a whole, and when the job ran."""
    data = allocated(mounted)
    touch_memory(data + EXTRA_SIZE)
    start = time.monotonic()
    with mounted.backup(mounted.directory / "backup.raw") as job:
        period = job.finish()
        elapsed = time.monotonic() - start
    numbers = {
        "megabytes": data / 1e6 / elapsed,
        "seconds": elapsed,
        "job_seconds": period.ended - period.began,
    }
    return numbers, period


def allocated(mounted: Mounted) -> int:
    """Return the bytes of data in the source."""
    return mounted.source.stat().st_blocks * 512


# --- A busy guest ---------------------------------------------------------------


def backup_under_load(mounted: Mounted, seconds: float, *, of: str) -> Sample:
    """Return what a backup and a guest that writes make of each other."""
    log = mounted.directory / "guest"
    with running(*writing(mounted, 4, log)) as guest:
        time.sleep(GUEST_START_SECONDS)
        numbers, period = timed_backup(mounted)
        guest.stop()
    numbers["iops"] = rate_within(log.with_name("guest_iops.log"), period)
    return Sample(numbers[of], numbers)


def writing(mounted: Mounted, depth: int, log: Path) -> list[str]:
    """Return a guest that writes 4 KiB here and there until it is stopped."""
    return fio_command(
        mounted.live,
        mounted.size,
        rw="randwrite",
        bs="4k",
        iodepth=depth,
        norandommap=1,
        time_based=1,
        runtime=PATIENCE_SECONDS,
        write_iops_log=log,
        log_avg_msec=LOG_MILLISECONDS,
        log_unix_epoch=1,
        per_job_logs=0,
    )


def rate_within(log: Path, period: Period) -> float:
    """Return the mean IOPS in a period, from the lines that lie within it.

    fio writes no line for a time in which nothing was completed; that counts, too.
    """
    step = LOG_MILLISECONDS / 1000
    count = 0.0
    for line in log.read_text().splitlines():
        end, rate, *_ = line.split(",")
        if period.began + step <= int(end) / 1000 <= period.ended:
            count += int(rate) * step
    if not count:
        raise Failed("the guest wrote nothing while the job ran")
    return count / (period.ended - period.began)


# --- A slow target --------------------------------------------------------------


def slow_backup(mounted: Mounted, seconds: float) -> Sample:
    """Return how many times longer a guest's writes take during a slow backup: p99."""
    before = percentile(mounted, seconds)
    with slow_target(mounted) as target, mounted.backup(target) as job:
        time.sleep(JOB_START_SECONDS)
        during = percentile(mounted, seconds)
        start = time.monotonic()
        job.cancel()
        cancel = time.monotonic() - start
    numbers = {
        "p99_us": during * 1000,
        "p99_without_us": before * 1000,
        "cancel_ms": cancel * 1000,
    }
    return Sample(during / before, numbers)


def percentile(mounted: Mounted, seconds: float) -> float:
    """Return what 99 % of a guest's writes of 4 KiB do not exceed, in ms."""
    command = fio_command(
        mounted.live,
        mounted.size,
        rw="randwrite",
        bs="4k",
        iodepth=1,
        norandommap=1,
        time_based=1,
        runtime=f"{seconds * 1000:.0f}ms",
        ramp_time="500ms",
    )
    touch_memory(EXTRA_SIZE)
    output = run(*command, timeout=PATIENCE_SECONDS)
    value = fio_numbers(output, "write")["clat_p99_ms"]
    if not value:
        raise Failed("the guest wrote nothing")
    return value


@contextlib.contextmanager
def slow_target(mounted: Mounted) -> Iterator[Path]:
    """Make a file of the disk's size that takes 5 MB/s, and not a byte more."""
    path = mounted.directory / "slow.raw"
    path.touch()
    server = ("nbdkit", "--single", "--filter=rate", "memory", mounted.size)
    command = (*map(str, server), f"rate={SLOW_BITS_PER_SECOND}")
    try:
        with running("nbdfuse", path, "--command", *command) as daemon:
            daemon.wait_until(lambda: is_mounted(path))
            yield path
    finally:
        with undisturbed():
            unmount_lazily(path)


# --- Memory ---------------------------------------------------------------------


def memory_of_backup(mounted: Mounted, seconds: float) -> Sample:
    """Return the MiB that backups take at the most: in the daemon, and in the RAM tier.

    One is as fast as can be; one can not keep up with the guest, so that the RAM tier
    is filled. What is in that is in files on tmpfs, and no part of the daemon's RSS.
    """
    run(*load(mounted, io_size=64 * MiB), timeout=PATIENCE_SECONDS)
    pid, _ = daemon_of(mounted)
    before = memory_of(pid)["VmRSS"]
    # proc(5): the peak begins anew.
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    backup_under_load(mounted, seconds, of="megabytes")
    with slow_target(mounted) as target, mounted.backup(target) as job:
        time.sleep(JOB_START_SECONDS)
        run(*load(mounted, io_size=OVERFLOW_SIZE), timeout=PATIENCE_SECONDS)
        _, used = daemon_of(mounted)
        job.cancel()
    memory = memory_of(pid)
    grown = memory["VmHWM"] - before
    numbers = {"before": before, "rss_grown": grown, "ram_tier_used": used}
    return Sample(grown + used, memory | numbers)
