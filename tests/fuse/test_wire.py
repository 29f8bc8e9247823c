"""FUSE's wire format: bytes as the kernel sends and expects them (linux/fuse.h)."""

import errno
import os
import struct

import pytest

from fleecefs.fuse import wire

# struct fuse_in_header: len opcode unique nodeid uid gid pid total_extlen padding
HEADER = "<IIQQIIIHH"

ALL_FLAGS = (1 << 64) - 1


def request(
    opcode: int, arguments: bytes, *, unique: int = 7, inode: int = 16
) -> bytes:
    length = 40 + len(arguments)
    return struct.pack(HEADER, length, opcode, unique, inode, 1, 2, 3, 0, 0) + arguments


def init_request(
    minor: int = 41, flags: int = ALL_FLAGS, *, major: int = 7, readahead: int = 131072
) -> bytes:
    """Return struct fuse_init_in as a kernel from 5.17 on sends it."""
    low, high = flags & 0xFFFFFFFF, flags >> 32
    arguments = struct.pack("<IIIII44x", major, minor, readahead, low, high)
    return request(26, arguments, unique=2, inode=0)


class InitOut:
    """struct fuse_init_out, taken apart."""

    def __init__(self, reply: bytes) -> None:
        assert len(reply) == 64
        (
            self.major,
            self.minor,
            self.readahead,
            low,
            self.max_background,
            self.congestion_threshold,
            self.max_write,
            self.time_granularity,
            self.max_pages,
            self.map_alignment,
            high,
        ) = struct.unpack("<IIIIHHIIHHI28x", reply)
        self.flags = low | high << 32


# -- INIT


def test_init_is_answered_with_what_we_want():
    answer = wire.answer_init(init_request())

    out = InitOut(answer)
    assert (out.major, out.minor, out.readahead) == (7, 41, 131072)
    assert out.max_write == 1 << 20
    assert out.max_pages == 256
    assert out.time_granularity == 1
    assert 0 < out.congestion_threshold <= out.max_background
    assert out.flags == wire.WANTED
    assert wire.can_resend(answer)


@pytest.mark.parametrize(
    ("bit", "wanted"),
    [
        pytest.param(0, True, id="ASYNC_READ"),
        pytest.param(3, False, id="ATOMIC_O_TRUNC"),
        pytest.param(13, True, id="DO_READDIRPLUS"),
        pytest.param(15, True, id="ASYNC_DIO"),
        pytest.param(16, False, id="WRITEBACK_CACHE"),
        pytest.param(22, True, id="MAX_PAGES"),
        pytest.param(27, False, id="HANDLE_KILLPRIV"),
        pytest.param(28, True, id="HANDLE_KILLPRIV_V2"),
        pytest.param(30, True, id="INIT_EXT"),
        pytest.param(36, True, id="DIRECT_IO_ALLOW_MMAP"),
        pytest.param(37, False, id="PASSTHROUGH"),
        pytest.param(39, True, id="HAS_RESEND"),
    ],
)
def test_init_negotiates(bit, wanted):
    offered = InitOut(wire.answer_init(init_request()))
    withheld = InitOut(wire.answer_init(init_request(flags=ALL_FLAGS & ~(1 << bit))))

    assert bool(offered.flags >> bit & 1) == wanted
    assert not withheld.flags >> bit & 1


def test_init_of_a_kernel_without_the_second_word_of_flags():
    answer = wire.answer_init(init_request(flags=ALL_FLAGS & ~wire.INIT_EXT))

    assert InitOut(answer).flags >> 32 == 0
    assert not wire.can_resend(answer)


@pytest.mark.parametrize(
    ("theirs", "answered"),
    [
        pytest.param(31, 31, id="oldest"),
        pytest.param(38, 38, id="debian-12"),
        pytest.param(99, 41, id="newer-than-we-know"),
    ],
)
def test_init_speaks_the_older_of_both_versions(theirs, answered):
    assert InitOut(wire.answer_init(init_request(theirs))).minor == answered


@pytest.mark.parametrize(
    ("major", "minor"),
    [
        pytest.param(7, 30, id="kernel-5.1"),
        pytest.param(6, 41, id="major-older"),
        pytest.param(8, 0, id="major-newer"),
    ],
)
def test_init_of_an_unknown_kernel_is_refused(major, minor):
    with pytest.raises(OSError) as e:
        wire.answer_init(init_request(minor, major=major))

    assert e.value.errno == errno.EPROTO
    assert f"FUSE {major}.{minor}" in str(e.value)


def test_init_for_names_is_one_that_a_kernel_could_send():
    request = wire.names_init()

    length, opcode, unique, inode = struct.unpack_from("<IIQQ", request)
    major, minor, _, low, high = struct.unpack_from("<IIIII", request, 40)
    assert (length, opcode, inode) == (len(request), 26, 0)
    assert len(request) == 40 + 64
    assert unique
    assert (major, high) == (7, 0)
    # Without it flags2 does not count, and libfuse expects the short request.
    assert not low & wire.INIT_EXT
    assert minor >= 31


# -- the hot path


def test_read_request_is_decoded():
    # struct fuse_read_in: fh offset size read_flags lock_owner flags padding
    arguments = struct.pack("<QQIIQII", 16, 1 << 40, 4096, 0, 9, os.O_DIRECT, 0)

    decoded = wire.HOT_REQUEST.unpack_from(request(15, arguments, unique=123))

    assert decoded == (wire.READ, 123, 16, 1 << 40, 4096, os.O_DIRECT)


