"""A step's samples are the same whatever the number of processes, and none of them gets much more than another."""

import random
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
from datasets import Dataset

from train.collate import packed_tokens
from train.data import TrainingData
from train.dealing import Limits, cost, deal, spread
from train.engine.plan import Plan
from train.layout import BatchLayout
from train.profiles import demo

NUM_STEPS = 60
PLAN = Plan(True, True, micro_batch_tokens=2048, num_blocks=1, num_kept=1, uses_graphs=True, num_samples=12)


def question_lengths(count: int) -> list[int]:
    """Lengths in tokens as GSM8K's rows have them: 71 to 451, 167 on average, with a deviation of 57."""
    draw = random.Random(0)
    return [round(min(451, max(71, draw.lognormvariate(5.06, 0.33)))) for _ in range(count)]


def data_of(num_processes: int, rank: int = 0, samples: int = 32, **data: Any) -> TrainingData:
    lengths = question_lengths(samples * NUM_STEPS - samples // 2)  # the last step has half of the samples
    columns = {"num_tokens": lengths, "num_supervised_tokens": lengths, "path_number": [0] * len(lengths)}
    recipe = demo()
    chosen: dict[str, Any] = {"group_by_length": False} | data
    config = replace(recipe, data=replace(recipe.data, **chosen))
    return TrainingData(Dataset.from_dict(columns), config, BatchLayout(2, 8, num_processes, rank, samples), 0)


def shares_of(data: TrainingData, step: int, pair_cost: float = 0.0) -> list[float]:
    return [
        cost([data.num_tokens[i] for members in share for i in members], pair_cost)
        for share in data.divided(step, replace(PLAN, pair_cost=pair_cost))
    ]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4, 7])
def test_every_process_knows_the_whole_deal(num_processes: int) -> None:
    """Each computes the same one: a step's samples once each, as on one process, micro-batches equally many."""
    alone = data_of(1)
    ranks = [data_of(num_processes, rank) for rank in range(num_processes)]
    for step in (0, 1, NUM_STEPS - 1):
        deals = [data.divided(step, PLAN) for data in ranks]
        assert all(each == deals[0] for each in deals)
        assert deals[0] == ranks[0].divided(step, PLAN)
        assert sorted(i for share in deals[0] for members in share for i in members) == sorted(alone.sample_ids(step))
        assert len(deals[0]) == num_processes
        assert len({len(share) for share in deals[0]}) == 1


@pytest.mark.parametrize(("num_processes", "mean", "most"), [(2, 1.001, 1.01), (3, 1.004, 1.03), (4, 1.006, 1.04)])
def test_no_process_has_much_more_to_do(num_processes: int, mean: float, most: float) -> None:
    """Of 32 samples a step, the largest share over the mean: by position it would be 1.05 and 1.14 on two and four."""
    data = data_of(num_processes)
    found = [max(shares) / fmean(shares) for shares in (shares_of(data, step) for step in range(NUM_STEPS))]
    assert fmean(found) < mean
    assert max(found) < most
    literal = [data.divided(step, replace(PLAN, merges=False)) for step in range(NUM_STEPS)]
    sums = [[sum(data.num_tokens[i] for each in share for i in each) for share in step] for step in literal]
    assert fmean(max(each) / fmean(each) for each in sums) > 10 * (mean - 1) + 1


def test_micro_batches_hold_what_there_is_room_for() -> None:
    """Neither more tokens than the plan's nor more samples than its graphs have room for, in any step."""
    data = data_of(2)
    for plan in (PLAN, replace(PLAN, num_samples=5), replace(PLAN, micro_batch_tokens=600)):
        for step in range(NUM_STEPS):
            for members in (each for share in data.divided(step, plan) for each in share):
                assert 0 < len(members) <= plan.num_samples
                assert packed_tokens([data.num_tokens[i] for i in members]) <= plan.micro_batch_tokens


def test_attention_counts_by_the_square_of_the_length() -> None:
    """A sample of 2,048 tokens beside 32 of 128: with 8 of them by tokens alone, with none where pairs cost much."""
    lengths, limits = [2048] + [128] * 32, Limits(8192, 99, is_padded=False)
    for pair_cost, expected in ((0.0, 9), (1e-4, 7), (1e-3, 1)):
        shares = deal([[i] for i in range(33)], lengths, 2, limits, pair_cost)
        assert [len(members) for share in shares for members in share if 0 in members] == [expected]


def test_equal_rows_are_shared_equally() -> None:
    """As many for each where they divide; otherwise no process has two more than another."""
    for count, num_processes in ((16, 2), (16, 4), (32, 3), (7, 4), (1, 4)):
        sizes = [len(share) for share in spread([2048.0] * count, num_processes)]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1, sizes


def test_a_row_that_is_too_long_is_dealt_by_samples() -> None:
    """What fits nowhere stays alone; a process without samples has an empty micro-batch."""
    lengths = [700, 400, 300, 900]
    shares = deal([[0, 1], [2], [3]], lengths, 2, Limits(1000, 9, is_padded=False), 0.0)
    assert sorted(map(len, shares)) == [2, 2]
    assert sorted(members for share in shares for members in share) == [[0], [1], [2], [3]]
    assert deal([[3]], lengths, 2, Limits(500, 9, is_padded=False), 0.0) in ([[[3]], [[]]], [[[]], [[3]]])


def test_a_sample_that_is_drawn_twice_is_trained_on_twice() -> None:
    """data.weights may bring it into one step twice."""
    shares = deal([[0], [1], [0], [0]], [300, 200], 2, Limits(1000, 9, is_padded=False), 0.0)
    assert sorted(i for share in shares for members in share for i in members) == [0, 0, 0, 1]


def test_packed_rows_are_dealt_whole() -> None:
    """With packing a step has rows, which stay together; all processes have as many micro-batches."""
    data = data_of(4, samples=8, packing=True, max_length=2048)
    plan = replace(PLAN, num_samples=99)
    for step in range(data.steps_per_epoch):
        rows = [sorted(data.rows[row]) for row in data.row_ids(step)]
        shares = data.divided(step, plan)
        assert sorted(sorted(each) for share in shares for each in share if each) == sorted(rows)
        assert {len(share) for share in shares} == {-(-len(rows) // 4)}
