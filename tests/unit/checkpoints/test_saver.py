"""When a checkpoint is due, which ones stay, how large they are, and what a refused write does to metrics.jsonl."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.conftest import arguments, run_command, training_of
from train.checkpoints import saver as saving
from train.checkpoints.saver import Saver, checkpoint_bytes
from train.checkpoints.store import CheckpointStore
from train.config import CheckpointConfig, Config, DataConfig, OptimConfig
from train.run.folder import RunFolder
from train.step import optimizer_step
from train.track.metrics_file import MetricsFile, read_metrics
from train.track.trackers import Trackers


@pytest.fixture
def saver(config: Config, tmp_path: Path) -> Callable[[CheckpointConfig], Saver]:
    def make(checkpoint: CheckpointConfig) -> Saver:
        training = training_of(replace(config, checkpoint=checkpoint), Accelerator(cpu=True))
        store = CheckpointStore(RunFolder(tmp_path / "run"), checkpoint.keep)
        return Saver.of(training, store, {}, Trackers(), None)

    return make


def test_due_by_epoch_steps_end_and_best(saver: Callable[[CheckpointConfig], Saver]) -> None:
    """Three steps an epoch, six in all; a validation loss lower than all before is worth a checkpoint anywhere."""
    by_epoch, by_steps = saver(CheckpointConfig()), saver(CheckpointConfig(every=4))
    assert [step for step in range(1, 7) if by_epoch.is_due(step, None)] == [3, 6]
    assert [step for step in range(1, 7) if by_steps.is_due(step, None)] == [4, 6]
    by_share = saver(CheckpointConfig(every=0.5))
    assert [step for step in range(1, 7) if by_share.is_due(step, None)] == [2, 3, 5, 6]
    by_steps.record.add(3, 2.0, 0.0)
    assert by_steps.is_due(3, 2.0)
    by_steps.record.add(5, 2.0, 0.0)
    assert not by_steps.is_due(5, 2.0)
    by_steps.record.add(5, 1.9, 0.0)
    assert by_steps.is_due(5, 1.9)


def test_the_clock(saver: Callable[[CheckpointConfig], Saver], monkeypatch: pytest.MonkeyPatch) -> None:
    """After checkpoint.minutes, counted from the last save; never where it is 0."""
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    timed, untimed = saver(CheckpointConfig(minutes=0.5)), saver(CheckpointConfig())
    timed.since = untimed.since = now[0]
    now[0] += 29
    assert not timed.is_time()
    now[0] += 2
    assert timed.is_time()
    assert not untimed.is_time()
    timed.save(2, None, must_stop=False)
    assert not timed.is_time()


def test_the_best_checkpoint_stays(saver: Callable[[CheckpointConfig], Saver]) -> None:
    """Beside the newest two; when a better one comes the old best goes; a resumed run knows it."""
    made = saver(CheckpointConfig(every=1))
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, None)):
        if loss is not None:
            made.record.add(step, loss, 0.0)
        made.save(step, loss, must_stop=False)
    assert sorted(int(path.name[5:]) for path in made.store.root.iterdir()) == [2, 4, 5]
    best = made.store.best()
    assert best == (made.store.root / "step-0000000002", 1.0)
    again = Saver.of(made.training, made.store, {}, Trackers(), made.store.latest())
    assert (again.saved, again.record.best_step, again.record.best_loss) == (5, 2, 1.0)
    made.save(6, 0.5, must_stop=False)
    assert sorted(int(path.name[5:]) for path in made.store.root.iterdir()) == [5, 6]


def test_a_loss_that_is_not_a_number_is_never_the_best(saver: Callable[[CheckpointConfig], Saver]) -> None:
    """NaN compares with nothing: it must not hide the lowest loss that is one."""
    made = saver(CheckpointConfig(every=1))
    for step, loss in ((1, 0.5), (2, 0.9), (3, float("nan")), (4, float("inf"))):
        made.save(step, loss, must_stop=False)
    assert made.store.best() == (made.store.root / "step-0000000001", 0.5)


def test_metrics_that_cannot_be_synced_are_a_failed_save(
    saver: Callable[[CheckpointConfig], Saver], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An I/O error of metrics.jsonl at a checkpoint: said, counted, training goes on, the next save is whole."""
    made = saver(CheckpointConfig(every=1))
    made.store.run_uid()
    file = MetricsFile(made.store.folder.metrics, 0)
    made.trackers = Trackers(file)
    file.log({"step": 1})
    with monkeypatch.context() as broken:
        broken.setattr(file, "durable_bytes", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        made.save(1, None, must_stop=False)
    assert (made.saved, made.failures) == (0, 1)
    assert "Input/output error" in capsys.readouterr().out
    made.save(2, None, must_stop=False)
    assert (made.saved, made.failures) == (2, 0)
    found = made.store.latest()
    assert found is not None
    assert found.state.metrics_bytes == len('{"step": 1}\n')


def test_half_a_row_is_completed_before_a_checkpoint_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that a checkpoint stores ends behind a whole row, also where a full disk had cut one."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    real, allowed = os.write, [7]

    def write(descriptor: int, content: bytes) -> int:
        if descriptor == file.descriptor and not allowed:
            raise OSError(28, "No space left on device")
        return real(descriptor, content[: allowed.pop()] if descriptor == file.descriptor else content)

    monkeypatch.setattr(os, "write", write)
    file.log({"step": 1})
    with pytest.raises(OSError, match="No space"):
        file.durable_bytes()
    monkeypatch.undo()
    assert file.durable_bytes() == len('{"step": 1}\n')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
@pytest.mark.parametrize("rank", [4, 64])
def test_the_size_is_known_before_the_first_step(name: str, rank: int, config: Config, tmp_path: Path) -> None:
    """The predicted bytes beside those of a real checkpoint: not less, and at most 25 KB and 1 % more."""
    lora = replace(config.lora, r=rank)
    training = training_of(replace(config, optim=OptimConfig(name=name), lora=lora), Accelerator(cpu=True))  # type: ignore[arg-type]
    predicted = checkpoint_bytes(training)
    optimizer_step(training, 0)
    made = Saver.of(training, CheckpointStore(RunFolder(tmp_path / "run"), 2), {}, Trackers(), None)
    made.save(1, None, must_stop=False)
    real = sum(file.stat().st_size for file in (made.store.root / "step-0000000001").iterdir())
    assert real <= predicted <= 1.01 * real + 25_000


@pytest.mark.slow
def test_minutes_and_best_through_the_command(config: Config, pairs: Path, tmp_path: Path) -> None:
    """A clock that is always due saves behind every step; the state of a validated step holds its loss."""
    data = DataConfig(path=(str(pairs),), max_length=128, validation_fraction=0.2)
    timed = replace(config, data=data, checkpoint=CheckpointConfig(minutes=1e-6, keep=9))
    outcome = run_command(arguments(timed))
    assert outcome.returncode == 0, outcome.stderr
    run_dir = Path(config.run.dir)
    assert sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").iterdir()) == [1, 2, 3, 4]
    best = CheckpointStore(RunFolder(run_dir), 2).best()
    assert best is not None
    assert best[1] in [row["eval/loss"] for row in read_metrics(run_dir / "metrics.jsonl") if "eval/loss" in row]


def test_rows_that_a_full_disk_refuses_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A write that fails, and one that writes half a row: nothing is lost or doubled, and it is said once."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    real, answers = os.write, [3, OSError(28, "No space left on device"), OSError(28, "No space left on device")]

    def write(descriptor: int, content: bytes) -> int:
        answer = answers.pop(0) if answers and descriptor == file.descriptor else len(content)
        if isinstance(answer, OSError):
            raise answer
        return real(descriptor, content[:answer])

    monkeypatch.setattr(os, "write", write)
    for step in (1, 2, 3):
        file.log({"step": step})
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert capfd.readouterr().err.count("rows are kept until it can be written") == 1
    file.finish()
