"""What preview, audit and the start of a run say of prepared data: files, format, history, what nothing reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.prepare import Statistics
from data_tools.terminal import printable

NUM_NAMED = 6


def data_lines(statistics: Statistics, notes: Sequence[str]) -> list[str]:
    """Lines with their labels, none of them a warning."""
    lines = [f"files     {note}" for note in notes]
    lines.append(f"format    {' and '.join(statistics.formats)}")
    if statistics.date:
        lines.append(f"date      {statistics.date}, which the chat template asks for")
    if statistics.num_history_tokens:
        lines.append(
            f"history   in {statistics.num_rewritten:,} conversations the chat template renders earlier answers "
            "otherwise than the last, so each such answer is a sample of its own, as it would be generated: "
            f"{statistics.num_history_tokens:,} tokens more; --data.history last trains the last answers alone"
        )
    if statistics.num_empty_reasonings:
        lines.append(
            f"thinking  {statistics.num_empty_reasonings:,} answers stand behind an empty think block, which is not "
            "trained (--data.empty_reasoning)"
        )
    return lines


HISTORY_COUNTS = ("num_rewritten", "num_history_tokens", "num_left_out_turns", "num_empty_reasonings")


def described(statistics: Statistics, notes: Sequence[str]) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "formats": statistics.formats,
        "files": list(notes),
        "date": statistics.date,
        "unread_fields": statistics.ignored_fields,
        "unread_turn_keys": statistics.unread_keys,
        "history": {name: getattr(statistics, name) for name in HISTORY_COUNTS},
    }


def data_warnings(statistics: Statistics) -> list[str]:
    """What of the data is not used."""
    lines = []
    if statistics.ignored_fields:
        lines.append(f"nothing reads {_named(statistics.ignored_fields, 'the field', 'rows')}")
    if statistics.unread_keys:
        lines.append(f"nothing reads {_named(statistics.unread_keys, 'the key', 'turns')}")
    if statistics.num_left_out_turns:
        lines.append(
            f"{statistics.num_left_out_turns:,} earlier answers are not trained (--data.history last); "
            "each trains them, too"
        )
    return lines


def _named(counts: Mapping[str, int], what: str, of: str) -> str:
    names = sorted(counts, key=lambda name: (-counts[name], name))
    parts = [f"{what} {printable(name)!r} of {counts[name]:,} {of}" for name in names[:NUM_NAMED]]
    return ", ".join(parts) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")
