"""The header of a qcow2 file, version 3: bytes <-> values.

All of it that we write lies in the first sector, 512 bytes: so it is replaced as a
whole, whatever happens. That takes the bitmaps extension to the front; QEMU puts it
behind its table of feature names, where it lies across two sectors. Those names only
make messages nicer, and are left out when the header is written.

The header of an image with a backing file may take more than a sector: the name of
that file comes last, and has up to 1023 bytes. See `encode_image`.

Source: docs/interop/qcow2.rst of QEMU. Numbers in qcow2 are big-endian.
"""

import struct
from typing import NamedTuple

from fleecefs.errors import NotUsable
from fleecefs.units import KiB, MiB

SECTOR = 512

# Beyond that no header extension is looked for.
AREA_MAX = 64 * KiB

MAGIC = b"QFI\xfb"
_VERSION = 3

# Magic and version; the fields of Header up to refcount_order; the header's length.
_FIXED = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_EXTENSION = struct.Struct(">II")
_BITMAPS = struct.Struct(">IIQQ")

_END = 0
_BITMAPS_TYPE = 0x23852875
_FEATURE_NAMES_TYPE = 0x6803F857
# Ours, "flcs": programs keep what they do not know.
_IDENTITY_TYPE = 0x666C6373
_BACKING_FORMAT_TYPE = 0xE2792ACA

# Of autoclear: the bitmaps extension is up to date. A program that does not know the
# extension clears the bit when it changes the file.
_AUTOCLEAR_BITMAPS = 1

# Of incompatible: bits 0 to 4 are known, and bit 1 says that nothing may be believed.
_INCOMPATIBLE_KNOWN = 0b11111
_INCOMPATIBLE_CORRUPT = 0b00010
INCOMPATIBLE_EXTERNAL_DATA = 0b00100
INCOMPATIBLE_EXTENDED_L2 = 0b10000

# QEMU's limits: what is more makes it refuse the file.
L1_SIZE_MAX = 32 * MiB
_REFCOUNT_TABLE_SIZE_MAX = 8 * MiB
_SNAPSHOTS_MAX = 65536

BACKING_NAME_LENGTH_MAX = 1023

# Ours: 1024 bitmaps, and a directory of 1 MiB.
BITMAPS_MAX = 1024
DIRECTORY_SIZE_MAX = 1 * MiB


class Directory(NamedTuple):
    """Where the bitmap directory is, and how many entries it has."""

    entry_count: int
    length: int
    offset: int


class Header(NamedTuple):
    """The fields in their order, then what follows them.

    `rest` are fields that later versions have added. `is_void` says that there are
    bitmaps, but that some program has changed the file without them. `backing_format`
    is as it is in its extension, None if that is missing; so is `identity`, which says
    of what disk bitmaps are that move to another host.
    """

    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_count: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    rest: bytes = b""
    directory: Directory | None = None
    is_void: bool = False
    has_unknown_extensions: bool = False
    backing_format: bytes | None = None
    identity: bytes | None = None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def with_directory(self, directory: Directory | None) -> "Header":
        """Return it as it is when these are the bitmaps, and nothing else is known."""
        autoclear = _AUTOCLEAR_BITMAPS if directory else 0
        return self._replace(directory=directory, autoclear=autoclear, is_void=False)

    def encode(self) -> bytes:
        """Return the first sector of the file."""
        header = self._encode_fields()
        if self.directory:
            count, length, offset = self.directory
            header += _EXTENSION.pack(_BITMAPS_TYPE, _BITMAPS.size)
            header += _BITMAPS.pack(count, 0, length, offset)
        if self.identity is not None:
            header += _EXTENSION.pack(_IDENTITY_TYPE, len(self.identity))
            header += self.identity + bytes(-len(self.identity) % 8)
        header += _EXTENSION.pack(_END, 0)
        assert len(header) <= SECTOR, "check_writable lets no longer one pass"
        return header.ljust(SECTOR, b"\0")

    def encode_image(self, backing_name: bytes) -> bytes:
        """Return whole sectors: the header of an image without bitmaps.

        Of `self` the format of the backing file counts, not where its name lies. The
        name is empty if there is no backing file.
        """
        assert not self.directory
        assert len(backing_name) <= BACKING_NAME_LENGTH_MAX
        extensions = b""
        if self.backing_format is not None:
            length = len(self.backing_format)
            extensions = _EXTENSION.pack(_BACKING_FORMAT_TYPE, length)
            extensions += self.backing_format + bytes(-length % 8)
        extensions += _EXTENSION.pack(_END, 0)
        offset = _FIXED.size + len(self.rest) + len(extensions)
        header = self._replace(
            backing_file_offset=offset if backing_name else 0,
            backing_file_size=len(backing_name),
        )
        area = header._encode_fields() + extensions + backing_name
        return area + bytes(-len(area) % SECTOR)

    def _encode_fields(self) -> bytes:
        fields = self[: Header._fields.index("rest")]
        length = _FIXED.size + len(self.rest)
        return _FIXED.pack(MAGIC, _VERSION, *fields, length) + self.rest


