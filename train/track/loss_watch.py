"""Watches the losses: warns once of a jump or a standstill, when it happens."""

import math
from collections import deque

SETTLED = 20  # steps before a jump can be distinguished from the start of training
JUMP_DEVIATIONS, JUMP_FACTOR = 6.0, 1.3
# A step of eight samples has a hard one now and then: one of a healthy demo's 984 steps is 6 deviations high. The next
# step is then high as well, or it was that; what is so high as this needs no second step.
SURE_DEVIATIONS = 12.0
SPAN = 200  # steps that are compared with as many before them
MIN_FALL = 0.002  # as a share of the loss


class LossWatch:
    """Only warns, and remembers nothing across a resume."""

    def __init__(self) -> None:
        self.mean = self.variance = 0.0  # exponential, over about twenty steps
        self.seen = 0
        self.hard: list[float] = []  # the last loss, if it was high, and may be the first of a jump
        self.recent: deque[float] = deque(maxlen=2 * SPAN)

    def check(self, loss: float) -> str:
        """A warning about the step with this loss, or nothing; losses that are not finite are ignored."""
        if not math.isfinite(loss):
            return ""
        return self._jump(loss) or self._standstill(loss)

    def _jump(self, loss: float) -> str:
        is_high = self.seen >= SETTLED and loss > self._limit(JUMP_DEVIATIONS)
        if is_high and not self.hard and loss <= self._limit(SURE_DEVIATIONS):
            self.hard = [loss]  # not counted yet: the next one is compared with what was before
            return ""
        before = self.mean
        for each in (*self.hard, loss):
            self._count(each)
        self.hard = []
        if not is_high:
            return ""
        return f"the loss jumped to {loss:.4f} from about {before:.4f}; look at the step's samples, or lower optim.lr"

    def _limit(self, deviations: float) -> float:
        return max(self.mean + deviations * math.sqrt(self.variance), JUMP_FACTOR * self.mean)

    def _count(self, loss: float) -> None:
        weight = 1 / min(self.seen + 1, SETTLED)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        self.seen += 1

    def _standstill(self, loss: float) -> str:
        self.recent.append(loss)
        if len(self.recent) < 2 * SPAN:
            return ""
        losses = list(self.recent)
        before, after = sum(losses[:SPAN]) / SPAN, sum(losses[SPAN:]) / SPAN
        self.recent.clear()  # the next comparison is of other steps
        if before - after >= MIN_FALL * before:
            return ""
        return (
            f"the loss has not fallen: mean {after:.4f} over the last {SPAN} steps, {before:.4f} over those before them"
        )
