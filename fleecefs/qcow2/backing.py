"""The backing file of an image: its name, its format, and what may be one.

A raw disk can begin with anything its guest has written, with a header of qcow2 too,
which names a file of the host. So the format of a backing file is recorded, as QEMU
recommends, and never taken from what the file begins with alone.
"""

import os
from typing import NamedTuple

from fleecefs.errors import NotUsable
from fleecefs.qcow2.contents import naming
from fleecefs.qcow2.file import File
from fleecefs.qcow2.header import (
    AREA_MAX,
    BACKING_NAME_LENGTH_MAX,
    MAGIC,
    SECTOR,
    decode_header,
)

RAW, QCOW2 = "raw", "qcow2"


class Backing(NamedTuple):
    """A backing file as it is recorded: a relative name begins where the image is."""

    name: str
    format: str

    def check(self) -> None:
        """Raise NotUsable if an image can not have it, or QEMU would misread it."""
        check_format(self.format)
        if "\0" in self.name:
            raise NotUsable(f"backing file {self.name!r}: is no name of a file")
        length = len(os.fsencode(self.name))
        if not 0 < length <= BACKING_NAME_LENGTH_MAX:
            raise NotUsable(
                f"backing file {self.name!r}: qcow2 has room for a name of 1 to "
                f"{BACKING_NAME_LENGTH_MAX} bytes, and this one has {length}"
            )
        if ":" in self.name.partition("/")[0]:
            raise NotUsable(
                f"backing file {self.name!r}: QEMU takes what is before ':' for a "
                "protocol; begin with ./ or /"
            )


def decode_backing(name: bytes, format: bytes | None) -> Backing:
    """Return what an image has recorded, or raise NotUsable."""
    if not format:
        raise NotUsable(
            "does not record the format of its backing file; see `qemu-img rebase -u`"
        )
    backing = Backing(os.fsdecode(name), format.decode(errors="backslashreplace"))
    backing.check()
    return backing


def check_format(name: str) -> None:
    if name not in (RAW, QCOW2):
        raise NotUsable(f"format {name!r} is neither raw nor qcow2")


def disk_size_recorded(size: int) -> int:
    """Return what a header has for a disk of that size: it counts in sectors."""
    return -(-size // SECTOR) * SECTOR


def is_qcow2(area: bytes) -> bool:
    """Tell whether a file that begins so says that it is qcow2."""
    return area.startswith(MAGIC)


def find_backing_format(
    file: File, disk_size: int, told: str | None, *, option: str = "--backing-format"
) -> str:
    """Return the format of a backing file for a disk of that size.

    It is checked if it was told. Otherwise the length of the file decides, which is
    not the guest's to choose: NotUsable if that leaves both formats, or none. `option`
    is what people tell it by.
    """
    with naming(file):
        if told is None:
            return _find_format(file, disk_size, option)
        check_format(told)
        if told == QCOW2:
            _check_header(file, disk_size)
        elif file.size() != disk_size:
            raise NotUsable(_sizes(file, disk_size))
        return told


def _find_format(file: File, disk_size: int, option: str) -> str:
    is_as_long = file.size() == disk_size
    if not is_qcow2(file.pread(min(len(MAGIC), file.size()), 0)):
        if not is_as_long:
            raise NotUsable(_sizes(file, disk_size))
        return RAW
    if is_as_long:
        raise NotUsable(f"may be raw or qcow2: say which with {option}")
    try:
        _check_header(file, disk_size)
    except NotUsable as e:
        raise NotUsable(f"{e}; it {_sizes(file, disk_size)}") from None
    return QCOW2


def _check_header(file: File, disk_size: int) -> None:
    header = decode_header(file.pread(min(AREA_MAX, file.size()), 0))
    if header.size != disk_size_recorded(disk_size):
        raise NotUsable(f"is of a disk of {header.size} bytes, not {disk_size}")


def _sizes(file: File, disk_size: int) -> str:
    return f"has {file.size()} bytes, and the disk {disk_size}"
