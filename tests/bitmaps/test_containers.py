"""Open containers: who may use one, and what is left of it when a change fails."""

import errno
import os
import subprocess
from contextlib import contextmanager

import pytest
from bitarray.util import zeros

from fleecefs.bitmaps.containers import Containers, OpenContainer, read_container
from fleecefs.errors import Busy, NotUsable
from fleecefs.qcow2.container import Bitmap
from fleecefs.units import KiB, MiB
from tests.support.host import failing
from tests.support.qemu import (
    check_code,
    dirty_extents,
    listed_bitmaps,
    qemu_img,
    require_qemu,
)
from tests.support.running import Running

SIZE = 16 * MiB
GRANULARITY = 64 * KiB
COUNT = SIZE // GRANULARITY


def bitmap(name, *numbers, **more):
    bits = zeros(COUNT, endian="little")
    for number in numbers:
        bits[number] = 1
    return Bitmap(name, GRANULARITY, bits, **more)


def bits_of(container, name):
    return set(container.bits(name).search(1))


@pytest.fixture
def containers():
    containers = Containers()
    yield containers
    for container in list(containers._open.values()):
        container.close()


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "bitmaps.qcow2"


@pytest.fixture
def made(containers, path):
    """A container with a bitmap in it, open."""
    container = containers.use(path, SIZE, create=True)
    container.update([bitmap("old", 1, 2)])
    return container


@contextmanager
def opened(path):
    """Open it as the next daemon will."""
    container = OpenContainer.open(path, SIZE, create=False)
    try:
        yield container
    finally:
        container.close()


# -- open and close


def test_container_is_made_once(containers, path):
    container = containers.use(path, SIZE, create=True)
    container.update([bitmap("daily", 3)])
    containers.release(container)

    again = containers.use(path, SIZE, create=True)

    assert list(again.entries) == ["daily"]
    assert bits_of(again, "daily") == {3}
    assert [p.name for p in path.parent.iterdir()] == ["bitmaps.qcow2"]


def test_missing_container_is_not_made_unasked(containers, path):
    with pytest.raises(FileNotFoundError, match=r"container .*: No such file"):
        containers.use(path, SIZE)

    assert not path.exists()


def test_empty_file_becomes_a_container(containers, path):
    path.touch()

    assert containers.use(path, SIZE, create=True).entries == {}


def test_container_of_two_disks_is_open_once(containers, path, made):
    link = path.with_name("link.qcow2")
    link.symlink_to(path)

    other = containers.use(link, SIZE)
    assert other is made
    assert other.users == 2
    containers.release(made)
    # It is still locked.
    with pytest.raises(Busy):
        OpenContainer.open(path, SIZE, create=False)
    containers.release(other)

    with opened(path) as last:
        assert list(last.entries) == ["old"]


def test_container_of_another_size_is_refused_and_let_go(containers, path, made):
    with pytest.raises(NotUsable, match=r"is for a disk of 16777216 bytes .16 MiB., "):
        containers.use(path, 2 * SIZE)
    assert made.users == 1
    containers.release(made)
    with pytest.raises(NotUsable, match="is for a disk of"):
        containers.use(path, SIZE + 1)

    with opened(path):
        pass


def test_size_is_rounded_up_to_sectors(containers, path):
    container = containers.use(path, SIZE + 1, create=True)

    assert containers.use(path, SIZE + 512) is container


def not_regular(path):
    os.mkfifo(path)


def damaged(path):
    path.write_bytes(b"QFI\xfb" + bytes(range(256)) * 4)


def raw(path):
    path.write_bytes(bytes(1 * MiB))


def with_guest_data(path):
    require_qemu()
    qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
    source = path.with_name("data")
    source.write_bytes(b"x" * 512 + bytes(SIZE - 512))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", source, path)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(not_regular, "not a regular file", id="not a regular file"),
        pytest.param(damaged, "container|bitmaps.qcow2: ", id="damaged"),
        pytest.param(raw, "is no qcow2 file", id="raw"),
        pytest.param(with_guest_data, "has guest data", id="an image in use"),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_what_is_no_container_is_refused_and_not_touched(
    containers, path, make, text, create
):
    make(path)
    before = path.stat().st_mtime_ns

    with pytest.raises(NotUsable, match=text):
        containers.use(path, SIZE, create=create)

    assert path.stat().st_mtime_ns == before
    # And nobody holds it.
    assert containers._open == {}


def test_directory_is_refused(containers, path):
    path.mkdir()

    with pytest.raises(OSError, match=r"container .*: Is a directory"):
        containers.use(path, SIZE)


# -- locks


def test_container_that_another_daemon_has_is_busy(path, made):
    with pytest.raises(Busy, match="in use by another program"):
        Containers().use(path, SIZE)


