"""A run that goes on to another number of steps: freely where the schedule allows it, else refused or extended."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, change_states, finish, reference, result_of
from tests.conftest import Outcome, arguments, run_command, thorough
from tests.injections import Fault
from train.checkpoints.contents import STATE
from train.config import CheckpointConfig, CompareConfig, Config
from train.run.attempts import read_attempts
from train.run.folder import RunFolder, read_object
from train.track.metrics_file import read_metrics


@pytest.fixture
def config(config: Config) -> Config:
    """Three steps an epoch, saved after each; dropout, so that a step made with another seed would show."""
    dropped = replace(config.lora, dropout=0.1)
    return replace(config, lora=dropped, checkpoint=CheckpointConfig(every=1), compare=CompareConfig(2, 4))


def of(config: Config, run_dir: Path, epochs: int = 2, extend: bool = False, **optim: Any) -> Config:
    """The run in `run_dir` with so many epochs."""
    config = replace(config, train=replace(config.train, epochs=epochs), optim=replace(config.optim, **optim))
    return replace(at(config, run_dir), run=replace(config.run, dir=str(run_dir), extend=extend))


def rates(run_dir: Path) -> list[float]:
    return [row["train/learning_rate"] for row in read_metrics(run_dir / "metrics.jsonl")]


def run(config: Config, fault: Callable[[], None] | None = None) -> Outcome:
    return run_command(arguments(config), fault)


def as_of_before(state: dict[str, Any]) -> None:
    """What 0.1.0 wrote: no schedule, no details, no CPU threads."""
    del state["schedule"], state["identity"]["details"], state["versions"]["CPU threads"]


@pytest.mark.parametrize("is_old", [False, pytest.param(True, marks=thorough)])
def test_a_constant_schedule_goes_on_freely(is_old: bool, config: Config, tmp_path: Path) -> None:
    """A finished run of two epochs, repeated with three, is the run of three to the bit; answers and final/ are new."""
    run_dir = tmp_path / "run"
    expected = reference(of(config, run_dir, 3, schedule="constant"), tmp_path / "whole")
    finish(arguments(of(config, run_dir, 2, schedule="constant")))
    if is_old:
        change_states(run_dir, as_of_before)
    (run_dir / "answers.json").unlink()
    outcome = finish(arguments(of(config, run_dir, 3, schedule="constant")))
    assert "continues after step 6" in outcome.stdout
    assert result_of(run_dir) == expected
    assert (run_dir / "answers.json").read_text() == (tmp_path / "whole" / "answers.json").read_text()


@thorough  # the rule itself is tried in tests/unit/test_learning_rate.py
def test_a_run_still_in_its_warmup_goes_on_freely(config: Config, tmp_path: Path) -> None:
    """Killed before its rate depends on the end, a linear run may have another end; one step later it may not."""
    expected = reference(of(config, tmp_path, 3), tmp_path / "whole")
    for saves, code in ((3, 0), (4, 77)):
        run_dir = tmp_path / f"killed-{saves}"
        assert run(of(config, run_dir, 2), Fault("save", saves, "after")).returncode == -signal.SIGKILL
        assert run(of(config, run_dir, 3)).returncode == code
        assert code or result_of(run_dir) == expected


def test_what_the_schedule_forbids_is_refused_with_both_ways_out(config: Config, tmp_path: Path) -> None:
    """The refusal says both rates at the checkpoint's step and names --run.resume never and --run.extend true."""
    finish(arguments(of(config, tmp_path)))
    outcome = run(of(config, tmp_path, 5))
    assert outcome.returncode == 77
    last, would_be = 0.01 * (1 - 3 / 4), 0.01 * (1 - 3 / 13)
    for words in (
        "belongs to a run of 6 optimizer steps, and this command makes 15 (--train.epochs 5)",
        f"step 6 had the learning rate {last:.3g}, in a run of 15 steps it would have had {would_be:.3g}",
        "--run.resume never",
        f"--run.extend true     goes on with a new linear decay from {last:.3g} after step 6 to step 15",
    ):
        assert words in outcome.stderr
    assert "loading" not in outcome.stdout
    by_steps = of(config, tmp_path)
    limited = run(replace(by_steps, train=replace(by_steps.train, max_steps=5)))
    assert limited.returncode == 77
    assert "has 6 optimizer steps, and this command makes only 5 (--train.max_steps 5)" in limited.stderr
    assert run(of(config, tmp_path)).returncode == 0  # the run itself is untouched


