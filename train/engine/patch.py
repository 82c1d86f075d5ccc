"""Which models the engine executes, and how it takes the place of their decoder."""

import math
from typing import Any

import bitsandbytes as bnb
import torch

from train.collate import MicroBatch
from train.engine.attention import Attend, attend_packed, has_flash
from train.engine.block import Block, Pass
from train.engine.embedding import HostEmbedding
from train.engine.graphs import Graphs, pad
from train.engine.operations import mixed
from train.engine.stack import Stack
from train.engine.weight_store import WeightStore
from train.plan import GRAPH_TOKENS, BlockSizes, Plan

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def reason_against(causal_lm: Any) -> str:
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


class Engine:
    """The decoder of `causal_lm` (with PEFT's adapters in it), run block by block by our own code."""

    def __init__(self, causal_lm: Any, plan: Plan) -> None:
        decoder = causal_lm.base_model
        self.decoder = decoder
        blocks = _blocks(causal_lm)
        norm: torch.Tensor = decoder.norm.weight
        store = WeightStore(blocks, plan.num_cached, norm.dtype, norm.device)
        self.stack = Stack(blocks, decoder.norm, store, plan.num_kept)
        # Qwen's attention knows its window, Mistral's reads the configuration, Llama has none whatever that says
        is_mistral = type(causal_lm).__name__ == "MistralForCausalLM"
        window = causal_lm.config.sliding_window if is_mistral else None
        self.sliding_window: int | None = getattr(decoder.layers[0].self_attn, "sliding_window", window)
        self.dropout = max(block.dropout for block in blocks)
        self.graphs: Graphs | None = None
        # a run that is resumed launches its first pass where the other replays: not for those who want the same bits
        is_free = not torch.are_deterministic_algorithms_enabled()
        if is_free and has_flash(norm.dtype, norm.device) and plan.tokens_per_pass <= GRAPH_TOKENS:
            self.graphs = Graphs(self.stack, self._attend_for, plan.tokens_per_pass)

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """What the head reads, [T or more, H], of a packed micro-batch; dropout while the model trains."""
        recorded = self.graphs if torch.is_grad_enabled() else None
        if recorded is not None:
            batch = pad(batch)
        hidden = self.decoder.embed_tokens(batch.input_ids[0])  # [T, H]
        cos, sin = self.decoder.rotary_emb(hidden[None], batch.position_ids)  # [1, T, D]
        dropout = self.dropout if self.decoder.training else 0.0
        # the seed of this forward pass, which runtime.seed_forward has set
        seed = torch.full((), mixed(torch.initial_seed()), device=hidden.device)
        shared = Pass(cos[0].contiguous(), sin[0].contiguous(), self._attend_for(batch), dropout, seed)
        return recorded(hidden, shared, batch) if recorded is not None else self.stack(hidden, shared)

    def _attend_for(self, batch: MicroBatch) -> Attend:
        return attend_packed(batch, self.sliding_window, self.stack.blocks[0].scaling)


def block_sizes(causal_lm: Any) -> BlockSizes:
    """What train.plan counts with."""
    block = Block(causal_lm.base_model.layers[0], 0)
    element_bytes = causal_lm.get_output_embeddings().weight.element_size()
    return BlockSizes(
        num_blocks=len(causal_lm.base_model.layers),
        hidden=block.qkv.num_inputs,
        heads=block.qkv.num_outputs,
        query=block.o.num_inputs,
        inner=block.down.num_inputs,
        extra=max(group.num_extra for group in block.groups),
        element_bytes=element_bytes,
        matrix_bytes=element_bytes * sum(math.prod(group.shape) for group in block.groups),
    )


def offload_embedding(causal_lm: Any) -> None:
    """Moves the input embedding to host memory, where the head does not share it."""
    embedding = causal_lm.get_input_embeddings()
    is_tied = embedding.weight is causal_lm.get_output_embeddings().weight
    if embedding.weight.is_cuda and not is_tied:
        causal_lm.set_input_embeddings(HostEmbedding(embedding.weight))
