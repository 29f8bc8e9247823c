"""A new image, filled in any order, by many threads, and killed at any write."""

import errno
import random
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecefs.errors import FlushFailed, NotUsable
from fleecefs.qcow2.backing import Backing
from fleecefs.qcow2.chain import Chain
from fleecefs.qcow2.image import NewImage
from fleecefs.units import GiB, KiB, MiB, TiB
from tests.qcow2.files import Killed, power_failures
from tests.qcow2.images import (
    MemoryImageFile,
    converted,
    fill,
    info,
    mapped,
    opened,
    parts,
    put,
    random_disk,
)
from tests.support.qemu import check_code, require_qemu

BASE = Backing("base.raw", "raw")


@pytest.fixture(autouse=True)
def _tools():
    require_qemu()


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "b.qcow2"


@pytest.fixture
def file(path):
    file = opened(path)
    yield file
    file.close()


@pytest.mark.parametrize(
    ("size", "offsets"),
    [
        pytest.param(1, [0], id="1 byte"),
        pytest.param(4097, [0, 4096], id="4097 bytes"),
        pytest.param(64 * KiB, [0], id="one cluster"),
        pytest.param(1 * MiB, [0, 3 * 64 * KiB, 1 * MiB - 1], id="64 KiB multiples"),
        pytest.param(1 * GiB + 512, [5, 512 * MiB, 1 * GiB], id="1 GiB and a sector"),
        pytest.param(1 * TiB, [0, 300 * GiB + 7, 1 * TiB - 3], id="sparse 1 TiB"),
    ],
)
def test_qemu_reads_what_was_written(file, path, size, offsets):
    image = NewImage.create(file, size)
    for offset in offsets:
        assert image.pwrite(b"abcdefgh"[: size - offset], offset)
    image.flush()

    assert check_code(path) == 0
    assert info(path)["virtual-size"] == -(-size // 512) * 512
    chain = Chain.open(path, size, "qcow2")
    for offset in offsets:
        wanted = b"abcdefgh"[: size - offset]
        assert chain.pread(len(wanted), offset) == wanted
    chain.close()
    if size <= 1 * MiB:
        assert any(converted(path, size))
    data = [each for each in mapped(path) if each["data"]]
    assert sum(each["length"] for each in data) <= len(offsets) * 64 * KiB


def test_an_empty_image_reads_as_zeroes(file, path):
    NewImage.create(file, 4097).flush()

    assert check_code(path) == 0
    assert converted(path, 4097) == bytes(4097)


@pytest.mark.parametrize("name", ["base.raw", "b" * 200, "x/" * 510 + "abc"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_qemu_shows_name_and_format_of_the_backing_file(file, path, name, format):
    NewImage.create(file, 4097, Backing(name, format)).flush()

    found = info(path)
    assert found["backing-filename"] == name
    assert found["backing-filename-format"] == format


@pytest.mark.parametrize(
    ("backing", "reason"),
    [
        pytest.param(Backing("nbd:host", "raw"), "protocol", id="protocol"),
        pytest.param(Backing("", "raw"), "0", id="no name"),
        pytest.param(Backing("a\0b", "raw"), "no name", id="zero byte"),
        pytest.param(Backing("a" * 1024, "raw"), "1024", id="too long"),
        pytest.param(Backing("a", "vmdk"), "neither raw nor qcow2", id="format"),
    ],
)
def test_a_backing_file_that_can_not_be_recorded_is_refused(backing, reason):
    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        NewImage.create(MemoryImageFile(), 4097, backing)


@pytest.mark.parametrize("size", [0, 3 * 1024 * TiB])
def test_a_disk_of_no_possible_size_is_refused(size):
    with pytest.raises(NotUsable, match="can have no image"):
        NewImage.create(MemoryImageFile(), size)


def test_whole_clusters_are_marked_as_zeroes_on_a_backing_file(file, path):
    size = 5 * 64 * KiB + 100
    path.with_name("base.raw").write_bytes(b"\1" * size)
    image = NewImage.create(file, size, BASE)

    image.discard(2 * 64 * KiB, 64 * KiB)
    image.zero(100, size - 100)
    image.flush()

    assert check_code(path) == 0
    zeroes = [(e["start"], e["length"]) for e in mapped(path) if not e["depth"]]
    assert zeroes == [(64 * KiB, 128 * KiB), (5 * 64 * KiB, 512)]
    assert not any(e["data"] for e in mapped(path) if not e["depth"])
    wanted = bytearray(b"\1" * size)
    wanted[64 * KiB : 192 * KiB] = bytes(128 * KiB)
    wanted[-100:] = bytes(100)
    assert converted(path, size) == wanted


def test_parts_of_a_cluster_that_are_zeroed_hide_the_backing_file(file, path):
    path.with_name("base.raw").write_bytes(b"\1" * 128 * KiB)
    image = NewImage.create(file, 128 * KiB, BASE)

    image.discard(32 * KiB, 0)
    image.discard(28 * KiB, 36 * KiB)
    image.pwrite(b"2" * 4 * KiB, 32 * KiB)
    image.flush()

    assert check_code(path) == 0
    wanted = bytes(32 * KiB) + b"2" * 4 * KiB + bytes(28 * KiB) + b"\1" * 64 * KiB
    assert converted(path, 128 * KiB) == wanted


def test_what_was_marked_as_zeroes_may_be_written(file, path):
    path.with_name("base.raw").write_bytes(b"\1" * 64 * KiB)
    image = NewImage.create(file, 64 * KiB, BASE)

    image.discard(64 * KiB, 0)
    image.pwrite(b"2" * 4 * KiB, 4 * KiB)
    image.flush()

    assert check_code(path) == 0
    wanted = bytes(4 * KiB) + b"2" * 4 * KiB + bytes(56 * KiB)
    assert converted(path, 64 * KiB) == wanted


@pytest.mark.parametrize("backing", [None, BASE], ids=["full", "backed"])
def test_what_was_written_may_be_zeroed(file, path, backing):
    path.with_name("base.raw").write_bytes(b"\1" * 128 * KiB)
    image = NewImage.create(file, 128 * KiB, backing)

    image.pwrite(b"2" * 128 * KiB, 0)
    image.discard(64 * KiB + 10, 0)
    image.flush()

    assert check_code(path) == 0
    wanted = bytes(64 * KiB + 10) + b"2" * (64 * KiB - 10)
    assert converted(path, 128 * KiB) == wanted
    assert image.allocated() < 64 * KiB * 5


def test_without_a_backing_file_zeroes_take_nothing():
    file = MemoryImageFile()
    image = NewImage.create(file, 1 * TiB)

    image.discard(1 * TiB, 0)
    image.zero(5, 100)

    assert file.history == []


def test_new_clusters_in_a_row_are_one_write(file):
    memory = MemoryImageFile()
    image = NewImage.create(memory, 16 * MiB)
    image.pwrite(b"1" * MiB, 1 * MiB)
    memory.forget()

    image.pwrite(b"2" * MiB, 4 * MiB)

    assert sorted(len(data) for _, data in memory.history) == [16 * 8, 1 * MiB]


@pytest.mark.parametrize("backing", [None, BASE], ids=["full", "backed"])
@pytest.mark.parametrize("seed", range(4))
def test_threads_fill_it_in_any_order(file, path, backing, seed):
    rng = random.Random(seed)
    size = 8 * MiB + rng.choice([0, 1, 512, 4097])
    base, disk = random_disk(rng, size), random_disk(rng, size)
    path.with_name("base.raw").write_bytes(base)
    extents = [(0, size)]
    if backing:
        # As with an incremental backup: some areas of 64 KiB have changed.
        extents = [
            (at, min(64 * KiB, size - at))
            for at in range(0, size, 64 * KiB)
            if rng.random() < 0.5
        ]
        changed, disk = disk, base[:]
        for offset, length in extents:
            disk[offset : offset + length] = changed[offset : offset + length]
    image = NewImage.create(file, size, backing)

    with ThreadPoolExecutor(4) as pool:
        for done in [
            pool.submit(put, image, disk, *part) for part in parts(rng, extents)
        ]:
            done.result()
    image.flush()

    assert check_code(path) == 0
    assert converted(path, size) == disk
    chain = Chain.open(path, size, "qcow2")
    assert chain.pread(size, 0) == disk
    chain.close()


def story(cluster_size, backing, seed=3):
    """Return size and disk, and what is put into the image in which order."""
    rng = random.Random(seed)
    size = 150 * cluster_size + 77
    disk = random_disk(rng, size)
    extents = [(at * cluster_size, 6 * cluster_size) for at in (0, 30, 100, 130)]
    extents.append((149 * cluster_size, cluster_size + 77))
    if not backing:
        extents = [(0, size)]
    order = []
    for offset, length in extents:
        half = cluster_size // 2
        order += [(offset, half), (offset + half, length - half)]
    rng.shuffle(order)
    return size, disk, order


def expected(disk, order, base):
    wanted = bytearray(base)
    for offset, length in order:
        wanted[offset : offset + length] = disk[offset : offset + length]
    return bytes(wanted)


@pytest.mark.parametrize("backing", [None, BASE], ids=["full", "backed"])
@pytest.mark.parametrize("cluster_size", [512, 64 * KiB])
def test_a_kill_at_any_write_can_be_gone_on_from(path, backing, cluster_size):
    size, disk, order = story(cluster_size, backing)
    base = b"\1" * size if backing else bytes(size)
    path.with_name("base.raw").write_bytes(base)
    events = story_until_killed(size, disk, order, backing, cluster_size, None)
    wanted = expected(disk, order, base)

    step = 1 if cluster_size == 512 else 5
    for kill_at in range(0, len(events.history), step):
        killed = story_until_killed(size, disk, order, backing, cluster_size, kill_at)
        image = NewImage.resume(killed, size, backing, cluster_size)
        fill(image, disk, order)
        image.flush()

        path.write_bytes(killed.content)
        assert check_code(path) == 0
        chain = Chain.open(path, size, "qcow2")
        assert chain.pread(size, 0) == wanted
        chain.close()


def story_until_killed(size, disk, order, backing, cluster_size, kill_at):
    file = MemoryImageFile()
    file.kill_at = kill_at
    try:
        image = NewImage.create(file, size, backing, cluster_size)
        fill(image, disk, order)
        image.flush()
    except Killed:
        file.kill_at = None
    return file


def test_a_kill_of_each_process_that_goes_on(path):
    size, disk, order = story(512, BASE)
    path.with_name("base.raw").write_bytes(bytes(size))
    file = MemoryImageFile()
    left = list(order)
    kills = 0
    is_finished = False

    while not is_finished:
        # What flush does, and a write after it, is more than 3 events.
        file.kill_at = len(file.history) + (3 if left else 100)
        try:
            image = NewImage.resume(file, size, BASE, 512)
            while left:
                put(image, disk, *left[-1])
                left.pop()
            image.flush()
            is_finished = True
        except Killed:
            kills += 1

    path.write_bytes(file.content)
    assert kills > 5
    assert check_code(path) == 0
    chain = Chain.open(path, size, "qcow2")
    assert chain.pread(size, 0) == expected(disk, order, bytes(size))
    chain.close()


def test_a_finished_image_stays_one_when_it_is_opened_again(path):
    size, disk, order = story(512, BASE)
    file = story_until_killed(size, disk, order, BASE, 512, None)
    content = bytes(file.content)

    NewImage.resume(file, size, BASE, 512).flush()

    assert file.content == content


@pytest.mark.parametrize("backing", [None, BASE], ids=["full", "backed"])
def test_writes_after_a_flush_take_the_header_away(path, backing):
    size, disk, order = story(512, backing)
    base = bytes(size)
    path.with_name("base.raw").write_bytes(base)
    file = MemoryImageFile()
    image = NewImage.create(file, size, backing, 512)

    for number, part in enumerate(order):
        put(image, disk, *part)
        if not any(disk[part[0] : part[0] + part[1]]):
            continue
        assert not any(file.content[:512])
        image.flush()
        path.write_bytes(file.content)
        assert check_code(path) == 0, number

    chain = Chain.open(path, size, "qcow2")
    assert chain.pread(size, 0) == expected(disk, order, base)
    chain.close()


def test_a_second_flush_writes_nothing():
    file = MemoryImageFile()
    image = NewImage.create(file, 1 * MiB)
    image.pwrite(b"1", 0)
    image.flush()
    file.forget()

    image.flush()

    assert file.history == [None]


@pytest.mark.parametrize("name", ["base.raw", "n" * 1000], ids=["short", "long"])
def test_a_power_failure_before_the_end_of_flush_leaves_no_image(name):
    backing = Backing(name, "raw")
    file = MemoryImageFile()
    image = NewImage.create(file, 16 * KiB, backing, 2 * KiB)
    image.pwrite(b"1" * 2 * KiB, 2 * KiB)
    image.discard(2 * KiB, 0)
    image.flush()
    whole = bytes(file.content)
    seen = set()

    for label, content in power_failures(file):
        is_image = content[:4] == b"QFI\xfb"
        seen.add(is_image)
        assert content == whole if is_image else not any(content[:512]), label

    assert seen == {True, False}


def test_a_power_failure_after_a_flush_leaves_the_image_or_none():
    file = MemoryImageFile()
    image = NewImage.create(file, 16 * KiB, None, 512)
    image.pwrite(b"1" * 512, 512)
    image.flush()
    before = bytes(file.content)
    file.forget()
    image.pwrite(b"2" * 512, 5 * 512)
    image.flush()
    after = bytes(file.content)

    for label, content in power_failures(file):
        if content[:4] == b"QFI\xfb":
            assert content in (before, after), label


def test_after_a_flush_that_failed_none_succeeds():
    file = MemoryImageFile()
    image = NewImage.create(file, 1 * MiB)
    image.pwrite(b"1", 0)
    image.flush()
    image.pwrite(b"2", 0)
    file.error = OSError(errno.EIO, "injected")
    file.flush = fail_once(file.error, file.flush)

    with pytest.raises(OSError, match="injected"):
        image.flush()

    with pytest.raises(FlushFailed, match=r"^\[?.*c.qcow2: an earlier flush failed"):
        image.flush()
    assert not any(file.content[:512])


def fail_once(error, call):
    errors = [error]

    def failing(*arguments):
        if errors:
            raise errors.pop()
        return call(*arguments)

    return failing


@pytest.mark.parametrize("nth", range(1, 40, 3))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_failed_is_tried_again(path, nth, code):
    size, disk, order = story(512, BASE)
    path.with_name("base.raw").write_bytes(bytes(size))
    file = MemoryImageFile()
    image = NewImage.create(file, size, BASE, 512)
    file.error = OSError(code, "injected")

    failures = 0
    for part in order:
        file.kill_at = len(file.history) + nth if failures < 5 else None
        try:
            put(image, disk, *part)
        except OSError:
            failures += 1
            file.kill_at = None
            put(image, disk, *part)
    file.kill_at = None
    image.flush()

    path.write_bytes(file.content)
    assert check_code(path) == 0
    chain = Chain.open(path, size, "qcow2")
    assert chain.pread(size, 0) == expected(disk, order, bytes(size))
    chain.close()


def test_a_short_write_says_how_much_was_written():
    file = MemoryImageFile()
    image = NewImage.create(file, 1 * MiB)
    image.pwrite(b"1" * 64 * KiB, 64 * KiB)
    image.pwrite(b"1" * 64 * KiB, 0)
    whole = file.pwrite
    file.pwrite = lambda data, offset: whole(data[:1000], offset)

    assert image.pwrite(b"2" * 128 * KiB, 0) == 1000


def test_an_error_after_a_part_was_written_is_told_next_time():
    file = MemoryImageFile()
    image = NewImage.create(file, 1 * MiB)
    image.pwrite(b"1" * 64 * KiB, 64 * KiB)
    image.pwrite(b"1" * 64 * KiB, 0)
    file.error = OSError(errno.ENOSPC, "injected")
    file.kill_at = len(file.history) + 1

    assert image.pwrite(b"2" * 128 * KiB, 0) == 64 * KiB
    with pytest.raises(OSError, match="injected"):
        image.pwrite(b"2" * 64 * KiB, 64 * KiB)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"something else", "is no qcow2 file", id="foreign"),
        pytest.param(
            bytes(512) + struct.pack(">Q", 3), "where nothing can be", id="unaligned"
        ),
        pytest.param(
            bytes(512) + struct.pack(">Q", 1 << 54), "where nothing can be", id="far"
        ),
        pytest.param(
            bytes(512) + struct.pack(">Q", 512) + bytes(504), "twice", id="twice"
        ),
    ],
)
def test_what_is_not_ours_is_not_gone_on_with(content, reason):
    file = MemoryImageFile(content)

    with pytest.raises(NotUsable, match=f"^c.qcow2: .*{reason}"):
        NewImage.resume(file, 16 * KiB, None, 512)

    assert file.history == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((16 * KiB + 512, None, 512), id="size"),
        pytest.param((16 * KiB, BASE, 512), id="backing"),
        pytest.param((16 * KiB, None, 1024), id="cluster size"),
    ],
)
def test_another_image_is_not_gone_on_with(arguments):
    file = MemoryImageFile()
    NewImage.create(file, 16 * KiB, None, 512).flush()
    file.forget()

    with pytest.raises(NotUsable, match="not the image that was begun"):
        NewImage.resume(file, *arguments)

    assert file.history == []


def test_a_file_with_content_is_not_begun():
    with pytest.raises(NotUsable, match=r"^c.qcow2: is not empty"):
        NewImage.create(MemoryImageFile(b"x"), 16 * KiB)


sizes = st.integers(1, 40 * 512)
ranges = st.tuples(st.booleans(), st.integers(0, 40 * 512), st.integers(1, 5000))


@given(size=sizes, steps=st.lists(ranges, max_size=12), resumes=st.integers(1, 5))
def test_it_reads_as_a_bytearray(tmp_path_factory, size, steps, resumes):
    path = tmp_path_factory.getbasetemp() / "hypothesis.qcow2"
    file = MemoryImageFile()
    image = NewImage.create(file, size, None, 512)
    model = bytearray(size)

    for number, (is_data, offset, length) in enumerate(steps):
        offset = min(offset, size - 1)
        length = min(length, size - offset)
        data = bytes([number + 1]) * length if is_data else bytes(length)
        model[offset : offset + length] = data
        put(image, model, offset, length)
        if number % resumes == 0:
            image = NewImage.resume(file, size, None, 512)
    image.flush()

    path.write_bytes(file.content)
    chain = Chain.open(path, size, "qcow2")
    assert chain.pread(size, 0) == model
    chain.close()
