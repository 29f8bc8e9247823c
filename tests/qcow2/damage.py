"""Valid containers, and ways to write something else into them."""

import struct

from fleecefs.qcow2.bitmaps import encode_directory
from fleecefs.qcow2.container import Bitmap, Container
from fleecefs.qcow2.contents import read_contents
from fleecefs.qcow2.header import Directory
from fleecefs.units import KiB, MiB
from tests.qcow2.files import MemoryFile, bits

SIZE = 16 * MiB
GRANULARITY = 4 * KiB
COUNT = SIZE // GRANULARITY
CLUSTER_SIZE = 512

DAILY = Bitmap("daily", GRANULARITY, bits(COUNT, 7, slice(3000, 3500)))
WEEKLY = Bitmap("weekly", GRANULARITY, bits(COUNT, slice(None)), is_auto=False)

# Where fields are in the header, and in a directory entry.
HEADER = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing file offset": (8, 8),
    "cluster bits": (20, 4),
    "size": (24, 8),
    "crypt method": (32, 4),
    "L1 count": (36, 4),
    "L1 offset": (40, 8),
    "refcount table offset": (48, 8),
    "refcount table clusters": (56, 4),
    "snapshot count": (60, 4),
    "snapshots offset": (64, 8),
    "incompatible": (72, 8),
    "autoclear": (88, 8),
    "refcount order": (96, 4),
    "header length": (100, 4),
    "extension type": (104, 4),
    "extension length": (108, 4),
    "bitmap count": (112, 4),
    "reserved": (116, 4),
    "directory length": (120, 8),
    "directory offset": (128, 8),
    "end": (136, 4),
}
ENTRY = {
    "table offset": (0, 8),
    "table count": (8, 4),
    "flags": (12, 4),
    "kind": (16, 1),
    "granularity": (17, 1),
    "name length": (18, 2),
    "extra length": (20, 4),
    "name": (24, 1),
}


def container_file(*bitmaps, cluster_size=CLUSTER_SIZE):
    """Return a container with these bitmaps, or else with DAILY and WEEKLY."""
    file = MemoryFile()
    container = Container.create(file, SIZE, cluster_size)
    container.update(bitmaps or [DAILY, WEEKLY])
    file.forget()
    return file


def put(file, value, offset, length):
    """Write a number of so many bytes."""
    file.content[offset : offset + length] = value.to_bytes(length)


def put_header(file, field, value):
    put(file, value, *HEADER[field])


def put_entry(file, field, value):
    """Change the first entry of the directory."""
    offset, length = ENTRY[field]
    put(file, value, read_contents(file).header.directory.offset + offset, length)


def put_table(file, index, value):
    """Change the table of the first bitmap."""
    contents = read_contents(file)
    first = next(iter(contents.entries.values()))
    struct.pack_into(">Q", file.content, first.table_offset + index * 8, value)


def put_directory(file, entries):
    """Write another directory in place of the one that is there."""
    header = read_contents(file).header
    data = encode_directory(entries)
    assert len(data) <= header.cluster_size, "there is room for that"
    offset = header.directory.offset
    file.content[offset : offset + len(data)] = data
    header = header.with_directory(Directory(len(entries), len(data), offset))
    file.content[:512] = header.encode()
    file.forget()
