"""How many micro-batches a step is expected to have, and how many samples they hold, beside what regrouping makes."""

from dataclasses import replace
from statistics import fmean, pstdev

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.conftest import training_of
from train.batching import LengthStatistics, regroup
from train.config import BatchConfig, Config
from train.data import TrainingData
from train.layout import BatchLayout


def test_padding_counts_where_micro_batches_are_merged() -> None:
    """Six samples of 1,000 tokens, each padded to 1,024: five are a micro-batch of 6,000 tokens, six one of 6,144."""
    for max_tokens, sizes in ((6000, [5, 1]), (6144, [6])):
        micro_batches = regroup([[i] for i in range(6)], [1000] * 6, is_padded=False, max_tokens=max_tokens)
        assert [len(members) for members in micro_batches] == sizes


@pytest.mark.parametrize("tokens", [2000, 800])
def test_grouped_samples_are_counted_at_their_most(tokens: int, config: Config) -> None:
    """A step of nothing but short samples has more of them in a micro-batch than lengths drawn at random would have."""
    lengths = torch.randint(20, 401, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    grouped = replace(config, data=replace(config.data, group_by_length=True), batch=BatchConfig(1, 32))
    data = training_of(grouped, Accelerator(cpu=True)).data
    data.num_tokens, data.row_tokens = lengths, lengths
    data.rows, data.steps_per_epoch = [[i] for i in range(3200)], 100
    steps = [[[i] for i in data.row_ids(step)] for step in range(100)]
    seen = [max(map(len, regroup(configured, lengths, False, tokens))) for configured in steps]
    most = data.length_statistics().num_samples(32, tokens)
    assert max(seen) == most == 32
    assert replace(data.length_statistics(), length_deviation=pstdev(lengths)).num_samples(32, tokens) < 32


def test_samples_of_packed_rows_are_counted(config: Config) -> None:
    """Rows are filled with samples of like lengths: some micro-batches have many more than lengths alone tell."""
    lengths = torch.randint(200, 901, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    packed = replace(config, data=replace(config.data, packing=True, max_length=2048), batch=BatchConfig(2, 16))
    training = training_of(config, Accelerator(cpu=True)).data
    samples = Dataset.from_dict(
        {"num_tokens": lengths, "num_supervised_tokens": lengths, "path_number": [0] * len(lengths)}
    )
    data = TrainingData(samples, packed, BatchLayout(2, 16, 1, 0), training.pad_token_id)
    rows, tokens = data.length_statistics(), 8064
    seen = []
    for step in range(data.steps_per_epoch):
        of_step = [data.rows[number] for number in data.row_ids(step)]
        configured = [of_step[n] + of_step[n + 1] for n in range(0, len(of_step), 2)]
        seen += [len(members) for members in regroup(configured, lengths, False, tokens)]
    most = rows.num_samples(16, tokens)
    assert 0.7 * most < max(seen) <= most
    assert max(seen) > replace(rows, row_samples=(1.0, 0.0)).num_samples(16, tokens)


@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("tokens", [4300, 3700, 3400, 3000, 2000, 1300, 800])
def test_micro_batches_are_counted_as_steps_are_regrouped(tokens: int, per_device: int, config: Config) -> None:
    """Steps of 16 samples of 20 to 400 tokens: the expected number is within 10 % of what regrouping makes of them.

    No micro-batch has more samples than memory is counted for.
    """
    data = training_of(config, Accelerator(cpu=True)).data
    lengths = torch.randint(20, 401, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    data.num_tokens, data.layout = lengths, BatchLayout(per_device, 16 // per_device, 1, 0)
    data.rows, data.row_tokens = [[i] for i in range(3200)], lengths
    rows = data.length_statistics()
    steps = []
    for first in range(0, 3200, 16):
        configured = [list(range(start, start + per_device)) for start in range(first, first + 16, per_device)]
        steps.append(regroup(configured, lengths, False, tokens))
    expected = rows.num_micro_batches(16 // per_device, tokens)
    assert expected == pytest.approx(fmean(map(len, steps)), rel=0.1)
    most = rows.num_samples(16 // per_device, tokens)
    assert 0.4 * most <= max(len(members) for step in steps for members in step) <= most


def test_micro_batches_of_rows_of_one_length() -> None:
    """As many as it takes; rows that are almost of one length need no more."""
    even = LengthStatistics((400,), 400, 0.0, 400)
    assert [even.num_micro_batches(16, n) for n in (400, 800, 1600, 6400, 9000)] == [16, 8, 4, 1, 1]
    assert LengthStatistics((2048,), 1500, 0.0, 1500).num_micro_batches(4, 2048) == 4  # two of 1,500 never fit
    nearly = LengthStatistics((2048,), 2000, 120, 2000)
    assert nearly.num_micro_batches(4, 8192) == 1
    assert nearly.num_micro_batches(4, 4096) == pytest.approx(2, rel=0.02)
