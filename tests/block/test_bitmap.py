"""Bits in files: those in use, and those saved for the next start."""

import os
import struct
from uuid import uuid4

import pytest
from bitarray import bitarray

from fleecefs.block.bitmap import (
    PAGE,
    LiveBits,
    Owner,
    next_clear,
    next_set,
    replace_file,
    save_bits,
    sync_directory,
)
from fleecefs.errors import NotUsable

COUNT = 1000


@pytest.fixture(params=["any directory", "tmpfs"])
def directory(request, tmp_path):
    if request.param == "tmpfs":
        return request.getfixturevalue("tmpfs_path")
    return tmp_path


@pytest.fixture
def owner():
    return Owner(uuid4(), 7, COUNT)


@pytest.fixture
def live(directory, owner):
    return LiveBits.create(directory / "live.bits", owner)


@pytest.fixture
def saved(directory, live):
    """A saved file with bits 3 and 999 set."""
    live.bits[3] = live.bits[COUNT - 1] = 1
    live.save(directory / "saved.bits")
    return directory / "saved.bits"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path, size):
    os.truncate(path, size)


# Where in a file things are: the version, the epoch's number, the CRC of the header.
VERSION, EPOCH, HEADER_CRC = 8, 32, 48

DAMAGES = [
    pytest.param(lambda path: cut(path, 0), "not a file of bits", id="empty"),
    pytest.param(lambda path: cut(path, 20), "not a file of bits", id="cut in header"),
    pytest.param(lambda path: cut(path, PAGE), "truncated", id="cut before the bits"),
    pytest.param(lambda path: cut(path, PAGE + 64), "truncated", id="cut in the bits"),
    pytest.param(lambda path: cut(path, PAGE + 4096), "truncated", id="too long"),
    pytest.param(lambda path: flip(path, 0), "not a file of bits", id="other magic"),
    pytest.param(
        lambda path: flip(path, VERSION),
        "version 0",
        id="version",
    ),
    pytest.param(lambda path: flip(path, EPOCH), "header is damaged", id="header flip"),
    pytest.param(
        lambda path: flip(path, HEADER_CRC), "header is damaged", id="header CRC"
    ),
    pytest.param(
        lambda path: path.write_bytes(b"\x7fELF" * 2000), "not a file of bits", id="ELF"
    ),
    pytest.param(
        lambda path: path.write_bytes(bytes(PAGE + 128)),
        "not a file of bits",
        id="zeroes",
    ),
]

OTHERS = [
    pytest.param(lambda owner: Owner(uuid4(), owner.epoch, COUNT), id="other disk"),
    pytest.param(lambda owner: Owner(owner.disk, 8, COUNT), id="other epoch"),
    pytest.param(lambda owner: Owner(owner.disk, 7, COUNT + 1), id="other size"),
]


# -- bits in use


def test_new_bits_are_clear_and_at_least_as_many_as_clusters(live):
    assert not live.bits.any()
    assert len(live.bits) >= COUNT


def test_bits_in_use_survive_whoever_set_them(live, owner):
    live.bits[5:500] = 1
    again = LiveBits.open(live.path, owner)

    assert again.bits == live.bits
    again.bits[900] = 1
    assert live.bits[900]


def test_a_file_of_bits_is_preallocated(live):
    status = live.path.stat()

    assert status.st_blocks * 512 >= status.st_size == PAGE + 16 * 8


def test_a_file_of_bits_is_for_its_owner_only(live):
    assert live.path.stat().st_mode & 0o777 == 0o600


def test_creating_again_starts_clear(live, owner):
    live.bits.setall(1)
    live.note = "broken"

    again = LiveBits.create(live.path, owner)

    assert not again.bits.any()
    assert again.note is None


@pytest.mark.parametrize("count", [1, 63, 64, 65, 4096 * 8])
def test_any_count_of_bits_can_be_reopened(tmp_path, count):
    owner = Owner(uuid4(), 1, count)
    live = LiveBits.create(tmp_path / "bits", owner)

    live.bits[count - 1] = 1

    assert LiveBits.open(live.path, owner).bits.find(1) == count - 1


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_bits_in_use_are_refused_by_name(live, owner, damage, message):
    damage(live.path)

    with pytest.raises(NotUsable, match=message) as e:
        LiveBits.open(live.path, owner)

    assert str(live.path) in str(e.value)


@pytest.mark.parametrize("other", OTHERS)
def test_bits_in_use_of_something_else_are_refused_by_name(live, owner, other):
    with pytest.raises(NotUsable, match="another disk or epoch") as e:
        LiveBits.open(live.path, other(owner))

    assert str(live.path) in str(e.value)


def test_missing_bits_are_a_plain_error(live, owner):
    with pytest.raises(FileNotFoundError):
        LiveBits.open(live.path.with_name("missing"), owner)


