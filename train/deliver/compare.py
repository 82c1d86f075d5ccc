"""Asks the base and the tuned model the same questions, and shows the answers side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.terminal import printable
from train.deliver.generation import Completion, Generator, in_batches
from train.deliver.questions import Question
from train.deliver.scores import Score, score

ROWS_SHOWN = 3


@dataclass(frozen=True)
class Answer:
    """A question, its reference answer if it has one, and what the base and the tuned model wrote."""

    question: str
    reference: str | None
    before: Completion
    after: Completion
    path_number: int = 0  # which of the user's paths it is from

    def score(self, completion: Completion) -> Score | None:
        """How one of the two compares with the reference; None where there is none."""
        return None if self.reference is None else score(completion.text, self.reference)

    def has_contained(self, completion: Completion) -> bool | None:
        """Whether the reference stands in it; None where there is none."""
        found = self.score(completion)
        return None if found is None else found.contained


def compare(generator: Generator, questions: Sequence[Question], must_stop: Callable[[], bool]) -> list[Answer]:
    """Answers each question with adapters off and on; ends early when `must_stop` returns True."""
    model = generator.model

    def generate_both(batch: Sequence[Question]) -> tuple[list[Completion], list[Completion]]:
        prompts = [question.prompt for question in batch]
        with model.without_adapters():
            before = generator(prompts)
        return before, generator(prompts)

    answers: list[Answer] = []
    with model.generating():
        for batch, completions in in_batches(questions, generate_both, must_stop):
            for question, before, after in zip(batch, *completions, strict=True):
                answers.append(Answer(question.text, question.reference, before, after, question.path_number))
    return answers


def as_rows(answers: Sequence[Answer], paths: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The answers as written to answers.json; with `paths`, each says from which of them its question is."""
    return [
        {
            **({"path": paths[answer.path_number]} if paths else {}),
            "question": answer.question,
            "reference": answer.reference,
            "before": answer.before.text,
            "after": answer.after.text,
            "exact": answer.after.text == answer.reference,
            "stopped": answer.after.is_stopped,
            "before_exact": answer.before.text == answer.reference,
            "before_stopped": answer.before.is_stopped,
            "contained": answer.has_contained(answer.after),
            "before_contained": answer.has_contained(answer.before),
        }
        for answer in answers
    ]


def show_answers(console: Console, title: str, answers: Sequence[Answer]) -> None:
    """A table of the first few answers, and the counts over all of them."""
    show_first(console, title, answers, ROWS_SHOWN)
    console.print(f"{title}:", highlight=False)
    for label, completions in (("before", [a.before for a in answers]), ("after", [a.after for a in answers])):
        console.print(f"{label:>6}: {_counts(answers, completions)}", highlight=False, soft_wrap=True)


def _counts(answers: Sequence[Answer], completions: Sequence[Completion]) -> str:
    """How many are right (the reference stands in them), how many word for word, and how many ended by themselves."""
    pairs = list(zip(answers, completions, strict=True))
    scores = [found for answer, completion in pairs if (found := answer.score(completion)) is not None]
    exact, contained = sum(found.exact for found in scores), sum(found.contained for found in scores)
    stopped = sum(completion.is_stopped for completion in completions)
    right = f"{contained} of {len(scores)} right"
    told = [f"{right} ({contained / len(scores):.1%}), {exact} word for word"] if scores else []
    return ", ".join([*told, f"{stopped} stopped by themselves ({stopped / len(answers):.1%})"])


def show_first(console: Console, title: str, answers: Sequence[Answer], count: int) -> None:
    """A table of the first `count` answers, before and after."""
    table = Table(title=f"the first {min(count, len(answers))} {title}, before and after", show_lines=True)
    table.add_column("question", ratio=2)
    table.add_column("before", ratio=3, style="dim")
    table.add_column("after", ratio=3)
    table.add_column("right", justify="center")
    table.add_column("stopped", justify="center")
    for answer in answers[:count]:
        right = {None: "-", True: "yes", False: "no"}[answer.has_contained(answer.after)]
        texts = (answer.question, answer.before.text, answer.after.text)
        table.add_row(*map(_shown, texts), right, "yes" if answer.after.is_stopped else "no")
    console.print(table)


def _shown(text: str) -> Text:
    """The beginning of the text, without rich's markup and with control characters made visible."""
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return Text("\n".join(map(printable, short.split("\n"))))
