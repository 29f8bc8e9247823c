"""Where two images differ, by sectors, in and outside a bitmap."""

import random
from itertools import pairwise

import pytest
from bitarray import bitarray

from fleecefs.jobs.differences import EXTENTS_MAX, SECTOR, Differences, find_runs


def told(*runs, dirty=None, granularity=SECTOR):
    bits = None if dirty is None else bitarray(dirty, endian="little")
    differences = Differences(bits, granularity)
    for run in runs:
        differences.add(*run)
    return differences


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        pytest.param([], [], id="same"),
        pytest.param([0], [(0, 512)], id="first-byte"),
        pytest.param([511, 512], [(0, 1024)], id="two-sectors"),
        pytest.param([0, 1024], [(0, 512), (1024, 1536)], id="apart"),
        pytest.param([1545], [(1536, 1546)], id="last-byte"),
        pytest.param([1546], [], id="beyond"),
    ],
)
def test_runs_are_whole_sectors_up_to_the_end(changed, runs):
    one, other = bytearray(2048), bytearray(2048)
    for at in changed:
        other[at] = 1

    assert find_runs(one, other, 1546) == runs


@pytest.mark.parametrize("seed", range(10))
def test_runs_have_each_sector_that_differs(seed):
    choice = random.Random(seed)
    one = bytearray(choice.randbytes(16 * SECTOR - seed))
    other = bytearray(one)
    changed = set(choice.sample(range(len(one)), seed))
    for at in changed:
        other[at] ^= 1

    runs = find_runs(one, other, len(one))

    sectors = {at // SECTOR for begin, end in runs for at in range(begin, end)}
    assert sectors == {at // SECTOR for at in changed}
    assert all(end < begin for (_, end), (begin, _) in pairwise(runs))


def test_adjacent_runs_are_one_extent():
    found = told((0, 512), (512, 1024), (2048, 2060))

    assert found.extents == [[0, 1024], [2048, 12]]
    assert (found.count, found.outside, found.within) == (2, 1036, 0)


def test_a_bitmap_parts_what_is_within_from_what_is_outside():
    found = told((0, 4096), (5120, 8000), dirty="0110", granularity=2048)

    assert found.extents == [[0, 2048], [6144, 1856]]
    assert (found.outside, found.within) == (2048 + 1856, 2048 + 1024)


def test_what_is_within_does_not_join_what_is_outside():
    found = told((0, 1536), dirty="010")

    assert found.extents == [[0, 512], [1024, 512]]


def test_only_the_first_extents_are_kept_but_all_counted():
    found = told(*((at * 1024, at * 1024 + 512) for at in range(EXTENTS_MAX + 5)))
    found.add((EXTENTS_MAX + 4) * 1024 + 512, (EXTENTS_MAX + 5) * 1024)

    assert len(found.extents) == EXTENTS_MAX
    assert found.count == EXTENTS_MAX + 5
    assert found.outside == (EXTENTS_MAX + 6) * 512
    assert found.extents[-1] == [(EXTENTS_MAX - 1) * 1024, 512]
