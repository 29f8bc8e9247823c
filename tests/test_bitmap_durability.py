"""Dirty bitmaps when the host goes down: no bit is missing, and few are too many.

`Power` (tests/support/power.py) watches a story of writes and bitmaps; then the power
fails at each of its steps, with each choice of what was not synced. What a bitmap has
to have afterwards, the disk itself tells: a part that is not what it was when the
bitmap began is dirty. Whoever copies what is dirty over a copy of that instant has the
disk as it is.
"""

import itertools
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bitarray import bitarray

from fleecefs.bitmaps import disk as bitmaps_of_disk
from fleecefs.bitmaps.steps import (
    Add,
    Clear,
    Copy,
    Disable,
    Enable,
    Freeze,
    Merge,
    Remove,
    Set,
)
from fleecefs.block.raw import RawImage
from fleecefs.inventory import PrivateOptions
from fleecefs.qcow2.container import Container
from fleecefs.state import activity_log, runtime
from fleecefs.units import KiB
from tests.qcow2.files import check as check_container
from tests.support.disks import clusters
from tests.support.host import CLUSTER, Host, failing
from tests.support.killed import killed_at
from tests.support.power import Power

WEB = "web.raw"
SIZE = 16 * CLUSTER

# Four clusters, so that a small disk has some.
AREA = 16 * KiB

# Of what a power failure can leave we look at each so many-th: all are 13000.
STRIDE = 23

Units = frozenset[int]


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """A host with a disk of sixteen clusters, and areas of four."""
    for module in activity_log, bitmaps_of_disk:
        monkeypatch.setattr(module, "AREA_SIZE", AREA)
    # Of smaller clusters: there is less to compare.
    create = Container.create
    small = staticmethod(lambda file, size: create(file, size, CLUSTER))
    monkeypatch.setattr(Container, "create", small)
    host = Host(tmpfs_path, monkeypatch)
    host.add(WEB, clusters("abcdefghijklmnop"))
    yield host
    host.end()


# -- what has to be


@dataclass(frozen=True)
class Mark:
    """What a bitmap has to have, and may have.

    base     what the disk held when the bitmap began to record; None if it does not
    fixed    what it has to have whatever the disk holds
    may      what it may have, exactly
    is_open  whether nobody has been told yet that it has begun
    """

    granularity: int
    base: bytes | None
    fixed: Units = frozenset()
    may: Units = frozenset()
    is_open: bool = False

    def must(self, content: bytes) -> Units:
        if self.base is None or self.is_open:
            return self.fixed
        return self.fixed | self.differences(content)

    def differences(self, content: bytes) -> Units:
        assert self.base is not None
        unit = self.granularity
        return frozenset(
            at // unit
            for at in range(0, len(content), unit)
            if content[at : at + unit] != self.base[at : at + unit]
        )

    def scaled(self, units: Units, granularity: int) -> Units:
        """Return these bits of ours in another granularity, rounded outward."""
        return frozenset(
            at // granularity
            for unit in units
            for at in range(
                unit * self.granularity,
                min(SIZE, (unit + 1) * self.granularity),
                min(granularity, self.granularity),
            )
        )


