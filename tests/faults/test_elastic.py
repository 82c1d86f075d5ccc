"""The same command on another number of processes: every step keeps its samples, or the run is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.compare_runs import at, change_states, reference, result_of, start_processes
from tests.conftest import Outcome, arguments, run_command, thorough, with_batch
from tests.injections import Fault
from train.checkpoints.contents import ADAPTER
from train.config import BatchConfig, CheckpointConfig, Config, EngineConfig, ModelConfig, OptimConfig
from train.run.folder import RunFolder, read_object
from train.track.metrics_file import read_metrics


@pytest.fixture
def config(config: Config) -> Config:
    """In fp32 with torch's AdamW, whose state is not quantised: what is apart is rounding."""
    model = ModelConfig(config.model.name_or_path, random_init=True, quantization="none")
    config = replace(config, model=model, optim=OptimConfig("adamw", lr=1e-3), run=replace(config.run, dir="unused"))
    return replace(config, checkpoint=CheckpointConfig(every=1), train=replace(config.train, epochs=2))


def on(num_processes: int, config: Config, run_dir: Path, fault: Fault | None = None) -> list[Outcome]:
    """How the command ends in each process; `fault` is the first one's."""
    faults = [fault] + [None] * (num_processes - 1)
    if num_processes == 1:
        return [run_command(arguments(at(config, run_dir)), fault)]
    return [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults)]


def samples_of(run_dir: Path) -> list[list[int]]:
    return [row["data/sample_ids"] for row in read_metrics(run_dir / "metrics.jsonl")]


