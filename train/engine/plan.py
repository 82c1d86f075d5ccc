"""How a run is executed: data, which memory/search.py chooses and the engine follows."""

from dataclasses import dataclass

from train.batching import MicroBatchShape
from train.config import MemoryConfig


@dataclass(frozen=True)
class Plan:
    """How the run is executed.

    What is computed stays the same, up to the order in which sums are rounded and, where there is dropout, which masks
    are drawn for which pass. So a resumed run keeps its `micro_batch_shape`.
    """

    is_fused: bool  # on our own engine
    merges: bool  # passes are put together, or cut, to hold `micro_batch_tokens` at most
    micro_batch_tokens: int  # what memory was counted for; 0: padded passes
    num_blocks: int
    num_kept: int  # blocks whose activations are kept, the last ones
    num_cached: int = 0  # blocks whose dequantised weights are kept, the first ones
    streamed: tuple[int, ...] = ()  # blocks whose weights are in host memory
    needs_host: bool = True  # nothing that leaves the host alone fits
    offloads_inputs: bool = False  # inputs of blocks that are computed again are in host memory
    uses_graphs: bool = False
    mlp_tile: int = 0  # tokens that go through an MLP together; 0: all
    num_samples: int = 1  # in a pass, that memory was counted for
    graph_bytes: int = 0  # what the largest recorded graph keeps
    fragmentation_bytes: int = 0  # what all of other lengths take beside it; recorded only where that is left
    eager_bytes: int = 0  # what is launched beside them: the head, a validation
    validation_tokens: int = 0  # of a validation's pass beside graphs at most; 0: there are no graphs
    parts: tuple[tuple[str, int], ...] = ()  # predicted bytes on the device at the worst moment, by component
    host_bytes: int = 0  # page-locked
    seconds: float = 0.0  # predicted, of an optimizer step
    traffic_bytes: int = 0  # of weights to the device, in a pass forward and backward

    @property
    def micro_batch_shape(self) -> MicroBatchShape:
        """How a step is cut."""
        return MicroBatchShape(self.micro_batch_tokens, self.mlp_tile)

    @property
    def peak_bytes(self) -> int:
        """Predicted; 0 where no memory is counted (CPU, reference engine)."""
        return sum(num_bytes for _, num_bytes in self.parts)

    def __str__(self) -> str:
        recomputed = self.num_blocks - self.num_kept
        text = f"{self.num_kept} of {self.num_blocks} blocks keep their activations"
        text += f", {recomputed} recompute them" if recomputed else ""
        text += f"; {self.num_cached} keep dequantised weights" if self.num_cached else ""
        if self.streamed:
            text += f"; {len(self.streamed)} blocks' weights are streamed from host memory"
            text += "" if self.needs_host else ", which is faster (it would fit without)"
        elif self.parts:
            text += "; all weights are on the GPU, nothing is streamed"
        text += "; inputs of blocks in host memory" if self.offloads_inputs else ""
        text += f"; MLPs in tiles of {self.mlp_tile:,} tokens" if self.mlp_tile else ""
        text += f"; predicted peak {self.peak_bytes / 2**30:.2f} GiB" if self.parts else ""
        return text + (f", {self.host_bytes / 2**30:.1f} GiB of host memory" if self.host_bytes else "")


def padded(tokens: int) -> int:
    """Tokens that a recorded pass of so many has."""
    return -(-tokens // GRAPH_STEP) * GRAPH_STEP


GRAPH_STEP = 128  # recorded passes are padded to a multiple of so many tokens

NUM_SLOTS = 2  # device buffers of blocks from the host: one is free again as soon as its block is dequantised


def reference_plan(num_blocks: int, memory: MemoryConfig) -> Plan:
    """transformers merges no passes, and its blocks recompute all or nothing."""
    kept = num_blocks if memory.checkpointing in ("none", 0) else 0
    return Plan(is_fused=False, merges=False, micro_batch_tokens=0, num_blocks=num_blocks, num_kept=kept)


def spread(count: int, total: int) -> tuple[int, ...]:
    """So many of `total` blocks, about evenly: the bus then has the time of the others as well.

    Those of a smaller count are among those of a larger one: a plan that needs less memory moves some more.
    """
    width = max(1, (total - 1).bit_length())
    order = sorted(range(total), key=lambda i: int(f"{total - 1 - i:0{width}b}"[::-1], 2))
    return tuple(sorted(order[:count]))
