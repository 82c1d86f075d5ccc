"""Which models the engine executes."""

from typing import Any

import bitsandbytes as bnb

from train.engine.block import Block

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def unsupported_reason(causal_lm: Any) -> str:
    """Why the blocks of `causal_lm` (with PEFT's adapters in it) cannot run fused; nothing where they can."""
    name, shape = type(causal_lm).__name__, causal_lm.config
    if name not in FAMILIES:
        return f"{name} is not one of {', '.join(FAMILIES)}"
    if shape.hidden_act != "silu":
        return f"its MLP computes {shape.hidden_act}, not silu"
    if getattr(shape, "attention_dropout", 0.0):
        return "its attention has dropout"
    layers = set(causal_lm.base_model.layers.modules())
    for name, module in causal_lm.named_modules():
        if hasattr(module, "lora_A") and module not in layers:
            return f"{name} has an adapter and is no part of a decoder block"
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "int8 layers round their inputs, which only bitsandbytes does"
    if len(set(getattr(shape, "layer_types", None) or [""])) > 1:
        return "its blocks do not all have the same attention"
    if (
        len({tuple(group.shape for group in block.groups) for block in _blocks(causal_lm)}) > 1
    ):  # they share one place for weights
        return "its blocks do not all have the same adapters"
    return ""


def _blocks(causal_lm: Any) -> list[Block]:
    return [Block(layer, number) for number, layer in enumerate(causal_lm.base_model.layers)]
