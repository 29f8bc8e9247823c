"""Backups and what they lie on, read as qemu-img reads them, or refused."""

import os
import random
import resource
import struct
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleecefs.errors import NotUsable
from fleecefs.qcow2.backing import Backing
from fleecefs.qcow2.chain import FILES_MAX, Chain
from fleecefs.qcow2.header import new_header
from fleecefs.qcow2.image import NewImage
from fleecefs.units import KiB, MiB
from tests.qcow2.images import (
    MemoryImageFile,
    converted,
    fill,
    opened,
    parts,
    put,
    random_disk,
)
from tests.qcow2.test_fuzz import NUMBERS, SECONDS_MAX
from tests.support.qemu import qemu_img, require_qemu

ROUNDS = 1500
# So many of the files that we read are shown to qemu-img.
QEMU_SAMPLE = 40

OPENING = {"open", "os.open", "socket.connect", "subprocess.Popen", "os.system"}
opening = []
is_watching = False


@sys.addaudithook
def _watch(event, arguments):
    if is_watching and event in OPENING:
        opening.append((event, arguments[0]))


@contextmanager
def watching():
    """Note what is opened: an audit hook can not be removed."""
    global is_watching
    opening.clear()
    is_watching = True
    try:
        yield opening
    finally:
        is_watching = False


@pytest.fixture(autouse=True)
def _tools():
    require_qemu()


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "b.qcow2"


def read(path, size, format="qcow2"):
    chain = Chain.open(path, size, format)
    try:
        return chain.pread(size, 0)
    finally:
        chain.close()


def make(path, size, order, disk, backing=None, cluster_size=64 * KiB):
    """Write an image of what is in the order."""
    file = opened(path)
    image = NewImage.create(file, size, backing, cluster_size)
    fill(image, disk, order)
    image.flush()
    image.close()


def qemu_io(path, *commands):
    arguments = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *arguments, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("size", [3 * MiB, 3 * MiB + 4097])
def test_a_raw_disk_and_three_images_on_it(path, size):
    rng = random.Random(size)
    disk = random_disk(rng, size)
    below = path.with_name("full.raw")
    below.write_bytes(disk)
    format = "raw"
    for day in "monday", "tuesday", "wednesday":
        changed = random_disk(rng, size)
        extents = [
            (at, min(64 * KiB, size - at))
            for at in range(0, size, 64 * KiB)
            if rng.random() < 0.3
        ]
        for offset, length in extents:
            disk[offset : offset + length] = changed[offset : offset + length]
        upper = path.with_name(f"{day}.qcow2")
        order = parts(rng, extents)
        make(upper, size, order, disk, Backing(below.name, format))
        below, format = upper, "qcow2"

        assert read(upper, size) == converted(upper, size) == disk

    chain = Chain.open(below, size, "qcow2")
    for _ in range(300):
        offset = rng.randrange(size)
        length = rng.randrange(size - offset)
        assert chain.pread(length, offset) == disk[offset : offset + length]
    assert [each.stem for each in chain.paths][::3] == ["wednesday", "full"]
    chain.close()


@pytest.mark.parametrize("cluster_size", [512, 4 * KiB, 64 * KiB, 2 * MiB])
def test_images_of_qemu(path, cluster_size):
    base = path.with_name("base.qcow2")
    options = f"cluster_size={cluster_size}"
    qemu_img("create", "-f", "qcow2", "-o", options, base, "5M")
    qemu_io(base, "write -P 1 1000k 3M", "write -P 2 5119k 1k")
    where = ["-b", "base.qcow2", "-F", "qcow2"]
    qemu_img("create", "-f", "qcow2", "-o", options, *where, path, "7340544")
    qemu_io(
        path,
        "write -P 3 1500k 300k",
        "write -z 2M 1M",
        "discard 3M 512k",
        "write -P 4 7340032 512",
    )

    assert read(path, 7340544) == converted(path, 7340544)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("preallocation=metadata", id="preallocated"),
        pytest.param("compression_type=zstd", id="zstd, but nothing compressed"),
        pytest.param("lazy_refcounts=on", id="lazy counts"),
        pytest.param("refcount_bits=1", id="narrow counts"),
    ],
)
def test_kinds_of_image_that_read_alike(path, options):
    qemu_img("create", "-f", "qcow2", "-o", options, path, "5M")
    qemu_io(path, "write -P 1 1M 100k", "write -z 2M 1M")

    assert read(path, 5 * MiB) == converted(path, 5 * MiB)


