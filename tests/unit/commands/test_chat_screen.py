"""The terminal of a chat: keys, history, interrupts, and text that is safe to print."""

import io
import os
import signal
import stat
from collections.abc import Iterator
from typing import Any

import pytest
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from train.commands.chat_screen import Pipe, Terminal, history_file
from train.run.exits import ExitCode

ENTER, ALT_ENTER, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x03", "\x04"


@pytest.fixture
def keys(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipeInput]:
    """What is typed; the history is in a folder of its own."""
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    with create_pipe_input() as typed:
        yield typed


def terminal(keys: PipeInput) -> Terminal:
    return Terminal(input=keys, output=DummyOutput())


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (f"one{ENTER}", "one"),
        (f"one{ALT_ENTER}two{ENTER}", "one\ntwo"),
        (f"one\\{ENTER}two{ENTER}", "one\ntwo"),
        (f"\x1b[200~one\ntwo\r\nthree\x1b[201~{ENTER}", "one\ntwo\nthree"),  # pasted
        (f"gone{CTRL_C}kept{ENTER}", "kept"),
        (CTRL_D, None),
    ],
    ids=["a line", "Alt+Enter", "a backslash", "pasted", "Ctrl-C", "Ctrl-D"],
)
def test_keys(typed: str, wanted: str | None, keys: PipeInput) -> None:
    """Enter sends; Alt+Enter, a backslash and a paste break lines; Ctrl-C empties the line, Ctrl-D ends the chat."""
    keys.send_text(typed)
    assert terminal(keys).read("> ") == wanted


def test_history_is_kept_and_private(keys: PipeInput) -> None:
    """Another chat has the earlier messages; only the user can read their file."""
    mask = os.umask(0)
    try:
        keys.send_text(f"first\\{ENTER}message{ENTER}")
        assert terminal(keys).read("> ") == "first\nmessage"
    finally:
        os.umask(mask)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    history_file().chmod(0o644)
    other = terminal(keys)
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    assert list(other.session.history.load_history_strings()) == ["first\nmessage"]


def test_without_a_place_for_it_the_history_is_in_memory(
    keys: PipeInput, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that cannot be written costs the history, which is said, and nothing else."""
    monkeypatch.setenv("HANDLOOP_CACHE", "/dev/null/none")
    keys.send_text(f"one{ENTER}")
    assert terminal(keys).read("> ") == "one"
    assert "the history is not kept" in capsys.readouterr().out


def test_ctrl_c_ends_the_answer(keys: PipeInput) -> None:
    """The first one asks for the end, the second is a KeyboardInterrupt; afterwards the handler is the old one."""
    before = signal.getsignal(signal.SIGINT)
    screen = terminal(keys)
    was_asked: list[bool] = []

    def press_twice() -> None:
        with screen.answering() as must_stop:
            for _ in range(2):
                was_asked.append(must_stop())
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert was_asked == [False, True]
    assert signal.getsignal(signal.SIGINT) is before
    with screen.answering() as must_stop:
        assert not must_stop()


def test_answers_cannot_steer_the_terminal(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences are visible, in answers and in what is said; spaces, tabs and line breaks stay."""
    screen = terminal(keys)
    hostile = "a \x1b]0;owned\x07\tb\n\x9b31m[bold]c"
    screen.write(hostile)
    screen.end_answer(hostile)
    screen.refuse(hostile)
    said = capsys.readouterr().out
    assert said.startswith("a ␛]0;owned␇\tb\n<U+009B>31m[bold]c\n")
    assert not any(sign in said for sign in ("\x1b]", "\x07", "\x9b"))


def test_a_pipe_is_bare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are messages, a backslash joins two; only answers go to stdout, as they are."""
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\\\nthree\n\nlast\\"))
    screen = Pipe()
    read = [screen.read("> ") for _ in range(5)]
    assert read == ["one", "two\nthree", "", "last", None]
    screen.write("an\x1bswer")
    screen.end_answer("3 tokens")
    screen.say("a note")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("an\x1bswer\n", "a note\n")


def test_every_answer_in_a_pipe_ends_with_one_line_break(capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that has its own, and half a one before something is refused; what is refused makes the code 78."""
    screen = Pipe()
    for pieces in (["two", "\n", "lines"], ["one\n"], [], ["last", ""]):
        for piece in pieces:
            screen.write(piece)
        screen.end_answer("")
    assert screen.exit_code() == ExitCode.FINISHED
    screen.write("half")
    screen.refuse("no memory")
    screen.refuse("no memory")
    assert capsys.readouterr().out == "two\nlines\none\n\nlast\nhalf\n"
    assert screen.exit_code() == ExitCode.BAD_INPUT


def test_a_refusal_stands_on_a_line_of_its_own(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal what is refused does not follow half an answer."""
    screen = terminal(keys)
    screen.write("half")
    screen.refuse("no memory")
    screen.refuse("twice")
    assert capsys.readouterr().out == "half\nno memory\ntwice\n"
