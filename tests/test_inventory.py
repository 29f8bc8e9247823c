"""Disks and snapshots in the life of a machine: ends, crashes, reboots, full disks."""

import contextlib
import errno
import gc
import itertools
import json
import os
import shutil

import pytest

from fleecefs.block.bitmap import LiveBits
from fleecefs.block.epoch import History, OnCbwError
from fleecefs.block.raw import RawImage
from fleecefs.block.store import Tier
from fleecefs.errors import (
    BadName,
    Busy,
    NameTaken,
    NameTooLong,
    NoSpace,
    NotFound,
    NotUsable,
    SnapshotLost,
)
from fleecefs.inventory import Inventory, Options
from fleecefs.state import runtime
from fleecefs.state.directory import StateDirectory
from tests.support.disks import clusters, letters
from tests.support.host import CLUSTER, Host, failing
from tests.support.mount import wait_until

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def failing_always(*args):
    raise NO_SPACE


class Killed(BaseException):
    """The daemon dies here."""


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    host = Host(tmpfs_path, monkeypatch)
    yield host
    host.end()


@pytest.fixture
def web(host):
    """A host with a disk of eight clusters, `aaaaaaaa`."""
    host.add("web.raw", clusters("aaaaaaaa"))
    host.open()
    return host


def write(host, letter, *indices, disk="web.raw"):
    """Fill clusters with a letter."""
    for index in indices:
        host.write(disk, clusters(letter), index * CLUSTER)


def write_source(host, letter, disk="web.raw"):
    """Fill the first cluster of a source behind the back of all."""
    with host.sources[disk].open("r+b") as file:
        file.write(clusters(letter))


def shown(host, name, disk="web.raw"):
    return letters(host.read(name, disk))


# -- what a new one holds


def test_snapshot_keeps_the_instant(web):
    write(web, "b", 1)
    group = web.inventory.create_snapshot("one")
    write(web, "c", 0, 1, 2)

    assert shown(web, "one") == "abaaaaaa"
    assert letters(web.live("web.raw")) == "cccaaaaa"
    assert group.state == "good"


def test_snapshot_of_chosen_disks_has_only_those(web):
    web.close()
    web.add("db.raw", clusters("dd"))
    web.open()

    group = web.inventory.create_snapshot("one", ["db.raw"])

    assert list(group.snapshots) == ["db.raw"]
    assert list(group.inodes) == ["db.raw"]


def test_events_tell_of_creation_and_deletion(web):
    web.inventory.create_snapshot("one")
    web.inventory.delete_snapshot("one")

    assert [(name, data["name"]) for name, data in web.events] == [
        ("FLEECEFS_SNAPSHOT_CREATED", "one"),
        ("FLEECEFS_SNAPSHOT_DELETED", "one"),
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("", BadName, id="empty"),
        pytest.param(".", BadName, id="dot"),
        pytest.param("..", BadName, id="dots"),
        pytest.param(".hidden", BadName, id="begins with a dot"),
        pytest.param("-f", BadName, id="begins with a dash"),
        pytest.param("a/b", BadName, id="slash"),
        pytest.param("a b", BadName, id="space"),
        pytest.param("a\n", BadName, id="newline at the end"),
        pytest.param("a\0b", BadName, id="null byte"),
        pytest.param("a\x1b[31m", BadName, id="escape sequence"),
        pytest.param("\udcff", BadName, id="non-UTF-8"),
        pytest.param("näme", BadName, id="letter with an umlaut"),
        pytest.param("n" * 64, NameTooLong, id="64 characters"),
        pytest.param("n" * 300, NameTooLong, id="300 characters"),
    ],
)
def test_names_are_checked(web, name, kind):
    with pytest.raises(kind) as snapshot_error:
        web.inventory.create_snapshot(name)
    with pytest.raises(kind) as disk_error:
        Inventory.open(web.state, {name: web.sources["web.raw"]}, Options())

    assert str(snapshot_error.value).startswith("snapshot name")
    assert str(disk_error.value).startswith("disk name")
    assert web.inventory.snapshots == {}


@pytest.mark.parametrize("name", ["a", "0", "a.b-c_d", "A" * 63, "x..y"])
def test_good_names_are_taken(web, name):
    web.inventory.create_snapshot(name)

    assert shown(web, name) == "aaaaaaaa"


def test_no_disk_can_be_called_snapshots(host):
    host.add("snapshots", clusters("a"))

    with pytest.raises(NotUsable, match="'snapshots'"):
        host.open()


def test_a_name_is_taken_once(web):
    web.inventory.create_snapshot("one")

    with pytest.raises(NameTaken, match="'one'"):
        web.inventory.create_snapshot("one")

    assert list(web.inventory.snapshots) == ["one"]


