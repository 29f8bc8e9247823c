"""The sides of the benchmark: fleecefs, qemu-storage-daemon's FUSE export, and cp.

All serve the same source, one after the other, and look alike to a measure: a `Mounted`
with a live file, the files of its snapshots, and ways to back it up and mirror it. What
a side starts it ends, and what it mounts it unmounts, also when the measure fails or is
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
from typing import Any, NamedTuple

from bench_fio import MiB, fio_command, fio_nbd_command
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


class Mirror(NamedTuple):
    """A mirror that has been started.

    ready      waits until the target is like the disk, and durable
    complete   moves the disk to the target, and waits until that is done
    """

    ready: Callable[[], object]
    complete: Callable[[], object]


@dataclass(frozen=True)
class Mounted:
    """A source being served, its snapshots from the oldest to the newest.

    directory  is for this sample's files, and removed after it
    backup     starts a full backup to a target
    mirror     starts a full mirror to a target
    guest      returns the command for a guest's fio with these options
    command    runs a subcommand of fleecefs on this mount; returns what it printed
    """

    source: Path
    directory: Path
    live: Path
    snapshots: tuple[Path, ...]
    backup: Callable[[Path], AbstractContextManager[Job]]
    mirror: Callable[[Path], AbstractContextManager[Mirror]]
    guest: Callable[..., list[str]]
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
            yield Mounted(
                source,
                directory,
                live,
                files,
                backup,
                partial(self._mirror, mount),
                partial(fio_command, live, source.stat().st_size),
                command,
            )
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

    @contextlib.contextmanager
    def _mirror(self, mount: Path, target: Path) -> Iterator[Mirror]:
        job = (self.binary, "-m", mount, "job")

        def complete() -> None:
            run(*job, "complete", DISK)
            run(*job, "wait", DISK, timeout=PATIENCE_SECONDS)

        with running(self.binary, "-m", mount, "mirror", DISK, target) as follower:
            try:
                yield Mirror(lambda: follower.output(PATIENCE_SECONDS), complete)
            finally:
                with undisturbed(), contextlib.suppress(Failed):
                    run(*job, "cancel", "--force", DISK)
                    run(*job, "wait", DISK)

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
                guest = partial(fio_command, live, source.stat().st_size)
                yield Mounted(
                    source, directory, live, files, backup, no_mirror, guest, refuse
                )
        finally:
            with undisturbed():
                for path in mounts:
                    unmount_lazily(path)

    @contextlib.contextmanager
    def _backup(self, qmp: Path, size: int, target: Path) -> Iterator[Job]:
        with connected(qmp) as monitor:
            add_target(monitor, "backup", target, size)
            job = {"job-id": "backup", "device": "source", "target": "backup"}
            monitor.execute("blockdev-backup", job | {"sync": "full"})
            yield Job(
                partial(finish_job, monitor, target),
                partial(monitor.execute, "job-cancel", {"id": "backup"}),
            )


@dataclass(frozen=True)
class PeerNbd:
    """The peer, with a guest that comes through NBD.

    It can not mirror what it exports through FUSE: that may be resized.
    """

    binary: str

    @contextlib.contextmanager
    def mounted(
        self, source: Path, directory: Path, snapshots: int
    ) -> Iterator[Mounted]:
        size, qmp, nbd = source.stat().st_size, directory / "qmp", directory / "nbd"
        server = ("--nbd-server", f"addr.type=unix,addr.path={nbd}")
        export = ("--export", "type=nbd,id=guest,node-name=source,name=,writable=on")
        command = (*monitor(qmp), *raw_nodes("source", source), *server, *export)
        with running(self.binary, *command) as daemon:
            daemon.wait_until(nbd.exists)
            mirror = partial(self._mirror, qmp, size)
            guest = partial(fio_nbd_command, nbd, size)
            yield Mounted(source, directory, source, (), no_job, mirror, guest, refuse)

    @contextlib.contextmanager
    def _mirror(self, qmp: Path, size: int, target: Path) -> Iterator[Mirror]:
        with connected(qmp) as monitor:
            add_target(monitor, "mirror", target, size)
            job = {"job-id": "mirror", "device": "source", "target": "mirror"}
            monitor.execute("blockdev-mirror", job | {"sync": "full"})

            def complete() -> None:
                monitor.execute("job-complete", {"id": "mirror"})
                completed = monitor.event("BLOCK_JOB_COMPLETED")
                if "error" in completed["data"]:
                    raise Failed(f"blockdev-mirror: {completed['data']['error']}")

            yield Mirror(partial(monitor.event, "BLOCK_JOB_READY"), complete)


@dataclass(frozen=True)
class Cp:
    """Copies the source as it is: nothing is served."""

    @contextlib.contextmanager
    def mounted(
        self, source: Path, directory: Path, snapshots: int
    ) -> Iterator[Mounted]:
        backup = partial(copying, source)
        yield Mounted(source, directory, source, (), backup, no_mirror, no_job, refuse)


Side = Ours | Peer | PeerNbd | Cp


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


def add_target(monitor: Monitor, node: str, target: Path, size: int) -> None:
    """Let the peer open a target, which is made if it is not there."""
    if not target.exists():
        target.touch()
        os.truncate(target, size)
    file = {"driver": "file", "filename": str(target), "aio": "io_uring"}
    monitor.execute("blockdev-add", {"node-name": node, "driver": "raw", "file": file})


def no_mirror(target: Path) -> AbstractContextManager[Mirror]:
    raise Failed("this side has no mirror")


def no_job(*arguments: object, **options: object) -> Any:
    raise Failed("this side can only be mirrored, or not at all")


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
