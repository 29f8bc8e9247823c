"""A command line, and a fake daemon for it to talk to."""

import pytest

from fleecefs.state.runtime import RunningMount
from tests.control.fakes import running_daemon


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """The same width and no choice of a daemon, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FLEECEFS_MOUNT", raising=False)


@pytest.fixture
def running(monkeypatch):
    """The mounts that are said to be served."""
    mounts = []
    monkeypatch.setattr(
        "fleecefs.state.runtime.running_mounts", lambda wanted=None: list(mounts)
    )
    return mounts


@pytest.fixture
def daemon(tmp_path, running):
    with running_daemon(tmp_path / "control") as daemon:
        running.append(RunningMount(daemon.mount, daemon.path, 0))
        yield daemon
