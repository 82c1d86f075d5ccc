"""What is kept of every record for the audit: where it is, hashes of its text, and what is odd about it; no text."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

import pyarrow as pa

from data_tools.locate import leaves
from data_tools.messages import Message
from data_tools.records import Conversation, Record
from data_tools.similarity import NUM_MINIMA, fingerprint, normalise

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _misread(low: int, high: int) -> str:
    """A `re` character set: what the bytes in range(low, high) become when read as Latin-1 or Windows-1252."""
    data = bytes(range(low, high))
    return f"[{re.escape(data.decode('latin-1') + data.decode('cp1252', 'ignore'))}]"


_NEXT = _misread(0x80, 0xC0)  # every byte of a UTF-8 character except its first
# UTF-8 that was decoded wrongly, told by its first bytes (Latin letters, punctuation, emoji, two letters of Cyrillic),
# and the replacement character. After an upper-case letter Ã is not counted: IRMÃ» is a word in capitals and a quote.
MOJIBAKE = re.compile(
    rf"\ufffd|ï¿½|(?<![A-ZÀ-Þ])Ã{_NEXT}|Â[\u0080-\u00bf]|â{_misread(0x80, 0x85)}{_NEXT}|ð[Ÿ\u009f]|(?:[ÐÑ]{_NEXT}){{2}}"
)
LEADING_ROLES = ("system", "developer")
FOLLOWS = {("user", "assistant"), ("assistant", "user"), ("assistant", "tool"), ("tool", "tool"), ("tool", "assistant")}

SCHEMA = pa.schema(
    {
        "place": pa.string(),  # file:line
        "path_number": pa.int32(),  # which of the user's paths it comes from
        "exact": pa.uint64(),  # hashes: equal for equal records,
        "normalised": pa.uint64(),  # for those that differ in case, white space and punctuation,
        "prompt": pa.uint64(),  # and for those with the same turns before the first trained one; 0 for none
        "sketch": pa.binary(4 * NUM_MINIMA),  # MinHash minima
        "control_character_rows": pa.string(),  # notes for the findings of these names; empty if there is none
        "mojibake_rows": pa.string(),
        "role_order_rows": pa.string(),
        "num_tokens": pa.int64(),  # as rendered, before truncation; 0 for documents, which are never too long
        "num_supervised_tokens": pa.int64(),
    }
)


def facts_of(record: Record) -> dict[str, Any]:
    """A row of SCHEMA without its token counts, with `spoken`, the normalised text, where the sketch is to be."""
    is_conversation = isinstance(record, Conversation)
    turns = record.messages if is_conversation else (Message("text", record.text, train=True),)
    plain = [normalise(turn.content) for turn in turns]
    spoken = " ".join(text for turn, text in zip(turns, plain, strict=True) if text and turn.role not in LEADING_ROLES)
    texts = [text for turn in turns for text in (turn.content, turn.reasoning) if text]
    calls = [leaf for turn in turns for call in turn.tool_calls for leaf in leaves(call)]
    texts += [leaf for leaf in calls if isinstance(leaf, str)]
    beginning = next((i for i, turn in enumerate(turns) if turn.train), 0)
    tools = json.dumps(record.tools) if is_conversation and record.tools else ""
    flags = [(turn.train, turn.name, turn.tool_call_id) for turn in turns]
    told = f"{flags} {record.template_arguments}" if is_conversation else ""
    exact = _hash([turn.content for turn in turns], turns, tools + told)
    return {
        "place": record.source,
        "path_number": record.path_number,
        "exact": exact,
        # texts of punctuation alone would all be equal, so they are not normalised
        "normalised": _hash(plain if spoken else [turn.content for turn in turns], turns, tools),
        "prompt": _hash(plain[:beginning], turns[:beginning], tools) if beginning else 0,
        "spoken": spoken,
        "control_character_rows": _note(CONTROL, texts),
        "mojibake_rows": _note(MOJIBAKE, texts),
        "role_order_rows": turn_problem(turns) if is_conversation else "",
    }


def _hash(texts: Sequence[str], turns: Sequence[Message], tools: str) -> int:
    parts = [
        f"{turn.role}\x1f{text}\x1f{(turn.reasoning, turn.tool_calls, turn.extra) if _has_more(turn) else ''}"
        for turn, text in zip(turns, texts, strict=True)
    ]
    return fingerprint("\x1e".join([*parts, tools] if tools else parts))


def _has_more(turn: Message) -> bool:
    return bool(turn.reasoning or turn.tool_calls or turn.extra)


def _note(pattern: re.Pattern[str], texts: Sequence[str]) -> str:
    """The first match in the texts, by its characters and its line."""
    for text in texts:
        # what was wrongly decoded is never ASCII
        if (pattern is CONTROL or not text.isascii()) and (match := pattern.search(text)):
            spelled = " ".join(f"U+{ord(character):04X}" for character in match[0])
            return f"{spelled} in line {text.count(chr(10), 0, match.start()) + 1}"
    return ""


def turn_problem(turns: Sequence[Message]) -> str:
    """What is unusual about the order of a conversation's turns: tool calls that nothing answers, before all else."""
    for number, turn in enumerate(turns[:-1], start=1):
        if not turn.tool_calls:
            continue
        if left := _unanswered(turn, list(takewhile(lambda each: each.role == "tool", turns[number:]))):
            is_one = len(left) == 1
            names = ", ".join(str(call.get("id") or call["function"]["name"]) for call in left)
            return f"tool call{'' if is_one else 's'} {names} of turn {number} {'has' if is_one else 'have'} no result"
    return role_problem([turn.role for turn in turns])


def _unanswered(turn: Message, results: Sequence[Message]) -> list[Mapping[str, Any]]:
    """The calls of a turn without a result; one that has no id may answer any number of them."""
    answered = {result.tool_call_id for result in results}
    if "" in answered:
        return []
    return [call for call in turn.tool_calls if not results or str(call.get("id", "")) not in {"", *answered}]


def role_problem(roles: Sequence[str]) -> str:
    """What is unusual about the order of a conversation's roles; empty if nothing is."""
    turns = list(roles[1:] if roles[:1] and roles[0] in LEADING_ROLES else roles)
    if turns[:1] != ["user"]:
        return f"begins with {turns[0]}" if turns else "nothing follows the system turn"
    for before, after in pairwise(turns):
        if (before, after) not in FOLLOWS:
            return f"{after} after {before}"
    return f"ends with {turns[-1]}" if turns[-1] != "assistant" else ""
