"""Bytes of a candidate: one function a term of the GPU's peak, and the pinned host memory.

T is the tokens of the largest micro-batch as it runs (`Candidate.width`), H, N, Q, F, G, R are `hidden`, `qkv`,
`query`, `intermediate`, `gate_up`, `padded_rank` of a block, e is `element_bytes`. Tensors are those of engine/block.py
(Activations, Block.backward) and engine/stack.py. The peak is the head, or the backward pass of the last block, while
everything that is kept for the backward pass is there; or a validation sample much longer than what is trained on.
"""

from train.engine.copies import host_bytes as pinned_bytes
from train.engine.plan import NUM_SLOTS, padded, part_tokens, spread
from train.engine.sharded_blocks import part_bytes
from train.memory.attention import attention_backward, linear_backward
from train.memory.candidate import Candidate, Job
from train.memory.kept import exchanged_width, gate_up_width, kept_of, mlp_rank, mlp_rows, routing_bytes
from train.memory.linear import FP32_BYTES
from train.memory.sizes import MixtureSizes, ModelSizes

CUBLAS_BYTES = 2**26  # bytes of cuBLAS's workspaces, which torch keeps once a stream has used them
SMALL_TENSOR_BYTES = 2**20  # up to this size torch's allocator takes a tensor from segments of their own
INPUTS_IN_FLIGHT = 3  # block inputs on their way to the host or back, at most; with a fast bus one (hidden_store.py)


def packed_weights(job: Job, c: Candidate) -> int:
    """Frozen weights of the blocks that are not streamed, as they are stored, or this process's part; and all norms."""
    num_blocks = job.sizes.num_blocks
    if job.num_shards > 1:
        return max(num_blocks - c.num_streamed, job.num_shared_out) * _part(job) + job.sizes.norm_bytes
    resident = job.sizes.packed(range(num_blocks)) - job.sizes.packed(spread(c.num_streamed, num_blocks))
    return resident + job.sizes.norm_bytes


def streaming_slots(job: Job, c: Candidate) -> int:
    """A slot holds the packed weights of one streamed block, or of one whose parts are read from all processes."""
    shared_out = job.sizes.num_blocks - c.num_streamed if job.num_shards > 1 else 0
    streamed = min(NUM_SLOTS, c.num_streamed) * job.sizes.largest_packed
    return streamed + min(NUM_SLOTS, shared_out) * job.num_shards * _part(job)


def _part(job: Job) -> int:
    """What a process holds of a block's packed weights, as much of each block as of the largest."""
    return part_bytes(job.sizes.largest_packed, job.num_shards)


def dequantised_weights(job: Job, c: Candidate) -> int:
    """One block's matrices for each cached block, and one set that the other blocks share."""
    return min(c.num_cached + 1, job.sizes.num_blocks) * job.sizes.matrix_bytes + job.sizes.shared_bytes


def head_weights(job: Job, c: Candidate) -> int:
    """The head is not quantised."""
    return job.sizes.head_bytes


def embedding(job: Job, c: Candidate) -> int:
    """The embedding, where the GPU does not read it from pinned host memory."""
    return 0 if job.sizes.embedding_on_host else job.sizes.embedding_bytes


def adapters(job: Job, c: Candidate) -> int:
    """fp32 adapters, gradients, and optimizer state that is not paged."""
    return job.sizes.adapter_bytes


def block_inputs(job: Job, c: Candidate) -> int:
    """x [T, H] of every block, or of kept blocks and those in flight; and down_proj's X A^T [T, R] of every block.

    Keys and values that blocks lend, with gradients in fp32, and what each block has of its own to read [T, P].
    """
    s = job.sizes
    num_inputs = s.num_blocks
    if c.offloads:
        num_inputs = c.num_kept + min(INPUTS_IN_FLIGHT, s.num_blocks - c.num_kept)
    width = num_inputs * s.hidden + s.num_blocks * (mlp_rank(s) + s.per_layer) + s.lent
    return c.width * (s.element_bytes * width + FP32_BYTES * s.lent)


def kept_activations(job: Job, c: Candidate) -> int:
    """What the backward pass of every kept block reads, beside its input."""
    num_blocks = job.sizes.num_blocks
    return kept_of(job, c, range(num_blocks - c.num_kept, num_blocks))


