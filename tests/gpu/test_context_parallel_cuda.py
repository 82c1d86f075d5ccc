"""Two GPUs that share each row's tokens train as one does, by NCCL; with sharded weights and recomputed blocks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at
from tests.conftest import ROOT, arguments
from train.config import BatchConfig, Config, EngineConfig, MemoryConfig, OptimConfig, RunConfig
from train.track.metrics_file import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


def rows_of(config: Config, count: int) -> list[dict[str, Any]]:
    """metrics.jsonl of a run on so many GPUs."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, str(ROOT / "train" / "main.py"), *arguments(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0,1" if count > 1 else "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
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
