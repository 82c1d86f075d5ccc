"""What is decided about a base before and after it is loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.conftest import BUNDLED_BASE, tokenizer_at
from train.collate import collate_packed
from train.config import Config, MemoryConfig, ModelConfig
from train.engine import attention
from train.models.fingerprint import base_fingerprint
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


def test_samples_must_fit_the_model(config: Config, shape: Path) -> None:
    """More positions than the model was made for, or a tokenizer with more tokens than it embeds, are refused."""
    tokenizer = tokenizer_at(shape)
    check_fits(config, tokenizer)
    with pytest.raises(ExitWith, match=r"--data\.max_length 1024: .* made for 512"):
        check_fits(replace(config, data=replace(config.data, max_length=1024)), tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(10)])
    with pytest.raises(ExitWith, match=r"the tokenizer has .* tokens and the model embeds"):
        check_fits(config, tokenizer)


def test_masks_keep_away_from_cudnn(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA does not take cuDNN by itself, whose masked gradients may be NaN, but where the engine asks for it."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    run_accelerator.start_accelerator(config)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    enabled: list[bool] = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda *states, **options: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()) or real(*states, **options),
    )
    batch = replace(collate_packed([{"input_ids": [0, 1], "trained": [True, True]}]), uniform_length=2)
    attention.PackedAttention(batch, None, 1.0)._uniform(*(torch.ones(2, 1, 8) for _ in range(3)))
    assert enabled == [True]


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