def working_memory(job: Job, c: Candidate) -> int:
    """What is there for moments: head, backward pass of a block, validation; and what libraries take."""
    fixed = CUBLAS_BYTES + without_triton(job)
    if c.uses_graphs:  # nothing else can use a graph's memory
        return eager_bytes(job, c) + block_backward(job, c) + fixed
    # a validation runs when everything that training keeps is gone
    validation = validation_bytes(job, part_tokens(job.rows.longest_validation, c.num_parts), c)
    validation -= block_inputs(job, c) + kept_activations(job, c)
    return max(head_bytes(job, c.width), block_backward(job, c), validation) + fixed


def head_bytes(job: Job, tokens: int) -> int:
    """The stack's output, its supervised rows and their gradient [T, H] each, a chunk of logits, what a trained W
    takes."""
    s = job.sizes
    chunk = min(s.chunk_bytes, tokens * s.vocabulary * s.element_bytes)
    return tokens * s.element_bytes * 3 * s.hidden + chunk + s.whole_bytes


def block_backward(job: Job, c: Candidate) -> int:
    """Gradients of the stack's output [T, H] and of the block's output [T, H + R], and what MLP or attention adds.

    Where a norm or factor is behind the two, the gradient of what they make [T, H + R] stands beside that of the sum.
    """
    s = job.sizes
    gradients = c.width * s.element_bytes * (s.hidden + (1 + s.copies_gradient) * (s.hidden + s.padded_rank))
    return gradients + max(mlp_backward(job, c), attention_backward(job, c), linear_backward(job, c))


def mlp_backward(job: Job, c: Candidate) -> int:
    """Gradient of the norm's output [T, H]; of a tile silu(gate) up [t, F], with dropout twice, and gate and up.

    In fp8 the gradient of gate and up stands beside them in e4m3 [t, G], too, with its scales [t].
    """
    s = job.sizes
    if s.mixture:
        return _mixture_backward(s, s.mixture, c)
    product = (2 if s.has_dropout else 1) * s.intermediate * s.element_bytes
    if s.in_fp8:
        product += s.gate_up + s.beside + FP32_BYTES
    of_tile = c.mlp_tile * (gate_up_width(s) * s.element_bytes + product) if c.is_tiled else c.width * product
    return c.width * s.hidden * s.element_bytes + of_tile


def _mixture_backward(s: ModelSizes, mixture: MixtureSizes, c: Candidate) -> int:
    """Gradient of the norm's output [T, H]; of each row that of its product [F], or of what it read [H], with 2 P, and
    of its factor; its adapters' gradients."""
    rows = c.width * mixture.num_chosen
    elements = c.width * s.hidden + rows * (max(s.hidden, s.intermediate) + 2 * mixture.columns)
    return s.element_bytes * elements + rows * FP32_BYTES + mixture.gradient_bytes


def without_triton(job: Job) -> int:
    """What torch's operations add: a dequantised weight [H, F]; in 16 bits two fp32 copies of a chunk of logits."""
    if job.has_triton:
        return 0
    s = job.sizes
    largest = s.mixture.weights if s.mixture else s.hidden * s.intermediate
    return s.element_bytes * largest + (4 * s.chunk_bytes if s.element_bytes == 2 else 0)


def validation_bytes(job: Job, tokens: int, c: Candidate) -> int:
    """A validation micro-batch of `tokens`: its head, or a block's forward pass of which nothing is kept."""
    if not tokens:
        return 0
    s = job.sizes
    tiled_tokens = max(0, tokens - c.mlp_tile) if c.mlp_tile else 0
    exchanged = 2 * exchanged_width(s, c.num_parts) if c.num_parts > 1 else 0  # as sent, and as it comes
    block = tokens * (validation_per_token(s) + s.element_bytes * exchanged)
    block -= tiled_tokens * (s.gate_up + s.intermediate) * s.element_bytes
    return max(head_bytes(job, tokens), block)


def validation_per_token(s: ModelSizes) -> int:
    """Bytes a token in a block's forward pass: embedded tokens and block input [2 H]; what the block makes.

    `normed`, `post_attention`, its norm's output, output [4 H]; `qkv` [N] and before its norms; attention's output
    twice [2 Q]; gate, up and their product [G + F]; the adapters' X A^T of four groups [4 R]; before norms behind [H].
    """
    made = (4 + s.norms_behind) * s.hidden + s.qkv + s.normed_qk + 2 * s.query
    made += s.copied + 3 * s.per_layer + (2 * s.query if s.is_wide else 0)
    made += 4 * s.padded_rank + mlp_rows(s) * (s.gate_up + s.intermediate)
    if s.mixture:  # the rows that go into an expert, or come out of it
        made += mlp_rows(s) * (s.hidden + 2 * s.mixture.columns)
    in_fp8 = s.intermediate + s.beside if s.in_fp8 else 0  # what down_proj reads
    softmax = s.element_bytes * (2 * s.hidden + made) + routing_bytes(s) + in_fp8
    return max(softmax, s.linear.forward_bytes(s.hidden, s.element_bytes)) if s.linear else softmax


