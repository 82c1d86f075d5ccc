"""The blocks' weights as their matrix products take them: dequantised, with the adapters, while they are needed."""

from collections.abc import Sequence

import torch

from train.engine.block import Block
from train.engine.lora_linear import Matrices
from train.engine.packed_source import PackedSource

SHARED = -1  # the place of all blocks that have none of their own


class WeightStore:
    """M of each group of each block (lora_linear.py), made from the packed base and the adapters on demand.

    The first `num_cached` blocks keep their matrices, in the compute type, from step to step: only the adapters' part
    is filled again. The others share one block's place, which is not filled again while the same block is asked for.
    """

    def __init__(self, blocks: Sequence[Block], num_cached: int, like: torch.Tensor, source: PackedSource) -> None:
        """`like` has the type and the device of the matrices."""
        self.blocks = blocks
        self.num_cached = num_cached
        self.like = like
        self.source = source
        self.places: dict[int, Matrices] = {}  # by cached block, and SHARED
        self.holds: dict[int, int] = {}  # place -> the block whose base is in it
        self.fresh: set[int] = set()  # blocks whose adapters have been filled in since `invalidate_adapters`

    def invalidate_adapters(self) -> None:
        """The adapters may have changed: those in the matrices are stale."""
        self.fresh.clear()

    def begin(self, order: Sequence[int]) -> None:
        """All blocks are asked for in this order from here on."""
        self.source.begin(order)

    def forget_shared(self) -> None:
        """What is in the shared place is unknown: a CUDA graph has written it, or will."""
        self.holds.pop(SHARED, None)

    def release(self) -> None:
        """Frees all matrices; they are made again when they are asked for."""
        self.places.clear()
        self.holds.clear()
        self.fresh.clear()

    def matrices(self, number: int) -> Matrices:
        """The matrices of block `number`; in the shared place they last until another block's are asked for."""
        block, where = self.blocks[number], number if number < self.num_cached else SHARED
        if where not in self.places:
            self.places[where] = [self.like.new_zeros(group.shape) for group in block.groups]
        matrices = self.places[where]
        if self.holds.get(where) == number:
            self.source.skip(number)
        else:
            self._fill_base(block, matrices)
            self.fresh.discard(number)
            self.holds[where] = number
        if number not in self.fresh:
            self._fill_adapters(block, matrices)
            self.fresh.add(number)
        return matrices

    def before_replay(self, order: Sequence[int]) -> None:
        """A CUDA graph of a pass in this order is about to be replayed, or captured."""
        self.forget_shared()
        self.source.before_replay(order)

    def after_replay(self, order: Sequence[int]) -> None:
        """The graph of a pass in this order has been launched."""
        self.source.after_replay(order)

    def _fill_base(self, block: Block, matrices: Matrices) -> None:
        weights = iter(self.source.take(block.number))
        for group, matrix in zip(block.groups, matrices, strict=True):
            group.fill_base(matrix, [next(weights) for _ in group.bases])
        self.source.give(block.number)

    @torch.no_grad()
    def _fill_adapters(self, block: Block, matrices: Matrices) -> None:
        for group, matrix in zip(block.groups, matrices, strict=True):
            for place, parameter, factor in group.adapter_places(matrix):
                if factor == 1.0:
                    place.copy_(parameter)
                else:
                    torch.mul(parameter, factor, out=place)
