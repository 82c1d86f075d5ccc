"""What fits: which activations and weights are kept and how many tokens one pass holds, from sizes alone."""

import math
from dataclasses import dataclass, replace

from train.config import BatchConfig, MemoryConfig
from train.loss import CHUNK_BYTES

MARGIN = 0.92  # of the budget is planned with; the rest is the allocator's waste
# A pass costs as much as this many tokens more than it has. An estimate: dequantising Llama-3.1-8B twice takes an H200
# 11 ms, in which it trains 200 tokens, and small products lose as much again and more.
PASS_TOKENS = 600
# Passes of so many tokens at most run as CUDA graphs (engine.graphs): beyond, the GPU is slower than the host. Their
# memory is theirs alone.
GRAPH_TOKENS = 4096
MOST_MERGED = 16384  # products are not faster beyond
RECOMPUTED_SHARE = 0.35  # of a block's time is added where it is computed again


@dataclass(frozen=True)
class BlockSizes:
    """Widths of one decoder block, in elements, and of what stands around the blocks."""

    num_blocks: int
    hidden: int
    heads: int  # outputs of q_proj, k_proj and v_proj together
    query: int  # inputs of o_proj
    inner: int  # inputs of down_proj
    extra: int  # columns that the adapters add to a product, at most
    element_bytes: int
    matrix_bytes: int  # one block's weights in the compute type


@dataclass(frozen=True)
class Rows:
    """The samples' lengths, as far as the plan needs them."""

    longest_pass: int  # tokens that one pass of `per_device` rows holds at most
    mean_pass: float
    deviation: float  # standard deviation of a pass's tokens

    def tokens(self, merged: int) -> int:
        """Tokens that so many passes together seldom exceed (three deviations); where they do, they stay apart."""
        usual = merged * self.mean_pass + 3 * math.sqrt(merged) * self.deviation
        return max(self.longest_pass, min(merged * self.longest_pass, math.ceil(usual)))


@dataclass(frozen=True)
class Plan:
    """How the run is executed.

    What is computed stays the same, up to the order in which sums are rounded and, where there is dropout, which masks
    are drawn for which pass. So a resumed run keeps its `tokens_per_pass`.
    """

    merges: bool  # passes are put together while they hold `tokens_per_pass` at most
    tokens_per_pass: int  # what memory was counted for (filling and validation may add some); 0: padded passes
    num_blocks: int
    num_kept: int  # blocks whose activations are kept, the last ones
    num_cached: int  # blocks whose dequantised weights are kept, the first ones
    peak_bytes: int  # predicted; 0 where no memory is counted (CPU)

    def __str__(self) -> str:
        recomputed = self.num_blocks - self.num_kept
        text = f"{self.num_kept} of {self.num_blocks} blocks keep their activations"
        text += f", {recomputed} recompute them" if recomputed else ""
        text += f"; {self.num_cached} keep dequantised weights" if self.num_cached else ""
        return text + (
            f"; predicted peak {self.peak_bytes / 2**30:.1f} GiB beside the model" if self.peak_bytes else ""
        )


def peak_bytes(sizes: BlockSizes, num_tokens: int, num_kept: int, num_cached: int) -> int:
    """Bytes beside the model itself at the worst moment of a pass of `num_tokens` through the fused engine.

    The candidates are the head, and the backward pass of the last block, while all that is kept stands; and a block
    that is computed again once the kept ones are gone. Terms follow engine.block.Activations and Block.backward.
    """
    s, wide = sizes, sizes.hidden + sizes.extra
    kept_input = s.element_bytes * (s.hidden + s.extra)
    activations = s.element_bytes * (2 * wide + s.heads + s.query + s.hidden + 2 * s.inner + 3 * s.extra)
    activations += 4 * s.query // 64 + 8  # attention's log sums and the norms' scales, fp32
    largest = max(s.inner, 2 * s.query + s.heads)
    workspace = s.element_bytes * (wide + s.hidden + largest) + 4 * s.query  # attention sums dQ in fp32
    head = num_tokens * s.element_bytes * 3 * s.hidden + CHUNK_BYTES
    backward = num_tokens * workspace
    matrices = min(num_cached + 1, s.num_blocks) * s.matrix_bytes
    standing = num_tokens * s.num_blocks * kept_input + matrices
    is_graph = num_tokens <= GRAPH_TOKENS
    if is_graph:
        standing += num_tokens * s.element_bytes * 4 * s.hidden
    last = num_tokens * max(1, num_kept) * activations + (head + backward if is_graph else max(head, backward))
    again = num_tokens * activations + backward + (head if is_graph else 0) if num_kept < s.num_blocks else 0
    return standing + max(last, again)


def make_plan(
    sizes: BlockSizes,
    rows: Rows,
    batch: BatchConfig,
    memory: MemoryConfig,
    free_bytes: int | None,
    saved_tokens: int = 0,
) -> Plan:
    """The plan with the least predicted time whose peak fits into `free_bytes` beside the model (None: no limit).

    Where nothing fits, the smallest plan: the allocator then says what was missing. A run that is resumed gives the
    `tokens_per_pass` that it was started with; 0 is a fresh one.
    """
    room = None if free_bytes is None else int(free_bytes * MARGIN)
    best, least = None, float("inf")
    merges = batch.merge == "auto"
    for merged in range(1, batch.accumulation + 1 if merges and not saved_tokens else 2):
        tokens = saved_tokens or rows.tokens(merged)
        if merged > 1 and tokens > MOST_MERGED:
            break
        kept = _most_kept(sizes, tokens, memory, room)
        peak = peak_bytes(sizes, tokens, kept, 0)
        if best is not None and room is not None and peak > room:
            break
        num_passes = batch.accumulation if merged == 1 else max(1.0, batch.accumulation * rows.mean_pass / tokens)
        recomputed = RECOMPUTED_SHARE * (sizes.num_blocks - kept) / sizes.num_blocks
        cost = num_passes * PASS_TOKENS + batch.accumulation * rows.mean_pass * (1 + recomputed)
        if cost < least:
            best = Plan(merges, tokens, sizes.num_blocks, kept, 0, 0 if room is None else peak)
            least = cost
    assert best is not None
    # weights give less for their memory than activations, so they are kept only where all of those are
    if room is None or best.num_kept < sizes.num_blocks:
        return best
    num_cached = max(0, min(sizes.num_blocks, (room - best.peak_bytes) // sizes.matrix_bytes))
    peak = peak_bytes(sizes, best.tokens_per_pass, best.num_kept, num_cached)
    return replace(best, num_cached=num_cached, peak_bytes=peak)


def reference_plan(num_blocks: int, memory: MemoryConfig) -> Plan:
    """transformers merges no passes, and its blocks recompute all or nothing."""
    kept = num_blocks if memory.checkpointing in ("none", 0) else 0
    return Plan(merges=False, tokens_per_pass=0, num_blocks=num_blocks, num_kept=kept, num_cached=0, peak_bytes=0)


def _most_kept(sizes: BlockSizes, num_tokens: int, memory: MemoryConfig, room: int | None) -> int:
    """Blocks that keep their activations; the last always does, its backward pass follows at once."""
    if memory.checkpointing == "full":
        return 1
    if memory.checkpointing == "none":
        return sizes.num_blocks
    if memory.checkpointing != "auto":
        return max(1, sizes.num_blocks - memory.checkpointing)
    kept = sizes.num_blocks
    while room is not None and kept > 1 and peak_bytes(sizes, num_tokens, kept, 0) > room:
        kept -= 1
    return kept
