"""The display costs training no time, and neither a terminal that dies or hangs nor a defect in it reaches training."""

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from rich.console import Console

from benchmarks.display import main
from tests.conftest import training_of
from tests.unit.track.terminal import (
    STEPS_PER_EPOCH,
    TOTAL_STEPS,
    Terminal,
    console_on,
    facts_in,
    rows_of_a_run,
)
from train.config import Config
from train.track import display
from train.track.display import PLAIN_LINE_SECONDS, Display, Lines, room_of
from train.track.progress import Progress
from train.track.trackers import Trackers

MAX_LOG_SECONDS = 1e-4


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The screen takes stdout's place; a test that fails gives it back."""
    before = sys.stdout, sys.stderr
    monkeypatch.setattr(display, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 2.0)
    yield
    sys.stdout, sys.stderr = before


def plain(file: Any) -> Console:
    """A console that is no terminal."""
    return Console(file=file, width=80)


def ended(folder: Path, code: int, last: int = TOTAL_STEPS) -> None:
    """Writes what a run that ended with the code leaves."""
    (folder / "exit.json").write_text(json.dumps({"code": code}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_a_run(last)))


class Dying(Terminal):
    """A terminal that takes some writes and then raises."""

    def __init__(self, error: Exception, takes: int) -> None:
        super().__init__()
        self.error, self.takes = error, takes

    @property
    def closed(self) -> bool:
        return isinstance(self.error, ValueError) and self.takes < 0

    def write(self, text: str) -> int:
        self.takes -= 1
        if self.takes < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(), ValueError("closed file")])
@pytest.mark.parametrize("make", [console_on, plain])
@pytest.mark.parametrize("takes", [0, 3])
def test_a_dying_terminal_raises_nothing(error: Exception, make: Callable, takes: int, tmp_path: Path) -> None:
    """Neither from log nor from finish, whenever it dies; stdout is given back."""
    file, own = Dying(error, takes), sys.stdout
    ended(tmp_path, 0)
    shown = Display(facts_in(tmp_path), make(file))
    for row in rows_of_a_run():
        shown.log(row)
        time.sleep(0.002)
    shown.finish()
    assert sys.stdout is own
    assert not shown.thread.is_alive()


