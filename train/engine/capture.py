"""The capture of a CUDA graph, after which, whether it succeeds or not, the process computes as before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """While entered, what is launched becomes the graph, in memory of the pool, and does not run.

    torch.cuda.graph leaves its own stream current where a capture ends with an error. Later work on that stream would
    run beside bitsandbytes' kernels that quantise weights and update adapters: those are always launched on the
    default one, and sharing it is all that orders the two.
    """
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    finally:
        torch.cuda.set_stream(stream)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected during a capture: freeing what holds CUDA objects would end it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
