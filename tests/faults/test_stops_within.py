"""Stop signals within a step and within a validation: what is unfinished is dropped, and computed again to the bit."""

import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, exit_record, finish, known_reference, reference, result_of, start_processes
from tests.conftest import Outcome, arguments, run_command, thorough, with_batch
from tests.injections import Both, NotANumber, OtherScale
from tests.interruptions import AtMicroBatch, InValidation
from train.checkpoints.store import CheckpointStore
from train.config import CheckpointConfig, Config, EngineConfig
from train.run.attempts import read_attempts
from train.run.folder import RunFolder, read_object
from train.track.metrics_file import read_metrics


@pytest.fixture
def config(config: Config) -> Config:
    """The tiny run with its micro-batches as they are configured: faults are counted by them."""
    return replace(config, batch=replace(config.batch, merge="off"))


@pytest.fixture
def dropout(config: Config) -> Config:
    """The tiny run with dropout and six steps of 4, 4 and 2 micro-batches an epoch."""
    return replace(config, lora=replace(config.lora, dropout=0.1))


def steps_saved(run_dir: Path) -> list[int]:
    """The steps of the checkpoints, in order."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    """trainer_state.json of a checkpoint."""
    return read_object(run_dir / "checkpoints" / f"step-{step:010d}" / "trainer_state.json")


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without clocks, and without what a save has left in the next row of the same process."""
    return [
        {name: value for name, value in row.items() if not name.startswith(("perf/", "checkpoint/"))}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


PLACES = [(0, 0, 0), (1, 1, 1), (1, 3, 2), (2, 0, 2), (5, 1, 6)]


@pytest.mark.fault("T27")
@pytest.mark.parametrize(
    ("step", "number", "saved"), [*PLACES[:3], *(pytest.param(*each, marks=thorough) for each in PLACES[3:])]
)
def test_a_signal_within_a_step(step: int, number: int, saved: int, dropout: Config, tmp_path: Path) -> None:
    """The unfinished step leaves no trace; in the last micro-batch the step is finished instead. The same bits."""
    expected = known_reference(dropout)
    run_dir, words = tmp_path / "run", arguments(at(dropout, tmp_path / "run"))
    stopped = run_command(words, AtMicroBatch(step, number))
    assert stopped.returncode == 75, stopped.stderr
    assert steps_saved(run_dir)[-1:] == ([saved] if saved else [])
    assert [row["step"] for row in rows_of(run_dir)] == list(range(1, saved + 1))
    reason, (attempt,) = str(exit_record(run_dir)["reason"]), read_attempts(RunFolder(run_dir))
    assert attempt.end is not None
    if saved:
        told = re.fullmatch(r"stopped by SIGTERM; step (\d+) is saved, (\S+) s after the signal; .*again", reason)
        assert told is not None
        assert int(told[1]) == saved
        assert attempt.end["seconds_after_signal"] == exit_record(run_dir)["seconds_after_signal"] == float(told[2])
    else:
        assert "before the first step was complete, so there is nothing to save" in reason
    finish(words)
    assert result_of(run_dir) == expected


@pytest.mark.fault("T27")
@pytest.mark.parametrize("visit", [1, pytest.param(2, marks=thorough)])
def test_the_loss_scale_of_a_dropped_step(visit: int, dropout: Config, tmp_path: Path) -> None:
    """fp16: what is saved then is the scaler before the step, also where that had been computed at half the scale."""
    half = replace(dropout, model=replace(dropout.model, dtype="fp16", quantization="none"))
    scale = OtherScale(2.0**10, 50)
    overflows = Both(scale, NotANumber((5,), only_gradient=True))  # in the second step, with a scale one step old
    each = replace(at(half, tmp_path / "whole"), checkpoint=CheckpointConfig(every=1, keep=9))
    assert run_command(arguments(each), overflows).returncode == 0
    run_dir, words = tmp_path / "run", arguments(at(half, tmp_path / "run"))
    assert run_command(words, Both(overflows, AtMicroBatch(1, 0, visit))).returncode == 75
    assert steps_saved(run_dir) == [1]
    assert state_of(run_dir, 1)["scaler"] == state_of(tmp_path / "whole", 1)["scaler"]
    assert state_of(run_dir, 1)["scaler"]["_growth_tracker"] == 1
    assert run_command(words, Both(scale, NotANumber((1,), only_gradient=True))).returncode == 0
    assert [row["train/overflows"] for row in rows_of(run_dir)] == [0, 1, 0, 0, 0, 0]
    assert result_of(run_dir) == result_of(tmp_path / "whole")
    assert rows_of(run_dir) == rows_of(tmp_path / "whole")


def together(config: Config, run_dir: Path, faults: list[Callable[[], None] | None]) -> list[Outcome]:
    """The outcomes of one start, in order of rank."""
    return [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults)]


