"""Files in memory: what was written to them since, and what a power failure leaves."""

import itertools
import struct
from collections.abc import Iterator

from bitarray import bitarray

from fleecefs.qcow2.container import Bitmap
from fleecefs.qcow2.contents import read_contents

SECTOR = 512

# So many of the writes that were not flushed are lost in every combination.
LOST_MAX = 3


class Killed(BaseException):
    """The process ends here."""


class MemoryFile:
    """A file that keeps its history: (offset, data) for a write, None for a flush.

    `kill_at` is how many of these it does before it raises Killed, or `error`.
    """

    def __init__(self, content=b"", name="c.qcow2"):
        self.name = name
        self.before = bytes(content)
        self.content = bytearray(content)
        self.history = []
        self.kill_at = None
        self.error = Killed()
        self.reads = 0

    def pread(self, length, offset):
        assert length >= 0
        assert 0 <= offset <= offset + length <= len(self.content), "outside the file"
        self.reads += length
        return bytes(self.content[offset : offset + length])

    def pwrite(self, data, offset):
        self._happens((offset, bytes(data)))
        apply(self.content, offset, data)
        return len(data)

    def flush(self):
        self._happens(None)

    def lose(self):
        """Let a flush fail now: what was written since the last one is only cached."""
        while self.history and self.history[-1] is not None:
            self.history.pop()

    def size(self):
        return len(self.content)

    def _happens(self, event):
        if self.kill_at is not None and len(self.history) >= self.kill_at:
            raise self.error
        self.history.append(event)

    def forget(self):
        """Let what is in the file be durable, and the history begin here."""
        self.before = bytes(self.content)
        self.history = []


def apply(content, offset, data):
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def power_failures(file, since=0) -> Iterator[tuple[str, bytes]]:
    """Yield all that can be left if the power fails within the file's history."""
    seen = set()
    for count in range(since, len(file.history) + 1):
        durable, pending = _split(file, count)
        for kept in _choices(pending):
            content = bytearray(durable)
            for offset, data in kept:
                apply(content, offset, data)
            if bytes(content) not in seen:
                seen.add(bytes(content))
                yield f"after {count} of {file.history}, kept {kept}", bytes(content)


def _split(file, count):
    """Return what is durable after so many events, and the writes that are not."""
    durable, pending = bytearray(file.before), []
    for event in file.history[:count]:
        if event is not None:
            pending.append(event)
            continue
        for offset, data in pending:
            apply(durable, offset, data)
        pending = []
    return durable, pending


def _choices(pending):
    for lost in range(min(LOST_MAX, len(pending)) + 1):
        for indexes in itertools.combinations(range(len(pending)), lost):
            yield [each for i, each in enumerate(pending) if i not in indexes]
            # And the other way round: only these are there.
            yield [each for i, each in enumerate(pending) if i in indexes]
    for index, write in enumerate(pending):
        for part in _torn(*write):
            yield [part]
            yield [*pending[:index], part, *pending[index + 1 :]]


def _torn(offset, data):
    """Yield beginnings and ends of a write, cut between sectors."""
    bounds = range(SECTOR - offset % SECTOR, len(data), SECTOR)
    for at in sorted({*bounds[:2], *bounds[len(bounds) // 2 :][:1], *bounds[-1:]}):
        yield offset, data[:at]
        yield offset + at, data[at:]


def stored(file):
    """Return what is in a file: (granularity, is_auto, is_in_use, bits) by name."""
    contents = read_contents(file)
    return {
        name: (
            entry.granularity,
            entry.is_auto,
            entry.is_in_use,
            contents.bits(file, name),
        )
        for name, entry in contents.entries.items()
    }


def is_there(bitmap: Bitmap):
    """Return what `stored` should have of a bitmap."""
    return bitmap.granularity, bitmap.is_auto, bitmap.is_in_use, bitmap.bits


def bits(count, *dirty):
    """Return bits, of which those with these indexes or slices are set."""
    result = bitarray(count, endian="little")
    for each in dirty:
        result[each] = 1
    return result


def check(content) -> tuple[int, int]:
    """Return how many clusters leak, and how many are in use without a count.

    As `qemu-img check`, for containers with counts of 16 bits; it shares nothing with
    the code it checks but what leads to a cluster.
    """
    file = MemoryFile(content)
    contents = read_contents(file)
    used = contents.clusters(len(content)).used
    cluster_size = contents.header.cluster_size
    counts = {}
    for index, block in enumerate(contents.blocks):
        if block:
            values = struct.unpack_from(f">{cluster_size // 2}H", content, block)
            first = index * cluster_size // 2
            counts |= {first + i: value for i, value in enumerate(values) if value}
    wanted = set(used.search(bitarray("1")))
    leaked = sum(value - (index in wanted) for index, value in counts.items())
    return leaked, len(wanted - set(counts))
