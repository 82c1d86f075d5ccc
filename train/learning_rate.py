"""The learning rate as a pure function of the step: a warmup and a decay, and a further decay for each extension."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.config import OptimConfig


@dataclass(frozen=True)
class Decay:
    """One stretch of a schedule."""

    start: int  # optimizer steps completed before it
    rate: float  # that it begins with: the peak, or the rate of the last step before
    end: int  # optimizer steps completed when it is over


@dataclass(frozen=True)
class Schedule:
    """The rates of a whole run; the first decay has the warmup before it, each further one an extension of the run."""

    optim: OptimConfig
    decays: tuple[Decay, ...]

    @classmethod
    def of(cls, optim: OptimConfig, total_steps: int) -> "Schedule":
        """The schedule of a run that was not extended."""
        return cls(optim, (Decay(0, optim.lr, total_steps),))

    @classmethod
    def from_rows(cls, optim: OptimConfig, rows: Any) -> "Schedule":
        """The schedule that `rows` describes; raises ValueError where they describe none."""
        try:
            decays = tuple(Decay(int(start), float(rate), int(end)) for start, rate, end in rows)
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None
        starts = [decay.start for decay in decays]
        is_finite = all(math.isfinite(decay.rate) for decay in decays)
        if not decays or starts != sorted({0, *starts}) or decays[0].rate != optim.lr or not is_finite:
            raise ValueError("not a schedule of this learning rate")
        return cls(optim, decays)

    def rows(self) -> list[list[float]]:
        """Start, rate and end of each decay, as a checkpoint keeps them."""
        return [[decay.start, decay.rate, decay.end] for decay in self.decays]

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.decays[-1].end

    @property
    def extensions(self) -> Sequence[Decay]:
        """The decays that were added to the first."""
        return self.decays[1:]

    def rate(self, step: int) -> float:
        """The rate of optimizer step `step`, counted from 0: a linear warmup to the peak, then a decay."""
        decay = next(decay for decay in reversed(self.decays) if decay.start <= step)
        warmup, done = self._warmup(decay), step - decay.start
        if done < warmup:
            return decay.rate * (done + 1) / warmup
        if self.optim.schedule == "constant":
            return decay.rate
        progress = (done - warmup) / max(1, decay.end - decay.start - warmup)
        if self.optim.schedule == "linear":
            return decay.rate * (1 - progress)
        return decay.rate * 0.5 * (1 + math.cos(math.pi * progress))

    def is_independent(self, completed: int) -> bool:
        """Whether the first `completed` steps would have had the same rates with any other end."""
        last = self.decays[-1]  # whose first step behind the warmup has its full rate
        if last is self.decays[0] and isinstance(self.optim.warmup, float) and self.warmup:
            return not completed  # a share of another number of steps
        return self.optim.schedule == "constant" or completed - last.start <= self._warmup(last) + 1

    def with_end(self, total_steps: int) -> "Schedule":
        """The same decays, the last of them to another end."""
        return replace(self, decays=(*self.decays[:-1], replace(self.decays[-1], end=total_steps)))

    def extended(self, completed: int, total_steps: int) -> "Schedule":
        """A further decay of the same shape, from the rate of the last of `completed` steps to the new end."""
        return replace(self, decays=(*self.decays, Decay(completed, self.rate(completed - 1), total_steps)))

    @property
    def warmup(self) -> int:
        """Steps of the warmup: as asked for, or the share of the first decay's steps that was asked for."""
        asked = self.optim.warmup
        return math.ceil(asked * self.decays[0].end) if isinstance(asked, float) else asked

    def _warmup(self, decay: Decay) -> int:
        return self.warmup if decay is self.decays[0] else 0
