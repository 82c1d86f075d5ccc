"""What `handloop glossary` writes, counts and refuses."""

import json
from pathlib import Path

import pytest

from data_tools.glossary import PairSettings, main, make_pairs
from data_tools.glossary_files import read_terms
from data_tools.report import DataError
from tests.unit.data_tools.glossaries import BUNDLED, write_as
from train.commands.handloop import main as handloop
from train.run.exits import ExitCode

# No comparisons: their answers are two definitions long, and the bundled base learnt none of six.
BUNDLED_WORDS = ("--forms", "3", "--held-out-forms", "1", "--comparisons", "0")


def command(source: Path, folder: Path, *words: str) -> int:
    return handloop(
        [
            "glossary",
            str(source),
            "--out",
            str(folder / "t.jsonl"),
            "--held-out",
            str(folder / "new" / "h.jsonl"),
            *words,
        ]
    )


def test_the_command_writes_both_files_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files hold the rows of make_pairs, one JSON object per line, and the printed counts are theirs."""
    path = write_as("csv", tmp_path / "terms")
    path.write_text(path.read_text(encoding="utf-8") + "PR,buying,Purchase requisition,\n", encoding="utf-8")
    assert command(path, tmp_path) == ExitCode.BAD_INPUT
    assert "terms.csv:7: 'PR' is defined differently" in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()

    write_as("csv", tmp_path / "terms")
    path.write_text(path.read_text(encoding="utf-8") + "NO,repair,Nitric oxide.,\n", encoding="utf-8")
    assert command(path, tmp_path, "--forms", "3", "--held-out-forms", "1", "--comparisons", "5", "--seed", "4") == 0
    pairs = make_pairs(read_terms(path).terms, PairSettings(3, 1, 5, 4))
    for name, held_out in (("t.jsonl", False), ("new/h.jsonl", True)):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == pairs.rows(held_out)
        assert sum("Überholung" in line for line in lines) == (1 if held_out else 3)
    printed = capsys.readouterr().out
    for part in (
        "5 terms: buying 3, repair 2",
        "18 training rows: 15 on definitions (3 forms per term), 2 on examples, 1 comparisons",
        "8 held-out rows: 5 on definitions (1 forms per term), 2 on examples, 1 comparisons",
        "1 duplicates removed",
    ):
        assert part in printed


@pytest.mark.parametrize("words", [["--form", "3"], ["--forms", "x"], ["--seed"]])
def test_the_command_refuses_what_it_does_not_know(words: list[str], tmp_path: Path, capsys) -> None:
    """Bad options end with exit code 78 and the usage, as in every command."""
    assert command(BUNDLED, tmp_path, *words) == ExitCode.BAD_INPUT
    assert "usage: handloop glossary" in capsys.readouterr().err
    with pytest.raises(DataError, match="must be three different files"):
        main([str(BUNDLED), "--out", str(BUNDLED), "--held-out", str(tmp_path / "h.jsonl")])


def test_the_bundled_rows_are_those_of_the_bundled_glossary(tmp_path: Path) -> None:
    """The command in BUNDLED_WORDS writes demo/glossary.jsonl and demo/held_out.jsonl byte for byte."""
    assert command(BUNDLED, tmp_path, *BUNDLED_WORDS) == 0
    for made, bundled_rows in (("t.jsonl", "glossary.jsonl"), ("new/h.jsonl", "held_out.jsonl")):
        assert (tmp_path / made).read_bytes() == (BUNDLED.parent / bundled_rows).read_bytes()


def test_a_glossary_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without names for them the two files lie beside the glossary; they are never replaced unasked."""
    path = write_as("csv", tmp_path / "terms")
    assert handloop(["glossary", str(path)]) == 0
    training, held_out = tmp_path / "terms.train.jsonl", tmp_path / "terms.held_out.jsonl"
    assert training.exists()
    assert held_out.exists()
    assert handloop(["glossary", str(path)]) == ExitCode.BAD_INPUT
    assert f"{training} exists; to replace it, say --out {training}" in capsys.readouterr().err
    assert handloop(["glossary", str(path), "--out", str(training), "--held-out", str(held_out)]) == 0
