"""The daemon: serves one mount until it is unmounted.

Started by the keeper with the /dev/fuse descriptor. Data threads answer data requests,
pyfuse3 on trio's thread answers those about names, and the control socket is served
beside them. It ends when the kernel says that the mount is gone, whoever unmounted it;
then it saves its state.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from fleecefs import __version__
from fleecefs.block.epoch import OnCbwError
from fleecefs.control.commands import Commands, Lifecycle
from fleecefs.control.events import Events
from fleecefs.control.server import serving
from fleecefs.errors import NotUsable
from fleecefs.fuse.channel import Channel
from fleecefs.fuse.data import DataThreads
from fleecefs.fuse.mount import abort, connection, read_ahead, unmount
from fleecefs.fuse.names import Names
from fleecefs.inventory import RAM_LIMIT, Inventory, Options
from fleecefs.state import runtime

log = logging.getLogger(__name__)

# How long the kernel may take to end a connection after the mount is gone.
_END_SECONDS = 5.0


class Daemon:
    """One mount being served."""

    def __init__(self, settings: dict[str, Any], fuse_fd: int) -> None:
        self._mountpoint: str = settings["mount"]
        self._started = time.time()
        self._events = Events()
        self._ended = trio.Event()
        self._inventory = Inventory.open(
            Path(settings["state"]),
            {disk["name"]: Path(disk["source"]) for disk in settings["disks"]},
            _options(settings),
            self._events.emit,
        )
        self._channel = Channel(fuse_fd)
        self._inventory.invalidate = self._channel.invalidate
        self._data = DataThreads(self._channel, self._inventory.files)
        self._names = Names(self._inventory, self._data.opened_by)

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until unmounted; call ready() when the mount is usable."""
        runtime.announce(self._inventory.runtime_path, self._mountpoint)
        pyfuse3.init(
            self._names, f"/dev/fd/{self._channel.names_fd}", {"fsname=fleecefs"}
        )
        try:
            trio.run(self._serve, ready)
        finally:
            pyfuse3.close(unmount=False)

    async def _serve(self, ready: Callable[[], None]) -> None:
        inventory = self._inventory
        self._events.start(trio.lowlevel.current_trio_token())
        commands = Commands(inventory, Lifecycle(self._status, self._umount))
        control = str(runtime.control_socket(inventory.runtime_path))
        async with serving(control, commands, self._events):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                nursery.start_soon(self._end_on_signals)
                nursery.start_soon(_run_in_thread, self._channel.relay_answers)
                nursery.start_soon(self._tell_ready, ready)
                await _run_in_thread(self._data.run)
                self._ended.set()
                pyfuse3.terminate()
                self._channel.close_names()
                nursery.cancel_scope.cancel()
            # Before the clients' connections end: who waited for that finds all saved.
            await trio.to_thread.run_sync(inventory.close)
            log.info("unmounted %s", self._mountpoint)

    async def _tell_ready(self, ready: Callable[[], None]) -> None:
        await _run_in_thread(self._channel.initialized.wait)
        read_ahead(self._mountpoint)
        log.info("mounted %s", self._mountpoint)
        ready()

    # -- the end

    async def _end_on_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("got %s", signal.Signals(number).name)
                try:
                    await self._umount(force=False)
                except OSError as e:
                    log.error("not ended: %s", e.strerror)

    async def _umount(self, force: bool) -> None:
        """Unmount; the data threads end when the kernel tells them."""
        if not force:
            await trio.to_thread.run_sync(self._inventory.check_end)
        control = connection(self._mountpoint)
        await trio.to_thread.run_sync(lambda: unmount(self._mountpoint, lazy=force))
        with trio.move_on_after(0 if force else _END_SECONDS):
            await self._ended.wait()
        if not self._ended.is_set():
            # Users that --force does not spare, or a copy of the mount in another
            # mount namespace, which would keep the disks here for ever.
            log.warning("cut off whoever still uses %s", self._mountpoint)
            await trio.to_thread.run_sync(abort, control)

    # -- for the control socket

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
            "generation": 0,
            "started": self._started,
            "policy": {
                "on-cbw-error": options.on_cbw_error.value,
                "cbw-timeout": options.cbw_timeout,
            },
            "disks": inventory.describe_disks(),
            "snapshots": inventory.describe_snapshots(),
            "store": {
                "directory": str(inventory.store_path),
                **inventory.budgets.disk.statistics(),
            },
            "ram": inventory.budgets.ram.statistics(),
        }


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
    )


def _log_to(path: str | None) -> None:
    """Log to a file, or to stderr; what Python itself says goes there too."""
    if path is not None:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as e:
            raise NotUsable(f"log {path}: {e.strerror}") from None
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)


def main() -> int:
    """Run as the keeper starts it: daemon.py FUSE_FD REPORT_FD, settings on stdin."""
    fuse_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    settings = json.load(sys.stdin)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO
    )

    def report(**what: object) -> None:
        os.write(report_fd, json.dumps(what).encode() + b"\n")
        os.close(report_fd)

    try:
        daemon = Daemon(settings, fuse_fd)
        _log_to(settings["log"])
    except OSError as e:
        report(error=str(e), code=e.errno)
        return 1
    daemon.run(lambda: report(ready=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
