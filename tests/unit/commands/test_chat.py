"""`handloop chat`: its commands, in a pipe and on a screen."""

import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import BUNDLED_BASE
from train.commands import handloop
from train.commands.chat import Chat, about, is_model
from train.deliver.sampling import Sampling
from train.deliver.speaker import Spoken
from train.run.exits import ExitCode


class Script:
    """A screen that reads given lines and records what it is told."""

    def __init__(self, *lines: str, is_asked: bool = False) -> None:
        self.is_asked = is_asked
        self.lines, self.said, self.refused, self.prompts = list(lines), list[str](), list[str](), list[str]()

    def read(self, prompt: str) -> str | None:
        self.prompts.append(prompt)
        return self.lines.pop(0) if self.lines else None

    def write(self, text: str) -> None:
        self.said.append(text)

    def end_answer(self, about: str, **facts: object) -> None:
        self.said.append(about)

    def say(self, line: str) -> None:
        self.said.append(line)

    def warn(self, line: str) -> None:
        self.said.append(line)

    def refuse(self, reason: str) -> None:
        self.refused.append(reason)

    def exit_code(self) -> ExitCode:
        return ExitCode.FINISHED

    @contextmanager
    def answering(self) -> Any:
        yield lambda: self.is_asked


class Talk:
    """Records what is asked; answers, or raises what it is given."""

    def __init__(self, *errors: BaseException) -> None:
        self.asked, self.errors = list[str](), list(errors)
        self.sampling, self.with_adapters, self.system = Sampling(), True, ""

    def ask(self, text: str, *_: Any) -> Spoken:
        self.asked.append(text)
        if self.errors:
            raise self.errors.pop(0)
        return Spoken("yes", "stopped", 4, 2.0, 0)

    def reset(self) -> None:
        self.asked.clear()

    def set_system(self, text: str) -> None:
        if text == "bad":
            raise ValueError("no system")
        self.system = text


def ran(*lines: str, errors: tuple[Exception, ...] = (), has_adapters: bool = True) -> tuple[Talk, Script]:
    talk, screen = Talk(*errors), Script(*lines)
    given: Any = talk
    Chat(given, screen, has_adapters).run()
    return talk, screen


def test_messages_and_commands_are_told_apart() -> None:
    """What begins with / is a command or refused, with // or a backslash it is text; blank lines ask nothing."""
    lines = ["hello ", "", "  ", "//etc/hosts", "\\/etc", "/etc/hosts", "/bas", "a /b", "one\n/two", "/exit", "never"]
    talk, screen = ran(*lines)
    assert talk.asked == ["hello", "/etc/hosts", "/etc", "a /b", "one\n/two"]
    assert [line.partition(":")[0] for line in screen.refused] == ["/etc/hosts", "/bas"]
    assert "4 tokens, 2.0 tokens/s" in screen.said


def test_the_base_is_switched_and_shown() -> None:
    """/base toggles, the prompt says so; a model without adapters refuses it."""
    talk, screen = ran("/base", "/base", "/base")
    assert not talk.with_adapters
    assert screen.prompts == ["> ", "base> ", "> ", "base> "]
    talk, screen = ran("/base", has_adapters=False)
    assert (talk.with_adapters, screen.prompts) == (True, ["> ", "> "])
    assert "no adapters" in screen.refused[0]


def test_settings_are_changed_and_shown() -> None:
    """/set takes a value, refuses an impossible one, lists all, and says where a value changes nothing."""
    talk, screen = ran("/set top-p 0.5", "/set temperature 1", "/set top_p 0.9", "/set seed x", "/set", "/set x")
    assert (talk.sampling.temperature, talk.sampling.top_p) == (1.0, 0.9)
    assert sum("changes nothing while temperature is 0" in line for line in screen.said) == 1
    assert [line.partition(":")[0] for line in screen.refused] == ["/set", "/set"]
    assert "temperature 1.0, top_p 0.9, top_k 0" in screen.said[-1]


def test_other_commands() -> None:
    """/system sets, takes away and refuses; /reset forgets; /help names every command; /save wants a name."""
    talk, screen = ran("/system Be brief.", "/system bad", "hi", "/reset", "/help", "/save")
    assert (talk.system, talk.asked) == ("Be brief.", [])
    assert screen.refused == ["/system: no system", "/save: name a file"]
    named = {line.split()[0] for line in screen.said if line.startswith("/")}
    assert named == {"/base", "/reset", "/system", "/save", "/set", "/help", "/exit"}
    assert max(len(line) for line in screen.said) <= 80
    assert ran("/system x", "/system")[0].system == ""


