"""Calls in threads of their own, and who of them waits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fleecefs.block.requests import Requests
from tests.support.gate import PATIENCE


class Running:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._call = lambda: call(*args, **kwargs)
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as e:
            self._error = e

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(PATIENCE)
        assert self.is_done, "the call does not end"

    def result(self) -> Any:
        """Wait; return what the call returned, or raise what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def error(self) -> BaseException | None:
        """Wait; return what the call raised, or None."""
        self.wait()
        return self._error


class WatchedRequests(Requests):
    """Requests that tell which threads wait for others."""

    def __init__(self) -> None:
        super().__init__()
        self._waiters: set[int] = set()
        self._came = threading.Condition()

    def wait_opened(self) -> None:
        with self._as_waiter():
            super().wait_opened()

    def wait_changed(self, deadline: float) -> bool:
        with self._as_waiter():
            return super().wait_changed(deadline)

    @contextmanager
    def _as_waiter(self) -> Iterator[None]:
        ident = threading.get_ident()
        with self._came:
            self._waiters.add(ident)
            self._came.notify_all()
        try:
            yield
        finally:
            with self._came:
                self._waiters.discard(ident)

    def wait_waiting(self, running: Running) -> None:
        """Return when the call waits for a request of somebody else to end."""
        with self._came:
            came = self._came.wait_for(
                lambda: running.ident in self._waiters or running.is_done, PATIENCE
            )
        assert came, "it does not wait"
        assert not running.is_done, "it did not wait"
        # It came with the lock held: who can have it finds the thread in its wait.
        with self.lock:
            pass
