"""rsLoRA, LoRA+, trained rows and whole layers: plain transformers, PEFT and torch's AdamW train the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from tests.conftest import training_of
from tests.parity.bases import Shape, on, write
from train.config import Config, EngineConfig, LoraConfig, OptimConfig
from train.models.tokenizer import trained_tokens
from train.step import Training, optimizer_step

STEPS = 3
ENGINES = ("fused", "streamed", "reference")
NEW = ("<|so|>", "bolt")  # a control token that nothing spells, and a word of the data
# name: (how the adapters are, the ratio of LoRA+, whether the head is the embedding)
WAYS: dict[str, tuple[dict[str, Any], float, bool]] = {
    "LoRA": ({}, 1.0, False),
    "rsLoRA": ({"rslora": True}, 1.0, False),
    "LoRA+": ({}, 8.0, False),
    "rows": ({"trainable_tokens": NEW}, 1.0, False),
    "rows of a tied pair": ({"trainable_tokens": NEW}, 1.0, True),
    "whole head": ({"modules_to_save": ("lm_head",)}, 1.0, False),
    "whole embedding": ({"modules_to_save": ("embed_tokens",)}, 1.0, False),
    "head and rows, LoRA+": ({"modules_to_save": ("lm_head",), "trainable_tokens": NEW}, 4.0, False),
}


def way(config: Config, name: str, engine: str, folder: Path) -> Config:
    """A run on a base that is not quantised; its blocks are streamed from host memory, or not."""
    settings, ratio, is_tied = WAYS[name]
    config = on(config, write(folder / "base", Shape(is_tied=is_tied)), "none")
    lora, optim = LoraConfig(r=4, alpha=8, **settings), OptimConfig("adamw", lr=5e-3, lora_plus_ratio=ratio)
    config = replace(config, lora=lora, optim=optim, engine=EngineConfig(kind="fused"))
    if engine == "streamed":
        return replace(config, memory=replace(config.memory, offload="stream"))
    return replace(config, engine=EngineConfig(kind=engine))  # type: ignore[arg-type]


def by_peft(config: Config, training: Training) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and trained tensors of the same steps by libraries alone, from the same start."""
    base: Any = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32)
    tokens, lora = trained_tokens(config), config.lora
    rows = None
    if tokens.ids:
        base.resize_token_embeddings(tokens.vocabulary)
        layers = {"embed_tokens", "lm_head"} - set(lora.modules_to_save)
        is_tied = base.config.tie_word_embeddings
        rows = list(tokens.ids) if is_tied else {key: list(tokens.ids) for key in sorted(layers)}
    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    model: Any = peft.get_peft_model(base, settings)
    state = {name: tensor.detach().clone() for name, tensor in training.parameters.items()}
    loaded = peft.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    optim = config.optim
    optimizer: Any = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=optim.lr, loraplus_lr_ratio=optim.lora_plus_ratio
    )
    ratios = [group["lr"] / optim.lr for group in optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        batch = training.data.batch(step, replace(training.plan, merges=False))
        total = 0.0
        for micro_batch in batch.micro_batches:
            inputs = {"input_ids": micro_batch.input_ids, "position_ids": micro_batch.position_ids}
            logits = model(**inputs, use_cache=False).logits  # so that transformers tells packed samples apart
            rows_of_targets = logits.flatten(0, 1)[micro_batch.target_rows]
            loss = torch.nn.functional.cross_entropy(rows_of_targets, micro_batch.targets, reduction="sum")
            (loss / batch.num_supervised_tokens).backward()
            total += loss.item() / batch.num_supervised_tokens
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], optim.max_grad_norm)
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = training.schedule.rate(step) * ratio
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, peft.get_peft_model_state_dict(model, save_embedding_layers=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WAYS)
def test_three_steps_of_peft(name: str, engine: str, config: Config, tmp_path: Path) -> None:
    """Three steps give the losses and every trained tensor of plain PEFT, on each engine, and they move."""
    config = way(config, name, engine, tmp_path)
    training = training_of(config, Accelerator(cpu=True))
    assert training.model.engine_name == ("reference" if engine == "reference" else "fused")
    assert bool(training.plan.streamed) == (engine == "streamed")
    before = {key: tensor.detach().clone() for key, tensor in training.parameters.items()}
    wanted, tensors = by_peft(config, training)
    found = [optimizer_step(training, step).loss for step in range(STEPS)]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert set(tensors) == set(before)
    for key, tensor in tensors.items():
        moved = (tensor - before[key]).norm()
        assert moved > 0, key
        assert (training.parameters[key] - tensor).norm() <= 0.02 * moved, key