def test_a_name_is_free_again_after_deletion(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.inventory.delete_snapshot("one")

    web.inventory.create_snapshot("one")

    assert shown(web, "one") == "baaaaaaa"


def test_unknown_names_are_not_found(web):
    with pytest.raises(NotFound, match=r"'no\.raw'; there are web\.raw"):
        web.inventory.create_snapshot("one", ["no.raw"])
    with pytest.raises(NotFound, match="'two'"):
        web.inventory.delete_snapshot("two")
    with pytest.raises(NotFound, match="'two'"):
        web.inventory.describe_snapshot("two")

    assert web.inventory.snapshots == {}
    assert web.epoch_directories() == []


def test_a_deleted_snapshot_answers_its_readers_with_an_error(web):
    group = web.inventory.create_snapshot("one")
    web.inventory.delete_snapshot("one")

    with pytest.raises(SnapshotLost) as e:
        group.snapshots["web.raw"].read(CLUSTER, 0)

    assert e.value.errno == errno.EIO
    assert web.epoch_directories() == []


# -- a clean end


def test_everything_is_exact_after_a_clean_end(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0, 3)
    web.inventory.create_snapshot("two")
    write(web, "c", 3, 7)
    instants = {n: g.created_ns for n, g in web.inventory.snapshots.items()}

    web.close()
    web.open()

    assert shown(web, "one") == "aaaaaaaa"
    assert shown(web, "two") == "baabaaaa"
    assert letters(web.live("web.raw")) == "baacaaac"
    assert instants == {n: g.created_ns for n, g in web.inventory.snapshots.items()}


def test_a_reboot_after_a_clean_end_loses_nothing(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0, 3)
    web.close()

    web.reboot()
    web.open()

    assert shown(web, "one") == "aaaaaaaa"


def test_a_clean_end_leaves_nothing_on_tmpfs(web):
    web.inventory.create_snapshot("one")
    runtime_path = web.inventory.runtime_path

    web.close()

    assert not runtime_path.exists()


def test_a_snapshot_grows_after_it_was_loaded(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    web.open()
    write(web, "c", 0, 1)
    web.close()
    web.open()

    assert shown(web, "one") == "aaaaaaaa"
    assert letters(web.live("web.raw")) == "ccaaaaaa"


def test_the_ram_tier_moves_to_the_disk_at_a_clean_end(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    assert web.inventory.budgets.ram.used == CLUSTER

    web.close()
    web.reboot()
    web.open(ram_limit=0)

    assert shown(web, "one") == "aaaaaaaa"
    assert web.inventory.budgets.ram.used == 0
    assert web.inventory.budgets.disk.used == CLUSTER


def test_discarded_parts_stay_denied_after_a_clean_end(web):
    group = web.inventory.create_snapshot("one")
    group.snapshots["web.raw"].discard(2 * CLUSTER, 0)
    web.close()
    web.open()
    file = web.inventory.snapshots["one"].snapshots["web.raw"]

    with pytest.raises(SnapshotLost):
        file.read(CLUSTER, CLUSTER)

    assert letters(file.read(CLUSTER, 2 * CLUSTER)) == "a"


def test_a_store_elsewhere_is_found_again(web, tmpfs_path):
    store = tmpfs_path / "store"
    store.mkdir()
    web.close()
    web.open(store=store, ram_limit=0)
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()

    web.open()

    assert shown(web, "one") == "aaaaaaaa"
    assert list(store.glob("*/disks/web.raw/epochs/0001/store.raw"))
    assert not list(web.state.glob("disks/*/epochs/*/store.raw"))


def test_deleting_frees_a_store_elsewhere(web, tmpfs_path):
    store = tmpfs_path / "store"
    store.mkdir()
    web.close()
    web.open(store=store, ram_limit=0)
    web.inventory.create_snapshot("one")
    write(web, "b", 0)

    web.inventory.delete_snapshot("one")

    assert not list(store.glob("**/store.raw"))
    assert web.inventory.budgets.disk.used == 0


def test_a_disk_that_no_snapshot_needs_can_be_left_out(web):
    web.close()
    web.add("db.raw", clusters("dd"))
    web.open()
    web.inventory.create_snapshot("one", ["db.raw"])
    web.close()

    web.open(["db.raw"])

    assert list(web.inventory.disks) == ["db.raw"]
    assert shown(web, "one", "db.raw") == "dd"


def test_a_disk_that_a_snapshot_needs_can_not_be_left_out(web):
    web.close()
    web.add("db.raw", clusters("dd"))
    web.open()
    web.inventory.create_snapshot("one")
    web.close()
    before = (web.state / "state.json").read_bytes()

    with pytest.raises(NotUsable, match=r"'one' needs disk 'db\.raw'.*--disk db\.raw="):
        web.open(["web.raw"])

    assert (web.state / "state.json").read_bytes() == before
    web.open()
    assert shown(web, "one", "db.raw") == "dd"


def test_a_source_may_move(web, tmpfs_path):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    moved = tmpfs_path / "elsewhere"
    web.sources["web.raw"].rename(moved)
    web.sources["web.raw"] = moved

    web.open()

    assert shown(web, "one") == "aaaaaaaa"
    assert web.inventory.describe_disks()[0]["source"] == str(moved)


def test_a_state_directory_may_move(web, tmpfs_path):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    web.state = web.state.rename(tmpfs_path / "elsewhere")

    web.open()

    assert shown(web, "one") == "aaaaaaaa"


def test_a_copy_of_a_state_directory_has_a_life_of_its_own(web, tmpfs_path):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    copy = shutil.copytree(web.state, tmpfs_path / "copy")
    web.open()
    web.inventory.delete_snapshot("one")
    web.close()
    web.state = copy

    web.open()

    assert shown(web, "one") == "aaaaaaaa"


def edit(path):
    with path.open("r+b") as file:
        file.write(b"edited")
    # The clock behind mtime is coarse.
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def replace(path):
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.rename(path)


def grow(path):
    os.truncate(path, path.stat().st_size + 512)


@pytest.mark.logs("is broken: the source was changed")
@pytest.mark.parametrize("change", [edit, replace, grow])
def test_a_source_changed_in_between_breaks_its_snapshots(web, change):
    web.close()
    web.add("db.raw", clusters("dd"))
    web.open()
    web.inventory.create_snapshot("one")
    web.inventory.create_snapshot("two")
    write(web, "b", 0)
    web.close()
    change(web.sources["web.raw"])

    web.open()

    for name in "one", "two":
        assert web.lost(name, "web.raw") == (
            "the source was changed while it was not mounted"
        )
        with pytest.raises(SnapshotLost, match="was changed"):
            web.read(name, "web.raw")
        assert shown(web, name, "db.raw") == "dd"
        assert web.inventory.snapshots[name].state == "broken"
    assert web.live("web.raw") == web.sources["web.raw"].read_bytes()
    assert web.inventory.disks["web.raw"].size == web.sources["web.raw"].stat().st_size


@pytest.mark.logs("is broken: the source was changed")
@pytest.mark.parametrize("change", [edit, replace, grow])
def test_what_a_change_broke_stays_broken_and_can_be_deleted(web, change):
    web.inventory.create_snapshot("one")
    web.close()
    change(web.sources["web.raw"])
    web.open()
    web.inventory.create_snapshot("two")
    write(web, "z", 1)
    web.close()

    web.open()

    assert web.lost("one", "web.raw") is not None
    assert shown(web, "two")[1] == "a"
    web.inventory.delete_snapshot("one")
    assert list(web.inventory.snapshots) == ["two"]
    assert len(web.epoch_directories()) == 1


@pytest.mark.logs("is broken: the source was changed")
def test_a_source_swapped_for_another_of_the_same_size_is_noticed(web):
    web.inventory.create_snapshot("one")
    web.close()
    other = web.add("other.raw", clusters("zzzzzzzz"))
    del web.sources["other.raw"]
    web.sources["web.raw"] = other

    web.open()

    assert web.lost("one", "web.raw") is not None


def test_cluster_size_is_kept_while_there_are_snapshots(host):
    host.add("web.raw", bytes(1 << 20))
    host.open(cluster_size=65536)
    host.inventory.create_snapshot("one")
    host.close()

    with pytest.raises(NotUsable, match=r"'web\.raw'.*64 KiB"):
        host.open(cluster_size=4096)

    host.open()
    assert host.inventory.disks["web.raw"].cluster_size == 65536
    assert host.read("one", "web.raw") == bytes(1 << 20)
    host.inventory.delete_snapshot("one")
    host.close()
    host.open(cluster_size=4096)
    assert host.inventory.disks["web.raw"].cluster_size == 4096


@pytest.mark.parametrize("size", [0, 1, 512, 2048, 4097, 12288, 2 << 20])
def test_cluster_size_is_a_power_of_two_in_bounds(host, size):
    host.add("web.raw", bytes(1 << 20))

    with pytest.raises(NotUsable, match=r"power of two from 4 KiB to 1 MiB"):
        host.open(cluster_size=size)

    assert not host.state.exists()


def test_a_snapshot_keeps_the_policy_it_was_made_with(web):
    web.close()
    web.open(on_cbw_error=OnCbwError.BREAK_GUEST_WRITE, ram_limit=0, store_limit=0)
    web.inventory.create_snapshot("one")
    web.close()
    web.open(ram_limit=0, store_limit=0)

    with pytest.raises(NoSpace):
        web.write("web.raw", clusters("b"))

    assert shown(web, "one") == "aaaaaaaa"


# -- locks


def test_a_state_is_used_by_one_at_a_time(web):
    with pytest.raises(Busy, match="in use by another fleecefs"):
        Inventory.open(web.state, web.sources, Options())

    assert letters(web.live("web.raw")) == "aaaaaaaa"


def test_a_state_and_a_copy_of_it_are_used_one_at_a_time(web, tmpfs_path):
    copy = shutil.copytree(web.state, tmpfs_path / "copy")
    source = shutil.copy(web.sources["web.raw"], tmpfs_path / "copy.raw")

    with pytest.raises(Busy, match="a copy of this state directory"):
        Inventory.open(copy, {"web.raw": source}, Options())

    assert web.inventory.runtime_path.exists()


def test_a_source_is_used_by_one_at_a_time(web, tmpfs_path):
    with pytest.raises(Busy, match=r"source .*web\.raw: in use"):
        Inventory.open(tmpfs_path / "other", web.sources, Options())


def test_a_source_can_not_be_two_disks(host):
    host.add("a.raw", clusters("a"))
    host.sources["b.raw"] = host.sources["a.raw"]

    with pytest.raises(Busy, match="in use"):
        host.open()


@pytest.mark.parametrize(
    "why", ["no source", "damaged state", "no store", "bad cluster size"]
)
def test_who_failed_to_open_lets_go_of_everything(host, why, tmpfs_path):
    host.add("web.raw", clusters("aa"))
    options = {}
    sources = dict(host.sources)
    if why == "no source":
        sources["x.raw"] = tmpfs_path / "missing"
    elif why == "damaged state":
        host.state.mkdir()
        (host.state / "lock").touch()
        (host.state / "state.json").write_text("{")
    elif why == "no store":
        options["store"] = tmpfs_path / "missing"
    else:
        options["cluster_size"] = 5
    gc.collect()
    fds = os.listdir("/proc/self/fd")

    with pytest.raises(OSError):
        Inventory.open(host.state, sources, Options(**options))

    # A mapping keeps its file open for as long as somebody could look at it.
    gc.collect()
    assert os.listdir("/proc/self/fd") == fds
    assert not host.runtime.exists() or os.listdir(host.runtime) == []
    (host.state / "state.json").unlink(missing_ok=True)
    host.open()
    assert letters(host.live("web.raw")) == "aa"


# -- a crash of the daemon: the same boot


def test_a_crash_of_the_daemon_loses_nothing(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0, 3)
    web.inventory.create_snapshot("two")
    write(web, "c", 3, 7)

    web.crash()
    web.open()

    assert shown(web, "one") == "aaaaaaaa"
    assert shown(web, "two") == "baabaaaa"
    assert letters(web.live("web.raw")) == "baacaaac"
    write(web, "d", 0, 1)
    assert shown(web, "one") == "aaaaaaaa"
    assert shown(web, "two") == "baabaaaa"


def test_crash_after_crash_loses_nothing(web):
    web.inventory.create_snapshot("one")
    for index in range(8):
        write(web, "b", index)
        web.crash()
        web.open()

    assert shown(web, "one") == "aaaaaaaa"
    web.close()
    web.open()
    assert shown(web, "one") == "aaaaaaaa"


def test_the_limit_of_the_ram_tier_may_change_over_a_crash(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.crash()

    web.open(ram_limit=0)
    write(web, "c", 1)

    assert shown(web, "one") == "aaaaaaaa"
    assert web.inventory.budgets.ram.used == CLUSTER
    assert web.inventory.budgets.disk.used == CLUSTER


@pytest.mark.logs("could not preserve|No space left|is missing")
def test_a_snapshot_that_broke_stays_broken_over_a_crash(web, monkeypatch):
    """Also if the crash comes before the state has been told."""
    web.close()
    web.open(ram_limit=0, store_limit=0)
    web.inventory.create_snapshot("one")
    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "save", failing_always)
        write(web, "b", 0)
        web.crash()

    web.open()

    assert web.lost("one", "web.raw") is not None
    assert letters(web.live("web.raw")) == "baaaaaaa"


def test_denied_parts_stay_denied_over_a_crash(web):
    group = web.inventory.create_snapshot("one")
    group.snapshots["web.raw"].discard(CLUSTER, 0)
    web.crash()
    web.open()

    with pytest.raises(SnapshotLost):
        web.inventory.snapshots["one"].snapshots["web.raw"].read(CLUSTER, 0)


def test_a_kill_between_the_bits_of_tier_and_epoch_is_mended(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    # As if the kill had come before the write: the old data is still on the source.
    web.inventory.disks["web.raw"].history.newest.preserved[0] = 0
    write_source(web, "a")
    web.crash()

    web.open()

    assert web.inventory.budgets.ram.used == 0
    write(web, "c", 0)
    assert shown(web, "one") == "aaaaaaaa"
    assert web.inventory.budgets.ram.used == CLUSTER


# -- a crash of the host: another boot


@pytest.mark.logs("is broken: the host went down")
def test_a_crash_of_the_host_breaks_snapshots_and_says_so(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.crash()

    web.reboot()
    web.open()

    assert web.lost("one", "web.raw") == "the host went down without unmounting"
    with pytest.raises(SnapshotLost):
        web.read("one", "web.raw")
    assert letters(web.live("web.raw")) == "baaaaaaa"


@pytest.mark.logs("is broken: the host went down")
def test_after_a_crash_of_the_host_new_snapshots_are_good(web):
    web.inventory.create_snapshot("one")
    web.crash()
    web.reboot()
    web.open()

    web.inventory.create_snapshot("two")
    write(web, "b", 0)

    assert shown(web, "two") == "aaaaaaaa"
    web.close()
    web.open()
    assert shown(web, "two") == "aaaaaaaa"
    assert web.lost("one", "web.raw") == "the host went down without unmounting"


def test_a_new_state_that_was_never_ended_survives_a_crash_of_the_host(web):
    web.crash()
    web.reboot()

    web.open()

    assert letters(web.live("web.raw")) == "aaaaaaaa"


def test_a_crash_of_the_host_before_a_mount_without_snapshots_breaks_nothing(web):
    web.inventory.create_snapshot("one")
    web.inventory.delete_snapshot("one")
    web.crash()
    web.reboot()

    web.open()

    assert web.inventory.snapshots == {}
    assert web.epoch_directories() == []


@pytest.mark.logs("is missing")
def test_bits_that_vanished_within_a_boot_break_the_snapshot(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    runtime_path = web.inventory.runtime_path
    web.crash()
    shutil.rmtree(runtime_path)

    web.open()

    assert web.lost("one", "web.raw").endswith("preserved.bits: is missing")
    assert letters(web.live("web.raw")) == "baaaaaaa"


# -- damage


def saved(host, epoch, name):
    return host.state / "disks/web.raw/epochs" / epoch / name


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def tear(path):
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff")


def tear_header(path):
    with path.open("r+b") as file:
        file.seek(17)
        byte = file.read(1)[0]
        file.seek(17)
        file.write(bytes([byte ^ 1]))


def overwrite(path):
    path.write_text("something else")


def age(path):
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x07")


def remove(path):
    path.unlink()


@pytest.mark.logs(r"preserved\.bits")
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "damaged or truncated"),
        (empty, "not a file of bits"),
        (tear, "damaged or truncated"),
        (tear_header, "header is damaged"),
        (overwrite, "not a file of bits"),
        (age, "has version 7"),
        (remove, "is missing"),
    ],
)
def test_damaged_bits_break_their_snapshot_and_older_ones(web, damage, says):
    """The snapshot after it loads, and the live disk is served."""
    for name, letter in ("one", "b"), ("two", "c"), ("three", "d"):
        web.inventory.create_snapshot(name)
        write(web, letter, 0)
    web.close()
    path = saved(web, "0002", "preserved.bits")
    damage(path)

    web.open()

    for name in "one", "two":
        assert str(path) in web.lost(name, "web.raw")
        assert says in web.lost(name, "web.raw")
    assert shown(web, "three") == "caaaaaaa"
    assert letters(web.live("web.raw")) == "daaaaaaa"


@pytest.mark.logs(r"preserved\.bits")
def test_bits_of_another_epoch_are_refused(web):
    for name, letter in ("one", "b"), ("two", "c"):
        web.inventory.create_snapshot(name)
        write(web, letter, 0)
    web.close()
    shutil.copy(
        saved(web, "0001", "preserved.bits"), saved(web, "0002", "preserved.bits")
    )

    web.open()

    assert "belongs to another disk or epoch" in web.lost("two", "web.raw")


@pytest.mark.logs(r"disk\.bits|store\.raw")
@pytest.mark.parametrize("name", ["disk.bits", "store.raw"])
@pytest.mark.parametrize("damage", [remove, truncate])
def test_other_damaged_files_break_the_snapshot(web, name, damage):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    damage(saved(web, "0001", name))

    web.open()

    assert str(saved(web, "0001", name)) in web.lost("one", "web.raw")
    assert letters(web.live("web.raw")) == "baaaaaaa"


@pytest.mark.logs(r"preserved\.bits")
def test_what_is_broken_by_damage_stays_so_and_can_be_deleted(web):
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    web.close()
    path = saved(web, "0001", "preserved.bits")
    whole = path.read_bytes()
    truncate(path)
    web.open()
    write(web, "c", 1)
    web.close()
    # Too late: a write in between was not preserved.
    path.parent.mkdir(parents=True)
    path.write_bytes(whole)

    web.open()

    assert web.lost("one", "web.raw") is not None
    assert web.epoch_directories() == []
    web.inventory.delete_snapshot("one")
    assert web.inventory.snapshots == {}


# -- no space


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_no_space_for_bits_leaves_nothing_half(web, monkeypatch, nth):
    """Three files of bits for each of two disks; any of them may find tmpfs full."""
    web.close()
    web.add("db.raw", clusters("dd"))
    web.open()
    web.inventory.create_snapshot("old")
    before = web.epoch_directories()
    create = failing(LiveBits.create, nth, NO_SPACE, after=False)

    with monkeypatch.context() as patch:
        patch.setattr(LiveBits, "create", create)
        with pytest.raises(OSError, match="no new snapshot: No space left") as e:
            web.inventory.create_snapshot("one")

    assert e.value.errno == errno.ENOSPC
    assert list(web.inventory.snapshots) == ["old"]
    assert web.epoch_directories() == before
    write(web, "b", 0)
    assert shown(web, "old") == "aaaaaaaa"
    web.inventory.create_snapshot("one")
    write(web, "c", 0)
    assert shown(web, "one") == "baaaaaaa"
    web.crash()
    web.open()
    assert shown(web, "one") == "baaaaaaa"
    assert shown(web, "old") == "aaaaaaaa"


def test_no_space_for_the_store_leaves_nothing_half(web, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            RawImage, "create", failing(RawImage.create, 2, NO_SPACE, after=False)
        )
        with pytest.raises(OSError) as e:
            web.inventory.create_snapshot("one")

    assert e.value.errno == errno.ENOSPC
    assert web.inventory.snapshots == {}
    assert web.epoch_directories() == []
    assert web.inventory.disks["web.raw"].history.newest is None


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_no_space_for_the_state_leaves_no_snapshot(web, monkeypatch, nth, after):
    web.inventory.create_snapshot("old")
    save = failing(StateDirectory.save, nth, NO_SPACE, after=after)

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "save", save)
        with pytest.raises(OSError) as e:
            web.inventory.create_snapshot("one")

    assert e.value.errno == errno.ENOSPC
    assert list(web.inventory.snapshots) == ["old"]
    write(web, "b", 0)
    assert shown(web, "old") == "aaaaaaaa"
    web.inventory.create_snapshot("one")
    write(web, "c", 0)
    web.crash()
    web.open()
    assert shown(web, "old") == "aaaaaaaa"
    assert shown(web, "one") == "baaaaaaa"
    web.inventory.delete_snapshot("one")
    web.inventory.delete_snapshot("old")
    assert web.epoch_directories() == []


@pytest.mark.logs("could not be saved: No space left|never created")
def test_no_space_comes_after_the_state_was_written(web, monkeypatch):
    """As when the directory can not be made durable; then comes a crash."""
    web.inventory.create_snapshot("old")
    write(web, "b", 0)
    original = StateDirectory.save
    saves = itertools.count(1)

    def save(self, state):
        nth = next(saves)
        if nth <= 2:
            original(self, state)
        if nth >= 2:
            raise NO_SPACE

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "save", save)
        with pytest.raises(OSError):
            web.inventory.create_snapshot("one")
    write(web, "c", 0)
    web.crash()
    web.open()

    assert shown(web, "old") == "aaaaaaaa"
    # It is in the state that was written, and lost by now: broken, not wrong.
    assert web.lost("one", "web.raw") is not None


@pytest.mark.logs("could not be saved: No space left")
def test_no_space_for_the_state_at_all_leaves_no_snapshot(web, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "save", failing_always)
        with pytest.raises(OSError) as e:
            web.inventory.create_snapshot("one")

    assert e.value.errno == errno.ENOSPC
    assert web.inventory.snapshots == {}
    web.crash()
    web.open()
    assert web.inventory.snapshots == {}
    assert web.epoch_directories() == []


@pytest.mark.logs("could not be saved: No space left")
@pytest.mark.parametrize("nth", [1, 2])
def test_no_space_for_the_state_while_deleting(web, monkeypatch, nth):
    """Either the snapshot is as it was, or it is gone."""
    web.inventory.create_snapshot("one")
    write(web, "b", 0)
    save = failing(StateDirectory.save, nth, NO_SPACE, after=False)

    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "save", save)
        if nth == 1:
            with pytest.raises(OSError):
                web.inventory.delete_snapshot("one")
        else:
            web.inventory.delete_snapshot("one")

    if nth == 1:
        assert shown(web, "one") == "aaaaaaaa"
        web.inventory.delete_snapshot("one")
    assert web.inventory.snapshots == {}
    web.crash()
    web.open()
    assert web.inventory.snapshots == {}
    assert web.epoch_directories() == []


