"""`python -m fleecefs` is `fleecefs`."""

from fleecefs.cli import main

main(prog_name="fleecefs")
