"""Attempts of a run that consist of their rows alone, told to the real trackers in a process that may be killed."""

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import _FORKS, ROOT
from train.config import Config
from train.run.folder import RunFolder
from train.track.metrics_file import MetricsFile

LAST = 7
ROWS: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0.0, "eval/loss": 4.0, "eval/perplexity": 54.6},
    *(
        {
            "step": step,
            "epoch": step / 4,
            "train/loss": 4.0 - step / 4,
            "data/tokens": 100 * step,
            "perf/step_seconds": 0.5,
            "memory/peak_reserved_gib": 2.0 + step % 3,
            "data/sample_ids": [step],
            **({"eval/loss": 3.0 + (step - 4) / 10} if step in (4, 6) else {}),
        }
        for step in range(1, LAST + 1)
    ),
]
VALIDATED = (0, 4, 6)


def answers(step: int) -> list[dict[str, Any]]:
    """The table of a validation."""
    return [
        {"step": step, "question": f"What is part {i} | at?", "now": "a bolt\nof <b>steel</b>", "exact": i == 1}
        for i in range(2)
    ]


def attempt(config: Config, first: int, last: int, ends: str = "finished", **environment: str) -> str:
    """An attempt that completes the steps from `first` to `last`; returns what it printed.

    It ends as `finished`, as `saved` (75), as `failed` (70), or `killed` as soon as the last row is told, or `late`,
    killed when the listeners have taken it.
    """
    said = Path(config.run.dir).parent / "said"
    told = Told(ROWS[first : last + 1], VALIDATED)
    process = _FORKS.Process(target=_attempt, args=(config, told, ends, {**os.environ, **environment}, said))
    process.start()
    process.join(120)
    assert process.exitcode == (-signal.SIGKILL if ends in ("killed", "late") else 0), said.read_text()
    return said.read_text()


@dataclass(frozen=True)
class Told:
    """What an attempt tells: the rows, and the steps with a table."""

    rows: list[dict[str, Any]]
    validated: tuple[int, ...]


def _attempt(config: Config, told: Told, ends: str, environment: dict[str, str], said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update({name: value for name, value in environment.items() if value})
    os.chdir(ROOT)
    from train.track.isolated import Isolated
    from train.track.trackers import Trackers, wanted_listeners

    folder = RunFolder.of(config)
    folder.path.mkdir(exist_ok=True)
    folder.exit.unlink(missing_ok=True)
    kept = _shortened(folder, told.rows[0]["step"])
    listeners = [
        Isolated(each, folder.identifier("run_uid", lambda: "0123456789"), folder.metrics, folder.validation_answers)
        for each in wanted_listeners(config)
    ]
    trackers = Trackers(MetricsFile(folder.metrics, kept), None, listeners)
    for row in told.rows:
        if row["step"] in told.validated:
            table = answers(row["step"])
            with folder.validation_answers.open("a") as file:
                file.write("".join(json.dumps(answer) + "\n" for answer in table))
            trackers.table("validation", table)
        trackers.log(row)
    while ends == "late" and any(each.last_step < told.rows[-1]["step"] for each in listeners):
        time.sleep(0.05)
    if ends in ("killed", "late"):
        os.kill(os.getpid(), signal.SIGKILL)
    if ends == "finished":
        trackers.table("answers", [{"question": "Who?", "with": "me"}])
    code = {"finished": 0, "saved": 75, "failed": 70}[ends]
    folder.exit.write_text(json.dumps({"code": code, "name": ends, "reason": "for a test"}))
    trackers.finish()


def _shortened(folder: RunFolder, first: int) -> int:
    """Shortens what earlier attempts wrote to the steps before `first`; returns the length of metrics.jsonl."""
    if not folder.metrics.exists():
        return 0
    with suppress(FileNotFoundError):
        answers = folder.validation_answers.read_text().splitlines(keepends=True)
        folder.validation_answers.write_text("".join(line for line in answers if json.loads(line)["step"] < first))
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    return sum(len(line) for line in lines if json.loads(line)["step"] < first)


def numbers(rows: Sequence[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    """The rows as a listener should have them: without lists."""
    return [{name: value for name, value in row.items() if not isinstance(value, list)} for row in rows]
