"""The sides of the benchmark: fleecefs, qemu-storage-daemon's FUSE export, and cp.

All serve the same source, one after the other, and look alike to a measure: a `Mounted`
with a live file, the files of its snapshots, and a way to back it up. What a side
starts it ends, and what it mounts it unmounts, also when the measure fails or is
interrupted.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bench_fio import MiB, fio_command
from bench_processes import (
    PATIENCE_SECONDS,
    Failed,
    end_marked,
    is_mounted,
    run,
    running,
    undisturbed,
    unmount_lazily,
)
from bench_qmp import Monitor, connected, time_of

DISK = "disk.raw"

# What is written between two snapshots when several are asked for: each epoch shall
# hold something, without the disk having changed much.
SCRIBBLE_SIZE = 4 * MiB


# A cancel returns at once, whatever the target does.
CANCEL_SECONDS = 10


class Period(NamedTuple):
    """When something began and ended, in seconds since 1970."""

    began: float
    ended: float


class Job(NamedTuple):
    """A backup that has been started.

    finish   waits until all is copied and durable, and tells when it ran
    cancel   ends it without waiting for anything; raises Failed if it has ended before
    """

    finish: Callable[[], Period]
    cancel: Callable[[], object]


@dataclass(frozen=True)
class Mounted:
    """A source being served, its snapshots from the oldest to the newest.

    directory  is for this sample's files, and removed after it
    backup     starts a full backup to a target
    command    runs a subcommand of fleecefs on this mount; returns what it printed
    """

    source: Path
    directory: Path
    live: Path
    snapshots: tuple[Path, ...]
    backup: Callable[[Path], AbstractContextManager[Job]]
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
            backup = partial(self._backup, mount)
            yield Mounted(source, directory, live, files, backup, command)
            run(self.binary, "umount", mount)
        finally:
            with undisturbed():
                self._end(mount)

    @contextlib.contextmanager
    def _backup(self, mount: Path, target: Path) -> Iterator[Job]:
        fleecefs = (self.binary, "-m", mount)
        cancel = partial(run, *fleecefs, "job", "cancel", DISK, timeout=CANCEL_SECONDS)
        with running(*fleecefs, "backup", DISK, target, "--json") as follower:
            try:
                yield Job(lambda: period_of(follower.output(PATIENCE_SECONDS)), cancel)
            except BaseException:
                with undisturbed(), contextlib.suppress(Failed):
                    cancel()
                raise

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
        target, qmp = directory / "target.raw", directory / "qmp"
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
            with running(self.binary, *monitor(qmp), *nodes, *exports) as daemon:
                daemon.wait_until(lambda: all(is_mounted(path) for path in mounts))
                backup = partial(self._backup, qmp, source.stat().st_size)
                files = tuple(mounts[1:])
                yield Mounted(source, directory, live, files, backup, refuse)
        finally:
            with undisturbed():
                for path in mounts:
                    unmount_lazily(path)

    @contextlib.contextmanager
    def _backup(self, qmp: Path, size: int, target: Path) -> Iterator[Job]:
        if not target.exists():
            target.touch()
            os.truncate(target, size)
        with connected(qmp) as monitor:
            file = {"driver": "file", "filename": str(target), "aio": "io_uring"}
            node = {"node-name": "backup", "driver": "raw", "file": file}
            monitor.execute("blockdev-add", node)
            job = {"job-id": "backup", "device": "source", "target": "backup"}
            monitor.execute("blockdev-backup", job | {"sync": "full"})
            yield Job(
                partial(finish_job, monitor, target),
                partial(monitor.execute, "job-cancel", {"id": "backup"}),
            )


@dataclass(frozen=True)
class Cp:
    """Copies the source as it is: nothing is served."""

    @contextlib.contextmanager
    def mounted(
        self, source: Path, directory: Path, snapshots: int
    ) -> Iterator[Mounted]:
        yield Mounted(source, directory, source, (), partial(copying, source), refuse)


Side = Ours | Peer | Cp


@contextlib.contextmanager
def copying(source: Path, target: Path) -> Iterator[Job]:
    script = 'cp --sparse=never -- "$1" "$2" && sync -- "$2"'
    began = time.time()
    with running("bash", "-c", script, "bash", source, target) as process:

        def finish() -> Period:
            process.output(PATIENCE_SECONDS)
            return Period(began, time.time())

        yield Job(finish, process.stop)


def period_of(output: str) -> Period:
    """Return when a job ran, from the last that `backup --json` says of it."""
    try:
        job = json.loads(output.splitlines()[-1])
        return Period(job["created"], job["created"] + job["elapsed"])
    except (ValueError, LookupError, TypeError) as e:
        raise Failed(f"backup --json: {output[-80:]!r}") from e


def finish_job(monitor: Monitor, target: Path) -> Period:
    began = monitor.event("JOB_STATUS_CHANGE", status="running")
    completed = monitor.event("BLOCK_JOB_COMPLETED")
    if "error" in completed["data"]:
        raise Failed(f"blockdev-backup: {completed['data']['error']}")
    ended = monitor.event("JOB_STATUS_CHANGE", status="concluded")
    # The job does not flush its target.
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return Period(time_of(began), time_of(ended))


SNAPSHOT_NODES = [
    "--blockdev",
    "driver=copy-before-write,node-name=filter,file=source,target=target"
    ",on-cbw-error=break-snapshot",
    "--blockdev",
    "driver=snapshot-access,node-name=snapshot,file=filter",
]


def monitor(path: Path) -> list[str]:
    socket = f"socket,id=qmp,server=on,wait=off,path={str(path).replace(',', ',,')}"
    return ["--chardev", socket, "--monitor", "chardev=qmp"]


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
    raise Failed(f"this side has no {' '.join(arguments)}")


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