def test_ending_is_refused_while_the_ram_tier_does_not_fit(web):
    web.close()
    web.open(store_limit=0)
    web.inventory.create_snapshot("one")
    write(web, "b", 0)

    with pytest.raises(NoSpace, match=r"4 KiB of snapshots are in RAM.*--force"):
        web.inventory.check_end()

    web.inventory.delete_snapshot("one")
    web.inventory.check_end()


@pytest.mark.logs("a snapshot is lost: the store has reached its limit")
def test_ending_nevertheless_breaks_the_snapshot(web):
    web.close()
    web.open(store_limit=0)
    web.inventory.create_snapshot("one")
    write(web, "b", 0)

    web.close()
    web.open()

    assert "limit" in web.lost("one", "web.raw")
    assert letters(web.live("web.raw")) == "baaaaaaa"


@pytest.mark.logs("snapshot one of web.raw is broken: could not preserve")
def test_a_snapshot_breaks_when_the_store_is_full(web):
    web.close()
    web.open(ram_limit=0, store_limit=2 * CLUSTER)
    web.inventory.create_snapshot("one")
    write(web, "b", 0, 1)
    assert shown(web, "one") == "aaaaaaaa"

    write(web, "b", 2)

    assert letters(web.live("web.raw")) == "bbbaaaaa"
    with pytest.raises(SnapshotLost):
        web.read("one", "web.raw")
    wait_until(lambda: len(web.events) == 2, "the event")
    assert web.events[1] == (
        "FLEECEFS_SNAPSHOT_BROKEN",
        {
            "name": "one",
            "disk": "web.raw",
            "reason": "could not preserve: the store has reached its limit",
        },
    )
    wait_until(lambda: web.inventory.budgets.disk.used == 0, "the freeing of space")
    document = json.loads((web.state / "state.json").read_text())
    assert "limit" in document["snapshots"][0]["files"][0]["lost"]


