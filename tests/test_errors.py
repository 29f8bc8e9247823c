"""What can go wrong in front of the command line: one clear line, and nothing broken.

Every failure says what it is about and what to do, leaves nothing mounted and nothing
running, and takes nothing away that was there.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fleecefs.units import KiB, MiB
from tests.support.mount import (
    FLEECEFS,
    Mount,
    filesystem,
    loop_device,
    require_mount,
    run,
)
from tests.support.namespace import Namespace, require_user


def complaint(done, code=1):
    """Return the one line with which a command has failed."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fleecefs: ")
    assert "[Errno" not in lines[0]
    return lines[0].removeprefix("fleecefs: ")


@pytest.fixture
def prepared(tmpfs_path):
    """A function that makes a Mount which is not mounted; nothing of it may stay."""
    require_mount()
    with ExitStack() as stack:

        def prepared(disks):
            mount = Mount(tmpfs_path / "live", disks)
            stack.callback(mount.kill)
            return mount

        yield prepared


@pytest.fixture
def plain(prepared):
    """A disk that could be mounted."""
    return prepared({"web.raw": MiB})


@pytest.fixture
def used(prepared):
    """A state with a snapshot in it; `check` compares that later."""
    mount = prepared({"web.raw": b"a" * MiB})
    mount.mount()
    mount.create("one")
    overwrite(mount.live("web.raw"), b"b" * 8192)
    mount.umount()
    return mount


def overwrite(path, data):
    """Write to the beginning of a file."""
    with path.open("r+b") as file:
        file.write(data)


def check_snapshot(mount):
    """Mount, and compare the snapshot of `used`."""
    mount.mount()
    assert mount.snapshot("one", "web.raw").read_bytes() == b"a" * MiB
    assert mount.live("web.raw").read_bytes() == b"b" * 8192 + b"a" * (MiB - 8192)
    mount.umount()


def refused(mount, *options):
    """Return the complaint of a mount that has to fail, and leaves nothing behind."""
    text = complaint(mount.try_mount(*options))
    assert not mount.is_mounted
    assert not mount.processes()
    assert not mount.unexpected_log()
    return text


# -- sources


def make_missing(path):
    pass


def make_directory(path):
    path.mkdir()


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_dangling_link(path):
    path.symlink_to("nowhere")


def make_loop_of_links(path):
    path.symlink_to(path)


def make_empty(path):
    path.touch()


def make_character_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(make_missing, "No such file or directory", id="missing"),
        pytest.param(make_directory, "Is a directory", id="directory"),
        pytest.param(make_fifo, "not a regular file or block device", id="fifo"),
        pytest.param(make_socket, "No such device or address", id="socket"),
        pytest.param(make_dangling_link, "No such file", id="dangling link"),
        pytest.param(make_loop_of_links, "symbolic links", id="loop of links"),
        pytest.param(make_empty, "is empty; a disk has a size", id="empty"),
        pytest.param(
            make_character_device, "not a regular file or block device", id="zero"
        ),
    ],
)
def test_a_source_that_is_no_disk(plain, make, says):
    source = plain.directory / "source"
    make(source)
    plain.add_disk("db.raw", source)

    text = refused(plain)

    assert text.startswith(f"source {source}: ")
    assert says in text


def test_a_source_below_a_file(plain):
    plain.add_disk("db.raw", plain.sources["web.raw"] / "below")

    assert "below: Not a directory" in refused(plain)


def test_a_source_on_a_read_only_file_system(plain, tmpfs_path):
    where = tmpfs_path / "read-only"
    where.mkdir()
    shutil.move(plain.sources["web.raw"], where / "web.raw")
    plain.sources["web.raw"] = where / "web.raw"
    with bind(where, "ro"):
        assert "web.raw: Read-only file system" in refused(plain)

    plain.mount()


@contextmanager
def bind(path, options):
    """Mount a directory over itself with options."""
    run("mount", "--bind", path, path)
    try:
        run("mount", "-o", f"remount,bind,{options}", path)
        yield
    finally:
        run("umount", path)


