"""What the target of a mirror lacks: writes, copies, and those that follow.

A letter is a granule: a disk "abcd" has four. What a mirror knows is shown as a text: a
`1` for a granule that is dirty, a `c` for one being copied.
"""

import errno
import itertools
import random
import sys
import threading
import time

import pytest

from fleecefs.block import mirror as mirror_module
from fleecefs.block.disk import drained
from fleecefs.block.memory import MemoryImage
from fleecefs.block.mirror import Mirror
from fleecefs.errors import Abandoned, TimedOut
from tests.support.disks import CLUSTER, clusters, letters, make_bits
from tests.support.faulty import Full
from tests.support.mirrors import LATER, Mirrored, restarted
from tests.support.running import Running, WatchedRequests

# A last granule that is cut short.
TAIL = 100


def write(disk, length, offset):
    return disk.write(b"X" * length, offset)


def zero(disk, length, offset):
    return disk.zero(length, offset)


def discard(disk, length, offset):
    return disk.discard(length, offset)


# What a guest does, and what becomes of it on the source.
overwrites = pytest.mark.parametrize(
    ("overwrite", "operation"),
    [
        pytest.param(write, "pwrite", id="write"),
        pytest.param(zero, "zero", id="zero"),
        pytest.param(discard, "discard", id="discard"),
    ],
)

# Of a disk of four granules and a short one: which are touched.
RANGES = [
    pytest.param(CLUSTER, CLUSTER, ".1...", id="aligned"),
    pytest.param(CLUSTER - 50, CLUSTER + 50, ".1...", id="unaligned-head"),
    pytest.param(CLUSTER - 50, CLUSTER, ".1...", id="unaligned-tail"),
    pytest.param(2 * CLUSTER - 10, CLUSTER + 5, ".11..", id="unaligned-both"),
    pytest.param(1, 2 * CLUSTER - 1, ".1...", id="last-byte-of-one"),
    pytest.param(1, 2 * CLUSTER, "..1..", id="first-byte-of-one"),
    pytest.param(2, 2 * CLUSTER - 1, ".11..", id="across-two"),
    pytest.param(3 * CLUSTER, CLUSTER, ".111.", id="several"),
    pytest.param(TAIL, 4 * CLUSTER, "....1", id="last-partial-granule"),
    pytest.param(1, 4 * CLUSTER + TAIL - 1, "....1", id="very-last-byte"),
    pytest.param(4 * CLUSTER + TAIL, 0, "11111", id="all"),
]


def scene_with_tail(**options):
    return Mirrored(clusters("abcd") + b"e" * TAIL, **options)


def alike(text="abcd", **options):
    """Return a scene in which the target has all, and follows."""
    scene = Mirrored(clusters(text), **options)
    scene.follow()
    scene.mirror.mark_synced()
    assert scene.mirror.is_synced
    return scene


def writing(scene, text, granule=0):
    """Start writing granules in a thread."""
    return Running(scene.disk.write, clusters(text), granule * CLUSTER)


def held(scene, operation="pwrite", text="X", granule=0):
    """Start writing granules; return where that stays on the target, and the thread."""
    stay = scene.target.hold(operation)
    running = writing(scene, text, granule)
    stay.wait_arrived()
    return stay, running


# -- writes in the background


@overwrites
@pytest.mark.parametrize(("length", "offset", "shown"), RANGES)
def test_a_write_makes_its_granules_dirty(overwrite, operation, length, offset, shown):
    scene = scene_with_tail()
    before = bytes(scene.target_memory.data)

    overwrite(scene.disk, length, offset)

    assert scene.shown == shown
    assert bytes(scene.target_memory.data) == before
    assert scene.told == []
    scene.check_end()


@overwrites
def test_granules_are_dirty_before_they_are_overwritten(overwrite, operation):
    scene = Mirrored(clusters("abcd"))
    stay = scene.source.hold(operation)

    running = Running(overwrite, scene.disk, CLUSTER + 1, CLUSTER)
    stay.wait_arrived()

    assert scene.on_source == "abcd"
    assert scene.shown == ".11."
    stay.release()
    running.result()


@overwrites
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_what_is_copied_while_it_is_overwritten_is_dirty_again(
    overwrite, operation, after
):
    scene = Mirrored(clusters("abcd"))
    stay = scene.source.hold(operation, after=after)
    running = Running(overwrite, scene.disk, 2 * CLUSTER, CLUSTER)
    stay.wait_arrived()

    scene.copy_all()
    assert scene.shown == "...."
    stay.release()
    running.result()

    assert scene.shown == ".11."
    scene.check_end()


@overwrites
def test_what_is_copied_during_a_write_that_fails_is_dirty_again(overwrite, operation):
    scene = Mirrored(clusters("abcd"))
    scene.source_faults.arm(operation)
    stay = scene.source.hold(operation)
    running = Running(overwrite, scene.disk, CLUSTER, CLUSTER)
    stay.wait_arrived()

    scene.copy_all()
    stay.release()

    assert running.error().errno == errno.EIO
    # Nobody knows how much of it is on the source.
    assert scene.shown == ".1.."


def test_what_is_copied_during_a_write_that_is_cut_short_is_dirty_again():
    scene = Mirrored(clusters("abcd"))
    scene.source.image = Full(scene.memory, CLUSTER + 5)
    stay = scene.source.hold("pwrite")
    running = writing(scene, "XX", 1)
    stay.wait_arrived()

    scene.copy_all()
    stay.release()

    assert running.result() == CLUSTER + 5
    assert scene.shown == ".11."
    scene.check_end()


