"""What a daemon needs may not lie on its own mount: it would wait for itself.

tests/test_errors.py has paths under the mount point and links to it; here are other
names for the same place, which mounts and loop devices make.
"""

import os
import signal
from contextlib import ExitStack, contextmanager

import pytest

from fleecefs.units import MiB
from tests.support.mount import (
    Mount,
    filesystem,
    loop_device,
    require_mount,
    run,
    wait_until,
)

WHATS = ["source", "state", "store", "log"]

each_what = pytest.mark.parametrize("what", WHATS)


@pytest.fixture
def stack(tmpfs_path):
    require_mount()
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def mount(stack, tmpfs_path):
    """A disk that could be mounted."""
    mount = Mount(tmpfs_path / "live", {"web.raw": MiB})
    stack.callback(mount.kill)
    return mount


@contextmanager
def bound(place, twin, *options):
    """Let a directory or file be somewhere else too."""
    if place.is_dir():
        twin.mkdir()
    else:
        twin.touch()
    run("mount", "--bind", *options, place, twin)
    try:
        yield twin
    finally:
        run("umount", twin)


def refused(mount, what, path):
    """Try to mount with something at a path, and expect one clear line."""
    was_mounted = mount.is_mounted
    if what == "source":
        mount.sources["x.raw"] = path
        done = mount.try_mount()
    else:
        done = mount.try_mount(f"--{what}={path}")
    assert done.returncode == 1
    assert done.stderr == (
        f"fleecefs: {what} {path}: would be on the mount itself, {mount.point}; "
        "put it elsewhere\n"
    )
    assert mount.is_mounted == was_mounted
    wait_until(lambda: not mount.processes(), "the end of the keeper")
    mount.sources.pop("x.raw", None)


# -- before there is a mount


@each_what
def test_a_bind_mount_of_the_mount_point_is_refused(mount, stack, tmpfs_path, what):
    twin = stack.enter_context(bound(mount.point, tmpfs_path / "twin"))

    refused(mount, what, twin / "below")

    assert os.listdir(mount.point) == []


@each_what
def test_a_private_bind_mount_of_the_mount_point_is_refused(
    mount, stack, tmpfs_path, what
):
    """It would show what lies below the mount: confusing, if no cycle."""
    options = ["--make-private"]
    twin = stack.enter_context(bound(mount.point, tmpfs_path / "twin", *options))

    refused(mount, what, twin / "below/further/below")


@each_what
def test_a_link_in_a_bind_mount_is_refused(mount, stack, tmpfs_path, what):
    twin = stack.enter_context(bound(mount.directory, tmpfs_path / "twin"))
    link = tmpfs_path / "link"
    link.symlink_to(twin / "mount")

    refused(mount, what, link / "below")


def test_a_mount_point_that_is_a_link_is_followed(mount, tmpfs_path):
    link = tmpfs_path / "link"
    link.symlink_to(mount.point)
    path = mount.point / "below"

    done = mount.cli(
        "mount", f"--disk={mount.sources['web.raw']}", f"--state={path}", link
    )

    assert done.returncode == 1
    assert f"state {path}: would be on the mount itself" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not mount.is_mounted


def test_what_is_refused_can_be_put_elsewhere(mount):
    refused(mount, "state", mount.point / "state")

    mount.mount()

    assert mount.live("web.raw").read_bytes() == bytes(MiB)
    mount.umount()


def test_a_name_that_only_begins_alike_is_no_cycle(mount):
    """And a state beside the mount point is none either."""
    store = mount.directory / "mount-store"
    store.mkdir()

    mount.mount(f"--store={store}", f"--log={mount.directory / 'mount.log'}")

    mount.umount()


# -- what an earlier mount has left


@pytest.fixture
def left(mount, stack):
    """A mount whose daemon and keeper are dead, and a loop device of its disk."""
    mount.add_disk("disk.raw", 16 * MiB)
    mount.mount()
    run("mkfs.ext4", "-q", mount.live("disk.raw"))
    device = stack.enter_context(loop_device(mount.live("disk.raw")))
    return mount, device


def die(mount):
    """Kill the daemon and its keeper; neither may notice that the other has died."""
    keeper, daemon = mount.keeper_pid, mount.pid
    os.kill(keeper, signal.SIGSTOP)
    os.kill(daemon, signal.SIGKILL)
    os.kill(keeper, signal.SIGKILL)
    wait_until(lambda: not mount.processes(), "the end of keeper and daemon")
    assert mount.is_mounted


@pytest.mark.parametrize("what", ["source", "log"])
def test_a_loop_device_of_a_dead_mount_is_refused(left, what):
    mount, device = left
    die(mount)

    refused(mount, what, device)
    # It is as it was, so this is no accident.
    refused(mount, what, device)


@pytest.mark.parametrize("what", ["source", "log"])
def test_a_link_to_a_loop_device_of_a_dead_mount_is_refused(left, tmpfs_path, what):
    mount, device = left
    die(mount)
    link = tmpfs_path / "link"
    link.symlink_to(device)

    refused(mount, what, link)


@each_what
def test_a_file_system_on_a_loop_device_of_a_dead_mount_is_refused(
    left, stack, tmp_path, what
):
    mount, device = left
    options = ["-o", "errors=continue,norecovery,ro"]
    where = stack.enter_context(filesystem(device, tmp_path / "fs", *options))
    die(mount)

    refused(mount, what, where / "file")


def test_a_loop_device_on_a_loop_device_of_a_dead_mount_is_refused(left, stack):
    mount, device = left
    second = stack.enter_context(loop_device(device))
    die(mount)

    refused(mount, "source", second)


def test_a_dead_mount_is_mounted_again_without_its_loop_device(left):
    mount, device = left
    die(mount)

    mount.mount()

    assert mount.live("web.raw").read_bytes() == bytes(MiB)
    mount.umount()
    # It stays dead: whoever has it open has to let go of it.
    with pytest.raises(OSError):
        device.read_bytes()


def test_a_loop_device_of_another_mount_is_no_cycle(left, stack, tmpfs_path):
    first, device = left
    second = Mount(tmpfs_path / "second", {"web.raw": MiB, "x.raw": device})
    stack.callback(second.kill)

    second.mount()
    second.create("one")
    with second.live("x.raw").open("r+b", buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())

    assert first.live("disk.raw").read_bytes()[:4096] == b"x" * 4096
    assert second.snapshot("one", "x.raw").read_bytes()[:4096] != b"x" * 4096
    second.umount()


# -- while it is mounted


@pytest.mark.parametrize(
    "words",
    ["bitmap add web.raw daily --container", "bitmap export web.raw", "bitmap attach"],
)
def test_a_file_of_bitmaps_on_the_mount_is_refused(mount, tmpfs_path, words):
    mount.mount()
    mount.cli("bitmap", "add", "web.raw", "there")
    link = tmpfs_path / "link"
    link.symlink_to(mount.point)

    for path in mount.live("web.raw"), mount.point / "new", link / "snapshots/new":
        command = words.split()
        if command[-1] == "attach":
            command += ["web.raw", "--container"]
        done = mount.cli(*command, path)
        assert done.returncode == 1
        assert done.stderr == (
            f"fleecefs: container {path}: would be on the mount itself, "
            f"{mount.point}; put it elsewhere\n"
        )
    assert [b["name"] for b in mount.json("bitmap", "list")] == ["there"]
    mount.umount()
