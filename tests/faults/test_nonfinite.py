"""A step with a non-finite loss or gradient is skipped, recorded and counted, and never published."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch

from tests.compare_runs import at, exit_record, finish, result_of, start_processes
from tests.conftest import arguments, run_command, with_batch
from tests.injections import Both, Fault, NotANumber
from tests.tally import Tally
from train.config import CheckpointConfig, Config
from train.track.metrics_file import read_metrics


@pytest.fixture
def config(config: Config) -> Config:
    """The tiny run with its micro-batches as they are configured: faults are counted by them."""
    return replace(config, batch=replace(config.batch, merge="off"))


def all_finite(run_dir: Path) -> bool:
    """Whether every tensor in the run folder is finite."""
    files = list(run_dir.rglob("*.safetensors"))
    tensors = [tensor for file in files for tensor in safetensors.torch.load_file(file).values()]
    return all(tensor.float().isfinite().all() for tensor in tensors)


@pytest.mark.fault("T18")
def test_a_step_is_left_out(config: Config, tmp_path: Path, tally: Tally) -> None:
    """NaN, infinity, or only an infinite gradient, in the first or a middle step: the step is skipped and recorded."""
    config = replace(config, checkpoint=CheckpointConfig(every=1))  # epochs of 3 steps with 4, 4 and 2 micro-batches
    cases = [NotANumber((1,)), NotANumber((6,), math.inf), NotANumber((7,), only_gradient=True)]
    for number, fault in enumerate(cases):
        run_dir, step = tmp_path / f"case-{number}", 1 if fault.micro_batches == (1,) else 2
        outcome = run_command(arguments(at(config, run_dir)), fault)
        tally.check(outcome.returncode == 0, f"{fault}: {outcome.stderr[-300:]}")
        tally.check(f"step {step}: loss" in outcome.stdout and "skipped" in outcome.stdout, f"{fault}: not said")
        rows = read_metrics(run_dir / "metrics.jsonl")
        tally.check([row["step"] for row in rows if "train/skipped" in row] == [step], f"{fault}: rows")
        note = json.loads((run_dir / f"nonfinite-step-{step}.json").read_text())
        tally.check(note["sample_ids"] == rows[step - 1]["data/sample_ids"], f"{fault}: samples")
        tally.check(all("pairs.jsonl" in source for source in note["sources"]), f"{fault}: sources")
        tally.check(all_finite(run_dir), f"{fault}: published")


@pytest.mark.fault("T18")
def test_nothing_moves_in_a_step_that_is_left_out(config: Config, tmp_path: Path, tally: Tally) -> None:
    """The checkpoint after a skipped step has the weights and the optimizer state of the one before."""
    config = replace(config, checkpoint=CheckpointConfig(every=1, keep=9))
    assert run_command(arguments(at(config, tmp_path / "run")), NotANumber((6,))).returncode == 0
    folder = tmp_path / "run" / "checkpoints"
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, two, three = ((folder / f"step-{step:010d}" / name).read_bytes() for step in (1, 2, 3))
        tally.check(one == two, f"{name} changed in the skipped step")
        tally.check(two != three, f"{name} did not change in the next")


@pytest.mark.fault("T18")
def test_too_many_end_the_run(config: Config, tmp_path: Path, tally: Tally) -> None:
    """One skipped step more than train.max_skipped_steps, or than three in a row, is exit 79."""
    config = replace(config, checkpoint=CheckpointConfig(every=1), train=replace(config.train, epochs=4))
    none = replace(config, train=replace(config.train, max_skipped_steps=0))
    cases = [
        (none, (5,), 2),
        (config, (1, 5, 9, 11), 4),
        (replace(none, train=replace(none.train, max_skipped_steps=1)), (1, 9), 3),
    ]
    for number, (case, micro_batches, step) in enumerate(cases):
        run_dir = tmp_path / f"case-{number}"
        outcome = run_command(arguments(at(case, run_dir)), NotANumber(micro_batches))
        tally.check(outcome.returncode == 79, f"{micro_batches}: {outcome.returncode} {outcome.stderr[-300:]}")
        tally.check(
            f"step {step}: loss nan" in outcome.stderr and "pairs.jsonl" in outcome.stderr, f"{micro_batches}: said"
        )
        tally.check(exit_record(run_dir)["code"] == 79, f"{micro_batches}: exit.json")
        tally.check(all_finite(run_dir), f"{micro_batches}: published")
        newest = max(path.name for path in (run_dir / "checkpoints").glob("step-*"))
        tally.check(int(newest[5:]) == step - 1, f"{micro_batches}: {newest}")


@pytest.mark.fault("T18")
def test_the_count_survives_a_kill(config: Config, tmp_path: Path, tally: Tally) -> None:
    """After a kill behind a skipped step, that step still counts, and a first step that is skipped counts too."""
    config = replace(config, checkpoint=CheckpointConfig(every=1), train=replace(config.train, max_skipped_steps=1))
    words = arguments(at(config, tmp_path / "run"))

    killed = run_command(words, Both(NotANumber((5,)), Fault("save", 2, "after")))
    tally.check(killed.returncode == -signal.SIGKILL, f"{killed.returncode}")
    outcome = run_command(words, NotANumber((1,)))  # the first step after the resume
    tally.check(outcome.returncode == 79 and "Skipped steps so far: 2, 3" in outcome.stderr, outcome.stderr[-400:])
    finish(words)
    tally.check(len(result_of(tmp_path / "run")) == 5, "result")


@pytest.mark.fault("T18")
def test_a_checkpoint_before_any_update(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Killed behind a first step that was skipped, a run ends in the bits of one that was not."""
    config = replace(config, checkpoint=CheckpointConfig(every=1))
    alone, words = (arguments(at(config, tmp_path / name)) for name in ("alone", "run"))
    skipped = run_command(alone, NotANumber((1,)))
    tally.check(skipped.returncode == 0, f"{skipped.returncode}")
    killed = run_command(words, Both(NotANumber((1,)), Fault("save", 1, "after")))
    tally.check(killed.returncode == -signal.SIGKILL, f"{killed.returncode}")
    finish(words)
    tally.check(result_of(tmp_path / "run") == result_of(tmp_path / "alone"), "result")


@pytest.mark.fault("T18")
def test_processes_decide_together(config: Config, tmp_path: Path, tally: Tally) -> None:
    """NaN in only the second of two processes: both skip the step, and both end with 79 when it is one too many."""
    config = with_batch(replace(config, checkpoint=CheckpointConfig(every=1)), 2, 2)
    for budget, code in ((10, 0), (0, 79)):
        run_dir = tmp_path / f"budget-{budget}"
        case = at(replace(config, train=replace(config.train, max_skipped_steps=budget)), run_dir)
        both = [run.wait() for run in start_processes(arguments(case), [None, NotANumber((3,))])]
        tally.check([o.returncode for o in both] == [code, code], f"{budget}: {[o.returncode for o in both]}")
        rows = read_metrics(run_dir / "metrics.jsonl")
        tally.check(
            [row["step"] for row in rows if "train/skipped" in row] == ([2] if code == 0 else []), f"{budget}: rows"
        )
        tally.check(all_finite(run_dir), f"{budget}: published")
