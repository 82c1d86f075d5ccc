"""Rows -> conversations and documents, in every data format that Handloop reads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PAIR_NAMES = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"), ("input", "output"))
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SHAREGPT_ROLES |= {"tool": "tool", "observation": "tool", "function_response": "tool"}


@dataclass(frozen=True)
class Message:
    """One turn; `train` says whether the model is to learn to write it."""

    role: str
    content: str
    train: bool = False
    extra: tuple[tuple[str, Any], ...] = ()  # other fields for the chat template, such as tool calls

    def as_turn(self) -> dict[str, Any]:
        """The turn as a chat template expects it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


Row = Mapping[str, Any]
Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Format:
    """A data format: how its rows are recognised and read; `text` rows become documents, all others conversations."""

    name: str
    fields: tuple[str, ...]  # required in every row
    optional: tuple[str, ...]  # read where present
    read: Callable[[Row], Turns | str]

    def matches(self, row: Row) -> bool:
        """Whether the row has this format's required fields."""
        return all(name in row for name in self.fields)

    def ignored_fields(self, row: Row) -> set[str]:
        """Fields of the row that this format does not read."""
        return set(row) - set(self.fields) - set(self.optional)


def detect(row: Row, wanted: str, field_map: Mapping[str, str]) -> Format:
    """The format of a data set, from its first row; raises ValueError naming the row's fields and the known ones."""
    candidates = [candidate for candidate in _formats(field_map) if wanted in ("auto", candidate.name)]
    for candidate in candidates:
        if candidate.matches(row):
            return candidate
    known = "; ".join(" and ".join(map(repr, candidate.fields)) for candidate in candidates)
    found = ", ".join(sorted(map(str, row))) or "none"
    raise ValueError(f"unknown fields ({found}); known are {known}; name others with --data.fields")


def _formats(field_map: Mapping[str, str]) -> list[Format]:
    """All formats, the most specific first; a field map is a prompt/response format with those field names."""
    pairs = [(field_map["prompt"], field_map["response"])] if field_map else PAIR_NAMES
    return [
        *(Format("prompt_response", pair, ("system",), _pair(*pair)) for pair in pairs if field_map),
        Format("messages", ("messages",), ("tools",), lambda row: _turns(row["messages"], "messages")),
        Format("sharegpt", ("conversations",), ("system", "tools"), _sharegpt),
        Format("alpaca", ("instruction", "output"), ("input", "system"), _alpaca),
        *(Format("prompt_response", pair, ("system",), _pair(*pair)) for pair in pairs if not field_map),
        Format("text", ("text",), (), lambda row: _string(row, "text")),
    ]


def _pair(prompt: str, response: str) -> Callable[[Row], Turns]:
    def read(row: Row) -> Turns:
        question, answer = _string(row, prompt), _string(row, response)
        return (*_system(row), Message("user", question), Message("assistant", answer, train=True))

    return read


def _alpaca(row: Row) -> Turns:
    """Instruction and input become one user turn; the chat template replaces Alpaca's own prompt template."""
    question = _string(row, "instruction")
    if row.get("input"):
        question += "\n\n" + _string(row, "input")
    return (*_system(row), Message("user", question), Message("assistant", _string(row, "output"), train=True))


def _sharegpt(row: Row) -> Turns:
    return (*_system(row), *_turns(row["conversations"], "conversations"))


def _system(row: Row) -> Turns:
    return (Message("system", _string(row, "system")),) if row.get("system") else ()


def _turns(entries: Any, field: str) -> Turns:
    """Turns with `role`/`content` or `from`/`value`; `train: false` or `weight: 0` masks an assistant turn."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{field!r} must be a list of at least one turn")
    turns = []
    for number, entry in enumerate(entries, start=1):
        try:
            turns.append(_turn(entry))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
    if not any(turn.train for turn in turns):
        raise ValueError(f"{field!r} has no assistant turn to train")
    return tuple(turns)


def _turn(entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object with role and content, not {type(entry).__name__}")
    named = entry.get("role", entry.get("from"))
    role = SHAREGPT_ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"unknown role {named!r}; known: {', '.join(sorted(SHAREGPT_ROLES))}")
    # Arrow fills in None for keys that only other rows have
    extra = tuple((key, entry[key]) for key in ("tool_calls", "name", "tool_call_id") if entry.get(key) is not None)
    content = _content(entry.get("content", entry.get("value")), has_tool_calls="tool_calls" in dict(extra))
    return Message(role, content, _is_trained(entry, role), extra)


def _content(value: Any, has_tool_calls: bool) -> str:
    """A turn's text: a string, or the joined parts of a list; only a turn with tool calls may have none."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if value is None and has_tool_calls:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the content must be a string, not {type(value).__name__}")
    if not value.strip() and not has_tool_calls:
        raise ValueError("the content is empty")
    return _encodable(value)


def _is_trained(entry: Row, role: str) -> bool:
    given = entry.get("train")
    weight = entry.get("weight")
    if given is not None and not isinstance(given, bool):
        raise ValueError(f"'train' must be true or false, not {given!r}")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"'weight' must be 0 or 1, not {weight!r}")
    wanted = given if given is not None else weight != 0
    if role != "assistant" and (given or weight):
        raise ValueError(f"a {role} turn cannot be trained; only assistant turns are")
    return role == "assistant" and wanted


def _string(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name!r} is empty")
    return _encodable(value)


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair; the text was cut or badly escaped"
        ) from None
    return text
