"""Every command speaks JSON: one document on stdout, with the keys that docs/SCRIPTS.md names."""

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.run_folders import write_run
from train.commands import handloop, train

PAGE = (ROOT / "docs" / "SCRIPTS.md").read_text(encoding="utf-8")
KEYS = {
    name: re.findall(r"`(\w+)`", keys)
    for name, keys in re.findall(r"^\| `handloop ([\w-]+).*?` \| (.*) \|$", PAGE, re.M)
}
FEW = ("--num", "1", "--max-new-tokens", "2", "--loss-tokens", "64")


def glossary(run: Path, folder: Path) -> list[str]:
    return [str(shutil.copy(ROOT / "demo" / "glossary.csv", folder / "terms.csv"))]


def recorded(run: Path, folder: Path) -> list[str]:
    """A run with an uploaded record of Weights & Biases, whose content does not matter here."""
    record = write_run(folder / "recorded") / "wandb" / "offline-run-1" / "run-1.wandb"
    record.parent.mkdir(parents=True)
    record.write_bytes(b":W&B" + bytes(3))
    record.with_name("run-1.wandb.synced").touch()
    return [str(folder / "recorded"), "--dry-run"]


def foreign(run: Path, folder: Path) -> list[str]:
    """A configuration of PEFT's."""
    path = folder / "adapter_config.json"
    path.write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "owner/base"}')
    return [str(path)]


def rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "What is part {n}?", "response": "A bolt {n}."}}\n' for n in range(3)))
    return str(path)


# the words of each command that give a result in a second or two
CASES: dict[str, Callable[[Path, Path], list[str]]] = {
    "train": lambda run, folder: ["--profile", "demo", "--run.dir", str(run)],
    "preview": lambda run, folder: [rows(folder)],
    "audit": lambda run, folder: [rows(folder)],
    "glossary": glossary,
    "chat": lambda run, folder: [str(run), "--max-new-tokens", "2"],
    "compare": lambda run, folder: [str(run), *FEW],
    "import-config": foreign,
    "plan": lambda run, folder: ["--profile", "4gb", "--model.name_or_path", str(folder / "shape"), "--gpu", "4GiB"],
    "merge": lambda run, folder: [str(run), "--onto", "original"],
    "report": lambda run, folder: [str(run)],
    "runs": lambda run, folder: [str(run)],
    "sync": recorded,
    "export": lambda run, folder: [str(run), "--format", "adapter"],
}


@pytest.mark.usefixtures("short_receipts")
@pytest.mark.parametrize("name", CASES)
def test_one_document(
    name: str,
    run: Path,
    tinyllama_1b: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --json stdout is one document, which has the keys of the page, and --help names the option."""
    (tmp_path / "shape").symlink_to(tinyllama_1b)
    monkeypatch.setattr(
        train, "launch", lambda arguments, output: (0, "finished")
    )  # tests/integration has the real one
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/nothing\nagain\n" if name == "chat" else ""))
    words = CASES[name](run, tmp_path)
    capsys.readouterr()
    code = handloop.main([name, *words, "--json"])
    out, said = capsys.readouterr()
    assert code == (78 if name == "chat" else 0), said  # a line of the chat cannot be done
    lines = [json.loads(line) for line in out.splitlines()] if name == "chat" else []
    document: Any = lines or json.loads(out)
    found = document[0] if isinstance(document, list) else document
    assert KEYS[name], name
    assert set(KEYS[name]) <= set(found)
    assert name == "audit" or set(KEYS[name]) == set(found)  # whose counts are too many for the page
    if name == "chat":
        assert [line["line"] for line in lines] == [1, 3]
        assert "line 2: /nothing: no such command" in said
    with pytest.raises(SystemExit):
        handloop.main([name, "--help"])
    assert "--json" in capsys.readouterr().out


def test_every_command_is_tried() -> None:
    """A new command has a case here and a row on the page."""
    assert set(CASES) == set(handloop.COMMANDS) == set(KEYS)


def test_the_page_has_the_exit_codes() -> None:
    """Every code, with its name in exit.json and --json."""
    from train.run.exits import ExitCode

    rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert {int(code): name for code, name in rows.items()} == {int(code): code.name.lower() for code in ExitCode}


def test_the_loop_of_the_page_trains_to_the_end(tmp_path: Path) -> None:
    """It repeats what was interrupted, ends with what is finished, and gives up where repeating does not help."""
    loop = re.findall(r"```text\n(until.*?)```", PAGE, re.DOTALL)[0]
    for name, text in {
        "handloop": f'read code < "{tmp_path}/codes"\nsed -i 1d "{tmp_path}/codes"\nexit $code',
        "sleep": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o700)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for codes, code, left in (("75\n83\n81\n0\n9\n", 0, "9\n"), ("75\n78\n0\n", 1, "0\n")):
        (tmp_path / "codes").write_text(codes)
        done = subprocess.run(["bash", "-c", loop], cwd=tmp_path, env=environment, check=False, timeout=60)
        assert (done.returncode, (tmp_path / "codes").read_text()) == (code, left)


def test_numbers_that_json_lacks_are_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is JSON, also where a value is infinite or undefined."""
    from train.commands.options import print_document

    print_document({"a": float("nan"), "b": [float("-inf"), 1.5]})
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"a": "NaN", "b": ["-Infinity", 1.5]}


def test_a_refusal_leaves_stdout_empty(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A command that is refused says so on stderr, and prints no half document."""
    for words in (["train", "--json"], ["compare", str(tmp_path), "--json"], ["report", "--json"]):
        assert handloop.main(words) == 78
        out, said = capsys.readouterr()
        assert (out, said != "") == ("", True)
