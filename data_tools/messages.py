"""The border: a turn as people write it, in whichever trainer's spelling, becomes our `Message`, or is refused."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from data_tools.strict_json import parse_json
from data_tools.tool_calls import tool_calls_of
from data_tools.values import check_plain, encodable, is_absent, json_or_same, kind_of, without_absent, without_nulls

ROLES = {name: name for name in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES |= dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool")
CALL_ROLES = ("function_call", "tool_call")  # an assistant turn whose text is the call, as JSON

# names for one thing; a turn has one of each
ROLE_KEYS, CONTENT_KEYS, CALL_KEYS = {"role", "from"}, {"content", "value"}, {"tool_calls", "function_call"}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Whether a turn counts in the loss, under the names that trainers give it: true or 1 is trained
TRAINED_FLAGS = ("train", "weight", "training", "trainable", "loss", "loss_mask", "loss_weight", "train_on_turn")
MASKED_FLAGS = ("masked", "ignore_loss")  # true or 1 is not trained
# flags whose meaning differs between trainers, or that select parts of a turn: honouring one would be a guess
REFUSED_FLAGS = ("mask", "train_detail", "training_detail", "weights", "loss_weights")
PART_KEYS = {"type", "text", "thinking", "reasoning"}
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
    ignored: tuple[str, ...] = ()  # keys of the content's parts that nothing reads, such as "content.cache_control"


def turns_of(entries: Any, field: str, only_flagged: bool = False) -> tuple[Message, ...]:
    """The turns of a list, or of JSON text that holds one; raises ValueError naming the turn.

    Assistant turns are trained unless a flag says otherwise; with `only_flagged` none of them is without a flag.
    """
    if isinstance(entries, str):
        entries = _list_from_text(entries, field)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{field!r} must be a list of at least one turn, not {kind_of(entries)}")
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
        raise ValueError(f"expected an object with role and content, not {kind_of(entry)}")
    named = _one_of(entry, ROLE_KEYS)
    is_call = named in CALL_ROLES
    role = "assistant" if is_call else ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        hint = f"write {named.lower()!r}; " if isinstance(named, str) and named.lower() in ROLES else ""
        raise ValueError(f"unknown role {named!r}; {hint}known: {', '.join(sorted({*ROLES, *CALL_ROLES}))}")
    value = _one_of(entry, CONTENT_KEYS)
    if is_call:
        content, thought, calls = "", "", _calls_of_role(value, _one_of(entry, CALL_KEYS))
    else:
        content, thought = _content(value, role)
        calls = tool_calls_of(_one_of(entry, CALL_KEYS))
    given = {_text(entry[key], key) for key in REASONING_KEYS if key in entry and not is_absent(entry[key])}
    given = {text for text in (*given, thought) if text.strip()}
    if len(given) > 1:
        raise ValueError(f"it has two different reasonings ({', '.join(k for k in REASONING_KEYS if entry.get(k))})")
    if role != "assistant" and (given or calls):
        raise ValueError(f"a {role} turn cannot have {'reasoning' if given else 'tool calls'}; only assistant turns do")
    if not (content.strip() or calls or role == "tool" or (role in ("system", "developer") and value is not None)):
        keys = ", ".join(sorted(str(key) for key, item in entry.items() if item is not None))
        raise ValueError("the content is empty" if value is not None else f"it has no content (it has: {keys})")
    extra = {str(key): without_absent(value) for key, value in entry.items() if key not in READ_KEYS}
    if calls or extra:
        check_plain([calls, extra])
    return Message(
        role,
        content,
        _is_trained(entry, role, only_flagged),
        reasoning=given.pop() if given else "",
        tool_calls=calls,
        name=_text(entry.get("name") or "", "name"),
        tool_call_id=encodable(str(entry.get("tool_call_id") or "")),
        extra=tuple((key, value) for key, value in extra.items() if not is_absent(value)),
        ignored=_ignored(value) if role != "tool" or _is_typed(value) else (),
    )


def _calls_of_role(content: Any, beside: Any) -> tuple[dict[str, Any], ...]:
    """The calls of a turn whose role says that it is one: its content, or what stands beside it."""
    calls, others = tool_calls_of(json_or_same(content, "the call")), tool_calls_of(beside)
    if calls and others and calls != others:
        raise ValueError("it has a call in its content and another beside it; keep one")
    return calls or others


def _one_of(entry: Mapping[str, Any], keys: Set[str]) -> Any:
    """The value that is there under one of several names; raises ValueError if there are two different ones."""
    if len(keys & entry.keys()) < 2:  # as in nearly all rows
        return next((entry[key] for key in keys if key in entry), None)
    found = {key: entry[key] for key in keys if not is_absent(entry.get(key))}
    values = list(found.values())
    same = [ROLES.get(value, value) if keys is ROLE_KEYS and isinstance(value, str) else value for value in values]
    if any(value != same[0] for value in same[1:]):
        raise ValueError(f"it has {' and '.join(map(repr, sorted(found)))}, which differ; keep one")
    return values[0] if values else next((entry[key] for key in keys if entry.get(key) is not None), None)


def _content(value: Any, role: str) -> tuple[str, str]:
    """A turn's text and the reasoning before it: a string, or the joined parts of a list.

    A tool's result may be any JSON value; what is no text and no list of texts is spelled as JSON.
    """
    if value is None or value == []:
        return "", ""
    if role == "tool" and not isinstance(value, str) and not _is_typed(value):
        result = without_nulls(value)
        check_plain(result)
        return json.dumps(result, ensure_ascii=False), ""
    if not isinstance(value, list):
        return _text(value, "content"), ""
    parts = [_part(part, number, role) for number, part in enumerate(value, start=1)]
    thoughts = [text for kind, text in parts if kind == "reasoning"]
    if any(kind == "reasoning" for kind, _ in parts[len(thoughts) :]):
        raise ValueError("a part of its reasoning follows a text; templates know reasoning before the answer alone")
    texts = [text for kind, text in parts if kind == "text"]
    return encodable("".join(texts)), encodable("\n\n".join(thoughts))


def _is_typed(value: Any) -> bool:
    """Whether a tool's result is a list of parts, and not any list."""
    return isinstance(value, list) and all(isinstance(part, Mapping) and "type" in part for part in value)


