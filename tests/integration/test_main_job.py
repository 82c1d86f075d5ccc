"""The main job, from data files to an adapter that PEFT loads."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from tests.conftest import (
    BUNDLED_BASE,
    SHARED,
    arguments,
    needs_shared,
    run_command,
    splits_of,
    tokenizer_at,
    training_of,
    write_shape,
)
from train.config import CompareConfig, Config, ModelConfig
from train.models.language_model import keep_one_cpu_kernel, load_adapters
from train.track.metrics_file import read_metrics


def on_bundled_base(config: Config) -> Config:
    return replace(config, model=ModelConfig(name_or_path=str(BUNDLED_BASE)), train=replace(config.train, max_steps=3))


def test_plain_peft_loads_the_result_with_the_same_logits(config: Config) -> None:
    """PEFT with final/ or a checkpoint, on transformers' NF4 base, gives the trainer's logits to the bit."""
    config = on_bundled_base(config)
    outcome = run_command(arguments(config))
    assert outcome.returncode == 0, outcome.stderr
    run_dir = Path(config.run.dir)
    samples = splits_of(config).training.samples
    ours = training_of(config, Accelerator(cpu=True)).model
    load_adapters(ours, load_file(run_dir / "final" / "adapter_model.safetensors"))
    ours.eval()
    ids = torch.tensor([samples[0]["input_ids"]])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with torch.no_grad():
        expected = ours.adapted(ids).logits
        for folder in (run_dir / "final", run_dir / "checkpoints" / "step-0000000003"):
            settings = json.loads((folder / "adapter_config.json").read_text())
            base: Any = AutoModelForCausalLM.from_pretrained(
                settings["base_model_name_or_path"], quantization_config=quantization, dtype=torch.float32
            )
            keep_one_cpu_kernel(base)
            untuned = base(ids).logits
            plain = peft.PeftModel.from_pretrained(base, folder).eval()
            assert torch.equal(plain(ids).logits, expected)
            assert not torch.allclose(untuned, expected, atol=1e-3)


def test_the_result_names_the_trained_end_tokens(config: Config) -> None:
    """generation_config.json and the saved tokenizer have the trained end token, another pad token, the template."""
    outcome = run_command(arguments(on_bundled_base(config)))
    assert outcome.returncode == 0, outcome.stderr
    final = Path(config.run.dir) / "final"
    tokenizer = tokenizer_at(final)
    end_ids = GenerationConfig.from_pretrained(final).eos_token_id
    assert end_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert tokenizer.pad_token_id not in end_ids
    assert tokenizer.chat_template == tokenizer_at(BUNDLED_BASE).chat_template


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_every_quantization_trains(quantization: Literal["nf4", "int8", "none"], config: Config) -> None:
    """The loss falls, every adapter changes, and only adapters are saved."""
    config = replace(config, model=replace(config.model, quantization=quantization))
    outcome = run_command(arguments(replace(config, train=replace(config.train, epochs=4))))
    assert outcome.returncode == 0, outcome.stderr
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    assert rows[-1]["train/loss"] < 0.9 * rows[0]["train/loss"]
    adapters = load_file(Path(config.run.dir) / "final" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 2
    assert all(tensor.abs().sum() > 0 for tensor in adapters.values())


def test_validation_is_logged_and_changes_no_bit(config: Config, tmp_path: Path) -> None:
    """Validation adds eval/loss at the end of each epoch and does not change the training losses."""
    config = replace(config, lora=replace(config.lora, dropout=0.1))  # dropout must be on again after validation
    without = run_command(arguments(config))
    held = replace(
        config,
        data=replace(config.data, validation_path=config.data.path, gate="warn"),
        run=replace(config.run, dir=str(tmp_path / "v")),
    )
    outcome = run_command(arguments(held))
    assert (without.returncode, outcome.returncode) == (0, 0), outcome.stderr
    plain, measured = (read_metrics(Path(c.run.dir) / "metrics.jsonl") for c in (config, held))
    assert [row["train/loss"] for row in plain] == [row["train/loss"] for row in measured]
    assert [row["step"] for row in measured if "eval/loss" in row] == [3, 6]
    assert all(row["eval/loss"] > 0 for row in measured if "eval/loss" in row)


def test_the_banner_shows_the_arithmetic(config: Config) -> None:
    """The banner shows batch, steps and tokens before the first step, as plain lines without a terminal."""
    outcome = run_command(arguments(replace(config, compare=CompareConfig(num_questions=2, max_new_tokens=4))))
    assert "2 per device x 4 accumulated x 1 process = 8 samples per step" in outcome.stdout
    assert "3 per epoch, 6 in all; starts fresh" in outcome.stdout
    assert "19 records (prompt_response), 19 samples" in outcome.stdout
    assert "step 6/6" in outcome.stdout
    assert "\x1b" not in outcome.stdout
    answers = json.loads((Path(config.run.dir) / "answers.json").read_text())
    assert len(answers) == 2
    assert {"question", "reference", "before", "after", "exact", "stopped"} <= answers[0].keys()


def real_shape(folder: Path, tokenizer: str) -> Path:
    """A tiny Llama with the real tokenizer and its vocabulary."""
    shutil.copytree(SHARED / tokenizer, folder, copy_function=shutil.copyfile)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "config.json").unlink()
    write_shape(folder, vocab_size)
    return folder


@needs_shared
@pytest.mark.parametrize(
    ("tokenizer", "data", "profile", "end"),
    [
        ("tinyllama_1b", "glossary/training_dataset.jsonl", "4gb_tinyllama", 2),
        ("llama31_8b", "wildfire", "a100", 128001),
    ],
)
def test_real_tokenizers_and_data(
    tokenizer: str, data: str, profile: str, end: int, config: Config, tmp_path: Path
) -> None:
    """Real data and tokenizers, through their profiles on tiny shapes, train and save the real end token."""
    folder = real_shape(tmp_path / "base", tokenizer)
    words = ["--profile", profile, "--model.name_or_path", str(folder), "--model.random_init", "true"]
    words += ["--data.path", str(SHARED / data), "--run.device", "cpu", "--run.dir", str(tmp_path / "run")]
    short = "--train.max_steps 2 --track.wandb off --compare.max_new_tokens 4 --data.max_length 256"
    words += short.split()
    outcome = run_command(words)
    assert outcome.returncode == 0, outcome.stderr
    final = tmp_path / "run" / "final"
    assert GenerationConfig.from_pretrained(final).eos_token_id == [end]
    assert GenerationConfig.from_pretrained(final).pad_token_id != end
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
