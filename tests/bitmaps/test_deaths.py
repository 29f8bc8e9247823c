"""Dirty bitmaps when the daemon is killed midway: no bit is missing, nothing leaks."""

import itertools
import os
import shutil

import pytest

from fleecefs.bitmaps.steps import (
    Add,
    Attach,
    Clear,
    Copy,
    Disable,
    Enable,
    Fill,
    Freeze,
    Merge,
    Remove,
    Set,
)
from fleecefs.state import runtime
from tests.bitmaps.hosts import (
    AREA,
    CLUSTER,
    COUNT,
    DB,
    WEB,
    change,
    check_nothing_leaks,
    described,
    dirty,
    held,
    make_host,
    names,
    write,
)
from tests.support.disks import letters
from tests.support.killed import killed_at
from tests.support.qemu import require_qemu


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    require_qemu()
    host = make_host(tmpfs_path, monkeypatch)
    host.open()
    yield host
    host.end()


def add(name, disk=WEB, **more):
    return Add(disk, name, granularity=CLUSTER, **more)


class Guest:
    """A step that writes a cluster before the instant, and one after it."""

    def __init__(self, host, before, after):
        self._host, self._before, self._after = host, before, after

    def prepare(self, find):
        write(self._host, self._before)

    def apply(self):
        pass

    def finish(self):
        write(self._host, self._after)

    def undo(self):
        pass

    def concerned(self):
        return []


BEFORE, AFTER = {2}, {3, 10}


def has(host, name, bits, written, *, if_recording=frozenset()):
    """A bitmap that is there, and good, has some bits, if they were written."""
    if name not in names(host) or described(host, name)["inconsistent"]:
        return
    needed = set(bits)
    if described(host, name)["recording"]:
        needed |= set(if_recording)
    assert needed & written <= dirty(host, name), name


SCENARIOS = {
    "add": (lambda p: [add("new")], {"new": (set(), AFTER)}),
    "add elsewhere": (
        lambda p: [add("new", container=p / "new.qcow2")],
        {"new": (set(), AFTER)},
    ),
    "remove": (lambda p: [Remove(WEB, "daily")], {"daily": ({1}, BEFORE | AFTER)}),
    "clear": (lambda p: [Clear(WEB, "daily")], {"daily": (set(), AFTER)}),
    "clear lost": (lambda p: [Clear(WEB, "lost")], {"lost": (set(), AFTER)}),
    "fill": (
        lambda p: [Fill(WEB, "lost")],
        {"lost": ({1}, set(range(COUNT)))},
    ),
    "freeze": (
        lambda p: [Freeze(WEB, "daily", "job")],
        {"daily": ({1}, BEFORE | AFTER)},
    ),
    "merge": (lambda p: [Merge(WEB, "daily", [(DB, "db")])], {}),
    "disable": (
        lambda p: [Disable(WEB, "daily")],
        {"daily": ({1} | BEFORE, AFTER)},
    ),
    "enable": (lambda p: [Enable(WEB, "off")], {"off": (set(), AFTER)}),
    "copy": (
        lambda p: [Copy(WEB, "daily", "new", persistent=True)],
        {"new": ({1} | BEFORE, set())},
    ),
    "persistent": (
        lambda p: [Set(WEB, "now", persistent=True)],
        {"now": ({1}, BEFORE | AFTER)},
    ),
    "transient": (
        lambda p: [Set(WEB, "daily", persistent=False)],
        {"daily": ({1}, BEFORE | AFTER)},
    ),
    "attach": (lambda p: [Attach(WEB, p / "attached.qcow2")], {}),
    "save": (lambda p: [], {}),
}


def prepare_scenario(host, tmpfs_path):
    """Leave behind what a daemon does that was killed; return a copy of it."""
    change(host, add("theirs", container=tmpfs_path / "attached.qcow2"))
    host.close()
    shutil.rmtree(host.state)
    host.open()
    change(host, add("daily"), add("lost"), add("off", recording=False))
    change(host, add("db", DB), add("now", persistent=False))
    held(host, "lost").lose("for a test")
    write(host, 1)
    write(host, 5, disk=DB)
    host.inventory.save_bitmaps([WEB, DB])
    host.crash()


