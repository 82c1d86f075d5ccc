"""TensorBoard reads every step of a run once, whatever became of its attempts."""

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import told
from tests.conftest import arguments, losses, run_command
from train.config import Config, TrackConfig
from train.run.exits import ExitCode, ExitWith
from train.track.tensorboard_tracker import TensorBoard, markdown
from train.track.trackers import wanted_listeners

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the extra `tensorboard`"
)


@pytest.fixture
def watched(config: Config) -> Config:
    return replace(config, track=TrackConfig(wandb="off", tensorboard=True))


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar in the event files, in no reader's eyes purged."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    events = [event for path in sorted(folder.glob("events.*")) for event in EventFileLoader(str(path)).Load()]
    return [
        (value.tag, event.step, float(make_ndarray(value.tensor)))
        for event in events
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "scalars"
    ]


def read(folder: Path) -> Any:
    """What TensorBoard itself makes of the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def expected(last: int) -> Counter[tuple[str, int, float]]:
    rows = told.numbers(told.ROWS[: last + 1])
    return Counter((name, row["step"], round(row[name], 4)) for row in rows for name in row if name != "step")


@needs_tensorboard
def test_every_step_is_there_once_after_kills(watched: Config) -> None:
    """Killed at once and after a second, then saved, then finished: step 0 to the last once, and each table once."""
    folder = Path(watched.run.dir) / "tensorboard"
    told.attempt(watched, 0, 4, "killed")
    told.attempt(watched, 3, 6, "late")
    told.attempt(watched, 5, 6, "saved")
    assert Counter((tag, step, round(value, 4)) for tag, step, value in scalars(folder)) == expected(6)
    said = told.attempt(watched, 7, 7)
    assert f"TensorBoard: tensorboard --logdir {folder}\n" in said
    assert Counter((tag, step, round(value, 4)) for tag, step, value in scalars(folder)) == expected(told.LAST)
    (file,) = folder.iterdir()
    page = read(folder)
    assert {event.step for event in page.Scalars("train/loss")} == set(range(1, told.LAST + 1))
    texts = page.Tensors("samples/validation/text_summary")
    assert [event.step for event in texts] == list(told.VALIDATED)
    assert page.Tensors("samples/answers/text_summary")[0].step == told.LAST
    content = file.read_bytes()
    assert b"lora.r" in content
    assert b"pairs.jsonl" not in content


@needs_tensorboard
def test_an_open_tensorboard_forgets_the_earlier_files(watched: Config, tmp_path: Path) -> None:
    """With both files in sight, as between writing anew and removing, its reader has each step once."""
    folder = Path(watched.run.dir) / "tensorboard"
    told.attempt(watched, 0, 5, "saved")
    (earlier,) = folder.iterdir()
    kept = tmp_path / earlier.name
    kept.write_bytes(earlier.read_bytes())
    told.attempt(watched, 6, 6)
    kept.rename(earlier)
    assert len(list(folder.iterdir())) == 2
    assert [event.step for event in read(folder).Scalars("train/loss")] == list(range(1, 7))


@needs_tensorboard
def test_the_bits_are_those_of_a_run_without_it(watched: Config, tmp_path: Path) -> None:
    """A whole run, watched, watched in vain and not: the same losses, and the event file has them."""
    outcome = run_command(arguments(watched))
    assert outcome.returncode == 0, outcome.stderr
    blocked = replace(watched, run=replace(watched.run, dir=str(tmp_path / "blocked")))
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "tensorboard").write_text("a file in the way")
    outcome = run_command(arguments(blocked))
    assert outcome.returncode == 0, outcome.stderr
    assert "TensorBoard: stopped recording (" in outcome.stdout
    assert "Traceback" not in outcome.stderr
    plain = replace(watched, track=TrackConfig(wandb="off"), run=replace(watched.run, dir=str(tmp_path / "plain")))
    assert run_command(arguments(plain)).returncode == 0
    assert not (tmp_path / "plain" / "tensorboard").exists()
    assert losses(Path(watched.run.dir)) == losses(tmp_path / "plain") == losses(tmp_path / "blocked")
    seen = [step for tag, step, _ in scalars(Path(watched.run.dir) / "tensorboard") if tag == "train/loss"]
    assert seen == [step for step, _, _ in losses(tmp_path / "plain")]


def test_a_missing_package_is_said_before_training(watched: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """78 with the command that installs it, and nothing is asked of who does not want it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExitWith, match=r"pip install -c constraints\.txt -e '\.\[tensorboard\]'") as refused:
        wanted_listeners(watched)
    assert refused.value.code == ExitCode.BAD_INPUT
    assert TensorBoard.wanted(replace(watched, track=TrackConfig(wandb="off"))) is None


def test_a_table_cannot_be_broken_by_what_is_in_it() -> None:
    """Bars, lines and markup of an answer stay text in its cell."""
    lines = markdown([{"question": "a | b\n# c", "now": "<script>*x*"}]).splitlines()
    assert lines == [
        "| question | now |",
        "| --- | --- |",
        "| a &#124; b<br>&#35; c | &#60;script&#62;&#42;x&#42; |",
    ]
