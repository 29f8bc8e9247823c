"""The files of one epoch: made, saved, loaded, removed."""

import os
from uuid import UUID

import pytest
from bitarray import bitarray

from fleecefs.block.epoch import OnCbwError
from fleecefs.block.store import Budget
from fleecefs.errors import NoSpace, NotUsable
from fleecefs.state.epochs import Budgets, End, EpochFiles, gone
from tests.support.disks import BREAK_SNAPSHOT, CLUSTER, clusters, letters

DISK = UUID("5f0c4b1e-6b0c-4d0e-9c6a-1f2e3d4c5b6a")
COUNT = 8


class Place:
    """Where an epoch is, on tmpfs."""

    def __init__(self, base):
        self.runtime = base / "runtime"
        self.state = base / "state"
        self.store = base / "store"
        self.budgets = Budgets(Budget(None, "ram"), Budget(None, "disk"))

    def files(self, *, number=1, size=COUNT * CLUSTER, cluster_size=CLUSTER):
        return EpochFiles(
            disk_id=DISK,
            number=number,
            size=size,
            cluster_size=cluster_size,
            runtime=self.runtime,
            state=self.state,
            store=self.store,
            budgets=self.budgets,
        )

    def limit(self, *, ram=None, disk=None):
        """Set limits for what comes; nothing is used yet."""
        self.budgets = Budgets(Budget(ram, "ram"), Budget(disk, "disk"))


@pytest.fixture
def place(tmpfs_path):
    return Place(tmpfs_path)


def keep(epoch, text, first=0):
    """Preserve clusters as a write would."""
    epoch.store.put(clusters(text), first)
    epoch.preserved[first : first + len(text)] = 1


def kept(epoch):
    """Return what the store has; zeroes for what it has not."""
    data = bytearray(COUNT * CLUSTER)
    everything = bitarray("1" * COUNT, endian="little")
    epoch.store.read_into(memoryview(data), 0, 0, everything)
    return letters(data)


def test_a_new_epoch_is_empty_and_private(place):
    epoch = place.files().create(BREAK_SNAPSHOT)

    assert not epoch.preserved.any()
    assert epoch.lost is None
    for directory in place.runtime, place.state, place.store:
        assert directory.stat().st_mode & 0o777 == 0o700
        for path in directory.iterdir():
            assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, {"disk.bits", "preserved.bits", "ram.bits", "ram.raw"}),
        (0, {"disk.bits", "preserved.bits"}),
    ],
)
def test_without_ram_there_is_no_ram_tier(place, limit, expected):
    place.limit(ram=limit)

    place.files().create(BREAK_SNAPSHOT)

    assert set(os.listdir(place.runtime)) == expected


@pytest.mark.parametrize("policy", OnCbwError)
def test_what_lives_is_found_by_the_next_daemon(place, policy):
    place.limit(ram=CLUSTER)
    epoch = place.files().create(policy)
    keep(epoch, "a")
    keep(epoch, ".bc", 2)

    place.limit(ram=CLUSTER)
    again = place.files().load(policy, End.PROCESS_CRASHED)

    assert kept(again) == "a..bc..."
    assert again.preserved[:COUNT].to01() == "10111000"
    assert again.on_cbw_error is policy
    assert (place.budgets.ram.used, place.budgets.disk.used) == (CLUSTER, 2 * CLUSTER)


def test_what_was_saved_is_found_without_what_lived(place):
    files = place.files()
    epoch = files.create(BREAK_SNAPSHOT)
    keep(epoch, "ab", 3)
    files.save(epoch)
    for path in place.runtime.iterdir():
        path.unlink()
    place.runtime.rmdir()

    again = place.files().load(BREAK_SNAPSHOT, End.CLEAN)

    assert kept(again) == "...ab..."
    assert again.preserved[:COUNT].to01() == "00011000"
    assert again.store.used() == {"ram": 0, "disk": 2 * CLUSTER}


def test_saving_twice_saves_the_latter(place):
    files = place.files()
    epoch = files.create(BREAK_SNAPSHOT)
    keep(epoch, "a")
    files.save(epoch)
    keep(epoch, "b", 1)
    files.save(epoch)

    again = place.files().load(BREAK_SNAPSHOT, End.CLEAN)

    assert kept(again) == "ab......"


