"""Settings and targets that few models have: the fused engine computes them as transformers and PEFT do."""

from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
import transformers as T

from tests.parity.models import (
    ALL,
    DELTA,
    GEMMA4,
    LINEAR,
    MIXED,
    NOTHING,
    SIZES,
    adapted_model,
    alone,
    close,
    gradients_of,
    packed,
    plan,
)
from train.engine.decoder import FusedDecoder
from train.engine.support import unsupported_reason

HYBRID: Any = T.Qwen3_5TextConfig(**SIZES, **DELTA, initializer_range=0.1, layer_types=LINEAR)
FOUR: Any = {"num_hidden_layers": 4}
# the last block borrows from the second; the third stores its keys and values, too, and nobody takes them
SHARED: Any = T.Gemma4TextConfig(
    **SIZES | FOUR, **GEMMA4 | {"layer_types": [*MIXED, "full_attention"]}, num_kv_shared_layers=1
)
CASES: dict[str, tuple[Any, list[str]]] = {
    "adapters in softmax blocks alone": (HYBRID, ["q_proj", "o_proj"]),
    "adapters in linear blocks alone": (HYBRID, ["out_proj"]),
    "keys that nobody borrows": (SHARED, ALL),
    "no adapter in a block that borrows": (SHARED, ["k_proj"]),
    "windows by kind of layer alone": (
        T.SmolLM3Config(**SIZES, pad_token_id=0, use_sliding_window=False, sliding_window=4, layer_types=MIXED),
        ALL,
    ),
    "silu by its other name": (T.LlamaConfig(**SIZES, hidden_act="swish"), ALL),
}


def compare(adapted: Any, num_kept: int) -> dict[str, torch.Tensor]:
    """Asserts that hidden states and gradients are those of transformers; returns these."""
    causal_lm, batch = adapted.get_base_model(), packed()
    assert not unsupported_reason(causal_lm)
    exact = deepcopy(adapted).double()
    wanted = alone(exact.get_base_model(), batch)
    upstream = torch.randn_like(wanted).float()
    wanted.backward(upstream.double())
    expected = gradients_of(exact)
    num_blocks = len(causal_lm.base_model.layers)
    engine = FusedDecoder(causal_lm, plan(min(num_kept, num_blocks), num_cached=0), NOTHING)
    found = engine(batch)
    close(found.detach(), wanted.detach())
    found.backward(upstream)
    for name, gradient in gradients_of(adapted).items():
        close(gradient, expected[name])
    return expected


@pytest.mark.parametrize("num_kept", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_transformers_computes(case: str, num_kept: int) -> None:
    """Hidden states and the adapters' gradients, all blocks kept or recomputed."""
    expected = compare(adapted_model(*CASES[case]), num_kept)
    assert any(gradient.norm() > 0 for gradient in expected.values())


def test_a_trained_row_of_the_padding_token() -> None:
    """transformers' embedding gives it no gradient, whatever samples hold it."""
    base = T.AutoModelForCausalLM.from_config(T.LlamaConfig(**SIZES, pad_token_id=7))
    lora = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 7, 9]})
    adapted: Any = peft.get_peft_model(base, lora).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    causal_lm, batch = adapted.get_base_model(), packed()
    batch.input_ids[0, :6] = torch.tensor([5, 7, 9, 7, 1, 7])
    upstream = torch.randn(15, 64)
    alone(causal_lm, batch).backward(upstream)
    expected = gradients_of(adapted)
    FusedDecoder(causal_lm, plan(1, num_cached=0), NOTHING)(batch).backward(upstream)
    found = gradients_of(adapted)
    (rows,) = (name for name in found if "trainable_tokens_delta" in name)
    close(found[rows], expected[rows])
    assert [bool(row.norm() > 0) for row in found[rows]] == [True, False, True]
