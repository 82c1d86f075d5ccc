"""JSON as its standard has it: what Python's json also accepts, NaN and a field given twice, is refused."""

import json
from typing import Any


def parse_json(text: str) -> Any:
    """One JSON value; raises ValueError also for NaN and repeated keys, which json accepts, and for deep nesting."""
    try:
        # without the end of a line, or one that is cut short has its error in column 1 of the next
        return json.loads(text.rstrip(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(json_reason(error)) from None


def strict_decoder() -> json.JSONDecoder:
    """A decoder for values that stand behind one another; its errors go through `json_reason`."""
    return json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def json_reason(error: Exception) -> str:
    """What is wrong with a text that is not JSON, without its place in the buffer."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated!r} appears twice")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
