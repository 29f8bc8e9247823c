"""Targets: what can be one, what is refused, and what is left when it is."""

import errno
import fcntl
import os
import re
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from fleecefs.block.memory import MemoryImage
from fleecefs.block.raw import RawImage
from fleecefs.errors import Busy, NotUsable, Unsupported
from fleecefs.jobs.target import (
    Surroundings,
    Target,
    busy_targets,
    open_target,
    reopen_target,
)
from fleecefs.units import MiB
from tests.support.faulty import Faulty, Full
from tests.support.mount import require_mount

SIZE = 1 * MiB


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.raw"
    path.write_bytes(b"s" * SIZE)
    return path


@pytest.fixture
def around(tmp_path, source):
    """Surroundings with one disk and one directory of ours."""
    ours = tmp_path / "ours"
    ours.mkdir()
    return Surroundings({"web.raw": source.stat()}, [ours])


def refused(path, around, match, error=NotUsable, size=SIZE):
    """Check that a target is refused and nothing has been made."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None

    with pytest.raises(error, match=match) as caught:
        open_target(path, size, around)

    assert str(path) in str(caught.value)
    after = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    assert after == before


# -- what can be a target


@pytest.mark.parametrize("size", [SIZE, 4097, 1])
def test_a_new_file_has_the_size_of_the_source_and_is_ours_alone(
    tmp_path, around, size
):
    target = open_target(tmp_path / "new.raw", size, around)

    status = (tmp_path / "new.raw").stat()
    assert (status.st_size, status.st_blocks) == (size, 0)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert target.is_new
    assert target.is_blank
    target.close()


def test_an_existing_file_keeps_what_it_holds(tmp_path, around):
    path = tmp_path / "old.raw"
    path.write_bytes(b"o" * SIZE)

    target = open_target(path, SIZE, around)

    assert not target.is_new
    assert not target.is_blank
    assert path.read_bytes() == b"o" * SIZE
    target.close()


def test_a_link_to_a_file_is_followed(tmp_path, around):
    (tmp_path / "old.raw").write_bytes(bytes(SIZE))
    (tmp_path / "link").symlink_to("old.raw")

    target = open_target(tmp_path / "link", SIZE, around)

    target.write(memoryview(b"new"), 0)
    assert (tmp_path / "old.raw").read_bytes()[:3] == b"new"
    target.close()


def test_names_are_made_durable(tmp_path, around, monkeypatch):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd))
    )

    target = open_target(tmp_path / "new.raw", SIZE, around)

    wanted = [(tmp_path / "new.raw").stat().st_ino, tmp_path.stat().st_ino]
    assert synced == wanted
    synced.clear()
    target.flush()
    assert synced == wanted
    target.close()


# -- what is refused


def test_the_source_itself_is_refused(source, around):
    refused(source, around, "is the source of disk 'web.raw'")


@pytest.mark.parametrize("how", ["link", "hard link", "path"])
def test_the_source_under_another_name_is_refused(tmp_path, source, around, how):
    path = tmp_path / "other"
    if how == "link":
        path.symlink_to(source)
    elif how == "hard link":
        path.hardlink_to(source)
    else:
        path = tmp_path / "ours" / ".." / "source.raw"

    refused(path, around, "is the source of disk|is the source")


@pytest.mark.parametrize("name", ["state.json", "new.raw", "deep/er/store.raw"])
def test_files_of_ours_are_refused(tmp_path, around, name):
    path = tmp_path / "ours" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name != "new.raw":
        path.write_bytes(bytes(SIZE))

    refused(path, around, "among the files of fleecefs")


def test_our_files_are_found_behind_a_link(tmp_path, around):
    (tmp_path / "link").symlink_to("ours")

    refused(tmp_path / "link" / "new.raw", around, "among the files of fleecefs")


def test_our_own_mount_is_refused(tmp_path, source):
    def check_place(path):
        raise NotUsable(f"target {path}: would be on the mount itself")

    around = Surroundings({}, [], check_place)

    refused(tmp_path / "new.raw", around, "is on the mount of its own source")


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE + 1, 2 * SIZE])
def test_a_file_of_another_size_is_refused_and_untouched(tmp_path, around, size):
    path = tmp_path / "old.raw"
    path.write_bytes(b"o" * size)

    refused(path, around, f"has {size} bytes .*and the disk {SIZE}")
    assert path.read_bytes() == b"o" * size


def test_what_is_no_file_is_refused(tmp_path, around):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        (tmp_path / "nowhere").symlink_to("missing/file")

        refused(tmp_path / "directory", around, "is a directory")
        refused(tmp_path / "fifo", around, "is not a regular file")
        refused(tmp_path / "socket", around, "is not a regular file")
        refused(tmp_path / "nowhere", around, "no directory|leads nowhere", OSError)


def test_a_device_that_is_no_disk_is_refused(around):
    with pytest.raises(NotUsable, match="is not a regular file"):
        open_target(Path("/dev/null"), SIZE, around)


def test_a_missing_directory_is_named(tmp_path, around):
    refused(tmp_path / "missing" / "a.raw", around, "no directory .*missing")


def test_a_relative_path_is_refused(around):
    with pytest.raises(NotUsable, match="absolute"):
        open_target(Path("a.raw"), SIZE, around)


def test_a_target_in_use_is_refused(tmp_path, around):
    first = open_target(tmp_path / "new.raw", SIZE, around)

    refused(tmp_path / "new.raw", around, "in use by another job", Busy)

    first.close()
    open_target(tmp_path / "new.raw", SIZE, around).close()


def test_a_file_that_a_program_has_locked_is_refused(tmp_path, around):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        refused(path, around, "in use", Busy)


def test_a_file_that_may_not_be_written_is_refused(tmp_path, around, monkeypatch):
    path = tmp_path / "old.raw"
    path.write_bytes(bytes(SIZE))
    real = os.open

    def read_only(name, flags, *rest, **more):
        if str(name) == str(path):
            raise OSError(errno.EROFS, "Read-only file system", str(name))
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)

    refused(path, around, "Read-only file system", OSError)


def test_a_file_that_can_not_be_so_large_is_not_left(tmp_path, around):
    path = tmp_path / "new.raw"

    refused(path, around, "target .*: ", OSError, size=1 << 62)


def test_there_is_no_file_left_if_its_directory_can_not_be_synced(
    tmp_path, around, monkeypatch
):
    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("fleecefs.jobs.target.sync_directory", failing)

    with pytest.raises(OSError, match=r"target .*new.raw: Input/output error"):
        open_target(tmp_path / "new.raw", SIZE, around)

    assert not (tmp_path / "new.raw").exists()


# -- devices


@pytest.fixture
def loop(tmp_path):
    """A function that makes a loop device of so many bytes."""
    require_mount()
    made = []

    def loop(size, path=None):
        path = path or tmp_path / f"loop{len(made)}"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size)
        done = subprocess.run(
            ["losetup", "--find", "--show", path], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        made.append(done.stdout.strip())
        return type(path)(made[-1])

    yield loop
    for device in made:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("more", [0, 512, SIZE])
def test_a_device_may_be_larger_than_the_source(around, loop, more):
    device = loop(SIZE + more)

    target = open_target(device, SIZE, around)

    assert not target.is_blank
    target.write(memoryview(b"x" * 512), SIZE - 512)
    target.punch(4096, 0)
    target.empty()
    assert not target.is_blank
    target.flush()
    with pytest.raises(Busy):
        open_target(device, SIZE, around)
    target.close()


def test_a_device_that_is_too_small_is_refused(around, loop):
    device = loop(SIZE - 512)

    with pytest.raises(NotUsable, match=f"has {SIZE - 512} bytes"):
        open_target(device, SIZE, around)


def test_a_device_that_shows_the_source_is_refused(around, loop, source):
    device = loop(SIZE, source)

    with pytest.raises(NotUsable, match=r"is the source of disk 'web\.raw'"):
        open_target(device, SIZE, around)


def test_a_device_that_is_the_source_is_refused(loop):
    device = loop(SIZE)
    around = Surroundings({"web.raw": device.stat()}, [])

    with pytest.raises(NotUsable, match=r"is the source of disk 'web\.raw'"):
        open_target(device, SIZE, around)


# -- going on


def identity_of(path):
    target = open_target(path, SIZE, Surroundings({}, []))
    identity = target.identity
    target.close()
    return identity


def test_a_target_is_opened_again_as_one_that_may_hold_anything(tmp_path, around):
    path = tmp_path / "new.raw"
    open_target(path, SIZE, around).close()

    target = reopen_target(path, SIZE, is_new=True, identity=identity_of(path))

    assert target.is_new
    assert not target.is_blank
    target.close()


def test_another_file_in_its_place_is_not_the_target(tmp_path):
    path = tmp_path / "new.raw"
    path.write_bytes(bytes(SIZE))
    identity = identity_of(path)
    path.rename(tmp_path / "kept.raw")
    path.write_bytes(bytes(SIZE))

    with pytest.raises(NotUsable, match=r"target .*new.raw: was replaced"):
        reopen_target(path, SIZE, is_new=True, identity=identity)


def test_a_target_that_is_gone_is_named(tmp_path):
    with pytest.raises(OSError, match=r"target .*gone.raw"):
        reopen_target(tmp_path / "gone.raw", SIZE, is_new=True, identity="")


# -- what it does


def test_a_short_write_goes_on_until_there_is_no_space():
    image = Full(MemoryImage(8192), 5000)
    target = Target(image)

    with pytest.raises(OSError, match="no space left"):
        target.write(memoryview(b"x" * 8192), 0)

    image.room = 8192
    target.write(memoryview(b"y" * 8192), 0)
    assert image.image.data == b"y" * 8192


def test_punching_makes_holes(tmp_path):
    path = tmp_path / "old.raw"
    path.write_bytes(b"o" * SIZE)
    target = reopen_target(path, SIZE, is_new=False, identity=identity_of(path))

    target.punch(SIZE - 8192, 4096)

    assert path.read_bytes() == b"o" * 4096 + bytes(SIZE - 8192) + b"o" * 4096
    assert path.stat().st_blocks * 512 <= 8192
    target.close()


class Stubborn(MemoryImage):
    """An image that knows neither holes nor zeroes."""

    def __init__(self, size, code):
        super().__init__(size, b"o" * size)
        self.code = code

    def discard(self, length, offset):
        if self.code == errno.EOPNOTSUPP:
            raise Unsupported("no holes")
        raise OSError(self.code, "no")

    def zero(self, length, offset):
        raise OSError(errno.EINVAL, "no")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_zeroes_are_written_where_nothing_else_is_possible(code):
    image = Stubborn(3 * MiB, code)

    Target(image).punch(2 * MiB + 4097, 5)

    assert bytes(image.data).strip(b"o") == bytes(2 * MiB + 4097)


def test_what_else_goes_wrong_with_punching_is_told():
    with pytest.raises(OSError, match="no"):
        Target(Stubborn(8192, errno.EIO)).punch(4096, 0)


def test_emptying_drops_what_a_file_holds(tmp_path):
    path = tmp_path / "old.raw"
    path.write_bytes(b"o" * SIZE)
    target = reopen_target(path, SIZE, is_new=False, identity=identity_of(path))

    target.empty()

    assert target.is_blank
    assert path.stat().st_blocks == 0
    assert path.stat().st_size == SIZE
    target.close()


def test_what_can_not_be_emptied_is_not_blank():
    target = Target(Stubborn(8192, errno.EOPNOTSUPP))

    target.empty()

    assert not target.is_blank


def test_a_failed_emptying_can_be_tried_again():
    image = Faulty(MemoryImage(8192, b"o" * 8192), on="discard")
    target = Target(image)

    with pytest.raises(OSError):
        target.empty()
    target.empty()

    assert target.is_blank
    assert image.image.data == bytes(8192)


@pytest.mark.parametrize("what", ["new", "old", "replaced", "gone"])
def test_only_a_file_that_the_job_made_is_removed(tmp_path, around, what):
    path = tmp_path / "a.raw"
    if what == "old":
        path.write_bytes(bytes(SIZE))
    target = open_target(path, SIZE, around)
    if what == "replaced":
        path.rename(tmp_path / "moved")
        path.write_bytes(b"another")
    elif what == "gone":
        path.unlink()

    target.remove()

    assert path.exists() == (what in ("old", "replaced"))
    target.close()


# -- shared by the file system


@pytest.fixture(params=["xfs", "btrfs"])
def sharing(request, tmp_path, loop):
    """A directory on a file system that can share ranges of files."""
    device = loop(400 * MiB)
    where = tmp_path / "mnt"
    where.mkdir()
    subprocess.run([f"mkfs.{request.param}", "-q", device], check=True)
    subprocess.run(["mount", device, where], check=True)
    yield where
    # A test that failed may still have files open there.
    subprocess.run(["umount", "--lazy", where], check=True)


def test_a_clone_shares_storage(sharing, around):
    source = RawImage.create(sharing / "source", SIZE)
    data = os.urandom(SIZE)
    source.pwrite(data, 0)
    target = open_target(sharing / "new.raw", SIZE, around)

    target.clone(source, 65536, 65536)

    found = (sharing / "new.raw").read_bytes()
    assert found == bytes(65536) + data[65536:131072] + bytes(SIZE - 131072)
    target.close()
    source.close()


def test_without_sharing_there_is_no_clone(tmpfs_path, around):
    source = RawImage.create(tmpfs_path / "source", SIZE)
    target = open_target(tmpfs_path / "new.raw", SIZE, around)

    for each in source, MemoryImage(SIZE):
        with pytest.raises(Unsupported):
            target.clone(each, 65536, 0)
    target.close()
    source.close()


def test_messages_name_the_target_once(tmp_path, around):
    with pytest.raises(NotUsable) as e:
        open_target(tmp_path, SIZE, around)

    assert len(re.findall(str(tmp_path), str(e.value))) == 1


def test_who_is_busy_with_a_target_closes_it(tmp_path, around):
    target = open_target(tmp_path / "copy.raw", SIZE, around)
    with target.used():
        with target.used():
            target.close()
            inside = busy_targets()
            with pytest.raises(OSError, match="is closed"), target.used():
                pass
        target.flush()
    after = busy_targets()

    assert inside == [str(tmp_path / "copy.raw")]
    assert after == []
    # Nobody has it locked any more.
    open_target(tmp_path / "copy.raw", SIZE, around).close()
