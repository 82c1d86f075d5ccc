"""What the command line answers to other trainers' option names, and to words that belong to no option."""

import dataclasses
import re
from pathlib import Path

import pytest
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from data_tools.compressed import COMPRESSIONS
from data_tools.sources import KNOWN_EXTENSIONS
from tests.unit.test_cli import refusal
from train.advice import looks_like_data
from train.config import Config
from train.foreign.names import ROWS, TRAINERS, counterpart, row_of, rows, spelled_here
from train.help_pages import meanings
from train.not_offered import reason_for
from train.profiles import PROFILES

OPTIONS = {
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    if section.name != "profile"
    for field in dataclasses.fields(getattr(PROFILES["demo"](), section.name))
}
TYPED = {  # what people type, and what they are told
    "--lr 2e-4": "--lr: here it is --optim.lr 2e-4",
    "--learning-rate 2e-4": "--learning-rate: here it is --optim.lr 2e-4",
    "--optim.learning_rate=2e-4": "--optim.learning_rate: here it is --optim.lr 2e-4",
    "--batch_size 4": "--batch_size: here it is --batch.per_device 4",
    "--per_device_train_batch_size 4": "here it is --batch.per_device 4",
    "--micro_batch_size 4": "here it is --batch.per_device 4",
    "--gradient_accumulation_steps 4": "here it is --batch.accumulation 4",
    "--epochs 3": "here it is --train.epochs 3",
    "--num_train_epochs 3.0": "here it is --train.epochs 3",
    "--num_train_epochs 0.5": "here it is --train.epochs, which has no such value (whole epochs; ",
    "--max_seq_length 512": "here it is --data.max_length 512",
    "--sequence_len 512": "here it is --data.max_length 512",
    "--output_dir runs/x": "here it is --run.dir runs/x",
    "--warmup_ratio 0.1": "here it is --optim.warmup 0.1",
    "--lora_r 16": "here it is --lora.r 16",
    "--load_in_4bit": "here it is --model.quantization nf4",
    "--load_in_8bit true": "here it is --model.quantization int8",
    "--load_in_4bit false": "leave it out; here it is --model.quantization",
    "--model x/y": "here it is --model.name_or_path x/y",
    "--dataset pairs.jsonl": "here it is --data.path pairs.jsonl",
    "--val_set_size 0.05": "here it is --data.validation_fraction 0.05",
    "--lora.use_rslora true": "here it is --lora.rslora true",
    "--loraplus_lr_ratio 16": "here it is --optim.lora_plus_ratio 16",
    "--lora_target all": "here it is --lora.target_modules all-linear",
    "--lr_scheduler_type SchedulerType.COSINE": "here it is --optim.schedule cosine",
    "--ddp_timeout 1800": "here it is --run.timeout_minutes 30",
    "--gradient_checkpointing false": "here it is --memory.checkpointing none",
    "--report_to wandb": "here it is --track.wandb auto",
    "--trust_remote_code": "--trust_remote_code: no such option: no code from the hub is run",
    "--deepspeed zero3.json": "no such option: several GPUs hold one replica each",
    "--config recipe.yaml": "handloop import-config FILE",
    "--optim.seed 3": "--optim.seed: here it is --train.seed 3",
    "--modle.dtype fp32": "--modle.dtype: no such option; did you mean --model.dtype?",
    "--frobnicate 1": "--frobnicate: no such option\n",
    "--learning_rat 1e-4": "no such option; did you mean learning_rate, which is --optim.lr here?",
    "--optim.learning_rat 1e-4": "no such option; did you mean learning_rate, which is --optim.lr here?",
    "--num_train_epoch 3": "did you mean num_train_epochs, which is --train.epochs here?",
    "--optim.name adamw_torch_fused": ". Here it is --optim.name adamw\n",
    "--optim.schedule constant_with_warmup": ". Here it is --optim.schedule constant\n",
    "--model.dtype torch.bfloat16": ". Here it is --model.dtype bf16\n",
    "--model.quantization 4bit": ". Here it is --model.quantization nf4\n",
    "--data.truncation keep_start": ". Here it is --data.truncation right\n",
    "--train.method qlora": ". Here it is --train.method lora\n",
    "--train.epochs 3.0": ". Here it is --train.epochs 3\n",
    "--optim.schedule polynomial": "('linear', 'cosine', 'constant').\n",
}


@pytest.mark.parametrize("words", TYPED)
def test_other_trainers_names(words: str) -> None:
    """Each is refused with our option and the value as it is written here, or with why there is none."""
    assert TYPED[words] in refusal("--profile", "demo", *words.split())


