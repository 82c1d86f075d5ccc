"""`handloop import-config`: each key of another trainer's file is in the command, or told."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import TrainingArguments

from train.cli import parse
from train.commands.handloop import main
from train.config import Config
from train.foreign.files import read_config, trainer_of
from train.foreign.names import row_of, spelled_here
from train.foreign.reasons import why
from train.foreign.translation import Translation, translate

AXOLOTL = """
base_model: mistralai/Mistral-7B-v0.3
tokenizer_type: AutoTokenizer
load_in_4bit: true
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: letters.jsonl
    ds_type: json
    type: chat_template
    roles_to_train: [assistant]
  - path: somebody/notes
    name: long
    split: validation
    type: alpaca
    shards: 4
val_set_size: 0.05
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
learning_rate: 2e-4
lr_scheduler: cosine
warmup_steps: 10
optimizer: adamw_bnb_8bit
evals_per_epoch: 4
saves_per_epoch: 1
bf16: auto
gradient_checkpointing: true
flash_attention: true
train_on_inputs: false
early_stopping_patience:
special_tokens: {pad_token: "</s>"}
chat_template: chatml
output_dir: ./out
favourite_colour: green
"""
LLAMA_FACTORY = """
model_name_or_path: TinyLlama/TinyLlama-1.1B-Chat-v1.0
stage: sft
finetuning_type: lora
quantization_bit: 4
lora_rank: 16
lora_target: all
dataset: notes,letters
dataset_dir: sets
template: llama3
cutoff_len: 1024
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
warmup_steps: 20
max_samples: 500
neat_packing: true
val_size: 200
ddp_timeout: 180000000
eval_strategy: steps
eval_steps: 100
output_dir: saves/notes
deepspeed: null
"""
TRL = """
model_name_or_path: Qwen/Qwen3-8B
dataset_name: somebody/chats
dataset_config: clean
use_peft: true
lora_r: 8
lora_target_modules: [q_proj, v_proj]
load_in_4bit: true
learning_rate: 1.0e-4
max_length: 2048
packing: true
assistant_only_loss: false
eval_strategy: steps
eval_steps: 50
report_to: [tensorboard]
trust_remote_code: true
"""


def translated(tmp_path: Path, text: str, name: str = "recipe.yaml") -> tuple[dict[str, Any], Translation]:
    """What is in a file, and what becomes of it."""
    path = tmp_path / name
    path.write_text(text)
    found = read_config(path)
    return found, translate(trainer_of(path, found), found, path)


def accepted(result: Translation) -> Config:
    """The configuration that the command sets."""
    return parse(["--profile", result.profile, *result.words()])


def accounted(result: Translation) -> set[str]:
    """The keys of the file that are in the command or told, those of a data set by its list's name."""
    told = [*result.taken, *(key for key, _ in result.anyway), *(key for key, *_ in result.missing), *result.off]
    return {re.sub(r"\[.*", "", key) for key in [*told, *(key for key, _ in result.unknown)]}


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY, TRL], ids=["axolotl", "LLaMA-Factory", "TRL"])
def test_every_key_is_accounted_for(text: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The file's trainer is recognised, the command accepted, and each key is in it or told; one that is new, too."""
    found, result = translated(tmp_path, text)
    assert result.trainer == request.node.callspec.id
    accepted(result)
    assert accounted(result) == set(found)
    found, result = translated(tmp_path, text + "never_heard_of: 3\n")
    assert ("never_heard_of", 3) in result.unknown


def test_an_axolotl_recipe(tmp_path: Path) -> None:
    """Its values arrive, with what means something else and what is lost; its data sets are ours."""
    _, result = translated(tmp_path, AXOLOTL)
    config = accepted(result)
    assert (config.profile, config.model.quantization, config.train.method) == ("a100", "nf4", "lora")
    assert config.data.path == ("letters.jsonl", "somebody/notes:long:validation")
    assert (config.data.max_length, config.data.packing, config.data.validation_fraction) == (4096, True, 0.05)
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (32, 16, ("all-linear",))
    assert (config.batch.per_device, config.batch.accumulation, config.train.epochs) == (2, 4, 2)
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup) == (2e-4, "cosine", 10)
    assert (config.optim.name, config.validate.every, config.checkpoint.every) == ("adamw_8bit", 0.25, "epoch")
    assert ("favourite_colour", "green") in result.unknown
    lost = {key: reason for key, _, reason in result.missing}
    assert set(lost) == {"datasets[1].shards", "special_tokens", "chat_template"}
    assert "effective batch" in dict(result.notes)
    assert result.off == ["early_stopping_patience"]


