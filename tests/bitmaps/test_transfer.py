"""Bitmaps that move to another host with their disk: only there are they taken."""

import errno
import os

import pytest

from fleecefs.bitmaps import transfer
from fleecefs.bitmaps.containers import OpenContainer
from fleecefs.bitmaps.steps import Add, Attach, Disable, Freeze, Remove
from fleecefs.errors import NameTaken, NotFound, NotUsable
from tests.bitmaps.hosts import (
    CLUSTER,
    COUNT,
    DB,
    SIZE,
    WEB,
    change,
    described,
    dirty,
    everything,
    held,
    make_host,
    names,
    stored,
    write,
)
from tests.support.disks import clusters
from tests.support.gate import Stay
from tests.support.host import failing
from tests.support.qemu import check_code, dirty_extents, require_qemu
from tests.support.running import Running


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    """A host with a bitmap that records and one that does not."""
    require_qemu()
    host = make_host(tmpfs_path, monkeypatch)
    host.open()
    add = Add(WEB, "daily", granularity=CLUSTER)
    change(host, add, Add(WEB, "kept", granularity=512))
    write(host, 1)
    change(host, Disable(WEB, "kept"))
    write(host, 2)
    yield host
    host.end()


@pytest.fixture
def path(tmpfs_path):
    return tmpfs_path / "exported.qcow2"


def move(host):
    """Go to another host, with the disks."""
    host.close()
    host.state = host.state.with_name("elsewhere")
    host.open()


def export(host, path, names=None):
    return host.inventory.export_bitmaps(WEB, path, names)


def take(host, path, disk=WEB, names=None):
    return host.inventory.import_bitmaps(disk, path, names)


def refuse(host, path, kind, text, disk=WEB, names=None):
    """Check that an import is refused, and leaves nothing behind."""
    before = everything(host)

    with pytest.raises(kind, match=text):
        take(host, path, disk, names)

    assert everything(host) == before


# -- export


def test_exported_file_is_one_that_qemu_reads(host, path):
    assert export(host, path) == ["daily", "kept"]

    assert check_code(path) == 0
    assert dirty_extents(path, "daily") == [(CLUSTER, 2 * CLUSTER)]
    assert dirty_extents(path, "kept") == [(CLUSTER, CLUSTER)]


def test_all_good_bitmaps_are_exported_or_those_that_were_chosen(host, path):
    held(host, "kept").lose("for a test")
    change(host, Freeze(WEB, "daily", "job"))
    write(host, 9)

    assert export(host, path) == ["daily"]

    # With what is frozen.
    assert dirty_extents(path, "daily")[-1] == (9 * CLUSTER, CLUSTER)
    path.unlink()
    for name, text in [
        ("kept", "inconsistent"),
        ("daily", "currently in use"),
        ("no", "not found"),
    ]:
        with pytest.raises(OSError, match=text):
            export(host, path, [name])
        assert not path.exists()


def test_disk_without_bitmaps_has_nothing_to_export(host, path):
    with pytest.raises(NotFound, match=r"disk 'db.raw' has no bitmap to export"):
        host.inventory.export_bitmaps(DB, path)

    assert not path.exists()


def test_export_replaces_no_file(host, path):
    path.write_text("of somebody")

    with pytest.raises(NotUsable, match="exists; give the name of a new one"):
        export(host, path)

    assert path.read_text() == "of somebody"


def test_export_that_fails_leaves_no_file(host, path, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, 5, error, after=False))

    with pytest.raises(OSError, match="No space left"):
        export(host, path)

    assert not path.exists()


def test_export_to_a_missing_directory_names_the_file(host, path):
    with pytest.raises(OSError, match=r"file .*/no/x: No such file or directory"):
        export(host, path.parent / "no" / "x")


# -- import


def test_bitmaps_move_with_their_disk(host, path):
    export(host, path)
    move(host)

    assert take(host, path) == ["daily", "kept"]
    write(host, 5)

    assert dirty(host, "daily") == {1, 2, 5}
    assert dirty(host, "kept") == set(range(8, 16))
    assert not described(host, "kept")["recording"]
    assert described(host, "daily")["persistent"]
    assert stored(host) == {"daily": {"auto", "in-use"}, "kept": {"in-use"}}
    for end in host.crash, host.close:
        end()
        host.open()
        assert dirty(host, "daily") == {1, 2, 5}
    host.crash()
    host.reboot()
    host.open()
    assert {1, 2, 5} <= dirty(host, "daily")