def test_every_option_in_the_table_is_one() -> None:
    """Each row leads to an option of the configuration; no name is ours already, and each is found where it stands."""
    assert len(ROWS) > 50
    assert {row.option for row in ROWS} <= OPTIONS
    assert {"model", "data", "batch", "optim", "lora", "train", "run"} <= {row.option.split(".")[0] for row in ROWS}
    for trainer in (*TRAINERS, "typed"):
        assert len(list(rows(trainer))) > 10
        for name, row in rows(trainer):
            assert name not in OPTIONS
            assert re.fullmatch(r"\w+", name), name
            found = row_of(name, trainer)
            assert found is not None
            assert found.option == row.option, f"{trainer}: {name}"


def test_what_does_not_pay_hides_no_option() -> None:
    """No name that has a counterpart is refused as a way to tune that does not pay, which is said first."""
    for name in {name for trainer in (*TRAINERS, "typed") for name, _ in rows(trainer)}:
        assert not reason_for(name), name


def test_values_that_others_have_name_ours() -> None:
    """Every AdamW and schedule of transformers that is ours in other words leads to ours, as an option's value, too."""
    fitting = {name: spelled_here("optim.name", name) for name in (each.value for each in OptimizerNames)}
    known = {name: ours for name, ours in fitting.items() if ours}
    assert {"adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "adamw_bnb_8bit"} <= set(known)
    assert set(known.values()) == {"adamw", "adamw_8bit"}
    assert not {name for name in known if "adamw" not in name}
    assert {each.value for each in SchedulerType if spelled_here("optim.schedule", each.value)} == {
        "constant_with_warmup"
    }
    assert spelled_here("model.quantization", "true") == ""  # says too little: of 4 bits, or of 8
    assert spelled_here("optim.name", "adamw") == ""


def test_values_that_do_not_carry_over() -> None:
    """They are told with the option that is meant and without a value."""
    for name, given in (("optim", "adafactor"), ("lr_scheduler_type", "polynomial"), ("val_size", 500), ("r", {})):
        found = counterpart(name, given)
        assert found is not None
        assert found[1] is None, name


def test_words_that_belong_to_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with what was probably meant: a profile, a file, an option without dashes, quotes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    demo = ("--profile", "demo")
    assert "a100 belongs to no option; did you mean --profile a100?" in refusal("a100")
    assert "--data.path a100: did you mean --profile a100?" in refusal("--data.path", "pairs.jsonl", "a100")
    file = "pairs.jsonl belongs to no option; data files are --data.path pairs.jsonl"
    for option in ("--train.epochs 3", "--data.weights 1 2", "--lora.target_modules q_proj", "--data.packing true"):
        assert file in refusal(*demo, *option.split(), "pairs.jsonl")
    assert file in refusal("pairs.jsonl", *demo)
    assert file in refusal(*demo, "pairs.jsonl", "--train.epochs", "3")
    assert "data files are --data.path reports" in refusal("reports", *demo)
    assert "did you mean --optim.lr=3?" in refusal("optim.lr=3", *demo)
    assert "here it is --optim.lr 3" in refusal("learning_rate=3", *demo)
    assert "a dash that is no hyphen: write --profile" in refusal("\N{EM DASH}profile", "demo")
    assert "handloop import-config x.yaml reads" in refusal("x.yaml", *demo)
    assert "a model is --model.name_or_path a/b, a data set --data.path a/b" in refusal("a/b", *demo)
    assert "folder belongs to no option; values follow" in refusal(*demo, "--run.dir", "my", "folder")
    assert "--data.packing: write --data.packing true or --data.packing false" in refusal(*demo, "--data.packing")


def test_all_stray_words_are_told_at_once() -> None:
    """A stray word hides neither another one nor an unknown option."""
    text = refusal("x.jsonl", "--profile", "demo", "--train.epochs", "3", "y.csv", "--optim.lrr", "1")
    for part in ("--data.path x.jsonl", "--data.path y.csv", "did you mean --optim.lr?"):
        assert part in text


def test_data_files_are_known_by_their_names() -> None:
    """The names that are taken for data are those that data_tools reads, compressed or not."""
    for extension in KNOWN_EXTENSIONS:
        assert looks_like_data(f"a/b{extension}")
        assert all(looks_like_data(f"b{extension}{ending}") for ending in COMPRESSIONS)
    assert not looks_like_data("model.safetensors")


def test_every_option_has_a_meaning() -> None:
    """The docstrings that help prints are those of all fields, one each."""
    fields = {f"{kind.__name__}.{field.name}" for kind in _sections() for field in dataclasses.fields(kind)}
    assert {name for name in meanings() if not name.startswith("Config.")} == fields
    assert all(meanings().values())


def _sections() -> list[type]:
    demo = PROFILES["demo"]()
    return [type(getattr(demo, field.name)) for field in dataclasses.fields(Config) if field.name != "profile"]
