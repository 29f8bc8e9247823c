"""fleecefs job ...: list, show, wait, and the verbs."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli import follow
from fleecefs.cli.daemons import connect
from fleecefs.cli.edge import report
from fleecefs.cli.options import complete_jobs, json_option, mount_option, size
from fleecefs.cli.text import (
    format_duration,
    format_time,
    print_json,
    print_table,
    printable,
)
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.control.client import Client
    from fleecefs.control.results import Job

_one_id = click.argument("job_id", metavar="ID", shell_complete=complete_jobs)
_ids = click.argument(
    "ids", metavar="ID...", nargs=-1, required=True, shell_complete=complete_jobs
)


@click.group(short_help="List, watch, pause and cancel jobs.")
@mount_option
def job() -> None:
    """List, watch, pause and cancel jobs.

    A job is what goes on by itself, like a backup. Its ID is the name of its disk,
    unless --job-id was given.
    """


@job.command("list")
@mount_option
@json_option
def list_jobs(as_json: bool) -> None:
    """List the jobs that have not been dismissed."""
    with connect() as client:
        answer = client.execute("fleecefs-job-list")
    if as_json:
        print_json(answer)
        return
    jobs = cast("list[Job]", answer)
    print_table(
        ["JOB", "TYPE", "STATUS", ">DONE", ">OF", ">SPEED", "TARGET"],
        [
            [
                each["id"],
                each["type"],
                each["status"],
                format_size(each["current"]),
                format_size(each["total"]),
                f"{format_size(int(each['speed-now']))}/s",
                each["target"],
            ]
            for each in jobs
        ],
    )
    for each in jobs:
        for line in _news(each):
            click.echo(printable(line))


@job.command()
@mount_option
@json_option
@_one_id
def show(as_json: bool, job_id: str) -> None:
    """Show how far a job is, and what it costs the guest.

    Also what became of one that is gone, if it was among the last.
    """
    with connect() as client:
        answer = client.execute("fleecefs-job-show", id=job_id)
    if as_json:
        print_json(answer)
        return
    _print_details(cast("Job", answer))


@job.command()
@mount_option
@click.option(
    "--json", "as_json", is_flag=True, help="Print what became of them as JSON."
)
@click.option("--ready", is_flag=True, help="Or until they are mirrors that are ready.")
@_ids
def wait(as_json: bool, ready: bool, ids: tuple[str, ...]) -> None:
    """Wait until jobs have ended. The exit status is 4 if one ended with an error.

    Ctrl-C leaves them running.
    """
    try:
        jobs = follow.wait(ids, follow.is_settled if ready else follow.is_over)
    except KeyboardInterrupt:
        follow.leave(ids)
    if as_json:
        print_json(jobs)
    follow.conclude(jobs, as_json)


def _verb(name: str, help: str) -> None:
    """Add a command that tells jobs something."""

    def tell(ctx: click.Context, ids: tuple[str, ...]) -> None:
        _tell_all(ctx, ids, lambda client, each: client.execute(f"job-{name}", id=each))

    decorated: Callable[..., None] = _ids(mount_option(click.pass_context(tell)))
    job.command(name, help=help)(decorated)


def _tell_all(
    ctx: click.Context,
    ids: tuple[str, ...],
    tell: "Callable[[Client, str], object]",
) -> None:
    """Tell jobs something, all of them; exit with the status of the first refusal."""
    from fleecefs.control.client import CommandFailed

    statuses = []
    with connect() as client:
        for each in ids:
            try:
                tell(client, each)
            except CommandFailed as e:
                # As rm: the others are told nevertheless.
                statuses.append(report(e))
    if statuses:
        ctx.exit(statuses[0])


_verb("pause", "Let jobs rest; what the guest overwrites is kept for them.")
_verb("resume", "Let jobs go on, also after a pause for an error.")
_verb("complete", "Move the disks of mirrors that are ready to their targets.")
_verb("finalize", "Let jobs end that wait for it (--no-auto-finalize).")
_verb("dismiss", "Forget jobs that have ended (--no-auto-dismiss).")


@job.command()
@mount_option
@click.option("--force", is_flag=True, help="At once, also if it is ready or paused.")
@_ids
@click.pass_context
def cancel(ctx: click.Context, force: bool, ids: tuple[str, ...]) -> None:
    """End jobs without a result, together with their group.

    A mirror that is ready ends with one: its target is a copy of the disk of this
    moment, unless it is done by force.
    """

    def tell(client: "Client", job_id: str) -> None:
        found = cast("Job", client.execute("fleecefs-job-show", id=job_id))
        if follow.is_ready(found) and not force:
            client.execute("block-job-cancel", device=job_id)
        else:
            client.execute("job-cancel", id=job_id)

    _tell_all(ctx, ids, tell)


@job.command()
@mount_option
@click.option(
    "--copy-mode",
    type=click.Choice(["background", "write-blocking"]),
    required=True,
    help="When what the guest writes comes to the target: later, or before its write"
    " is answered.",
)
@_one_id
def change(copy_mode: str, job_id: str) -> None:
    """Change how a mirror goes on: from background to write-blocking."""
    arguments = {"type": "mirror", "copy-mode": copy_mode}
    with connect() as client:
        client.execute("block-job-change", id=job_id, **arguments)


@job.command("set-speed")
@mount_option
@_one_id
@click.argument("speed", metavar="SIZE", callback=size)
def set_speed(job_id: str, speed: int) -> None:
    """Let a job copy SIZE bytes a second from now on; 0 is no limit."""
    with connect() as client:
        client.execute("block-job-set-speed", device=job_id, speed=speed)


def _news(shown: "Job") -> Iterable[str]:
    """Yield what there is to say about a job beyond its row in the list."""
    problem = follow.find_problem(shown)
    if problem is not None:
        yield problem
    elif not shown.get("converges", True):
        yield (
            f"job {shown['id']} does not converge: {follow.describe_dirtying(shown)},"
            f" {format_size(int(shown['speed-now']))}/s are copied; see 'fleecefs job"
            " change --help'"
        )
    elif shown["io-status"] != "ok":
        yield f"job {shown['id']} is {follow.describe_pace(shown)}"
    if shown["status"] == "pending" and not shown["auto-finalize"]:
        yield follow.describe_end(shown)
    if shown["fell-back"] is not None:
        yield f"job {shown['id']} is a full backup, because {shown['fell-back']}"
    if shown["restarts"]:
        times = "once" if shown["restarts"] == 1 else f"{shown['restarts']} times"
        yield f"job {shown['id']} went on after a restart of the daemon, {times}"


def _print_details(shown: "Job") -> None:
    done = f"{format_size(shown['current'])} of {format_size(shown['total'])}"
    limit = f"{format_size(shown['speed'])}/s" if shown["speed"] else "none"
    lines = {
        "job": f"{shown['id']}, {_kind(shown)}",
        "status": shown["status"],
        "disk": shown["disk"],
        "target": shown["target"],
        **_details_of_bitmap(shown),
        "started": format_time(shown["created"]),
        "elapsed": format_duration(shown["elapsed"]),
        "done": done,
        "pace": follow.describe_pace(shown),
        "limit": limit,
        "guest": follow.describe_waits(shown["cost"]),
        **dict(follow.describe_own(shown)),
    }
    if follow.is_over(shown):
        del lines["pace"]
    for title, text in lines.items():
        click.echo(f"{title:<9}{printable(text)}")
    for line in _news(shown):
        click.echo(printable(line))


def _kind(shown: "Job") -> str:
    return shown["type"] + (f", sync {shown['sync']}" if shown["sync"] else "")


def _details_of_bitmap(shown: "Job") -> dict[str, str]:
    """Return what only some backups have to do with."""
    lines = {}
    if shown["format"] != "raw":
        lines["format"] = shown["format"]
    if shown["backing"] is not None:
        lines["backing"] = shown["backing"]
    if shown["bitmap"] is not None:
        lines["bitmap"] = shown["bitmap"]
        if shown["sync"]:
            # An increment has no other mode.
            lines["bitmap"] += f", {shown['bitmap-mode'] or 'on-success'}"
    return lines