@contextmanager
def locked_by_flock(path):
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def locked_by_record(path):
    with path.open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_by_qemu(path):
    """qemu-io with the image open, waiting for a command."""
    command = ["qemu-io", "-f", "raw", path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        # It has opened the image when it answers.
        qemu.stdin.write("length\n")
        qemu.stdin.flush()
        assert "1 MiB" in qemu.stdout.readline()
        yield
        qemu.stdin.close()


@pytest.mark.parametrize(
    "locked",
    [locked_by_flock, locked_by_record, locked_by_qemu],
    ids=lambda f: f.__name__,
)
def test_a_source_that_is_locked(plain, locked):
    with locked(plain.sources["web.raw"]):
        text = refused(plain)

    assert text.startswith(f"source {plain.sources['web.raw']}: in use by another")
    plain.mount()


def test_a_source_that_another_fleecefs_serves(plain, mounted):
    other = mounted({"web.raw": plain.sources["web.raw"]})

    text = refused(plain)

    assert text.startswith(f"source {plain.sources['web.raw']}: in use by another")
    assert other.live("web.raw").stat().st_size == MiB


def test_a_source_that_is_mounted(plain, tmp_path):
    """A block device; it is busy for as long as its file system is mounted."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 * MiB)
    run("mkfs.ext4", "-q", image)
    with loop_device(image) as device:
        plain.add_disk("db.raw", device)
        with filesystem(device, tmp_path / "mnt"):
            text = refused(plain)
        plain.mount()
        plain.umount()

    assert text.startswith(f"source {device}: ")
    assert "in use by the system: mounted" in text


def test_a_source_given_twice(plain):
    plain.add_disk("db.raw", plain.sources["web.raw"])

    assert "web.raw: in use" in refused(plain)


@pytest.fixture
def namespace():
    with Namespace() as namespace:
        require_user(namespace)
        yield namespace


@pytest.mark.parametrize("mode", ["000", "444", "200"])
def test_a_source_that_may_not_be_opened(namespace, mode):
    namespace.do("truncate", "--size=1M", "secret.raw")
    namespace.do("chmod", mode, "secret.raw")
    namespace.do("mkdir", "live", user=True)

    done = namespace.cli("mount", "--disk=secret.raw", "live", user=True)

    assert complaint(done) == f"source {namespace.home}/secret.raw: Permission denied"
    assert namespace.mounts() == []


# -- names of disks


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param(".", "letters, digits", id="dot"),
        pytest.param("..", "letters, digits", id="dots"),
        pytest.param(".raw", "begin with a letter or digit", id="dot first"),
        pytest.param("-raw", "begin with a letter or digit", id="dash first"),
        pytest.param("a b", "'a b'", id="space"),
        pytest.param("a\nb", r"'a\nb'", id="newline"),
        pytest.param("a\x1b[2Jb", r"'a\x1b[2Jb'", id="escape sequence"),
        pytest.param("a\x7f", r"'a\x7f'", id="delete"),
        pytest.param(os.fsdecode(b"a\xff"), r"'a\udcff'", id="not UTF-8"),
        pytest.param("größe", "letters, digits", id="not ASCII"),
        pytest.param("n" * 64, "64 characters: 63 at most", id="64 bytes"),
        pytest.param("n" * 300, "300 characters: 63 at most", id="300 bytes"),
        pytest.param("snapshots", "use NAME=SOURCE", id="snapshots"),
    ],
)
def test_a_disk_that_can_not_be_called_so(plain, name, says):
    plain.sources[name] = plain.sources.pop("web.raw")

    text = refused(plain)

    assert "disk" in text
    assert says in text


def test_a_name_with_a_slash_is_a_path(plain):
    plain.sources["a/b"] = plain.sources.pop("web.raw")

    text = refused(plain)

    assert text.startswith(f"source {plain.directory}/a/b=")
    assert text.endswith("No such file or directory")


@pytest.mark.parametrize("how", ["given", "made of the path"])
def test_a_name_used_twice(plain, how):
    other = plain.directory / "web.raw"
    other.write_bytes(bytes(MiB))
    name = "web.raw=" if how == "given" else ""

    done = plain.try_mount(f"--disk={name}{other}")

    assert "two disks are named 'web.raw': name one" in complaint(done, code=2)


@pytest.mark.parametrize("name", ["a", "0", "n" * 63, "web-1_2.raw"])
def test_a_disk_that_can_be_called_so(plain, name):
    plain.sources[name] = plain.sources.pop("web.raw")

    plain.mount()

    assert plain.live(name).stat().st_size == MiB


# -- names of snapshots

BAD_SNAPSHOT_NAMES = [
    pytest.param(".hidden", errno.EINVAL, id="dot first"),
    pytest.param("-f", errno.EINVAL, id="dash first"),
    pytest.param("a b", errno.EINVAL, id="space"),
    pytest.param("a\nb", errno.EINVAL, id="newline"),
    pytest.param("a\x1b[2Jb", errno.EINVAL, id="escape sequence"),
    pytest.param(os.fsdecode(b"a\xff"), errno.EINVAL, id="not UTF-8"),
    pytest.param("größe", errno.EINVAL, id="not ASCII"),
    pytest.param("n" * 64, errno.ENAMETOOLONG, id="64 bytes"),
    pytest.param("n" * 300, errno.ENAMETOOLONG, id="300 bytes"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A mount that no test changes."""
    require_mount()
    directory = tmp_path_factory.mktemp("shared")
    mount = Mount(directory, {"web.raw": MiB, "db.raw": 64 * KiB})
    with mount:
        mount.create("taken")
        yield mount


@pytest.mark.parametrize(("name", "code"), BAD_SNAPSHOT_NAMES)
def test_a_snapshot_that_can_not_be_called_so(shared, name, code):
    with pytest.raises(OSError) as e:
        shared.create(name)
    text = complaint(shared.cli("snapshot", "create", "--", name))

    assert e.value.errno == code
    # A name that is no text does not even come through the socket.
    assert text.startswith(("snapshot name ", "Parameter 'name' is not valid"))
    assert os.listdir(shared.snapshots) == ["taken"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "../../web.raw"])
