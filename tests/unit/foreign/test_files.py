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
    names = [name for row in ROWS for name in row.names(trainer) if name != "max_grad_norm"]
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
    _, result = translated(tmp_path, "per_device_train_batch_size: 1.0e+300\ngradient_accumulation_steps: 1.0e+300\n")
    assert "effective batch" not in dict(result.notes)


def test_warmup_that_is_no_number(tmp_path: Path) -> None:
    """It is told, and not taken for one that is off."""
    _, result = translated(tmp_path, "max_length: 512\nwarmup_steps: many\nwarmup_ratio: 0\n")
    assert [key for key, *_ in result.missing] == ["warmup_steps"]
    assert result.off == ["warmup_ratio"]


def test_gradients_that_are_not_clipped(tmp_path: Path) -> None:
    """Infinity is a norm, and what 0 means to transformers' Trainer."""
    for trainer, spelled, norm in (
        ("TRL", ".inf", "inf"), ("TRL", "0", "inf"), ("LLaMA-Factory", "0.0", "inf"),
        ("axolotl", ".inf", "inf"), ("axolotl", "0.3", "0.3"),
    ):  # fmt: skip
        _, result = translated(tmp_path, f"{BASES[trainer]}max_grad_norm: {spelled}\n")
        assert (result.trainer, result.options["optim.max_grad_norm"]) == (trainer, (norm,))
    _, result = translated(tmp_path, "max_length: 512\nmax_grad_norm: .nan\n")
    assert [key for key, *_ in result.missing] == ["max_grad_norm"]


def nested(each: str) -> str:
    """Eight levels of nine aliases, which are 9^8 values once they are written out."""
    lines = ["sequence_len: 5", f"a0: &a0 {each.format('a: 1')}"]
    lines += [f"a{i}: &a{i} {each.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 9)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested("[{}]"), "recipe.yaml: has more than 100,000 values"),
        (nested("{{<<: [{}]}}").replace("<<: [a: 1]", "a: 1"), "recipe.yaml: has more than 100,000 values"),
        ("sequence_len: 5\nx: &a [*a]\n", "recipe.yaml: the value in line 2 holds itself"),
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


TORCHTUNE = """
model: {_component_: torchtune.models.llama3_1.lora_llama3_1_8b, lora_rank: 8, lora_alpha: 16}
batch_size: 2
optimizer: {_component_: torch.optim.AdamW, lr: 3e-4}
gradient_accumulation_steps: 8
output_dir: out
"""


def test_a_recipe_of_torchtune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused by name: as another trainer's its adapters would become a full fine-tune."""
    path = tmp_path / "recipe.yaml"
    for text in (TORCHTUNE, "output_dir: out\ndatasets: [{_component_: torchtune.datasets.alpaca_dataset}]\n"):
        path.write_text(text)
        assert main(["import-config", str(path)]) == 78
        said = capsys.readouterr()
        assert "recipe.yaml: is a recipe of torchtune" in said.err
        assert said.out == ""


def test_an_adapter_of_another_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused by name; LoRA's is taken in every spelling."""
    path = tmp_path / "adapter_config.json"
    for spelled, is_taken in (
        ("LORA", True), ("lora", True), ("PeftType.LORA", True), ("IA3", False), ("PeftType.LOHA", False),
        ("XLORA", False), ("PROMPT_TUNING", False),
    ):  # fmt: skip
        path.write_text(
            json.dumps({"base_model_name_or_path": "m", "peft_type": spelled, "target_modules": ["k_proj"]})
        )
        assert main(["import-config", str(path)]) == (0 if is_taken else 78), spelled
        said = capsys.readouterr().err
        assert (f"peft_type {spelled.rpartition('.')[2]}: adapters here are LoRA's alone" in said) != is_taken
