"""`handloop import-config`: each key of another trainer's file is in the command, or told."""

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from train.cli import parse
from train.commands.handloop import main
from train.config import Config
from train.foreign.files import read_config, trainer_of
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
