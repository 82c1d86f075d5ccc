"""A comparison as tables for the terminal, at 80 columns."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from train.deliver.compare import show_first
from train.deliver.comparison import GENERAL, Comparison, group_json


def show_comparison(console: Console, found: Comparison, num_shown: int) -> None:
    """The first answers of each group, then the figures of all, then the losses."""
    if num_shown:
        for name, answers in found.answers.items():
            show_first(console, f"answers ({name})", answers, num_shown)
    if found.answers:
        console.print(_answers_table(found))
        console.print(
            "in brackets: 95 % intervals (Wilson). contained: the reference stands in the answer, but for case, "
            "punctuation and articles. F1: of words.",
            style="dim",
        )
    if found.losses:
        console.print(_losses_table(found))
    if GENERAL in found.losses:
        difference = found.losses[GENERAL].as_json()["difference"]
        what = "forgotten" if difference > 0 else "nothing forgotten"
        console.print(f"general text: {what} by this measure, {difference:+.4f} per token", highlight=False)
    if GENERAL in found.answers:
        unchanged = group_json(found.answers[GENERAL])["unchanged"]
        console.print(f"general questions: {unchanged['count']} of {unchanged['total']} answers unchanged")


def _answers_table(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for name in ("questions", "exact", "contained", "F1", "stopped", "tokens"):
        table.add_column(name, justify="left" if name == "questions" else "right", no_wrap=True)
    for name, answers in found.answers.items():
        group = group_json(answers)
        table.add_row(f"{name}, {len(answers)}")
        for when in ("before", "after"):
            figures = group[when]
            table.add_row(
                f"  {when}",
                *(_rate(figures[key]) for key in ("exact", "contained")),
                "-" if figures["f1"] is None else f"{figures['f1']:.3f}",
                _rate(figures["stopped"]),
                f"{figures['mean_tokens']:.1f}",
            )
    return table


def _rate(share: dict[str, Any]) -> str:
    """`12 % (4-28)`; at most 15 characters."""
    if share["share"] is None:
        return "-"
    return f"{share['share']:.0%} ({100 * share['low']:.0f}-{100 * share['high']:.0f})".replace("%", " %", 1)


def _losses_table(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("loss per token")
    for name in ("before", "after", "difference", "tokens"):
        table.add_column(name, justify="right")
    for name, loss in found.losses.items():
        figures = loss.as_json()
        means = (f"{figures['before']:.4f}", f"{figures['after']:.4f}", f"{figures['difference']:+.4f}")
        table.add_row(f"{name} {'text' if name == GENERAL else 'rows'}", *means, f"{loss.num_tokens:,}")
    return table
