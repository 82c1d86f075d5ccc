"""Two circumstances together, each of which other tests have alone."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at, result_of
from tests.conftest import arguments, run_command, thorough
from tests.injections import AtForward, Both, DiskError, Fault, KillAtOperation
from tests.integration.test_validation import Told
from train.config import CheckpointConfig, Config, ValidateConfig
from train.run.folder import RunFolder

LOSSES = (1.0, 2.0, 3.0, 3.5, 3.6, 3.7)  # of the validations: the first step is the best


@dataclass(frozen=True)
class StopInValidation:
    """SIGTERM in the first validation's forward pass."""

    def __call__(self) -> None:
        from train.models.language_model import LanguageModel

        original = LanguageModel.forward

        def forward(model: LanguageModel, batch: Any) -> torch.Tensor:
            if not torch.is_grad_enabled():
                os.kill(os.getpid(), signal.SIGTERM)
            return original(model, batch)

        setattr(LanguageModel, "forward", forward)  # noqa: B010


@pytest.fixture
def validated(config: Config) -> Config:
    """Two steps an epoch, three epochs; saved and validated after each step, final/ of the best one."""
    validate = ValidateConfig(at_start=False, every=1, general_text="off", num_questions=0, final="best")
    data, batch = replace(config.data, validation_fraction=0.3), replace(config.batch, merge="off")
    config = replace(config, data=data, batch=batch, validate=validate, checkpoint=CheckpointConfig(every=1))
    return replace(config, train=replace(config.train, epochs=3))


def step_of_final(run_dir: Path) -> int:
    return json.loads((run_dir / "final" / "base.json").read_text())["step"]


def checkpoints(run_dir: Path) -> list[int]:
    return RunFolder(run_dir).checkpoint_steps


def test_a_refused_command_and_the_best_checkpoint(validated: Config, tmp_path: Path) -> None:
    """77 for other data removes nothing: the right command then makes final/ of the best step."""
    config = at(validated, tmp_path / "run")
    killed = run_command(arguments(config), Both(Told(LOSSES), Fault("save", 4, "after")))
    assert killed.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") == [1, 3, 4]
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Q {i}?", "response": f"another {i}"}) + "\n" for i in range(19))
    )
    other = replace(config, data=replace(config.data, path=(str(tmp_path / "other.jsonl"),)))
    assert run_command(arguments(other)).returncode == 77
    assert checkpoints(tmp_path / "run") == [1, 3, 4]
    assert run_command(arguments(config), Told(LOSSES[4:])).returncode == 0
    assert step_of_final(tmp_path / "run") == 1
    assert checkpoints(tmp_path / "run") == [1, 5, 6]


def test_other_validation_samples_and_the_best_checkpoint(validated: Config, tmp_path: Path) -> None:
    """Its loss cannot be compared with theirs, but it stays for a command that goes back to its own."""
    config = at(validated, tmp_path / "run")
    assert run_command(arguments(config), Told(LOSSES)).returncode == 0
    assert step_of_final(tmp_path / "run") == 1
    fewer = replace(config, validate=replace(config.validate, tokens=50))
    outcome = run_command(arguments(fewer))
    assert "no checkpoint has a validation loss on these samples" in outcome.stdout
    assert run_command(arguments(config)).returncode == 0
    assert step_of_final(tmp_path / "run") == 1
    assert checkpoints(tmp_path / "run") == [1, 5, 6]


@pytest.mark.parametrize("moment", [27, *(pytest.param(n, marks=thorough) for n in range(20, 34) if n != 27)])
def test_a_kill_while_a_checkpoint_is_saved_again(moment: int, validated: Config, tmp_path: Path) -> None:
    """Stopped in a validation, a step is saved with a note of it, and again behind it: one of both is always there."""
    config = at(validated, tmp_path / "run")
    assert run_command(arguments(config), StopInValidation()).returncode == 75
    assert checkpoints(tmp_path / "run") == [1]
    killed = run_command(arguments(config), KillAtOperation(moment))
    assert killed.returncode == -signal.SIGKILL
    outcome = run_command(arguments(config))
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step 1" in outcome.stdout
    assert run_command(arguments(at(validated, tmp_path / "alone"))).returncode == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "alone")