# -- inode numbers


@pytest.mark.logs("is broken: the host went down")
def test_inode_numbers_are_never_used_again(web):
    used = {web.inventory.inodes["web.raw"]}

    def take(name):
        group = web.inventory.create_snapshot(name)
        new = {group.inode, *group.inodes.values()}
        assert not new & used
        used.update(new)

    take("one")
    take("two")
    web.inventory.delete_snapshot("two")
    take("two")
    web.close()
    web.open()
    take("three")
    web.inventory.delete_snapshot("three")
    web.crash()
    web.open()
    take("three")
    web.crash()
    web.reboot()
    web.open()
    take("four")
    web.close()
    web.add("db.raw", clusters("d"))
    web.open()
    assert web.inventory.inodes["db.raw"] not in used


def test_inode_numbers_stay_with_what_they_stand_for(web):
    group = web.inventory.create_snapshot("one")
    inodes = web.inventory.inodes["web.raw"], group.inode, group.inodes["web.raw"]

    web.crash()
    web.open()

    group = web.inventory.snapshots["one"]
    assert inodes == (
        web.inventory.inodes["web.raw"],
        group.inode,
        group.inodes["web.raw"],
    )
    assert web.inventory.files[inodes[2]] is group.snapshots["web.raw"]


# -- a kill at every step


