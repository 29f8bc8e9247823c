"""How far, how fast, how long."""

import pytest
import trio

from fleecefs.jobs.progress import WINDOW, Progress


async def test_speed_and_eta_follow_the_last_seconds(autojump_clock):
    progress = Progress(100_000)
    progress.start()
    for _ in range(60):
        await trio.sleep(1)
        progress.advance(100)
    slow = progress.speed(), progress.eta()
    for _ in range(20):
        await trio.sleep(1)
        progress.advance(1000)

    assert slow == (pytest.approx(100), pytest.approx(940))
    assert progress.speed() == pytest.approx(1000)
    assert progress.eta() == pytest.approx(progress.remaining / 1000)
    assert (progress.current, progress.total) == (26_000, 100_000)


async def test_what_stands_still_gets_slower(autojump_clock):
    progress = Progress(100_000)
    progress.start()
    await trio.sleep(1)
    progress.advance(1000)

    speeds = []
    for _ in range(3):
        await trio.sleep(WINDOW)
        speeds.append(progress.speed())

    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] == 0
    assert progress.eta() is None


async def test_many_small_steps_are_counted_and_not_remembered(autojump_clock):
    progress = Progress(10**6)
    progress.start()
    for _ in range(100_000):
        progress.advance(1)
    await trio.sleep(1)

    assert progress.speed() == 100_000
    assert len(progress._samples) == 1


async def test_nothing_is_known_before_the_start(autojump_clock):
    progress = Progress(10)

    assert (progress.speed(), progress.eta(), progress.total) == (0, None, 10)
