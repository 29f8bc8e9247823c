"""What jobs hold: a private snapshot, and a target in which a thread may hang.

A job lets go of both when it ends; of a target that hangs, whoever hangs in it.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from fleecefs.block.epoch import LONGEST, WAITS
from fleecefs.errors import SnapshotLost
from fleecefs.inventory import Inventory, PrivateSnapshot
from fleecefs.jobs.job import Job
from fleecefs.jobs.target import Surroundings, Users

# Raises NotUsable for a path that leads to our own mount.
CheckPlace = Callable[[str], None]

_Result = TypeVar("_Result")


def end_if_broken(job: Job, private: PrivateSnapshot) -> None:
    """Let a job fail at once when its snapshot breaks; raise if it has."""
    token = trio.lowlevel.current_trio_token()

    def broke(reason: str) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(job.fail, _broken(reason))

    private.broke = broke
    check(private)


def check(private: PrivateSnapshot) -> None:
    """Raise SnapshotLost if what was read of it may not be of its instant."""
    if private.snapshot.lost is not None:
        raise _broken(private.snapshot.lost)


def _broken(reason: str) -> SnapshotLost:
    return SnapshotLost(f"its snapshot is broken: {reason}")


def cost_of(private: PrivateSnapshot) -> dict[str, Any]:
    """Return what a job costs the guest (control/results.py, Cost)."""
    counters, budgets = private.snapshot.epoch.counters, private.budgets
    return {
        "waited": int(counters[WAITS]),
        "longest-wait": counters[LONGEST] / 1e9,
        "ram": budgets.ram.used,
        "ram-peak": budgets.ram.peak,
        "disk": budgets.disk.used,
        "disk-peak": budgets.disk.peak,
    }


async def in_thread(users: Users, function: Callable[[], _Result]) -> _Result:
    """Run what may hang in a target, in a thread that can be abandoned."""

    def run() -> _Result:
        with users.busy():
            return function()

    limiter = trio.CapacityLimiter(1)
    return await trio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)


def surroundings_of(inventory: Inventory, check_place: CheckPlace) -> Surroundings:
    """Return what a target on this mount must not be."""
    sources = {
        name: inventory.sources.status(disk.id)
        for name, disk in inventory.disks.items()
    }
    return Surroundings(sources, inventory.own_places(), check_place)
