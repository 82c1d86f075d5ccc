"""What is decided about a base before and after it is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PhiConfig

from tests.conftest import BUNDLED_BASE, tokenizer_at
from train.config import Config, MemoryConfig, ModelConfig
from train.engine.plan import reference_plan
from train.models.fingerprint import base_fingerprint
from train.models.language_model import load_model
from train.models.tokenizer import check_fits
from train.run import accelerator as run_accelerator
from train.run.exits import ExitWith


def test_the_fingerprint_sees_other_weights_and_nothing_else(config: Config, tmp_path: Path) -> None:
    """One tensor scaled: another fingerprint. Another folder or transformers version: the same."""
    shutil.copytree(BUNDLED_BASE, tmp_path / "copy")

    def fingerprint(folder: Path) -> str:
        return base_fingerprint(replace(config, model=ModelConfig(name_or_path=str(folder))))

    settings = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(settings | {"transformers_version": "9.9.9"}))
    assert fingerprint(tmp_path / "copy") == fingerprint(BUNDLED_BASE)
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"] *= 1.5
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(tmp_path / "copy") != fingerprint(BUNDLED_BASE)


def test_a_head_that_does_more_than_multiply_is_refused(config: Config, tmp_path: Path) -> None:
    """Phi's head has a bias: our loss would silently be another one than the model's."""
    PhiConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)
    phi = replace(
        config,
        model=ModelConfig(name_or_path=str(tmp_path), random_init=True, quantization="none"),
        lora=replace(config.lora, target_modules=("fc1",)),
    )
    plan = reference_plan(1, MemoryConfig())
    load_model(phi, torch.device("cpu"), plan)  # with a bias of zero there is no difference
    original: Any = torch.zeros

    def biased(*arguments: object, **options: object) -> torch.Tensor:
        return original(*arguments, **options) + (3.0 * torch.arange(64) if arguments[0] == torch.Size([64]) else 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", biased)
        with pytest.raises(ExitWith, match="its head does more than multiply"):
            load_model(phi, torch.device("cpu"), plan)


def test_samples_must_fit_the_model(config: Config, shape: Path) -> None:
    """More positions than the model was made for, or a tokenizer with more tokens than it embeds, are refused."""
    tokenizer = tokenizer_at(shape)
    check_fits(config, tokenizer)
    with pytest.raises(ExitWith, match=r"--data\.max_length 1024: .* made for 512"):
        check_fits(replace(config, data=replace(config.data, max_length=1024)), tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])
    with pytest.raises(ExitWith, match=r"the tokenizer has .* tokens and the model embeds"):
        check_fits(config, tokenizer)


def test_the_budget_is_set_for_the_current_device(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's device has no index in a single process, and torch refuses such a device for the memory fraction."""
    calls = []
    card = type("Card", (), {"total_memory": 16 * 2**30})()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: calls.append(given))
    single = Accelerator(cpu=True)
    monkeypatch.setattr(type(single), "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(run_accelerator, "Accelerator", lambda **options: single)
    run_accelerator.start_accelerator(replace(config, memory=MemoryConfig(budget="4GiB")))
    assert calls == [(0.25,)]
