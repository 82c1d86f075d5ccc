"""What only a GPU can show of one host copy for several processes: page-locked in each, read by copies and kernels."""

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as T

from tests.compare_runs import at, start_processes
from tests.conftest import BUNDLED_BASE, arguments, losses, with_batch
from tests.parity.models import ALL, NOTHING, SIZES, adapted_model, bf16_twin
from train.collate import collate_packed
from train.config import Config, MemoryConfig, ModelConfig
from train.engine import machine_memory
from train.engine.copies import HostMemoryError
from train.engine.decoder import FusedDecoder
from train.engine.embedding import HostEmbedding
from train.engine.families import decoder_layers
from train.engine.machine_memory import MachineMemory, cannot_share
from train.engine.peer_memory import settle
from train.engine.plan import Plan
from train.engine.sharded_blocks import AwayBlocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process(rank: int, port: str, said: Any) -> None:
    """One of two on one GPU, which gloo allows and NCCL does not."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    device = torch.device("cuda", 0)
    assert not cannot_share(device)
    memory = MachineMemory(device)
    torch.manual_seed(0)
    table = torch.randn(1000, 100, device=device, dtype=torch.bfloat16)
    embedding = HostEmbedding(table, memory)  # written by the first process
    settle(device)
    assert embedding.weight.is_pinned()
    ids = torch.randint(1000, (3, 57), device=device)
    assert torch.equal(embedding(ids), table[ids])

    half = bf16_twin(adapted_model(T.LlamaConfig(**SIZES), ALL).to(device))
    causal_lm: Any = half.get_base_model()
    rows = [{"input_ids": [1 + k % 90 for k in range(length)], "trained": [True] * length} for length in (70, 140)]
    batch: Any = collate_packed(rows).to(device)
    plan = Plan(True, True, 512, 3, 1, streamed=(0, 2), num_sharing=2)
    with torch.no_grad():
        wanted = FusedDecoder(causal_lm, replace(plan, streamed=()), NOTHING)(batch)
        away = AwayBlocks.of(plan, device)
        away.stream(plan.streamed, decoder_layers(causal_lm))  # each process writes one of the two
        assert all(buffer.is_pinned() for buffer in away.host.buffers.values())
        engine = FusedDecoder(causal_lm, plan, *away.holders)
        assert all(torch.equal(engine(batch), wanted) for _ in range(3))

    original = machine_memory._pin
    machine_memory._pin = lambda memory, device: original(memory, device) or ("refused" if rank else "")
    try:
        memory.buffers([4096])
    except HostMemoryError as error:  # in both, and the one that had pinned its pages has let them go
        said.put((rank, str(error)))
    torch.zeros(8, device=device).add_(1).sum().item()
    dist.destroy_process_group()


def test_two_processes_read_one_copy() -> None:
    """Copies and kernels read it to the bit, whoever wrote it; one that cannot pin it ends both."""
    context = multiprocessing.get_context("spawn")
    said: Any = context.Queue()
    both = [context.Process(target=process, args=(rank, port, said)) for port in [free_port()] for rank in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join(240)
    assert [each.exitcode for each in both] == [0, 0]
    for _, reason in sorted(said.get(timeout=10) for _ in both):
        assert reason.endswith("could not be shared or pinned: process 1: refused")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_on_two_gpus(config: Config, tmp_path: Path) -> None:
    """Streamed by NCCL's processes, from one copy: the losses of resident weights to the bit."""
    config = replace(with_batch(config, 2, 2), model=ModelConfig(name_or_path=str(BUNDLED_BASE)))
    config = replace(config, run=replace(config.run, device="cuda", deterministic=True))
    found = []
    for offload in ("none", "stream"):
        memory: Any = MemoryConfig(offload=offload, checkpointing="none")
        words = arguments(at(replace(config, memory=memory), tmp_path / offload))
        ends = [run.wait() for run in start_processes(words, [None, None], on_gpus=True)]
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-500:]
        found.append(losses(tmp_path / offload))
    assert "one copy for 2 processes" in ends[0].stdout
    assert found[0] == found[1]
