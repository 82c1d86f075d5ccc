"""Values as files and Arrow give them: what counts as absent, JSON text for what it holds, and text that is none.

Nulls count as absent at every depth, and empty lists outside a call's arguments, because Arrow fills them in where only
other rows have a value.
"""

import math
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from data_tools.strict_json import parse_json


def is_absent(value: Any) -> bool:
    """Whether a value is what Arrow, or an exporter, puts where there is none, as an object of nulls is."""
    if isinstance(value, Mapping):
        return all(item is None or (isinstance(item, Mapping) and is_absent(item)) for item in value.values())
    return value is None or value in ([], "")


def without_absent(value: Any) -> Any:
    """The value without nulls and empty lists, at every depth; what JSON has no type for, such as a date, as text."""
    if isinstance(value, Mapping):
        kept = {str(key): without_absent(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in kept.items() if item != []}
    if isinstance(value, list | tuple):
        return [without_absent(item) for item in value if item is not None]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def without_nulls(value: Any) -> Any:
    """The value without nulls in objects, at every depth; an empty list, or a null in a list, is a call's own.

    Dates and decimals become text; raises ValueError for bytes and whatever else JSON has no form for.
    """
    if isinstance(value, Mapping):
        return {str(key): without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    if isinstance(value, date | time | Decimal):
        return str(value)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"{kind_of(value)} cannot be written as JSON; give it as text")
    return value


def json_or_same(value: Any, what: str) -> Any:
    """The value that JSON text holds, or a value that is not text as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if value == "" else value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{what} is text, but {error}") from None


def encodable(text: str) -> str:
    """The text; raises ValueError if it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} is half of a surrogate pair; the text was cut or badly escaped"
        ) from None
    return text


def check_plain(value: Any) -> None:
    """Raises ValueError if anything in a JSON-like value cannot be written as JSON in UTF-8."""
    if isinstance(value, str):
        encodable(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a number that JSON has")
    elif isinstance(value, Mapping):
        check_plain([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            check_plain(item)


def kind_of(value: Any) -> str:
    return type(value).__name__ if value != [] else "an empty list"
