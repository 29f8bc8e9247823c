"""Programs that people use on disk images and backups: qemu, rsync, tar, cp, mount."""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from fleecefs.units import KiB, MiB
from tests.support.mount import Mount, filesystem, loop_device, run

SIZE = 8 * MiB

# Where there is data; the rest are holes.
EXTENTS = [(0, 256 * KiB), (4 * MiB, 100 * KiB), (SIZE - 4 * KiB, 4 * KiB)]
DATA = sum(length for _, length in EXTENTS)


def sparse_image(seed: int = 0) -> bytes:
    content = bytearray(SIZE)
    for offset, length in EXTENTS:
        content[offset : offset + length] = random.Random(seed).randbytes(length)
    return bytes(content)


@pytest.fixture
def snapshotted(mounted) -> Mount:
    """A mount with a sparse disk, a snapshot of it, and both overwritten since."""
    mount = mounted({"a.raw": SIZE})
    content = sparse_image()
    with open(mount.live("a.raw"), "r+b") as live:
        for offset, length in EXTENTS:
            os.pwrite(live.fileno(), content[offset : offset + length], offset)
        mount.create("s")
        # Data, a bound between data and hole, and a hole.
        for offset in 0, 128 * KiB - 100, 200 * KiB, 2 * MiB, SIZE - 2 * KiB:
            os.pwrite(live.fileno(), b"new" * 600, offset)
        os.pwrite(live.fileno(), bytes(100 * KiB), 4 * MiB)
    return mount


def is_sparse(path: Path) -> bool:
    """Tell whether a file takes little more space than its data."""
    return path.stat().st_blocks * 512 <= DATA + 64 * KiB


# -- QEMU


def qemu_io(path: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-t", "none", *words, path)
    assert "failed" not in said, said
    return said


def test_qemu_io_writes_and_reads_patterns(mounted):
    mount = mounted({"a.raw": SIZE})
    live = mount.live("a.raw")

    qemu_io(live, "write -P 0xaa 0 1M", "write -P 0xbb 64k 4k", "flush")
    mount.create("s")
    qemu_io(
        live,
        "write -f -P 0xcc 32k 64k",
        "write -z -u 512k 64k",
        "discard 768k 64k",
        "aio_write -P 0xdd 1M 1M",
        "aio_flush",
    )

    qemu_io(
        live,
        "read -P 0xaa 0 32k",
        "read -P 0xcc 32k 64k",
        "read -P 0xaa 96k 416k",
        "read -P 0 512k 64k",
        "read -P 0 768k 64k",
        "read -P 0xdd 1M 1M",
        "read -P 0 2M 6M",
    )
    read_only = run(
        "qemu-io",
        *("-r", "-f", "raw", "-t", "none"),
        *("-c", "read -P 0xaa 0 64k"),
        *("-c", "read -P 0xbb 64k 4k"),
        *("-c", "read -P 0xaa 68k 956k"),
        *("-c", "read -P 0 1M 7M"),
        mount.snapshot("s", "a.raw"),
    )
    assert "failed" not in read_only
    assert read_only.count("ops; ") == 4


def test_qemu_img_compares_a_snapshot(snapshotted, tmp_path):
    path = snapshotted.snapshot("s", "a.raw")
    same, other = tmp_path / "same", tmp_path / "other"
    same.write_bytes(sparse_image())
    other.write_bytes(sparse_image(1))

    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw"]
    assert "identical" in run(*compare, path, same)
    done = subprocess.run([*compare, path, other], capture_output=True, text=True)
    assert (done.returncode, "Content mismatch" in done.stdout) == (1, True)


def test_qemu_img_map_sees_holes(snapshotted):
    path = snapshotted.snapshot("s", "a.raw")

    mapped = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path))

    # Data in whole clusters; their neighbours may count as one.
    data = [(m["start"], m["start"] + m["length"]) for m in mapped if m["data"]]
    assert data == [(offset, offset + length) for offset, length in EXTENTS]
    assert sum(m["length"] for m in mapped) == SIZE


