"""An audit as a page for the terminal."""

from rich.console import Console
from rich.text import Text

from data_tools.abilities import Abilities
from data_tools.audit import Audit, failures, warnings
from data_tools.chat_template import NO_TEMPLATE
from data_tools.data_lines import data_lines, data_warnings
from data_tools.terminal import printable

BAR_WIDTH = 40


def _validation(audit: Audit) -> str:
    """How many validation rows there are, and how many of them are left out."""
    split = audit.validation
    if split is None:
        return ""
    skipped = split.findings["skipped_rows"].count
    lost = split.findings["dropped_rows"].count + split.findings["rows_without_supervision"].count + skipped
    left_out = f", of which {lost:,} of {split.rows + skipped:,} are left out" if lost else ""
    return f", {split.rows:,} more for validation ({split.supervised_tokens:,} tokens of answers){left_out}"


def show_audit(audit: Audit, console: Console, abilities: Abilities) -> None:
    """Prints the audit: counts, a histogram of the lengths, the longest samples, findings and verdict."""
    schedule, reasons, doubts = audit.schedule, failures(audit), [*warnings(audit), *data_warnings(audit.statistics)]
    doubts += [NO_TEMPLATE] if abilities.is_plain else []
    supervised_share = audit.supervised_tokens / max(audit.tokens, 1)
    lines = [
        *data_lines(audit.statistics, audit.notes),
        *(f"template  {line}" for line in abilities.lines()),
        f"rows      {audit.rows:,}{_validation(audit)}",
        f"samples   {audit.samples:,} of {audit.tokens / max(audit.samples, 1):,.0f} tokens on average",
        f"tokens    {audit.tokens:,}, {audit.supervised_tokens:,} of them trained ({supervised_share:.0%})",
        f"end token trained in {audit.end_token_trained_fraction:.1%} of the rows, present but masked in "
        f"{audit.end_token_masked_fraction:.1%}, cut in {audit.end_token_cut_fraction:.1%}",
        f"batch     {schedule.batch}",
        f"steps     {schedule.units_per_epoch:,} {schedule.unit} per epoch = {schedule.steps_per_epoch:,} steps; "
        f"{schedule.epochs} epoch{'s' if schedule.epochs > 1 else ''}, {schedule.total_steps:,} steps in all",
        "lengths   samples by number of tokens",
        *_bars(audit.length_histogram),
        "longest   " + ", ".join(f"{printable(source)} ({tokens:,} tokens)" for source, tokens in audit.longest),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    for style, label, sentences in (("yellow", "warning", doubts), ("bold red", "failure", reasons)):
        for sentence in sentences:
            console.print(Text.assemble((f"{label}   ", style), sentence), soft_wrap=True)
    good = "nothing found" if not doubts else "nothing that forbids training"
    verdict = Text(f"verdict   {len(reasons)} reason{'s' * (len(reasons) > 1)} not to train on this", "bold red")
    console.print(verdict if reasons else Text(f"verdict   {good}", "bold green"), soft_wrap=True)


def _bars(histogram: tuple[tuple[int, int, int], ...]) -> list[str]:
    max_count = max(count for _, _, count in histogram)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in histogram]
    width = max(map(len, labels))
    return [
        f"  {label:>{width}}  {'█' * round(BAR_WIDTH * count / max_count) or ('▏' if count else '')} {count:,}"
        for label, (_, _, count) in zip(labels, histogram, strict=True)
    ]
