"""Blocks whose packed weights are in host memory, and come to the device one after another while others compute."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from train.engine.copies import Copies, Event
from train.engine.layers import DecoderLayer
from train.engine.machine_memory import HostMemory
from train.engine.packed_weights import PackedLayout, put
from train.engine.plan import NUM_SLOTS

Kind = tuple[tuple[int, int], ...]  # shapes of a block's linear layers; blocks of one kind have one layout


class BlockHolder(Protocol):
    """Takes the packed weights of decoder blocks as they are loaded."""

    @property
    def wanted(self) -> Sequence[int]:
        """The blocks that it takes."""
        ...

    @property
    def memory(self) -> HostMemory:
        """Where it keeps what is in host memory."""
        ...

    def offload(self, number: int, layers: Sequence[DecoderLayer]) -> None:
        """Takes those of layer `number` of all decoder layers, if they are wanted and not here yet."""
        ...


class HostBlocks:
    """The packed weights of some blocks in host memory, of this process or of its machine."""

    def __init__(self, wanted: Sequence[int], memory: HostMemory) -> None:
        """For the blocks `wanted`; their memory is allocated when the first of them is offloaded."""
        self.wanted = list(wanted)
        self.memory = memory
        self.layouts: dict[Kind, PackedLayout] = {}
        self.kinds: dict[int, Kind] = {}  # of the blocks that are here
        self.buffers: dict[int, torch.Tensor] = {}
        self.weights: dict[int, list[torch.nn.Parameter]] = {}  # views of the buffers, which the modules hold as well

    @property
    def numbers(self) -> list[int]:
        """The blocks that are here, in order."""
        return sorted(self.weights)

    def offload(self, number: int, layers: Sequence[DecoderLayer]) -> None:
        """Moves the weights of layer `number` of all decoder layers here, if they are wanted and not here yet.

        In memory of the machine another process may write them: they are there once all have settled.
        """
        if number not in self.wanted or number in self.weights:
            return
        linears, kind, layout = layers[number].linears, _kind(layers[number]), self._layout_of(number, layers)
        if number not in self.buffers:
            missing = [each for each in self.wanted if each not in self.buffers and _kind(layers[each]) == kind]
            buffers = self.memory.buffers([layout.num_bytes] * len(missing))
            self.buffers |= dict(zip(missing, buffers, strict=True))
        layout.check(linears)
        if self.writes(number):
            layout.write(linears, self.buffers[number])
        self.weights[number] = layout.views(self.buffers[number])
        put(linears, self.weights[number])

    def writes(self, number: int) -> bool:
        """Whether this process writes a block that is wanted."""
        return self.memory.writes(self.wanted.index(number))

    def _layout_of(self, number: int, layers: Sequence[DecoderLayer]) -> PackedLayout:
        """That of the block's kind, made of the first block of it."""
        self.kinds[number] = kind = _kind(layers[number])
        if kind not in self.layouts:
            self.layouts[kind] = PackedLayout(layers[number].linears)
        return self.layouts[kind]

    def pieces(self, number: int) -> list[tuple[int, torch.Tensor]]:
        """Where the bytes of a block are: for each piece its start in the block, and its memory."""
        return [(0, self.buffers[number])]

    def slot_buffers(self, count: int, device: torch.device) -> list[torch.Tensor]:
        """Device memory for so many blocks of any kind at a time."""
        size = max(layout.num_bytes for layout in self.layouts.values())
        return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]


def _kind(layer: DecoderLayer) -> Kind:
    return tuple((linear.in_features, linear.out_features) for linear in layer.linears)


@dataclass
class Slot:
    """Device memory for one block's packed weights at a time."""

    buffer: torch.Tensor  # uint8, as large as the largest block
    weights: dict[Kind, list[torch.nn.Parameter]]  # views of it, for a block of each kind
    block: int | None = None  # whose weights are in it, or on their way
    ready: Event = None  # the end of the copy into it, until it has been waited for
    free: Event = None  # the end of the last work that reads it


