"""The blocks' weights as their matrix products take them: dequantised, with the adapters, while they are needed."""

from collections.abc import Sequence
from typing import Any

import torch

from train.engine.block import Block
from train.engine.lora_linear import Matrices, Pass
from train.engine.packed_source import PackedSource

SHARED = -1  # the place of all blocks that have none of their own


class WeightStore:
    """M of each group of each block (lora_linear.py, fp8.py), made from the packed base and the adapters on demand.

    The first `num_cached` blocks keep their matrices, in the compute type, from step to step: only the adapters' part
    is filled again. The others share one block's place, which is not filled again while the same block is asked for.
    Where a model has blocks of two kinds, that place has the matrices of each, but those that both have once.
    """

    def __init__(self, blocks: Sequence[Block], num_cached: int, like: torch.Tensor, source: PackedSource) -> None:
        """`like` has the type and the device of the matrices."""
        self.blocks = blocks
        self.num_cached = num_cached
        self.like = like
        self.source = source
        self.places: dict[int, Matrices] = {}  # by cached block
        self.shared: dict[tuple[int, object], Any] = {}  # by a group's number and layout
        self.holds: dict[int, int] = {}  # place -> the block whose base is in it
        self.fresh: set[int] = set()  # blocks whose adapters have been filled in since `invalidate_adapters`

    def invalidate_adapters(self) -> None:
        """The adapters may have changed: those in the matrices are stale."""
        self.fresh.clear()

    def begin(self, order: Sequence[int]) -> None:
        """All blocks are asked for in this order from here on.

        Cached blocks get their memory at once: between the activations of a first pass it would leave gaps when they
        are freed, up to 20 MB a block, which is the unit in which torch gives memory back.
        """
        self.source.begin(order)
        for block in self.blocks[: self.num_cached]:
            self._own(block)

    def forget_shared(self) -> None:
        """What is in the shared place is unknown: a CUDA graph has written it, or will."""
        self.holds.pop(SHARED, None)

    def release(self) -> None:
        """Frees all matrices; they are made again when they are asked for."""
        self.places.clear()
        self.shared.clear()
        self.holds.clear()
        self.fresh.clear()

    def matrices(self, number: int, run: Pass) -> Matrices:
        """The matrices of block `number`, with what a pass reads; in the shared place until others are asked for."""
        block, where = self.blocks[number], number if number < self.num_cached else SHARED
        matrices = self._shared(block) if where == SHARED else self._own(block)
        # a cached block's serve all passes
        run = run if where == SHARED or run is Pass.CHECKED else Pass.RECOMPUTED
        serves = [group.begin(matrix, run) for group, matrix in zip(block.groups, matrices, strict=True)]
        if self.holds.get(where) == number and all(serves):
            self.source.skip(number)
        else:
            self._fill_base(block, matrices)
            self.fresh.discard(number)
            self.holds[where] = number
        if number not in self.fresh:
            for group, matrix in zip(block.groups, matrices, strict=True):
                group.fill_adapters(matrix)
            self.fresh.add(number)
        return matrices

    def _own(self, block: Block) -> Matrices:
        if block.number not in self.places:
            self.places[block.number] = [group.new_matrix(self.like) for group in block.groups]
        return self.places[block.number]

    def _shared(self, block: Block) -> Matrices:
        for place, group in zip(block.places, block.groups, strict=True):
            if place not in self.shared:
                self.shared[place] = group.new_matrix(self.like)
        return [self.shared[place] for place in block.places]

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