@pytest.mark.logs("daily of web.raw: the source was changed")
def test_bitmaps_move_on_and_back(host, path):
    export(host, path)
    home = host.state
    move(host)
    take(host, path)
    write(host, 5)
    back = path.with_name("back.qcow2")
    export(host, back, ["daily"])
    host.close()
    host.state = home
    host.open()

    # At home it was written to by somebody else.
    assert described(host, "daily")["inconsistent"]
    refuse(host, back, NameTaken, "Bitmap already exists: daily")
    change(host, Remove(WEB, "daily"))
    assert take(host, back) == ["daily"]
    assert dirty(host, "daily") == {1, 2, 5}


def test_some_of_the_bitmaps_are_taken(host, path):
    export(host, path)
    move(host)

    assert take(host, path, names=["kept"]) == ["kept"]

    assert names(host) == {"kept"}
    refuse(host, path, NotFound, "Dirty bitmap 'no' not found in", names=["no"])
    refuse(host, path, NameTaken, "already exists: kept", names=["daily", "kept"])
    refuse(host, path, NameTaken, "already exists: kept")
    assert take(host, path, names=["daily"]) == ["daily"]


def test_other_disk_of_the_same_mount_is_told_by_its_id(host, path):
    host.close()
    host.sources[DB].write_bytes(host.sources[WEB].read_bytes())
    host.open()
    export(host, path)

    refuse(host, path, NotUsable, "is of disk 'web.raw', not of 'db.raw'", disk=DB)


@pytest.mark.parametrize("at", [0, 5 * CLUSTER, SIZE - 1])
def test_other_disk_elsewhere_is_told_by_what_it_holds(host, path, at):
    export(host, path)
    move(host)
    host.write(WEB, b"z", at)

    text = "disk 'web.raw' is another one, or it was written to since the export"
    refuse(host, path, NotUsable, text)


def test_disk_that_was_written_to_since_the_export_is_refused_at_home(host, path):
    export(host, path)
    change(host, Remove(WEB, "daily"))
    write(host, 3)

    refuse(host, path, NotUsable, "written to since", names=["daily"])


def test_disk_of_another_size_is_refused(host, path, tmpfs_path):
    export(host, path)
    host.close()
    host.state = tmpfs_path / "elsewhere"
    host.add("big.raw", clusters("a" * (COUNT + 1)))
    host.open()

    text = rf"is of a disk of {SIZE} bytes, and 'big.raw' has {SIZE + CLUSTER}"
    refuse(host, path, NotUsable, text, disk="big.raw")


def test_bitmap_that_was_left_in_use_is_refused(host, path):
    export(host, path)
    opened = OpenContainer.open(path, SIZE, create=False)
    opened.mark_in_use(["kept"])
    opened.close()
    move(host)

    refuse(host, path, NotUsable, "bitmap 'kept' was left in use")
    assert take(host, path, names=["daily"]) == ["daily"]


def test_what_is_no_export_is_refused(host, path):
    plain = OpenContainer.open(path, SIZE, create=True)
    plain.close()
    raw = path.with_name("raw")
    raw.write_bytes(bytes(1 << 20))

    refuse(host, path, NotUsable, "does not say of which disk it is")
    refuse(host, raw, NotUsable, "is no qcow2 file")
    refuse(host, path.with_name("no"), FileNotFoundError, "No such file")
    refuse(host, path.parent, OSError, "not a regular file|Is a directory")


def test_exported_file_can_be_attached_as_it_is(host, path):
    export(host, path)
    move(host)

    change(host, Attach(WEB, path))
    write(host, 5)

    assert dirty(host, "daily") == {1, 2, 5}


@pytest.mark.parametrize("operation", ["write", "zero", "discard"])
def test_what_is_written_during_the_import_is_not_missing(
    host, path, monkeypatch, operation
):
    export(host, path)
    move(host)
    stay = Stay(True)
    look = transfer.fingerprint

    looks = []

    def looking(disk):
        found = look(disk)
        looks.append(found)
        # The second one counts.
        if len(looks) == 2:
            stay.stay()
        return found

    monkeypatch.setattr(transfer, "fingerprint", looking)
    running = Running(take, host, path)
    stay.wait_arrived()
    disk = host.inventory.disks[WEB]
    if operation == "write":
        write(host, 9)
    else:
        getattr(disk, operation)(CLUSTER, 9 * CLUSTER)
    stay.release()
    running.result()

    assert dirty(host, "daily") == {1, 2, 9}
    # One that does not record is of the instant of the export.
    assert dirty(host, "kept") == set(range(8, 16))
