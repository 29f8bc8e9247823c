"""Calls in threads of their own, and who of them waits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from fleecefs.block.requests import Requests
from tests.support.gate import PATIENCE

# Threads that wait for a request to end, and for a lock; whoever changes them tells.
_for_requests: set[int] = set()
_for_locks: set[int] = set()
_told = threading.Condition()


@contextmanager
def _among(waiters: set[int]) -> Iterator[None]:
    ident = threading.get_ident()
    with _told:
        waiters.add(ident)
        _told.notify_all()
    try:
        yield
    finally:
        with _told:
            waiters.discard(ident)


class Running:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._call = lambda: call(*args, **kwargs)
        self._result: Any = None
        self._error: BaseException | None = None
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as e:
            self._error = e
        with _told:
            self._has_ended = True
            _told.notify_all()

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def result(self) -> Any:
        """Wait; return what the call returned, or raise what it raised."""
        error = self.error()
        if error is not None:
            raise error
        return self._result

    def error(self) -> BaseException | None:
        """Wait; return what the call raised, or None."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the call does not end"
        return self._error

    def wait_waiting(self) -> bool:
        """Return True when it waits for a request to end, False when it has ended."""
        return self._wait_stopped(_for_requests)

    def wait_stuck(self) -> bool:
        """Return True when it waits for a request or a lock, False once ended."""
        return self._wait_stopped(_for_requests, _for_locks)

    def _wait_stopped(self, *waiters: set[int]) -> bool:
        with _told:
            came = _told.wait_for(
                lambda: self._has_ended or any(self.ident in w for w in waiters),
                PATIENCE,
            )
            assert came, "it neither waits nor ends"
            return not self._has_ended


class WatchedLock:
    """A lock that tells who waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release = self._lock.release
        self.locked = self._lock.locked

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._lock.acquire(False):
            return True
        if not blocking:
            return False
        with _among(_for_locks):
            return self._lock.acquire(True, timeout)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class WatchedRequests(Requests):
    """Requests that tell which threads wait for others."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = WatchedLock()  # type: ignore[assignment]
        self._changed = threading.Condition(self.lock)  # type: ignore[arg-type]

    def wait_opened(self) -> None:
        with _among(_for_requests):
            super().wait_opened()

    def wait_changed(self, deadline: float) -> bool:
        with _among(_for_requests):
            return super().wait_changed(deadline)

    def wait_waiting(self, running: Running) -> None:
        """Return when the call waits for a request of somebody else to end."""
        assert running.wait_waiting(), "it did not wait"
        # It came with the lock held: who can have it finds the thread in its wait.
        with self.lock:
            pass
