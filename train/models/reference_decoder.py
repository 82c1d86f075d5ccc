"""transformers' decoder with PEFT's layers, in the place that FusedDecoder has on the engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from train.collate import MicroBatch
from train.engine.attention import announce
from train.engine.layers import CausalLM, as_causal_lm
from train.models.pass_graphs import PassGraphs
from train.models.rotary import SampleRotary
from train.models.whole import WholeModel, computing_in


class ReferenceDecoder:
    """From a micro-batch to what the head reads; runs any model, eagerly or, after a trial, by CUDA graphs."""

    def __init__(self, adapted: Any, compute: torch.dtype) -> None:
        self.base: Any = adapted.get_base_model()
        self.compute = compute
        self.is_whole = isinstance(adapted, WholeModel)
        self.recomputes = False  # all blocks
        self.rotaries = [module for module in adapted.modules() if isinstance(module, SampleRotary)]
        self.graphs: PassGraphs | None = None

    @property
    def causal_lm(self) -> CausalLM:
        """transformers' model."""
        return as_causal_lm(self.base)

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [B * T, H] or, by a graph, more rows, which are padding."""
        if self.graphs and torch.is_grad_enabled() and batch.cu_seqlens is not None:
            return self.graphs(batch)
        return self.eager(batch)

    def eager(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [B * T, H] by transformers and PEFT.

        Packed samples are isolated at cu_seqlens by engine.attention; where that has no kernel, by transformers, where
        position_ids start again (masking_utils.find_packed_sequence_indices). isolation.py tests that they are.
        """
        self.tell_lengths(batch.lengths)
        announce(batch)
        with self.computing():
            outputs = self.causal_lm.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                cu_seq_lens_q=batch.cu_seqlens,
                max_length_q=batch.max_length,
            )
        return outputs.last_hidden_state.flatten(0, 1)

    def computing(self) -> AbstractContextManager[Any]:
        """The compute type where fp32 weights are trained whole; a frozen base has it itself."""
        return computing_in(self.compute, self.base.device) if self.is_whole else nullcontext()

    def tell_lengths(self, lengths: Sequence[int]) -> None:
        """Says how long the samples are, to rotary embeddings that depend on it."""
        for rotary in self.rotaries:
            rotary.lengths = lengths

    def recompute(self, wanted: bool) -> None:
        """Blocks recompute their activations from now on, all or none."""
        self.graphs = None
        if wanted:
            # use_reentrant=False: the frozen embedding's output needs no gradient
            self.base.gradient_checkpointing_enable({"use_reentrant": False})
        elif self.recomputes:
            self.base.gradient_checkpointing_disable()
        self.recomputes = wanted

    def release(self) -> None:
        """Frees the memory of graphs; they are captured anew."""
        if self.graphs is not None:
            self.graphs.release()
