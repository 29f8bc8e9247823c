"""The host goes down: what was flushed is there, a snapshot is exact, or it is broken.

`Power` (tests/support/power.py) watches a story of writes and snapshots; then the power
fails at each of its steps, with each choice of what was not synced, and the next boot
has to find what the story says. Only the last tests mount anything.
"""

import errno
import itertools
import json
import os
import re
import subprocess
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from fleecefs.block.bitmap import PAGE
from fleecefs.block.epoch import History, OnCbwError
from fleecefs.state import preserved_log
from fleecefs.state.directory import StateDirectory
from fleecefs.state.preserved_log import PreservedLog
from fleecefs.units import MiB
from tests.support.damage import (
    damage_end,
    damage_header,
    empty,
    make_older,
    overwrite,
    remove,
    truncate,
)
from tests.support.disks import clusters, letters
from tests.support.gate import Stay
from tests.support.host import CLUSTER, Host, failing
from tests.support.killed import killed_at
from tests.support.mount import wait_until
from tests.support.power import Power
from tests.support.running import Running
from tests.support.story import Story
from tests.support.walk import write

WENT_DOWN = "the host went down without unmounting"

# So much of a file may have been written, and not yet recorded, when the power failed.
SLACK = 3 * CLUSTER


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """A host with a disk of eight clusters, `aaaaaaaa`."""
    # So that logs grow: room for one record at first.
    monkeypatch.setattr(preserved_log, "_STEP", PAGE + 64)
    host = Host(tmpfs_path, monkeypatch)
    host.add("web.raw", clusters("aaaaaaaa"))
    yield host
    host.end()


# -- stories


def coming_and_going(story):
    """Snapshots that come and go, between writes of all kinds."""
    story.open(survives_host=True)
    story.write(clusters("b"))
    story.create("one")
    story.write(clusters("c"))
    story.write(b"c" * 700, 3 * CLUSTER + 300)
    story.flush()
    story.write(clusters("."), CLUSTER)
    story.create("two")
    story.write(clusters("ddd"))
    story.discard(2 * CLUSTER, 4 * CLUSTER)
    story.flush()
    story.delete("one")
    story.write(clusters("ee"), 3 * CLUSTER)
    story.close()
    story.open()
    story.write(clusters("f"), 7 * CLUSTER)
    story.create("three")
    story.write(clusters("gg"), 6 * CLUSTER)
    story.flush()
    story.delete("two")


def deleted_in_the_middle(story):
    """What older snapshots need of one that is deleted stays."""
    story.open(survives_host=True)
    story.create("one")
    story.write(clusters("b"))
    story.create("two")
    story.write(clusters("cc"))
    story.flush()
    story.create("three")
    story.write(clusters("dd"), CLUSTER)
    story.delete("two")
    story.flush()
    story.write(clusters("ee"), 2 * CLUSTER)
    story.flush()
    story.delete("three")
    story.write(clusters("fff"), 3 * CLUSTER)


def two_disks(story):
    """One instant of both, and a snapshot of one."""
    story.open(survives_host=True)
    story.write(clusters("b"))
    story.write(clusters("B"), disk="db.raw")
    story.create("one")
    story.write(clusters("c"))
    story.write(clusters("C"), disk="db.raw")
    story.flush()
    story.create("two")
    story.write(clusters("D"), CLUSTER, disk="db.raw")
    story.delete("one")


def store_elsewhere(story):
    store = story.host.state.parent / "store"
    story.open(survives_host=True, store=store)
    story.create("one")
    story.write(clusters("b"))
    story.flush()
    story.create("two")
    story.write(clusters("cc"))
    story.delete("one")


def with_a_newer_one_for_less(story):
    """The older snapshot reads the newer one's epoch, which has to last as long."""
    story.open(survives_host=True)
    story.create("one")
    story.write(clusters("b"))
    story.close()
    story.open(survives_host=False)
    story.write(clusters("c"), CLUSTER)
    story.create("two")
    story.write(clusters("dd"), CLUSTER)
    story.flush()
    story.delete("one")
    story.create("three")
    story.write(clusters("ee"), 2 * CLUSTER)


def with_an_older_one_for_less(story):
    story.open(survives_host=False)
    story.create("one")
    story.write(clusters("b"))
    story.close()
    story.open(survives_host=True)
    story.write(clusters("c"), CLUSTER)
    story.create("two")
    story.write(clusters("dd"), CLUSTER)
    story.flush()
    story.create("three")
    story.delete("two")
    story.write(clusters("ee"), 2 * CLUSTER)