def test_background_writes_to_one_granule_do_not_wait_for_each_other_nor_a_copy():
    scene = Mirrored(clusters("abcd"))
    stay = scene.source.hold("pwrite")
    first = writing(scene, "X")
    stay.wait_arrived()
    assert scene.mirror.claim(0, 4, 4) == (0, 1)

    second = writing(scene, "YY")

    assert not second.wait_waiting()
    stay.release()
    first.result()
    assert scene.shown == "C1.."


def test_a_discard_beyond_the_end_is_cut():
    scene = scene_with_tail()

    scene.disk.discard(10 * CLUSTER, 4 * CLUSTER + 1)

    assert scene.shown == "....1"
    assert not scene.dirty[5:].any()


def test_a_zero_of_many_pieces_makes_all_of_them_dirty(monkeypatch):
    monkeypatch.setattr("fleecefs.block.disk._PIECE_SIZE", CLUSTER)
    scene = scene_with_tail()

    scene.disk.zero(3 * CLUSTER + TAIL, CLUSTER)

    assert scene.shown == ".1111"


# -- how much is dirty


@pytest.mark.parametrize("granularity", [512, 4096, 65536, 1 << 20])
@pytest.mark.parametrize("size", [1, 511, 512, 4096, 70_000, (1 << 20) + 5])
def test_left_is_exact(size, granularity):
    scene = Mirrored(bytes(size), granularity=granularity)
    mirror, count = scene.mirror, -(-size // granularity)
    tail = size - (count - 1) * granularity
    assert (mirror.count, mirror.left(), mirror.is_dirty) == (count, 0, False)

    mirror.mark_dirty(0, size)
    assert (mirror.left(), mirror.is_dirty) == (size, True)

    # All but the last one.
    mirror.claim(count - 1, count, 1)
    mirror.finish(count - 1, count)
    assert mirror.left() == size - tail

    scene.copy_all()
    mirror.mark_dirty(size - 1, size)
    assert mirror.left() == tail
    assert not scene.dirty[count:].any()


def test_what_is_being_copied_is_left():
    scene = Mirrored(clusters("abcd"))
    scene.mirror.mark_dirty(0, 3 * CLUSTER)

    run = scene.mirror.claim(0, 4, 2)
    assert scene.mirror.left() == 3 * CLUSTER

    scene.mirror.finish(*run)
    assert scene.mirror.left() == CLUSTER


@pytest.mark.parametrize(("length", "offset", "shown"), RANGES)
def test_dirty_is_made_of_whole_granules(length, offset, shown):
    scene = scene_with_tail()

    scene.mirror.mark_dirty(offset, offset + length)

    assert scene.shown == shown


# -- who copies


def marked(text, **options):
    """Return a scene with the granules dirty that are `1` in the text."""
    scene = Mirrored(bytes(len(text) * CLUSTER), **options)
    for granule, letter in enumerate(text):
        if letter == "1":
            scene.mirror.mark_dirty(granule * CLUSTER, (granule + 1) * CLUSTER)
    return scene


@pytest.mark.parametrize(
    ("dirty", "args", "run", "shown"),
    [
        pytest.param("....", (0, 4, 4), None, "....", id="nothing"),
        pytest.param(".11.1", (0, 5, 9), (1, 3), ".cc.1", id="one-run"),
        pytest.param("11111", (0, 5, 2), (0, 2), "cc111", id="so-many-at-the-most"),
        pytest.param("11111", (3, 5, 9), (3, 5), "111cc", id="from-there-on"),
        pytest.param("11111", (0, 3, 9), (0, 3), "ccc11", id="up-to-there"),
        pytest.param("1...1", (1, 4, 9), None, "1...1", id="none-in-between"),
        pytest.param("11111", (2, 2, 9), None, "11111", id="nowhere"),
        pytest.param("...1", (0, 4, 1), (3, 4), "...c", id="the-last"),
    ],
)
def test_dirty_granules_are_claimed(dirty, args, run, shown):
    scene = marked(dirty)

    assert scene.mirror.claim(*args) == run

    assert scene.shown == shown


@pytest.mark.parametrize(
    ("excluded", "runs"),
    [
        pytest.param([], [(0, 8)], id="none"),
        pytest.param([(0, 2)], [(2, 8)], id="head"),
        pytest.param([(6, 8)], [(0, 6)], id="tail"),
        pytest.param([(3, 4)], [(0, 3), (4, 8)], id="within"),
        pytest.param([(5, 6), (1, 2)], [(0, 1), (2, 5), (6, 8)], id="not-in-order"),
        pytest.param([(0, 3), (2, 5)], [(5, 8)], id="overlapping"),
        pytest.param([(0, 2), (2, 4)], [(4, 8)], id="adjacent"),
        pytest.param([(0, 8)], [], id="all"),
        pytest.param([(0, 100)], [], id="more-than-all"),
        pytest.param([(8, 9), (20, 30)], [(0, 8)], id="elsewhere"),
    ],
)
def test_what_is_excluded_is_not_claimed(excluded, runs):
    mirror = marked("1" * 8 + ".").mirror
    found = []
    while (run := mirror.claim(0, 9, 9, excluded)) is not None:
        found.append(run)

    assert found == runs


def test_what_is_being_copied_is_not_claimed_again():
    scene = marked("11111")
    scene.mirror.claim(2, 3, 1)
    scene.mirror.claim(0, 1, 1)
    for granule in (0, 2):
        write(scene.disk, 1, granule * CLUSTER)
    assert scene.shown == "C1C11"

    assert scene.mirror.claim(0, 5, 9) == (1, 2)
    assert scene.mirror.claim(0, 5, 9) == (3, 5)
    assert scene.mirror.claim(0, 5, 9) is None

    scene.mirror.finish(2, 3)
    assert scene.shown == "Cc1cc"
    assert scene.mirror.claim(0, 5, 9) == (2, 3)


def test_what_could_not_be_copied_is_dirty():
    scene = marked("111")
    scene.mirror.claim(0, 3, 2)

    scene.mirror.fail(0, 1)
    scene.mirror.finish(1, 2)

    assert scene.shown == "1.1"


@pytest.mark.parametrize("seed", range(10))
def test_a_claim_takes_the_first_that_nobody_uses(seed):
    chance = random.Random(seed)
    for _ in range(100):
        count = chance.randint(1, 20)
        scene = marked("".join(chance.choices(".1", k=count)))
        for granule in range(count):
            if scene.dirty[granule] and chance.random() < 0.3:
                scene.mirror.claim(granule, granule + 1, 1)
                scene.dirty[granule] = chance.random() < 0.5
        starts = [chance.randrange(count) for _ in range(chance.randrange(4))]
        excluded = [(start, start + chance.randint(1, 4)) for start in starts]
        start, stop = sorted(chance.choices(range(count + 1), k=2))
        most = chance.randint(1, 6)
        free = [
            granule
            for granule in range(start, stop)
            if scene.dirty[granule]
            and not scene.copying[granule]
            and not any(first <= granule < end for first, end in excluded)
        ]
        before = scene.shown

        run = scene.mirror.claim(start, stop, most, excluded)

        if run is None:
            assert free == []
            assert scene.shown == before
            continue
        taken = range(*run)
        assert taken.start == free[0]
        assert 1 <= len(taken) <= most
        assert set(taken) <= set(free)
        assert scene.shown == "".join(
            "c" if granule in taken else letter for granule, letter in enumerate(before)
        )


def shown_at_lines(scene, call):
    """Return what is shown of a scene at each line of a call, in which it may die."""
    shown = []

    def look(frame, event, argument):
        if event == "line":
            shown.append(scene.shown)
        return look

    def trace(frame, event, argument):
        return look if frame.f_code.co_filename == mirror_module.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return [text for text, _ in itertools.groupby(shown)]


def test_a_granule_is_dirty_or_copied_at_every_instant():
    scene = marked("11")

    def claim():
        scene.mirror.claim(0, 2, 1)

    assert shown_at_lines(scene, claim) == ["11", "C1", "c1"]
    assert shown_at_lines(scene, lambda: scene.mirror.fail(0, 1)) == ["c1", "C1", "11"]


def test_what_a_daemon_was_copying_is_dirty_to_the_next_one():
    scene = marked("111..")
    scene.mirror.claim(0, 5, 2)
    write(scene.disk, 1, 0)
    assert scene.shown == "Cc1.."

    mirror = restarted(scene)

    assert mirror.left() == 3 * CLUSTER
    assert mirror.claim(0, 5, 5) == (0, 3)
    assert not mirror.is_synced
    assert not mirror.is_following


# -- writes that follow


@overwrites
@pytest.mark.parametrize(("length", "offset", "shown"), RANGES)
def test_a_write_that_follows_comes_to_the_target(
    overwrite, operation, length, offset, shown
):
    scene = scene_with_tail()
    scene.follow()
    scene.mirror.mark_synced()

    overwrite(scene.disk, length, offset)

    what = "write" if overwrite is write else "zero"
    assert scene.told == [(what, offset, length)]
    assert scene.memory.data != clusters("abcd") + b"e" * TAIL
    assert scene.target_memory.data == scene.memory.data
    assert scene.shown == "....."
    assert scene.mirror.is_synced
    assert scene.mirror.is_following
    scene.check_quiet()


@pytest.mark.parametrize(
    ("dirty", "told"),
    [
        pytest.param(".....", [(4090, 12294)], id="all-clean"),
        pytest.param("1111.", [], id="all-dirty"),
        pytest.param("1....", [(4096, 12288)], id="head"),
        pytest.param("...1.", [(4090, 8198)], id="tail"),
        pytest.param(".1...", [(4090, 6), (8192, 8192)], id="middle"),
        pytest.param("1.11.", [(4096, 4096)], id="all-but-one"),
        pytest.param("....1", [(4090, 12294)], id="another"),
    ],
)
@pytest.mark.parametrize("overwrite", [write, zero])
def test_what_is_dirty_is_left_to_who_copies(overwrite, dirty, told):
    scene = marked(dirty)
    scene.memory.data[:] = scene.target_memory.data[:] = clusters("abcde")
    scene.follow()

    overwrite(scene.disk, 12294, 4090)

    what = "write" if overwrite is write else "zero"
    assert scene.told == [(what, offset, length) for offset, length in told]
    assert scene.shown == dirty
    for granule, letter in enumerate(dirty):
        at = slice(granule * CLUSTER, (granule + 1) * CLUSTER)
        is_old = scene.target_memory.data[at] == clusters("abcde"[granule])
        assert is_old == (letter == "1" or granule == 4)
    scene.check_end()


def test_an_unaligned_write_brings_its_bytes_and_no_more():
    scene = alike()

    scene.disk.write(b"XYZ", CLUSTER + 10)

    assert scene.told == [("write", CLUSTER + 10, 3)]
    assert scene.target_memory.pread(5, CLUSTER + 9) == b"bXYZb"


def test_a_write_that_follows_is_dirty_until_it_ends():
    scene = alike()

    shown = shown_at_lines(scene, lambda: scene.disk.write(b"XY", 2 * CLUSTER - 1))

    assert shown == ["....", ".11.", "...."]


def test_the_source_comes_before_the_target():
    scene = alike()
    on_source = scene.source.hold("pwrite")
    on_target = scene.target.hold("pwrite")
    running = writing(scene, "X", 1)

    on_source.wait_arrived()
    assert (scene.on_source, scene.on_target) == ("abcd", "abcd")
    assert scene.shown == ".1.."
    on_source.release()
    on_target.wait_arrived()
    assert (scene.on_source, scene.on_target) == ("aXcd", "abcd")
    assert scene.shown == ".1.."

    assert restarted(scene).claim(0, 4, 4) == (1, 2)
    on_target.release()
    running.result()
    assert (scene.on_source, scene.on_target) == ("aXcd", "aXcd")


@overwrites
def test_a_write_waits_for_who_copies_its_granules(overwrite, operation):
    scene = Mirrored(clusters("abcd"), clusters("ab.."))
    scene.mirror.mark_dirty(2 * CLUSTER, 4 * CLUSTER)
    scene.follow()
    run = scene.mirror.claim(0, 4, 1)
    data = scene.read(run)

    running = Running(overwrite, scene.disk, CLUSTER + 1, 2 * CLUSTER - 1)

    scene.requests.wait_waiting(running)
    assert scene.on_source == "abcd"
    assert scene.told == []
    scene.bring(run, data)
    scene.mirror.finish(*run)
    running.result()
    assert len(scene.told) == 1
    assert scene.shown == "...1"
    scene.check_end()


def test_a_write_goes_on_when_a_copy_has_failed():
    scene = Mirrored(clusters("abcd"), clusters("...."))
    scene.mirror.mark_dirty(0, 4 * CLUSTER)
    scene.follow()
    scene.mirror.claim(0, 4, 2)
    running = writing(scene, "X", 1)
    scene.requests.wait_waiting(running)

    scene.mirror.fail(0, 2)

    assert running.result() == CLUSTER
    # Left to who copies: it was dirty again.
    assert scene.told == []
    assert scene.shown == "1111"
    scene.check_end()


def test_a_write_does_not_wait_for_copies_elsewhere():
    scene = Mirrored(clusters("abcd"))
    scene.mirror.mark_dirty(CLUSTER, 2 * CLUSTER)
    scene.mirror.mark_dirty(3 * CLUSTER, 4 * CLUSTER)
    scene.follow()
    scene.mirror.claim(1, 2, 1)
    scene.mirror.claim(3, 4, 1)

    running = Running(scene.disk.write, b"X" * CLUSTER, 2 * CLUSTER)

    assert not running.wait_waiting()
    running.result()
    assert scene.on_target == "abXd"


@pytest.mark.parametrize("where", ["source", "target"])
def test_nobody_copies_what_a_running_write_uses(where):
    scene = Mirrored(clusters("abcd"))
    scene.follow()
    stay = getattr(scene, where).hold("pwrite")
    running = writing(scene, "XX", 1)
    stay.wait_arrived()
    scene.mirror.mark_dirty(0, 4 * CLUSTER)

    assert scene.mirror.claim(1, 3, 4) is None
    assert scene.mirror.claim(0, 4, 4) == (0, 1)
    assert scene.mirror.claim(0, 4, 4) == (3, 4)
    assert scene.mirror.claim(0, 4, 4) is None

    stay.release()
    running.result()


def test_nobody_copies_what_a_waiting_write_is_to_use():
    scene = marked("111.")
    scene.follow()
    scene.mirror.claim(0, 1, 1)
    running = writing(scene, "XX", 0)
    scene.requests.wait_waiting(running)

    # Else a guest that waits for one copy waits for the next one, too.
    assert scene.mirror.claim(0, 4, 4) == (2, 3)
    assert scene.mirror.claim(0, 4, 4) is None

    scene.mirror.finish(0, 1)
    running.result()
    scene.mirror.finish(2, 3)
    assert scene.mirror.claim(0, 4, 4) == (1, 2)


def test_writes_to_one_granule_come_in_the_order_of_arrival():
    scene = alike("abcde")
    stay, first = held(scene, text="AA", granule=0)
    second = writing(scene, "BB", 1)
    scene.requests.wait_waiting(second)
    # It uses nothing that the first one does, and still waits for the second.
    third = writing(scene, "CC", 2)
    scene.requests.wait_waiting(third)
    elsewhere = writing(scene, "D", 4)
    assert not elsewhere.wait_waiting()
    assert scene.on_source == "AAcdD"

    stay.release()

    for running in (first, second, third):
        running.result()
    assert scene.on_source == scene.on_target == "ABCCD"
    scene.check_quiet()


def test_a_write_waits_for_one_that_has_neighbouring_bytes_of_a_granule():
    scene = alike()
    stay, first = held(scene)
    second = Running(scene.disk.write, b"YY", CLUSTER - 1)

    scene.requests.wait_waiting(second)

    stay.release()
    first.result()
    second.result()
    assert scene.told[1:] == [("write", CLUSTER - 1, 2)]
    scene.check_quiet()


@pytest.fixture
def switching():
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("is_following", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_many_writes_and_copies_at_once_leave_nothing_behind(
    switching, is_following, seed
):
    scene = Mirrored(bytes(10 * CLUSTER + TAIL), granularity=512)
    scene.mirror.mark_dirty(0, scene.disk.size)
    scene.target_memory.data[:] = b"o" * scene.disk.size
    if is_following:
        scene.follow()
    has_ended = threading.Event()

    def guest(number):
        chance = random.Random(f"{seed}/{number}")
        for _ in range(60):
            offset = chance.randrange(scene.disk.size)
            length = chance.randint(1, min(3000, scene.disk.size - offset))
            match chance.randrange(4):
                case 0:
                    scene.disk.zero(length, offset)
                case 1:
                    scene.disk.discard(length, offset)
                case _:
                    scene.disk.write(chance.randbytes(1) * length, offset)

    def copier():
        while not has_ended.is_set():
            if scene.copy(4) is None:
                time.sleep(0.0005)

    copiers = [Running(copier) for _ in range(2)]
    guests = [Running(guest, number) for number in range(4)]
    for running in guests:
        running.result()
    has_ended.set()
    for running in copiers:
        running.result()

    scene.check_quiet()
    scene.copy_all()
    assert scene.target_memory.data == scene.memory.data
    if is_following:
        scene.mirror.mark_synced()
        assert scene.mirror.is_synced
        assert scene.mirror.take_failure() is None


def test_writes_to_a_target_that_has_all_leave_it_so(switching):
    scene = alike("abcdefgh")

    def guest(number):
        chance = random.Random(number)
        for _ in range(60):
            offset = chance.randrange(scene.disk.size)
            length = chance.randint(1, min(3 * CLUSTER, scene.disk.size - offset))
            scene.disk.write(chance.randbytes(1) * length, offset)

    for running in [Running(guest, number) for number in range(6)]:
        running.result()

    assert scene.target_memory.data == scene.memory.data
    assert scene.shown == "........"
    assert scene.mirror.is_synced
    assert scene.mirror.waited == 6 * 60
    scene.check_quiet()


def test_no_write_is_under_way_when_following_begins():
    scene = Mirrored(clusters("abcd"))
    stay = scene.source.hold("pwrite")
    running = writing(scene, "X")
    stay.wait_arrived()

    following = Running(scene.follow)

    scene.requests.wait_waiting(following)
    assert not scene.mirror.is_following
    stay.release()
    running.result()
    following.result()
    assert scene.mirror.is_following
    assert scene.shown == "1..."


# -- whether the target has all


def test_a_mirror_is_synced_once_it_follows_and_has_all():
    scene = marked("1.")
    scene.mirror.mark_synced()
    assert not scene.mirror.is_synced

    scene.follow()
    scene.mirror.mark_synced()
    assert not scene.mirror.is_synced

    run = scene.mirror.claim(0, 2, 2)
    scene.mirror.mark_synced()
    assert not scene.mirror.is_synced
    assert not scene.mirror.is_alike()

    scene.mirror.finish(*run)
    assert scene.mirror.is_alike()
    assert not scene.mirror.is_synced
    scene.mirror.mark_synced()
    assert scene.mirror.is_synced


def test_a_mirror_that_does_not_follow_is_alike_and_not_synced():
    scene = Mirrored(clusters("ab"))

    scene.mirror.mark_synced()

    assert scene.mirror.is_alike()
    assert not scene.mirror.is_synced


def test_a_write_under_way_counts_as_brought():
    scene = Mirrored(clusters("abcd"))
    scene.follow()
    stay, running = held(scene, text="XX", granule=1)

    scene.mirror.mark_synced()

    assert scene.mirror.is_synced
    assert scene.mirror.is_alike()
    assert scene.mirror.left() == 0
    stay.release()
    running.result()
    assert scene.mirror.is_synced


def test_what_a_write_under_way_leaves_to_who_copies_is_lacked():
    scene = marked(".1..")
    scene.follow()
    stay, running = held(scene, text="XX", granule=0)

    scene.mirror.mark_synced()

    assert not scene.mirror.is_synced
    assert not scene.mirror.is_alike()
    assert scene.mirror.left() == CLUSTER
    stay.release()
    running.result()
    assert scene.shown == ".1.."


def test_zeroes_of_the_target_are_known_until_something_is_written():
    scene = scene_with_tail()
    mirror = scene.mirror
    assert not mirror.is_zero(0, 5)
    mirror.set_zero(0, 5, is_zero=True)
    assert not mirror.is_zero(0, 5)

    mirror.mark_zero()
    assert mirror.is_zero(0, 5)
    mirror.set_zero(1, 2, is_zero=False)
    assert [mirror.is_zero(n, n + 1) for n in range(5)] == [True, False, *[True] * 3]
    assert not mirror.is_zero(0, 5)
    mirror.set_zero(1, 2, is_zero=True)
    assert mirror.is_zero(0, 5)


@overwrites
def test_a_write_that_follows_ends_what_is_known_of_zeroes(overwrite, operation):
    scene = Mirrored(bytes(4 * CLUSTER))
    scene.mirror.mark_zero()
    overwrite(scene.disk, CLUSTER, 0)
    # The target has not heard of it.
    assert scene.mirror.is_zero(0, 4)
    scene.follow()
    stay = scene.source.hold(operation)

    running = Running(overwrite, scene.disk, CLUSTER, CLUSTER + 1)
    stay.wait_arrived()

    assert [scene.mirror.is_zero(n, n + 1) for n in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    stay.release()
    running.result()


# -- errors of the source


@overwrites
def test_an_error_of_the_source_leaves_dirty_what_follows(overwrite, operation):
    scene = alike()
    scene.source_faults.arm(operation)

    with pytest.raises(OSError) as e:
        overwrite(scene.disk, CLUSTER + 1, CLUSTER)

    assert e.value.errno == errno.EIO
    assert scene.shown == ".11."
    assert scene.told == []
    # The target did nothing wrong.
    assert scene.mirror.is_following
    assert scene.mirror.take_failure() is None
    assert scene.mirror.claim(0, 4, 4) == (1, 3)


@overwrites
def test_a_mirror_is_not_synced_after_an_error_of_the_source(overwrite, operation):
    scene = alike()
    scene.source_faults.arm(operation)

    with pytest.raises(OSError):
        overwrite(scene.disk, CLUSTER, CLUSTER)

    assert scene.shown == ".1.."
    assert not scene.mirror.is_synced


def test_a_mirror_is_not_synced_after_a_write_that_is_cut_short():
    scene = alike()
    scene.source.image = Full(scene.memory, 5)

    writing(scene, "X").result()

    assert scene.dirty[0]
    assert not scene.mirror.is_synced


def test_a_write_that_is_cut_short_leaves_the_rest_dirty():
    scene = alike()
    scene.source.image = Full(scene.memory, CLUSTER + 5)

    assert writing(scene, "XXX", 1).result() == CLUSTER + 5

    assert scene.told == [("write", CLUSTER, CLUSTER + 5)]
    assert scene.target_memory.data == scene.memory.data
    # The last two at the least; nobody needs to know better.
    assert scene.dirty[2]
    assert scene.dirty[3]
    assert not scene.dirty[0]
    scene.check_end()


# -- errors of the target


@overwrites
def test_an_error_of_the_target_ends_following_and_the_guest_hears_nothing(
    overwrite, operation
):
    scene = alike()
    scene.target_faults.arm("pwrite" if overwrite is write else "zero")

    overwrite(scene.disk, CLUSTER, CLUSTER)

    assert scene.on_source in ("aXcd", "a.cd")
    assert scene.on_target == "abcd"
    assert scene.shown == ".1.."
    assert not scene.mirror.is_following
    assert not scene.mirror.is_synced
    assert scene.mirror.take_failure().errno == errno.EIO
    assert scene.mirror.take_failure() is None
    scene.check_end()


def test_an_error_of_the_second_piece_leaves_all_dirty():
    scene = marked(".1...")
    scene.follow()
    scene.target_faults.arm("pwrite", nth=2)

    writing(scene, "XXX").result()

    assert scene.shown == "111.."
    assert scene.on_target == "X...."
    scene.check_end()


def test_the_first_error_of_the_target_is_the_failure():
    scene = alike()
    stays = [scene.target.hold("pwrite") for _ in range(2)]
    scene.target_faults.arm("pwrite", count=2, code=errno.ENOSPC)
    first = writing(scene, "X", 0)
    stays[0].wait_arrived()
    second = writing(scene, "Y", 2)
    stays[1].wait_arrived()

    stays[1].release()
    second.result()
    scene.target_faults.arm("pwrite", code=errno.EIO)
    stays[0].release()
    first.result()

    assert scene.mirror.take_failure().errno == errno.ENOSPC
    assert scene.mirror.take_failure() is None
    assert scene.shown == "1.1."


def test_a_target_that_works_again_can_be_followed_again():
    scene = alike()
    scene.target_faults.arm("pwrite")
    writing(scene, "X").result()
    writing(scene, "Y", 1).result()
    assert scene.on_target == "abcd"

    scene.follow()
    writing(scene, "ZZZ", 1).result()

    assert scene.on_target == "abZZ"
    assert scene.shown == "11.."
    assert scene.mirror.is_following
    scene.check_end()


def test_after_a_failure_a_write_under_way_clears_nothing():
    """Following has ended, so a background write may have come in between."""
    scene = alike()
    stay, running = held(scene, text="X", granule=0)
    scene.target_faults.arm("pwrite")
    writing(scene, "Y", 2).result()
    assert not scene.mirror.is_following

    background = writing(scene, "Z", 0)
    assert not background.wait_waiting()
    background.result()
    stay.release()
    running.result()

    assert scene.on_source == "ZbYd"
    assert scene.on_target == "Xbcd"
    assert scene.shown == "1.1."
    scene.check_end()


@pytest.mark.parametrize("where", ["source", "target"])
def test_a_write_under_way_clears_nothing_once_following_has_ended(where):
    scene = alike()
    stay = getattr(scene, where).hold("pwrite", after=True)
    running = writing(scene, "X", 0)
    stay.wait_arrived()
    scene.mirror.unfollow()

    writing(scene, "Z", 0).result()
    stay.release()
    running.result()

    assert scene.on_source == "Zbcd"
    assert scene.shown == "1..."
    scene.check_end()


def test_nobody_copies_what_a_write_uses_though_following_has_ended():
    scene = alike()
    stay, running = held(scene, text="X", granule=0)
    scene.mirror.unfollow()
    writing(scene, "ZZ", 0).result()

    assert scene.mirror.claim(0, 4, 4) == (1, 2)
    assert scene.mirror.claim(0, 4, 4) is None

    stay.release()
    running.result()
    assert scene.mirror.claim(0, 4, 4) == (0, 1)


# -- a target that hangs


def expire(scene, seconds=LATER):
    return scene.disk.expire(time.monotonic() + seconds)


def test_a_target_that_hangs_is_given_up():
    scene = alike()
    stay, running = held(scene, text="X", granule=1)
    assert not scene.disk.has_late(time.monotonic())
    assert expire(scene, 0) == {}
    assert scene.disk.has_late(time.monotonic() + LATER)

    assert expire(scene) == {running.ident: None}

    assert expire(scene) == {}
    assert not scene.disk.has_late(time.monotonic() + LATER)
    assert not scene.mirror.is_following
    assert not scene.mirror.is_synced
    assert scene.mirror.is_hanging
    assert isinstance(scene.mirror.take_failure(), TimedOut)
    # Nobody waits for it any more, also who drains the disk.
    with drained([scene.disk], 0):
        assert scene.shown == ".1.."
    # What it may still write, nobody may write before it.
    assert not scene.mirror.is_alike()
    assert scene.mirror.claim(0, 4, 4) is None

    stay.release()

    assert isinstance(running.error(), Abandoned)
    assert not scene.mirror.is_hanging
    assert scene.shown == ".1.."
    assert scene.mirror.claim(0, 4, 4) == (1, 2)


def test_a_request_is_served_again_while_its_first_thread_hangs():
    scene = alike()
    stay, running = held(scene, text="XX", granule=1)
    expire(scene)

    writing(scene, "XX", 1).result()
    writing(scene, "Y", 2).result()
    assert scene.on_source == "aXYd"
    assert scene.mirror.claim(0, 4, 4) is None
    stay.release()

    # It came late, with what has been overwritten.
    assert isinstance(running.error(), Abandoned)
    assert scene.on_target == "aXXd"
    assert scene.shown == ".11."
    scene.check_end()


def test_only_what_is_on_the_target_can_be_late():
    scene = alike()
    on_source = scene.source.hold("pwrite")
    first = writing(scene, "X")
    on_source.wait_arrived()
    waiting = writing(scene, "Y")
    scene.requests.wait_waiting(waiting)

    assert not scene.disk.has_late(time.monotonic() + LATER)
    assert expire(scene) == {}

    assert scene.mirror.is_following
    on_source.release()
    first.result()
    waiting.result()
    assert scene.on_target == "Ybcd"


def test_one_that_hangs_lets_the_others_go_on_in_the_background():
    scene = alike()
    stay, running = held(scene, text="XX", granule=1)
    waiting = writing(scene, "YY", 2)
    scene.requests.wait_waiting(waiting)

    expire(scene)

    assert waiting.result() == 2 * CLUSTER
    assert scene.on_source == "aXYY"
    assert scene.on_target == "abcd"
    assert scene.shown == ".111"
    stay.release()
    running.error()
    scene.check_end()


def test_a_hanging_write_that_fails_at_last_says_only_that_it_hung():
    scene = alike()
    scene.target_faults.arm("pwrite")
    stay, running = held(scene)
    expire(scene)

    stay.release()

    assert isinstance(running.error(), Abandoned)
    assert isinstance(scene.mirror.take_failure(), TimedOut)
    assert scene.mirror.take_failure() is None
    scene.check_end()


@overwrites
def test_a_zero_or_discard_that_hangs_is_given_up_as_a_write_is(overwrite, operation):
    scene = alike()
    stay = scene.target.hold("pwrite" if overwrite is write else "zero")
    running = Running(overwrite, scene.disk, 2 * CLUSTER, CLUSTER)
    stay.wait_arrived()

    assert expire(scene) == {running.ident: None}

    stay.release()
    assert isinstance(running.error(), Abandoned)
    assert scene.shown == ".11."
    scene.check_end()


def test_the_deadline_is_the_timeout_of_the_mirror():
    scene = alike(timeout=10.0)
    begin = time.monotonic()
    stay, running = held(scene)
    end = time.monotonic()

    assert scene.mirror.expire(begin + 9.9) == []
    assert scene.mirror.expire(end + 10.1) == [running.ident]

    stay.release()
    running.error()


def test_a_write_waits_for_ever_if_there_is_no_timeout():
    scene = alike(timeout=float("inf"))
    stay, running = held(scene)
    waiting = writing(scene, "Y")
    scene.requests.wait_waiting(waiting)

    assert expire(scene, 1e9) == {}

    stay.release()
    running.result()
    waiting.result()
    assert scene.on_target == "Ybcd"


def test_a_write_waits_for_a_copy_only_so_long():
    scene = marked("11..", timeout=0.01)
    scene.follow()
    run = scene.mirror.claim(0, 4, 1)

    assert writing(scene, "X").result() == CLUSTER

    assert scene.on_source == "X..."
    assert scene.on_target == "...."
    assert scene.shown == "C1.."
    assert not scene.mirror.is_following
    assert isinstance(scene.mirror.take_failure(), TimedOut)
    scene.mirror.finish(*run)
    assert scene.shown == "11.."
    scene.check_end()


def test_a_write_waits_for_another_only_so_long():
    scene = alike(timeout=0.01)
    stay, first = held(scene)

    assert writing(scene, "Y").result() == CLUSTER

    assert isinstance(scene.mirror.take_failure(), TimedOut)
    stay.release()
    assert first.result() == CLUSTER
    assert (scene.on_source, scene.on_target) == ("Ybcd", "Xbcd")
    assert scene.shown == "1..."
    scene.check_end()


def test_unfollow_lets_nobody_wait_for_the_target():
    scene = alike("abcd")
    stay, hanging = held(scene, text="XX", granule=0)
    waiting = writing(scene, "YY", 1)
    scene.requests.wait_waiting(waiting)

    scene.mirror.unfollow()

    waiting.result()
    assert scene.on_source == "XYYd"
    assert scene.disk.has_late(time.monotonic())
    assert expire(scene, 0) == {hanging.ident: None}
    stay.release()
    assert isinstance(hanging.error(), Abandoned)
    assert not scene.mirror.is_following
    assert not scene.mirror.is_synced
    assert scene.shown == "111."
    scene.check_end()


def test_unfollow_is_no_failure():
    scene = alike()

    scene.mirror.unfollow()
    writing(scene, "X").result()

    assert scene.mirror.take_failure() is None
    assert scene.told == []
    assert scene.shown == "1..."


def test_a_write_on_the_source_during_unfollow_leaves_the_target_alone():
    scene = alike()
    stay = scene.source.hold("pwrite")
    running = writing(scene, "X")
    stay.wait_arrived()

    scene.mirror.unfollow()
    stay.release()

    running.result()
    assert scene.told == []
    assert scene.shown == "1..."


def test_a_hanging_write_comes_before_those_that_follow_anew():
    scene = alike()
    stay, hanging = held(scene, text="X", granule=0)
    expire(scene)
    scene.mirror.take_failure()
    scene.follow()

    later = writing(scene, "Y", 0)
    scene.requests.wait_waiting(later)
    elsewhere = writing(scene, "Z", 3)
    assert not elsewhere.wait_waiting()
    stay.release()

    assert isinstance(hanging.error(), Abandoned)
    later.result()
    assert scene.on_source == "YbcZ"
    assert scene.shown == "1..."
    assert scene.mirror.is_following
    scene.check_end()


# -- what the guest has waited for


def test_who_waited_is_counted():
    scene = alike()
    stay, running = held(scene)
    assert (scene.mirror.waited, scene.mirror.longest_wait) == (0, 0.0)
    time.sleep(0.01)

    stay.release()
    running.result()
    writing(scene, "Y", 1).result()

    assert scene.mirror.waited == 2
    assert 0.01 <= scene.mirror.longest_wait < 30.0


# -- a target that has forgotten


def forget(scene):
    """Let a flush of the target fail: what it had got before is gone."""
    scene.target_memory.discard(scene.disk.size, 0)
    scene.mirror.redo()


@overwrites
@pytest.mark.parametrize("where", ["source", "target"])
def test_what_is_forgotten_during_a_write_stays_dirty(overwrite, operation, where):
    scene = alike()
    if where == "target":
        operation = "pwrite" if overwrite is write else "zero"
    stay = getattr(scene, where).hold(operation, after=True)
    running = Running(overwrite, scene.disk, 1, CLUSTER)
    stay.wait_arrived()

    forget(scene)
    stay.release()
    running.result()

    assert scene.shown == "1111"
    assert not scene.mirror.is_synced
    scene.check_end()


def test_what_is_forgotten_while_it_is_copied_stays_dirty():
    scene = scene_with_tail()
    scene.mirror.mark_dirty(0, scene.disk.size)
    run = scene.mirror.claim(0, 5, 2)
    scene.bring(run, scene.read(run))

    forget(scene)
    scene.mirror.finish(*run)

    assert scene.shown == "11111"
    scene.check_end()


def test_a_target_that_has_forgotten_is_not_followed_and_that_is_no_failure():
    scene = alike()

    forget(scene)
    writing(scene, "X").result()

    assert not scene.mirror.is_following
    assert scene.mirror.take_failure() is None
    assert scene.told == []
    scene.follow()
    scene.copy_all()
    scene.mirror.mark_synced()
    assert scene.mirror.is_synced


def test_a_target_that_has_forgotten_is_not_known_to_be_zero():
    """Zeroes were written over something else, and that is back."""
    scene = Mirrored(bytes(2 * CLUSTER))
    scene.mirror.mark_zero()
    scene.mirror.set_zero(0, 1, is_zero=False)
    scene.mirror.set_zero(0, 1, is_zero=True)

    scene.mirror.redo()

    assert not scene.mirror.is_zero(0, 1)


def test_what_is_marked_dirty_while_it_is_copied_stays_dirty():
    scene = marked("1111")
    run = scene.mirror.claim(0, 4, 2)

    scene.mirror.mark_dirty(0, scene.disk.size)
    scene.mirror.finish(*run)

    assert scene.shown == "1111"


def test_bits_beyond_the_end_stay_clear():
    requests, size = WatchedRequests(), 3 * CLUSTER + 1
    dirty = make_bits(size)
    mirror = Mirror(size, CLUSTER, dirty, make_bits(size), requests)

    mirror.mark_dirty(0, size)
    mirror.write(MemoryImage(size), b"x", size - 1)

    assert dirty.count() == mirror.count == 4
    assert mirror.left() == size
    assert letters(bytes(4)) == "."
