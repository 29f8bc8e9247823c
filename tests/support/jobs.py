"""Jobs of a real daemon, told what to do by the command line."""

from pathlib import Path
from typing import Any

from tests.support.mount import Mount, wait_until


def output_of(mount: Mount, *words: object) -> str:
    """Run a command that has to succeed and return what it printed."""
    done = mount.cli(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def error_of(mount: Mount, *words: object) -> tuple[int, str]:
    """Run a command and return its exit status and the line it complained with."""
    done = mount.cli(*map(str, words))
    return done.returncode, done.stderr.removeprefix("fleecefs: ").rstrip()


def start(mount: Mount, *words: object) -> None:
    """Start a backup that nobody follows."""
    output_of(mount, "backup", *words, "--detach")


def job_of(mount: Mount, job_id: str = "web.raw") -> Any:
    return mount.json("job", "show", job_id)


def job_ids(mount: Mount) -> list[str]:
    return [job["id"] for job in mount.json("job", "list")]


def wait_status(mount: Mount, status: str, job_id: str = "web.raw") -> None:
    wait_until(lambda: job_of(mount, job_id)["status"] == status, f"a {status} job")


def wait_begun(mount: Mount, job_id: str = "web.raw") -> None:
    """Wait until something is copied."""
    wait_until(lambda: job_of(mount, job_id)["current"] > 0, "progress")


def check_nothing_is_left(mount: Mount) -> None:
    """Check that jobs which are over have left nothing in the daemon's hands."""
    status = mount.status()
    assert [job for job in status["jobs"] if job["status"] != "concluded"] == []
    assert (status["ram"]["used"], status["store"]["used"]) == (0, 0)
    for base in mount.state, Path(status["runtime"]):
        assert list(base.glob("jobs/*")) == []
        assert list(base.glob("disks/*/epochs/*")) == []
