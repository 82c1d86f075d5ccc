"""The lines at the bottom of a terminal: right after every sequence of changes and prints, at few bytes."""

import random
import sys
from pathlib import Path

import pytest

from tests.unit.track.terminal import Terminal, console_on, facts_in, rows_of_a_run
from train.track.painter import Painter
from train.track.progress import Progress
from train.track.screen import Line, Room, screen

MAX_BYTES, MAX_BYTES_OF_A_SECOND = 1_600, 500  # of a refresh at 80x24; rich's Live writes 1.7 kB each time


def never() -> bool:
    return False


def lines_of(*texts: str) -> list[Line]:
    return [((text, "bold"),) if text else () for text in texts]


def test_what_is_printed_stands_above(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 300 random changes and prints the terminal shows all prints in order, then the lines, and no more."""
    terminal, draw = Terminal(), random.Random(1)
    monkeypatch.setattr(sys, "stdout", terminal)
    painter = Painter(console_on(terminal), never)
    printed: list[str] = []
    wanted: list[str] = []
    for number in range(300):
        if draw.random() < 0.2 and painter.is_started:
            printed.append(f"print {number}")
            print(printed[-1], flush=True)
        else:
            texts = [draw.choice(["", "a", "longer than that", f"{number}"]) for _ in range(draw.randrange(1, 9))]
            wanted = [*texts[:-1], texts[-1] or "end"]
            painter.show(lines_of(*wanted))
        assert terminal.rows() == [*printed, *wanted]
        assert terminal.has_cursor
    painter.stop()
    assert sys.stdout is terminal
    print("after")
    assert terminal.rows() == [*printed, "after"]


def test_a_terminal_that_becomes_narrower() -> None:
    """What it has wrapped is written over: nothing of the old lines is left."""
    terminal = Terminal(80)
    console = console_on(terminal)
    painter = Painter(console, never)
    painter.show(lines_of("x" * 70, "short", "y" * 45))
    terminal.narrow(30)
    console.width = 30
    painter.show(lines_of("one", "two"))
    assert terminal.rows() == ["one", "two"]
    painter.stop()
    assert terminal.rows() == []


def test_it_stands_still_when_others_write_past_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once frozen it moves no more, and what is printed stands below its last lines."""
    terminal, frozen = Terminal(), False
    monkeypatch.setattr(sys, "stdout", terminal)
    painter = Painter(console_on(terminal), lambda: frozen)
    painter.show(lines_of("one", "two"))
    frozen = True
    painter.show(lines_of("three"))
    print("printed")
    painter.stop()
    print("after")
    assert terminal.rows() == ["one", "two", "printed", "after"]


def test_stderr_in_a_file_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a stderr that is a terminal, too, is led through the screen."""
    terminal = Terminal()
    for is_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer)
        own = sys.stderr
        painter = Painter(console_on(terminal), never)
        painter.show(lines_of("one"))
        assert (sys.stderr is own) != is_terminal
        painter.stop()
        assert sys.stderr is own


def test_a_refresh_is_small(tmp_path: Path) -> None:
    """At 80x24 and in colour a row takes one write of at most MAX_BYTES, a passing second a third, no change none."""
    terminal = Terminal()
    painter = Painter(console_on(terminal), never)
    progress, sizes = Progress(facts_in(tmp_path), first_step=0), []
    for row in rows_of_a_run():
        progress.take(row, float(row["step"]))
        shown = screen(progress, row["step"], Room(80, 24, is_ascii=False))
        painter.show(shown)
        sizes.append(len(terminal.written[-1].encode()))
        count = len(terminal.written)
        painter.show(shown)
        assert len(terminal.written) == count
        if row["step"] > 21:  # the times so far and left, and the age of the checkpoint
            painter.show(screen(progress, row["step"] + 1, Room(80, 24, is_ascii=False)))
            assert len(terminal.written) == count + 1
            assert len(terminal.written[-1].encode()) <= MAX_BYTES_OF_A_SECOND
    assert max(sizes[2:]) <= MAX_BYTES
    painter.stop()
