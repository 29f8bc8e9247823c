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

# A copy that was cut short, and the one of the write after it.
SLACK = 4 * CLUSTER


def store_of(story):
    store = story.host.state.parent / "store"
    store.mkdir(exist_ok=True)
    return store


def in_ram(story):
    """More than the RAM tier can hold; what it holds is saved at the end."""
    story.open(ram_limit=2 * CLUSTER)
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
    story.open(ram_limit=0, store=store_of(story))
    for letter, name in ("b", "one"), ("c", "two"), ("d", "three"):
        story.create(name)
        story.write(clusters(letter * 3))
    story.delete("two")
    story.write(clusters("eee"), 2 * CLUSTER)
    story.delete("three")
    story.delete("one")


def surviving_the_host(story):
    story.open(survives_host=True)
    for letter, name in ("b", "one"), ("c", "two"), ("d", "three"):
        story.create(name)
        story.write(clusters(letter * 2 + "." + letter))
    story.delete("two")
    story.write(clusters("ee"), 3 * CLUSTER)
    story.delete("one")


def breaking(story):
    """There is room for two clusters in all."""
    story.open(ram_limit=0, store_limit=2 * CLUSTER)
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
    story.open(ram_limit=CLUSTER)
    story.create("one")
    story.write(clusters("bbb"))
    story.may_break("one")
    story.host.inventory.snapshots["one"].snapshots["web.raw"].discard(2 * CLUSTER, 0)
    story.write(clusters("cc"))
    story.delete("one")


STORIES = [in_ram, in_the_store, surviving_the_host, breaking, given_up]


@pytest.fixture
def hosts(tmpfs_path, monkeypatch):
    """Make hosts with a disk of eight clusters, one after the other."""
    made = []

    def hosts():
        if made:
            made[-1].end()
        directory = tmpfs_path / str(len(made))
        directory.mkdir()
        host = Host(directory, monkeypatch)
        host.add("web.raw", clusters("aaaaaaaa"))
        made.append(host)
        return host

    yield hosts
    made[-1].end()


def tell(host, story):
    """Tell a story so that also who comes afterwards knows how far it came."""
    path = host.state.parent / "expected"

    def note(expected):
        new = path.with_suffix(".new")
        new.write_bytes(pickle.dumps(expected))
        new.replace(path)

    story(Story(host, note))


def expected_of(host):
    return pickle.loads((host.state.parent / "expected").read_bytes())


@pytest.mark.logs("is broken: |could not preserve")
@pytest.mark.parametrize("story", STORIES)
def test_a_kill_at_any_point_loses_no_space(hosts, story):
    for nth in itertools.count(1):
        host = hosts()
        is_killed = killed_at(nth, lambda host=host: tell(host, story))

        store = host.state.parent / "store"
        options = {"store": store} if store.exists() else {}
        host.open(**options)
        expected_of(host).check(host)
        host.check_space(SLACK)
        # The guest's writes come again, and then there is nothing in between.
        host.write("web.raw", clusters("zzzzzzzz"))
        host.check_space()
        for name in list(host.inventory.snapshots):
            host.inventory.delete_snapshot(name)
        host.check_space()
        assert host.epoch_directories() == []
        if not is_killed:
            break
    assert nth > 30
