"""Answers to a few held-out questions at each validation, beside what the base answered before training."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from train.deliver.generation import Completion, Generator, in_batches
from train.deliver.questions import Question

Row = dict[str, Any]


class Interviewer:
    """Asks the same questions again and again; what the base alone answers is asked for once in a process.

    It belongs to the first process. Nothing that fails here may end training: the first failure is told, and no more
    questions are asked.
    """

    def __init__(
        self,
        generator: Generator,
        questions: Sequence[Question],
        limit_seconds: float = math.inf,
    ) -> None:
        """`limit_seconds` is what one round may take: the other processes wait, and would give up."""
        self.is_asked = generator.must_stop
        self.generator = replace(generator, must_stop=self._must_stop)
        self.questions, self.limit_seconds = questions, limit_seconds
        self.before: list[Completion] = []
        self.deadline = math.inf
        self.failure = ""

    def ask(self, step: int) -> list[Row]:
        """A row for each question; none where the run was asked to stop, or where asking fails."""
        if not self.questions or self.failure:
            return []
        self.deadline = time.monotonic() + self.limit_seconds
        rows: list[Row] = []
        try:
            rows = self._ask(step)
            if not rows and not self.is_asked():
                self.failure = f"they take longer than {self.limit_seconds:.0f} s; lower --validate.num_questions"
        except Exception as error:  # an answer is worth no night
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what answers took, training allocates again
        if self.failure:
            with suppress(OSError):  # a terminal that is gone
                print(f"the questions at validations are not asked any more: {self.failure}", flush=True)
        return rows

    def _must_stop(self) -> bool:
        return self.is_asked() or time.monotonic() > self.deadline

    def _ask(self, step: int) -> list[Row]:
        model = self.generator.model
        with model.generating():
            if not self.before:
                with model.without_adapters():
                    before = self._answers()
                if len(before) < len(self.questions):
                    return []
                self.before = before
            now = self._answers()
        if len(now) < len(self.questions):
            return []
        return [
            {
                "step": step,
                "question": question.text,
                "reference": question.reference,
                "before": before.text,
                "now": after.text,
                "exact": after.text == question.reference,
                "stopped": after.is_stopped,
            }
            for question, before, after in zip(self.questions, self.before, now, strict=True)
        ]

    def _answers(self) -> list[Completion]:
        """One for each question; fewer where the run was asked to stop."""
        prompts = [question.prompt for question in self.questions]
        must_stop = self.generator.must_stop
        found = [each for _, batch in in_batches(prompts, self.generator, must_stop) for each in batch]
        return [] if must_stop() else found
