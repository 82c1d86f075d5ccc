"""How a step's samples go through the model: in how many passes, of how many tokens and samples, by lengths alone."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """The samples' lengths, as far as the plan needs them."""

    longest: tuple[int, ...]  # tokens of one, two, ... `per_device` rows at most
    mean_pass: float  # of a pass of `per_device` rows
    deviation: float  # standard deviation of a pass's tokens
    mean_length: float  # of a sample
    length_deviation: float = 0.0  # math.inf where samples of like lengths come together
    most_samples: int = 1  # of a pass of `per_device` rows
    longest_validated: int = 0  # tokens of the longest sample of the validation

    def tokens(self, merged: int) -> int:
        """Tokens that so many passes together seldom exceed (three deviations); where they do, they stay apart."""
        usual = merged * self.mean_pass + 3 * math.sqrt(merged) * self.deviation
        return max(self.longest[-1], min(merged * self.longest[-1], math.ceil(usual)))

    def num_passes(self, accumulation: int, tokens: int) -> float:
        """Passes of at most `tokens` that so many passes are put together into, on average.

        What a step has is counted as normally distributed: the sum of the chances that it needs more than one pass,
        more than two, and so on. All but a step's last have room for half of what comes next, where lengths differ. It
        never needs more than its longest rows would, or where passes have to be taken apart.
        """
        mean, deviation = accumulation * self.mean_pass, math.sqrt(accumulation) * self.deviation
        num_rows = accumulation * len(self.longest)
        most = math.ceil(num_rows / max(1, tokens // self.longest[0]))
        if not deviation:
            return min(most, math.ceil(num_rows / max(1, int(tokens * num_rows / mean))))
        unit = self.mean_pass / (len(self.longest) if tokens < self.longest[-1] else 1)
        spare, total = min(unit / 2, self.deviation), 1.0
        for count in range(1, most):
            total += 0.5 * math.erfc((count * tokens - (count - 1) * spare - mean) / (deviation * math.sqrt(2)))
        return total

    def samples(self, accumulation: int, tokens: int) -> int:
        """Samples that a pass of so many tokens seldom exceeds (three deviations)."""
        usual, most = tokens / self.mean_length, accumulation * self.most_samples
        usual += 3 * math.sqrt(usual) * self.length_deviation / self.mean_length
        return max(self.most_samples, math.ceil(min(usual, most)))


@dataclass(frozen=True)
class Passes:
    """How a step's samples go through the model: what the bits of its result depend on, so a resumed run keeps it."""

    tokens: int  # of one pass at most
    mlp_tile: int = 0  # tokens that go through an MLP together; 0: all

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens" + (f" in tiles of {self.mlp_tile:,}" if self.mlp_tile else "")
