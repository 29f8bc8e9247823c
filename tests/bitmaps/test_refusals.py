"""What can not be done to dirty bitmaps: what says so, and that nothing is changed."""

import pytest
from bitarray.util import ones

from fleecefs.bitmaps.steps import (
    Abort,
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
    check_granularity,
)
from fleecefs.errors import BadName, Busy, NameTaken, NotFound, NotUsable, Refused
from fleecefs.units import GiB, KiB, MiB
from tests.bitmaps.hosts import (
    CLUSTER,
    DB,
    SIZE,
    WEB,
    change,
    described,
    dirty,
    everything,
    held,
    make_host,
    reason,
    write,
)
from tests.support.disks import clusters
from tests.support.qemu import require_qemu


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


def refused(name, kind, text, *steps):
    return pytest.param(kind, text, steps, id=name)


BUSY = "Bitmap 'busy' is currently in use by another operation and cannot be used"
LOST = (
    "Bitmap 'lost' is inconsistent and cannot be used: for a test; clear it or "
    "remove it"
)
MISSING = "Dirty bitmap 'no' not found"
POWER = "Granularity must be power of 2 and at least 512"


@pytest.mark.parametrize(
    ("kind", "text", "steps"),
    [
        refused("empty name", BadName, "Bitmap name cannot be empty", add("")),
        refused("too long", BadName, "Bitmap name is longer", add("x" * 1024)),
        refused("too long in bytes", BadName, "is longer", add("ä" * 512)),
        refused("newline", BadName, "can not be printed", add("a\nb")),
        refused("no unicode", BadName, "can not be printed", add("a\udcff")),
        refused("granularity 0", NotUsable, POWER, add("a", granularity=0)),
        refused("granularity 256", NotUsable, POWER, add("a", granularity=256)),
        refused("negative granularity", NotUsable, POWER, add("a", granularity=-512)),
        refused("granularity 1000", NotUsable, POWER, add("a", granularity=1000)),
        refused("4 GiB", NotUsable, "at most 2 GiB", add("a", granularity=4 * GiB)),
        refused("exists", NameTaken, "Bitmap already exists: daily", add("daily")),
        refused(
            "twice", NameTaken, "Bitmap already exists: a", add("a"), transient("a")
        ),
        refused(
            "transient in a container",
            NotUsable,
            "a transient bitmap is in no container",
            transient("a", container="/x"),
        ),
        refused("no disk", NotFound, "no disk 'no'; there are", add("a", "no")),
        refused("busy, remove", Busy, BUSY, Remove(WEB, "busy")),
        refused("busy, clear", Busy, BUSY, Clear(WEB, "busy")),
        refused("busy, enable", Busy, BUSY, Enable(WEB, "busy")),
        refused("busy, disable", Busy, BUSY, Disable(WEB, "busy")),
        refused("busy, merge to", Busy, BUSY, Merge(WEB, "busy", [(WEB, "daily")])),
        refused("busy, merge from", Busy, BUSY, Merge(WEB, "daily", [(WEB, "busy")])),
        refused("busy, copy", Busy, BUSY, Copy(WEB, "busy", "a")),
        refused("busy, set", Busy, BUSY, Set(WEB, "busy", auto=False)),
        refused("busy, freeze", Busy, BUSY, Freeze(WEB, "busy", "job")),
        refused("busy, fill", Busy, BUSY, Fill(WEB, "busy")),
        refused("lost, enable", NotUsable, LOST, Enable(WEB, "lost")),
        refused("lost, disable", NotUsable, LOST, Disable(WEB, "lost")),
        refused("lost, merge", NotUsable, LOST, Merge(WEB, "daily", [(WEB, "lost")])),
        refused("lost, copy", NotUsable, LOST, Copy(WEB, "lost", "a")),
        refused("lost, freeze", NotUsable, LOST, Freeze(WEB, "lost", "job")),
        refused("lost, look", NotUsable, LOST, Look(WEB, "lost")),
        refused("missing, remove", NotFound, MISSING, Remove(WEB, "no")),
        refused("missing, clear", NotFound, MISSING, Clear(WEB, "no")),
        refused("missing, look", NotFound, MISSING, Look(WEB, "no")),
        refused("missing, merge", NotFound, MISSING, Merge(WEB, "daily", [(DB, "no")])),
        refused("copy exists", NameTaken, "exists: busy", Copy(WEB, "daily", "busy")),
        refused(
            "persistent already",
            NotUsable,
            "Bitmap 'daily' is persistent already",
            Set(WEB, "daily", persistent=True, container="/x"),
        ),
        refused("abort", Refused, "Transaction aborted using Abort action", Abort()),
        refused(
            "removed", NotFound, "found", Remove(WEB, "daily"), Clear(WEB, "daily")
        ),
        refused(
            "frozen",
            Busy,
            "currently in use",
            Freeze(WEB, "daily", "job"),
            Clear(WEB, "daily"),
        ),
        refused(
            "cleared twice",
            Busy,
            "currently in use",
            Clear(WEB, "daily"),
            Clear(WEB, "daily"),
        ),
        refused(
            "cleared and frozen",
            Busy,
            "currently in use",
            Clear(WEB, "daily"),
            Freeze(WEB, "daily", "job"),
        ),
    ],
)
def test_refusal_says_why_and_changes_nothing(host, kind, text, steps):
    change(host, add("daily"), transient("now"), add("busy"), add("lost"))
    write(host, 1)
    change(host, Freeze(WEB, "busy", "job"))
    held(host, "lost").lose("for a test")
    host.inventory.save_bitmaps([WEB])
    save_state(host)
    before = everything(host)

    with pytest.raises(kind) as error:
        change(host, *steps)

    assert text in str(error.value)
    assert everything(host) == before
    write(host, 2)
    assert dirty(host, "daily") == dirty(host, "now") == {1, 2}


