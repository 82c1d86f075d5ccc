"""Curves out of rows: read, smoothed, and thinned without losing an extreme. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from train.report.values import number

MIN_SPAN, SPANS = 11, 50  # smoothed over a fiftieth of the run, and at least eleven steps
BUCKETS = 400  # about one for each pixel of a figure's width
TABLE_ROWS = 40
SMALLEST, LARGEST = 1e-38, 1e38  # that fp32 holds; with others, which only damage makes, no chart can be laid out


@dataclass(frozen=True)
class Curve:
    """A number by step."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def lowest(self) -> int:
        """The place of the lowest value, the first of equal ones."""
        return min(range(len(self)), key=lambda i: self.values[i])

    @property
    def highest(self) -> int:
        """The place of the highest value, the first of equal ones."""
        return max(range(len(self)), key=lambda i: self.values[i])

    def only(self, places: Iterable[int]) -> "Curve":
        """The points at these places."""
        kept = sorted(set(places))
        return Curve(tuple(self.steps[i] for i in kept), tuple(self.values[i] for i in kept))


def drawable(value: Any) -> float | None:
    """A number that can be drawn; None for anything else."""
    found = number(value)
    return found if found is not None and (found == 0 or SMALLEST <= abs(found) <= LARGEST) else None


def curve(rows: Sequence[dict[str, Any]], key: str) -> Curve:
    """What the rows have under the key; those without a number that can be drawn are left out."""
    points = [(row["step"], value) for row in rows if (value := drawable(row.get(key))) is not None]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def span_of(num_points: int) -> int:
    """Over how many points a curve of this length is smoothed: an odd number, as many before as after each."""
    return max(MIN_SPAN, num_points // SPANS) | 1


def smoothed(raw: Curve) -> Curve:
    """Each point's mean with as many before as after it, so that it lags nowhere; near the ends with fewer."""
    sums = [0.0, *accumulate(raw.values)]
    half, last, values = span_of(len(raw)) // 2, len(raw) - 1, []
    for i in range(len(raw)):
        reach = min(half, i, last - i)
        values.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return Curve(raw.steps, tuple(values))


def thinned(full: Curve, buckets: int = BUCKETS) -> Curve:
    """First and last point, and of each of `buckets` equal stretches of steps the lowest and the highest."""
    if len(full) <= 2 * buckets:
        return full
    width = (full.steps[-1] - full.steps[0]) / buckets
    places: dict[int, list[int]] = {}
    for i, step in enumerate(full.steps):
        places.setdefault(int((step - full.steps[0]) / width), []).append(i)
    kept = {0, len(full) - 1}
    for each in places.values():
        kept |= {min(each, key=lambda i: full.values[i]), max(each, key=lambda i: full.values[i])}
    return full.only(kept)


def table_steps(curves: Sequence[Curve], wanted: Iterable[int] = ()) -> list[int]:
    """The steps that a table shows: `wanted`, each curve's ends and extremes, and others at equal distances."""
    chosen, every = set(wanted), sorted({step for each in curves for step in each.steps})
    for each in curves:
        if len(each):
            chosen |= {each.steps[i] for i in (0, -1, each.lowest, each.highest)}
    stride = max(1, -(-len(every) // TABLE_ROWS))
    return sorted((chosen | set(every[::stride])) & set(every))
