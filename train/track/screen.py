"""What a terminal shows of a run: as many lines as it has room for, the most important ones first."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from data_tools.terminal import printable
from train.track.chart import bar, chart
from train.track.progress import Progress, Row
from train.track.words import ago, duration

Line = tuple[tuple[str, str], ...]  # (text, style) pairs
BLANK: Line = ()

LABEL = 12  # columns of a label
COLUMN = 42  # where the second fact of a line begins
BAR = 28  # columns of a bar, at most
CHART_ROWS = 8  # at most
WARNINGS_SHOWN = 3
_WRAPPING = Console(width=80)  # wraps text; nothing is written to it


@dataclass(frozen=True)
class Room:
    """What the terminal offers."""

    width: int
    height: int
    is_ascii: bool


@dataclass
class Block:
    """Lines that are shown together or not at all; those of the least importance go first."""

    importance: int
    lines: Sequence[Line]


def screen(progress: Progress, now: float, room: Room) -> list[Line]:
    """The lines, none wider than the terminal less a column, and at least one row fewer than it has.

    A full last column would make terminals wrap, and somebody else's line needs a row.
    """
    width, height = max(room.width - 1, 1), max(room.height - 1, 1)
    blocks = [
        Block(3, [_title(progress, width)]),
        Block(1, [BLANK]),
        *_bars(progress, now, width, room.is_ascii),
        Block(1, [BLANK]),
        Block(9, _loss(progress, width)),
        Block(2, []),  # the chart's place
        *_facts(progress, now, width),
        *_warnings(progress, width),
    ]
    while sum(len(block.lines) for block in blocks) > height and len(blocks) > 1:
        blocks.remove(min(blocks, key=lambda block: block.importance))
    free = height - sum(len(block.lines) for block in blocks)
    for block in blocks:
        if block.importance == 2 and free >= 2:
            block.lines = _chart(progress, width, min(free, CHART_ROWS), room.is_ascii)
    lines = [line for block in blocks for line in block.lines][:height]
    return [_fitted(line, width, room.is_ascii) for line in lines]


def _title(progress: Progress, width: int) -> Line:
    """As much as fits, the base at least."""
    facts, told = progress.facts, ""
    title = f"{facts.base} on {facts.data}"
    for part in (facts.method, facts.device):
        if cell_len(f"{title}{told}   {part}") <= width:
            told += f"   {part}"
    return ((title, "bold"), (told, "dim"))


def _bars(progress: Progress, now: float, width: int, is_ascii: bool) -> list[Block]:
    facts, step = progress.facts, progress.step
    # an epoch's last step shows it full, not the next one empty
    whole = max(0, -(-step // facts.steps_per_epoch) - 1)
    num_epochs = -(-facts.total_steps // facts.steps_per_epoch)
    past = "" if progress.began is None else f"{duration(now - progress.began[0])} so far"
    left = progress.seconds_left(now)
    counts = (f"{whole + 1} of {num_epochs}", f"{step:,} of {facts.total_steps:,}")
    shares = (facts.epochs(step) - whole, step / max(facts.total_steps, 1))
    times = (past, "" if left is None else f"{duration(left)} left")
    column = max(map(len, counts))
    length = min(BAR, width - LABEL - column - 22)
    blocks = []
    for importance, label, count, share, time in zip((6, 10), ("epoch", "step"), counts, shares, times, strict=True):
        told: list[Line] = [((f"{count:<{column}}", ""),), ((f"{share:4.0%}", ""),), ((time, "cyan"),)]
        if length > 0:
            told.insert(1, ((bar(share, length, is_ascii), "green"),))
        blocks.append(Block(importance, _flowing(label, told, width)))
    return blocks


def _loss(progress: Progress, width: int) -> list[Line]:
    if progress.first_loss is None:
        return [(*_label("loss"), ("none yet", "dim"))]
    loss = progress.row.get("train/loss")
    now = (f"{loss:.4f}", "bold") if loss is not None else ("step left out", "yellow")
    smoothed = (("smoothed ", "dim"), (f"{progress.smoothed.value():.4f}", "bold"))
    return _flowing("loss", [(now,), smoothed, (("first ", "dim"), (f"{progress.first_loss:.4f}", ""))], width)


def _chart(progress: Progress, width: int, height: int, is_ascii: bool) -> list[Line]:
    """The loss over the whole run, from its first step to its last; the mean where a column holds several."""
    columns = progress.losses.columns(max(width - LABEL, 1))
    known = [value for value in columns if value is not None]
    if not known:
        return [BLANK] * height
    labels = [""] * height
    labels[0], labels[-1] = f"{max(known):.3f}", f"{min(known):.3f}"
    drawn = chart(columns, height, is_ascii)
    return [
        ((f"{label:>{LABEL - 1}} ", "dim"), (line.rstrip(), "cyan")) for label, line in zip(labels, drawn, strict=True)
    ]


def _facts(progress: Progress, now: float, width: int) -> list[Block]:
    """Two facts a line where both fit."""
    blocks = [Block(8, lines)] if (lines := _validation(progress, width)) else []
    if not progress.row:
        return blocks
    pairs = [
        (5, *_optimizer(progress.row)),
        (7, _speed(progress), _mfu(progress.row)),
        (7, _memory(progress), _checkpoint(progress, now)),
    ]
    for importance, left, right in pairs:
        gap: Line = ((" " * max(2, COLUMN - columns_of(left)), ""),)
        both = (*left, *gap, *right)
        lines = [both] if left and right and columns_of(both) <= width else [left, right]
        blocks += [Block(importance, [line]) for line in lines if line]
    return blocks


def _validation(progress: Progress, width: int) -> list[Line]:
    row, best = progress.validation, progress.best_validation
    phrases: list[Line] = [((f"{row['eval/loss']:.4f}", "bold"),)] if "eval/loss" in row else []
    if "eval/perplexity" in row:
        phrases.append((("perplexity ", "dim"), (f"{row['eval/perplexity']:.2f}", "")))
    if best is not None:
        is_last = best[1] == row["step"]
        told = "best so far," if is_last else f"best {best[0]:.4f}"
        phrases.append(((f"{told} at step {best[1]:,}", "green" if is_last else "yellow"),))
    if "eval/general_loss" in row:
        phrases.append((("general ", "dim"), (f"{row['eval/general_loss']:.4f}", "")))
    return _flowing("validation", phrases, width) if phrases else []


def _optimizer(row: Row) -> tuple[Line, Line]:
    norm = row.get("train/grad_norm")
    gradient = (f"{norm:.3f}", "") if norm is not None else ("not finite", "yellow")
    return (*_label("learn. rate"), (f"{row['train/learning_rate']:.2e}", "")), (*_label("grad. norm"), gradient)


def _speed(progress: Progress) -> Line:
    speed = (*_label("tokens/s"), (f"{progress.row['perf/tokens_per_second']:,.0f}", "bold"))
    mean = f"  mean {progress.tokens / progress.seconds:,.0f}" if progress.seconds else ""
    return (*speed, (mean, "dim"))


def _mfu(row: Row) -> Line:
    return (*_label("MFU"), (f"{row['perf/mfu']:.1%}", "")) if "perf/mfu" in row else ()


def _memory(progress: Progress) -> Line:
    peak, planned = progress.facts.peak_gib(progress.row), progress.facts.planned_gib
    if peak is None:
        return ()
    against = f" of {planned:.2f} GiB planned" if planned else " GiB"
    return (*_label("memory"), (f"{peak:.2f}", "bold"), (against, ""))


def _checkpoint(progress: Progress, now: float) -> Line:
    if progress.failed_saves:
        return (*_label("checkpoint"), (f"{progress.failed_saves} could not be written", "red"))
    if not progress.checkpoint:
        return (*_label("checkpoint"), ("none yet", "dim"))
    since = "" if progress.checkpoint_at is None else f", {ago(now - progress.checkpoint_at)}"
    return (*_label("checkpoint"), (f"step {progress.checkpoint:,}{since}", ""))


def _warnings(progress: Progress, width: int) -> list[Block]:
    """The last warnings, of two lines at most; the newest counts as much as the loss."""
    blocks = []
    for place, (step, text) in enumerate(list(progress.warnings)[-WARNINGS_SHOWN:]):
        first, *rest = wrapped(f"step {step:,}: {text}", max(width - 2, 1))
        lines: list[Line] = [(("! ", "bold yellow"), (first, "yellow")), *((("  " + line, "yellow"),) for line in rest)]
        blocks.append(Block(4 + place, lines))
    if blocks:
        blocks[-1].importance = 9
    return blocks


@lru_cache(maxsize=64)
def wrapped(text: str, width: int) -> list[str]:
    """The text in at most two lines of `width` columns, safe for a terminal."""
    lines = [line.plain.rstrip() for line in Text(printable(text)).wrap(_WRAPPING, width)]
    return lines if len(lines) <= 2 else [lines[0], set_cell_size(lines[1], max(width - 4, 0)).rstrip() + " ..."]


def _label(text: str) -> Line:
    return ((f"{text:<{LABEL}}", "dim"),)


def _flowing(label: str, phrases: Sequence[Line], width: int) -> list[Line]:
    """The phrases behind the label, on further lines where they do not fit."""
    lines = [_label(label)]
    for phrase in phrases:
        if lines[-1] not in (_label(label), _label("")) and columns_of(lines[-1]) + 2 + columns_of(phrase) > width:
            lines.append(_label(""))
        gap: Line = () if len(lines[-1]) == 1 else (("  ", ""),)
        lines[-1] = (*lines[-1], *gap, *phrase)
    return lines


def columns_of(line: Line) -> int:
    """The columns that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def _fitted(line: Line, width: int, is_ascii: bool) -> Line:
    """The line cut to `width` columns, in characters that the terminal has."""
    fitted: list[tuple[str, str]] = []
    for text, style in line:
        text = text.encode("ascii", "backslashreplace").decode() if is_ascii else text
        length = cell_len(text)
        if length > width:
            text, length = set_cell_size(text, width), width
        fitted.append((text, style))
        width -= length
    return tuple(pair for pair in fitted if pair[0])
