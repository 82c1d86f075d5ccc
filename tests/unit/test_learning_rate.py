"""Learning rate at every step, also where a run was extended."""

import json
import math
from typing import Any

import pytest

from train.config import OptimConfig
from train.learning_rate import Decay, Schedule

LINEAR = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
SHAPES = ("linear", "cosine", "constant")


def schedule(shape: Any, total: int = 10, warmup: int | float = 4) -> Schedule:
    return Schedule.of(OptimConfig(lr=2.0, schedule=shape, warmup=warmup), total)


def rates(of: Schedule) -> list[float]:
    return [of.rate(step) for step in range(of.total_steps)]


def test_the_rate_of_every_step() -> None:
    """Ten steps, four of warmup, written out by hand for each schedule."""
    found = {shape: [rate / 2 for rate in rates(schedule(shape))] for shape in SHAPES}
    cosine = [*LINEAR[:4], *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6))]
    assert found["linear"] == pytest.approx(LINEAR)
    assert found["cosine"] == pytest.approx(cosine)
    assert found["constant"] == pytest.approx([*LINEAR[:4], *[1.0] * 6])
    assert schedule("linear", 1, 0).rate(0) == 2.0


def test_a_share_of_the_run_is_that_many_steps() -> None:
    """Rounded up, of the steps that the run had at first: an extension has no warmup, and changes no earlier step."""
    assert rates(schedule("linear", 10, 0.4)) == rates(schedule("linear", 10, 4))
    assert [schedule("cosine", total, 0.1).warmup for total in (1, 10, 11, 984)] == [1, 1, 2, 99]
    longer = schedule("cosine", 10, 0.4).extended(10, 50)
    assert longer.warmup == 4
    assert rates(longer) == rates(schedule("cosine", 10, 4).extended(10, 50))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_is_independent_of_its_end_exactly_where_no_rate_changes(shape: str) -> None:
    """The rule says what comparing every rate of the steps made with those of longer runs says."""
    for warmup in (0, 1, 4, 12, 0.0, 0.3, 0.95):
        for completed in range(1, 11):
            run = schedule(shape, 10, warmup)
            same = all(run.rate(s) == run.with_end(end).rate(s) for s in range(completed) for end in (11, 15, 99))
            assert run.is_independent(completed) == same, (warmup, completed)
            longer = run.extended(completed, 20)
            for more in range(1, 8):
                same = all(longer.rate(s) == longer.with_end(30).rate(s) for s in range(completed + more))
                assert longer.is_independent(completed + more) == same, (warmup, completed, more)


def test_an_extension_goes_on_from_the_last_rate() -> None:
    """Steps that were made keep their rates; the new decay begins at the last of them and would end at zero."""
    first = schedule("linear")
    second = first.extended(10, 14)
    third = second.extended(12, 15)
    assert rates(second)[:10] == rates(first)
    assert rates(third)[:12] == rates(second)[:12]
    last = 2.0 * LINEAR[-1]
    assert rates(second)[10:] == pytest.approx([last, last * 3 / 4, last / 2, last / 4])
    assert rates(third)[12:] == pytest.approx([last * 3 / 4, last / 2, last / 4])
    cosine = schedule("cosine").extended(10, 12)
    assert rates(cosine)[10:] == pytest.approx([rates(cosine)[9], rates(cosine)[9] / 2])
    assert third.decays == (Decay(0, 2.0, 10), Decay(10, first.rate(9), 14), Decay(12, second.rate(11), 15))
    assert third.total_steps == 15


def test_a_schedule_comes_back_to_the_bit() -> None:
    """Through JSON, as a checkpoint keeps it; what is none is refused."""
    made = schedule("cosine", 37, 3).extended(37, 55).extended(41, 90)
    assert Schedule.from_rows(made.optim, json.loads(json.dumps(made.rows()))) == made
    wrong: list[Any] = [
        [],
        None,
        3,
        [[0, 2.0]],
        [[0, 1.0, 9]],
        [[1, 2.0, 9]],
        [[0, 2.0, 9], [0, 1.0, 9]],
        [[0, 2.0, "x"]],
        [[0, 2.0, math.inf]],
        [[0, 2.0, 9], [9, math.inf, 12]],
        "rows",
    ]
    for rows in [*wrong, [[0, 2.0, None]]]:
        with pytest.raises(ValueError, match=r"\w"):
            Schedule.from_rows(made.optim, rows)
