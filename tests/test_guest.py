"""A virtual machine runs on a live file while its daemon is killed, again and again."""

import pytest

from fleecefs.units import MiB
from tests.support.guest import Guest, make_initramfs, unpack_kernel
from tests.support.killer import DIED, Killer
from tests.support.mount import run, wait_until

KILLS = 10

# What a kernel says when its disk does not do what it should.
COMPLAINTS = ["I/O error", "EXT4-fs error", "FAILED", "hung_task", "blocked for more"]


@pytest.mark.logs(DIED)
def test_a_guest_does_not_notice(mounted, tmp_path):
    kernel = unpack_kernel(tmp_path / "kernel")
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(make_initramfs(kernel))
    mount = mounted({"vda.raw": 64 * MiB})

    with Guest(kernel, initramfs, mount.live("vda.raw")) as guest:
        guest.wait_rounds(1)
        with Killer(mount, KILLS) as killer:
            wait_until(lambda: killer.ended, "the last kill", 120)
        guest.wait_rounds(guest.rounds + 2)
        guest.stop()

    assert killer.kills == KILLS
    assert [word for word in COMPLAINTS if word in guest.console] == []
    assert f"DONE {guest.rounds}" in guest.console
    # Exit code 0: nothing to correct.
    assert "Pass 5" in run("e2fsck", "-fn", mount.live("vda.raw"))
