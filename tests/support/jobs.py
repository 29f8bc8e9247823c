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


def start_mirror(mount: Mount, *words: object) -> None:
    """Start a mirror that nobody follows."""
    output_of(mount, "mirror", *words, "--detach")


def wait_ready(mount: Mount, job_id: str = "web.raw") -> None:
    """Wait until the target of a mirror is like its disk, and follows it."""
    output_of(mount, "job", "wait", "--ready", job_id)
    assert job_of(mount, job_id)["status"] == "ready"


def complete(mount: Mount, job_id: str = "web.raw") -> str:
    """Move a disk to the target that follows it; return what is said of it."""
    output_of(mount, "job", "complete", job_id)
    return output_of(mount, "job", "wait", job_id)


def keep(mount: Mount, job_id: str = "web.raw") -> str:
    """Let what follows a disk be a copy of this moment; return what is said of it."""
    output_of(mount, "job", "cancel", job_id)
    return output_of(mount, "job", "wait", job_id)


def source_of(mount: Mount, disk: str = "web.raw") -> Path:
    """Return where a disk lives."""
    disks = mount.status()["disks"]
    return next(Path(each["source"]) for each in disks if each["name"] == disk)


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
