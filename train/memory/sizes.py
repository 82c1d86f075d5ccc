"""What a model takes, from its shape alone: the widths of a block and the bytes of weights, adapters and optimizer."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.config import Config
from train.engine.attention import MAX_FLASH_SIZE
from train.engine.block import Block
from train.engine.families import decoder_layers
from train.engine.fp8 import Fp8Group
from train.engine.layers import DecoderLayer, Heads, Vocabulary
from train.engine.mixture import Mixture
from train.engine.packed_weights import packed_bytes
from train.loss import CHUNK_BYTES
from train.memory.linear import LinearSizes, linear_sizes
from train.optim import OPTIMIZERS, state_bytes


@dataclass(frozen=True)
class MixtureSizes:
    """What a block whose MLP is a mixture of experts has beside a dense one's widths, which are those of an expert."""

    num_experts: int
    num_chosen: int  # experts that a token goes through
    weights: int  # of all experts of a block, with the adapters' columns
    multiplied: int  # those of them that products take (experts.py)
    gradient_bytes: int  # fp32, of the adapters of a block's experts
    columns: int  # that adapters add to a row's products: the larger of both groups

    @property
    def active_weights(self) -> float:
        """Those that a token is multiplied with."""
        return self.multiplied * self.num_chosen / self.num_experts


@dataclass(frozen=True)
class ModelSizes:
    """Widths of one decoder block in elements, and bytes of what is kept on the device or the host for a whole run.

    Of a hybrid, the widths are those of a block with softmax attention; where such blocks differ, the largest of each.
    """

    num_blocks: int
    hidden: int  # width of the residual stream
    qkv: int  # outputs of q_proj, k_proj and v_proj together
    query: int  # queries, inputs of o_proj
    intermediate: int  # width of the MLP: inputs of down_proj
    gate_up: int  # outputs of gate_proj and up_proj together
    padded_rank: int  # columns that adapters add to a product: the largest of a block's four groups
    normed_qk: int  # of query, key and value what is also kept before its norms (Qwen3: the first two); 0 elsewhere
    norms_behind: int  # of a block: norms of what its parts make, before it is added (Gemma 3: 2)
    copies_gradient: bool  # the gradient of what they make is another than that of the sum
    is_parallel: bool  # attention and MLP read the same, whose gradients are summed
    has_dropout: bool
    element_bytes: int  # of the compute type
    matrix_bytes: int  # one block's dequantised weights, with the adapters' columns; of a hybrid the largest block's
    packed_bytes: int  # one block's frozen linear weights as they are stored
    norm_bytes: int  # norms and biases of all blocks, and the last norm
    embedding_bytes: int  # 0 where the head shares it
    embedding_on_host: bool
    head_bytes: int
    chunk_bytes: int  # logits of one chunk of the head
    vocabulary: int
    adapter_bytes: int  # fp32 adapters and their gradients, and optimizer state that is not paged
    paged_bytes: int  # optimizer state that moves to host memory when the GPU is full
    gradient_bytes: int = 0  # fp32 gradients of all that is trained
    mixture: MixtureSizes | None = None
    whole_bytes: int = 0  # for moments, where head or embedding are trained whole: copy, product and gradient
    num_key_value: int = 1  # heads of keys, and of values
    gate: int = 0  # the part of `qkv` that is gates of what is attended to (Qwen3.5)
    linear: LinearSizes | None = None  # of a hybrid
    shared_bytes: int = 0  # of a hybrid: what matrices of the other kind add to the place that blocks share
    reused: int = 0  # values that are not projected but made of keys (Gemma 4)
    borrowed: int = 0  # keys and values that another block has projected
    lent: int = 0  # the same of all blocks that lend theirs
    per_layer: int = 0  # inputs that each block has of its own
    head_size: int = 0  # elements of a head
    in_fp8: bool = False  # products with frozen weights
    has_sinks: bool = False  # of attention
    beside: int = 0  # adapters' columns behind rows that such products read
    kinds: tuple["BlockKind", ...] = ()  # where blocks with softmax attention are not all alike

    @property
    def states(self) -> int:
        """Query, key and value, as attention reads them."""
        return self.qkv - self.gate + self.reused + self.borrowed

    @property
    def copied(self) -> int:
        """The same, where what is projected has other columns and is kept beside it."""
        return self.states if self.gate or self.reused else 0

    @property
    def is_wide(self) -> bool:
        """Whether flash kernels do not take its heads."""
        return self.head_size > MAX_FLASH_SIZE

    def by_kind(self, numbers: Collection[int]) -> list[tuple[int, "ModelSizes"]]:
        """How many of these blocks have softmax attention, and sizes with their widths, for each kind of them."""
        if not self.kinds:
            return [(len(numbers) - self.num_linear(numbers), self)]
        return [(len(kind.numbers.intersection(numbers)), kind.sizes) for kind in self.kinds]

    @property
    def largest_packed(self) -> int:
        """Bytes of the block that takes the most."""
        return max(self.packed_bytes, self.linear.packed_bytes if self.linear else 0)

    def num_linear(self, numbers: Iterable[int]) -> int:
        """How many of these blocks have linear attention."""
        return len(self.linear.numbers.intersection(numbers)) if self.linear else 0

    def packed(self, numbers: Collection[int]) -> int:
        """Bytes of the packed weights of these blocks."""
        of_linear = self.num_linear(numbers) * self.linear.packed_bytes if self.linear else 0
        return of_linear + sum(count * sizes.packed_bytes for count, sizes in self.by_kind(numbers))


