"""Follow jobs to their end, also over a restart of the daemon."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from fleecefs.cli.daemons import MOUNT_KEY, choose
from fleecefs.cli.edge import INTERRUPTED, JOB_FAILED, complain
from fleecefs.cli.text import format_duration, format_time_left, printable
from fleecefs.errors import NotFound
from fleecefs.units import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fleecefs.control.client import Client
    from fleecefs.control.qmp import Message
    from fleecefs.control.results import Cost, Job

# How often a person sees a change, and a program gets a line.
_BAR_SECONDS = 0.5
_LINE_SECONDS = 1.0

# As long as the keeper tries to start the next daemon.
_LOST_SECONDS = 60.0
_RETRY_SECONDS = 0.1

_BAR_WIDTH = 24


def is_over(job: "Job") -> bool:
    """Whether nothing happens to a job any more."""
    return job["status"] in ("concluded", "null")


def is_settled(job: "Job") -> bool:
    """Whether a job does not come to an end unless told to."""
    return (
        is_over(job)
        or is_ready(job)
        or (job["status"] == "pending" and not job["auto-finalize"])
    )


def is_ready(job: "Job") -> bool:
    """Whether the target of a mirror is like its disk, and follows it."""
    return job["status"] in ("ready", "standby")


def follow(ids: Sequence[str], as_json: bool) -> "list[Job]":
    """Show how jobs go on, and return what they are when all have settled.

    A terminal gets a bar; a program, with --json, a line for each job every second.
    """
    if as_json:
        return _print_lines(ids)
    if sys.stdout.isatty():
        return _draw_bars(ids)
    return wait(ids, is_settled)


def wait(ids: Sequence[str], is_end: "Callable[[Job], bool]") -> "list[Job]":
    """Return what the jobs are when all have come to that."""
    *_, last = Follower(ids).states(is_end, _LINE_SECONDS)
    return last


def conclude(jobs: "list[Job]", as_json: bool) -> NoReturn:
    """Say how the jobs have ended, and exit with the status for it."""
    failed = False
    for job in jobs:
        problem = find_problem(job)
        failed |= problem is not None
        if problem is not None:
            complain(problem)
        elif not as_json:
            click.echo(printable(describe_end(job)))
    click.get_current_context().exit(JOB_FAILED if failed else 0)


def leave(ids: Sequence[str], wait: str = "wait") -> NoReturn:
    """Say that the jobs go on without us, after Ctrl-C."""
    for each in ids:
        complain(
            f"job {each} goes on: follow it with 'fleecefs job {wait} {each}',"
            f" or end it with 'fleecefs job cancel {each}'"
        )
    click.get_current_context().exit(INTERRUPTED)


def find_problem(job: "Job") -> str | None:
    """Return what went wrong with a job, if something did."""
    if job["cancelled"]:
        # Nothing else ends such a backup.
        is_endless = job["type"] == "backup" and job["sync"] == "none"
        is_normal = is_endless and job["error"] == "cancelled"
        return None if is_normal else f"job {job['id']} was {job['error']}"
    if job["error"] is not None:
        return f"job {job['id']} failed: {job['error']}"
    return None


def describe_end(job: "Job") -> str:
    """Return how a job ended well, or that it waits for people."""
    if job["status"] == "standby":
        return (
            f"job {job['id']} is ready, but rests: 'fleecefs job resume {job['id']}'"
            f" lets {job['target']} follow the disk again"
        )
    if is_ready(job):
        return (
            f"job {job['id']} is ready, {job['target']} follows the disk: next is"
            f" 'fleecefs job complete {job['id']}' or 'fleecefs job cancel {job['id']}'"
        )
    if job["status"] == "pending":
        return f"job {job['id']} waits for 'fleecefs job finalize {job['id']}'"
    elapsed = max(job["elapsed"], 1e-3)
    took = f"{format_size(job['current'])} in {format_duration(job['elapsed'])}"
    speed = f"{format_size(int(job['current'] / elapsed))}/s"
    word = "ended" if job["cancelled"] else "completed"
    waits = describe_waits(job["cost"])
    if job["type"] == "mirror":
        return f"job {job['id']} {word}: {describe_result(job)}; {took}; {waits}"
    text = f"job {job['id']} {word}: {took}, {speed}; {waits}"
    if job["fell-back"] is not None:
        text += f"; a full backup, because {job['fell-back']}"
    return text


def describe_waits(cost: "Cost") -> str:
    """Return what a job has cost the guest in time."""
    if cost["waited"] == 0:
        return "no guest write waited"
    writes = "write" if cost["waited"] == 1 else "writes"
    longest = format_duration(cost["longest-wait"])
    return f"{cost['waited']} guest {writes} waited, the longest {longest}"


def describe_space(cost: "Cost") -> str:
    """Return what a job takes to keep what the guest overwrites."""
    return ", ".join(
        f"{format_size(now)} {where} (peak {format_size(peak)})"
        for where, now, peak in (
            ("in RAM", cost["ram"], cost["ram-peak"]),
            ("on disk", cost["disk"], cost["disk-peak"]),
        )
    )


def describe_own(job: "Job") -> list[tuple[str, str]]:
    """Return what only jobs of its kind have to tell while they go on."""
    if job["type"] != "mirror":
        return [("kept", describe_space(job["cost"]))]
    if is_over(job):
        return [] if find_problem(job) else [("result", describe_result(job))]
    mode = "actively synced" if job["actively-synced"] else job["copy-mode"]
    return [("writes", f"{describe_dirtying(job)}, {mode}")]


def describe_dirtying(job: "Job") -> str:
    """Return how much a guest gives a mirror to do."""
    return f"{format_size(int(job['dirty-rate']))}/s become dirty"


def describe_result(job: "Job") -> str:
    """Return what has come of a mirror, and what that has cost the guest."""
    target, held = job["target"], format_duration(job["held"])
    what = f"the disk lives on {target} now" if job["moved"] else f"{target} is a copy"
    return f"{what}, writes were held for {held}"


def describe_pace(job: "Job") -> str:
    """Return how fast a job is and how long it takes, or why it does nothing."""
    if job["status"] in ("running", "ready"):
        speed = f"{format_size(int(job['speed-now']))}/s"
        if is_ready(job):
            return "ready, follows the disk"
        if not job.get("converges", True):
            return f"{speed}, does not converge"
        return f"{speed}, {format_time_left(job['eta'])} left"
    if job["io-status"] == "nospace":
        return f"{job['status']}: no space in target"
    if job["io-status"] == "failed":
        return f"{job['status']}: I/O error"
    return job["status"]


# -- asking


class Follower:
    """What is known of some jobs, from asking and from events.

    Events tell the end also where the daemon goes with the job, before we can ask.
    """

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        self._known: dict[str, Job] = {}

    def states(
        self, is_end: "Callable[[Job], bool]", seconds: float
    ) -> "Iterator[list[Job]]":
        """Yield what the jobs are, now and then and when it changes, until the end."""
        from fleecefs.control.client import Client, ConnectionLost, NoSuchDevice

        mount = choose(click.get_current_context().meta.get(MOUNT_KEY)).mount
        heard = time.monotonic()
        while True:
            try:
                with Client(choose(mount).socket) as client:
                    try:
                        while True:
                            jobs = self._ask(client)
                            heard = time.monotonic()
                            yield jobs
                            if all(map(is_end, jobs)):
                                return
                            self._wait_change(client, seconds)
                    except ConnectionLost:
                        self._hear_rest(client)
                        raise
            except ConnectionLost:
                if time.monotonic() - heard > _LOST_SECONDS:
                    raise
                time.sleep(_RETRY_SECONDS)
            except NoSuchDevice:
                raise
            except NotFound:
                if not self._known:
                    raise
                yield self._after_the_end()
                return

    def _ask(self, client: "Client") -> "list[Job]":
        from fleecefs.control.client import NoSuchDevice

        for each in self._ids:
            try:
                answer = client.execute("fleecefs-job-show", id=each)
            except NoSuchDevice:
                if each not in self._known:
                    raise
                # Of a kind that no other daemon goes on with.
                _lose(self._known[each], "cancelled, as its daemon has died")
            else:
                self._known[each] = cast("Job", answer)
        return list(self._known.values())

    def _wait_change(self, client: "Client", seconds: float) -> None:
        """Wait until one of the jobs has another status, or the time has come."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            event = client.next_event(left)
            if event is None or self._hear(event):
                return

    def _hear_rest(self, client: "Client") -> None:
        """Hear what a daemon had to say before it ended."""
        with contextlib.suppress(OSError):
            while (event := client.next_event(0)) is not None:
                self._hear(event)

    def _hear(self, event: "Message") -> bool:
        """Learn from an event; return whether a job has another status now."""
        data = cast("dict[str, Any]", event["data"])
        job = self._known.get(data.get("id") or data.get("device", ""))
        if job is None:
            return False
        match event["event"]:
            case "JOB_STATUS_CHANGE":
                job["status"] = data["status"]
                return True
            case "BLOCK_JOB_COMPLETED":
                job["error"] = data.get("error")
                job["current"], job["total"] = data["offset"], data["len"]
            case "BLOCK_JOB_CANCELLED":
                job["cancelled"] = True
                job["error"] = "cancelled"
        return False

    def _after_the_end(self) -> "list[Job]":
        """Return what became of jobs whose daemon has ended, and none came after it."""
        for job in self._known.values():
            _lose(job, "cancelled, as the mount has ended")
        return list(self._known.values())


