"""Copies between host and device memory that run beside the computation, and the events that order the two.

A copy begins when what `after` marks is done, and whoever reads its target waits for the event that it returns. Whole
streams never wait for one another: that would put all computation that has been queued in front of every copy
(docs/LOG.md, streaming).
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Protocol

import torch

Event = Any  # what a Copies gives out and takes back


class Copies(Protocol):
    """One queue of copies."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """Starts target = source once `after` has happened; the event is its end."""
        ...

    def wait(self, event: Event) -> None:
        """Nothing that is computed from here on begins before `event`."""
        ...

    def mark(self) -> Event:
        """The moment when all that has been given to the computation so far is done."""
        ...


class StreamCopies:
    """A CUDA stream; may be recorded into a graph, since every copy waits for an event of the recording stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """As Copies has it; the host's side must be page-locked, or the host would wait here."""
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        """The current stream waits, not the host."""
        torch.cuda.current_stream().wait_event(event)

    def mark(self) -> Event:
        """An event of the current stream."""
        event = torch.cuda.Event()
        event.record()
        return event


class ThreadCopies:
    """A thread, where a CPU computes: what it has been given is done, so that there is nothing to mark."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "copies")

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """As Copies has it."""
        return self.thread.submit(target.copy_, source)

    def wait(self, event: Event) -> None:
        """The computation is this thread, so it waits."""
        if isinstance(event, Future):
            event.result()

    def mark(self) -> Event:
        """Now."""
        return None


def copies_for(device: torch.device) -> Copies:
    """A new queue of copies to or from the device."""
    return StreamCopies(device) if device.type == "cuda" else ThreadCopies()


class HostMemoryError(RuntimeError):
    """Host memory that could not be page-locked."""


def page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor that a GPU copies from, or reads; raises HostMemoryError where it is refused."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        size = math.prod(shape) * dtype.itemsize / 2**30
        reason = str(error).partition("\n")[0]
        raise HostMemoryError(f"{size:.2f} GiB of host memory could not be page-locked: {reason}") from error


def host_buffers(sizes: list[int], pin: bool) -> list[torch.Tensor]:
    """Byte buffers of the sizes in host memory, page-locked where a GPU copies from them."""
    buffers: list[torch.Tensor] = []
    for shared in _allocations(sizes) if pin else [sizes]:
        size = [sum(shared)]
        whole = page_locked(size, torch.uint8) if pin else torch.empty(size, dtype=torch.uint8)
        buffers += whole.split(shared)
    return buffers


@cache
def host_bytes(size: int, count: int) -> int:
    """What page-locked host_buffers of one size take."""
    return sum(_rounded(sum(shared)) for shared in _allocations([size] * count))


def _allocations(sizes: list[int]) -> list[list[int]]:
    """Which of the sizes share an allocation: torch rounds page-locked ones up to a power of two."""
    shares: list[list[int]] = []
    while sizes:
        fills = [sum(sizes[:count]) / _rounded(sum(sizes[:count])) for count in range(1, len(sizes) + 1)]
        count = 1 + fills.index(max(fills))
        shares.append(sizes[:count])
        sizes = sizes[count:]
    return shares


def _rounded(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length()
