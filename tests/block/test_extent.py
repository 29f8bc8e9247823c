"""Ranges of bytes, and how they are cut."""

import pytest

from fleecefs.block.extent import Extent, Mapped, clip, pieces


def test_an_extent_ends_behind_its_last_byte():
    assert Extent(10, 5).end == 15
    assert Mapped(10, 5, "source").end == 15


@pytest.mark.parametrize("where", ["source", "ram", "disk"])
def test_data_is_what_is_kept_somewhere(where):
    assert Mapped(0, 1, where).is_data
    assert not Mapped(0, 1, "none").is_data


@pytest.mark.parametrize(
    ("offset", "length", "clipped"),
    [
        pytest.param(0, 10, 10, id="inside"),
        pytest.param(90, 10, 10, id="up to the end"),
        pytest.param(95, 10, 5, id="across the end"),
        pytest.param(99, 1, 1, id="last byte"),
        pytest.param(100, 1, 0, id="at the end"),
        pytest.param(200, 50, 0, id="past the end"),
        pytest.param(50, 0, 0, id="nothing"),
    ],
)
def test_the_end_cuts_a_range(offset, length, clipped):
    assert clip(offset, length, size=100) == clipped


@pytest.mark.parametrize(
    ("offset", "end", "expected"),
    [
        pytest.param(0, 20, [(0, 10), (10, 10)], id="aligned"),
        pytest.param(5, 20, [(5, 5), (10, 10)], id="unaligned head"),
        pytest.param(0, 15, [(0, 10), (10, 5)], id="unaligned tail"),
        pytest.param(5, 25, [(5, 5), (10, 10), (20, 5)], id="both"),
        pytest.param(3, 7, [(3, 4)], id="inside one"),
        pytest.param(9, 11, [(9, 1), (10, 1)], id="two bytes of two"),
        pytest.param(10, 20, [(10, 10)], id="one"),
        pytest.param(10, 10, [], id="nothing, aligned"),
        pytest.param(7, 7, [], id="nothing, unaligned"),
    ],
)
def test_a_range_is_cut_at_multiples(offset, end, expected):
    assert pieces(offset, end, 10) == expected
