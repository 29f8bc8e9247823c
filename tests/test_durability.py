"""The host goes down: what was flushed is there, a snapshot is exact, or it is broken.

`Power` (tests/support/power.py) watches a story of writes and snapshots; then the power
fails at each of its steps, with each choice of what was not synced, and the next boot
has to find what the story says. Only the last tests mount anything.
"""

import itertools

import pytest

from fleecefs.block.bitmap import PAGE
from fleecefs.state import preserved_log
from tests.support.disks import clusters
from tests.support.host import CLUSTER, Host
from tests.support.killed import killed_at
from tests.support.mount import wait_until
from tests.support.power import Power
from tests.support.story import Story

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
            is_killed = killed_at(nth, lambda: host.open(**told.options))
            open_and_check(host, told, failure)
            host.reboot()
            open_and_check(host, told, failure)
            if not is_killed:
                break


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
