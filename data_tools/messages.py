"""The border: a turn as people write it, in whichever trainer's spelling, becomes our `Message`, or is refused.

Nulls count as absent at every depth, and empty lists outside a call's arguments, because Arrow fills them in where only
other rows have a value.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.strict_json import parse_json

ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES |= dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool")
CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call, as JSON

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Whether a turn counts in the loss, under the names that trainers give it: true or 1 is trained
TRAINED_FLAGS = ("train", "weight", "training", "trainable", "loss", "loss_mask", "loss_weight", "train_on_turn")
MASKED_FLAGS = ("masked", "ignore_loss")  # true or 1 is not trained
# flags whose meaning differs between trainers, or that select parts of a turn: honouring one would be a guess
REFUSED_FLAGS = ("mask", "train_detail", "training_detail", "weights", "loss_weights")
FLAGS = {*TRAINED_FLAGS, *MASKED_FLAGS, *REFUSED_FLAGS}
READ_KEYS = FLAGS | {
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "name",
    "tool_call_id",
    *REASONING_KEYS,
}


@dataclass(frozen=True)
class Message:
    """One turn; `train` says whether the model is to learn to write it."""

    role: str
    content: str = ""
    train: bool = False
    reasoning: str = ""  # what the model thought before it answered
    tool_calls: tuple[dict[str, Any], ...] = ()  # {"type": "function", "function": {"name", "arguments": object}}
    name: str = ""  # of a tool, whose result this is
    tool_call_id: str = ""
    extra: tuple[tuple[str, Any], ...] = ()  # other keys of the turn, which the chat template may read


def turns_of(entries: Any, field: str, only_flagged: bool = False) -> tuple[Message, ...]:
    """The turns of a list, or of JSON text that holds one; raises ValueError naming the turn.

    Assistant turns are trained unless a flag says otherwise; with `only_flagged` none of them is without a flag.
    """
    if isinstance(entries, str):
        entries = _list_from_text(entries, field)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{field!r} must be a list of at least one turn, not {_kind(entries)}")
    turns = []
    for number, entry in enumerate(entries, start=1):
        try:
            turns.append(message_of(entry, only_flagged))
        except ValueError as error:
            raise ValueError(f"turn {number}: {error}") from None
    return tuple(turns)


def _list_from_text(text: str, field: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{field!r} must be a list of at least one turn, or JSON text of one; it is {error}") from None


def message_of(entry: Any, only_flagged: bool = False) -> Message:
    """A turn with `role`/`content` or `from`/`value`; raises ValueError saying what of it cannot be read."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"expected an object with role and content, not {_kind(entry)}")
    named = entry.get("role", entry.get("from"))
    is_call = named in CALL_ROLES
    role = "assistant" if is_call else ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        raise ValueError(f"unknown role {named!r}; known: {', '.join(sorted({*ROLES, *CALL_ROLES}))}")
    value = next((entry[key] for key in ("content", "value") if entry.get(key) is not None), None)
    if is_call:
        content, thought, calls = "", "", tool_calls_of(_json_or_same(value, "the call"))
    else:
        content, thought = _content(value, role)
        calls = tool_calls_of(entry.get("tool_calls")) or tool_calls_of(entry.get("function_call"))
    given = {_text(entry[key], key) for key in REASONING_KEYS if not is_absent(entry.get(key))}
    given |= {thought} if thought else set()
    if len(given) > 1:
        raise ValueError(f"it has two different reasonings ({', '.join(k for k in REASONING_KEYS if entry.get(k))})")
    if role != "assistant" and (given or calls):
        raise ValueError(f"a {role} turn cannot have {'reasoning' if given else 'tool calls'}; only assistant turns do")
    if not (content.strip() or calls or role == "tool"):
        raise ValueError("the content is empty" if value is not None else "it has no content")
    extra = {str(key): without_absent(value) for key, value in entry.items() if key not in READ_KEYS}
    if calls or extra:
        check_encodable([calls, extra])
    return Message(
        role,
        content,
        _is_trained(entry, role, only_flagged),
        reasoning=given.pop() if given else "",
        tool_calls=calls,
        name=_text(entry.get("name") or "", "name"),
        tool_call_id=str(entry.get("tool_call_id") or ""),
        extra=tuple((key, value) for key, value in extra.items() if not is_absent(value)),
    )


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions as templates expect them, from a list or JSON text; raises ValueError for anything else."""
    value = _json_or_same(value, "'tools'")
    if is_absent(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list of tool definitions, not {_kind(value)}")
    tools = []
    for number, tool in enumerate(value, start=1):
        tool = without_absent(_json_or_same(tool, f"tool {number}"))
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"tool {number} must be an object with a name")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    check_encodable(tools)
    return tuple(tools)


def arguments_of(value: Any, field: str) -> dict[str, Any]:
    """A row's arguments for the chat template; raises ValueError unless they are an object of options."""
    value = _json_or_same(value, f"{field!r}")
    if is_absent(value):
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{field!r} must be an object, not {_kind(value)}")
    check_arguments(value)
    check_encodable(value)
    return without_absent(value)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a template argument that would replace the conversation itself."""
    taken = sorted({"messages", "tools", "documents", "add_generation_prompt", "strftime_now"} & set(arguments))
    if taken:
        raise ValueError(f"a template argument cannot be named {taken[0]!r}; that is what the template is given anyway")


def tool_calls_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls with their arguments as objects; from a list or a single call, each an object or JSON text."""
    value = _json_or_same(value, "'tool_calls'")
    if is_absent(value):
        return ()
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, number) for number, call in enumerate(calls, start=1))


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    call = _json_or_same(call, f"call {number}")
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"call {number} must be an object with the name and arguments of a function")
    given = next((inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), {})
    is_text = isinstance(given, str)
    try:
        # what JSON text says was written; in an object Arrow may have filled in what other rows have
        arguments = (parse_json(given) if given.strip() else {}) if isinstance(given, str) else _without_nulls(given)
    except ValueError as error:
        raise ValueError(f"call {number}: the arguments are {error}") from None
    if not isinstance(arguments, dict):
        text = " in JSON text" if is_text else ""
        raise ValueError(f"call {number}: the arguments must be an object, not {_kind(arguments)}{text}")
    known = {"type", "function", "name", "arguments", "parameters"}
    rest = {key: value for key, value in call.items() if key not in known and not is_absent(value)}
    return {**rest, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def _content(value: Any, role: str) -> tuple[str, str]:
    """A turn's text and the reasoning in it: a string, or the joined parts of a list."""
    if isinstance(value, list):
        parts = [_part(part, number, role) for number, part in enumerate(value, start=1)]
        texts = ["".join(text for kind, text in parts if kind == wanted) for wanted in ("text", "reasoning")]
        return encodable(texts[0]), encodable(texts[1])
    if isinstance(value, Mapping) and role == "tool":
        return encodable(json.dumps(without_absent(value), ensure_ascii=False)), ""
    if value is None:
        return "", ""
    return _text(value, "content"), ""


def _part(part: Any, number: int, role: str) -> tuple[str, str]:
    """(text or reasoning, the text of a part of the content)."""
    if isinstance(part, str):
        return "text", part
    if isinstance(part, Mapping):
        kind = part.get("type") or "text"
        if kind == "text" and isinstance(part.get("text"), str):
            return "text", part["text"]
        if kind in ("thinking", "reasoning") and role == "assistant":
            names = (kind, "thinking", "reasoning", "text")
            inner = next((part[name] for name in names if not is_absent(part.get(name))), "")
            texts = inner if isinstance(inner, list) else [inner]
            return "reasoning", "".join(_part(text, number, "reasoning")[1] for text in texts)
        keys = ", ".join(sorted(key for key, value in part.items() if value is not None))
        if kind != "text":
            raise ValueError(f"part {number} of the content is of type {kind!r}; only text can be trained")
        raise ValueError(f"part {number} of the content has no text under 'text' (it has: {keys or 'nothing'})")
    if role == "tool":
        return "text", json.dumps(part, ensure_ascii=False)
    raise ValueError(f"part {number} of the content must be an object with a text, not {_kind(part)}")


def _is_trained(entry: Mapping[str, Any], role: str, only_flagged: bool) -> bool:
    flags: dict[str, bool] = {}
    for key in entry.keys() & FLAGS:
        value = entry[key]
        if is_absent(value):
            continue
        if key in REFUSED_FLAGS:
            raise ValueError(f"{key!r} means different things to different trainers; say train: true or train: false")
        if value not in (0, 1):  # True and False equal these
            wanted = "0 or 1" if key in ("weight", "loss_weight", "loss_mask") else "true or false"
            raise ValueError(f"{key!r} must be {wanted}, not {value!r}")
        flags[key] = bool(value) != (key in MASKED_FLAGS)
    if len(set(flags.values())) > 1:
        raise ValueError(f"its flags contradict each other: {', '.join(f'{key} {entry[key]!r}' for key in flags)}")
    wanted = next(iter(flags.values()), None)
    if role != "assistant" and wanted:
        # a row whose flags are all filled in says 1 for prompts, too, where the trainer masks them anyway
        raise ValueError(f"a {role} turn cannot be trained; only assistant turns are")
    return role == "assistant" and (wanted if wanted is not None else not only_flagged)


def is_absent(value: Any) -> bool:
    """Whether a value is what Arrow, or an exporter, puts where there is none."""
    return value is None or value == [] or value == {} or value == ""


def without_absent(value: Any) -> Any:
    """The value without nulls and empty lists, at every depth; what JSON has no type for, such as a date, as text."""
    if isinstance(value, Mapping):
        kept = {str(key): without_absent(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item != []}
    if isinstance(value, list | tuple):
        return [without_absent(item) for item in value if item is not None]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _without_nulls(value: Any) -> Any:
    """The value without nulls in objects, at every depth; an empty list, or a null in a list, is a call's own."""
    if isinstance(value, Mapping):
        return {str(key): _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _json_or_same(value: Any, what: str) -> Any:
    """The value that JSON text holds, or a value that is not text as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{what} is text, but {error}") from None


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the {key} must be a string, not {_kind(value)}")
    return encodable(value)


def encodable(text: str) -> str:
    """The text; raises ValueError if it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair; the text was cut or badly escaped"
        ) from None
    return text


def check_encodable(value: Any) -> None:
    """Raises ValueError if a string anywhere in a JSON-like value cannot be written as UTF-8."""
    if isinstance(value, str):
        encodable(value)
    elif isinstance(value, Mapping):
        check_encodable([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            check_encodable(item)


def _kind(value: Any) -> str:
    return type(value).__name__ if value != [] else "an empty list"
