"""The reference engine's plan, whose memory nobody predicts: what is tried on the real model, in which order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from train.batching import LengthStatistics, MicroBatchShape
from train.config import BatchConfig, Config, MemoryConfig
from train.engine.plan import Plan, reference_plan
from train.memory.search import MAX_MERGED_TOKENS

# Tokens of a pass at most, by its attention. With a mask every token of a row meets every other, and eager attention
# keeps the scores of all heads besides: by their FLOPs, at this size both are still the smaller part of a 1B's pass.
# Gemma-2-2B's shape on an H100: 300 to 370 ms in one pass of 2,000 tokens, 490 to 690 in two of 2,400 together
MOST_TOKENS = {"varlen": MAX_MERGED_TOKENS, "sdpa": 4096, "eager": 4096}
# SmolLM2's shape on one core: 1,663 tokens/s in packed passes of 67 tokens, 2,009 of 269, 1,855 of 538, 1,564 of 1,077
CPU_TOKENS = 512
BUSY_TOKENS = 4096  # a pass of so many keeps a GPU busy, whatever launching costs
RECOMPUTED = 1.5  # a frozen base's forward, recomputed forward and backward take as much beside forward and backward


@dataclass(frozen=True)
class ReferencePlan(Plan):
    """How transformers and PEFT run micro-batches: padded as configured, or packed where none sees another."""

    layout: Literal["unpadded", "padded"] = "padded"
    choices: tuple[str, ...] = ()  # what was chosen on this engine, and why, in words

    @property
    def micro_batch_shape(self) -> MicroBatchShape:
        """As Plan."""
        return MicroBatchShape(self.micro_batch_tokens, layout=self.layout)


def configured_plan(num_blocks: int, memory: MemoryConfig) -> ReferencePlan:
    """Micro-batches as they are configured, padded; transformers recomputes all blocks or none."""
    plain = reference_plan(num_blocks, memory)
    return ReferencePlan(plain.is_fused, plain.merges, plain.micro_batch_tokens, num_blocks, plain.num_kept)


def why_padded(config: Config, is_cpu: bool, saved: MicroBatchShape | None) -> str:
    """Why rows are padded, where the model need not be asked; otherwise they are where it does not isolate samples."""
    if config.data.packing:
        return ""
    if config.batch.merge == "off":
        return "batch.merge off"
    if is_cpu and config.batch.accumulation == 1 and config.data.group_by_length:
        return "a step is one micro-batch of samples of similar length"  # a mask between them costs more
    return "as the run began" if saved is not None and saved.layout == "padded" else ""


def rows_told(padded: str, attention: str) -> str:
    """How rows are run; `padded` is why they are padded, if they are."""
    if padded:
        return f"padded rows: {padded}"
    return f"rows without padding; samples are isolated by {attention} attention"


def passes_told(activations: str, tokens: int) -> str:
    """What a trial at the start chose, or has to choose from; 0 tokens are micro-batches as configured."""
    most = f", of {tokens:,} tokens at most" if tokens else ""
    return f"activations {activations}, micro-batches{most}, by trial"


def engine_lines(reason: str, choices: Sequence[str]) -> list[str]:
    """The engine, why it is not the fused one, and what is chosen on it; for the banner and `handloop plan`."""
    why = f" ({reason})" if reason else ""
    return [f"engine    transformers and PEFT{why}", *(f"          {choice}" for choice in choices)]


@dataclass(frozen=True)
class Passes:
    """The passes that the reference engine may take, and which of them are the fastest that fit."""

    start: ReferencePlan  # its layout is kept
    rows: LengthStatistics
    batch: BatchConfig
    memory: MemoryConfig
    saved: MicroBatchShape | None  # the shape that a resumed run was started with, of this layout

    @property
    def may_keep(self) -> bool:
        """Whether memory.checkpointing lets activations be kept; transformers keeps those of all blocks or none."""
        return self.memory.checkpointing in ("auto", "none", 0)

    @property
    def may_recompute(self) -> bool:
        """Whether it lets them be recomputed."""
        return self.memory.checkpointing not in ("none", 0)

    def on_cpu(self) -> ReferencePlan:
        """Without a trial: merged up to CPU_TOKENS, kept or recomputed as configured."""
        if self.batch.merge == "off" or self.start.layout == "padded":
            return self.start
        tokens = self.saved.tokens if self.saved else min(self._merged()[0], CPU_TOKENS)
        return self._of(max(tokens, self.rows.longest[0]))

    def sizes(self, most: int) -> list[ReferencePlan]:
        """Plans with passes of fewer and fewer tokens: a step merged, halves of it, as configured, fewer rows.

        A resumed run's own size comes first.
        """
        longest = self.rows.longest
        if self.batch.merge == "off":
            return [self.start]
        if self.start.layout == "padded":
            fewer = [self._of(count * longest[0]) for count in _halves(len(longest))[1:]]
            if self.saved:
                return [self._of(self.saved.tokens), *(p for p in fewer if p.micro_batch_tokens < self.saved.tokens)]
            return [self.start, *fewer]
        fewer = [longest[count - 1] for count in _halves(len(longest))]
        tokens = {max(longest[0], min(most, each)) for each in (*self._merged(), *fewer)}
        if self.saved:
            tokens = {each for each in tokens if each < self.saved.tokens} | {self.saved.tokens}
        return [self._of(each) for each in sorted(tokens, reverse=True)]

    def fastest(self, sizes: Sequence[ReferencePlan], fits: Callable[[ReferencePlan], bool]) -> ReferencePlan | None:
        """The plan that takes the least time of those that fit; None where none does.

        Kept activations win where passes keep the GPU busy; small passes are as many launches, so one that recomputes
        wins where it saves more than a third of them. A size that a resumed run has is kept, if recomputed.
        """
        may_keep, may_recompute = self.may_keep, self.may_recompute
        all_kept = [replace(plan, num_kept=plan.num_blocks) for plan in sizes] if may_keep else []
        kept = next(filter(fits, all_kept[:1] if self.saved else all_kept), None)
        if kept is not None and (not may_recompute or self._is_enough(kept, sizes[0])):
            return kept
        larger = [plan for plan in sizes if kept is None or plan.micro_batch_tokens > kept.micro_batch_tokens]
        recomputed = next(filter(fits, [replace(plan, num_kept=0) for plan in larger]), None)
        if kept is None or recomputed is None:
            return kept or recomputed
        return kept if self._number(kept) <= RECOMPUTED * self._number(recomputed) else recomputed

    def _is_enough(self, plan: ReferencePlan, largest: ReferencePlan) -> bool:
        return plan.micro_batch_tokens == largest.micro_batch_tokens or plan.micro_batch_tokens >= BUSY_TOKENS

    def _number(self, plan: ReferencePlan) -> float:
        """Passes of a step."""
        rows, accumulation = self.rows, self.batch.accumulation
        if plan.layout == "unpadded":
            return rows.num_micro_batches(accumulation, plan.micro_batch_tokens)
        per_pass = plan.micro_batch_tokens // rows.longest[0] or len(rows.longest)
        return accumulation * math.ceil(len(rows.longest) / per_pass)

    def _merged(self) -> list[int]:
        return [self.rows.merged_tokens(count) for count in _halves(self.batch.accumulation)]

    def _of(self, tokens: int) -> ReferencePlan:
        return replace(self.start, merges=True, micro_batch_tokens=tokens)


def _halves(count: int) -> list[int]:
    """The count, half of it rounded up, ... 1."""
    found = [count]
    while found[-1] > 1:
        found.append(math.ceil(found[-1] / 2))
    return found
