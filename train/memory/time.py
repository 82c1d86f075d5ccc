"""Seconds of a candidate's optimizer step: one function a term.

Of one block and a micro-batch of mean length, in each direction, the slowest decides: the GPU that computes, the host
that launches its kernels, or the bus that brings weights and block inputs. Rates are the GPU's sustained ones.
"""

from train.memory.candidate import Candidate, Job
from train.memory.kept import exchanged_width

# Tokens. Short products are less efficient: n tokens take as long as n + 155 at the full rate (fitted to six steps)
LATENCY_TOKENS = 155
# How often a block's activations are read or written between its products, forward (or recomputing) and backward, and
# the seconds a block and direction in which kernels are too small to fill the GPU. Neither was measured alone: with
# both, steps of an 8B are within 10 % of the prediction; short steps of small models take 10 to 29 % longer
ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD = 3, 9
SMALL_KERNEL_SECONDS = 0.0002
# Norms of query and key heads read them, keep a copy and write them; their backward reads two and writes one. Logits
# are written, read twice and written again. With both, packed steps of 19 shapes are within 5 % (results/families.json)
HEAD_NORM_PASSES, LOGIT_PASSES = 3, 4
# How often linear attention moves what torch code makes between its projections. Fitted to one step of Qwen3.5-9B with
# flash-linear-attention on an H200; of torch code nothing was measured
LINEAR_FORWARD, LINEAR_BACKWARD = 2.8, 9.3
# Products of experts reach this share of the rate of one large product, less what an expert's last tile of rows lacks
# (half of 128 on average) and what each tile takes before and behind its sum, in elements of that. Of the rows of
# experts [F] and [H] are read or written between products, forward and backward; their adapters (fp32) and gradients
# likewise, in bytes of gradients
GROUPED_SHARE, MISSING_ROWS, TILE_ELEMENTS = 0.81, 64, 480
ROWS_FORWARD, ROWS_BACKWARD = (3, 1), (9, 3)
ADAPTERS_FORWARD, ADAPTERS_BACKWARD = 1.5, 6.5
# Attention of heads beyond flash kernels, forward by SDPA and backward by products in tiles, reaches this share of the
# rate of one large product with many heads, and half of it with WIDE_HEADS (on an H200 74 TFLOP/s with 8, 102 with 32)
WIDE_SHARE, WIDE_HEADS = 0.164, 4.8
# fp8 products beside 16-bit ones (1,400 to 16,384 tokens on an H200: 1.7 to 2.1 times); what they read is written in
# e4m3 before them
FP8_GAIN = 1.9
ADAPTER_PASSES = 3  # of fp32 adapters and their gradients, in a step: norm, clipping, AdamW
# Seconds in which the host launches the kernels of one block (measured: 272 ms for 32 blocks that all recompute)
LAUNCH_FORWARD, LAUNCH_BACKWARD = 0.0024, 0.0037
LAUNCH_MIXTURE = 1.5  # times as many, about, where the MLP is a mixture (454 ms for 48 blocks that recompute nothing)
# Copies beside the computation slow it by these shares (measured: 1.9 % with all blocks streamed)
STREAMING_SLOWDOWN, OFFLOADING_SLOWDOWN = 0.02, 0.01


def step_seconds(job: Job, c: Candidate) -> float:
    """All micro-batches of a step: every block forward and backward, and the head."""
    kinds = [(len(kind.numbers), kind.sizes) for kind in job.sizes.kinds] or [(job.sizes.num_blocks, job.sizes)]
    blocks = sum(count * block_seconds(job.with_sizes(sizes), c) for count, sizes in kinds)
    return c.num_micro_batches * (blocks * slowdown(job, c) + head(job, c)) + update(job)


def block_seconds(job: Job, c: Candidate) -> float:
    """A block forward and backward."""
    forward_seconds = max(
        forward(job, c), forward_launches(job, c), weights_bus(job, c), inputs_bus(job, c), peers(job, c)
    )
    recomputing = recomputed_share(job, c) * recomputation(job, c)
    # to the host and from it the bus moves at full rate each; weights and inputs that come back share one direction
    backward_seconds = max(
        backward(job, c) + recomputing,
        backward_launches(job, c),
        weights_bus(job, c) + inputs_bus(job, c),
        peers(job, c),
    )
    return forward_seconds + backward_seconds


def update(job: Job) -> float:
    """The optimizer's part: of adapters on experts; others are too small to count (0.3 ms for an 8B)."""
    return ADAPTER_PASSES * job.sizes.adapter_bytes / job.gpu.bandwidth if job.sizes.mixture else 0.0


