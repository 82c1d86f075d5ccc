"""The validation losses so far: which was the lowest, and whether they end the run early."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from train.config import ValidateConfig


@dataclass
class ValidationRecord:
    """What checkpoints keep of a run's validations, so that a resumed run decides as the uninterrupted one would."""

    measured_on: str = ""  # fingerprint of the samples: losses on others cannot be compared
    best_loss: float | None = None
    best_step: int = 0
    num_since_best: int = 0  # validations without an improvement
    last_loss: float | None = None  # None also where the last one was not finite

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], measured_on: str) -> "ValidationRecord":
        """The record in a checkpoint; a new one where the samples are others, or the checkpoint has none."""
        known = {name: saved[name] for name in (field.name for field in fields(cls)) if name in saved}
        record = cls(**known)
        if record.measured_on in ("", measured_on):
            record.measured_on = measured_on
            return record
        return cls(measured_on)

    def add(self, step: int, loss: float | None, min_improvement: float) -> None:
        """Takes the loss after `step`; None stands for one that is not finite.

        The lowest loss is the best by whatever it is lower; only a fall by more than `min_improvement` is patience's
        new start.
        """
        improved = loss is not None and (self.best_loss is None or loss < self.best_loss - min_improvement)
        self.num_since_best = 0 if improved else self.num_since_best + 1
        if self.is_best(loss):
            self.best_loss, self.best_step = loss, step
        self.last_loss = loss

    def is_best(self, loss: float | None) -> bool:
        """Whether the loss is lower than all before."""
        return loss is not None and math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)

    def reason_to_end(self, settings: ValidateConfig) -> str:
        """Why the run ends now, by today's settings, or nothing."""
        if self._has_reached(settings):
            return (
                f"the validation loss {self.last_loss:.4f} has reached --validate.target_loss {settings.target_loss:g}"
            )
        if self._is_out_of_patience(settings):
            lowest = f"{self.best_loss:.4f} after step {self.best_step}" if self.best_loss is not None else "none"
            validations = f"{self.num_since_best} validations" if self.num_since_best > 1 else "1 validation"
            return (
                f"{validations} without an improvement (--validate.patience {settings.patience}); "
                f"the lowest loss is {lowest}"
            )
        return ""

    def to_go_on(self, settings: ValidateConfig) -> str:
        """The options without which a longer run would end at once for `reason_to_end`, with a space before each."""
        target = " --validate.target_loss 0" if self._has_reached(settings) else ""
        return target + (" --validate.patience 0" if self._is_out_of_patience(settings) else "")

    def _has_reached(self, settings: ValidateConfig) -> bool:
        return self.last_loss is not None and settings.target_loss > 0 and self.last_loss <= settings.target_loss

    def _is_out_of_patience(self, settings: ValidateConfig) -> bool:
        return 0 < settings.patience <= self.num_since_best

    def as_state(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)