def only_for_the_daemon(story):
    """Nothing was promised for the host: but wrong they may never be."""
    story.open(survives_host=False)
    story.write(clusters("b"))
    story.create("one")
    story.write(clusters("c"))
    story.create("two")
    story.write(clusters("dd"))
    story.flush()
    story.close()
    story.open()
    story.write(clusters("ee"), CLUSTER)
    story.delete("one")


def breaking(story):
    """The store has no room for the second write, and later for no other."""
    story.open(survives_host=True, store_limit=CLUSTER)
    story.create("one")
    story.write(clusters("b"))
    story.flush()
    story.may_break("one")
    with recorder_held(story.host):
        story.write(clusters("c"), CLUSTER)
        story.has_broken("one")
        story.flush()
    wait_until(lambda: len(story.host.events) == 2, "the event")
    story.create("two")
    story.write(clusters("d"))
    story.create("three")
    story.may_break("two")
    story.may_break("three")
    with recorder_held(story.host):
        story.write(clusters("e"), CLUSTER)
        story.has_broken("two")
        story.has_broken("three")


def recorder_held(host):
    """Return a context in which state.json does not hear what has broken."""
    return host.inventory._control


EXACT = [
    coming_and_going,
    deleted_in_the_middle,
    two_disks,
    store_elsewhere,
    with_a_newer_one_for_less,
]
STORIES = [*EXACT, with_an_older_one_for_less, only_for_the_daemon, breaking]

each_story = pytest.mark.parametrize("story", STORIES)
each_exact_story = pytest.mark.parametrize("story", EXACT)


def watched(host, happen):
    """Let something happen under the eyes of `Power`, and the host crash."""
    power = Power(host.state.parent, host.runtime, list(host.sources.values()))
    with pytest.MonkeyPatch.context() as patch:
        power.watch(patch)
        happen(power)
        host.crash()
    return power


def watch(host, story):
    """Let a story happen; return what was seen of it, and what it was."""
    if story is two_disks:
        host.add("db.raw", clusters("AAA"))
    if story is store_elsewhere:
        (host.state.parent / "store").mkdir()
    told = Story(host)

    def happen(power):
        power.expected = lambda: told.expected
        story(told)

    return watched(host, happen), told


def fail(host, power, failure):
    """Let the power fail, and start the machine again."""
    host.end()
    host.reboot()
    power.restore(failure)


def open_and_check(host, told, failure):
    """Mount, and find what the story says; then let the daemon crash."""
    try:
        host.open(**told.options)
        failure.point.expected.check(host)
        host.check_space(SLACK)
        host.crash()
    except BaseException as e:
        e.add_note(str(failure))
        raise


@pytest.mark.logs("is broken: ")
@each_story
def test_after_any_power_failure_nothing_is_wrong(host, story):
    power, told = watch(host, story)

    for failure in power.failures():
        fail(host, power, failure)
        sources = [path.read_bytes() for path in host.sources.values()]
        open_and_check(host, told, failure)
        assert [path.read_bytes() for path in host.sources.values()] == sources


@pytest.mark.logs("is broken: ")
@each_story
def test_crash_upon_crash_changes_nothing(host, story):
    """Of the daemon, and then of the host again; and then the guest goes on."""
    power, told = watch(host, story)

    for failure in itertools.islice(power.failures(), 0, None, 13):
        fail(host, power, failure)
        open_and_check(host, told, failure)
        open_and_check(host, told, failure)
        host.reboot()
        open_and_check(host, told, failure)


@each_exact_story
def test_the_guest_goes_on_after_a_power_failure(host, story):
    """It overwrites all there is, and the power fails again."""
    power, told = watch(host, story)

    for failure in itertools.islice(power.failures(), 3, None, 17):
        fail(host, power, failure)
        host.open(**told.options)
        for name, disk in host.inventory.disks.items():
            host.write(name, b"z" * disk.size)
        failure.point.expected.check_snapshots(host)
        host.crash()
        host.reboot()
        host.open(**told.options)
        failure.point.expected.check_snapshots(host)


@pytest.mark.logs("is broken: ")
@each_story
def test_recovering_may_be_killed_at_any_step(host, story):
    power, told = watch(host, story)

    for failure in itertools.islice(power.failures(), 5, None, 97):
        for nth in itertools.count(1):
            fail(host, power, failure)
            is_killed = killed_at(nth, host.open, **told.options)
            open_and_check(host, told, failure)
            host.reboot()
            open_and_check(host, told, failure)
            if not is_killed:
                break
        assert nth > 3


