"""Kill points: named places between two steps where a test lets the daemon die.

    FLEECEFS_KILL=NAME:NTH:FILE

kills the process with SIGKILL when it reaches the place for the NTH time, as long as
the number in FILE is not 0; it is counted down first, so that the next daemon lives.
Without the variable a kill point is a call of an empty function.
"""

import os
import signal
from pathlib import Path

_ARMED = os.environ.get("FLEECEFS_KILL")

if _ARMED is None:

    def reached(name: str) -> None:
        """Do nothing: no test is running."""

else:
    _name, _nth, _file = _ARMED.split(":", 2)
    _left = int(_nth)

    def reached(name: str) -> None:
        """Die here, if it is this place's turn."""
        global _left
        if name != _name:
            return
        _left -= 1
        kills = int(Path(_file).read_text())
        if _left <= 0 and kills > 0:
            Path(_file).write_text(str(kills - 1))
            os.kill(os.getpid(), signal.SIGKILL)