@pytest.mark.parametrize("is_old", [pytest.param(False, marks=thorough), True])
def test_an_extension_is_found_again_to_the_bit(is_old: bool, config: Config, tmp_path: Path) -> None:
    """Extended, killed before and behind its first save, repeated, extended again: as without the kills."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(arguments(of(config, whole)))
    if is_old:
        change_states(whole, as_of_before)
    shutil.copytree(whole, killed)
    shutil.rmtree(whole / "final")
    outcome = finish(arguments(of(config, whole, 3, extend=True)))
    assert "schedule  extended after step 6: new linear decay from 0.0025 to step 9" in outcome.stdout
    assert (whole / "final").is_dir()
    again = arguments(of(config, whole, 4, extend=True))
    assert "extended after step 9: new linear decay from" in finish(again).stdout
    expected = result_of(whole)
    assert rates(whole)[5:] == pytest.approx(
        [0.0025, *(0.0025 * k / 3 for k in (3, 2, 1)), *(0.0025 / 9 * k for k in (3, 2, 1))]
    )

    words = arguments(of(config, killed, 3, extend=True))
    for when in ("before", "after"):
        assert run_command(words, Fault("save", 1, when)).returncode == -signal.SIGKILL
    unextended = run(of(config, killed, 3))  # the checkpoint knows it now
    assert unextended.returncode == 0, unextended.stderr
    assert "continues after step 7" in unextended.stdout
    assert "extended after step 6" in unextended.stdout
    second = run(of(config, killed, 4, extend=True), Fault("save", 1, "after"))
    assert second.returncode == -signal.SIGKILL
    finish(arguments(of(config, killed, 4, extend=True)))
    assert result_of(killed) == expected


def test_an_extension_is_recorded(config: Config, tmp_path: Path) -> None:
    """In the attempts, the plan and the checkpoint."""
    finish(arguments(of(config, tmp_path)))
    finish(arguments(of(config, tmp_path, 3, extend=True)))
    folder = RunFolder(tmp_path)
    decays = [{"start": 0, "rate": 0.01, "end": 6}, {"start": 6, "rate": 0.0025, "end": 9}]
    wanted = {"shape": "linear", "decays": decays}
    assert [each.start["schedule"]["decays"] for each in read_attempts(folder)] == [decays[:1], decays]
    assert read_object(folder.plan)["schedule"] == wanted
    state = read_object(max(folder.checkpoints.glob("step-*")) / STATE)
    assert state["schedule"] == [[0, 0.01, 6], [6, 0.0025, 9]]


@thorough
def test_an_extension_from_next_to_nothing_is_warned_of(config: Config, tmp_path: Path) -> None:
    """The last rate of a long cosine is below 1 % of the peak: its extension hardly trains, and that is said."""
    tiny = replace(config, train=replace(config.train, max_steps=0))
    finish(arguments(of(tiny, tmp_path, 12, schedule="cosine")))
    outcome = finish(arguments(of(tiny, tmp_path, 13, extend=True, schedule="cosine")))
    assert "warning   the extension begins at 0.0021 of the peak learning rate" in outcome.stdout
    assert "--run.resume never" in outcome.stdout
    (tmp_path / "short").mkdir()
    finish(arguments(of(config, tmp_path / "short")))
    assert "warning   the extension" not in finish(arguments(of(config, tmp_path / "short", 3, extend=True))).stdout


@thorough
def test_max_steps_is_extended_likewise(config: Config, tmp_path: Path) -> None:
    """A run of four steps goes on to six by max_steps, and then to the end of its epochs."""

    def limited(max_steps: int, extend: bool) -> Config:
        run_of = of(config, tmp_path, 3, extend)
        return replace(run_of, train=replace(run_of.train, max_steps=max_steps))

    finish(arguments(limited(4, False)))
    refused = run(limited(6, False))
    assert refused.returncode == 77
    assert "this command makes 6 (--train.max_steps 6)" in refused.stderr
    assert "extended after step 4" in finish(arguments(limited(6, True))).stdout
    assert "extended after step 6" in finish(arguments(limited(0, True))).stdout
    assert len(rates(tmp_path)) == 9
