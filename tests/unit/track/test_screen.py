"""The screen of a run: every fact is on it, it fits any terminal, and what matters most stays on a small one."""

import itertools
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.unit.track.terminal import facts_in, rows_of_a_run
from train.track.chart import bar, chart, means
from train.track.progress import SMOOTHING_STEPS, LossHistory, Progress, SmoothedLoss, saved_step
from train.track.screen import Room, screen, wrapped
from train.track.words import ago, duration


def after(step: int, folder: Path) -> tuple[Progress, float]:
    """What is known after the step, a second each, and the time then."""
    progress = Progress(facts_in(folder), first_step=0)
    for row in rows_of_a_run(step):
        progress.take(row, float(row["step"]))
    return progress, float(step)


def texts(progress: Progress, now: float, room: Room) -> list[str]:
    """The screen's lines without their styles."""
    return ["".join(text for text, _ in line) for line in screen(progress, now, room)]


def test_every_fact_is_on_80x24(tmp_path: Path) -> None:
    """Title, both bars with their times, losses, chart, validation, rates, speed, memory, checkpoint, the warning."""
    progress, now = after(45, tmp_path)
    lines = texts(progress, now + 5, Room(80, 24, is_ascii=False))
    text = "\n".join(lines)
    smoothed = SmoothedLoss()
    for row in rows_of_a_run(45):
        if "train/loss" in row:
            smoothed.add(row["train/loss"])
    facts = (
        "SmolLM2-135M on glossary.jsonl   LoRA r=16 on NF4   NVIDIA H100",
        "epoch       3 of 3",
        "25%  0:49 so far",  # 5 of 20 steps; since the end of the first step
        "step        45 of 60",
        "75%  0:10 left",  # 15 steps of a second, less the five that have passed
        f"loss        0.0889  smoothed {smoothed.value():.4f}  first 4.1250",
        "validation  1.7500  perplexity 9.50  best so far, at step 40  general 3.2500",
        "learn. rate 5.50e-04",
        "grad. norm  0.545",
        "tokens/s    1,045  mean 1,046",
        "MFU         2.4%",
        "memory      1.25 of 1.40 GiB planned",
        "checkpoint  step 40, 9 s ago",
        "! step 30: loss nan, nothing was updated; its samples: [/red]␛[2J.jsonl:3",
    )
    for fact in facts:
        assert fact in text, fact
    assert any("█" in line for line in lines)
    assert len(lines) <= 23


@pytest.mark.parametrize("is_ascii", [False, True])
def test_it_fits_any_terminal(is_ascii: bool, tmp_path: Path) -> None:
    """From 1 x 1 to 200 x 50, before the first step and after the last, no line is too wide and none too many."""
    for step in (0, 1, 31, 60):
        progress, now = after(step, tmp_path)
        for width, height in itertools.product((1, 2, 13, 40, 41, 80, 200), (1, 2, 3, 10, 24, 50)):
            lines = texts(progress, now, Room(width, height, is_ascii))
            assert len(lines) <= max(height - 1, 1)
            assert all(cell_len(line) <= max(width - 1, 1) for line in lines)
            assert not is_ascii or "".join(lines).isascii()


@pytest.mark.parametrize("room", [Room(80, 10, False), Room(40, 24, False), Room(40, 10, True)])
def test_what_matters_stays_on_a_small_terminal(room: Room, tmp_path: Path) -> None:
    """Steps, time left, loss, validation, speed and the newest warning are whole on 10 rows or 40 columns."""
    progress, now = after(45, tmp_path)
    text = "\n".join(texts(progress, now, room))
    wanted = ["45 of 60", "0:15 left", "loss        0.0889", "smoothed", "1.7500", "step 30: loss nan"]
    assert [word for word in wanted if word not in text] == []


def test_losses_that_rise_again_are_told(tmp_path: Path) -> None:
    """Where an earlier validation was better, the screen says which; a step that was left out has no loss."""
    progress, now = after(60, tmp_path)
    text = "\n".join(texts(progress, now, Room(80, 24, False)))
    assert "validation  1.8750  perplexity 9.50  best 1.7500 at step 40" in text
    assert "100%  0:00 left" in text
    progress, now = after(30, tmp_path)
    assert "loss        step left out  smoothed" in "\n".join(texts(progress, now, Room(80, 24, False)))


def test_before_the_first_step_there_is_a_validation(tmp_path: Path) -> None:
    """The row of step 0 has no loss, rate or speed; the screen shows what it has."""
    progress, now = after(0, tmp_path)
    text = "\n".join(texts(progress, now, Room(80, 24, False)))
    assert "0 of 60" in text
    assert "loss        none yet" in text
    assert "validation  3.5000  perplexity 33.12  general 3.2100" in text


