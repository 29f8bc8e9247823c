"""QEMU's tools read what we write, and we read what they write."""

import os
import random
import subprocess

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.file import DescriptorFile
from fleecefs.units import GiB, KiB, MiB, TiB
from tests.qcow2.files import bits, stored
from tests.support.qemu import (
    check_code,
    dirty_extents,
    listed_bitmaps,
    qemu_img,
    require_qemu,
)


@pytest.fixture(autouse=True)
def _tools():
    require_qemu()


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "c.qcow2"


@pytest.fixture
def file(path):
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    yield DescriptorFile(fd, path.name)
    os.close(fd)


def extents_of(dirty, granularity, size):
    """Return the runs of bits in bytes; the last one may end with the disk."""
    extents = []
    first = dirty.find(1)
    while first >= 0:
        end = dirty.find(0, first)
        end = len(dirty) if end < 0 else end
        offset = first * granularity
        extents.append((offset, min(end * granularity, size) - offset))
        first = dirty.find(1, end)
    return extents


@pytest.mark.parametrize(
    ("size", "granularity", "dirty"),
    [
        pytest.param(1 * MiB, 512, [0, slice(5, 9), -1], id="granularity 512"),
        pytest.param(10 * GiB, 2 * GiB, [1, -1], id="granularity 2 GiB"),
        pytest.param(130 * GiB, 64 * KiB, [0, 2**21 - 1, -1], id="below 128 GiB"),
        pytest.param(130 * GiB, 64 * KiB, [2**21], id="above 128 GiB"),
        pytest.param(130 * GiB, 64 * KiB, [slice(2**21 - 1, 2**21 + 1)], id="across"),
        pytest.param(5 * MiB + 512, 64 * KiB, [-1], id="very last sector"),
        pytest.param(5 * MiB + 512, 64 * KiB, [slice(None)], id="all, odd size"),
        pytest.param(10 * TiB, 64 * KiB, [12345678, -1], id="10 TiB"),
        pytest.param(1 * MiB, 64 * KiB, [], id="clean"),
    ],
)
def test_our_bits_are_served_by_qemu_nbd(file, path, size, granularity, dirty):
    ours = bits(-(-size // granularity), *dirty)

    Container.create(file, size).update([Bitmap("daily", granularity, ours)])

    assert check_code(path) == 0
    assert listed_bitmaps(path) == {"daily": (granularity, {"auto"})}
    assert dirty_extents(path, "daily") == extents_of(ours, granularity, size)


def test_the_bits_of_a_size_within_a_sector_are_those_of_qemu(file, path):
    Container.create(file, 1 * MiB + 1).update([Bitmap("b", 512, bits(2049, -1))])

    assert dirty_extents(path, "b") == [(1 * MiB, 512)]


@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_qemu_reads_each_cluster_size(file, path, cluster_size):
    size = 64 * MiB
    ours = bits(size // 512, slice(100, 90000), 120000)

    container = Container.create(file, size, cluster_size)
    container.update([Bitmap("a", 512, ours), Bitmap("b", 4096, bits(size // 4096))])

    assert check_code(path) == 0
    assert dirty_extents(path, "a") == extents_of(ours, 512, size)


def test_qemu_shows_our_flags(file, path):
    container = Container.create(file, 1 * MiB)
    container.update(
        [
            Bitmap("täglich", 512, bits(2048), is_auto=False),
            Bitmap("both", 4096, bits(256), is_in_use=True),
            Bitmap("marked", 65536, bits(16), is_auto=False),
        ]
    )
    container.mark_in_use(["marked"])

    assert listed_bitmaps(path) == {
        "täglich": (512, set()),
        "both": (4096, {"auto", "in-use"}),
        "marked": (65536, {"in-use"}),
    }


def test_qemu_merges_ours_and_we_read_the_result(file, path):
    container = Container.create(file, 10 * MiB)
    container.update(
        [
            Bitmap("monday", 64 * KiB, bits(160, 3, slice(70, 80))),
            Bitmap("tuesday", 64 * KiB, bits(160, 4, slice(75, 90)), is_auto=False),
            Bitmap("broken", 64 * KiB, bits(160, 7), is_in_use=True),
        ]
    )

    qemu_img("bitmap", "--merge", "tuesday", "-f", "qcow2", path, "monday")

    assert check_code(path) == 0
    found = stored(file)
    assert found["monday"][3] == bits(160, 3, 4, slice(70, 90))
    assert found["tuesday"][3] == bits(160, 4, slice(75, 90))
    assert found["broken"] == (64 * KiB, True, True, bits(160, 7))


@pytest.mark.parametrize("cluster_size", [1 << n for n in range(9, 22)])
def test_we_go_on_with_what_qemu_made(path, cluster_size):
    size = 100 * MiB + 512
    qemu_img("create", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, size)
    qemu_img("bitmap", "--add", "-g", "64K", path, "theirs")
    qemu_img("bitmap", "--add", "--disable", "-g", "512", path, "fine")

    with open(path, "r+b") as opened:
        file = DescriptorFile(opened.fileno(), path.name)
        container = Container.open(file)
        assert container.bits("theirs") == bits(1601)
        fine = bits(204801, slice(10, 20), slice(60000, 61000), -1)
        container.update([Bitmap("fine", 512, fine), Bitmap("ours", 4096, bits(25601))])
        assert check_code(path) == 0
        qemu_img("bitmap", "--merge", "fine", path, "theirs")
        container = Container.open(file)
        container.update(remove=["ours"])

        assert check_code(path) == 0
        assert listed_bitmaps(path) == {
            "theirs": (64 * KiB, {"auto"}),
            "fine": (512, {"auto"}),
        }
        assert dirty_extents(path, "fine") == extents_of(fine, 512, size)
        assert container.bits("theirs") == bits(1601, 0, *range(468, 477), -1)


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_counts_of_each_width(path, refcount_bits):
    options = f"cluster_size=4096,refcount_bits={refcount_bits}"
    qemu_img("create", "-f", "qcow2", "-o", options, path, "64M")

    with open(path, "r+b") as opened:
        file = DescriptorFile(opened.fileno(), path.name)
        for dirty in slice(0, 100), slice(None), 5:
            container = Container.open(file)
            container.update([Bitmap("daily", 512, bits(131072, dirty))])

            assert check_code(path) == 0
            assert stored(file)["daily"][3] == bits(131072, dirty)


def test_many_operations_leave_nothing_to_complain_about(file, path):
    rng = random.Random(5)
    size, granularity = 8 * MiB, 512
    container = Container.create(file, size, 512)
    expected = {}
    for step in range(12):
        name = rng.choice("abc")
        new = expected[name].copy() if name in expected else bits(size // granularity)
        first = rng.randrange(len(new))
        end = min(len(new), first + rng.choice([1, 100, 9000]))
        new[first:end] = rng.choice([0, 1])
        changed = [(first, end)] if name in expected and step % 2 else None
        container.update([Bitmap(name, granularity, new, changed=changed)])
        expected[name] = new

        assert check_code(path) == 0
        assert {each: container.bits(each) for each in expected} == expected


def test_a_disk_with_guest_data_is_read_but_never_written(path):
    qemu_img("create", "-f", "qcow2", path, "10M")
    qemu_img("bitmap", "--add", "--enable", "-g", "64K", path, "theirs")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q 1M 128K", path], check=True
    )
    before = path.read_bytes()

    with open(path, "r+b") as opened:
        file = DescriptorFile(opened.fileno(), path.name)
        assert stored(file) == {"theirs": (64 * KiB, True, False, bits(160, 16, 17))}
        with pytest.raises(NotUsable, match="guest data"):
            Container.open(file)

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        pytest.param(["snapshot -c s FILE"], "internal snapshots", id="snapshot"),
        pytest.param(["rebase -u -F raw -b base FILE"], "backing file", id="backing"),
        pytest.param(["amend -o compat=0.10 FILE"], "version 2", id="version 2"),
    ],
)
def test_other_kinds_of_qcow2_are_not_written(path, steps, reason):
    qemu_img("create", "-f", "qcow2", path, "10M")
    for step in steps:
        qemu_img(*step.replace("FILE", str(path)).split())
    before = path.read_bytes()

    with (
        open(path, "r+b") as opened,
        pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"),
    ):
        Container.open(DescriptorFile(opened.fileno(), path.name))

    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("extended_l2=on", id="extended L2"),
        pytest.param("data_file=data.raw", id="external data"),
        pytest.param("preallocation=metadata", id="preallocated"),
        pytest.param("compression_type=zstd", id="zstd"),
    ],
)
def test_features_we_leave_alone_are_not_written(path, options, monkeypatch):
    monkeypatch.chdir(path.parent)
    qemu_img("create", "-f", "qcow2", "-o", options, path, "10M")
    before = path.read_bytes()

    with open(path, "r+b") as opened:
        file = DescriptorFile(opened.fileno(), path.name)
        assert read_contents(file).entries == {}
        with pytest.raises(NotUsable, match="can only be read"):
            Container.open(file)

    assert path.read_bytes() == before


def test_lazy_refcounts_may_stay(path):
    qemu_img("create", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "10M")

    with open(path, "r+b") as opened:
        container = Container.open(DescriptorFile(opened.fileno(), path.name))
        container.update([Bitmap("daily", 64 * KiB, bits(160, 1))])

    assert check_code(path) == 0
    assert '"lazy-refcounts": true' in qemu_img("info", "--output=json", path)
