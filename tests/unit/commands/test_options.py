"""The data commands look at files without a profile, and say what there is to be said of the data."""

import io
import json
import re
from pathlib import Path

import pytest

from tests.conftest import BUNDLED_BASE
from tests.unit.data_tools.jinja import THINKS, answer, user
from train.commands.handloop import main
from train.commands.options import fitted


def test_files_without_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`handloop preview FILE` and `audit FILE` take the bundled tokenizer, and say so; --json has what is said."""
    turns = [{"role": "user", "content": "Which?", "mood": "calm"}, {"role": "assistant", "content": "AOG."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns, "id": 7}) + "\n")
    assert main(["preview", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("no --profile: tokenizer and chat template are those of the bundled demo base")
    for line in (
        "format    messages",
        "template  takes an answer, several turns, a system turn",
        "template  not reasoning: turn 2: its reasoning would be lost",
        r"template  an answer stands between '\n<|assistant|>\n' and '<|end|>'",
        "warning   nothing reads the field 'id' of 1 rows",
        "warning   nothing reads the key 'mood' of 1 turns",
    ):
        assert line in captured.out
    assert main(["preview", str(path), "--json"]) == 0
    about = json.loads(capsys.readouterr().out.splitlines()[0])["about"]
    assert (about["formats"], about["unread_fields"], about["unread_turn_keys"]) == (
        ["messages"],
        {"id": 1},
        {"mood": 1},
    )
    assert about["template"]["refusals"]["an answer"] == ""
    assert "would be lost" in about["template"]["refusals"]["reasoning"]
    assert main(["audit", str(path), "--json", "--model.name_or_path", str(BUNDLED_BASE)]) == 0
    captured = capsys.readouterr()
    assert f"are those of {BUNDLED_BASE}\n" in captured.err
    found = json.loads(captured.out)
    assert found["unread_fields"] == {"id": 1}
    assert found["template"]["end"] == "<|end|>"
    assert any("'mood'" in line for line in found["warnings"])


def test_arguments_that_the_template_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A misspelled template argument, and one that is none, are refused before anything is prepared."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    for given, reason in (
        ("enable_thinkng=false", "the chat template reads no 'enable_thinkng'; check the spelling"),
        ("nonsense", "write name=value, such as enable_thinking=false"),
        ("eos_token=x", "eos_token is what the template is given anyway"),
    ):
        assert main(["preview", str(path), "--data.template_arguments", given]) == 78
        assert reason in capsys.readouterr().err


def test_history_is_said_with_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Preview and audit tell how many conversations became several samples, and the option that changes it."""
    template = tmp_path / "x.jinja"
    template.write_text(THINKS)
    turns = [user("a"), answer("b"), user("c"), answer("d")]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert main(["preview", str(path), "--data.chat_template", str(template)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"history   in 1 conversations .*: \d+ tokens more; --data\.history last", shown)
    assert "thinking  2 answers stand behind an empty think block, which is not trained" in shown
    assert main(["audit", str(path), "--data.chat_template", str(template), "--data.history", "last"]) == 0
    assert "warning   1 earlier answers are not trained (--data.history last)" in capsys.readouterr().out


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal lines break between words; a path, and a command to paste, stay whole; a pipe gets whole lines."""
    monkeypatch.setenv("COLUMNS", "30")
    path, command = f"/a/{'long-folder/' * 4}x", f"  pip install {'x' * 30}"
    text = f"the merged model is written, with its receipt, to {path}\n{command}"
    lines = fitted(text, Terminal()).split("\n")
    assert lines[:2] == ["the merged model is written,", "with its receipt, to"]
    assert lines[2:] == [path, command]
    assert fitted(text, io.StringIO()) == text
