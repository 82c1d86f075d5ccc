"""A chart of a loss in characters."""

from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:#"  # where the terminal's encoding has no block characters


def chart(values: Sequence[float | None], height: int, is_ascii: bool) -> list[str]:
    """`height` lines from the top: a column of blocks a value, the highest full; blank where there is None."""
    known = [value for value in values if value is not None]
    if not known:
        return [" " * len(values)] * height
    blocks = ASCII_BLOCKS if is_ascii else BLOCKS
    steps = len(blocks) - 1  # of one character
    low, high = min(known), max(known)
    scale = (height * steps - 1) / (high - low) if high > low else 0.0
    # the lowest is one step high, to be told from nothing
    levels = [0 if value is None else 1 + round((value - low) * scale) for value in values]
    return [
        "".join(blocks[min(max(level - steps * row, 0), steps)] for level in levels) for row in reversed(range(height))
    ]


def means(values: Sequence[float], width: int) -> list[float | None]:
    """The values in `width` columns at most, each the mean of its part."""
    width = min(width, len(values))
    bounds = [column * len(values) // width for column in range(width + 1)] if width else [0]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]


def bar(share: float, width: int, is_ascii: bool) -> str:
    """A bar of `width` characters, filled by the share."""
    blocks = "-=#" if is_ascii else "╌╸━"
    halves = round(max(0.0, min(1.0, share)) * width * 2)
    full, half = divmod(halves, 2)
    return (blocks[2] * full + blocks[1] * half).ljust(width, blocks[0])
