"""The oracle: what a disk and its snapshots hold, with nothing that could go wrong."""


class DiskModel:
    """A bytearray, and the frozen copies of its snapshots by name."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.snapshots: dict[str, bytes] = {}

    def read(self, length: int, offset: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def write(self, data: bytes, offset: int) -> int:
        """Return how much was written: the end cuts it."""
        data = data[: max(0, self.size - offset)]
        self.data[offset : offset + len(data)] = data
        return len(data)

    def zero(self, length: int, offset: int) -> None:
        self.write(bytes(length), offset)

    def freeze(self, name: str) -> None:
        self.snapshots[name] = bytes(self.data)

    def forget(self, name: str) -> None:
        del self.snapshots[name]
