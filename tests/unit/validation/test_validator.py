"""When a run is validated, what the row then holds, and what is asked."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from tests.conftest import TODAY, splits_of, training_of
from train.config import Config, ValidateConfig
from train.data import TrainingData
from train.deliver.comparison import first_samples
from train.deliver.losses import losses_of
from train.early_stop import ValidationRecord
from train.models.tokenizer import load_tokenizer
from train.run.processes import Watch
from train.step import Training, optimizer_step
from train.validation import validator as validating
from train.validation.material import material_of
from train.validation.validator import Validator


@pytest.fixture
def held_out(config: Config, pairs: Path) -> Config:
    """A configuration that holds out two paths of its own training data and measures everything."""
    data = replace(config.data, validation_path=(str(pairs), str(pairs)), gate="warn")
    return replace(config, data=data, validate=ValidateConfig(max_new_tokens=8))


def validator_of(config: Config, watch: Watch | None = None) -> tuple[Training, Validator]:
    training = training_of(config, Accelerator(cpu=True))
    material = material_of(config, load_tokenizer(config).backend, splits_of(config), TODAY)
    return training, Validator.of(training, material, ValidationRecord(), watch or Watch())


@pytest.mark.parametrize(
    ("every", "due"),
    [("epoch", [3, 6]), (2, [2, 4, 6]), (4, [4, 6]), (0.5, [2, 3, 5, 6]), (0.25, [1, 2, 3, 4, 5, 6]), (1.0, [3, 6])],
)
def test_it_is_due_by_the_interval_and_at_the_end(every: Any, due: list[int], held_out: Config) -> None:
    """Three steps an epoch, six in all; a share of an epoch is due at the first step behind each multiple."""
    _, validator = validator_of(replace(held_out, validate=ValidateConfig(every=every, num_questions=0)))
    assert [step for step in range(1, 7) if validator.is_due(step)] == due


def test_a_tenth_is_due_ten_times(held_out: Config) -> None:
    """In an epoch of 7, 10, 97 or 1,000 steps, at most once a step, the last time at its end."""
    _, validator = validator_of(replace(held_out, validate=ValidateConfig(every=0.1, num_questions=0)))
    for steps in (7, 10, 97, 1000):
        data: Any = SimpleNamespace(steps_per_epoch=steps)
        data.ends = partial(TrainingData.ends, data)
        training: Any = SimpleNamespace(data=data, total_steps=10**9)
        validator.training = training
        found = [step for step in range(1, 3 * steps + 1) if validator.is_due(step)]
        assert len(found) == 3 * min(10, steps)
        assert {steps, 2 * steps, 3 * steps} <= set(found)


def test_the_losses_are_the_paths_own_and_the_whole_is_weighted_by_token(held_out: Config) -> None:
    """Equal paths have equal losses; the general loss is what `handloop compare` measures on the same text."""
    training, validator = validator_of(held_out)
    row = validator.measure(0)
    assert row["eval/path1/loss"] == pytest.approx(row["eval/loss"], rel=1e-6)
    assert row["eval/path2/loss"] == pytest.approx(row["eval/loss"], rel=1e-6)
    general: Any = validator.material.general
    found = losses_of(training.model, first_samples(general, 10**9), training.data.pad_token_id)
    assert row["eval/general_loss"] == pytest.approx(found.after / found.num_tokens, rel=1e-4)
    assert row["eval/tokens"] == 2 * sum(validator.material.parts[1]["num_supervised_tokens"])
    assert validator.record.best_loss is None  # of before the first step there is no checkpoint
    assert validator.measure(3)["eval/best_step"] == 3


def test_a_loss_that_is_not_finite_is_said_and_left_out(held_out: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON has no NaN, and nothing is lower than it."""
    _, validator = validator_of(held_out)
    monkeypatch.setattr(validating, "validate", lambda *_: {"eval/loss": float("nan"), "eval/perplexity": 9.0})
    row = validator.measure(1)
    assert set(row) == {"warning"}
    assert "eval/loss" in row["warning"]
    assert (validator.record.best_loss, validator.record.num_since_best) == (None, 1)


def test_answers_before_stay_and_now_changes(held_out: Config) -> None:
    """Before is the base alone, asked once; asking changes no weight and no later step's bits."""
    training, validator = validator_of(held_out)
    twin, _ = validator_of(held_out)
    first = validator.ask(0)
    assert len(first) == 4
    assert all(row["before"] == row["now"] for row in first)  # adapters start as nothing
    for step in range(6):
        mine, other = optimizer_step(training, step), optimizer_step(twin, step)
        assert (mine.loss, mine.grad_norm) == (other.loss, other.grad_norm)
        last = validator.ask(step + 1)
    assert [row["before"] for row in last] == [row["before"] for row in first]
    assert any(row["now"] != row["before"] for row in last)
    assert {row["step"] for row in last} == {6}


def test_what_fails_while_asking_ends_the_questions_alone(
    held_out: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once, and training goes on."""
    training, validator = validator_of(held_out)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no room for keys and values")

    interviewer: Any = validator.interviewer
    monkeypatch.setattr(type(interviewer.generator), "__call__", broken)
    assert validator.ask(1) == validator.ask(2) == []
    assert capsys.readouterr().out.count("no room for keys and values") == 1
    assert optimizer_step(training, 0).loss > 0


def test_answers_take_no_longer_than_others_wait(held_out: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Past its limit a round is left, said once with what to lower, and nothing is asked again."""
    _, validator = validator_of(replace(held_out, validate=ValidateConfig(max_new_tokens=400)))
    assert validator.interviewer is not None
    validator.interviewer.limit_seconds = 0.01
    assert [validator.ask(step) for step in (1, 2)] == [[], []]
    assert capsys.readouterr().out.count("lower --validate.num_questions") == 1


def test_a_base_that_is_trained_whole_is_asked_nothing(held_out: Config) -> None:
    """So it is asked nothing, as at the end of such a run; its losses are measured."""
    whole = replace(held_out, model=replace(held_out.model, quantization="none"))
    _, validator = validator_of(replace(whole, train=replace(held_out.train, method="full")))
    assert validator.ask(1) == ()
    assert validator.measure(1)["eval/loss"] > 0


def test_the_last_step_ends_nothing_early(held_out: Config) -> None:
    """A target that is reached, or patience that ends, with the last validation makes no early end."""
    _, validator = validator_of(replace(held_out, validate=ValidateConfig(target_loss=1e3, num_questions=0)))
    validator.measure(3)
    assert "--validate.target_loss" in validator.reason_to_end(3)
    assert validator.reason_to_end(6) == ""


def test_a_stop_ends_an_answer_within_a_token(held_out: Config) -> None:
    """Asked after each token, so that a scheduler's grace is enough; half of the answers are none."""

    class Stopped(Watch):
        asked = 0

        def is_asked(self) -> bool:
            self.asked += 1
            return self.asked > 3

    watch = Stopped()
    _, validator = validator_of(replace(held_out, validate=ValidateConfig(max_new_tokens=400)), watch)
    assert validator.ask(1) == []
    assert watch.asked < 10
