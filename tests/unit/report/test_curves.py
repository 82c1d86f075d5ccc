"""Curves are smoothed without lag and thinned without losing an extreme."""

import random

import pytest

from train.report.curves import Curve, curve, smoothed, span_of, table_steps, thinned


def noisy(length: int) -> Curve:
    noise = random.Random(length)
    return Curve(tuple(range(1, length + 1)), tuple(noise.gauss(0, 1) for _ in range(length)))


@pytest.mark.parametrize("length", [1, 3, 801, 3000])
def test_thinning_keeps_every_stretch_s_extremes(length: int) -> None:
    """What is left are points of the curve, its ends, and the lowest and highest of each stretch of steps."""
    full, buckets = noisy(length), 400
    left = thinned(full, buckets)
    assert len(left) <= 2 * buckets + 2
    points, kept = (set(zip(each.steps, each.values, strict=True)) for each in (full, left))
    assert kept <= points
    assert (left.steps[0], left.steps[-1]) == (full.steps[0], full.steps[-1])
    width = (full.steps[-1] - full.steps[0]) / buckets or 1
    for bucket in range(buckets + 1):
        inside = [value for step, value in points if int((step - full.steps[0]) / width) == bucket]
        still = [value for step, value in kept if int((step - full.steps[0]) / width) == bucket]
        assert not inside or (min(still), max(still)) == (min(inside), max(inside))


def test_smoothing_lags_nowhere() -> None:
    """A straight line stays what it is, and each point is the mean of as many before as after it."""
    steps = tuple(range(200))
    line = Curve(steps, tuple(3.0 - 0.01 * step for step in steps))
    assert smoothed(line).values == pytest.approx(line.values)
    raw = noisy(200)
    half = span_of(200) // 2
    assert smoothed(raw).values[100] == pytest.approx(sum(raw.values[100 - half : 101 + half]) / (2 * half + 1))
    assert (smoothed(raw).values[0], smoothed(raw).values[-1]) == pytest.approx((raw.values[0], raw.values[-1]))


def test_only_finite_numbers_are_points() -> None:
    """Text, booleans, NaN and rows without the key are no points; integers are."""
    found: list[object] = [1, "2", True, float("nan"), float("inf"), None, 10**400, 2.5]
    rows = [{"step": step, "key": value} for step, value in enumerate(found)] + [{"step": 9}]
    assert curve(rows, "key") == Curve((0, 7), (1, 2.5))


def test_a_table_has_the_ends_and_the_extremes() -> None:
    """Of 3,000 steps few are listed, the lowest, highest, first, last and wanted ones among them."""
    full = noisy(3000)
    steps = table_steps([full], wanted=[1234])
    assert len(steps) < 60
    assert {1, 3000, 1234, full.steps[full.lowest], full.steps[full.highest]} <= set(steps)
