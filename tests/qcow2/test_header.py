"""The header as bytes and as values."""

import struct

import pytest

from fleecefs.qcow2.header import Directory, check_writable, decode_header
from tests.qcow2.damage import container_file

EMPTY = decode_header(bytes(container_file().content)).with_directory(None)


def extension(kind, data):
    padding = bytes(-len(data) % 8)
    return struct.pack(">II", kind, len(data)) + data + padding


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(EMPTY, id="no bitmaps"),
        pytest.param(EMPTY.with_directory(Directory(2, 64, 512)), id="bitmaps"),
        pytest.param(EMPTY._replace(rest=b"later".ljust(8, b"\0")), id="later fields"),
    ],
)
def test_a_header_is_a_sector_and_reads_as_it_was_written(header):
    sector = header.encode()

    assert len(sector) == 512
    assert decode_header(sector) == header


def test_a_header_of_ours_byte_by_byte():
    header = EMPTY._replace(cluster_bits=16, size=2**40, l1_count=2048)

    sector = header.with_directory(Directory(3, 0x1234, 0x50000)).encode()

    assert sector[:8].hex(" ", 4) == "514649fb 00000003"
    assert sector[20:40].hex(" ", 4) == "00000010 00000100 00000000 00000000 00000800"
    assert not any(sector[72:88])
    assert sector[88:104].hex(" ", 4) == "00000000 00000001 00000004 00000068"
    assert sector[104:120].hex(" ", 4) == "23852875 00000018 00000003 00000000"
    assert sector[120:136].hex(" ", 4) == "00000000 00001234 00000000 00050000"
    assert not any(sector[136:])


def test_extensions_come_in_any_order_and_with_padding():
    bitmaps = EMPTY.with_directory(Directory(1, 32, 512)).encode()[104:136]
    start = EMPTY._replace(autoclear=1).encode()[:104]

    area = start + extension(0x6803F857, b"x" * 49) + bitmaps + extension(7, b"abc")
    header = decode_header(area)

    assert header.directory == Directory(1, 32, 512)
    assert header.has_unknown_extensions


def test_names_of_features_are_known_and_left_out():
    area = EMPTY.encode()[:104] + extension(0x6803F857, b"x" * 384)

    header = decode_header(area)

    check_writable(header)
    assert header.encode() == EMPTY.encode()


def test_the_name_of_a_backing_file_is_no_extension():
    start = EMPTY._replace(backing_file_offset=104, backing_file_size=8).encode()[:104]

    header = decode_header(start + b"base.raw" * 4)

    assert header.backing_file_size == 8
    assert not header.has_unknown_extensions
