"""Rows -> conversations and documents, in every data format that Handloop reads."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from data_tools.messages import CALL_KEYS, CONTENT_KEYS, ROLE_KEYS, Message, turns_of
from data_tools.strict_json import parse_json
from data_tools.tool_calls import arguments_of, tools_of
from data_tools.values import encodable, is_absent, json_or_same

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

SAID_KEYS = CONTENT_KEYS | CALL_KEYS
PRINTED_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)': .*?'(role|from|content|value)': ", re.DOTALL)

Row = Mapping[str, Any]
Turns = tuple[Message, ...]


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
            return _string(row, self.fields[0])
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
    candidates = [candidate for candidate in _formats(field_map) if wanted in ("auto", candidate.name)]
    for candidate in candidates:
        if candidate.matches(row):
            return candidate
    empty = sorted({name for each in candidates if each.is_in(row) for name in each.fields if row[name] == []})
    if empty:
        raise ValueError(f"{' and '.join(map(repr, empty))} is an empty list; there is nothing to train")
    if {"chosen", "rejected"} <= row.keys():
        column = "messages" if isinstance(row["chosen"], list) else "response"
        raise ValueError(
            "a row of preferences, 'chosen' and 'rejected', which is not for this training; to train what was chosen, "
            f"rename that column to {column!r}" + ("" if column == "messages" else " and its question to 'prompt'")
        )
    known = "; ".join(" and ".join(map(repr, candidate.fields)) for candidate in candidates)
    reason = f"unknown fields ({fields_with_values(row)}); known are {known}"
    if wanted in ("auto", "prompt_response"):
        reason += f"; name others with --data.fields {' '.join(proposed_fields(row))}"
    raise ValueError(reason)


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


def _formats(field_map: Mapping[str, str]) -> list[Format]:
    """All formats, the most specific first; a field map adds a prompt/response format with those field names."""
    optional = ("history", *SHARED_FIELDS)
    pairs = [Format("prompt_response", pair, optional, partial(_pair, *pair)) for pair in PAIR_NAMES]
    mapped: list[Format] = []
    if field_map:
        named = field_map["prompt"], field_map["response"]
        mapped.append(Format("prompt_response", named, optional, partial(_pair, *named), is_mapped=True))
    formats = [
        *mapped,
        Format("messages", ("messages",), SHARED_FIELDS, partial(_listed, "messages")),
        Format("sharegpt", ("conversations",), SHARED_FIELDS, partial(_listed, "conversations")),
        Format("alpaca", ("instruction", "output"), ("input", "history", *SHARED_FIELDS), _alpaca),
        *pairs,
        Format("text", ("text",), (), None),
    ]
    return [replace(each, rank=rank) for rank, each in enumerate(formats)]


def _listed(field: str, row: Row) -> Turns:
    return turns_of(row[field], field)


def _pair(prompt: str, response: str, row: Row) -> Turns:
    """A question and an answer: two strings, or lists of turns; in the question's, only flagged turns are trained.

    `history` is of earlier ones, as Alpaca's.
    """
    if row.get("label") is False:
        raise ValueError(
            "its 'label' is false: an answer that was not wanted (KTO); leave such rows out, or skip them with "
            "--data.on_error skip"
        )
    question, answer = row[prompt], row[response]
    if isinstance(question, str):
        question = turns_in_text(question, prompt) or question
    if isinstance(question, list) and isinstance(answer, str):
        # behind a question of text an answer is text, which may well be about turns
        answer = turns_in_text(answer, response) or answer
    earlier = _earlier(row)
    if isinstance(question, list):
        if earlier:
            raise ValueError(f"there are earlier turns in 'history' and others in {prompt!r}; keep one")
        asked = turns_of(question, prompt, only_flagged=True)
    else:
        asked = (*earlier, Message("user", _string(row, prompt)))
    if isinstance(answer, list):
        return (*asked, *turns_of(answer, response))
    return (*asked, Message("assistant", _string(row, response), train=True))


def turns_in_text(text: str, field: str) -> list[Any]:
    """The list of turns, or the turn, that JSON text holds; empty for any other text, such as JSON of other things.

    Raises ValueError where Python has printed a list of turns.
    """
    if not text.lstrip().startswith(("[", "{")):
        return []
    if PRINTED_TURNS.match(text):
        raise ValueError(f"{field!r} is a list of turns as Python prints it; write it as JSON")
    try:
        value = parse_json(text)
    except ValueError:
        return []
    turns = value if isinstance(value, list) else [value]
    return turns if turns and all(_is_turn(turn) for turn in turns) else []


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(ROLE_KEYS & value.keys()) and bool(SAID_KEYS & value.keys())


def _alpaca(row: Row) -> Turns:
    """Instruction and input become one user turn; the chat template replaces Alpaca's own prompt template."""
    question = _string(row, "instruction")
    if not _is_blank(row.get("input")):
        question += "\n\n" + _string(row, "input")
    return (*_earlier(row), Message("user", question), Message("assistant", _string(row, "output"), train=True))


def _earlier(row: Row) -> Turns:
    """The turns of `history`, a list of earlier [question, answer] pairs."""
    earlier: list[Message] = []
    for number, pair in enumerate(json_or_same(row.get("history"), "'history'") or (), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"'history', entry {number}: expected a list of a question and an answer")
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
        try:
            earlier += turns_of(turns, "history")
        except ValueError as error:
            raise ValueError(f"'history', entry {number}: {error}") from None
    return tuple(earlier)


def _system(row: Row) -> Turns:
    return () if _is_blank(row.get("system")) else (Message("system", _string(row, "system")),)


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _string(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    return encodable(value)
