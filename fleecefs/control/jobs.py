"""The commands about jobs: QEMU's, as far as we have what they are about.

QEMU's block-job-pause, -resume, -complete, -dismiss and -finalize are left out: it has
deprecated them in favour of job-*.
"""

from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import cast

from fleecefs.block.mirror import GRANULARITY
from fleecefs.control.arguments import (
    BOOLEAN,
    INTEGER,
    OBJECT,
    OBJECTS,
    STRING,
    Command,
    Handler,
    check_arguments,
    check_at_least_0,
    one_of,
    optional,
    word,
    words_of,
)
from fleecefs.control.bitmaps import absolute
from fleecefs.control.qmp import Message, QmpError
from fleecefs.control.transactions import (
    BACKUP,
    BACKUP_ARGUMENTS,
    WORKERS_MAX,
    backup_options,
    transact,
)
from fleecefs.errors import Refused
from fleecefs.inventory import Inventory
from fleecefs.jobs.held import CheckPlace
from fleecefs.jobs.job import Job
from fleecefs.jobs.mirrors import create_mirror
from fleecefs.jobs.options import (
    BUF_SIZE,
    MIRROR_WORKERS,
    CopyMode,
    Format,
    MirrorOptions,
    OnError,
    Sync,
    VerifyOptions,
)
from fleecefs.jobs.registry import Jobs
from fleecefs.jobs.verify import create_verify

PROPERTIES = {"completion-mode": optional(one_of("individual", "grouped"))}

VERIFY_ARGUMENTS = {
    "job-id": optional(STRING),
    "device": STRING,
    "target": STRING,
    "bitmap": optional(STRING),
    "format": optional(words_of(Format)),
    "speed": optional(INTEGER),
    "auto-dismiss": optional(BOOLEAN),
}

MIRROR_ARGUMENTS = {
    "job-id": optional(STRING),
    "device": STRING,
    "target": STRING,
    "sync": words_of(Sync),
    "speed": optional(INTEGER),
    "granularity": optional(INTEGER),
    "buf-size": optional(INTEGER),
    "on-source-error": optional(words_of(OnError)),
    "on-target-error": optional(words_of(OnError)),
    "copy-mode": optional(words_of(CopyMode)),
    "converge": optional(one_of("auto")),
    "target-is-zero": optional(BOOLEAN),
    "max-workers": optional(INTEGER),
    "auto-finalize": optional(BOOLEAN),
    "auto-dismiss": optional(BOOLEAN),
}


class JobCommands:
    """The part of the table of commands that is about jobs."""

    def __init__(
        self, inventory: Inventory, jobs: Jobs, check_place: CheckPlace
    ) -> None:
        self._inventory = inventory
        self._jobs = jobs
        self._check_place = check_place
        of_job = {"id": STRING}
        table = {
            BACKUP: Command(self._backup, BACKUP_ARGUMENTS),
            "blockdev-mirror": Command(self._mirror, MIRROR_ARGUMENTS),
            "transaction": Command(
                self._transaction,
                {"actions": OBJECTS, "properties": optional(OBJECT)},
            ),
            "query-jobs": Command(self._query_jobs, {}),
            "query-block-jobs": Command(self._query_block_jobs, {}),
            "job-pause": Command(self._telling(methodcaller("pause")), of_job),
            "job-resume": Command(self._telling(methodcaller("resume")), of_job),
            "job-cancel": Command(self._telling(methodcaller("cancel")), of_job),
            "job-complete": Command(self._telling(methodcaller("complete")), of_job),
            "job-finalize": Command(self._telling(methodcaller("finalize")), of_job),
            "job-dismiss": Command(self._telling(methodcaller("dismiss")), of_job),
            "block-job-set-speed": Command(
                self._set_speed, {"device": STRING, "speed": INTEGER}
            ),
            "block-job-cancel": Command(
                self._block_job_cancel, {"device": STRING, "force": optional(BOOLEAN)}
            ),
            "block-job-change": Command(
                self._change,
                {
                    "id": STRING,
                    "type": one_of("mirror"),
                    "copy-mode": words_of(CopyMode),
                },
            ),
            "fleecefs-verify": Command(self._verify, VERIFY_ARGUMENTS),
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
        await transact(
            self._inventory, self._jobs, actions, is_grouped=mode == "grouped"
        )
        return {}

    async def _mirror(self, **arguments: object) -> Message:
        options = mirror_options(arguments)

        def create() -> Sequence[Job]:
            return [create_mirror(self._inventory, options, self._check_place)]

        await self._jobs.start([options.job_id], create)
        return {}

    async def _verify(self, **arguments: object) -> Message:
        options = verify_options(arguments)

        def create() -> Sequence[Job]:
            return [create_verify(self._inventory, options, self._check_place)]

        await self._jobs.start([options.job_id], create)
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
        if force:
            job.cancel()
        else:
            job.cancel_softly()
        return {}

    async def _change(self, id: str, type: str, **arguments: object) -> Message:
        job = self._jobs.get(id)
        if job.type != type:
            raise Refused(f"job {id!r} is a {job.type} job, not a {type} job")
        job.change(CopyMode(arguments["copy-mode"]))
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


def mirror_options(arguments: Message) -> MirrorOptions:
    """Return what the arguments of a mirror say, once their types were checked."""
    for name in ("speed", "granularity", "buf-size"):
        check_at_least_0(arguments, name)
    workers = cast("int", arguments.get("max-workers", MIRROR_WORKERS))
    if not 1 <= workers <= WORKERS_MAX:
        raise QmpError(
            f"Parameter 'max-workers' expects a value from 1 to {WORKERS_MAX}"
        )
    device = str(arguments["device"])
    return MirrorOptions(
        device=device,
        target=absolute("target", str(arguments["target"])),
        job_id=str(arguments.get("job-id", device)),
        sync=Sync(arguments["sync"]),
        speed=cast("int", arguments.get("speed", 0)),
        # As in QEMU, 0 is what there is without it.
        granularity=cast("int", arguments.get("granularity", 0)) or GRANULARITY,
        buf_size=cast("int", arguments.get("buf-size", 0)) or BUF_SIZE,
        on_source_error=word(arguments, "on-source-error", OnError) or OnError.REPORT,
        on_target_error=word(arguments, "on-target-error", OnError) or OnError.REPORT,
        copy_mode=word(arguments, "copy-mode", CopyMode) or CopyMode.BACKGROUND,
        is_auto="converge" in arguments,
        target_is_zero=bool(arguments.get("target-is-zero", False)),
        workers=workers,
        auto_finalize=bool(arguments.get("auto-finalize", True)),
        auto_dismiss=bool(arguments.get("auto-dismiss", True)),
    )


def verify_options(arguments: Message) -> VerifyOptions:
    """Return what the arguments of a comparison say, once their types were checked."""
    device, format = str(arguments["device"]), arguments.get("format")
    return VerifyOptions(
        device=device,
        target=absolute("target", str(arguments["target"])),
        # Beside a backup of the same disk.
        job_id=str(arguments.get("job-id", f"verify-{device}")),
        bitmap=cast("str | None", arguments.get("bitmap")),
        format=None if format is None else Format(format),
        speed=cast("int", arguments.get("speed", 0)),
        auto_dismiss=bool(arguments.get("auto-dismiss", True)),
    )
