"""Files of other trainers that are no plain lists of keys: numbers that are none, aliases, other programs' recipes."""

import json
import time
from pathlib import Path

import pytest

from tests.unit.commands.test_import_config import translated
from train.commands.handloop import main
from train.foreign.names import ROWS

BASES = {"TRL": "loss_type: nll\n", "axolotl": "tokenizer_type: x\n", "LLaMA-Factory": "plot_loss: true\n"}


@pytest.mark.parametrize("trainer", BASES)
def test_numbers_that_are_not_finite(trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever key has one, it is told that there is no such value, and none is in the command or the JSON."""
    names = [name for row in ROWS for name in row.names(trainer)]
    names = [*dict.fromkeys([*names, "adam_epsilon", "logging_steps", "eval_delay", "loftq_config"])]
    assert len(names) > 30
    path = tmp_path / "recipe.yaml"
    for spelled in (".inf", "-.inf", ".nan"):
        path.write_text(BASES[trainer] + "".join(f"{name}: {spelled}\n" for name in names))
        assert main(["import-config", str(path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        lost = {each["key"]: each["reason"] for each in told["no_counterpart"]}
        assert [name for name in names if "has no such value" not in lost.get(name, "")] == []
        assert not {"inf", "nan"} & {word.strip("-.") for word in told["command"]}
    _, result = translated(tmp_path, '{"max_length": 512, "max_steps": 1e999, "seed": -1e999}', "args.json")
    assert {key for key, *_ in result.missing} == {"max_steps", "seed"}


def test_warmup_that_is_no_number(tmp_path: Path) -> None:
    """It is told, and not taken for one that is off."""
    _, result = translated(tmp_path, "max_length: 512\nwarmup_steps: many\nwarmup_ratio: 0\n")
    assert [key for key, *_ in result.missing] == ["warmup_steps"]
    assert result.off == ["warmup_ratio"]


def nested(each: str) -> str:
    """Eight levels of nine aliases, which are 9^8 values once they are written out."""
    lines = ["sequence_len: 5", f"a0: &a0 {each.format('a: 1')}"]
    lines += [f"a{i}: &a{i} {each.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 9)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested("[{}]"), "more than 100,000 values"),
        (nested("{{<<: [{}]}}").replace("<<: [a: 1]", "a: 1"), "more than 100,000 values"),
        ("sequence_len: 5\nx: &a [*a]\n", "a value holds itself"),
        ("sequence_len: 5\n? [a, b]\n: c\n", "unhashable key"),
        ("sequence_len: 5\nx: " + "[" * 150 + "]" * 150 + "\n", "nested too deeply"),
    ],
    ids=["lists", "merge keys", "itself", "list as key", "depth"],
)
def test_documents_that_do_not_end(text: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 78 with the reason, at once."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    start = time.monotonic()
    assert main(["import-config", str(path)]) == 78
    assert time.monotonic() - start < 5
    assert reason in capsys.readouterr().err


def test_aliases_of_a_plain_file(tmp_path: Path) -> None:
    """A few are what YAML has them for; keys and values that JSON lacks are text."""
    text = "max_length: 512\nbase: &b {r: 1, 2024-01-01: 2024-01-02}\nagain: [*b, *b]\n"
    _, result = translated(tmp_path, text)
    assert dict(result.unknown)["again"] == [{"r": 1, "2024-01-01": "2024-01-02"}] * 2
