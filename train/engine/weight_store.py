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
        self.num_cached = num_cached
        self.dtype = dtype
        self.device = device
        self.places: dict[int, Matrices] = {}  # of each cached block; -1 is the shared place
        self.holds: dict[int, int] = {}  # the block whose base stands in a place
        self.fresh: set[int] = set()  # blocks whose adapters have been filled in since they moved

    def begin(self) -> None:
        """The adapters may have moved since the last pass."""
        self.fresh.clear()

    def forget(self) -> None:
        """What stands in the shared place is not known: a recorded graph has written it, or will."""
        self.holds.pop(-1, None)

    def matrices(self, number: int) -> Matrices:
        """The matrices of block `number`; in the shared place they last until another block's are asked for."""
        block, where = self.blocks[number], number if number < self.num_cached else -1
        if where not in self.places:
            self.places[where] = [
                torch.zeros(group.shape, dtype=self.dtype, device=self.device) for group in block.groups
            ]
        matrices = self.places[where]
        if self.holds.get(where) != number:
            for group, matrix in zip(block.groups, matrices, strict=True):
                group.fill_base(matrix)
            self.fresh.discard(number)
            self.holds[where] = number
        if number not in self.fresh:
            self._fill_adapters(block, matrices)
            self.fresh.add(number)
        return matrices

    @torch.no_grad()
    def _fill_adapters(self, block: Block, matrices: Matrices) -> None:
        for group, matrix in zip(block.groups, matrices, strict=True):
            for place, parameter, factor in group.adapter_places(matrix):
                if factor == 1.0:
                    place.copy_(parameter)
                else:
                    torch.mul(parameter, factor, out=place)
