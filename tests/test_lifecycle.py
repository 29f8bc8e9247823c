"""The life of a mount: how it begins, who keeps it busy, and all the ways it ends.

After every end the state is saved and the snapshots are exact when it is mounted again,
except where a test says otherwise.
"""

import contextlib
import errno
import json
import mmap
import os
import signal
import subprocess
import threading
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
    wait_until,
)
from tests.support.namespace import Namespace, require_user

OLD = b"a" * MiB
NEW = b"b" * (64 * KiB)


def overwrite(path, data, offset=0):
    with path.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), data, offset) == len(data)


def take_snapshot(mount):
    """Take a snapshot of a disk that holds OLD, and write NEW to it."""
    mount.create("one")
    overwrite(mount.live("web.raw"), NEW)


def check_snapshot(mount):
    """Compare what `take_snapshot` left."""
    assert mount.snapshot("one", "web.raw").read_bytes() == OLD
    assert mount.live("web.raw").read_bytes() == NEW + OLD[len(NEW) :]


def is_clean(mount):
    return json.loads((mount.state / "state.json").read_text())["is_clean"]


def wait_ended(mount):
    """Return when no process of a mount is left."""
    wait_until(lambda: not mount.processes(), "the end of daemon and keeper")
    assert not mount.is_mounted


def complaint(done, code=1):
    """Return the one line with which a command has failed."""
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fleecefs: ")
    return done.stderr.removeprefix("fleecefs: ").rstrip("\n")


@pytest.fixture
def mount(mounted):
    """A mount with one disk and one snapshot of it."""
    mount = mounted({"web.raw": OLD})
    take_snapshot(mount)
    return mount


# -- the beginning


def test_mounting_returns_when_the_files_can_be_used(mounted):
    mount = mounted({"web.raw": OLD, "db.raw": NEW})

    assert mount.live("web.raw").read_bytes() == OLD
    assert mount.live("db.raw").stat().st_size == len(NEW)
    assert sorted(os.listdir(mount.point)) == ["db.raw", "snapshots", "web.raw"]


def test_daemon_and_keeper_are_detached(mount):
    for pid in mount.pid, mount.keeper_pid:
        assert os.getsid(pid) == mount.keeper_pid
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2)} <= {
            "/dev/null",
            str(mount.log),
        }


@pytest.fixture
def foreground(tmpfs_path):
    """A function that mounts in the foreground and returns the Mount and the process.

    What it says on stderr is in the file `stderr` of the Mount's directory.
    """
    require_mount()
    with ExitStack() as stack:

        def foreground(*options):
            mount = Mount(tmpfs_path / "live", {"web.raw": OLD})
            stack.callback(mount.kill)
            source = mount.sources["web.raw"]
            words = [
                *[FLEECEFS, "mount", f"--disk=web.raw={source}", "--foreground"],
                *[f"--state={mount.state}", *options, mount.point],
            ]
            with (mount.directory / "stderr").open("wb") as stderr:
                process = subprocess.Popen(
                    words,
                    env=mount.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    start_new_session=True,
                )
            stack.callback(process.communicate)
            stack.callback(mount.kill)
            wait_until(
                lambda: process.poll() is not None or "serves" in said(mount),
                "the mount",
            )
            return mount, process

        yield foreground


def said(mount):
    return (mount.directory / "stderr").read_text()


def test_in_the_foreground_it_stays_and_logs_to_stderr(foreground):
    mount, process = foreground()

    take_snapshot(mount)
    check_snapshot(mount)

    assert process.poll() is None
    assert mount.keeper_pid == process.pid
    assert "INFO snapshot one of 1 disks created" in said(mount)
    assert not list(mount.state.glob("*.log"))


