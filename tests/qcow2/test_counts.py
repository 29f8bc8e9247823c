"""Which clusters are free, and reference counts of each width."""

from array import array

import pytest
from bitarray import bitarray

from fleecefs.qcow2.clusters import Clusters
from fleecefs.qcow2.counts import Counts
from tests.qcow2.files import bits
from tests.qcow2.test_header import EMPTY


def decode(data, order):
    """Return the counts one by one, as the specification has them."""
    width = 1 << order
    if order >= 3:
        size = width // 8
        return [
            int.from_bytes(data[at : at + size]) for at in range(0, len(data), size)
        ]
    mask = (1 << width) - 1
    return [byte >> at & mask for byte in data for at in range(0, 8, width)]


@pytest.mark.parametrize("order", range(7))
def test_counts_say_what_is_used(order):
    counts = Counts(EMPTY._replace(refcount_order=order))
    used = bits(24, 0, 3, slice(7, 12), -1)

    assert decode(counts.encode(used), order) == used.tolist()
    per_block = 512 * 8 >> order
    assert decode(counts.block(used, 0), order) == [*used, *[0] * per_block][:per_block]


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize(
    "changed",
    [[], [0], [63], [64], [9, 10], [0, 5000], [63, 64], [4095, 4096]],
    ids=lambda changed: " and ".join(map(str, changed)) or "none",
)
def test_changes_make_the_old_blocks_new(order, changed):
    counts = Counts(EMPTY._replace(refcount_order=order))
    per_block = 512 * 8 >> order
    before = bits(5001, slice(0, None, 5))
    after = before.copy()
    after.extend(bits(77))
    for index in changed:
        after[index] ^= 1
    count = -(-len(after) // per_block)
    blocks = array("Q", [512 * (2 + index) for index in range(count)])
    content = bytearray(1024)
    for index in range(count):
        content += counts.block(before, index)

    writes = list(counts.changes(before, after, blocks))
    for data, offset in writes:
        content[offset : offset + len(data)] = data

    assert bytes(content[1024:]) == b"".join(
        counts.block(after, index) for index in range(count)
    )
    assert len(writes) == len({index // per_block for index in changed})


def test_the_first_gap_that_is_large_enough_is_taken():
    clusters = Clusters(512, 12 * 512)
    clusters.used = bitarray("110100111001")

    assert clusters.allocate(512) == 2 * 512
    assert clusters.allocate(513) == 4 * 512
    assert clusters.allocate(512 * 3) == 12 * 512
    assert clusters.allocate(512 * 2) == 9 * 512
    assert clusters.used == bitarray("111111111111111")


def test_a_gap_at_the_end_is_made_longer():
    clusters = Clusters(512, 0)
    clusters.used = bitarray("1100")

    assert clusters.allocate(512 * 5) == 2 * 512
    assert clusters.used == bitarray("1111111")
