"""Gemma 4 on the fused engine: keys and values that blocks lend, inputs of each block's own, and what is refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import finish
from tests.parity.bases import VOCABULARY, on
from tests.parity.models import ALL, ALL_AND_PER_LAYER, FAMILIES, NOTHING, adapted_model, gradients_of, packed, plan
from tests.parity.test_merge import adapted_logits, merged_logits, written
from tests.unit.memory.examples import SHORT, planner_for
from train.config import BatchConfig, Config, EngineConfig, MemoryConfig, OptimConfig
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers
from train.engine.layers import Heads
from train.engine.packed_weights import packed_bytes
from train.engine.stack import Saved
from train.engine.support import unsupported_reason
from train.memory.sizes import model_sizes

WANTED = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
NF4: dict[str, Any] = {"quantization_config": WANTED, "device_map": {"": "cpu"}}
SHAPE: Any = FAMILIES["gemma4"][0]
CONFIG: Any = type("Config", (), {"optim": OptimConfig(), "engine": EngineConfig()})


def changed(**settings: Any) -> Any:
    """The shape with other settings."""
    return T.Gemma4TextConfig(**SHAPE.to_dict() | settings)


def test_dropout_of_recomputed_blocks_is_that_of_kept_ones() -> None:
    """Also of the two layers that read a block's own inputs; another pass's seed draws other masks."""
    adapted, batch = adapted_model(SHAPE, ALL_AND_PER_LAYER, dropout=0.3), packed()
    upstream = torch.randn(15, 64)
    found = []
    for num_kept, seed in ((6, 5), (1, 5), (1, 6)):
        torch.manual_seed(seed)
        FusedDecoder(adapted.get_base_model(), plan(num_kept, 0), NOTHING)(batch).backward(upstream)
        gradients = gradients_of(adapted)
        found.append({name: each for name, each in gradients.items() if "per_layer" in name or "k_proj" in name})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])
        assert (gradient - found[2][name]).norm() > 0.1 * gradient.norm()


def test_what_is_lent_is_given_back() -> None:
    """Two blocks lend; behind a backward pass neither keys and values nor their gradients are kept."""
    adapted = adapted_model(SHAPE, ALL)
    engine = FusedDecoder(adapted.get_base_model(), plan(1, 0), NOTHING)
    heads = [layer.heads for layer in engine.layers if isinstance(layer.heads, Heads)]
    assert [each.lends or each.borrows for each in heads] == [
        "", "full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention",
    ]  # fmt: skip
    batch = packed()
    context = engine.context(batch)
    saved: Saved = []
    with torch.no_grad():
        engine.stack.forward(engine.embed(batch.input_ids[0]), context, saved)
        assert set(context.lent.states) == {"full_attention", "sliding_attention"}
        engine.stack.backward(torch.randn(15, 64), context, saved)
    assert not context.lent.states
    assert not context.lent.gradients


def test_the_plan_knows_each_kind_of_block() -> None:
    """Packed bytes and widths by kind; what is lent; and no graphs where heads are too wide for flash kernels."""
    causal_lm = adapted_model(SHAPE, ALL).get_base_model()
    layers, sizes = decoder_layers(causal_lm), model_sizes(causal_lm, CONFIG, on_gpu=False)
    assert [sorted(kind.numbers) for kind in sizes.kinds] == [[0, 2], [1], [3, 5], [4]]
    for numbers in ([0, 1], [2, 3, 4], range(6)):
        wanted = sum(packed_bytes(linear) for number in numbers for linear in layers[number].linears)
        assert sizes.packed(numbers) == wanted
    assert [kind.sizes.intermediate for kind in sizes.kinds] == [96, 96, 192, 192]
    assert sizes.lent == 2 * (2 * 32) + 2 * (2 * 16)
    for size, has_graphs in ((256, True), (512, False)):
        wide = replace(sizes, head_size=size, kinds=())
        candidates = planner_for(SHORT, BatchConfig(2, 4), sizes=wide)._candidates
        assert any(candidate.uses_graphs for candidate in candidates(True, 0, 0)) == has_graphs


@pytest.mark.parametrize(
    ("settings", "lora", "reason"),
    [
        ({"use_bidirectional_attention": "vision"}, {}, ""),
        ({"use_bidirectional_attention": "all"}, {}, "its tokens see later ones"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
            {"target_modules": ["q_proj"]},
            "its MLPs stand beside a mixture of experts in one block (enable_moe_block)",
        ),
        (
            {},
            {"target_modules": ["q_proj", "per_layer_model_projection"]},
            "model.per_layer_model_projection has an adapter and is no part of a decoder block",
        ),
        (
            {},
            {"trainable_token_indices": {"embed_tokens": [1, 2]}},
            "its embedding is trained, of which each block's own inputs are made",
        ),
    ],
)
def test_what_is_not_run(settings: Any, lora: Any, reason: str) -> None:
    """Each by its name; text of a multimodal base, whose images alone see forward, runs."""
    base = AutoModelForCausalLM.from_config(changed(**settings))
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(**({"target_modules": ALL} | lora)))
    assert unsupported_reason(adapted.get_base_model()) == reason


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_a_merged_model_is_what_was_trained(onto: Any, config: Config, tmp_path: Path) -> None:
    """Trained in NF4 on the fused engine; factors of blocks and unused weights of shared layers pass through."""
    base = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, base, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_config(changed(vocab_size=VOCABULARY))
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.9)
    model.save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.4.self_attn.k_proj.weight"] = torch.ones(32, 64)  # as published checkpoints have it
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    told = on(config, base, "nf4")
    run = finish(
        replace(told, engine=EngineConfig(kind="fused"), memory=MemoryConfig(offload="stream")), tmp_path / "run"
    )
    merged = written(run, onto, tmp_path / "merged")
    wanted = adapted_logits(base, run / "final", **(NF4 if onto == "dequantized" else {}))
    torch.testing.assert_close(merged_logits(merged), wanted, rtol=0, atol=2e-3)
    assert load_file(merged / "model.safetensors")["model.layers.3.layer_scalar"] == pytest.approx(0.9, rel=1e-2)


def test_gradients_with_dropout_are_those_of_the_masks_drawn() -> None:
    """A step along the gradient of the layers that read own inputs changes what is made as much as it says."""
    adapted, batch = adapted_model(SHAPE, ALL_AND_PER_LAYER, dropout=0.3), packed()
    upstream, engine = torch.randn(15, 64), FusedDecoder(adapted.get_base_model(), plan(1, 0), NOTHING)

    def made() -> torch.Tensor:
        torch.manual_seed(5)
        return engine(batch)

    made().backward(upstream)
    gradients = {name: each for name, each in gradients_of(adapted).items() if "per_layer" in name}
    norm = torch.cat([each.flatten() for each in gradients.values()]).norm()
    parameters, ends = dict(adapted.named_parameters()), []
    for step in (1e-3, -2e-3):
        for name, gradient in gradients.items():
            parameters[name].data += step * gradient / norm
        with torch.no_grad():
            ends.append((made().double() * upstream).sum().item())
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(norm.item(), rel=0.01)
