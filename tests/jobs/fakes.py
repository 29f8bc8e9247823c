"""A backup that copies nothing, in chunks, as its test wants it."""

import trio

from fleecefs.errors import NotFound
from fleecefs.jobs.job import Job
from fleecefs.jobs.options import BackupOptions
from fleecefs.jobs.registry import Jobs

CHUNK = 1000
SIZE = 10 * CHUNK


class FakeBackup(Job):
    """Copies ten chunks, each of which takes `seconds`; tells what was done to it."""

    type = "backup"

    def __init__(self, job_id="job0", device="web.raw", *, seconds=1.0, **options):
        super().__init__(job_id, device, **options)
        self.seconds = seconds
        self.progress.remaining = SIZE
        self.steps = []
        self.saves = 0
        # What goes wrong: (is_read, OSError) once each, before a chunk.
        self.faults = []
        # What a step of the end raises, by its name.
        self.failing = {}
        self.target = f"/backup/{device}"
        self.sync = "full"
        # What else a backup tells of how it was told.
        self.told = {
            "format": "raw",
            "backing": None,
            "bitmap": None,
            "bitmap-mode": None,
            "fell-back": None,
        }
        self.cost = {
            "waited": 12,
            "longest-wait": 0.0032,
            "ram": 1 << 20,
            "ram-peak": 3 << 20,
            "disk": 0,
            "disk-peak": 0,
        }

    async def work(self):
        while self.progress.remaining:
            await self.turn()
            if self.faults:
                is_read, error = self.faults.pop(0)
                await self.on_error(error, is_read=is_read)
                continue
            self.limit.charge(CHUNK)
            with self.in_flight():
                await trio.sleep(self.seconds)
            self.progress.advance(CHUNK)
        self._step("work")

    async def prepare(self):
        self._step("prepare")

    async def commit(self):
        self._step("commit")

    async def abort(self):
        self._step("abort")

    async def clean(self):
        self._step("clean")

    def save(self):
        self.saves += 1

    def details(self):
        shown = {"target": self.target, "sync": self.sync, "cost": self.cost}
        return shown | self.told

    def _step(self, name):
        self.steps.append(name)
        if name in self.failing:
            raise self.failing[name]


class Heard(list):
    """Events, as they were emitted."""

    def __call__(self, name, data):
        self.append((name, data))

    def named(self, name):
        return [data for event, data in self if event == name]

    def statuses(self, job_id="job0"):
        moves = self.named("JOB_STATUS_CHANGE")
        return [move["status"] for move in moves if move["id"] == job_id]


class FakeBackups:
    """Creates FakeBackups of some disks, and remembers what it was asked for."""

    def __init__(self, disks=("web.raw", "db.raw"), seconds=1.0):
        self.disks = disks
        self.seconds = seconds
        # What fails in new jobs: an OSError, by the name of the step.
        self.failing = {}
        self.wanted = []
        self.jobs = {}
        # An OSError with which all are refused.
        self.refusal = None
        # Why they fall back to a full backup, if they may.
        self.fell_back = None

    def __call__(self, wanted):
        backups = [each for each in wanted if isinstance(each, BackupOptions)]
        for options in backups:
            if options.device not in self.disks:
                raise NotFound(f"no disk {options.device!r}")
        if self.refusal is not None:
            raise self.refusal
        self.wanted.append(list(wanted))
        return [self._create(options) for options in backups]

    def _create(self, options):
        job = FakeBackup(
            options.job_id,
            options.device,
            seconds=self.seconds,
            speed=options.speed,
            on_source_error=options.on_source_error,
            on_target_error=options.on_target_error,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        job.target = str(options.target)
        job.sync = options.sync.value
        job.told = {
            "format": options.format.value,
            "backing": options.backing and str(options.backing),
            "bitmap": options.bitmap,
            "bitmap-mode": options.bitmap_mode and options.bitmap_mode.value,
            "fell-back": self.fell_back if options.fallback else None,
        }
        job.failing = self.failing
        self.jobs[job.id] = job
        return job


def new_jobs(emit=lambda name, data: None, **options):
    """Return a registry of FakeBackups, and what creates them."""
    backups = FakeBackups(**options)
    return Jobs(backups, emit), backups