def test_failed_saves_are_shown_until_one_succeeds(tmp_path: Path) -> None:
    """As the row counts them; the checkpoint stays the one before."""
    progress, now = after(45, tmp_path)
    row = list(rows_of_a_run(46))[-1] | {"perf/save_seconds": 0.1, "perf/failed_saves": 2}
    progress.take(row, now + 1)
    assert "checkpoint  2 could not be written" in "\n".join(texts(progress, now, Room(80, 24, False)))
    progress.take(row | {"step": 47, "perf/failed_saves": 0, "checkpoint/step": 46}, now + 2)
    assert "checkpoint  step 46" in "\n".join(texts(progress, now, Room(80, 24, False)))


def test_runs_of_0_1_name_no_checkpoint() -> None:
    """Theirs is the step before the row that has the time of a save without a failure."""
    assert saved_step({"step": 21, "perf/save_seconds": 0.1, "perf/failed_saves": 0}) == 20
    assert saved_step({"step": 21, "perf/save_seconds": 0.1, "perf/failed_saves": 1}) is None
    assert saved_step({"step": 21}) is None


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    """Losses, best validation and warnings of earlier attempts are there; the pace is this attempt's."""
    whole, now = after(45, tmp_path)
    resumed = Progress(facts_in(tmp_path), first_step=40)
    rows = list(rows_of_a_run(45))
    resumed.remember(row for row in rows if row["step"] <= 40)
    for row in rows:
        if row["step"] > 40:
            resumed.take(row, 2.0 * row["step"])
    assert resumed.losses.columns(60) == whole.losses.columns(60)
    assert resumed.smoothed.value() == whole.smoothed.value()
    assert resumed.best_validation == whole.best_validation == (1.75, 40)
    assert list(resumed.warnings) == list(whole.warnings)
    assert (resumed.seconds_left(90.0), whole.seconds_left(now)) == (30.0, 15.0)
    assert resumed.tokens == sum(row["data/tokens"] for row in rows if row["step"] > 40)


def test_the_smoothed_loss_is_an_exponential_mean() -> None:
    """Of equal losses it is that loss from the first on; after a jump it is 1 - 1/e of the way after 20 steps."""
    smoothed = SmoothedLoss()
    smoothed.add(2.0)
    assert smoothed.value() == pytest.approx(2.0)
    for _ in range(500):
        smoothed.add(2.0)
    assert smoothed.value() == pytest.approx(2.0)
    for _ in range(SMOOTHING_STEPS):
        smoothed.add(3.0)
    assert smoothed.value() == pytest.approx(2.632, abs=0.02)


@pytest.mark.parametrize("total", [1, 7, 1024, 100_000])
def test_the_chart_holds_the_whole_run(total: int) -> None:
    """Of a run with a loss at every step no column is empty; of half a run the second half is."""
    history = LossHistory(total)
    for step in range(1, total + 1):
        history.add(step, float(step))
    columns = [value for value in history.columns(60) if value is not None]
    assert len(columns) == 60
    assert columns == sorted(columns)
    half = LossHistory(total)
    for step in range(1, total // 2 + 1):
        half.add(step, 1.0)
    assert [value is None for value in half.columns(60)][-29:] == [True] * 29


def test_charts_and_bars() -> None:
    """The highest value is full, the lowest one step, nothing is blank; a bar is filled by its share."""
    assert chart([1.0, None, 17.0, 9.0], 2, is_ascii=False) == ["  █▁", "▁ ██"]
    assert chart([3.0, 3.0], 1, is_ascii=True) == [".."]
    assert chart([None, None], 2, is_ascii=True) == ["  ", "  "]
    assert means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert means([1.0], 5) == [1.0]
    assert means([], 5) == []
    assert [bar(share, 4, is_ascii=True) for share in (0, 0.5, 0.625, 1, 2)] == ["----", "##--", "##=-", "####", "####"]


def test_times_and_warnings_in_words() -> None:
    """Hours only where there are some; a long warning ends after two lines."""
    assert [duration(seconds) for seconds in (0, 61.9, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert [ago(seconds) for seconds in (5, 150, 7200)] == ["5 s ago", "2 min ago", "2.0 h ago"]
    assert wrapped("one two", 20) == ["one two"]
    shown = wrapped("word " * 50, 20)
    assert len(shown) == 2
    assert shown[1].endswith(" ...")
    assert max(map(cell_len, wrapped("表" * 50, 21))) <= 21
