"""Small micro-batches as CUDA graphs: launching 2,500 kernels takes the host longer than a GPU needs to run them.

A step of 1,340 tokens of Llama-3.1-8B takes 155 ms eagerly and 84 to 88 ms as a graph (H200; docs/LOG.md). A graph has
one shape, so micro-batches are padded to a multiple of plan.GRAPH_STEP tokens, by a last sample that is not trained on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from typing import Any

import torch

from train.collate import MicroBatch
from train.engine.attention import Attend
from train.engine.capture import capturing, no_collection
from train.engine.context import ForwardContext
from train.engine.copies import HostMemoryError
from train.engine.graph_shapes import Shape, boundaries, num_spare, serving
from train.engine.plan import GRAPH_STEP, padded
from train.engine.stack import Saved, Stack
from train.engine.weight_store import WeightStore
from train.run.devices import out_of_memory_line

MAX_GRAPHS = 32  # about 10 MB each; later shapes use a larger graph, since a capture costs several steps

AttendFor = Callable[[MicroBatch], Mapping[int | None, Attend]]


@dataclass(frozen=True)
class StaticBuffers:
    """What graphs read and write; a smaller shape uses the beginning of the largest one's buffers."""

    hidden: torch.Tensor  # [T, H]; after a backward pass its gradient, where the embedding is trained
    positions: torch.Tensor  # [T, C]: Positions.values
    out: torch.Tensor  # [T, H]
    grad_out: torch.Tensor  # [T, H]
    per_layer: torch.Tensor  # [T, blocks P]: ForwardContext.per_layer

    def first(self, num_tokens: int) -> "StaticBuffers":
        """Those of a micro-batch with fewer tokens."""
        return StaticBuffers(*(getattr(self, field.name)[:num_tokens] for field in fields(self)))


@dataclass(frozen=True)
class CapturedGraph:
    """The forward and the backward pass of one shape."""

    static: StaticBuffers
    seed: torch.Tensor
    cu_seqlens: torch.Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class State(Enum):
    """What Graphs does with a shape that it has not captured."""

    COLD = auto()
    OPEN = auto()
    FULL = auto()
    EAGER = auto()