def new_header(size: int, cluster_size: int, l1_offset: int) -> Header:
    """Return the header for a disk of that size, still without reference counts.

    The size is rounded up to sectors, as QEMU does, and the L1 table has room for it.
    """
    size = -(-size // SECTOR) * SECTOR
    return Header(
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=cluster_size.bit_length() - 1,
        size=size,
        crypt_method=0,
        # An entry of the L1 table stands for a cluster full of L2 entries.
        l1_count=-(-size * 8 // cluster_size**2),
        l1_offset=l1_offset,
        refcount_table_offset=0,
        refcount_table_clusters=0,
        snapshot_count=0,
        snapshots_offset=0,
        incompatible=0,
        compatible=0,
        autoclear=0,
        # 16 bits, QEMU's default too.
        refcount_order=4,
    )


def decode_header(area: bytes) -> Header:
    """Return the header at the start of a file, of which AREA_MAX bytes are wanted.

    Raises NotUsable if it is none, or beyond the limits of QEMU or of ours.
    """
    if len(area) < _FIXED.size or not area.startswith(MAGIC):
        raise NotUsable("is no qcow2 file")
    _, version, *fields, length = _FIXED.unpack_from(area)
    if version != _VERSION:
        raise NotUsable(f"is qcow2 of version {version}, not {_VERSION}")
    header = Header(*fields)
    _check_fields(header)
    # The name of a backing file lies behind the extensions.
    area = area[: header.cluster_size][: header.backing_file_offset or None]
    if length % 8 or not _FIXED.size <= length <= len(area):
        raise NotUsable(f"header has a length of {length}")
    header = header._replace(rest=area[_FIXED.size : length])
    return _with_extensions(header, _extensions(area, length))


def _check_fields(header: Header) -> None:
    if not 9 <= header.cluster_bits <= 21:
        raise NotUsable(f"has clusters of 2**{header.cluster_bits} bytes")
    if header.size % SECTOR or not 0 < header.size < 1 << 63:
        raise NotUsable(f"disk size {header.size} is not possible")
    if header.refcount_order > 6:
        raise NotUsable(f"has reference counts of 2**{header.refcount_order} bits")
    if header.incompatible & ~_INCOMPATIBLE_KNOWN:
        raise NotUsable("has features that fleecefs does not know")
    if header.incompatible & _INCOMPATIBLE_CORRUPT:
        raise NotUsable("is marked as corrupt")
    for name, length, length_max in [
        ("L1 table", header.l1_count * 8, L1_SIZE_MAX),
        (
            "refcount table",
            header.refcount_table_clusters << header.cluster_bits,
            _REFCOUNT_TABLE_SIZE_MAX,
        ),
    ]:
        if length > length_max:
            raise NotUsable(f"{name} has {length} bytes, more than {length_max}")
    if header.snapshot_count > _SNAPSHOTS_MAX:
        raise NotUsable(f"has {header.snapshot_count} snapshots")


def _extensions(area: bytes, offset: int) -> list[tuple[int, bytes]]:
    """Return type and data of all header extensions.

    An end marker may be missing where the area ends.
    """
    found = []
    while offset + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, offset)
        if kind == _END:
            break
        offset += _EXTENSION.size
        if length > len(area) - offset:
            raise NotUsable(f"header extension {kind:#x} is longer than its place")
        found.append((kind, area[offset : offset + length]))
        offset += (length + 7) // 8 * 8
    return found


def _with_extensions(header: Header, extensions: list[tuple[int, bytes]]) -> Header:
    kinds = [kind for kind, _ in extensions]
    known = {
        _BITMAPS_TYPE,
        _FEATURE_NAMES_TYPE,
        _BACKING_FORMAT_TYPE,
        _IDENTITY_TYPE,
    }
    header = header._replace(
        has_unknown_extensions=bool(set(kinds) - known),
        backing_format=dict(extensions).get(_BACKING_FORMAT_TYPE),
        identity=dict(extensions).get(_IDENTITY_TYPE),
    )
    is_current = bool(header.autoclear & _AUTOCLEAR_BITMAPS)
    if not is_current:
        return header._replace(is_void=_BITMAPS_TYPE in kinds)
    if kinds.count(_BITMAPS_TYPE) != 1:
        raise NotUsable("should have one bitmaps extension, and has not")
    return header._replace(directory=_decode_bitmaps(dict(extensions)[_BITMAPS_TYPE]))


def _decode_bitmaps(data: bytes) -> Directory:
    if len(data) != _BITMAPS.size:
        raise NotUsable(f"bitmaps extension has {len(data)} bytes")
    count, reserved, length, offset = _BITMAPS.unpack(data)
    if reserved:
        raise NotUsable("bitmaps extension is of a kind that fleecefs does not know")
    if not 1 <= count <= BITMAPS_MAX:
        raise NotUsable(f"has {count} bitmaps; fleecefs takes up to {BITMAPS_MAX}")
    if length > DIRECTORY_SIZE_MAX:
        raise NotUsable(
            f"bitmap directory has {length} bytes, more than {DIRECTORY_SIZE_MAX}"
        )
    return Directory(count, length, offset)


def check_writable(header: Header) -> None:
    """Raise NotUsable if there is something that writing could damage.

    So we write to no file with a backing file, snapshots, encryption, an external data
    file, extended L2 entries, or header extensions that we do not know.
    """
    length = _FIXED.size + len(header.rest)
    if header.identity is not None:
        length += _EXTENSION.size + len(header.identity) + 7
    room = SECTOR - 2 * _EXTENSION.size - _BITMAPS.size
    for what, is_there in [
        ("features that only its owner can change", header.incompatible),
        (
            "a backing file",
            header.backing_file_offset or header.backing_format is not None,
        ),
        ("encryption", header.crypt_method),
        ("internal snapshots", header.snapshot_count),
        (
            "header extensions that fleecefs does not know",
            header.has_unknown_extensions,
        ),
        ("a header that is too long", length > room),
    ]:
        if is_there:
            raise NotUsable(f"has {what}, so it can only be read")