def test_what_fails_does_not_end_the_chat() -> None:
    """A message that the template refuses, and memory that ends, are said; the next message is asked."""
    errors = (ValueError("too long"), torch.OutOfMemoryError())
    talk, screen = ran("one", "two", "three", errors=errors)
    assert talk.asked == ["one", "two", "three"]
    assert screen.refused[0] == "too long"
    assert "memory" in screen.refused[1]
    assert about(Spoken("", "interrupted", 0, 0.0, 0)).endswith("interrupted")


def test_an_interrupt_ends_the_answer_or_the_chat() -> None:
    """Ctrl-C outside of a token ends the turn where the screen was asked for that, and everything where it was not."""
    for is_asked in (True, False):
        talk, screen = Talk(KeyboardInterrupt()), Script("one", "two", is_asked=is_asked)
        given: Any = talk
        if is_asked:
            Chat(given, screen, True).run()
            assert (talk.asked, screen.refused) == (["one", "two"], ["interrupted; this turn is not kept"])
        else:
            with pytest.raises(KeyboardInterrupt):
                Chat(given, screen, True).run()


def piped(path: Path, text: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return handloop.main(["chat", str(path), *words])


def test_in_a_pipe(
    finished_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout has one line an answer, the run's own; what is said of them goes to stderr, and /save writes a row."""
    rows = json.loads((finished_path / "answers.json").read_text())[:2]
    text = f"{rows[0]['question']}\n/reset\n{rows[1]['question']}\n/save {tmp_path}/rows.jsonl\n/reset\n/base\n"
    assert piped(finished_path, f"{text}{rows[0]['question']}", monkeypatch, "--max-new-tokens", "60") == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    wanted = [rows[0]["after"], rows[1]["after"], rows[0]["before"]]
    assert [line[: len(start)] for line, start in zip(lines, wanted, strict=True)] == wanted
    assert "without the adapters" in said.err
    (saved,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [turn["content"] for turn in saved["messages"]] == [rows[1]["question"], lines[1]]


def test_a_misspelt_command_costs_its_line_alone(
    finished_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a pipe it is said with its line and the nearest command, what follows is answered, and the code is 78.

    An answer that the limit cuts is named too, but fails nothing.
    """
    question = json.loads((finished_path / "answers.json").read_text())[0]["question"]
    words = (finished_path, f"{question}\n/hlep\n/rest\n{question}\n", monkeypatch, "--max-new-tokens", "1")
    assert piped(*words) == 78
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2
    assert "line 2: /hlep: no such command; did you mean /help? As a text it is written //hlep\n" in said.err
    assert "line 3: /rest: no such command; did you mean /reset?" in said.err
    cut = "the answer is cut after 1 tokens; --max-new-tokens N, or /set max-new-tokens N, lets it be longer"
    assert [f"line {number}: {cut}" in said.err for number in range(1, 5)] == [True, False, False, True]
    assert piped(finished_path, question, monkeypatch, "--max-new-tokens", "1") == 0
    assert f"line 1: {cut}" in capsys.readouterr().err


def test_bad_words_end_with_78(finished_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No folder, no run, impossible settings and unknown options are refused."""
    (tmp_path / "config.json").write_text("{}")
    for words, reason in [
        ([], "name a run folder or a model"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(tmp_path)], "config.json"),
        ([str(finished_path), "--top-p", "3"], "--top-p 3: must be greater than 0"),
        ([str(finished_path), "--modle.dtype", "fp32"], "did you mean --model.dtype?"),
    ]:
        assert handloop.main(["chat", *words]) == 78, words
        assert reason in capsys.readouterr().err


def test_a_run_and_a_model_are_told_apart(finished_path: Path, tmp_path: Path) -> None:
    """A model's folder and a hub id are models; a run, its final/, and a path that is not there are not."""
    assert is_model(BUNDLED_BASE)
    assert is_model(Path("owner/name-1.1"))
    for path in (finished_path, finished_path / "final", tmp_path / "none", Path("tests/none"), Path("none")):
        assert not is_model(path), path
