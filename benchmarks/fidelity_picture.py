"""Draws benchmarks.fidelity's JSON: the distance of the loss from fp32's by step, a panel for each base and rate."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.svg import key, page

# of systems, in the order in which they are drawn: name, colour on light and on dark, dashes
STYLES = {
    "trl": ("TRL", "#b35806", "#fdae61", ""),
    "unsloth": ("Unsloth", "#7b3294", "#d7a8e8", "6 2"),
    "seed": ("Trainer, PEFT's kbit", "#666666", "#aaaaaa", "2 3"),
    "reference": ("Handloop, reference", "#1a9850", "#66d98a", "8 3 2 3"),
    "fused-fp8": ("Handloop, fused, fp8", "#c51b7d", "#f48fb1", "4 2"),
    "fused": ("Handloop, fused", "#0b5fd0", "#6cb0ff", ""),
    "fused-fp32": ("Handloop, fused in fp32", "#999999", "#777777", "1 3"),
}
BASES = {"nf4": "NF4", "none": "16 bits"}
SPAN = 5  # steps of which each point is the median, of all seeds: a single step's distance passes through 0
WIDTH, HEIGHT = 300, 170  # of a panel
LEFT, TOP, GAP, FOOT = 62, 52, 28, 46
LOWEST = 1e-7  # where fp32 ends: a loss of 4 has steps of 5e-7

Points = list[tuple[int, float]]


def picture(found: dict[str, Any]) -> str:
    """An SVG that follows the reader's light or dark."""
    rows = [row for row in found["rows"] if "loss_distance" in row]
    bases = [base for base in BASES if any(row["base"] == base for row in rows)]
    rates = sorted({row["rate"] for row in rows})
    systems = [name for name in STYLES if any(row["system"] == name for row in rows)]
    panels = {(base, rate): panel_lines(rows, systems, base, rate) for base in bases for rate in rates}
    values = [value for lines in panels.values() for line in lines.values() for _, value in line]
    if not values:
        raise SystemExit("there is no row of a system beside fp32 to draw; run the benchmark first")
    lowest = math.floor(math.log10(min(values)))
    span = lowest, max(lowest + 1, math.ceil(math.log10(max(values))))
    columns, num_rows = len(bases), len(rates)
    width = LEFT + columns * (WIDTH + GAP)
    bottom = TOP + num_rows * (HEIGHT + FOOT)
    title = f"{found['model']}: how far a step's loss is from fp32's"
    parts = []
    for (base, rate), lines in panels.items():
        x = LEFT + bases.index(base) * (WIDTH + GAP)
        y = TOP + rates.index(rate) * (HEIGHT + FOOT)
        parts.append(f'<text x="{x}" y="{y - 8}">base in {BASES[base]}, learning rate {rate:g}</text>')
        parts += axes(x, y, span, found["steps"], is_first=base == bases[0])
        parts += [f'<polyline class="{name}" points="{path(line, x, y, span)}"/>' for name, line in lines.items()]
    colours = {name: STYLES[name][1:] for name in systems}
    return page((width, bottom + 44), (LEFT, title), colours, parts + legend(systems, bottom))


def panel_lines(rows: Sequence[dict[str, Any]], systems: Sequence[str], base: str, rate: float) -> dict[str, Points]:
    """Each system's line: the step, as a share of all, and the distance."""
    lines = {}
    for system in systems:
        of = [row["loss_distance"] for row in rows if (row["system"], row["base"], row["rate"]) == (system, base, rate)]
        if of:
            lines[system] = smooth(of)
    return lines


def smooth(runs: Sequence[Sequence[float]]) -> Points:
    """Medians over the runs and SPAN steps; near the ends over fewer."""
    reach, count, points = SPAN // 2, min(map(len, runs)), []
    for step in range(count):
        near = [value for run in runs for value in run[max(0, step - reach) : min(count, step + reach + 1)]]
        points.append((step + 1, max(LOWEST, statistics.median(near))))
    return points


def axes(x: float, y: float, span: tuple[int, int], steps: int, is_first: bool) -> list[str]:
    """Lines at the powers of ten, their numbers left of the first column, and steps below."""
    parts = []
    for power in range(span[0], span[1] + 1):
        height = y + HEIGHT * (span[1] - power) / (span[1] - span[0])
        parts.append(f'<line class="grid" x1="{x}" y1="{height:.1f}" x2="{x + WIDTH}" y2="{height:.1f}"/>')
        if is_first:
            told = f"{10.0**power:g}"
            parts.append(f'<text x="{x - 8}" y="{height + 4:.1f}" text-anchor="end">{told}</text>')
    for step in sorted({1, *(round(steps * part / 4) for part in range(1, 5))} - {0}):
        place = x + WIDTH * (step - 1) / max(1, steps - 1)
        parts.append(f'<text x="{place:.1f}" y="{y + HEIGHT + 16}" text-anchor="middle">{step}</text>')
    return parts


def path(points: Points, x: float, y: float, span: tuple[int, int]) -> str:
    """Of a polyline."""
    last = max(1, points[-1][0] - 1)
    places = []
    for step, value in points:
        height = (span[1] - math.log10(value)) / (span[1] - span[0])
        places.append(f"{x + WIDTH * (step - 1) / last:.1f},{y + HEIGHT * height:.1f}")
    return " ".join(places)


def legend(systems: Sequence[str], y: float) -> list[str]:
    """Names beside pieces of their lines, three in a row."""
    parts = []
    for number, name in enumerate(systems):
        parts += key(name, STYLES[name][0], LEFT + 215 * (number % 3), y + 22 * (number // 3))
    return parts
