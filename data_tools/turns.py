"""Which texts a conversation is trained as, and where the trained turns stand in them.

A turn is trained where the text before it is its generation prompt, to the letter, and ends with the token that stops
generation. Templates that render earlier answers otherwise than the last one (Qwen3 takes their reasoning away) give
one text for each answer that no other text has as it would be generated.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from data_tools.chat_template import ChatTemplate, Dialect
from data_tools.encode import Encoder
from data_tools.locate import end_aside_space, find_leaf, find_text, said_in_calls, shared_prefix
from data_tools.messages import Message

History = Literal["each", "last", "refuse"]

EMPTY_ELEMENT = re.compile(r"(<|\[)(\w+)(>|\])\1/\2\3")
MARK = "\uf8ff"  # a private character, with which no answer begins


@dataclass(frozen=True)
class Dialogue:
    """A conversation as it goes into the template; `arguments` are the row's own template arguments."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    arguments: Mapping[str, Any]
    dialect: Dialect


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


@dataclass(frozen=True)
class Answer:
    """A turn as generation writes it: the text before it, and the turn with what ends it."""

    prompt: str
    text: str
    rest: str  # white space behind it
    written: int  # where it begins to be trained: behind an empty think block, or 0


class DialogueText:
    """The texts of one dialogue, each rendered once."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, dialogue: Dialogue) -> None:
        self.template, self.encoder, self.dialogue = template, encoder, dialogue
        self.messages = dialogue.messages
        self._turns = [dialogue.dialect.turn(message) for message in self.messages]
        self._known: dict[int, str] = {}

    def through(self, count: int) -> str:
        """The text of the first `count` turns."""
        if count not in self._known:
            self._known[count] = self._render(self._turns[:count])
        return self._known[count]

    @cached_property
    def whole(self) -> str:
        """The text of all turns."""
        return self.through(len(self.messages))

    def renderings(self, history: History, masks_empty_reasoning: bool) -> list[Rendering]:
        """The texts to train; raises ValueError naming the turn that cannot be trained as it would be generated."""
        text = self.whole
        numbers = [number for number, message in enumerate(self.messages) if message.train]
        answers: dict[int, Answer] = {}
        for number in numbers:
            try:
                answers[number] = self.answer(number, masks_empty_reasoning)
            except ValueError as error:
                raise ValueError(f"turn {number + 1}: {error}") from None
        left = set(numbers)
        covered = {number for number in numbers if _stands_in(text, answers[number])}
        if covered == left:
            return [self._rendering(text, answers, covered)]
        if history == "refuse":
            other = min(left - covered) + 1
            raise ValueError(
                f"turn {other}: the chat template renders this answer otherwise when other turns follow it; "
                "--data.history each trains each answer as it is generated, last the last one alone"
            )
        found: list[Rendering] = []
        while left:
            latest = max(left)
            # as rendered through this turn, and with the generation prompt in the template's own white space
            text = answers[latest].prompt + answers[latest].text + answers[latest].rest
            covered = {number for number in left if _stands_in(text, answers[number])}
            left -= covered
            found.append(self._rendering(text, answers, covered, len(left) if history == "last" else 0))
            if history == "last":
                break
        return found[::-1]

    def answer(self, number: int, masks_empty_reasoning: bool) -> Answer:
        """Turn `number` as generation writes it, the last turn of its conversation."""
        prompt, text = self._prompt_and_turn(number)
        if lost := self._lost(number, text):
            raise ValueError(f"the chat template loses or changes {lost}, which was to be trained")
        is_masked = masks_empty_reasoning and not self.messages[number].reasoning
        written = self._empty_reasoning(number, prompt, text) if is_masked else 0
        said = text.rstrip()
        return Answer(prompt, said, text[len(said) :], written)

    def _prompt_and_turn(self, number: int) -> tuple[str, str]:
        """The generation prompt and what stands behind it; raises ValueError where generation would see another text.

        Tried in this order: as it is; in the template's thinking or other mode; behind the empty think block with which
        generation begins and which the turn does not show; and with the white space of generation.
        """
        before, through = self._turns[:number], self.through(number + 1)
        prompt = self._prompt(before)
        thinks = bool(self.messages[number].reasoning)
        if through.startswith(prompt) and not (thinks and self._lost(number, through[len(prompt) :])):
            return prompt, through[len(prompt) :]
        for switch in self._switches():
            other = self._prompt(before, **{switch: thinks})
            for text in (through, self._render(self._turns[: number + 1], **{switch: thinks})):
                if text.startswith(other) and not self._lost(number, text[len(other) :]):
                    return other, text[len(other) :]
        if through.startswith(prompt):
            return prompt, through[len(prompt) :]
        if place := end_aside_space(through, prompt):
            return through[:place], through[place:]
        shared = self._shared(prompt, through)
        if not thinks and self._is_empty_block(number, prompt, shared):
            return prompt, through[shared:]
        raise ValueError(
            "the chat template rewrites the conversation, so generation would see another text than is trained: "
            f"its generation prompt goes on with {prompt[shared : shared + 40]!r} where the turn has "
            f"{through[shared : shared + 40]!r}; choose another --data.chat_template or arguments for this one "
            "(--data.template_arguments), or, if the model is to think first, give the turn a reasoning"
        )

    def _shared(self, prompt: str, through: str) -> int:
        """The number of characters with which both begin, without a part of a token."""
        shared = len(shared_prefix(prompt, through))
        opened = max(prompt.rfind(bracket, 0, shared) for bracket in "<[")
        return opened if opened >= 0 and not re.search(r"[>\]\s]", prompt[opened:shared]) else shared

    def _is_empty_block(self, number: int, prompt: str, shared: int) -> bool:
        """Whether the generation prompt goes on, where the turn does not, with a think block that is empty and closed.

        It is one if it is what the template puts around a reasoning; or what it adds where thinking is switched off;
        or an element that is opened and closed.
        """
        extra = "".join(prompt[shared:].split())
        opening, closing, _ = self._around_reasoning(number)
        if "".join((opening[shared:] + closing).split()) == extra or EMPTY_ELEMENT.fullmatch(extra):
            return True
        header = prompt[max(shared - 20, 0) : shared].strip()
        thinking = (self._prompt(self._turns[:number], **{switch: True}) for switch in self._switches())
        return any(text.rstrip().endswith(header) for text in thinking)

    def _switches(self) -> list[str]:
        return self.template.switches(bool(self.dialogue.tools), self.dialogue.arguments)

    def _around_reasoning(self, number: int) -> tuple[str, str, str]:
        """The text before a reasoning in turn `number`, what closes the reasoning, and all that follows it."""
        thinking = replace(self.messages[number], reasoning=f"{MARK}thought")
        answering = replace(thinking, content=f"{MARK}answer", tool_calls=())
        turns = [self.dialogue.dialect.turn(turn) for turn in (thinking, answering)]
        try:
            texts = [self._render([*self._turns[:number], turn]) for turn in turns]
        except ValueError:
            return "", "", ""
        opening, _, after = texts[0].partition(thinking.reasoning)
        return opening, shared_prefix(after, texts[1].partition(thinking.reasoning)[2]), after

    def has_influence(self, number: int) -> bool:
        """Whether the content of turn `number` changes the text: without it, and with another, the text is another."""
        for content in ("", f"{MARK}other"):
            other = self.dialogue.dialect.turn(replace(self.messages[number], content=content))
            with suppress(ValueError):
                if self._render([*self._turns[:number], other, *self._turns[number + 1 :]]) == self.whole:
                    return False
        return True

    def _prompt(self, before: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        return self._render(before, add_generation_prompt=True, **arguments)

    def _lost(self, number: int, text: str) -> str:
        """What of a turn is not in its text; empty if nothing is lost."""
        message = self.messages[number]
        for part, value in (("its reasoning", message.reasoning), ("its content", message.content)):
            if value.strip() and find_text(text, value) < 0:
                return part
        return next((part for part, value in said_in_calls(message) if find_leaf(text, value) < 0), "")

    def _empty_reasoning(self, number: int, prompt: str, text: str) -> int:
        """The length of the empty think block between the prompt and a turn without reasoning; 0 if there is none.

        Either the template has a generation prompt that ends behind it, or it is what the template puts around a
        reasoning, white space aside.
        """
        if not self.template.knows_reasoning:
            return 0
        for switch in self._switches():
            other = self._prompt(self._turns[:number], **{switch: False})
            if len(other) > len(prompt) and (prompt + text).startswith(other):
                return len(other) - len(prompt)
        opening, closing, after = self._around_reasoning(number)
        if not (closing.strip() and text.endswith(after) and opening.startswith(prompt.rstrip())):
            return 0
        head = text[: -len(after)]
        return len(head) + len(closing) if head.strip() == opening[len(prompt) :].strip() else 0

    def _rendering(
        self, text: str, answers: Mapping[int, Answer], covered: set[int], num_left_out: int = 0
    ) -> Rendering:
        turns: list[TrainedTurn] = []
        for number in sorted(covered):
            start = len(answers[number].prompt)
            end = start + len(answers[number].text)
            stop = self._stop(number, text, start, end)
            if stop is None and end >= len(text.rstrip()):
                text = text[:end] + self._what_follows(number)
                stop = self._stop(number, text, start, end)
            if stop is None:
                raise ValueError(
                    f"turn {number + 1}: the chat template ends the answer without a special token at which to stop"
                )
            turns.append(TrainedTurn(number, start, start + answers[number].written, stop))
        return Rendering(text, tuple(turns), num_left_out)

    def _stop(self, number: int, text: str, start: int, end: int) -> int | None:
        """Where the token ends at which the turn stops: its own last one, or the one that begins what follows."""
        if text.endswith(self.encoder.special_names, start, end):
            return end
        message, places = self.messages[number], [end]
        if message.content and not message.tool_calls:
            places = [start + find_text(text[start:end], message.content), end]
        for place in places:
            behind = place + len(text[place:]) - len(text[place:].lstrip())
            if stop := self.encoder.begins_with_special(text, behind):
                return stop
        return None

    def _what_follows(self, number: int) -> str:
        """The special token with which the template begins the turn after this one; empty if it begins with none.

        Both are rendered without reasoning, which templates take out of earlier turns; from what the turn says last on,
        the texts of one and of two turns are compared.
        """
        message, mark = self.messages[number], f"{MARK}said"
        calls = [*message.tool_calls]
        if calls:
            calls[-1] = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {"said": mark}}}
        this = replace(message, reasoning="", content=message.content if calls else mark, tool_calls=tuple(calls))
        following = Message("tool" if calls else "user", f"{MARK}next")
        turns = [self.dialogue.dialect.turn(each) for each in (this, following)]
        try:
            texts = [self._render([*self._turns[:number], *turns[:count]]) for count in (1, 2)]
        except ValueError:
            return ""
        shorter, longer = (text.partition(mark)[2] for text in texts)
        rest = longer[len(shorter.rstrip()) :] if longer.startswith(shorter.rstrip()) else ""
        return rest[: self.encoder.begins_with_special(rest, len(rest) - len(rest.lstrip()))]

    def _render(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **arguments: Any) -> str:
        dialogue = self.dialogue
        return self.template.render(turns, dialogue.tools, {**dialogue.arguments, **arguments}, add_generation_prompt)


def _stands_in(text: str, answer: Answer) -> bool:
    return text.startswith(answer.prompt) and text.startswith(answer.text, len(answer.prompt))