def test_a_snapshot_that_can_not_be_called_so_by_the_command(shared, name):
    text = complaint(shared.cli("snapshot", "create", "--", name))

    assert text.startswith(f"snapshot name {name!r}: use letters, digits")
    assert os.listdir(shared.snapshots) == ["taken"]


def test_a_snapshot_whose_name_is_taken(shared):
    with pytest.raises(FileExistsError):
        shared.create("taken")
    text = complaint(shared.cli("snapshot", "create", "taken"))

    assert text == "snapshot 'taken' exists"


# -- what is not there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        pytest.param(
            ["snapshot", "create", "new", "no.raw"],
            "no disk 'no.raw'; there are db.raw, web.raw",
            id="disk",
        ),
        pytest.param(["snapshot", "show", "no"], "no snapshot 'no'", id="show"),
        pytest.param(["snapshot", "delete", "no"], "no snapshot 'no'", id="delete"),
        pytest.param(["map", "no.raw"], "no disk or snapshot file 'no.raw'", id="map"),
        pytest.param(
            ["map", "snapshots/no/web.raw"],
            "no disk or snapshot file 'snapshots/no/web.raw'",
            id="map of a snapshot",
        ),
        pytest.param(
            ["status", "-m", "/nowhere"],
            "no daemon serves /nowhere: start one with 'fleecefs mount'",
            id="daemon",
        ),
        pytest.param(
            ["umount", "/nowhere"],
            "no daemon serves /nowhere: start one with 'fleecefs mount'",
            id="mount",
        ),
        pytest.param(
            ["umount", "/"],
            "no daemon serves /: start one with 'fleecefs mount'",
            id="another file system",
        ),
    ],
)
def test_what_is_not_there_is_exit_code_3(shared, words, says):
    assert complaint(shared.cli(*words), code=3) == says


