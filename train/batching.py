"""How a step's samples are grouped into micro-batches: how many, of how many tokens and samples, by lengths alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from train.collate import packed_tokens


@dataclass(frozen=True)
class LengthStatistics:
    """The samples' lengths in tokens, as far as the plan needs them.

    A micro-batch as configured holds `batch.per_device` rows; a row is one sample, or with packing several.
    """

    longest: tuple[int, ...]  # tokens of the longest row, of the two longest together, ... up to `per_device` rows
    mean_micro_batch: float  # mean tokens of a micro-batch as configured
    deviation: float  # standard deviation of a micro-batch's tokens
    mean_length: float  # mean tokens of a sample
    length_deviation: float = 0.0  # standard deviation of a sample's tokens; math.inf where grouped by length
    max_samples: int = 1  # samples in a micro-batch as configured
    num_processes: int = 1  # one that is dealt short samples has more of them than another
    longest_validation: int = 0  # tokens of the longest validation sample; 0 without validation
    row_samples: tuple[float, float] = (1.0, 0.0)  # mean and standard deviation of samples in a row

    def merged_tokens(self, count: int) -> int:
        """Three-sigma bound on the tokens of `count` merged micro-batches; longer ones stay apart."""
        bound = count * self.mean_micro_batch + 3 * math.sqrt(count) * self.deviation
        return max(self.longest[-1], min(count * self.longest[-1], math.ceil(bound)))

    def num_micro_batches(self, accumulation: int, tokens: int) -> float:
        """Expected forward passes of a step, when micro-batches are merged or split to hold at most `tokens` tokens.

        A step's tokens are modelled as normally distributed: this is the sum over k of the probability that a step has
        more tokens than k micro-batches hold. All but the last micro-batch leave room for half of the next row (or
        micro-batch), where lengths differ. The upper bound is a step of nothing but longest rows.
        """
        mean, deviation = accumulation * self.mean_micro_batch, math.sqrt(accumulation) * self.deviation
        num_rows = accumulation * len(self.longest)
        upper = math.ceil(num_rows / max(1, tokens // self.longest[0]))
        if not deviation:
            return min(upper, math.ceil(num_rows / max(1, int(tokens * num_rows / mean))))
        unit = self.mean_micro_batch / (len(self.longest) if tokens < self.longest[-1] else 1)
        unused, total = min(unit / 2, self.deviation), 1.0
        for count in range(1, upper):
            total += 0.5 * math.erfc((count * tokens - (count - 1) * unused - mean) / (deviation * math.sqrt(2)))
        return total

    def num_samples(self, accumulation: int, tokens: int) -> int:
        """Three-sigma bound on the samples in a micro-batch of `tokens` tokens."""
        mean, upper = tokens / self.mean_length, accumulation * self.max_samples * self.num_processes
        bound = mean + 3 * math.sqrt(mean) * self.length_deviation / self.mean_length
        in_row, deviation = self.row_samples
        if deviation:  # rows are filled with samples of like lengths: some have many more than others
            bound = max(bound, mean + 3 * math.sqrt(mean / in_row) * deviation)
        return max(self.max_samples, math.ceil(min(bound, upper)))


@dataclass(frozen=True)
class MicroBatchShape:
    """What the bits of a step's result depend on beside its samples; a resumed run keeps it."""

    tokens: int  # a micro-batch holds at most so many; 0: as configured
    mlp_tile: int = 0  # tokens that go through an MLP at once; 0: all
    layout: Literal["fused", "unpadded", "padded"] = "fused"  # packed for the engine, packed for transformers, padded

    def __str__(self) -> str:
        size = f"{self.tokens:,} tokens" if self.tokens else "the configured size"
        size += " with padding" if self.layout == "padded" else ""
        return size + (f" in tiles of {self.mlp_tile:,}" if self.mlp_tile else "")


class StepPlan(Protocol):
    """What of a plan (engine/plan.py) decides how a step's samples are grouped into micro-batches."""

    @property
    def is_fused(self) -> bool:
        """Whether the fused engine runs micro-batches, which are then packed."""
        ...

    @property
    def merges(self) -> bool:
        """Whether micro-batches are merged or split to hold at most `micro_batch_tokens`."""
        ...

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that a micro-batch holds at most."""
        ...

    @property
    def uses_graphs(self) -> bool:
        """Whether micro-batches run as CUDA graphs, which have room for `num_samples`."""
        ...

    @property
    def num_samples(self) -> int:
        """Samples in a micro-batch that memory is counted for."""
        ...

    @property
    def pair_cost(self) -> float:
        """What attention costs for a pair of tokens, beside a token's cost."""
        ...

    @property
    def micro_batch_shape(self) -> MicroBatchShape:
        """The same with how samples lie in it."""
        ...


def collated_tokens(lengths: Sequence[int], is_padded: bool) -> int:
    """Tokens of a micro-batch of samples with these lengths: padded to the longest, or packed."""
    return len(lengths) * max(lengths, default=0) if is_padded else packed_tokens(lengths)


def regroup(
    micro_batches: Sequence[list[int]], num_tokens: Sequence[int], is_padded: bool, max_tokens: int
) -> list[list[int]]:
    """The sample numbers of each micro-batch, merged or split so that each holds at most `max_tokens` (0: unchanged).

    Tokens count as collated: padded to the longest sample, or packed. A sample longer than `max_tokens` is a
    micro-batch of its own.
    """
    if not max_tokens:
        return list(micro_batches)

    def fits(samples: list[int]) -> bool:
        return collated_tokens([num_tokens[i] for i in samples], is_padded) <= max_tokens

    merged: list[list[int]] = []
    for whole in micro_batches:
        for samples in [whole] if fits(whole) else [[i] for i in whole]:
            if merged and fits(merged[-1] + samples):
                merged[-1] = merged[-1] + samples
            else:
                merged.append(samples)
    return merged
