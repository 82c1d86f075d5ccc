"""What a GPU could do at most, against which benchmarks.speed holds what was measured."""

import time
from typing import Any

import torch

from train.memory.gpus import peak_flops
from train.metrics import flops_per_token


def against_limits(row: dict[str, Any], shape: Any, rate: float) -> dict[str, Any]:
    """MFU by datasheet, and the tokens a second of nothing but products at the rate measured here."""
    flops = flops_per_token(linear_weights(shape), shape, row["mean_length"])
    peak = peak_flops(torch.device("cuda"))
    recomputed = 2 * recomputed_weights(shape) * row["recomputed_share"]
    mfu = round(row["tokens_per_second"] * flops / peak, 4) if peak else None
    return {"mfu": mfu, "limit": round(rate / (flops + recomputed))}


def linear_weights(shape: Any) -> int:
    """Weights of all linear layers, the head among them."""
    width, inner = shape.hidden_size, shape.intermediate_size
    key = width // shape.num_attention_heads * shape.num_key_value_heads
    return shape.num_hidden_layers * (2 * width * (width + key) + 3 * width * inner) + width * shape.vocab_size


def recomputed_weights(shape: Any) -> int:
    """Weights that a backward pass must read again where no activations are kept: all but down_proj and the head."""
    kept = shape.num_hidden_layers * shape.hidden_size * shape.intermediate_size + shape.hidden_size * shape.vocab_size
    return linear_weights(shape) - kept


def matmul_rate(seconds: float = 2.0) -> float:
    """FLOP/s that bf16 products of random numbers reach when they follow one another, hot and at the power limit."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(20):
            torch.mm(a, b)
        torch.cuda.synchronize()
        count += 20
    return 2 * 8192**3 * count / (time.perf_counter() - start)
