"""Why the engine cannot execute a model."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch

from train.engine.block import Block
from train.engine.delta_net import KIND
from train.engine.families import COMPUTED, FAMILIES, Family, decoder_layers
from train.engine.fp8 import MULTIPLE
from train.engine.layers import CausalLM, DecoderLayer, Heads, Vocabulary

KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}
# what configurations call the dropouts of their own that act in a decoder
DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop", "embedding_dropout", "hidden_dropout")


def unsupported_reason(causal_lm: CausalLM) -> str:
    """Why the engine cannot execute `causal_lm` (with PEFT's adapters in it); empty where it can."""
    name, config = type(causal_lm).__name__, causal_lm.config
    if name not in FAMILIES:
        return f"{name} is not one of {', '.join(FAMILIES)}"
    if reason := _unknown_setting(config, FAMILIES[name]):
        return reason
    layers = decoder_layers(causal_lm)
    if layers[0].activation not in COMPUTED:
        return f"its MLP computes {layers[0].activation}, not one of {', '.join(COMPUTED)}"
    if reason := _unknown_weight(layers):
        return reason
    if reason := _unknown_adapter(causal_lm, layers):
        return reason
    return _unlike_blocks(layers)


def undivided_reason(causal_lm: CausalLM, count: int) -> str:
    """Why `count` processes cannot share a micro-batch's tokens (split_attention.py); empty where they can."""
    for layer in decoder_layers(causal_lm):
        if not isinstance(layer.heads, Heads):
            return "its linear attention carries a state from token to token"
        query, key = layer.heads.num_query, layer.heads.num_key_value
        if query % count or (key % count and count % key):
            return f"{count} processes cannot have equal shares of its {query} query and {key} key heads"
    return ""


def not_in_fp8(causal_lm: CausalLM) -> str:
    """Why the products of a model that the engine runs are not offered in fp8; empty where they are."""
    for layer in decoder_layers(causal_lm):
        if layer.router is not None:
            return "products of experts are grouped, and those are not offered in fp8"
        if layer.output_scale is not None:
            return "blocks whose outputs have a factor (Gemma 4) were not tried in fp8"
        for linear in layer.linears:
            widths = linear.out_features, linear.in_features
            if not isinstance(linear.weight, bnb.nn.Params4bit):
                return "a layer of its blocks is not in NF4"
            if any(width % MULTIPLE for width in widths):
                return f"fp8 products need widths that are multiples of {MULTIPLE}, not {widths[0]} x {widths[1]}"
    return ""


def _unlike_blocks(layers: Sequence[DecoderLayer]) -> str:
    """Why blocks cannot share what they share; empty where they can."""
    scalings = {layer.heads.scaling for layer in layers if isinstance(layer.heads, Heads)}
    if not scalings:
        return "none of its blocks has softmax attention"
    if len(scalings) > 1:
        return "its blocks do not all scale attention's scores alike"
    kinds: dict[Any, set[Any]] = {}  # blocks of a kind share memory for weights
    for number, layer in enumerate(layers):
        kinds.setdefault(layer.kind, set()).add(Block(layer, number).places)
    return "its blocks do not all have the same adapters" if any(len(each) > 1 for each in kinds.values()) else ""


def _unknown_adapter(causal_lm: CausalLM, layers: Sequence[DecoderLayer]) -> str:
    """Which adapter, or rounding of its input, the engine does not compute; empty where there is none."""
    in_layers = {module for layer in layers for module in layer.module.modules()}
    for name, module in causal_lm.named_modules():
        if hasattr(module, "lora_A") and module not in in_layers:
            return f"{name} has an adapter and is no part of a decoder block"
        if isinstance(module, bnb.nn.Linear8bitLt):
            return "int8 layers round their inputs, which only bitsandbytes does"
    if len({layer.router is None for layer in layers}) > 1:
        return "some of its layers are dense and some a mixture of experts"
    if layers[0].per_layer and Vocabulary.of(causal_lm.get_input_embeddings()).is_trained:
        return "its embedding is trained, of which each block's own inputs are made"
    if any(hasattr(layer.router, "lora_A") for layer in layers):
        return "its routers have adapters"
    return ""


def _unknown_setting(config: Any, family: Family) -> str:
    """What config.json asks for that the engine does not compute; empty where there is no such."""
    if rates := {name: rate for name in DROPOUTS if (rate := getattr(config, name, None))}:
        return "it has dropout of its own: " + ", ".join(f"{name} {rate}" for name, rate in rates.items())
    if getattr(config, "router_jitter_noise", 0):
        return f"its router adds noise in training (router_jitter_noise {config.router_jitter_noise})"
    kinds = KINDS_OF_LAYERS | ({KIND} if family.linear else set())
    if unknown := set(getattr(config, "layer_types", None) or []) - kinds:
        return f"it has layers of {', '.join(sorted(unknown))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps its scores, for which the flash kernels have no place"
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # text sees no later token
        return "its tokens see later ones"
    if getattr(config, "enable_moe_block", False):
        return "its MLPs stand beside a mixture of experts in one block (enable_moe_block)"
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