def test_a_run_begun_anew_and_the_old_one_at_the_mirror(config: Config, tmp_path: Path) -> None:
    """Stopped before its first save and repeated as it advises, the new run begins, and does not take the old one's
    checkpoints from the mirror."""
    saved = CheckpointConfig(every=1, mirror=f"file://{tmp_path}/mirror")
    config = at(replace(config, checkpoint=saved, batch=replace(config.batch, merge="off")), tmp_path / "run")
    assert run_command(arguments(config), AtForward(16, signal.SIGTERM)).returncode == 75
    again = replace(config, optim=replace(config.optim, lr=2e-3))
    words = arguments(replace(again, run=replace(again.run, resume="never")))
    stopped = run_command(words, AtForward(2, signal.SIGTERM))
    assert stopped.returncode == 75
    assert "without --run.resume never" in stopped.stderr
    outcome = run_command(arguments(again))
    assert outcome.returncode == 0, outcome.stderr
    assert "starts fresh" in outcome.stdout


@pytest.mark.parametrize(
    ("losses", "failed", "step", "said"),
    [
        (
            (4.0, 1.0, 3.0, 3.5),
            2,
            3,
            "loss (3.0000) of those saved: step 2 had 1.0000, and has no checkpoint",
        ),
        ((4.0, 3.0, 3.5, 1.0), 4, 4, ""),
    ],
)
def test_a_full_disk_at_the_best_step(
    losses: tuple[float, ...], failed: int, step: int, said: str, validated: Config, tmp_path: Path
) -> None:
    """final/ is of the last step where that is the best, whether saved or not; else it is told what is missing."""
    config = at(replace(validated, train=replace(validated.train, epochs=2)), tmp_path / "run")
    first_write = 5 * (failed - 1) + 1
    outcome = run_command(arguments(config), Both(Told(losses), DiskError(first_write, first_write)))
    assert outcome.returncode == 0, outcome.stderr
    assert failed not in checkpoints(tmp_path / "run")
    assert step_of_final(tmp_path / "run") == step
    assert said in outcome.stdout


def test_an_adapter_in_the_folder_that_is_begun_anew(config: Config, tmp_path: Path) -> None:
    """Refused before the run is set aside: where it is said to lie it still is, and another folder takes it."""
    config = at(config, tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    lora, run = replace(config.lora, init_from=str(tmp_path / "run")), replace(config.run, resume="never")
    refused = run_command(arguments(replace(config, lora=lora, run=run)))
    assert refused.returncode == 78
    assert "choose another --run.dir" in refused.stderr
    elsewhere = replace(config, lora=lora, run=replace(run, dir=str(tmp_path / "other")))
    assert run_command(arguments(elsewhere)).returncode == 0


def test_longer_after_an_early_end(validated: Config, tmp_path: Path) -> None:
    """The options that a finished run advises to train on with do so, where patience had ended it."""
    validate = replace(validated.validate, patience=1)
    config = at(replace(validated, validate=validate), tmp_path / "run")
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    assert run_command(arguments(config), Told((4.0, 3.0, 3.5))).returncode == 0
    assert checkpoints(tmp_path / "run")[-1] == 3
    again = run_command(arguments(config))
    (advised,) = [line.split("trains on")[0].split() for line in again.stdout.splitlines() if "trains on" in line]
    assert advised[-2:] == ["--validate.patience", "0"]
    epochs = int(advised[advised.index("--train.epochs") + 1])
    longer = replace(config, train=replace(config.train, epochs=epochs), validate=replace(validate, patience=0))
    outcome = run_command(arguments(longer), Told((1.0,) * 20))
    assert outcome.returncode == 0, outcome.stderr
    assert checkpoints(tmp_path / "run")[-1] > 6
