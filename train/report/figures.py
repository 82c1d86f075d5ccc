"""Which curves a report shows, with the sentence and the numbers of each."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from train.report.blocks import Cell, Table
from train.report.curves import Curve, curve, drawable, smoothed, span_of, table_steps
from train.report.record import RunRecord
from train.report.values import at, brief, plural, texts

LOSSES = re.compile(r"eval/(?!best_).*loss")
WIDE, TOO_WIDE = 30, 1e20  # largest over smallest value between which an axis is logarithmic
LINEAR = ("learning-rate", "memory", "mfu")  # whatever their values
MAX_WANTED = 40  # validations whose rows a table shows in any case
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One curve of a chart; `role` is raw (pale), line, points (marked as well) or limit (horizontal)."""

    label: str
    full: Curve
    role: str
    series: int  # its colour
    column: str = ""  # its heading in the table; empty: the table lacks it


@dataclass(frozen=True)
class Marks:
    """Steps that a chart marks."""

    resumes: Sequence[int] = ()
    skipped: Sequence[int] = ()
    saved: Sequence[int] = ()


@dataclass(frozen=True)
class Chart:
    """What is drawn in one picture."""

    key: str
    title: str
    unit: str
    lines: Sequence[Line]
    marks: Marks
    last_step: int  # of all runs: where the axis ends
    sentence: str
    table: Table

    @property
    def is_logarithmic(self) -> bool:
        """Whether the values are positive and of such different sizes that the small ones could not be seen."""
        if self.key in LINEAR:
            return False
        values = [value for line in self.lines if line.role != "raw" for value in line.full.values]
        return bool(values) and min(values) > 0 and WIDE < max(values) / min(values) < TOO_WIDE


@dataclass(frozen=True)
class Kind:
    """A chart that every run may have."""

    key: str
    title: str
    unit: str
    lines: Callable[[RunRecord], list[Line]]


def _measured(key: str, label: str) -> Callable[[RunRecord], list[Line]]:
    """A noisy number of each step: pale, with its smoothed curve over it."""

    def lines(run: RunRecord) -> list[Line]:
        raw = curve(run.rows, key)
        over = f"mean of {span_of(len(raw))} steps around it"
        return [Line(label, raw, "raw", 0, key), Line(over, smoothed(raw), "line", 0)]

    return lines


def _exact(key: str, label: str) -> Callable[[RunRecord], list[Line]]:
    """A number of each step that is not noise."""
    return lambda run: [Line(label, curve(run.rows, key), "line", 0, key)]


def _training_loss(run: RunRecord) -> list[Line]:
    held_out = Line("validation", curve(run.rows, "eval/loss"), "points", 1, "eval/loss")
    return [*_measured("train/loss", "each step")(run), held_out]


def _validation(run: RunRecord) -> list[Line]:
    keys = sorted({key for row in run.rows for key in row if LOSSES.fullmatch(key)}, key=lambda key: (len(key), key))
    return [Line(loss_name(run, key), curve(run.rows, key), "points", i, key) for i, key in enumerate(keys)]


def loss_name(run: RunRecord, key: str) -> str:
    """What a validation loss is of."""
    if match := re.fullmatch(r"eval/path(\d+)/loss", key):
        paths = texts(run.plan.get("validation_paths"))
        place = int(match[1]) - 1
        return paths[place] if 0 <= place < len(paths) else f"held-out data {match[1]}"
    return {"eval/loss": "all held-out data", "eval/general_loss": "general text (its rise is forgetting)"}.get(
        key, key
    )


def _memory(run: RunRecord) -> list[Line]:
    reserved, allocated = (curve(run.rows, f"memory/peak_{kind}_gib") for kind in ("reserved", "allocated"))
    lines = [
        Line("reserved by torch", reserved, "line", 0, "memory/peak_reserved_gib"),
        Line("allocated", allocated, "line", 1, "memory/peak_allocated_gib"),
    ]
    planned = drawable(at(run.plan, "peak_bytes"))
    if planned and len(reserved):
        ends = (reserved.steps[0], reserved.steps[-1])
        lines.append(Line("planned", Curve(ends, (planned / GIB, planned / GIB)), "limit", 2))
    return lines


KINDS = (
    Kind("loss", "Training loss", "nats per token", _training_loss),
    Kind("validation", "Validation loss", "nats per token", _validation),
    Kind("learning-rate", "Learning rate", "learning rate", _exact("train/learning_rate", "learning rate")),
    Kind("gradient-norm", "Gradient norm before clipping", "norm", _measured("train/grad_norm", "each step")),
    Kind("tokens", "Tokens a second", "tokens/s", _measured("perf/tokens_per_second", "each step")),
    Kind("time", "Time of a step", "seconds", _measured("perf/step_seconds", "each step")),
    Kind("mfu", "Model FLOPs utilisation", "share of the GPU's peak", _measured("perf/mfu", "each step")),
    Kind("loss-scale", "Loss scale of fp16", "loss scale", _exact("train/loss_scale", "loss scale")),
    Kind("memory", "Peak memory on the GPU", "GiB", _memory),
)


