"""What can be measured of mirrors: when they are ready, and what a move costs.

Speed is that of what is done for the user: from the command until the target is like
the disk, and durable.
"""

import time

from bench_backup import EXTRA_SIZE, GUEST_START_SECONDS, allocated
from bench_fio import fio_numbers
from bench_measures import Sample
from bench_processes import PATIENCE_SECONDS, running, touch_memory
from bench_sides import Mounted

# 50 MB/s, as QEMU counts when it speaks of converging.
GUEST_RATE = "50m"


def mirror(mounted: Mounted, seconds: float) -> Sample:
    """Return how fast a full mirror of an idle disk is ready, in MB/s of data."""
    return timed_mirror(mounted)


def timed_mirror(mounted: Mounted) -> Sample:
    data = allocated(mounted)
    touch_memory(data + EXTRA_SIZE)
    start = time.monotonic()
    with mounted.mirror(mounted.directory / "mirror.raw") as job:
        job.ready()
        elapsed = time.monotonic() - start
    value = data / 1e6 / elapsed
    return Sample(value, {"megabytes": value, "seconds": elapsed})


def mirror_under_load(mounted: Mounted, seconds: float) -> Sample:
    """Return the same while a guest writes 50 MB/s."""
    with running(*writing(mounted, PATIENCE_SECONDS)) as guest:
        time.sleep(GUEST_START_SECONDS)
        sample = timed_mirror(mounted)
        guest.stop()
    return sample


def complete_under_load(mounted: Mounted, seconds: float) -> Sample:
    """Return the longest write of a guest, in ms, while its disk moves."""
    touch_memory(allocated(mounted) + EXTRA_SIZE)
    with mounted.mirror(mounted.directory / "mirror.raw") as job:
        job.ready()
        with running(*writing(mounted, seconds)) as guest:
            time.sleep(seconds / 2)
            start = time.monotonic()
            job.complete()
            elapsed = time.monotonic() - start
            numbers = fio_numbers(guest.output(PATIENCE_SECONDS), "write")
    return Sample(numbers["lat_max_ms"], numbers | {"complete_seconds": elapsed})


def writing(mounted: Mounted, seconds: float) -> list[str]:
    """Return a guest that writes 50 MB/s here and there."""
    return mounted.guest(
        rw="randwrite",
        bs="16k",
        iodepth=4,
        norandommap=1,
        time_based=1,
        runtime=f"{seconds * 1000:.0f}ms",
        rate=GUEST_RATE,
    )
