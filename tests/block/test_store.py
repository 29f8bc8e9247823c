"""Where preserved clusters are kept, and what that costs."""

import errno

import pytest
from bitarray import bitarray

from fleecefs.block import store as store_module
from fleecefs.block.memory import MemoryImage
from fleecefs.block.store import Budget, Store, Tier, runs
from fleecefs.errors import NoSpace, Unsupported
from tests.support.disks import CLUSTER, clusters, letters, make_bits
from tests.support.faulty import Faulty, Full

COUNT = 8
# The last cluster is cut short by the end of the disk.
SIZE = COUNT * CLUSTER - 1000


def make_tier(name="disk", image=None, limit=None, bits=None):
    return Tier(
        name,
        image or MemoryImage(SIZE),
        make_bits(SIZE) if bits is None else bits,
        Budget(limit, name),
        CLUSTER,
    )


def used(tier):
    return tier._budget.used // CLUSTER


def held(tier):
    return tier.bits[:COUNT].to01()


def make_store(*tiers):
    return Store(list(tiers), CLUSTER, SIZE)


def read(store, length=SIZE, offset=0):
    first, stop = offset // CLUSTER, -(-(offset + length) // CLUSTER)
    buffer = bytearray(b"?" * length)
    bits = bitarray("1" * (stop - first), endian="little")
    store.read_into(memoryview(buffer), offset, first, bits)
    return bytes(buffer)


def reads_of(name, texts):
    """Return what is asked of a tier's image to read the clusters that it holds."""
    size = len(texts) * CLUSTER
    tier = make_tier(name, MemoryImage(size), bits=make_bits(size))
    for first, text in enumerate(texts):
        if text != ".":
            tier.put(clusters(text), first, first + 1)
    asked = []
    image = tier.image
    image.pread = watch(asked, image.pread)
    image.pread_into = watch(asked, image.pread_into)

    assert letters(read(make_store(tier), size)) == texts

    return asked


