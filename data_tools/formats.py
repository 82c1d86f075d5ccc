"""Rows -> conversations and documents, in every data format that Handloop reads."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from data_tools.messages import Message, turns_of
from data_tools.pairs import Row, Turns, is_blank, of_alpaca, of_pair, text_in
from data_tools.tool_calls import arguments_of, tools_of
from data_tools.values import is_absent

PAIR_NAMES = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))
# how columns of questions and of answers are called, the more telling names first
ASKED = (
    "prompt",
    "instruction",
    "question",
    "query",
    "user",
    "human",
    "input",
    "problem",
    "source",
    "context",
    "title",
)
ASKED += ("term", "request", "q", "frage", "pregunta")
ANSWERED = ("response", "completion", "answer", "output", "assistant", "reply", "chosen", "target", "solution", "label")
ANSWERED += ("definition", "summary", "a", "antwort", "respuesta")
MAPPED = "prompt_response by data.fields"  # among the formats that were found
SHARED_FIELDS = ("system", "tools", "chat_template_kwargs")  # read in every row that is a conversation


@dataclass(frozen=True)
class RowConversation:
    """What a row says of a conversation: its turns, the tools, and arguments for the chat template."""

    messages: Turns
    tools: tuple[dict[str, Any], ...] = ()
    template_arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Format:
    """A data format: how its rows are recognised and read; `text` rows become documents, all others conversations."""

    name: str
    fields: tuple[str, ...]  # required in every row
    optional: tuple[str, ...]  # read where present
    turns: Callable[[Row], Turns] | None  # None: a document
    is_mapped: bool = False  # by data.fields
    rank: int = 0  # the most specific has the lowest

    def matches(self, row: Row) -> bool:
        """Whether the row has this format's required fields; a null, which Arrow fills in, is none."""
        return all(row.get(name) is not None and row[name] != [] for name in self.fields)

    def is_in(self, row: Row) -> bool:
        """Whether the row has a value, if only an empty list, for each of the required fields."""
        return all(row.get(name) is not None for name in self.fields)

    def ignored_fields(self, row: Row) -> set[str]:
        """Fields of the row that have a value and that this format does not read."""
        ignored = set(row) - set(self.fields) - set(self.optional)
        return {name for name in ignored if not is_absent(row[name])}

    def read(self, row: Row) -> RowConversation | str:
        """The row's conversation or text; raises ValueError saying what cannot be read."""
        if self.turns is None:
            return text_in(row, self.fields[0])
        turns, system = self.turns(row), _system(row)
        if system and turns[0].role == "system":
            raise ValueError(f"there is a system prompt in 'system' and another in {self.fields[0]!r}; keep one")
        messages = (*system, *turns)
        if not any(message.train for message in messages):
            raise ValueError(f"{self.fields[-1]!r} has no assistant turn to train")
        arguments = arguments_of(row.get("chat_template_kwargs"), "chat_template_kwargs")
        return RowConversation(messages, tools_of(row.get("tools")), tuple(sorted(arguments.items())))


def detect(row: Row, wanted: str, field_map: Mapping[str, str]) -> Format:
    """The most specific format that the row has; raises ValueError naming the row's fields and the known ones."""
    candidates = _candidates(wanted, field_map.get("prompt", ""), field_map.get("response", ""))
    for candidate in candidates:
        if candidate.matches(row):
            return candidate
    empty = sorted({name for each in candidates if each.is_in(row) for name in each.fields if row[name] == []})
    if empty:
        raise ValueError(f"{' and '.join(map(repr, empty))} is an empty list; there is nothing to train")
    if {"chosen", "rejected"} <= row.keys():
        remedy = "rename that column to 'messages'"
        if not isinstance(row["chosen"], list):
            remedy = f"write --data.fields {proposed_fields(row)[0]} response=chosen"
        reason = "a row of preferences, 'chosen' and 'rejected', which are not compared here; to train what was chosen"
        raise ValueError(f"{reason}, {remedy}")
    null = _nulls(row, candidates)
    if null and "COLUMN" in "".join(proposed_fields(row)):  # no other column has it
        told = f"{' and '.join(map(repr, null))} {'are' if len(null) > 1 else 'is'} null"
        raise ValueError(f"{told}; there is nothing to train")
    known = "; ".join(" and ".join(map(repr, candidate.fields)) for candidate in candidates)
    reason = f"unknown fields ({fields_with_values(row)}); known are {known}"
    if wanted in ("auto", "prompt_response"):
        reason += f"; name others with --data.fields {' '.join(proposed_fields(row))}"
    raise ValueError(reason)


def _nulls(row: Row, candidates: Sequence[Format]) -> list[str]:
    """Fields without a value of formats whose others have one."""
    whole = [each.fields for each in candidates if {*each.fields} <= row.keys()]
    partly = [fields for fields in whole if any(row[name] is not None for name in fields)]
    return sorted({name for fields in partly for name in fields if row[name] is None})


def proposed_fields(row: Row) -> tuple[str, str]:
    """`prompt=COLUMN` and `response=COLUMN`, by the columns' names, or as the only two texts; quoted for a shell."""
    texts = [str(name) for name, value in row.items() if isinstance(value, str | list) and value and name != "rejected"]
    plain = {re.sub(r"[^a-z]", "", name.lower()): name for name in texts}
    asked = next((plain[word] for word in ASKED if word in plain), "")
    answered = next((plain[word] for word in ANSWERED if word in plain), "")
    if len(texts) == 2 and not (asked and answered):
        asked = asked or next(name for name in texts if name != answered)
        answered = next(name for name in texts if name != asked)
    if not (asked and answered):
        return "prompt=COLUMN", "response=COLUMN"
    return shlex.quote(f"prompt={asked}"), shlex.quote(f"response={answered}")


def fields_with_values(row: Row) -> str:
    """The names of a row's fields that are not null, for a message."""
    return ", ".join(sorted(str(name) for name, value in row.items() if value is not None)) or "none"


@cache
def _candidates(wanted: str, prompt: str, response: str) -> list[Format]:
    """The formats of this name, or all; kept, as every row asks for them."""
    return [candidate for candidate in _formats(prompt, response) if wanted in ("auto", candidate.name)]


def _formats(prompt: str, response: str) -> list[Format]:
    """All formats, the most specific first; two columns' names add a prompt/response format."""
    optional = ("history", *SHARED_FIELDS)
    pairs = [Format("prompt_response", pair, optional, partial(of_pair, *pair)) for pair in PAIR_NAMES]
    mapped: list[Format] = []
    if prompt:
        named = prompt, response
        mapped.append(Format("prompt_response", named, optional, partial(of_pair, *named), is_mapped=True))
    formats = [
        *mapped,
        Format("messages", ("messages",), SHARED_FIELDS, partial(_listed, "messages")),
        Format("sharegpt", ("conversations",), SHARED_FIELDS, partial(_listed, "conversations")),
        Format("alpaca", ("instruction", "output"), ("input", "history", *SHARED_FIELDS), of_alpaca),
        *pairs,
        Format("text", ("text",), (), None),
    ]
    return [replace(each, rank=rank) for rank, each in enumerate(formats)]


def _listed(field: str, row: Row) -> Turns:
    return turns_of(row[field], field)


def _system(row: Row) -> Turns:
    return () if is_blank(row.get("system")) else (Message("system", text_in(row, "system")),)
