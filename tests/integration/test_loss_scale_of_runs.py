"""In fp16 runs of the real command the loss scale survives a kill, and processes agree on an overflow."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, result_of, start_processes
from tests.conftest import arguments, run_command, with_batch
from tests.injections import Both, Fault, NotANumber, OtherScale
from train.config import CheckpointConfig, Config, EngineConfig
from train.track.metrics_file import read_metrics

START = OtherScale(2.0**34, 2)  # overflows in the tiny model, and again after two steps of growth


@pytest.fixture
def half(config: Config) -> Config:
    """Six fused fp16 steps with dropout and a checkpoint after each."""
    config = replace(config, model=replace(config.model, dtype="fp16"), engine=EngineConfig(kind="fused"))
    return replace(config, lora=replace(config.lora, dropout=0.1), checkpoint=CheckpointConfig(every=1))


def scales(run_dir: Path) -> list[tuple[float, int]]:
    """The (loss scale, overflows) of every step."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(row["train/loss_scale"], row["train/overflows"]) for row in rows]


def test_a_killed_run_resumes_with_its_loss_scale(half: Config, tmp_path: Path) -> None:
    """Killed after steps 1, 2 and 4, with overflows and growth in between, a run has the same bits and loss scales.

    The scale grows two steps after it was set, so the checkpoint must hold both the scale and the count.
    """
    outcome = run_command(arguments(at(half, tmp_path / "whole")), START)
    assert outcome.returncode == 0, outcome.stderr
    expected = scales(tmp_path / "whole")
    assert expected[0][1] > 2
    assert sum(overflows for _, overflows in expected[1:]) > 0
    assert len({scale for scale, _ in expected}) > 1
    words = arguments(at(half, tmp_path / "killed"))
    for saves in (1, 1, 2):
        outcome = run_command(words, Both(START, Fault("save", saves, "after")))
        assert outcome.returncode == -signal.SIGKILL, outcome.stderr
    outcome = run_command(words, START)
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step 4" in outcome.stdout
    assert scales(tmp_path / "killed") == expected
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")


def test_processes_retry_together(half: Config, tmp_path: Path) -> None:
    """On an infinite gradient in only one of two processes both retry the step, and no step is skipped."""
    case = at(with_batch(half, 2, 2), tmp_path / "run")
    both = [run.wait() for run in start_processes(arguments(case), [None, NotANumber((2,), only_gradient=True)])]
    assert [outcome.returncode for outcome in both] == [0, 0], both[1].stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("train/skipped" in row for row in rows)
    assert scales(tmp_path / "run") == [(2.0**16, 0), *[(2.0**15, int(step == 2)) for step in range(2, 7)]]


def test_other_types_have_no_loss_scale(config: Config) -> None:
    """An fp32 run logs no loss scale, and its checkpoint has none."""
    assert run_command(arguments(replace(config, checkpoint=CheckpointConfig(every=1)))).returncode == 0
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    assert rows
    assert not any("scale" in name or "overflows" in name for row in rows for name in row)
    assert '"scaler": {}' in (Path(config.run.dir) / "checkpoints/step-0000000006/trainer_state.json").read_text()
