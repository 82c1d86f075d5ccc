"""Small passes as CUDA graphs: launching 2,500 kernels takes the host longer than a GPU needs to run them.

A step of 1,340 tokens of Llama-3.1-8B: 155 ms by launches, 84 to 88 ms as a graph (H200; docs/LOG.md). A graph holds
one shape, so passes are padded to a multiple of STEP tokens, by a last sample of its own that nobody learns from.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from train.collate import MicroBatch
from train.engine.attention import Attend
from train.engine.block import Pass
from train.engine.stack import Kept, Stack
from train.engine.weight_store import WeightStore

STEP = 128
MOST_GRAPHS = 32  # one for each multiple of STEP; about 10 MB each

AttendFor = Callable[[MicroBatch], Attend]


def pad(batch: MicroBatch) -> MicroBatch:
    """The packed micro-batch with a multiple of STEP tokens and of eight borders; its longest sample may be all of it.

    What is added predicts nothing; samples of no tokens stand at its end.
    """
    borders = batch.cu_seqlens
    assert borders is not None
    num_tokens = batch.input_ids.shape[1]
    width = -(-num_tokens // STEP) * STEP
    num_borders = -(-(len(borders) + 1) // 8) * 8
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, width - num_tokens)),
        position_ids=F.pad(batch.position_ids, (0, width - num_tokens)),
        cu_seqlens=F.pad(borders, (0, num_borders - len(borders)), value=width),
        even_length=0,
        max_length=width,
    )


@dataclass(frozen=True)
class _Places:
    """What graphs read and write; a smaller shape uses the beginning of the largest one's."""

    hidden: torch.Tensor  # [T, H]
    cos: torch.Tensor  # [T, D]
    sin: torch.Tensor
    out: torch.Tensor  # [T, H]
    grad_out: torch.Tensor

    def first(self, num_tokens: int) -> "_Places":
        """Those of a pass with fewer tokens."""
        return _Places(*(getattr(self, field.name)[:num_tokens] for field in fields(self)))


@dataclass(frozen=True)
class _Graph:
    """One shape's forward and backward."""

    places: _Places
    seed: torch.Tensor
    borders: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class Graphs:
    """The stack's training passes, recorded at a shape's first sight and replayed from then on."""

    def __init__(self, stack: Stack, attend_for: AttendFor, most_tokens: int) -> None:
        self.stack = stack
        self.attend_for = attend_for
        self.most_tokens = -(-most_tokens // STEP) * STEP
        self.graphs: dict[tuple[int, int], _Graph] = {}  # by tokens and borders
        self.places: _Places | None = None
        self.pool: Any = None

    def release(self) -> None:
        """Lets go of all graphs and their memory; passes are recorded anew."""
        self.graphs.clear()
        self.places = self.pool = None

    def __call__(self, hidden: torch.Tensor, shared: Pass, batch: MicroBatch) -> torch.Tensor:
        """As Stack, for a batch that `pad` has padded."""
        assert batch.cu_seqlens is not None
        if self.places is None:  # the very first pass compiles kernels and makes the libraries' handles
            self.pool = torch.cuda.graph_pool_handle()
            like = (hidden, shared.cos, shared.sin, hidden, hidden)
            self.most_tokens = max(self.most_tokens, hidden.shape[0])
            self.places = _Places(*(part.new_zeros(self.most_tokens, part.shape[1]) for part in like))
            return self.stack(hidden, shared)
        num_tokens, num_borders = hidden.shape[0], len(batch.cu_seqlens)
        if num_tokens > self.most_tokens:
            return self.stack(hidden, shared)
        # the largest first of all: the pool then has room for the others
        for size in (num_tokens,) if self.graphs else (self.most_tokens, num_tokens):
            if (size, num_borders) not in self.graphs:
                if len(self.graphs) == MOST_GRAPHS:
                    del self.graphs[next(iter(self.graphs))]
                self.graphs[size, num_borders] = self._record(self.places.first(size), num_borders, shared, batch)
        graph = self.graphs[num_tokens, num_borders]
        places = graph.places
        pairs = ((places.hidden, hidden), (places.cos, shared.cos), (places.sin, shared.sin))
        for place, value in (*pairs, (graph.seed, shared.seed), (graph.borders, batch.cu_seqlens)):
            place.copy_(value)
        return _Replay.apply(graph, self.stack, self.stack.anchor)

    def _record(self, places: _Places, num_borders: int, shared: Pass, batch: MicroBatch) -> _Graph:
        """Both directions; what lies between them stays in the pool, which all graphs share, one replay at a time."""
        assert batch.cu_seqlens is not None
        store = self.stack.store
        store.before_replay(forward=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what launches have used, the pool needs now
        num_tokens = places.hidden.shape[0]
        borders, seed = batch.cu_seqlens.new_full((num_borders,), num_tokens), shared.seed.clone()
        borders[0] = 0
        attend = self.attend_for(replace(batch, cu_seqlens=borders, max_length=num_tokens))
        own = replace(shared, cos=places.cos, sin=places.sin, seed=seed, attend=attend)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kept: list[Kept] = []
        store.adapters_moved()
        with torch.no_grad():
            with torch.cuda.graph(forward, pool=self.pool):
                out, last, rstd = self.stack.forward(places.hidden, own, kept)
                places.out.copy_(out)
                del out
            with torch.cuda.graph(backward, pool=self.pool):
                self.stack.backward(places.grad_out, last, rstd, own, kept)
        store.forget()  # nothing of it has run yet
        return _Graph(places, seed, borders, forward, backward)


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it, a function of one adapter as in stack.py."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, stack: Stack, _: torch.nn.Parameter) -> torch.Tensor:
        ctx.graph, ctx.store = graph, stack.store
        _replay(graph.forward, stack.store, forward=True)
        return graph.places.out.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        ctx.graph.places.grad_out.copy_(grad_outputs[0])
        _replay(ctx.graph.backward, ctx.store, forward=False)
        return None, None, None


def _replay(graph: torch.cuda.CUDAGraph, store: WeightStore, forward: bool) -> None:
    store.before_replay(forward)
    graph.replay()
    store.after_replay(forward)
