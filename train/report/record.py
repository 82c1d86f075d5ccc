"""A run folder as it is read again, whatever is missing in it or damaged."""

import statistics
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from train.report.curves import Curve, curve, drawable
from train.report.state import State, is_locked, state_by
from train.report.values import at, whole
from train.run.attempts import Attempt, read_attempts
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object
from train.run.json_lines import read_lines

Row = dict[str, Any]
REFUSALS = (ExitCode.BAD_INPUT, ExitCode.FINGERPRINT_MISMATCH, ExitCode.NO_VALID_CHECKPOINT)
MAX_STEP = 2**53  # beyond it a float is no longer the step


@dataclass(frozen=True)
class RunRecord:
    """What is in a run folder; of a damaged one what can be read, and `notes` on the rest."""

    folder: RunFolder
    name: str
    config: dict[str, Any]
    plan: dict[str, Any]
    rows: list[Row]  # of metrics.jsonl, one a step, in order
    attempts: list[Attempt]
    exit: dict[str, Any]
    base: dict[str, Any]  # final/base.json
    audit: list[dict[str, Any]]  # what the audit counted
    state: State
    notes: list[str]

    @property
    def start(self) -> dict[str, Any]:
        """What the last attempt wrote down at its start."""
        return self.attempts[-1].start if self.attempts else {}

    @property
    def last_step(self) -> int:
        """The last step that the metrics have."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def total_steps(self) -> int | None:
        """The steps that were planned."""
        return whole(at(self.start, "data", "total_steps"))

    @property
    def ending(self) -> dict[str, Any]:
        """How the last attempt ended, by exit.json or, where it is gone or of a command that was refused untrained, by
        attempts.jsonl; empty: it did not."""
        return _ending(self.exit, self.attempts)

    @property
    def resumes(self) -> list[int]:
        """The steps after which later attempts went on."""
        return [_step(attempt.start.get("from_step")) or 0 for attempt in self.attempts[1:]]

    @property
    def skipped(self) -> list[int]:
        """The steps that updated nothing."""
        return [row["step"] for row in self.rows if row.get("train/skipped")]

    @cached_property
    def saved(self) -> list[int]:
        """The steps of the checkpoints, with those that were removed since.

        Rows of 0.1.0 do not say which step was saved: it is the one before the row that has the time of saving.
        """
        told = [_step(row.get("checkpoint/step")) for row in self.rows]
        told += [row["step"] - 1 for row in self.rows if "perf/save_seconds" in row and "checkpoint/step" not in row]
        return sorted({step for step in [*told, *self.folder.checkpoint_steps] if step is not None and step > 0})

    @property
    def held_out(self) -> Curve:
        """The losses on held-out data after steps; that before the first step is no candidate for the lowest."""
        return curve([row for row in self.rows if row["step"]], "eval/loss")

    def values(self, key: str) -> list[float]:
        """The numbers that rows have under the key, as far as they can be drawn."""
        return [value for row in self.rows if (value := drawable(row.get(key))) is not None]

    def median(self, key: str) -> float | None:
        """Their median; None where there are none."""
        values = self.values(key)
        return statistics.median(values) if values else None

    @cached_property
    def seconds(self) -> float | None:
        """How long its attempts took; of one without an end, the steps that are left of it. None: nothing is known."""
        if not self.attempts:
            return sum(self.values("perf/step_seconds")) or None
        bounds = [_step(attempt.start.get("from_step")) or 0 for attempt in self.attempts] + [MAX_STEP]
        return sum(
            _seconds(attempt, [row for row in self.rows if first < row["step"] <= last])
            for attempt, (first, last) in zip(self.attempts, pairwise(bounds), strict=True)
        )

    @property
    def last_sign(self) -> float:
        """When something was last written of the run, in seconds since the epoch; 0: never."""
        times = [0.0]
        for path in (self.folder.metrics, self.folder.attempts, self.folder.exit):
            with suppress(OSError):
                times.append(path.stat().st_mtime)
        return max(times)


def read_run(path: Path) -> RunRecord:
    """Reads a run folder; raises nothing, whatever is in it."""
    folder, notes = RunFolder(path), list[str]()
    objects: dict[Path, dict[str, Any]] = {}
    base = folder.final / "base.json"
    for entry in (folder.config, folder.plan, folder.exit, base):
        objects[entry] = {} if folder.is_foreign(entry) else read_object(entry)
        if not objects[entry] and entry.exists():
            notes.append(f"{entry.relative_to(path)} is damaged, or none of a run's")
    rows, attempts = _rows(folder.metrics, notes), read_attempts(folder)
    if _was_refused(objects[folder.exit], attempts):
        reason = str(objects[folder.exit].get("reason", "")).partition("\n")[0]
        notes.append(f"a later command was refused ({objects[folder.exit]['code']}): {reason}")
    code = whole(_ending(objects[folder.exit], attempts).get("code"))
    return RunRecord(
        folder=folder,
        name=path.resolve().name,
        config=objects[folder.config],
        plan=objects[folder.plan],
        rows=rows,
        attempts=attempts,
        exit=objects[folder.exit],
        base=objects[base],
        audit=objects_of(folder.audit, notes),
        state=state_by(code, is_locked(folder.lock), bool(attempts or rows)),
        notes=notes,
    )


def is_run(path: Path) -> bool:
    """Whether a run has written into this folder."""
    folder = RunFolder(path)
    if any(entry.is_file() for entry in (folder.metrics, folder.attempts, folder.exit)):
        return True
    return any(entry.is_file() and not folder.is_foreign(entry) for entry in (folder.config, folder.plan))


def objects_of(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; none where there is no file. What cannot be read is noted."""
    try:
        lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        found = read_lines(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    if lines > len(found):
        notes.append(f"{path.name}: {lines - len(found)} of {lines} lines hold no whole object and are left out")
    return found


def _rows(path: Path, notes: list[str]) -> list[Row]:
    found = objects_of(path, notes)
    by_step = {row["step"]: row for row in found if _step(row.get("step")) is not None}
    if lost := len(found) - len(by_step):
        notes.append(f"{path.name}: {lost} of {len(found)} rows have no step of their own and are left out")
    return [by_step[step] for step in sorted(by_step)]


def _step(value: Any) -> int | None:
    """A number of steps; None for anything else."""
    step = whole(value)
    return step if step is not None and 0 <= step <= MAX_STEP else None


def _ending(exit_record: dict[str, Any], attempts: list[Attempt]) -> dict[str, Any]:
    of_training = (attempts[-1].end or {}) if attempts else {}
    return of_training if _was_refused(exit_record, attempts) else exit_record or of_training


def _was_refused(exit_record: dict[str, Any], attempts: list[Attempt]) -> bool:
    """Whether exit.json is of a command that the run's last attempt knows nothing of: a mistyped one, say."""
    code = exit_record.get("code")
    return code in REFUSALS and bool(attempts) and (attempts[-1].end or {}).get("code") != code


def _seconds(attempt: Attempt, rows: list[Row]) -> float:
    with suppress(ValueError, TypeError, KeyError):  # no end, or no times
        ended = datetime.fromisoformat((attempt.end or {})["time"])
        return (ended - datetime.fromisoformat(attempt.start["time"])).total_seconds()
    return sum(drawable(row.get("perf/step_seconds")) or 0.0 for row in rows)
