"""Chains of increments through a real mount, with everything in between that happens.

Each increment is of one instant: the guest rests while it is started, and what the disk
was then is read from the live file. Afterwards the guest goes on, daemons die, jobs are
cancelled or fail. In the end each instant can be restored, by the eyes of QEMU too.
"""

import os
import random
import shutil
import threading

import pytest

from fleecefs.block.raw import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE, fallocate
from fleecefs.units import GiB, KiB, MiB
from tests.support.jobs import (
    check_nothing_is_left,
    error_of,
    job_of,
    output_of,
    start,
    wait_begun,
)
from tests.support.killer import DIED, daemon_pid, generation, kill, wait_generation
from tests.support.qemu import check_code, qemu_img, require_qemu
from tests.support.walk import noise, opened, read, write

# No whole granules, clusters or sectors.
SIZE = 6 * MiB + 700

# So that most of an increment is overwritten before it is copied.
SLOW = "--speed=64K"


class Chain:
    """A disk with its guest, and the backups that were made of it."""

    def __init__(self, mount, directory, *, is_qcow2):
        self.mount = mount
        self.directory = directory
        self.is_qcow2 = is_qcow2
        self.random = random.Random(is_qcow2)
        # What there is of it: the last one is what the next one adds to.
        self.newest = directory / "0.raw"
        self.restorable = []
        self.number = 0

    # -- the guest

    def write(self, count=12):
        """Write, zero and discard here and there, in all sizes."""
        choice = self.random
        with opened(self.mount.live("web.raw"), os.O_RDWR) as live:
            for _ in range(count):
                length = choice.choice([1, 512, 5000, 64 * KiB, 200_000, 500_000])
                offset = choice.randrange(SIZE - length)
                what = choice.choice("wwwzd")
                if what == "w":
                    os.pwrite(live, choice.randbytes(length), offset)
                elif what == "z":
                    fallocate(live, ZERO_RANGE | KEEP_SIZE, offset, length)
                else:
                    fallocate(live, PUNCH_HOLE | KEEP_SIZE, offset, length)
            # The very last sector, too.
            os.pwrite(live, choice.randbytes(1), SIZE - 1)

    def kill(self):
        """Let the daemon die while the guest writes."""
        before, pid = generation(self.mount), daemon_pid(self.mount)
        guest = threading.Thread(target=self.write)
        guest.start()
        kill(pid)
        guest.join()
        wait_generation(self.mount, before + 1)

    # -- backups

    def begin(self, *options, speed=SLOW):
        """Start an increment of now; return what the disk is now."""
        self.number += 1
        instant = self.mount.live("web.raw").read_bytes()
        words = list(options) or ["--sync=incremental"]
        self.target = self.newest
        if self.is_qcow2:
            self.target = self.directory / f"{self.number}.qcow2"
            words += ["--format=qcow2", f"--backing={self.newest}"]
        words += ["--bitmap=daily", speed]
        start(self.mount, "web.raw", self.target, *words)
        return instant

    def end(self, instant):
        """Let it come to its end, and see that it is what the disk was."""
        output_of(self.mount, "job", "wait", "web.raw")
        self.newest = self.target
        if self.is_qcow2:
            self.restorable.append((self.target, instant))
        else:
            assert self.target.read_bytes() == instant

    def increment(self, *options):
        instant = self.begin(*options, speed="--speed=0")
        self.write()
        self.end(instant)

    def hurry(self):
        output_of(self.mount, "job", "set-speed", "web.raw", "0")

    def fail(self, *tell):
        """See that a job ends without a result."""
        if tell:
            output_of(self.mount, *tell)
        code, _ = error_of(self.mount, "job", "wait", "web.raw")
        assert code == 4

    # -- what may happen to one

    def undisturbed(self):
        self.increment()

    def killed(self):
        instant = self.begin()
        self.kill()
        assert job_of(self.mount)["restarts"] == 1
        self.hurry()
        self.end(instant)

    def restarted(self):
        instant = self.begin()
        self.write()
        output_of(self.mount, "restart")
        self.write()
        self.hurry()
        self.end(instant)

    def cancelled(self):
        self.begin()
        self.write()
        self.fail("job", "cancel", "web.raw")
        self.write()
        self.increment()

    def remounted(self):
        self.mount.remount()
        self.write()
        self.increment()

    def out_of_reach(self):
        """Fail, as the target is gone after the daemon died."""
        self.begin()
        away = self.target.rename(self.target.with_suffix(".away"))
        self.kill()
        self.fail()
        away.rename(self.target)
        self.increment()

    def cancelled_in_part(self):
        self.begin("--sync=bitmap", "--bitmap-mode=always")
        wait_begun(self.mount)
        self.write()
        self.fail("job", "cancel", "web.raw")
        # A part of the chain, of no instant.
        self.newest = self.target
        self.write()
        self.increment()

    def differential(self):
        self.increment("--sync=bitmap", "--bitmap-mode=never")

    def remounted_in_the_middle(self):
        self.begin()
        self.write()
        output_of(self.mount, "umount", "--force", self.mount.point)
        self.mount.mount()
        self.increment()

    def killed_before(self):
        self.kill()
        self.increment()

    HAPPENINGS = (
        undisturbed,
        killed,
        cancelled,
        restarted,
        out_of_reach,
        remounted,
        cancelled_in_part,
        undisturbed,
        differential,
        remounted_in_the_middle,
        killed_before,
        undisturbed,
    )


