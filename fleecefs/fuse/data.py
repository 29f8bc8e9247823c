"""Data requests: threads that read from /dev/fuse, serve, and answer.

The hot path of the whole project. A request is 6 microseconds of the interpreter: READ
and WRITE come first, with as few steps as possible, everything else after them.

One point turns errors into errnos: `_answer`.

Each thread has a request buffer of its own. Threads that block must not stop the
others: a monitor starts more while requests wait and the processor has time to spare,
and lets them end again.
"""

import errno
import logging
import os
import random
import select
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from fleecefs.block.disk import Disk, drained
from fleecefs.block.raw import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE
from fleecefs.block.snapshot import Snapshot
from fleecefs.errors import Abandoned, Busy, NoSpace, NotFound, ReadOnly, Unsupported
from fleecefs.fuse import wire
from fleecefs.fuse.channel import Channel
from fleecefs.killpoint import reached

log = logging.getLogger(__name__)

# Two threads saturate an interpreter on page-cached storage; more only compete for it:
# under copy-before-write, 68k writes a second with two, 50k with four.
_THREADS_MIN = 2
# As many requests as the kernel sends asynchronously can wait for storage at a time.
_THREADS_MAX = 64

# How often the monitor looks, while requests are waiting and while none is.
_BUSY_TICK = 0.005
# How many threads the monitor asks the kernel about at a time.
_SAMPLE_COUNT = 4
_IDLE_TICK_MAX = 1.0

# How long the end waits for requests that hang in storage.
_END_SECONDS = 10.0

# How long after the beginning of a daemon the second half of an open(2) may come that
# the daemon before began.
_EARLIER_SECONDS = 10.0

# Nothing of a live disk is cached: a write is in the snapshot or not when it returns.
_LIVE_FLAGS = wire.FOPEN_DIRECT_IO | wire.FOPEN_PARALLEL_DIRECT_WRITES
# A snapshot never changes. Cached, with the kernel's read-ahead, small reads (tar's are
# 10 KiB) come at 0.8 GB/s and more; not cached, at 0.3. When it breaks or is deleted,
# the inventory has the cache invalidated.
_SNAPSHOT_FLAGS = wire.FOPEN_KEEP_CACHE

File = Disk | Snapshot


class Worker:
    """A data thread and its buffer; the request in it starts with its length."""

    def __init__(self) -> None:
        self.buffer = bytearray(wire.REQUEST_SIZE_MAX)
        self.view = memoryview(self.buffer)
        self.served = 0
        # The request in the buffer has been given to another thread.
        self.relieved = threading.Event()

    def request(self) -> bytes:
        length = int.from_bytes(self.view[:4], "little")
        return bytes(self.view[:length])


