"""Where the parts of a turn stand in a text that a chat template made of them."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from data_tools.messages import Message

# a thought between tags, as data sets write it into the content
THOUGHT = re.compile(
    r"(?P<open><(?P<tag>think|thinking|thought|reasoning)>)(?P<said>.*?)(?P<close></(?P=tag)>)", re.DOTALL
)


def shared_prefix(one: str, other: str) -> str:
    """The characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]


def end_aside_space(text: str, beginning: str) -> int:
    """Where `beginning` ends in a text that begins with it but for white space, and the white space after it; or 0."""
    wanted, seen = "".join(beginning.split()), 0
    if not wanted or not "".join(text[: 2 * len(beginning) + 64].split()).startswith(wanted):
        return 0
    for place, character in enumerate(text):
        if seen == len(wanted) and not character.isspace():
            return place
        seen += not character.isspace()
    return len(text)


def said_in_calls(message: Message) -> Iterator[tuple[str, Any]]:
    """(what it is, its value) of everything in a turn's tool calls."""
    for number, call in enumerate(message.tool_calls, start=1):
        function = call["function"]
        label = f"tool call {number}" if len(message.tool_calls) > 1 else "its tool call"
        yield label, function["name"]
        yield from ((f"an argument of {label}", leaf) for leaf in leaves(function["arguments"]))


def is_printed(message: Message, text: str) -> bool:
    """Whether a nested argument of a call stands in the text as Python prints it, and not as JSON."""
    for call in message.tool_calls:
        for value in call["function"]["arguments"].values():
            if isinstance(value, Mapping | list) and repr(value) in text and json.dumps(value) != repr(value):
                return True
    return False


def leaves(value: Any) -> Iterator[Any]:
    """The keys and values of a JSON-like value, at every depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value


def find_value(text: str, value: Any) -> int:
    """Where a value ends in a text; its end if it stands there with other white space; -1 if it is not there.

    For what the model reads, which a template may spell as it likes; what it is to write must be there as it is.
    """
    if isinstance(value, str) and (end := find_text(text, value)) >= 0:
        return end
    if (end := find_leaf(text, value)) >= 0 or not isinstance(value, str):
        return end
    return len(text) if "".join(value.split()) in "".join(text.split()) else -1


def find_leaf(text: str, value: Any) -> int:
    """Where an argument of a call ends in a text, as it is or as JSON spells it; -1 if it is not there."""
    if isinstance(value, bool):
        return _end(text.lower(), str(value).lower())
    if not isinstance(value, str):
        return max(_end(text, json.dumps(value)), _end(text, str(value)))
    stripped = value.strip()
    spellings = (json.dumps(stripped, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return max(_end(text, stripped), *(_end(text, spelled) for spelled in spellings))


def find_text(text: str, value: str) -> int:
    """Where a text ends in another, without white space around it; -1 if it is not there.

    Where it begins with a thought in tags, the white space around the tags may be another.
    """
    stripped = value.strip()
    if (end := _end(text, stripped)) >= 0 or "</" not in stripped:
        return end
    match = THOUGHT.match(stripped)
    if match is None:
        return -1
    parts = (match["open"], match["said"].strip(), match["close"], stripped[match.end() :].strip())
    found = re.search(r"\s*".join(map(re.escape, parts)), text)
    return found.end() if found else -1


def _end(text: str, spelled: str) -> int:
    place = text.find(spelled)
    return place + len(spelled) if place >= 0 else -1


def unread_in_tool(tool: Mapping[str, Any], text: str) -> set[str]:
    """Keywords of a tool's definition of which something is not in the text, such as `enum` or nested `properties`."""
    lower = text.lower()  # templates write types in capitals

    def walk(value: Any, keyword: str) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, item in value.items():
                is_name = keyword == "properties"
                if is_name and find_value(text, key) < 0:
                    yield keyword
                yield from walk(item, "schema" if is_name else key)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item, keyword)
        elif find_value(text, value) < 0 and find_value(lower, str(value).lower()) < 0:
            yield keyword

    return set(walk(tool["function"], "function"))
