"""Options of the commands: what misspelt ones may mean, and what the data commands say of files without a profile."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.terminal import fitted
from tests.conftest import BUNDLED_BASE, ROOT
from tests.unit.data_tools.jinja import THINKS, answer, user
from train.commands import handloop
from train.commands.handloop import main


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
    about = json.loads(capsys.readouterr().out)["about"]
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


MISSPELT = [  # the words of a command, and what it answers
    (["merge", "RUN", "--ont", "original"], "--ont: no such option; did you mean --onto?"),
    (["merge", "RUN", "--onto", "original", "--dtyp", "bf16"], "--dtyp: no such option; did you mean --dtype?"),
    (["merge", "RUN", "--quantise", "Q4_0"], "--quantise: no such option\n"),  # the run's quantisation stays
    (["export", "RUN", "--formt", "gguf"], "--formt: no such option; did you mean --format?"),
    (["export", "RUN", "--format", "gguf", "--quantise", "Q4_0"], "did you mean --quantize?"),
    (["export", "RUN", "--max-klm", "1"], "--max-klm: no such option; did you mean --max-kl?"),
    (["compare", "RUN", "--nmu", "3", "--device", "cpu"], "did you mean --num?"),
    (["compare", "RUN", "--nmu", "3", "--device", "cpu"], "--device: no such option; did you mean --run.device?"),
    (["chat", "RUN", "--temprature", "0"], "--temprature: no such option; did you mean --temperature?"),
    (["chat", "RUN", "--temp=0"], "--temp: no such option; did you mean --temperature?"),
    (["chat", "RUN", "--quantization", "nf4"], "--quantization: no such option\n"),
    (["chat", "MODEL", "--quantization", "nf4"], "did you mean --model.quantization?"),
    (["train", "--profile", "demo", "--num_proceses", "2"], "did you mean --num_processes?"),
    (["train", "--profile", "demo", "--max_steps", "2"], "--train.max_steps"),
    (["plan", "--prob"], "--prob: no such option; did you mean --probe?"),
    (["plan", "--profile", "demo", "--mean-lenth", "3"], "did you mean --mean-length?"),
    (["plan", "--profil", "demo"], "--profil: no such option; did you mean --profile?"),
    (["plan", "--profile", "demo", "--lr", "1"], "--lr: here it is --optim.lr 1"),
    (["preview", "FILE", "--row", "3"], "--row: no such option; did you mean --rows?"),
    (["audit", "FILE", "--jsn"], "--jsn: no such option; did you mean --json?"),
    (["audit", "FILE", "--data.pth", "x"], "--data.pth: no such option; did you mean --data.path?"),
    (["report", "RUN", "--outptu", "x"], "did you mean --output?"),
    (["runs", "--jsno"], "did you mean --json?"),
    (["sync", "RUN", "--dry-rnu"], "did you mean --dry-run?"),
    (["import-config", "FILE", "--jsno"], "--jsno: no such option; did you mean --json?"),
    (["glossary", "FILE", "--fomrs", "3"], "--fomrs: no such option; did you mean --forms?"),
]


@pytest.mark.parametrize(("words", "answer"), MISSPELT, ids=[" ".join(words) for words, _ in MISSPELT])
def test_a_misspelt_option_is_taken_for_one_that_the_command_takes(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own options come first; of train/main.py only those that this very command would take."""
    assert handloop.main([str(BUNDLED_BASE) if word == "MODEL" else word for word in words]) == 78
    said = capsys.readouterr().err
    assert answer in said
    assert f"usage: handloop {words[0]}" in said


def test_every_command_is_tried() -> None:
    """A new command has a row above."""
    assert {words[0] for words, _ in MISSPELT} == set(handloop.COMMANDS)


def test_all_that_is_wrong_with_the_words_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Two misspelt options and an invalid value are one report, also where the run is not there."""
    assert handloop.main(["merge", "RUN", "--ont", "x", "--jsn", "--run.device", "gpu"]) == 78
    said = capsys.readouterr().err
    for part in ("did you mean --onto?", "did you mean --json?", "--run.device gpu: "):
        assert part in said


REFUSED = [[], ["foo"], ["plan"], *([name, "--hlep"] for name in handloop.COMMANDS)]
REFUSED += [["merge", "--onto", "original"], ["export", "--format", "gguf"], ["compare"], ["chat"]]
TRY = """
import json, sys
from train.commands import handloop
for words in json.loads(sys.argv[1]):
    code = handloop.main(words)
    print("##", words, code, *sorted({"torch", "transformers", "datasets", "numpy"} & set(sys.modules)))
"""


def test_a_usage_error_waits_for_no_library() -> None:
    """Neither torch nor another library that takes seconds is imported before the words are understood."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRY, json.dumps(REFUSED)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    told = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert told == [f"## {words} {78 if words else 0}" for words in REFUSED], done.stderr


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal lines break between words; a path, and a command to paste, stay whole; a pipe gets whole lines."""
    monkeypatch.setenv("COLUMNS", "40")
    path, command = f"/a/{'long-folder/' * 4}x", f"  pip install {'x' * 30}"
    text = f"the merged model is written, with its receipt, to {path}\n{command}"
    lines = fitted(text, Terminal()).split("\n")
    assert lines[:2] == ["the merged model is written, with its", "  receipt, to"]
    assert [line.strip() for line in lines[2:]] == [path, command.strip()]
    assert fitted(text, io.StringIO()) == text