def test_qemu_can_read_but_not_write_meanwhile(path, made):
    require_qemu()

    assert listed_bitmaps(path) == {"old": (GRANULARITY, {"auto"})}
    assert dirty_extents(path, "old") == [(GRANULARITY, 2 * GRANULARITY)]
    command = ["qemu-img", "bitmap", "--add", path, "other"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode != 0
    assert "lock" in done.stderr
    made.update([bitmap("new", 5)])
    assert set(listed_bitmaps(path)) == {"old", "new"}


def test_container_that_qemu_writes_to_is_busy(containers, path, made):
    require_qemu()
    containers.release(made)
    command = ["qemu-io", "-f", "qcow2", str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        qemu.stdin.write("length\n")
        qemu.stdin.flush()
        assert "16 MiB" in qemu.stdout.readline()

        with pytest.raises(Busy, match="in use by another program"):
            containers.use(path, SIZE)

        qemu.stdin.close()
        qemu.stdout.read()
        assert qemu.wait() == 0
    assert containers._open == {}


def test_container_can_be_looked_at_while_it_is_in_use(path, made):
    contents, file, fd = read_container(path)

    assert set(contents.bits(file, "old").search(1)) == {1, 2}
    os.close(fd)


def test_container_is_closed_when_what_uses_it_has_ended(containers, path, made):
    made.lock.acquire()
    running = Running(containers.release, made)
    # A save is at it: the descriptor stays what it is.
    made.update([bitmap("old", 7)])
    made.lock.release()
    running.result()

    with opened(path) as container:
        assert bits_of(container, "old") == {7}


# -- failures


FULL = "No space left on device"


def try_full(monkeypatch, call, nth, function, *args, **kwargs):
    """Call a function while the nth `call` finds no space; return if it failed."""
    error = OSError(errno.ENOSPC, FULL)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(getattr(os, call), nth, error, after=False))
        try:
            function(*args, **kwargs)
        except OSError as e:
            return e.strerror
    return None


@pytest.mark.parametrize(("call", "count"), [("pwrite", 8), ("fdatasync", 2)])
def test_change_that_fails_leaves_the_old_or_the_new(
    path, made, monkeypatch, call, count
):
    for nth in range(1, count + 1):
        bitmaps = [bitmap("old", 1, 2), bitmap("new", nth)]

        found = try_full(monkeypatch, call, nth, made.update, bitmaps)

        assert found == f"container {path}: {FULL}"
        # The next look finds one of both, and the next change works.
        assert bits_of(made, "old") == {1, 2}
        assert "new" not in made.entries or bits_of(made, "new") == {nth}
        made.update([bitmap("old", 1, 2)], [n for n in made.entries if n == "new"])
        assert list(made.entries) == ["old"]
        assert check_code(path) == 0


@pytest.mark.parametrize("nth", range(1, 4))
def test_container_that_could_not_be_made_is_made_later(
    containers, path, monkeypatch, nth
):
    use = containers.use

    found = try_full(monkeypatch, "pwrite", nth, use, path, SIZE, create=True)

    assert found is not None
    assert not path.exists()
    container = containers.use(path, SIZE, create=True)
    container.update([bitmap("daily", 1)])
    assert bits_of(container, "daily") == {1}
    assert check_code(path) == 0


def test_marks_fail_as_a_whole(path, made, monkeypatch):
    made.update([bitmap("other", 4)])
    error = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(os.fdatasync, 1, error, after=False))
        with pytest.raises(OSError, match=r"container .*: Input/output error"):
            made.mark_in_use(["old", "other"])

    made.mark_in_use(["old", "other"])

    assert all(entry.is_in_use for entry in made.entries.values())
    assert bits_of(made, "other") == {4}


def test_what_a_container_has_no_room_for_is_refused_and_it_goes_on(made):
    names = [f"{number:04}" + "x" * 1000 for number in range(1024)]

    with pytest.raises(NotUsable, match="fleecefs takes up to 1024"):
        made.update([bitmap(name) for name in names])

    assert list(made.entries) == ["old"]
    made.update([bitmap("new", 1)])
    assert bits_of(made, "new") == {1}


def test_container_whose_file_was_damaged_meanwhile_says_so(path, made, monkeypatch):
    error = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(os.pwrite, 1, error, after=False))
        with pytest.raises(OSError, match="Input/output error"):
            made.update([bitmap("old", 7)])
    before = path.read_bytes()
    path.write_bytes(b"x" * len(before))

    with pytest.raises(NotUsable, match="is no qcow2 file"):
        made.update([bitmap("old", 7)])
    # As it was, it is used again.
    path.write_bytes(before)

    made.update([bitmap("old", 7)])
    assert bits_of(made, "old") == {7}
