"""Two GPUs that share each row's tokens train as one does, by NCCL; with sharded weights and recomputed blocks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at, start_processes
from tests.conftest import arguments, run_command
from train.config import BatchConfig, Config, EngineConfig, MemoryConfig, OptimConfig, RunConfig
from train.track.metrics_file import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def rows_of(config: Config, count: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a run on so many GPUs."""
    words = arguments(config)
    ends = (
        [run_command(words)]
        if count == 1
        else [run.wait() for run in start_processes(words, [None] * count, on_gpus=True)]
    )
    assert [end.returncode for end in ends] == [0] * count, ends[0].stdout[-1000:] + ends[0].stderr[-1000:]
    return read_metrics(Path(config.run.dir) / "metrics.jsonl")


@pytest.mark.parametrize(("dtype", "shard", "tolerance"), [("fp32", False, 1e-4), ("bf16", True, 1e-2)])
def test_two_gpus_share_rows(dtype: Any, shard: bool, tolerance: float, config: Config, tmp_path: Path) -> None:
    """Losses, gradient norms and validations are those of one, to rounding."""
    config = replace(
        config,
        model=replace(config.model, dtype=dtype),
        data=replace(config.data, packing=True, max_length=256, validation_fraction=0.2),
        run=RunConfig(dir="unused", device="cuda"),
        engine=EngineConfig(kind="fused"),
        memory=MemoryConfig(checkpointing="full"),
        optim=OptimConfig("adamw", lr=1e-3),  # whose state is not quantised: what is apart is rounding
        batch=BatchConfig(1, 0, samples=2),
    )
    alone = rows_of(at(config, tmp_path / "alone"), 1)
    batch, memory = replace(config.batch, context_parallel=2), replace(config.memory, shard=shard)
    shared = rows_of(at(replace(config, batch=batch, memory=memory), tmp_path / "shared"), 2)
    assert len(alone) > 2
    for one, two in zip(alone, shared, strict=True):
        for name in one.keys() & {"train/loss", "train/grad_norm", "eval/loss", "eval/tokens"}:
            assert two[name] == pytest.approx(one[name], rel=tolerance if name != "train/grad_norm" else 5 * tolerance)