def test_sizes_that_differ_can_not_be_merged(host):
    host.close()
    host.add("big.raw", clusters("b" * 17))
    host.open()
    change(host, add("daily"), add("big", "big.raw"))

    with pytest.raises(NotUsable) as error:
        change(host, Merge(WEB, "daily", [("big.raw", "big")]))

    assert str(error.value) == (
        f"Bitmaps are of different sizes (destination size is {SIZE} and source size "
        f"is {SIZE + CLUSTER}) and can't be merged"
    )


def test_granularity_that_needs_too_many_bits_is_refused():
    check_granularity(64 * KiB, 16 * 1024 * GiB)
    with pytest.raises(NotUsable, match="needs 4 GiB of bits, more than 64 MiB"):
        check_granularity(512, 16 * 1024 * GiB)
    check_granularity(2 * GiB, 1 * MiB)


# -- all or nothing


def every_kind(host, tmpfs_path):
    """Return a step of each kind that can be undone, by name."""
    other = tmpfs_path / "other.qcow2"
    return {
        "add": add("new"),
        "add transient": transient("new"),
        "add elsewhere": add("new", container=other),
        "add with bits": add("new", bits=ones(16, endian="little")),
        "remove": Remove(WEB, "daily"),
        "remove transient": Remove(WEB, "now"),
        "clear": Clear(WEB, "daily"),
        "clear lost": Clear(WEB, "lost"),
        "fill": Fill(WEB, "lost"),
        "freeze": Freeze(WEB, "daily", "job"),
        "enable": Enable(WEB, "off"),
        "disable": Disable(WEB, "daily"),
        "merge": Merge(WEB, "daily", [(DB, "db")]),
        "copy": Copy(WEB, "daily", "new", persistent=True),
        "copy transient": Copy(WEB, "daily", "new"),
        "set persistent": Set(WEB, "now", persistent=True),
        "set elsewhere": Set(WEB, "now", persistent=True, container=other),
        "set transient": Set(WEB, "daily", persistent=False),
        "set auto": Set(WEB, "daily", auto=False),
        "attach": Attach(WEB, tmpfs_path / "attached.qcow2"),
    }


@pytest.mark.parametrize("at_save", [False, True])
@pytest.mark.logs("could not be saved")
def test_each_step_is_undone_when_the_instant_does_not_come(
    host, tmpfs_path, monkeypatch, at_save
):
    attached = tmpfs_path / "attached.qcow2"
    change(host, add("gone", container=attached))
    change(host, add("daily"), transient("now"), add("lost"), add("off"))
    change(host, add("db", DB), Disable(WEB, "off"))
    held(host, "lost").lose("for a test")
    write(host, 1)
    write(host, 5, disk=DB)
    # As another host leaves it.
    host.inventory.save_bitmaps([WEB])
    bitmaps = host.inventory.bitmaps.find(WEB)
    bitmaps.detach(["gone"])
    save_state(host)
    before = everything(host)

    for kind, step in every_kind(host, tmpfs_path).items():
        with monkeypatch.context() as patch:
            if at_save:
                patch.setattr(host.inventory, "_save", failing_once(host))
            steps = [step] if at_save else [step, Abort()]
            with pytest.raises((Refused, Busy)):
                change(host, *steps)
        assert everything(host) == before, kind

    write(host, 2)
    assert dirty(host, "daily") == {1, 2}
    assert dirty(host, "now") == {1, 2}
    assert dirty(host, "off") == set()
    assert reason(host, "lost") == "for a test"
    # And each of them works when nothing refuses.
    change(host, Freeze(WEB, "daily", "job"), Fill(WEB, "lost"), add("new"))


def failing_once(host):
    """Return a way to save the state that fails the first time."""
    save, calls = host.inventory._save, []

    def failing():
        calls.append(1)
        if len(calls) == 1:
            raise Busy("for a test")
        save()

    return failing


def test_steps_that_undo_each_other_leave_what_there_was(host):
    change(host, add("daily"))
    write(host, 1)
    before = everything(host)

    with pytest.raises(Refused):
        change(
            host,
            Disable(WEB, "daily"),
            Enable(WEB, "daily"),
            Copy(WEB, "daily", "kept"),
            Remove(WEB, "kept"),
            Remove(WEB, "daily"),
            transient("daily"),
            Abort(),
        )

    assert everything(host) == before
    assert dirty(host, "daily") == {1}


def test_filled_bitmap_that_was_right_is_as_before_when_undone(host):
    change(host, add("daily", recording=False))

    with pytest.raises(Refused):
        change(host, Fill(WEB, "daily"), Abort())
    write(host, 1)

    assert not described(host, "daily")["recording"]
