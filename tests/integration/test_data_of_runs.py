"""What a run trains on, asks and keeps of its data, by the real command."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, start_processes
from tests.conftest import arguments, run_command
from tests.unit.data_tools.jinja import DATED
from train.config import CompareConfig, Config
from train.deliver.generation import Generator
from train.run import folder
from train.track.metrics_file import read_metrics


def on(config: Config, **data: Any) -> Config:
    """Two steps on this data, with three questions of each side."""
    return replace(
        config,
        data=replace(config.data, **data),
        train=replace(config.train, max_steps=2),
        optim=replace(config.optim, warmup=0),
        compare=CompareConfig(num_questions=3, max_new_tokens=4),
    )


def asked(config: Config, name: str) -> list[tuple[str, str]]:
    path = Path(config.run.dir) / name
    return [(row["question"], row["reference"]) for row in json.loads(path.read_text())] if path.exists() else []


def fail(*_: Any) -> Any:
    raise RuntimeError("the device is gone")


def break_the_answers() -> None:
    """Makes every answer fail."""
    Generator.__call__ = fail  # type: ignore[method-assign]


class _Later(date):
    @classmethod
    def today(cls) -> date:  # type: ignore[override]
        return date(2031, 1, 1)


def in_another_year() -> None:
    """Makes it 2031 for the run folder."""
    folder.date = _Later  # type: ignore[misc]


def test_questions_are_trained_turns_of_kept_samples(config: Config, tmp_path: Path) -> None:
    """Skipped rows and text that follows an answer are not asked; each side has its own questions, as it was split."""
    rows = [
        [{"role": "user", "content": f"first {i}"}, {"role": "assistant", "content": f"answer {i}"}] for i in range(20)
    ]
    lines = [json.dumps({"messages": [*turns, {"role": "user", "content": "thanks"}]}) for turns in rows]
    opening = json.dumps({"messages": [{"role": "assistant", "content": "Hello there."}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(['{"messages": 7}', opening, *lines]) + "\n")
    config = on(config, path=(str(path),), on_error="skip", validation_fraction=0.2, max_length=64)
    outcome = run_command(arguments(config))
    assert outcome.returncode == 0, outcome.stderr
    trained, held_out = asked(config, "answers.json"), asked(config, "answers_held_out.json")
    assert len(trained) == len(held_out) == 3
    for question, reference in (*trained, *held_out):
        assert (question.replace("first", "answer")) == reference
    assert not set(trained) & set(held_out)
    assert "warning   1 bad records were skipped" in outcome.stdout


def test_a_finished_command_repeated_says_so(config: Config) -> None:
    """It reads no base and writes only how it ended; other questions, or a final/ that is not whole, are work."""
    config = on(config)
    config = replace(config, compare=replace(config.compare, general_questions="bundled"))
    first = run_command(arguments(config))
    assert first.returncode == 0
    assert "2 in all (by --train.max_steps 2, which comes before the 6 of --train.epochs 2); starts" in first.stdout
    assert "--train.max_steps 2 was the limit" in first.stdout
    assert [reference for _, reference in asked(config, "answers_general.json")] == ["Paris", "Seven", "Mercury"]
    run_dir, said = Path(config.run.dir), "this run has finished before"
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    again = run_command(arguments(config))
    assert again.returncode == 0, again.stderr
    assert said in again.stdout
    assert "loading" not in again.stdout
    for part in ("2 steps", "handloop chat", "--lora.init_from", "--train.max_steps 4", "--run.resume never"):
        assert part in again.stdout
    after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"exit.json", ".lock"}
    assert json.loads((run_dir / "exit.json").read_text())["name"] == "finished"

    other = replace(config, compare=replace(config.compare, num_questions=2))
    more = run_command(arguments(other))
    assert said not in more.stdout
    assert len(asked(config, "answers.json")) == 2
    adapter = run_dir / "final" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-9])
    mended = run_command(arguments(other))
    assert said not in mended.stdout
    assert adapter.read_bytes() == whole


def test_questions_that_fail_do_not_undo_a_training(config: Config) -> None:
    """Exit 82 and a reason: final/ is complete, and the command repeated asks again without training."""
    config = on(config)
    failed = run_command(arguments(config), break_the_answers)
    assert failed.returncode == 82
    assert "training is finished and" in failed.stderr
    assert "RuntimeError: the device is gone" in failed.stderr
    run_dir = Path(config.run.dir)
    assert json.loads((run_dir / "exit.json").read_text())["name"] == "delivery_failed"
    adapters = (run_dir / "final" / "adapter_model.safetensors").read_bytes()
    again = run_command(arguments(config))
    assert again.returncode == 0, again.stderr
    assert len(asked(config, "answers.json")) == 3
    assert (run_dir / "final" / "adapter_model.safetensors").read_bytes() == adapters
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 2


def test_a_resumed_run_sees_the_day_on_which_it_started(config: Config, tmp_path: Path) -> None:
    """Its template asks for the date: in another year it goes on with the same tokens, and a new run has new ones."""
    (tmp_path / "dated.jinja").write_text(DATED)
    config = on(config, chat_template=str(tmp_path / "dated.jinja"))
    first = run_command(arguments(config))
    assert first.returncode == 0, first.stderr
    assert f"date      {date.today().isoformat()}, which the chat template asks for" in first.stdout
    other = replace(config, compare=replace(config.compare, num_questions=2))  # so that something is left to do
    resumed = run_command(arguments(other), in_another_year)
    assert resumed.returncode == 0, resumed.stderr
    assert f"date      {date.today().isoformat()}" in resumed.stdout
    fresh = run_command(arguments(at(config, tmp_path / "fresh")), in_another_year)
    assert "date      2031-01-01" in fresh.stdout
    other = run_command(arguments(on(config, date="2030-01-01")))
    assert other.returncode == 77
    assert f"data.date {date.today().isoformat()} -> 2030-01-01" in other.stderr


def test_a_validation_of_one_sample_on_two_processes(config: Config, tmp_path: Path) -> None:
    """The process that has no sample of it waits for the other: the loss is that of one process."""
    (tmp_path / "held.jsonl").write_text('{"prompt": "What is part 99?", "response": "a bolt number 99."}\n')
    config = on(config, validation_path=(str(tmp_path / "held.jsonl"),))
    config = replace(config, compare=CompareConfig(num_questions=0))
    alone = run_command(arguments(at(config, tmp_path / "alone")))
    assert alone.returncode == 0, alone.stderr
    both = at(replace(config, batch=replace(config.batch, per_device=1)), tmp_path / "both")
    assert [run.wait().returncode for run in start_processes(arguments(both), [None, None])] == [0, 0]
    found = [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["eval/loss"] for name in ("alone", "both")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