def test_deleting_what_is_not_there_by_rmdir(shared):
    with pytest.raises(FileNotFoundError):
        shared.delete("no")


# -- options


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--ram-limit=lots", "'lots' is not a size"),
        ("--ram-limit=-1", "'-1' is not a size"),
        ("--store-limit=1.5G", "'1.5G' is not a size"),
        ("--store-limit=", "'' is not a size"),
        ("--cluster-size=4Q", "'4Q' is not a size"),
        ("--cbw-timeout=soon", "'soon' is not a valid float"),
        ("--cbw-timeout=-1", "write a number of seconds"),
        ("--cbw-timeout=nan", "write a number of seconds"),
        ("--cbw-timeout=inf", "write a number of seconds"),
        ("--on-cbw-error=panic", "'panic' is not one of"),
        ("--frobnicate", "No such option"),
    ],
)
def test_an_option_that_can_not_be_understood(plain, option, says):
    text = complaint(plain.try_mount(option), code=2)

    assert says in text
    assert "--help" in text
    assert not plain.state.exists()


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("0", "0"),
        ("1", "1"),
        ("2K", "2048"),
        ("4095", "4095"),
        ("12K", "12288"),
        ("2M", "2097152"),
    ],
)
def test_a_cluster_size_that_can_not_be(plain, size, says):
    text = refused(plain, f"--cluster-size={size}")

    assert text == (
        f"cluster size of {says} bytes: has to be a power of two from 4 KiB to 1 MiB"
    )
    assert not plain.state.exists()


# -- mount points


@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(Path.rmdir, "no such directory; make it", id="missing"),
        pytest.param(
            lambda path: (path.rmdir(), path.touch()), "not a directory", id="file"
        ),
        pytest.param(
            lambda path: (path / "file").touch(),
            "not empty; use an empty directory",
            id="not empty",
        ),
        pytest.param(
            lambda path: (path.rmdir(), path.symlink_to("nowhere")),
            "no such directory; make it",
            id="dangling link",
        ),
    ],
)
def test_a_mount_point_that_is_none(plain, make, says):
    make(plain.point)

    text = refused(plain)

    assert text.startswith("mount point ")
    assert text.endswith(says)
    assert not plain.state.exists()


def test_a_mount_point_in_use(mounted, plain):
    other = mounted({"db.raw": MiB})
    plain.point = other.point

    text = complaint(plain.try_mount())

    assert text == (f"mount point {other.point}: fleecefs is already mounted there")
    assert other.live("db.raw").stat().st_size == MiB
    plain.point = plain.directory / "mount"


def test_a_mount_point_in_use_under_another_name(mounted, plain):
    other = mounted({"db.raw": MiB})
    link = plain.directory / "link"
    link.symlink_to(other.point)
    plain.point = link

    text = complaint(plain.try_mount())

    assert text.endswith(f"{other.point}: fleecefs is already mounted there")
    plain.point = plain.directory / "mount"


def test_a_mount_point_that_may_not_be_used(namespace):
    namespace.do("mkdir", "--mode=755", "/run/theirs")
    namespace.do("truncate", "--size=1M", "web.raw", user=True)

    done = namespace.cli("mount", "--disk=web.raw", "/run/theirs", user=True)

    text = complaint(done)
    assert text.startswith("can not mount on /run/theirs: ")
    assert "access" in text
    assert namespace.mounts() == []


def test_a_fuse_that_may_not_be_used(namespace):
    namespace.do("chmod", "600", "/dev/fuse")
    namespace.do("mkdir", "live", user=True)
    namespace.do("truncate", "--size=1M", "web.raw", user=True)

    done = namespace.cli("mount", "--disk=web.raw", "live", user=True)

    assert "/dev/fuse: Permission denied" in complaint(done)