class Killer:
    """Kills the daemon around the nth of the steps that leave something behind.

    From then on every step fails: who is dead does not clean up.
    """

    def __init__(self, patch, nth, *, after):
        self.is_dead = False
        self._nth, self._after = nth, after
        self._steps = itertools.count(1)
        for owner, name in (
            (StateDirectory, "save"),
            (LiveBits, "create"),
            (LiveBits, "save"),
            (RawImage, "create"),
            (Tier, "free"),
            (History, "retire"),
            (shutil, "rmtree"),
            (runtime, "remove"),
        ):
            patch.setattr(owner, name, self._step(getattr(owner, name)))

    def _step(self, call):
        def step(*args, **kwargs):
            is_nth = next(self._steps) == self._nth
            self.is_dead |= is_nth and not self._after
            if self.is_dead:
                raise Killed
            result = call(*args, **kwargs)
            self.is_dead |= is_nth
            if self.is_dead:
                raise Killed
            return result

        return step


class Story:
    """Three snapshots made and deleted in some order, and what each has to show."""

    def __init__(self, host, order):
        self.host = host
        self.order = order
        self.content = {}
        self.doing = None

    def run(self):
        inventory = self.host.inventory
        for letter, name in zip("xyz", ("one", "two", "three"), strict=True):
            self.content[name] = letters(self.host.live("web.raw"))
            self.doing = name
            inventory.create_snapshot(name)
            self.doing = None
            write(self.host, letter, 0, ord(letter) - ord("w"))
        for name in self.order:
            self.doing = name
            inventory.delete_snapshot(name)
            self.doing = None
            del self.content[name]
            write(self.host, "w", 5)

    def check(self):
        """What was done is done, what was being done is or is not; nothing else."""
        found = set(self.host.inventory.snapshots)
        assert set(self.content) - {self.doing} <= found <= set(self.content)
        for name in found:
            # 0 until the instant has come: before, it is not there.
            assert self.host.inventory.snapshots[name].created_ns
            assert shown(self.host, name) == self.content[name], name


