"""How things look on a terminal or in a pipe: tables, times, JSON."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

import click


def printable(text: str) -> str:
    """Return text with control characters, and what is no text, as escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def format_time(seconds: float) -> str:
    """Return a time since 1970 as local ISO 8601."""
    local = datetime.fromtimestamp(seconds).astimezone()
    return local.isoformat(sep=" ", timespec="seconds")


def format_duration(seconds: float) -> str:
    """Return a duration for people."""
    if seconds < 0.01:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s"


def format_time_left(seconds: float | None) -> str:
    """Return how long something still takes, as 0:12 or 1:02:03, for people."""
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"


def print_json(value: object) -> None:
    """Print a result as it came, indented."""
    click.echo(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table no wider than the terminal, or than 80 columns in a pipe.

    A column whose title begins with `>` is for numbers; the last is the one that is
    folded if there is not enough room.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=column is not columns[-1],
            overflow="fold",
        )
    for row in rows:
        # Text, so that a name like [red] is a name.
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
