"""Sizes in bytes, as people write and read them."""

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SUFFIXES = "KMGTPE"
_SIZE = re.compile(rf"(\d+)\s*(?:([{_SUFFIXES}])(?:iB|B)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that `64K`, `10GiB` or `4096` stand for.

    Every suffix is a power of 1024, as in qemu-img. Raises ValueError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write 4096, 64K or 10GiB")
    number, suffix = match.groups()
    power = _SUFFIXES.index(suffix.upper()) + 1 if suffix else 0
    return int(number) << (10 * power)


def format_size(size: int) -> str:
    """Return a size for people: three digits and a binary unit."""
    if size < KiB:
        return f"{size} B"
    value = float(size)
    for suffix in _SUFFIXES:
        value /= 1024
        if value < 999.5 or suffix == _SUFFIXES[-1]:
            break
    digits = 0 if value >= 99.95 or value == int(value) else 1
    return f"{value:.{digits}f} {suffix}iB"
