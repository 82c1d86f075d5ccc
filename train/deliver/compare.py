"""The same questions to the base and to the tuned model, side by side."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedTokenizerBase

from data_tools.preview import printable
from data_tools.records import Conversation
from data_tools.render import render_prompt
from train.models.language_model import LanguageModel

QUESTIONS_AT_A_TIME = 32
ROWS_SHOWN = 6


@dataclass(frozen=True)
class Answer:
    """One question and what became of it."""

    question: str
    reference: str
    before: str
    after: str
    exact: bool  # the tuned answer is the reference, to the letter
    stopped: bool  # the tuned model wrote an end token by itself
    before_exact: bool
    before_stopped: bool


def compare(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    end_token_ids: Sequence[int],
    max_new_tokens: int,
    must_stop: Callable[[], bool],
) -> list[Answer]:
    """Greedy answers to each conversation's last question, with the adapters off and on, until `must_stop` says so."""
    answers: list[Answer] = []
    count = QUESTIONS_AT_A_TIME
    with model.generating():
        while len(answers) < len(conversations) and not must_stop():
            batch = conversations[len(answers) : len(answers) + count]
            prompts = [render_prompt(tokenizer, conversation.messages[:-1]) for conversation in batch]
            try:
                with model.adapted.disable_adapter():
                    before = _generate(model, tokenizer, prompts, end_token_ids, max_new_tokens)
                after = _generate(model, tokenizer, prompts, end_token_ids, max_new_tokens)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                count = len(batch) // 2  # keys and values of 32 answers of an 8B are more than a small card has left
                continue
            for conversation, (old, old_stopped), (new, stopped) in zip(batch, before, after, strict=True):
                question, reference = conversation.messages[-2].content, conversation.messages[-1].content.strip()
                exact, was_exact = new == reference, old == reference
                answers.append(Answer(question, reference, old, new, exact, stopped, was_exact, old_stopped))
    return answers


@torch.no_grad()
def _generate(
    model: LanguageModel,
    tokenizer: Any,
    prompts: Sequence[str],
    end_token_ids: Sequence[int],
    max_new_tokens: int,
) -> list[tuple[str, bool]]:
    """(text, whether an end token closed it) for each prompt, decoded greedily."""
    causal_lm: Any = model.adapted
    inputs = tokenizer(
        list(prompts), add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    ).to(causal_lm.device)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(end_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    generated = causal_lm.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=settings,
    )
    results = []
    for tokens in generated[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(tokens) if token in end_token_ids), None)
        results.append((tokenizer.decode(tokens[:end]).strip(), end is not None))
    return results


def as_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The answers as they stand in answers.json."""
    return [asdict(answer) for answer in answers]


def show(console: Console, title: str, answers: Sequence[Answer]) -> None:
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
    """The beginning, as it stands: no markup of rich's, and nothing that would steer the terminal."""
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return Text("\n".join(map(printable, short.split("\n"))))
