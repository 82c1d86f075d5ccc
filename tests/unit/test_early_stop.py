"""Which validation is the best, and which one ends the run."""

import json

from train.config import ValidateConfig
from train.early_stop import ValidationRecord


def ended_at(losses: list[float | None], settings: ValidateConfig) -> tuple[int, str]:
    """The number of the validation that ends the run, counted from 1, and the reason; 0 where none does."""
    record = ValidationRecord("samples")
    for number, loss in enumerate(losses, start=1):
        record.add(10 * number, loss, settings.min_improvement)
        record = ValidationRecord.resumed(json.loads(json.dumps(record.as_state())), "samples")  # as after a resume
        if reason := record.reason_to_end(settings):
            return number, reason
    return 0, ""


def test_patience_counts_validations_without_an_improvement() -> None:
    """Two in a row end the run, a better one begins anew, and one that is not finite is none."""
    patient = ValidateConfig(patience=2)
    assert ended_at([3.0, 2.0, 2.1, 1.9, 2.0, 1.95], patient)[0] == 6
    assert "the lowest loss is 1.9000 after step 40" in ended_at([3.0, 2.0, 2.1, 1.9, 2.0, 1.95], patient)[1]
    assert ended_at([3.0, None, None, 1.0], patient)[0] == 3
    assert ended_at([None, None], patient) == (
        2,
        "2 validations without an improvement (--validate.patience 2); the lowest loss is none",
    )
    assert ended_at([3.0, 3.0], ValidateConfig(patience=1))[0] == 2
    assert ended_at([3.0, 3.0, 3.0, 3.0], ValidateConfig()) == (0, "")


def test_a_small_fall_is_the_best_but_no_improvement() -> None:
    """min_improvement decides on patience alone: the lowest loss stays the lowest."""
    settings = ValidateConfig(patience=2, min_improvement=0.1)
    number, reason = ended_at([3.0, 2.95, 2.92, 1.0], settings)
    assert (number, "2.9200 after step 30" in reason) == (3, True)
    assert ended_at([3.0, 2.8, 2.6, 2.4], settings) == (0, "")


def test_the_target_ends_the_run_that_reaches_it() -> None:
    """At the target or below it."""
    settings = ValidateConfig(target_loss=1.0)
    assert ended_at([1.2, 1.0, 0.9], settings) == (
        2,
        "the validation loss 1.0000 has reached --validate.target_loss 1",
    )
    assert ended_at([1.2, None], settings) == (0, "")


def test_other_samples_begin_a_new_record() -> None:
    """A loss on other held-out samples cannot be compared; today's settings decide on what is kept."""
    record = ValidationRecord("these")
    record.add(1, 0.5, 0.0)
    state = record.as_state()
    assert ValidationRecord.resumed(state, "others") == ValidationRecord("others")
    assert ValidationRecord.resumed(state, "these").best_step == 1
    assert ValidationRecord.resumed({}, "these") == ValidationRecord("these")
    assert ValidationRecord.resumed({**state, "of a later version": 1}, "these").best_loss == 0.5
    assert ValidationRecord.resumed(state, "these").reason_to_end(ValidateConfig(target_loss=0.6))
    assert not ValidationRecord.resumed(state, "these").reason_to_end(ValidateConfig())
