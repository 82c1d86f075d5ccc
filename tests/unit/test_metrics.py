"""The FLOP count behind MFU is the textbook's."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.metrics import flops_per_token, num_matmul_weights, to_host


def test_llama_8b_costs_what_the_literature_says() -> None:
    """Llama-3.1-8B: 6.98 G weights in its layers and 0.525 G in the head, times 4, plus 3.5 x 0.54 GFLOP at 2,048."""
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        weights = num_matmul_weights(LlamaForCausalLM(shape))
    assert flops_per_token(weights, shape, 0) == pytest.approx(4 * (6.979e9 + 0.525e9), rel=1e-3)
    assert flops_per_token(weights, shape, 2048) - flops_per_token(weights, shape, 0) == pytest.approx(1.88e9, rel=1e-2)


def test_read_keeps_double_precision() -> None:
    """Token counts beyond 2^24 survive."""
    assert to_host(torch.tensor(2.0**30 + 1, dtype=torch.float64), torch.tensor(0.5)) == [2.0**30 + 1, 0.5]
