"""Ranges of bytes, and their whole clusters."""

from itertools import pairwise
from typing import NamedTuple


class Extent(NamedTuple):
    """A range of bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Mapped(NamedTuple):
    """A range of a disk or snapshot, and where its bytes are.

    `where` is "source", "ram" or "disk" (a tier of an epoch's store), or "none":
    the range reads as zeroes and no byte of it is kept anywhere.
    """

    offset: int
    length: int
    where: str

    @property
    def is_data(self) -> bool:
        return self.where != "none"

    @property
    def end(self) -> int:
        return self.offset + self.length


def clip(offset: int, length: int, size: int) -> int:
    """Return how much of a range lies before `size`."""
    return max(0, min(length, size - offset))


def pieces(offset: int, end: int, length: int) -> list[Extent]:
    """Cut [offset, end) at multiples of `length`."""
    cuts = [offset, *range((offset // length + 1) * length, end, length), end]
    return [Extent(a, b - a) for a, b in pairwise(cuts) if a < b]
