"""Reading a backup: an image, its backing file, the backing file of that, and so on.

Any number of threads may read at once. Whatever is wrong with a file, or of a kind that
fleecefs does not read, is a NotUsable that names the file; see layers.py.
"""

import os
from functools import partial
from pathlib import Path
from typing import Self

from fleecefs.errors import NotUsable
from fleecefs.qcow2.backing import QCOW2, check_format, disk_size_recorded
from fleecefs.qcow2.layers import Image, Layer, Opened, Raw, clear, naming_path

# Far more than anybody restores from: each takes a descriptor, and time to read.
FILES_MAX = 64


class Chain:
    """A disk as a backup has it; it can only be read."""

    def __init__(self, size: int) -> None:
        """Use `open`."""
        self.size = size
        self._layers: list[Layer] = []

    @classmethod
    def open(cls, path: Path, size: int, format: str) -> Self:
        """Open the backup of a disk of that size, and all files it needs."""
        chain = cls(size)
        try:
            chain._push(path, format)
            chain._check_size()
            while backing := chain._layers[-1].backing:
                directory = chain._layers[-1].file.path.parent
                chain._push(directory / backing.name, backing.format)
        except BaseException:
            chain.close()
            raise
        return chain

    @property
    def paths(self) -> list[Path]:
        """All its files, the backup itself first."""
        return [layer.file.path for layer in self._layers]

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly `length` bytes."""
        data = bytearray(length)
        self.pread_into(memoryview(data), offset)
        return bytes(data)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer."""
        assert 0 <= offset <= offset + len(buffer) <= self.size
        self._read(0, buffer, offset)

    def close(self) -> None:
        """Nothing may be read afterwards."""
        while self._layers:
            os.close(self._layers.pop().file.fd)

    def _push(self, path: Path, format: str) -> None:
        if len(self._layers) == FILES_MAX:
            raise NotUsable(f"{self.paths[0]}: is a chain of more than {FILES_MAX}")
        file = Opened.open(path)
        try:
            with naming_path(path):
                self._layers.append(self._layer(file, format))
        except BaseException:
            os.close(file.fd)
            raise

    def _layer(self, file: Opened, format: str) -> Layer:
        for layer in self._layers:
            if os.path.samestat(layer.file.status, file.status):
                raise NotUsable("is its own backing file")
        check_format(format)
        return Image(file) if format == QCOW2 else Raw(file)

    def _check_size(self) -> None:
        layer = self._layers[0]
        wanted = self.size
        if not isinstance(layer, Raw):
            wanted = disk_size_recorded(wanted)
        # A device may be larger than the disk whose copy is on it.
        elif layer.file.is_device and layer.size > wanted:
            return
        if layer.size != wanted:
            raise NotUsable(
                f"{layer.file.path}: is of a disk of {layer.size} bytes, "
                f"not {self.size}"
            )

    def _read(self, depth: int, buffer: memoryview, offset: int) -> None:
        """Fill the buffer as it is from this layer on."""
        if depth == len(self._layers):
            clear(buffer)
            return
        layer = self._layers[depth]
        # A backing file may be shorter than what lies on it.
        length = max(0, min(len(buffer), layer.size - offset))
        clear(buffer[length:])
        layer.read(buffer[:length], offset, partial(self._read, depth + 1))
