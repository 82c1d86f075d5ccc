"""Rows of a question and an answer in two columns -> turns."""

import re
from collections.abc import Mapping
from typing import Any

from data_tools.messages import CALL_KEYS, CALL_ROLES, CONTENT_KEYS, ROLE_KEYS, ROLES, Message, turns_of
from data_tools.strict_json import parse_json
from data_tools.values import encodable, json_or_same

SAID_KEYS = CONTENT_KEYS | CALL_KEYS
PRINTED_TURNS = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)': .*?'(role|from|content|value)': ", re.DOTALL)

Row = Mapping[str, Any]
Turns = tuple[Message, ...]


def of_pair(prompt: str, response: str, row: Row) -> Turns:
    """A question and an answer: two strings, or lists of turns; in the question's, only flagged turns are trained.

    `history` is of earlier ones, as Alpaca's.
    """
    if row.get("label") is False and prompt == "prompt":
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
        asked = (*earlier, Message("user", text_in(row, prompt)))
    if isinstance(answer, list):
        return (*asked, *turns_of(answer, response))
    return (*asked, Message("assistant", text_in(row, response), train=True))


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
    if not all(isinstance(turn, Mapping) and SAID_KEYS & turn.keys() for turn in turns):
        return []
    named = [str(turn[key]).lower() for turn in turns for key in ROLE_KEYS & turn.keys()]
    # mails, too, are from somebody
    return turns if len(named) >= len(turns) and any(name in ROLES or name in CALL_ROLES for name in named) else []


def of_alpaca(row: Row) -> Turns:
    """Instruction and input become one user turn; the chat template replaces Alpaca's own prompt template."""
    question = text_in(row, "instruction")
    if not is_blank(row.get("input")):
        question += "\n\n" + text_in(row, "input")
    return (*_earlier(row), Message("user", question), Message("assistant", text_in(row, "output"), train=True))


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


def is_blank(value: Any) -> bool:
    """Whether a value is null, or text of white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_in(row: Row, name: str) -> str:
    """The text in a field; raises ValueError where there is none."""
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    return encodable(value)
