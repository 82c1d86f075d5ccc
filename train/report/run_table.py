"""Runs as tables for the terminal, at 80 columns."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.terminal import printable
from train.report.blocks import Cell
from train.report.record import RunRecord
from train.report.summary import Summary, differing, results_of
from train.report.values import NOTHING, brief, letter_of, shown, size, span
from train.run.redact import redact

COLUMNS = {"state": 11, "step": 13, "loss": 8, "best": 8, "eval best": 10, "tokens/s": 9, "time": 9, "size": 10}
COLOURS = {"finished": "green", "running": "cyan", "stopped": "yellow", "killed": "red", "failed": "red"}


def show_runs(console: Console, summaries: Sequence[Summary]) -> None:
    """Two lines a run: its name, when it began, base and data; its figures."""
    console.print(_figures([Text(name, style="dim") for name in COLUMNS]))
    for run in summaries:
        about = [run.started.replace("T", " ")[:16], run.base, " ".join(run.data)]
        told = [printable_text(each) for each in about if each not in ("", NOTHING)]
        console.print(Text.assemble((printable_text(run.name), "bold"), (f"  {' · '.join(told)}", "dim")))
        of = f"/{run.total_steps:,}" if run.total_steps is not None else ""
        state = Text(f"{run.state} {run.code}" if run.code else run.state, style=COLOURS.get(run.state, ""))
        losses = [_loss(value) for value in (run.loss_last, run.loss_best, run.eval_loss_best)]
        speed = NOTHING if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}"
        console.print(_figures([state, f"{run.step:,}{of}", *losses, speed, span(run.seconds), size(run.size_bytes)]))
        for note in run.notes:
            console.print(Text(f"  ! {printable_text(note)}", style="yellow"))


def show_differences(console: Console, runs: Sequence[tuple[str, RunRecord]]) -> None:
    """What came of each run, and the options that differ, side by side."""
    letters = [letter_of(place) for place in range(len(runs))]
    for letter, (name, run) in zip(letters, runs, strict=True):
        console.print(Text.assemble((letter, "bold"), f"  {printable_text(name)}"))
        for note in run.notes:
            console.print(Text(f"   ! {printable_text(note)}", style="yellow"))
    results = [results_of(run) for _, run in runs]
    rows = [(name, [each[name] for each in results]) for name in results[0]]
    console.print(_side_by_side("result", letters, rows))
    options = differing([run.config for _, run in runs])
    if options:
        console.print(_side_by_side("option", letters, options))
    else:
        console.print("all options are the same, but for the run's folder")


def _figures(cells: Sequence[Text | str]) -> Table:
    table = Table.grid(padding=0)
    table.add_column(width=2)
    for name, width in COLUMNS.items():
        table.add_column(width=width, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_row("", *cells)
    return table


def _side_by_side(what: str, letters: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(what, overflow="fold")
    for letter in letters:
        table.add_column(letter, overflow="fold")
    for name, values in rows:
        cells = [brief(value) if isinstance(value, int | float) else shown(value) for value in values]
        table.add_row(printable_text(name), *(Text(printable_text(cell)) for cell in cells))
    return table


def _loss(value: float | None) -> str:
    """At most seven characters below 10,000, so that columns stay apart."""
    return NOTHING if value is None else f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def printable_text(text: str) -> str:
    """The text on one line, without secrets, safe for a terminal."""
    return printable(redact(text))
