"""Where a block's weights are: packed, on the device or in host memory; and dequantised, while it is computed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from train.engine.block import Block, Matrices
from train.engine.copies import Copies, Event
from train.engine.packed_weights import HostBlocks, put
from train.engine.plan import NUM_SLOTS

SHARED = -1  # the place of all blocks that have none of their own


@dataclass
class Slot:
    """A block's packed weights on the device, on their way from the host or there."""

    buffer: torch.Tensor  # uint8
    weights: list[torch.nn.Parameter]  # views of it
    block: int | None = None
    ready: Event = None  # the end of the copy, where it has not been waited for
    free: Event = None  # what read it last


@dataclass
class _Stream:
    """Blocks that come from host memory, in turn; the k-th of them always into slot k modulo the number of slots."""

    host: HostBlocks
    copies: Copies
    slots: list[Slot]
    numbers: list[int]  # of the blocks, in order
    coming: deque[int] = field(default_factory=deque)  # blocks that will be asked for

    def __post_init__(self) -> None:
        self.own = {number: self.slots[k % len(self.slots)] for k, number in enumerate(self.numbers)}

    def begin(self, order: Iterable[int]) -> None:
        """Tells which blocks are asked for next."""
        if not self.slots:
            return
        mark = self.copies.mark()
        for slot in self.slots:
            slot.free = mark  # `ready` stays: a pass that raised has not waited for all that it fetched
        self.coming = deque(number for number in order if number in self.host.weights)
        self._fetch()

    def take(self, number: int) -> list[torch.nn.Parameter]:
        """The block's weights; to be given back with `give` when all that reads them has been launched."""
        assert self.coming[0] == number, f"block {number} is asked for, {self.coming[0]} was expected"
        slot = self.slot(number)
        assert slot.block == number, f"the slot of block {number} holds {slot.block}"
        if slot.ready is not None:
            self.copies.wait(slot.ready)
            slot.ready = None
        return slot.weights

    def give(self, number: int) -> None:
        """Lets the next block into its slot."""
        self.slot(number).free = self.copies.mark()
        self.coming.popleft()
        self._fetch()

    def skip(self, number: int) -> None:
        """The next block is not needed: its matrices stand where they are wanted."""
        assert self.coming[0] == number
        self.coming.popleft()
        self._fetch()

    def slot(self, number: int) -> Slot:
        """The block's own."""
        return self.own[number]

    def _fetch(self) -> None:
        for number in list(self.coming)[: len(self.slots)]:  # neighbours, so each has another slot
            slot = self.slot(number)
            if slot.block != number:
                slot.ready = self.copies.copy(slot.buffer, self.host.buffers[number], slot.free)
                slot.block = number


class WeightStore:
    """M of each group of each block (lora_linear.py), made from the packed base and the adapters when it is asked for.

    The first `num_cached` blocks keep theirs, in the compute type, from step to step: only the adapters' part is filled
    again. The others share one block's place; it stays as it is while the same block is asked for again. Blocks that
    are in host memory come through slots, a copy each, while the blocks before them compute.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        num_cached: int,
        like: torch.Tensor,
        host: HostBlocks,
        copies: Callable[[], Copies],
    ) -> None:
        self.blocks = blocks
        self.num_cached = num_cached
        self.like = like  # type and device of the matrices
        self.places: dict[int, Matrices] = {}  # of each cached block; -1 is the shared place
        self.holds: dict[int, int] = {}  # the block whose base stands in a place
        self.fresh: set[int] = set()  # blocks whose adapters have been filled in since they moved
        slots = []
        if host.packing is not None:
            buffers = [like.new_empty(host.packing.num_bytes, dtype=torch.uint8) for _ in range(NUM_SLOTS)]
            slots = [Slot(buffer, host.packing.views(buffer)) for buffer in buffers]
        self.stream = _Stream(host, copies(), slots, host.numbers)

    def invalidate_adapters(self) -> None:
        """Since the last pass they may have."""
        self.fresh.clear()

    def begin(self, order: Iterable[int]) -> None:
        """Tells the order in which the blocks will be asked for, all of them."""
        self.stream.begin(order)

    def forget(self) -> None:
        """What stands in the shared place is not known: a recorded graph has written it, or will."""
        self.holds.pop(SHARED, None)

    def release(self) -> None:
        """Lets go of all matrices; they are made again when they are asked for."""
        self.places.clear()
        self.holds.clear()
        self.fresh.clear()

    def matrices(self, number: int) -> Matrices:
        """The matrices of block `number`; in the shared place they last until another block's are asked for."""
        block, where = self.blocks[number], number if number < self.num_cached else SHARED
        if where not in self.places:
            self.places[where] = [self.like.new_zeros(group.shape) for group in block.groups]
        matrices = self.places[where]
        is_streamed = number in self.stream.host.weights
        if self.holds.get(where) != number:
            self._fill_base(block, matrices, is_streamed)
            self.fresh.discard(number)
            self.holds[where] = number
        elif is_streamed:
            self.stream.skip(number)
        if number not in self.fresh:
            self._fill_adapters(block, matrices)
            self.fresh.add(number)
        return matrices

    def _fill_base(self, block: Block, matrices: Matrices, is_streamed: bool) -> None:
        own = [linear.weight for linear in _linears(block)]
        weights = iter(self.stream.take(block.number) if is_streamed else own)
        for group, matrix in zip(block.groups, matrices, strict=True):
            group.fill_base(matrix, [next(weights) for _ in group.bases])
        if is_streamed:
            self.stream.give(block.number)

    @torch.no_grad()
    def _fill_adapters(self, block: Block, matrices: Matrices) -> None:
        for group, matrix in zip(block.groups, matrices, strict=True):
            for place, parameter, factor in group.adapter_places(matrix):
                if factor == 1.0:
                    place.copy_(parameter)
                else:
                    torch.mul(parameter, factor, out=place)

    def before_replay(self, forward: bool) -> None:
        """Sees to it that the slots hold what they held when the graph was recorded: the pass's first blocks.

        A graph cannot look: what is in a slot was decided when it was recorded.
        """
        self.forget()
        stream, numbers = self.stream, self.stream.numbers
        stream.begin(numbers if forward else numbers[::-1])
        for slot in stream.slots:
            if slot.ready is not None:
                stream.copies.wait(slot.ready)
                slot.ready = None

    def after_replay(self, forward: bool) -> None:
        """The graph has left a pass's last blocks in the slots."""
        numbers = self.stream.numbers
        for number in numbers if forward else numbers[::-1]:
            self.stream.slot(number).block = number

    @contextmanager
    def lent(self, layers: Sequence[Any]) -> Iterator[None]:
        """While it is entered, transformers can run `layers` itself: each gets its weights when it is called."""
        hooks: list[Any] = []
        for number in self.stream.host.weights:
            hooks.append(layers[number].register_forward_pre_hook(partial(self._lend, number)))
            hooks.append(layers[number].register_forward_hook(partial(self._return, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for number, weights in self.stream.host.weights.items():  # a layer that raised has not given them back
                put(_linears(self.blocks[number]), weights)

    def _lend(self, number: int, *_: Any) -> None:
        stream = self.stream
        if number == stream.numbers[0]:  # of a forward pass, also after one that raised
            stream.begin(stream.numbers)
        put(_linears(self.blocks[number]), stream.take(number))

    def _return(self, number: int, *_: Any) -> None:
        stream = self.stream
        stream.give(number)
        put(_linears(self.blocks[number]), stream.host.weights[number])


def _linears(block: Block) -> list[Any]:
    return [base for group in block.groups for base in group.bases]
