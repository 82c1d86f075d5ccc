"""From a configuration to a training that runs: planned before weights are read, and tried before the first step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from train.batching import LengthStatistics, MicroBatchShape
from train.config import Config
from train.engine.plan import Plan, reference_plan
from train.memory.gpus import Gpu, cpu_rates, detect_gpu
from train.memory.search import Planner
from train.memory.sizes import ModelSizes, model_sizes
from train.models.language_model import choose_engine, sketch
from train.run.devices import compute_type, compute_type_at
from train.run.exits import ExitCode, ExitWith

GIB = 2**30
SMALLER = 0.93  # of the last budget is planned with when a plan has run out of memory
MOST_TRIES = 8


# sizes, or None and why the fused engine cannot run it; number of blocks
Sketched = tuple[ModelSizes | None, str, int]


@lru_cache(maxsize=4)
def sketched_sizes(config: Config, device: torch.device, dtype: torch.dtype) -> Sketched:
    """What is known of the model without its weights."""
    sketched = sketch(config, dtype)
    causal_lm: Any = sketched.get_base_model()
    fused, reason = choose_engine(sketched, config, device)
    sizes = model_sizes(causal_lm, config, on_gpu=device.type == "cuda") if fused else None
    return sizes, reason, causal_lm.config.num_hidden_layers


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before its weights are read."""

    config: Config
    rows: LengthStatistics
    planner: Planner | None  # None: the reference engine, whose memory is not predicted
    reason: str  # why it is not the fused one
    budget: int | None  # bytes; None is no limit
    num_blocks: int
    saved: MicroBatchShape | None  # of a run that is resumed

    @classmethod
    def of(
        cls,
        config: Config,
        device: torch.device,
        rows: LengthStatistics,
        budget: int | None,
        saved: MicroBatchShape | None = None,
    ) -> "Outlook":
        """Of a run on `device`."""
        dtype = compute_type(config.model.dtype, device).dtype
        card = detect_gpu(device, dtype) if device.type == "cuda" else cpu_rates()
        return replace(cls._by(config, rows, card, sketched_sizes(config, device, dtype), budget), saved=saved)

    @classmethod
    def on_card(cls, config: Config, card: Gpu, rows: LengthStatistics, budget: int) -> "Outlook":
        """Of a run on a GPU that need not be here; raises ExitWith(BAD_INPUT) where it lacks the type asked for."""
        compute = compute_type_at(config.model.dtype, card.capability)
        card = card.computing(compute.name == "fp32", config.run.deterministic)
        return cls._by(config, rows, card, sketched_sizes(config, torch.device("cuda"), compute.dtype), budget)

    @classmethod
    def _by(
        cls, config: Config, rows: LengthStatistics, card: Gpu, sketched: Sketched, budget: int | None
    ) -> "Outlook":
        sizes, reason, num_blocks = sketched
        planner = Planner(sizes, rows, config.batch, config.memory, card) if sizes else None
        return cls(config, rows, planner, reason, budget, num_blocks, saved=None)

    @property
    def num_tokens(self) -> float:
        """Of an optimizer step, on average."""
        return self.config.batch.accumulation * self.rows.mean_micro_batch

    def first_plan(self) -> Plan:
        """The plan to begin with; raises ExitWith(BAD_INPUT) where the smallest is larger than the budget."""
        if self.planner is None:
            return reference_plan(self.num_blocks, self.config.memory)
        plan = self.planner.best(self.budget, self.saved)
        if self.budget is None or plan.peak_bytes <= self.budget:
            return plan
        if self.saved:  # of a larger card, or budget: the samples of a step stay
            plan = self.planner.best(self.budget)
        if plan.peak_bytes > self.budget:
            raise ExitWith(ExitCode.BAD_INPUT, self.what_would_fit(plan))
        return plan

    def check_host(self, plan: Plan) -> None:
        """Raises ExitWith(BAD_INPUT) where the plan would page-lock more memory than the host has."""
        if self.planner is not None and plan.host_bytes > self.planner.host_room:
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"the smallest plan page-locks {plan.host_bytes / GIB:.1f} GiB of host memory and "
                f"{self.planner.host_room / GIB:.1f} GiB may be taken: {plan}\n"
                "Free host memory, give --memory.budget more, or take a smaller base",
            )

    def smaller_plans(self, plan: Plan) -> Iterator[Plan]:
        """Plans that need less and less, when one has run out of memory."""
        if self.planner is None:
            yield from self._smaller_reference_plans(plan)
            return
        budget, saved = self.budget or 0, self.saved
        for _ in range(MOST_TRIES):
            budget = int(min(budget, plan.peak_bytes or budget) * SMALLER)
            smaller = self.planner.best(budget, saved, len(plan.streamed))
            if smaller.peak_bytes >= plan.peak_bytes and saved:
                saved = None
                smaller = self.planner.best(budget, None, len(plan.streamed))
            if smaller.peak_bytes >= plan.peak_bytes:
                return
            plan = smaller
            yield plan

    def _smaller_reference_plans(self, plan: Plan) -> Iterator[Plan]:
        if plan.num_kept:
            plan = replace(plan, num_kept=0)
            yield plan
        if self.config.batch.merge == "off":
            return
        rows, longest = len(self.rows.longest), self.rows.longest[0]
        while rows > 1:
            rows = math.ceil(rows / 2)
            yield replace(plan, merges=True, micro_batch_tokens=rows * longest)

    def what_would_fit(self, plan: Plan) -> str:
        """Says that the smallest plan is too large, where its memory goes, and what would fit."""
        assert self.planner is not None
        assert self.budget is not None
        validated = self.rows.longest_validation
        longest = f"\nthe longest sample of the validation has {validated:,} tokens" if validated else ""
        parts = "\n".join(f"  {num_bytes / GIB:7.2f} GiB  {name}" for name, num_bytes in plan.parts if num_bytes)
        return (
            f"{self.config.model.name_or_path} needs {plan.peak_bytes / GIB:.2f} GiB of GPU memory at least, and "
            f"{self.budget / GIB:.2f} GiB may be used:\n{parts}{longest}\n{self.remedies(plan)}"
        )

    def remedies(self, plan: Plan) -> str:
        """What would fit, where the smallest plan does not."""
        assert self.planner is not None
        assert self.budget is not None
        found, adapters = [], dict(plan.parts)["adapters, gradients, optimizer"]
        if self.config.memory.offload == "none":
            found.append("--memory.offload auto, which streams weights")
        if length := self.planner.longest_row(self.budget):
            found.append(f"--data.max_length {length}")
        if adapters > plan.peak_bytes - self.budget:
            found.append("a lower --lora.r")
        if self.config.memory.budget:
            found.append("a larger --memory.budget")
        return f"What would fit: {', or '.join([*found, 'a smaller base'])}"
