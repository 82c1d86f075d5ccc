"""What is said of a run at its end, out of its metrics.jsonl: the whole run, with all its attempts."""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_tools.terminal import printable
from train.bundled import typed
from train.recipe import forgot, taught_little
from train.run.attempts import read_attempts
from train.run.folder import RunFolder, read_object
from train.track.chart import chart, means
from train.track.progress import Row, RunFacts, SmoothedLoss
from train.track.screen import Room
from train.track.words import duration

LABEL = 12
CHART_WIDTH, CHART_HEIGHT = 60, 3
WARNINGS_SHOWN = 3


@dataclass(frozen=True)
class Trend:
    """How a loss went: its first value, the lowest and the last, with their steps."""

    first: tuple[int, float]
    lowest: tuple[int, float]
    last: tuple[int, float]

    @classmethod
    def of(cls, rows: Sequence[Row], name: str) -> "Trend | None":
        """Of the rows that have a value of this name, the lowest of those behind a step; None where none has."""
        found = [(row["step"], row[name]) for row in rows if name in row]
        reached = [pair for pair in found if pair[0]] or found
        return cls(found[0], min(reached, key=lambda pair: pair[1]), found[-1]) if found else None


@dataclass(frozen=True)
class Totals:
    """The run's sums, over the steps that are in metrics.jsonl."""

    num_steps: int
    num_skipped: int
    seconds: float  # of the steps, without validations, saves and starts
    tokens: int
    supervised_tokens: int
    peak_gib: float | None

    @classmethod
    def of(cls, facts: RunFacts, rows: Sequence[Row]) -> "Totals":
        """Of all rows of steps."""
        steps = [row for row in rows if "perf/step_seconds" in row]
        peaks = [peak for row in rows if (peak := facts.peak_gib(row)) is not None]
        return cls(
            num_steps=len(steps),
            num_skipped=sum(bool(row.get("train/skipped")) for row in steps),
            seconds=sum(row["perf/step_seconds"] for row in steps),
            tokens=sum(row["data/tokens"] for row in steps),
            supervised_tokens=sum(row["data/supervised_tokens"] for row in steps),
            peak_gib=max(peaks, default=None),
        )


def summary(facts: RunFacts, rows: Sequence[Row], room: Room) -> list[str]:
    """The lines about a finished run."""
    folder = facts.folder
    result = "the model" if facts.is_whole else "the adapter"
    where = [(f"{folder.final}/", f"{result} and its tokenizer")]
    where += [(f"{folder.answers}", "without and with it")] if folder.answers.exists() else []
    where += [(f"{folder.metrics}", "every step")]
    return [
        _head("finished", facts, rows),
        *_losses(facts, rows, room),
        *_answers(facts, rows),
        *_costs(facts, rows),
        *_warnings(facts, rows),
        *_mirror(folder),
        *table("where", where),
        *table("next", next_commands(folder, facts.is_whole)),
    ]


def short_summary(facts: RunFacts, rows: Sequence[Row], room: Room) -> list[str]:
    """The lines about a run that was stopped and saved; how it goes on is said by who ends it."""
    about = [*_costs(facts, rows), *_warnings(facts, rows), *_mirror(facts.folder)]
    return [_head("stopped", facts, rows), *_losses(facts, rows, room), *about]


def next_commands(folder: RunFolder, is_whole: bool) -> list[tuple[str, str]]:
    """What a user may type now, and what for. A base that was trained whole has nothing to compare with."""
    command, run = handloop(), shlex.quote(str(folder.path))
    report = (f"{command} report {run}", "all of it on a page")
    if is_whole:
        return [report]
    return [
        (f"{command} compare {run}", "what it learnt, and forgot"),
        (f"{command} chat {run}", "talk to it"),
        report,
    ]


def handloop() -> str:
    """The command as it can be typed here: its place, where it is not on the PATH."""
    beside = Path(sys.executable).with_name("handloop")
    if shutil.which("handloop") or not beside.exists():
        return "handloop"
    return typed(beside)


def _head(word: str, facts: RunFacts, rows: Sequence[Row]) -> str:
    """Steps and time; of a run that was resumed, that this is all of it."""
    totals, last = Totals.of(facts, rows), rows[-1]["step"]
    attempts = len(read_attempts(facts.folder))
    whole = f", all {attempts} attempts together" if attempts > 1 else ""
    steps = f"{last:,} of {facts.total_steps:,} steps" if last < facts.total_steps else f"{last:,} steps"
    skipped = f", {totals.num_skipped:,} of them left out" if totals.num_skipped else ""
    epochs = f"{facts.epochs(last):.2f}".rstrip("0").rstrip(".")
    return _line(word, f"{steps}{skipped}, {epochs} epochs, {duration(totals.seconds)} in steps{whole}")


