"""The one narrow interface that all storage speaks: files, devices, memory."""

from typing import Protocol

from fleecefs.block.extent import Mapped


class Image(Protocol):
    """Bytes at offsets. Errors are OSErrors; no method moves a position.

    Ranges lie inside the image: Disk and Store validate them once, above.
    """

    size: int

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly `length` bytes; EIO if the image has become shorter."""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer; EIO if the image has become shorter."""

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        """Write, and return how much: less than all if space ran out midway."""

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes, by the cheapest way there is."""

    def discard(self, length: int, offset: int) -> None:
        """Give the range's space back; it reads as zeroes. EOPNOTSUPP if it can not."""

    def flush(self) -> None:
        """Make everything written durable."""

    def find_data(self, offset: int) -> int:
        """Return the first byte at or after offset that is not in a hole, or size."""

    def find_hole(self, offset: int) -> int:
        """Return the first byte at or after offset that is in a hole, or size."""

    def allocated(self) -> int:
        """Return the bytes of storage the image occupies."""

    def close(self) -> None:
        """Release the storage. Nothing else may be called afterwards."""


def mapped_at(image: Image, offset: int, end: int) -> Mapped:
    """Return what [offset, ...) of a source is, data or hole, at most up to end."""
    data = image.find_data(offset)
    if data > offset:
        return Mapped(offset, min(data, end) - offset, "none")
    return Mapped(offset, min(image.find_hole(offset), end) - offset, "source")