def _lose(job: "Job", reason: str) -> None:
    """Say what became of a job of which no daemon knows any more."""
    if not is_over(job):
        job["status"] = "null"
        job["cancelled"] = True
        job["error"] = reason


# -- showing


def _print_lines(ids: Sequence[str]) -> "list[Job]":
    due = 0.0
    for jobs in Follower(ids).states(is_settled, _LINE_SECONDS):
        if time.monotonic() >= due or all(map(is_settled, jobs)):
            due = time.monotonic() + _LINE_SECONDS * 0.9
            for job in jobs:
                click.echo(json.dumps(job))
            sys.stdout.flush()
    return jobs


def _draw_bars(ids: Sequence[str]) -> "list[Job]":
    from rich.live import Live

    with Live(auto_refresh=False, transient=True) as live:
        for jobs in Follower(ids).states(is_settled, _BAR_SECONDS):
            live.update(_render(jobs), refresh=True)
    return jobs


def _render(jobs: "list[Job]") -> "RenderableType":
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for job in jobs:
        row = Table.grid(padding=(0, 1))
        row.add_column(min_width=max(len(each["id"]) for each in jobs))
        row.add_row(
            Text(printable(job["id"])),
            ProgressBar(max(job["total"], 1), job["current"], width=_BAR_WIDTH),
            Text(f"{format_size(job['current'])}/{format_size(job['total'])}"),
            Text(describe_pace(job)),
        )
        parts += [row, Text(f"  {describe_waits(job['cost'])}")]
        parts += [Text(f"  {title} {text}") for title, text in describe_own(job)]
    return Group(*parts)
