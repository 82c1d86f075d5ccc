"""From a configuration to a training that runs: planned before weights are read, and tried before the first step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator

from train import hardware, runtime
from train.cards import Card, host_card, present_card
from train.collate import MicroBatch, collate, collate_packed, packed_tokens, with_borders
from train.config import Config
from train.data import TrainingData
from train.engine.graphs import is_out_of_memory
from train.engine.patch import model_sizes
from train.exits import ExitCode, ExitWith
from train.model import DTYPES, choose_engine, load_model, resolve_dtype, sketch
from train.optim import FlatParameters, build_optimizer, build_scaler
from train.passes import Passes, Rows
from train.plan import ModelSizes, Plan, Planner, reference_plan
from train.step import Training

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
    rows: Rows
    planner: Planner | None  # None: the reference engine, whose memory is not predicted
    reason: str  # why it is not the fused one
    budget: int | None  # bytes; None is no limit
    num_blocks: int
    saved: Passes | None  # of a run that is resumed

    @classmethod
    def of(
        cls, config: Config, device: torch.device, rows: Rows, budget: int | None, saved: Passes | None = None
    ) -> "Outlook":
        """Of a run on `device`."""
        dtype = DTYPES[resolve_dtype(config.model, device)]
        card = present_card(device, dtype) if device.type == "cuda" else host_card()
        return replace(cls._by(config, rows, card, sketched_sizes(config, device, dtype), budget), saved=saved)

    @classmethod
    def on_card(cls, config: Config, card: Card, rows: Rows, budget: int) -> "Outlook":
        """Of a run on a GPU that need not be here; raises ExitWith(BAD_INPUT) where it lacks the type asked for."""
        dtype = hardware.type_on(config.model.dtype, card.capability)[0]
        card = card.computing(dtype == "fp32", config.run.deterministic)
        return cls._by(config, rows, card, sketched_sizes(config, torch.device("cuda"), DTYPES[dtype]), budget)

    @classmethod
    def _by(cls, config: Config, rows: Rows, card: Card, sketched: Sketched, budget: int | None) -> "Outlook":
        sizes, reason, num_blocks = sketched
        planner = Planner(sizes, rows, config.batch, config.memory, card) if sizes else None
        return cls(config, rows, planner, reason, budget, num_blocks, saved=None)

    @property
    def num_tokens(self) -> float:
        """Of an optimizer step, on average."""
        return self.config.batch.accumulation * self.rows.mean_pass

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
            yield replace(plan, merges=True, tokens_per_pass=rows * longest)

    def what_would_fit(self, plan: Plan) -> str:
        """Says that the smallest plan is too large, where its memory goes, and what would fit."""
        assert self.planner is not None
        assert self.budget is not None
        validated = self.rows.longest_validated
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


def assemble(
    config: Config,
    accelerator: Accelerator,
    data: TrainingData,
    saved: Passes | None = None,
    longest_validated: int = 0,
) -> Training:
    """Plan, model and optimizer on this process's device, beside the data; the longest pass has run there.

    `saved` as Planner.best has it, `longest_validated` in tokens. Raises ExitWith(BAD_INPUT) where no plan fits.
    """
    device = accelerator.device
    budget = runtime.free_bytes(config, accelerator)
    rows = replace(data.rows_for_plan(), longest_validated=longest_validated)
    outlook = Outlook.of(config, device, rows, budget, saved)
    plan = outlook.first_plan()
    outlook.check_host(plan)
    if saved and plan.is_fused and plan.passes != saved:
        runtime.say(
            accelerator,
            f"memory    the run's passes of {saved} do not fit here: {plan.passes} now, the same samples a step; sums "
            "are rounded otherwise, and with other passes dropout draws other masks",
        )
    model = load_model(config, device, plan)
    parameters = model.trainable()
    flat = FlatParameters(parameters)
    runtime.say(accelerator, f"engine    {'fused' if plan.is_fused else f'reference: {outlook.reason}'}")
    training = Training(
        config=config,
        accelerator=accelerator,
        model=model,
        parameters=parameters,
        flat=flat,
        optimizer=build_optimizer(flat, config.optim),
        scaler=build_scaler(resolve_dtype(config.model, device), device),
        plan=plan,
        data=data,
        total_steps=data.total_steps(config.train),
    )
    return fitted(training, outlook)


def fitted(training: Training, outlook: Outlook) -> Training:
    """The training with a plan whose longest pass has run here, and a validation's longer one; nothing was updated.

    What runs out of memory is planned smaller, with the same samples in a step. Raises ExitWith(BAD_INPUT) where
    nothing is left to make smaller. A CPU tries nothing: it has no budget.
    """
    first = plan = training.plan
    _follow(training, plan)
    accelerator, longest_validated = training.accelerator, outlook.rows.longest_validated
    if not _is_gpu(training) or not any(runtime.agreed(accelerator, not _runs(training, plan, longest_validated))):
        return training
    for plan in outlook.smaller_plans(first):
        runtime.say(accelerator, f"memory    the longest pass did not fit; trying: {plan}")
        _follow(training, plan)
        if not any(runtime.agreed(accelerator, not _fits(training, plan, longest_validated))):
            return replace(training, plan=plan)
    longest = max(outlook.rows.longest[0], plan.tokens_per_pass, longest_validated)
    raise ExitWith(
        ExitCode.BAD_INPUT,
        f"out of memory at the longest pass, {longest:,} tokens, and no "
        "smaller plan is left: lower --data.max_length or --batch.per_device, or leave --batch.merge at auto",
    )


def _is_gpu(training: Training) -> bool:
    return training.accelerator.device.type == "cuda"


def _follow(training: Training, plan: Plan) -> None:
    """The data is cut as the plan says."""
    training.data.padding_free |= plan.is_fused
    training.data.most_tokens = plan.tokens_per_pass if plan.merges else 0


def _fits(training: Training, plan: Plan, longest_validated: int) -> bool:
    """Whether the model can be set up by the plan, and its longest pass runs."""
    try:
        training.model.execute(plan)
    except torch.OutOfMemoryError:
        return False
    return _runs(training, plan, longest_validated)


def _runs(training: Training, plan: Plan, longest_validated: int) -> bool:
    """Whether the longest pass goes through, and a validation's longer sample.

    What it leaves in the gradients is taken away.
    """
    try:
        for _ in range(2 if plan.uses_graphs else 1):  # the first pass of an engine with graphs is not recorded
            training.model(longest_pass(training, plan).to(training.accelerator.device)).backward()
        if longest_validated > max(training.data.num_tokens):
            with torch.no_grad():
                training.model(_longest_validation(training, plan, longest_validated).to(training.accelerator.device))
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        training.flat.zero_grad()
        torch.cuda.empty_cache()
    return True


def longest_pass(training: Training, plan: Plan) -> MicroBatch:
    """A pass as long as any of this run, every token of which is trained.

    For graphs it has as many borders as memory was counted for: the graph of this pass serves all others.
    """
    data = training.data
    longest = max(data.num_tokens)
    if not data.padding_free:
        return _padded_rows(training, plan, longest)
    total = plan.tokens_per_pass or data.rows_for_plan().longest[-1]
    lengths = [longest] * max(1, total // packed_tokens([longest]))
    rest = total - packed_tokens(lengths)
    if rest > 0 and packed_tokens([*lengths, rest]) <= total:
        lengths.append(rest)
    batch = collate_packed([_sample(length) for length in lengths])
    return with_borders(batch, plan.num_samples) if plan.uses_graphs else batch


def _longest_validation(training: Training, plan: Plan, longest: int) -> MicroBatch:
    """The pass of a validation whose samples are all as long as its longest, which is longer than any trained on."""
    if training.model.engine is not None:
        return collate_packed([_sample(longest)])
    return _padded_rows(training, plan, longest)


def _padded_rows(training: Training, plan: Plan, longest: int) -> MicroBatch:
    """As many rows as the reference engine takes at a time, all of them as long as the longest."""
    count = plan.tokens_per_pass // longest if plan.merges else training.data.layout.per_device
    return collate([_sample(longest)] * max(1, count), training.data.pad_token_id)


def _sample(num_tokens: int) -> dict[str, list]:
    return {"input_ids": [0] * num_tokens, "trained": [True] * num_tokens}