@dataclass(frozen=True)
class BlockKind:
    """Blocks with softmax attention whose linear layers have the same shapes."""

    numbers: frozenset[int]
    sizes: ModelSizes  # the model's, with the widths of these blocks


def model_sizes(causal_lm: Any, config: Config, on_gpu: bool) -> ModelSizes:
    """The sizes of a model with adapters, which may be on the meta device: no weights are read.

    Raises KeyError for families that the fused engine does not know.
    """
    layers = decoder_layers(causal_lm)
    blocks = [Block(layer, number, config.engine.products) for number, layer in enumerate(layers)]
    softmax = [block for block, layer in zip(blocks, layers, strict=True) if isinstance(layer.heads, Heads)]
    block, widths = softmax[0], {each.number: _widths(each, layers[each.number]) for each in softmax}
    rooms = [block.around_attention, block.around_mlp, *([block.per_layer.around] if block.per_layer else [])]
    largest: dict[str, Any] = {name: max(each[name] for each in widths.values()) for name in widths[block.number]}
    largest["num_key_value"] = min(each["num_key_value"] for each in widths.values())  # the fewest are repeated most
    words_in, words_out = map(Vocabulary.of, (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()))
    embedding, head = words_in.layer.weight, words_out.layer.weight
    trained = [parameter for parameter in causal_lm.parameters() if parameter.requires_grad]
    linears = {id(linear.weight) for layer in layers for linear in layer.linears}
    others = {id(embedding), id(head), *linears, *map(id, trained)}
    norms = [parameter for parameter in causal_lm.parameters() if id(parameter) not in others]
    element_bytes = head.element_size()
    is_tied = head is embedding
    state = state_bytes(trained, config.optim)
    is_paged = OPTIMIZERS[config.optim.name].is_paged
    sizes = ModelSizes(
        num_blocks=len(layers),
        hidden=block.attention.groups[0].num_inputs,
        padded_rank=max(group.padded_rank for each in blocks for group in each.groups),
        norms_behind=sum(half.after is not None for half in rooms),
        copies_gradient=any(half.after is not None or half.scale != 1.0 for half in rooms),
        is_parallel=block.is_parallel,
        has_dropout=block.dropout > 0,
        element_bytes=element_bytes,
        matrix_bytes=max(_matrix_bytes(block, element_bytes) for block in blocks),
        norm_bytes=sum(parameter.numel() * parameter.element_size() for parameter in norms),
        embedding_bytes=0 if is_tied else embedding.numel() * element_bytes,
        embedding_on_host=on_gpu and not is_tied and not words_in.is_trained,
        head_bytes=head.numel() * element_bytes,
        chunk_bytes=CHUNK_BYTES,
        vocabulary=head.shape[0],
        adapter_bytes=8 * sum(parameter.numel() for parameter in trained) + (0 if is_paged else state),
        paged_bytes=state if is_paged else 0,
        gradient_bytes=4 * sum(parameter.numel() for parameter in trained),
        mixture=_mixture_sizes(block, causal_lm.config),
        whole_bytes=_whole_bytes(words_in, words_out, element_bytes),
        linear=linear_sizes(layers, element_bytes),
        shared_bytes=_shared_bytes(blocks, element_bytes),
        in_fp8=config.engine.products == "fp8",
        has_sinks=any(isinstance(layer.heads, Heads) and layer.heads.sinks is not None for layer in layers),
        beside=max(
            3 * group.num_beside if isinstance(group, Fp8Group) else 0 for each in blocks for group in each.groups
        ),
        lent=sum(
            sum(layer.heads.widths[1:]) for layer in layers if isinstance(layer.heads, Heads) and layer.heads.lends
        ),
        per_layer=block.per_layer.size if block.per_layer else 0,
        **largest,
    )
    return replace(sizes, kinds=_kinds(sizes, softmax, layers, widths))


