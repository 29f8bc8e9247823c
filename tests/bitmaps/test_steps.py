"""What can be done to dirty bitmaps: results, and several at one instant."""

import pytest

from fleecefs.bitmaps.steps import (
    Add,
    Attach,
    Clear,
    Copy,
    Disable,
    Enable,
    Fill,
    Freeze,
    Look,
    Merge,
    Remove,
    Set,
)
from fleecefs.block import disk as block_disk
from fleecefs.errors import Busy, NameTaken, NotFound, NotUsable
from tests.bitmaps.hosts import (
    CLUSTER,
    DB,
    WEB,
    change,
    check_nothing_leaks,
    container,
    described,
    dirty,
    held,
    live_files,
    make_host,
    names,
    reason,
    saved,
    stored,
    write,
)
from tests.support.gate import Gate
from tests.support.qemu import dirty_extents, require_qemu
from tests.support.running import Running


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    require_qemu()
    host = make_host(tmpfs_path, monkeypatch)
    host.open()
    yield host
    host.end()


def save_state(host):
    host.inventory.bitmaps.find(WEB)._save_state()


def add(name, disk=WEB, **more):
    return Add(disk, name, granularity=more.pop("granularity", CLUSTER), **more)


def transient(name, disk=WEB, **more):
    return add(name, disk, persistent=False, **more)


# -- results


@pytest.mark.parametrize("persistent", [True, False])
def test_new_bitmap_is_clear_and_records(host, persistent):
    write(host, 1)
    change(host, add("daily", persistent=persistent))
    write(host, 2, 15)

    assert described(host, "daily") == {
        "disk": WEB,
        "name": "daily",
        "count": 2 * CLUSTER,
        "granularity": CLUSTER,
        "recording": True,
        "busy": False,
        "persistent": persistent,
        "inconsistent": False,
        "auto": True,
        "reason": None,
        "container": str(container(host)) if persistent else None,
    }
    assert dirty(host, "daily") == {2, 15}
    assert container(host).exists() == persistent
    check_nothing_leaks(host)


def test_bitmap_that_is_added_disabled_does_not_record(host):
    change(host, add("daily", recording=False))
    write(host, 1)

    assert dirty(host, "daily") == set()
    assert stored(host) == {"daily": {"in-use"}}


def test_removed_bitmap_is_nowhere(host):
    change(host, add("daily"), transient("now"))
    change(host, Remove(WEB, "daily"), Remove(WEB, "now"))
    write(host, 1)

    assert names(host) == set()
    assert live_files(host) == []
    assert stored(host) == {}
    assert host.inventory.disks[WEB].recorder is None
    # The container is free for others.
    require_qemu()
    change(host, add("daily"))
    assert dirty(host, "daily") == set()


def test_clear_forgets_what_was_written_before(host):
    change(host, add("daily"))
    write(host, 1, 2)
    change(host, Clear(WEB, "daily"))
    write(host, 3)
    host.inventory.save_bitmaps([WEB])

    assert dirty(host, "daily") == {3}
    assert saved(host, "daily") == {3}
    assert len(live_files(host)) == 1
    check_nothing_leaks(host)


@pytest.mark.parametrize("persistent", [True, False])
def test_clear_and_merge_at_one_instant_replace_what_there_is(host, persistent):
    change(host, Add(WEB, "daily", granularity=CLUSTER, persistent=persistent))
    write(host, 1)
    change(host, add("newer"))
    write(host, 2)
    change(
        host,
        Clear(WEB, "daily"),
        Merge(WEB, "daily", [(WEB, "newer")]),
        Disable(WEB, "daily"),
        Clear(WEB, "newer"),
    )
    write(host, 3)

    assert (dirty(host, "daily"), dirty(host, "newer")) == ({2}, {3})
    host.crash()
    host.open()
    assert (dirty(host, "daily"), dirty(host, "newer")) == ({2}, {3})
    check_nothing_leaks(host)


def test_disabled_bitmap_stays_as_it_is_until_it_is_enabled(host):
    change(host, add("daily"))
    write(host, 1)
    change(host, Disable(WEB, "daily"))
    write(host, 2)
    assert dirty(host, "daily") == {1}
    assert not described(host, "daily")["recording"]
    change(host, Enable(WEB, "daily"))
    write(host, 3)

    assert dirty(host, "daily") == {1, 3}


