"""What `handloop plan` predicts of a run on one GPU, or on every known one, before a weight is read."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from train.batching import LengthStatistics
from train.config import Config, parse_bytes
from train.engine.plan import Plan
from train.memory.gpus import CONTEXT_BYTES, KNOWN_GPUS, Gpu, detect_gpu, gpus_like, gpus_of_size, named_gpu
from train.memory.outlook import GIB, Outlook
from train.memory.time import reduction
from train.run.devices import BF16, compute_type
from train.run.exits import ExitCode, ExitWith

PROCESS_BYTES = int(2.5 * GIB)  # host memory of a process that has imported torch, transformers and CUDA
# Where only a memory size is given: the rates of a small GPU. They decide what is given up first; no speed is told
SMALL_GPU_RATES = {"flops": 12e12, "fp32_flops": 4e12, "bandwidth": 160e9, "bus": 12e9}


@dataclass(frozen=True)
class Forecast:
    """What a run would need on a GPU, and do on so many of them."""

    gpu: Gpu
    budget: int  # bytes of GPU memory
    plan: Plan
    tokens_per_second: float | None  # None: it does not fit, or the GPU's rates are not known
    paged_bytes: int  # optimizer state that may move to host memory
    fits: bool
    advice: str  # what would fit; empty where the plan does
    num_gpus: int = 1
    added_bytes: int = 0  # gradients that each GPU adds to those of the others in a step
    speedup: float = 1.0  # of all GPUs over one with the same work
    seconds: float | None = None  # of the whole run's steps; None: they, or the speed, are not known

    @property
    def is_card(self) -> bool:
        """Whether it is a known GPU, whose rates are known, and not a size."""
        return any(self.gpu.name == known.name for known in KNOWN_GPUS)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, memory in GiB."""
        return {
            "gpu": self.gpu.name,
            "num_gpus": self.num_gpus,
            "predicted_speedup": round(self.speedup, 3),
            "added_gib": round(self.added_bytes / GIB, 4),
            "budget_gib": round(self.budget / GIB, 3),
            "fits": self.fits,
            "predicted_peak_gib": round(self.plan.peak_bytes / GIB, 3),
            "predicted_tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "predicted_seconds": self.seconds and round(self.seconds, 3),
            "parts_gib": {name: round(num_bytes / GIB, 4) for name, num_bytes in self.plan.parts},
            "host_gib": round(self.plan.host_bytes / GIB, 3),
            "advice": self.advice,
            "cards_of_this_size": [] if self.is_card else [gpu.name for gpu in gpus_of_size(self.gpu.memory_bytes)],
            "plan": {key: value for key, value in asdict(self.plan).items() if key != "parts"},
        }


def parse_gpu(text: str) -> Gpu:
    """The GPU that `--gpu` names: a known one, or one of a size such as 4GiB; raises ExitWith(BAD_INPUT) for others."""
    try:
        gpu = named_gpu(text) or _of_size(text)
    except ValueError:
        names, like = ", ".join(gpu.name for gpu in KNOWN_GPUS), " or ".join(gpu.name for gpu in gpus_like(text))
        hint = f"did you mean {like}? " if like else ""
        reason = f"--gpu {text}: {hint}write a size such as 4GiB, or one of {names}"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None
    if gpu.usable_bytes <= 0:
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {text}: CUDA itself takes {CONTEXT_BYTES / GIB:.2f} GiB of a GPU")
    return gpu


