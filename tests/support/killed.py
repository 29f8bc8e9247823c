"""A call in a process of its own, which is killed at one of its kill points.

What it has written lives on, in files and on tmpfs; nothing else does, as after a
kill -9 of the daemon.
"""

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from fleecefs import killpoint


def killed_at(
    nth: int, call: Callable[..., object], *args: Any, **kwargs: Any
) -> str | None:
    """Run a call until its nth kill point, and return that; None if it has ended."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Threads of other tests, which Python warns of: ours need none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            _arm(nth, write)
            call(*args, **kwargs)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with open(read) as name:
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return name.read()
    assert os.WEXITSTATUS(status) == 0, "see the traceback above"
    return None


def _arm(nth: int, output: int) -> None:
    left = nth
    original = killpoint.reached

    def reached(name: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.write(output, name.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    for name, module in list(sys.modules.items()):
        ours = name.startswith("fleecefs.")
        if ours and getattr(module, "reached", None) is original:
            module.reached = reached  # type: ignore[attr-defined]
