"""How a step's samples go through the model: in how many passes, of how many tokens and samples, by lengths alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from train.collate import packed_tokens


@dataclass(frozen=True)
class LengthStatistics:
    """The samples' lengths, as far as the plan needs them."""

    longest: tuple[int, ...]  # tokens of one, two, ... `per_device` rows at most
    mean_micro_batch: float  # of a pass of `per_device` rows
    deviation: float  # standard deviation of a pass's tokens
    mean_length: float  # of a sample
    length_deviation: float = 0.0  # math.inf where samples of like lengths come together
    max_samples: int = 1  # of a pass of `per_device` rows
    longest_validation: int = 0  # tokens of the longest sample of the validation

    def tokens(self, merged: int) -> int:
        """Tokens that so many passes together seldom exceed (three deviations); where they do, they stay apart."""
        usual = merged * self.mean_micro_batch + 3 * math.sqrt(merged) * self.deviation
        return max(self.longest[-1], min(merged * self.longest[-1], math.ceil(usual)))

    def num_micro_batches(self, accumulation: int, tokens: int) -> float:
        """Passes of at most `tokens` that so many passes are put together into, on average.

        What a step has is counted as normally distributed: the sum of the chances that it needs more than one pass,
        more than two, and so on. All but a step's last have room for half of what comes next, where lengths differ. It
        never needs more than its longest rows would, or where passes have to be taken apart.
        """
        mean, deviation = accumulation * self.mean_micro_batch, math.sqrt(accumulation) * self.deviation
        num_rows = accumulation * len(self.longest)
        most = math.ceil(num_rows / max(1, tokens // self.longest[0]))
        if not deviation:
            return min(most, math.ceil(num_rows / max(1, int(tokens * num_rows / mean))))
        unit = self.mean_micro_batch / (len(self.longest) if tokens < self.longest[-1] else 1)
        spare, total = min(unit / 2, self.deviation), 1.0
        for count in range(1, most):
            total += 0.5 * math.erfc((count * tokens - (count - 1) * spare - mean) / (deviation * math.sqrt(2)))
        return total

    def samples(self, accumulation: int, tokens: int) -> int:
        """Samples that a pass of so many tokens seldom exceeds (three deviations)."""
        usual, most = tokens / self.mean_length, accumulation * self.max_samples
        usual += 3 * math.sqrt(usual) * self.length_deviation / self.mean_length
        return max(self.max_samples, math.ceil(min(usual, most)))


@dataclass(frozen=True)
class MicroBatchShape:
    """How a step's samples go through the model: what the bits of its result depend on, so a resumed run keeps it."""

    tokens: int  # of one pass at most
    mlp_tile: int = 0  # tokens that go through an MLP together; 0: all

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens" + (f" in tiles of {self.mlp_tile:,}" if self.mlp_tile else "")


class StepPlan(Protocol):
    """What of a plan (engine/plan.py) decides how a step's samples are grouped into micro-batches."""

    @property
    def is_fused(self) -> bool:
        """Whether micro-batches are packed, as the fused engine needs them."""
        ...

    @property
    def merges(self) -> bool:
        """Whether micro-batches are merged or split to hold `micro_batch_tokens` at most."""
        ...

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that a micro-batch holds at most."""
        ...


def regroup(
    micro_batches: Sequence[list[int]], num_tokens: Sequence[int], is_padded: bool, max_tokens: int
) -> list[list[int]]:
    """The samples of micro-batches merged, or split, so that each holds `max_tokens` at most (0: as they are).

    Counted as collated: with padding to the longest, or packed. A sample that is longer is a micro-batch of its own.
    """
    if not max_tokens:
        return list(micro_batches)

    def fits(samples: list[int]) -> bool:
        lengths = [num_tokens[i] for i in samples]
        size = len(lengths) * max(lengths, default=0) if is_padded else packed_tokens(lengths)
        return size <= max_tokens

    merged: list[list[int]] = []
    for whole in micro_batches:
        for samples in [whole] if fits(whole) else [[i] for i in whole]:
            if merged and fits(merged[-1] + samples):
                merged[-1] = merged[-1] + samples
            else:
                merged.append(samples)
    return merged