@pytest.mark.logs("is broken: ")
@each_story
def test_the_power_may_fail_while_recovering(host, story):
    power, told = watch(host, story)

    for failure in itertools.islice(power.failures(), 9, None, 61):
        fail(host, power, failure)
        again = watched(host, lambda power: host.open(**told.options))
        for second in again.failures():
            fail(host, again, second)
            open_and_check(host, told, failure)


# -- what survives what


@pytest.mark.logs("is broken: the host went down")
def test_without_the_promise_a_snapshot_breaks_and_says_why(host):
    host.open(survives_host=False)
    host.inventory.create_snapshot("one")
    host.write("web.raw", clusters("b"))
    host.crash()

    host.reboot()
    host.open(survives_host=True)

    assert host.lost("one", "web.raw") == WENT_DOWN
    assert letters(host.live("web.raw")) == "baaaaaaa"


def test_a_crash_of_the_daemon_only_is_no_crash_of_the_host(host):
    host.open(survives_host=True)
    host.inventory.create_snapshot("one")
    host.write("web.raw", clusters("b"))
    for first in range(1, 8):
        host.crash()
        host.open(survives_host=True)
        host.write("web.raw", clusters("c"), first * CLUSTER)

    assert letters(host.read("one", "web.raw")) == "aaaaaaaa"
    host.crash()
    host.reboot()
    host.open()
    assert letters(host.read("one", "web.raw")) == "aaaaaaaa"
    host.check_space()


@pytest.mark.logs("is broken: the host went down")
def test_the_older_one_was_for_less(host):
    """What the newer one keeps the older one would need, but not the other way."""
    host.open(survives_host=False)
    host.inventory.create_snapshot("older")
    host.write("web.raw", clusters("b"))
    host.close()
    host.open(survives_host=True)
    host.inventory.create_snapshot("newer")
    host.write("web.raw", clusters("cc"))
    host.crash()

    host.reboot()
    host.open()

    assert host.lost("older", "web.raw") == WENT_DOWN
    assert letters(host.read("newer", "web.raw")) == "baaaaaaa"


def test_the_newer_one_was_for_less(host):
    """It has what the older one needs, so it lasts as long, while that is there."""
    host.open(survives_host=True)
    host.inventory.create_snapshot("older")
    host.write("web.raw", clusters("b"))
    host.close()
    host.open(survives_host=False)
    host.inventory.create_snapshot("newer")
    host.write("web.raw", clusters("cc"))
    host.crash()

    host.reboot()
    host.open()

    assert letters(host.read("older", "web.raw")) == "aaaaaaaa"
    assert letters(host.read("newer", "web.raw")) == "baaaaaaa"


@pytest.mark.logs("is broken: the host went down")
def test_the_newer_one_was_for_less_and_the_older_one_is_gone(host):
    host.open(survives_host=True)
    host.inventory.create_snapshot("older")
    host.inventory.delete_snapshot("older")
    host.close()
    host.open(survives_host=False)
    host.inventory.create_snapshot("newer")
    host.crash()

    host.reboot()
    host.open()

    assert host.lost("newer", "web.raw") == WENT_DOWN


def test_zeroes_take_no_room_after_a_crash_of_the_host(host):
    """Nor do they count: the limit has room for one cluster more."""
    host.add("zero.raw", clusters("a......."))
    host.open(["zero.raw"], survives_host=True, store_limit=2 * CLUSTER)
    host.inventory.create_snapshot("one")
    host.write("zero.raw", clusters("bbbbbbb"))
    host.crash()

    host.reboot()
    host.open(["zero.raw"], store_limit=2 * CLUSTER)

    assert host.inventory.budgets.disk.used == CLUSTER
    assert letters(host.read("one", "zero.raw")) == "a......."
    host.check_space()


# -- damage


def log_of(host, epoch="0002"):
    return host.state / "disks/web.raw/epochs" / epoch / "preserved.log"


def another_s(path):
    """Put the log of another epoch there."""
    path.write_bytes((path.parent.parent / "0001/preserved.log").read_bytes())


@pytest.mark.logs(r"is broken: .*preserved\.log: ")
@pytest.mark.parametrize("is_clean", [False, True])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "is missing"),
        (empty, "not a file of bits"),
        (truncate, "is truncated"),
        (overwrite, "not a file of bits"),
        (damage_header, "header is damaged"),
        (make_older, "has version 7"),
        (another_s, "belongs to another disk or epoch"),
    ],
)
def test_a_damaged_log_breaks_its_snapshot_and_older_ones(host, damage, says, is_clean):
    """By name; the snapshot after it is good, and the live disk is served."""
    check_damaged(host, damage, says, is_clean)


