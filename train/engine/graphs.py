"""Small passes as CUDA graphs: launching 2,500 kernels takes the host longer than a GPU needs to run them.

Llama-3.1-8B, 1,340 tokens: 155 ms by launches, 75 ms as a graph (H200; docs/LOG.md). A graph holds one shape, so
passes are padded to a multiple of STEP tokens, by a last sample of its own that nobody learns from.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from train.collate import MicroBatch
from train.engine.block import Pass
from train.engine.stack import Kept, Stack

STEP = 128
MOST_TOKENS = 4096  # beyond it the GPU is slower than the host
MOST_GRAPHS = 16  # about 10 MB each

AttendFor = Callable[[MicroBatch], Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]]


def pad(batch: MicroBatch) -> MicroBatch:
    """The packed micro-batch with STEP's multiple of tokens and eight's multiple of borders, and one of two lengths.

    What is added predicts nothing; samples of no tokens stand at its end.
    """
    borders = batch.cu_seqlens
    assert borders is not None
    num_tokens = batch.input_ids.shape[1]
    width = -(-num_tokens // STEP) * STEP
    num_borders = -(-(len(borders) + 1) // 8) * 8
    longest = max(batch.max_length, width - num_tokens)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, width - num_tokens)),
        position_ids=F.pad(batch.position_ids, (0, width - num_tokens)),
        cu_seqlens=F.pad(borders, (0, num_borders - len(borders)), value=width),
        even_length=0,
        max_length=min(width, -(-longest // 512) * 512),
    )


@dataclass
class _Graph:
    """One shape's forward and backward, and the places that they read and write."""

    hidden: torch.Tensor
    shared: Pass
    borders: torch.Tensor
    out: torch.Tensor
    grad_out: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """The stack's training passes, recorded at a shape's first sight and replayed from then on."""

    def __init__(self, stack: Stack, attend_for: AttendFor) -> None:
        self.stack = stack
        self.attend_for = attend_for
        self.graphs: dict[tuple[int, int, int], _Graph] = {}
        self.pool: Any = None

    def __call__(self, hidden: torch.Tensor, shared: Pass, batch: MicroBatch) -> torch.Tensor:
        """As Stack, for a batch that `pad` has padded."""
        assert batch.cu_seqlens is not None
        key = (hidden.shape[0], len(batch.cu_seqlens), batch.max_length)
        if self.pool is None:  # the very first pass compiles kernels and makes the libraries' handles
            self.pool = torch.cuda.graph_pool_handle()
            return self.stack(hidden, shared)
        if key not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                return self.stack(hidden, shared)
            self.graphs[key] = self._record(hidden, shared, batch)
        graph = self.graphs[key]
        pairs = ((graph.hidden, hidden), (graph.shared.cos, shared.cos), (graph.shared.sin, shared.sin))
        for place, value in (*pairs, (graph.shared.seed, shared.seed), (graph.borders, batch.cu_seqlens)):
            place.copy_(value)
        self.stack.store.forget()
        return _Replay.apply(graph, self.stack.blocks[0].parameters[0])

    def _record(self, hidden: torch.Tensor, shared: Pass, batch: MicroBatch) -> _Graph:
        """Both directions; what lies between them stays in the pool, which all graphs share, one replay at a time."""
        assert batch.cu_seqlens is not None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        places = replace(batch, cu_seqlens=batch.cu_seqlens.clone())
        assert places.cu_seqlens is not None
        own = replace(
            shared,
            cos=shared.cos.clone(),
            sin=shared.sin.clone(),
            seed=shared.seed.clone(),
            attend=self.attend_for(places),
        )
        hidden, grad_out = hidden.detach().clone(), torch.zeros_like(hidden)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kept: list[Kept] = []
        self.stack.store.begin()
        self.stack.store.forget()
        with torch.no_grad():
            with torch.cuda.graph(forward, pool=self.pool):
                out, last, rstd = self.stack.forward(hidden, own, kept)
            with torch.cuda.graph(backward, pool=self.pool):
                self.stack.backward(grad_out, last, rstd, own, kept)
        return _Graph(hidden, own, places.cu_seqlens, out, grad_out, forward, backward)


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it, a function of one adapter as in stack.py."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, _: torch.nn.Parameter) -> torch.Tensor:
        ctx.graph = graph
        graph.forward.replay()
        return graph.out.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        ctx.graph.grad_out.copy_(grad_outputs[0])
        ctx.graph.backward.replay()
        return None, None
