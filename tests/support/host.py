"""A machine on which one inventory lives, dies and comes back. Nothing is mounted."""

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from fleecefs.inventory import Inventory, Options
from fleecefs.state import runtime

CLUSTER = 4096


class Host:
    """Sources, a state directory, a runtime directory and the id of the boot."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = directory / "state"
        self.runtime = directory / "run"
        self.sources: dict[str, Path] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.inventory: Inventory | None = None
        self._directory = directory
        self._monkeypatch = monkeypatch
        self._boots = itertools.count(1)
        monkeypatch.setattr(runtime, "base_directory", lambda: self.runtime)
        self._boot()

    def add(self, name: str, data: bytes) -> Path:
        """Make a source."""
        self.sources[name] = self._directory / name
        self.sources[name].write_bytes(data)
        return self.sources[name]

    # -- the inventory's life

    def open(self, names: Iterable[str] | None = None, **options: Any) -> Inventory:
        """Open the inventory with some disks, or all."""
        chosen = {name: self.sources[name] for name in names or self.sources}
        self.inventory = Inventory.open(
            self.state, chosen, Options(**options), self._emit
        )
        return self.inventory

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def close(self) -> None:
        """End cleanly."""
        assert self.inventory is not None
        self.inventory.close()
        self.inventory = None

    def crash(self) -> None:
        """Let go of everything as a kill -9 does: locks are free, nothing is saved."""
        assert self.inventory is not None
        self.inventory._broken.put(None)
        self.inventory._recorder.join()
        self.inventory.bitmaps._stop_saver()
        self.inventory.bitmaps.close_files()
        self.inventory._close_files()
        self.inventory = None

    def end(self) -> None:
        if self.inventory is not None:
            self.crash()

    def reboot(self) -> None:
        """Lose what is on tmpfs; end or crash before."""
        assert self.inventory is None
        shutil.rmtree(self.runtime, ignore_errors=True)
        self._boot()

    def _boot(self) -> None:
        boot_id = str(UUID(int=next(self._boots)))
        self._monkeypatch.setattr(runtime, "boot_id", lambda: boot_id)

    # -- what is there

    def read(self, snapshot: str, disk: str, offset: int = 0) -> bytes:
        """Return all of a disk as it was, from some offset on."""
        assert self.inventory is not None
        file = self.inventory.snapshots[snapshot].snapshots[disk]
        return bytes(file.read(file.size, offset))

    def lost(self, snapshot: str, disk: str) -> str | None:
        """Return why a disk of a snapshot is broken, or None."""
        assert self.inventory is not None
        return self.inventory.snapshots[snapshot].snapshots[disk].lost

    def live(self, disk: str) -> bytes:
        assert self.inventory is not None
        return self.inventory.disks[disk].read(self.inventory.disks[disk].size, 0)

    def write(self, disk: str, data: bytes, offset: int = 0) -> None:
        assert self.inventory is not None
        assert self.inventory.disks[disk].write(data, offset) == len(data)

    def epoch_directories(self) -> list[str]:
        """Return the epochs that occupy space in the state directory."""
        found = self.state.glob("disks/*/epochs/*")
        return sorted("/".join(path.parts[-3::2]) for path in found)

    def check_space(self, slack: int = 0) -> None:
        """Nothing takes space that no epoch needs, and what takes space is counted.

        But for `slack` bytes of each file: data whose copy was cut short.
        """
        assert self.inventory is not None
        needed, used = set(), {"ram": 0, "disk": 0}
        for disk in self.inventory.disks.values():
            for epoch in disk.history.epochs:
                needed.add(f"{disk.name}/{epoch.number:04}")
                for tier in epoch.store.tiers:
                    used[tier.name] += tier.used
                    assert not (tier.bits & ~epoch.preserved).any()
                    assert 0 <= tier.image.allocated() - tier.used <= slack
        budgets = self.inventory.budgets
        assert used == {"ram": budgets.ram.used, "disk": budgets.disk.used}
        places = self.state, self.inventory.runtime_path, *self._stores()
        found = [p for place in places for p in place.glob("disks/*/epochs/*")]
        assert {"/".join(path.parts[-3::2]) for path in found} <= needed

    def _stores(self) -> Iterable[Path]:
        """Return where stores are that are not in the state directory."""
        assert self.inventory is not None
        place = self.inventory.options.store
        return [] if place is None else place.iterdir()


def failing(call: Callable[..., Any], nth: int, error: BaseException, *, after: bool):
    """Return a function that does as `call`, and raises at or after the nth call."""
    calls = itertools.count(1)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        is_nth = next(calls) == nth
        if is_nth and not after:
            raise error
        result = call(*args, **kwargs)
        if is_nth:
            raise error
        return result

    return wrapper