def test_merge_adds_what_others_have(host):
    change(
        host,
        add("all"),
        transient("fine", granularity=512),
        transient("coarse", granularity=4 * CLUSTER),
        add("db", DB),
    )
    host.write(WEB, b"x", 5 * CLUSTER)
    change(host, Clear(WEB, "all"))
    write(host, 9, disk=DB)

    change(host, Merge(WEB, "all", [(WEB, "fine"), (DB, "db")]))
    assert dirty(host, "all") == {5, 9}
    change(host, Merge(WEB, "all", [(WEB, "coarse")]))

    assert dirty(host, "all") == {4, 5, 6, 7, 9}
    assert dirty(host, "fine") == {40}
    assert saved(host, "all") == {4, 5, 6, 7, 9}


def test_merge_with_itself_changes_nothing(host):
    change(host, add("daily"))
    write(host, 3)

    change(host, Merge(WEB, "daily", [(WEB, "daily")]))

    assert dirty(host, "daily") == {3}


@pytest.mark.parametrize("persistent", [True, False])
def test_copy_has_what_there_was_and_does_not_record(host, persistent):
    change(host, add("daily"))
    write(host, 1)
    change(host, Copy(WEB, "daily", "kept", persistent=persistent))
    write(host, 2)

    assert dirty(host, "kept") == {1}
    assert not described(host, "kept")["recording"]
    assert described(host, "kept")["persistent"] == persistent
    assert ("kept" in stored(host)) == persistent
    check_nothing_leaks(host)


def test_look_sees_also_what_a_job_uses(host):
    change(host, add("daily"))
    write(host, 1)
    change(host, Freeze(WEB, "daily", "job"))
    write(host, 2)
    look = Look(WEB, "daily")

    change(host, look)

    assert set(look.bits.search(1)) == {1, 2}
    assert look.granularity == CLUSTER


def test_fill_makes_an_inconsistent_bitmap_right(host):
    change(host, add("daily"))
    write(host, 1)
    held(host, "daily").lose("for a test")
    assert reason(host, "daily") == "for a test"

    change(host, Fill(WEB, "daily"))

    assert dirty(host, "daily") == set(range(16))
    host.crash()
    host.open()
    assert dirty(host, "daily") == set(range(16))


def test_clear_makes_an_inconsistent_bitmap_right(host):
    change(host, add("daily", recording=False))
    held(host, "daily").lose("for a test")

    change(host, Clear(WEB, "daily"))
    write(host, 4)

    assert dirty(host, "daily") == {4}
    host.crash()
    host.open()
    assert dirty(host, "daily") == {4}


def test_bitmap_becomes_persistent_and_transient_again(host):
    change(host, transient("daily"))
    write(host, 1)
    change(host, Set(WEB, "daily", persistent=True))
    assert stored(host) == {"daily": {"in-use", "auto"}}
    assert saved(host, "daily") == {1}
    # Nothing new.
    change(host, Set(WEB, "daily", persistent=True))
    change(host, Set(WEB, "daily", persistent=False))
    write(host, 2)

    assert stored(host) == {}
    assert dirty(host, "daily") == {1, 2}
    check_nothing_leaks(host)
    host.close()
    host.open()
    assert names(host) == set()


def test_bitmap_without_auto_does_not_record_after_a_mount(host):
    change(host, add("daily"), add("other"))
    change(host, Set(WEB, "daily", auto=False), Set(WEB, "other", auto=False))
    change(host, Set(WEB, "other", auto=True))
    write(host, 1)
    assert dirty(host, "daily") == {1}
    host.close()
    assert stored(host) == {"daily": set(), "other": {"auto"}}
    host.open()
    write(host, 2)

    assert dirty(host, "daily") == {1}
    assert dirty(host, "other") == {1, 2}


ODD_NAMES = ["-f", ".", "a/b", "ä\u00a0".strip(), "名前", "a b", "'; rm", "x" * 1023]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_names(host, name):
    change(host, add(name))
    write(host, 1)
    host.close()
    host.open()

    assert dirty(host, name) == {1}
    change(host, Remove(WEB, name))
    assert names(host) == set()


# -- containers


def test_container_is_shared_by_disks_with_unique_names(host, tmpfs_path):
    place = tmpfs_path / "shared.qcow2"
    change(host, add("web", container=place), add("db", DB, container=place))
    with pytest.raises(NameTaken, match=r"Bitmap already exists: web, in .*shared"):
        change(host, add("web", DB, container=place))
    assert names(host, DB) == {"db"}
    write(host, 1)
    write(host, 2, disk=DB)
    host.close()
    assert dirty_extents(place, "web") == [(CLUSTER, CLUSTER)]
    host.open()

    assert (dirty(host, "web"), dirty(host, "db", DB)) == ({1}, {2})
    change(host, Remove(WEB, "web"))
    change(host, add("web", DB, container=place))
    assert names(host, DB) == {"web", "db"}


