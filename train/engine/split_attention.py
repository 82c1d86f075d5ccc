"""Attention whose tokens several processes hold: of all tokens, each attends with its share of the heads (context
parallelism, DeepSpeed-Ulysses, Jacobs et al. 2023).
"""

from collections.abc import Callable
from typing import Any

import torch

from train.collate import Part
from train.engine.attention import Attend

Swap = Callable[[torch.Tensor], torch.Tensor]


class SplitAttention:
    """An `Attend` of one part's tokens, by `attend` of all tokens, which takes fewer heads; autograd swaps back."""

    def __init__(self, attend: Attend, part: Part) -> None:
        self.attend, self.part = attend, part

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As Attend, of T / N tokens; two exchanges, of queries, keys and values, and of what is attended to."""
        count = self.part.count
        if (repeats := num_repeats(key.shape[1], count)) > 1:
            key, value = (states.repeat_interleave(repeats, 1) for states in (key, value))
        shares = [states.unflatten(1, (count, -1)).transpose(0, 1) for states in (query, key, value)]
        sizes = [share.shape[2] for share in shares]
        del key, value
        # [N, T / N, heads, D]; what is sent has no name, so that it is freed before attention runs
        come = _Swapped.apply(torch.cat(shares, 2), self.part.swap)
        del shares
        query, key, value = come.flatten(0, 1).split(sizes, 1)
        own = None if sinks is None else sinks.chunk(count)[self.part.number]
        attended = self.attend(query, key, value, own)  # [T, heads, D]
        back = _Swapped.apply(attended.unflatten(0, (count, -1)), self.part.swap)  # [N, T / N, heads, D]
        return back.transpose(0, 1).flatten(1, 2)


def num_repeats(num_key_value: int, count: int) -> int:
    """How often each key and value head is there, so that every one of `count` processes has a whole number."""
    return max(1, count // num_key_value)


class _Swapped(torch.autograd.Function):
    """Chunks as the processes of a group have swapped them; the gradients of what came go back where it came from."""

    @staticmethod
    def forward(ctx: Any, chunks: torch.Tensor, swap: Swap) -> torch.Tensor:
        ctx.swap = swap
        return swap(chunks.contiguous())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.swap(grad_outputs[0].contiguous()), None