def test_fleecefs_map_agrees_with_qemu_img(snapshotted):
    for path in snapshotted.live("a.raw"), snapshotted.snapshot("s", "a.raw"):
        theirs = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", path))
        ours = snapshotted.json("map", path)

        assert joined(ours["extents"]) == joined(theirs)


def joined(extents: list[dict[str, int]]) -> list[tuple[int, int]]:
    """Return begin and end of data, neighbours joined."""
    found: list[tuple[int, int]] = []
    for extent in extents:
        begin, end = extent["start"], extent["start"] + extent["length"]
        if not extent["data"]:
            continue
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, end))
    return found


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_img_converts_a_snapshot(snapshotted, tmp_path, format):
    target = tmp_path / "target"

    run(
        *("qemu-img", "convert", "-f", "raw", "-O", format, "-T", "none"),
        *(snapshotted.snapshot("s", "a.raw"), target),
    )

    back = tmp_path / "back"
    run("qemu-img", "convert", "-f", format, "-O", "raw", target, back)
    assert back.read_bytes() == sparse_image()
    # qcow2 has some clusters of 64 KiB for itself.
    assert target.stat().st_blocks * 512 <= DATA + 512 * KiB


def test_qemu_img_converts_into_a_live_disk(mounted, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(sparse_image())
    mount = mounted({"a.raw": random.Random(1).randbytes(SIZE)})
    mount.create("s")

    run(
        *("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw"),
        *(image, mount.live("a.raw")),
    )

    assert mount.live("a.raw").read_bytes() == sparse_image()
    before = random.Random(1).randbytes(SIZE)
    assert mount.snapshot("s", "a.raw").read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["qemu-img", "check", "-f", "raw"], id="qemu-img-check"),
        pytest.param(["qemu-io", "-f", "raw", "-c", "write 0 4k"], id="qemu-io-write"),
        pytest.param(
            ["qemu-io", "-r", "-f", "raw", "-c", "read 0 4k"], id="qemu-io-read"
        ),
    ],
)
def test_qemu_is_kept_off_the_source_of_a_mount(mounted, command):
    mount = mounted({"a.raw": sparse_image()})

    done = subprocess.run(
        [*command, str(mount.sources["a.raw"])], capture_output=True, text=True
    )

    assert done.returncode != 0
    assert "lock" in done.stderr + done.stdout
    assert mount.live("a.raw").read_bytes() == sparse_image()


def test_qemu_may_use_the_source_after_unmounting(mounted):
    mount = mounted({"a.raw": SIZE})
    source = mount.sources["a.raw"]
    flock = ["flock", "--nonblock", str(source), "true"]
    assert subprocess.run(flock).returncode == 1

    mount.umount()

    assert subprocess.run(flock).returncode == 0
    qemu_io(source, "write -P 0x11 0 64k", "read -P 0x11 0 64k")


# -- backup


def test_rsync_copies_a_snapshot_sparsely(snapshotted, tmp_path):
    target = tmp_path / "target"

    run("rsync", "-aS", f"{snapshotted.snapshots}/s/", f"{target}/")

    copy = target / "a.raw"
    assert copy.read_bytes() == sparse_image()
    assert is_sparse(copy)
    path = snapshotted.snapshot("s", "a.raw")
    assert abs(copy.stat().st_mtime - path.stat().st_mtime) < 1e-5
    # What has been copied is found unchanged, by its size and time.
    again = run("rsync", "-aSi", f"{snapshotted.snapshots}/s/", f"{target}/")
    assert "a.raw" not in again


def test_rsync_updates_in_place_from_the_next_snapshot(snapshotted, tmp_path):
    target = tmp_path / "target"
    # Two snapshots of one second: rsync has to look at the nanoseconds.
    rsync = ["rsync", "-a", "--inplace", "--no-whole-file", "--modify-window=-1"]
    run(*rsync, f"{snapshotted.snapshots}/s/", f"{target}/")
    snapshotted.create("t")
    content = snapshotted.live("a.raw").read_bytes()

    run(*rsync, f"{snapshotted.snapshots}/t/", f"{target}/")

    assert (target / "a.raw").read_bytes() == content != sparse_image()


