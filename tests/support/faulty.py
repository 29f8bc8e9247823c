"""Images that fail when told to."""

import errno
from collections.abc import Callable
from typing import Any

from fleecefs.block.image import Image


class Faulty:
    """An image that fails the nth call of one operation, and some more after it.

    "pread" is every way to read.
    """

    def __init__(
        self,
        image: Image,
        *,
        on: str = "",
        nth: int = 1,
        code: int = errno.EIO,
        count: int = 1,
    ) -> None:
        self.image = image
        self.fired = 0
        self.is_paused = False
        self.arm(on, nth=nth, code=code, count=count)

    def arm(
        self, on: str, *, nth: int = 1, code: int = errno.EIO, count: int = 1
    ) -> None:
        """Fail calls `nth` to `nth + count - 1` from now on."""
        self._on, self._code = on, code
        self._wait, self._left = nth, count

    def disarm(self) -> None:
        self.arm("")

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.image, name)
        is_armed = self._on and not self.is_paused
        if is_armed and name.removesuffix("_into") == self._on:
            return self._failing(name, attribute)
        return attribute

    def _failing(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any) -> Any:
            self._wait -= 1
            if self._wait <= 0 and self._left > 0:
                self._left -= 1
                self.fired += 1
                raise OSError(self._code, f"injected into {name}")
            return call(*args)

        return failing


class Full:
    """An image on storage that fills up: a write is cut short, the next one fails."""

    def __init__(self, image: Image, room: int) -> None:
        self.image = image
        self.room = room

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        if data and not self.room:
            raise OSError(errno.ENOSPC, "no space left")
        written = min(len(data), self.room)
        self.room -= written
        return self.image.pwrite(data[:written], offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image, name)
