"""What all blocks share in one pass over a micro-batch."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from train.engine.attention import Attend
from train.engine.delta_rule import PackedSamples
from train.engine.operations import Dropout
from train.engine.positions import Positions


@dataclass
class ForwardContext:
    """What all blocks share in one forward pass over T tokens, and in its backward pass."""

    positions: Positions
    attend: Mapping[int | None, Attend]  # by the window of a layer
    dropout: float
    seed: torch.Tensor  # int64 scalar on the device, so that a CUDA graph can be replayed with another
    tile: int = 0  # tokens that go through an MLP together; 0: all
    samples: PackedSamples | None = None  # for linear attention

    def drop(self, block: int, group: int, rows: slice = slice(0, None)) -> Dropout | None:
        """The dropout of one group's adapters, for these of the tokens; None without dropout."""
        return Dropout(self.dropout, self.seed, (block << 5) + (group << 3), rows.start) if self.dropout else None

    def tiles(self, num_tokens: int) -> list[slice]:
        """The tokens of each tile in turn."""
        size = self.tile or num_tokens
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
