"""Real file systems inside a live disk, with snapshots taken under load.

A snapshot is what a machine's disk is after a power cut, so a copy of it has to mount,
to be free of errors after that, and to hold all that was fsynced before the instant.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import fleecefs
from fleecefs.units import KiB, MiB
from tests.support.mount import PATIENCE, filesystem, loop_device, run, wait_until

# mkfs.xfs makes nothing below 300 MiB.
SIZE = 320 * MiB

# What is done between two snapshots, at least.
FSYNCED_FILES = 100
COPIED_TREES = 2


class Load:
    """Programs at work in a file system, until the end of the context.

    `kept` are files that were fsynced; no file of them is touched again.
    """

    def __init__(self, point: Path) -> None:
        self.kept: dict[str, bytes] = {}
        self.copied = 0
        self._point = point
        self._ended = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(step,))
            for step in (self._keep, self._copy_tree, self._rewrite)
        ]
        for name in "kept", "trees", "database":
            (point / name).mkdir()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        if kind is None:
            assert self._errors == []

    def wait_for_more(self) -> None:
        files, trees = len(self.kept) + FSYNCED_FILES, self.copied + COPIED_TREES
        wait_until(
            lambda: (len(self.kept) >= files and self.copied >= trees) or self._errors,
            "more files",
        )

    def _run(self, step: Callable[[int], None]) -> None:
        index = 0
        try:
            while not self._ended.is_set():
                step(index)
                index += 1
        except BaseException as e:
            self._errors.append(e)

    def _keep(self, index: int) -> None:
        """Write a file and fsync it and its directory, as a mail server does."""
        directory, name = self._point / "kept", f"{index:05}"
        content = f"{index} ".encode() * (index % 9 * KiB + 1)
        with open(directory / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fd = os.open(directory, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        self.kept[name] = content

    def _copy_tree(self, index: int) -> None:
        """Make many small files and delete them again."""
        trees = self._point / "trees"
        package = Path(fleecefs.__file__).parent
        run("cp", "-r", package, trees / f"{index}")
        if index >= 3:
            shutil.rmtree(trees / f"{index - 3}")
        run("sync", "-f", trees)
        self.copied += 1

    def _rewrite(self, index: int) -> None:
        """Write all over one file, as a database does."""
        fd = os.open(self._point / "database/file", os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(fd, bytes([index % 256]) * 8 * KiB, index * 7919 % 500 * 8 * KiB)
            os.fdatasync(fd)
        finally:
            os.close(fd)


def check_ext4(device: Path) -> str:
    return run("e2fsck", "-f", "-n", device)


def check_xfs(device: Path) -> str:
    return run("xfs_repair", "-n", device)


def check_btrfs(device: Path) -> str:
    return run("btrfs", "check", "--readonly", device)


def forget_btrfs() -> None:
    """Forget devices: each copy of a snapshot says that it is the same one."""
    subprocess.run(["btrfs", "device", "scan", "--forget"], capture_output=True)


@pytest.mark.parametrize(
    "loop_options",
    [
        pytest.param(["--direct-io=on"], id="direct-loop"),
        pytest.param(["--direct-io=off"], id="plain-loop"),
    ],
)
@pytest.mark.parametrize(
    ("mkfs", "mount_options", "check"),
    [
        pytest.param(["mkfs.ext4", "-q"], "discard", check_ext4, id="ext4"),
        pytest.param(["mkfs.xfs", "-q"], "discard,nouuid", check_xfs, id="xfs"),
        pytest.param(["mkfs.btrfs", "-q"], "discard", check_btrfs, id="btrfs"),
    ],
)
def test_snapshots_under_load_are_sound_file_systems(
    mounted, tmpfs_path, mkfs, mount_options, check, loop_options
):
    mount = mounted({"a.raw": SIZE}, "--ram-limit=8M")
    point = tmpfs_path / "fs"
    promised: dict[str, dict[str, bytes]] = {}

    with loop_device(mount.live("a.raw"), *loop_options) as device:
        run(*mkfs, device)
        with filesystem(device, point, "-o", mount_options):
            with Load(point) as load:
                for name in "one", "two", "three":
                    load.wait_for_more()
                    promised[name] = dict(load.kept)
                    mount.create(name)
                load.wait_for_more()
            everything = dict(load.kept)
        check(device)

    assert mount.status()["ram"]["used"] > 0
    assert len(promised["one"]) < len(promised["three"]) < len(everything)
    for name, kept in promised.items():
        copy = tmpfs_path / name
        run("cp", mount.snapshot(name, "a.raw"), copy)
        forget_btrfs()
        with loop_device(copy) as device:
            # Mounting replays the log.
            with filesystem(device, point, "-o", mount_options):
                for file, content in kept.items():
                    assert (point / "kept" / file).read_bytes() == content
            check(device)
        copy.unlink()
    forget_btrfs()
