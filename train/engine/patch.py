"""Which models the engine executes, and how it takes the place of their decoder."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch

from train.collate import MicroBatch
from train.config import Config
from train.engine.attention import attend_packed
from train.engine.block import Block, Pass
from train.engine.copies import copies_for
from train.engine.embedding import HostEmbedding
from train.engine.graphs import Graphs, pad
from train.engine.hidden_store import DeviceInputs, HostInputs
from train.engine.operations import mixed
from train.engine.packing import HostBlocks, linear_layers, packed_bytes
from train.engine.stack import Stack
from train.engine.weight_store import WeightStore
from train.loss import CHUNK_BYTES
from train.optim import state_bytes
from train.plan import ModelSizes, Plan, padded

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

    def __init__(self, causal_lm: Any, plan: Plan, host: HostBlocks) -> None:
        decoder = causal_lm.base_model
        self.decoder = decoder
        blocks = _blocks(causal_lm)
        norm: torch.Tensor = decoder.norm.weight
        copies = partial(copies_for, norm.device)
        store = WeightStore(blocks, plan.num_cached, norm, host, copies)
        inputs = DeviceInputs()
        if plan.offloads_inputs:
            num_tokens = padded(plan.tokens_per_pass)
            inputs = HostInputs(plan.num_blocks - plan.num_kept, num_tokens, norm, copies(), copies())
        self.stack = Stack(blocks, decoder.norm, store, plan.num_kept, inputs)
        # Qwen's attention knows its window, Mistral's reads the configuration, Llama has none whatever that says
        is_mistral = type(causal_lm).__name__ == "MistralForCausalLM"
        window = causal_lm.config.sliding_window if is_mistral else None
        self.sliding_window: int | None = getattr(decoder.layers[0].self_attn, "sliding_window", window)
        self.dropout = max(block.dropout for block in blocks)
        self.mlp_tile = plan.mlp_tile
        # no method of this object, which would keep a replaced engine's graphs alive
        self.attend_for = partial(attend_packed, sliding_window=self.sliding_window, scale=blocks[0].scaling)
        self.graphs: Graphs | None = None
        if plan.uses_graphs:
            memory = plan.graph_bytes, plan.gap_bytes, plan.launch_bytes
            self.graphs = Graphs(self.stack, self.attend_for, plan.tokens_per_pass, *memory)

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
        rotary = cos[0].contiguous(), sin[0].contiguous()
        shared = Pass(*rotary, self.attend_for(batch), dropout, seed, self.mlp_tile)
        return recorded(hidden, shared, batch) if recorded is not None else self.stack(hidden, shared)

    def release(self) -> None:
        """Lets go of graphs and dequantised weights, which are made again when they are asked for."""
        if self.stack.store.like.is_cuda:
            torch.cuda.synchronize()  # copies of a pass that raised may still be under way
        if self.graphs is not None:
            self.graphs.release()
        self.stack.store.release()
        if self.stack.store.like.is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While it is entered, transformers can run the decoder: its memory is free, streamed weights come by layer."""
        self.release()
        with self.stack.store.lent(self.decoder.layers):
            yield


def model_sizes(causal_lm: Any, config: Config, on_gpu: bool) -> ModelSizes:
    """What train.plan counts with, of a model that need have no weights; raises AttributeError for other families."""
    block = Block(causal_lm.base_model.layers[0], 0)
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    trained = [p for p in causal_lm.parameters() if p.requires_grad]
    linears = {id(layer.weight) for one in causal_lm.base_model.layers for layer in linear_layers(one)}
    others = {id(embedding), id(head), *linears, *map(id, trained)}
    small = sum(p.numel() * p.element_size() for p in causal_lm.parameters() if id(p) not in others)
    element = head.element_size()
    state = state_bytes(trained, config.optim)
    is_paged = config.optim.name.startswith("paged")
    is_tied = head is embedding
    return ModelSizes(
        num_blocks=len(causal_lm.base_model.layers),
        hidden=block.qkv.num_inputs,
        heads=block.qkv.num_outputs,
        query=block.o.num_inputs,
        inner=block.down.num_inputs,
        extra=max(group.num_extra for group in block.groups),
        normed_heads=block.qkv.rows[1].stop if block.head_norms else 0,
        has_dropout=block.dropout > 0,
        element_bytes=element,
        matrix_bytes=element * sum(math.prod(group.shape) for group in block.groups),
        packed_bytes=sum(packed_bytes(layer) for layer in linear_layers(causal_lm.base_model.layers[0])),
        small_bytes=small,
        embedding_bytes=0 if is_tied else embedding.numel() * element,
        embedding_on_host=on_gpu and not is_tied,
        head_bytes=head.numel() * element,
        chunk_bytes=CHUNK_BYTES,
        vocabulary=head.shape[0],
        adapter_bytes=8 * sum(p.numel() for p in trained) + (0 if is_paged else state),
        paged_bytes=state if is_paged else 0,
    )


def offload_embedding(causal_lm: Any) -> None:
    """Moves the input embedding to host memory, where the head does not share it."""
    embedding = causal_lm.get_input_embeddings()
    is_tied = embedding.weight is causal_lm.get_output_embeddings().weight
    if embedding.weight.is_cuda and not is_tied:
        causal_lm.set_input_embeddings(HostEmbedding(embedding.weight))
