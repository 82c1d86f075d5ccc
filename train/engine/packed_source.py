"""Where the packed weights of the blocks are: one type for each place, behind one protocol."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch

from train.engine.copies import Copies
from train.engine.host_stream import HostBlocks, HostStream
from train.engine.layers import DecoderLayer


class PackedSource(Protocol):
    """Gives the packed weights of blocks on the device, in an order that is known ahead.

    `begin` tells the order of a forward or backward pass. Then each block in turn is either taken, and given back when
    all that reads its weights has been launched, or skipped.
    """

    def begin(self, order: Sequence[int]) -> None:
        """A pass over these blocks starts."""
        ...

    def take(self, number: int) -> Sequence[torch.nn.Parameter]:
        """The weights of the block's linear layers on the device, q, k, v, o, gate, up, down; until `give`."""
        ...

    def give(self, number: int) -> None:
        """The work launched so far is the last that reads the block's weights."""
        ...

    def skip(self, number: int) -> None:
        """The block's weights are not needed: its matrices are still in place."""
        ...

    def before_replay(self, order: Sequence[int]) -> None:
        """Restores what a CUDA graph of a pass in this order found at its capture: a replay cannot look."""
        ...

    def after_replay(self, order: Sequence[int]) -> None:
        """A CUDA graph has run a pass in this order."""
        ...

    def lent(self) -> AbstractContextManager[None]:
        """While entered, transformers can run the layers itself: each has its weights when it is called."""
        ...


class ResidentSource:
    """Weights that stay in their modules, on the device."""

    def __init__(self, layers: Sequence[DecoderLayer]) -> None:
        self.linears = [layer.linears for layer in layers]

    def begin(self, order: Sequence[int]) -> None:
        """Nothing has to come."""

    def take(self, number: int) -> Sequence[torch.nn.Parameter]:
        """The modules' own."""
        return [linear.weight for linear in self.linears[number]]

    def give(self, number: int) -> None:
        """They stay."""

    def skip(self, number: int) -> None:
        """They stay."""

    def before_replay(self, order: Sequence[int]) -> None:
        """They are where they were."""

    def after_replay(self, order: Sequence[int]) -> None:
        """They are where they were."""

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The modules have them already."""
        yield


class MixedSource:
    """Blocks with different sources; each source sees its own blocks only."""

    def __init__(self, sources: Sequence[PackedSource]) -> None:
        """`sources[number]` is that of block `number`."""
        self.sources = sources
        self.distinct = list({id(source): source for source in sources}.values())

    def begin(self, order: Sequence[int]) -> None:
        """As PackedSource."""
        for source in self.distinct:
            source.begin(self._own(source, order))

    def take(self, number: int) -> Sequence[torch.nn.Parameter]:
        """As PackedSource."""
        return self.sources[number].take(number)

    def give(self, number: int) -> None:
        """As PackedSource."""
        self.sources[number].give(number)

    def skip(self, number: int) -> None:
        """As PackedSource."""
        self.sources[number].skip(number)

    def before_replay(self, order: Sequence[int]) -> None:
        """As PackedSource."""
        for source in self.distinct:
            source.before_replay(self._own(source, order))

    def after_replay(self, order: Sequence[int]) -> None:
        """As PackedSource."""
        for source in self.distinct:
            source.after_replay(self._own(source, order))

    @contextmanager
    def lent(self) -> Iterator[None]:
        """As PackedSource."""
        with ExitStack() as stack:
            for source in self.distinct:
                stack.enter_context(source.lent())
            yield

    def _own(self, source: PackedSource, order: Sequence[int]) -> list[int]:
        return [number for number in order if self.sources[number] is source]


def packed_source(
    layers: Sequence[DecoderLayer], away: Sequence[HostBlocks], device: torch.device, copies: Callable[[], Copies]
) -> PackedSource:
    """The source of all blocks: those that one of `away` holds, the first that does, are streamed to `device`, the
    others are resident there."""
    resident = ResidentSource(layers)
    sources: list[PackedSource] = [resident] * len(layers)
    for held in away:
        numbers = [number for number in held.numbers if sources[number] is resident]
        if numbers:
            stream = HostStream(held, numbers, layers, device, copies())
            for number in numbers:
                sources[number] = stream
    return MixedSource(sources) if any(source is not resident for source in sources) else resident