def test_without_fusermount3_it_says_what_to_install(plain, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")

    assert refused(plain) == "fusermount3 is missing: install the package fuse3"


# -- the state directory


def rewrite(path, **fields):
    document = json.loads(path.read_text())
    document.update(fields)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(
            lambda path: rewrite(path, version=2),
            "has version 2, this fleecefs reads version 1",
            id="another version",
        ),
        pytest.param(
            lambda path: os.truncate(path, path.stat().st_size // 2),
            "damaged or truncated",
            id="truncated",
        ),
        pytest.param(
            lambda path: os.truncate(path, 0), "damaged or truncated", id="empty"
        ),
        pytest.param(
            lambda path: path.write_bytes(bytes(4096)),
            "damaged or truncated",
            id="zeroes",
        ),
        pytest.param(
            lambda path: path.write_text('{"name": "web", "version": 1}'),
            "not a state file of fleecefs",
            id="foreign",
        ),
        pytest.param(
            lambda path: rewrite(path, disks=[{"name": "../../../etc"}]),
            "is damaged",
            id="wrong fields",
        ),
    ],
)
def test_a_state_that_can_not_be_read(used, damage, says):
    path = used.state / "state.json"
    whole = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()

    text = refused(used)

    assert text.startswith(f"{path}: ")
    assert says in text
    assert "restore it from a backup, or give another --state directory" in text
    assert path.read_bytes() == damaged
    path.write_bytes(whole)
    check_snapshot(used)


def test_a_state_directory_of_somebody_else(plain):
    plain.state.mkdir()
    (plain.state / "letter.txt").write_text("dear")

    text = refused(plain)

    assert text.startswith(f"state {plain.state}: not empty")
    assert "give an empty directory" in text
    assert os.listdir(plain.state) == ["letter.txt"]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Path.touch, id="file"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="dangling link"),
    ],
)
def test_a_state_directory_that_is_none(plain, make):
    make(plain.state)

    assert refused(plain) == f"state {plain.state}: not a directory"


def test_a_state_directory_that_can_not_be_written(used):
    with bind(used.state, "ro"):
        text = refused(used)

    assert text == (
        f"state {used.state}: Read-only file system; "
        "give a --state directory that you can write to"
    )
    check_snapshot(used)


def test_a_state_directory_that_can_not_be_made(plain):
    plain.state = Path("/proc/state")

    assert refused(plain).startswith("state /proc/state: ")


def test_a_state_directory_that_may_not_be_used(namespace):
    namespace.do("mkdir", "live", user=True)
    namespace.do("truncate", "--size=1M", "web.raw", user=True)
    namespace.do("mkdir", "--mode=700", "/run/theirs")

    done = namespace.cli(
        "mount", "--disk=web.raw", "--state=/run/theirs", "live", user=True
    )

    assert complaint(done).startswith("state /run/theirs: Permission denied; give a")
    assert namespace.mounts() == []


def test_a_state_directory_in_use(mounted, prepared):
    first = mounted({"web.raw": b"a" * MiB})
    first.create("one")
    second = prepared({"db.raw": MiB})
    second.state = first.state

    text = refused(second)

    assert text == f"state {first.state}: in use by another fleecefs"
    assert first.snapshot("one", "web.raw").read_bytes() == b"a" * MiB


def fill(directory):
    """Leave no space in a file system."""
    with (
        contextlib.suppress(OSError),
        (directory / "filler").open("wb", buffering=0) as file,
    ):
        while True:
            file.write(bytes(4096))


def test_a_full_file_system_for_the_state(plain, tmpfs_path):
    where = tmpfs_path / "full"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64k", "none", where)
    try:
        fill(where)
        plain.state = where / "state"

        text = refused(plain)
    finally:
        run("umount", where)

    assert text.startswith(f"state {plain.state}: No space left on device")