def test_a_defect_is_told_once_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What fails in the thread is raised by the next row, so that the trackers leave the display out and say so."""
    shown = Display(facts_in(tmp_path), plain(io.StringIO()))
    trackers = Trackers(display=shown)
    trackers.log({"step": 1})  # a row without an epoch
    shown.thread.join(5)
    for row in rows_of_a_run():
        trackers.log(row)
    trackers.finish()
    assert capsys.readouterr().err.count("Display is left out from now on: 'epoch'") == 1


def test_a_hanging_terminal_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """log returns at once while the terminal takes nothing; the end waits PATIENCE_SECONDS, rows are not hoarded."""
    monkeypatch.setattr(display, "PATIENCE_SECONDS", 0.3)
    over = threading.Event()

    class Hanging(Terminal):
        def write(self, text: str) -> int:
            over.wait(20)
            return len(text)

    ended(tmp_path, 0)
    shown = Display(facts_in(tmp_path, total_steps=10**9), console_on(Hanging()))
    row = list(rows_of_a_run(1))[-1]
    began = time.monotonic()
    for step in range(1, 30_001):
        shown.log(row | {"step": step})
    assert time.monotonic() - began < 2.0
    assert len(shown.waiting) <= display.MAX_WAITING
    began = time.monotonic()
    shown.finish()
    waited = time.monotonic() - began
    shown.finish()
    assert waited >= 0.3
    assert time.monotonic() - began - waited < 0.2
    over.set()
    shown.thread.join(5)


@pytest.mark.parametrize("make", [console_on, plain])
def test_a_row_costs_training_less_than_a_tenth_of_a_millisecond(make: Callable, tmp_path: Path) -> None:
    """Over 1,000 rows, the median and the mean, while the thread draws."""
    shown = Display(facts_in(tmp_path, total_steps=10_000), make(Terminal()))
    row = list(rows_of_a_run(1))[-1]
    seconds = []
    for step in range(1, 1001):
        began = time.perf_counter()
        shown.log(row | {"step": step})
        seconds.append(time.perf_counter() - began)
    shown.finish()
    assert sorted(seconds)[500] < MAX_LOG_SECONDS
    assert sum(seconds) / len(seconds) < MAX_LOG_SECONDS


def test_the_screen_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains the screen is there; at the end the epochs' lines and the summary are, and each once."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    shown = Display(facts_in(tmp_path), console_on(terminal))
    for row in rows_of_a_run(last := 55):
        shown.log(row)
        if row["step"] == 50:
            deadline = time.monotonic() + 5
            while "step        50 of 60" not in "\n".join(terminal.rows()) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert "step        50 of 60" in "\n".join(terminal.rows())
    shown.rest()  # also where training ends before its last step
    print("asking questions")
    ended(tmp_path, 0, last)
    shown.finish()
    rows = terminal.rows()
    above = [row for row in rows if row.startswith("epoch ")]
    assert [row.split()[1] for row in above] == ["0.00", "1.00", "2.00"]
    assert "step 40" in above[2]
    assert "validation 1.7500, best so far" in above[2]
    assert all(len(row) < 80 for row in above)
    assert rows[len(above)] == "asking questions"
    assert sum(row.startswith("finished    55 of 60 steps") for row in rows) == 1
    assert not any("left" in row and "━" in row for row in rows)


@pytest.mark.parametrize(("code", "first"), [(0, "finished"), (82, "finished"), (75, "stopped"), (79, "")])
def test_which_ends_have_a_summary(code: int, first: str, tmp_path: Path) -> None:
    """A finished run the whole one, a stopped one the short one, an error none; without rows there is none."""
    for has_rows in (True, False):
        ended(tmp_path, code)
        if not has_rows:
            (tmp_path / "metrics.jsonl").write_text("")
        out = io.StringIO()
        Display(facts_in(tmp_path), plain(out)).finish()
        said = out.getvalue().strip()
        assert said.split(" ")[0] == (first if has_rows else "")
        assert ("next " in said) == (first == "finished" and has_rows)


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    """One every five seconds, at validations and ends of epochs, with all facts; a warning has its own; no codes."""
    out = io.StringIO()
    progress = Progress(facts_in(tmp_path), first_step=0)
    lines = Lines(progress, plain(out))
    for row in rows_of_a_run():
        progress.take(row, 1.5 * row["step"])
        lines.take(row, 1.5 * row["step"])
    said = out.getvalue().splitlines()
    steps = [int(line.split()[1].partition("/")[0]) for line in said if "/60" in line]
    assert steps == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60]
    assert PLAIN_LINE_SECONDS == 5.0
    assert said[0] == "step 0/60  epoch 0.00  validation 3.5000 (perplexity 33.12, general text 3.2100)"
    assert "step 30: loss nan, nothing was updated; its samples: [/red]␛[2J.jsonl:3" in said
    [line] = [line for line in said if line.startswith("step 60/60")]
    for fact in (
        "epoch 3.00",
        "loss 0.0667 (smoothed 0.",
        "lr 4.00e-04",
        "grad norm 0.560",
        "1,060 tokens/s",
        "MFU 2.4%",
    ):
        assert fact in line, fact
    for fact in ("validation 1.8750 (perplexity 9.50, best 1.7500 at step 40", "1.25 of 1.40 GiB", "checkpoint 40"):
        assert fact in line, fact
    assert "  0:24 left" in next(line for line in said if line.startswith("step 44/60"))
    assert "\x1b" not in out.getvalue()


def test_a_dumb_terminal_and_other_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TERM=dumb gets lines; LANG=C and encodings other than UTF-8 get ASCII; NO_COLOR gets no colours."""
    monkeypatch.setenv("TERM", "dumb")
    dumb = Display(facts_in(tmp_path), console_on(Terminal()))
    assert isinstance(dumb.view, Lines)
    dumb.finish()
    monkeypatch.delenv("TERM")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", "en_GB.UTF-8")
    assert not room_of(console_on(Terminal())).is_ascii
    ascii_file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert room_of(console_on(ascii_file)).is_ascii
    display.put(plain(ascii_file), "a name of 表 and ▇")
    ascii_file.flush()
    assert ascii_file.buffer.getvalue() == b"a name of \\u8868 and \\u2587\n"  # pyrefly: ignore
    monkeypatch.setenv("LANG", "C")
    assert room_of(console_on(Terminal())).is_ascii
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    shown = Display(facts_in(tmp_path), console_on(terminal))
    for row in rows_of_a_run(59):
        shown.log(row)
    shown.finish()
    written = "".join(terminal.written)
    assert "smoothed" in written
    assert "\x1b[3" not in written
    assert "\x1b[1;3" not in written


def test_what_it_takes_from_a_training(config: Config) -> None:
    """Model, data, method, sizes, folder and the plan's peak, as the run has them."""
    training = training_of(config, Accelerator(cpu=True))
    shown = Display.of(training, 0, lambda: False)
    shown.finish()
    facts = shown.facts
    assert (facts.base, facts.data) == (Path(config.model.name_or_path).name, "pairs.jsonl")
    assert facts.method == "LoRA r=4 on NF4"
    assert (facts.total_steps, facts.steps_per_epoch) == (6, 3)
    assert facts.planned_gib == training.plan.peak_bytes / 2**30
    assert facts.folder.path == Path(config.run.dir)
    assert "CPU" in facts.device


def test_the_picture_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same bytes, with the step's facts, small, and without a font from elsewhere."""
    config = {
        "model": {"name_or_path": "/a/base", "quantization": "nf4"},
        "data": {"path": ["/b/rows.jsonl"]},
        "lora": {"r": 8},
    }
    data = {"total_steps": TOTAL_STEPS, "steps_per_epoch": STEPS_PER_EPOCH}
    start = {"attempt": 1, "event": "start", "device": "a GPU, 80 GiB", "data": data}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "plan.json").write_text(json.dumps({"peak_bytes": 2**30, "uses_graphs": False}))
    (tmp_path / "attempts.jsonl").write_text(json.dumps(start) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_a_run()))
    drawn = []
    for name in ("one.svg", "two.svg"):
        words = ["display", str(tmp_path), "--step", "45", "--out", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", words)
        main()
        drawn.append((tmp_path / name).read_text(encoding="utf-8").replace("&#160;", " "))
    assert drawn[0] == drawn[1]
    for fact in ("base on rows.jsonl", "LoRA r=8 on NF4", "a GPU", "45 of 60", "1.7500", "of 1.00 GiB planned"):
        assert fact in drawn[0], fact
    assert len(drawn[0]) < 60_000
    assert "url(" not in drawn[0].replace("url(#", "")
    assert "@font-face" not in drawn[0]