def test_internal_snapshots_do_not_matter(path):
    qemu_img("create", "-f", "qcow2", path, "5M")
    qemu_io(path, "write -P 1 1M 1M")
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 2 1M 100k")

    assert read(path, 5 * MiB) == converted(path, 5 * MiB)


def test_beyond_a_shorter_backing_file_are_zeroes(path):
    bottom, middle = path.with_name("bottom.raw"), path.with_name("middle.qcow2")
    bottom.write_bytes(b"\1" * 300000)
    where = ["-b", "bottom.raw", "-F", "raw"]
    qemu_img("create", "-f", "qcow2", *where, middle, 200192)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", path, "1M")

    found = read(path, 1 * MiB)

    assert found == b"\1" * 200192 + bytes(1 * MiB - 200192)
    assert found == converted(path, 1 * MiB)


def test_a_raw_backup_is_read_whatever_it_begins_with(path):
    content = new_header(5 * MiB, 64 * KiB, 64 * KiB).encode_image(b"/etc/passwd")
    path.write_bytes(content)

    assert read(path, len(content), "raw") == content


def test_names_are_relative_to_the_file_that_has_them(path, monkeypatch):
    directory = path.with_name("sub")
    directory.mkdir()
    (directory / "base.raw").write_bytes(b"\1" * 512)
    make(directory / "middle", 512, [], b"", Backing("base.raw", "raw"))
    make(path, 512, [], b"", Backing("sub/middle", "qcow2"))

    monkeypatch.chdir("/")

    assert read(path, 512) == b"\1" * 512


@pytest.mark.parametrize("name", ["fifo", "directory", "/dev/null", "missing"])
def test_only_files_and_block_devices_are_opened(path, name):
    os.mkfifo(path.with_name("fifo"))
    path.with_name("directory").mkdir()
    make(path, 512, [], b"", Backing(name, "raw"))

    with watching() as found, pytest.raises(OSError, match=f"^.*{name}: "):
        Chain.open(path, 512, "qcow2")

    assert [where for _, where in found] == [str(path)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param("extended_l2=on", "extended L2", id="extended L2"),
        pytest.param("data_file=data.raw", "external data file", id="external data"),
        pytest.param("compat=0.10", "version 2", id="version 2"),
    ],
)
def test_features_we_do_not_read_are_refused(path, options, reason, monkeypatch):
    monkeypatch.chdir(path.parent)
    qemu_img("create", "-f", "qcow2", "-o", options, path, "10M")

    with pytest.raises(NotUsable, match=f"^{path}: .*{reason}"):
        Chain.open(path, 10 * MiB, "qcow2")


def test_compressed_clusters_are_refused(path):
    raw = path.with_name("raw")
    raw.write_bytes(b"1" * MiB)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", raw, path)

    with pytest.raises(NotUsable, match=f"^{path}: .*compressed"):
        read(path, 1 * MiB)


def test_a_backing_file_without_format_is_refused(path):
    path.with_name("base.raw").write_bytes(bytes(512))
    content = new_header(512, 512, 512).encode_image(b"base.raw")
    path.write_bytes(content.ljust(1024, b"\0"))

    with pytest.raises(NotUsable, match=f"^{path}: does not record the format"):
        Chain.open(path, 512, "qcow2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"incompatible": 2}, "corrupt", id="corrupt"),
        pytest.param({"crypt_method": 2}, "encryption", id="encryption"),
        pytest.param({"l1_offset": 513}, "begin with a cluster", id="L1 unaligned"),
        pytest.param({"l1_offset": 1 << 40}, "not within the file", id="L1 outside"),
        pytest.param({"l1_count": 0}, "L1 table has 0", id="L1 too short"),
        pytest.param({"size": 1024}, "disk of 1024 bytes, not 512", id="size"),
        pytest.param({"backing_format": b"vmdk"}, "neither raw nor", id="vmdk"),
        pytest.param({"backing_format": b"\xff"}, "neither raw nor", id="no text"),
        pytest.param({"backing_format": b""}, "does not record", id="empty format"),
    ],
)
def test_headers_that_are_refused(path, changes, reason):
    header = new_header(512, 512, 512)._replace(backing_format=b"raw")
    content = header._replace(**changes).encode_image(b"base.raw")
    path.write_bytes(content.ljust(1024, b"\0"))

    with pytest.raises(NotUsable, match=f"^{path}: .*{reason}"):
        Chain.open(path, 512, "qcow2")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(b"json:{}", "protocol", id="json"),
        pytest.param(b"nbd:host:1", "protocol", id="nbd"),
        pytest.param(b"nbd://host/x", "protocol", id="nbd with a path"),
        pytest.param(b"a\0b", "no name of a file", id="zero byte"),
        pytest.param(b"b.qcow2", "its own backing file", id="loop"),
        pytest.param(b"./b.qcow2", "its own backing file", id="loop by another name"),
    ],
)
def test_names_of_backing_files_that_are_refused(path, name, reason):
    header = new_header(512, 512, 512)._replace(backing_format=b"qcow2")
    path.write_bytes(header.encode_image(name).ljust(1024, b"\0"))

    with pytest.raises(NotUsable, match=f"b.qcow2: .*{reason}"):
        Chain.open(path, 512, "qcow2")


