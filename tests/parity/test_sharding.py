"""Weights that are shared out to several processes: each computes what one with all of them computes, to the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.compare_runs import at, start_processes
from tests.conftest import arguments, training_of, with_batch
from train.config import Config, EngineConfig, MemoryConfig
from train.engine.decoder import FusedDecoder
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.engine.sharded_blocks import ShardedBlocks
from train.run.exits import ExitWith
from train.step import Training, optimizer_step
from train.track.metrics_file import read_metrics


class OneProcess:
    """The memory of all processes in this one."""

    def __init__(self, count: int) -> None:
        self.count, self.memory = count, dict[int, list[torch.Tensor]]()

    def arenas(self, num_bytes: int) -> list[torch.Tensor]:
        memory = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self.count)]
        return self.memory.setdefault(num_bytes, memory)


def fused(config: Config, quantization: Any) -> Training:
    model = replace(config.model, quantization=quantization)
    config = replace(config, model=model, engine=EngineConfig(kind="fused"), memory=MemoryConfig())
    return training_of(config, Accelerator(cpu=True))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_all_processes_make_the_whole(config: Config, count: int, quantization: str) -> None:
    """Gradients are those of resident weights to the bit; each process holds its part alone, the host's blocks too."""
    together = OneProcess(count)
    wanted = optimizer_step(fused(config, quantization), 0)
    trainings = [fused(config, quantization) for _ in range(count)]
    held = []
    for rank, training in enumerate(trainings):
        engine = training.model.engine
        assert engine is not None
        shards = ShardedBlocks(range(1, len(engine.layers)), rank, count, together.arenas)
        host = HostBlocks([0], OwnMemory(pin=False))
        for number in range(len(engine.layers)):
            for holder in (host, shards):
                holder.offload(number, engine.layers)
        held.append(shards)
        training.model.engine = FusedDecoder(training.model.causal_lm, training.plan, host, shards)
    for training in trainings:
        found = optimizer_step(training, 0)
        assert (found.loss, found.grad_norm) == (wanted.loss, wanted.grad_norm)
    (layout,) = held[0].layouts.values()
    assert held[0].part_bytes == pytest.approx(layout.num_bytes / count, abs=512)
    assert all(shards.shards[0] is held[0].shards[0] for shards in held)
    held[0].shards[1].zero_()  # another's part is read, not copied once
    assert optimizer_step(fused(config, quantization), 0).loss == wanted.loss
    assert optimizer_step(trainings[0], 0).loss != wanted.loss


@pytest.mark.slow
def test_two_processes(config: Config, tmp_path: Path) -> None:
    """Sharded, a run of two processes with a validation has the losses and adapters of a data-parallel one, to the
    bit."""
    config = with_batch(replace(config, engine=EngineConfig(kind="fused")), 2, 2)
    config = replace(config, validate=replace(config.validate, at_start=True))
    adapters = []
    for shard in (False, True):
        each = at(replace(config, memory=MemoryConfig(shard=shard)), tmp_path / str(shard))
        ends = [run.wait() for run in start_processes(arguments(each), [None, None])]
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-500:]
        adapters.append((tmp_path / str(shard) / "final" / "adapter_model.safetensors").read_bytes())
    assert "each of 2 GPUs holds a part of the weights of all blocks" in ends[0].stdout
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("False", "True")]
    assert [row.get("train/loss") for row in rows[0]] == [row.get("train/loss") for row in rows[1]]
    assert adapters[0] == adapters[1]


def test_one_process_shares_nothing(config: Config) -> None:
    """It is refused with what to do, and so is the reference engine."""
    config = replace(config, memory=MemoryConfig(shard=True), engine=EngineConfig(kind="fused"))
    with pytest.raises(ExitWith, match="one process has nobody to share"):
        training_of(config, Accelerator(cpu=True))
    with pytest.raises(ExitWith, match="only the fused engine shards"):
        training_of(replace(config, engine=EngineConfig(kind="reference")), Accelerator(cpu=True))