class HostStream:
    """The packed source (packed_source.py) of blocks that are elsewhere, copied to the device ahead of their use.

    The k-th of these blocks always uses slot k modulo NUM_SLOTS, so that a captured graph and its replays agree on it.
    A copy into a slot waits for the slot's last reader, the first copies of a pass for all work before it, and a slot's
    reader for the copy; nothing else waits.
    """

    def __init__(
        self,
        host: HostBlocks,
        numbers: Sequence[int],
        layers: Sequence[DecoderLayer],
        device: torch.device,
        copies: Copies,
    ) -> None:
        """`layers` are all decoder layers; of these `numbers`, at least one, come from `host`."""
        self.host = host
        self.layers = layers
        self.copies = copies
        buffers = host.slot_buffers(NUM_SLOTS, device)
        self.slots = [
            Slot(buffer, {kind: layout.views(buffer) for kind, layout in host.layouts.items()}) for buffer in buffers
        ]
        self.numbers = sorted(numbers)
        self.slot_of = {number: self.slots[k % len(self.slots)] for k, number in enumerate(self.numbers)}
        self.coming: deque[int] = deque()  # blocks that will be asked for, in order

    def begin(self, order: Sequence[int]) -> None:
        """As PackedSource; the first copies start."""
        mark = self.copies.mark()
        for slot in self.slots:
            slot.free = mark  # `ready` stays: a pass that raised has not waited for all that it fetched
        self.coming = deque(order)
        self._fetch()

    def take(self, number: int) -> Sequence[torch.nn.Parameter]:
        """As PackedSource; later work waits for the block's copy."""
        assert self.coming[0] == number, f"block {number} is asked for, {self.coming[0]} was expected"
        slot = self.slot_of[number]
        assert slot.block == number, f"the slot of block {number} holds {slot.block}"
        self._wait_for(slot)
        return slot.weights[self.host.kinds[number]]

    def give(self, number: int) -> None:
        """As PackedSource; the next block may be copied into its slot."""
        self.slot_of[number].free = self.copies.mark()
        self.coming.popleft()
        self._fetch()

    def skip(self, number: int) -> None:
        """As PackedSource."""
        assert self.coming[0] == number
        self.coming.popleft()
        self._fetch()

    def before_replay(self, order: Sequence[int]) -> None:
        """As PackedSource: the first blocks of the order are in their slots."""
        self.begin(order)
        for slot in self.slots:
            self._wait_for(slot)

    def after_replay(self, order: Sequence[int]) -> None:
        """As PackedSource: the last blocks of the order are in their slots."""
        for number in order:
            self.slot_of[number].block = number

    @contextmanager
    def lent(self) -> Iterator[None]:
        """As PackedSource: a layer's hooks give it the slot's weights, and after it the host's again."""
        hooks: list[RemovableHandle] = []
        for number in self.numbers:
            module = self.layers[number].module
            hooks.append(module.register_forward_pre_hook(partial(self._lend, number)))
            hooks.append(module.register_forward_hook(partial(self._return, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for number in self.numbers:  # a layer that raised has not given them back
                self._put_back(number)

    def _lend(self, number: int, *_: object) -> None:
        if number == self.numbers[0]:  # a forward pass starts, perhaps after one that raised
            self.begin(self.numbers)
        put(self.layers[number].linears, self.take(number))

    def _return(self, number: int, *_: object) -> None:
        self.give(number)
        self._put_back(number)

    def _put_back(self, number: int) -> None:
        put(self.layers[number].linears, self.host.weights[number])

    def _fetch(self) -> None:
        for number in list(self.coming)[: len(self.slots)]:  # neighbours, so each has another slot
            slot = self.slot_of[number]
            if slot.block != number:
                slot.ready = slot.free
                for start, piece in self.host.pieces(number):
                    target = slot.buffer[start : start + len(piece)]
                    slot.ready = self.copies.copy(target, piece, slot.ready)
                slot.block = number

    def _wait_for(self, slot: Slot) -> None:
        if slot.ready is not None:
            self.copies.wait(slot.ready)
            slot.ready = None
