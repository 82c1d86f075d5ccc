"""What all blocks share in one pass over a micro-batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from train.engine.attention import Attend
from train.engine.delta_rule import PackedSamples
from train.engine.operations import Dropout
from train.engine.positions import Positions


class LentStates:
    """Keys and values that blocks lend to later ones in a pass, and the gradients that come back; by name.

    They stay from the forward pass until their own block's backward pass, also where that block is recomputed.
    """

    def __init__(self) -> None:
        self.states: dict[str, list[torch.Tensor]] = {}  # key and value [T, kv_heads, D]
        self.gradients: dict[str, list[torch.Tensor]] = {}  # fp32: sums over all that have borrowed

    def lend(self, name: str, states: Sequence[torch.Tensor]) -> None:
        """Keeps copies: the block's own become gradients. A block that is recomputed has lent its own already."""
        if name not in self.states:
            self.states[name] = [each.clone() for each in states]

    def give_back(self, name: str, gradients: Sequence[torch.Tensor]) -> None:
        """Adds a borrower's gradients of key and value."""
        if name not in self.gradients:
            self.gradients[name] = [torch.zeros_like(each, dtype=torch.float32) for each in gradients]
        for total, gradient in zip(self.gradients[name], gradients, strict=True):
            total += gradient

    def collect(self, name: str) -> list[torch.Tensor]:
        """The sums, in the backward pass of the block that has lent, where the states are no longer needed."""
        del self.states[name]
        return self.gradients.pop(name)


@dataclass
class ForwardContext:
    """What all blocks share in one forward pass over T tokens, and in its backward pass."""

    positions: Positions
    attend: Mapping[int | None, Attend]  # by the window of a layer
    dropout: float
    seed: torch.Tensor  # int64 scalar on the device, so that a CUDA graph can be replayed with another
    tile: int = 0  # tokens that go through an MLP together; 0: all
    samples: PackedSamples | None = None  # for linear attention
    # [T, blocks P], or without columns: each block's own inputs
    per_layer: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0))
    lent: LentStates = field(default_factory=LentStates, init=False)

    def drop(self, block: int, group: int, rows: slice = slice(0, None)) -> Dropout | None:
        """The dropout of one group's adapters, for these of the tokens; None without dropout.

        A block has 32 places, 4 for the adapters of each of 8 groups.
        """
        place = (block << 5) + (group % 4 << 3) + (group // 4 << 2)
        return Dropout(self.dropout, self.seed, place, rows.start) if self.dropout else None

    def tiles(self, num_tokens: int) -> list[slice]:
        """The tokens of each tile in turn."""
        size = self.tile or num_tokens
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
