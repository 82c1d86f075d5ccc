"""Which models the engine executes, and how transformers' parts are read for it."""

from typing import Any

import bitsandbytes as bnb
import torch

from train.engine.block import Block

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")


def reason_against(causal_lm: Any) -> str:
    """Why the blocks of `causal_lm` (with PEFT's adapters in it) cannot run fused; nothing where they can."""
    name = type(causal_lm).__name__
    if name not in FAMILIES:
        return f"{name} is not of the Llama family"
    shape = causal_lm.config
    if shape.hidden_act != "silu":
        return f"its MLP uses {shape.hidden_act}, not silu"
    if getattr(shape, "attention_dropout", 0.0):
        return "it has attention dropout"
    outside = [
        name
        for name, module in causal_lm.named_modules()
        if hasattr(module, "lora_A") and ".layers." not in f".{name}"
    ]
    if outside:
        return f"{outside[0]} has an adapter and is no linear layer of a decoder block"
    for module in causal_lm.base_model.layers.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "int8 layers compute with rounded activations, which only bitsandbytes does"
    return ""


def read_blocks(causal_lm: Any) -> list[Block]:
    """The decoder's blocks, each reading its layer's weights and adapters where they are."""
    return [Block(layer, number) for number, layer in enumerate(causal_lm.base_model.layers)]


def rotary(causal_lm: Any, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D] of `positions` [T] in the type of `hidden`."""
    cos, sin = causal_lm.base_model.rotary_emb(hidden[None], positions[None])
    return cos[0].contiguous(), sin[0].contiguous()
