"""Answers to a few held-out questions at each validation, beside what the base answered before training."""

from collections.abc import Sequence
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

    def __init__(self, generator: Generator, questions: Sequence[Question]) -> None:
        self.generator = generator
        self.questions = questions
        self.before: list[Completion] = []
        self.failure = ""

    def ask(self, step: int) -> list[Row]:
        """A row for each question; none where the run was asked to stop, or where asking fails."""
        if not self.questions or self.failure:
            return []
        try:
            return self._ask(step)
        except Exception as error:  # an answer is worth no night
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"the questions at validations are not asked any more: {self.failure}", flush=True)
            return []
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what answers took, training allocates again

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
