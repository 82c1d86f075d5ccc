"""A plan for a configuration, before weights are read; smaller ones if it runs out of memory; what to say if none fits.

engine/plan.py is the plan itself, search.py how one is chosen, commands/forecast.py what `handloop plan` prints of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from train.batching import LengthStatistics, MicroBatchShape
from train.config import Config
from train.engine.plan import Plan
from train.memory import cost
from train.memory.candidate import Job
from train.memory.gpus import Gpu, cpu_rates, detect_gpu, free_host_bytes
from train.memory.reference import configured_plan
from train.memory.search import Planner
from train.memory.sizes import ModelSizes, model_sizes
from train.models.language_model import choose_engine, sketch
from train.models.whole import trained_weights
from train.optim import BLOCK, OPTIMIZERS
from train.run.devices import check_products, compute_type, compute_type_at
from train.run.exits import ExitCode, ExitWith

GIB = 2**30
SMALLER = 0.93  # share of the last plan's budget that the next is planned with, when a plan ran out of memory
MAX_TRIES = 8  # smaller plans


@dataclass(frozen=True)
class Sketched:
    """What is known of a model without its weights."""

    sizes: ModelSizes | None  # None: the fused engine cannot run it
    reason: str  # why not; empty where it can
    num_blocks: int
    num_trained: int = 0  # weights, where all of them are trained


@lru_cache(maxsize=4)
def sketched_sizes(config: Config, device: torch.device, dtype: torch.dtype) -> Sketched:
    """Sketches the model on the meta device; asked once for each of all GPUs, so the last few are remembered."""
    sketched = sketch(config, dtype)
    causal_lm: Any = sketched.get_base_model()
    is_fused, reason = choose_engine(sketched, config, device)
    sizes = model_sizes(causal_lm, config, on_gpu=device.type == "cuda") if is_fused else None
    num_blocks = causal_lm.config.get_text_config(decoder=True).num_hidden_layers
    is_whole = config.train.method == "full"
    num_trained = sum(p.numel() for p in trained_weights(causal_lm).values()) if is_whole else 0
    return Sketched(sizes, reason, num_blocks, num_trained)


@dataclass(frozen=True)
class Outlook:
    """What is known of a run before its weights are read, and the plans that follow from it."""

    config: Config
    rows: LengthStatistics
    planner: Planner | None  # None: the reference engine, whose memory is not predicted
    reason: str  # why it is the reference engine; empty where it is not
    budget: int | None  # bytes of GPU memory; None: no limit
    num_blocks: int
    saved: MicroBatchShape | None  # the shape that a resumed run was started with
    num_trained: int = 0  # weights, where all of them are trained

    @classmethod
    def of(
        cls,
        config: Config,
        device: torch.device,
        rows: LengthStatistics,
        budget: int | None,
        saved: MicroBatchShape | None = None,
    ) -> "Outlook":
        """For a run on `device`."""
        dtype = compute_type(config.model.dtype, device).dtype
        gpu = detect_gpu(device, dtype) if device.type == "cuda" else cpu_rates()
        outlook = cls._by(config, rows, gpu, sketched_sizes(config, device, dtype), budget)
        is_kept = saved is not None and (saved.layout == "fused") == (outlook.planner is not None)
        return replace(outlook, saved=saved if is_kept else None)  # the other engine's is none here

    @classmethod
    def on_gpu(cls, config: Config, gpu: Gpu, rows: LengthStatistics, budget: int) -> "Outlook":
        """For a run on a GPU that need not be here; raises ExitWith(BAD_INPUT) where it lacks the type asked for."""
        compute = compute_type_at(config.model.dtype, gpu.capability)
        gpu = gpu.computing(compute.name == "fp32", config.run.deterministic)
        return cls._by(config, rows, gpu, sketched_sizes(config, torch.device("cuda"), compute.dtype), budget)

    @classmethod
    def _by(cls, config: Config, rows: LengthStatistics, gpu: Gpu, sketched: Sketched, budget: int | None) -> "Outlook":
        sizes, planner = sketched.sizes, None
        if gpu.memory_bytes:  # else it is a CPU
            check_products(config.engine.products, gpu.capability)
        if sizes is not None:
            planner = Planner(Job(sizes, rows, config.batch, gpu), config.memory)
        reason, num_trained = sketched.reason, sketched.num_trained
        return cls(config, rows, planner, reason, budget, sketched.num_blocks, saved=None, num_trained=num_trained)

    def on(self, num_processes: int, num_local: int = 1, shares_host: bool = False) -> "Outlook":
        """The same for so many processes, `num_local` of them on each machine, where they have one copy of what is
        streamed if they share host memory; packed weights are shared out to all if memory.shard asks for it.

        Raises ExitWith(BAD_INPUT) where they cannot be.
        """
        if self.config.memory.shard:
            self._check_shards(num_processes, num_local)
        if self.planner is None:
            return self
        num_shards = num_processes if self.config.memory.shard else 1
        job = replace(self.planner.job, num_shards=num_shards, num_local=num_local, shares_host=shares_host)
        return replace(self, planner=replace(self.planner, job=job))

    def _check_shards(self, num_processes: int, num_local: int) -> None:
        """Raises ExitWith(BAD_INPUT) where weights cannot be shared out to so many processes."""
        reason = ""
        if self.planner is None:
            reason = f"only the fused engine shards, and {self.reason}"
        elif num_processes == 1:
            reason = "one process has nobody to share weights with; start one a GPU (accelerate launch)"
        elif num_processes != num_local:
            reason = (
                f"{num_processes} processes are on several machines, and only those of one share weights; leave it "
                "out, --memory.offload auto streams"
            )
        if reason:
            raise ExitWith(ExitCode.BAD_INPUT, f"--memory.shard: {reason}")

    def first_plan(self) -> Plan:
        """The plan to begin with; raises ExitWith(BAD_INPUT) where the smallest exceeds the budget."""
        if self.planner is None:
            self._check_whole()
            return configured_plan(self.num_blocks, self.config.memory)
        plan = self.planner.best(self.budget, self.saved)
        if self.budget is None or plan.peak_bytes <= self.budget:
            return plan
        if self.saved:  # made for a larger GPU or budget: smaller micro-batches, with the same samples a step
            plan = self.planner.best(self.budget)
        if plan.peak_bytes > self.budget:
            raise ExitWith(ExitCode.BAD_INPUT, self.what_would_fit(plan))
        return plan

    def _check_whole(self) -> None:
        """Raises ExitWith(BAD_INPUT) where weights that are all trained, with what belongs to each, exceed the memory.

        An 8-bit optimizer's state is two bytes a weight and two fp32 scales for each of its blocks; activations come
        on top and are not counted.
        """
        if not self.num_trained:
            return
        is_8bit = OPTIMIZERS[self.config.optim.name].is_8bit
        each = 8 + (2 + 8 / BLOCK if is_8bit else 8)
        needed, free = each * self.num_trained, free_host_bytes() if self.budget is None else self.budget
        if needed > free:
            smaller = "" if is_8bit else "--optim.name adamw_8bit (10 bytes a weight), "
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"--train.method full: {self.num_trained:,} weights take {needed / GIB:,.1f} GiB ({each:.1f} bytes "
                f"each: fp32 weight, gradient, optimizer) without activations, and {free / GIB:,.1f} GiB may be used.\n"
                f"What would fit: {smaller}a smaller base, or adapters (--train.method lora)",
            )

    def check_host(self, plan: Plan) -> None:
        """Raises ExitWith(BAD_INPUT) where the plan would pin more host memory than is free."""
        if self.planner is None or plan.host_bytes <= self.planner.job.gpu.max_host_bytes:
            return
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"the smallest plan pins {plan.host_bytes / GIB:.1f} GiB of host memory{self._for_all}, and "
            f"{self.planner.job.gpu.max_host_bytes / GIB:.1f} GiB may be pinned: {plan}\n"
            "Free host memory, raise --memory.budget, or take a smaller base",
        )

    @property
    def _for_all(self) -> str:
        """For whom host memory is counted."""
        assert self.planner is not None
        count = self.planner.job.num_local
        return f" for {count} processes of a machine" if count > 1 else ""

    def smaller_plans(self, plan: Plan) -> Iterator[Plan]:
        """Plans of the fused engine that need less and less memory, for when `plan` ran out of it."""
        assert self.planner is not None
        budget, saved, job = self.budget or 0, self.saved, self.planner.job
        shared_out = plan.num_blocks - len(plan.streamed) if job.num_shards > 1 else 0
        planner = replace(self.planner, job=replace(job, num_shared_out=shared_out))
        for _ in range(MAX_TRIES):
            budget = int(min(budget, plan.peak_bytes or budget) * SMALLER)
            smaller = planner.best(budget, saved, len(plan.streamed))
            if smaller.peak_bytes >= plan.peak_bytes and saved:
                saved = None
                smaller = planner.best(budget, None, len(plan.streamed))
            if smaller.peak_bytes >= plan.peak_bytes:
                return
            plan = smaller
            yield plan

    def what_would_fit(self, plan: Plan) -> str:
        """Tells that the smallest plan is too large, where its memory goes, and what would fit."""
        assert self.planner is not None
        assert self.budget is not None
        validated = self.rows.longest_validation
        longest = f"\nthe longest validation sample has {validated:,} tokens" if validated else ""
        parts = "\n".join(f"  {num_bytes / GIB:7.2f} GiB  {name}" for name, num_bytes in plan.parts if num_bytes)
        return (
            f"{self.config.model.name_or_path} needs at least {plan.peak_bytes / GIB:.2f} GiB of GPU memory, and "
            f"{self.budget / GIB:.2f} GiB may be used:\n{parts}{longest}\n{self.remedies(plan)}"
        )

    def remedies(self, plan: Plan) -> str:
        """What would fit, where the smallest plan does not."""
        assert self.planner is not None
        assert self.budget is not None
        found, adapters = [], dict(plan.parts)[cost.ADAPTERS]
        if self.config.memory.offload == "none":
            found.append("--memory.offload auto, which streams weights")
        if length := self.planner.longest_row(self.budget):
            found.append(f"--data.max_length {length}")
        if adapters > plan.peak_bytes - self.budget:
            found.append("a lower --lora.r")
        if self.config.memory.budget:
            found.append("a larger --memory.budget")
        return f"What would fit: {', or '.join([*found, 'a smaller base'])}"