def test_a_longer_loop_is_refused(path):
    make(path, 512, [], b"", Backing("other", "qcow2"))
    make(path.with_name("other"), 512, [], b"", Backing(path.name, "qcow2"))

    with pytest.raises(NotUsable, match="is its own backing file"):
        Chain.open(path, 512, "qcow2")


def test_a_chain_has_a_limit_and_leaves_nothing_open(path):
    names = [path.with_name(f"{number}") for number in range(FILES_MAX + 1)]
    names[0].write_bytes(b"\1" * 512)
    for number, name in enumerate(names[1:]):
        format = "qcow2" if number else "raw"
        make(name, 512, [], b"", Backing(str(number), format))
    before = set(os.listdir("/proc/self/fd"))

    assert read(names[-2], 512) == b"\1" * 512
    with pytest.raises(NotUsable, match=f"{FILES_MAX}: is a chain of more than 64"):
        Chain.open(names[-1], 512, "qcow2")

    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("size", [511, 513])
def test_a_raw_backup_of_another_size_is_refused(path, size):
    path.write_bytes(bytes(512))

    with pytest.raises(NotUsable, match=f"disk of 512 bytes, not {size}"):
        Chain.open(path, size, "raw")


def test_a_format_we_do_not_know_is_refused(path):
    path.write_bytes(bytes(512))

    with pytest.raises(NotUsable, match="neither raw nor qcow2"):
        Chain.open(path, 512, "vmdk")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        pytest.param(1024, 1 << 62, "compressed", id="compressed"),
        pytest.param(1024, 1 << 60 | 1536, "no meaning", id="unknown bit"),
        pytest.param(1024, 1 << 40, "not within the file", id="data outside"),
        pytest.param(512, 1 << 40, "not within the file", id="L2 outside"),
        pytest.param(512, 1 << 62, "L1 table has an entry", id="L1 unknown bit"),
    ],
)
def test_tables_that_are_refused(path, at, value, reason):
    content = bytearray(new_header(512, 512, 512).encode_image(b"").ljust(2048, b"\0"))
    struct.pack_into(">Q", content, 512, 1024)
    struct.pack_into(">Q", content, 1024, 1536)
    struct.pack_into(">Q", content, at, value)
    path.write_bytes(content)

    with pytest.raises(NotUsable, match=f"^{path}: .*{reason}"):
        read(path, 512)


def test_entries_that_are_not_aligned_are_refused(path):
    content = bytearray(new_header(4096, 4096, 4096).encode_image(b""))
    content = content.ljust(16384, b"\0")
    struct.pack_into(">Q", content, 4096, 8192)
    struct.pack_into(">Q", content, 8192, 12288 + 512)
    path.write_bytes(content)

    with pytest.raises(NotUsable, match="does not begin with a cluster"):
        read(path, 4096)


changes = st.lists(
    st.tuples(st.integers(0, 59), st.integers(1, 9), st.booleans()), max_size=6
)


@given(days=st.lists(changes, min_size=1, max_size=4))
def test_days_of_changes_read_as_the_last_one(tmp_path_factory, days):
    """Clusters of 512 bytes, each written as a whole."""
    directory = tmp_path_factory.getbasetemp()
    size = 60 * 512
    disk = bytearray(size)
    backing = None
    for number, day in enumerate(days):
        file = MemoryImageFile()
        image = NewImage.create(file, size, backing, 512)
        for first, count, is_data in day:
            offset = first * 512
            length = min(count * 512, size - offset)
            value = bytes([number + 1]) if is_data else b"\0"
            disk[offset : offset + length] = value * length
            put(image, disk, offset, length)
        image.flush()
        path = directory / f"day{number}.qcow2"
        path.write_bytes(file.content)
        backing = Backing(path.name, "qcow2")

    assert read(path, size) == disk


