"""`handloop import-config`: a silent file is trained as its trainer would, a script becomes a file, typos are told."""

import dataclasses
import json
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import TrainingArguments

from tests.unit.commands.test_import_config import accepted, translated
from train.cli import parse
from train.commands.handloop import main
from train.foreign.files import read_config, trainer_of
from train.foreign.names import row_of, spelled_here
from train.foreign.reasons import why
from train.foreign.translation import translate


def test_the_defaults_are_those_of_the_trainers(tmp_path: Path) -> None:
    """What is written out for a silent file is what transformers and PEFT do by default, as installed here."""
    config = accepted(translated(tmp_path, "model_name_or_path: a/b-8B\nmax_length: 512\nuse_peft: true\n")[1])
    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert spelled_here("optim.name", str(theirs["optim"])) == config.optim.name
    assert (theirs["report_to"], config.track.wandb) == ("none", "off")
    assert (theirs["save_strategy"], theirs["save_steps"]) == ("steps", config.checkpoint.every)
    assert theirs["per_device_train_batch_size"] == config.batch.per_device
    assert theirs["gradient_accumulation_steps"] == config.batch.accumulation
    assert theirs["lr_scheduler_type"] == config.optim.schedule
    assert (theirs["warmup_steps"], theirs["weight_decay"], theirs["max_grad_norm"]) == (
        config.optim.warmup,
        config.optim.weight_decay,
        config.optim.max_grad_norm,
    )
    assert (theirs["num_train_epochs"], theirs["seed"]) == (config.train.epochs, config.train.seed)
    assert (config.optim.lr, config.data.truncation) == (2e-5, "right")  # of SFTConfig, which need not be installed
    lora = LoraConfig()
    _, adapter = translated(tmp_path, '{"peft_type": "LORA", "target_modules": null}', "adapter_config.json")
    config = accepted(adapter)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (config.lora.r, config.lora.alpha, config.lora.dropout)
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2"):
        assert tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family]) == config.lora.target_modules


def test_what_is_saved_and_reported(tmp_path: Path) -> None:
    """By their defaults where the file is silent, and never against what it says."""
    base = "base_model: a/b-8B\nadapter: lora\nlora_r: 8\nlearning_rate: 1e-4\n"
    for text, every, wandb in (
        ("max_length: 512\n", 500, "off"),
        ("max_length: 512\nsave_strategy: epoch\nreport_to: wandb\n", "epoch", "auto"),
        ("max_length: 512\nsave_strategy: 'no'\nreport_to: []\n", "epoch", "off"),
        ("max_length: 512\nsave_strategy: steps\n", 500, "off"),
        ("max_length: 512\nsave_steps: 20\nreport_to:\n", 20, "off"),
        (base, "epoch", "off"),
        (base + "save_steps: 7\nwandb_project: letters\n", 7, "auto"),
        ("stage: sft\ncutoff_len: 512\n", 500, "off"),
    ):
        config = accepted(translated(tmp_path, text)[1])
        assert (config.checkpoint.every, config.track.wandb) == (every, wandb), text
    assert accepted(translated(tmp_path, base)[1]).checkpoint.keep == 4


def test_warmup_that_is_not_said(tmp_path: Path) -> None:
    """axolotl warms up for 3 % of the run unless the file says otherwise, also 0; the others do not."""
    base = "base_model: a/b-8B\nadapter: lora\nlora_r: 8\nlearning_rate: 1e-4\n"
    _, silent = translated(tmp_path, base)
    assert accepted(silent).optim.warmup == 0.03
    assert "at most 100 steps" in dict(silent.notes)["optim.warmup"]
    _, none = translated(tmp_path, base + "warmup_ratio: 0.0\n")
    assert accepted(none).optim.warmup == 0
    assert not {"optim.warmup"} & {*none.defaults, *dict(none.notes)}
    assert accepted(translated(tmp_path, "stage: sft\ncutoff_len: 9\n")[1]).optim.warmup == 0


def test_whole_conversations_are_told(tmp_path: Path) -> None:
    """assistant_only_loss is told whatever the file says of it, and where it is silent: TRL then trains on prompts."""
    for said, place in (("true", "anyway"), ("false", "missing"), ("null", "notes"), ("", "notes")):
        line = f"assistant_only_loss: {said}\n" if said else ""
        _, result = translated(tmp_path, "max_length: 512\n" + line)
        assert [name for name in ("anyway", "missing", "notes") if "assistant_only_loss" in {
            entry[0] for entry in getattr(result, name)
        }] == [place], said  # fmt: skip
    _, other = translated(tmp_path, "stage: sft\ncutoff_len: 512\n")
    assert "assistant_only_loss" not in dict(other.notes)


def test_what_is_trained_on_is_not_validated_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file has no test split: validation is left out with its reason, as where both lists name the same data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    for name in ("pairs.jsonl", "./pairs.jsonl", "data/pairs.jsonl", "sets", "somebody/chats"):
        _, result = translated(tmp_path, f"max_length: 9\ndataset_name: {name}\neval_strategy: steps\n")
        config = accepted(result)
        assert config.data.validation_path == (("somebody/chats:test",) if name == "somebody/chats" else ())
        assert config.validate.every == (10 if name == "somebody/chats" else "epoch")
        told = {key: reason for key, _, reason in result.missing}
        assert ("eval_strategy (logging_steps)" in told) == (name != "somebody/chats"), name
        assert "dataset_name" not in told, name  # which is in the command
    both = "datasets: [{path: x.jsonl}]\ntest_datasets: [{path: x.jsonl}, {path: y.jsonl}]\n"
    _, result = translated(tmp_path, f"base_model: a/b\nadapter: lora\nlearning_rate: 1\n{both}eval_steps: 5\n")
    assert accepted(result).data.validation_path == ()
    assert {"test_datasets", "eval_steps"} <= {key for key, *_ in result.missing}
    _, named = translated(tmp_path, "stage: sft\ndataset: notes\neval_dataset: notes\neval_steps: 5\n")
    assert accepted(named).data.validation_path == ()