def test_attached_bitmaps_are_those_that_nobody_uses(host, tmpfs_path):
    place = tmpfs_path / "shared.qcow2"
    change(host, add("one", container=place), add("two", container=place))
    write(host, 1)
    host.close()
    # Another state, which knows nothing of it.
    host.state = tmpfs_path / "other"
    host.open()
    attach = Attach(WEB, place, ["one"])
    change(host, attach)
    write(host, 2)
    assert attach.attached == ["one"]
    assert dirty(host, "one") == {1, 2}
    all_others = Attach(DB, place)
    change(host, all_others)
    write(host, 3, disk=DB)

    assert all_others.attached == ["two"]
    assert dirty(host, "two", DB) == {1, 3}
    with pytest.raises(NotUsable, match="has no bitmap to attach"):
        change(host, Attach(DB, place))
    with pytest.raises(NameTaken, match="Bitmap already exists: one"):
        change(host, Attach(DB, place, ["one"]))
    with pytest.raises(NotFound, match="Dirty bitmap 'no' not found"):
        change(host, Attach(DB, place, ["no"]))


# -- several at one instant


def test_steps_see_what_those_before_them_did(host):
    change(host, add("daily"))
    write(host, 1)
    change(
        host,
        transient("sum"),
        Merge(WEB, "sum", [(WEB, "daily")]),
        Copy(WEB, "daily", "kept"),
        Clear(WEB, "daily"),
        Disable(WEB, "sum"),
        transient("short"),
        Remove(WEB, "short"),
    )
    write(host, 2)

    assert names(host) == {"daily", "sum", "kept"}
    assert dirty(host, "daily") == {2}
    assert dirty(host, "sum") == dirty(host, "kept") == {1}
    check_nothing_leaks(host)


@pytest.mark.parametrize("steps", ["off and on", "on and off"])
def test_last_of_opposite_steps_counts_also_after_a_crash(host, steps):
    change(host, add("daily"))
    both = [Disable(WEB, "daily"), Enable(WEB, "daily")]
    if steps == "on and off":
        both = both[::-1]
    change(host, *both)
    host.crash()
    host.open()
    write(host, 1)

    assert dirty(host, "daily") == ({1} if steps == "off and on" else set())


def test_bitmaps_are_replaced_at_one_instant(host):
    change(host, add("monday"))
    write(host, 1)
    change(host, Disable(WEB, "monday"), add("tuesday"))
    write(host, 2)

    assert (dirty(host, "monday"), dirty(host, "tuesday")) == ({1}, {2})


def test_name_is_free_within_the_instant_in_which_it_is_removed(host):
    change(host, transient("daily"))
    write(host, 1)
    change(host, Remove(WEB, "daily"), transient("daily"))
    write(host, 2)

    assert dirty(host, "daily") == {2}
    check_nothing_leaks(host)


@pytest.mark.parametrize("disk", [WEB, DB])
def test_write_in_flight_is_on_one_side_of_the_instant_of_both_disks(host, disk):
    change(host, add("before"), add("before", DB))
    gate = Gate(host.inventory.disks[disk].source)
    host.inventory.disks[disk].source = gate
    stay = gate.hold("pwrite")
    running = Running(write, host, 1, disk=disk)
    stay.wait_arrived()

    changing = Running(
        change,
        host,
        *(Disable(d, "before") for d in (WEB, DB)),
        *(add("after", d) for d in (WEB, DB)),
    )
    # What waits holds all new writes back.
    requests = host.inventory.disks[disk].requests
    while not requests.is_drained:
        assert changing._thread.is_alive()
    late = Running(write, host, 2, disk=disk)
    stay.release()
    for each in running, changing, late:
        each.result()

    other = DB if disk == WEB else WEB
    assert dirty(host, "before", disk) == {1}
    assert dirty(host, "after", disk) == {2}
    assert dirty(host, "before", other) == dirty(host, "after", other) == set()


def test_disk_that_does_not_come_to_rest_refuses_the_instant(host, monkeypatch):
    change(host, add("daily"))
    before = live_files(host)
    gate = Gate(host.inventory.disks[WEB].source)
    host.inventory.disks[WEB].source = gate
    stay = gate.hold("pwrite")
    running = Running(write, host, 1)
    stay.wait_arrived()
    monkeypatch.setattr(block_disk, "drain_deadline", lambda seconds: 0.0)

    with pytest.raises(Busy, match="writes did not end"):
        change(host, add("new"), Disable(WEB, "daily"))

    stay.release()
    running.result()
    assert dirty(host, "daily") == {1}
    assert live_files(host) == before
    assert names(host) == {"daily"}
