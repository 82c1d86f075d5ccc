"""What a chat template does with each part of a conversation, asked with sentinels in the place of the data.

Answers depend on the conversation's shape (roles, and which parts each turn has), so each shape is asked once.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_tools.chat_template import DIALECTS, ChatTemplate, Dialect
from data_tools.locate import leaves
from data_tools.messages import Message
from data_tools.records import Conversation
from data_tools.template_files import has_word

# An object as Python prints it, or a part of a content as JSON; a template that was given text writes neither.
PRINTED = re.compile(r"""'zq\w+key7qz'|['"]type['"]: ?['"](text|thinking)['"]""")
MAX_SHAPES = 4096  # remembered; a data set seldom has more than a few hundred


@dataclass(frozen=True)
class Verdict:
    """How a template takes conversations of one shape: the dialect, what is lost, and keys of turns that it ignores."""

    dialect: Dialect
    lost: tuple[str, ...]  # "turn 2: its reasoning"
    unread: tuple[str, ...]  # keys of turns, once for each turn that has one


class Questions:
    """Asks one template; verdicts are kept by shape."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._verdicts: dict[str, Verdict] = {}

    def ask(self, conversation: Conversation) -> Verdict:
        """The verdict on conversations of this shape; what a template refuses altogether is lost in no dialect."""
        shape = self.shape_of(conversation)
        if shape not in self._verdicts:
            if len(self._verdicts) >= MAX_SHAPES:
                self._verdicts.clear()
            self._verdicts[shape] = self._asked(conversation)
        return self._verdicts[shape]

    def shape_of(self, conversation: Conversation) -> str:
        """Everything of a conversation but its strings, and what the template does not name; equal for those alike."""
        turns = [
            (message.role, bool(message.content.strip()), bool(message.reasoning), *self._more(message))
            for message in conversation.messages
        ]
        return repr((turns, len(conversation.tools), conversation.template_arguments))

    def _more(self, message: Message) -> tuple[Any, ...]:
        """What of a turn's shape most turns do not have."""
        if not (message.tool_calls or message.name or message.tool_call_id or message.extra):
            return ()
        told = {key: None if isinstance(value, str) else value for key, value in message.extra}
        return (
            [(sorted(call), _kinds(call["function"]["arguments"])) for call in message.tool_calls],
            bool(message.name),
            bool(message.tool_call_id),
            [(key, value if self.template.names(key) else None) for key, value in told.items()],
        )

    def _asked(self, conversation: Conversation) -> Verdict:
        sentinels = _Sentinels(conversation)
        best: tuple[int, Verdict] | None = None
        for dialect in DIALECTS:
            texts = self._texts(sentinels, dialect)
            if texts is None:
                continue
            lost = tuple(sentinels.lost(texts))
            verdict = Verdict(dialect, lost, tuple(sentinels.unread("".join(texts), self.template)))
            if not lost:
                return verdict
            if best is None or len(lost) < best[0]:
                best = len(lost), verdict
        # a template that refuses the sentinels may still take the data; if not, its own message says why
        return best[1] if best else Verdict(DIALECTS[0], (), ())

    def _texts(self, sentinels: "_Sentinels", dialect: Dialect) -> list[str] | None:
        """The text of the whole, and of each assistant turn as the last one; None where the template refuses it."""
        turns = [dialect.turn(message) for message in sentinels.messages]
        ends = [i for i, message in enumerate(sentinels.messages, start=1) if message.role == "assistant"]
        thinks = any(message.reasoning for message in sentinels.messages)
        switches = self.template.switches(bool(sentinels.tools), sentinels.arguments) if thinks else []
        texts = []
        for count in sorted({len(turns), *ends}, reverse=True):
            for arguments in ({}, *({switch: True} for switch in switches)):
                try:
                    given = {**sentinels.arguments, **arguments}
                    texts.append(self.template.render(turns[:count], sentinels.tools, given))
                except ValueError:
                    if count == len(turns) and not arguments:
                        return None
        # {'key': 'value'}: the template joins text, and was given an object
        return None if any(PRINTED.search(text) for text in texts) else texts


class _Sentinels:
    """A conversation whose strings are sentinels; the real names of roles, and what the template may test, stay."""

    def __init__(self, conversation: Conversation) -> None:
        self.arguments = dict(conversation.template_arguments)
        self._names: dict[str, str] = {}
        self.messages = tuple(self._message(i, message) for i, message in enumerate(conversation.messages, start=1))
        self.tools = [self._tool(number, tool) for number, tool in enumerate(conversation.tools, start=1)]

    def _message(self, number: int, message: Message) -> Message:
        sign = f"zq{number}"
        calls = [self._call(call, f"{sign}x{j}") for j, call in enumerate(message.tool_calls, start=1)]
        return replace(
            message,
            content=f"{sign}content7qz" if message.content.strip() else message.content,
            reasoning=f"{sign}thought7qz" if message.reasoning else "",
            tool_calls=tuple(calls),
            name=self._names.get(message.name, f"{sign}name7qz") if message.name else "",
            extra=tuple((key, f"{sign}{key}7qz" if isinstance(item, str) else item) for key, item in message.extra),
        )

    def _call(self, call: dict[str, Any], sign: str) -> dict[str, Any]:
        kinds = _kinds(call["function"]["arguments"]) or ["str"]
        arguments = {f"{sign}{kind}key7qz": _sentinel(kind, sign) for kind in kinds}
        return {**call, "function": {**call["function"], "name": self._name(call), "arguments": arguments}}

    def _name(self, call: Mapping[str, Any]) -> str:
        name = call["function"]["name"]
        return self._names.setdefault(name, f"zqfunction{len(self._names)}7qz")

    def _tool(self, number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
        real = tool["function"]["name"]
        name = self._names.setdefault(real, f"zqfunction{len(self._names)}7qz")
        field = {f"zqtool{number}field7qz": {"type": "string", "description": "zqfield7qz"}}
        parameters = {"type": "object", "properties": field, "required": list(field)}
        return {
            "type": "function",
            "function": {"name": name, "description": f"zqtool{number}described7qz", "parameters": parameters},
        }

    def lost(self, texts: list[str]) -> Iterator[str]:
        """What is in none of the texts."""
        text = "\n".join(texts)
        for number, tool in enumerate(self.tools, start=1):
            function = tool["function"]
            fields = function["parameters"]["properties"]
            if function["name"] not in text or not all(field in text for field in fields):
                yield f"the definition of tool {number}"
            elif function["description"] not in text:
                yield f"the description of tool {number}"
        for number, message in enumerate(self.messages, start=1):
            if message.content and message.content.startswith("zq") and message.content not in text:
                yield f"turn {number}: the {message.role} turn's content"
            if message.reasoning and message.reasoning not in text:
                yield f"turn {number}: its reasoning"
            yield from self._lost_calls(number, message, text)

    def _lost_calls(self, number: int, message: Message, text: str) -> Iterator[str]:
        for j, call in enumerate(message.tool_calls, start=1):
            function = call["function"]
            label = f"tool call {j}" if len(message.tool_calls) > 1 else "its tool call"
            # true and false may well be elsewhere in the text
            arguments = [str(leaf) for leaf in leaves(function["arguments"]) if not isinstance(leaf, bool)]
            if not any(leaf in text for leaf in arguments) and not self._is_named_in_call(function["name"], text):
                yield f"turn {number}: {label}"
            elif not all(leaf in text for leaf in (function["name"], *arguments)):
                yield f"turn {number}: the arguments of {label}"

    def _is_named_in_call(self, name: str, text: str) -> bool:
        return name in text and not self.tools  # a definition has the name, too

    def unread(self, text: str, template: ChatTemplate) -> Iterator[str]:
        """Keys of turns that cannot have had an influence on the text."""
        source = template.source(bool(self.tools))
        for message in self.messages:
            known = {"name": message.name, "tool_call_id": message.tool_call_id}
            for key, value in (*((k, v) for k, v in known.items() if v), *message.extra):
                is_named = has_word(source, key)
                is_sentinel = isinstance(value, str) and value.startswith("zq")
                if not is_named or (is_sentinel and value not in text):
                    yield key
            for call in message.tool_calls:
                keys = {*call, *call["function"]} - {"type", "id", "function", "name", "arguments"}
                yield from (f"tool_calls.{key}" for key in sorted(keys) if not has_word(source, key))
        for name in template.unread_arguments(self.arguments):
            yield f"chat_template_kwargs.{name}"


def _kinds(arguments: Mapping[str, Any]) -> list[str]:
    """The kinds of JSON values among a call's arguments, since a template may write one and not another."""
    return sorted({type(value).__name__ for value in arguments.values()})


def _sentinel(kind: str, sign: str) -> Any:
    """A value of a kind that is nowhere else in a text; true and null are what they are."""
    number = 90_000_000 + int("".join(filter(str.isdigit, sign)))
    values = {"str": f"{sign}value7qz", "int": number, "float": number + 0.25, "bool": True, "list": [f"{sign}item7qz"]}
    return values.get(kind) if kind != "dict" else {f"{sign}innerkey7qz": f"{sign}inner7qz"}


def with_sentinels(conversation: Conversation) -> tuple[Message, ...]:
    """The conversation's turns with sentinels in the place of their strings."""
    return _Sentinels(conversation).messages
