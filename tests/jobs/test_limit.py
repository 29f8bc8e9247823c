"""The speed of a job, on a clock that jumps."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fleecefs.jobs.limit import RateLimit
from fleecefs.units import MiB


async def time_of(limit, chunks, length):
    """Let chunks through, and return when the last one went."""
    for _ in range(chunks):
        await limit.wait()
        went = trio.current_time()
        limit.charge(length)
    return went


@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 12345], ids=lambda n: f"{n}B")
async def test_speed_is_kept_over_time(autojump_clock, length):
    limit = RateLimit(10_000)
    chunks = 200_000 // length

    took = await time_of(limit, chunks, length)

    # One chunk is let through before the first is charged, and a slice at once.
    assert took == pytest.approx(20, abs=0.1 + 2 * length / 10_000)


async def test_without_a_limit_nothing_waits(autojump_clock):
    assert await time_of(RateLimit(), 1000, MiB) == 0


async def test_at_one_byte_a_second_only_the_first_chunk_goes(autojump_clock):
    limit = RateLimit(1)
    await limit.wait()
    limit.charge(MiB)

    with trio.move_on_after(24 * 3600) as day:
        await limit.wait()

    assert day.cancelled_caught


@pytest.mark.parametrize("speed", [0, 100 * MiB], ids=["none", "higher"])
async def test_who_waits_goes_at_once_when_the_speed_is_raised(autojump_clock, speed):
    limit = RateLimit(1)
    limit.charge(MiB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limit.wait)
        await wait_all_tasks_blocked()

        limit.set_speed(speed)

    assert trio.current_time() < 0.1


async def test_a_lower_speed_is_not_held_against_what_has_passed(autojump_clock):
    limit = RateLimit(10 * MiB)
    limit.charge(2 * MiB)

    limit.set_speed(1)
    await limit.wait()

    assert trio.current_time() == pytest.approx(0.2)


async def test_what_passed_without_a_limit_is_not_held_against_one(autojump_clock):
    limit = RateLimit()
    limit.charge(1000 * MiB)

    limit.set_speed(MiB)
    await limit.wait()

    assert trio.current_time() == 0


async def test_a_speed_that_goes_and_comes_back_begins_anew(autojump_clock):
    limit = RateLimit(1)
    limit.charge(MiB)
    limit.set_speed(0)
    limit.charge(1000 * MiB)
    limit.set_speed(1000)

    assert await time_of(limit, 20, 1000) == pytest.approx(19, abs=1.1)


async def test_one_chunk_passes_at_a_time_however_many_wait(autojump_clock):
    limit = RateLimit(1000)
    limit.charge(1000)
    passed = []

    async def worker():
        await limit.wait()
        passed.append(trio.current_time())
        limit.charge(1000)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(worker)

    assert passed == pytest.approx([1, 2, 3, 4, 5])
