"""What is said, and planned next, when a configuration does not fit."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.memory.examples import GIB, H200, LONG, SHORT, planner_for
from train.batching import LengthStatistics, MicroBatchShape
from train.config import BatchConfig, Config, LoraConfig, MemoryConfig, ModelConfig
from train.memory import together
from train.memory.outlook import Outlook
from train.memory.together import planned_together
from train.run.exits import ExitWith


def test_what_would_fit_instead(config: Config, llama31_8b: Path) -> None:
    """An 8B with rows of 100,000 tokens in 4 GiB: refused before a weight is read, with a length that would fit."""
    config = replace(config, model=ModelConfig(str(llama31_8b), dtype="bf16"), memory=MemoryConfig())
    rows = LengthStatistics((100_000,), 100_000, 0, 100_000)
    ahead = Outlook.on_gpu(config, H200, rows, 4 * GIB)
    with pytest.raises(ExitWith, match=r"What would fit: --data\.max_length \d+") as error:
        ahead.first_plan()
    length = int(str(error.value.reason).split("--data.max_length ")[1].split(",")[0])
    fits = Outlook.on_gpu(config, H200, LengthStatistics((length,), length, 0, length), 4 * GIB)
    assert fits.first_plan().peak_bytes <= 4 * GIB
    assert length > 2048


@pytest.mark.parametrize(
    ("offload", "gib", "r", "remedies"),
    [
        ("none", 2, 8, {"--memory.offload auto"}),
        ("auto", 2, 8, set()),
        ("auto", 3, 128, {"a lower --lora.r"}),
    ],
)
def test_remedies_are_those_that_help(
    offload: Any, gib: int, r: int, remedies: set[str], config: Config, llama31_8b: Path
) -> None:
    """Streaming where it was forbidden, a lower rank where adapters are the matter, a budget where one was set."""
    memory = MemoryConfig(offload=offload, budget=f"{gib}GiB")
    asked = replace(config, model=ModelConfig(str(llama31_8b), dtype="bf16"), memory=memory)
    ahead = Outlook.on_gpu(replace(asked, lora=LoraConfig(r=r)), H200, LONG, gib * GIB)
    with pytest.raises(ExitWith, match="What would fit") as error:
        ahead.first_plan()
    told = {each for each in ("--memory.offload auto", "a lower --lora.r") if each in error.value.reason}
    assert told == remedies
    assert "a larger --memory.budget" in error.value.reason


def test_a_resumed_run_on_a_smaller_gpu_takes_smaller_micro_batches(config: Config) -> None:
    """Micro-batches are kept where they fit and given up where not; nobody is told to change the data."""
    planner = planner_for(SHORT, BatchConfig(2, 16))
    ahead = Outlook(config, SHORT, planner, "", None, 32, None)
    started = replace(ahead, budget=130 * GIB).first_plan()
    again = replace(ahead, budget=100 * GIB, saved=started.micro_batch_shape).first_plan()
    assert again.micro_batch_tokens == started.micro_batch_tokens > 4000
    small = replace(ahead, budget=int(2.6 * GIB), saved=started.micro_batch_shape).first_plan()
    assert small.micro_batch_tokens < started.micro_batch_tokens
    assert small.peak_bytes <= int(2.6 * GIB)


def test_host_memory_is_planned_too() -> None:
    """A host with little memory streams fewer blocks; one that has too little for any plan is told before loading."""
    gpu: Any = replace(H200, max_host_bytes=2 * GIB)
    rich_planner, planner = (planner_for(LONG, BatchConfig(1, 4, merge="off"), gpu=each) for each in (H200, gpu))
    rich = rich_planner.best(6 * GIB)
    assert len(rich.streamed) > 8
    poor = planner.best(6 * GIB)
    assert poor.host_bytes <= 2 * GIB < rich.host_bytes
    assert poor.peak_bytes <= 6 * GIB
    config: Any = None  # not looked at
    ahead = Outlook(config, LONG, planner, "", 3 * GIB, 32, None)
    with pytest.raises(ExitWith, match=r"GiB of host memory, and 2\.0 GiB may be pinned"):
        ahead.check_host(ahead.first_plan())


def test_host_memory_of_all_processes_is_refused_together() -> None:
    """Four processes with a copy each exceed a host that has room for one copy, which all of them can read."""
    gpu: Any = replace(H200, max_host_bytes=6 * GIB)
    config: Any = SimpleNamespace(memory=MemoryConfig(offload="stream"))
    planner = planner_for(LONG, BatchConfig(1, 4), config.memory, gpu=gpu)
    ahead = Outlook(config, LONG, planner, "", 12 * GIB, 32, None)
    shared = ahead.on(4, 4, shares_host=True)
    shared.check_host(shared.first_plan())
    assert "(one copy for 4 processes)" in str(shared.first_plan())
    each = ahead.on(4, 4)
    with pytest.raises(ExitWith, match=r"pins 18\.0 GiB of host memory for 4 processes of a machine, and 6\.0 GiB"):
        each.check_host(each.first_plan())


def test_shards_are_of_one_machine() -> None:
    """Eight processes on two machines are refused, eight on one are not."""
    config: Any = SimpleNamespace(memory=MemoryConfig(shard=True))
    ahead = Outlook(config, LONG, planner_for(LONG, BatchConfig(1, 4)), "", 12 * GIB, 32, None)
    assert ahead.on(8, 8).first_plan().num_shards == 8
    with pytest.raises(ExitWith, match="8 processes are on several machines"):
        ahead.on(8, 4)


def test_processes_plan_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least of all rates and of all free memory; and with one copy for a machine, where pages are shared."""
    is_there = 1.0
    other = torch.tensor([1e13, 9e15, 1e12, 9e12, 3e9, 0.0, 8.0, 0.0, is_there], dtype=torch.float64)
    accelerator: Any = SimpleNamespace(
        num_processes=2,
        process_index=0,
        device=torch.device("cpu"),
        reduce=lambda rows, reduction: rows + torch.stack([torch.zeros_like(other), other]),
    )
    config: Any = SimpleNamespace(memory=MemoryConfig())
    ahead = Outlook(config, LONG, planner_for(LONG, BatchConfig(1, 4)), "", 12 * GIB, 32, None)
    several = "they are in several containers of a machine"
    one, two = [1, 1], [1, 2]
    for containers, places, reason, sharing, told in (
        (one, one, "", 2, ""),
        (one, one, "denied", 1, "denied"),
        (two, two, "", 1, ""),
        (two, one, "", 1, several),
    ):
        of = {False: containers, True: places}
        monkeypatch.setattr(together, "machines", lambda device, are_whole=False, of=of: of[are_whole])
        monkeypatch.setattr(together, "cannot_share", lambda device, reason=reason: reason)
        found, why = planned_together(ahead, accelerator)
        assert found.planner is not None
        gpu, job = found.planner.job.gpu, found.planner.job
        assert (gpu.flops, gpu.fp32_flops, gpu.bandwidth, gpu.bus) == (1e13, H200.fp32_flops, 1e12, H200.bus)
        assert (gpu.max_host_bytes, gpu.has_graphs, gpu.capability) == (3 * 10**9, False, (8, 0))
        assert (job.num_local, job.num_sharing, why) == (max(map(places.count, places)), sharing, told)


def test_a_resumed_run_that_runs_out_of_memory_keeps_its_micro_batches_while_it_can(config: Config) -> None:
    """Each plan needs less; first blocks recompute and weights move to the host, then micro-batches get smaller."""
    saved = MicroBatchShape(4096)
    ahead = Outlook(config, SHORT, planner_for(SHORT, BatchConfig(2, 16)), "", int(3.6 * GIB), 32, saved)
    plans = [ahead.first_plan(), *ahead.smaller_plans(ahead.first_plan())]
    peaks = [plan.peak_bytes for plan in plans]
    assert all(less < more for more, less in pairwise(peaks))
    kept = [plan.micro_batch_shape == saved for plan in plans]
    assert kept == sorted(kept, reverse=True)
    assert kept[:2] == [True, True]
    assert not kept[-1]
    for plan, smaller in pairwise(plans):
        assert set(plan.streamed) <= set(smaller.streamed)
