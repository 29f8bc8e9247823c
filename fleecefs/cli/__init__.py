"""The command line: a thin client of the control socket.

Each command is a module; this one puts them together. rich and the client are
imported only where something is asked or shown, so that help and completion are
quick.
"""

import click

from fleecefs import __version__
from fleecefs.cli.backup import backup
from fleecefs.cli.bitmap import bitmap
from fleecefs.cli.check import check
from fleecefs.cli.completion import completion
from fleecefs.cli.edge import Program
from fleecefs.cli.events import events
from fleecefs.cli.job import job
from fleecefs.cli.map import map_file
from fleecefs.cli.mirror import mirror
from fleecefs.cli.mount import mount
from fleecefs.cli.options import mount_option_of_program
from fleecefs.cli.restart import restart
from fleecefs.cli.snapshot import snapshot
from fleecefs.cli.status import status
from fleecefs.cli.umount import umount
from fleecefs.cli.verify import verify


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@mount_option_of_program
@click.version_option(__version__, message="fleecefs %(version)s")
def main() -> None:
    """Live disks and their snapshots, as files.

    A raw image or block device becomes a writable file for a virtual machine or
    a loop device; its snapshots are read-only files for any backup program.

    \b
    Example:
      fleecefs mount --disk web.raw=/images/web.raw /mnt/live
      fleecefs snapshot create nightly
      rsync -aS /mnt/live/snapshots/nightly/ /backup/
      fleecefs snapshot delete nightly
      fleecefs umount /mnt/live

    \b
    Exit status: 0 done, 1 refused or failed, 2 wrong usage, 3 no such daemon,
    disk, snapshot, bitmap or job, 4 the job ended with an error, 130 interrupted.
    """


for command in (
    mount,
    umount,
    restart,
    status,
    events,
    map_file,
    snapshot,
    backup,
    mirror,
    bitmap,
    verify,
    job,
    check,
    completion,
):
    main.add_command(command)