def test_a_llama_factory_recipe(tmp_path: Path) -> None:
    """Names of data sets are looked up in dataset_info.json; a small base in 4 bits takes the recipe for 4 GB."""
    (tmp_path / "sets").mkdir()
    about = {"notes": {"file_name": "notes.json", "columns": {"prompt": "q"}}, "letters": {"hf_hub_url": "a/letters"}}
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(about))
    _, result = translated(tmp_path, LLAMA_FACTORY)
    config = accepted(result)
    assert (config.profile, config.data.path) == ("4gb", (str(tmp_path / "sets" / "notes.json"), "a/letters"))
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (16, 32, ("all-linear",))
    assert config.data.packing
    lost = {key: reason for key, _, reason in result.missing}
    assert {"dataset notes: columns", "template", "max_samples", "val_size", "ddp_timeout"} <= set(lost)
    assert lost["eval_steps"].startswith("validate.every needs held-out data")  # val_size 200 is no share
    (tmp_path / "sets" / "dataset_info.json").unlink()
    _, result = translated(tmp_path, LLAMA_FACTORY)
    assert accepted(result).data.path == ("notes", "letters")
    assert any("dataset_info.json" in reason for _, _, reason in result.missing)


def test_a_trl_recipe(tmp_path: Path) -> None:
    """`trl sft`: subset and splits stand behind the name, trackers are told apart, defaults are written out."""
    _, result = translated(tmp_path, TRL)
    config = accepted(result)
    assert config.data.path == ("somebody/chats:clean:train",)
    assert config.data.validation_path == ("somebody/chats:clean:test",)
    assert (config.track.wandb, config.track.tensorboard, config.validate.every) == ("off", True, 50)
    assert (config.lora.alpha, config.lora.dropout, config.batch.per_device) == (32, 0.05, 8)
    assert {"lora.alpha", "lora.dropout", "batch.per_device", "optim.schedule"} <= set(result.defaults)
    lost = {key: reason for key, _, reason in result.missing}
    assert lost["trust_remote_code"] == "no code from the hub is run"
    assert lost["assistant_only_loss"].startswith("here prompts are never trained")


def test_what_a_file_does_not_say(tmp_path: Path) -> None:
    """No adapter means every weight; no 4 bits an unquantised base; no data and no base are to be filled in."""
    _, full = translated(tmp_path, "base_model: a/b-1B\nadapter:\nlearning_rate: 1e-5\nlora_r: 8\n")
    config = accepted(full)
    assert (config.train.method, config.model.quantization) == ("full", "none")
    assert ("lora_r", "8", "every weight is trained (train.method full), so there are no adapters") in full.missing
    _, silent = translated(tmp_path, "base_model: a/b-1B\nsequence_len: 64\nlora_r: 8\n")  # axolotl without `adapter`
    assert accepted(silent).train.method == "full"
    _, quiet = translated(tmp_path, "model_name_or_path: a/b-8B\nstage: sft\n")  # LLaMA-Factory's default is LoRA
    assert (accepted(quiet).train.method, accepted(quiet).lora.alpha) == ("lora", 16)
    _, plain = translated(tmp_path, "base_model: a/b-8B\nadapter: lora\nlora_r: 8\n")
    assert accepted(plain).model.quantization == "none"
    _, qlora = translated(tmp_path, "base_model: a/b-8B\nadapter: qlora\nchat_template_jinja: '{{ messages }}'\n")
    assert accepted(qlora).model.quantization == "nf4"
    assert [key for key, *_ in qlora.missing] == ["chat_template_jinja"]
    _, bare = translated(tmp_path, '{"max_length": 512, "use_cpu": true, "warmup_steps": 3}', "args.json")
    assert (bare.profile, accepted(bare).data.path, bare.options["model.name_or_path"]) == (
        "demo",
        ("FILE",),
        ("MODEL",),
    )
    assert {"adapters", "data.path", "model.name_or_path"} <= set(dict(bare.notes))
    _, adapter = translated(tmp_path, '{"peft_type": "LORA", "r": 4, "use_dora": true}', "adapter_config.json")
    assert (adapter.options["lora.r"], adapter.options["lora.alpha"]) == (("4",), ("8",))
    assert "optim.lr" not in adapter.options
    assert any(key == "use_dora" and "DoRA" in reason for key, _, reason in adapter.missing)
    _, several = translated(tmp_path, "base_model: a/b\nadapter: lora\nfsdp: [full_shard]\n")
    assert several.profile == "multi_gpu"


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