def test_a_disk_left_out_that_a_snapshot_needs(used):
    used.add_disk("db.raw", MiB)
    source = used.sources.pop("web.raw")

    text = refused(used)

    assert text == (
        f"state {used.state}: snapshot 'one' needs disk 'web.raw': "
        f"add --disk web.raw={source}, or give another --state directory"
    )
    used.sources = {"web.raw": source}
    check_snapshot(used)


def test_another_cluster_size_than_the_snapshots_have(used):
    text = refused(used, "--cluster-size=64K")

    assert text == (
        "disk 'web.raw' has snapshots with a cluster size of 4 KiB: "
        "delete them, or mount without --cluster-size"
    )
    check_snapshot(used)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda m: m.add_disk("x.raw", Path("/nowhere")), id="no source"),
        pytest.param(lambda m: m.add_disk("x.raw", 0), id="empty source"),
        pytest.param(lambda m: m.add_disk("a b", MiB), id="bad name"),
        pytest.param(lambda m: m.options.append("--store=/nowhere"), id="no store"),
        pytest.param(lambda m: m.options.append("--log=/nowhere/log"), id="no log"),
        pytest.param(lambda m: (m.point / "file").touch(), id="mount point not empty"),
    ],
)
def test_a_mount_that_fails_changes_no_snapshot(used, spoil):
    before = (used.state / "state.json").read_bytes()
    spoil(used)

    refused(used)

    assert (used.state / "state.json").read_bytes() == before
    used.sources = {"web.raw": used.sources["web.raw"]}
    used.options.clear()
    for path in used.point.iterdir():
        path.unlink()
    check_snapshot(used)


def test_a_mount_that_fails_leaves_nothing_on_tmpfs(namespace):
    namespace.do("mkdir", "live")
    namespace.do("truncate", "--size=1M", "web.raw")
    options = ["--disk=web.raw", "--disk=missing.raw", "--state=state"]

    complaint(namespace.cli("mount", *options, "live"))

    assert namespace.do("ls", "/run/fleecefs") == ""
    assert namespace.do("ls", "state") == "lock\n"


# -- the store


def test_a_store_that_is_missing(plain):
    store = plain.directory / "store"

    text = refused(plain, f"--store={store}")

    assert text == f"store {store}: no such directory; make it"
    assert not plain.state.exists()


def test_a_store_that_is_a_file(plain):
    text = refused(plain, f"--store={plain.sources['web.raw']}")

    assert text.startswith("store ")


def test_a_store_that_is_read_only_refuses_snapshots(mounted, tmpfs_path):
    store = tmpfs_path / "store"
    store.mkdir()
    mount = mounted({"web.raw": MiB}, f"--store={store}")
    with bind(store, "ro"):
        with pytest.raises(OSError) as e:
            mount.create("one")
        text = complaint(mount.cli("snapshot", "create", "one"))

    assert e.value.errno == errno.EROFS
    assert text.startswith("no new snapshot: ")
    assert "Read-only file system" in text
    assert os.listdir(mount.snapshots) == []
    mount.create("one")


# -- its own mount


def itself(mount):
    return mount.point


def below(mount):
    return mount.point / "below"


def around_the_corner(mount):
    return mount.directory / "sources/../mount/below"


def by_a_link(mount):
    link = mount.directory / "link"
    link.symlink_to(mount.point)
    return link / "below"


@pytest.mark.parametrize("what", ["state", "store", "log", "source"])
@pytest.mark.parametrize(
    "where", [itself, below, around_the_corner, by_a_link], ids=lambda f: f.__name__
)
def test_nothing_that_the_daemon_needs_may_be_on_its_own_mount(plain, what, where):
    path = where(plain)
    if what == "source":
        plain.add_disk("db.raw", path)
        options = []
    else:
        options = [f"--{what}={path}"]

    text = refused(plain, *options)

    assert text.startswith(f"{what} ")
    assert text.endswith(
        f"would be on the mount itself, {plain.point}; put it elsewhere"
    )
    assert os.listdir(plain.point) == []


