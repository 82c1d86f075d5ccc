"""The capture of a CUDA graph, after which, whether it succeeds or not, the process computes as before."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.cuda.memory import _cuda_endAllocateToPool, _cuda_releasePool


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """While entered, what is launched becomes the graph, in memory of the pool, and does not run.

    A failure raises what stopped the work, not the end of the capture that fails after it. The pool serves again only
    if graphs hold it. torch.cuda.graph leaves its own stream current then: later work on it would run beside
    bitsandbytes' kernels that quantise weights and fetch paged state, which are always launched on the default one.
    """
    stream, cause = torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph, pool=pool):
            try:
                yield
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        torch.cuda.set_stream(stream)
        _forget_failed(pool)
        raise cause or error from None
    finally:
        torch.cuda.set_stream(stream)


def _forget_failed(pool: Any) -> None:
    """A capture whose end fails goes on for torch's allocator and its random numbers (2.11): both are told.

    Otherwise the allocator would give nothing back to the device, and the next dropout would raise an error. Drawing
    is allowed again by the end of any capture.
    """
    device = torch.cuda.current_device()
    try:
        _cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # it knows of the end: the capture was whole, and the work raised an error of its own
        return
    _cuda_releasePool(device, pool)
    # a device that is broken or full cannot capture this: what was raised first says why
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected during a capture: freeing what holds CUDA objects would end it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