def recomputed_share(job: Job, c: Candidate) -> float:
    """The share of blocks that recompute their activations."""
    return (job.sizes.num_blocks - c.num_kept) / job.sizes.num_blocks


def streamed_share(job: Job, c: Candidate) -> float:
    """The share of blocks whose weights are streamed."""
    return c.num_streamed / job.sizes.num_blocks


def linear_share(job: Job) -> float:
    """The share of blocks that have linear attention."""
    s = job.sizes
    return s.num_linear(range(s.num_blocks)) / s.num_blocks


def linear_rule(job: Job, c: Candidate, times: float) -> float:
    """What lies between linear attention's projections, on the mean of all blocks."""
    linear = job.sizes.linear
    return linear_share(job) * times * linear.rule_bytes * c.mean_tokens / job.gpu.bandwidth if linear else 0.0


def products(job: Job, c: Candidate, flops_per_token: float) -> float:
    """Matrix products, and attention's."""
    return flops_per_token / (job.gpu.flops / (c.mean_tokens + LATENCY_TOKENS))


def num_weights(job: Job, c: Candidate) -> float:
    """Weights of a block that a token is multiplied with, and the adapters' columns; 2 FLOP each. Those of experts
    count as many as take their time."""
    s = job.sizes
    of_experts = s.mixture.active_weights / grouped_share(job, c) - s.mixture.weights if s.mixture else 0
    return s.matrix_bytes / s.element_bytes + of_experts


def grouped_share(job: Job, c: Candidate) -> float:
    """Of the rate of one large product, what those of experts reach, forward and backward together.

    They sum over H and F forward, 2 F and H backward, for gate and up, which are two thirds of the weights, and down.
    """
    s = job.sizes
    assert s.mixture is not None
    rows = c.mean_tokens * s.mixture.num_chosen / s.mixture.num_experts
    per_element = (2 / s.hidden + 1 / s.intermediate + 1 / s.intermediate + 1 / s.hidden) / 6
    return GROUPED_SHARE / ((1 + MISSING_ROWS / rows) * (1 + TILE_ELEMENTS * per_element))


def attention_flops(job: Job) -> float:
    """Causal attention forward, a token: two products of 2 Q FLOP with half of the sample's tokens on average.

    Of a hybrid's blocks, some of which have linear attention, the mean. Of wide heads as many as take their time.
    """
    s = job.sizes
    flops = 2 * s.query * job.rows.mean_length * (1 - linear_share(job))
    return flops / WIDE_SHARE * (1 + WIDE_HEADS * s.head_size / s.query) if s.is_wide else flops


def elementwise(job: Job, c: Candidate, times: int) -> float:
    """Norms, rotation, SwiGLU and residuals read or write the block's activations `times` times."""
    s = job.sizes
    width = (3 + s.norms_behind) * s.hidden + s.qkv + s.query + (0 if s.mixture else s.gate_up)
    width = times * width + HEAD_NORM_PASSES * s.normed_qk
    return s.element_bytes * width * c.mean_tokens / job.gpu.bandwidth


def experts(job: Job, c: Candidate, rows: tuple[int, int], adapters: float) -> float:
    """What a mixture reads and writes between its products: gates and sums of its rows, adapters and gradients."""
    s = job.sizes
    if s.mixture is None:
        return 0.0
    elements = s.mixture.num_chosen * (rows[0] * s.intermediate + rows[1] * s.hidden)
    return (c.mean_tokens * s.element_bytes * elements + adapters * s.mixture.gradient_bytes) / job.gpu.bandwidth


def dequantisation(job: Job, c: Candidate, share: float = 1.0) -> float:
    """Packed weights are read and matrices written, of blocks that are not cached; in fp8 a `share` of them."""
    s = job.sizes
    written = s.matrix_bytes * (share if s.in_fp8 else 1.0)
    return (written + s.packed_bytes) * (1 - c.num_cached / s.num_blocks) / job.gpu.bandwidth


def frozen_flops(job: Job, weights: float) -> float:
    """FLOP a token of the product with so many weights, in those of 16 bits that take as long."""
    return 2 * weights / (FP8_GAIN if job.sizes.in_fp8 else 1)


def around_fp8(job: Job, c: Candidate, is_backward: bool) -> float:
    """What fp8 products read is written in e4m3: 2 bytes read, 1 written."""
    s = job.sizes
    if not s.in_fp8:
        return 0.0
    read = s.qkv + s.gate_up if is_backward else s.query + s.intermediate
    return c.mean_tokens * 3 * (2 * s.hidden + read) / job.gpu.bandwidth


