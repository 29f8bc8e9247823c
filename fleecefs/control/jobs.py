"""The commands about jobs: QEMU's, as far as we have what they are about.

QEMU's block-job-pause, -resume, -complete, -dismiss and -finalize are left out: it has
deprecated them in favour of job-*.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from fleecefs.block.epoch import OnCbwError
from fleecefs.control.arguments import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    OBJECT,
    OBJECTS,
    STRING,
    Command,
    Handler,
    check_arguments,
    one_of,
    optional,
)
from fleecefs.control.qmp import Message, QmpError
from fleecefs.errors import Refused
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import WORKERS, BackupOptions, OnError, Sync
from fleecefs.jobs.registry import Jobs

# Each worker is a thread that may hang with its target.
WORKERS_MAX = 256

BACKUP = "blockdev-backup"

_ON_ERROR = one_of(*(policy.value for policy in OnError))

BACKUP_ARGUMENTS = {
    "job-id": optional(STRING),
    "device": STRING,
    "target": STRING,
    "sync": one_of(*(sync.value for sync in Sync)),
    "speed": optional(INTEGER),
    "on-source-error": optional(_ON_ERROR),
    "on-target-error": optional(_ON_ERROR),
    "on-cbw-error": optional(one_of(*(policy.value for policy in OnCbwError))),
    "cbw-timeout": optional(NUMBER),
    "max-workers": optional(INTEGER),
    "auto-finalize": optional(BOOLEAN),
    "auto-dismiss": optional(BOOLEAN),
}

ACTION_ARGUMENTS = {"type": STRING, "data": OBJECT}

PROPERTIES = {"completion-mode": optional(one_of("individual", "grouped"))}


class JobCommands:
    """The part of the table of commands that is about jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        of_job = {"id": STRING}
        table = {
            BACKUP: Command(self._backup, BACKUP_ARGUMENTS),
            "transaction": Command(
                self._transaction,
                {"actions": OBJECTS, "properties": optional(OBJECT)},
            ),
            "query-jobs": Command(self._query_jobs, {}),
            "query-block-jobs": Command(self._query_block_jobs, {}),
            "job-pause": Command(self._telling(Job.pause), of_job),
            "job-resume": Command(self._telling(Job.resume), of_job),
            "job-cancel": Command(self._telling(Job.cancel), of_job),
            "job-complete": Command(self._telling(Job.complete), of_job),
            "job-finalize": Command(self._telling(Job.finalize), of_job),
            "job-dismiss": Command(self._telling(Job.dismiss), of_job),
            "block-job-set-speed": Command(
                self._set_speed, {"device": STRING, "speed": INTEGER}
            ),
            "block-job-cancel": Command(
                self._block_job_cancel, {"device": STRING, "force": optional(BOOLEAN)}
            ),
            "fleecefs-job-list": Command(self._list, {}),
            "fleecefs-job-show": Command(self._show, of_job),
        }
        self.table = {
            name: command._replace(handler=self._when_resumed(command.handler))
            for name, command in table.items()
        }

    async def _backup(self, **arguments: object) -> Message:
        await self._jobs.start_backups([backup_options(arguments)])
        return {}

    async def _transaction(
        self, actions: list[Message], properties: Message | None = None
    ) -> Message:
        check_arguments(properties or {}, PROPERTIES)
        mode = (properties or {}).get("completion-mode", "individual")
        wanted = [_backup_action(action) for action in actions]
        if wanted:
            await self._jobs.start_backups(wanted, grouped=mode == "grouped")
        return {}

    async def _query_jobs(self) -> list[Message]:
        return [job.describe_job() for job in self._jobs.all()]

    async def _query_block_jobs(self) -> list[Message]:
        return [job.describe_block_job() for job in self._jobs.all()]

    async def _list(self) -> list[Message]:
        return [job.describe() for job in self._jobs.all()]

    async def _show(self, id: str) -> Message:
        return self._jobs.describe(id)

    async def _set_speed(self, device: str, speed: int) -> Message:
        self._jobs.get(device).set_speed(speed)
        return {}

    async def _block_job_cancel(self, device: str, force: bool = False) -> Message:
        job = self._jobs.get(device)
        if job.is_user_paused and not force:
            raise Refused(f"job {device!r} is paused: resume it, or use force")
        job.cancel()
        return {}

    def _when_resumed(self, handler: Handler) -> Handler:
        """Return a handler that is about all jobs, also those that go on."""

        async def waiting(**arguments: object) -> object:
            await self._jobs.wait_resumed()
            return await handler(**arguments)

        return waiting

    def _telling(self, verb: Callable[[Job], None]) -> Handler:
        """Return a handler that tells a job something."""

        async def handler(id: str) -> Message:
            verb(self._jobs.get(id))
            return {}

        return handler


def backup_options(arguments: Message) -> BackupOptions:
    """Return what the arguments of a backup say, once their types were checked."""
    _check_at_least_0(arguments, "speed")
    _check_at_least_0(arguments, "cbw-timeout")
    workers = cast("int", arguments.get("max-workers", WORKERS))
    if not 1 <= workers <= WORKERS_MAX:
        raise QmpError(
            f"Parameter 'max-workers' expects a value from 1 to {WORKERS_MAX}"
        )
    target = Path(str(arguments["target"]))
    if not target.is_absolute():
        # What it would be relative to, only the daemon knows.
        raise QmpError("Parameter 'target' expects an absolute path")
    device = str(arguments["device"])
    on_cbw_error = arguments.get("on-cbw-error")
    return BackupOptions(
        device=device,
        target=target,
        job_id=str(arguments.get("job-id", device)),
        sync=Sync(arguments["sync"]),
        speed=cast("int", arguments.get("speed", 0)),
        on_source_error=_on_error(arguments, "on-source-error"),
        on_target_error=_on_error(arguments, "on-target-error"),
        on_cbw_error=None if on_cbw_error is None else OnCbwError(on_cbw_error),
        cbw_timeout=cast("float | None", arguments.get("cbw-timeout")),
        workers=workers,
        auto_finalize=bool(arguments.get("auto-finalize", True)),
        auto_dismiss=bool(arguments.get("auto-dismiss", True)),
    )


def _check_at_least_0(arguments: Message, name: str) -> None:
    if cast("float", arguments.get(name, 0)) < 0:
        raise QmpError(f"Parameter {name!r} expects a value of at least 0")


def _on_error(arguments: Message, name: str) -> OnError:
    return OnError(arguments.get(name, OnError.REPORT.value))


def _backup_action(action: Message) -> BackupOptions:
    check_arguments(action, ACTION_ARGUMENTS)
    if action["type"] != BACKUP:
        raise QmpError(
            f"Parameter 'type' does not accept value {action['type']!r}:"
            f" it takes {BACKUP}"
        )
    data = cast("Message", action["data"])
    check_arguments(data, BACKUP_ARGUMENTS)
    return backup_options(data)
