"""fleecefs completion: what a shell needs to complete our commands and names."""

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that makes a shell complete fleecefs.

    \b
    Example, for ~/.bashrc:
      eval "$(fleecefs completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ctx.find_root().command, {}, "fleecefs", "_FLEECEFS_COMPLETE")
    click.echo(script.source())