def static_buffers(job: Job, c: Candidate) -> int:
    """What graphs read and write: hidden, output and its gradient [T, H]; cos and sin, together one more at most;
    blocks' own inputs."""
    s = job.sizes
    width = 4 * s.hidden + s.num_blocks * s.per_layer
    return width * c.width * s.element_bytes if c.uses_graphs else 0


def eager_bytes(job: Job, c: Candidate) -> int:
    """What runs eagerly beside graphs, whose memory it cannot use: the head, and a block at a time of a validation."""
    if not c.uses_graphs:
        return 0
    return max(head_bytes(job, c.width), validation_bytes(job, validation_tokens(job, c), c))


def validation_tokens(job: Job, c: Candidate) -> int:
    """Tokens of a validation micro-batch beside graphs: what the head's memory holds, or the longest sample."""
    if not c.uses_graphs:
        return 0
    in_head = head_bytes(job, c.width) // validation_per_token(job.sizes)
    usual = min(c.width, max(job.rows.longest[0], in_head))
    return max(usual, job.rows.longest_validation)


def graph_bytes(job: Job, c: Candidate) -> int:
    """The memory pool of the largest graph: what its forward pass keeps, and what its backward pass works with."""
    if not c.uses_graphs:
        return 0
    working = block_backward(job, c) + CUBLAS_BYTES + without_triton(job)
    return block_inputs(job, c) + kept_activations(job, c) + working


def fragmentation_bytes(job: Job, c: Candidate) -> int:
    """What the graphs of shorter micro-batches add to the largest one's pool.

    They reuse it, but for tensors that are small only in them: torch takes those from segments for small tensors. That
    is the share of tokens whose [tokens, H] is small; some tensors are twice as wide, so it is an upper bound.
    """
    small_tokens = SMALL_TENSOR_BYTES // (job.sizes.hidden * job.sizes.element_bytes)
    return graph_bytes(job, c) * small_tokens // c.width if c.width > small_tokens else 0


def counted_fragmentation(job: Job, c: Candidate) -> int:
    """Nothing where all samples have one length: there are no other graphs."""
    return fragmentation_bytes(job, c) if job.rows.length_deviation else 0


ADAPTERS = "adapters, gradients, optimizer"
TERMS = {
    "packed weights": packed_weights,
    "slots for streamed weights": streaming_slots,
    "dequantised weights": dequantised_weights,
    "head": head_weights,
    "embedding": embedding,
    ADAPTERS: adapters,
    "block inputs": block_inputs,
    "kept activations": kept_activations,
    "working memory": working_memory,
    "static buffers of graphs": static_buffers,
    "fragmentation between graphs": counted_fragmentation,
}


def parts(job: Job, c: Candidate) -> dict[str, int]:
    """Bytes on the GPU at the peak, by component."""
    return {name: term(job, c) for name, term in TERMS.items()}


def peak(job: Job, c: Candidate) -> int:
    """Bytes on the GPU at the worst moment."""
    return sum(term(job, c) for term in TERMS.values())


def host_bytes(job: Job, c: Candidate) -> int:
    """Pinned host memory of a machine: what is read there, one copy where its processes share it and else one each;
    and of each process the inputs of recomputed blocks."""
    s = job.sizes
    inputs = 0
    if c.offloads:
        tokens = padded(part_tokens(c.tokens, c.num_parts))
        inputs = pinned_bytes(tokens * s.hidden * s.element_bytes, s.num_blocks - c.num_kept)
    return job.num_local // job.num_sharing * read_bytes(job, c) + job.num_local * inputs


def read_bytes(job: Job, c: Candidate) -> int:
    """A copy of the streamed blocks and the embedding; shared memory is not rounded up to a power of two."""
    s = job.sizes
    streamed = spread(c.num_streamed, s.num_blocks)
    parts = [(sizes.packed_bytes, count) for count, sizes in s.by_kind(streamed)]
    parts += [(s.linear.packed_bytes, s.num_linear(streamed))] if s.linear else []
    parts += [(s.embedding_bytes, 1)] if s.embedding_on_host else []
    return sum(size * count if job.num_sharing > 1 else pinned_bytes(size, count) for size, count in parts)