def apart(one: Path, other: Path) -> tuple[float, float]:
    """The largest relative difference of a loss, and that of the adapters."""
    losses = [[row["train/loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (one, other)]
    adapters = [safetensors.torch.load_file(path / "final" / ADAPTER) for path in (one, other)]
    between = [
        torch.cat([adapter[name].flatten() for name in sorted(adapters[0]) if "lora_B" in name]) for adapter in adapters
    ]
    differing = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    return differing, float((between[0] - between[1]).norm() / between[1].norm())


@pytest.mark.slow
@pytest.mark.fault("T14")
def test_the_same_command_goes_on_with_other_processes(config: Config, tmp_path: Path) -> None:
    """Begun on 2, killed, on 3, killed, then alone: the samples, losses and adapters of a run of 8 samples a step.

    Three do not divide them; `--batch.samples 8` on three from the start is the same as well.
    """
    alone = replace(config, batch=BatchConfig(2, 0, samples=8))
    reference(alone, tmp_path / "alone")
    config, run_dir = with_batch(config, 2, 2), tmp_path / "run"
    assert on(2, config, run_dir, Fault("save", 2, "after"))[0].returncode == -9
    outcomes = on(3, config, run_dir, Fault("save", 2, "after"))
    told = "batch     8 samples per step in uneven shares, of at most 2 per device x 2 accumulated x 3 processes, "
    assert told + "as the run began; 2 x 2 on 3 would be 12" in outcomes[0].stdout
    assert outcomes[0].returncode == -9
    (last,) = on(1, config, run_dir)
    assert last.returncode == 0, last.stderr
    assert "2 per device x 4 accumulated x 1 process = 8 samples per step, as the run began" in last.stdout
    assert read_object(RunFolder(run_dir).config)["batch"]["samples"] == 8
    uneven = on(3, alone, tmp_path / "uneven")
    assert [each.returncode for each in uneven] == [0, 0, 0], uneven[0].stderr
    for path in (run_dir, tmp_path / "uneven"):
        assert samples_of(path) == samples_of(tmp_path / "alone")
        loss, adapters = apart(path, tmp_path / "alone")
        assert loss < 1e-6, path
        assert adapters < 1e-5, path


@thorough  # the test above does it with fewer; these take half a minute a start on two cores
@pytest.mark.fault("T14")
def test_eight_processes_four_and_eight_again(config: Config, tmp_path: Path) -> None:
    """Killed on eight, then on four, finished on eight: the samples, losses and adapters of one process."""
    alone = replace(config, batch=BatchConfig(2, 0, samples=16), train=replace(config.train, epochs=4))
    reference(alone, tmp_path / "alone")
    run_dir = tmp_path / "run"
    for count, fault in ((8, Fault("save", 2, "after")), (4, Fault("save", 2, "after")), (8, None)):
        outcomes = on(count, alone, run_dir, fault)
        assert outcomes[0].returncode == (0 if fault is None else -9), outcomes[0].stderr
    assert {each.returncode for each in outcomes} == {0}
    assert samples_of(run_dir) == samples_of(tmp_path / "alone")
    loss, adapters = apart(run_dir, tmp_path / "alone")
    assert loss < 1e-6
    assert adapters < 1e-5


@pytest.mark.fault("T14")
def test_a_group_that_shares_rows_goes_on_as_one_process(config: Config, tmp_path: Path) -> None:
    """Begun on two that share each micro-batch, killed, then alone, and two groups of two: the run of one process."""
    config, run_dir = replace(with_batch(config, 2, 4), engine=EngineConfig(kind="fused")), tmp_path / "run"
    assert on(1, config, tmp_path / "alone")[0].returncode == 0
    group = replace(config, batch=replace(config.batch, context_parallel=2))
    assert on(2, group, run_dir, Fault("save", 2, "after"))[0].returncode == -9
    assert on(1, config, run_dir, Fault("save", 1, "after"))[0].returncode == -9
    last = on(4, group, run_dir)
    assert [each.returncode for each in last] == [0] * 4, last[0].stderr
    assert "x 4 processes in groups of 2 = 8 samples per step, as the run began" in last[0].stdout
    assert samples_of(run_dir) == samples_of(tmp_path / "alone")
    loss, adapters = apart(run_dir, tmp_path / "alone")
    assert loss < 1e-6
    assert adapters < 1e-5


@pytest.mark.fault("T14")
def test_a_step_with_too_few_samples_is_refused(config: Config, tmp_path: Path) -> None:
    """Two samples a step begun alone are refused on three processes with 78; with other options it is another run: 77.

    A checkpoint of an earlier version says nothing of the options; its own numbers stand for them.
    """
    config, run_dir = with_batch(config, 1, 2), tmp_path / "run"
    stopped = run_command(arguments(at(config, run_dir)), Fault("save", 1, "after"))
    assert stopped.returncode == -9
    change_states(run_dir, lambda state: [state["layout"].pop(name) for name in ("asked", "dealt by")])
    refused = on(3, config, run_dir)
    assert [each.returncode for each in refused] == [78, 78, 78]
    assert "the run has 2 samples in a step, which 3 processes cannot share; start at most 2" in refused[0].stderr
    other = on(2, with_batch(config, 2, 1), run_dir)
    assert [each.returncode for each in other] == [77, 77]
    assert "batch (samples in a step) 2 -> 4" in other[0].stderr
    contradicted = on(2, replace(config, batch=BatchConfig(2, 4, samples=8)), run_dir)
    assert [each.returncode for each in contradicted] == [78, 78]
    assert "leave out --batch.accumulation, which is then 2" in contradicted[0].stderr
    went_on = on(2, config, run_dir)
    assert [each.returncode for each in went_on] == [0, 0], went_on[0].stderr
    assert "processes 1 -> 2, dealt by position -> cost" in went_on[0].stdout


@pytest.mark.fault("T14")
def test_shares_by_cost_resume_to_the_bit(config: Config, tmp_path: Path) -> None:
    """Two processes that were killed go on with the same shares: the bits of two that were left alone."""
    config = replace(with_batch(config, 2, 2), lora=replace(config.lora, dropout=0.1))
    assert [each.returncode for each in on(2, config, tmp_path / "whole")] == [0, 0]
    assert on(2, config, tmp_path / "killed", Fault("save", 2, "after"))[0].returncode == -9
    assert [each.returncode for each in on(2, config, tmp_path / "killed")] == [0, 0]
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