def test_in_the_foreground_it_can_log_to_a_file(foreground):
    mount, process = foreground("--log=/dev/stderr")

    mount.create("one")

    assert process.poll() is None
    assert "INFO snapshot one" in said(mount)


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda pid: os.killpg(pid, signal.SIGINT), id="Ctrl-C"),
        pytest.param(lambda pid: os.kill(pid, signal.SIGINT), id="SIGINT"),
        pytest.param(lambda pid: os.kill(pid, signal.SIGTERM), id="SIGTERM"),
        pytest.param(lambda pid: os.killpg(pid, signal.SIGTERM), id="SIGTERM to all"),
    ],
)
def test_in_the_foreground_a_signal_ends_it_well(foreground, end):
    mount, process = foreground()
    take_snapshot(mount)

    end(process.pid)

    assert process.wait(60) == 0
    wait_ended(mount)
    assert is_clean(mount)
    assert "Traceback" not in said(mount)
    mount.mount()
    check_snapshot(mount)


def test_in_the_foreground_umount_ends_it_well(foreground):
    mount, process = foreground()

    mount.umount()

    assert process.wait(60) == 0


def test_in_the_foreground_a_failure_is_one_line(foreground):
    mount, process = foreground("--store=/nowhere")

    assert process.wait(60) == 1
    assert said(mount) == ("fleecefs: store /nowhere: no such directory; make it\n")
    assert not mount.is_mounted


# -- ends without a user


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda m: os.kill(m.pid, signal.SIGTERM), id="SIGTERM to daemon"),
        pytest.param(lambda m: os.kill(m.pid, signal.SIGINT), id="SIGINT to daemon"),
        pytest.param(
            lambda m: os.kill(m.keeper_pid, signal.SIGTERM), id="SIGTERM to keeper"
        ),
        pytest.param(
            lambda m: os.kill(m.keeper_pid, signal.SIGINT), id="SIGINT to keeper"
        ),
        pytest.param(lambda m: run("fusermount3", "-u", m.point), id="fusermount3"),
        pytest.param(
            lambda m: run("fusermount3", "-u", "-z", m.point), id="fusermount3 -z"
        ),
        pytest.param(lambda m: run("umount", m.point), id="umount(8)"),
        pytest.param(lambda m: m.cli("umount", m.point), id="umount"),
        pytest.param(lambda m: m.cli("umount", "--force", m.point), id="forced"),
    ],
)
@pytest.mark.logs("WARNING cut off")
def test_an_end_saves_everything(mount, end):
    runtime = Path(mount.status()["runtime"])

    end(mount)

    wait_ended(mount)
    assert is_clean(mount)
    assert not runtime.exists()
    assert "unmounted" in mount.read_log()
    mount.mount()
    check_snapshot(mount)


def test_unmounting_returns_when_nothing_is_left(mount):
    assert len(mount.processes()) == 2

    assert mount.cli("umount", mount.point).returncode == 0

    assert not mount.is_mounted
    assert not mount.processes()
    # Its locks are free, too.
    mount.mount()


def test_unmounting_twice_says_that_it_is_not_mounted(mount):
    mount.umount()

    text = complaint(mount.cli("umount", mount.point), code=3)

    assert text == (f"no daemon serves {mount.point}: start one with 'fleecefs mount'")


def test_signals_one_after_the_other_are_one_end(mount):
    pids = mount.processes()
    for _ in range(5):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    wait_ended(mount)
    assert is_clean(mount)
    assert not mount.unexpected_log()


def test_who_reads_a_snapshot_keeps_it_mounted(mount):
    with mount.snapshot("one", "web.raw").open("rb") as file:
        text = complaint(mount.cli("umount", mount.point))

        assert f"(pid {os.getpid()})" in text
        assert file.read() == OLD


# -- users


@contextmanager
def an_open_file(mount, tmp_path):
    with mount.live("web.raw").open("rb") as file:
        process = subprocess.Popen(["sleep", "600"], stdin=file)
    yield f"sleep (pid {process.pid})"
    process.kill()
    process.wait()


@contextmanager
def a_current_directory(mount, tmp_path):
    process = subprocess.Popen(["sleep", "600"], cwd=mount.snapshots)
    yield f"sleep (pid {process.pid})"
    process.kill()
    process.wait()


@contextmanager
def a_mapping(mount, tmp_path):
    with mount.live("web.raw").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    with mapped:
        yield f"(pid {os.getpid()})"