@pytest.mark.logs(r"is broken: .*preserved\.log: ")
def test_a_damaged_record_breaks_its_snapshot_and_older_ones(host):
    """After a clean end nobody looks at it."""
    check_damaged(host, damage_end, "a record is damaged", is_clean=False)


def check_damaged(host, damage, says, is_clean):
    host.open(survives_host=True)
    for name, letter in ("one", "b"), ("two", "c"), ("three", "d"):
        host.inventory.create_snapshot(name)
        host.write("web.raw", clusters(letter))
    if is_clean:
        host.close()
    else:
        host.crash()
    host.reboot()
    damage(log_of(host))
    source = host.sources["web.raw"].read_bytes()

    host.open()

    for name in "one", "two":
        assert host.lost(name, "web.raw").startswith(f"{log_of(host)}: ")
        assert says in host.lost(name, "web.raw")
    assert letters(host.read("three", "web.raw")) == "caaaaaaa"
    assert host.sources["web.raw"].read_bytes() == source
    host.crash()
    host.reboot()
    host.open()
    assert host.lost("one", "web.raw") is not None
    assert host.lost("two", "web.raw") is not None
    assert letters(host.read("three", "web.raw")) == "caaaaaaa"


@pytest.mark.logs(r"is broken: .*store\.raw: ")
@pytest.mark.parametrize("damage", [remove, empty, truncate])
def test_a_damaged_store_breaks_its_snapshot(host, damage):
    host.open(survives_host=True)
    host.inventory.create_snapshot("one")
    host.write("web.raw", clusters("b"))
    host.crash()
    host.reboot()
    path = log_of(host, "0001").with_name("store.raw")
    damage(path)

    host.open()

    assert host.lost("one", "web.raw").startswith(f"{path}: ")
    assert letters(host.live("web.raw")) == "baaaaaaa"


# -- what is broken stays so


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILS = OSError(errno.EIO, "Input/output error")


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.mark.logs("is broken: |could not be saved")
def test_a_snapshot_without_room_for_its_log_breaks_for_good(host, monkeypatch):
    """Nothing can be saved: but there is room to say that it is broken."""
    host.open(survives_host=True)
    host.inventory.create_snapshot("one")
    with monkeypatch.context() as patch:
        patch.setattr(preserved_log, "fallocate", raising(FULL))
        patch.setattr(StateDirectory, "save", raising(FULL))
        # As where the older one still needs it: its files stay.
        patch.setattr(History, "collect", lambda history: None)
        host.write("web.raw", clusters("b"))
        host.write("web.raw", clusters("b"), CLUSTER)
        host.crash()

    host.reboot()
    host.open()

    assert host.lost("one", "web.raw") == "it broke before the host went down"
    assert letters(host.live("web.raw")) == "bbaaaaaa"


@pytest.mark.logs("is broken: could not preserve")
@pytest.mark.parametrize("nth", [1, 2], ids=["the data", "the log"])
def test_what_can_not_be_made_durable_breaks_the_snapshot(host, monkeypatch, nth):
    host.open(survives_host=True)
    host.inventory.create_snapshot("one")

    monkeypatch.setattr(os, "fdatasync", failing(os.fdatasync, nth, FAILS, after=False))
    host.write("web.raw", clusters("b"))

    assert "Input/output error" in host.lost("one", "web.raw")
    host.crash()
    host.reboot()
    host.open()
    assert host.lost("one", "web.raw") is not None