class DataThreads:
    """Serve the data requests of a mount until it is unmounted."""

    def __init__(self, channel: Channel, files: Mapping[int, File]) -> None:
        self._channel = channel
        self._files = files
        self._workers: dict[int, Worker] = {}
        self._threads: set[threading.Thread] = set()
        self._wanted = _THREADS_MIN
        self._ended = threading.Event()
        self._stopping = False
        self._drained = ExitStack()
        # Who opened what for writing last: see `opened_by`.
        self._opened: dict[int, int] = {}
        self._begun = time.monotonic()

    def run(self) -> None:
        """Serve until the kernel says that the mount is gone."""
        for _ in range(_THREADS_MIN):
            self._start(Worker())
        self._monitor()
        if self._stopping:
            return  # threads that wait for a request end with the process
        deadline = time.monotonic() + _END_SECONDS
        for thread in list(self._threads):
            thread.join(max(0, deadline - time.monotonic()))
            if thread.is_alive():
                log.error("a data thread hangs in storage; ended without it")

    def stop(self) -> None:
        """Serve no request any more; return when none that writes is running.

        The disks stay drained, for a thread that has just got a request. The kernel
        keeps waiting for answers until the descriptor is closed.
        """
        self._stopping = True
        try:
            self._drained = drained(list(self._disks()))
        except Busy as e:
            log.error("ending without waiting any longer: %s", e.strerror)
        self._ended.set()

    def opened_by(self, pid: int, inode: int) -> bool:
        """Tell, once, whether a process has just opened a file for writing.

        The kernel makes open(O_TRUNC) an OPEN followed by a SETATTR of size 0, which
        looks like truncate(2) but for the OPEN before it. Of an OPEN that an earlier
        daemon answered we know nothing: the SETATTR comes right after it.
        """
        age = time.monotonic() - self._begun
        may_be_earlier = not self._channel.is_first and age < _EARLIER_SECONDS
        return self._opened.pop(pid, None) == inode or may_be_earlier

    # -- the threads

    def _start(self, worker: Worker, *, has_request: bool = False) -> None:
        self._start_thread(self._serve, worker, has_request)

    def _start_thread(self, function: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(
            target=self._run_thread, args=(function, *args), name="data", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def _run_thread(self, function: Callable[..., None], *args: object) -> None:
        try:
            function(*args)
        finally:
            self._threads.discard(threading.current_thread())

    def _serve(self, worker: Worker, has_request: bool) -> None:
        ident = threading.get_ident()
        self._workers[ident] = worker
        try:
            if has_request:
                self._answer(worker)
            self._serve_requests(worker)
        except Abandoned:
            # Another thread answers the request in this buffer. Until that has it, we
            # stay, and so does the key that we are found by.
            worker.relieved.wait()
        finally:
            self._workers.pop(ident, None)

    def _serve_requests(self, worker: Worker) -> None:
        fd, vector = self._channel.fd, [worker.buffer]
        readv, answer = os.readv, self._answer
        while len(self._workers) <= self._wanted:
            try:
                readv(fd, vector)
            except OSError as e:
                if e.errno == errno.ENODEV:
                    self._ended.set()
                    return
                # ENOENT: the request was interrupted before we got it.
                continue
            if self._stopping:
                return
            worker.served += 1
            answer(worker)

    def _answer(self, worker: Worker) -> None:
        """Serve the request in a worker's buffer and answer it."""
        opcode, unique, fh, offset, size, flags = wire.HOT_REQUEST.unpack_from(
            worker.buffer
        )
        try:
            if opcode == wire.READ:
                data = self._files[fh].read(size, offset)
                header = wire.OUT_HEADER.pack(16 + len(data), 0, unique)
                os.writev(self._channel.fd, (header, data))
            elif opcode == wire.WRITE:
                written = self._files[fh].write(
                    worker.view[80 : 80 + size], offset, flags & wire.DURABLE != 0
                )
                reached("write.unanswered")
                os.write(
                    self._channel.fd, wire.WRITE_REPLY.pack(24, 0, unique, written, 0)
                )
            else:
                self._answer_other(opcode, unique, worker)
        except OSError as e:
            self._channel.send(wire.error_reply(unique, e.errno or errno.EIO))
        except KeyError:
            # The file of a snapshot that has been deleted.
            self._channel.send(wire.error_reply(unique, errno.EIO))
        except Abandoned:
            # Somebody else answers it.
            raise
        except Exception:
            log.exception("a request with opcode %d failed", opcode)
            self._channel.send(wire.error_reply(unique, errno.EIO))

    def _answer_other(self, opcode: int, unique: int, worker: Worker) -> None:
        serve = self._SERVES.get(opcode)
        if serve is not None:
            self._channel.send(wire.reply(unique, serve(self, worker.buffer)))
        elif opcode in self._SILENT:
            return
        elif opcode == wire.INIT:
            self._channel.initialize(worker.buffer, unique)
        else:
            length = int.from_bytes(worker.view[:4], "little")
            self._channel.relay(worker.view[:length])

    # INTERRUPT needs no answer: what runs is soon done. FORGET has none: inodes live as
    # long as what they stand for.
    _SILENT = frozenset((wire.INTERRUPT, wire.FORGET, wire.BATCH_FORGET))

    # -- one method a request; each returns the payload of the answer

    def _open(self, buffer: bytearray) -> bytes:
        _, _, _, inode, _, _, pid, _, _ = wire.IN_HEADER.unpack_from(buffer)
        (flags,) = wire.OPEN_IN.unpack_from(buffer, 40)
        file = self._files.get(inode)
        if file is None:
            raise NotFound("the file is gone")
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            if not isinstance(file, Disk):
                raise ReadOnly("a snapshot is read-only")
            if len(self._opened) > 1000:
                self._opened.clear()
            self._opened[pid] = inode
        # A handle is the inode number, so that a restarted daemon can serve it.
        if isinstance(file, Disk):
            return wire.OPEN_OUT.pack(inode, _LIVE_FLAGS, 0)
        return wire.OPEN_OUT.pack(inode, _SNAPSHOT_FLAGS, 0)

    def _flush(self, buffer: bytearray) -> bytes:
        """Answer close(2). Nothing is made durable by it; there is FSYNC for that."""
        pid = wire.IN_HEADER.unpack_from(buffer)[6]
        self._opened.pop(pid, None)
        return b""

    def _nothing(self, buffer: bytearray) -> bytes:
        return b""

    def _fsync(self, buffer: bytearray) -> bytes:
        (fh,) = wire.FSYNC_IN.unpack_from(buffer, 40)
        self._files[fh].flush()
        return b""

    def _fallocate(self, buffer: bytearray) -> bytes:
        fh, offset, length, mode = wire.FALLOCATE_IN.unpack_from(buffer, 40)
        disk = self._files[fh]
        if not isinstance(disk, Disk):
            raise ReadOnly("a snapshot is read-only")
        if mode == PUNCH_HOLE | KEEP_SIZE:
            disk.discard(length, offset)
        elif mode == ZERO_RANGE | KEEP_SIZE:
            disk.zero(min(length, max(0, disk.size - offset)), offset)
        elif mode == ZERO_RANGE:
            if offset + length > disk.size:
                raise NoSpace("a disk does not grow")
            disk.zero(length, offset)
        else:
            raise Unsupported(f"fallocate mode {mode:#x}")
        return b""

    def _lseek(self, buffer: bytearray) -> bytes:
        fh, offset, whence = wire.LSEEK_IN.unpack_from(buffer, 40)
        file = self._files[fh]
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "not a search for data or holes")
        find = file.find_data if whence == os.SEEK_DATA else file.find_hole
        found = find(offset) if offset < file.size else file.size
        if offset >= file.size or (whence == os.SEEK_DATA and found == file.size):
            raise OSError(errno.ENXIO, "nothing there")
        return wire.LSEEK_OUT.pack(found)

    def _copy_file_range(self, buffer: bytearray) -> bytes:
        # The kernel copies by reading and writing, and does not ask again.
        raise OSError(errno.ENOSYS, "not implemented")

    _SERVES = {  # noqa: RUF012
        wire.OPEN: _open,
        wire.RELEASE: _nothing,
        wire.FLUSH: _flush,
        wire.DESTROY: _nothing,
        wire.FSYNC: _fsync,
        wire.FALLOCATE: _fallocate,
        wire.LSEEK: _lseek,
        wire.COPY_FILE_RANGE: _copy_file_range,
        wire.COPY_FILE_RANGE_64: _copy_file_range,
    }

    # -- the monitor

    def _monitor(self) -> None:
        """Keep enough threads running, and relieve those whose copy hangs."""
        poller = select.poll()
        poller.register(self._channel.fd, select.POLLIN)
        while not self._ended.is_set():
            timeouts = [disk.history.timeout / 4 for disk in self._disks()]
            if poller.poll(min(_IDLE_TICK_MAX, *timeouts) * 1000):
                served = self._served()
                self._ended.wait(_BUSY_TICK)
                blocked = self._blocked()
                if not poller.poll(0):
                    pass
                elif served == self._served() or blocked == _SAMPLE_COUNT:
                    self._add_thread()
                elif not blocked:
                    self._wanted = max(_THREADS_MIN, self._wanted - 1)
            else:
                self._wanted = max(_THREADS_MIN, self._wanted - 1)
            if any(disk.has_late(time.monotonic()) for disk in self._disks()):
                # Breaking a snapshot may have to wait for reads, which need threads.
                self._start_thread(self._relieve)

    def _served(self) -> int:
        return sum(worker.served for worker in list(self._workers.values()))

    def _blocked(self) -> int:
        """Return how many of some threads wait for storage: state D (proc(5))."""
        threads = list(self._threads)
        return sum(
            _state(random.choice(threads)) == "D"
            for _ in range(_SAMPLE_COUNT if threads else 0)
        )

    def _disks(self) -> Iterable[Disk]:
        return [file for file in self._files.values() if isinstance(file, Disk)]

    def _add_thread(self) -> None:
        if len(self._threads) < _THREADS_MAX:
            self._wanted = len(self._workers) + 1
            self._start(Worker())

    def _relieve(self) -> None:
        """Serve the requests of threads whose copy is over its time elsewhere."""
        now = time.monotonic()
        for disk in self._disks():
            for ident, error in disk.expire(now).items():
                # Taken out: a thread that hangs does not count as one that serves.
                hanging = self._workers.pop(ident)
                request = hanging.request()
                hanging.relieved.set()
                worker = Worker()
                worker.view[: len(request)] = request
                if error is None:
                    self._start(worker, has_request=True)
                else:
                    unique = wire.HOT_REQUEST.unpack_from(request)[1]
                    code = error.errno or errno.EIO
                    self._channel.send(wire.error_reply(unique, code))


def _state(thread: threading.Thread) -> str:
    """Return what the kernel says a thread of ours is doing: one letter."""
    try:
        status = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return ""  # it has ended just now
    return status.rpartition(") ")[2][:1]
