"""Which texts a conversation is trained as, and where the trained turns stand in them.

A turn is trained where the text before it is its generation prompt, to the letter, and ends with the token that stops
generation. Templates that render earlier answers otherwise than the last one (Qwen3 takes their reasoning away) give
one text for each answer that no other text has as it would be generated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from data_tools.answers import Answer, AnswerFinder
from data_tools.dialogue import DialogueText

History = Literal["each", "last", "refuse"]


@dataclass(frozen=True)
class TrainedTurn:
    """Characters [start, end) of a text that the model learns to write; `written` is behind an empty think block."""

    number: int
    start: int
    written: int
    end: int


@dataclass(frozen=True)
class Rendering:
    """A text and the turns that are trained in it; `num_left_out` trained turns are in no text, by data.history."""

    text: str
    turns: tuple[TrainedTurn, ...]
    num_left_out: int = 0


def renderings_of(texts: DialogueText, history: History, masks_empty_reasoning: bool) -> list[Rendering]:
    """The texts to train; raises ValueError naming the turn that cannot be trained as it would be generated."""
    whole = texts.through(len(texts.messages))
    answers: dict[int, Answer] = {}
    covered = set()
    for number, message in enumerate(texts.messages):
        if message.train:
            try:
                answer = AnswerFinder(texts, number).find(masks_empty_reasoning)
            except ValueError as error:
                raise ValueError(f"turn {number + 1}: {error}") from None
            if _stands_in(whole, answer):
                covered.add(number)
                answer = replace(answer, prompt=None)  # all of a long conversation's would take much memory
            answers[number] = answer
    left = set(answers)
    if covered == left:
        return [_rendering(whole, answers, covered)]
    # the beginnings of the whole are not known by other texts, which may begin otherwise
    answers = {n: each if each.prompt else replace(each, prompt=whole[: each.start]) for n, each in answers.items()}
    if history == "refuse":
        other = min(left - covered) + 1
        raise ValueError(
            f"turn {other}: the chat template renders this answer otherwise when other turns follow it; "
            "--data.history each trains each answer as it is generated, last the last one alone"
        )
    found: list[Rendering] = []
    while left:
        latest = answers[max(left)]
        text = f"{latest.prompt}{latest.text}{latest.rest}"
        covered = {number for number in left if _stands_in(text, answers[number])}
        left -= covered
        found.append(_rendering(text, answers, covered, len(left) if history == "last" else 0))
        if history == "last":
            break
    return found[::-1]


def _stands_in(text: str, answer: Answer) -> bool:
    return text.startswith(answer.prompt or "") and text.startswith(answer.text, answer.start)


def _rendering(text: str, answers: Mapping[int, Answer], covered: set[int], num_left_out: int = 0) -> Rendering:
    turns = []
    for number in sorted(covered):
        answer = answers[number]
        turns.append(TrainedTurn(number, answer.start, answer.start + answer.written, answer.start + len(answer.text)))
    return Rendering(text, tuple(turns), num_left_out)
