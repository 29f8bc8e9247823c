"""Where a job is remembered, so that it can go on after a crash of the daemon.

    STATE/jobs/KEY.json      what it was told; there from before its instant until the
                             end, and as long as it is there its snapshot is kept
    RUNTIME/jobs/KEY.json    what changes: its speed, whether it rests, how it ends

How far it is needs no record of its own: see copy.py. No job survives the host.
"""

import contextlib
import enum
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fleecefs.block.bitmap import replace_file, sync_directory
from fleecefs.block.epoch import OnCbwError
from fleecefs.errors import NotUsable
from fleecefs.inventory import Inventory
from fleecefs.jobs.options import BackupOptions, BitmapMode, Format, OnError, Sync
from fleecefs.jobs.target import Target

_FORMAT = "fleecefs-job"
_VERSION = 1


class Record:
    """Where a job is remembered."""

    def __init__(self, inventory: Inventory, key: str) -> None:
        self.key = key
        self._told = inventory.state_path / "jobs" / f"{key}.json"
        self._now = inventory.runtime_path / "jobs" / f"{key}.json"

    def create(self, told: dict[str, Any]) -> None:
        """Remember durably what a job was told."""
        for path in self._told.parent, self._now.parent:
            path.mkdir(mode=0o700, exist_ok=True)
        document = {"format": _FORMAT, "version": _VERSION, **told}
        replace_file(self._told, (json.dumps(document, indent=1) + "\n").encode())

    def told(self) -> dict[str, Any]:
        """Return what a job was told; NotUsable if that can not be read."""
        try:
            told = json.loads(self._told.read_bytes())
        except (OSError, ValueError):
            raise NotUsable(f"{self._told}: is damaged") from None
        if not isinstance(told, dict) or told.get("format") != _FORMAT:
            raise NotUsable(f"{self._told}: is no record of a job")
        if told.get("version") != _VERSION:
            raise NotUsable(f"{self._told}: has version {told.get('version')}")
        return told

    def save(self, now: dict[str, Any]) -> None:
        """Remember what changes: on tmpfs, so it does not wait."""
        new = self._now.with_suffix(".new")
        # Without it the job goes on as it was told.
        with contextlib.suppress(OSError):
            new.write_text(json.dumps(now))
            new.replace(self._now)

    def now(self) -> dict[str, Any]:
        """Return what was saved last."""
        with contextlib.suppress(OSError, ValueError):
            now = json.loads(self._now.read_bytes())
            if isinstance(now, dict):
                return now
        return {}

    def remove(self) -> None:
        """Forget the job: it does not go on."""
        for path in self._now.parent.glob(f"{self.key}.*"):
            path.unlink(missing_ok=True)
        # It may never have been made, nor the directory.
        with contextlib.suppress(FileNotFoundError):
            self._told.unlink()
            sync_directory(self._told.parent)


def told_of(options: BackupOptions, target: Target) -> dict[str, Any]:
    """Return what a job was told, for its record."""
    told = {
        **asdict(options),
        "type": "backup",
        "target": str(options.target),
        "sync": options.sync.value,
        "on_source_error": options.on_source_error.value,
        "on_target_error": options.on_target_error.value,
        "on_cbw_error": value_of(options.on_cbw_error),
        "bitmap_mode": value_of(options.bitmap_mode),
        "target_format": options.format.value,
        "backing": text_of(options.backing),
        "backing_format": target.backing_format,
        "target_is_new": target.is_new,
        "target_identity": target.identity,
        "created": time.time(),
    }
    # Where the record says what kind of file it is.
    del told["format"]
    return {name.replace("_", "-"): value for name, value in told.items()}


def options_of(told: dict[str, Any]) -> BackupOptions:
    """Return what a record says that a job was told; KeyError, ValueError if none."""
    on_cbw_error = told["on-cbw-error"]
    return BackupOptions(
        device=told["device"],
        target=Path(told["target"]),
        job_id=told["job-id"],
        sync=Sync(told["sync"]),
        speed=told["speed"],
        on_source_error=OnError(told["on-source-error"]),
        on_target_error=OnError(told["on-target-error"]),
        on_cbw_error=on_cbw_error and OnCbwError(on_cbw_error),
        cbw_timeout=told["cbw-timeout"],
        workers=told["workers"],
        auto_finalize=told["auto-finalize"],
        auto_dismiss=told["auto-dismiss"],
        bitmap=told["bitmap"],
        bitmap_mode=told["bitmap-mode"] and BitmapMode(told["bitmap-mode"]),
        format=Format(told["target-format"]),
        backing=told["backing"] and Path(told["backing"]),
        backing_format=told["backing-format"] and Format(told["backing-format"]),
        fallback=told["fallback"],
        fell_back=told["fell-back"],
    )


def text_of(value: object) -> str | None:
    return None if value is None else str(value)


def value_of(word: enum.Enum | None) -> Any:
    return None if word is None else word.value
