"""The life of a job, as tables.

Statuses, verbs and legal moves are those of QEMU's jobs, so that its users feel at
home. Everything that decides whether a job may move is in this file; nothing in it
waits, logs or does I/O.
"""

import enum

from fleecefs.errors import VerbRejected


class JobStatus(enum.Enum):
    """Where a job is in its life."""

    CREATED = "created"  # exists, not started
    RUNNING = "running"  # copying
    PAUSED = "paused"  # running, told to rest
    READY = "ready"  # target converged, waiting for complete
    STANDBY = "standby"  # ready, told to rest
    WAITING = "waiting"  # done; the rest of its transaction is not
    PENDING = "pending"  # done; waiting for finalize
    ABORTING = "aborting"  # failed or cancelled, cleaning up
    CONCLUDED = "concluded"  # over; kept until dismiss
    NULL = "null"  # gone


class JobVerb(enum.Enum):
    """What people can tell a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    CHANGE = "change"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


S = JobStatus
V = JobVerb

MOVES = {
    S.CREATED: {S.RUNNING, S.ABORTING, S.NULL},
    S.RUNNING: {S.PAUSED, S.READY, S.WAITING, S.ABORTING},
    S.PAUSED: {S.RUNNING},
    S.READY: {S.STANDBY, S.WAITING, S.ABORTING},
    S.STANDBY: {S.READY},
    S.WAITING: {S.PENDING, S.ABORTING},
    S.PENDING: {S.ABORTING, S.CONCLUDED},
    S.ABORTING: {S.ABORTING, S.CONCLUDED},
    S.CONCLUDED: {S.NULL},
    S.NULL: set(),
}

# What a job that is told to rest becomes, and what it was.
RESTING = {S.RUNNING: S.PAUSED, S.READY: S.STANDBY}
RESTED = {resting: working for working, resting in RESTING.items()}

WORKING = {S.CREATED, S.RUNNING, S.PAUSED, S.READY, S.STANDBY}

# Nothing happens to these any more, except that they are forgotten.
OVER = {S.CONCLUDED, S.NULL}

ACCEPTS = {
    V.CANCEL: WORKING | {S.WAITING, S.PENDING},
    V.PAUSE: WORKING,
    V.RESUME: WORKING,
    V.SET_SPEED: WORKING,
    V.CHANGE: WORKING,
    V.COMPLETE: {S.READY, S.STANDBY},
    V.FINALIZE: {S.PENDING},
    V.DISMISS: {S.CONCLUDED},
}


def check_verb(job_id: str, status: JobStatus, verb: JobVerb) -> None:
    """Raise VerbRejected unless a job in this status accepts the verb."""
    if status not in ACCEPTS[verb]:
        raise VerbRejected(f"job {job_id!r} is {status.value}: cannot {verb.value}")
