"""Over hundreds of steps with a checkpoint after each, memory and open files do not grow."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at
from tests.conftest import Run, arguments
from tests.tally import Tally
from train.config import CheckpointConfig, Config


def open_files(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@pytest.mark.fault("T25")
def test_nothing_grows(config: Config, tmp_path: Path, tally: Tally) -> None:
    """From the first fifth of the run to its end, no more open files and less than 5 % more resident memory."""
    steps = tally.times(60, 500)
    config = replace(config, checkpoint=CheckpointConfig(every=1), train=replace(config.train, epochs=steps // 3))
    run = Run(arguments(at(config, tmp_path / "run")))
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen: list[tuple[int, float]] = []
    while run.is_alive():
        rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if steps // 5 <= rows < steps - 3:
            try:
                seen.append((open_files(run.process.pid), resident_mib(run.process.pid)))
            except (OSError, ValueError):  # it has just ended
                break
        run.process.join(0.1)
    outcome = run.wait()
    tally.check(outcome.returncode == 0, outcome.stderr[-300:])
    tally.check(len(seen) > 5, f"seen {len(seen)} times")
    third = max(1, len(seen) // 3)
    files = [min(count for count, _ in part) for part in (seen[:third], seen[-third:])]
    memory = [sorted(mib for _, mib in part)[third // 2] for part in (seen[:third], seen[-third:])]
    tally.check(files[1] <= files[0], f"open files {files}")
    tally.check(memory[1] < 1.05 * memory[0], f"resident {memory} MiB")
    tally.check(len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2, "checkpoints left")
