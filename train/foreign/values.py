"""How the value of another trainer's option is spelled here.

Each function takes the value as their file or command line has it and returns our words: none of them where nothing
need be set, because it is so anyway; None where there is no counterpart.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Words = tuple[str, ...]
Spell = Callable[[Any], Words | None]

NOT_FINITE = (".inf", "-.inf", ".nan")  # as a file's numbers that are not finite arrive here
TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off", "none", "null", "")


def truth(value: Any) -> bool | None:
    """Whether a value is true or false, in any spelling; None for another."""
    word = str(value).strip().lower()
    return True if word in TRUE else False if word in FALSE else None


def number(value: Any) -> float | None:
    """The finite number that a value is, also as text (YAML reads 2e-5 as text); None for another."""
    try:
        amount = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return amount if math.isfinite(amount) else None


def plain(value: float) -> str:
    """A number without a needless `.0`."""
    return str(int(value)) if value == int(value) else f"{value:g}"


def is_finite(value: Any) -> bool:
    """Whether neither a value nor an entry of a list is a number that is not finite."""
    return not any(str(each).lower() in NOT_FINITE for each in (value if isinstance(value, list) else [value]))


def same(value: Any) -> Words | None:
    """As it stands; a list is several words."""
    if isinstance(value, bool):
        return ("true",) if value else ("false",)
    if isinstance(value, dict):
        return None
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def flag(value: Any) -> Words | None:
    """true or false, in any spelling; a bare flag is true."""
    known = truth(value)
    return None if known is None else ("true",) if known else ("false",)


def words(value: Any) -> Words | None:
    """A list, or text with commas between its entries."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return same(value)


def modules(value: Any) -> Words | None:
    """Names of layers; `all` and all-linear are the same."""
    found = words(value)
    return ("all-linear",) if found in (("all",), ("all-linear",), ("all_linear",)) else found


def when(yes: str, no: str = "") -> Spell:
    """`yes` where the value is true, `no` (or nothing to set) where it is false."""

    def spell(value: Any) -> Words | None:
        known = truth(value)
        chosen = yes if known else no
        return None if known is None else (chosen,) if chosen else ()

    return spell


def one_of(known: Mapping[str, str]) -> Spell:
    """Our word for theirs; an empty one: nothing to set."""

    def spell(value: Any) -> Words | None:
        chosen = known.get(str(value).lower().rpartition(".")[2])  # torch.bfloat16, OptimizerNames.ADAMW_TORCH
        return None if chosen is None else (chosen,) if chosen else ()

    return spell


def whole(value: Any) -> Words | None:
    """A whole number, such as 3.0 epochs."""
    amount = number(value)
    return (plain(amount),) if amount is not None and amount == int(amount) else None


def limit(value: Any) -> Words | None:
    """A whole number; 0 and -1 are no limit."""
    amount = number(value)
    return () if amount is not None and amount <= 0 else whole(value)


def share(value: Any) -> Words | None:
    """A share of the data, greater than 0 and below 1; 0 is none."""
    amount = number(value)
    return None if amount is None or amount < 0 or amount >= 1 else (f"{amount:g}",) if amount else ()


def steps(value: Any) -> Words | None:
    """A number of steps; 0 is nothing to set, and a share of the run has no counterpart."""
    amount = number(value)
    return None if amount is None or amount < 0 or 0 < amount < 1 else whole(value) if amount else ()


def warmup(value: Any) -> Words | None:
    """Steps, or a share of the run below 1."""
    amount = number(value)
    return None if amount is None or amount < 0 else (plain(amount),)


def norm(value: Any) -> Words | None:
    """The greatest norm of gradients; 0 and infinity are no limit."""
    amount = number(value)
    return ("inf",) if str(value).lower() in (".inf", "inf") or (amount is not None and amount <= 0) else same(value)


def parts_of_epoch(value: Any) -> Words | None:
    """N times an epoch as the share between two of them."""
    amount = number(value)
    return None if amount is None or amount < 1 else ("epoch",) if amount == 1 else (f"{1 / amount:.4g}",)


def at_least_two(value: Any) -> Words | None:
    """A number of checkpoints, two of which always stay."""
    amount = whole(value)
    return amount and (str(max(2, int(amount[0]))),)


def minutes(value: Any) -> Words | None:
    """Seconds as minutes, a day of them at most."""
    amount = number(value)
    return None if amount is None or not 0 < amount <= 86_400 else (plain(amount / 60),)


def resume(value: Any) -> Words | None:
    """A checkpoint's path; true is what happens anyway."""
    known = truth(value)
    return same(value) if known is None else () if known else ("never",)


def file(value: Any) -> Words | None:
    """A path, as it stands; none for a list of tables."""
    return same(value) if isinstance(value, str) else None


def template(value: Any) -> Words | None:
    """A Jinja file, not the template itself."""
    return None if re.search(r"[{}\n]", str(value)) else file(value)
