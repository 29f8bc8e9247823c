"""Whether a mirror converges, from what is copied and what is left."""

import pytest

from fleecefs.jobs.trend import TREND_COUNT, Sample, Trend
from fleecefs.units import MiB

# What is copied and made dirty in each second.
CASES = [
    pytest.param(100, 0, False, id="idle-guest"),
    pytest.param(100, 50, False, id="slower-guest"),
    pytest.param(100, 80, False, id="nearly-as-fast"),
    pytest.param(100, 95, True, id="as-fast"),
    pytest.param(100, 300, True, id="faster"),
    pytest.param(0, 1, True, id="nothing-is-copied"),
    pytest.param(0, 0, False, id="nothing-happens"),
]


def trend_of(copied, dirtied, seconds, *, is_catching_up=True):
    trend = Trend()
    for second in range(1, seconds + 1):
        sample = Sample(
            float(second),
            second * copied * MiB,
            10_000 * MiB + second * (dirtied - copied) * MiB,
        )
        trend.add(sample, is_catching_up=is_catching_up)
    return trend


@pytest.mark.parametrize(("copied", "dirtied", "is_stuck"), CASES)
def test_a_guest_that_is_as_fast_is_not_caught_up_with(copied, dirtied, is_stuck):
    # The first sample is that of all that was before.
    trend = trend_of(copied, dirtied, TREND_COUNT + 2)

    assert trend.is_stuck is is_stuck
    assert trend.dirty_rate == dirtied * MiB


def test_it_takes_some_time_to_say_so():
    assert not trend_of(100, 300, TREND_COUNT - 1).is_stuck


def test_one_good_second_is_enough_to_hope():
    trend = trend_of(100, 300, TREND_COUNT + 2)
    last = trend._samples[-1]

    trend.add(
        Sample(last.time + 1, last.copied + 100 * MiB, last.left - 100 * MiB),
        is_catching_up=True,
    )

    assert not trend.is_stuck


def test_who_does_not_try_to_catch_up_is_not_stuck():
    assert not trend_of(100, 300, 10, is_catching_up=False).is_stuck


def test_samples_between_do_not_count():
    trend = Trend()
    for tick in range(1, 20):
        trend.add(Sample(1 + tick / 100, 0, tick * MiB), is_catching_up=True)

    assert trend.stuck_count <= 1


def test_an_old_rate_is_forgotten():
    trend = trend_of(0, 100, 10)
    last = trend._samples[-1]

    for second in range(1, 20):
        trend.add(Sample(last.time + second, 0, last.left), is_catching_up=True)

    assert trend.dirty_rate == 0


def test_nothing_is_known_at_first():
    trend = Trend()

    assert trend.dirty_rate == 0
    assert not trend.is_stuck
