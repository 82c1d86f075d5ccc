"""What a model takes, from its shape alone."""

import math
from dataclasses import dataclass
from typing import Any

from train.config import Config
from train.engine.block import Block
from train.engine.packed_weights import linear_layers, packed_bytes
from train.loss import CHUNK_BYTES
from train.optim import OPTIMIZERS, state_bytes


@dataclass(frozen=True)
class ModelSizes:
    """Widths of one decoder block in elements, and bytes of what stands on the device or may stand on the host."""

    num_blocks: int
    hidden: int
    heads: int  # outputs of q_proj, k_proj and v_proj together
    query: int  # inputs of o_proj
    inner: int  # inputs of down_proj
    extra: int  # columns that the adapters add to a product, at most
    normed_qk: int  # of `heads`, those that are kept before their norms too (Qwen3)
    has_dropout: bool
    element_bytes: int  # of the compute type
    matrix_bytes: int  # one block's weights in the compute type, with the adapters' columns
    packed_bytes: int  # one block's frozen linear weights as they are stored
    norm_bytes: int  # norms and biases of all blocks, and the last norm
    embedding_bytes: int  # 0 where the head shares it
    embedding_on_host: bool
    head_bytes: int
    chunk_bytes: int  # logits of one chunk of the head, with what is computed of them
    vocabulary: int
    adapter_bytes: int  # fp32 adapters and their gradients, and what of the optimizer's state is not paged
    paged_bytes: int  # the optimizer's state where it is: in host memory when the card is full


def model_sizes(causal_lm: Any, config: Config, on_gpu: bool) -> ModelSizes:
    """What train.plan counts with, of a model that need have no weights; raises AttributeError for other families."""
    block = Block(causal_lm.base_model.layers[0], 0)
    embedding, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight
    trained = [p for p in causal_lm.parameters() if p.requires_grad]
    linears = {id(layer.weight) for one in causal_lm.base_model.layers for layer in linear_layers(one)}
    others = {id(embedding), id(head), *linears, *map(id, trained)}
    small = sum(p.numel() * p.element_size() for p in causal_lm.parameters() if id(p) not in others)
    element = head.element_size()
    state = state_bytes(trained, config.optim)
    is_paged = OPTIMIZERS[config.optim.name].is_paged
    is_tied = head is embedding
    return ModelSizes(
        num_blocks=len(causal_lm.base_model.layers),
        hidden=block.qkv.num_inputs,
        heads=block.qkv.num_outputs,
        query=block.o.num_inputs,
        inner=block.down.num_inputs,
        extra=max(group.padded_rank for group in block.groups),
        normed_qk=block.qkv.rows[1].stop if block.head_norms else 0,
        has_dropout=block.dropout > 0,
        element_bytes=element,
        matrix_bytes=element * sum(math.prod(group.shape) for group in block.groups),
        packed_bytes=sum(packed_bytes(layer) for layer in linear_layers(causal_lm.base_model.layers[0])),
        norm_bytes=small,
        embedding_bytes=0 if is_tied else embedding.numel() * element,
        embedding_on_host=on_gpu and not is_tied,
        head_bytes=head.numel() * element,
        chunk_bytes=CHUNK_BYTES,
        vocabulary=head.shape[0],
        adapter_bytes=8 * sum(p.numel() for p in trained) + (0 if is_paged else state),
        paged_bytes=state if is_paged else 0,
    )