@pytest.mark.fault("T27")
@pytest.mark.parametrize("rank", [pytest.param(0, marks=thorough), 1])
def test_one_of_two_processes_is_asked(rank: int, dropout: Config, tmp_path: Path) -> None:
    """The other one learns it from the sum and drops the step too; the same bits."""
    config = with_batch(dropout, 1, 4)
    assert [o.returncode for o in together(config, tmp_path / "whole", [None, None])] == [0, 0]
    faults: list[Callable[[], None] | None] = [None, None]
    faults[rank] = AtMicroBatch(1, 1)
    both = together(config, tmp_path / "run", faults)
    assert [o.returncode for o in both] == [75, 75], both[0].stderr + both[1].stderr
    assert steps_saved(tmp_path / "run") == [1]
    assert ("s after the signal" in str(exit_record(tmp_path / "run")["reason"])) == (rank == 0)
    assert [o.returncode for o in together(config, tmp_path / "run", [None, None])] == [0, 0]
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.fault("T27")
def test_one_of_a_group_is_asked(dropout: Config, tmp_path: Path) -> None:
    """Both processes share each micro-batch, and leave a step, then a validation, at the same one; where one is killed
    the other ends with 81. The same bits."""
    config = replace(with_batch(dropout, 1, 4), engine=EngineConfig(kind="fused"))
    config = replace(config, batch=replace(config.batch, context_parallel=2))
    config = replace(config, data=replace(config.data, validation_path=config.data.path, gate="warn"))
    assert [o.returncode for o in together(config, tmp_path / "whole", [None, None])] == [0, 0]
    for fault in (AtMicroBatch(1, 1), InValidation(4)):
        both = together(config, tmp_path / "run", [None, fault])
        assert [o.returncode for o in both] == [75, 75], both[0].stderr + both[1].stderr
    assert steps_saved(tmp_path / "run") == [1, 5]
    both = together(config, tmp_path / "run", [None, AtMicroBatch(6, 1, kind=signal.SIGKILL)])
    assert [o.returncode for o in both] == [81, -9], both[0].stderr
    assert [o.returncode for o in together(config, tmp_path / "run", [None, None])] == [0, 0]
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


@pytest.mark.fault("T27")
@pytest.mark.parametrize("every", [pytest.param(1, marks=thorough), 4])
def test_a_signal_within_a_validation(every: int, dropout: Config, tmp_path: Path) -> None:
    """Its row waits in the checkpoint, through a second stop, and is logged with its validation, in the right place."""
    data = replace(dropout.data, validation_path=dropout.data.path, gate="warn")
    config = replace(dropout, data=data, checkpoint=CheckpointConfig(every=every))
    expected = reference(config, tmp_path / "whole")
    run_dir, words = tmp_path / "run", arguments(at(config, tmp_path / "run"))
    for micro_batch in (4, 1):
        assert run_command(words, InValidation(micro_batch)).returncode == 75
        assert steps_saved(run_dir)[-1] == 3
        assert [row["step"] for row in rows_of(run_dir)] == [1, 2]
        state = state_of(run_dir, 3)
        assert (state["unlogged"]["step"], state["validation_loss"]) == (3, None)
        assert "repeats the validation of step 3 and then logs that step" in str(exit_record(run_dir)["reason"])
    assert run_command(words, Both(InValidation(10), AtMicroBatch(3, 0))).returncode == 75  # behind the validation
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3]
    assert (state_of(run_dir, 3)["unlogged"], "eval/loss" in rows_of(run_dir)[2]) == ({}, True)
    assert run_command(words, InValidation(4)).returncode == 75  # behind the last step
    assert [row["step"] for row in rows_of(run_dir)] == [1, 2, 3, 4, 5]
    assert steps_saved(run_dir)[-1] == 6
    finish(words)
    assert result_of(run_dir) == expected
    assert rows_of(run_dir) == rows_of(tmp_path / "whole")
    best = [CheckpointStore(RunFolder(path), 2).best() for path in (run_dir, tmp_path / "whole")]
    assert best[0] is not None
    assert best[1] is not None
    assert (best[0][0].name, best[0][1]) == (best[1][0].name, best[1][1])
    assert state_of(run_dir, 6)["unlogged"] == {}


@pytest.mark.fault("T27")
def test_a_stop_waits_for_one_micro_batch(dropout: Config, tmp_path: Path) -> None:
    """Four micro-batches of 1.5 s: all is durable within one of them and a save, where a step would take 6 s."""
    slow = AtMicroBatch(1, 0, seconds=1.5)
    stopped = run_command(arguments(at(dropout, tmp_path / "run")), slow)
    assert stopped.returncode == 75
    assert steps_saved(tmp_path / "run") == [1]
    assert 1.5 <= float(str(exit_record(tmp_path / "run")["seconds_after_signal"])) < 3.5


@pytest.mark.fault("T27")
def test_a_stop_that_takes_longer_than_it_may_is_said(dropout: Config, tmp_path: Path) -> None:
    """Micro-batches of more than run.grace_seconds: a warning from the second step on, once."""
    slow = replace(dropout, run=replace(dropout.run, dir=str(tmp_path / "run"), grace_seconds=0.05))
    outcome = run_command(arguments(slow), AtMicroBatch(99, 0, seconds=0.06))
    assert outcome.returncode == 0, outcome.stderr
    warned = [row["step"] for row in rows_of(tmp_path / "run") if "run.grace_seconds = 0.05" in row.get("warning", "")]
    assert warned == [2]
    assert "lower --batch.per_device" in outcome.stdout.lower()


@thorough
@pytest.mark.fault("T27")
def test_a_checkpoint_of_another_run_is_saved_here(dropout: Config, tmp_path: Path) -> None:
    """A run that goes on from a named checkpoint and is stopped in its first step has a checkpoint of its own."""
    every = replace(dropout, checkpoint=CheckpointConfig(every=1))
    expected = reference(every, tmp_path / "other")
    start = tmp_path / "other" / "checkpoints" / "step-0000000005"
    run_dir = tmp_path / "run"
    named = replace(every, run=replace(every.run, dir=str(run_dir), resume=str(start)))
    assert run_command(arguments(named), AtMicroBatch(5, 0)).returncode == 75
    assert steps_saved(run_dir) == [5]
    finish(arguments(at(every, run_dir)))
    assert result_of(run_dir)["adapters"] == expected["adapters"]
