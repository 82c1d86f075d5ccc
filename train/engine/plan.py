"""How a run is executed: data, which memory/search.py chooses and the engine follows."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from train.batching import MicroBatchShape
from train.config import MemoryConfig

GRAPH_STEP = 128  # tokens; micro-batches that run as CUDA graphs are padded to a multiple of it
NUM_SLOTS = 2  # device buffers for streamed blocks: a slot is free again as soon as its block is dequantised


@dataclass(frozen=True)
class Plan:
    """How the run is executed.

    Plans differ only in the order in which sums are rounded and, with dropout, in which masks a sample gets. A resumed
    run keeps its `micro_batch_shape` for that reason.
    """

    is_fused: bool  # on the fused engine; else on transformers and PEFT
    merges: bool  # micro-batches are merged, or split, to hold at most `micro_batch_tokens`
    micro_batch_tokens: int  # the largest micro-batch that memory is counted for; 0: as configured, padded
    num_blocks: int  # decoder blocks of the model
    num_kept: int  # the last so many blocks keep their activations, the others recompute them
    products: Literal["bf16", "fp8"] = "bf16"  # in which those of frozen weights run; bf16: the compute type
    num_cached: int = 0  # the first so many blocks keep their dequantised weights
    streamed: tuple[int, ...] = ()  # numbers of the blocks whose packed weights are streamed from pinned host memory
    num_parts: int = 1  # processes that compute a part of each micro-batch's tokens; its numbers here are of the whole
    num_shards: int = 1  # processes that each hold a part of every block that is not streamed
    num_sharing: int = 1  # processes of a machine that have one copy of what is streamed, in its host memory
    needs_host: bool = True  # nothing that leaves host memory alone fits
    offloads_inputs: bool = False  # the inputs of recomputed blocks wait in pinned host memory
    uses_graphs: bool = False  # training passes are captured as CUDA graphs and replayed
    num_linear: int = 0  # blocks with linear attention, whose passes are not captured
    mlp_tile: int = 0  # tokens that go through an MLP at once; 0: all
    num_samples: int = 1  # samples in a micro-batch that memory is counted for
    pair_cost: float = 0.0  # of attention for a pair of tokens, beside a token's; by it samples are dealt to processes
    longest_sample: int = 0  # tokens that graphs count on no sample exceeding; 0: each may be the whole micro-batch
    graph_bytes: int = 0  # memory pool of the largest graph; this and the next three are 0 without graphs
    fragmentation_bytes: int = 0  # what the graphs of all other lengths add to it; they are captured only where it fits
    eager_bytes: int = 0  # reserved for what runs eagerly beside graphs: the head, a validation
    validation_tokens: int = 0  # tokens of a validation micro-batch beside graphs, at most
    parts: tuple[tuple[str, int], ...] = ()  # predicted bytes on the GPU at the peak, by component; empty: no budget
    host_bytes: int = 0  # pinned host memory, of all processes of a machine
    seconds: float = 0.0  # predicted, of an optimizer step
    traffic_bytes: int = 0  # weights copied to the GPU for one micro-batch, forward and backward

    @property
    def micro_batch_shape(self) -> MicroBatchShape:
        """What a checkpoint records of the plan and a resumed run keeps."""
        return MicroBatchShape(self.micro_batch_tokens, self.mlp_tile)

    @property
    def peak_bytes(self) -> int:
        """Predicted peak on the GPU; 0 where no memory is counted (CPU, reference engine)."""
        return sum(num_bytes for _, num_bytes in self.parts)

    def __str__(self) -> str:
        num_recomputed = self.num_blocks - self.num_kept
        text = f"{self.num_kept} of {self.num_blocks} blocks keep their activations"
        text += f", {num_recomputed} recompute them" if num_recomputed else ""
        text += "; products of frozen weights in fp8" if self.products == "fp8" else ""
        text += f"; {self.num_cached} keep dequantised weights" if self.num_cached else ""
        if self.streamed:
            text += f"; {len(self.streamed)} blocks' weights are streamed from host memory"
            text += f" (one copy for {self.num_sharing} processes)" if self.num_sharing > 1 else ""
            text += "" if self.needs_host else ", which is predicted to be faster (it would fit without)"
        elif self.parts and self.num_shards == 1:
            text += "; all weights are on the GPU, nothing is streamed"
        if self.num_shards > 1 and len(self.streamed) < self.num_blocks:
            rest = "the other blocks" if self.streamed else "all blocks"
            text += f"; each of {self.num_shards} GPUs holds a part of the weights of {rest}"
        text += f"; a micro-batch's tokens are split over {self.num_parts} GPUs" if self.num_parts > 1 else ""
        text += f"; {self.num_linear} have linear attention, so there are no CUDA graphs" if self.num_linear else ""
        text += "; block inputs are offloaded to host memory" if self.offloads_inputs else ""
        text += f"; MLPs run in tiles of {self.mlp_tile:,} tokens" if self.mlp_tile else ""
        text += f"; predicted peak {self.peak_bytes / 2**30:.2f} GiB" if self.parts else ""
        return text + (f", {self.host_bytes / 2**30:.1f} GiB of host memory" if self.host_bytes else "")


def unshared(plan: Plan, memory: MemoryConfig) -> str:
    """Why memory.shard shares nothing out, and what makes it; empty where it does, or is not asked for."""
    if plan.num_shards == 1 or len(plan.streamed) < plan.num_blocks:
        return ""
    if memory.offload == "stream":
        return "memory.shard shares nothing out, as --memory.offload stream streams all blocks; leave one of them out"
    if plan.needs_host:
        return (
            "memory.shard shares nothing out: parts of all blocks do not fit on the GPUs, and streaming all is "
            "predicted to be as fast as sharing some out"
        )
    return (
        "memory.shard shares nothing out: streaming all blocks is predicted to be faster; --memory.offload none shares "
        "them out all the same"
    )


def padded(tokens: int) -> int:
    """Tokens of a micro-batch of `tokens` when it runs as a CUDA graph."""
    return -(-tokens // GRAPH_STEP) * GRAPH_STEP


def part_tokens(num_tokens: int, num_parts: int) -> int:
    """Tokens of a part of a micro-batch that so many processes share."""
    return -(-num_tokens // num_parts)


def reference_plan(num_blocks: int, memory: MemoryConfig) -> Plan:
    """The plan of the reference engine: transformers merges nothing, and recomputes all blocks or none."""
    num_kept = num_blocks if memory.checkpointing in ("none", 0) else 0
    return Plan(is_fused=False, merges=False, micro_batch_tokens=0, num_blocks=num_blocks, num_kept=num_kept)


@cache
def spread(count: int, total: int) -> tuple[int, ...]:
    """The numbers of `count` of `total` blocks, about evenly spaced, so that each copy has several blocks' time.

    The blocks of a smaller count are among those of a larger one: a plan that streams more blocks moves only those.
    """
    width = max(1, (total - 1).bit_length())
    order = sorted(range(total), key=lambda i: int(f"{total - 1 - i:0{width}b}"[::-1], 2))
    return tuple(sorted(order[:count]))
