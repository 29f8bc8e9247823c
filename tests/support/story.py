"""A story of writes and snapshots on a host, and what is expected at each moment."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tests.support.host import Host
from tests.support.power import SECTOR

WEB = "web.raw"


@dataclass(frozen=True)
class LiveDisk:
    """What a guest knows of its disk: what it has flushed, and wrote since."""

    flushed: bytes
    since: tuple[tuple[int, bytes], ...] = ()

    @property
    def content(self) -> bytes:
        content = bytearray(self.flushed)
        for offset, data in self.since:
            content[offset : offset + len(data)] = data
        return bytes(content)

    def check(self, found: bytes) -> None:
        """Each sector is what was flushed, or what was written to it later."""
        assert len(found) == len(self.flushed)
        for at in range(0, len(found), SECTOR):
            sector = found[at : at + SECTOR]
            if sector != self.flushed[at : at + SECTOR]:
                assert sector in self._later(at), f"sector at {at}"

    def _later(self, at: int) -> Iterator[bytes]:
        """Return what may be in a sector; a write may change a part of it."""
        content = self.flushed[at : at + SECTOR]
        for offset, data in self.since:
            start, stop = max(offset, at), min(offset + len(data), at + SECTOR)
            if start < stop:
                part = data[start - offset : stop - offset]
                content = content[: start - at] + part + content[stop - at :]
                yield content


@dataclass(frozen=True)
class Expected:
    """What has to hold at some moment.

    `snapshots` is the content of each one, by disk. Those that are `open` are being
    made or deleted, and may be there or not. The `fragile` ones are exact or broken,
    the `broken` ones are that, all others are exact. `given_up` is how much of the
    beginning of a snapshot nobody wants to read any more.
    """

    disks: dict[str, LiveDisk]
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    open: frozenset[str] = frozenset()
    fragile: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    given_up: dict[str, int] = field(default_factory=dict)

    def check(self, host: Host) -> None:
        for name, disk in self.disks.items():
            disk.check(host.live(name))
        self.check_snapshots(host)

    def check_snapshots(self, host: Host) -> None:
        assert host.inventory is not None
        found = set(host.inventory.snapshots)
        assert set(self.snapshots) - self.open <= found <= set(self.snapshots)
        for snapshot in found:
            for name, content in self.snapshots[snapshot].items():
                self._check(host, snapshot, name, content)

    def _check(self, host: Host, snapshot: str, disk: str, content: bytes) -> None:
        lost = host.lost(snapshot, disk)
        if snapshot in self.broken:
            assert lost is not None, snapshot
        elif lost is None:
            start = self.given_up.get(snapshot, 0)
            assert host.read(snapshot, disk, start) == content[start:], snapshot
        else:
            assert snapshot in self.fragile, (snapshot, lost)
        # It is known how it broke, so no damage is found.
        assert "/" not in (lost or ""), lost


class Story:
    """What happens to the disks of a host.

    `tell` is told what is expected, whenever that changes.
    """

    def __init__(
        self, host: Host, tell: Callable[[Expected], None] = lambda expected: None
    ) -> None:
        self.host = host
        self.options: dict[str, Any] = {}
        self._tell = tell
        self._change(
            Expected({n: LiveDisk(p.read_bytes()) for n, p in host.sources.items()})
        )

    def _change(self, expected: Expected) -> None:
        self.expected = expected
        self._tell(expected)

    # -- the life of the mount

    def open(self, **options: Any) -> None:
        self.options |= options
        self.host.open(**self.options)

    def close(self) -> None:
        self.host.close()
        disks = {n: LiveDisk(d.content) for n, d in self.expected.disks.items()}
        self._change(replace(self.expected, disks=disks))

    # -- the guest

    def write(self, data: bytes, offset: int = 0, disk: str = WEB) -> None:
        self._overwrite(disk, offset, data)
        self.host.write(disk, data, offset)

    def discard(self, length: int, offset: int = 0, disk: str = WEB) -> None:
        assert self.host.inventory is not None
        self._overwrite(disk, offset, bytes(length))
        self.host.inventory.disks[disk].discard(length, offset)

    def flush(self, disk: str = WEB) -> None:
        assert self.host.inventory is not None
        self.host.inventory.disks[disk].flush()
        self._change_disk(disk, LiveDisk(self.expected.disks[disk].content))

    def _overwrite(self, disk: str, offset: int, data: bytes) -> None:
        before = self.expected.disks[disk]
        self._change_disk(disk, replace(before, since=(*before.since, (offset, data))))

    def _change_disk(self, name: str, disk: LiveDisk) -> None:
        disks = self.expected.disks | {name: disk}
        self._change(replace(self.expected, disks=disks))

    # -- snapshots

    def create(self, name: str) -> None:
        """Take a snapshot; without `survives_host` it is fragile."""
        assert self.host.inventory is not None
        content = {n: disk.content for n, disk in self.expected.disks.items()}
        snapshots = self.expected.snapshots | {name: content}
        if not self.options.get("survives_host"):
            self.may_break(name)
        self._change(
            replace(self.expected, snapshots=snapshots, open=frozenset({name}))
        )
        self.host.inventory.create_snapshot(name)
        self._change(replace(self.expected, open=frozenset()))

    def delete(self, name: str) -> None:
        assert self.host.inventory is not None
        self._change(replace(self.expected, open=frozenset({name})))
        self.host.inventory.delete_snapshot(name)
        left = {n: c for n, c in self.expected.snapshots.items() if n != name}
        self._change(replace(self.expected, snapshots=left, open=frozenset()))

    def may_break(self, name: str) -> None:
        fragile = self.expected.fragile | {name}
        self._change(replace(self.expected, fragile=fragile))

    def give_up(self, name: str, length: int) -> None:
        """Discard the beginning of a snapshot."""
        assert self.host.inventory is not None
        given_up = self.expected.given_up | {name: length}
        self._change(replace(self.expected, given_up=given_up))
        self.host.inventory.snapshots[name].snapshots[WEB].discard(length, 0)

    def has_broken(self, name: str) -> None:
        self._change(replace(self.expected, broken=self.expected.broken | {name}))
