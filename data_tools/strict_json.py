"""JSON as its standard has it: what Python's json also accepts, NaN and a field given twice, is refused."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """One JSON value; raises ValueError also for NaN and repeated keys, which json accepts, and for deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_reason(error)) from None


def strict_decoder() -> json.JSONDecoder:
    """A decoder for values that stand behind one another; its errors go through `json_reason`."""
    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def json_reason(error: Exception, lines_before: int = 0, column_before: int = 0) -> str:
    """What is wrong with a text that is not JSON, and where; the text may begin in a line of a file."""
    if isinstance(error, json.JSONDecodeError):
        line, column = place_of(error)
        column += column_before if line == 1 else 0
        line += lines_before
        place = f"column {column}" if line == 1 else f"line {line}, column {column}"
        return f"not JSON: {error.msg.removesuffix(' at')} at {place}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def place_of(error: json.JSONDecodeError) -> tuple[int, int]:
    """(line, column) of an error, both from 1; of a text that is cut short its end, without the white space behind it.

    json names the end of that white space: column 1 of the line after the last.
    """
    position = min(error.pos, len(error.doc.rstrip(" \t\n\r")))
    return error.doc.count("\n", 0, position) + 1, position - error.doc.rfind("\n", 0, position)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated!r} appears twice")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
