"""Files from anywhere: read, or refused with our own error, quickly and harmlessly."""

import random
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager

import pytest

from fleecefs.errors import NotUsable
from fleecefs.qcow2.bitmaps import AUTO, IN_USE, Entry, encode_directory
from fleecefs.qcow2.container import Container
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.header import Directory
from fleecefs.units import MiB
from tests.qcow2.damage import ENTRY, HEADER, container_file, put_header
from tests.qcow2.files import MemoryFile, check, stored
from tests.qcow2.test_header import EMPTY
from tests.support.qemu import listed_bitmaps, qemu_img, require_qemu

ROUNDS = 3000
SECONDS_MAX = 1.0
# So many of the files that we read are shown to qemu-img.
QEMU_SAMPLE = 40

NUMBERS = [0, 1, 2, 3, 7, 8, 9, 31, 32, 63, 64, 255, 511, 512, 513, 1024, 4096, 65536]
NUMBERS += [2**n + d for n in (20, 31, 32, 40, 55, 56, 62, 63, 64) for d in (-1, 0, 1)]

# What must not happen while a file is read, and where it is noted if it does.
HARMFUL = {"open", "os.open", "socket.connect", "subprocess.Popen", "os.system"}
harm = []
is_watching = False


@sys.addaudithook
def _watch(event, arguments):
    if is_watching and event in HARMFUL:
        harm.append((event, arguments))


@contextmanager
def watching():
    """Note what a file makes us do: an audit hook can not be removed."""
    global is_watching
    is_watching = True
    try:
        yield
    finally:
        is_watching = False


