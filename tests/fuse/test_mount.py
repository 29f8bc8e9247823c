"""Mounting, unmounting, and who uses a mount: with real mounts and processes."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fleecefs.errors import Busy, NotFound, NotUsable, Refused
from fleecefs.fuse import mount as mounting
from fleecefs.fuse.mount import check_mountpoint, mounts, unmount, users
from fleecefs.units import MiB
from tests.support.mount import filesystem, loop_device, require_mount, run, wait_until

# -- the mount point


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        pytest.param(lambda p: None, NotFound, "no such directory", id="missing"),
        pytest.param(lambda p: p.touch(), NotUsable, "not a directory", id="file"),
        pytest.param(lambda p: os.mkfifo(p), NotUsable, "not a directory", id="fifo"),
        pytest.param(
            lambda p: (p / "below").mkdir(parents=True),
            NotUsable,
            "not empty",
            id="not-empty",
        ),
        pytest.param(
            lambda p: p.symlink_to(p), NotUsable, "symbolic link", id="link-to-itself"
        ),
        pytest.param(
            lambda p: p.symlink_to("nowhere"),
            NotFound,
            "no such directory",
            id="link-to-nothing",
        ),
    ],
)
def test_mount_point_that_can_not_be_used(tmp_path, make, error, says):
    path = tmp_path / "mount"
    make(path)

    with pytest.raises(error) as e:
        check_mountpoint(str(path))

    assert says in str(e.value)
    assert str(path) in str(e.value)


def test_mount_point_that_can_be_used(tmp_path):
    check_mountpoint(str(tmp_path))

    assert str(tmp_path) not in mounts()


def test_mount_point_in_use(mounted):
    mount = mounted({"a.raw": MiB})

    with pytest.raises(Busy, match="already mounted"):
        check_mountpoint(str(mount.point))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("with space", id="space"),
        pytest.param("tab\tand\nnewline", id="tab-and-newline"),
        pytest.param("back\\slash\\040", id="backslash"),
        pytest.param("#comment", id="hash"),
        pytest.param("käse", id="not-ascii"),
        pytest.param("line\u2028separator\x0c", id="ends-of-lines-of-unicode"),
        pytest.param("carriage\rreturn", id="carriage-return"),
        pytest.param(os.fsdecode(b"\xff\xfe"), id="not-utf-8"),
    ],
)
# The rest of a line about a path that looks like more than one.
@pytest.mark.logs(r"^(newline|return)/\S+/mount$|^separator|^/fleecefs-\w+/mount$")
def test_mount_point_with_an_odd_name(mounted, tmpfs_path, name):
    directory = tmpfs_path / name
    directory.mkdir()
    mount = mounted({"a.raw": MiB}, directory=directory)

    assert str(mount.point) in mounts()
    with open(mount.live("a.raw"), "rb") as file:
        assert f"(pid {os.getpid()})" in "".join(users(str(mount.point)))
        assert file.read(10) == bytes(10)
    mount.umount()
    assert str(mount.point) not in mounts()


# -- mounting itself


@contextmanager
def unserved(path: Path) -> Iterator[int]:
    """Mount without a daemon: whoever looked at the files would hang."""
    require_mount()
    fd = mounting.mount(str(path), allow_other=False)
    try:
        yield fd
    finally:
        os.close(fd)
        unmount(str(path), lazy=True)


def test_mount_hands_over_the_descriptor_and_unmount_ends_it(tmp_path):
    with unserved(tmp_path) as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/fuse"
        assert not os.get_inheritable(fd)
        assert mounts().count(str(tmp_path)) == 1

        unmount(str(tmp_path))

        assert str(tmp_path) not in mounts()
        with pytest.raises(OSError) as e:
            os.read(fd, 1 << 21)
        assert e.value.errno == errno.ENODEV


def test_mount_is_private_by_default(tmp_path):
    with unserved(tmp_path):
        lines = Path("/proc/self/mounts").read_text().splitlines()

        (options,) = [each.split()[3] for each in lines if f" {tmp_path} " in each]
        assert "allow_other" not in options.split(",")
        assert {"nosuid", "nodev", "default_permissions"} <= set(options.split(","))


def test_mount_is_refused_by_fusermount(tmp_path):
    require_mount()

    with pytest.raises(Refused, match=r"can not mount on .*missing"):
        mounting.mount(str(tmp_path / "missing"), allow_other=False)


def test_unmounting_what_is_not_mounted_is_fine(tmp_path):
    unmount(str(tmp_path))
    unmount(str(tmp_path), lazy=True)

    assert str(tmp_path) not in mounts()


def test_unmount_of_a_busy_mount_names_its_users(mounted):
    mount = mounted({"a.raw": MiB})

    with open(mount.live("a.raw"), "rb"), pytest.raises(Busy) as e:
        unmount(str(mount.point))

    assert f"(pid {os.getpid()})" in str(e.value)
    assert "--force" in str(e.value)
    assert mount.is_mounted
    unmount(str(mount.point))
    assert not mount.is_mounted
    wait_until(lambda: not mount.processes(), "the end of the daemon")


# -- who uses it: an ordinary directory will do


def ours() -> str:
    return f"(pid {os.getpid()})"


def test_open_file_is_a_use(tmp_path):
    path = tmp_path / "file"
    path.touch()

    with path.open() as file:
        assert ours() in "".join(users(str(tmp_path)))
        os.unlink(file.name)
        assert ours() in "".join(users(str(tmp_path)))

    assert users(str(tmp_path)) == []


def test_use_names_the_program(tmp_path):
    sleep = subprocess.Popen(["sleep", "1000"], cwd=tmp_path)
    try:
        # Popen returns when the program has been started.
        assert users(str(tmp_path)) == [f"sleep (pid {sleep.pid})"]
    finally:
        sleep.kill()
        sleep.wait()

    assert users(str(tmp_path)) == []


def test_program_with_an_odd_name_is_a_use(tmp_path):
    program = tmp_path / os.fsdecode(b"\xff(odd) name")
    program.symlink_to("/bin/sleep")
    directory = tmp_path / "directory"
    directory.mkdir()
    sleep = subprocess.Popen([program, "1000"], cwd=directory)
    try:
        assert users(str(directory)) == [f"�(odd) name (pid {sleep.pid})"]
    finally:
        sleep.kill()
        sleep.wait()


def test_mapped_file_is_a_use(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4096)

    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with memory:
        # Python keeps a descriptor of its own, too.
        assert ours() in "".join(users(str(tmp_path)))

    assert users(str(tmp_path)) == []


@pytest.mark.parametrize("name", ["image", os.fsdecode(b"\xffimage\n")])
def test_loop_device_is_a_use(tmp_path, name):
    require_mount()
    path = tmp_path / name
    path.write_bytes(bytes(MiB))

    with loop_device(path) as device:
        assert users(str(tmp_path)) == [str(device)]

    assert users(str(tmp_path)) == []


def test_mount_below_is_a_use(tmp_path):
    require_mount()
    below = tmp_path / "a directory"

    with filesystem(Path("tmpfs"), below, "-t", "tmpfs"):
        assert users(str(tmp_path)) == [f"the mount on {below}"]

    assert users(str(tmp_path)) == []


def test_neighbour_with_a_longer_name_is_no_use(tmp_path):
    point, neighbour = tmp_path / "mount", tmp_path / "mount2"
    point.mkdir()
    neighbour.mkdir()
    path = neighbour / "file"
    path.touch()

    with path.open():
        assert users(str(point)) == []
        assert ours() in "".join(users(str(neighbour)))


def test_loop_device_of_a_live_disk_keeps_it_from_being_unmounted(mounted):
    mount = mounted({"a.raw": MiB})

    with loop_device(mount.live("a.raw")) as device:
        done = mount.cli("umount", mount.point)

        assert done.returncode == 1
        assert str(device) in done.stderr
        assert run("blockdev", "--getsize64", device).strip() == str(MiB)

    mount.umount()