def _widths(block: Block, layer: DecoderLayer) -> dict[str, int]:
    """What differs between blocks with softmax attention."""
    assert isinstance(layer.heads, Heads)
    heads, (qkv, o) = layer.heads, block.attention.groups
    query, key, value = heads.widths
    return {
        "qkv": qkv.num_outputs,
        "query": o.num_inputs,
        "intermediate": block.mlp.down.num_inputs,
        "gate_up": block.mlp.gate_up.num_outputs,
        "normed_qk": sum(heads.widths[: len(heads.norms)]),
        "packed_bytes": sum(map(packed_bytes, layer.linears)),
        "gate": query if heads.has_gate else 0,
        "reused": value if heads.values_are_keys else 0,
        "borrowed": key + value if heads.borrows else 0,
        "head_size": heads.size,
        "num_key_value": heads.num_key_value,
    }


def _kinds(
    sizes: ModelSizes, blocks: Sequence[Block], layers: Sequence[DecoderLayer], widths: dict[int, dict[str, int]]
) -> tuple[BlockKind, ...]:
    """Of these blocks, if there are several."""
    found: dict[tuple[object, ...], list[Block]] = {}
    for block in blocks:
        found.setdefault(layers[block.number].kind, []).append(block)
    if len(found) == 1:
        return ()
    return tuple(
        BlockKind(
            frozenset(block.number for block in alike),
            replace(
                sizes,
                matrix_bytes=_matrix_bytes(alike[0], sizes.element_bytes),
                **widths[alike[0].number],  # type: ignore[arg-type]
            ),
        )
        for alike in found.values()
    )


def _matrix_bytes(block: Block, element_bytes: int) -> int:
    return sum(group.matrix_bytes(element_bytes) for group in block.groups)


def _shared_bytes(blocks: Sequence[Block], element_bytes: int) -> int:
    """Of the place that blocks share (weight_store.py), beyond what the largest block has."""
    places = {key: group for block in blocks for key, group in zip(block.places, block.groups, strict=True)}
    all_bytes = sum(group.matrix_bytes(element_bytes) for group in places.values())
    return all_bytes - max(_matrix_bytes(block, element_bytes) for block in blocks)


def _mixture_sizes(block: Block, config: Any) -> MixtureSizes | None:
    if not isinstance(block.mlp, Mixture):
        return None
    groups = block.mlp.groups
    num_adapters = sum(parameter.numel() for group in groups for parameter in group.parameters)
    return MixtureSizes(
        num_experts=block.mlp.gate_up.num_experts,
        num_chosen=config.num_experts_per_tok,
        weights=sum(math.prod(group.shape) for group in groups),
        multiplied=sum(
            group.num_experts * (group.num_outputs + group.num_columns) * (group.num_inputs + group.num_columns)
            for group in groups
        ),
        gradient_bytes=4 * num_adapters,
        columns=max(group.num_columns for group in groups),
    )


def _whole_bytes(embedding: Vocabulary, head: Vocabulary, element_bytes: int) -> int:
    """Of a whole head its copy in the compute type, a chunk's part of its gradient, and that in fp32; of a whole
    embedding its gradient."""
    in_head = 0 if head.whole is None else (2 * element_bytes + 4) * head.whole.numel()
    return in_head + (0 if embedding.whole is None else 4 * embedding.whole.numel())
