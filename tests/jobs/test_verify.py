"""A disk of one instant compared with a backup of it."""

import contextlib
import errno
import fcntl
import os

import pytest
import trio
import trio.testing

from fleecefs.bitmaps.steps import Add, Disable
from fleecefs.block.epoch import OnCbwError
from fleecefs.errors import Busy, NotFound, NotUsable
from fleecefs.jobs import compare, verify
from fleecefs.jobs.backups import create_backups
from fleecefs.jobs.options import BackupOptions, Format, Sync, VerifyOptions
from fleecefs.jobs.registry import Jobs
from fleecefs.jobs.status import JobStatus
from fleecefs.jobs.target import busy_targets
from fleecefs.jobs.verify import create_verify
from fleecefs.units import KiB, MiB
from tests.support.copying import wait_for
from tests.support.faulty import Faulty
from tests.support.gate import Gate
from tests.support.host import CLUSTER
from tests.support.qemu import qemu_img, require_qemu

# Neither a whole number of chunks, nor of clusters, nor of sectors.
SIZE = 3 * MiB + 5 * KiB + 7

# A speed at which nothing follows the first chunk.
NEVER = 1


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Wait for nothing as long as people would."""
    monkeypatch.setattr(verify, "_CLOSE_SECONDS", 0.2)


@pytest.fixture
def web(host):
    """A host with a disk of all bytes there are."""
    host.add("web.raw", (bytes(range(256)) * (SIZE // 256 + 1))[:SIZE])
    host.open()
    return host


@pytest.fixture
def target(web, tmpfs_path):
    """A raw backup of it."""
    path = tmpfs_path / "copy.raw"
    path.write_bytes(web.live("web.raw"))
    return path


def wanted(target, device="web.raw", **options):
    options.setdefault("job_id", "v")
    options.setdefault("auto_dismiss", False)
    return VerifyOptions(device, target, **options)


@contextlib.asynccontextmanager
async def running(host):
    """The jobs of a daemon, which are cancelled at the end."""
    jobs = Jobs(lambda wanted: create_backups(host.inventory, wanted), host._emit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(jobs.run)
        try:
            yield jobs
        finally:
            await jobs.close()


async def verified(host, target, **options):
    """Verify, and return what is known of the job in the end."""
    async with running(host) as jobs:
        job = create_verify(host.inventory, wanted(target, **options))
        jobs.add([job])
        await ended(job)
    assert nothing_left(host)
    return job.describe()


async def ended(job):
    await wait_for(lambda: job.is_over)
    return job


def nothing_left(host):
    """Whether no trace of a job is left."""
    disks = host.inventory.disks.values()
    epochs = [epoch for disk in disks for epoch in disk.history.epochs]
    return not epochs and not host.inventory.private and not busy_targets()


def add_bitmap(host, **options):
    options.setdefault("persistent", False)
    host.inventory.change_bitmaps([Add("web.raw", "daily", **options)])


def corrupt(path, *offsets):
    with path.open("r+b") as file:
        for at in offsets:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)


def hook(job, wrap, *args, **kwargs):
    """Put an image around the backup that a job reads, and return it."""
    job._backup._chain = wrap(job._backup._chain, *args, **kwargs)
    return job._backup._chain


# -- what is found


async def test_a_backup_is_like_its_disk(web, target):
    shown = await verified(web, target)

    assert shown["error"] is None
    assert (shown["differs"], shown["extents"]) == (0, [])
    assert (shown["current"], shown["total"]) == (SIZE, SIZE)
    assert (shown["type"], shown["format"], shown["sync"]) == ("verify", "raw", None)
    assert (shown["bitmap"], shown["dirty"], shown["differs-dirty"]) == (None, None, 0)


@pytest.mark.logs("failed: differs")
@pytest.mark.parametrize(
    ("offsets", "extents"),
    [
        pytest.param([0], [[0, 512]], id="first"),
        pytest.param([SIZE - 1], [[SIZE - 7, 7]], id="last"),
        pytest.param([MiB - 1], [[MiB - 512, 512]], id="end-of-chunk"),
        pytest.param([MiB], [[MiB, 512]], id="begin-of-chunk"),
        pytest.param([MiB - 1, MiB], [[MiB - 512, 1024]], id="over-a-border"),
        pytest.param(
            [5, MiB, 3 * MiB - 1, 3 * MiB],
            [[0, 512], [MiB, 512], [3 * MiB - 512, 1024]],
            id="here-and-there",
        ),
    ],
)
async def test_a_byte_that_differs_is_found(web, target, offsets, extents):
    corrupt(target, *offsets)

    shown = await verified(web, target)

    length = sum(length for _, length in extents)
    assert (shown["extents"], shown["extent-count"]) == (extents, len(extents))
    assert (shown["differs"], shown["differs-dirty"]) == (length, 0)
    assert shown["error"].startswith(f"differs from {target} in {len(extents)} extent")
    assert not shown["cancelled"]


@pytest.mark.logs("failed: differs")
async def test_all_may_differ(web, target):
    target.write_bytes(bytes(byte ^ 1 for byte in target.read_bytes()))

    shown = await verified(web, target)

    assert (shown["extents"], shown["differs"]) == ([[0, SIZE]], SIZE)


async def test_what_was_written_since_is_within_the_bitmap(web, target):
    add_bitmap(web)
    web.write("web.raw", b"n" * 1000, MiB - 10)
    web.write("web.raw", b"n", SIZE - 1)

    shown = await verified(web, target, bitmap="daily")

    assert shown["error"] is None
    assert shown["differs"] == 0
    assert shown["differs-dirty"] == 3 * 512 + 7
    assert shown["dirty"] == 3 * 64 * KiB


@pytest.mark.logs("failed: differs")
async def test_a_bitmap_that_misses_writes_is_found_out(web, target):
    add_bitmap(web)
    web.write("web.raw", b"n", 0)
    web.inventory.change_bitmaps([Disable("web.raw", "daily")])
    web.write("web.raw", b"n", 2 * MiB)

    shown = await verified(web, target, bitmap="daily")

    assert (shown["extents"], shown["differs-dirty"]) == ([[2 * MiB, 512]], 512)
    assert shown["error"] == (
        f"differs from {target} in 1 extent, 512 B, outside bitmap 'daily'"
    )


async def test_of_a_busy_bitmap_all_counts_that_its_job_may_give_back(
    web, target, tmpfs_path
):
    add_bitmap(web)
    web.write("web.raw", b"n", 0)
    async with running(web) as jobs:
        options = BackupOptions(
            "web.raw",
            tmpfs_path / "other.raw",
            job_id="b",
            bitmap="daily",
            bitmap_mode=None,
            sync=Sync.INCREMENTAL,
            auto_finalize=False,
        )
        (backup,) = await jobs.start_backups([options])
        await wait_for(lambda: backup.status is JobStatus.PENDING)
        web.write("web.raw", b"n", MiB)
        job = create_verify(web.inventory, wanted(target, bitmap="daily"))
        jobs.add([job])
        await ended(job)

        assert job.error is None
        assert job.describe()["differs-dirty"] == 2 * 512


async def test_holes_are_not_read(host, tmpfs_path, monkeypatch):
    monkeypatch.setattr(compare, "_DATA_SIZE", MiB)
    path = host.add("web.raw", b"")
    with path.open("r+b") as file:
        file.truncate(64 * MiB + 5)
        file.seek(40 * MiB)
        file.write(b"x" * 10_000)
    host.open()
    target = tmpfs_path / "copy.raw"
    with target.open("wb") as file:
        file.truncate(64 * MiB + 5)
        file.seek(40 * MiB)
        file.write(b"x" * 10_000)
    async with running(host) as jobs:
        job = create_verify(host.inventory, wanted(target, speed=MiB))
        chain = hook(job, Faulty, on="pread", nth=2)
        jobs.add([job])
        await ended(job)

    assert (job.error, chain.fired) == (None, 0)
    assert job.progress.current == 64 * MiB + 5


@pytest.mark.logs("failed: differs")
@pytest.mark.parametrize("where", ["disk", "backup"])
async def test_what_only_one_of_them_has_is_found(host, tmpfs_path, where):
    path = host.add("web.raw", bytes(8))
    target = tmpfs_path / "copy.raw"
    target.write_bytes(bytes(8))
    for each in path, target:
        os.truncate(each, 200 * MiB)
    with (path if where == "disk" else target).open("r+b") as file:
        file.seek(150 * MiB)
        file.write(b"x")
    host.open()

    shown = await verified(host, target)

    assert shown["extents"] == [[150 * MiB, 512]]


# -- while the guest goes on


async def test_what_the_guest_writes_meanwhile_does_not_show(web, target):
    add_bitmap(web)
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target, bitmap="daily"))
        gate = hook(job, Gate)
        stays = [gate.hold("pread") for _ in range(4)]
        jobs.add([job])
        for stay in stays:
            await trio.to_thread.run_sync(stay.wait_arrived)
        await trio.to_thread.run_sync(web.write, "web.raw", b"n" * SIZE)
        for stay in stays:
            stay.release()
        await ended(job)
        shown = job.describe()

    assert shown["error"] is None
    # Neither of them: both are of the instant.
    assert (shown["differs"], shown["differs-dirty"], shown["dirty"]) == (0, 0, 0)
    assert shown["cost"]["waited"] > 0


async def test_what_is_compared_is_not_preserved_any_more(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target, speed=NEVER))
        jobs.add([job])
        await wait_for(lambda: job.progress.current == MiB)
        web.write("web.raw", b"n" * MiB, 0)
        before = job.describe()["cost"]["ram"]
        web.write("web.raw", b"n", 2 * MiB)
        after = job.describe()["cost"]["ram"]
        job.cancel()
        await ended(job)

    assert (before, after) == (0, CLUSTER)


@pytest.mark.logs("failed: its snapshot is broken")
async def test_a_broken_snapshot_is_no_result(host, tmpfs_path):
    host.add("web.raw", b"a" * (2 * MiB))
    host.open(ram_limit=0, store_limit=0)
    target = tmpfs_path / "copy.raw"
    target.write_bytes(host.live("web.raw"))
    async with running(host) as jobs:
        job = create_verify(host.inventory, wanted(target, speed=NEVER))
        jobs.add([job])
        await wait_for(lambda: job.progress.current == MiB)
        host.write("web.raw", b"n", MiB)
        await ended(job)

    assert job.error.startswith("its snapshot is broken: could not preserve: ")
    assert job.describe()["differs"] is None
    assert nothing_left(host)


async def test_a_guest_never_gets_an_error(host, tmpfs_path):
    host.add("web.raw", bytes(range(256)) * 16)
    host.open(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE)
    target = tmpfs_path / "copy.raw"
    target.write_bytes(host.live("web.raw"))

    job = create_verify(host.inventory, wanted(target))

    epoch = job._private.snapshot.epoch
    assert epoch.on_cbw_error is OnCbwError.BREAK_SNAPSHOT
    job._backup.users.close()


# -- what people tell it


async def test_it_rests_when_told_to(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target, speed=NEVER))
        jobs.add([job])
        await wait_for(lambda: job.progress.current == MiB)
        job.pause()
        await wait_for(lambda: job.status is JobStatus.PAUSED)
        job.set_speed(0)
        at_rest = job.progress.current
        job.resume()
        await ended(job)

    assert at_rest == MiB
    assert (job.error, job.progress.current) == (None, SIZE)


async def test_cancel_does_not_wait_for_a_target_that_hangs(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target))
        gate = hook(job, Gate)
        stays = [gate.hold("pread") for _ in range(4)]
        jobs.add([job])
        for stay in stays:
            await trio.to_thread.run_sync(stay.wait_arrived)
        job.cancel()
        await ended(job)
        busy = busy_targets()
        fd = job._backup._chain.image._layers[0].file.fd
        is_open = os.fstat(fd)
        for stay in stays:
            stay.release()
        await wait_for(lambda: not busy_targets())

    assert job.error == "cancelled"
    assert job.describe()["differs"] is None
    assert busy == [str(target)]
    assert os.path.samestat(is_open, target.stat())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert nothing_left(web)


async def test_others_do_not_run_away_from_one_that_hangs(web, target, monkeypatch):
    monkeypatch.setattr(compare, "_AHEAD_MAX", MiB)
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target))
        gate = hook(job, Gate)
        stay = gate.hold("pread")
        jobs.add([job])
        await trio.to_thread.run_sync(stay.wait_arrived)
        await trio.testing.wait_all_tasks_blocked(0.05)
        ahead = job.progress.current
        stay.release()
        await ended(job)

    assert ahead == 0
    assert (job.error, job.progress.current) == (None, SIZE)


@pytest.mark.logs("failed: injected into pread_into")
async def test_an_error_of_the_backup_is_reported(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target))
        hook(job, Faulty, on="pread", nth=2, code=errno.EIO)
        jobs.add([job])
        await ended(job)

    assert job.error == "injected into pread_into"
    assert job.describe()["differs"] is None
    assert nothing_left(web)
    errors = [data for name, data in web.events if name == "BLOCK_JOB_ERROR"]
    assert errors == [{"device": "v", "operation": "read", "action": "report"}]


@pytest.mark.logs("failed: .*became shorter while it was read")
async def test_a_backup_that_is_cut_short_is_reported(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target, speed=NEVER))
        jobs.add([job])
        await wait_for(lambda: job.progress.current == MiB)
        os.truncate(target, MiB)
        job.set_speed(0)
        await ended(job)

    assert str(target) in job.error


# -- the end of the daemon


async def test_it_ends_with_a_restart(web, target):
    async with running(web) as jobs:
        job = create_verify(web.inventory, wanted(target, speed=NEVER))
        jobs.add([job])
        await wait_for(lambda: job.progress.current == MiB)
        await jobs.rest()

        assert job.is_over
        assert job.error == "cancelled, as the daemon was restarted"
        assert nothing_left(web)


def test_a_crash_leaves_nothing_of_it(web, target):
    job = create_verify(web.inventory, wanted(target))
    web.write("web.raw", b"n", 0)
    web.crash()
    job._backup.users.close()

    web.open()

    assert nothing_left(web)
    assert web.inventory.budgets.ram.used == 0


# -- what is refused


def refused(host, target, error, match, **options):
    check_place = options.pop("check_place", lambda path: None)
    with pytest.raises(error, match=match):
        create_verify(host.inventory, wanted(target, **options), check_place)
    assert nothing_left(host)


def test_what_is_missing_is_refused(web, target, tmpfs_path):
    refused(web, target, NotFound, "no disk 'x'", device="x")
    refused(web, target, NotFound, "'daily' not found", bitmap="daily")
    refused(web, tmpfs_path / "none", FileNotFoundError, "No such file")
    refused(web, target, NotUsable, "not negative", speed=-1)


def test_an_inconsistent_bitmap_is_refused(web, target):
    add_bitmap(web)
    web.inventory.bitmaps.find("web.raw").held["daily"].lose("of this")

    refused(web, target, NotUsable, "inconsistent .* of this", bitmap="daily")


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("format", [None, Format.RAW])
def test_a_raw_file_of_another_size_is_refused(web, target, change, format):
    os.truncate(target, SIZE + change)

    refused(web, target, NotUsable, f"has {SIZE + change} bytes", format=format)


def test_what_is_of_us_is_refused(web, target):
    def check_place(path):
        raise NotUsable("on the mount")

    refused(web, web.sources["web.raw"], NotUsable, "is the source of disk 'web.raw'")
    refused(web, target, NotUsable, "on the mount of its", check_place=check_place)
    refused(web, web.state / "state.json", NotUsable, "among the files of fleecefs")
    refused(web, target.parent, NotUsable, "not a regular file")


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        pytest.param("web.raw", NotUsable, "backing .* is the source", id="source"),
        pytest.param("state/b", NotUsable, "backing .* among the files", id="state"),
        pytest.param("locked", Busy, "backing .* a job still writes", id="locked"),
        pytest.param("none", OSError, "No such file", id="missing"),
    ],
)
def test_so_are_the_files_of_a_chain(web, tmpfs_path, name, error, match):
    require_qemu()
    backing, target = tmpfs_path / name, tmpfs_path / "1.qcow2"
    if name not in ("web.raw", "none"):
        backing.write_bytes(web.live("web.raw"))
    words = "-f", "qcow2", "-u", "-F", "raw", "-b", backing, target, SIZE
    qemu_img("create", "-q", *words)
    with contextlib.ExitStack() as stack:
        if name == "locked":
            file = stack.enter_context(backing.open("r+b"))
            fcntl.flock(file, fcntl.LOCK_EX)

        refused(web, target, error, match)


def test_a_backup_that_is_being_written_is_refused(web, tmpfs_path):
    path = tmpfs_path / "new.raw"
    (job,) = create_backups(web.inventory, [BackupOptions("web.raw", path, "b")])

    with pytest.raises(Busy, match="a job still writes to it"):
        create_verify(web.inventory, wanted(path))

    job._target.close()


def test_who_is_compared_with_is_not_written(web, target):
    first, second = (create_verify(web.inventory, wanted(target)) for _ in range(2))

    with pytest.raises(Busy, match="in use by another job"):
        create_backups(web.inventory, [BackupOptions("web.raw", target, "b")])

    for job in first, second:
        job._backup.users.close()


@pytest.mark.parametrize(("format", "is_read"), [(None, False), (Format.RAW, True)])
async def test_a_raw_backup_that_looks_like_qcow2(web, tmpfs_path, format, is_read):
    web.write("web.raw", b"QFI\xfb" + bytes(100), 0)
    target = tmpfs_path / "copy.raw"
    target.write_bytes(web.live("web.raw"))

    if not is_read:
        refused(web, target, NotUsable, "say which with --format", format=format)
    else:
        assert (await verified(web, target, format=format))["differs"] == 0


async def test_a_file_that_is_read_only_will_do(web, target):
    target.chmod(0o400)

    assert (await verified(web, target))["differs"] == 0