def test_tar_archives_a_snapshot_sparsely(snapshotted, tmp_path):
    archive, target = tmp_path / "s.tar", tmp_path / "target"
    target.mkdir()

    run("tar", "-C", snapshotted.snapshots, "--sparse", "-cf", archive, "s")
    run("tar", "-C", target, "-xf", archive)

    copy = target / "s" / "a.raw"
    assert copy.read_bytes() == sparse_image()
    assert is_sparse(copy)
    assert archive.stat().st_size <= DATA + 64 * KiB


@pytest.mark.parametrize("when", ["always", "auto", "never"])
def test_cp_copies_a_snapshot(snapshotted, tmp_path, when):
    copy = tmp_path / "copy"

    run("cp", f"--sparse={when}", snapshotted.snapshot("s", "a.raw"), copy)

    assert copy.read_bytes() == sparse_image()
    assert is_sparse(copy) == (when != "never")


@pytest.mark.parametrize("flags", [[], ["iflag=direct"]], ids=["buffered", "direct"])
def test_dd_copies_a_snapshot(snapshotted, tmp_path, flags):
    copy = tmp_path / "copy"

    run("dd", f"if={snapshotted.snapshot('s', 'a.raw')}", f"of={copy}", "bs=1M", *flags)

    assert copy.read_bytes() == sparse_image()


def test_dd_fills_a_live_disk_to_its_end(mounted):
    mount = mounted({"a.raw": SIZE + 512})

    done = subprocess.run(
        ["dd", "if=/dev/urandom", f"of={mount.live('a.raw')}", "bs=3M"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert f"{SIZE + 512} bytes" in done.stderr
    assert mount.live("a.raw").stat().st_size == SIZE + 512


# -- loop devices


def test_snapshot_is_loop_mounted_read_only(mounted, tmp_path):
    mount = mounted({"a.raw": 16 * MiB})
    live = mount.live("a.raw")
    run("mkfs.ext4", "-q", live)
    with loop_device(live) as device, filesystem(device, tmp_path / "fs") as point:
        (point / "file").write_bytes(sparse_image())
    mount.create("s")
    with loop_device(live) as device, filesystem(device, tmp_path / "fs") as point:
        (point / "file").write_bytes(b"changed")

    with (
        loop_device(mount.snapshot("s", "a.raw"), "--read-only") as device,
        filesystem(device, tmp_path / "old", "-o", "ro") as point,
    ):
        found = (point / "file").read_bytes()

    assert found == sparse_image()


def test_loop_device_of_a_snapshot_can_not_be_written(snapshotted):
    # losetup falls back to read-only where it may not write.
    with loop_device(snapshotted.snapshot("s", "a.raw")) as device:
        assert run("blockdev", "--getro", device).strip() == "1"
        assert run("blockdev", "--getsize64", device).strip() == str(SIZE)
        assert device.read_bytes() == sparse_image()


def test_discard_of_a_loop_device_reaches_the_source(mounted):
    mount = mounted({"a.raw": random.Random(2).randbytes(SIZE)})
    mount.create("s")

    with loop_device(mount.live("a.raw"), "--direct-io=on") as device:
        run("blkdiscard", "--offset", str(MiB), "--length", str(4 * MiB), device)
        run("blkdiscard", "--zeroout", "--offset", str(6 * MiB), device)

    content = bytearray(random.Random(2).randbytes(SIZE))
    assert mount.snapshot("s", "a.raw").read_bytes() == content
    content[MiB : 5 * MiB] = bytes(4 * MiB)
    content[6 * MiB :] = bytes(2 * MiB)
    assert mount.live("a.raw").read_bytes() == content
    assert mount.sources["a.raw"].stat().st_blocks * 512 == 2 * MiB
