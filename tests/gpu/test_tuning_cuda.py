"""What only a GPU can show of other ways to tune: graphs with a trained embedding, autocast, the plan's bytes."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import with_batch
from tests.gpu.test_engine_cuda import build, gradient
from train.config import Config, LoraConfig, OptimConfig
from train.step import optimizer_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"trainable_tokens": ("bolt", "<|so|>")},
    "whole": {"modules_to_save": ("lm_head", "embed_tokens")},
    "head": {"modules_to_save": ("lm_head",)},
}


@pytest.mark.parametrize("name", WAYS)
def test_graphs_give_the_embedding_its_gradient(name: str, config: Config) -> None:
    """Five steps with CUDA graphs, eagerly and by the reference: the gradients agree, those of the vocabulary too."""
    config = with_batch(replace(config, lora=LoraConfig(r=4, **WAYS[name])), 2, 4)
    found: dict[str, list[torch.Tensor]] = {}
    for way in ("graphs", "eager", "reference"):
        training = build(config, engine=replace(config.engine, kind="reference" if way == "reference" else "fused"))
        if way != "reference":
            training.model.execute(replace(training.plan, num_kept=1, num_cached=0, uses_graphs=way == "graphs"))
        beside = [name for name in training.parameters if "lora_" not in name]
        found[way] = []
        for step in range(5):
            gradient(training, step)
            found[way] += [training.parameters[each].grad.flatten().clone() for each in beside]  # type: ignore[union-attr]
        if way == "graphs":
            engine: Any = training.model.engine
            assert len(engine.graphs.graphs) > 1
    assert all(one.norm() > 0 for one in found["graphs"])
    for one, two, three in zip(found["graphs"], found["eager"], found["reference"], strict=True):
        assert torch.cosine_similarity(one, two, dim=0) > 0.999
        assert torch.cosine_similarity(one, three, dim=0) > 0.98  # 0.9875 has been seen for two rows alone


def test_full_fine_tuning_learns_in_bf16(config: Config) -> None:
    """Products in bf16 follow those in fp32, and weights, gradients and state stay fp32."""
    config = replace(config, optim=OptimConfig("adamw", lr=1e-3), train=replace(config.train, method="full"))
    curves = []
    for dtype in ("fp32", "bf16"):
        training = build(replace(config, model=replace(config.model, quantization="none", dtype=dtype)))  # type: ignore[arg-type]
        curves.append([optimizer_step(training, step).loss for step in range(6)])
        assert {parameter.dtype for parameter in training.parameters.values()} == {torch.float32}
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert curves[0][-1] < curves[0][0]
