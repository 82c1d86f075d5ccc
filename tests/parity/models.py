"""Tiny models of every family with adapters, their micro-batches and their gradients."""

from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from train.collate import MicroBatch, collate_packed
from train.engine.host_stream import HostBlocks
from train.engine.plan import Plan

NOTHING = HostBlocks([], pin=False)
LENGTHS = (5, 1, 9)  # one token alone, odd lengths
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**SIZES), ALL),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), ALL),
    "some layers adapted": (LlamaConfig(**SIZES), ["q_proj", "v_proj", "down_proj"]),
    "one layer adapted": (LlamaConfig(**SIZES), ["up_proj"]),
    "mistral with a window": (MistralConfig(**SIZES, sliding_window=4), ALL),
    "qwen2": (Qwen2Config(**SIZES), ALL),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), ALL),
    "qwen2 with a window": (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0), ALL),
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the rounding of fp32 sums."""
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def packed() -> MicroBatch:
    rows = [{"input_ids": torch.randint(100, (n,)).tolist(), "trained": [True] * n} for n in LENGTHS]
    return collate_packed(rows)


def adapted_model(shape: PretrainedConfig, targets: list[str], dropout: float = 0.0) -> Any:
    """A model of the shape with norms that matter and adapters that do something."""
    base = AutoModelForCausalLM.from_config(shape)
    for name, parameter in base.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(float("norm" in name), 0.2)
    lora = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=targets)
    adapted: Any = peft.get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return adapted.train()


def gradients_of(adapted: Any) -> dict[str, torch.Tensor]:
    """Of the adapters, by name; they are zeros afterwards."""
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.grad.zero_()
    return found


def plan(num_kept: int, num_cached: int, tile: int = 0) -> Plan:
    return Plan(True, True, 64, num_blocks=3, num_kept=num_kept, num_cached=num_cached, mlp_tile=tile)
