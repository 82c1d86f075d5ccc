"""`handloop plan --probe`: real steps on random weights, beside what was predicted."""

import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from train.assemble import assemble
from train.commands.forecast import shortest_row
from train.config import Config
from train.data import BatchLayout, TrainingData
from train.memory.outlook import GIB
from train.run.accelerator import check_machine, start_accelerator
from train.step import Training, optimizer_step


def probe(config: Config, mean_length: int, num_steps: int) -> dict[str, Any]:
    """Real steps on random weights of the real shape on the GPU that is here; raises ExitWith(BAD_INPUT) without one.

    The memory is the allocator's peak from loading on, the time the median step after the first ones. With graphs it is
    what the allocator holds: their memory counts as free once they are recorded.
    """
    config = replace(config, model=replace(config.model, random_init=True), run=replace(config.run, device="cuda"))
    check_machine(config)
    accelerator = start_accelerator(config)
    data = TrainingData(
        _random_rows(config, mean_length),
        config,
        BatchLayout.of(config.batch, accelerator),
        0,
    )
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    training: Training = assemble(config, accelerator, data)
    loaded = time.perf_counter() - start
    # where rows differ in length the first steps record their graphs
    num_first = FIRST_STEPS if mean_length == config.data.max_length else MORE_FIRST_STEPS
    seconds, losses, norms, tokens, retries = [], [], [], [], 0
    for step in range(num_first + num_steps):
        torch.cuda.synchronize()
        if step == num_first:
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        start = time.perf_counter()
        result = optimizer_step(training, step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss.hex())
        norms.append(result.grad_norm.hex())
        tokens.append(result.num_tokens)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    measured = sorted(zip(seconds[num_first:], tokens[num_first:], strict=True), key=lambda pair: pair[0] / pair[1])
    median, num_tokens = measured[num_steps // 2]
    return {
        "gpu": torch.cuda.get_device_name(),
        "plan": str(training.plan),
        "micro_batch_tokens": training.plan.micro_batch_tokens,
        "num_streamed": len(training.plan.streamed),
        "traffic_gib": round(training.plan.traffic_bytes / GIB, 3),
        "predicted_peak_gib": round(training.plan.peak_bytes / GIB, 3),
        "peak_gib": round((reserved if training.plan.uses_graphs else allocated) / GIB, 3),
        "reserved_gib": round(reserved / GIB, 3),
        "predicted_seconds": round(training.plan.seconds, 4),
        "seconds": round(median, 4),
        "tokens_per_second": round(num_tokens / median, 1),
        # times that the allocator had to give all it held back to find room, which waits for the device
        "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries,
        "load_seconds": round(loaded, 1),
        "host_gib": round(_process_bytes() / GIB, 2),
        "losses": losses,
        "grad_norms": norms,
    }


FIRST_STEPS, MORE_FIRST_STEPS = 2, 16

FIRST_STEPS, MORE_FIRST_STEPS = 2, 16


def beside(measured: dict[str, Any]) -> str:
    """What a probe has found, predicted beside measured."""
    lines = [
        f"{measured['gpu']}: {measured['plan']}",
        f"{'':22} predicted  measured",
        f"{'peak, GiB':22} {measured['predicted_peak_gib']:9.2f} {measured['peak_gib']:9.2f}"
        f"  (the allocator held {measured['reserved_gib']:.2f})",
        f"{'seconds a step':22} {measured['predicted_seconds']:9.3f} {measured['seconds']:9.3f}",
        f"{'tokens a second':22} {'':9} {measured['tokens_per_second']:9,.0f}",
        f"{'host memory, GiB':22} {'':9} {measured['host_gib']:9.2f}",
        f"{'seconds to load':22} {'':9} {measured['load_seconds']:9.1f}",
    ]
    if not measured["predicted_peak_gib"]:
        lines.append("nothing is predicted of the reference engine")
    return "\n".join(lines)


def _random_rows(config: Config, mean_length: int) -> Any:
    """Enough rows for the steps of a probe: the first as long as any, the others around the mean length."""
    generator = torch.Generator().manual_seed(config.train.seed)
    longest, count = config.data.max_length, 16 * config.batch.per_device * config.batch.accumulation
    lengths = torch.randint(shortest_row(longest, mean_length), longest + 1, (count,), generator=generator).tolist()
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
    """Memory that this process has of its own now (not files that are mapped)."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