@contextmanager
def a_loop_device(mount, tmp_path):
    with loop_device(mount.live("web.raw")) as device:
        yield str(device)


@contextmanager
def a_mount_on_a_loop_device(mount, tmp_path):
    with (
        loop_device(mount.live("fs.raw")) as device,
        filesystem(device, tmp_path / "mnt"),
    ):
        yield str(device)


@contextmanager
def a_bind_mount_below(mount, tmp_path):
    run("mount", "--bind", "/usr", mount.snapshots)
    yield f"the mount on {mount.snapshots}"
    run("umount", mount.snapshots)


USERS = [
    an_open_file,
    a_current_directory,
    a_mapping,
    a_loop_device,
    a_mount_on_a_loop_device,
    a_bind_mount_below,
]


@pytest.fixture(scope="module")
def file_system(tmp_path_factory):
    """The bytes of an empty ext4."""
    require_mount()
    path = tmp_path_factory.mktemp("images") / "ext4"
    with path.open("wb") as file:
        file.truncate(8 * MiB)
    run("mkfs.ext4", "-q", path)
    return path.read_bytes()


@pytest.fixture
def used(mounted, file_system):
    mount = mounted({"web.raw": OLD, "fs.raw": file_system})
    take_snapshot(mount)
    return mount


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
def test_a_mount_in_use_is_not_unmounted(used, tmp_path, user):
    with user(used, tmp_path) as name:
        text = complaint(used.cli("umount", used.point))

        assert text.startswith(f"{used.point} is in use by ")
        assert name in text
        assert text.endswith("; end that, or use --force")
        assert used.is_mounted
        if user is not a_bind_mount_below:
            check_snapshot(used)
            used.create("two")
    used.umount()


@pytest.mark.logs("ERROR going on: .* is in use by sleep")
@pytest.mark.parametrize("whom", ["pid", "keeper_pid"])
def test_a_signal_does_not_end_a_mount_in_use(mount, tmp_path, whom):
    with an_open_file(mount, tmp_path) as name:
        os.kill(getattr(mount, whom), signal.SIGTERM)
        wait_until(lambda: f"is in use by {name}" in mount.read_log(), "the refusal")

        check_snapshot(mount)
        mount.create("two")
        mount.delete("two")
    os.kill(getattr(mount, whom), signal.SIGTERM)

    wait_ended(mount)
    assert is_clean(mount)


@pytest.mark.logs("ERROR going on: .* is in use by")
def test_a_signal_does_not_disturb_who_writes(mount):
    """Every write that was answered is there in the end."""
    with Writer(mount.live("web.raw")) as writer:
        writer.wait_for(100)
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: "going on" in mount.read_log(), "the refusal")
        writer.wait_for(writer.count + 100)
    assert writer.error is None
    os.kill(mount.pid, signal.SIGTERM)

    wait_ended(mount)
    assert writer.is_in(mount.sources["web.raw"])


