"""What can happen to a file of bits, or to a log, when nobody looks."""

import os
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    os.truncate(path, 0)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def overwrite(path: Path) -> None:
    path.write_text("something else")


def damage_header(path: Path) -> None:
    """Change a bit of the disk's id."""
    _overwrite(path, 17, bytes([path.read_bytes()[17] ^ 1]))


def make_older(path: Path) -> None:
    """Give it a version that we do not know."""
    _overwrite(path, 8, b"\x07")


def damage_end(path: Path) -> None:
    _overwrite(path, path.stat().st_size - 1, b"\xff")
