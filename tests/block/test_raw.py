"""Raw files and block devices: what can be a source, and what is in the way."""

import contextlib
import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fleecefs.block import raw
from fleecefs.block.raw import RawImage
from fleecefs.errors import Busy, NotUsable, Unsupported
from tests.support.mount import filesystem, loop_device, require_mount, run

SIZE = 1 << 20
NOBODY = 65534


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"disk" * (SIZE // 4))
    return path


@pytest.fixture
def source(path):
    source = RawImage.open_source(path)
    yield source
    source.close()


@pytest.fixture
def device(path):
    require_mount()
    with loop_device(path) as device:
        yield device


def refused(path):
    """Return how opening a source fails."""
    with pytest.raises(OSError) as e:
        RawImage.open_source(path)
    assert f"source {path}" in e.value.strerror
    return e.value


# -- what can be a source


def test_a_regular_file_is_a_source(source):
    assert source.size == SIZE
    assert source.pread(4, SIZE - 4) == b"disk"


def test_a_device_is_a_source(device):
    source = RawImage.open_source(device)

    assert source.size == SIZE
    assert source.pwrite(b"X", 0) == 1
    assert source.pread(4, 0) == b"Xisk"
    assert stat.S_ISBLK(source.status().st_mode)
    source.close()


def test_a_link_to_a_file_is_a_source(path):
    link = path.with_name("link")
    link.symlink_to(path)

    source = RawImage.open_source(link)

    assert source.size == SIZE


def test_a_qcow2_file_is_taken_for_the_bytes_it_has(path):
    path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))

    source = RawImage.open_source(path)

    assert source.size == 512
    assert source.pread(4, 0) == b"QFI\xfb"


def test_a_source_is_not_inherited_by_programs(source):
    assert not os.get_inheritable(source.fd)


# -- what can not


def test_a_missing_source_is_named(path):
    path.unlink()

    assert refused(path).errno == errno.ENOENT


def test_a_directory_is_no_source(tmp_path):
    assert refused(tmp_path).errno == errno.EISDIR


def test_a_fifo_is_no_source_and_nobody_waits_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    error = refused(tmp_path / "fifo")

    assert isinstance(error, NotUsable)
    assert "not a regular file" in str(error)


def test_a_character_device_is_no_source():
    assert isinstance(refused(Path("/dev/null")), NotUsable)


def test_an_empty_file_is_no_source(path):
    os.truncate(path, 0)

    error = refused(path)

    assert isinstance(error, NotUsable)
    assert "empty" in str(error)


@pytest.mark.parametrize("size", [1, 511, 513, SIZE - 1])
def test_a_file_of_an_odd_size_is_a_source(path, size):
    os.truncate(path, size)

    source = RawImage.open_source(path)

    assert source.size == size
    source.close()


def test_a_file_that_may_not_be_opened_is_named(path):
    """As another user: root may open everything."""
    if os.getuid() != 0:
        pytest.skip("needs root")
    # Where that user may look.
    path = Path(run("mktemp", "/tmp/fleecefs-test-XXXXXX").strip())
    path.write_bytes(bytes(512))
    path.chmod(0o600)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from fleecefs.block.raw import RawImage\n"
        f"os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "try: RawImage.open_source(Path(sys.argv[1]))\n"
        "except OSError as e: print(e.errno, e.strerror)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True,
        text=True,
        cwd=Path(raw.__file__).parents[2],
    )

    path.unlink()
    assert done.stdout == f"{errno.EACCES} source {path}: Permission denied\n"


@pytest.fixture
def read_only(tmp_path):
    """A device that is mounted read-only, and the mount point: there is a `file`."""
    require_mount()
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "file").write_bytes(bytes(512))
    run("mkfs.ext4", "-q", "-d", tmp_path / "content", tmp_path / "image", "8M")
    with (
        loop_device(tmp_path / "image") as device,
        filesystem(device, tmp_path / "point", "-o", "ro") as point,
    ):
        yield device, point


