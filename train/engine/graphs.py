"""Small passes as CUDA graphs: launching 2,500 kernels takes the host longer than a GPU needs to run them.

A step of 1,340 tokens of Llama-3.1-8B: 155 ms by launches, 84 to 88 ms as a graph (H200; docs/LOG.md). A graph holds
one shape, so passes are padded to a multiple of plan.GRAPH_STEP tokens, by a last sample of its own that nobody learns
from.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F

from train.collate import MicroBatch, with_empty_samples
from train.engine.attention import Attend
from train.engine.block import Pass
from train.engine.plan import padded
from train.engine.stack import Memory, Stack
from train.engine.weight_store import WeightStore

MOST_GRAPHS = 32  # about 10 MB each; what comes later goes through a larger one, since a recording costs several steps

AttendFor = Callable[[MicroBatch], Attend]


def pad(batch: MicroBatch) -> MicroBatch:
    """The packed micro-batch with a multiple of plan.GRAPH_STEP tokens and of eight borders.

    Its longest sample may be all of it. What is added predicts nothing; samples of no tokens stand at its end.
    """
    borders = batch.cu_seqlens
    assert borders is not None
    num_tokens = batch.input_ids.shape[1]
    width = padded(num_tokens)
    num_borders = -(-(len(borders) + 1) // 8) * 8
    wide = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, width - num_tokens)),
        position_ids=F.pad(batch.position_ids, (0, width - num_tokens)),
        max_length=width,
    )
    return with_empty_samples(wide, num_borders - 1)


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

    def __init__(
        self,
        stack: Stack,
        attend_for: AttendFor,
        most_tokens: int,
        graph_bytes: int,
        fragmentation_bytes: int,
        eager_bytes: int,
    ) -> None:
        """For `most_tokens`, whose graph takes `graph_bytes`, and shorter ones that take `fragmentation_bytes` more.

        `eager_bytes` are left to what is not recorded.
        """
        self.stack = stack
        self.graph_bytes = graph_bytes
        self.fragmentation_bytes = fragmentation_bytes
        self.eager_bytes = eager_bytes
        self.attend_for = attend_for
        self.most_tokens = padded(most_tokens)
        self.graphs: dict[tuple[int, int], _Graph] = {}  # by tokens and borders
        self.places: _Places | None = None
        self.pool: Any = None
        self.largest: tuple[int, int] | None = None  # the shape that was recorded first
        self.has_room = True  # for more recordings than the largest
        self.has_none = False  # no room for the largest either

    def release(self) -> None:
        """Lets go of all graphs and their memory; passes are recorded anew."""
        self.graphs.clear()
        self.places = self.pool = None
        self.has_room, self.has_none = True, False

    def __call__(self, hidden: torch.Tensor, shared: Pass, batch: MicroBatch) -> torch.Tensor:
        """As Stack, for a batch that `pad` has padded; what cannot be recorded is launched."""
        assert batch.cu_seqlens is not None
        if self.places is None:  # the very first pass compiles kernels and makes the libraries' handles
            self.pool = torch.cuda.graph_pool_handle()
            like = (hidden, shared.cos, shared.sin, hidden, hidden)
            self.most_tokens = max(self.most_tokens, hidden.shape[0])
            self.places = _Places(*(part.new_zeros(self.most_tokens, part.shape[1]) for part in like))
            return self.stack(hidden, shared)
        graph = self._graph_for(hidden.shape[0], shared, batch)
        if graph is None:
            return self.stack(hidden, shared)
        num_tokens = hidden.shape[0]
        places = graph.places.first(num_tokens)
        pairs = ((places.hidden, hidden), (places.cos, shared.cos), (places.sin, shared.sin))
        for place, value in (*pairs, (graph.seed, shared.seed)):
            place.copy_(value)
        graph.borders.fill_(graph.places.hidden.shape[0])
        # the last border stays: what a larger graph has too much belongs to the sample that `pad` has added
        graph.borders[: len(batch.cu_seqlens) - 1].copy_(batch.cu_seqlens[:-1])
        return _Replay.apply(graph, self.stack, num_tokens, self.stack.anchor)

    def _graph_for(self, num_tokens: int, shared: Pass, batch: MicroBatch) -> "_Graph | None":
        """The shape's graph, recorded at its first sight; where there are enough, or no memory, a larger one, or none.

        The largest comes first: the others find room in its memory, and it serves where there is none. Raises
        OutOfMemoryError where there is no room for the very first.
        """
        assert batch.cu_seqlens is not None
        shape = (num_tokens, len(batch.cu_seqlens))
        largest = self.largest or (self.most_tokens, shape[1])
        if shape[0] > largest[0] or shape[1] > largest[1]:
            self.release()  # what it holds, launches need
            return None
        if not self.graphs:
            if self.has_none or self._room() < self.graph_bytes + self.eager_bytes:
                if self.largest is None:
                    raise torch.OutOfMemoryError(f"{self.graph_bytes:,} bytes for a graph, and what runs beside it")
                self.has_none = True
                return None
            self.graphs[largest] = self._record(largest, shared, batch)
            self.largest = largest
        if shape not in self.graphs and self.has_room and len(self.graphs) < MOST_GRAPHS:
            gaps = (
                self.fragmentation_bytes if len(self.graphs) == 1 else 0
            )  # what others have taken of them is theirs already
            self.has_room = self._room() >= gaps + self.eager_bytes
            if self.has_room:
                self.graphs[shape] = self._record(shape, shared, batch)
                self.has_room = self._room() >= self.eager_bytes
                if not self.has_room:  # its gaps have taken what others need, and only a whole pool is given back
                    self.graphs.clear()
                    self.pool = torch.cuda.graph_pool_handle()
                    return self._graph_for(num_tokens, shared, batch)
        return self.graphs[min(each for each in self.graphs if each[0] >= shape[0] and each[1] >= shape[1])]

    def _room(self) -> int:
        """Bytes that are left for recordings.

        It is asked for before each: one that runs out of memory leaves torch's allocator in disorder.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what launches have used, the pool needs now
        free, total = torch.cuda.mem_get_info()
        cap = int(total * torch.cuda.get_per_process_memory_fraction())
        return min(free, cap - torch.cuda.memory_reserved())

    def _record(self, shape: tuple[int, int], shared: Pass, batch: MicroBatch) -> _Graph:
        """Both directions; what lies between them stays in the pool, which all graphs share, one replay at a time."""
        assert batch.cu_seqlens is not None
        assert self.places is not None
        places, num_borders = self.places.first(shape[0]), shape[1]
        store = self.stack.store
        store.before_replay(self.stack.forward_order)
        torch.cuda.synchronize()
        num_tokens = places.hidden.shape[0]
        borders, seed = batch.cu_seqlens.new_full((num_borders,), num_tokens), shared.seed.clone()
        borders[0] = 0
        attend = self.attend_for(replace(batch, cu_seqlens=borders, max_length=num_tokens))
        own = replace(shared, cos=places.cos, sin=places.sin, seed=seed, attend=attend)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        kept: Memory = []
        store.invalidate_adapters()
        with torch.no_grad(), _no_collection():
            with torch.cuda.graph(forward, pool=self.pool):
                out = self.stack.forward(places.hidden, own, kept)
                places.out.copy_(out)
                del out
            with torch.cuda.graph(backward, pool=self.pool):
                self.stack.backward(places.grad_out, own, kept)
        store.forget_shared()  # nothing of it has run yet
        return _Graph(places, seed, borders, forward, backward)


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it, a function of one adapter as in stack.py."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, stack: Stack, num_tokens: int, _: torch.nn.Parameter) -> torch.Tensor:
        ctx.graph, ctx.stack, ctx.num_tokens = graph, stack, num_tokens
        _replay(graph.forward, stack.store, stack.forward_order)
        return graph.places.out[:num_tokens].detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        graph, ctx.graph = ctx.graph, None  # the loss may outlive it: its memory would not be free
        place = graph.places.grad_out
        place[: ctx.num_tokens].copy_(grad_outputs[0])
        place[ctx.num_tokens :].zero_()  # nobody learns from what a larger graph has too much
        _replay(graph.backward, ctx.stack.store, ctx.stack.backward_order)
        return None, None, None, None


@contextmanager
def _no_collection() -> Iterator[None]:
    """While a graph is recorded no garbage is freed: what CUDA is told then would end the recording."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where the end of a recording that ran out of memory has failed after it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__context__
    return False


def _replay(graph: torch.cuda.CUDAGraph, store: WeightStore, order: Sequence[int]) -> None:
    store.before_replay(order)
    graph.replay()
    store.after_replay(order)
