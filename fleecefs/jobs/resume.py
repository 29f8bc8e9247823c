"""How the jobs of the daemon before go on."""

import logging
from collections.abc import Callable, Mapping, Sequence

from fleecefs.errors import NotUsable
from fleecefs.inventory import Inventory
from fleecefs.jobs.backup import BackupJob
from fleecefs.jobs.backups import resume_backup
from fleecefs.jobs.job import Job
from fleecefs.jobs.mirror import MirrorJob
from fleecefs.jobs.mirrors import resume_mirror
from fleecefs.jobs.record import Record

log = logging.getLogger(__name__)

_RESUMES: Mapping[str, Callable[[Inventory, Record], Job | None]] = {
    BackupJob.type: resume_backup,
    MirrorJob.type: resume_mirror,
}


def resume_jobs(inventory: Inventory) -> Sequence[Sequence[Job]]:
    """Return the jobs of the daemon before, in groups that end together; blocking."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for path in (inventory.state_path / "jobs").glob("*.json.new"):
        # A crash has cut it short.
        path.unlink()
    for path in (inventory.state_path / "jobs").glob("*.json"):
        record = Record(inventory, path.stem)
        job = _resume(inventory, record)
        if job is None:
            record.remove()
            inventory.forget_job(record.key)
        else:
            groups.setdefault(tuple(job.group), []).append(job)
    for jobs in groups.values():
        jobs.sort(key=lambda job: job.created)
        # All are told so before the first commits: if one was not, none has.
        is_committing = all(job.is_committing for job in jobs)
        for job in jobs:
            job.is_committing = is_committing
    return sorted(groups.values(), key=lambda jobs: jobs[0].created)


def _resume(inventory: Inventory, record: Record) -> Job | None:
    try:
        return _RESUMES[record.told()["type"]](inventory, record)
    except (NotUsable, KeyError, ValueError, TypeError) as e:
        log.error("job %s does not go on: %s", record.key, e)
        return None
