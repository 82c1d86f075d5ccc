"""The reference engine's merged passes without padding compute what the configured ones do, in families of its own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import training_of
from tests.unit.models.test_agreement import SIZES, SPARSE, for_all_linear, write
from train.collate import collate_packed
from train.config import Config
from train.engine import attention
from train.memory.reference import ReferencePlan
from train.models import isolation
from train.step import Training, optimizer_step

EXPERTS: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ISOLATED: dict[str, Any] = {
    "gemma2": lambda: T.Gemma2Config(**SIZES, head_dim=16, sliding_window=16, attn_logit_softcapping=5.0),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZES | EXPERTS),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SPARSE, hidden_dropout=0.0, attention_dropout=0.0),
    "stablelm": lambda: T.StableLmConfig(**SIZES),
}
CARRIED = {"lfm2": lambda: T.Lfm2Config(**SIZES | {"num_hidden_layers": 2}, layer_types=["conv", "full_attention"])}


def step_of(config: Config, merge: Any) -> tuple[Training, float, torch.Tensor]:
    """(training, loss, flat gradient) of the first step."""
    config = replace(config, batch=replace(config.batch, merge=merge))
    training = training_of(replace(config, optim=replace(config.optim, max_grad_norm=1e9)), Accelerator(cpu=True))
    gradients: list[torch.Tensor] = []
    training.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            torch.cat([p.grad.flatten() for p in training.parameters.values() if p.grad is not None])
        )
    )
    return training, optimizer_step(training, 0).loss, gradients[0]


@pytest.mark.parametrize("name", [*ISOLATED, *CARRIED])
def test_merged_passes_compute_what_configured_ones_do(name: str, config: Config, tmp_path: Path) -> None:
    """Loss and gradients are the padded micro-batches', in fewer passes; where a state is carried, all is as before."""
    config = for_all_linear(config, write(tmp_path / "base", (ISOLATED | CARRIED)[name]()))
    plain, wanted, wanted_gradient = step_of(config, "off")
    training, loss, gradient = step_of(config, "auto")
    assert isinstance(training.plan, ReferencePlan)
    assert plain.plan.micro_batch_shape.layout == "padded"
    is_isolated = name in ISOLATED
    assert training.plan.layout == ("unpadded" if is_isolated else "padded")
    assert any("does not compute packed samples" in line for line in training.plan.choices) != is_isolated
    passes = training.data.batch(0, training.plan).micro_batches
    assert all((each.cu_seqlens is not None) == is_isolated for each in passes)
    counts = [len(each.data.batch(0, each.plan).micro_batches) for each in (plain, training)]
    assert counts[0] == 4
    assert (counts[1] < 4) == is_isolated
    assert loss == pytest.approx(wanted, rel=2e-5)
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) < 2e-4
    assert float(wanted_gradient.norm()) > 1e-3


def test_boundaries_reach_layers_that_do_not_hand_them_on(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """StableLM's layers drop what the decoder is called with; varlen attention isolates its samples all the same.

    The kernel, which a CPU does not have, is replaced by an SDPA call for each sample.
    """

    def by_samples(states: Any, cu_seqlens: torch.Tensor, max_length: int, reach: int, scale: float) -> torch.Tensor:
        batch = replace(collate_packed([{"input_ids": [0], "trained": [True]}]), cu_seqlens=cu_seqlens)
        return attention.PackedAttention(replace(batch, max_length=max_length), None, scale)(*states)

    monkeypatch.setattr(attention, "_varlen", by_samples)
    monkeypatch.setattr(isolation, "has_flash", lambda *_: True)
    config = for_all_linear(config, write(tmp_path / "base", ISOLATED["stablelm"]()))
    training = training_of(replace(config, batch=replace(config.batch, merge="auto")), Accelerator(cpu=True))
    assert training.model.causal_lm.config._attn_implementation == "varlen"
    assert "varlen attention" in " ".join(getattr(training.plan, "choices", ()))


def test_a_cpu_s_short_steps_stay_padded(config: Config) -> None:
    """One micro-batch a step of samples of similar length: nothing to merge, little to pad, and no mask to pay for."""
    config = replace(config, batch=replace(config.batch, per_device=4, accumulation=1))
    grouped = replace(config, data=replace(config.data, group_by_length=True))
    layouts = [training_of(each, Accelerator(cpu=True)).plan.micro_batch_shape.layout for each in (config, grouped)]
    assert layouts == ["unpadded", "padded"]