@dataclass(frozen=True)
class Expected:
    """What has to hold at some moment.

    A bitmap is as one of its marks says; None among them: it may be missing. Those that
    `may_be_lost` may be inconsistent, with a reason like this. `logged` are the areas
    that count as dirty.
    """

    marks: dict[str, tuple[Mark | None, ...]] = field(default_factory=dict)
    may_be_lost: dict[str, str] = field(default_factory=dict)
    has_to_be_lost: frozenset[str] = frozenset()
    logged: Units = frozenset()

    def check(self, host: Host) -> None:
        held = host.inventory.bitmaps.find(WEB).held
        needed = {name for name, marks in self.marks.items() if None not in marks}
        assert needed <= set(held) <= set(self.marks)
        content = host.live(WEB)
        for name, each in held.items():
            reason = each.bitmap.inconsistent
            if reason is not None:
                assert re.search(self.may_be_lost.get(name, "never"), reason), reason
                continue
            assert name not in self.has_to_be_lost
            found = frozenset(each.bitmap.to_save().search(1))
            marks = [mark for mark in self.marks[name] if mark is not None]
            assert any(
                mark.granularity == each.bitmap.granularity
                and mark.must(content) <= found
                and (mark.base is not None) == each.bitmap.recording
                for mark in marks
            ), f"{name}: {sorted(found)} is not enough for {describe(marks, content)}"
            may = self._may(marks)
            assert found <= may, f"{name}: {sorted(found - may)} are too many"

    def _may(self, marks: list[Mark]) -> Units:
        may = frozenset().union(*(mark.may | mark.fixed for mark in marks))
        recorded = [mark for mark in marks if mark.base is not None]
        for mark in recorded:
            unit = mark.granularity
            may |= {
                at // unit
                for a in self.logged
                for at in range(a * AREA, (a + 1) * AREA, min(unit, AREA))
            }
        return may


def describe(marks: list[Mark], content: bytes) -> list[Any]:
    return [(sorted(mark.must(content)), mark.base is not None) for mark in marks]


