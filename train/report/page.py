"""The page: its parts put together, and written as HTML that is whole in itself."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from data_tools.terminal import JOINERS
from train.report.answers import answers_section
from train.report.blocks import Block, Cell, Legend, Page, Picture, Pictures, Section, Table, Text
from train.report.drawing import DASHES, NUM_COLOURS, svg
from train.report.facts import config_section, data_section, plan_section, trained_section
from train.report.figures import Chart, charts_of, overlaid
from train.report.outcome import ending_line, ending_section, figures_of, loading_section, receipts_section
from train.report.record import RunRecord
from train.report.summary import differing, results_of
from train.report.values import brief, letter_of, shown
from train.run.redact import redact

TEMPLATE = "page.html"
MAX_VALIDATIONS = 200  # rows of their table


def page_of(run: RunRecord) -> Page:
    """The report of one run."""
    notes = list(run.notes)
    answers = answers_section(run, notes)
    sections = [
        trained_section(run),
        _curves(run),
        answers,
        plan_section(run),
        data_section(run),
        config_section(run),
        ending_section(run),
        loading_section(run),
        receipts_section(run),
    ]
    return Page(run.name, ending_line(run), figures_of(run), [each for each in sections if each], notes)


def page_of_several(runs: Sequence[RunRecord]) -> Page:
    """The report of several runs beside each other."""
    lettered = [(letter_of(place), run) for place, run in enumerate(runs)]
    letters = [letter for letter, _ in lettered]
    where: list[list[Cell]] = [[letter, run.name, str(run.folder.path), ending_line(run)] for letter, run in lettered]
    compared = [results_of(run) for run in runs]
    results: list[list[Cell]] = [[name, *(each[name] for each in compared)] for name in compared[0]]
    sections = [
        Section("runs", "The runs", [Table("Runs", ["run", "name", "folder", "how it ended"], where)]),
        Section("results", "Results", [Table("What came of each run", ["result", *letters], results)]),
        Section("options", "Options", [options_table(lettered)]),
        Section("curves", "Curves", _pictures(overlaid(lettered))),
    ]
    notes = [f"{letter}: {note}" for letter, run in lettered for note in run.notes]
    return Page(f"{len(runs)} runs compared", ", ".join(run.name for run in runs), [], sections, notes)


def options_table(lettered: Sequence[tuple[str, RunRecord]]) -> Block:
    """The options that are not the same in all runs."""
    rows: list[list[Cell]] = [
        [name, *map(shown, values)] for name, values in differing([run.config for _, run in lettered])
    ]
    if not rows:
        return Text("All options are the same, but for the run's folder.")
    return Table("Options that differ", ["option", *(letter for letter, _ in lettered)], rows)


def _curves(run: RunRecord) -> Section:
    blocks = _pictures(charts_of(run))
    rows = [row for row in run.rows if any(key.startswith("eval/") for key in row)]
    keys = sorted({key for row in rows for key in row if key.startswith("eval/")})
    if rows:
        more = f", the last {MAX_VALIDATIONS} of {len(rows)}" if len(rows) > MAX_VALIDATIONS else ""
        cells: list[list[Cell]] = [[row["step"], *(_cell(row.get(key)) for key in keys)] for row in rows]
        blocks.append(Table(f"Validations{more}", ["step", *keys], cells[-MAX_VALIDATIONS:]))
    return Section("curves", "Curves", blocks)


def _cell(value: Any) -> Cell:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number or value is None else shown(value)


def _pictures(charts: Sequence[Chart]) -> list[Block]:
    if not charts:
        return [Text("No step is recorded, so there is nothing to draw.")]
    return [Pictures([_picture(chart) for chart in charts])]


def _picture(chart: Chart) -> Picture:
    legend = [Legend(line.label, line.series, line.role) for line in chart.lines]
    marks = (("saved", "checkpoint"), ("resumes", "resumed"), ("skipped", "skipped step"))
    legend += [Legend(label, 0, name) for name, label in marks if getattr(chart.marks, name)]
    return Picture(chart.key, chart.title, chart.sentence, legend, svg(chart), chart.table)


def render(page: Page) -> str:
    """The page as HTML: no scripts, nothing loaded, all text escaped, without secrets, control characters visible."""
    return _template().render(page=page, num_colours=NUM_COLOURS, num_dashes=len(DASHES)) + "\n"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["brief"] = brief
    return environment.get_template(TEMPLATE)


def _safe(value: Any) -> Any:
    """What is written of a value, before it is escaped; markup is only what the template itself declares so."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return redact(value, keep=f"\n\t{JOINERS}")
    return value
