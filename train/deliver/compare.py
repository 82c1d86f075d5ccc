"""Asks the base and the tuned model the same questions, and shows the answers side by side."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.terminal import printable
from train.deliver.generation import Completion, Generator, in_batches
from train.deliver.questions import Question

ROWS_SHOWN = 6


@dataclass(frozen=True)
class Answer:
    """A question, its reference answer, and the answers of the base and of the tuned model."""

    question: str
    reference: str
    before: str
    after: str
    exact: bool  # the tuned model's answer equals the reference
    stopped: bool  # the tuned model ended its answer with an end token
    before_exact: bool
    before_stopped: bool


def compare(generator: Generator, questions: Sequence[Question], must_stop: Callable[[], bool]) -> list[Answer]:
    """Answers each question with adapters off and on; ends early when `must_stop` returns True."""
    model = generator.model

    def generate_both(batch: Sequence[Question]) -> tuple[list[Completion], list[Completion]]:
        prompts = [question.prompt for question in batch]
        with model.adapted.disable_adapter():
            before = generator(prompts)
        return before, generator(prompts)

    answers: list[Answer] = []
    with model.generating():
        for batch, completions in in_batches(questions, generate_both, must_stop):
            answers += [_answer(*each) for each in zip(batch, *completions, strict=True)]
    return answers


def _answer(question: Question, before: Completion, after: Completion) -> Answer:
    return Answer(
        question=question.text,
        reference=question.reference,
        before=before.text,
        after=after.text,
        exact=after.text == question.reference,
        stopped=after.is_stopped,
        before_exact=before.text == question.reference,
        before_stopped=before.is_stopped,
    )


def as_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The answers as written to answers.json."""
    return [asdict(answer) for answer in answers]


def show_answers(console: Console, title: str, answers: Sequence[Answer]) -> None:
    """A table of the first few answers, and the counts over all of them."""
    table = Table(title=f"the first {min(ROWS_SHOWN, len(answers))} {title}, before and after", show_lines=True)
    table.add_column("question", ratio=2)
    table.add_column("before", ratio=3, style="dim")
    table.add_column("after", ratio=3)
    table.add_column("exact", justify="center")
    table.add_column("stopped", justify="center")
    for answer in answers[:ROWS_SHOWN]:
        marks = ("yes" if answer.exact else "no", "yes" if answer.stopped else "no")
        table.add_row(*map(_shown, (answer.question, answer.before, answer.after)), *marks)
    console.print(table)
    total = len(answers)
    before = sum(a.before_exact for a in answers), sum(a.before_stopped for a in answers)
    after = sum(a.exact for a in answers), sum(a.stopped for a in answers)
    console.print(f"{title}:", highlight=False)
    for label, (exact, stopped) in (("before", before), ("after", after)):
        shares = (
            f"{exact} of {total} exact ({exact / total:.1%}), {stopped} stopped by themselves ({stopped / total:.1%})"
        )
        console.print(f"{label:>6}: {shares}", highlight=False, soft_wrap=True)


def _shown(text: str) -> Text:
    """The beginning of the text, without rich's markup and with control characters made visible."""
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return Text("\n".join(map(printable, short.split("\n"))))
