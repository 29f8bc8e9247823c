"""fleecefs status: everything about a daemon at one glance."""

from typing import TYPE_CHECKING, cast

import click

from fleecefs.cli.bitmap import describe_problem
from fleecefs.cli.daemons import connect
from fleecefs.cli.follow import describe_pace, is_over
from fleecefs.cli.options import json_option, mount_option
from fleecefs.cli.snapshot import print_snapshots
from fleecefs.cli.text import format_time, print_json, print_table, printable
from fleecefs.units import format_size

if TYPE_CHECKING:
    from fleecefs.control.results import Disk, Job, Policy, RamUse, Status, StoreUse


@click.command(short_help="Show the disks, snapshots, jobs and space in use.")
@mount_option
@json_option
def status(as_json: bool) -> None:
    """Show the disks, the snapshots and the space that they take, and the jobs."""
    with connect() as client:
        answer = cast("Status", client.execute("fleecefs-status"))
    if as_json:
        print_json(answer)
        return
    _print_daemon(answer)
    click.echo()
    _print_disks(answer["disks"])
    for bitmap in answer["bitmaps"]:
        problem = describe_problem(bitmap)
        if problem is not None:
            click.echo(printable(problem))
    if answer["snapshots"]:
        click.echo()
        print_snapshots(answer["snapshots"])
    jobs = [job for job in answer["jobs"] if not is_over(job)]
    if jobs:
        click.echo()
        _print_jobs(jobs)


def _print_daemon(answer: "Status") -> None:
    policy = answer["policy"]
    store = answer["store"]
    lines = {
        "mount": answer["mount"],
        "daemon": f"fleecefs {answer['version']}, {_processes(answer)},"
        f" since {format_time(answer['started'])}",
        "state": answer["state"],
        "store": f"{store['directory']}, {_use(store)}",
        "RAM": _use(answer["ram"]),
        "policy": f"{_on_cbw_error(policy)};"
        f" snapshots survive the {policy['durability']}",
    }
    for title, text in lines.items():
        click.echo(f"{title:<8}{printable(text)}")


def _processes(answer: "Status") -> str:
    keeper = answer["keeper-pid"]
    return f"pid {answer['pid']}" + (f", keeper {keeper}" if keeper else "")


def _on_cbw_error(policy: "Policy") -> str:
    seconds = policy["cbw-timeout"]
    limit = f"after {seconds:g} s" if seconds else "no time limit"
    return f"{policy['on-cbw-error']}, {limit}"


def _use(space: "StoreUse | RamUse") -> str:
    limit = space["limit"]
    return (
        f"{format_size(space['used'])} used, peak {format_size(space['peak'])},"
        f" {'no limit' if limit is None else f'limit {format_size(limit)}'}"
    )


def _print_disks(disks: "list[Disk]") -> None:
    print_table(
        ["DISK", ">SIZE", ">CLUSTER", ">SNAPSHOTS", ">READS", ">WRITES", "SOURCE"],
        [
            [
                disk["name"],
                format_size(disk["size"]),
                format_size(disk["cluster-size"]),
                str(disk["snapshots"]),
                str(disk["reads"]),
                str(disk["writes"]),
                disk["source"],
            ]
            for disk in disks
        ],
    )
    for disk in disks:
        if disk["flush-error"] is not None:
            text = f"{disk['name']}: a flush has failed: {disk['flush-error']}"
            click.echo(printable(text))


def _print_jobs(jobs: "list[Job]") -> None:
    print_table(
        ["JOB", "TYPE", ">DONE", "PACE"],
        [[job["id"], job["type"], _percent(job), describe_pace(job)] for job in jobs],
    )


def _percent(job: "Job") -> str:
    """Return how much is done; less than 100 % as long as it is not all."""
    return f"{100 * job['current'] // max(job['total'], 1)} %"