@pytest.mark.parametrize("nth", [1, 2], ids=["the data", "the log"])
def test_a_store_that_could_not_be_made_durable_is_never_trusted_again(
    host, monkeypatch, nth
):
    """The kernel says it once, and may have dropped what another thread wrote."""
    host.open(survives_host=True, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    host.inventory.create_snapshot("one")

    monkeypatch.setattr(os, "fdatasync", failing(os.fdatasync, nth, FAILS, after=False))
    for _ in range(3):
        with pytest.raises(OSError) as e:
            host.write("web.raw", clusters("b"))
        assert e.value.errno == errno.EIO

    assert letters(host.live("web.raw")) == "aaaaaaaa"
    assert letters(host.read("one", "web.raw")) == "aaaaaaaa"
    host.inventory.delete_snapshot("one")
    host.write("web.raw", clusters("b"))


@pytest.mark.logs("is broken: could not preserve")
def test_nobody_overwrites_before_it_is_durable_that_a_snapshot_broke(
    host, monkeypatch
):
    """Nor does a second write, which finds the snapshot broken in memory already."""
    host.open(survives_host=True, store_limit=0)
    host.inventory.create_snapshot("one")
    steps = []
    stay = Stay(is_after=False)
    mark_lost, sync, pwrite = PreservedLog.mark_lost, PreservedLog.sync, os.pwrite

    def held(log):
        if not stay.has_arrived:
            stay.stay()
        mark_lost(log)

    def synced(log):
        sync(log)
        steps.append("synced")

    def wrote(fd, data, offset):
        written = pwrite(fd, data, offset)
        if os.readlink(f"/proc/self/fd/{fd}") == str(host.sources["web.raw"]):
            steps.append("overwritten")
        return written

    monkeypatch.setattr(PreservedLog, "mark_lost", held)
    monkeypatch.setattr(PreservedLog, "sync", synced)
    monkeypatch.setattr(os, "pwrite", wrote)
    first = Running(host.write, "web.raw", clusters("b"))
    stay.wait_arrived()
    second = Running(host.write, "web.raw", clusters("c"))
    assert second.error() is None

    assert steps == ["synced", "overwritten"]
    stay.release()
    assert first.error() is None
    assert steps == ["synced", "overwritten", "synced", "overwritten"]
    wait_until(lambda: len(host.events) == 2, "the event")
    assert host.lost("one", "web.raw") is not None


# -- through the kernel


def test_order_of_a_guest_s_write(mounted, tmp_path):
    """Data, that it is there, and only then the overwriting; each durable before."""
    mount = mounted({"web.raw": MiB}, "--durability=host", directory=tmp_path)
    write(mount.live("web.raw"), b"a" * MiB, 0)
    mount.create("one")

    with traced(mount.pid, tmp_path) as calls:
        write(mount.live("web.raw"), b"b" * 100, 5 * CLUSTER + 7)
        write(mount.live("web.raw"), b"c" * 100, 5 * CLUSTER + 9)

    assert calls == [
        "pwrite64 store.raw",
        "fdatasync store.raw",
        "pwrite64 preserved.log",
        "fdatasync preserved.log",
        "pwrite64 web.raw",
        # What is preserved needs no more.
        "pwrite64 web.raw",
    ]
    assert mount.snapshot("one", "web.raw").read_bytes() == b"a" * MiB


@contextmanager
def traced(pid, directory):
    """Collect what a process writes and syncs, in order, as `call file`."""
    calls = []
    output = directory / "trace"
    trace = "trace=pwrite64,pwritev,pwritev2,fdatasync,fsync"
    with subprocess.Popen(
        ["strace", "-f", "-y", "-p", str(pid), "-e", trace, "-o", str(output)],
        stderr=subprocess.DEVNULL,
    ) as strace:
        try:
            wait_until(lambda: is_traced(pid, strace.pid), "strace to attach")
            yield calls
        finally:
            strace.terminate()
    # A call that was interrupted by another thread's has a second line.
    found = re.findall(r"(\w+)\(\d+<([^>]*)>", output.read_text())
    calls += [f"{call} {Path(path).name}" for call, path in found]


def is_traced(pid, tracer):
    statuses = Path(f"/proc/{pid}/task").glob("*/status")
    return all(f"TracerPid:\t{tracer}\n" in path.read_text() for path in statuses)


@pytest.mark.parametrize("durability", ["process", "host"])
def test_durability_is_shown(mounted, durability):
    mount = mounted({"web.raw": MiB}, f"--durability={durability}")

    assert mount.status()["policy"]["durability"] == durability


@pytest.mark.logs("is broken: the host went down|keeper: ")
def test_after_a_crash_of_the_host_with_all_that_was_mounted(mounted, tmp_path):
    """Keeper and daemon are killed, what is on tmpfs is gone, the boot is another."""
    mount = mounted({"web.raw": b"a" * MiB}, directory=tmp_path)
    mount.create("process")
    write(mount.live("web.raw"), b"b" * 5000, 3000)
    mount.remount("--durability=host")
    mount.create("host")
    frozen = mount.live("web.raw").read_bytes()
    write(mount.live("web.raw"), b"c" * 5000, 5000)
    write(mount.live("web.raw"), bytes(70000), 100_000)
    current = mount.live("web.raw").read_bytes()

    mount.kill()
    state = json.loads((mount.state / "state.json").read_text())
    state["boot_id"] = str(uuid4())
    (mount.state / "state.json").write_text(json.dumps(state))
    mount.mount()

    assert mount.snapshot_state("process", "web.raw") == ("broken", WENT_DOWN)
    with pytest.raises(OSError) as e:
        mount.snapshot("process", "web.raw").read_bytes()
    assert e.value.errno == errno.EIO
    assert mount.snapshot_state("host", "web.raw") == ("good", None)
    assert mount.snapshot("host", "web.raw").read_bytes() == frozen
    assert mount.live("web.raw").read_bytes() == current
