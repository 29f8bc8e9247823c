"""The daemon: serves one mount until it is unmounted.

Started by the keeper with the /dev/fuse descriptor. Data threads answer data requests,
pyfuse3 on trio's thread answers those about names, and the control socket is served
beside them. It ends when the kernel says that the mount is gone, whoever unmounted it;
then it saves its state.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sdnotify
import trio

from fleecefs import __version__, logs
from fleecefs.bitmaps.steps import Step
from fleecefs.block.epoch import OnCbwError
from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.events import Events
from fleecefs.control.server import serving
from fleecefs.errors import Refused, describe
from fleecefs.fuse.channel import Channel
from fleecefs.fuse.data import DataThreads
from fleecefs.fuse.mount import check_no_loop, check_outside, read_ahead, unmount
from fleecefs.fuse.names import Names
from fleecefs.inventory import RAM_LIMIT, Inventory, Options
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BackupOptions
from fleecefs.jobs.registry import Jobs
from fleecefs.jobs.resume import resume_jobs
from fleecefs.jobs.target import busy_targets
from fleecefs.killpoint import reached
from fleecefs.state import runtime

log = logging.getLogger(__name__)

# The exit code that asks the keeper for the next daemon (keeper.py).
RESTART = 75

# What the kernel sends us when the keeper dies: prctl(2), PR_SET_PDEATHSIG.
_KEEPER_GONE = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1
# Our dirty pages are not throttled behind those of our own users: they would wait for
# us (prctl(2), PR_SET_IO_FLUSHER; needs CAP_SYS_RESOURCE).
_PR_SET_IO_FLUSHER = 57

# How long the kernel may take to end a connection after the mount is gone.
_END_SECONDS = 5.0


class Daemon:
    """One mount being served."""

    def __init__(self, settings: dict[str, Any], fuse_fd: int) -> None:
        self._mountpoint: str = settings["mount"]
        self._log: str | None = settings["log"]
        self._started = time.time()
        self._events = Events()
        self._ended = trio.Event()
        self._is_restarting = False
        self._inventory = Inventory.open(
            Path(settings["state"]),
            {disk["name"]: Path(disk["source"]) for disk in settings["disks"]},
            _options(settings),
            self._events.emit,
        )
        self._generation: int = settings["generation"]
        self._channel = Channel(
            fuse_fd,
            self._inventory.runtime_path / "init",
            is_first=self._generation == 0,
        )
        self._inventory.invalidate = self._channel.invalidate
        self._inventory.bitmaps.containers.check_place = self._check_container
        self._jobs = Jobs(
            self._create_backups,
            self._events.emit,
            self._inventory.runtime_path / "jobs.json",
            partial(resume_jobs, self._inventory),
        )
        self._data = DataThreads(self._channel, self._inventory.files)
        self._names = Names(self._inventory, self._channel.resent, self._data.opened_by)

    def run(self, report: Callable[..., None]) -> None:
        """Serve until unmounted; report what the keeper needs when it is usable."""
        reached("start.opened")
        runtime.announce(self._inventory.runtime_path, self._mountpoint)
        reached("start.announced")
        with self._names.relayed(self._channel.names_fd):
            trio.run(self._serve, report)

    def give_up(self) -> None:
        """End well without having served."""
        self._inventory.close()

    async def _serve(self, report: Callable[..., None]) -> None:
        inventory = self._inventory
        self._events.start(trio.lowlevel.current_trio_token())
        commands = Commands(
            inventory,
            self._jobs,
            Lifecycle(
                self._status,
                self._umount_on_request,
                self._restart,
                self._check_target,
            ),
        )
        control = str(runtime.control_socket(inventory.runtime_path))
        async with serving(control, commands, self._events):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._names.serve)
                nursery.start_soon(self._obey_signals)
                nursery.start_soon(_run_in_thread, self._channel.relay_answers)
                nursery.start_soon(self._tell_ready, report)
                nursery.start_soon(self._jobs.run)
                if self._generation > 0:
                    self._channel.resend()
                    reached("start.resent")
                await _run_in_thread(self._data.run)
                if self._is_restarting:
                    # Jobs go on in the next daemon: they are not to be cancelled.
                    await trio.sleep_forever()
                self._ended.set()
                await self._jobs.close()
                self._names.end()
                self._channel.close_names()
                nursery.cancel_scope.cancel()
            # Before the clients' connections end: who waited for that finds all saved.
            await trio.to_thread.run_sync(inventory.close)
            log.info("unmounted %s", self._mountpoint)
            for target in busy_targets():
                log.warning("can not end before target %s answers", target)

    async def _tell_ready(self, report: Callable[..., None]) -> None:
        await _run_in_thread(self._channel.initialized.wait)
        read_ahead(self._mountpoint)
        log.info("daemon %d serves %s", self._generation, self._mountpoint)
        reached("start.served")
        report(
            ready=True,
            resend=self._channel.can_resend,
            runtime=str(self._inventory.runtime_path),
            notes=self._inventory.notes,
        )
        notifier = sdnotify.SystemdNotifier()
        notifier.notify(f"READY=1\nSTATUS=daemon {self._generation} serves")
        while True:
            notifier.notify("WATCHDOG=1")
            await trio.sleep(_watchdog_seconds() / 2)

    # -- the end

    async def _obey_signals(self) -> None:
        obeyed = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, _KEEPER_GONE
        for each in obeyed:
            # What holds again after this: who tells us twice does not kill us while we
            # save.
            signal.signal(each, signal.SIG_IGN)
        with trio.open_signal_receiver(*obeyed) as signals:
            async for number in signals:
                log.info("got %s", signal.Signals(number).name)
                try:
                    if number == signal.SIGHUP:
                        logs.open_log(self._log)
                        continue
                    # Without a keeper nobody would free our users if we died.
                    await self._umount(force=number == _KEEPER_GONE)
                except OSError as e:
                    log.error("going on: %s", e.strerror)

    async def _restart(self) -> None:
        """Make room for the next daemon, which gets what is unanswered."""
        if not self._channel.can_resend:
            raise Refused("this kernel can not send requests again: Linux 6.9 can")
        # No job's thread that is in a target then holds up our end, and so the guests.
        await self._jobs.rest()
        # The inventory first: when the data threads end, `_serve` would close it.
        await trio.to_thread.run_sync(self._inventory.stop)
        self._is_restarting = True
        await trio.to_thread.run_sync(self._data.stop)
        reached("restart.stopped")
        log.info("ending for the next daemon")
        os._exit(RESTART)

    async def _umount_on_request(self, force: bool) -> None:
        """Unmount, but not from under a job that people may have forgotten.

        A signal cancels jobs: after it comes a kill.
        """
        if not force:
            await self._jobs.check_end()
        await self._umount(force)

    async def _umount(self, force: bool) -> None:
        """Unmount; the data threads end when the kernel tells them."""
        if not force:
            await trio.to_thread.run_sync(self._inventory.check_end)
        await trio.to_thread.run_sync(lambda: unmount(self._mountpoint, lazy=force))
        reached("end.unmounted")
        with trio.move_on_after(0 if force else _END_SECONDS):
            await self._ended.wait()
        if not self._ended.is_set():
            # Users that --force does not spare, or a copy of the mount in another
            # mount namespace, which would keep the disks here for ever.
            # The keeper closes the descriptor when we have ended: then they get errors.
            log.warning("cut off whoever still uses %s", self._mountpoint)
            await trio.to_thread.run_sync(self._data.stop)

    # -- for the control socket

    def _create_backups(self, wanted: Sequence[BackupOptions | Step]) -> Sequence[Job]:
        return create_backups(self._inventory, wanted, self._check_target)

    def _check_container(self, path: str) -> None:
        check_outside(self._mountpoint, "container", path)
        check_no_loop(self._mountpoint, "container", path)

    def _check_target(self, path: str) -> None:
        check_outside(self._mountpoint, "target", path)
        check_no_loop(self._mountpoint, "target", path)

    def _status(self) -> dict[str, Any]:
        inventory = self._inventory
        options = inventory.options
        return {
            "mount": self._mountpoint,
            "state": str(inventory.state_path),
            "runtime": str(inventory.runtime_path),
            "version": __version__,
            "pid": os.getpid(),
            "keeper-pid": os.getppid(),
            "generation": self._generation,
            "started": self._started,
            "policy": {
                "on-cbw-error": options.on_cbw_error.value,
                "cbw-timeout": options.cbw_timeout,
                "durability": "host" if options.survives_host else "process",
            },
            "disks": inventory.describe_disks(),
            "snapshots": inventory.describe_snapshots(),
            "bitmaps": [
                bitmap
                for disk in inventory.disks
                for bitmap in inventory.bitmaps.describe(disk)
            ],
            "store": {
                "directory": str(inventory.store_path),
                **inventory.budgets.disk.statistics(),
            },
            "ram": inventory.budgets.ram.statistics(),
        }


def _watchdog_seconds() -> float:
    """Return how long systemd waits for a sign of life (sd_watchdog_enabled(3))."""
    return int(os.environ.get("WATCHDOG_USEC", 60_000_000)) / 1e6


async def _run_in_thread(function: Callable[[], object]) -> None:
    """Run what ends by itself, or with the process: nobody waits for it then."""
    await trio.to_thread.run_sync(function, abandon_on_cancel=True)


def _options(settings: dict[str, Any]) -> Options:
    ram_limit = settings["ram_limit"]
    return Options(
        store=Path(settings["store"]) if settings["store"] else None,
        store_limit=settings["store_limit"],
        ram_limit=RAM_LIMIT if ram_limit is None else ram_limit,
        on_cbw_error=OnCbwError(settings["on_cbw_error"]),
        cbw_timeout=settings["cbw_timeout"],
        cluster_size=settings["cluster_size"],
        survives_host=settings["durability"] == "host",
        has_bitmaps=settings["bitmaps"] == "auto",
    )


def main() -> int:
    """Run as the keeper starts it: daemon.py FUSE_FD REPORT_FD, settings on stdin."""
    fuse_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    settings = json.load(sys.stdin)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, _KEEPER_GONE, 0, 0, 0)
    libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    # An epoch of a disk has five files open, and there may be many.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if os.getppid() != settings["keeper"]:
        return 1

    def report(**what: object) -> None:
        os.write(report_fd, json.dumps(what).encode() + b"\n")
        os.close(report_fd)

    logs.hold()
    try:
        daemon = Daemon(settings, fuse_fd)
    except OSError as e:
        report(error=describe(e))
        return 1
    except Exception as e:
        # A bug; there is no log to say it in.
        report(error=f"internal error: {e!r}")
        raise
    try:
        logs.open_log(settings["log"])
    except OSError as e:
        if settings["generation"] == 0:
            daemon.give_up()
            report(error=describe(e))
            return 1
        # By now there are users, who need us more than a log.
        logs.open_log(None)
        log.error("%s", describe(e))
    daemon.run(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