@pytest.mark.parametrize("crash", ["kill", "host crash"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.logs("for a test|was in use when|is not in|cut short|lost of web.raw")
def test_death_at_each_kill_point_loses_no_bit(
    host, tmpfs_path, monkeypatch, scenario, crash
):
    make_steps, expected = SCENARIOS[scenario]
    prepare_scenario(host, tmpfs_path)
    here = [p for p in tmpfs_path.iterdir() if p.name != "copy"]
    copy_all(here, tmpfs_path / "copy")
    everything = {"daily": ({1}, BEFORE | AFTER)}
    if scenario in ("clear", "disable", "remove", "transient", "freeze"):
        everything = {}

    def act():
        steps = make_steps(tmpfs_path)
        change(host, Guest(host, 2, 3), *steps)
        write(host, 10)
        if scenario == "save":
            host.inventory.save_bitmaps([WEB])

    boot = runtime.boot_id()
    # What a crash of the host leaves, tests/test_bitmap_durability.py looks at.
    for number in itertools.count(1, 1 if crash == "kill" else 4):
        restore(here, tmpfs_path / "copy")
        monkeypatch.setattr(runtime, "boot_id", lambda: boot)
        host.open()
        point = killed_at(number, act)
        host.crash()
        if crash == "host crash":
            host.reboot()
        host.open()
        written = {i for i, c in enumerate(letters(host.live(WEB))) if c == "x"}
        for name, (bits, if_recording) in {**everything, **expected}.items():
            has(host, name, bits, written, if_recording=if_recording)
        if scenario == "merge" and point is None:
            assert 5 in dirty(host, "daily")
        if scenario == "remove" and point is None:
            assert "daily" not in names(host)
        check_nothing_leaks(host, counts=number % 3 == 0 or point is None)
        # Whatever was cut short can be done again.
        if number % 3 == 0 and scenario in ("add", "add elsewhere", "copy"):
            if "new" in names(host):
                change(host, Remove(WEB, "new"))
            change(host, *make_steps(tmpfs_path))
            host.close()
            host.open()
            check_nothing_leaks(host)
        host.crash()
        if point is None:
            break
    assert number > 10


def copy_all(paths, to):
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        else:
            to.mkdir(exist_ok=True)
            shutil.copy2(path, to / path.name)


def restore(paths, copy):
    """Make all as it was; files keep their inodes."""
    for path in copy.parent.iterdir():
        if path not in paths and path != copy:
            path.unlink()
    for path in paths:
        if (copy / path.name).is_dir():
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(copy / path.name, path)
        else:
            path.write_bytes((copy / path.name).read_bytes())


@pytest.mark.parametrize("end", ["clean end", "kill", "host crash"])
@pytest.mark.parametrize("crash", ["kill", "host crash"])
def test_death_at_each_kill_point_of_a_start_loses_no_bit(host, tmpfs_path, end, crash):
    change(host, add("daily"), add("off", recording=False), add("db", DB))
    write(host, 1)
    write(host, 5, disk=DB)
    if end == "clean end":
        host.close()
    else:
        host.crash()
    here = [p for p in tmpfs_path.iterdir() if p.name != "copy"]
    stamps = {p: p.stat().st_mtime_ns for p in here if p.is_file()}
    copy_all(here, tmpfs_path / "copy")
    if end == "host crash":
        host.reboot()

    number, point = 0, ""
    while point is not None:
        restore(here, tmpfs_path / "copy")
        for path, stamp in stamps.items():
            os.utime(path, ns=(stamp, stamp))
        if end == "host crash":
            shutil.rmtree(host.runtime)
        number += 1
        point = killed_at(number, host.open)
        if crash == "host crash":
            host.inventory = None
            host.reboot()
        host.open()
        found = dirty(host, "daily")
        assert {1} <= found <= set(range(AREA // CLUSTER)), point
        assert 5 in dirty(host, "db", DB)
        assert dirty(host, "off") == set()
        check_nothing_leaks(host)
        host.crash()
    assert number > 5
