"""The engine in the place of a model's decoder: from token ids to what the head reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from train.collate import MicroBatch
from train.engine.attention import attentions
from train.engine.block import Block
from train.engine.context import ForwardContext
from train.engine.copies import copies_for
from train.engine.delta_rule import PackedSamples
from train.engine.embedding import RowsInPlace
from train.engine.families import family_of
from train.engine.graph_shapes import pad
from train.engine.graphs import Graphs
from train.engine.hidden_store import DeviceInputs, HostInputs
from train.engine.host_stream import HostBlocks
from train.engine.layers import CausalLM, DeltaHeads, Heads, Vocabulary
from train.engine.operations import mixed
from train.engine.packed_source import packed_source
from train.engine.plan import Plan, padded, part_tokens
from train.engine.split_attention import SplitAttention
from train.engine.stack import Stack
from train.engine.weight_store import WeightStore


class FusedDecoder:
    """The decoder of `causal_lm` (with PEFT's adapters in it), run block by block by our own code."""

    def __init__(self, causal_lm: CausalLM, plan: Plan, *away: HostBlocks) -> None:
        """Allocates slots and host buffers; matrices and graphs follow on demand. Blocks in `away` are streamed."""
        family = family_of(causal_lm)
        self.decoder = causal_lm.base_model
        self.layers, norm = family.decoder_layers(causal_lm), family.norm_of(self.decoder.norm)
        blocks = [Block(layer, number, plan.products) for number, layer in enumerate(self.layers)]
        copies = partial(copies_for, norm.weight.device)
        self.source = packed_source(self.layers, away, norm.weight.device, copies)
        store = WeightStore(blocks, plan.num_cached, norm.weight, self.source)
        inputs = DeviceInputs()
        if plan.offloads_inputs:
            num_tokens = padded(part_tokens(plan.micro_batch_tokens, plan.num_parts))
            inputs = HostInputs(plan.num_blocks - plan.num_kept, num_tokens, norm.weight, copies(), copies())
        embedding = Vocabulary.of(causal_lm.get_input_embeddings())
        self.embed_tokens = RowsInPlace(embedding) if embedding.rows else self.decoder.embed_tokens
        self.embedding_scale = family.embedding_scale(causal_lm)
        self.stack = Stack(blocks, norm, store, plan.num_kept, inputs, embedding.is_trained)
        self.dropout = max(block.dropout for block in blocks)
        self.mlp_tile = plan.mlp_tile
        # no method of this object: it would keep a replaced engine's graphs alive
        heads = [layer.heads for layer in self.layers if isinstance(layer.heads, Heads)]
        scale = next((each.scaling for each in heads), 1.0)
        self.attend_for = partial(attentions, windows={each.window for each in heads}, scale=scale)
        # those of linear attention, where there is some; they are of one size
        self.linear_heads = next((each.heads for each in self.layers if isinstance(each.heads, DeltaHeads)), None)
        self.position_tables = family.position_tables(causal_lm, self.layers)
        self.graphs: Graphs | None = None
        if plan.uses_graphs:
            memory = plan.graph_bytes, plan.fragmentation_bytes, plan.eager_bytes
            self.graphs = Graphs(self.stack, self.attend_for, plan.micro_batch_tokens, *memory)
            self.graphs.longest_sample = plan.longest_sample

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """What the head reads, [T or more, H], of a packed micro-batch; with dropout while the model trains.

        Rows beyond T are padding of a CUDA graph's shape.
        """
        graphs = self.graphs if torch.is_grad_enabled() else None
        if graphs is not None:
            batch = pad(batch)
        hidden = self.embed(batch.input_ids[0])
        context = self.context(batch)
        return graphs(hidden, context, batch) if graphs is not None else self.stack(hidden, context)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [T] -> what the first block reads [T, H]."""
        embedded = self.embed_tokens(input_ids)
        return embedded if self.embedding_scale == 1.0 else embedded * self.embedding_scale

    @torch.no_grad()
    def inputs_per_layer(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [T] -> what each block has of its own to read of a token [T, blocks P], by transformers' functions."""
        if self.stack.blocks[0].per_layer is None:
            return self.stack.store.like.new_empty(len(input_ids), 0)
        decoder: Any = self.decoder
        embedded = self.embed(input_ids)
        of_tokens = decoder.get_per_layer_inputs(input_ids, embedded)
        return decoder.project_per_layer_inputs(embedded, of_tokens).flatten(1)

    def context(self, batch: MicroBatch) -> ForwardContext:
        """What all blocks share in a forward pass over a packed micro-batch."""
        like = self.stack.store.like
        positions, attend = self.position_tables(like, batch.position_ids), self.attend_for(batch)
        if batch.part.count > 1:  # tables are of the whole: some depend on a sample's length
            values = positions.values[batch.part.rows(batch.position_ids.shape[1])].clone()
            positions = replace(positions, values=values)
            attend = {window: SplitAttention(each, batch.part) for window, each in attend.items()}
        dropout = self.dropout if self.decoder.training else 0.0
        # the seed of this forward pass, which seeds.seed_forward has set
        seed = torch.full((), mixed(torch.initial_seed()), device=like.device)
        samples = PackedSamples(batch) if self.linear_heads else None
        per_layer = self.inputs_per_layer(batch.input_ids[0])
        return ForwardContext(positions, attend, dropout, seed, self.mlp_tile, samples, per_layer)

    def release(self) -> None:
        """Frees graphs and dequantised weights; they are made again when they are needed."""
        is_cuda = self.stack.store.like.is_cuda
        if is_cuda:
            torch.cuda.synchronize()  # copies of a pass that raised may still be under way
        if self.graphs is not None:
            self.graphs.release()
        self.stack.store.release()
        if is_cuda:
            torch.cuda.empty_cache()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While entered, transformers can run the decoder: memory is released, streamed weights come layer by layer."""
        self.release()
        with self.source.lent():
            yield
