"""One answer as generation writes it: the prompt before it, its text, and the token at which generation stops."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from data_tools.dialogue import DialogueText
from data_tools.locate import end_aside_space, find_leaf, find_text, is_printed, said_in_calls, shared_prefix
from data_tools.messages import Message

EMPTY_THOUGHT = re.compile(r"\s*<(\w*(?:think|thought|reason)\w*)>\s*</\1>\s*")
EMPTY_ELEMENT = re.compile(r"(<|\[)(\w+)(>|\])\1/\2\3")
MARK = "\uf8ff"  # a private character, with which no answer begins
MAX_HEADERS = 8  # that one turn may have: a thought, calls and an answer have one each


@dataclass(frozen=True)
class Answer:
    """A turn as generation writes it, the last of its conversation."""

    prompt: str | None  # None where it is known to be the beginning of a text
    start: int  # its length
    text: str  # with the token that stops generation
    rest: str  # what the template writes behind it
    written: int  # where the text begins to be trained: behind an empty think block, or 0


class AnswerFinder:
    """Finds the answer in one turn of a dialogue."""

    def __init__(self, texts: DialogueText, number: int) -> None:
        self.texts, self.number = texts, number
        self.message = texts.messages[number]
        self.thinks = bool(self.message.reasoning)

    def find(self, masks_empty_reasoning: bool) -> Answer:
        """The answer; raises ValueError where it cannot be trained as it would be generated."""
        prompt, text = self._prompt_and_turn()
        if self.number == 0:
            begin = self._header_length(text)  # of a template that has no prompt for an empty conversation
            prompt, text = prompt + text[:begin], text[begin:]
        if lost := self._lost(text):
            raise ValueError(f"the chat template loses or changes {lost}, which was to be trained")
        written = self._empty_reasoning(prompt, text) if masks_empty_reasoning and not self.thinks else 0
        said, rest = self._stopped(text)
        return Answer(prompt, len(prompt), said, rest, written)

    def _prompt_and_turn(self) -> tuple[str, str]:
        """The generation prompt and what stands behind it; raises ValueError where generation would see another text.

        Tried in this order: as the template has it, for a turn with reasoning in its thinking mode; with other white
        space; behind an empty think block with which generation begins and which the turn does not show; and behind
        the prompt's header, where the template renders what came before otherwise once the turn is there.
        """
        for prompt, through in self._in_modes():
            if through.startswith(prompt):
                return prompt, through[len(prompt) :]
        prompt, through = self.texts.prompt(self.number), self.texts.through(self.number + 1)
        if place := end_aside_space(through, prompt):
            return through[:place], through[place:]
        shared = self._shared(prompt, through)
        if not self.thinks and self._is_empty_block(prompt, shared):
            return prompt, through[shared:]
        if (begin := self._behind_header(through)) >= 0:
            return prompt, through[begin:]
        raise ValueError(
            "the chat template rewrites the conversation, so generation would see another text than is trained: "
            f"its generation prompt goes on with {prompt[shared : shared + 40]!r} where the turn has "
            f"{through[shared : shared + 40]!r}; choose another --data.chat_template or arguments for this one "
            "(--data.template_arguments), or, if the model is to think first, give the turn a reasoning"
        )

    def _in_modes(self) -> Iterator[tuple[str, str]]:
        """(prompt, text through the turn) in the modes of the template, the likeliest first."""
        switched: list[dict[str, Any]] = [{switch: self.thinks} for switch in self.texts.switches()]
        for mode in [*switched, {}] if self.thinks else [{}, *switched]:
            with suppress(ValueError):
                prompt = self.texts.prompt(self.number, **mode)
                for given in ({}, mode) if mode else ({},):
                    # what the thinking mode alone shows is lost in the other, though an answer may have the same words
                    if not (self.thinks and switched) or self._shows_reasoning(given):
                        yield prompt, self.texts.through(self.number + 1, **given)

    def _shows_reasoning(self, mode: dict[str, Any]) -> bool:
        other = replace(self.message, reasoning=f"{MARK}thought")
        return f"{MARK}thought" in self.texts.with_last(self.number, other, **mode)

    def _shared(self, prompt: str, through: str) -> int:
        """The number of characters with which both begin, without a part of a token."""
        shared = len(shared_prefix(prompt, through))
        opened = max(prompt.rfind(bracket, 0, shared) for bracket in "<[")
        return opened if opened >= 0 and not re.search(r"[>\]\s]", prompt[opened:shared]) else shared

    def _is_empty_block(self, prompt: str, shared: int) -> bool:
        """Whether all that the prompt has and the turn has not is a think block that is empty and closed.

        It is one if it is what the template puts around a reasoning; or an element that is opened and closed; or what
        the template adds to a prompt where thinking is switched off.
        """
        extra = "".join(prompt[shared:].split())
        if EMPTY_ELEMENT.fullmatch(extra):
            return True
        opening, closing, _ = self._around_reasoning
        if "".join((opening[shared:] + closing).split()) == extra:
            return True
        plain = self._tail()
        for switch in self.texts.switches():
            thinking = self._tail(**{switch: True})
            if thinking and plain.startswith(thinking) and "".join(plain[len(thinking) :].split()) == extra:
                return True
        return False

    def _tail(self, **arguments: Any) -> str:
        """What the generation prompt writes behind the last thing said before the turn; empty if nothing was said."""
        if not self.number or not self.texts.messages[self.number - 1].content:
            return ""
        before = replace(self.texts.messages[self.number - 1], content=MARK)
        with suppress(ValueError):
            text = self.texts.with_last(self.number - 1, before, add_generation_prompt=True, **arguments)
            return text.partition(MARK)[2]
        return ""

    def _behind_header(self, through: str) -> int:
        """Where the turn begins in a text whose beginning is not the prompt: behind what the prompt ends with.

        The last place counts behind which the whole turn stands; -1 if there is none.
        """
        tail, place = self._tail(), len(through)
        for _ in range(MAX_HEADERS if tail.strip() else 0):
            place = through.rfind(tail, 0, place)
            if place < 0:
                return -1
            text = through[place + len(tail) :]
            if not self._lost(text):
                # behind a user's turn that looks alike the question would be trained, too
                asked = self.texts.messages[self.number - 1].content.strip()
                own = " ".join([self.message.content, self.message.reasoning, json.dumps(self.message.tool_calls)])
                return place + len(tail) if asked not in text or asked in own else -1
        return -1

    def _header_length(self, text: str) -> int:
        """The length of an assistant turn's header at the beginning of a text; 0 if none stands there."""
        try:
            asked = self.texts.with_last(0, Message("user", MARK), add_generation_prompt=True)
        except ValueError:
            return 0
        tail, begin = asked.partition(MARK)[2], len(text) - len(text.lstrip())
        headers = (tail[match.start() :] for match in self.texts.encoder.special_pattern.finditer(tail))
        return next((begin + len(header) for header in headers if text.startswith(header, begin)), 0)

    @cached_property
    def _around_reasoning(self) -> tuple[str, str, str]:
        """The text before a reasoning in this turn, what closes the reasoning, and all that follows it."""
        thinking = replace(self.message, reasoning=f"{MARK}thought")
        answering = replace(thinking, content=f"{MARK}answer", tool_calls=())
        try:
            texts = [self.texts.with_last(self.number, turn) for turn in (thinking, answering)]
        except ValueError:
            return "", "", ""
        opening, _, after = texts[0].partition(thinking.reasoning)
        return opening, shared_prefix(after, texts[1].partition(thinking.reasoning)[2]), after

    def _lost(self, text: str) -> str:
        """What of the turn is not in its text; empty if nothing is lost."""
        message = self.message
        for part, value in (("its reasoning", message.reasoning), ("its content", message.content)):
            if value.strip() and find_text(text, value) < 0:
                return part
        lost = next((part for part, value in said_in_calls(message) if find_leaf(text, value) < 0), "")
        return lost or ("an argument, printed as Python does" if is_printed(message, text) else "")

    def _empty_reasoning(self, prompt: str, text: str) -> int:
        """The length of the empty think block between the prompt and a turn without reasoning; 0 if there is none.

        Either the template has a generation prompt that ends behind it, or it is what the template puts around a
        reasoning, white space aside.
        """
        if not self.texts.template.knows_reasoning:
            return 0
        for switch in self.texts.switches():
            with suppress(ValueError):
                other = self.texts.prompt(self.number, **{switch: False})
                if len(other) > len(prompt) and (prompt + text).startswith(other):
                    return len(other) - len(prompt)
        block = EMPTY_THOUGHT.match(text)
        if block and not self.message.content.lstrip().startswith("<"):
            return block.end()
        opening, closing, after = self._around_reasoning
        if not (closing.strip() and text.endswith(after) and opening.startswith(prompt.rstrip())):
            return 0
        head = text[: -len(after)]
        return len(head) + len(closing) if head.strip() == opening[len(prompt) :].strip() else 0

    def _stopped(self, text: str) -> tuple[str, str]:
        """(the turn up to the token at which generation stops, what follows it); raises ValueError if there is none.

        It is the turn's own last token; or the one behind its content, where the template goes on; or, for a template
        that ends no turn, the one that begins the next.
        """
        encoder, said = self.texts.encoder, text.rstrip()
        repeats_prompt = self.texts.template.repeats_prompt
        if said.endswith(encoder.special_names) and not repeats_prompt:
            return said, text[len(said) :]
        content = self.message.content.strip()
        if content and not self.message.tool_calls and (place := text.rfind(content)) >= 0:
            stops = list(encoder.specials_at(text, place + len(content)))
            if len(stops) > 2 and repeats_prompt:  # more than one that ends this turn and one that begins another
                raise ValueError(
                    "the chat template begins another answer behind this one where none is asked for, so the token at "
                    "which generation stops cannot be told; choose another --data.chat_template"
                )
            if stops:
                return text[: stops[0]], text[stops[0] :]
        if follows := self._what_follows():
            return said + follows, ""
        raise ValueError(
            "the chat template ends the answer without a special token at which to stop; put {{ eos_token }} behind "
            "answers in a copy of the template, and give it with --data.chat_template"
        )

    def _what_follows(self) -> str:
        """The special token with which the template begins the turn after this one; empty if it begins with none.

        Both are rendered without reasoning, which templates take out of earlier turns; from what the turn says last on,
        the texts of one and of two turns are compared.
        """
        message, mark = self.message, f"{MARK}said"
        calls = [*message.tool_calls]
        if calls:
            calls[-1] = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {"said": mark}}}
        this = replace(message, reasoning="", content=message.content if calls else mark, tool_calls=tuple(calls))
        following = Message("tool" if calls else "user", f"{MARK}next")
        try:
            both = self.texts.with_last(self.number, this), self.texts.with_last(self.number, this, following)
        except ValueError:
            return ""
        shorter, longer = (text.partition(mark)[2] for text in both)
        rest = longer[len(shorter.rstrip()) :] if longer.startswith(shorter.rstrip()) else ""
        return rest[: next(self.texts.encoder.specials_at(rest, 0), 0)]
