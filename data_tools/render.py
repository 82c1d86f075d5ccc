"""Conversations -> token ids and which are trained, made together: no marker is searched for in the ids later."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from operator import itemgetter
from typing import Any, Literal

from data_tools.chat_template import ChatTemplate
from data_tools.dialogue import Dialogue, DialogueText
from data_tools.encode import Encoded, Encoder, SpelledTokens
from data_tools.locate import THOUGHT, find_leaf, find_value, said_in_calls, unread_in_tool
from data_tools.messages import Message
from data_tools.questions import MAX_SHAPES, Questions, with_sentinels
from data_tools.records import Conversation
from data_tools.samples import Sample
from data_tools.turns import History, Rendering, TrainedTurn, renderings_of

MAX_TOOLS = 1024  # sets of definitions that are remembered
# what data.leave_out takes away, and how it is named where a template loses it
LEFT_OUT = {"reasoning": r"its reasoning$", "system": r"the system turn's content$", "tools": r"of tool \d+$"}


@dataclass(frozen=True)
class RenderSettings:
    """What decides how a conversation is rendered, beside its tokenizer and template."""

    arguments: Mapping[str, Any] = field(default_factory=dict)  # for the chat template
    today: date = date(2000, 1, 1)
    history: History = "each"
    empty_reasoning: Literal["mask", "train"] = "mask"
    leave_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """The samples of a conversation, and what is to be said about it."""

    samples: list[Sample]
    num_left_out: int = 0  # trained turns that data.history leaves out
    num_empty_reasonings: int = 0  # trained turns with an empty think block
    unread: tuple[str, ...] = ()  # keys of its turns that the template does not read


class ConversationRenderer:
    """Renders conversations with one tokenizer, template and settings."""

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        self.settings = settings
        self.template = ChatTemplate(tokenizer, settings.arguments, settings.today)
        self.encoder = Encoder(tokenizer)
        self.questions = Questions(self.template)
        self._unread_tools: dict[str, tuple[str, ...]] = {}
        self._num_specials: dict[tuple[str, tuple[bool, ...]], list[int]] = {}  # in each text of a shape's sentinels

    def render(self, conversation: Conversation) -> Rendered:
        """Samples in which exactly the turns marked `train`, with the tokens that end them, are trained.

        Raises ValueError, naming the turn, where the template loses a part of the conversation, where what is trained
        is not what generation would see, or where nothing ends an answer; TimeoutError where the template does not end.
        """
        conversation = self._wanted(conversation)
        apart = _with_thoughts_apart(conversation, self.template.knows_reasoning)
        if apart != conversation:
            with suppress(ValueError):  # a template without reasoning leaves it in the content
                return self._rendered(apart)
        return self._rendered(conversation)

    def _rendered(self, conversation: Conversation) -> Rendered:
        spelled = self._spelled(conversation)
        verdict = self.questions.ask(conversation)
        if verdict.lost:
            lost = _listed(verdict.lost)
            raise ValueError(f"{lost} would be lost: the chat template leaves it out; {_ways_out(verdict.lost)}")
        dialogue = Dialogue(
            conversation.messages, conversation.tools, dict(conversation.template_arguments), verdict.dialect
        )
        if spelled is not None:
            dialogue = _hidden(dialogue, spelled)
        texts = DialogueText(self.template, self.encoder, dialogue)
        renderings = renderings_of(texts, self.settings.history, self.settings.empty_reasoning == "mask")
        self._check_context(texts, renderings)
        encoded = [self._apart(rendering, self._encoded(rendering, spelled), spelled) for rendering in renderings]
        self._check_specials(conversation, dialogue, encoded)
        samples = [
            self._sample(conversation, rendering, each, spelled)
            for rendering, each in zip(renderings, encoded, strict=True)
        ]
        return Rendered(
            samples,
            num_left_out=sum(rendering.num_left_out for rendering in renderings),
            num_empty_reasonings=sum(turn.written > turn.start for each in renderings for turn in each.turns),
            unread=(
                *verdict.unread,
                *(key for message in conversation.messages for key in message.ignored),
                *self._unread_in_tools(dialogue.tools, renderings),
            ),
        )

    def _wanted(self, conversation: Conversation) -> Conversation:
        """The conversation without what data.leave_out names."""
        unwanted = self.settings.leave_out
        if not unwanted:
            return conversation
        messages = conversation.messages
        if "system" in unwanted:
            messages = tuple(message for message in messages if message.role != "system")
        if "reasoning" in unwanted:
            messages = tuple(replace(message, reasoning="") for message in messages)
        tools = () if "tools" in unwanted else conversation.tools
        return replace(conversation, messages=messages, tools=tools)

    def _spelled(self, conversation: Conversation) -> SpelledTokens | None:
        """The special tokens that the conversation's strings spell, at every depth; None, as a rule, for none."""
        strings = "\n".join(_strings(conversation))
        pattern = self.encoder.special_pattern
        return SpelledTokens(pattern, strings) if pattern.search(strings) else None

    def _check_context(self, texts: DialogueText, renderings: Sequence[Rendering]) -> None:
        """Raises ValueError if a text does not show what was said before a trained turn, which the model is to read."""
        text = "\n".join(rendering.text for rendering in renderings)
        last = max(turn.number for rendering in renderings for turn in rendering.turns)
        for number, message in enumerate(texts.messages[:last]):
            if message.role == "assistant":  # an earlier answer's thought may be gone, as in generation
                lost = next((part for part, value in said_in_calls(message) if find_leaf(text, value) < 0), "")
            else:
                is_shown = not message.content.strip() or find_value(text, message.content) >= 0
                lost = "" if is_shown else f"the {message.role} turn's content"
            if lost:
                lost, ways_out = f"turn {number + 1}: {lost}", _ways_out([lost])
                raise ValueError(f"{lost} would be lost or changed by the chat template; {ways_out}")

    def _unread_in_tools(self, tools: Sequence[dict[str, Any]], renderings: Sequence[Rendering]) -> tuple[str, ...]:
        """What the template leaves out of the tools' definitions, which are often the same in all rows."""
        if not tools:
            return ()
        key = repr(tools)
        if key not in self._unread_tools:
            if len(self._unread_tools) >= MAX_TOOLS:
                self._unread_tools.clear()
            lost = {f"tools.{name}" for tool in tools for name in unread_in_tool(tool, renderings[-1].text)}
            self._unread_tools[key] = tuple(sorted(lost))
        return self._unread_tools[key]

    def _check_specials(self, conversation: Conversation, dialogue: Dialogue, found: Sequence[Encoded]) -> None:
        """Raises ValueError if the template has made special tokens of the data, by changing or joining strings.

        Conversations of one shape have as many special tokens as the same with sentinels, but for the arguments of
        calls, of which each may have its own.
        """
        if any(message.tool_calls for message in conversation.messages) or conversation.tools:
            return
        shape = self.questions.shape_of(conversation), tuple(message.train for message in conversation.messages)
        if shape not in self._num_specials:
            if len(self._num_specials) >= MAX_SHAPES:
                self._num_specials.clear()
            sentinels = replace(dialogue, messages=with_sentinels(conversation))
            texts = DialogueText(self.template, self.encoder, sentinels)
            try:
                renderings = renderings_of(texts, self.settings.history, self.settings.empty_reasoning == "mask")
                counts = [self._count(self.encoder.encode(rendering.text)) for rendering in renderings]
            except ValueError:  # it takes the data alone
                counts = []
            self._num_specials[shape] = counts
        expected = self._num_specials[shape]
        if len(expected) == len(found) and expected != list(map(self._count, found)):
            raise ValueError("the chat template makes a special token of what the conversation says; take it out")

    def _count(self, encoded: Encoded) -> int:
        """The number of special tokens."""
        return sum(map(self.encoder.special.__contains__, encoded.ids))

    def _encoded(self, rendering: Rendering, spelled: SpelledTokens | None) -> Encoded:
        if spelled is not None and spelled.are_escaped(rendering.text):
            raise ValueError("it spells a special token that the chat template escapes, so it cannot be kept as text")
        return self.encoder.encode(rendering.text, spelled)

    def _apart(self, rendering: Rendering, encoded: Encoded, spelled: SpelledTokens | None) -> Encoded:
        """The text with its last answer encoded apart, as in generation, where they merge; an earlier one may not."""
        turn = rendering.turns[-1]
        if spelled is not None or not self._merges(rendering.text, encoded, turn, spelled):
            return encoded
        return self.encoder.encode_apart(rendering.text, turn.written) or encoded

    def _merges(self, text: str, encoded: Encoded, turn: TrainedTurn, spelled: SpelledTokens | None) -> bool:
        """Whether the prompt has other tokens alone, where generation begins, than before the answer."""
        first = bisect_right(encoded.offsets, turn.written, key=itemgetter(1))
        if text[encoded.offsets[first][0] : turn.written].strip():
            return True
        return not self.encoder.is_prefix(encoded, text, turn.written, first, spelled)

    def _sample(
        self, conversation: Conversation, rendering: Rendering, encoded: Encoded, spelled: SpelledTokens | None
    ) -> Sample:
        trained = [False] * len(encoded.ids)
        questions = []
        for turn in rendering.turns:
            try:
                first, last = self._tokens(rendering.text, encoded, turn, spelled)
            except ValueError as error:
                raise ValueError(f"turn {turn.number + 1}: {error}") from None
            trained[first : last + 1] = [True] * (last + 1 - first)
            if first and trained[first - 1]:  # an answer behind an answer, with nothing that is asked between
                continue
            questions.append(conversation.messages[turn.number - 1].content if turn.number else "")
        return Sample(conversation.source, encoded.ids, trained, tuple(questions))

    def _tokens(self, text: str, encoded: Encoded, turn: TrainedTurn, spelled: SpelledTokens | None) -> tuple[int, int]:
        """Indices of the first token that the model writes in a turn, and of the turn's end token."""
        offsets = encoded.offsets
        first = bisect_right(offsets, turn.written, key=itemgetter(1))
        if self._merges(text, encoded, turn, spelled):
            raise ValueError(
                "the tokenizer merges the end of the prompt with the beginning of the answer, often a newline or a "
                "space, which only the last answer of a sample may begin with; take it out"
            )
        last = bisect_left(offsets, turn.end, key=itemgetter(0)) - 1
        if last < first or encoded.ids[last] not in self.encoder.special:
            raise ValueError("the chat template ends the answer without a special token at which to stop")
        return first, last


