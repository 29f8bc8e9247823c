"""The two sides of the benchmark: fleecefs, and qemu-storage-daemon's FUSE export.

Both serve the same source, one after the other, and look alike to a measure: a
`Mounted` with a live file and the files of its snapshots. What a side starts it ends,
and what it mounts it unmounts, also when the measure fails or is interrupted.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench_fio import MiB, fio_command
from bench_processes import (
    Failed,
    end_marked,
    is_mounted,
    run,
    running,
    undisturbed,
    unmount_lazily,
)

DISK = "disk.raw"

# What is written between two snapshots when several are asked for: each epoch shall
# hold something, without the disk having changed much.
SCRIBBLE_SIZE = 4 * MiB


@dataclass(frozen=True)
class Mounted:
    """A source being served, its snapshots from the oldest to the newest.

    `command` runs a subcommand of fleecefs on this mount and returns what it printed.
    """

    source: Path
    live: Path
    snapshots: tuple[Path, ...]
    command: Callable[..., str]

    @property
    def size(self) -> int:
        return self.source.stat().st_size


@dataclass(frozen=True)
class Ours:
    binary: Path

    @contextlib.contextmanager
    def mounted(
        self, source: Path, directory: Path, snapshots: int
    ) -> Iterator[Mounted]:
        mount, state, store = (directory / name for name in ("mount", "state", "store"))
        for path in (mount, state, store):
            path.mkdir()
        live = mount / DISK

        def command(*arguments: str) -> str:
            return run(self.binary, "-m", mount, *arguments)

        try:
            options = ("--disk", f"{DISK}={source}", "--state", state, "--store", store)
            run(self.binary, "mount", *options, mount)
            directories = [mount / f"snapshots/bench{n}" for n in range(snapshots)]
            for index, snapshot in enumerate(directories):
                if index > 0:
                    run(*scribble(live, source.stat().st_size, seed=index))
                run("mkdir", snapshot)
            files = tuple(snapshot / DISK for snapshot in directories)
            yield Mounted(source, live, files, command)
            run(self.binary, "umount", mount)
        finally:
            with undisturbed():
                self._end(mount)

    def _end(self, mount: Path) -> None:
        """See to it that nothing of ours is left, whatever went wrong."""
        if is_mounted(mount):
            with contextlib.suppress(Failed):
                run(self.binary, "umount", mount)
        end_marked()
        unmount_lazily(mount)


@dataclass(frozen=True)
class Peer:
    binary: str

    @contextlib.contextmanager
    def mounted(
        self, source: Path, directory: Path, snapshots: int
    ) -> Iterator[Mounted]:
        live, snapshot = directory / "live.raw", directory / "snapshot.raw"
        target = directory / "target.raw"
        mounts = [live, snapshot] if snapshots else [live]
        for path in (live, snapshot, target):
            path.touch()
        os.truncate(target, source.stat().st_size)

        nodes = raw_nodes("source", source)
        exports = fuse_export("source", live, writable=True)
        if snapshots:
            nodes += raw_nodes("target", target) + SNAPSHOT_NODES
            exports = fuse_export("filter", live, writable=True)
            exports += fuse_export("snapshot", snapshot, writable=False)
        try:
            with running(self.binary, *nodes, *exports) as daemon:
                daemon.wait_until(lambda: all(is_mounted(path) for path in mounts))
                yield Mounted(source, live, tuple(mounts[1:]), refuse)
        finally:
            with undisturbed():
                for path in mounts:
                    unmount_lazily(path)


SNAPSHOT_NODES = [
    "--blockdev",
    "driver=copy-before-write,node-name=filter,file=source,target=target"
    ",on-cbw-error=break-snapshot",
    "--blockdev",
    "driver=snapshot-access,node-name=snapshot,file=filter",
]


def raw_nodes(name: str, path: Path) -> list[str]:
    protocol = f"{name}-file"
    filename = str(path).replace(",", ",,")
    return [
        "--blockdev",
        f"driver=file,node-name={protocol},aio=io_uring,filename={filename}",
        "--blockdev",
        f"driver=raw,node-name={name},file={protocol}",
    ]


def fuse_export(node: str, mountpoint: Path, *, writable: bool) -> list[str]:
    path = str(mountpoint).replace(",", ",,")
    switch = "on" if writable else "off"
    options = f"type=fuse,id=export-{node},node-name={node},writable={switch}"
    return ["--export", f"{options},mountpoint={path}"]


def refuse(*arguments: str) -> str:
    raise Failed(f"qemu-storage-daemon has no {' '.join(arguments)}")


def scribble(live: Path, size: int, seed: int) -> list[str]:
    """Return a command that writes a few random pieces all over the disk."""
    return fio_command(
        live,
        size,
        rw="randwrite",
        bs="4k",
        iodepth=16,
        norandommap=1,
        io_size=SCRIBBLE_SIZE,
        randseed=seed,
    )
