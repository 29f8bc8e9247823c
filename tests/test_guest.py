"""A guest whose disk is a live file works on while daemons die."""

import pytest

from fleecefs.units import MiB
from tests.support.guest import Guest
from tests.support.killer import DIED, Contents, Killer, Pulse
from tests.support.mount import run

SIZE = 96 * MiB
KILLS = 10


@pytest.mark.parametrize("aio", ["threads", "native"])
@pytest.mark.logs(DIED)
def test_a_guest_sees_only_a_pause(mounted, tmp_path, tell_stall, aio):
    mount = mounted({"vda.raw": SIZE})
    live = mount.live("vda.raw")
    contents = Contents(mount, "vda.raw")

    rounds = 0
    with Guest(live, tmp_path, aio=aio) as guest:
        with Pulse(live) as pulse, Killer(mount, KILLS, seed=aio) as killer:
            while not killer.ended:
                guest.round(rounds)
                rounds += 1
                if rounds % 3 == 0:
                    contents.create()
        guest.end()

    assert killer.kills == KILLS
    assert guest.complaints() == []
    assert "DONE" in guest.console
    assert [f"VERIFIED {n}" in guest.console for n in range(rounds)] == [True] * rounds
    run("e2fsck", "-fn", live)
    contents.check()
    tell_stall(pulse.longest, f"{killer.kills} kills, {rounds} rounds")
