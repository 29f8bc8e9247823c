"""The two tables, cell by cell: written down a second time, in QEMU's way."""

import subprocess
import sys
from pathlib import Path

import pytest

from fleecefs.errors import VerbRejected
from fleecefs.jobs.status import (
    ACCEPTS,
    MOVES,
    RESTED,
    RESTING,
    JobStatus,
    JobVerb,
    check_verb,
)

# Rows: from; columns: to. CREATED RUNNING PAUSED READY STANDBY WAITING PENDING ABORTING
# CONCLUDED NULL, in the order of the enum.
LEGAL = {
    "created": ". x . . . . . x . x",
    "running": ". . x x . x . x . .",
    "paused": ". x . . . . . . . .",
    "ready": ". . . . x x . x . .",
    "standby": ". . . x . . . . . .",
    "waiting": ". . . . . . x x . .",
    "pending": ". . . . . . . x x .",
    "aborting": ". . . . . . . x x .",
    "concluded": ". . . . . . . . . x",
    "null": ". . . . . . . . . .",
}

ACCEPTED = {
    "cancel": "x x x x x x x . . .",
    "pause": "x x x x x . . . . .",
    "resume": "x x x x x . . . . .",
    "set-speed": "x x x x x . . . . .",
    "change": "x x x x x . . . . .",
    "complete": ". . . x x . . . . .",
    "finalize": ". . . . . . x . . .",
    "dismiss": ". . . . . . . . x .",
}


def cells(table, rows):
    return [
        pytest.param(row, column, mark == "x", id=f"{row.value}-{column.value}")
        for row in rows
        for column, mark in zip(JobStatus, table[row.value].split(), strict=True)
    ]


@pytest.mark.parametrize(("before", "after", "legal"), cells(LEGAL, JobStatus))
def test_move(before, after, legal):
    assert (after in MOVES[before]) is legal


@pytest.mark.parametrize(("verb", "status", "accepted"), cells(ACCEPTED, JobVerb))
def test_verb(verb, status, accepted):
    assert (status in ACCEPTS[verb]) is accepted
    if accepted:
        check_verb("job0", status, verb)
        return
    with pytest.raises(VerbRejected) as e:
        check_verb("job0", status, verb)
    assert str(e.value) == f"job 'job0' is {status.value}: cannot {verb.value}"


def test_rest_is_a_legal_move_and_so_is_the_way_back():
    for working, resting in RESTING.items():
        assert resting in MOVES[working]
        assert MOVES[resting] == {working}
        assert RESTED[resting] is working


def test_every_status_can_be_reached_and_leads_to_the_end():
    reached = {JobStatus.CREATED}
    for _ in JobStatus:
        reached |= {after for before in reached for after in MOVES[before]}
    ending = {JobStatus.NULL}
    for _ in JobStatus:
        ending |= {before for before in MOVES if MOVES[before] & ending}

    assert reached == ending == set(JobStatus)


def test_the_drawing_in_the_docs_is_that_of_the_tables():
    draw = Path(__file__).parents[2] / "contrib" / "draw-jobs"

    done = subprocess.run([sys.executable, draw, "--check"], check=False)

    assert done.returncode == 0