def mutated(rng, content, others):
    """Return the content with some of it replaced."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        kind = rng.randrange(6)
        places = structures(content)
        if kind <= 2:
            offset, length = rng.choice(places)
            value = rng.choice(NUMBERS) % (1 << 8 * length)
            content[offset : offset + length] = value.to_bytes(length)
        elif kind == 3:
            offset, length = rng.choice(places)
            at = min(offset + rng.randrange(length), len(content) - 1)
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 4:
            del content[rng.randrange(len(content)) :]
        else:
            other = rng.choice(others)
            at = rng.randrange(0, len(other), 512)
            content[at : at + 512] = other[at : at + 512]
        content = content or bytearray(1)
    return bytes(content)


def structures(content):
    """Return offset and length of fields that decide on anything."""
    places = list(HEADER.values())
    try:
        contents = read_contents(MemoryFile(content))
    except NotUsable:
        return places
    at = contents.header.directory.offset if contents.header.directory else 0
    for entry in contents.entries.values():
        places += [(at + offset, length) for offset, length in ENTRY.values()]
        places += [(entry.table_offset + 8 * index, 8) for index in range(2)]
        at += entry.length
    places += [(contents.header.refcount_table_offset + 8 * i, 8) for i in range(3)]
    return places


def attempt(call, *arguments):
    """Return what the call returns, None if it refuses the file as it should."""
    try:
        return call(*arguments)
    except NotUsable as e:
        message = str(e)
    assert message.startswith("c.qcow2: ")
    return None


def use(content):
    """Do with a file all there is to be done; True if it could be read."""
    file = MemoryFile(content)
    contents = attempt(read_contents, file)
    if contents is None:
        return False
    for name in contents.entries:
        attempt(contents.bits, file, name)
    container = attempt(Container.open, file)
    if container is None:
        assert file.content == content
        return True
    container.update(remove=list(contents.entries)[:1])
    return True


def originals(tmpfs_path):
    require_qemu()
    path = tmpfs_path / "theirs.qcow2"
    qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4096", path, "40M")
    for name in "one", "two":
        qemu_img("bitmap", "--add", "-g", "4096", path, name)
    return [
        path.read_bytes(),
        bytes(container_file().content),
        bytes(container_file(cluster_size=4096).content),
    ]


def test_mutations_of_valid_files_are_read_or_refused(tmpfs_path):
    rng = random.Random(20)
    files = originals(tmpfs_path)
    accepted = []
    longest = 0.0

    for _ in range(ROUNDS):
        content = mutated(rng, rng.choice(files), files)
        start = time.perf_counter()
        with watching():
            is_accepted = use(content)
        longest = max(longest, time.perf_counter() - start)
        if is_accepted and content not in files:
            accepted.append(content)

    assert harm == []
    assert longest < SECONDS_MAX
    assert ROUNDS // 10 < len(accepted) < ROUNDS * 9 // 10
    for content in rng.sample(accepted, QEMU_SAMPLE):
        agree_with_qemu(tmpfs_path / "mutated.qcow2", content)


def agree_with_qemu(path, content):
    """Check that QEMU reads the same bitmaps.

    It refuses files with foreign entries, and some for what does not matter to us.
    """
    entries = read_contents(MemoryFile(content)).entries
    if any(each.is_foreign for each in entries.values()):
        return
    path.write_bytes(content)
    command = ["qemu-img", "info", "-f", "qcow2", path]
    info = subprocess.run(command, capture_output=True, text=True)
    if info.returncode:
        assert "bitmap" not in info.stderr.lower()
        return
    flags = {IN_USE: "in-use", AUTO: "auto"}
    assert listed_bitmaps(path) == {
        name: (
            each.granularity,
            {word for flag, word in flags.items() if each.flags & flag},
        )
        for name, each in entries.items()
    }


class Sparse(MemoryFile):
    """A file that is huge, and zeroes but for its beginning."""

    def __init__(self, content, size):
        super().__init__(content)
        self._size = size

    def pread(self, length, offset):
        data = bytes(self.content[offset : offset + length])
        return data.ljust(length, b"\0")

    def size(self):
        return self._size


def huge_file():
    file = container_file()
    return Sparse(file.content, 1 << 62)


def huge_l1_and_refcount_tables():
    file = container_file()
    put_header(file, "L1 count", 2**22)
    put_header(file, "L1 offset", 2**30)
    put_header(file, "refcount table clusters", 2**14)
    put_header(file, "refcount table offset", 2**31)
    return Sparse(file.content, 1 << 35)


def huge_tables():
    """Bitmaps in use, each with a table that is far too long."""
    length = 2**20 // 4
    entries = [
        Entry(f"{number}", 16, 1, 2**26 + number * length * 8, length)
        for number in range(5)
    ]
    return with_entries(entries)


def most_clusters():
    """As many clusters of bits as there may be, each in its place."""
    length = 2**20 // 2 - 8
    entries = [
        Entry(f"{number}", 16, 1, 2**26 + number * 2**23, length) for number in range(2)
    ]
    file = with_entries(entries)
    tables = b"".join((2**28 + index * 512).to_bytes(8) for index in range(2**21))
    file.content.extend(bytes(2**26 - len(file.content)))
    file.content += tables
    return file


def most_refcount_blocks():
    file = with_entries([])
    put_header(file, "refcount table clusters", 2**14)
    put_header(file, "refcount table offset", 2**26)
    file.content.extend(bytes(2**26 - len(file.content)))
    file.content += b"".join((2**28 + i * 512).to_bytes(8) for i in range(2**20))
    return file


def longest_directory():
    entries = [
        Entry(f"{number:01000}", 16, 1, 2**26 + number * 512, 1)
        for number in range(1020)
    ]
    return with_entries(entries)


def with_entries(entries):
    """Return a huge file with this directory, and else nothing."""
    data = encode_directory(entries)
    directory = Directory(len(entries), len(data), 2**20) if entries else None
    header = EMPTY._replace(
        l1_offset=512, l1_count=8, refcount_table_offset=2**16
    ).with_directory(directory)
    content = header.encode().ljust(2**20, b"\0") + data
    return Sparse(content, 1 << 36)


@pytest.mark.parametrize(
    "make",
    [
        huge_file,
        huge_l1_and_refcount_tables,
        huge_tables,
        most_clusters,
        most_refcount_blocks,
        longest_directory,
    ],
)
def test_hostile_files_cost_little(make):
    file = make()

    start = time.process_time()
    use_sparse(file)
    seconds = time.process_time() - start

    assert seconds < 2 * SECONDS_MAX


def use_sparse(file):
    if attempt(read_contents, file):
        attempt(Container.open, file)


def test_a_hostile_file_takes_little_memory():
    file = huge_l1_and_refcount_tables()
    tracemalloc.start()

    try:
        use_sparse(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 64 * MiB


def test_the_corpus_is_valid(tmpfs_path):
    for content in originals(tmpfs_path):
        assert len(stored(MemoryFile(content))) == 2
        assert check(content) == (0, 0)