class Story:
    """What happens to the disk of a host, and to its bitmaps."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.expected = Expected()
        # As it was while the last command was at work.
        self.meanwhile = self.expected
        self.transient: dict[str, Mark] = {}
        self._keys = (f"job{index}" for index in itertools.count())

    # -- the life of the mount

    def open(self) -> None:
        self.host.open()

    def close(self) -> None:
        """End cleanly: all is saved."""
        self.host.close()
        self.transient = {}
        self._has_saved()

    @property
    def content(self) -> bytes:
        return self.host.live(WEB)

    # -- the guest

    def write(self, letters: str, first: int = 0) -> None:
        self._dirties(first * CLUSTER, len(letters) * CLUSTER)
        self.host.write(WEB, clusters(letters), first * CLUSTER)

    def write_bytes(self, data: bytes, offset: int) -> None:
        self._dirties(offset, len(data))
        self.host.write(WEB, data, offset)

    def zero(self, count: int, first: int) -> None:
        self._dirties(first * CLUSTER, count * CLUSTER)
        self.host.inventory.disks[WEB].zero(count * CLUSTER, first * CLUSTER)

    def discard(self, count: int, first: int) -> None:
        self._dirties(first * CLUSTER, count * CLUSTER)
        self.host.inventory.disks[WEB].discard(count * CLUSTER, first * CLUSTER)

    def flush(self) -> None:
        self.host.inventory.disks[WEB].flush()

    def _dirties(self, offset: int, length: int) -> None:
        def dirtied(mark: Mark) -> Mark:
            unit = mark.granularity
            units = range(offset // unit, (offset + length - 1) // unit + 1)
            return replace(mark, may=mark.may | set(units)) if mark.base else mark

        marks = {
            name: tuple(mark and dirtied(mark) for mark in marks)
            for name, marks in self.expected.marks.items()
        }
        self.transient = {n: dirtied(mark) for n, mark in self.transient.items()}
        areas = range(offset // AREA, (offset + length - 1) // AREA + 1)
        logged = self.expected.logged | set(areas)
        self.expected = replace(self.expected, marks=marks, logged=logged)

    # -- bitmaps

    def mark(self, name: str) -> Mark:
        if name in self.transient:
            return self.transient[name]
        (mark,) = self.expected.marks[name]
        return mark

    @contextmanager
    def becoming(self, name: str, mark: Mark | None) -> Iterator[None]:
        """While this happens a bitmap is what it was, or what it becomes."""
        before = self.expected.marks.get(name, (None,))
        was_recording = before[0] is not None and before[0].base is not None
        if mark is not None and not was_recording:
            self._set(name, *before, replace(mark, is_open=True))
        else:
            self._set(name, *before, mark)
        self.meanwhile = self.expected
        yield
        self._set(name, mark)

    def _set(self, name: str, *marks: Mark | None) -> None:
        changed = {**self.expected.marks, name: marks}
        if marks == (None,):
            del changed[name]
        self.expected = replace(self.expected, marks=changed)

    def do(self, *steps: Any) -> None:
        self.host.inventory.change_bitmaps(steps)

    def add(
        self,
        name: str,
        granularity: int = CLUSTER,
        *,
        recording: bool = True,
        persistent: bool = True,
    ) -> None:
        mark = Mark(granularity, self.content if recording else None)
        step = Add(
            WEB,
            name,
            granularity=granularity,
            recording=recording,
            persistent=persistent,
        )
        if not persistent:
            self.do(step)
            self.transient[name] = mark
            return
        with self.becoming(name, mark):
            self.do(step)

    def save(self) -> None:
        self.host.inventory.save_bitmaps([WEB])
        self._has_saved()

    def _has_saved(self) -> None:
        """What may be dirty now is what is."""
        self.expected = replace(self.expected, logged=frozenset())

    def clear(self, name: str) -> None:
        mark = self.mark(name)
        base = None if mark.base is None else self.content
        with self.becoming(name, Mark(mark.granularity, base)):
            self.do(Clear(WEB, name))
        self._has_saved()

    def disable(self, name: str) -> None:
        mark = self.mark(name)
        stopped = replace(mark, base=None, fixed=mark.must(self.content))
        with self.becoming(name, stopped):
            self.do(Disable(WEB, name))
        self._has_saved()

    def enable(self, name: str) -> None:
        with self.becoming(name, replace(self.mark(name), base=self.content)):
            self.do(Enable(WEB, name))
        self._has_saved()

    def merge(self, target: str, *sources: str) -> None:
        with self.becoming(target, self._merged(self.mark(target), sources)):
            self.do(Merge(WEB, target, [(WEB, source) for source in sources]))
        self._has_saved()

    def _merged(self, mark: Mark, sources: tuple[str, ...]) -> Mark:
        for name in sources:
            source = self.mark(name)
            must = source.scaled(source.must(self.content), mark.granularity)
            may = source.scaled(source.may | source.fixed, mark.granularity)
            mark = replace(mark, fixed=mark.fixed | must, may=mark.may | may)
        return mark

    def copy(self, name: str, target: str) -> None:
        mark = self._merged(Mark(self.mark(name).granularity, None), (name,))
        before = self.expected.may_be_lost
        self.may_be_lost(target, "was cut short")
        with self.becoming(target, mark):
            self.do(Copy(WEB, name, target, persistent=True))
        self.expected = replace(self.expected, may_be_lost=before)
        self._has_saved()

    def make_persistent(self, name: str) -> None:
        mark = self.mark(name)
        with self.becoming(name, mark):
            self.do(Set(WEB, name, persistent=True))
        del self.transient[name]
        self._has_saved()

    def make_transient(self, name: str) -> None:
        mark = self.mark(name)
        with self.becoming(name, None):
            self.do(Set(WEB, name, persistent=False))
        self.transient[name] = mark

    def remove(self, name: str) -> None:
        with self.becoming(name, None):
            self.do(Remove(WEB, name))

    def freeze(self, name: str) -> str:
        """Begin a backup; what it copies the bitmap has, as if the backup failed."""
        key = next(self._keys)
        self._job(key).write_text("{}")
        self.host.inventory.create_private(
            [PrivateOptions(WEB, key)], [Freeze(WEB, name, key)]
        )
        self.frozen_at = self.content
        return key

    def _job(self, key: str) -> Path:
        path = self.host.state / "jobs" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        return path

    def succeed(self, key: str, name: str, left: Units = frozenset()) -> None:
        """End a backup of which all is copied but these."""
        mark = self.mark(name)
        # What it had may be saved still.
        ended = replace(mark, base=self.frozen_at, fixed=left)
        bits = bitarray(SIZE // CLUSTER, endian="little")
        for unit in left:
            bits[unit] = 1
        with self.becoming(name, ended):
            self.host.inventory.settle_bitmap(key)
            self.host.inventory.end_bitmap(key, bits)
        self._end(key)

    def fail(self, key: str) -> None:
        self.host.inventory.end_bitmap(key, None)
        self._end(key)

    def _end(self, key: str) -> None:
        self._job(key).unlink()
        inventory = self.host.inventory
        inventory.delete_private(inventory.private[key])

    def may_be_lost(self, name: str, reason: str) -> None:
        may = {**self.expected.may_be_lost, name: reason}
        self.expected = replace(self.expected, may_be_lost=may)

    def has_to_be_lost(self, name: str) -> None:
        lost = self.expected.has_to_be_lost | {name}
        self.expected = replace(self.expected, has_to_be_lost=lost)


# -- stories


def recording(story):
    """Writes of all kinds, and saves between them; one granularity finer, one not."""
    story.open()
    story.write("A")
    story.add("daily")
    story.add("fine", 512)
    story.write("B", 1)
    story.write_bytes(b"#" * 700, 5 * CLUSTER + 300)
    story.flush()
    story.save()
    story.write("C", 1)
    story.zero(2, 8)
    story.discard(1, 13)
    story.save()
    story.write("D", 15)


def unmounting(story):
    """A clean end, and another mount."""
    story.open()
    story.add("daily")
    story.add("off", recording=False)
    story.write("A")
    story.close()
    story.open()
    story.write("B", 5)
    story.close()
    story.open()
    story.write("C", 10)


def clearing(story):
    story.open()
    story.add("daily")
    story.write("AA")
    story.clear("daily")
    story.write("B", 1)
    story.write("C", 9)
    story.save()
    story.clear("daily")
    story.write("D", 9)


def pausing(story):
    """Disabled and enabled again, beside one that records all the time."""
    story.open()
    story.add("daily")
    story.add("beside")
    story.write("A")
    story.disable("daily")
    story.write("B", 6)
    story.enable("daily")
    story.write("C", 12)
    story.disable("daily")
    story.clear("daily")
    story.write("D", 12)


def merging(story):
    story.open()
    story.add("daily")
    story.write("A")
    story.add("fine", 512)
    story.write("B", 5)
    story.disable("fine")
    story.add("sum", 8192, recording=False)
    story.merge("sum", "daily", "fine")
    story.write("C", 10)
    story.copy("daily", "copied")
    story.write("D", 14)


def changing_persistence(story):
    story.open()
    story.add("daily", persistent=False)
    story.write("A")
    story.make_persistent("daily")
    story.write("B", 5)
    story.make_transient("daily")
    story.write("C", 10)
    story.make_persistent("daily")
    story.write("D", 14)


def removing(story):
    story.open()
    story.add("daily")
    story.add("other")
    story.write("A")
    story.remove("daily")
    story.write("B", 5)
    story.add("daily", 8192)
    story.write("C", 10)
    story.remove("other")
    story.remove("daily")
    story.write("D", 14)
    story.add("other")
    story.write("E", 14)


def backing_up(story):
    """Three backups: one succeeds, one fails, one copies a part of it."""
    story.open()
    story.add("daily")
    story.write("A")
    key = story.freeze("daily")
    story.write("B", 5)
    story.save()
    story.succeed(key, "daily")
    story.write("C", 10)
    story.save()
    key = story.freeze("daily")
    story.write("D", 14)
    story.fail(key)
    story.write("E", 1)
    key = story.freeze("daily")
    story.write("F", 7)
    story.succeed(key, "daily", frozenset({10, 14}))
    story.write("G", 12)
    story.save()


def not_flushing(story):
    """A guest that does not flush: what is lost of its disk is different, too."""
    story.open()
    story.write("A")
    story.add("daily")
    story.write("B", 5)
    story.clear("daily")
    story.write("C", 10)
    key = story.freeze("daily")
    story.succeed(key, "daily")
    story.save()
    story.write("D", 14)


def with_areas_as_bits(story):
    """A bit is as much as an area, and as much as a cluster."""
    story.open()
    story.add("areas", AREA)
    story.add("daily")
    story.write("A")
    key = story.freeze("daily")
    story.succeed(key, "daily", frozenset({0}))
    story.write("B", 5)


def failing_log(story):
    """The log can not be written: bitmaps are given up before the guest goes on."""
    story.open()
    story.add("daily")
    story.add("off", recording=False)
    story.write("A")
    story.may_be_lost("daily", "activity log failed: .*Input/output error")
    with pytest.MonkeyPatch.context() as patch:
        error = OSError(5, "Input/output error")
        patch.setattr(
            activity_log, "_write", failing(activity_log._write, 1, error, after=False)
        )
        story.write("B", 5)
    story.has_to_be_lost("daily")
    story.write("C", 10)
    story.add("new")
    story.write("D", 14)


STORIES = [
    recording,
    unmounting,
    clearing,
    pausing,
    merging,
    changing_persistence,
    removing,
    backing_up,
    not_flushing,
    with_areas_as_bits,
    failing_log,
]

each_story = pytest.mark.parametrize("story", STORIES)


def watched(host, happen):
    """Let something happen under the eyes of `Power`, and the host crash."""
    power = Power(host.state.parent, host.runtime, list(host.sources.values()))
    with pytest.MonkeyPatch.context() as patch:
        power.watch(patch)
        happen(power)
        host.end()
    return power


def watch(host, story):
    """Let a story happen; return what was seen of it."""
    told = Story(host)

    def happen(power):
        power.expected = lambda: told.expected
        story(told)

    return watched(host, happen)


def fail(host, power, failure):
    """Let the power fail, and start the machine again."""
    host.end()
    host.reboot()
    power.restore(failure)


def open_and_check(host, failure):
    """Mount, and find what the story says; then let the daemon crash."""
    try:
        host.open()
        failure.point.expected.check(host)
        check_files(host)
        host.crash()
    except BaseException as e:
        e.add_note(str(failure))
        raise


def check_files(host):
    """Check the containers that are in use: no cluster is used without a count."""
    for path in host.state.glob("disks/*/bitmaps/bitmaps.qcow2"):
        content = path.read_bytes()
        if content.startswith(b"QFI\xfb"):
            assert check_container(content)[1] == 0


logs = pytest.mark.logs("its activity log failed|was cut short|is not in .* any more")


@logs
@each_story
def test_no_power_failure_loses_a_bit(host, story):
    power = watch(host, story)

    for failure in itertools.islice(power.failures(), 0, None, STRIDE):
        fail(host, power, failure)
        check_files(host)
        open_and_check(host, failure)


@logs
@each_story
def test_recovering_may_be_killed_at_any_step(host, story):
    power = watch(host, story)
    power.points = power.points[5::15]

    for failure in itertools.islice(power.failures(), 3, None, 25):
        for nth in itertools.count(1):
            fail(host, power, failure)
            is_killed = killed_at(nth, host.open)
            open_and_check(host, failure)
            host.reboot()
            open_and_check(host, failure)
            if not is_killed:
                break
        assert nth > 3


@logs
@each_story
def test_the_power_may_fail_while_recovering(host, story):
    power = watch(host, story)
    power.points = power.points[9::15]

    for failure in itertools.islice(power.failures(), 3, None, 25):
        fail(host, power, failure)
        again = watched(host, lambda power: host.open())
        for second in itertools.islice(again.failures(), 0, None, 5):
            fail(host, again, second)
            open_and_check(host, failure)


# -- commands that are cut short


def add_one(story):
    story.add("added")


def freeze_and_succeed(story):
    key = story.freeze("daily")
    story.write("Z", 2)
    story.succeed(key, "daily", frozenset({0}))


COMMANDS = [
    add_one,
    freeze_and_succeed,
    Story.save,
    *(
        pytest.param(partial(call, name=name), id=call.__name__)
        for call, name in (
            (Story.clear, "daily"),
            (Story.clear, "off"),
            (Story.disable, "daily"),
            (Story.enable, "off"),
            (Story.make_persistent, "transient"),
            (Story.make_transient, "daily"),
            (Story.remove, "daily"),
        )
    ),
    pytest.param(lambda story: story.merge("off", "daily"), id="merge"),
    pytest.param(lambda story: story.copy("daily", "copied"), id="copy"),
]


@logs
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_seen_after_a_kill_outlives_the_host(
    host, tmpfs_path, monkeypatch, command
):
    """A command is killed; what the next daemon shows is not lost with the host."""
    told = Story(host)
    told.open()
    told.add("daily")
    told.add("off")
    told.add("transient", persistent=False)
    told.write("A")
    told.disable("off")
    told.write("BC", 5)
    host.crash()
    before = tmpfs_path / "before"
    before.mkdir()
    copy_files(host.state.parent, before)
    expected = meanwhile(host, told, command)
    boot_id = runtime.boot_id()

    for nth in itertools.count(1):
        host.end()
        copy_files(before, host.state.parent)
        monkeypatch.setattr(runtime, "boot_id", lambda: boot_id)
        place = killed_at(nth, happen, told, command)
        host.open()
        expected.check(host)
        shown = bitmaps_of(host)
        host.crash()
        host.reboot()
        host.open()
        found = bitmaps_of(host)
        assert shown.keys() <= found.keys(), place
        for name, (is_recording, bits) in shown.items():
            assert found[name][0] == is_recording, f"{place}: {name}"
            assert bits <= found[name][1], f"{place}: {name}"
        if place is None:
            break
    assert nth > 10


def happen(story, command):
    story.open()
    command(story)


def meanwhile(host, told, command):
    """Let a command run to its end; return what has to hold while it does."""
    story = copy(told)
    story.transient = dict(told.transient)
    story.meanwhile = told.expected
    happen(story, command)
    host.crash()
    transient = {name: (mark,) for name, mark in told.transient.items()}
    return replace(story.meanwhile, marks=transient | story.meanwhile.marks)


def copy_files(directory, target):
    """Make all files there what they are here; a source that exists is the same one."""
    for name in "state", "run":
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(directory / name, target / name)
    shutil.copyfile(directory / WEB, target / WEB)


def bitmaps_of(host):
    """Return what is told of each good persistent bitmap: if it records, its bits."""
    return {
        name: (each.bitmap.recording, frozenset(each.bitmap.to_save().search(1)))
        for name, each in host.inventory.bitmaps.find(WEB).held.items()
        if each.record.persistent and each.bitmap.inconsistent is None
    }


class Killed(BaseException):
    """The daemon dies here."""


def test_a_bitmap_whose_disabling_was_cut_short_does_not_record(host, monkeypatch):
    """It has missed a write: it must not look as if it had recorded all the time."""
    host.open()
    host.inventory.change_bitmaps([Add(WEB, "daily", granularity=CLUSTER)])
    host.write(WEB, clusters("A"))

    def die(step):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Disable, "finish", die)
        with pytest.raises(Killed):
            host.inventory.change_bitmaps([Disable(WEB, "daily")])
    host.write(WEB, clusters("B"), 5 * CLUSTER)
    host.crash()
    host.open()

    assert bitmaps_of(host) == {"daily": (False, frozenset({0}))}
    host.crash()
    host.reboot()
    host.open()
    assert bitmaps_of(host) == {"daily": (False, frozenset(range(4)))}


@pytest.mark.logs("a flush failed|could not be saved")
def test_a_clear_whose_source_can_not_be_flushed_forgets_nothing(host, monkeypatch):
    """What the guest has not flushed may be undone with the host: that is a change."""
    host.open()
    host.inventory.change_bitmaps([Add(WEB, "daily", granularity=CLUSTER)])
    host.write(WEB, clusters("A"))

    error = OSError(5, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(RawImage, "flush", failing(RawImage.flush, 1, error, after=False))
        with pytest.raises(OSError, match="Input/output error"):
            host.inventory.change_bitmaps([Clear(WEB, "daily")])

    assert bitmaps_of(host) == {"daily": (True, frozenset({0}))}
    assert not host.inventory.bitmaps.find(WEB).held["daily"].bitmap.busy