def _with_thoughts_apart(conversation: Conversation, knows_reasoning: bool) -> Conversation:
    """The conversation with thoughts that begin a content as reasoning, since many templates have the tags elsewhere.

    An empty thought is none, for a template that knows any. Raises ValueError for a turn that has two.
    """

    def apart(number: int, message: Message) -> Message:
        content = message.content.lstrip()
        match = THOUGHT.match(content) if message.role == "assistant" else None
        if match is None:
            return message
        said = match["said"].strip()
        if said and message.reasoning.strip() not in ("", said):
            raise ValueError(f"turn {number}: it has two different reasonings, one of them in its content; keep one")
        rest = content[match.end() :].lstrip("\n")  # other white space is what was said
        if not said and not (knows_reasoning and rest.strip()):
            return message
        return replace(message, reasoning=match["said"].strip("\n") if said else message.reasoning, content=rest)

    messages = tuple(apart(number, message) for number, message in enumerate(conversation.messages, start=1))
    return replace(conversation, messages=messages)


def _strings(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message.content
        yield message.reasoning
        yield message.name
        yield message.tool_call_id
        if message.tool_calls or message.extra:
            yield json.dumps([message.tool_calls, message.extra], ensure_ascii=False)
    if conversation.tools or conversation.template_arguments:
        yield json.dumps([conversation.tools, conversation.template_arguments], ensure_ascii=False)


def _hidden(dialogue: Dialogue, spelled: SpelledTokens) -> Dialogue:
    """The dialogue with private characters in the place of the special tokens that its strings spell."""
    messages = tuple(
        replace(
            message,
            content=spelled.hide(message.content),
            reasoning=spelled.hide(message.reasoning),
            name=spelled.hide(message.name),
            tool_call_id=spelled.hide(message.tool_call_id),
            tool_calls=spelled.hide(message.tool_calls),
            extra=spelled.hide(message.extra),
        )
        for message in dialogue.messages
    )
    return replace(
        dialogue, messages=messages, tools=spelled.hide(dialogue.tools), arguments=spelled.hide(dialogue.arguments)
    )


def _listed(items: Sequence[str]) -> str:
    return " and ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def _ways_out(lost: Sequence[str]) -> str:
    """What helps where a template loses these parts; data.leave_out only where it takes all of them away."""
    found = [next((name for name, words in LEFT_OUT.items() if re.search(words, part)), "") for part in lost]
    left_out = f"leave it out with --data.leave_out {' '.join(dict.fromkeys(found))}, " if all(found) else ""
    return f"choose a --data.chat_template that has it, {left_out}or skip such rows with --data.on_error skip"
