"""The /dev/fuse descriptor, and the relay of requests about names to pyfuse3.

The kernel's requests are split: data requests are answered by our own threads
(data.py), all others are passed as they are over a socket pair to pyfuse3 (names.py),
and its answers are passed back.
"""

import contextlib
import errno
import logging
import os
import socket
import threading
from pathlib import Path

from fleecefs.block.bitmap import replace_file
from fleecefs.fuse import wire

log = logging.getLogger(__name__)

# A request about names fits easily; the default buffer of a socket holds some dozens.
_SOCKET_BUFFER = 4 << 20


class Channel:
    """One FUSE connection. `names_fd` is the end for pyfuse3: mount `/dev/fd/N`.

    The answer to INIT is kept in a file, for the daemons after this one.
    """

    def __init__(self, fuse_fd: int, init_path: Path, *, is_first: bool) -> None:
        self.fd = fuse_fd
        self.is_first = is_first
        self.initialized = threading.Event()
        # Names of MKDIR and RMDIR requests that an earlier daemon may have carried out.
        self.resent: set[tuple[int, bytes]] = set()
        self._init_path = init_path
        self._init_reply = b""
        if is_first:
            init_path.unlink(missing_ok=True)
        elif init_path.exists():
            self._init_reply = init_path.read_bytes()
            self.initialized.set()
        self._ours, self._theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        for end in self._ours, self._theirs:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self._theirs.setblocking(False)
        self.names_fd = self._theirs.fileno()
        # pyfuse3 wants an INIT of its own; the answer is dropped in relay_answers.
        self._ours.send(wire.names_init())

    def initialize(self, request: bytearray, unique: int) -> None:
        """Answer the kernel's INIT."""
        self._init_reply = wire.answer_init(request)
        replace_file(self._init_path, self._init_reply)
        self.send(wire.reply(unique, self._init_reply))
        self.initialized.set()

    @property
    def can_resend(self) -> bool:
        """Whether a daemon after this one could go on; known once initialized."""
        is_denied = "FLEECEFS_NO_RESEND" in os.environ  # for tests of older kernels
        return wire.can_resend(self._init_reply) and not is_denied

    def resend(self) -> None:
        """Get every request again that an earlier daemon has not answered."""
        self.send(wire.resend())

    def relay(self, request: memoryview) -> None:
        """Pass a request about names on to pyfuse3."""
        _, opcode, unique, parent, *_ = wire.IN_HEADER.unpack_from(request)
        if unique & wire.RESENT and opcode in (wire.MKDIR, wire.RMDIR):
            # The name comes last, with a NUL at its end.
            start = wire.IN_HEADER.size + (8 if opcode == wire.MKDIR else 0)
            self.resent.add((parent, bytes(request[start:-1])))
        self._ours.send(request)

    def relay_answers(self) -> None:
        """Pass pyfuse3's answers to the kernel, until the channel is closed."""
        buffer = bytearray(wire.REQUEST_SIZE_MAX)
        self._ours.recv_into(buffer)
        while length := self._ours.recv_into(buffer):
            self.send(memoryview(buffer)[:length])

    def send(self, answer: bytes | memoryview) -> None:
        """Send an answer; nobody minds if the asker is gone (ENOENT) or all are."""
        with contextlib.suppress(FileNotFoundError):
            try:
                os.write(self.fd, answer)
            except OSError as e:
                if e.errno != errno.ENODEV:
                    raise

    def invalidate(self, inode: int) -> None:
        """Make the kernel forget a file's cached data, and wait until it has.

        It waits for reads of the file that are under way, so whoever calls must not be
        needed to serve them: a data thread may, the monitor of data threads may not.
        """
        self.send(wire.invalidate_inode(inode))

    def close_names(self) -> None:
        """End relay_answers and pyfuse3's side of the channel."""
        self._ours.shutdown(socket.SHUT_RDWR)
