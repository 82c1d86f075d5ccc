"""Charts as SVG, by matplotlib: in the colours of the page, without the user's text, the same bytes each time."""

import re
from io import StringIO
from typing import Any

from train.bundled import how_to_install
from train.report.curves import thinned
from train.report.figures import Chart, Line
from train.run.exits import ExitCode, ExitWith

NUM_COLOURS = 8
MAX_MARKERS = 120  # side by side
# matplotlib knows no CSS: each of these colours, which nothing else has, becomes a variable of the page
INK, QUIET, GRID = "#fe0102", "#fe0103", "#fe0104"
VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--line"}
VARIABLES |= {f"#fe00{i:02x}": f"--s{i}" for i in range(NUM_COLOURS)}
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (6, 2, 1.2, 2)))
WIDTH, HEIGHT = 5.4, 3.1  # inches of 72 units: on a page about 390 to 550 pixels wide
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "handloop",
    "path.simplify": False,  # thinned() keeps the extremes
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "savefig.transparent": True,
}


def svg(chart: Chart) -> str:
    """An `<svg>` to stand in a page; its ids begin with the chart's key. Raises ExitWith without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        reason = f"the curves are drawn by matplotlib, which cannot be imported ({error}): {how_to_install()}"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for line in chart.lines:
            _draw(axes, line)
        _mark(axes, chart)
        _scale(axes, chart)
        written = StringIO()
        FigureCanvasSVG(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=nothing)
    return _for_page(written.getvalue(), chart.key)


def _draw(axes: Any, line: Line) -> None:
    points = thinned(line.full)
    style: dict[str, Any] = {"color": f"#fe00{line.series % NUM_COLOURS:02x}", "gid": f"{line.role}-{line.series}"}
    style["linestyle"] = DASHES[line.series % len(DASHES)]
    if line.role == "raw":
        style |= {"linewidth": 0.7, "alpha": 0.4, "linestyle": "-"}
    elif line.role == "limit":
        style |= {"linewidth": 1.4}
    else:
        is_marked = line.role == "points" and len(points) <= MAX_MARKERS
        style |= {"linewidth": 1.5, "marker": "o" if is_marked or len(points) == 1 else "", "markersize": 4}
    axes.plot(points.steps, points.values, **style)


def _mark(axes: Any, chart: Chart) -> None:
    for step in chart.marks.resumes:
        axes.axvline(step, color=QUIET, linewidth=1, linestyle=(0, (3, 2)))
    edge = axes.get_xaxis_transform()  # steps across, shares of the height upwards
    for steps, height, marker in ((chart.marks.saved, 0.0, "^"), (chart.marks.skipped, 0.97, "x")):
        # of marks that would lie on each other, one
        seen = sorted({int(MAX_MARKERS * step / max(1, chart.last_step)): step for step in steps}.values())
        style = {"color": QUIET, "linestyle": "", "marker": marker, "markersize": 5, "clip_on": False}
        axes.plot(seen, [height] * len(seen), transform=edge, **style)


def _scale(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_xlabel("step")
    axes.set_xlim(0, max(1, 1.02 * chart.last_step))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if chart.is_logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if all(value >= 0 for line in chart.lines for value in line.full.values):
            axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"))
    axes.set_ylabel(f"{chart.unit} (logarithmic)" if chart.is_logarithmic else chart.unit)


def _for_page(text: str, key: str) -> str:
    """The `<svg>` element: without what only a file needs, ids of its own, colours as variables, named by the page."""
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg ") :], flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-labelledby="{key}-title {key}-sentence">'
    text = re.sub(r"^<svg [^>]*>", head, text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = text.replace("url(#", f"url(#{key}-").replace('xlink:href="#', f'href="#{key}-')
    text = re.sub(r"font-family: [^;]+; ", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()