def forward(job: Job, c: Candidate) -> float:
    """A block's forward pass on the GPU: 2 FLOP a weight and token."""
    computing = products(job, c, frozen_flops(job, num_weights(job, c)) + attention_flops(job))
    moving = elementwise(job, c, ELEMENTWISE_FORWARD) + dequantisation(job, c, 0.5) + around_fp8(job, c, False)
    moving += experts(job, c, ROWS_FORWARD, ADAPTERS_FORWARD) + linear_rule(job, c, LINEAR_FORWARD)
    return computing + moving + exchange(job, c) + SMALL_KERNEL_SECONDS


def backward(job: Job, c: Candidate) -> float:
    """A block's backward pass on the GPU: input gradients alone, 2 FLOP a weight; attention 2.5 times its forward.

    A tiled MLP computes gate and up (G weights a hidden element) again, also in kept blocks.
    """
    s = job.sizes
    computing = products(job, c, frozen_flops(job, num_weights(job, c)) + 2.5 * attention_flops(job))
    moving = elementwise(job, c, ELEMENTWISE_BACKWARD) + around_fp8(job, c, True)
    moving += dequantisation(job, c, 0.5 + 0.5 * recomputed_share(job, c))
    moving += experts(job, c, ROWS_BACKWARD, ADAPTERS_BACKWARD) + linear_rule(job, c, LINEAR_BACKWARD)
    seconds = computing + moving + exchange(job, c) + SMALL_KERNEL_SECONDS
    if c.is_tiled:
        seconds += c.num_kept / s.num_blocks * products(job, c, frozen_flops(job, s.hidden * s.gate_up))
    return seconds


def recomputation(job: Job, c: Candidate) -> float:
    """A block's second forward pass; without down_proj (H F weights), unless a norm behind it reads its output."""
    s = job.sizes
    skipped = 0 if s.norms_behind else s.hidden * s.intermediate
    if s.mixture:
        skipped *= s.mixture.num_chosen / grouped_share(job, c)
    computing = products(job, c, frozen_flops(job, num_weights(job, c) - skipped) + attention_flops(job))
    moving = elementwise(job, c, ELEMENTWISE_FORWARD) + linear_rule(job, c, LINEAR_FORWARD)
    return computing + moving + around_fp8(job, c, False) + exchange(job, c)


def forward_launches(job: Job, c: Candidate) -> float:
    """The host launches a block's kernels, unless a graph replays them."""
    seconds = job.gpu.launch_time * LAUNCH_FORWARD * (LAUNCH_MIXTURE if job.sizes.mixture else 1)
    return 0.0 if c.uses_graphs else seconds


def backward_launches(job: Job, c: Candidate) -> float:
    """The same backward, with the kernels of blocks that are recomputed."""
    if c.uses_graphs:
        return 0.0
    return forward_launches(job, c) * (LAUNCH_BACKWARD / LAUNCH_FORWARD + recomputed_share(job, c))


def weights_bus(job: Job, c: Candidate) -> float:
    """Streamed weights come to the GPU, in either direction of the pass."""
    return streamed_share(job, c) * job.sizes.largest_packed / job.bus


def peers(job: Job, c: Candidate) -> float:
    """Parts of a block that other GPUs hold are read from them."""
    share = (1 - streamed_share(job, c)) * (job.num_shards - 1) / job.num_shards
    return share * job.sizes.largest_packed / job.gpu.link


def exchange(job: Job, c: Candidate) -> float:
    """Processes that split the tokens send all but their own share of queries, keys, values and attention's output."""
    if c.num_parts == 1:
        return 0.0
    width = (exchanged_width(job.sizes, c.num_parts) + job.sizes.query) * (c.num_parts - 1) / c.num_parts
    return c.mean_tokens * job.sizes.element_bytes * width / job.gpu.link


def inputs_bus(job: Job, c: Candidate) -> float:
    """Offloaded block inputs [T, H] go to the host in the forward pass and come back in the backward pass."""
    if not c.offloads:
        return 0.0
    s = job.sizes
    return recomputed_share(job, c) * c.mean_tokens * s.element_bytes * s.hidden / job.bus


def slowdown(job: Job, c: Candidate) -> float:
    """Copies take memory bandwidth from the computation."""
    return 1 + STREAMING_SLOWDOWN * streamed_share(job, c) + OFFLOADING_SLOWDOWN * c.offloads


def head(job: Job, c: Candidate) -> float:
    """Logits and the gradient of their input: 2 FLOP a weight each; and the cross entropy between them."""
    s = job.sizes
    entropy = LOGIT_PASSES * s.element_bytes * s.vocabulary * c.mean_tokens / job.gpu.bandwidth
    return products(job, c, 4 * s.head_bytes / s.element_bytes) + entropy
