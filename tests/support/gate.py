"""An image whose operations stay away until told to return.

With it every interleaving can be written down as a test, without a sleep: hold an
operation, wait until a thread is in it, do something else, let it go.
"""

import threading
from typing import Any

from fleecefs.block.image import Image

# Long enough for a busy machine; a test that needs it has failed.
PATIENCE = 30.0


class Stay:
    """One call that stays away."""

    def __init__(self, is_after: bool) -> None:
        self.is_after = is_after
        self._arrived = threading.Event()
        self._released = threading.Event()

    def wait_arrived(self) -> None:
        """Return when a thread is in the call."""
        assert self._arrived.wait(PATIENCE), "nobody came"

    @property
    def has_arrived(self) -> bool:
        return self._arrived.is_set()

    def release(self) -> None:
        """Let the call return."""
        self._released.set()

    def stay(self) -> None:
        self._arrived.set()
        assert self._released.wait(PATIENCE), "nobody let it go"


class Gate:
    """An image; `hold` makes the next call of an operation stay away.

    "pread" is every way to read.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self._stays: dict[str, list[Stay]] = {}
        self._lock = threading.Lock()

    def hold(self, operation: str, *, after: bool = False) -> Stay:
        """Hold the next call before it does anything, or after it has done it."""
        stay = Stay(after)
        with self._lock:
            self._stays.setdefault(operation, []).append(stay)
        return stay

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.image, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any) -> Any:
            stay = self._next_stay(name.removesuffix("_into"))
            if stay is not None and not stay.is_after:
                stay.stay()
            result = attribute(*args)
            if stay is not None and stay.is_after:
                stay.stay()
            return result

        return call

    def _next_stay(self, operation: str) -> Stay | None:
        with self._lock:
            stays = self._stays.get(operation)
            return stays.pop(0) if stays else None
