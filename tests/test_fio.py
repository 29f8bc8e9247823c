"""fio verifies every block it wrote, while snapshots come and go."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from fleecefs.units import MiB
from tests.support.mount import PATIENCE, Mount, run

SIZE = 24 * MiB


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--ioengine=psync --bs=512 --io_size=2M", id="psync-512"),
        pytest.param("--ioengine=psync --bs=4k --sync=dsync", id="psync-4k-dsync"),
        pytest.param("--ioengine=psync --bs=1M --direct=0", id="psync-1M-buffered"),
        pytest.param(
            "--ioengine=libaio --iodepth=16 --bsrange=512-64k", id="libaio-512-to-64k"
        ),
        pytest.param("--ioengine=libaio --iodepth=16 --bs=4k", id="libaio-4k"),
        pytest.param(
            "--ioengine=libaio --iodepth=4 --bs=64k --sync=dsync --fsync=16",
            id="libaio-64k-dsync",
        ),
        pytest.param("--ioengine=io_uring --iodepth=32 --bs=4k", id="io_uring-4k"),
        pytest.param(
            "--ioengine=io_uring --iodepth=8 --bs=12k --rw=write",
            id="io_uring-12k-sequential",
        ),
        pytest.param("--ioengine=io_uring --iodepth=4 --bs=1M", id="io_uring-1M"),
        pytest.param(
            "--ioengine=mmap --bs=4k --direct=0 --fsync=64", id="mmap-4k-buffered"
        ),
    ],
)
@pytest.mark.parametrize(
    "mount_options",
    [
        pytest.param([], id="ram"),
        pytest.param(["--ram-limit=4M", "--cluster-size=64K"], id="both-tiers"),
    ],
)
def test_fio_reads_what_it_wrote_under_snapshots(mounted, options, mount_options):
    mount = mounted({"a.raw": SIZE}, *mount_options)
    fio = Fio(mount.live("a.raw"), *options.split())

    count = take_snapshots_while_running(mount, fio)

    job = fio.result()
    assert job["error"] == 0
    assert job["write"]["io_bytes"] > 0
    # Half of it or more are the reads that verify.
    assert job["read"]["io_bytes"] >= job["write"]["io_bytes"]
    assert count > 0


def test_fio_finds_what_it_wrote_after_a_remount(mounted):
    mount = mounted({"a.raw": SIZE})
    options = ["--ioengine=libaio", "--iodepth=16", "--bs=4k", "--rw=randwrite"]
    written = Fio(mount.live("a.raw"), *options, "--do_verify=0").result()
    mount.create("s")
    mount.remount()

    live = Fio(mount.live("a.raw"), *options, "--verify_only").result()
    # fio opens for writing what it verifies, which a snapshot is not for.
    copy = mount.directory / "copy"
    run("cp", mount.snapshot("s", "a.raw"), copy)
    snapshot = Fio(copy, *options, "--verify_only").result()

    for job in live, snapshot:
        assert job["read"]["io_bytes"] == written["write"]["io_bytes"] > 0


def take_snapshots_while_running(mount: Mount, fio: "Fio") -> int:
    """Take, read and delete snapshots until fio has ended; return how many."""
    choice = random.Random(0)
    seen: dict[str, tuple[int, bytes]] = {}
    count = 0
    while fio.is_running or not count:
        name = f"s{count}"
        count += 1
        mount.create(name)
        for each, (offset, content) in seen.items():
            with open(mount.snapshot(each, "a.raw"), "rb") as file:
                assert os.pread(file.fileno(), MiB, offset) == content
        offset = choice.randrange(SIZE - MiB)
        with open(mount.snapshot(name, "a.raw"), "rb") as file:
            seen[name] = offset, os.pread(file.fileno(), MiB, offset)
        if len(seen) > 4:
            oldest = choice.choice(list(seen))
            del seen[oldest]
            mount.delete(oldest)
    return count


class Fio:
    """A run of fio on one file."""

    def __init__(self, path: Path, *options: str) -> None:
        self._process = subprocess.Popen(
            [
                "fio",
                "--name=job",
                f"--filename={path}",
                f"--size={SIZE}",
                "--rw=randrw",
                "--direct=1",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_backlog=64",
                "--randseed=1",
                "--allow_file_create=0",
                "--output-format=json",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Where fio leaves what it knows of a run.
            cwd=path.parent.parent,
        )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def result(self):
        """Wait, and return what fio tells of its one job."""
        try:
            output, complaint = self._process.communicate(timeout=PATIENCE)
        finally:
            self._process.kill()
        assert self._process.returncode == 0, output + complaint
        return json.loads(output[output.index("{") :])["jobs"][0]