def killed_at(host, story, nth, *, after):
    """Run a story until it is killed; return whether it was."""
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, nth, after=after)
        with contextlib.suppress(Killed):
            story.run()
            host.inventory.close()
    if killer.is_dead:
        host.crash()
    else:
        host.inventory = None
    return killer.is_dead


@pytest.fixture
def hosts(tmpfs_path, monkeypatch):
    """Make hosts, each on its own tmpfs directory."""
    with contextlib.ExitStack() as stack:

        def hosts():
            directory = tmpfs_path / str(next(numbers))
            directory.mkdir()
            host = Host(directory, monkeypatch)
            host.add("web.raw", clusters("aaaaaaaa"))
            stack.callback(host.end)
            return host

        numbers = itertools.count()
        yield hosts


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "order", list(itertools.permutations(["one", "two", "three"])), ids="-".join
)
def test_a_kill_at_any_step_leaves_a_consistent_state(hosts, order, after):
    for nth in itertools.count(1):
        host = hosts()
        host.open()
        story = Story(host, order)

        is_killed = killed_at(host, story, nth, after=after)

        host.open()
        story.check()
        # And it goes on.
        host.inventory.create_snapshot("four")
        frozen = letters(host.live("web.raw"))
        write(host, "v", *range(8))
        assert shown(host, "four") == frozen
        story.content["four"] = frozen
        story.check()
        for name in list(host.inventory.snapshots):
            host.inventory.delete_snapshot(name)
        assert host.epoch_directories() == []
        host.close()
        if not is_killed:
            break
    assert nth > 30