def valid_image():
    """Return an image with all kinds of entry, on one that is its like."""
    rng = random.Random(1)
    size = 200 * 512
    file = MemoryImageFile()
    image = NewImage.create(file, size, Backing("base.qcow2", "qcow2"), 512)
    for offset, length in parts(rng, [(0, 30 * 512), (100 * 512, 40 * 512)]):
        image.pwrite(rng.randbytes(length), offset)
    image.discard(20 * 512, 60 * 512)
    image.flush()
    return size, bytes(file.content)


def mutated(rng, content):
    content = bytearray(content)
    (l1,) = struct.unpack_from(">Q", content, 40)
    places = [(at, 8) for at in (0, 8, 24, 40, 48, 72, 80, 88, 104, 112, 120)]
    places += [(at, 4) for at in (4, 16, 20, 32, 36, 56, 60, 96, 100, 104, 108)]
    places += [(l1 + 8 * index, 8) for index in range(4)]
    tables = [
        struct.unpack_from(">Q", content, l1 + 8 * index)[0] & (1 << 56) - 1
        for index in range(4)
    ]
    for _ in range(rng.choice([1, 1, 2, 5])):
        kind = rng.randrange(5)
        table = rng.choice([each for each in tables if each])
        offset, length = rng.choice([*places, (table + 8 * rng.randrange(64), 8)] * 2)
        if kind <= 1:
            value = rng.choice([*NUMBERS, rng.choice(tables), 512 * rng.randrange(200)])
            value %= 1 << 8 * length
            content[offset : offset + length] = value.to_bytes(length)
        elif kind == 2:
            content[offset + rng.randrange(length)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            at = table + 8 * rng.randrange(64)
            content[at : at + 8] = struct.pack(">Q", rng.choice(NUMBERS) % (1 << 64))
        elif rng.random() < 0.2:
            del content[rng.randrange(2048, len(content)) :]
            break
    return bytes(content)


def test_mutations_of_valid_images_are_read_or_refused(tmpfs_path):
    rng = random.Random(21)
    path = tmpfs_path / "b.qcow2"
    size, content = valid_image()
    base = tmpfs_path / "base.qcow2"
    qemu_img("create", "-f", "qcow2", base, size)
    qemu_io(base, "write -P 9 0 60k")
    accepted = []
    longest = 0.0

    for _ in range(ROUNDS):
        mutation = mutated(rng, content)
        path.write_bytes(mutation)
        start = time.perf_counter()
        with watching() as found:
            data = attempt(path, size)
        longest = max(longest, time.perf_counter() - start)
        assert all(os.fspath(where).startswith(str(tmpfs_path)) for _, where in found)
        if data is not None:
            accepted.append((mutation, data))

    assert longest < SECONDS_MAX
    assert ROUNDS // 10 < len(accepted) < ROUNDS * 9 // 10
    for mutation, data in rng.sample(accepted, QEMU_SAMPLE):
        path.write_bytes(mutation)
        agree_with_qemu(path, data)


def attempt(path, size):
    """Return the disk, None if it is refused as it should."""
    try:
        return read(path, size)
    except OSError as e:
        message = e.strerror
    assert message.startswith(str(path.parent))
    return None


def agree_with_qemu(path, data):
    """Check that QEMU reads the same, unless it refuses what does not matter to us."""
    raw = path.with_name("converted")
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw]
    if subprocess.run(command, capture_output=True).returncode == 0:
        assert raw.read_bytes()[: len(data)] == data


def test_a_hostile_image_takes_little_memory(path):
    """Its L1 table is as long as it may be, and the file is full of holes."""
    size = 512 * 64 * 2**22
    header = new_header(size, 512, 512)
    path.write_bytes(header.encode_image(b""))
    os.truncate(path, 1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    start = time.perf_counter()
    chain = Chain.open(path, size, "qcow2")
    found = [chain.pread(512, offset) for offset in range(0, size - 512, size // 50)]
    chain.close()

    assert not any(map(any, found))
    assert time.perf_counter() - start < SECONDS_MAX
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * KiB < 32 * MiB
