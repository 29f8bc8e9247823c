"""What is counted of a disk, and that a flush of it failed, outlives the daemon."""

import errno
import os

import pytest

from fleecefs.block.raw import RawImage
from fleecefs.errors import FlushFailed
from fleecefs.units import MiB
from tests.support.disks import clusters
from tests.support.faulty import Faulty
from tests.support.host import Host
from tests.support.killer import DIED, daemon_pid, kill, wait_generation
from tests.support.walk import opened

BLOCK = 4096


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    host = Host(tmpfs_path, monkeypatch)
    host.add("web.raw", clusters("aa"))
    host.add("db.raw", clusters("dd"))
    yield host
    host.end()


def counted(host, name="web.raw"):
    disk = host.inventory.disks[name]
    return disk.reads, disk.writes


# -- counters


def test_reads_and_writes_are_counted(host):
    host.open()

    host.live("web.raw")
    host.write("web.raw", clusters("b"))
    host.write("web.raw", clusters("c"))

    assert counted(host) == (1, 2)
    assert counted(host, "db.raw") == (0, 0)


def test_counters_outlive_the_daemon(host):
    host.open()
    for count in range(1, 4):
        host.live("web.raw")
        host.write("web.raw", clusters("b"))
        host.crash()
        host.open()

        assert counted(host) == (count, count)
    assert counted(host, "db.raw") == (0, 0)


@pytest.mark.parametrize("is_clean", [False, True])
def test_counters_begin_anew_with_a_mount_or_a_boot(host, is_clean):
    host.open()
    host.write("web.raw", clusters("b"))

    if is_clean:
        host.close()
    else:
        host.crash()
        host.reboot()
    host.open()

    assert counted(host) == (0, 0)


def test_a_disk_that_was_left_out_after_a_crash_begins_anew(host):
    """It is another disk by then, to us."""
    host.open()
    host.write("web.raw", clusters("b"))
    host.crash()
    host.open(["db.raw"])
    host.crash()

    host.open()

    assert counted(host) == (0, 0)
    host.write("web.raw", clusters("b"))
    host.crash()
    host.open()
    assert counted(host) == (0, 1)


@pytest.mark.logs(DIED)
def test_status_counts_on_over_a_kill(mounted):
    mount = mounted({"web.raw": MiB, "db.raw": MiB})
    with opened(mount.live("web.raw"), os.O_RDWR | os.O_SYNC) as fd:
        for generation in range(1, 4):
            for _ in range(10):
                os.pwrite(fd, b"b" * BLOCK, 0)
                os.pread(fd, BLOCK, 0)
            before = counts(mount)
            kill(daemon_pid(mount))
            wait_generation(mount, generation)

            assert before == {
                "web.raw": (10 * generation, 10 * generation),
                "db.raw": (0, 0),
            }
            assert counts(mount) == before
            assert mount.status()["generation"] == generation
    assert mount.cli("restart").returncode == 0
    assert counts(mount) == before
    mount.remount()
    assert counts(mount) == {"web.raw": (0, 0), "db.raw": (0, 0)}


def counts(mount):
    return {
        disk["name"]: (disk["reads"], disk["writes"])
        for disk in mount.status()["disks"]
    }


# -- a flush that failed


@pytest.fixture
def failed(host, monkeypatch):
    """A host of which a flush of web.raw has failed, once."""
    host.open()
    disk = host.inventory.disks["web.raw"]
    disk.source = Faulty(disk.source, on="flush", code=errno.EIO)
    with pytest.raises(OSError) as e:
        disk.flush()
    assert e.value.errno == errno.EIO
    return host


def shown_error(host, name="web.raw"):
    disks = host.inventory.describe_disks()
    return next(disk["flush-error"] for disk in disks if disk["name"] == name)


@pytest.mark.logs("disk web.raw: a flush failed")
def test_a_failed_flush_is_shown(failed):
    assert shown_error(failed) == "a flush failed: injected into flush"
    assert shown_error(failed, "db.raw") is None


@pytest.mark.logs("disk web.raw: a flush failed")
def test_a_failed_flush_is_for_ever_over_crashes_of_the_daemon(failed):
    """The next daemon's descriptor would be told nothing by the kernel."""
    for _ in range(3):
        with pytest.raises(FlushFailed):
            failed.inventory.disks["web.raw"].flush()
        failed.crash()
        failed.open()

    assert shown_error(failed) == "a flush failed: injected into flush"
    with pytest.raises(FlushFailed) as e:
        failed.inventory.disks["web.raw"].write(clusters("b"), 0, durable=True)
    assert e.value.errno == errno.EIO
    failed.inventory.disks["db.raw"].flush()
    failed.write("web.raw", clusters("c"))
    assert failed.live("web.raw") == clusters("ca")


@pytest.mark.logs("disk web.raw: a flush failed")
def test_a_failed_flush_keeps_snapshots_from_being_promised(failed):
    """What the guest could not flush would be missing after a crash of the host."""
    failed.crash()
    failed.open(survives_host=True)

    with pytest.raises(OSError) as e:
        failed.inventory.create_snapshot("one")

    assert e.value.errno == errno.EIO
    assert failed.inventory.snapshots == {}
    failed.check_space()
    failed.inventory.create_snapshot("two", ["db.raw"])


@pytest.mark.logs("disk web.raw: ")
def test_an_operator_mounts_anew_after_a_failed_flush(failed):
    failed.close()

    failed.open()

    assert shown_error(failed) is None
    failed.inventory.disks["web.raw"].flush()


@pytest.mark.logs("disk web.raw: a flush failed")
def test_the_next_daemon_knows_of_it_before_the_guest(host, monkeypatch):
    """Who is killed in between has not answered."""
    host.open()
    disk = host.inventory.disks["web.raw"]
    path = host.inventory.runtime_path / "disks/web.raw/counters"

    def flush(image):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RawImage, "flush", flush)
    with pytest.raises(OSError):
        disk.flush()

    assert b"a flush failed: Input/output error" in path.read_bytes()
