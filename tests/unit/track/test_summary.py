"""The summary's figures are those of metrics.jsonl, over all attempts, and what it says to type works."""

import json
import shlex
from pathlib import Path

import pytest

from tests.unit.track.terminal import facts_in, rows_of_a_run
from train.commands.handloop import COMMANDS
from train.track.screen import Room
from train.track.summary import next_commands, short_summary, summary

ROOM = Room(80, 24, is_ascii=False)


def test_its_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    """First, lowest and last loss, validation before, lowest and last, time, steps, tokens, speed and peak."""
    rows = list(rows_of_a_run())
    text = "\n".join(summary(facts_in(tmp_path), rows, ROOM))
    steps = [row for row in rows if row["step"]]
    losses = {row["step"]: row["train/loss"] for row in steps if "train/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    tokens = sum(row["data/tokens"] for row in steps)
    assert "finished    60 steps, 1 of them left out, 3 epochs, 0:30 in steps\n" in text
    assert f"loss        {losses[1]:.4f} first, {losses[best]:.4f} lowest (the last), {losses[60]:.4f} last, " in text
    assert "validation  3.5000 before, 1.7500 lowest (step 40), 1.8750 last\n" in text
    assert "general     3.2100 before, 3.2500 lowest (step 20), 3.2500 last\n" in text
    assert f"tokens      {tokens:,}, 12,000 of them trained, {tokens / 30:,.0f} a second\n" in text
    assert "memory      1.25 GiB at the peak, 1.40 planned\n" in text
    assert "warning     step 30: loss nan, nothing was updated; its samples: [/red]␛[2J.jsonl:3\n" in text
    assert f"where       {tmp_path}/final/ " in text
    assert f"{tmp_path}/metrics.jsonl" in text
    assert text.count("█") > 3
    assert "attempts" not in text


def test_right_answers_are_counted(tmp_path: Path) -> None:
    """Before and after, of the questions that have a reference; files that are missing or damaged are left out."""
    facts, rows = facts_in(tmp_path), list(rows_of_a_run())
    told = [("Paris", True, False), ("Seven", True, True), ("Mercury", False, False), (None, None, None)]
    answers = [{"reference": text, "contained": after, "before_contained": before} for text, after, before in told]
    facts.folder.held_out_answers.write_text(json.dumps(answers))
    facts.folder.answers.write_text("[{")
    facts.folder.general_answers.write_text(json.dumps([{"reference": None}]))
    text = "\n".join(summary(facts, rows, ROOM))
    assert "right       2 of 3 held-out (1 before)\n" in text
    facts.folder.answers.write_text(json.dumps(answers[:1]))
    assert "right       1 of 1 trained (0 before), 2 of 3 held-out (1 before)\n" in "\n".join(
        summary(facts, rows, ROOM)
    )
    told = [("own.csv", 5, 6, 0), ("demo/everyday.jsonl", 7, 13, 5)]
    rows_of_two = [
        {"path": path, "reference": "x", "contained": i < after, "before_contained": i < before}
        for path, after, count, before in told
        for i in range(count)
    ]
    facts.folder.held_out_answers.write_text(json.dumps(rows_of_two))
    facts.folder.general_answers.write_text(json.dumps([{**row, "before_contained": True} for row in answers[:3]] * 4))
    text = "\n".join(summary(facts, rows, ROOM))
    assert "12 of 19 held-out (5 before)" in text
    assert "held-out: own.csv 5 of 6 (0 before), everyday.jsonl 7 of 13 (5 before)\n" in text
    assert "forgotten" not in text
    facts.folder.general_answers.write_text(json.dumps([{**answers[2], "before_contained": True}] * 5))
    assert "general questions are forgotten: 0 of 5 right, 5 before" in "\n".join(summary(facts, rows, ROOM))
    facts.folder.answers.write_text(json.dumps(answers[2:3]))
    assert "warning     60 steps taught little: 0 of 1 trained" in "\n".join(summary(facts, rows, ROOM))
    limited = facts_in(tmp_path, max_steps=60)
    assert "--train.max_steps 60 was the limit" in "\n".join(summary(limited, rows, ROOM))


def test_a_resumed_run_is_counted_whole_and_that_is_said(tmp_path: Path) -> None:
    """The rows of all attempts count; the number of attempts is that of attempts.jsonl."""
    lines = [{"attempt": number, "event": "start"} for number in (1, 2, 3)]
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ", all 3 attempts together" in summary(facts_in(tmp_path), list(rows_of_a_run()), ROOM)[0]


def test_a_stopped_run_is_told_in_short(tmp_path: Path) -> None:
    """How far it is, its losses and costs; neither where things are nor what to type, which is said by who ends it."""
    lines = short_summary(facts_in(tmp_path), list(rows_of_a_run(33)), ROOM)
    assert lines[0].startswith("stopped     33 of 60 steps, 1 of them left out, 1.65 epochs")
    assert not any(line.startswith(("where", "next")) for line in lines)


def test_rows_of_older_runs_are_enough(tmp_path: Path) -> None:
    """Without GPU, validation and checkpoints there is nothing about them, and nothing fails."""
    names = ("step", "epoch", "train/loss", "train/learning_rate", "perf/step_seconds", "perf/tokens_per_second")
    names += ("data/tokens", "data/supervised_tokens")
    rows = [{name: row[name] for name in names if name in row} for row in rows_of_a_run() if row["step"]]
    text = "\n".join(summary(facts_in(tmp_path), rows, ROOM))
    assert "validation" not in text
    assert "memory" not in text
    text = "\n".join(summary(facts_in(tmp_path), [{"step": 0, "epoch": 0.0, "eval/loss": 1.0}], ROOM))
    assert "validation  1.0000 before" in text


@pytest.mark.parametrize("width", [10, 40, 80])
def test_its_chart_fits(width: int, tmp_path: Path) -> None:
    """The chart's lines are narrower than the terminal, in ASCII where it has no blocks."""
    lines = summary(facts_in(tmp_path), list(rows_of_a_run()), Room(width, 24, is_ascii=True))
    drawn = [line for line in lines if line and set(line) <= set(" .:#")]
    assert all(len(line) < width for line in drawn)
    assert (len(drawn) == 3) == (width > 20)


def test_what_it_says_to_type_can_be_typed(tmp_path: Path) -> None:
    """The commands exist, the folder is quoted for a shell; after full fine-tuning those that compare are left out."""
    folder = facts_in(tmp_path / "a run's folder").folder
    typed = [shlex.split(command) for command, _ in next_commands(folder, is_whole=False)]
    assert [(words[1], words[2:]) for words in typed] == [
        (name, [str(folder.path)]) for name in ("compare", "chat", "report")
    ]
    assert {"compare", "chat"} <= set(COMMANDS)
    assert [shlex.split(command)[1] for command, _ in next_commands(folder, is_whole=True)] == ["report"]
