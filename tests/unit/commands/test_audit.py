"""What `handloop audit` prints and returns, its steps, and its verdict on real data."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import SHARED, needs_shared
from tests.unit.data_tools.rows import numbered, write
from train.commands.handloop import main


def test_json_has_everything_and_the_exit_code_is_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`--json` prints one object; 0 without failures, 78 with one; nothing else on stdout."""
    path = write(tmp_path / "rows.jsonl", numbered(20))
    assert main(["audit", "--profile", "4gb", "--json", "--model.name_or_path", "demo/base", "--data.path", path]) == 0
    result = json.loads(capsys.readouterr().out)
    wanted = (
        "rows samples tokens supervised_tokens rows_without_supervision end_token_trained_fraction double_bos_rows "
        "end_token_masked_fraction end_token_cut_fraction duplicates near_duplicates leaked_rows mojibake_rows longest "
        "control_character_rows truncated_rows length_histogram steps_per_epoch failures warnings"
    )
    assert set(wanted.split()) <= set(result)
    assert (result["rows"], result["failures"], result["warnings"]) == (20, [], [])
    assert (result["units_per_step"], result["steps_per_epoch"], result["total_steps"]) == (16, 2, 10)
    assert list(result["longest"][0]) == ["source", "tokens"]
    write(tmp_path / "rows.jsonl", [*numbered(10) * 2, *({"prompt": f"{i}\a", "response": "x"} for i in range(3))])
    assert main(["audit", "--profile", "demo", "--data.path", path, "--json"]) == 78
    captured = capsys.readouterr()
    assert json.loads(captured.out)["duplicates"] == 10
    assert json.loads(captured.out)["control_character_rows"] == 3
    assert captured.err.count("handloop: ") == 1


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a terminal: no escape codes, not even those of file names; a bar for each bin; the verdict last."""
    rows = [*numbered(14), {"prompt": "bell\a", "response": "x"}]
    path = write(tmp_path / "r\x1b[31mows.jsonl", rows)
    assert main(["audit", "--profile", "demo", "--data.path", path, "--train.epochs", "28"]) == 78
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "15 rows" not in text
    assert re.search(r"^rows +15$", text, re.MULTILINE)
    assert re.search(r"^ +\d+(-\d+)? +█+ \d+$", text, re.MULTILINE)
    assert re.search(r"^steps +15 samples per epoch = 2 steps; 28 epochs, 56 steps in all$", text, re.MULTILINE)
    assert "failure   1 rows contain control characters" in text
    assert text.strip().endswith("verdict   1 reason not to train on this")


def test_steps_are_those_of_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Packing, weights and max_steps change the number of steps as they do in training."""
    path = write(tmp_path / "rows.jsonl", numbered(40))
    words = ["audit", "--profile", "demo", "--train.epochs", "28", "--data.group_by_length", "false"]
    words += ["--json", "--data.path", path]
    plans = []
    for more in ([], ["--data.packing", "true"], ["--data.weights", "0.5"], ["--train.max_steps", "3"]):
        assert main([*words, *more]) == 0
        result = json.loads(capsys.readouterr().out)
        plans.append((result["unit"], result["units_per_epoch"], result["steps_per_epoch"], result["total_steps"]))
    assert plans[0] == ("samples", 40, 5, 140)
    assert plans[1][0] == "packed rows"
    assert plans[1][1] < 10
    assert plans[2][0] == "samples"
    assert 8 < plans[2][1] < 32
    assert plans[2][2] == -(-plans[2][1] // 8) == plans[2][3] // 28
    assert plans[3] == ("samples", 40, 5, 3)


@needs_shared
def test_real_data(capsys: pytest.CaptureFixture) -> None:
    """Both data sets pass; a warning says that 59 of the glossary's 105 rows are duplicates."""
    cpu = ["--run.device", "cpu", "--json", "--model.name_or_path"]
    reports = ["--profile", "a100", "--data.path", str(SHARED / "wildfire"), *cpu, str(SHARED / "llama31_8b")]
    assert main(["audit", *reports]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["double_bos_rows"], result["end_token_trained_fraction"]) == (11, 0, 1.0)
    glossary = str(SHARED / "glossary" / "training_dataset.jsonl")
    assert main(["audit", "--profile", "4gb", "--data.path", glossary, *cpu, str(SHARED / "tinyllama_1b")]) == 0
    result = json.loads(capsys.readouterr().out)
    lines = Path(glossary).read_text(encoding="utf-8").splitlines()
    assert result["duplicates"] == len(lines) - len(set(lines)) == 59
    assert len(result["warnings"]) >= 1
    assert result["end_token_trained_fraction"] == 1.0
