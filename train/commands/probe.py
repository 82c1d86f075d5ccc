"""`handloop plan --probe`: real steps on random weights, printed beside what was predicted."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset

from train.assemble import assemble
from train.commands.forecast import min_length
from train.config import Config
from train.data import TrainingData
from train.layout import BatchLayout
from train.memory.outlook import GIB
from train.memory.reference import ReferencePlan, engine_lines
from train.run.accelerator import check_training, start_accelerator
from train.step import Training, optimizer_step

# Steps before the measured ones: warm-up, and where lengths differ kernels are chosen for each of them
FIRST_STEPS, FIRST_STEPS_OF_SEVERAL_LENGTHS = 2, 16


def probe(config: Config, mean_length: int, num_steps: int) -> dict[str, Any]:
    """Real steps on random weights of the real shape on the GPU that is here; raises ExitWith(BAD_INPUT) without one.

    The time is the median of `num_steps` steps after the first ones. The peak counts from loading on: what is
    allocated, or with CUDA graphs what is reserved, since the memory of a captured graph counts as free.
    """
    config = replace(config, model=replace(config.model, random_init=True), run=replace(config.run, device="cuda"))
    check_training(config)
    accelerator = start_accelerator(config)
    rows = _random_rows(config, mean_length)
    data = TrainingData(rows, config, BatchLayout.of(config.batch, accelerator), pad_token_id=0)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    training: Training = assemble(config, accelerator, data)
    loaded = time.perf_counter() - start
    num_first = FIRST_STEPS if mean_length == config.data.max_length else FIRST_STEPS_OF_SEVERAL_LENGTHS
    steps = _run_steps(training, num_first, num_steps)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    measured = list(zip(steps.seconds[num_first:], steps.tokens[num_first:], strict=True))
    median, num_tokens = sorted(measured, key=lambda pair: pair[0] / pair[1])[num_steps // 2]
    plan = training.plan
    return {
        "gpu": torch.cuda.get_device_name(),
        "plan": str(plan),
        "engine": engine_lines(training.reference_reason, plan.choices) if isinstance(plan, ReferencePlan) else [],
        "micro_batch_tokens": plan.micro_batch_tokens,
        "num_streamed": len(plan.streamed),
        "traffic_gib": round(plan.traffic_bytes / GIB, 3),
        "predicted_peak_gib": round(plan.peak_bytes / GIB, 3),
        "peak_gib": round((reserved if plan.uses_graphs else allocated) / GIB, 3),
        "reserved_gib": round(reserved / GIB, 3),
        "predicted_seconds": round(plan.seconds, 4),
        "seconds": round(median, 4),
        "tokens_per_second": round(num_tokens / median, 1),
        "alloc_retries": steps.alloc_retries,
        "load_seconds": round(loaded, 1),
        "host_gib": round(_process_bytes() / GIB, 2),
        "losses": steps.losses,
        "grad_norms": steps.grad_norms,
    }


@dataclass
class _Steps:
    """What each step was, in order."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)  # hexadecimal, so that runs can be compared to the bit
    grad_norms: list[str] = field(default_factory=list)
    alloc_retries: int = 0  # in measured steps: the allocator freed all that it held back, which waits for the device


def _run_steps(training: Training, num_first: int, num_measured: int) -> _Steps:
    steps, retries = _Steps(), 0
    for step in range(num_first + num_measured):
        torch.cuda.synchronize()
        if step == num_first:
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        start = time.perf_counter()
        result = optimizer_step(training, step)
        torch.cuda.synchronize()
        steps.seconds.append(time.perf_counter() - start)
        steps.losses.append(result.loss.hex())
        steps.grad_norms.append(result.grad_norm.hex())
        steps.tokens.append(result.num_tokens)
    steps.alloc_retries = torch.cuda.memory_stats()["num_alloc_retries"] - retries
    return steps


def format_probe(measured: dict[str, Any]) -> str:
    """A probe's table, predicted beside measured."""
    lines = [
        *measured["engine"],
        f"{measured['gpu']}: {measured['plan']}",
        f"{'':22} predicted  measured",
        f"{'peak, GiB':22} {measured['predicted_peak_gib']:9.2f} {measured['peak_gib']:9.2f}"
        f"  (the allocator reserved {measured['reserved_gib']:.2f})",
        f"{'seconds a step':22} {measured['predicted_seconds']:9.3f} {measured['seconds']:9.3f}",
        f"{'tokens a second':22} {'':9} {measured['tokens_per_second']:9,.0f}",
        f"{'host memory, GiB':22} {'':9} {measured['host_gib']:9.2f}",
        f"{'seconds to load':22} {'':9} {measured['load_seconds']:9.1f}",
    ]
    if not measured["predicted_peak_gib"]:
        lines.append("the reference engine's memory and speed are not predicted")
    return "\n".join(lines)


def _random_rows(config: Config, mean_length: int) -> Any:
    """Rows for the steps of a probe: the first has data.max_length tokens, the others are spread around the mean."""
    generator = torch.Generator().manual_seed(config.train.seed)
    longest, count = config.data.max_length, 16 * config.batch.per_device * config.batch.accumulation
    lengths = torch.randint(min_length(longest, mean_length), longest + 1, (count,), generator=generator).tolist()
    lengths = [longest, *lengths[1:]] if mean_length < longest else [longest] * count
    ids = [torch.randint(2, 1000, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict(
        {
            "input_ids": ids,
            "trained": [[False] + [True] * (length - 1) for length in lengths],
            "num_tokens": lengths,
            "num_supervised_tokens": [length - 1 for length in lengths],
            "path_number": [0] * count,
        }
    )


def _process_bytes() -> int:
    """Host memory of this process now, without mapped files."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
