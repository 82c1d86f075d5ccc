"""What a block keeps of a token for its backward pass; letters as in cost.py."""

from collections.abc import Sequence

from train.engine.attention import FLASH_MULTIPLE
from train.engine.split_attention import num_repeats
from train.memory.candidate import Candidate, Job
from train.memory.linear import FP32_BYTES
from train.memory.sizes import ModelSizes

MIN_HEAD_SIZE = 64  # elements of an attention head, at least


def kept_of(job: Job, c: Candidate, numbers: Sequence[int]) -> int:
    """What these blocks keep."""
    s, num_linear = job.sizes, job.sizes.num_linear(numbers)
    bytes_per_token = sum(count * _kept_per_token(job.with_sizes(kind), c) for count, kind in s.by_kind(numbers))
    if s.linear:  # two norms' rstd in fp32
        width = s.linear.kept(s.hidden, s.padded_rank) + gate_up_kept(job, c)
        bytes_per_token += num_linear * (s.element_bytes * width + 2 * FP32_BYTES)
    return c.width * bytes_per_token


def _kept_per_token(job: Job, c: Candidate) -> int:
    s = job.sizes
    width = s.hidden + s.padded_rank  # `normed`
    width += s.qkv + s.padded_rank + s.normed_qk  # `qkv`, `raw_qk`
    width += s.copied  # `projected` beside `qkv`
    width += s.query + s.padded_rank  # `attended`, `low_rank`
    width += s.hidden  # `post_attention`
    width += s.hidden + mlp_rank(s)  # what the MLP reads
    width += s.norms_behind * s.hidden  # `attention_branch`, `mlp_branch`, that of own inputs
    width += s.hidden + 3 * s.per_layer + 2 * s.padded_rank if s.per_layer else 0  # `read`, `gate_up`, `product`
    width += gate_up_kept(job, c)
    if c.num_parts > 1:  # what came of other processes for attention, and its output in both orders
        width += exchanged_width(s, c.num_parts) + s.query
    if not job.has_flash or s.is_wide:
        # the outputs of single samples; keys and values repeated for all heads
        width += s.query if job.has_wide_tiles else 3 * s.query
        width += 2 * s.query if s.has_sinks else 0  # queries with an element more, a half more for kernels' alignment
    if padding := head_padding(job):  # copies of query, key and value, and a wider output
        width += (exchanged_width(s, c.num_parts) * (s.head_size + padding) + s.query * padding) // s.head_size
    # fp32: attention's log-sum-exp a head, the norms' rstd a head (Qwen3) and two a token, and of norms behind
    scales = FP32_BYTES * (s.query + s.normed_qk) // MIN_HEAD_SIZE + (2 + s.norms_behind) * FP32_BYTES
    return s.element_bytes * width + scales + routing_bytes(s)


def head_padding(job: Job) -> int:
    """Elements that flash kernels want behind those of a head, which attention.py puts there."""
    s = job.sizes
    return -s.head_size % FLASH_MULTIPLE if job.has_flash and not s.is_wide else 0


def exchanged_width(s: ModelSizes, num_parts: int) -> int:
    """Queries, keys and values of a token that attention reads, here or in another process; too few heads are
    repeated."""
    return s.query + num_repeats(s.num_key_value, num_parts) * (s.states - s.query)


def mlp_rank(s: ModelSizes) -> int:
    """The adapters' columns [T, R] before and behind an MLP; a mixture makes them again, of its sorted rows."""
    return 0 if s.mixture else s.padded_rank


def mlp_rows(s: ModelSizes) -> int:
    """What an MLP computes for a token: itself, or a row for each of its experts."""
    return s.mixture.num_chosen if s.mixture else 1


def routing_bytes(s: ModelSizes) -> int:
    """Bytes a token: the router's probabilities, fp32; for each choice three numbers of 8 bytes and three of 4."""
    return FP32_BYTES * s.mixture.num_experts + 36 * s.mixture.num_chosen if s.mixture else 0


def gate_up_width(s: ModelSizes) -> int:
    """`gate_up` [T, G + R], elements a token; of a mixture [G + P] for each of its rows."""
    return mlp_rows(s) * (s.gate_up + (s.mixture.columns if s.mixture else s.padded_rank))


def gate_up_kept(job: Job, c: Candidate) -> int:
    """As `gate_up_width`; a tiled MLP keeps none of it and computes it again. Mixtures are not tiled."""
    return 0 if c.is_tiled and not job.sizes.mixture else gate_up_width(job.sizes)