def _ignored(value: Any) -> tuple[str, ...]:
    """The keys of a content's parts that are not read."""
    parts = [part for part in value if isinstance(part, Mapping)] if isinstance(value, list) else []
    found = {key for part in parts for key, item in part.items() if key not in PART_KEYS and not is_absent(item)}
    return tuple(f"content.{key}" for key in sorted(found))


def _part(part: Any, number: int, role: str) -> tuple[str, str]:
    """(text or reasoning, the text of a part of the content)."""
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, Mapping):
        raise ValueError(f"part {number} of the content must be an object with a text, not {kind_of(part)}")
    kind = part.get("type") or "text"
    is_thought = kind in ("thinking", "reasoning") and role == "assistant"
    if kind != "text" and not is_thought:
        raise ValueError(f"part {number} of the content is of type {kind!r}; only text can be trained")
    named = {key: part[key] for key in ("text", "thinking", "reasoning") if not is_absent(part.get(key))}
    if len(named) > 1:
        raise ValueError(f"part {number} of the content has {' and '.join(map(repr, named))}; give each a part")
    found = next(iter(named.values()), "" if "text" in part and part["text"] == "" else None)
    if is_thought and isinstance(found, list):
        found = "".join(_part(inner, number, "a thought")[1] for inner in found)
    if not isinstance(found, str) or (kind == "text" and named.keys() - {"text"}):
        keys = ", ".join(sorted(key for key, value in part.items() if value is not None))
        raise ValueError(f"part {number} of the content has no text under {kind!r} (it has: {keys or 'nothing'})")
    return ("reasoning" if is_thought else "text"), found


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


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"the {key} must be a string, not {kind_of(value)}")
    return encodable(value)
