"""Validations of whole runs: rows, answers, an early end, the best weights; the same after a resume."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, finish, result_of, start_processes
from tests.conftest import arguments, run_command
from tests.injections import Fault
from train.checkpoints.contents import ADAPTER, step_folder
from train.config import CheckpointConfig, Config, ValidateConfig
from train.run.folder import RunFolder, read_object
from train.track.metrics_file import read_metrics


@pytest.fixture
def held_out(config: Config, pairs: Path) -> Config:
    """Six steps, validated every two and before the first, by two paths, with a general text and two questions."""
    data = replace(config.data, validation_path=(str(pairs), str(pairs)), gate="warn")
    validate = ValidateConfig(every=2, num_questions=2, max_new_tokens=8)
    return replace(config, data=data, validate=validate, checkpoint=CheckpointConfig(every=1, keep=9))


def evaluated(run_dir: Path) -> list[dict[str, Any]]:
    """What was measured, by step."""
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" in row]
    return [{name: row[name] for name in row if name == "step" or name.startswith("eval/")} for row in rows]


def answers_in(run_dir: Path) -> list[dict[str, Any]]:
    """validation_answers.jsonl."""
    return [json.loads(line) for line in (run_dir / "validation_answers.jsonl").read_text().splitlines()]


def test_it_is_the_same_after_kills_and_on_two_processes(held_out: Config, tmp_path: Path) -> None:
    """Killed behind two checkpoints: every row, answer and bit; on two processes the same losses."""
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    finish(arguments(at(held_out, whole)))
    rows = evaluated(whole)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    assert {"eval/loss", "eval/path1/loss", "eval/path2/perplexity", "eval/general_loss"} <= rows[1].keys()
    assert [row["step"] for row in answers_in(whole)] == [2, 2, 4, 4, 6, 6]
    words = arguments(at(held_out, killed))
    for number in (2, 3):
        assert run_command(words, Fault("save", number, "after")).returncode == -9
    finish(words)
    assert result_of(killed) == result_of(whole)
    assert (evaluated(killed), answers_in(killed)) == (rows, answers_in(whole))
    two = replace(at(held_out, shared), batch=replace(held_out.batch, per_device=1))
    outcomes = [run.wait() for run in start_processes(arguments(two), [None, None])]
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes[0].stderr
    for one, other in zip(rows, evaluated(shared), strict=True):
        assert other == pytest.approx(one, rel=1e-3)
        assert other["eval/tokens"] == one["eval/tokens"]
    assert len(answers_in(shared)) == 6


def test_training_is_the_same_whatever_is_measured(held_out: Config, tmp_path: Path) -> None:
    """The bits of every step and of final/ do not depend on validations, answers or the general text."""
    finish(arguments(at(held_out, tmp_path / "measured")))
    plain = replace(held_out, data=replace(held_out.data, validation_path=()), validate=ValidateConfig())
    finish(arguments(at(plain, tmp_path / "plain")))
    found = [result_of(tmp_path / name) for name in ("measured", "plain")]
    for name in ("adapters", "optimizer"):
        assert found[0][name] == found[1][name], name
    assert not evaluated(tmp_path / "plain")


def test_an_early_end_is_an_end(held_out: Config, tmp_path: Path) -> None:
    """At the target: a checkpoint, final/, exit 0 with the reason; repeated it makes no step; without, it goes on."""
    run_dir = tmp_path / "run"
    settings = replace(held_out.validate, target_loss=100.0)
    early = replace(at(held_out, run_dir), validate=settings, checkpoint=CheckpointConfig())
    for _ in range(2):
        finish(arguments(early))
        assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [0, 1, 2]
        record = read_object(RunFolder(run_dir).exit)
        assert record["code"] == 0
        assert "--validate.target_loss 100" in record["reason"]
        assert read_object(run_dir / "final" / "base.json")["step"] == 2
    assert "training ends here, before step 6" in read_metrics(run_dir / "metrics.jsonl")[-1]["warning"]
    goes_on = replace(early, validate=held_out.validate)
    finish(arguments(goes_on))
    finish(arguments(replace(goes_on, run=replace(goes_on.run, dir=str(tmp_path / "whole")))))
    assert result_of(run_dir) == result_of(tmp_path / "whole")


def test_patience_after_a_kill_ends_where_it_would_have(held_out: Config, tmp_path: Path) -> None:
    """The count of validations without an improvement is in the checkpoint."""
    settings = replace(held_out.validate, every=1, patience=2, min_improvement=50.0)
    patient = replace(held_out, validate=settings)
    words = arguments(at(patient, tmp_path / "run"))
    assert run_command(words, Fault("save", 2, "after")).returncode == -9
    finish(words)
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "2 validations without an improvement" in read_object(RunFolder(tmp_path / "run").exit)["reason"]


@dataclass(frozen=True)
class Told:
    """Validations find these losses, one after another."""

    losses: tuple[float, ...]

    def __call__(self) -> None:
        import train.validation.validator as validating

        real, left = validating.validate, list(self.losses)
        setattr(validating, "validate", lambda *given: real(*given) | {"eval/loss": left.pop(0)})  # noqa: B010


def test_final_of_the_best(held_out: Config, tmp_path: Path) -> None:
    """The weights of the checkpoint with the lowest loss, which stays beside the newest; base.json names its step."""
    run_dir = tmp_path / "run"
    settings = replace(held_out.validate, every=1, final="best", num_questions=0)
    config = replace(at(held_out, run_dir), validate=settings, checkpoint=CheckpointConfig(every=1))
    outcome = run_command(arguments(config), Told((0.1, 9.0, 2.0, 5.0, 4.0, 3.0, 6.0)))
    assert outcome.returncode == 0, outcome.stderr
    assert "final/ is made of step 2, with the lowest validation loss (2.0000)" in outcome.stdout
    saved = run_dir / "checkpoints" / step_folder(2) / ADAPTER
    assert (run_dir / "final" / ADAPTER).read_bytes() == saved.read_bytes()
    assert read_object(run_dir / "final" / "base.json")["step"] == 2
    rows = evaluated(run_dir)
    assert [row.get("eval/best_step") for row in rows] == [None, 1, 2, 2, 2, 2, 2]
    damaged = saved.read_bytes()
    saved.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    assert run_command(arguments(config)).returncode == 0  # final/ stands, so nothing is made again
    shutil.rmtree(run_dir / "final")
    repeated = run_command(arguments(config))
    assert repeated.returncode == 80
    assert "--validate.final last" in repeated.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--validate.patience", "2"], "--validate.patience 2: needs held-out data"),
        (["--validate.final", "best"], "--validate.final best: needs held-out data"),
        (["--validate.every", "50"], "--validate.every 50: needs held-out data"),
        (["--validate.every", "0"], "--validate.every 0: must be at least 1 step"),
        (["--validate.every", "1.5"], "--validate.every 1.5: a share of an epoch"),
        (["--validate.every", "often"], "--validate.every often"),
        (["--validate.min_improvement", "0.1"], "belongs to --validate.patience"),
        (["--validate.target_loss", "-1"], "--validate.target_loss -1.0: must be a finite number"),
        (["--validate.general_text", "nowhere.txt"], "--validate.general_text nowhere.txt: "),
    ],
)
def test_what_cannot_be_wanted_is_refused(words: list[str], said: str, tmp_path: Path) -> None:
    """Before anything is loaded, with the option and what would work."""
    outcome = run_command(["--profile", "demo", "--run.dir", str(tmp_path / "run"), *words])
    assert outcome.returncode == 78
    assert said in outcome.stderr