class Graphs:
    """The stack's training passes, captured when a shape is first seen and replayed from then on.

    Where shapes are `planned`, the smallest of them that has room is captured in place of a micro-batch's own.

    COLD: nothing is held. The next micro-batch runs eagerly, which compiles kernels and creates the libraries' handles,
        and allocates the static buffers -> OPEN.
    OPEN: a new shape is captured, but the largest before all others: those find room in its memory, and it serves
        where there is none. No room for the largest -> EAGER (the very first time OutOfMemoryError is raised instead,
        so that a smaller plan is tried); no room for another, or MAX_GRAPHS captured -> FULL; a capture that left too
        little room: all graphs are freed -> FULL.
    FULL: the smallest graph that a shape fits in serves; only the largest is captured, if it is not there -> EAGER
        where it no longer fits.
    EAGER: nothing is captured, everything runs eagerly.
    In any state: release(), also by a shape that exceeds the largest, or whose padding exceeds the samples that its
        graph has room for, and runs eagerly -> COLD.
    """

    def __init__(
        self,
        stack: Stack,
        attend_for: AttendFor,
        max_tokens: int,
        graph_bytes: int,
        fragmentation_bytes: int,
        eager_bytes: int,
    ) -> None:
        """For `max_tokens`, whose graph takes `graph_bytes`; all smaller ones take `fragmentation_bytes` more.

        `eager_bytes` are left free for what runs beside the graphs.
        """
        self.stack = stack
        self.graph_bytes = graph_bytes
        self.fragmentation_bytes = fragmentation_bytes
        self.eager_bytes = eager_bytes
        self.attend_for = attend_for
        self.max_tokens = padded(max_tokens)
        self.longest_sample = 0  # tokens of the longest one, which attention is launched for; 0: it may have all
        self.state = State.COLD
        self.graphs: dict[Shape, CapturedGraph] = {}
        self.static: StaticBuffers | None = None
        self.pool: Any = None  # torch's handle of the memory that all graphs share
        self.largest: Shape | None = None  # the shape that was captured first
        self.planned: Sequence[Shape] = ()
        self.seconds = 0.0  # spent in captures
        self.reserved = 0  # bytes that captures leave for what comes later

    def release(self) -> None:
        """Frees all graphs and their memory; shapes are captured anew."""
        self.graphs.clear()
        self.static = self.pool = None
        self.state = State.COLD

    def __call__(self, hidden: torch.Tensor, context: ForwardContext, batch: MicroBatch) -> torch.Tensor:
        """As Stack, for a batch that `pad` has padded; eagerly where no graph serves."""
        assert batch.cu_seqlens is not None
        if self.state is State.COLD:
            self._allocate(hidden, context)
            return self.stack(hidden, context)
        num_tokens = hidden.shape[0]
        graph = self._graph_for((num_tokens, len(batch.cu_seqlens)), context, batch)
        if graph is None:
            return self.stack(hidden, context)
        static = graph.static.first(num_tokens)
        pairs = [(static.hidden, hidden), (static.positions, context.positions.values), (graph.seed, context.seed)]
        for buffer, value in [*pairs, (static.per_layer, context.per_layer)]:
            buffer.copy_(value)
        # a graph's own backward pass has left its gradient there: 0 times infinity would be NaN
        graph.static.hidden[num_tokens:].zero_()
        shape = graph.static.hidden.shape[0], len(graph.cu_seqlens)
        graph.cu_seqlens.copy_(boundaries(batch, shape, self.longest_sample))
        return _Replay.apply(hidden, graph, self.stack, self.stack.anchor)

    def _allocate(self, hidden: torch.Tensor, context: ForwardContext) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        like = (hidden, context.positions.values, hidden, hidden, context.per_layer)
        self.max_tokens = max(self.max_tokens, hidden.shape[0])
        self.static = StaticBuffers(*(part.new_zeros(self.max_tokens, part.shape[1]) for part in like))
        self.state = State.OPEN

    def _graph_for(self, shape: Shape, context: ForwardContext, batch: MicroBatch) -> CapturedGraph | None:
        """The graph that serves the shape, captured if the state allows; None: run eagerly.

        Raises OutOfMemoryError where there is no room for the very first.
        """
        largest, num_tokens = self.largest or (self.max_tokens, shape[1]), shape[0]
        if shape[0] > largest[0] or shape[1] > largest[1]:
            self.release()  # the eager pass needs what the graphs hold
            return None
        if self.planned:
            shape = serving(shape, (*self.planned, largest)) or largest
        if self.state is not State.EAGER and not self.graphs:
            self._capture_largest(largest, context, batch)
        if self.state is State.OPEN and shape not in self.graphs:
            self._capture_another(shape, largest, context, batch)
        if self.state is State.EAGER:
            return None
        served = serving(shape, self.graphs) or largest
        if self.longest_sample and served[0] - num_tokens + GRAPH_STEP > num_spare(batch, served) * self.longest_sample:
            self.release()
            return None
        return self.graphs[served]

    def _capture_largest(self, largest: Shape, context: ForwardContext, batch: MicroBatch) -> None:
        if self._room() >= self.graph_bytes + self.eager_bytes:
            self.graphs[largest] = self._capture(largest, context, batch)
            self.largest = largest
        elif self.largest is None:
            needed = f"{self.graph_bytes:,} bytes, and {self.eager_bytes:,} beside it"
            raise torch.OutOfMemoryError(f"the largest CUDA graph needs {needed}")
        else:
            self.state = State.EAGER

    def _capture_another(self, shape: Shape, largest: Shape, context: ForwardContext, batch: MicroBatch) -> None:
        # the second graph takes the fragmentation of all, later ones reuse its memory
        fragmentation = self.fragmentation_bytes if len(self.graphs) == 1 else 0
        if len(self.graphs) >= MAX_GRAPHS or self._room() < fragmentation + self.eager_bytes:
            self.state = State.FULL
            return
        self.graphs[shape] = self._capture(shape, context, batch)
        if self._room() < self.eager_bytes:  # fragmentation took more; memory is given back by the whole pool only
            self.state = State.FULL
            self.graphs.clear()
            self.pool = torch.cuda.graph_pool_handle()
            self._capture_largest(largest, context, batch)

    def _room(self) -> int:
        return room() - self.reserved

    def _capture(self, shape: Shape, context: ForwardContext, batch: MicroBatch) -> CapturedGraph:
        """Both passes. What the first saves for the second stays in the pool, which all graphs share.

        That is safe since a forward replay is followed by its backward replay before the next.
        """
        assert batch.cu_seqlens is not None
        assert self.static is not None
        start = time.perf_counter()
        static, num_boundaries = self.static.first(shape[0]), shape[1]
        store = self.stack.store
        store.before_replay(self.stack.forward_order)
        torch.cuda.synchronize()
        num_tokens = static.hidden.shape[0]
        cu_seqlens, seed = batch.cu_seqlens.new_full((num_boundaries,), num_tokens), context.seed.clone()
        cu_seqlens[0] = 0
        max_length = min(num_tokens, self.longest_sample or num_tokens)
        attend = self.attend_for(replace(batch, cu_seqlens=cu_seqlens, max_length=max_length))
        positions = replace(context.positions, values=static.positions)
        own = replace(context, positions=positions, seed=seed, attend=attend, per_layer=static.per_layer)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        saved: Saved = []

        def run_forward() -> None:
            static.out.copy_(self.stack.forward(static.hidden, own, saved))

        def run_backward() -> None:
            grad_hidden = self.stack.backward(static.grad_out, own, saved)
            if grad_hidden is not None:
                static.hidden.copy_(grad_hidden)  # nothing reads the input any more

        store.invalidate_adapters()
        with torch.no_grad(), no_collection():
            self._record(forward, run_forward)
            self._record(backward, run_backward)
        store.forget_shared()  # nothing of it has run yet
        self.seconds += time.perf_counter() - start
        return CapturedGraph(static, seed, cu_seqlens, forward, backward)

    def _record(self, graph: torch.cuda.CUDAGraph, work: Callable[[], None]) -> None:
        """Captures what `work` launches; it is not run."""
        with capturing(graph, self.pool):
            work()


