"""Values of JSON that may be of any kind, and how they are written for a reader."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

NOTHING = "-"
UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def at(value: Any, *keys: str) -> Any:
    """What lies under the keys, one after another; None where something else is there."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return value if math.isfinite(value) else None
    return None


def whole(value: Any) -> int | None:
    """An integer; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def texts(value: Any) -> list[str]:
    """The items of a list as text; empty for anything else."""
    return [shown(each) for each in value] if isinstance(value, list) else []


def shown(value: Any) -> str:
    """A value as an option's or a cell's text."""
    if value is None or value == "" or value == []:
        return NOTHING
    if isinstance(value, float):
        return brief(value)
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def brief(value: float | None) -> str:
    """A number with four digits, or, beyond a thousand, to the unit."""
    if value is None:
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def span(seconds: float | None) -> str:
    """A time such as `1 h 4 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float | None) -> str:
    """A size such as `1.4 GiB`."""
    if num_bytes is None:
        return NOTHING
    unit, name = next(((unit, name) for unit, name in UNITS if num_bytes >= unit), (1, "bytes"))
    return f"{num_bytes / unit:.3g} {name}" if num_bytes < 1000 * unit else f"{num_bytes / unit:,.0f} {name}"


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def letter_of(place: int) -> str:
    """A, B and so on; after Z A2."""
    return chr(ord("A") + place % 26) + (str(place // 26 + 1) if place >= 26 else "")
