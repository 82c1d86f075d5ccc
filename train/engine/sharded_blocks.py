"""Blocks whose packed weights are shared out: each process holds an equal part of every block, and reads the others'.

Frozen weights never change, so nobody has to be asked for them: a process copies its peers' parts into its slots
whenever it needs a block, whatever they are doing. In an all-gather every process would have to take part, also where
one validates less, answers questions or was told to stop.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist

from train.engine.host_stream import HostBlocks
from train.engine.layers import DecoderLayer
from train.engine.machine_memory import HostMemory, MachineMemory, OwnMemory
from train.engine.packed_weights import ALIGNMENT, UnlikeBlocksError, packed_bytes, put
from train.engine.peer_memory import arenas, settle
from train.engine.plan import Plan

Arenas = Callable[[int], Sequence[torch.Tensor]]
"""Bytes that each process is to hold -> uint8 memory of that size of every process, in the order of ranks, as it is
seen here. All processes call it together."""


class ShardedBlocks(HostBlocks):
    """The parts that the processes hold of the packed weights of some blocks; this one's are on its device."""

    def __init__(self, wanted: Sequence[int], rank: int, num_processes: int, arenas: Arenas) -> None:
        super().__init__(wanted, OwnMemory(pin=False))
        self.rank, self.num_processes, self.arenas = rank, num_processes, arenas
        self.shards: Sequence[torch.Tensor] = ()  # of every process: a part of each block, one behind another
        self.part_bytes = 0  # of a block in one process, as much of each as of the largest

    def offload(self, number: int, layers: Sequence[DecoderLayer]) -> None:
        """Keeps this process's part of the weights of layer `number` of all decoder layers, if they are wanted and not
        here yet.

        Its modules hold room for one block from then on, and are lent their own weights when they run.
        """
        if number not in self.wanted or number in self.weights:
            return
        linears, layout = layers[number].linears, self._layout_of(number, layers)
        if not self.shards:
            self._allocate(layers, linears[0].weight.device)
        if layout.num_bytes > len(self.room):
            raise UnlikeBlocksError("its blocks are not all stored in the same way, and only such can be shared out")
        layout.check(linears)
        layout.write(linears, self.room)
        self._part(self.rank, number).copy_(self.room[self.rank * self.part_bytes :][: self.part_bytes])
        self.weights[number] = layout.views(self.room)
        put(linears, self.weights[number])

    def _allocate(self, layers: Sequence[DecoderLayer], device: torch.device) -> None:
        largest = max(sum(map(packed_bytes, layers[number].linears)) for number in self.wanted)
        self.part_bytes = part_bytes(largest, self.num_processes)
        self.shards = self.arenas(self.part_bytes * len(self.wanted))
        self.room = torch.zeros(self.part_bytes * self.num_processes, dtype=torch.uint8, device=device)

    def _part(self, rank: int, number: int) -> torch.Tensor:
        return self.shards[rank][self.part_bytes * self.wanted.index(number) :][: self.part_bytes]

    def pieces(self, number: int) -> list[tuple[int, torch.Tensor]]:
        """As HostBlocks; each process begins with its own part, so that they do not all read one at once."""
        ranks = [(self.rank + step) % len(self.shards) for step in range(len(self.shards))]
        return [(rank * self.part_bytes, self._part(rank, number)) for rank in ranks]

    def fetch(self, number: int) -> None:
        """Puts the weights of a block into the room of its modules, where they are until another's are."""
        for start, piece in self.pieces(number):
            self.room[start : start + len(piece)].copy_(piece)

    def slot_buffers(self, count: int, device: torch.device) -> list[torch.Tensor]:
        """As HostBlocks; the modules' room is one of them."""
        return [self.room, *(torch.empty_like(self.room) for _ in range(count - 1))]


class AwayBlocks:
    """The blocks of a plan whose weights are not whole on this device: in host memory, or shared out."""

    def __init__(self, host: HostBlocks, shards: ShardedBlocks | None, device: torch.device) -> None:
        self.host, self.shards, self.device = host, shards, device

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "AwayBlocks":
        """Nothing is there yet; where processes share weights or host memory, all of them make and load it together."""
        is_shared = plan.num_sharing > 1
        memory = MachineMemory(device) if is_shared else OwnMemory(pin=device.type == "cuda")
        host, shards = HostBlocks(plan.streamed, memory), None
        if plan.num_shards > 1:
            others = [number for number in range(plan.num_blocks) if number not in plan.streamed]
            shards = ShardedBlocks(others, dist.get_rank(), plan.num_shards, partial(arenas, device=device))
        return cls(host, shards, device)

    @property
    def holders(self) -> list[HostBlocks]:
        """A block is taken from the first that has it."""
        return [self.host, *([self.shards] if self.shards else [])]

    @property
    def wanted(self) -> Sequence[int]:
        """As BlockHolder."""
        return [number for holder in self.holders for number in holder.wanted]

    @property
    def memory(self) -> HostMemory:
        """As BlockHolder."""
        return self.host.memory

    def offload(self, number: int, layers: Sequence[DecoderLayer]) -> None:
        """As BlockHolder."""
        for holder in self.holders:
            holder.offload(number, layers)

    def stream(self, numbers: Sequence[int], layers: Sequence[DecoderLayer]) -> None:
        """Moves the weights of these blocks to host memory, wherever they are, if they are not there yet.

        Where processes share weights or host memory, all call it together, with the same blocks.
        """
        self.host.wanted = sorted({*self.host.wanted, *numbers})
        coming = [number for number in numbers if number not in self.host.weights]
        for number in coming:
            if self.shards and number in self.shards.weights and self.host.writes(number):
                self.shards.fetch(number)
            self.host.offload(number, layers)
        if coming:
            self.settle()

    def settle(self) -> None:
        """Returns when every process has written its part."""
        if self.shards or self.memory.is_shared:
            settle(self.device)


def part_bytes(num_bytes: int, num_processes: int) -> int:
    """What each process holds of a block of so many bytes."""
    return -(-num_bytes // (num_processes * ALIGNMENT)) * ALIGNMENT