def default_gpu(config: Config) -> Gpu | None:
    """The GPU that is here; without one, a GPU that leaves memory.budget free; without a budget, None."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return detect_gpu(device, compute_type(config.model.dtype, device).dtype)
    if not config.memory.budget:
        return None
    gpu = _of_size(config.memory.budget)
    return replace(gpu, memory_bytes=gpu.memory_bytes + CONTEXT_BYTES)


def _of_size(text: str) -> Gpu:
    return Gpu(text, parse_bytes(text), (8, 0), **SMALL_GPU_RATES)


def assumed_lengths(config: Config, mean_length: int) -> LengthStatistics:
    """Rows of up to data.max_length tokens, their lengths spread evenly around the mean as a probe's are."""
    count, longest = config.batch.per_device, config.data.max_length
    deviation = (longest - min_length(longest, mean_length)) / math.sqrt(12)  # of a uniform distribution
    return LengthStatistics(
        longest=tuple(longest * n for n in range(1, count + 1)),
        mean_micro_batch=count * (longest if config.data.packing else mean_length),
        deviation=0.0 if config.data.packing else math.sqrt(count) * deviation,
        mean_length=mean_length,
        length_deviation=deviation,
        max_samples=count * (longest // mean_length if config.data.packing else 1),
    )


def min_length(longest: int, mean_length: int) -> int:
    """The shortest row where lengths are spread evenly around the mean; all rows have one length where both agree."""
    return max(2, 2 * mean_length - longest)


def forecast(
    config: Config, gpu: Gpu, rows: LengthStatistics, num_steps: float | None = None, num_gpus: int = 1
) -> Forecast:
    """What a run of `num_steps` steps over these rows would need on the GPU, or on each of several.

    Raises ExitWith(BAD_INPUT) where the fused engine cannot run it.
    """
    budget = gpu.usable_bytes
    if config.memory.budget:
        budget = min(budget, parse_bytes(config.memory.budget))
    outlook = Outlook.on_gpu(config, gpu, rows, budget).on(num_gpus)
    if outlook.planner is None:
        reason = (
            f"only the fused engine's memory is predicted, and this run uses the reference engine: {outlook.reason}. "
            "--probe measures it on the GPU that is here"
        )
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    plan = outlook.planner.best(budget)
    seconds = plan.seconds + reduction(outlook.planner.job, num_gpus)
    fits = plan.peak_bytes <= budget
    has_rates = fits and any(gpu.name == known.name for known in KNOWN_GPUS)
    return Forecast(
        gpu=gpu,
        budget=budget,
        plan=plan,
        tokens_per_second=num_gpus // config.batch.context_parallel * outlook.num_tokens / seconds
        if has_rates
        else None,
        paged_bytes=outlook.planner.job.sizes.paged_bytes,
        fits=fits,
        advice="" if fits else outlook.remedies(plan),
        num_gpus=num_gpus,
        added_bytes=outlook.planner.job.sizes.gradient_bytes if num_gpus > 1 else 0,
        speedup=num_gpus * plan.seconds / seconds,
        seconds=num_steps * seconds if has_rates and num_steps is not None else None,
    )


def forecast_known_gpus(
    config: Config, rows: LengthStatistics, num_steps: float | None = None, num_gpus: int = 1
) -> list[Forecast]:
    """For every known GPU that has the type asked for; raises ExitWith(BAD_INPUT) as `forecast`."""
    wants_bf16 = config.model.dtype == "bf16"
    fitting = [gpu for gpu in KNOWN_GPUS if not wants_bf16 or gpu.capability >= BF16]
    return [forecast(config, gpu, rows, num_steps, num_gpus) for gpu in fitting]


def print_forecast(found: Forecast, console: Console) -> None:
    """Memory by component, the plan, and its speed or what would fit."""
    table = Table(title=f"{found.gpu.name}: {found.budget / GIB:.2f} GiB may be used", title_justify="left")
    table.add_column("on the GPU")
    table.add_column("GiB", justify="right")
    for name, num_bytes in found.plan.parts:
        if num_bytes:
            table.add_row(name, f"{num_bytes / GIB:.3f}")
    table.add_row("predicted peak", f"{found.plan.peak_bytes / GIB:.3f}", style="bold")
    console.print(table)
    plan = found.plan
    graph = ", as a CUDA graph" if plan.uses_graphs else ""
    paged = f"; {found.paged_bytes / GIB:.2f} GiB of optimizer state may be paged" if found.paged_bytes else ""
    lines = [
        f"plan      {plan}",
        f"batch     at most {plan.micro_batch_tokens:,} tokens in a micro-batch{graph}",
        f"host      {plan.host_bytes / GIB:.2f} GiB pinned, beside about {PROCESS_BYTES / GIB:.1f} GiB of the process"
        + paged,
    ]
    if plan.streamed:
        traffic = plan.traffic_bytes / GIB
        lines.append(f"traffic   {traffic:.2f} GiB of weights to the GPU a micro-batch, forward and backward")
    if found.num_gpus > 1:
        lines.append(
            f"GPUs      {found.num_gpus}, {found.speedup:.2f} times as fast as one with the same work for each; "
            f"{found.added_bytes / GIB:.2f} GiB of gradients are added a step, at {found.gpu.link / 1e9:,.0f} GB/s"
        )
    if not found.fits:
        lines.append(f"does not fit: {found.advice}")
    elif found.tokens_per_second is None:
        names = ", ".join(gpu.name for gpu in gpus_of_size(found.gpu.memory_bytes))
        cards = f"; cards of this size are {names}" if names and not found.is_card else ""
        lines.append(f"speed     unknown: its rates are not known; name a card with --gpu, or --probe it here{cards}")
    else:
        basis = "predicted; linear attention was never measured" if plan.num_linear else "predicted"
        lines.append(f"speed     about {found.tokens_per_second:,.0f} tokens/s ({basis})")
    if found.seconds is not None:
        cards = f"{found.num_gpus if found.num_gpus > 1 else 'one'} {found.gpu.name}"
        lines.append(f"time      about {time_of(found.seconds)} on {cards}, without validation and saving")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def time_of(seconds: float) -> str:
    """A predicted time in its largest unit: no more than two figures of it are known."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_known_gpus(found: Sequence[Forecast], console: Console) -> None:
    """A line for each known GPU."""
    table = Table(title="known GPUs, predicted", title_justify="left")
    has_times = any(each.seconds is not None for each in found)
    for heading in ("GPU", "GiB", "peak GiB", "blocks kept", "streamed", "tokens/s", *(["time"] if has_times else [])):
        table.add_column(heading, justify="left" if heading == "GPU" else "right")
    for each in found:
        cells = ("", "", "does not fit")
        if each.tokens_per_second is not None:
            cells = (str(each.plan.num_kept), str(len(each.plan.streamed)), f"{each.tokens_per_second:,.0f}")
            cells += (time_of(each.seconds),) if each.seconds is not None else ()
        table.add_row(each.gpu.name, f"{each.budget / GIB:.1f}", f"{each.plan.peak_bytes / GIB:.2f}", *cells)
    console.print(table)