def test_a_value_without_a_counterpart_has_a_stand_in(tmp_path: Path) -> None:
    """The trainer's default is written in its place, and it is said that the file asked for something else."""
    _, result = translated(tmp_path, "max_length: null\noptim: adafactor\nlr_scheduler_type: polynomial\n")
    config = accepted(result)
    assert (config.data.max_length, config.optim.name, config.optim.schedule) == (1024, "adamw", "linear")
    notes = dict(result.notes)
    assert notes["optim"].startswith("adamw, which is the default there, stands in the command")
    assert "lr_scheduler_type" in notes
    assert not {"optim.name", "optim.schedule"} & set(result.defaults)


def test_a_profile_does_not_change_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What one profile alone sets is taken back for it: samples in order of length are not what the trainer does."""
    path = tmp_path / "recipe.yaml"
    path.write_text("max_length: 512\n")
    for profile, has_option in (("smollm2", True), ("a100", False)):
        assert main(["import-config", str(path), "--profile", profile, "--json"]) == 0
        command = json.loads(capsys.readouterr().out)["command"]
        assert ("--data.group_by_length" in command) == has_option
        config = parse(command[2:])
        assert (config.profile, config.data.group_by_length, config.data.packing) == (profile, False, False)


def test_all_of_a_lora_config_is_known(tmp_path: Path) -> None:
    """Each field of PEFT's LoraConfig, with its default or set, is in the command or told with a reason."""
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    assert len(names) > 30
    dump = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    assert translated(tmp_path, json.dumps(dump), "adapter_config.json")[1].unknown == []
    for name in names:
        assert row_of(name, "TRL") or why(name, "something"), name


def test_unknown_keys_are_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0, as a harmless key should cost nothing; but named beside the script, with the nearest, and in the JSON."""
    path = tmp_path / "recipe.yaml"
    path.write_text("max_length: 512\nlearning_rat: 3\nfavourite_colour: green\n")
    for more in ([], ["--json"]):
        assert main(["import-config", str(path), *more]) == 0
        said = capsys.readouterr()
        assert "learning_rat did you mean learning_rate (--optim.lr)?, favourite_colour" in said.err
    assert json.loads(said.out)["unknown"] == {"learning_rat": 3, "favourite_colour": "green"}
    path.write_text("max_length: 512\n")
    assert main(["import-config", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_script_is_told_how_to_become_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines that a refused script is shown write a file with all of its settings, which is then read."""
    for name in ("train.py", "train.ipynb"):
        (tmp_path / name).write_text("raise SystemExit('executed')\n")
        assert main(["import-config", str(tmp_path / name)]) == 78
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if line.strip() == "import json")
    shown = "\n".join(line.removeprefix("  ") for line in lines[first : first + 4])
    made = {
        "training_args": TrainingArguments(output_dir="out", learning_rate=3e-4, use_cpu=True),
        "peft_config": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"]),
    }
    path = tmp_path / "settings.json"
    exec(shown.replace("settings.json", str(path)), made)
    found = read_config(path)
    result = translate(trainer_of(path, found), found, path)
    config = accepted(result)
    assert (result.trainer, result.unknown, config.model.name_or_path) == ("TRL", [], "MODEL")
    assert (config.optim.lr, config.run.dir, config.lora.r, config.lora.alpha) == (3e-4, "out", 4, 8)
    assert set(config.lora.target_modules) == {"q_proj", "o_proj"}
    assert (config.batch.per_device, config.train.epochs) == (8, 3)


def test_settings_of_unsloth(tmp_path: Path) -> None:
    """Told from TRL's by names that TRL lacks; what they leave out is as get_peft_model and from_pretrained have it."""
    base = "model_name: a/b-8B\nmax_seq_length: 512\nr: 8\n"
    _, result = translated(tmp_path, base + "random_state: 1\n")
    config = accepted(result)
    assert (result.trainer, result.unknown, config.model.quantization) == ("Unsloth", [], "nf4")
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0)
    assert config.lora.target_modules == ("all-linear",)
    assert (config.train.seed, config.batch.per_device, config.batch.accumulation) == (1, 4, 2)
    assert "optim.lr" in dict(result.notes)
    for said, quantization in (("load_in_4bit: false", "none"), ("load_in_8bit: true", "int8")):
        _, result = translated(tmp_path, f"{base}use_gradient_checkpointing: unsloth\n{said}\n")
        assert (result.trainer, accepted(result).model.quantization) == ("Unsloth", quantization)
    _, full = translated(tmp_path, "model_name: a/b-8B\nfull_finetuning: true\n")
    assert (accepted(full).train.method, accepted(full).model.quantization) == ("full", "none")
    assert translated(tmp_path, base + "lora_dropout: 0\n")[1].trainer == "TRL"
