"""fio: the command, and what it answers."""

import json
import os
from pathlib import Path

from bench_processes import Failed

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB


def fio_command(path: Path, size: int, **options: object) -> list[str]:
    filename = str(path).replace(":", "\\:")
    file = {"direct": 1, "fallocate": "none", "allow_file_create": 0}
    return command(ioengine="libaio", filename=filename, size=size, **file, **options)


def fio_nbd_command(socket: Path, size: int, **options: object) -> list[str]:
    """Return the same for what an NBD server has on a Unix socket."""
    uri = f"nbd+unix:///?socket={socket}"
    return command(ioengine="nbd", uri=uri, size=size, **options)


def command(**options: object) -> list[str]:
    words = (f"--{name}={value}" for name, value in options.items())
    return ["fio", "--name=bench", "--output-format=json", *words]


def fio_numbers(output: str, direction: str) -> dict[str, float]:
    """Return what fio says of one direction, in IOPS, MB/s and milliseconds."""
    try:
        # A warning may stand before the JSON.
        job = json.loads(output[output.index("{") :])["jobs"][0]
    except ValueError:
        raise Failed(f"fio: {output[:80]!r}") from None
    if job["error"]:
        raise Failed(f"fio: {os.strerror(job['error'])}")
    numbers = job[direction]
    return {
        "iops": numbers["iops"],
        "megabytes": numbers["bw_bytes"] / 1e6,
        "lat_max_ms": numbers["lat_ns"]["max"] / 1e6,
        "clat_max_ms": numbers["clat_ns"]["max"] / 1e6,
        # Not there if nothing was completed.
        "clat_p99_ms": numbers["clat_ns"].get("percentile", {}).get("99.000000", 0)
        / 1e6,
    }


def direction_of(pattern: str) -> str:
    return "read" if pattern.endswith("read") else "write"
