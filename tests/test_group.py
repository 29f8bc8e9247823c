"""A snapshot of several disks is one instant of all of them."""

import mmap
import os
import struct
import threading
from pathlib import Path

import pytest

from fleecefs.units import KiB
from tests.support.mount import Mount, wait_until

BLOCK = 4 * KiB
SIZE = 64 * KiB
DISKS = ["d1.raw", "d2.raw", "d3.raw", "d4.raw"]


class Counter:
    """A guest that writes 1 to every disk in turn, then 2, and so on.

    `begun` is on its way to the disks, `done` is on all of them.
    """

    def __init__(
        self, disks: list[Path], offset: int, flags: int = 0, *, length: int = BLOCK
    ) -> None:
        self.begun = 0
        self.done = 0
        self._offset = offset
        self._length = length
        self._fds = [os.open(path, os.O_WRONLY | os.O_DIRECT | flags) for path in disks]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def __enter__(self) -> "Counter":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for fd in self._fds:
            os.close(fd)

    def _count(self) -> None:
        with mmap.mmap(-1, self._length) as block:
            while not self._ended.is_set():
                self.begun += 1
                block[:] = struct.pack("<Q", self.begun) * (self._length // 8)
                for fd in self._fds:
                    assert os.pwrite(fd, block, self._offset) == self._length
                self.done = self.begun

    def wait_beyond(self, value: int) -> None:
        wait_until(lambda: self.done > value, f"the counter goes beyond {value}")


def values(mount: Mount, name: str, disks: list[str], offset: int) -> list[int]:
    """Return what the counter was on each disk of a snapshot."""
    return [
        value_of(mount.snapshot(name, disk).read_bytes()[offset : offset + BLOCK])
        for disk in disks
    ]


def value_of(block: bytes) -> int:
    """Return what the counter was when it wrote a block."""
    assert block == block[:8] * (len(block) // 8), "a write is there in part"
    return int.from_bytes(block[:8], "little")


def create_by_command(mount: Mount, name: str) -> None:
    done = mount.cli("snapshot", "create", name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("create", "count", "flags"),
    [
        pytest.param(Mount.create, 120, 0, id="mkdir"),
        pytest.param(Mount.create, 60, os.O_DSYNC, id="mkdir-durable-writes"),
        pytest.param(create_by_command, 15, 0, id="command"),
    ],
)
def test_snapshot_has_all_disks_at_one_instant(mounted, create, count, flags):
    mount = mounted(dict.fromkeys(DISKS, SIZE), "--ram-limit=256K")
    live = [mount.live(disk) for disk in DISKS]
    seen: dict[str, list[list[int]]] = {}

    # Two guests, each in an order of its own.
    with (
        Counter(live, 0, flags) as forward,
        Counter(live[::-1], 5 * BLOCK, flags) as backward,
    ):
        for index in range(count):
            forward.wait_beyond(index)
            backward.wait_beyond(index)
            name = f"s{index}"
            done = forward.done, backward.done
            create(mount, name)
            begun = forward.begun, backward.begun

            up = values(mount, name, DISKS, 0)
            down = values(mount, name, DISKS, 5 * BLOCK)[::-1]

            for found, least, most in zip((up, down), done, begun, strict=True):
                assert sorted(found, reverse=True) == found
                assert found[0] - 1 <= found[-1]
                # What was answered before is in, what was begun afterwards is not.
                assert least <= found[-1]
                assert found[0] <= most
            seen[name] = [up, down]
            if len(seen) > 8:
                for old in list(seen)[:4]:
                    up, down = seen.pop(old)
                    assert values(mount, old, DISKS, 0) == up
                    assert values(mount, old, DISKS, 5 * BLOCK) == down[::-1]
                    mount.delete(old)

    assert forward.done >= count
    assert mount.status()["snapshots"][-1]["state"] == "good"


def test_write_is_in_a_snapshot_whole_or_not_at_all(mounted):
    size = 512 * KiB
    mount = mounted({"a.raw": size})
    seen: dict[str, int] = {}

    # The kernel sends a write of this size, into aligned memory, as one request.
    with Counter([mount.live("a.raw")], 0, length=size) as counter:
        for index in range(100):
            counter.wait_beyond(index)
            mount.create(f"s{index}")
            if index >= 4:
                mount.delete(f"s{index - 4}")
                del seen[f"s{index - 4}"]
            with open(mount.snapshot(f"s{index}", "a.raw"), "rb", 0) as file:
                seen[f"s{index}"] = value_of(file.read(size))
            for name, value in seen.items():
                # Not what the kernel has cached: what the daemon has.
                fd = os.open(mount.snapshot(name, "a.raw"), os.O_RDONLY | os.O_DIRECT)
                with open(fd, "rb", 0) as file:
                    assert value_of(file.read(size)) == value

    assert list(seen.values()) == sorted(seen.values())
    assert counter.done >= 100


def test_snapshot_of_chosen_disks(mounted):
    mount = mounted(dict.fromkeys(DISKS, SIZE))

    done = mount.cli("snapshot", "create", "some", "d2.raw", "d4.raw")

    assert done.returncode == 0
    assert sorted(os.listdir(mount.snapshots / "some")) == ["d2.raw", "d4.raw"]
    for disk in DISKS:
        with open(mount.live(disk), "r+b") as file:
            file.write(b"x" * SIZE)
    shown = {s["name"]: s["snapshots"] for s in mount.status()["disks"]}
    assert shown == {"d1.raw": 0, "d2.raw": 1, "d3.raw": 0, "d4.raw": 1}
    for disk in "d2.raw", "d4.raw":
        assert mount.snapshot("some", disk).read_bytes() == bytes(SIZE)


def test_snapshot_of_chosen_disks_costs_the_others_nothing(mounted):
    mount = mounted(dict.fromkeys(DISKS, b"old " * (SIZE // 4)))
    mount.cli("snapshot", "create", "some", "d2.raw")

    for disk in DISKS:
        with open(mount.live(disk), "r+b") as file:
            file.write(b"new!" * (SIZE // 4))

    assert mount.status()["ram"]["used"] == SIZE
    assert mount.snapshot("some", "d2.raw").read_bytes() == b"old " * (SIZE // 4)


def test_snapshot_of_chosen_disks_is_one_instant_of_them(mounted):
    mount = mounted(dict.fromkeys(DISKS, SIZE))
    chosen = ["d1.raw", "d3.raw"]

    with Counter([mount.live(disk) for disk in DISKS], 0) as counter:
        for index in range(15):
            counter.wait_beyond(index)
            done = mount.cli("snapshot", "create", f"s{index}", *chosen)
            assert done.returncode == 0
            first, third = values(mount, f"s{index}", chosen, 0)
            assert first >= third >= first - 1


def test_deleting_a_snapshot_deletes_it_on_all_disks(mounted):
    mount = mounted(dict.fromkeys(DISKS, b"old " * (SIZE // 4)))
    mount.create("s")
    for disk in DISKS:
        with open(mount.live(disk), "r+b") as file:
            file.write(b"new!" * (SIZE // 4))
    assert mount.status()["ram"]["used"] == 4 * SIZE

    mount.delete("s")

    assert os.listdir(mount.snapshots) == []
    assert mount.status()["ram"]["used"] == 0