@pytest.mark.logs(DIED)
@pytest.mark.logs("job web.raw failed: target .* No such file")
# The kernel may not yet have let go of a file that the guest has closed.
@pytest.mark.logs("cut off whoever still uses")
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_chain_restores_to_each_instant(mounted, tmpfs_path, kind):
    require_qemu()
    mount = mounted({"web.raw": noise(SIZE)})
    output_of(mount, "bitmap", "add", "web.raw", "daily", "--granularity=4K")
    chain = Chain(mount, tmpfs_path, is_qcow2=kind == "qcow2")
    chain.write()
    content = mount.live("web.raw").read_bytes()
    output_of(mount, "backup", "web.raw", chain.newest, "--bitmap=daily")
    assert chain.newest.read_bytes() == content

    for happening in chain.HAPPENINGS:
        chain.write()
        # More than two daemons copy before they rest.
        write(mount.live("web.raw"), noise(3 * MiB, happening.__name__), MiB + 1)
        happening(chain)

    check_nothing_is_left(mount)
    for number, (path, instant) in enumerate(chain.restorable):
        check_restored(path, instant, tmpfs_path / f"restored.{number}")
    assert len(chain.restorable) == (12 if kind == "qcow2" else 0)


def check_restored(path, content, output):
    """Compare with what QEMU restores; its disks end with a sector."""
    assert check_code(path) == 0
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, output)
    found = output.read_bytes()
    output.unlink()
    assert found == content.ljust(len(found), b"\0")
    assert len(found) - len(content) < 512


# -- sizes


def check_same(live, target, format="raw"):
    """Compare by the eyes of QEMU, which does not read holes."""
    compared = qemu_img("compare", "-f", "raw", "-F", format, live, target)
    assert "Images are identical" in compared


def test_beyond_128_gib_nothing_is_missing(mounted, tmpfs_path):
    """Where a changed block tracking of others once lost what was written."""
    require_qemu()
    mount = mounted({"web.raw": 130 * GiB})
    live = mount.live("web.raw")
    full, increment = tmpfs_path / "0.raw", tmpfs_path / "1.qcow2"
    write(live, b"a" * MiB, 128 * GiB - MiB // 2)
    output_of(mount, "bitmap", "add", "web.raw", "daily")
    output_of(mount, "bitmap", "add", "web.raw", "other", "--granularity=1M")
    output_of(mount, "backup", "web.raw", full, "--bitmap=daily")
    check_same(live, full)

    # In the first bit, in two around the boundary, beyond, and in the very last one.
    for offset in 0, 128 * GiB - 1, 129 * GiB + 5, 130 * GiB - 2:
        write(live, b"bb", offset)
    options = ["--sync=incremental", "--detach", "--no-auto-dismiss"]
    words = ["--format=qcow2", f"--backing={full}", "--bitmap=other", "--job-id=qcow2"]
    output_of(mount, "backup", "web.raw", increment, *options, *words)
    output_of(mount, "job", "wait", "qcow2")
    assert job_of(mount, "qcow2")["total"] == 5 * MiB
    check_same(live, increment, "qcow2")
    assert check_code(increment) == 0

    output_of(mount, "backup", "web.raw", full, *options, "--bitmap=daily")
    output_of(mount, "job", "wait", "web.raw")

    assert job_of(mount)["total"] == 5 * 64 * KiB
    check_same(live, full)
    assert read(full, 4, 128 * GiB - 2) == b"abba"
    bitmaps = mount.json("bitmap", "list", "web.raw")
    assert [each["count"] for each in bitmaps] == [0, 0]


def test_disks_of_any_size_have_increments(mounted, tmpfs_path):
    require_qemu()
    sizes = {"a.raw": 4097, "b.raw": MiB + 4097, "c.raw": 511}
    mount = mounted({name: noise(size) for name, size in sizes.items()})
    full, updated = tmpfs_path / "full", tmpfs_path / "updated"
    full.mkdir()
    for name in sizes:
        for bitmap in "raw", "qcow2":
            output_of(mount, "bitmap", "add", name, bitmap)
    output_of(mount, "backup", "--all", full, "--bitmap=qcow2")
    shutil.copytree(full, updated)
    for name, size in sizes.items():
        write(mount.live(name), b"\xff", size - 1)

    output_of(mount, "backup", "--all", updated, "--sync=incremental", "--bitmap=raw")
    for name in sizes:
        path, content = tmpfs_path / f"{name}.qcow2", mount.live(name).read_bytes()
        options = ["--sync=incremental", "--bitmap=qcow2", "--format=qcow2"]
        output_of(mount, "backup", name, path, *options, f"--backing={full / name}")

        assert (updated / name).read_bytes() == content
        check_restored(path, content, tmpfs_path / "restored")
