"""What all tests share: `async def` tests run under trio, and nobody logs a warning."""

import gc
import inspect
import logging
import os
import re
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio.testing

from tests.support.mount import Mount, remove_leftovers, require_mount

# A guest gives up after 30 s and more; when a daemon dies, it waits some tenths.
STALL_SECONDS_MAX = 10.0

# A CI that starts us in the background may have SIGINT ignored, and so would all that
# we start; some tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "logs(pattern): the test makes us log a warning, or worse, like this"
    )
    if os.getuid() == 0:
        remove_leftovers()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run `async def` tests under trio."""
    if inspect.iscoroutinefunction(pyfuncitem.obj):
        pyfuncitem.obj = trio.testing.trio_test(pyfuncitem.obj)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_open():
    """Close what tests of a module have left to the garbage collector."""
    yield
    gc.collect()


@pytest.fixture
def autojump_clock():
    return trio.testing.MockClock(autojump_threshold=0)


@pytest.fixture(autouse=True)
def expected_logs(request, caplog):
    """Fail a test that logged a warning without `@pytest.mark.logs(pattern)`."""
    yield
    patterns = [mark.args[0] for mark in request.node.iter_markers("logs")]
    unexpected = [
        f"{record.levelname} {record.name}: {record.getMessage()}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.WARNING
        and not any(re.search(pattern, record.getMessage()) for pattern in patterns)
    ]
    assert not unexpected, "logged, and not expected by @pytest.mark.logs"


@pytest.fixture
def tmpfs_path():
    """An empty directory on tmpfs, where I/O is fast and durable at once."""
    path = Path(tempfile.mkdtemp(prefix="fleecefs-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def mounted(request, tmpfs_path):
    """A function that mounts disks: `mounted({"web.raw": 16 * MiB}, "--ram-limit=0")`.

    It returns a Mount, with all that belongs to it on tmpfs or in `directory`, which is
    unmounted at the end of the test. What its daemons may log is told by
    `@pytest.mark.logs(pattern)`.
    """
    require_mount()
    logs = [mark.args[0] for mark in request.node.iter_markers("logs")]
    with ExitStack() as stack:

        def mounted(disks, *options, directory=None):
            where = Path(
                tempfile.mkdtemp(prefix="fleecefs-", dir=directory or tmpfs_path)
            )
            mount = Mount(where, disks, *options, expected_logs=logs)
            return stack.enter_context(mount)

        yield mounted


@pytest.fixture
def tell_stall(capsys, record_property, request):
    """A function that tells how long the longest operation of a guest took."""

    def tell_stall(seconds, what):
        record_property("longest_stall_seconds", round(seconds, 3))
        with capsys.disabled():
            name = request.node.name
            print(f"\n{name}: {what}, longest stall {seconds * 1000:.0f} ms")
        assert seconds < STALL_SECONDS_MAX

    return tell_stall
