"""New images and their files: what is to be in them, and how QEMU reads them."""

import json
import os

from fleecefs.block.raw import RawImage
from fleecefs.qcow2.image import NewImage
from fleecefs.qcow2.imagefile import OpenFile
from tests.qcow2.files import MemoryFile
from tests.support.qemu import qemu_img

PIECE = 4096


class MemoryImageFile(MemoryFile):
    """A file in memory that an image can be written to."""

    def pread(self, length, offset):
        return bytes(self.content[offset : offset + length])

    def zero(self, length, offset):
        # A hole does not make the file longer.
        length = min(length, len(self.content) - offset)
        if length > 0:
            self.pwrite(bytes(length), offset)

    def allocated(self):
        return len(self.content)

    def close(self):
        pass


def opened(path):
    """Return a file, new or not, that an image can be written to."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    return OpenFile(RawImage(fd, 0), path.name)


def random_disk(rng, size):
    """Return a disk of pieces of 4 KiB, some of them zeroes, in runs."""
    disk = bytearray(size)
    at = 0
    while at < size:
        length = min(size - at, PIECE * rng.choice([1, 2, 5, 16, 40]))
        if rng.random() < 0.6:
            disk[at : at + length] = rng.randbytes(length)
        at += length
    return disk


def parts(rng, extents):
    """Return the extents in pieces of some 4 KiB, in any order."""
    found = []
    for offset, length in extents:
        end = offset + length
        while offset < end:
            step = PIECE * rng.choice([1, 1, 3, 16, 20])
            stop = min(end, (offset // PIECE) * PIECE + step)
            found.append((offset, stop - offset))
            offset = stop
    rng.shuffle(found)
    return found


def put(image, disk, offset, length):
    """Let the image have this range as the disk has it."""
    data = bytes(disk[offset : offset + length])
    if not any(data):
        image.discard(length, offset)
        return
    while data:
        written = image.pwrite(data, offset)
        data, offset = data[written:], offset + written


def fill(image: NewImage, disk, order):
    for offset, length in order:
        put(image, disk, offset, length)


def converted(path, size):
    """Return the disk as `qemu-img convert` reads it; the rest of it is zeroes."""
    raw = path.with_suffix(".converted")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    assert not any(data[size:])
    assert len(data) == -(-size // 512) * 512
    return data[:size]


def info(path):
    return json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))


def mapped(path):
    return json.loads(qemu_img("map", "-f", "qcow2", "--output=json", path))
