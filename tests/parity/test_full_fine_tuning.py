"""train.method full: plain transformers and torch's AdamW train the same model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PhiConfig

from tests.conftest import training_of
from tests.parity.bases import Shape, on, write
from tests.unit.models.test_agreement import SPARSE
from tests.unit.models.test_agreement import write as write_shape
from train.cli import parse
from train.config import Config, OptimConfig, TrainConfig
from train.memory import outlook
from train.run.exits import ExitWith
from train.step import optimizer_step

STEPS = 3


def whole(config: Config, folder: Path) -> Config:
    """A run that trains every weight of the base in the folder."""
    optim = OptimConfig("adamw", lr=1e-3, weight_decay=0.1)
    return replace(on(config, folder, "none"), optim=optim, train=TrainConfig(method="full", epochs=2))


@pytest.mark.parametrize("is_tied", [False, True])
def test_three_steps_of_adamw(is_tied: bool, config: Config, tmp_path: Path) -> None:
    """Three steps give the losses, gradient norms and every weight of transformers, of a tied pair, too."""
    config = whole(config, write(tmp_path / "base", Shape(is_tied=is_tied)))
    training = training_of(config, Accelerator(cpu=True))
    plain: Any = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, weight_decay=0.1)
    assert set(training.parameters) == {name for name, _ in plain.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    for step in range(STEPS):
        batch, total = training.data.batch(step, training.plan), 0.0
        for micro_batch in batch.micro_batches:
            logits = plain(input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids).logits
            rows = logits.flatten(0, 1)[micro_batch.target_rows]
            loss = torch.nn.functional.cross_entropy(rows, micro_batch.targets, reduction="sum")
            (loss / batch.num_supervised_tokens).backward()
            total += loss.item() / batch.num_supervised_tokens
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = training.schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        found = optimizer_step(training, step)
        assert (found.loss, found.grad_norm) == pytest.approx((total, norm.item()), rel=1e-4)
    for name, parameter in plain.named_parameters():
        moved = (parameter - before[name]).norm()
        assert moved > 0, name
        assert (training.parameters[name] - parameter).norm() <= 0.02 * moved, name


def test_half_precision_computes_and_fp32_learns(config: Config, tmp_path: Path) -> None:
    """In bf16 the loss is fp32's up to rounding, and weights and gradients stay fp32."""
    config = whole(config, write(tmp_path / "base", Shape()))
    losses = []
    for dtype in ("fp32", "bf16"):
        training = training_of(replace(config, model=replace(config.model, dtype=dtype)), Accelerator(cpu=True))
        assert training.model.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        losses.append([optimizer_step(training, step).loss for step in range(2)])
        assert {parameter.dtype for parameter in training.parameters.values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0]


def test_what_cannot_be_trained_whole(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights, the fused engine, options of adapters, a head with a bias, and too little memory."""
    words = "--profile demo --train.method full --engine.kind fused --memory.offload stream --lora.init_from x"
    words += " --lora.trainable_tokens y --lora.modules_to_save lm_head --optim.lora_plus_ratio 2"
    with pytest.raises(ExitWith) as caught:
        parse(words.split())
    for option in ("model.quantization nf4", "engine.kind fused", "memory.offload stream", "lora.init_from x"):
        assert f"--{option}: " in caught.value.reason
    for option in ("lora.trainable_tokens y", "lora.modules_to_save lm_head", "optim.lora_plus_ratio 2.0"):
        assert f"--{option}: belongs to adapters" in caught.value.reason
    biased = whole(config, write_shape(tmp_path / "phi", PhiConfig(**SPARSE)))
    with pytest.raises(ExitWith, match="its head has a bias"):
        training_of(biased, Accelerator(cpu=True))
    config = whole(config, write(tmp_path / "base", Shape()))
    count = sum(parameter.numel() for parameter in training_of(config, Accelerator(cpu=True)).parameters.values())
    for free, name, each in ((16 * count - 1, "adamw", 16.0), (10 * count, "adamw_8bit", 10.03125)):
        monkeypatch.setattr(outlook, "free_host_bytes", lambda free=free: free)
        small = replace(config, optim=replace(config.optim, name=name))
        with pytest.raises(ExitWith, match=rf"{count:,} weights take 0\.0 GiB \({each:.1f} bytes each"):
            training_of(small, Accelerator(cpu=True))
    monkeypatch.setattr(outlook, "free_host_bytes", lambda: 16 * count)
    training_of(config, Accelerator(cpu=True))