@pytest.mark.parametrize(
    ("flags", "is_durable"),
    [
        pytest.param(os.O_WRONLY, False, id="plain"),
        pytest.param(os.O_RDWR | os.O_DIRECT, False, id="O_DIRECT"),
        pytest.param(os.O_WRONLY | os.O_DSYNC, True, id="O_DSYNC"),
        pytest.param(os.O_WRONLY | os.O_SYNC, True, id="O_SYNC"),
        pytest.param(0o4010000, True, id="as-seen-for-RWF_SYNC"),
        pytest.param(0o10000, True, id="as-seen-for-RWF_DSYNC"),
    ],
)
def test_write_request_is_decoded(flags, is_durable):
    # struct fuse_write_in: fh offset size write_flags lock_owner flags padding
    arguments = struct.pack("<QQIIQII", 17, 8192, 5, 2, 9, flags, 0)
    message = request(16, arguments + b"hello", unique=1 << 63)

    opcode, unique, fh, offset, size, found = wire.HOT_REQUEST.unpack_from(message)

    assert (opcode, unique, fh, offset, size) == (wire.WRITE, 1 << 63, 17, 8192, 5)
    assert message[wire.WRITE_DATA : wire.WRITE_DATA + size] == b"hello"
    assert bool(found & wire.DURABLE) == is_durable


def test_write_reply():
    reply = wire.WRITE_REPLY.pack(24, 0, 5, 4096, 0)

    # struct fuse_out_header: len error unique; struct fuse_write_out: size padding
    assert reply == struct.pack("<IiQ", 24, 0, 5) + struct.pack("<II", 4096, 0)


# -- the others


@pytest.mark.parametrize(
    ("layout", "arguments", "values"),
    [
        pytest.param(
            wire.OPEN_IN,
            struct.pack("<II", os.O_RDWR, 0),
            (os.O_RDWR,),
            id="open",
        ),
        pytest.param(
            wire.FALLOCATE_IN,
            struct.pack("<QQQII", 16, 4096, 8192, 3, 0),
            (16, 4096, 8192, 3),
            id="fallocate",
        ),
        pytest.param(
            wire.LSEEK_IN,
            struct.pack("<QQII", 16, 4096, os.SEEK_HOLE, 0),
            (16, 4096, os.SEEK_HOLE),
            id="lseek",
        ),
        pytest.param(wire.FSYNC_IN, struct.pack("<QII", 16, 1, 0), (16,), id="fsync"),
    ],
)
def test_arguments_are_decoded(layout, arguments, values):
    assert layout.unpack_from(request(0, arguments), 40) == values


def test_header_is_decoded():
    decoded = wire.IN_HEADER.unpack_from(request(14, b"", unique=9, inode=18))

    assert decoded == (40, wire.OPEN, 9, 18, 1, 2, 3, 0, 0)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        pytest.param(wire.OPEN_OUT, 16, id="fuse_open_out"),
        pytest.param(wire.LSEEK_OUT, 8, id="fuse_lseek_out"),
        pytest.param(wire.OUT_HEADER, 16, id="fuse_out_header"),
        pytest.param(wire.INIT_OUT, 64, id="fuse_init_out"),
    ],
)
def test_answers_have_the_size_that_the_kernel_expects(layout, size):
    assert layout.size == size


@pytest.mark.parametrize("payload", [b"", b"x", b"payload" * 1000])
def test_reply(payload):
    reply = wire.reply(1 << 60, payload)

    assert reply == struct.pack("<IiQ", 16 + len(payload), 0, 1 << 60) + payload


def test_error_reply():
    assert wire.error_reply(3, errno.ENOSPC) == struct.pack("<IiQ", 16, -28, 3)


def test_opcodes_are_those_of_the_kernel():
    names = ["FORGET", "OPEN", "READ", "WRITE", "RELEASE", "FSYNC", "FLUSH", "INIT"]
    names += ["INTERRUPT", "DESTROY", "BATCH_FORGET", "FALLOCATE", "LSEEK"]
    names += ["COPY_FILE_RANGE", "COPY_FILE_RANGE_64"]

    assert [getattr(wire, name) for name in names] == [
        *(2, 14, 15, 16, 18, 20, 25, 26),
        *(36, 38, 42, 43, 46),
        *(47, 53),
    ]


# -- notifications: the code is where an answer has its error, unique is 0


def test_invalidation_of_all_that_is_cached_of_a_file():
    notification = wire.invalidate_inode(18)

    # struct fuse_notify_inval_inode_out: ino off len; length 0 is up to the end.
    assert notification == struct.pack("<IiQ", 40, 2, 0) + struct.pack("<Qqq", 18, 0, 0)


def test_call_for_unanswered_requests():
    assert wire.resend() == struct.pack("<IiQ", 16, 7, 0)


@pytest.mark.parametrize("offered", [True, False])
def test_kernel_that_can_resend_is_told_by_the_answer_to_init(offered):
    flags = ALL_FLAGS if offered else ALL_FLAGS & ~(1 << 39)

    reply = wire.answer_init(init_request(flags=flags))

    assert wire.can_resend(reply) == offered
