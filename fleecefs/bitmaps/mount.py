"""The dirty bitmaps of all disks of a mount, and the thread that saves them.

What is saved in the background keeps the activity logs small: after a crash of the host
no more is copied in vain than what was written since.
"""

import logging
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fleecefs.bitmaps.containers import Containers
from fleecefs.bitmaps.disk import DiskBitmaps, HeldBitmap
from fleecefs.block.disk import Disk
from fleecefs.errors import NotFound, describe
from fleecefs.state.directory import DiskRecord
from fleecefs.state.epochs import End

log = logging.getLogger(__name__)

# A save costs each area that is written to afterwards one more sync.
SAVE_SECONDS = 60.0

Lost = Callable[[str, str, str], None]


class MountBitmaps:
    """All bitmaps, by disk.

    `save_state` makes the records durable; `lost` is called with disk, bitmap and
    reason when a bitmap becomes inconsistent.
    """

    def __init__(
        self,
        runtime: Path,
        state: Path,
        timeout: float,
        save_state: Callable[[], None],
        lost: Lost,
    ) -> None:
        self._runtime = runtime
        self._state = state
        self._timeout = timeout
        self._save_state = save_state
        self._lost = lost
        self.containers = Containers()
        self._disks: dict[str, DiskBitmaps] = {}
        self._ending = threading.Event()
        # A daemon thread: nobody is left to end it if the daemon fails.
        self._saver = threading.Thread(
            target=self._save_now_and_then, name="saver", daemon=True
        )

    def load(
        self,
        record: DiskRecord,
        disk: Disk,
        end: End,
        jobs: Collection[str],
        *,
        changed: str | None,
        autoload: bool,
    ) -> None:
        """Take over the bitmaps of a disk. See DiskBitmaps.load."""
        bitmaps = DiskBitmaps(
            record,
            disk,
            runtime=self._runtime,
            state=self._state,
            containers=self.containers,
            timeout=self._timeout,
            save_state=self._save_state,
            lost=lambda name, reason: self._lost(record.name, name, reason),
        )
        self._disks[record.name] = bitmaps
        bitmaps.load(end, jobs, changed=changed, autoload=autoload)

    def mark_in_use(self) -> None:
        """Say in containers that they are in use; OSError if that can not be said."""
        for bitmaps in self._disks.values():
            bitmaps.mark_in_use()

    def save_from_now_on(self) -> None:
        """Save in the background, as soon as there is something that is persistent."""
        if self._saver.ident is None and any(
            held.is_stored
            for bitmaps in self._disks.values()
            for held in bitmaps.held.values()
        ):
            self._saver.start()

    def find(self, disk: str) -> DiskBitmaps:
        """Return the bitmaps of a disk; NotFound if there is no such disk."""
        if disk not in self._disks:
            raise NotFound(
                f"no disk {disk!r}; there are {', '.join(sorted(self._disks))}"
            )
        return self._disks[disk]

    def find_frozen(self, job: str) -> tuple[DiskBitmaps, HeldBitmap] | None:
        """Return the bitmap that a job uses, by the key of the job's snapshot."""
        for bitmaps in self._disks.values():
            for held in list(bitmaps.held.values()):
                if held.frozen is not None and held.record.job == job:
                    return bitmaps, held
        return None

    def collect(self) -> None:
        """Remove what the state, which has been saved, does without."""
        for bitmaps in self._disks.values():
            bitmaps.collect()

    def close(self) -> None:
        """Save all that is persistent; nobody reads or writes any more."""
        self._stop_saver()
        for bitmaps in self._disks.values():
            bitmaps.close()

    def close_files(self) -> None:
        """Let go of everything, without having served."""
        for bitmaps in self._disks.values():
            bitmaps.close_files()

    def _stop_saver(self) -> None:
        self._ending.set()
        if self._saver.ident is not None:
            self._saver.join()

    def _save_now_and_then(self) -> None:
        failed: set[str] = set()
        while not self._ending.wait(SAVE_SECONDS):
            for name, bitmaps in self._disks.items():
                if not bitmaps.has_unsaved:
                    continue
                try:
                    bitmaps.save()
                    failed.discard(name)
                except OSError as e:
                    if name not in failed:
                        log.error(
                            "bitmaps of %s can not be saved now: %s; what was written "
                            "is in the activity log",
                            name,
                            describe(e),
                        )
                    failed.add(name)

    # -- what people and programs want to know

    def describe(self, disk: str) -> list[dict[str, Any]]:
        """Return all that is known (control/results.py, DirtyBitmap)."""
        bitmaps = self.find(disk)
        return [
            {
                "disk": disk,
                **describe_as_qemu(held),
                "auto": held.record.auto,
                "reason": held.bitmap.inconsistent,
                "container": (
                    str(held.container.path) if held.container is not None else None
                ),
            }
            for held in list(bitmaps.held.values())
        ]


def describe_as_qemu(held: HeldBitmap) -> dict[str, Any]:
    """Return what QEMU's BlockDirtyInfo tells."""
    bitmap = held.bitmap
    is_lost = bitmap.inconsistent is not None
    return {
        "name": held.record.name,
        "count": 0 if is_lost else bitmap.count,
        "granularity": bitmap.granularity,
        "recording": bitmap.recording and not is_lost,
        "busy": bitmap.busy,
        "persistent": held.record.persistent,
        "inconsistent": is_lost,
    }
