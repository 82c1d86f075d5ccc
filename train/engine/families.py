"""The families of models that the engine executes, one row each, and why it executes no other."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import bitsandbytes as bnb
import torch

from train.engine.block import Block
from train.engine.layers import CausalLM, DecoderLayer, Projection


class Window(Enum):
    """Where a family keeps its attention's sliding window."""

    NONE = auto()  # it has none, whatever config.json says
    ATTENTION = auto()  # `sliding_window` of each layer's attention
    CONFIG = auto()  # `sliding_window` of config.json


@dataclass(frozen=True)
class Family:
    """One architecture of transformers, and the names of its modules; the defaults are Llama's.

    Names of projections that are not in config.LLAMA_LINEAR_LAYERS need a default of their own for
    --lora.target_modules.
    """

    architecture: str
    window: Window
    qk_norms: tuple[str, ...] = ()  # of the attention: norms of query and key heads
    layers: str = "layers"  # of the decoder
    attention: str = "self_attn"  # of a layer
    mlp: str = "mlp"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")  # of the attention
    o: str = "o_proj"
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")  # of the MLP
    down: str = "down_proj"

    def decoder_layers(self, causal_lm: CausalLM) -> list[DecoderLayer]:
        """The layers of a model of this family."""
        return [self._decoder_layer(module) for module in getattr(causal_lm.base_model, self.layers)]

    def sliding_window(self, causal_lm: CausalLM) -> int | None:
        """Tokens that attention sees, its own among them; None: all before it."""
        if self.window is Window.ATTENTION:
            first = getattr(causal_lm.base_model, self.layers)[0]
            return getattr(first, self.attention).sliding_window
        return getattr(causal_lm.config, "sliding_window", None) if self.window is Window.CONFIG else None

    def _decoder_layer(self, module: torch.nn.Module) -> DecoderLayer:
        attention, mlp = getattr(module, self.attention), getattr(module, self.mlp)
        before_attention, before_mlp = (getattr(module, name) for name in self.norms)
        return DecoderLayer(
            module=module,
            qkv=[Projection.of(getattr(attention, name)) for name in self.qkv],
            o=Projection.of(getattr(attention, self.o)),
            gate_up=[Projection.of(getattr(mlp, name)) for name in self.gate_up],
            down=Projection.of(getattr(mlp, self.down)),
            norms=(before_attention, before_mlp),
            qk_norms=[getattr(attention, name) for name in self.qk_norms],
            head_dim=attention.head_dim,
            scaling=attention.scaling,
        )


FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", Window.NONE),
        Family("MistralForCausalLM", Window.CONFIG),
        Family("Qwen2ForCausalLM", Window.ATTENTION),
        Family("Qwen3ForCausalLM", Window.ATTENTION, qk_norms=("q_norm", "k_norm")),
    )
}


def family_of(causal_lm: CausalLM) -> Family:
    """The family of a model that the engine executes; KeyError for another."""
    return FAMILIES[type(causal_lm).__name__]


def decoder_layers(causal_lm: CausalLM) -> list[DecoderLayer]:
    """The layers of a model that the engine executes; KeyError for another."""
    return family_of(causal_lm).decoder_layers(causal_lm)


def unsupported_reason(causal_lm: CausalLM) -> str:
    """Why the engine cannot execute `causal_lm` (with PEFT's adapters in it); empty where it can."""
    name, shape = type(causal_lm).__name__, causal_lm.config
    if name not in FAMILIES:
        return f"{name} is not one of {', '.join(FAMILIES)}"
    if shape.hidden_act != "silu":
        return f"its MLP computes {shape.hidden_act}, not silu"
    if getattr(shape, "attention_dropout", 0.0):
        return "its attention has dropout"
    layers = decoder_layers(causal_lm)
    if reason := _unknown_weight(layers):
        return reason
    in_layers = {module for layer in layers for module in layer.module.modules()}
    for name, module in causal_lm.named_modules():
        if hasattr(module, "lora_A") and module not in in_layers:
            return f"{name} has an adapter and is no part of a decoder block"
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "int8 layers round their inputs, which only bitsandbytes does"
    if len(set(getattr(shape, "layer_types", None) or [""])) > 1:
        return "its blocks do not all have the same attention"
    blocks = [Block(layer, number) for number, layer in enumerate(layers)]
    if len({tuple(group.shape for group in block.groups) for block in blocks}) > 1:  # they share memory for weights
        return "its blocks do not all have the same adapters"
    return ""


def _unknown_weight(layers: Sequence[DecoderLayer]) -> str:
    """Why the engine cannot read the weights of a layer; empty where it can."""
    for layer in layers:
        for linear in layer.linears:
            weight, kind = linear.weight, type(linear.weight).__name__
            if isinstance(weight, bnb.nn.Params4bit):
                if weight.quant_storage != torch.uint8:
                    return f"its packed weights are stored as {weight.quant_storage}, not as bytes"
            elif not isinstance(weight, bnb.nn.Int8Params) and (
                type(weight) is not torch.nn.Parameter or not weight.is_floating_point()
            ):
                return f"its weights are {kind} of {weight.dtype}, which it does not read"
    return ""
