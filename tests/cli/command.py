"""The command line, called from a test."""

from click.testing import CliRunner

from fleecefs.cli import main


def run(*words):
    result = CliRunner().invoke(main, words, prog_name="fleecefs")
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def output_of(*words):
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def error_of(*words):
    """Return the exit code and the one line on stderr."""
    result = run(*words)
    assert result.stdout == ""
    assert result.stderr.startswith("fleecefs: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr.removeprefix("fleecefs: ").rstrip()
