"""What `handloop plan` assumes of a run's lengths, and of a GPU that is given by its size."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import torch

from train.commands.forecast import assumed_lengths, default_gpu, forecast, min_length, parse_gpu
from train.commands.probe import _random_rows
from train.config import BatchConfig, Config
from train.layout import arranged
from train.memory.cluster import Cluster
from train.memory.gpus import CONTEXT_BYTES
from train.run.exits import ExitWith


def asked(config: Config, packing: bool = False) -> Config:
    """Rows of at most 512 tokens, four at a time."""
    return replace(config, data=replace(config.data, max_length=512, packing=packing), batch=BatchConfig(4, 16))


def test_a_probe_s_rows_are_those_that_are_assumed(config: Config) -> None:
    """Mean, deviation and longest row of what is forecast are those of the rows that a probe draws."""
    lengths = _random_rows(asked(config), 211)["num_tokens"][:]
    statistics = assumed_lengths(asked(config), 211)
    assert max(lengths) == statistics.longest[0] == 512
    assert min(lengths) >= min_length(512, 211) == 2
    assert fmean(lengths) == pytest.approx(257, rel=0.05)  # no row has fewer than two tokens
    assert pstdev(lengths) == pytest.approx(statistics.length_deviation, rel=0.05)
    assert statistics.deviation == pytest.approx(2 * statistics.length_deviation)  # of four rows
    lengths = _random_rows(asked(config), 400)["num_tokens"][:]
    assert fmean(lengths) == pytest.approx(assumed_lengths(asked(config), 400).mean_length, rel=0.02)
    assert set(_random_rows(asked(config), 512)["num_tokens"][:]) == {512}
    assert assumed_lengths(asked(config), 512).length_deviation == 0


def test_packed_rows_are_full(config: Config) -> None:
    """Each micro-batch has max_length tokens a row, and as many samples as fit on average."""
    statistics = assumed_lengths(asked(config, packing=True), 100)
    assert (statistics.mean_micro_batch, statistics.deviation) == (4 * 512, 0)
    assert statistics.max_samples == 4 * 5
    assert statistics.length_deviation == pytest.approx((512 - 2) / math.sqrt(12))


def test_a_budget_is_what_cuda_leaves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a budget stands for one that has it free, a size for one with CUDA's context on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_gpu(config) is None
    gpu = default_gpu(replace(config, memory=replace(config.memory, budget="4GiB")))
    assert gpu is not None
    assert gpu.usable_bytes == 4 * 2**30
    assert parse_gpu("4GiB").usable_bytes == 4 * 2**30 - CONTEXT_BYTES
    assert parse_gpu("a100-40").name == "A100-40"
    with pytest.raises(
        ExitWith, match=r"did you mean A100-80 or A100-40[?] write a size such as 4GiB, or one of B200, H200, H100-PCIe"
    ):
        parse_gpu("A100")


def test_uneven_shares_have_no_more_samples(llama31_8b: Path, config: Config) -> None:
    """Eight samples on three GPUs take as long as the largest share, three; nine of them are not counted."""
    model = replace(config.model, name_or_path=str(llama31_8b), quantization="nf4")
    config = replace(config, model=model, data=replace(config.data, max_length=64))
    config = replace(config, batch=arranged(BatchConfig(3, 0, samples=8), 3))
    found = forecast(config, parse_gpu("H100"), assumed_lengths(config, 64), None, Cluster(3, 1, 25))
    assert found.tokens_per_second is not None
    assert found.step_seconds is not None
    assert found.tokens_per_second * found.step_seconds == pytest.approx(8 * 64)
