"""The FUSE wire format as far as we speak it ourselves: linux/fuse.h, 7.31 to 7.45.

Bytes and values only, no I/O. Everything is little-endian on the machines we run on;
fuse itself is in host byte order.
"""

import errno
import os
import struct

IN_HEADER = struct.Struct("<IIQQIIIHH")  # len opcode unique nodeid uid gid pid …
OUT_HEADER = struct.Struct("<IiQ")  # len error unique

# Opcode, unique, file handle, offset, size, flags of a READ or WRITE in one go: half
# the cost of the loop. Both requests have these fields at the same places.
HOT_REQUEST = struct.Struct("<4xIQ24xQQI12xI")
WRITE_DATA = 80  # where the data of a WRITE begins
WRITE_REPLY = struct.Struct("<IiQII")

OPEN_IN = struct.Struct("<I")  # flags
OPEN_OUT = struct.Struct("<QII")  # fh open_flags
FALLOCATE_IN = struct.Struct("<QQQI")  # fh offset length mode
LSEEK_IN = struct.Struct("<QQI")  # fh offset whence
LSEEK_OUT = struct.Struct("<Q")
FSYNC_IN = struct.Struct("<Q")  # fh
INIT_IN = struct.Struct("<IIIII")  # major minor max_readahead flags flags2
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")

NOTIFY_INVAL_INODE_OUT = struct.Struct("<Qqq")  # inode offset length
NOTIFY_INVAL_INODE = 2
NOTIFY_RESEND = 7  # from 6.9 on

# In `unique`: the request has been sent before, to a daemon that did not answer.
RESENT = 1 << 63

MKDIR = 9
RMDIR = 11

FORGET = 2
OPEN = 14
READ = 15
WRITE = 16
RELEASE = 18
FSYNC = 20
FLUSH = 25
INIT = 26
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
FALLOCATE = 43
LSEEK = 46
COPY_FILE_RANGE = 47
COPY_FILE_RANGE_64 = 53

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6

ASYNC_READ = 1 << 0
BIG_WRITES = 1 << 5
DO_READDIRPLUS = 1 << 13
ASYNC_DIO = 1 << 15
MAX_PAGES = 1 << 22
HANDLE_KILLPRIV_V2 = 1 << 28
INIT_EXT = 1 << 30
DIRECT_IO_ALLOW_MMAP = 1 << 36
HAS_RESEND = 1 << 39

# No writeback cache: dirty pages would reach us after a snapshot's instant.
# HANDLE_KILLPRIV_V2: without it the kernel asks for security.capability before every
# write, which makes 2k instead of 100k writes a second.
WANTED = (
    ASYNC_READ
    | BIG_WRITES
    | DO_READDIRPLUS
    | ASYNC_DIO
    | MAX_PAGES
    | HANDLE_KILLPRIV_V2
    | INIT_EXT
    | DIRECT_IO_ALLOW_MMAP
    | HAS_RESEND
)

# The largest READ or WRITE; MAX_PAGES lets the kernel make them so.
IO_SIZE_MAX = 1 << 20
# Room for the largest request, header and arguments included.
REQUEST_SIZE_MAX = IO_SIZE_MAX + 4096

# Asynchronous requests the kernel has under way at most; then its users wait.
_MAX_BACKGROUND = 64

# With FOPEN_DIRECT_IO these flags of a WRITE are all there is of a guest's FUA.
DURABLE = os.O_SYNC | os.O_DSYNC


def answer_init(request: bytes | bytearray) -> bytes:
    """Return the payload that answers INIT; EPROTO for a kernel too old."""
    major, minor, readahead, low, high = INIT_IN.unpack_from(request, IN_HEADER.size)
    if major != 7 or minor < 31:
        raise OSError(
            errno.EPROTO, f"FUSE {major}.{minor}: a kernel from 5.4 on needed"
        )
    offered = low | (high << 32 if low & INIT_EXT else 0)
    flags = offered & WANTED
    return INIT_OUT.pack(
        7,
        min(minor, 41),
        readahead,
        flags & 0xFFFFFFFF,
        _MAX_BACKGROUND,
        _MAX_BACKGROUND * 3 // 4,
        IO_SIZE_MAX,
        1,  # time granularity, ns
        IO_SIZE_MAX // 4096,
        0,
        flags >> 32,
    )


def can_resend(init_reply: bytes) -> bool:
    """Tell from the answer to INIT whether the kernel can send requests again."""
    _, _, _, low, _, _, _, _, _, _, high = INIT_OUT.unpack(init_reply)
    return bool((low | high << 32) & HAS_RESEND)


def names_init() -> bytes:
    """Return an INIT request for pyfuse3: a kernel that offers what names need."""
    arguments = INIT_IN.pack(7, 36, 0, ASYNC_READ | BIG_WRITES | DO_READDIRPLUS, 0)
    arguments = arguments.ljust(64, b"\0")
    length = IN_HEADER.size + len(arguments)
    return IN_HEADER.pack(length, INIT, 2, 0, 0, 0, 0, 0, 0) + arguments


def reply(unique: int, payload: bytes = b"") -> bytes:
    """Return a successful answer."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(payload), 0, unique) + payload


def invalidate_inode(inode: int) -> bytes:
    """Return a notification that makes the kernel forget what it cached of a file."""
    payload = NOTIFY_INVAL_INODE_OUT.pack(inode, 0, 0)
    return (
        OUT_HEADER.pack(OUT_HEADER.size + len(payload), NOTIFY_INVAL_INODE, 0) + payload
    )


def resend() -> bytes:
    """Return a notification that makes the kernel send unanswered requests again."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


def error_reply(unique: int, code: int) -> bytes:
    """Return an answer that fails with an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)