def room() -> int:
    """Bytes left for captures; asked for first: one that runs out of memory leaves torch's allocator in disorder."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the pool needs now what eager passes have used
    free, total = torch.cuda.mem_get_info()
    cap = int(total * torch.cuda.get_per_process_memory_fraction())
    return min(free, cap - torch.cuda.memory_reserved())


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it: a function of one adapter, as in stack.py."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, graph: CapturedGraph, stack: Stack, _: torch.nn.Parameter
    ) -> torch.Tensor:
        ctx.graph, ctx.store, ctx.order, ctx.num_tokens = graph, stack.store, stack.backward_order, hidden.shape[0]
        _replay(graph.forward, stack.store, stack.forward_order)
        return graph.static.out[: ctx.num_tokens].detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        graph, store = ctx.graph, ctx.store
        ctx.graph = ctx.store = None  # the loss may outlive the engine, whose memory would not be free
        grad_out = graph.static.grad_out
        grad_out[: ctx.num_tokens].copy_(grad_outputs[0])
        grad_out[ctx.num_tokens :].zero_()  # a larger graph's surplus tokens have no gradient
        _replay(graph.backward, store, ctx.order)
        # a copy, because autograd may use it after the next replay
        grad_hidden = graph.static.hidden[: ctx.num_tokens].clone() if ctx.needs_input_grad[0] else None
        return grad_hidden, None, None, None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it tells of GPU memory or follows such an error: a capture that ran out of it fails again at its end."""
    while error is not None:
        if isinstance(error, HostMemoryError):  # another plan may need more of it
            return False
        if isinstance(error, RuntimeError) and (isinstance(error, torch.OutOfMemoryError) or out_of_memory_line(error)):
            return True
        error = error.__context__
    return False


def _replay(graph: torch.cuda.CUDAGraph, store: WeightStore, order: Sequence[int]) -> None:
    store.before_replay(order)
    graph.replay()
    store.after_replay(order)
