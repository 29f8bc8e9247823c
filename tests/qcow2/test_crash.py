"""A crash at any write: bitmaps are the old ones or the new ones, or said to be in use.

Each story is done on a file in memory, and the power fails at each of its writes and
flushes: any three of the writes that were not flushed are lost, or only three are
kept, or one is torn between sectors. Clusters are small, so that all combinations are
tried.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.units import KiB, MiB
from tests.qcow2.files import (
    Killed,
    MemoryFile,
    bits,
    check,
    is_there,
    power_failures,
    stored,
)
from tests.support.qemu import LEAKED, check_code, require_qemu

SIZE = 4 * MiB
GRANULARITY = 512
COUNT = SIZE // GRANULARITY

# So many of the states of each story are shown to qemu-img.
QEMU_SAMPLE = 6

OLD = Bitmap("daily", GRANULARITY, bits(COUNT, slice(0, 100), slice(4090, 4200)))
OTHER = Bitmap("other", 4096, bits(COUNT // 8, slice(0, None, 3)), is_auto=False)
NEW = OLD._replace(bits=bits(COUNT, 1, 4095, -1))
FULL = OLD._replace(bits=bits(COUNT, slice(None)))
FULLS = [FULL._replace(name=f"full{number}") for number in range(75)]
SMALL = OLD._replace(
    bits=OLD.bits | bits(COUNT, 200), is_in_use=True, changed=[(200, 201)]
)


class Story(NamedTuple):
    """What is done to a container, and the bitmaps that may be there afterwards.

    Before, there are OLD and OTHER, and the others. The last outcome is that of a story
    that came to its end.
    """

    act: Callable[[Container], None]
    outcomes: list[list[Bitmap]]
    cluster_size: int = 1 * KiB
    others: Sequence[Bitmap] = ()


STORIES = {
    "store": Story(lambda c: c.update([NEW]), [[OLD, OTHER], [NEW, OTHER]]),
    "store what has changed": Story(
        lambda c: c.update([SMALL]), [[OLD, OTHER], [SMALL, OTHER]]
    ),
    "add": Story(
        lambda c: c.update([NEW._replace(name="more")]),
        [[OLD, OTHER], [OLD, OTHER, NEW._replace(name="more")]],
    ),
    "remove": Story(lambda c: c.update(remove=["daily"]), [[OLD, OTHER], [OTHER]]),
    "remove all": Story(
        lambda c: c.update(remove=["daily", "other"]), [[OLD, OTHER], []]
    ),
    "replace": Story(
        lambda c: c.update([NEW._replace(name="new")], remove=["daily"]),
        [[OLD, OTHER], [OTHER, NEW._replace(name="new")]],
    ),
    "mark in use": Story(
        lambda c: c.mark_in_use(["daily", "other"]),
        [
            [OLD._replace(is_in_use=daily), OTHER._replace(is_in_use=other)]
            for daily in (False, True)
            for other in (False, True)
        ],
    ),
    # Clusters of 512 bytes: a block has the counts of 256, and these take 240.
    "more counts than one block has": Story(
        lambda c: c.update(FULLS[73:]),
        [[OLD, OTHER, *FULLS[:73]], [OLD, OTHER, *FULLS]],
        cluster_size=512,
        others=FULLS[:73],
    ),
    "twice in a row": Story(
        lambda c: (c.update([NEW]), c.update([OLD._replace(is_auto=False)])),
        [[OLD, OTHER], [NEW, OTHER], [OLD._replace(is_auto=False), OTHER]],
    ),
}

# How many events of the change before had happened when it was killed.
KILLS = range(9)


def container_for(story):
    """Return a container as it is before the story, and its file."""
    file = MemoryFile()
    container = Container.create(file, SIZE, story.cluster_size)
    container.update([OLD, OTHER, *story.others])
    # Something was there before, so that there are gaps.
    container.update([NEW._replace(name="gone")])
    container.update(remove=["gone"])
    container = Container.open(file)
    file.forget()
    return container, file


def change_after_a_kill(container, file, kill_at):
    file.kill_at = kill_at
    try:
        container.update([FULL])
    except Killed:
        container = None
    finally:
        file.kill_at = None
    (container or Container.open(file)).update([NEW])


def outcomes_of(story):
    return [{each.name: is_there(each) for each in some} for some in story.outcomes]


def verify(content, outcomes, label):
    """Check what a failure left, and that it is clean once it has been opened."""
    assert check(content)[1] == 0, f"in use without a count: {label}"
    file = MemoryFile(content)
    left = stored(file)
    assert left in outcomes, label

    Container.open(file)

    assert stored(file) == left, label
    assert check(file.content) == (0, 0), label


@pytest.mark.parametrize("name", STORIES)
def test_power_failure_leaves_old_or_new_bitmaps(name):
    story = STORIES[name]
    container, file = container_for(story)

    story.act(container)

    outcomes = outcomes_of(story)
    for label, content in power_failures(file):
        verify(content, outcomes, label)


@pytest.mark.parametrize("name", STORIES)
def test_what_has_returned_is_durable(name):
    story = STORIES[name]
    container, file = container_for(story)

    story.act(container)

    for label, content in power_failures(file, since=len(file.history)):
        verify(content, outcomes_of(story)[-1:], label)


def test_a_story_takes_another_block_of_counts():
    story = STORIES["more counts than one block has"]
    container, _ = container_for(story)
    assert not container.contents.blocks[1]

    story.act(container)

    assert container.contents.blocks[1]


@pytest.mark.parametrize("kill_at", KILLS)
def test_power_failure_after_a_kill_and_a_restart(kill_at):
    container, file = container_for(STORIES["store"])

    change_after_a_kill(container, file, kill_at)

    outcomes = outcomes_of(Story(None, [[OLD, OTHER], [FULL, OTHER], [NEW, OTHER]]))
    for label, content in power_failures(file):
        verify(content, outcomes, label)


@pytest.mark.parametrize("name", STORIES)
def test_power_failure_after_a_flush_that_failed(name):
    story = STORIES[name]
    container, file = container_for(story)
    story.act(container)
    flushes = [i for i, event in enumerate(file.history) if event is None]
    changed = OTHER._replace(bits=~OTHER.bits)

    for flush in flushes:
        container, file = container_for(story)
        with failing_flush(file, flush):
            story.act(container)
        container = Container.open(file)
        seen = stored(file)
        opened = len(file.history)
        container.update([changed])

        assert seen in outcomes_of(story)
        outcomes = [seen, seen | {"other": is_there(changed)}]
        for label, content in power_failures(file, since=opened):
            verify(content, outcomes, label)


@contextmanager
def failing_flush(file, at):
    """Let the flush that is the event `at` fail, and lose what it should have kept."""
    file.kill_at = at
    with pytest.raises(Killed):
        yield
    file.lose()
    file.kill_at = None


def test_power_failure_while_it_is_cleaned_up():
    story = STORIES["store"]
    container, file = container_for(story)
    story.act(container)
    seen = set()

    for _, content in list(power_failures(file))[::7]:
        again = MemoryFile(content)
        Container.open(again)
        for label, twice in power_failures(again):
            if twice not in seen:
                seen.add(twice)
                verify(twice, outcomes_of(story), label)


def test_power_failure_while_it_is_created():
    file = MemoryFile()

    Container.create(file, SIZE, 1 * KiB)

    for label, content in power_failures(file):
        left = MemoryFile(content)
        if not any(content[:4]):
            with pytest.raises(NotUsable, match="is no qcow2 file"):
                Container.open(left)
            continue
        container = Container.open(left)
        container.update([OLD])
        assert check(left.content) == (0, 0), label


@pytest.mark.parametrize("name", STORIES)
def test_qemu_finds_no_more_than_leaked_clusters(name, tmpfs_path):
    require_qemu()
    path = tmpfs_path / "c.qcow2"
    story = STORIES[name]
    container, file = container_for(story)
    story.act(container)

    for content in sample(content for _, content in power_failures(file)):
        path.write_bytes(content)
        assert check_code(path) == (LEAKED if check(content)[0] else 0)

        repaired = MemoryFile(content)
        Container.open(repaired)

        path.write_bytes(repaired.content)
        assert check_code(path) == 0


def sample(contents):
    """Return some of them, always the same; first those where clusters leak."""

    def order(content):
        return not check(content)[0], hashlib.sha256(content).digest()

    found = sorted(contents, key=order)
    return [*found[: QEMU_SAMPLE // 2], *found[-QEMU_SAMPLE // 2 :]]
