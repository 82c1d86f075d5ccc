"""The order of samples is a pure function of seed and step, and the same for every batch layout."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from data_tools.prepare import PrepareSettings, prepare
from data_tools.report import DataError
from tests.conftest import BUNDLED_BASE, tokenizer_at
from train.data import TrainingData, split_validation
from train.engine.plan import Plan
from train.layout import BatchLayout
from train.profiles import demo

SAMPLES = Dataset.from_dict(
    {
        "input_ids": [[i, i, i] for i in range(13)],
        "trained": [[False, True, True]] * 13,
        "path_number": [0] * 13,
        "num_tokens": [3] * 13,
        "num_supervised_tokens": [2] * 13,
    }
)
AS_CONFIGURED = Plan(is_fused=False, merges=False, micro_batch_tokens=0, num_blocks=1, num_kept=1)
LAYOUTS = [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)]


def ordered(seed: int, layout: BatchLayout, samples: Dataset = SAMPLES, **data: Any) -> TrainingData:
    """The samples of every step with this seed, in the demo's recipe."""
    recipe = demo()
    chosen: dict[str, Any] = {"group_by_length": False} | data
    changed = replace(recipe, train=replace(recipe.train, seed=seed), data=replace(recipe.data, **chosen))
    return TrainingData(samples, changed, layout, 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_epoch_visits_every_sample_once(layout: tuple[int, int, int]) -> None:
    """13 samples at 4 per step make four steps per epoch; seed and epoch determine the order."""
    data = ordered(7, BatchLayout(*layout, rank=0))
    assert data.steps_per_epoch == 4
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in data.sample_ids(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(data.sample_ids(step)) for step in range(4)] == [4, 4, 4, 1]
    reference = ordered(7, BatchLayout(4, 1, 1, rank=0))
    assert [data.sample_ids(step) for step in range(12)] == [reference.sample_ids(step) for step in range(12)]
    other = ordered(8, BatchLayout(*layout, rank=0))
    assert [other.sample_ids(step) for step in range(4)] != [data.sample_ids(step) for step in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_processes_divide_a_batch_without_loss_or_repetition(layout: tuple[int, int, int]) -> None:
    """Over all processes a step's batch has exactly its samples' supervised tokens; all have as many micro-batches."""
    for step in (0, 3):  # a whole batch, and one with a single sample
        parts = [ordered(7, BatchLayout(*layout, rank=r)).batch(step, AS_CONFIGURED) for r in range(layout[2])]
        assert len({len(part.micro_batches) for part in parts}) == 1
        targets = Counter(t for part in parts for batch in part.micro_batches for t in batch.targets.tolist())
        assert targets == Counter({i: 2 for i in parts[0].sample_ids})
        assert all(part.num_supervised_tokens == targets.total() for part in parts)


def test_validation_holds_out_whole_records(tmp_path: Path) -> None:
    """No part of a held-out text is trained on; an impossible fraction is refused."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"report {number}. " * 50)
    tokenizer = tokenizer_at(BUNDLED_BASE)
    prepared = prepare(PrepareSettings((str(tmp_path),), "auto", 32, 4), tokenizer)
    splits = split_validation(prepared, 0.4, seed=1)
    assert splits.validation is not None
    train, validation = splits.training.samples, splits.validation.samples
    assert len(set(validation["record"])) == 2
    assert set(train["record"]).isdisjoint(validation["record"])
    assert len(train) + len(validation) == len(prepared.dataset) > 20
    with pytest.raises(DataError, match="0 would be held out"):
        split_validation(prepared, 0.05, seed=1)


def test_a_row_survives_the_arrow_cache(pairs: Path) -> None:
    """Samples from the cache are those that were rendered: nineteen in file order, with masks as long as the ids."""
    tokenizer = tokenizer_at(BUNDLED_BASE)
    prepared = prepare(PrepareSettings((str(pairs),), "auto", 128, 16), tokenizer)
    answers = [json.loads(line)["response"] for line in pairs.read_text().splitlines()]
    assert len(prepared.dataset) == 19
    for row, answer in zip(prepared.dataset.to_list(), answers, strict=True):
        trained = [t for t, on in zip(row["input_ids"], row["trained"], strict=True) if on]
        assert tokenizer.decode(trained) == answer + "<|end|>"
        assert row["num_supervised_tokens"] == len(trained)
        assert row["num_tokens"] == len(row["input_ids"])


LENGTHS = Dataset.from_dict(
    {
        "path_number": [0] * 60 + [1] * 40,
        "num_tokens": [5 + (37 * i) % 90 for i in range(100)],
        "num_supervised_tokens": [3] * 100,
    }
)


def test_grouping_by_length_saves_padding_and_stays_shuffled() -> None:
    """Each epoch has every sample once, little padding, batches not sorted by length, and an order of its own."""
    plain = ordered(1, BatchLayout(8, 1, 1, 0), LENGTHS)
    grouped = ordered(1, BatchLayout(8, 1, 1, 0), LENGTHS, group_by_length=True)

    def padding(data: TrainingData) -> int:
        windows = [[data.num_tokens[i] for i in data.sample_ids(step)] for step in range(data.steps_per_epoch)]
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in windows)

    epoch = [i for step in range(13) for i in grouped.sample_ids(step)]
    assert sorted(epoch) == list(range(100))
    assert len(grouped.sample_ids(12)) == 4
    assert padding(grouped) < 0.25 * padding(plain)
    means = [sum(grouped.num_tokens[i] for i in grouped.sample_ids(step)) for step in range(12)]
    assert means != sorted(means)
    assert grouped.sample_ids(0) != grouped.sample_ids(13)


def test_weights_repeat_and_leave_out() -> None:
    """With weights 2.5 and 0.5 the counts per path follow, and the samples are the same every time."""
    data = ordered(1, BatchLayout(8, 1, 1, 0), LENGTHS, path=("a", "b"), weights=(2.5, 0.5))
    times = Counter(i for step in range(data.steps_per_epoch) for i in data.sample_ids(step))
    assert {times[i] for i in range(60)} == {2, 3}
    assert {times[i] for i in range(60, 100)} == {0, 1}
    assert 135 < sum(times[i] for i in range(60)) < 165
    assert 10 < sum(times[i] for i in range(60, 100)) < 30
    again = ordered(1, BatchLayout(8, 1, 1, 0), LENGTHS, path=("a", "b"), weights=(2.5, 0.5))
    assert [again.sample_ids(step) for step in range(9)] == [data.sample_ids(step) for step in range(9)]
    with pytest.raises(DataError, match="leave no sample"):
        ordered(1, BatchLayout(8, 1, 1, 0), LENGTHS, path=("a", "b"), weights=(1e-9, 1e-9))


def test_packed_rows_are_what_is_counted() -> None:
    """With packing a step has packed rows: fewer steps, every sample once per epoch, and a fill rate."""
    data = ordered(1, BatchLayout(2, 2, 1, 0), LENGTHS, packing=True, max_length=128)
    assert sorted(i for step in range(data.steps_per_epoch) for i in data.sample_ids(step)) == list(range(100))
    assert data.steps_per_epoch == -(-len(data.rows) // 4) < 12
    assert data.fill_rate(128) > 0.95
    assert all(tokens <= 128 for tokens in data.row_tokens)


def test_a_batch_that_was_made_ahead_is_that_of_its_plan() -> None:
    """The same step by the same plan is the batch made ahead; by another plan, or another step, it is made anew."""
    data = ordered(7, BatchLayout(2, 2, 1, 0))
    packed = replace(AS_CONFIGURED, is_fused=True, merges=True, micro_batch_tokens=100)
    data.prefetch(1, AS_CONFIGURED, torch.device("cpu"))
    ahead = data.batch(1, AS_CONFIGURED)
    assert data.batch(1, AS_CONFIGURED) is ahead
    assert len(ahead.micro_batches) == 2
    merged = data.batch(1, packed)
    assert [batch.cu_seqlens is not None for batch in merged.micro_batches] == [True]
    assert merged.sample_ids == ahead.sample_ids
    assert data.batch(2, AS_CONFIGURED).sample_ids != ahead.sample_ids
