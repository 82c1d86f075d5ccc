"""When a run is validated, what is measured then, and what it has come to so far."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from train.deliver.generation import Generator
from train.early_stop import ValidationRecord
from train.run.processes import UNWATCHED, Watch
from train.step import Training
from train.validation.answers import Interviewer
from train.validation.material import Material
from train.validation.measure import validate

ASKING_SHARE = 0.25  # of the time that processes wait for one another


class Validator:
    """The validations of one run; every process has one, and all of them find the same losses."""

    def __init__(
        self,
        training: Training,
        material: Material,
        record: ValidationRecord,
        watch: Watch = UNWATCHED,
        interviewer: Interviewer | None = None,
    ) -> None:
        """`record` is the checkpoint saver's, which keeps it; `interviewer` is None in all but the first process."""
        self.training, self.material, self.record, self.watch = training, material, record, watch
        self.interviewer = interviewer
        self.settings = training.config.validate

    @classmethod
    def of(cls, training: Training, material: Material, record: ValidationRecord, watch: Watch) -> "Validator":
        """One that also asks the questions, in the first process."""
        interviewer, settings = None, training.config.validate
        can_ask = training.config.train.method != "full"  # else the base is gone, and nothing to compare with
        if training.accelerator.is_main_process and material.questions and can_ask:
            reading = (material.tokenizer, material.end_token_ids)
            generator = Generator(training.model, *reading, settings.max_new_tokens, watch.is_asked)
            # another process that waits gives up after run.timeout_minutes
            is_alone = training.accelerator.num_processes == 1
            limit = math.inf if is_alone else 60 * training.config.run.timeout_minutes * ASKING_SHARE
            interviewer = Interviewer(generator, material.questions, limit)
        return cls(training, material, record, watch, interviewer)

    @property
    def starts(self) -> bool:
        """Whether something is to be measured before the first step."""
        return self.settings.at_start and bool(self.material.texts)

    def is_due(self, step: int) -> bool:
        """Whether the run is validated after `step`: by the interval, and after the last step."""
        if not self.material.texts:
            return False
        return self.training.data.ends(step, self.settings.every) or step == self.training.total_steps

    def measure(self, step: int) -> dict[str, Any]:
        """The row's part for a validation after `step`; raises Dropped. A loss that is not finite is a warning in it.

        The losses before the first step are no candidates for the best: there is no checkpoint of them.
        """
        row: dict[str, Any] = validate(self.training, self.material, self.watch)
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        for name in bad:
            del row[name]
        if "eval/loss" not in row:
            row.pop("eval/perplexity", None)
        if bad:
            row["warning"] = f"not finite, and left out: {', '.join(bad)}; the best checkpoint is chosen without them"
        if self.material.parts and step:
            self.record.add(step, row.get("eval/loss"), self.settings.min_improvement)
        if self.record.best_loss is not None:
            row |= {"eval/best_step": self.record.best_step, "eval/best_loss": self.record.best_loss}
        return row

    def ask(self, step: int) -> Sequence[Mapping[str, Any]]:
        """Answers to the questions, in the first process."""
        return self.interviewer.ask(step) if self.interviewer else ()

    def reason_to_end(self, step: int) -> str:
        """Why the run ends after `step`, before its last one; or nothing."""
        return self.record.reason_to_end(self.settings) if step < self.training.total_steps else ""