def test_a_file_that_can_not_be_written_is_no_source(read_only):
    _, point = read_only

    assert refused(point / "file").errno == errno.EROFS


def test_a_device_that_is_mounted_is_no_source(read_only):
    device, _ = read_only

    assert refused(device).errno == errno.EBUSY


def test_a_refused_source_leaves_no_descriptor_behind(path):
    os.truncate(path, 0)
    before = os.listdir("/proc/self/fd")

    refused(path)

    assert os.listdir("/proc/self/fd") == before


# -- locks


def test_a_source_is_opened_once(source, path):
    assert isinstance(refused(path), Busy)


def test_a_source_can_be_opened_again_after_its_end(source, path):
    source.close()

    again = RawImage.open_source(path)

    assert again.size == SIZE


@contextlib.contextmanager
def locked_by_another_process(path, how):
    code = (
        "import fcntl, struct, sys, time\n"
        "file = open(sys.argv[1], 'r+b')\n"
        f"{how}\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        yield
        process.stdin.close()


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("fcntl.flock(file, fcntl.LOCK_EX)", id="flock"),
        pytest.param("fcntl.flock(file, fcntl.LOCK_SH)", id="shared flock"),
        pytest.param("fcntl.lockf(file, fcntl.LOCK_EX)", id="POSIX lock"),
        pytest.param("fcntl.lockf(file, fcntl.LOCK_SH, 1, 100)", id="lock of a byte"),
    ],
)
def test_a_source_locked_by_another_process_is_busy(path, how):
    with locked_by_another_process(path, how):
        assert isinstance(refused(path), Busy)

    RawImage.open_source(path)


def test_others_see_that_a_source_is_locked(source, path):
    with open(path, "r+b") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, raw._WHOLE_FILE)


def test_a_device_is_opened_once(device):
    source = RawImage.open_source(device)

    error = refused(device)

    assert error.errno == errno.EBUSY
    source.close()


