"""What a plan is searched for, and one combination of what can be chosen."""

from dataclasses import dataclass, replace

from train.batching import LengthStatistics
from train.config import BatchConfig
from train.engine.plan import padded, part_tokens
from train.engine.wide_heads import MIN_LENGTH
from train.memory.gpus import HOST_BANDWIDTH, Gpu
from train.memory.sizes import ModelSizes
from train.run.devices import FLASH, TRITON


@dataclass(frozen=True)
class Job:
    """What is given: a model, the lengths of its data, how the step is configured, and the GPU."""

    sizes: ModelSizes
    rows: LengthStatistics
    batch: BatchConfig
    gpu: Gpu
    num_shards: int = 1  # processes that each hold a part of every block that is not streamed
    num_local: int = 1  # processes on a machine, which share its host memory's bandwidth
    shares_host: bool = False  # they have one copy there of streamed weights and embedding, not one each
    num_shared_out: int = 0  # blocks whose parts are held already, and stay if the block is streamed later

    @property
    def num_sharing(self) -> int:
        """Processes that have one copy of what is streamed."""
        return self.num_local if self.shares_host else 1

    @property
    def bus(self) -> float:
        """Bytes/s between host memory and a GPU while all GPUs of the machine read or write it."""
        return min(self.gpu.bus, HOST_BANDWIDTH / self.num_local)

    @property
    def has_flash(self) -> bool:
        """Whether attention takes grouped heads as they are and keeps nothing but its output."""
        return self.gpu.capability >= FLASH and self.sizes.element_bytes == 2

    @property
    def has_wide_tiles(self) -> bool:
        """Whether heads are too wide for flash kernels, and most samples long enough for a backward pass in tiles."""
        return self.has_flash and self.sizes.is_wide and self.rows.mean_length >= MIN_LENGTH

    @property
    def has_triton(self) -> bool:
        """Whether our Triton kernels run; true for a CPU too, since no memory is planned for one."""
        return self.gpu.capability >= TRITON or not self.gpu.memory_bytes

    def with_sizes(self, sizes: ModelSizes) -> "Job":
        """The same of a kind of blocks; the job itself where they are all of one, which is asked a million times."""
        return self if sizes is self.sizes else replace(self, sizes=sizes)

    def num_samples(self, tokens: int) -> int:
        """Samples in a micro-batch of `tokens` that memory is counted for."""
        return self.rows.num_samples(1 if self.batch.merge == "off" else self.batch.accumulation, tokens)


@dataclass(frozen=True)
class Candidate:
    """What is chosen: one way to execute the job, whose memory (cost.py) and time (time.py) are predicted."""

    tokens: int  # the largest micro-batch, of all that share it
    num_micro_batches: float  # expected, of a step
    mean_tokens: float  # of a micro-batch, in this process
    num_streamed: int  # blocks whose packed weights come from pinned host memory
    offloads: bool  # inputs of recomputed blocks wait in pinned host memory
    uses_graphs: bool
    mlp_tile: int = 0  # tokens that go through an MLP at once; 0: all
    num_kept: int = 1  # blocks that keep their activations, the last ones
    num_cached: int = 0  # blocks that keep their dequantised weights, the first ones
    num_parts: int = 1  # processes that share each micro-batch's tokens

    @property
    def uses_host(self) -> bool:
        """Whether each micro-batch copies something to or from pinned host memory."""
        return self.offloads or self.num_streamed > 0

    @property
    def width(self) -> int:
        """Tokens of the largest micro-batch as it runs here: graphs pad it, and others have their parts of it."""
        return padded(self.tokens) if self.uses_graphs else part_tokens(self.tokens, self.num_parts)

    @property
    def is_tiled(self) -> bool:
        """Whether the largest micro-batch goes through an MLP in more than one tile."""
        return 0 < self.mlp_tile < self.width
