"""Where a block's matrices are while it is computed: in a place of their own, or in one that all blocks share."""

from collections.abc import Sequence

import torch

from train.engine.block import Block, Matrices


class WeightStore:
    """M of each group of each block (lora_linear.py), made from the packed base and the adapters when it is asked for.

    The first `num_cached` blocks keep theirs, in the compute type, from step to step: only the adapters' part is filled
    again. The others share one block's place; it stays as it is while the same block is asked for again.
    """

    def __init__(self, blocks: Sequence[Block], num_cached: int, dtype: torch.dtype, device: torch.device) -> None:
        self.blocks = blocks
        self.dtype = dtype
        self.device = device
        self.cached: list[Matrices | None] = [None] * num_cached
        self.scratch: Matrices | None = None
        self.in_scratch = -1
        self.fresh: set[int] = set()

    def begin(self) -> None:
        """The adapters may have moved since the last pass."""
        self.fresh.clear()
        self.in_scratch = -1

    def matrices(self, number: int) -> Matrices:
        """The matrices of block `number`; in shared places they last until another block's are asked for."""
        groups = self.blocks[number].groups
        if number < len(self.cached):
            matrices = self.cached[number]
            if matrices is None:
                matrices = self.cached[number] = self._empty(number)
                for group, matrix in zip(groups, matrices, strict=True):
                    group.fill_base(matrix)
        else:
            matrices = self.scratch = self.scratch or self._empty(number)
            if self.in_scratch == number:
                return matrices
            self.in_scratch = number
            for group, matrix in zip(groups, matrices, strict=True):
                group.fill_base(matrix)
                group.fill_adapters(matrix)
            return matrices
        if number not in self.fresh:
            self.fresh.add(number)
            for group, matrix in zip(groups, matrices, strict=True):
                group.fill_adapters(matrix)
        return matrices

    def _empty(self, number: int) -> Matrices:
        return [torch.zeros(group.shape, dtype=self.dtype, device=self.device) for group in self.blocks[number].groups]
