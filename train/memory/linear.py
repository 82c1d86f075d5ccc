"""What linear attention takes: widths and bytes of the blocks that have it, from their shape alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from train.engine.delta_rule import CHUNK
from train.engine.layers import DecoderLayer, DeltaHeads
from train.engine.packed_weights import packed_bytes

FP32_BYTES = 4
RULE_FORWARD = 0.63  # share of `rule_bytes` that a forward pass alone takes: 0.49 to 0.62


@dataclass(frozen=True)
class LinearSizes:
    """The blocks with linear attention, where a model has such (hybrids); the rest of them is as in the others."""

    numbers: frozenset[int]  # of these blocks
    projected: int  # outputs of all its projections together
    value: int  # inputs of out_proj
    rule_bytes: int  # a token, of what a block's backward pass makes between the projections at its peak
    packed_bytes: int  # one such block's frozen linear weights as they are stored

    def kept(self, hidden: int, rank: int) -> int:
        """Elements a token that a block keeps, beside gate and up: `read` twice, `projected`, `low_rank`, and
        `post_attention`."""
        return 2 * (hidden + rank) + self.projected + 2 * rank + hidden

    def forward_bytes(self, hidden: int, element_bytes: int) -> int:
        """A token of a forward pass of which nothing is kept: embedded tokens, block input, `read`, `projected`, all
        between the projections, and what out_proj reads and makes."""
        width = 4 * hidden + self.projected + self.value
        return element_bytes * width + int(RULE_FORWARD * self.rule_bytes)


def linear_sizes(layers: Sequence[DecoderLayer], element_bytes: int) -> LinearSizes | None:
    """Of the layers with linear attention; None where there are none."""
    found = {number: layer for number, layer in enumerate(layers) if isinstance(layer.heads, DeltaHeads)}
    if not found:
        return None
    layer = next(iter(found.values()))
    assert isinstance(layer.heads, DeltaHeads)
    return LinearSizes(
        numbers=frozenset(found),
        projected=sum(projection.base.out_features for projection in layer.qkv),
        value=layer.o.base.in_features,
        rule_bytes=rule_bytes(layer.heads, element_bytes),
        packed_bytes=sum(map(packed_bytes, layer.linears)),
    )


def rule_bytes(heads: DeltaHeads, e: int) -> int:
    """Bytes a token that transformers' torch code makes between the projections, forward and backward, at its peak.

    Fitted to it, in fp32 and bf16, with heads of 32 to 128 elements (tests/unit/memory/test_linear.py): so many
    tensors of each kind, in the compute type of `e` bytes and in fp32; [CHUNK, CHUNK] numbers a chunk; states. A kernel
    takes less; how much was not measured.
    """
    k, v = heads.key_size, heads.value_size
    of_head = k * (8 * e + 27) + v * (5 * e + 19) + 8.3 * FP32_BYTES * CHUNK + 1.8 * FP32_BYTES * k * v / CHUNK
    return round(heads.num_value * of_head) + heads.num_key * k * 4 * e
