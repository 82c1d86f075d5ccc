"""Rotary embeddings whose frequencies depend on the length of the text, for each sample by its own.

transformers chooses the frequencies of `longrope` and `dynamic` scaling by the largest position in the batch: a short
sample beside a long one, in one micro-batch or one packed row, would be rotated as if it were long.
"""

from collections.abc import Sequence
from typing import Any

import torch

LENGTH_DEPENDENT = ("dynamic", "longrope")


class SampleRotary(torch.nn.Module):
    """A rotary embedding of transformers, called for one sample at a time."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.lengths: Sequence[int] = ()  # tokens of the samples to come, packed or a row each; empty: as transformers

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, T, D] for position_ids [B, T]; both may have a dimension more in front, of a place's three
        coordinates (Qwen3.5, the same for text)."""
        layer = next(iter((*args, *options.values())), None)  # the kind of layer, where frequencies differ by it
        args = () if layer is None else (layer,)
        if not self.lengths:
            return self._of_one(x, position_ids, *args)
        if position_ids.shape[-2] == 1:
            return self._of_packed(x, position_ids, *args)
        rows = []
        for row, length in enumerate(self.lengths):
            # padding behind a sample is rotated by its frequencies, too; nothing reads it
            rows.append(self._of_sample(x, position_ids[..., row : row + 1, :], length, *args))
        return torch.cat([cos for cos, _ in rows], -3), torch.cat([sin for _, sin in rows], -3)

    def _of_packed(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts, start, width = [], 0, position_ids.shape[-1]
        for length in [*self.lengths, width]:
            stop = min(start + length, width)
            if stop > start:
                parts.append(self._of_sample(x, position_ids[..., start:stop], stop - start, *args))
            start = stop
        return torch.cat([cos for cos, _ in parts], -2), torch.cat([sin for _, sin in parts], -2)

    def _of_sample(
        self, x: torch.Tensor, position_ids: torch.Tensor, length: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one row whose sample has this length: positions beyond it are padding, and get the last one's."""
        return self._of_one(x, position_ids.clamp(max=length - 1), *args)

    def _of_one(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self._forget()
        return self.inner(x, position_ids, *args)

    def _forget(self) -> None:
        """Dynamic scaling keeps the frequencies of the longest text so far; a function of seed and step must not."""
        inner = self.inner
        for name in [name for name in vars(inner) if name.endswith("max_seq_len_cached")]:
            if getattr(inner, name) > inner.original_max_seq_len:
                prefix = name.removesuffix("max_seq_len_cached")
                setattr(inner, name, inner.original_max_seq_len)
                getattr(inner, f"{prefix}inv_freq").copy_(getattr(inner, f"{prefix}original_inv_freq"))


def isolate_rotary(base: torch.nn.Module) -> None:
    """Puts a SampleRotary around every rotary embedding of the base that depends on lengths."""
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            kinds: Any = getattr(child, "rope_type", None)
            kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
            if any(part in str(kind) for kind in kinds for part in LENGTH_DEPENDENT):
                setattr(module, name, SampleRotary(child))
