"""What `handloop plan` predicts of a run on one GPU or on every known one, before a byte of weights is read."""

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
from train.memory.gpus import CONTEXT_BYTES, KNOWN, Gpu, detect_gpu, known_gpu
from train.memory.outlook import GIB, Outlook
from train.run.devices import BF16, compute_type
from train.run.exits import ExitCode, ExitWith

CPU_BYTES = int(2.5 * GIB)  # of a process with torch, transformers and CUDA in it
# of a small card, where only a size is given
UNKNOWN_RATES = {"flops": 12e12, "fp32_flops": 4e12, "bandwidth": 160e9, "bus": 12e9}


@dataclass(frozen=True)
class Forecast:
    """What a run would need and do on one card."""

    card: Gpu
    budget: int
    plan: Plan
    tokens_per_second: float | None  # None where it does not fit, or the card is none that is known
    paged_bytes: int
    fits: bool
    advice: str  # what would fit, where it does not

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "gpu": self.card.name,
            "budget_gib": round(self.budget / GIB, 3),
            "fits": self.fits,
            "predicted_peak_gib": round(self.plan.peak_bytes / GIB, 3),
            "predicted_tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "parts_gib": {name: round(num_bytes / GIB, 4) for name, num_bytes in self.plan.parts},
            "host_gib": round(self.plan.host_bytes / GIB, 3),
            "advice": self.advice,
            "plan": {key: value for key, value in asdict(self.plan).items() if key != "parts"},
        }


def card_of(text: str) -> Gpu:
    """The card that `--gpu` names: a known one, or a size such as 4GiB; raises ExitWith(BAD_INPUT) for others."""
    try:
        card = known_gpu(text) or _of_size(text)
    except ValueError:
        names = ", ".join(card.name for card in KNOWN)
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {text}: write a size such as 4GiB, or one of {names}") from None
    if card.usable_bytes <= 0:
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {text}: CUDA itself takes {CONTEXT_BYTES / GIB:.2f} GiB of a card")
    return card


def default_card(config: Config) -> Gpu | None:
    """The GPU that is here; without one, a card of memory.budget's size; without that none."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return detect_gpu(device, compute_type(config.model.dtype, device).dtype)
    if not config.memory.budget:
        return None
    card = _of_size(config.memory.budget)
    return replace(card, memory_bytes=card.memory_bytes + CONTEXT_BYTES)  # the budget is what is left beside it


def _of_size(text: str) -> Gpu:
    return Gpu(text, parse_bytes(text), (8, 0), **UNKNOWN_RATES)  # rates decide what is given up first


def rows_of(config: Config, mean_length: int) -> LengthStatistics:
    """Rows of which any may be data.max_length tokens long, spread evenly around their mean as a probe's are."""
    count, longest = config.batch.per_device, config.data.max_length
    deviation = (longest - shortest_row(longest, mean_length)) / math.sqrt(12)
    return LengthStatistics(
        longest=tuple(longest * n for n in range(1, count + 1)),
        mean_micro_batch=count * (longest if config.data.packing else mean_length),
        deviation=0.0 if config.data.packing else math.sqrt(count) * deviation,
        mean_length=mean_length,
        length_deviation=deviation,
        max_samples=count * (longest // mean_length if config.data.packing else 1),
    )


def shortest_row(longest: int, mean_length: int) -> int:
    """Where the longest and the mean are given; all have one length where those are equal."""
    return max(2, 2 * mean_length - longest)


def forecast(config: Config, card: Gpu, mean_length: int) -> Forecast:
    """What the run would need on the card; raises ExitWith(BAD_INPUT) where the engine that predicts cannot run it."""
    budget = card.usable_bytes
    if config.memory.budget:
        budget = min(budget, parse_bytes(config.memory.budget))
    outlook = Outlook.on_card(config, card, rows_of(config, mean_length), budget)
    if outlook.planner is None:
        reason = (
            f"only the fused engine's memory is predicted, and this run has another: {outlook.reason}. "
            "With --probe it is measured on the GPU that is here"
        )
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    plan = outlook.planner.best(budget)
    fits = plan.peak_bytes <= budget
    has_rates = any(card.name == each.name for each in KNOWN)  # where only a size is given nobody knows
    return Forecast(
        card=card,
        budget=budget,
        plan=plan,
        tokens_per_second=outlook.num_tokens / plan.seconds if fits and has_rates else None,
        paged_bytes=outlook.planner.sizes.paged_bytes,
        fits=fits,
        advice="" if fits else outlook.remedies(plan),
    )


def forecasts(config: Config, mean_length: int) -> list[Forecast]:
    """For every known card that has the type that is asked for; raises ExitWith(BAD_INPUT) as `forecast`."""
    wanted = config.model.dtype
    return [forecast(config, card, mean_length) for card in KNOWN if wanted != "bf16" or card.capability >= BF16]


def show(found: Forecast, console: Console) -> None:
    """The plan's table."""
    table = Table(title=f"{found.card.name}: {found.budget / GIB:.2f} GiB may be used", title_justify="left")
    table.add_column("on the GPU")
    table.add_column("GiB", justify="right")
    for name, num_bytes in found.plan.parts:
        if num_bytes:
            table.add_row(name, f"{num_bytes / GIB:.3f}")
    table.add_row("predicted peak", f"{found.plan.peak_bytes / GIB:.3f}", style="bold")
    console.print(table)
    plan = found.plan
    lines = [
        f"plan      {plan}",
        f"pass      {plan.micro_batch_tokens:,} tokens at most" + (", as a CUDA graph" if plan.uses_graphs else ""),
        f"host      {plan.host_bytes / GIB:.2f} GiB page-locked beside about {CPU_BYTES / GIB:.1f} GiB of the process"
        + (f"; {found.paged_bytes / GIB:.2f} GiB of optimizer state may be paged" if found.paged_bytes else ""),
    ]
    if plan.streamed:
        lines.append(f"traffic   {plan.traffic_bytes / GIB:.2f} GiB of weights to the GPU in a pass, there and back")
    if found.tokens_per_second is None and found.fits:
        lines.append("speed     not known of a card that has no name here; --gpu NAME, or --probe where it is")
    if found.tokens_per_second is not None:
        lines.append(f"speed     about {found.tokens_per_second:,.0f} tokens/s (predicted)")
    if not found.fits:
        lines.append(f"does not fit: {found.advice}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def show_known(others: Sequence[Forecast], console: Console) -> None:
    """A line for each known card."""
    overview = Table(title="known cards, predicted", title_justify="left")
    for heading in ("card", "GiB", "peak GiB", "blocks kept", "streamed", "tokens/s"):
        overview.add_column(heading, justify="left" if heading == "card" else "right")
    for each in others:
        cells = ("", "", "does not fit")
        if each.tokens_per_second is not None:
            cells = (str(each.plan.num_kept), str(len(each.plan.streamed)), f"{each.tokens_per_second:,.0f}")
        overview.add_row(each.card.name, f"{each.budget / GIB:.1f}", f"{each.plan.peak_bytes / GIB:.2f}", *cells)
    console.print(overview)