# -- what changes behind our back


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        pytest.param(SIZE // 2, 512, id="past the new end"),
        pytest.param(SIZE // 2 - 512, 1024, id="across the new end"),
        pytest.param(0, SIZE, id="all"),
    ],
)
def test_reading_what_was_cut_off_is_an_error(source, path, offset, length):
    os.truncate(path, SIZE // 2)

    with pytest.raises(OSError, match="shorter than its size") as e:
        source.pread(length, offset)
    assert e.value.errno == errno.EIO
    with pytest.raises(OSError) as e:
        source.pread_into(memoryview(bytearray(length)), offset)
    assert e.value.errno == errno.EIO


def test_what_was_cut_off_is_no_hole(source, path):
    os.truncate(path, SIZE // 2)

    assert source.find_data(0) == 0
    for search in (source.find_data, source.find_hole):
        with pytest.raises(OSError) as e:
            search(SIZE // 2)
        assert e.value.errno == errno.EIO


def test_what_was_not_cut_off_is_read(source, path):
    os.truncate(path, SIZE // 2)

    assert source.pread(SIZE // 2, 0) == b"disk" * (SIZE // 8)


# -- files of ours


def test_a_file_of_ours_is_opened_with_the_size_it_was_made_with(tmp_path):
    RawImage.create(tmp_path / "store", SIZE).pwrite(b"kept", 100)

    again = RawImage.open(tmp_path / "store", SIZE)

    assert again.pread(4, 100) == b"kept"
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1])
def test_a_file_of_ours_of_another_size_is_refused_by_name(tmp_path, size):
    RawImage.create(tmp_path / "store", size)

    with pytest.raises(NotUsable) as e:
        RawImage.open(tmp_path / "store", SIZE)

    assert str(e.value) == f"{tmp_path / 'store'}: is {size} bytes long, not {SIZE}"


def test_creating_a_file_of_ours_again_empties_it(tmp_path):
    RawImage.create(tmp_path / "store", SIZE).pwrite(b"old", 0)

    again = RawImage.create(tmp_path / "store", SIZE)

    assert again.pread(3, 0) == bytes(3)
    assert again.allocated() == 0


def test_a_closed_image_closes_its_descriptor_once(tmp_path):
    image = RawImage.create(tmp_path / "store", SIZE)
    fd = image.fd
    image.close()
    # Somebody else's now.
    again = os.open(tmp_path / "store", os.O_RDONLY)

    image.close()
    del image

    assert again == fd
    os.fstat(fd)
    os.close(again)


def test_the_last_user_closes_an_image(tmp_path):
    image = RawImage.create(tmp_path / "store", SIZE)
    fd = image.fd

    del image

    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


# -- storage that can not do everything


def without(monkeypatch, *modes, code=errno.EOPNOTSUPP):
    """Let fallocate fail in some of its modes; return the calls that came."""
    calls = []
    real = raw.fallocate

    def fallocate(fd, mode, offset, length):
        calls.append(mode)
        if mode in modes:
            raise OSError(code, os.strerror(code))
        real(fd, mode, offset, length)

    monkeypatch.setattr(raw, "fallocate", fallocate)
    return calls


ZERO = raw.ZERO_RANGE | raw.KEEP_SIZE
PUNCH = raw.PUNCH_HOLE | raw.KEEP_SIZE


def test_zeroing_tries_the_cheapest_way_first(source, monkeypatch):
    calls = without(monkeypatch, ZERO)

    source.zero(8192, 4096)

    assert calls == [ZERO, PUNCH]
    assert source.pread(8194, 4095) == b"k" + bytes(8192) + b"d"


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENODEV])
def test_zeroes_are_written_where_nothing_else_works(tmp_path, monkeypatch, code):
    source = RawImage.create(tmp_path / "big", 3 * SIZE)
    source.pwrite(b"x" * 3 * SIZE, 0)
    without(monkeypatch, ZERO, PUNCH, code=code)

    source.zero(2 * SIZE + 7, 5)

    assert source.pread(3 * SIZE, 0) == b"x" * 5 + bytes(2 * SIZE + 7) + b"x" * (
        SIZE - 12
    )


def test_a_failure_to_zero_is_not_hidden(source, monkeypatch):
    without(monkeypatch, ZERO, code=errno.EIO)

    with pytest.raises(OSError) as e:
        source.zero(4096, 0)

    assert e.value.errno == errno.EIO


def test_storage_that_can_not_discard_says_so(source, monkeypatch):
    without(monkeypatch, PUNCH)

    with pytest.raises(Unsupported, match="can not discard"):
        source.discard(4096, 0)


def test_a_failure_to_discard_is_not_hidden(source, monkeypatch):
    without(monkeypatch, PUNCH, code=errno.ENOSPC)

    with pytest.raises(OSError) as e:
        source.discard(4096, 0)

    assert e.value.errno == errno.ENOSPC


def test_an_interrupted_call_is_made_again(source, monkeypatch):
    codes = [errno.EINTR, 0]
    monkeypatch.setattr(raw._libc, "fallocate", lambda *args: codes[0] and -1)
    monkeypatch.setattr(raw.ctypes, "get_errno", lambda: codes.pop(0))

    raw.fallocate(source.fd, PUNCH, 0, 4096)

    assert codes == [0]


def test_storage_without_holes_is_all_data(source, monkeypatch):
    def lseek(fd, offset, whence):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", lseek)

    assert source.find_data(100) == 100
    assert source.find_hole(100) == SIZE


def test_a_failed_search_is_not_hidden(source, monkeypatch):
    def lseek(fd, offset, whence):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", lseek)

    with pytest.raises(OSError) as e:
        source.find_data(0)

    assert e.value.errno == errno.EIO
