"""No space is lost, wherever the daemon is killed (I24).

Each story is told in a process that is killed at its first kill point, at its second,
and so on. Then the next daemon, of the same boot or of another one, has to find what
the story says, and nothing else may occupy space.
"""

import itertools
import pickle

import pytest

from tests.support.disks import clusters
from tests.support.host import CLUSTER, Host
from tests.support.killed import killed_at
from tests.support.mount import wait_until
from tests.support.story import Story

# A copy that was cut short.
SLACK = 4 * CLUSTER


def in_ram(story):
    """More than the RAM tier can hold; what it holds is saved at the end."""
    story.open()
    story.create("one")
    story.write(clusters("bbb"))
    story.create("two")
    story.write(clusters("cc"), CLUSTER)
    story.delete("two")
    story.write(clusters("dd"), 4 * CLUSTER)
    story.delete("one")
    story.create("three")
    story.write(clusters("e"))
    story.close()
    story.open()
    story.write(clusters("ff"), 2 * CLUSTER)


def in_the_store(story):
    """Nothing in RAM, and everything elsewhere; deleted from the middle."""
    story.open()
    for letter, name in ("b", "one"), ("c", "two"), ("d", "three"):
        story.create(name)
        story.write(clusters(letter * 3))
    story.delete("two")
    story.write(clusters("eee"), 2 * CLUSTER)
    story.delete("three")
    story.delete("one")


def surviving_the_host(story):
    story.open()
    for letter, name in ("b", "one"), ("c", "two"), ("d", "three"):
        story.create(name)
        story.write(clusters(letter * 2 + "." + letter))
    story.delete("two")
    story.write(clusters("ee"), 3 * CLUSTER)
    story.delete("one")


def breaking(story):
    """There is room for two clusters in all."""
    story.open()
    story.create("one")
    story.write(clusters("b"))
    story.create("two")
    story.write(clusters("c"))
    story.may_break("one")
    story.may_break("two")
    story.write(clusters("d"), CLUSTER)
    wait_until(lambda: len(story.host.events) == 4, "what has broken is recorded")
    story.create("three")
    story.write(clusters("e"))


def given_up(story):
    """A reader gives up parts of its snapshot."""
    story.open()
    story.create("one")
    story.write(clusters("bbb"))
    story.give_up("one", 2 * CLUSTER)
    story.write(clusters("cc"))
    story.delete("one")


OPTIONS = {
    in_ram: {"ram_limit": 2 * CLUSTER},
    in_the_store: {"ram_limit": 0, "store": "store"},
    surviving_the_host: {"survives_host": True},
    breaking: {"ram_limit": 0, "store_limit": 2 * CLUSTER},
    given_up: {"ram_limit": CLUSTER},
}


@pytest.fixture
def hosts(tmpfs_path, monkeypatch):
    """Make hosts with a disk of eight clusters, one after the other, for a story."""
    made = []

    def hosts(story):
        if made:
            made[-1].end()
        directory = tmpfs_path / str(len(made))
        directory.mkdir()
        host = Host(directory, monkeypatch)
        host.add("web.raw", clusters("aaaaaaaa"))
        made.append(host)
        options = dict(OPTIONS[story])
        if "store" in options:
            options["store"] = directory / "store"
            options["store"].mkdir()
        return host, options

    yield hosts
    made[-1].end()


def tell(host, story, options):
    """Tell a story so that also who comes afterwards knows how far it came."""
    path = host.state.parent / "expected"

    def note(expected):
        new = path.with_suffix(".new")
        new.write_bytes(pickle.dumps(expected))
        new.replace(path)

    told = Story(host, note)
    told.options = options
    story(told)


def expected_of(host):
    return pickle.loads((host.state.parent / "expected").read_bytes())


def open_next(host, options):
    """Start the next daemon: it finds what the story says, and no space is lost."""
    host.open(**options)
    expected_of(host).check(host)
    host.check_space(SLACK)


def overwrite_all(host, slack):
    """Let the guest's writes come again, and more; then no copy is cut short."""
    host.write("web.raw", clusters("zzzzzzzz"))
    wait_until(
        lambda: not host.inventory._broken.qsize(), "what has broken is recorded"
    )
    with host.inventory._control:
        host.check_space(slack)


def delete_all(host):
    for name in list(host.inventory.snapshots):
        host.inventory.delete_snapshot(name)
    host.check_space()
    assert host.epoch_directories() == []


@pytest.mark.logs("is broken: |could not preserve")
@pytest.mark.parametrize("story", OPTIONS, ids=lambda story: story.__name__)
def test_a_kill_at_any_point_loses_no_space(hosts, story):
    # What was on its way from RAM to the disk is there twice, until the next end.
    slack = SLACK if story is in_ram else 0
    for nth in itertools.count(1):
        host, options = hosts(story)
        is_killed = killed_at(nth, tell, host, story, options)

        open_next(host, options)
        overwrite_all(host, slack)
        delete_all(host)
        if not is_killed:
            break
    assert nth > 30


@pytest.mark.logs("is broken: |could not preserve")
@pytest.mark.parametrize("story", OPTIONS, ids=lambda story: story.__name__)
def test_nor_does_a_kill_of_the_next_daemon_while_it_starts(hosts, story):
    slack = SLACK if story is in_ram else 0
    for first in range(20, 90, 15):
        for nth in itertools.count(1):
            host, options = hosts(story)
            killed_at(first, tell, host, story, options)
            is_killed = killed_at(nth, host.open, **options)

            open_next(host, options)
            overwrite_all(host, slack)
            delete_all(host)
            if not is_killed:
                break
        assert nth > 3
