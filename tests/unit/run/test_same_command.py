"""What of the options has to be the same in all processes."""

from dataclasses import asdict, replace

import pytest
from accelerate import Accelerator

from train.checkpoints import resume
from train.config import Config
from train.run.exits import ExitWith
from train.run.same_command import OF_THE_FIRST, PLACES, compared


def options_of(config: Config) -> set[str]:
    sections = {name: values for name, values in asdict(config).items() if isinstance(values, dict)}
    return {f"{section}.{name}" for section, values in sections.items() for name in values}


def test_all_but_places_are_compared(config: Config) -> None:
    """An option that is added is compared, and no place that is left out is misspelt."""
    left_out = {name for name in options_of(config) if name.partition(".")[0] in OF_THE_FIRST}
    assert left_out
    assert set(PLACES) <= options_of(config)
    assert compared(config).keys() == options_of(config) - left_out - set(PLACES)


@pytest.mark.parametrize(
    ("one", "other", "are_equal"),
    [("auto", "never", False), ("auto", "/here/step-1", False), ("/here/step-1", "/there/step-1", True)],
)
def test_a_checkpoint_may_lie_elsewhere(one: str, other: str, are_equal: bool, config: Config) -> None:
    """What is to be gone on from is the same; the folder's content is compared where it is read."""
    both = [compared(replace(config, run=replace(config.run, resume=word))) for word in (one, other)]
    assert (both[0] == both[1]) == are_equal


@pytest.mark.parametrize(("name", "option"), [("data.date", "--data.date"), ("model.dtype", "--model.dtype fp16")])
def test_what_a_machine_decides_names_its_option(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is sent to compare files where a clock or an older GPU is the cause."""
    monkeypatch.setattr(resume, "differing", lambda *_: ["data", name])
    with pytest.raises(ExitWith, match=f"give {option}$"):
        resume.check_same_everywhere({}, Accelerator(cpu=True))
