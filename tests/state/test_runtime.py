"""The runtime directory: where it is, whose it is, and which mounts run."""

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from uuid import UUID

import pytest

from fleecefs.errors import Busy, NotUsable
from fleecefs.state import runtime

ID = UUID("5f0c4b1e-6b0c-4d0e-9c6a-1f2e3d4c5b6a")


@pytest.fixture
def base(tmpfs_path, monkeypatch):
    """A runtime directory of our own."""
    monkeypatch.setattr(runtime, "base_directory", lambda: tmpfs_path / "run")
    return tmpfs_path / "run"


@pytest.fixture
def listening(base):
    """A function that makes a daemon's socket listen."""
    sockets = []

    def listening(directory):
        listener = socket.socket(socket.AF_UNIX)
        sockets.append(listener)
        listener.bind(str(runtime.control_socket(directory)))
        listener.listen()
        return listener

    yield listening
    for each in sockets:
        each.close()


def test_a_users_directory_is_on_tmpfs(tmpfs_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmpfs_path))

    assert runtime.base_directory() == tmpfs_path / "fleecefs"


@pytest.mark.parametrize("variable", ["/proc", "/missing", "", None])
def test_without_a_directory_on_tmpfs_shared_memory_is_taken(monkeypatch, variable):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", variable)

    assert runtime.base_directory() == Path("/dev/shm/fleecefs-1000")


def test_without_tmpfs_it_says_where_to_mount_one(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc")
    monkeypatch.setattr(runtime, "_file_system", lambda path: "ext4")

    with pytest.raises(NotUsable, match="mount one on /proc or /dev/shm"):
        runtime.base_directory()


def test_a_directory_of_a_mount_is_private(base):
    path = runtime.mount_directory(ID)

    assert path == base / str(ID)
    assert path.stat().st_mode & 0o777 == 0o700
    assert base.stat().st_mode & 0o777 == 0o700
    assert runtime.mount_directory(ID) == path


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_can_enter_is_refused(base, mode):
    base.mkdir()
    base.chmod(mode)

    with pytest.raises(NotUsable, match=f"{base}: has to be a directory of yours"):
        runtime.mount_directory(ID)


def test_a_link_in_its_place_is_refused(base, tmpfs_path):
    (tmpfs_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmpfs_path / "elsewhere")

    with pytest.raises(NotUsable, match="mode 0700"):
        runtime.mount_directory(ID)

    assert os.listdir(tmpfs_path / "elsewhere") == []


def test_somebody_elses_directory_is_refused(base, monkeypatch):
    base.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)

    with pytest.raises(NotUsable, match="of yours"):
        runtime.mount_directory(ID)


def test_a_directory_is_used_by_one_at_a_time(base):
    path = runtime.mount_directory(ID)
    fd = runtime.lock(path)

    with pytest.raises(Busy, match="copy of this state"):
        runtime.lock(path)

    os.close(fd)
    os.close(runtime.lock(path))


def test_mounts_that_run_are_found_in_order(base, listening):
    for number, mount in enumerate(["/mnt/b", "/mnt/a"]):
        path = runtime.mount_directory(UUID(int=number))
        runtime.announce(path, mount)
        listening(path)

    found = runtime.running_mounts()

    assert [each.mount for each in found] == ["/mnt/a", "/mnt/b"]
    assert found[0].socket == str(base / str(UUID(int=1)) / "control")


def test_a_mount_point_that_is_no_text_is_found(base, listening):
    path = runtime.mount_directory(ID)
    mount = os.fsdecode(b"/mnt/\xff\n")
    runtime.announce(path, mount)
    listening(path)

    assert [each.mount for each in runtime.running_mounts()] == [mount]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"mount": "/mnt"}', "null", '"text"', "5"],
)
def test_what_is_no_announcement_is_left_out(base, listening, text):
    path = runtime.mount_directory(ID)
    (path / "mount.json").write_text(text)
    listening(path)

    assert runtime.running_mounts() == []


def test_a_daemon_that_died_is_not_running(base, listening):
    path = runtime.mount_directory(ID)
    runtime.announce(path, "/mnt/a")
    assert runtime.running_mounts() == []
    listener = listening(path)
    assert len(runtime.running_mounts()) == 1

    listener.close()

    assert json.loads((path / "mount.json").read_text())["mount"] == "/mnt/a"
    assert runtime.running_mounts() == []


def test_no_runtime_directory_is_no_mount(base):
    assert runtime.running_mounts() == []


def test_a_long_path_is_no_obstacle(tmpfs_path, monkeypatch, listening):
    long = Path(tempfile.mkdtemp(dir=tmpfs_path)) / ("x" * 120)
    long.mkdir(mode=0o700)
    monkeypatch.setattr(runtime, "base_directory", lambda: long)
    path = runtime.mount_directory(ID)
    runtime.announce(path, "/mnt/a")
    fd = os.open(path, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{fd}/control")
        listener.listen()

        assert [each.mount for each in runtime.running_mounts()] == ["/mnt/a"]
    os.close(fd)


def test_removing_leaves_nothing(base):
    path = runtime.mount_directory(ID)
    runtime.announce(path, "/mnt/a")

    runtime.remove(path)

    assert os.listdir(base) == []
    shutil.rmtree(base)