class Writer:
    """Writes numbers to the sectors of a disk, round and round, until it is told to
    end or a write fails."""

    def __init__(self, path):
        self.path = path
        self.count = 0
        self.error = None
        self._told = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._told.set()
        self.wait_ended()

    def wait_ended(self):
        self._thread.join(60)
        assert not self._thread.is_alive(), "it hangs"

    def wait_for(self, count):
        wait_until(lambda: self.count >= count or self.error, "writes")
        assert self.error is None

    def _write(self):
        fd = os.open(self.path, os.O_WRONLY)
        try:
            while not self._told.is_set():
                sector = self.count % (MiB // 512)
                data = self.count.to_bytes(8, "big") * 64
                assert os.pwrite(fd, data, sector * 512) == 512
                self.count += 1
        except OSError as e:
            self.error = e
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def is_in(self, path):
        """Tell whether everything that was answered is in a file."""
        data = path.read_bytes()
        first = max(0, self.count - MiB // 512)
        # The write that failed may have been done.
        return all(
            data[at : at + 8] in (n.to_bytes(8, "big"), self.count.to_bytes(8, "big"))
            for n in range(first, self.count)
            for at in [n % (MiB // 512) * 512]
        )


# -- ends with users


@contextmanager
def opened(path):
    """Open a file whose mount may be gone when it is closed."""
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.mark.logs("WARNING cut off whoever still uses")
def test_force_ends_a_mount_in_use(mount, tmp_path):
    with opened(mount.live("web.raw")) as fd:
        done = mount.cli("umount", "--force", mount.point)

        assert done.returncode == 0, done.stderr
        wait_ended(mount)
        with pytest.raises(OSError) as e:
            os.pread(fd, 512, 0)
    assert e.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    assert is_clean(mount)
    mount.mount()
    check_snapshot(mount)


@pytest.mark.logs("WARNING cut off whoever still uses")
def test_force_gives_writers_an_error(mount):
    with Writer(mount.live("web.raw")) as writer:
        writer.wait_for(100)

        assert mount.cli("umount", "--force", mount.point).returncode == 0

        writer.wait_ended()
    assert isinstance(writer.error, OSError)
    wait_ended(mount)
    assert is_clean(mount)
    assert writer.is_in(mount.sources["web.raw"])
    mount.mount()
    assert mount.snapshot("one", "web.raw").read_bytes() == OLD


@pytest.mark.logs("WARNING cut off whoever still uses")
def test_force_ends_a_file_system_on_a_loop_device(used, tmp_path):
    where = tmp_path / "mnt"
    where.mkdir()
    device = run("losetup", "--find", "--show", used.live("fs.raw")).strip()
    try:
        run("mount", device, where)
        (where / "file").write_bytes(NEW)

        done = used.cli("umount", "--force", used.point)

        assert done.returncode == 0, done.stderr
        wait_ended(used)
        with pytest.raises(OSError):
            sync(where / "file")
    finally:
        run("umount", "--lazy", where)
        run("losetup", "--detach", device)
    assert is_clean(used)
    used.mount()
    check_snapshot(used)


def sync(path):
    with path.open("r+b", buffering=0) as file:
        file.write(b"new")
        os.fsync(file.fileno())


def test_a_lazy_unmount_from_outside_waits_for_the_last_user(mount):
    with mount.live("web.raw").open("r+b", buffering=0) as file:
        run("fusermount3", "-u", "-z", mount.point)

        assert not mount.is_mounted
        assert os.pwrite(file.fileno(), b"c" * 512, MiB - 512) == 512
        assert len(mount.processes()) == 2
    wait_ended(mount)
    assert is_clean(mount)
    mount.mount()
    assert mount.snapshot("one", "web.raw").read_bytes() == OLD
    assert mount.live("web.raw").read_bytes()[-512:] == b"c" * 512


# -- sudden ends


def kill_suddenly(mount):
    """Kill keeper and daemon so that neither can do anything about it."""
    keeper, daemon = mount.keeper_pid, mount.pid
    os.kill(daemon, signal.SIGSTOP)
    for pid in keeper, daemon:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount.processes(), "the end")


def test_a_kill_of_everything_loses_nothing(mount):
    """Keeper and daemon at once; then it is mounted again, over what is left."""
    overwrite(mount.live("web.raw"), NEW, MiB // 2)
    kill_suddenly(mount)
    with pytest.raises(OSError):
        mount.live("web.raw").read_bytes()

    mount.mount()

    assert mount.snapshot("one", "web.raw").read_bytes() == OLD
    half = NEW + OLD[: MiB // 2 - len(NEW)]
    assert mount.live("web.raw").read_bytes() == half + half


@pytest.mark.logs("WARNING cut off whoever still uses")
def test_a_kill_of_the_keeper_is_an_end(mount):
    keeper = mount.keeper_pid
    with opened(mount.live("web.raw")) as fd:
        os.kill(keeper, signal.SIGKILL)

        wait_ended(mount)
        with pytest.raises(OSError):
            os.pread(fd, 512, 0)
    assert is_clean(mount)
    mount.mount()
    check_snapshot(mount)


def test_what_has_lost_its_daemon_can_be_unmounted(mount):
    kill_suddenly(mount)
    assert mount.is_mounted

    done = mount.cli("umount", mount.point)

    assert done.returncode == 0, done.stderr
    assert "had lost its daemon" in done.stdout
    assert not mount.is_mounted
    mount.mount()
    check_snapshot(mount)


# -- the log


def test_sighup_begins_the_log_again(mount):
    old = mount.log.rename(mount.directory / "old.log")
    os.kill(mount.pid, signal.SIGHUP)
    wait_until(mount.log.exists, "the new log")

    mount.create("two")

    assert "snapshot two" in mount.read_log()
    assert "snapshot two" not in old.read_text()


@pytest.mark.logs("going on: log")
def test_sighup_without_a_place_for_the_log_changes_nothing(mount, tmp_path):
    elsewhere = mount.directory / "logs"
    elsewhere.mkdir()
    mount.umount()
    log, mount.log = mount.log, elsewhere / "log"
    mount.mount()
    generation = mount.status()["generation"]
    moved = elsewhere.rename(mount.directory / "moved")
    for pid in mount.pid, mount.keeper_pid:
        os.kill(pid, signal.SIGHUP)
    wait_until(lambda: "going on: log" in (moved / "log").read_text(), "the refusal")

    check_snapshot(mount)

    assert mount.status()["generation"] == generation
    mount.log = log


# -- several mounts


def test_two_mounts_know_nothing_of_each_other(mounted):
    first, second = mounted({"web.raw": OLD}), mounted({"web.raw": OLD})
    take_snapshot(first)
    second.create("another")

    assert os.listdir(first.snapshots) == ["one"]
    assert os.listdir(second.snapshots) == ["another"]
    first.umount()
    assert second.snapshot("another", "web.raw").read_bytes() == OLD
    assert second.live("web.raw").read_bytes() == OLD
    first.mount()
    check_snapshot(first)


@pytest.fixture
def namespace():
    with Namespace() as namespace:
        yield namespace


def mount_in(namespace, name, user=False):
    """Mount a disk of 1 MiB on a directory `name` of its own."""
    namespace.do("mkdir", name, user=user)
    namespace.do("truncate", "--size=1M", f"{name}.raw", user=user)
    options = [f"--disk={name}.raw", f"--state={name}.state"]
    done = namespace.cli("mount", *options, name, user=user)
    assert done.returncode == 0, done.stderr
    return namespace.home / name


def test_the_only_daemon_is_found(namespace):
    point = mount_in(namespace, "web")

    done = namespace.cli("status")

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"mount   {point}\n")
    assert namespace.cli("snapshot", "create", "one").returncode == 0
    assert namespace.do("ls", point / "snapshots") == "one\n"


def test_of_two_daemons_one_has_to_be_chosen(namespace):
    first, second = mount_in(namespace, "web"), mount_in(namespace, "db")

    text = complaint(namespace.cli("snapshot", "create", "one"), code=2)
    chosen = namespace.cli("snapshot", "create", "one", "--mount", "web")

    assert text.startswith(f"choose a daemon with --mount: {second}, {first}")
    assert chosen.returncode == 0, chosen.stderr
    assert namespace.do("ls", first / "snapshots") == "one\n"
    assert namespace.do("ls", second / "snapshots") == ""
    assert namespace.cli("umount", "db").returncode == 0
    assert namespace.cli("status").stdout.startswith(f"mount   {first}\n")


def test_without_a_daemon_it_says_how_to_start_one(namespace):
    text = complaint(namespace.cli("status"), code=3)

    assert text == "no daemon is running: start one with 'fleecefs mount'"


# -- events


@contextmanager
def events_of(mount):
    """Run `fleecefs events`; yield a function that returns the next event."""
    command = [FLEECEFS, "events", "--json"]
    with subprocess.Popen(
        command, env=mount.environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, lambda: json.loads(process.stdout.readline())
        process.kill()


@pytest.mark.logs("ERROR snapshot one of web.raw is broken")
def test_events_tell_what_becomes_of_snapshots(mounted):
    mount = mounted({"web.raw": OLD}, "--ram-limit=0", "--store-limit=64K")
    with events_of(mount) as (process, next_event):
        with probes(mount):
            # Nobody tells when it begins to listen.
            assert next_event()["data"]["name"] == "probe"
        mount.create("one")
        event = next_event()
        while event["data"]["name"] == "probe":
            event = next_event()
        assert event["event"] == "FLEECEFS_SNAPSHOT_CREATED"
        assert event["data"]["name"] == "one"
        assert event["data"]["disks"] == ["web.raw"]

        overwrite(mount.live("web.raw"), b"b" * (128 * KiB))
        event = next_event()
        assert event["event"] == "FLEECEFS_SNAPSHOT_BROKEN"
        assert event["data"]["name"] == "one"
        assert event["data"]["disk"] == "web.raw"
        assert "limit" in event["data"]["reason"]

        mount.delete("one")
        event = next_event()
        assert event["event"] == "FLEECEFS_SNAPSHOT_DELETED"
        assert event["data"] == {"name": "one"}

        mount.umount()
        assert next_event()["event"] == "SHUTDOWN"
        assert process.wait(60) == 0


@contextmanager
def probes(mount):
    """Let snapshots called `probe` come and go."""
    told = threading.Event()

    def come_and_go():
        while not told.is_set():
            mount.create("probe")
            mount.delete("probe")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        yield
    finally:
        told.set()
        thread.join()


# -- users who are not root


@pytest.fixture
def user_namespace(namespace):
    require_user(namespace)
    return namespace


def test_a_user_mounts_files_of_their_own(user_namespace):
    namespace = user_namespace
    point = mount_in(namespace, "web", user=True)

    def do(*words):
        return namespace.do(*words, user=True)

    do("sh", "-c", "printf old | dd of=web/web.raw conv=notrunc status=none")
    do("mkdir", "web/snapshots/one")
    do("sh", "-c", "printf new | dd of=web/web.raw conv=notrunc status=none")

    assert do("head", "-c", "3", "web/snapshots/one/web.raw") == "old"
    assert do("head", "-c", "3", "web/web.raw") == "new"
    assert namespace.cli("status", user=True).stdout.startswith(f"mount   {point}\n")
    assert namespace.cli("umount", "web", user=True).returncode == 0
    assert namespace.mounts() == []
    namespace.do("mkdir", "elsewhere", user=True)
    done = namespace.cli(
        "mount", "--disk=web.raw", "--state=web.state", "elsewhere", user=True
    )
    assert done.returncode == 0, done.stderr
    assert do("head", "-c", "3", "elsewhere/snapshots/one/web.raw") == "old"


def test_a_users_mount_is_closed_to_others(user_namespace):
    mount_in(user_namespace, "web", user=True)

    done = user_namespace.run("ls", "web")

    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    # Root has daemons of its own.
    assert complaint(user_namespace.cli("status"), code=3)


def test_a_user_can_force_the_end(user_namespace):
    namespace = user_namespace
    mount_in(namespace, "web", user=True)
    reader = subprocess.Popen(
        namespace.command(
            "sh", "-c", "exec 3<web/web.raw && exec sleep 600", user=True
        ),
        env=namespace.environment(user=True),
    )
    try:
        comm = Path(f"/proc/{reader.pid}/comm")
        wait_until(lambda: comm.read_text() == "sleep\n", "the reader")
        text = complaint(namespace.cli("umount", "web", user=True))
        done = namespace.cli("umount", "--force", "web", user=True)
    finally:
        reader.kill()
        reader.wait()

    assert f"is in use by sleep (pid {reader.pid})" in text
    assert done.returncode == 0, done.stderr
    assert namespace.mounts() == []
    state = namespace.do("cat", "web.state/state.json", user=True)
    assert json.loads(state)["is_clean"] is True


def test_a_users_runtime_directory_is_private(user_namespace):
    mount_in(user_namespace, "web", user=True)

    listed = user_namespace.do("stat", "-c", "%a %u", "fleecefs", user=True)

    assert listed == "700 65534\n"
