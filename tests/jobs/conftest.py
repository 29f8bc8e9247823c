"""A host with real files, and where its jobs copy to; some modules have their own."""

import pytest

from fleecefs.units import MiB
from tests.support.host import Host


@pytest.fixture
def host(tmpfs_path, monkeypatch):
    host = Host(tmpfs_path, monkeypatch)
    yield host
    host.end()


@pytest.fixture
def web(host):
    """A host with a disk of three chunks: `a`, `b` and `c`."""
    host.add("web.raw", b"a" * MiB + b"b" * MiB + b"c" * MiB)
    host.open()
    return host


@pytest.fixture
def content(web):
    return web.live("web.raw")


@pytest.fixture
def target(tmpfs_path):
    return tmpfs_path / "copy.raw"