def charts_of(run: RunRecord) -> list[Chart]:
    """The charts of one run that have something to show."""
    marks = Marks(run.resumes, run.skipped, run.saved)
    charts = []
    for kind in KINDS:
        lines = [line for line in kind.lines(run) if len(line.full)]
        if lines:
            sentence = f"{'; '.join(map(_told, filter(_is_said, lines)))}. {_marks_told(marks)}".rstrip()
            table = _table(kind.title, [("", line) for line in lines if line.column])
            charts.append(Chart(kind.key, kind.title, kind.unit, lines, marks, run.last_step, sentence, table))
    return charts


def overlaid(runs: Sequence[tuple[str, RunRecord]]) -> list[Chart]:
    """The charts of several runs, each run's most telling line in its own colour, by the runs' letters."""
    charts, last = [], max(run.last_step for _, run in runs)
    for kind in KINDS:
        drawn, listed, told = [], [], []
        for place, (letter, run) in enumerate(runs):
            found = [line for line in kind.lines(run) if len(line.full)]
            main = next((line for line in found if line.role in ("line", "points")), None)
            if main is None:
                continue
            drawn.append(replace(main, label=f"{letter}: {run.name}", series=place))
            exact = next(line for line in found if line.column and line.series == main.series)
            listed.append((letter, exact))
            told.append(f"{letter}: {_figures(exact.full)}")
        if drawn:
            smooth = "The lines are means of the steps around each. " if any(not line.column for line in drawn) else ""
            table, sentence = _table(kind.title, listed), f"{smooth}{'; '.join(told)}."
            charts.append(Chart(kind.key, kind.title, kind.unit, drawn, Marks(), last, sentence, table))
    return charts


def _is_said(line: Line) -> bool:
    return line.role != "line" or bool(line.column)  # a smoothed curve says nothing that its steps do not


def _told(line: Line) -> str:
    is_constant = line.role == "limit"
    return f"{line.label}: {brief(line.full.values[0]) if is_constant else _figures(line.full)}"


def _figures(of: Curve) -> str:
    """First, last and extreme values in words."""
    if len(set(of.values)) == 1:
        return f"{brief(of.values[0])} throughout" if len(of) > 1 else f"{brief(of.values[0])} at step {of.steps[0]:,}"
    ends = f"{brief(of.values[0])} at step {of.steps[0]:,}, {brief(of.values[-1])} at step {of.steps[-1]:,}"
    low, high = (f"{brief(of.values[i])} at step {of.steps[i]:,}" for i in (of.lowest, of.highest))
    return f"{ends}; lowest {low}, highest {high}"


def _marks_told(marks: Marks) -> str:
    told = []
    if marks.resumes:
        told.append(f"resumed after {_steps(marks.resumes)}")
    if marks.skipped:
        told.append(f"skipped: {_steps(marks.skipped)}")
    if marks.saved:
        told.append(plural(len(marks.saved), "checkpoint"))
    return f"Marked: {'; '.join(told)}." if told else ""


def _steps(steps: Iterable[int]) -> str:
    numbers = [f"{step:,}" for step in steps]
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"step{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:10])}{more}"


def _table(title: str, lines: Sequence[tuple[str, Line]]) -> Table:
    """The lines' numbers by step, a run after the other: all, or some where they are many."""
    rows: list[list[Cell]] = []
    columns = list(dict.fromkeys(line.column for _, line in lines))
    letters = list(dict.fromkeys(letter for letter, _ in lines))
    is_whole = True
    for letter in letters:
        curves = {line.column: line.full for of, line in lines if of == letter}
        values = {column: dict(zip(each.steps, each.values, strict=True)) for column, each in curves.items()}
        marked = [each for column, each in curves.items() if column.startswith("eval/")]
        steps = table_steps(list(curves.values()), [step for each in marked for step in each.steps[-MAX_WANTED:]])
        is_whole = is_whole and set(steps) == {step for each in curves.values() for step in each.steps}
        first: list[Cell] = [letter] if letter else []
        rows += [[*first, step, *(values.get(column, {}).get(step) for column in columns)] for step in steps]
    some = "" if is_whole else "; not every step is listed, but the ends and the extremes are"
    caption = f"{title} in numbers ({plural(len(rows), 'row')}{some})"
    return Table(caption, [*(["run"] if letters != [""] else []), "step", *columns], rows, is_folded=True)
