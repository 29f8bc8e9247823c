"""fleecefs check: look at a state directory that is not in use."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fleecefs.cli.edge import FAILED
from fleecefs.cli.options import complete_paths, json_option
from fleecefs.cli.text import print_json, printable

if TYPE_CHECKING:
    from fleecefs.state.check import Finding


@click.command(short_help="Check a state directory that is not in use.")
@click.option("--repair", is_flag=True, help="Remove what belongs to no snapshot.")
@json_option
@click.argument("state", metavar="STATE", shell_complete=complete_paths)
@click.pass_context
def check(ctx: click.Context, repair: bool, as_json: bool, state: str) -> None:
    """List what is wrong in the directory STATE, given to mount as --state.

    Only what is safe is repaired: files that belong to no snapshot. The exit status
    is 0 if nothing is wrong, or all of it has been repaired, and 1 otherwise.
    """
    from fleecefs.state import check as checking

    findings = checking.check(Path(state).absolute(), repair=repair)
    if as_json:
        print_json(
            [
                {
                    "what": finding.what,
                    "problem": finding.problem,
                    "can-repair": finding.can_repair,
                    "repaired": finding.repaired,
                }
                for finding in findings
            ]
        )
    elif not findings:
        click.echo("nothing is wrong")
    else:
        for finding in findings:
            click.echo(
                printable(f"{finding.what}: {finding.problem}{_remedy(finding)}")
            )
    if not all(finding.repaired for finding in findings):
        ctx.exit(FAILED)


def _remedy(finding: "Finding") -> str:
    if finding.repaired:
        return "; removed"
    return "; --repair removes it" if finding.can_repair else ""