def test_what_does_not_fit_can_not_be_saved(place):
    place.limit(disk=CLUSTER)
    files = place.files()
    epoch = files.create(BREAK_SNAPSHOT)
    keep(epoch, "ab")

    with pytest.raises(NoSpace, match="limit"):
        files.save(epoch)

    assert kept(epoch) == "ab......"


def test_a_lost_epoch_says_so_to_the_next_daemon(place):
    place.files().create(BREAK_SNAPSHOT).lose("no space in «store»")

    again = place.files().load(BREAK_SNAPSHOT, End.PROCESS_CRASHED)

    assert again.lost == "no space in «store»"


def test_a_long_reason_is_cut(place):
    place.files().create(BREAK_SNAPSHOT).lose("ü" * 5000)

    again = place.files().load(BREAK_SNAPSHOT, End.PROCESS_CRASHED)

    assert again.lost.startswith("ü" * 500)
    assert len(again.lost) < 600


@pytest.mark.parametrize("end", [End.PROCESS_CRASHED, End.CLEAN])
def test_what_was_denied_stays_denied(place, end):
    files = place.files()
    epoch = files.create(BREAK_SNAPSHOT)
    epoch.denied = epoch.make_denied()
    epoch.denied[2:4] = 1
    if end is End.CLEAN:
        files.save(epoch)

    again = place.files().load(BREAK_SNAPSHOT, end)

    assert again.denied[:COUNT].to01() == "00110000"


def test_a_bit_of_a_tier_alone_is_cleared(place):
    """The kill came between the two; the old data is still on the source."""
    epoch = place.files().create(BREAK_SNAPSHOT)
    epoch.store.put(clusters("ab"), 0)
    epoch.preserved[0] = 1

    again = place.files().load(BREAK_SNAPSHOT, End.PROCESS_CRASHED)

    assert again.store.used() == {"ram": CLUSTER, "disk": 0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"number": 2}, "another disk or epoch", id="another number"),
        pytest.param({"size": 2 * CLUSTER}, "bytes long", id="another size"),
        pytest.param({"cluster_size": 8192}, "another disk", id="another cluster size"),
    ],
)
@pytest.mark.parametrize("end", [End.PROCESS_CRASHED, End.CLEAN])
def test_files_of_something_else_are_refused(place, change, says, end):
    files = place.files()
    files.save(files.create(BREAK_SNAPSHOT))

    with pytest.raises(NotUsable, match=says):
        place.files(**change).load(BREAK_SNAPSHOT, end)


@pytest.mark.parametrize("name", ["preserved.bits", "disk.bits", "ram.raw"])
def test_a_missing_file_is_named(place, name):
    place.files().create(BREAK_SNAPSHOT)
    (place.runtime / name).unlink()

    with pytest.raises(NotUsable, match=rf"{name}: is missing"):
        place.files().load(BREAK_SNAPSHOT, End.PROCESS_CRASHED)


@pytest.mark.parametrize("name", ["preserved.bits", "disk.bits", "ram.raw"])
def test_a_truncated_file_is_named(place, name):
    place.files().create(BREAK_SNAPSHOT)
    os.truncate(place.runtime / name, 4096)

    with pytest.raises(NotUsable, match=name):
        place.files().load(BREAK_SNAPSHOT, End.PROCESS_CRASHED)


def test_removing_leaves_nothing(place):
    files = place.files()
    files.save(files.create(BREAK_SNAPSHOT))

    files.remove()
    files.remove()

    assert not place.runtime.exists()
    assert not place.state.exists()
    assert not place.store.exists()


def test_a_dropped_epoch_gives_everything_back(place):
    epoch = place.files().create(BREAK_SNAPSHOT)
    keep(epoch, "abc")

    epoch.drop()

    assert (place.budgets.ram.used, place.budgets.disk.used) == (0, 0)
    assert not place.store.exists()


def test_a_stand_in_is_lost_and_can_be_dropped(place):
    files = place.files()
    files.create(BREAK_SNAPSHOT)
    epoch = gone(1, "preserved.bits: is missing", files.remove)

    epoch.drop()

    assert epoch.lost == "preserved.bits: is missing"
    assert not place.state.exists()
