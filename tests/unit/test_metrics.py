"""The FLOP count behind MFU is the textbook's, and MFU is of all GPUs."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5TextConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import training_of
from train import loop
from train.config import Config
from train.metrics import flops_per_token, mfu, num_matmul_weights, to_host
from train.step import optimizer_step


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


def test_of_a_mixture_the_active_weights_count() -> None:
    """Qwen3-30B-A3B: of 128 experts 8, so about 3.0 G weights a token without the embedding."""
    sizes: dict[str, Any] = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    experts: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    shape = Qwen3MoeConfig(vocab_size=151936, num_hidden_layers=48, tie_word_embeddings=False, **sizes, **experts)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(shape)
    assert num_matmul_weights(model, 8) == pytest.approx(3.03e9, rel=0.01)
    assert num_matmul_weights(model, 128) == pytest.approx(30.2e9, rel=0.01)


def test_of_a_hybrid_softmax_layers_count_by_length() -> None:
    """A quarter of the layers, and so a quarter of what all would cost beside their weights."""
    shape = Qwen3_5TextConfig(num_hidden_layers=8)
    alone, whole = (flops_per_token(10**9, each, 2048) for each in (shape, LlamaConfig(num_hidden_layers=8)))
    assert alone - 4e9 == pytest.approx((whole - 4e9) / 4)


def test_read_keeps_double_precision() -> None:
    """Token counts beyond 2^24 survive."""
    assert to_host(torch.tensor(2.0**30 + 1, dtype=torch.float64), torch.tensor(0.5)) == [2.0**30 + 1, 0.5]


def test_mfu_is_the_share_of_all_gpus() -> None:
    """990 TFLOP in 2 s on four GPUs of 247.5 TFLOP/s are one half."""
    assert mfu(990e12, 2.0, 247.5e12, 4) == pytest.approx(0.5)


def test_the_mfu_of_a_run_is_divided_by_its_processes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's tokens are those of all processes, and so are its GPUs; no MFU where the peak is unknown."""
    training = training_of(config, Accelerator(cpu=True))
    result = optimizer_step(training, 0)
    num_weights = num_matmul_weights(training.model)
    stopwatch: Any = SimpleNamespace(lap=lambda: 0.5, peak_gib=dict)
    assert "perf/mfu" not in loop._row(training, result, stopwatch, num_weights)
    shape = training.model.adapted.get_base_model().config
    flops = flops_per_token(num_weights, shape, result.num_tokens / len(result.sample_ids)) * result.num_tokens
    monkeypatch.setattr(loop, "peak_flops", lambda device: flops)  # so that 0.5 s are an MFU of 2 on one GPU
    for num_processes in (1, 4):
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=num_processes)
        row = loop._row(replace(training, accelerator=accelerator), result, stopwatch, num_weights)
        assert row["perf/mfu"] == pytest.approx(2 / num_processes, abs=1e-4)