def watch(asked, function):
    def watching(what, offset):
        length = what if isinstance(what, int) else len(what)
        asked.append((offset // CLUSTER, length // CLUSTER))
        return function(what, offset)

    return watching


@pytest.mark.parametrize("name", ["ram", "disk"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        pytest.param("ab.cd", [(0, 2), (3, 2)], id="few"),
        pytest.param(".a.b.cd.e", [(1, 8)], id="many"),
    ],
)
def test_many_parts_are_read_with_what_is_between(name, texts, expected):
    assert reads_of(name, texts) == expected


def test_what_is_between_is_not_read_from_disk_if_it_is_most():
    texts = "a..b...c.d"

    assert reads_of("ram", texts) == [(0, 10)]
    assert reads_of("disk", texts) == [(0, 1), (3, 1), (7, 1), (9, 1)]


def discards_of(*kept):
    """Return what is discarded when a tier frees all that it has."""
    count = 600
    tier = make_tier(
        "ram", MemoryImage(count * CLUSTER), bits=make_bits(count * CLUSTER)
    )
    for cluster in kept:
        tier.put(clusters("a"), cluster, cluster + 1)
    asked = []
    tier.image.discard = watch(asked, tier.image.discard)

    tier.free(0, count)

    assert not tier.bits.any()
    assert used(tier) == 0
    assert tier.image.allocated() == 0
    return asked


def test_clusters_near_each_other_are_freed_in_one_call():
    assert discards_of(1, 3, 4, 200) == [(1, 200)]


def test_clusters_far_from_each_other_are_not():
    assert discards_of(0, 2, 300, 599) == [(0, 3), (300, 1), (599, 1)]


# -- budgets


def test_a_budget_is_used_up_to_its_limit():
    budget = Budget(100, "ram")

    assert budget.take(60)
    assert budget.take(40)
    assert not budget.take(1)
    budget.give(50)
    assert budget.take(50)
    assert budget.statistics() == {"limit": 100, "used": 100, "peak": 100}


def test_a_budget_without_a_limit_counts_all_the_same():
    budget = Budget(None, "disk")

    assert budget.take(1 << 50)
    budget.give(1 << 49)

    assert budget.statistics() == {"limit": None, "used": 1 << 49, "peak": 1 << 50}


def test_what_is_refused_is_not_counted():
    budget = Budget(100, "ram")

    assert not budget.take(101)

    assert budget.statistics() == {"limit": 100, "used": 0, "peak": 0}


def test_what_is_there_already_is_counted_beyond_the_limit():
    budget = Budget(100, "ram")

    budget.charge(150)

    assert budget.used == budget.peak == 150
    assert not budget.take(1)


# -- tiers


def test_a_tier_keeps_what_is_put_into_it():
    tier = make_tier()

    assert tier.put(clusters("bc"), 1, 3)

    assert held(tier) == "01100000"
    assert letters(tier.image.pread(4 * CLUSTER, 0)) == ".bc."
    assert used(tier) == 2


def test_a_tier_that_holds_clusters_counts_them_from_the_start():
    bits = make_bits(SIZE)
    bits[2:5] = 1

    tier = make_tier(bits=bits, limit=CLUSTER)

    assert used(tier) == 3
    assert tier.used == 3 * CLUSTER


def test_a_tier_refuses_what_its_budget_has_no_room_for():
    tier = make_tier(limit=2 * CLUSTER)

    assert tier.put(clusters("a"), 0, 1)
    assert not tier.put(clusters("bc"), 1, 3)

    assert held(tier) == "10000000"
    assert used(tier) == 1


def test_a_cluster_put_twice_is_counted_once():
    tier = make_tier()
    tier.put(clusters("ab"), 0, 2)

    tier.put(clusters("bcd"), 1, 4)

    assert used(tier) == 4
    tier.drop()
    assert used(tier) == 0


def test_the_last_cluster_may_be_short():
    tier = make_tier()

    assert tier.put(b"z" * (CLUSTER - 1000), 7, 8)

    assert used(tier) == 1
    tier.free(7, 8)
    assert used(tier) == 0
    assert tier.image.pread(CLUSTER - 1000, 7 * CLUSTER) == bytes(CLUSTER - 1000)


@pytest.mark.parametrize(
    ("image", "code"),
    [
        pytest.param(
            Faulty(MemoryImage(SIZE), on="pwrite"), errno.EIO, id="failed write"
        ),
        pytest.param(Full(MemoryImage(SIZE), 5000), errno.ENOSPC, id="short write"),
        pytest.param(Full(MemoryImage(SIZE), 0), errno.ENOSPC, id="no space"),
    ],
)
def test_what_could_not_be_written_is_not_held(image, code):
    tier = make_tier(image=image)

    with pytest.raises(OSError) as e:
        tier.put(clusters("ab"), 0, 2)

    assert e.value.errno == code
    assert held(tier) == "00000000"
    assert used(tier) == 0


def test_data_is_in_the_tier_before_its_bit_is_set():
    tier = make_tier()
    found = []
    pwrite = tier.image.pwrite
    tier.image.pwrite = lambda *args: found.append(held(tier)) or pwrite(*args)

    tier.put(clusters("a"), 0, 1)

    assert found == ["00000000"]


def test_freeing_gives_back_what_is_there():
    tier = make_tier()
    tier.put(clusters("ab"), 0, 2)
    tier.put(clusters("d"), 3, 4)

    tier.free(1, 8)

    assert held(tier) == "10000000"
    assert used(tier) == 1
    assert letters(tier.image.pread(4 * CLUSTER, 0)) == "a..."
    assert tier.image.allocated() == CLUSTER


def test_freeing_again_gives_nothing_back():
    tier = make_tier()
    tier.put(clusters("ab"), 0, 2)

    tier.free(0, 2)
    tier.free(0, 2)

    assert used(tier) == 0


def test_storage_that_can_not_punch_holes_is_no_reason_to_fail():
    class Solid(MemoryImage):
        def discard(self, length, offset):
            raise Unsupported("the storage below can not discard")

    tier = make_tier(image=Solid(SIZE))
    tier.put(clusters("ab"), 0, 2)

    tier.free(0, 1)

    assert held(tier) == "01000000"
    assert used(tier) == 1


def test_what_can_not_be_freed_is_not_counted_any_more():
    tier = make_tier(image=Faulty(MemoryImage(SIZE), on="discard"))
    tier.put(clusters("a.b"), 0, 3)

    with pytest.raises(OSError, match="injected"):
        tier.free(0, 3)

    assert used(tier) == 0


def test_dropping_gives_back_everything_once():
    tier = make_tier()
    tier.put(clusters("abc"), 0, 3)

    tier.drop()
    tier.drop()
    tier.free(0, 8)

    assert used(tier) == 0


def test_a_copy_that_comes_after_the_end_costs_nothing():
    tier = make_tier()
    tier.drop()

    assert tier.put(clusters("a"), 0, 1)

    assert used(tier) == 0
    assert not tier.bits.any()


# -- stores


@pytest.mark.parametrize(
    ("text", "first", "in_tier"),
    [
        pytest.param("a", 0, "10000000", id="one"),
        pytest.param(".", 0, "00000000", id="one zero"),
        pytest.param("abc", 2, "00111000", id="run"),
        pytest.param("...", 2, "00000000", id="zero run"),
        pytest.param("a.b", 0, "10100000", id="zero in the middle"),
        pytest.param(".a.", 0, "01000000", id="zeroes around"),
        pytest.param("..ab..c", 1, "00011001", id="several runs"),
        pytest.param("abcd....", 0, "11110000", id="zero tail"),
        pytest.param("....abcd", 0, "00001111", id="zero head"),
    ],
)
def test_zeroes_cost_nothing(text, first, in_tier):
    tier = make_tier()
    store = make_store(tier)
    data = clusters(text)[: SIZE - first * CLUSTER]

    store.put(data, first)

    assert held(tier) == in_tier
    assert used(tier) == in_tier.count("1")
    assert read(store, len(data), first * CLUSTER) == data


@pytest.mark.parametrize("at", [0, CLUSTER - 1001], ids=["first byte", "last byte"])
def test_a_short_cluster_with_one_byte_is_not_zeroes(at):
    tier = make_tier()
    store = make_store(tier)
    data = bytearray(CLUSTER - 1000)
    data[at] = 1

    store.put(bytes(data), 7)

    assert held(tier) == "00000001"
    assert read(store, CLUSTER - 1000, 7 * CLUSTER) == data


@pytest.mark.parametrize("index", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_cluster_that_ends_in_one_byte_is_not_zeroes(index):
    tier = make_tier()
    data = bytearray(clusters("..."))
    data[(index + 1) * CLUSTER - 1] = 1

    make_store(tier).put(bytes(data), 0)

    assert held(tier)[index] == "1"
    assert used(tier) == 1


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        pytest.param(0, SIZE, id="all"),
        pytest.param(CLUSTER, CLUSTER, id="one"),
        pytest.param(100, 200, id="inside one"),
        pytest.param(CLUSTER - 1, 2, id="across two by a byte"),
        pytest.param(CLUSTER + 5, 4 * CLUSTER, id="unaligned"),
        pytest.param(SIZE - 1, 1, id="last byte"),
    ],
)
def test_reading_finds_every_cluster_in_its_tier(offset, length):
    ram, disk = make_tier("ram", limit=3 * CLUSTER), make_tier()
    store = make_store(ram, disk)
    data = clusters("ab.cdef.")[:SIZE]
    # The first three go to RAM, the others to disk; d to both, as after a failed copy.
    store.put(data[: 4 * CLUSTER], 0)
    disk.put(clusters("cd"), 3, 5)
    store.put(data[5 * CLUSTER :], 5)

    found = read(store, length, offset)

    assert found == data[offset : offset + length]


def test_what_does_not_fit_in_ram_goes_to_disk():
    ram, disk = make_tier("ram", limit=2 * CLUSTER), make_tier()
    store = make_store(ram, disk)

    store.put(clusters("a"), 0)
    store.put(clusters("bc"), 1)
    store.put(clusters("d"), 3)

    assert held(ram) == "10010000"
    assert held(disk) == "01100000"
    assert store.used() == {"ram": 2 * CLUSTER, "disk": 2 * CLUSTER}


@pytest.mark.parametrize("room", [0, 100], ids=["full", "nearly full"])
def test_a_full_tmpfs_is_a_full_tier(room):
    ram, disk = make_tier("ram", image=Full(MemoryImage(SIZE), room)), make_tier()

    make_store(ram, disk).put(clusters("a"), 0)

    assert held(ram) == "00000000"
    assert used(ram) == 0
    assert held(disk) == "10000000"


def test_a_failing_ram_tier_is_an_error():
    ram = make_tier("ram", image=Faulty(MemoryImage(SIZE), on="pwrite"))
    disk = make_tier()

    with pytest.raises(OSError) as e:
        make_store(ram, disk).put(clusters("a"), 0)

    assert e.value.errno == errno.EIO
    assert used(ram) == used(disk) == 0


def test_a_store_at_its_limit_says_so():
    ram, disk = make_tier("ram", limit=CLUSTER), make_tier(limit=CLUSTER)
    store = make_store(ram, disk)
    store.put(clusters("a"), 0)
    store.put(clusters("b"), 1)

    with pytest.raises(NoSpace, match="limit"):
        store.put(clusters("c"), 2)

    assert read(store, 3 * CLUSTER) == clusters("ab.")


def test_freeing_forgets_clusters_in_every_tier():
    ram, disk = make_tier("ram", limit=CLUSTER), make_tier()
    store = make_store(ram, disk)
    store.put(clusters("a"), 0)
    store.put(clusters("b"), 1)

    store.free(0, 8)

    assert used(ram) == used(disk) == 0
    assert read(store) == bytes(SIZE)


def test_dropping_a_store_gives_back_all_and_removes_its_files():
    removed = []
    ram, disk = make_tier("ram", limit=CLUSTER), make_tier()
    store = Store([ram, disk], CLUSTER, SIZE, remove=lambda: removed.append(True))
    store.put(clusters("a"), 0)
    store.put(clusters("b"), 1)

    store.drop()

    assert used(ram) == used(disk) == 0
    assert removed == [True]


@pytest.mark.parametrize("copy_size", [CLUSTER, 2 * CLUSTER, 1 << 20])
def test_settling_moves_everything_to_disk_and_flushes_it(monkeypatch, copy_size):
    monkeypatch.setattr(store_module, "COPY_SIZE_MAX", copy_size)
    ram, disk = make_tier("ram"), make_tier()
    store = make_store(ram, disk)
    data = clusters("abc..def")[:SIZE]
    store.put(data, 0)

    store.settle()

    assert held(ram) == "00000000"
    assert held(disk) == "11100111"
    assert used(ram) == 0
    assert used(disk) == 6
    assert read(store) == data
    assert disk.image.durable == data


def test_settling_moves_nothing_that_does_not_fit():
    ram, disk = make_tier("ram"), make_tier(limit=CLUSTER)
    store = make_store(ram, disk)
    store.put(clusters("ab"), 0)

    with pytest.raises(NoSpace):
        store.settle()

    assert read(store, 2 * CLUSTER) == clusters("ab")


def test_settling_what_is_on_disk_already_costs_nothing():
    ram, disk = make_tier("ram"), make_tier()
    store = make_store(ram, disk)
    store.put(clusters("ab"), 0)
    disk.put(clusters("ab"), 0, 2)

    store.settle()

    assert used(disk) == 2


# -- runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("00000000", [], id="none"),
        pytest.param("11111111", [(1, 7)], id="all"),
        pytest.param("01100110", [(1, 3), (5, 7)], id="two"),
        pytest.param("10000001", [], id="outside only"),
        pytest.param("01010101", [(1, 2), (3, 4), (5, 6)], id="single ones"),
    ],
)
def test_runs_of_set_bits_are_found_in_a_range(text, expected):
    bits = make_bits(SIZE)
    bits[:COUNT] = type(bits)(text)

    assert list(runs(bits, 1, 7)) == expected
