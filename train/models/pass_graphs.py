"""Passes of transformers' decoder as CUDA graphs: launching their thousands of kernels takes longer than running them.

A pass of 1,551 tokens of StableLM-2-1.6B is 6,600 kernels of 88 ms, and the host launches them in 370 (H100).
As on the fused engine a graph has one shape: micro-batches are padded by a last sample that is not trained on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from train.collate import MicroBatch
from train.engine.capture import capturing, no_collection
from train.engine.graph_shapes import Shape, pad, padded_shape, serving
from train.engine.graphs import MAX_GRAPHS, room


@dataclass(frozen=True)
class _Graph:
    """The forward and the backward pass of one shape, and what they read and write."""

    batch: MicroBatch
    out: torch.Tensor  # [T, H]
    grad_out: torch.Tensor  # [T, H]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class PassGraphs:
    """A decoder's training passes, captured when a shape is first seen; backward adds to the parameters' gradients.

    The gradients must be in place, and stay there. The longest pass comes first: later ones find room in its memory.
    Shapes beyond MAX_GRAPHS, or without room, take a larger graph or run eagerly. Where shapes are `planned`, the
    smallest of them that has room is captured in place of a micro-batch's own.
    """

    def __init__(self, eager: Callable[[MicroBatch], torch.Tensor], trained: Sequence[torch.nn.Parameter]) -> None:
        self.eager = eager
        self.trained = list(trained)
        self.graphs: dict[Shape, _Graph] = {}
        self.pool: Any = None  # torch's handle of the memory that all graphs share
        self.planned: Sequence[Shape] = ()
        self.seconds = 0.0  # spent in captures
        self.reserved = 0  # bytes that captures leave for what comes later
        self.needed = 0  # bytes that the first capture took, and its warming up takes beside them

    def release(self) -> None:
        """Frees all graphs and their memory."""
        self.graphs.clear()
        self.pool = None
        torch.cuda.empty_cache()

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """A packed micro-batch -> hidden states [T or more, H]; further rows are padding."""
        shape = self._shape_for(padded_shape(batch))
        if shape is None:
            return self.eager(batch)
        batch = pad(batch, shape)
        if shape not in self.graphs:
            self.graphs[shape] = self._capture(batch)
        graph = self.graphs[shape]
        for buffer, value in zip(_tensors(graph.batch), _tensors(batch), strict=True):
            buffer.copy_(value)
        return _Replay.apply(graph, self.trained[0])

    def _shape_for(self, shape: Shape) -> Shape | None:
        if self.planned:
            shape = serving(shape, (*self.planned, *self.graphs)) or shape
        if shape in self.graphs or (len(self.graphs) < MAX_GRAPHS and room() - self.reserved >= self.needed):
            return shape
        return serving(shape, self.graphs)

    def _capture(self, batch: MicroBatch) -> _Graph:
        """Both passes. What the first saves for the second stays in the pool, which all graphs share.

        That is safe since a forward replay is followed by its backward replay before the next.
        """
        start = time.perf_counter()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        ids, positions, boundaries = (each.clone() for each in _tensors(batch))
        batch = replace(batch, input_ids=ids, position_ids=positions, cu_seqlens=boundaries)
        random_state, before = torch.cuda.get_rng_state(), torch.cuda.memory_reserved()
        self._warm_up(batch)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with no_collection():
            with capturing(forward, self.pool):
                out = self.eager(batch)
            grad_out = torch.zeros_like(out)
            with capturing(backward, self.pool):
                torch.autograd.backward(out, grad_out)
        torch.cuda.set_rng_state(random_state)
        torch.cuda.empty_cache()
        self.needed = self.needed or torch.cuda.memory_reserved() - before
        self.seconds += time.perf_counter() - start
        return _Graph(batch, out.detach(), grad_out, forward, backward)

    def _warm_up(self, batch: MicroBatch) -> None:
        """Compiles kernels of this shape, and creates the libraries' handles, which a capture cannot."""
        out = self.eager(batch)
        torch.autograd.grad(out, self.trained, torch.zeros_like(out), allow_unused=True)
        torch.cuda.synchronize()


class _Replay(torch.autograd.Function):
    """A graph as autograd sees it: a function of one parameter, whose gradient the graph adds itself."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, _: torch.nn.Parameter) -> torch.Tensor:
        ctx.graph = graph
        graph.forward.replay()
        return graph.out.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None]:
        graph, ctx.graph = ctx.graph, None
        graph.grad_out.copy_(grad_outputs[0])
        graph.backward.replay()
        return None, None


def _tensors(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a decoder reads of a packed micro-batch."""
    assert batch.cu_seqlens is not None
    return batch.input_ids, batch.position_ids, batch.cu_seqlens
