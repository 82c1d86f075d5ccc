"""The order of samples is a pure function of seed and step, the same for every layout."""

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from data_tools.prepare import PrepareSettings, prepare
from data_tools.records import DataError
from tests.conftest import BUNDLED_BASE, tokenizer_at
from train.data import Layout, TrainingData, split_validation

SAMPLES = Dataset.from_dict(
    {
        "input_ids": [[i, i, i] for i in range(13)],
        "trained": [[False, True, True]] * 13,
        "num_tokens": [3] * 13,
        "num_supervised_tokens": [2] * 13,
    }
)
LAYOUTS = [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_epoch_visits_every_sample_once(layout: tuple[int, int, int]) -> None:
    """13 samples, 4 a step: four steps an epoch, the last of one sample; another order each epoch; seed decides it."""
    data = TrainingData(SAMPLES, 7, Layout(*layout, rank=0), 0)
    assert data.steps_per_epoch == 4
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in data.sample_ids(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(data.sample_ids(step)) for step in range(4)] == [4, 4, 4, 1]
    reference = TrainingData(SAMPLES, 7, Layout(4, 1, 1, rank=0), 0)
    assert [data.sample_ids(step) for step in range(12)] == [reference.sample_ids(step) for step in range(12)]
    other = TrainingData(SAMPLES, 8, Layout(*layout, rank=0), 0)
    assert [other.sample_ids(step) for step in range(4)] != [data.sample_ids(step) for step in range(4)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_processes_share_a_window_without_loss_or_repetition(layout: tuple[int, int, int]) -> None:
    """All targets of the window, over all processes, are those of its samples; all run as many forward passes."""
    for step in (0, 3):  # a whole window, and one of a single sample
        windows = [TrainingData(SAMPLES, 7, Layout(*layout, rank=r), 0).window(step) for r in range(layout[2])]
        assert len({len(window.micro_batches) for window in windows}) == 1
        targets = Counter(t for w in windows for batch in w.micro_batches for t in batch.targets.tolist())
        assert targets == Counter({i: 2 for i in windows[0].sample_ids})
        assert all(window.num_supervised_tokens == targets.total() for window in windows)


def test_validation_holds_out_whole_records(tmp_path: Path) -> None:
    """No piece of a held-out text is trained on; an impossible share is refused."""
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"report {number}. " * 50)
    tokenizer = tokenizer_at(BUNDLED_BASE)
    prepared = prepare(PrepareSettings((str(tmp_path),), "auto", 32, 4), tokenizer)
    train, validation = split_validation(prepared, 0.4, seed=1)
    assert len(set(validation["record"])) == 2
    assert set(train["record"]).isdisjoint(validation["record"])
    assert len(train) + len(validation) == len(prepared.dataset) > 20
    with pytest.raises(DataError, match="0 would be held out"):
        split_validation(prepared, 0.05, seed=1)


def test_a_row_survives_the_arrow_cache(pairs: Path) -> None:
    """What is read back is what was rendered: nineteen rows in file order, masks of the ids' length."""
    tokenizer = tokenizer_at(BUNDLED_BASE)
    prepared = prepare(PrepareSettings((str(pairs),), "auto", 128, 16), tokenizer)
    answers = [json.loads(line)["response"] for line in pairs.read_text().splitlines()]
    assert len(prepared.dataset) == 19
    for row, answer in zip(prepared.dataset.to_list(), answers, strict=True):
        trained = [t for t, on in zip(row["input_ids"], row["trained"], strict=True) if on]
        assert tokenizer.decode(trained) == answer + "<|end|>"
        assert row["num_supervised_tokens"] == len(trained)
        assert row["num_tokens"] == len(row["input_ids"])