def test_all_training_arguments_are_known(tmp_path: Path) -> None:
    """Each field of transformers' TrainingArguments, as to_json_string writes it with its default, is accounted for."""
    dump = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }
    _, result = translated(tmp_path, json.dumps({**dump, "max_length": 1024}, default=str), "training_args.json")
    assert len(dump) > 90
    assert result.trainer == "TRL"
    assert result.unknown == []
    assert accounted(result) == {*dump, "max_length"}
    config = accepted(result)
    assert (config.optim.lr, config.batch.per_device, config.checkpoint.every) == (5e-5, 8, 500)


def test_all_of_a_lora_config_is_known(tmp_path: Path) -> None:
    """Each field of PEFT's LoraConfig, with its default or set, is in the command or told with a reason."""
    names = [field.name for field in dataclasses.fields(LoraConfig) if field.init]
    assert len(names) > 30
    dump = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
    assert translated(tmp_path, json.dumps(dump), "adapter_config.json")[1].unknown == []
    for name in names:
        assert row_of(name, "TRL") or why(name, "something"), name


def test_the_printed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is a shell script whose one command sets what --json says; a path with a space is quoted."""
    path = tmp_path / "recipe.yaml"
    path.write_text(TRL.replace("somebody/chats", "my chats.jsonl"))
    assert main(["import-config", str(path)]) == 0
    script = capsys.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = shlex.split(script.replace("\\\n", ""), comments=True)
    assert "'my chats.jsonl'" in script
    assert main(["import-config", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert command == told["command"]
    assert told["refused"] == ""
    assert parse(command[2:]).data.path == ("my chats.jsonl",)
    assert main(["import-config", str(path), "--profile", "multi_gpu"]) == 0
    assert "handloop train --profile multi_gpu \\\n" in capsys.readouterr().out


def test_a_command_that_would_be_refused_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A value that our parser does not take is told with its reason, below the command."""
    path = tmp_path / "recipe.yaml"
    path.write_text("base_model: a/b\nadapter: lora\nlora_r: many\n")
    assert main(["import-config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "# the command would be refused as it stands:" in shown
    assert "--lora.r many" in shown.partition("refused")[2]


MALFORMED = {
    "a.yaml": ("base_model: x\n  adapter: [lora\n", "a.yaml:2:10: not YAML: "),
    "b.yaml": ("lora_r: 8\nadapter: lora\nlora_r: 16\n", "b.yaml:3:1: not YAML: the key 'lora_r' is there twice"),
    "c.json": ('{"r": 8,\n "lora_alpha": }', "c.json:2:16: not JSON: Expecting value"),
    "d.json": ('{"r": 8, "r": 9}', "d.json: the field 'r' appears twice"),
    "e.yaml": ("- 1\n- 2\n", "e.yaml: is a list; a configuration has keys and values"),
    "f.yaml": ("", "f.yaml: is empty"),
    "g.yaml": ("colour: green\nsize: 3\n", "g.yaml: has no key of TRL, axolotl, LLaMA-Factory: colour, size"),
    "h.yaml": ("a: !!python/object/apply:os.system [ls]\n", "h.yaml:1:4: not YAML: "),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is exit 78 with its place and reason; nothing in a file is executed."""
    text, reason = MALFORMED[name]
    (tmp_path / name).write_text(text)
    assert main(["import-config", str(tmp_path / name)]) == 78
    said = capsys.readouterr()
    assert reason in said.err
    assert said.out == ""


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named, as is one that is not text."""
    assert main(["import-config", str(tmp_path / "gone.yaml")]) == 78
    assert "gone.yaml: cannot be read: No such file or directory" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    assert main(["import-config", str(tmp_path / "x.yaml")]) == 78
    assert "x.yaml: is not UTF-8 (byte 3)" in capsys.readouterr().err
