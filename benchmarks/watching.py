"""What being watched costs a step: trackers on against off, in one run, in turns.

    python -m benchmarks.watching --profile demo --track.tensorboard true --track.wandb offline --train.epochs 4

All arguments are options of train/main.py. The run is a real one, on a pseudo-terminal with its live display; every
BLOCK steps its trackers fall silent, or wake again. A step counts from one call of `Trackers.log` to the next, so that
it contains what the call and the listeners' threads take. The first step of each turn is left out, and so are steps
that validate or save. The result goes to results/watching.json under the device's name.
"""

import json
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.cli import parse
from train.main import run
from train.run.devices import device_name
from train.run.versions import versions
from train.track.trackers import Trackers

RESULTS = Path(__file__).parent / "results" / "watching.json"
BLOCK = 20
WARMUP = 60  # steps: graphs are recorded, services have started


class Turns:
    """Stands in for `Trackers.log`: passes rows on in every second block of steps, and times all of them."""

    def __init__(self) -> None:
        self.real, self.steps = Trackers.log, 0
        self.last: tuple[float, bool] = (0.0, False)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.calls: list[float] = []

    def __call__(self, trackers: Trackers, row: Mapping[str, Any]) -> None:
        now = time.perf_counter()
        is_on, place = self.steps // BLOCK % 2 == 0, self.steps % BLOCK
        is_plain = not any(name.startswith(("eval/", "checkpoint/")) for name in row)
        if self.steps > WARMUP and place > 1 and is_plain:
            self.seconds[self.last[1]].append(now - self.last[0])
        if is_on:
            self.real(trackers, row)
            self.calls.append(time.perf_counter() - now)
        self.last, self.steps = (now, is_on), self.steps + 1


def main() -> None:
    """Runs it and prints the table."""
    turns = Turns()
    setattr(Trackers, "log", lambda trackers, row: turns(trackers, row))  # noqa: B010
    with tempfile.TemporaryDirectory() as folder:
        config = parse([*sys.argv[1:], "--run.dir", f"{folder}/run", "--compare.num_questions", "0"])
        terminal, screen = pty.openpty()
        own = os.dup(1)
        read = threading.Thread(target=_drain, args=(terminal,), daemon=True)
        read.start()
        os.dup2(screen, 1)
        try:
            run(config)
        finally:
            sys.stdout.flush()
            os.dup2(own, 1)
        device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        num_bytes = (Path(folder) / "run" / "metrics.jsonl").stat().st_size
    record = result(turns) | {"options": sys.argv[1:], "versions": versions(), "metrics_bytes": num_bytes}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {device: record}, indent=1) + "\n")
    for name, value in record.items():
        print(f"{name:>24}  {value}")


def result(turns: Turns) -> dict[str, Any]:
    """Milliseconds of a step with and without, their difference as a share of the step without, and a call's own."""
    on, off = turns.seconds[True], turns.seconds[False]
    medians, means = ([1e3 * of(each) for each in (on, off)] for of in (statistics.median, _trimmed))
    return {
        "num_steps": [len(on), len(off)],
        "median_ms": [round(each, 3) for each in medians],
        "mean_ms": [round(each, 3) for each in means],  # without the slowest and fastest 5 %
        "median_share": round(medians[0] / medians[1] - 1, 5),
        "mean_share": round(means[0] / means[1] - 1, 5),
        "call_ms": round(1e3 * statistics.median(turns.calls), 4),
    }


def _trimmed(seconds: list[float]) -> float:
    cut = len(seconds) // 20
    return statistics.fmean(sorted(seconds)[cut : len(seconds) - cut])


def _drain(terminal: int) -> None:
    while True:
        try:
            os.read(terminal, 65536)
        except OSError:
            return


if __name__ == "__main__":
    main()
