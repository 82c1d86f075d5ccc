"""What attention's backward pass takes at its largest; letters as in cost.py."""

from train.engine.delta_rule import CHUNK
from train.engine.wide_heads import tile_bytes
from train.memory.candidate import Candidate, Job
from train.memory.kept import exchanged_width, gate_up_kept, head_padding, kept_of, mlp_rank
from train.memory.linear import FP32_BYTES

DQ_ROWS = 128  # rows of fp32 dQ that the flash backward kernels add for each sample
EMPTY_SAMPLES = 8  # samples without tokens that a graph may have beside its own, at most (engine.graphs.pad)


def attention_backward(job: Job, c: Candidate) -> int:
    """Gradients of attention's output [T, Q], of q, k, v [T, N], of repeated k and v [T, 2 Q], and fp32 dQ.

    Where processes split the tokens, the output's gradient is also there for some heads of all of them. Heads beyond
    flash kernels: fp32 dK and dV, too. Heads with zeros behind them: all but dQ once more, wider. Less what the MLP had
    kept and has freed: `post_attention` [T, H], its norm's output [T, H + R], `gate_up`.
    """
    s = job.sizes
    freed = s.hidden + s.hidden + mlp_rank(s) + gate_up_kept(job, c)
    freed -= s.hidden if s.is_parallel else 0  # the gradient of what both read
    num_samples = job.num_samples(c.width * c.num_parts) + (EMPTY_SAMPLES if c.uses_graphs else 0)
    dq = (c.width + DQ_ROWS * num_samples) * s.query * FP32_BYTES * (3 if s.is_wide else 1)
    width = 3 * s.query + exchanged_width(s, c.num_parts) + (s.query if c.num_parts > 1 else 0)
    if padding := head_padding(job):
        padded = (s.query + exchanged_width(s, c.num_parts)) * (s.head_size + padding) + 2 * s.query * padding
        width += padded // s.head_size
    if job.has_wide_tiles:
        width, dq = width - 2 * s.query, _tiles_backward(job, c)
    return c.width * s.element_bytes * (width - freed) + dq


def _tiles_backward(job: Job, c: Candidate) -> int:
    """Of wide heads in tiles: gradients of each sample's q, k, v before they are joined; of one sample fp32 dK and dV,
    what a tile adds to them, and its scores."""
    s, length = job.sizes, job.rows.longest[0]
    sums = 2 * length * (s.states - s.query) * FP32_BYTES
    return c.width * s.element_bytes * s.states + sums + tile_bytes(s.query // s.head_size, length)


def linear_backward(job: Job, c: Candidate) -> int:
    """The same of the last block with linear attention: its output's gradient [T, V], and all between its projections.

    Less what the MLP had kept, and what blocks behind it had kept; where it recomputes, with what it keeps itself. Each
    sample counts as if its last chunk were full.
    """
    s, linear = job.sizes, job.sizes.linear
    if linear is None:
        return 0
    last = max(linear.numbers)
    tokens = c.width + (CHUNK - 1) * job.num_samples(c.width)
    freed = s.hidden + s.hidden + s.padded_rank + gate_up_kept(job, c)
    needed = tokens * linear.rule_bytes + c.width * s.element_bytes * (linear.value - freed)
    if last < s.num_blocks - c.num_kept:
        needed += kept_of(job, c, [last])
    return needed - kept_of(job, c, range(max(last + 1, s.num_blocks - c.num_kept), s.num_blocks))