def test_dropped_bits_can_be_used_to_the_end(live):
    live.drop()
    live.drop()

    live.bits[3] = 1
    assert live.bits[3]
    assert not live.path.exists()


# -- the note


def test_there_is_no_note_at_first(live):
    assert live.note is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        pytest.param("no space in the store", "no space in the store", id="short"),
        pytest.param("Gerät fehlt", "Gerät fehlt", id="not ASCII"),
        pytest.param("x" * 5000, "x" * 1024, id="cut"),
        pytest.param(
            "x" * 1023 + "ä",
            "x" * 1023 + "\N{REPLACEMENT CHARACTER}",
            id="cut in a character",
        ),
    ],
)
def test_a_note_survives_a_reopening(live, owner, text, kept):
    live.note = text

    assert LiveBits.open(live.path, owner).note == live.note == kept
    assert not live.bits.any()


def test_a_later_note_replaces_an_earlier_one(live):
    live.note = "a long story of what went wrong"
    live.note = "short"

    assert live.note == "short"


# -- bits saved


def test_saved_bits_are_loaded_into_new_ones(directory, saved, owner):
    live = LiveBits.create(directory / "again.bits", owner)

    live.load(saved)

    assert list(live.bits.search(1)) == [3, COUNT - 1]


def test_saving_replaces_what_was_saved(directory, live, saved, owner):
    live.bits[4] = 1
    live.save(saved)
    again = LiveBits.create(directory / "again.bits", owner)

    again.load(saved)

    assert list(again.bits.search(1)) == [3, 4, COUNT - 1]
    assert sorted(p.name for p in directory.iterdir()) == [
        "again.bits",
        "live.bits",
        "saved.bits",
    ]


def test_saved_bits_need_not_be_whole_words(tmp_path):
    owner = Owner(uuid4(), 1, 10)
    save_bits(tmp_path / "bits", owner, bitarray("0100000001", endian="little"))
    live = LiveBits.create(tmp_path / "live", owner)

    live.load(tmp_path / "bits")

    assert list(live.bits.search(1)) == [1, 9]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_saved_bits_are_refused_by_name(live, saved, damage, message):
    damage(saved)
    live.bits.setall(0)

    with pytest.raises(NotUsable, match=message) as e:
        live.load(saved)

    assert str(saved) in str(e.value)
    assert not live.bits.any()


@pytest.mark.parametrize("at", [PAGE, PAGE + 10, -1], ids=["first", "middle", "last"])
def test_torn_saved_bits_are_refused_by_name(live, saved, at):
    flip(saved, at)

    with pytest.raises(NotUsable, match="damaged") as e:
        live.load(saved)

    assert str(saved) in str(e.value)


@pytest.mark.parametrize("other", OTHERS)
def test_saved_bits_of_something_else_are_refused_by_name(
    directory, saved, owner, other
):
    live = LiveBits.create(directory / "again.bits", other(owner))

    with pytest.raises(NotUsable, match="another disk or epoch") as e:
        live.load(saved)

    assert str(saved) in str(e.value)


def test_bits_in_use_are_not_taken_for_saved_ones(live):
    live.bits[3] = 1

    with pytest.raises(NotUsable, match="damaged"):
        live.load(live.path)


def test_a_header_is_as_written_in_the_formats(live, owner):
    header = live.path.read_bytes()[:52]

    found = struct.unpack("<8sII16sQQI", header)

    assert found[:6] == (b"flcbits\0", 1, 0, owner.disk.bytes, 7, COUNT)


# -- files replaced


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fsync(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")

    assert path.read_bytes() == b"old"


def test_a_replacement_is_durable_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.replace

    def recording_fsync(fd):
        calls.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def recording_rename(old, new):
        calls.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_rename)
    replace_file(tmp_path / "file", b"new")

    assert calls == ["file", "rename", "directory"]


def test_only_a_directory_is_synced_as_one(tmp_path):
    sync_directory(tmp_path)
    (tmp_path / "file").touch()

    with pytest.raises(NotADirectoryError):
        sync_directory(tmp_path / "file")


# -- searches


@pytest.mark.parametrize(
    ("start", "stop", "first_set", "first_clear"),
    [
        pytest.param(0, 8, 2, 0, id="all"),
        pytest.param(2, 8, 2, 4, id="from a set one"),
        pytest.param(0, 2, 2, 0, id="none set"),
        pytest.param(2, 4, 2, 4, id="none clear"),
        pytest.param(4, 4, 4, 4, id="nothing"),
    ],
)
def test_searches_end_where_they_are_told(start, stop, first_set, first_clear):
    bits = bitarray("00110010", endian="little")

    assert next_set(bits, start, stop) == first_set
    assert next_clear(bits, start, stop) == first_clear