def test_nothing_may_be_on_its_own_mount_by_a_bind_mount(plain, tmpfs_path):
    twin = tmpfs_path / "twin"
    twin.mkdir()
    run("mount", "--bind", plain.directory, twin)
    try:
        text = refused(plain, f"--store={twin / 'mount/below'}")
    finally:
        run("umount", twin)

    assert "would be on the mount itself" in text


def test_a_state_may_be_on_a_disk_of_another_mount(mounted, prepared, tmp_path):
    first = mounted({"web.raw": 32 * MiB})
    run("mkfs.ext4", "-q", first.live("web.raw"))
    second = prepared({"db.raw": b"a" * MiB})
    with (
        loop_device(first.live("web.raw")) as device,
        filesystem(device, tmp_path / "mnt") as where,
    ):
        second.state = where / "state"
        second.mount()
        second.create("one")
        overwrite(second.live("db.raw"), b"b" * 8192)

        assert second.snapshot("one", "db.raw").read_bytes() == b"a" * MiB
        second.umount()


# -- disks and snapshots


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (os.O_WRONLY, errno.EROFS),
        (os.O_RDWR, errno.EROFS),
        (os.O_RDONLY | os.O_TRUNC, errno.EROFS),
        (os.O_WRONLY | os.O_APPEND, errno.EROFS),
    ],
)
def test_a_snapshot_can_not_be_written(shared, flags, code):
    with pytest.raises(OSError) as e:
        os.open(shared.snapshot("taken", "web.raw"), flags)

    assert e.value.errno == code


def test_a_disk_keeps_its_size(shared):
    with pytest.raises(PermissionError):
        os.truncate(shared.live("web.raw"), 0)
    with pytest.raises(OSError) as e, shared.live("web.raw").open("r+b", 0) as file:
        os.pwrite(file.fileno(), b"a", MiB)

    assert e.value.errno == errno.ENOSPC
    assert shared.live("web.raw").stat().st_size == MiB


# -- the control socket


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\0" * 70_000, id="zeroes"),
        pytest.param(b"\xff\xfe\xfd\n" * 1000, id="not UTF-8"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="HTTP"),
        pytest.param(b"[" * 100_000 + b"\n", id="deep"),
        pytest.param(b'{"execute": ' + b'"a' * 600_000 + b"\n", id="long line"),
        pytest.param(b'{"execute": "quit"}\n', id="no handshake"),
        pytest.param(b'{"execute": "qmp_capabilities", "id": ', id="half"),
        pytest.param(b"9" * 10_000 + b"\n", id="huge number"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_garbage_on_the_control_socket(mounted, data):
    mount = mounted({"web.raw": MiB})
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(Path(mount.status()["runtime"], "control")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    mount.create("after")
    assert mount.snapshot("after", "web.raw").read_bytes() == bytes(MiB)
    assert mount.json("snapshot", "list")[0]["name"] == "after"


# -- the command line as a whole


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["status"], id="status"),
        pytest.param(["snapshot", "list"], id="list"),
        pytest.param(["events"], id="events"),
        pytest.param(["map", "web.raw"], id="map"),
    ],
)
def test_a_runtime_directory_with_rubbish(namespace, words):
    """What looks like daemons and is none."""
    for name, text in ("one", "{}"), ("two", "["), ("three", "null"):
        namespace.do("mkdir", "-p", "-m", "700", f"/run/fleecefs/{name}")
        namespace.do("sh", "-c", f"echo '{text}' >/run/fleecefs/{name}/mount.json")

    text = complaint(namespace.cli(*words), code=3)

    assert text == "no daemon is running: start one with 'fleecefs mount'"


def test_a_reader_that_went_away_is_no_traceback(shared):
    done = subprocess.run(
        f"'{FLEECEFS}' status | true",
        shell=True,
        env=shared.environment(),
        capture_output=True,
        text=True,
    )

    assert done.stderr == ""