def _losses(facts: RunFacts, rows: Sequence[Row], room: Room) -> list[str]:
    lines: list[str] = []
    if trend := Trend.of(rows, "train/loss"):
        losses, smoothed = [row["train/loss"] for row in rows if "train/loss" in row], SmoothedLoss()
        for loss in losses:
            smoothed.add(loss)
        told = f"{_trend(trend, 'first')}, {smoothed.value():.4f} smoothed"
        width = min(CHART_WIDTH, room.width - 1 - LABEL)
        drawn = chart(means(losses, width), CHART_HEIGHT, room.is_ascii) if width > 0 else []
        lines += [_line("loss", told), *(" " * LABEL + row.rstrip() for row in drawn)]
    for name, label in (("eval/loss", "validation"), ("eval/general_loss", "general")):
        if trend := Trend.of(rows, name):
            lines.append(_line(label, _trend(trend, "before" if trend.first[0] == 0 else "first")))
    return lines


def _trend(trend: Trend, beginning: str) -> str:
    (_, first), (step, lowest), (last_step, last) = trend.first, trend.lowest, trend.last
    place = "the last" if step == last_step else f"step {step:,}"
    return f"{first:.4f} {beginning}, {lowest:.4f} lowest ({place}), {last:.4f} last"


def _answers(facts: RunFacts, rows: Sequence[Row]) -> list[str]:
    """How many questions were answered right, where the questions have answers to compare with."""
    told, lines, warnings = [], [], []
    for kind, path in facts.folder.asked.items():
        with suppress(OSError, ValueError, TypeError, KeyError):
            asked = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["reference"] is not None]
            before, after = _right(asked)
            told += [f"{after} of {len(asked)} {kind.replace('_', '-')} ({before} before)"] if asked else []
            lines += _by_path(kind.replace("_", "-"), asked)
            step = rows[-1]["step"]
            if kind == "trained" and asked:
                warnings.append(taught_little(after, len(asked), step, facts.epochs(step), facts.max_steps))
            elif kind == "general":
                warnings.append(forgot(after, before, len(asked)))
    lines += [_line("warning", warning) for warning in warnings if warning]
    return ([_line("right", ", ".join(told))] if told else []) + lines


def _right(asked: Sequence[Row]) -> tuple[int, int]:
    """Right answers of the base and of the tuned model."""
    before, after = (sum(bool(row[key]) for row in asked) for key in ("before_contained", "contained"))
    return before, after


def _by_path(kind: str, asked: Sequence[Row]) -> list[str]:
    """Right answers of each of the user's paths, where the questions are from several."""
    paths = list(dict.fromkeys(row["path"] for row in asked if "path" in row))
    told = []
    for path in paths if len(paths) > 1 else []:
        own = [row for row in asked if row["path"] == path]
        before, after = _right(own)
        told.append(f"{Path(path).name} {after} of {len(own)} ({before} before)")
    return [" " * LABEL + f"{kind}: {', '.join(told)}"] if told else []


def _costs(facts: RunFacts, rows: Sequence[Row]) -> list[str]:
    totals = Totals.of(facts, rows)
    speed = f", {totals.tokens / totals.seconds:,.0f} a second" if totals.seconds else ""
    lines = [_line("tokens", f"{totals.tokens:,}, {totals.supervised_tokens:,} of them trained{speed}")]
    if totals.peak_gib is not None:
        planned = f", {facts.planned_gib:.2f} planned" if facts.planned_gib else ""
        lines.append(_line("memory", f"{totals.peak_gib:.2f} GiB at the peak{planned}"))
    return lines


def _warnings(facts: RunFacts, rows: Sequence[Row]) -> list[str]:
    found = [f"step {row['step']:,}: {printable(str(row['warning']))}" for row in rows if "warning" in row]
    more = len(found) - WARNINGS_SHOWN
    lines = [f"{more:,} earlier ones are in {facts.folder.metrics.name}"] if more > 0 else []
    return [_line("warning", text) for text in [*lines, *found[-WARNINGS_SHOWN:]]]


def _mirror(folder: RunFolder) -> list[str]:
    """What this attempt has copied to the mirror, if it has one."""
    found = read_object(folder.mirror)
    if not found:
        return []
    counts = ", ".join(f"{found[name]} {name}" for name in ("copied", "failed", "overtaken") if found.get(name))
    place = f"step {found['step']} is whole at" if found.get("step") else "nothing is at"
    return [_line("mirror", printable(f"{place} {found.get('url')}" + (f"; {counts}" if counts else "")))]


def table(label: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of what and why, the label before the first."""
    width = max(len(what) for what, _ in pairs)
    lines = [f"{what:<{width}}  {why}" for what, why in pairs]
    return [_line(label, lines[0]), *(" " * LABEL + line for line in lines[1:])]


def _line(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"
