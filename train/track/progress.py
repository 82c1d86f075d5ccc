"""What is known of a run while it goes on, gathered from the rows of metrics.jsonl."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from train.run.folder import RunFolder

Row = Mapping[str, Any]

SMOOTHING_STEPS = 20  # of the exponential mean: each step weighs 1/20, the ones before it 19/20
NUM_BUCKETS = 1024  # of losses over the whole run: more than a terminal has columns
WARNINGS_KEPT = 5


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step."""

    folder: RunFolder
    base: str
    data: str
    method: str
    device: str
    total_steps: int
    steps_per_epoch: int
    planned_gib: float = 0.0  # predicted peak of GPU memory; 0 where none is predicted
    uses_graphs: bool = False  # the prediction is then of reserved memory, else of allocated
    max_steps: int = 0  # train.max_steps; 0: no such limit
    is_whole: bool = False  # the base itself is trained, without adapters

    def peak_gib(self, row: Row) -> float | None:
        """The measured peak that is to be compared with the plan; None where there is no GPU."""
        return row.get("memory/peak_reserved_gib" if self.uses_graphs else "memory/peak_allocated_gib")

    def epochs(self, step: int) -> float:
        """Epochs that `step` steps are."""
        return step / self.steps_per_epoch


class SmoothedLoss:
    """Exponential mean over about SMOOTHING_STEPS steps, without the bias to zero at its start (as Adam's)."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.weight = 0.0

    def add(self, loss: float) -> None:
        """Takes the next step's loss."""
        kept = 1 - 1 / SMOOTHING_STEPS
        self.sum = kept * self.sum + loss / SMOOTHING_STEPS
        self.weight = kept * self.weight + 1 / SMOOTHING_STEPS

    def value(self) -> float:
        """The mean; one loss must have been added."""
        return self.sum / self.weight


class LossHistory:
    """The losses of a whole run as means of at most NUM_BUCKETS equal parts of it, for a chart."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        count = min(max(total_steps, 1), NUM_BUCKETS)
        self.sums, self.counts = [0.0] * count, [0] * count

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step from 1 to total_steps."""
        place = (step - 1) * len(self.sums) // self.total_steps
        self.sums[place] += loss
        self.counts[place] += 1

    def columns(self, width: int) -> list[float | None]:
        """The run in `width` columns; None where no loss is known."""
        found: list[float | None] = []
        for column in range(width):
            start = column * len(self.sums) // width
            end = max(start + 1, (column + 1) * len(self.sums) // width)
            count = sum(self.counts[start:end])
            found.append(sum(self.sums[start:end]) / count if count else None)
        return found


class Progress:
    """All that a display shows; `take` and `remember` are the only ways in."""

    def __init__(self, facts: RunFacts, first_step: int) -> None:
        self.facts = facts
        self.step = first_step
        self.row: Row = {}  # the last optimizer step's
        self.validation: Row = {}  # the last row with a validation
        self.best_validation: tuple[float, int] | None = None  # loss and step
        self.smoothed = SmoothedLoss()
        self.losses = LossHistory(facts.total_steps)
        self.first_loss: float | None = None
        self.checkpoint = first_step  # the step of the last one; 0: none yet
        self.checkpoint_at: float | None = None  # by the clock of `take`; None: an earlier attempt's
        self.failed_saves = 0  # in a row
        self.warnings: deque[tuple[int, str]] = deque(maxlen=WARNINGS_KEPT)
        self.began: tuple[float, int] | None = None  # when this attempt's first row came, and its step
        self.last_at = 0.0
        self.seconds = 0.0  # of this attempt's steps, without validation and saves
        self.tokens = 0

    def remember(self, rows: Iterable[Row]) -> None:
        """Takes the rows of earlier attempts, which say nothing about this one's speed."""
        for row in rows:
            self._learn(row)

    def take(self, row: Row, at: float) -> None:
        """Takes the row that came at the time `at`, in seconds of a clock that only goes forward."""
        self._learn(row)
        self.step, self.last_at = row["step"], at
        if "perf/step_seconds" not in row:
            return
        self.seconds += row["perf/step_seconds"]
        self.tokens += row["data/tokens"]
        # the first step of an attempt is slow (graphs are captured), so the pace is measured from its end
        self.began = self.began or (at, row["step"])
        if saved := saved_step(row):
            self.checkpoint, self.checkpoint_at = saved, at - row["perf/step_seconds"]

    def _learn(self, row: Row) -> None:
        step = row["step"]
        if "train/learning_rate" in row:
            self.row = row
        if is_validated(row):
            self.validation = row
        if "eval/loss" in row:
            best = (row["eval/loss"], step)
            if step:  # before the first one nothing was reached
                self.best_validation = min(self.best_validation or best, best)
        if (loss := row.get("train/loss")) is not None and 0 < step <= self.facts.total_steps:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.smoothed.add(loss)
            self.losses.add(step, loss)
        self.failed_saves = row.get("perf/failed_saves", self.failed_saves)
        if "warning" in row:
            self.warnings.append((step, str(row["warning"])))

    def seconds_left(self, now: float) -> float | None:
        """By this attempt's mean pace, with its validations and saves; None before its second step, 0 at the end."""
        if self.step >= self.facts.total_steps:
            return 0.0
        if self.began is None or self.step <= self.began[1]:
            return None
        began_at, began_step = self.began
        pace = (self.last_at - began_at) / (self.step - began_step)
        return max(0.0, pace * (self.facts.total_steps - self.step) - (now - self.last_at))


def is_validated(row: Row) -> bool:
    """Whether something was measured on held-out samples or a general text."""
    return "eval/loss" in row or "eval/general_loss" in row


def saved_step(row: Row) -> int | None:
    """The step of the checkpoint that became durable since the row before; runs of 0.1 do not name it."""
    if "checkpoint/step" in row:
        return row["checkpoint/step"]
    is_saved = "perf/save_seconds" in row and not row.get("perf/failed_saves")
    return row["step"] - 1 if is_saved else None
