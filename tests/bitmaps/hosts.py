"""Hosts whose disks have dirty bitmaps, and what is known of these."""

import json
import os
from pathlib import Path

import pytest

from fleecefs.bitmaps import disk as bitmaps_of_disk
from fleecefs.bitmaps.containers import read_container
from fleecefs.bitmaps.steps import Step
from fleecefs.qcow2.contents import read_contents
from fleecefs.state import activity_log
from tests.qcow2.files import MemoryFile, check
from tests.support.disks import clusters
from tests.support.host import CLUSTER, Host
from tests.support.qemu import listed_bitmaps

WEB, DB = "web.raw", "db.raw"

# Sixteen clusters; four areas of four.
COUNT = 16
SIZE = COUNT * CLUSTER
AREA = 4 * CLUSTER


def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in activity_log, bitmaps_of_disk:
        monkeypatch.setattr(module, "AREA_SIZE", AREA)


def make_host(path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a host with two disks of sixteen clusters each."""
    small_areas(monkeypatch)
    host = Host(path, monkeypatch)
    host.add(WEB, clusters("a" * COUNT))
    host.add(DB, clusters("d" * COUNT))
    return host


def change(host: Host, *steps: Step) -> None:
    assert host.inventory is not None
    host.inventory.change_bitmaps(steps)


def write(host: Host, *indexes: int, disk: str = WEB, letter: str = "x") -> None:
    """Write some clusters."""
    for index in indexes:
        host.write(disk, clusters(letter), index * CLUSTER)


def held(host: Host, name: str, disk: str = WEB):
    assert host.inventory is not None
    return host.inventory.bitmaps.find(disk).held[name]


def names(host: Host, disk: str = WEB) -> set[str]:
    assert host.inventory is not None
    return set(host.inventory.bitmaps.find(disk).held)


def dirty(host: Host, name: str, disk: str = WEB) -> set[int]:
    """Return the bits that are set of a good bitmap."""
    bitmap = held(host, name, disk).bitmap
    assert bitmap.inconsistent is None
    return set(bitmap.to_save().search(1))


def described(host: Host, name: str, disk: str = WEB) -> dict:
    assert host.inventory is not None
    found = host.inventory.bitmaps.describe(disk)
    return next(each for each in found if each["name"] == name)


def reason(host: Host, name: str, disk: str = WEB) -> str:
    """Return why a bitmap is inconsistent."""
    what = described(host, name, disk)
    assert what["inconsistent"]
    assert what["count"] == 0
    assert not what["recording"]
    assert what["reason"]
    return what["reason"]


def container(host: Host, disk: str = WEB) -> Path:
    return host.state / "disks" / disk / "bitmaps" / "bitmaps.qcow2"


def log_of(host: Host, disk: str = WEB) -> Path:
    return container(host, disk).with_name("activity.log")


def stored(host: Host, disk: str = WEB) -> dict[str, set[str]]:
    """Return the flags of each bitmap that QEMU finds in the container."""
    found = listed_bitmaps(container(host, disk))
    return {name: flags for name, (_, flags) in found.items()}


def saved(host: Host, name: str, disk: str = WEB) -> set[int]:
    """Return the bits that the container has; QEMU reads none that are in use."""
    contents, file, fd = read_container(container(host, disk))
    try:
        return set(contents.bits(file, name).search(1))
    finally:
        os.close(fd)


def live_files(host: Host) -> list[Path]:
    return sorted(host.runtime.glob("*/disks/*/bitmaps/*.bits"))


def record(host: Host, name: str, disk: str = WEB) -> dict | None:
    """Return what state.json says of a bitmap."""
    state = json.loads((host.state / "state.json").read_text())
    bitmaps = next(d["bitmaps"] for d in state["disks"] if d["name"] == disk)
    return next((each for each in bitmaps if each["name"] == name), None)


def check_nothing_leaks(host: Host, *, counts: bool = True) -> None:
    """All bits in use are of a bitmap, and so is what containers have."""
    assert host.inventory is not None
    known = set()
    for disk in host.inventory.disks:
        bitmaps = host.inventory.bitmaps.find(disk).held
        for each in bitmaps.values():
            known.add(each.live.path)
            if each.frozen is not None:
                known.add(each.frozen.path)
        place = container(host, disk)
        if place.exists():
            places = {n: e.record.container for n, e in bitmaps.items()}
            ours = {n for n, at in places.items() if at.startswith("disks/")}
            content = place.read_bytes()
            assert set(read_contents(MemoryFile(content)).entries) == ours
            if counts:
                # As `qemu-img check` does.
                assert check(content) == (0, 0)
    assert set(live_files(host)) == known


def everything(host: Host) -> dict:
    """Return all that a command which was refused must not have changed."""
    assert host.inventory is not None
    found = {}
    for disk in host.inventory.disks:
        of_disk = host.inventory.bitmaps.find(disk)
        for name, each in of_disk.held.items():
            found[disk, name] = (
                # What an inconsistent one has does not matter.
                each.bitmap.inconsistent or each.bitmap.to_save().to01(),
                each.bitmap.recording,
                each.bitmap.busy,
                each.record.persistent,
                each.record.auto,
                each.record.recording,
                each.container,
                each.live.path,
            )
        if container(host, disk).exists():
            found[disk] = stored(host, disk)
    state = json.loads((host.state / "state.json").read_text())
    for each in state["disks"]:
        each["bitmaps"].sort(key=lambda bitmap: bitmap["name"])
        # Numbers are not used twice.
        del each["next_bitmap"]
    return found | {"files": live_files(host), "disks": state["disks"]}
