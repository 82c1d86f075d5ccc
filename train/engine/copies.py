"""Copies between host and device memory that run beside the computation, and the events that order the two.

A copy begins after the event `after`, and whoever reads its target waits for the event that it returns. Whole streams
never wait for one another: every copy would then wait for all computation queued so far (docs/LOG.md, streaming).
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import torch

Event = Any  # opaque: a Copies returns it and takes it back


class Copies(Protocol):
    """One queue of copies."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """Starts target = source once `after` has happened; returns the event of its end."""
        ...

    def wait(self, event: Event) -> None:
        """Computation launched from here on begins after `event`."""
        ...

    def mark(self) -> Event:
        """The event of the end of all computation launched so far."""
        ...


class StreamCopies:
    """A CUDA stream; can be captured in a graph, since every copy waits for an event of the capturing stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """As Copies; the host's side must be pinned, or the host would wait here."""
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        """As Copies; the current stream waits, not the host."""
        torch.cuda.current_stream().wait_event(event)

    def mark(self) -> Event:
        """As Copies, for the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event


class ThreadCopies:
    """A thread, where a CPU computes: computation is done when it returns, so `mark` has nothing to record."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "copies")

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """As Copies."""
        return self.thread.submit(target.copy_, source)

    def wait(self, event: Event) -> None:
        """As Copies; this thread computes, so it waits."""
        if isinstance(event, Future):
            event.result()

    def mark(self) -> Event:
        """As Copies: now."""
        return None


def copies_for(device: torch.device) -> Copies:
    """A new queue of copies to or from the device."""
    return StreamCopies(device) if device.type == "cuda" else ThreadCopies()


class HostMemoryError(RuntimeError):
    """Host memory could not be pinned."""


def pinned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in pinned host memory, which a GPU copies from or reads.

    Raises HostMemoryError where the system refuses it.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        size = math.prod(shape) * dtype.itemsize / 2**30
        reason = str(error).partition("\n")[0]
        raise HostMemoryError(f"{size:.2f} GiB of host memory could not be pinned: {reason}") from error


def host_buffers(sizes: list[int], pin: bool) -> list[torch.Tensor]:
    """Byte buffers of these sizes in host memory; pinned where a GPU copies from them."""
    buffers: list[torch.Tensor] = []
    for shared in _allocations(sizes) if pin else [sizes]:
        size = [sum(shared)]
        whole = pinned(size, torch.uint8) if pin else torch.empty(size, dtype=torch.uint8)
        buffers += whole.split(shared)
    return buffers


@cache
def host_bytes(size: int, count: int) -> int:
    """Bytes that `count` pinned host_buffers of one size take."""
    return sum(_rounded(sum(shared)) for shared in _allocations([size] * count))


def _allocations(sizes: list[int]) -> list[list[int]]:
    """Which sizes share an allocation, so that little is wasted: torch rounds pinned ones up to a power of two."""
    shares: list[list[int]] = []
    while sizes:
        fills = [sum(sizes[:count]) / _rounded(sum(sizes[:count])) for count in range(1, len(sizes) + 1)]
        count = 1 + fills.index(max(fills))
        shares.append(sizes[:count])
        sizes = sizes[count:]
    return shares


def _rounded(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length()