def test_a_write_between_the_instant_and_a_kill_is_kept_for_older_snapshots(web):
    """It is preserved in the new epoch only, whose snapshot nobody hears of."""
    web.inventory.create_snapshot("old")
    original = StateDirectory.save
    saves = itertools.count(1)

    def save(self, state):
        if next(saves) == 1:
            return original(self, state)
        write(web, "b", 3)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateDirectory, "save", save)
        patch.setattr(Inventory, "_undo_create", lambda *args: None)
        with pytest.raises(Killed):
            web.inventory.create_snapshot("new")
    web.crash()
    web.open()

    assert list(web.inventory.snapshots) == ["old"]
    assert shown(web, "old") == "aaaaaaaa"
    assert letters(web.live("web.raw")) == "aaabaaaa"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "first", [None, 10, 20, 30], ids=lambda nth: f"killed at {nth}"
)
def test_a_kill_while_it_is_opened_leaves_a_consistent_state(hosts, first, after):
    """After a clean end, or after another kill."""
    for nth in itertools.count(1):
        host = hosts()
        host.open()
        story = Story(host, ["two"])
        is_killed = killed_at(host, story, first, after=after)
        assert is_killed is (first is not None)

        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, nth, after=after)
            with contextlib.suppress(Killed):
                host.open()
        if host.inventory is not None:
            host.crash()

        host.open()
        story.check()
        write(host, "v", *range(8))
        story.check()
        if not killer.is_dead:
            break
    assert nth > 1
