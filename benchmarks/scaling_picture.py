"""Draws benchmarks.scaling_table's rows: tokens a second over those of one GPU, by the number of GPUs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.svg import Colours, key, page

# of the panels: their workloads, each with its colour on light and on dark, and dashes
PANELS: dict[str, dict[str, tuple[str, str, str]]] = {
    "Llama-3.1-8B": {
        "short": ("#b35806", "#fdae61", ""),
        "packed": ("#0b5fd0", "#6cb0ff", ""),
        "packed-sharded": ("#c51b7d", "#f48fb1", "6 4"),
    },
    "70B": {
        "mlperf-70b": ("#7b3294", "#d7a8e8", ""),
        "llama-70b": ("#0b5fd0", "#6cb0ff", ""),
        "llama-70b-sharded": ("#c51b7d", "#f48fb1", "6 4"),
        "cards-24gb": ("#1a9850", "#66d98a", ""),
        "cards-24gb-sharded": ("#b35806", "#fdae61", "6 4"),
    },
}
IDEAL = {"ideal": ("#999999", "#777777", "")}
COLOURS: Colours = IDEAL | {name: style for panel in PANELS.values() for name, style in panel.items()}
DOUBLINGS = 6  # the axes end at 64
SIDE, HEIGHT = 345, 300  # of a panel
LEFT, TOP, GAP, FOOT = 48, 56, 36, 40
FILLED = 'style="stroke-width:5;stroke-dasharray:none"'  # a point: the colours are those of strokes

Rows = Sequence[Mapping[str, Any]]


def picture(found: Mapping[str, Rows]) -> str:
    """An SVG of the workloads that are drawn; found has each one's rows as the table has them."""
    if not any(name in found for panel in PANELS.values() for name in panel):
        raise SystemExit("there is no workload to draw; predict one first: --predict packed")
    parts = []
    for number, (title, panel) in enumerate(PANELS.items()):
        x, y = LEFT + number * (SIDE + GAP), TOP + HEIGHT + FOOT
        parts.append(f'<text x="{x}" y="{TOP - 10}">{title}</text>')
        parts += axes(x, has_numbers=number == 0)
        parts.append(line("ideal", [(1, 1), (2**DOUBLINGS, 2**DOUBLINGS)], x))
        for name in panel:
            if name in found:
                parts += marks(name, found[name], x)
                parts += key(name, told(name, found[name]), x, y)
                y += 20
    bottom = TOP + HEIGHT + FOOT + 20 * max(map(len, PANELS.values()))
    parts += key("ideal", "as many times as GPUs", LEFT, bottom)
    said = "lines: predicted by handloop plan; points: measured; 64 GPUs are 8 machines, each with the step of one"
    parts.append(f'<text x="{LEFT}" y="{bottom + 22}">{said}</text>')
    width = LEFT + len(PANELS) * (SIDE + GAP)
    return page(
        (width, bottom + 36), (LEFT, "Tokens a second, times those of one GPU, by the number of GPUs"), COLOURS, parts
    )


def axes(x: float, has_numbers: bool) -> list[str]:
    """A line at each doubling, with its number."""
    parts = []
    for doubling in range(DOUBLINGS + 1):
        across, up = place(2**doubling, 2**doubling, x)
        parts.append(f'<line class="grid" x1="{x}" y1="{up:.1f}" x2="{x + SIDE}" y2="{up:.1f}"/>')
        parts.append(f'<text x="{across:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{2**doubling}</text>')
        if has_numbers:
            parts.append(f'<text x="{x - 8}" y="{up + 4:.1f}" text-anchor="end">{2**doubling}</text>')
    return parts


def marks(name: str, rows: Rows, x: float) -> list[str]:
    """A workload's line, and a point for each measurement."""
    planned = [(row["gpus"], row["predicted"]["times_one"]) for row in rows if row["predicted"].get("times_one")]
    parts = [line(name, planned, x)] if planned else []
    for row in rows:
        if row["times_one"]:
            across, up = place(row["gpus"], row["times_one"], x)
            parts.append(f'<circle class="{name}" cx="{across:.1f}" cy="{up:.1f}" r="2.5" {FILLED}/>')
    return parts


def line(name: str, points: Sequence[tuple[float, float]], x: float) -> str:
    """A polyline over the numbers of GPUs."""
    places = " ".join(f"{across:.1f},{up:.1f}" for across, up in (place(*point, x) for point in points))
    return f'<polyline class="{name}" points="{places}"/>'


def place(gpus: float, times: float, x: float) -> tuple[float, float]:
    """Where a point lies; both axes count doublings."""
    return x + SIDE * math.log2(gpus) / DOUBLINGS, TOP + HEIGHT * (1 - math.log2(times) / DOUBLINGS)


def told(name: str, rows: Rows) -> str:
    """The workload with its GPU, and what the plan says of the two largest numbers of GPUs that it can run on."""
    planned = [(row["gpus"], row["predicted"]["times_one"]) for row in rows if row["predicted"].get("times_one")]
    numbers = ", ".join(f"{times:.1f} on {gpus}" for gpus, times in planned[-2:])
    return f"{name}, {rows[0]['gpu']}{': ' if numbers else ''}{numbers}"
