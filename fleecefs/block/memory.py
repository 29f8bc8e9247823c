"""An image in memory: for tests, and as the model of what an image is."""

import threading

# Holes are tracked in pages of this size, as tmpfs does.
_PAGE = 4096


class MemoryImage:
    """A bytearray as an image; a page never written is a hole."""

    def __init__(self, size: int, data: bytes = b"") -> None:
        self.size = size
        self.data = bytearray(size)
        self.durable = bytes(self.data)
        self._pages: set[int] = set()
        self._lock = threading.Lock()
        if data:
            self.pwrite(data, 0)

    def pread(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        with self._lock:
            self.data[offset : offset + len(data)] = data
            self._pages.update(self._touched(len(data), offset))
        return len(data)

    def zero(self, length: int, offset: int) -> None:
        self.discard(length, offset)

    def discard(self, length: int, offset: int) -> None:
        with self._lock:
            self.data[offset : offset + length] = bytes(length)
            first, stop = -(-offset // _PAGE), (offset + length) // _PAGE
            self._pages.difference_update(range(first, stop))

    def flush(self) -> None:
        self.durable = bytes(self.data)

    def find_data(self, offset: int) -> int:
        return self._find(offset, True)

    def find_hole(self, offset: int) -> int:
        return self._find(offset, False)

    def _find(self, offset: int, present: bool) -> int:
        while offset < self.size and (offset // _PAGE in self._pages) != present:
            offset = (offset // _PAGE + 1) * _PAGE
        return min(offset, self.size)

    def allocated(self) -> int:
        return len(self._pages) * _PAGE

    def close(self) -> None:
        pass

    @staticmethod
    def _touched(length: int, offset: int) -> range:
        return range(offset // _PAGE, -(-(offset + length) // _PAGE))
