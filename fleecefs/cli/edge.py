"""Where every error becomes one line on stderr and an exit status.

Below, commands raise: click's own errors for wrong usage, OSError for all that can
happen. Anything else is a bug, and its traceback is meant to be seen.
"""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click
from click.exceptions import NoArgsIsHelpError

from fleecefs.cli.text import printable
from fleecefs.errors import NotFound

FAILED = 1
NOT_FOUND = 3
JOB_FAILED = 4
INTERRUPTED = 130


class Program(click.Group):
    """A group whose errors read `fleecefs: what and why`."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: object,
    ) -> NoReturn:
        """Run the command line and exit."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A path need not be text, and a terminal need not know every letter.
            sys.stdout.reconfigure(errors="backslashreplace")
        status = FAILED
        try:
            try:
                # None from a command, a status from `ctx.exit`.
                status = super().main(args, prog_name, complete_var, False, **extra)
            finally:
                _flush_output()
        except NoArgsIsHelpError as e:
            e.show()
            status = e.exit_code
        except click.ClickException as e:
            complain(_usage(e))
            status = e.exit_code
        except click.Abort:
            status = INTERRUPTED
        except BrokenPipeError:
            # Who read our output has seen enough.
            status = FAILED
        except OSError as e:
            status = report(e)
        sys.exit(status)


def report(error: OSError) -> int:
    """Tell the user of an error, and return the exit status for it."""
    text = error.strerror or str(error)
    complain(f"{error.filename}: {text}" if error.filename else text)
    return NOT_FOUND if isinstance(error, NotFound) else FAILED


def complain(text: str) -> None:
    """Say what is wrong, on one line of stderr."""
    with contextlib.suppress(OSError):
        click.echo(f"fleecefs: {printable(' '.join(text.split()))}", err=True)


def _usage(error: click.ClickException) -> str:
    message = error.format_message()
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return message
    return f"{message.rstrip('.')}; see '{error.ctx.command_path} --help'"


def _flush_output() -> None:
    """Write out what is buffered, or drop it: the interpreter tries no second time."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
