"""Judges the losses as they come: a jump, or a standstill, is said once, when it happens."""

import math
from collections import deque

SETTLED = 20  # steps before a jump can be told from the start of training
JUMP_DEVIATIONS, JUMP_FACTOR = 6.0, 1.3
SPAN = 200  # steps that are compared with the same number before them
LEAST_FALL = 0.002  # share of the loss


class LossWatch:
    """Remembers nothing across a resume: it warns, and changes nothing."""

    def __init__(self) -> None:
        self.mean = self.variance = 0.0  # exponential, over about twenty steps
        self.seen = 0
        self.recent: deque[float] = deque(maxlen=2 * SPAN)

    def check(self, loss: float) -> str:
        """A warning about the step with this loss, or nothing; losses that are not finite are not its matter."""
        if not math.isfinite(loss):
            return ""
        warning = self._jump(loss) or self._standstill(loss)
        weight = 1 / min(self.seen + 1, SETTLED)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        self.seen += 1
        return warning

    def _jump(self, loss: float) -> str:
        limit = max(self.mean + JUMP_DEVIATIONS * math.sqrt(self.variance), JUMP_FACTOR * self.mean)
        if self.seen < SETTLED or loss <= limit:
            return ""
        return (
            f"the loss jumped to {loss:.4f} from about {self.mean:.4f}; look at the step's samples, or lower optim.lr"
        )

    def _standstill(self, loss: float) -> str:
        self.recent.append(loss)
        if len(self.recent) < 2 * SPAN:
            return ""
        losses = list(self.recent)
        before, after = sum(losses[:SPAN]) / SPAN, sum(losses[SPAN:]) / SPAN
        self.recent.clear()  # the next judgement is on other steps
        if before - after >= LEAST_FALL * before:
            return ""
        return f"the loss has not fallen for {SPAN} steps: {before:.4f} before them, {after:.4f} over them"
