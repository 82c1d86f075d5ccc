"""What the engine sees of a model: the parts of transformers', PEFT's and bitsandbytes' modules that it uses, typed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from train.engine.linears import ADAPTER, Linear, Projection, Router


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm over the last W elements, as its family computes it."""

    weight: torch.Tensor  # [W]
    bias: torch.Tensor | None  # [W]
    eps: float
    is_centred: bool  # the mean is subtracted first (LayerNorm)
    is_offset: bool  # the factor is 1 + weight (Gemma)
    rounds_first: bool  # the normed values are rounded to the compute type before the weight (Llama)


class Embedding(Protocol):
    """The input embedding."""

    weight: torch.Tensor  # [V, H]
    num_embeddings: int  # V


class Head(Protocol):
    """The linear layer that makes logits of hidden states."""

    weight: torch.Tensor  # [V, H]


@dataclass(frozen=True)
class TrainedRows:
    """Rows of the embedding or of the head that are trained while the others are frozen."""

    ids: torch.Tensor  # int64 [k]
    values: torch.nn.Parameter  # fp32 [k, H], in the place of the frozen rows


@dataclass(frozen=True)
class Vocabulary:
    """The embedding or the head: the base's own layer, and what PEFT trains in the place of it or of some rows."""

    layer: Any  # Embedding or Head
    rows: TrainedRows | None = None
    whole: torch.nn.Parameter | None = None  # fp32 [V, H]

    @classmethod
    def of(cls, module: Any) -> "Vocabulary":
        """Reads PEFT's TrainableTokensWrapper or ModulesToSaveWrapper, or a plain layer."""
        if hasattr(module, "token_adapter"):
            adapter = module.token_adapter
            values = adapter.trainable_tokens_delta[ADAPTER]
            ids = torch.tensor(adapter.token_indices[ADAPTER], device=values.device)
            return cls(adapter.base_layer, rows=TrainedRows(ids, values))
        if hasattr(module, "modules_to_save"):
            return cls(module.original_module, whole=module.modules_to_save[ADAPTER].weight)
        return cls(module)

    @property
    def is_trained(self) -> bool:
        """Whether any of it is."""
        return self.rows is not None or self.whole is not None


class DecoderOutput(Protocol):
    """What transformers' decoder returns."""

    last_hidden_state: torch.Tensor  # [B, T, H]


class Decoder(Protocol):
    """What lies between token ids and the head: transformers' LlamaModel and its like."""

    norm: torch.nn.Module
    training: bool
    embed_tokens: Callable[[torch.Tensor], torch.Tensor]  # int64 [T] -> [T, H]
    rotary_emb: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (x, positions, kind of layer) -> [1, T, D]

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        use_cache: bool,
        cu_seq_lens_q: torch.Tensor | None,
        max_length_q: int,
    ) -> DecoderOutput:
        """Ids and positions [B, T] -> hidden states; the last two reach the attention (attention.varlen_attention)."""
        ...


class Logits(Protocol):
    """What transformers' causal language model returns."""

    logits: torch.Tensor  # [B, T, V]


class Shape(Protocol):
    """transformers' configuration of a model; what not every family has is asked for with getattr."""

    use_cache: bool
    _attn_implementation: str


class CausalLM(Protocol):
    """transformers' LlamaForCausalLM and its like, with or without PEFT's adapters in it."""

    config: Shape

    @property
    def base_model(self) -> Decoder:
        """The decoder."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        ...

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> Logits:
        """Ids [B, T] -> logits."""
        ...

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """As torch.nn.Module."""
        ...

    def get_input_embeddings(self) -> Embedding:
        """The module that embeds token ids."""
        ...

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Puts another module in its place."""
        ...

    def get_output_embeddings(self) -> Head:
        """The head."""
        ...

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Chooses transformers' attention by name."""
        ...

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        """Makes transformers recompute every block's activations."""
        ...


def as_causal_lm(model: torch.nn.Module) -> CausalLM:
    """transformers' model as the engine sees it; families.unsupported_reason says whether it is one."""
    return cast(CausalLM, model)


@dataclass(frozen=True)
class Heads:
    """A layer's attention, apart from its projections."""

    num_query: int
    num_key_value: int
    size: int  # D
    scaling: float  # of the scores
    window: int | None  # tokens that a token sees, its own among them; None: all before it
    rotary: str | None  # the kind of layer whose rotary table it reads; None: no positions in it
    is_interleaved: bool  # rotary pairs are neighbours, not halves
    norms: Sequence[Norm]  # of queries and keys, over each head or over all together; empty where there are none
    has_gate: bool = (
        False  # behind each head's query its gate is made: what is attended to is multiplied by its sigmoid
    )

    values_are_keys: bool = False  # values are what k_proj makes, too, under a norm of their own
    lends: str = ""  # the name under which later blocks find its keys and values
    borrows: str = ""  # that of an earlier block, whose keys and values it attends to
    sinks: torch.Tensor | None = None  # [num_query]: each head's logit of a place without a value, which all tokens see

    @property
    def widths(self) -> tuple[int, int, int]:
        """Elements a token of query, key and value."""
        return self.num_query * self.size, self.num_key_value * self.size, self.num_key_value * self.size


@dataclass(frozen=True)
class DeltaHeads:
    """A layer's linear attention, apart from its projections."""

    num_key: int
    num_value: int  # a multiple of num_key
    key_size: int
    value_size: int
    weight: torch.Tensor  # [C, K]: the depthwise convolution of query, key and value; K tokens, the own one last
    bias: torch.Tensor | None  # [C]
    activation: str  # behind the convolution
    log_decay: torch.Tensor  # [num_value]: log of what the gate is multiplied by
    gate_bias: torch.Tensor  # [num_value]
    norm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # transformers': of [N, value_size], gated by as many
    rule: Callable[..., tuple[torch.Tensor, Any]]  # transformers' torch code; query, key, value [B, L, heads, size]
    convolve: Callable[..., torch.Tensor]  # transformers' torch code, of [B, C, L]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Elements a token of query, key and value."""
        return self.num_key * self.key_size, self.num_key * self.key_size, self.num_value * self.value_size


@dataclass(frozen=True)
class BlockNorms:
    """The norms around a block's two halves; None where a family has none there."""

    before_attention: Norm | None
    after_attention: Norm | None  # of o_proj's output, before it is added
    before_mlp: Norm | None
    after_mlp: Norm | None


@dataclass(frozen=True)
class PerLayerInput:
    """What a layer adds behind its MLP: norm(projection(act(gate(x)) times its own part of each token's inputs))."""

    gate: Projection  # [P, H]
    projection: Projection  # [H, P]
    norm: Norm


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of one decoder layer, found by its family's row (families.py)."""

    module: torch.nn.Module
    qkv: Sequence[Projection]  # query, key and value, or the one that makes all three; of linear attention more
    o: Projection
    gate_up: Sequence[Projection]  # gate and up, the one that makes both, or what an MLP without a gate begins with
    down: Projection
    heads: Heads | DeltaHeads  # of softmax or of linear attention
    norms: BlockNorms
    activation: str  # operations.ACTIVATIONS
    is_gated: bool
    is_parallel: bool  # attention and MLP read the same normed input
    residual_scale: float  # of what each half adds
    router: Router | None  # of a mixture of experts, whose linear layers are ExpertLinear
    per_layer: PerLayerInput | None = None
    output_scale: torch.Tensor | None = None  # [1]: of all that it hands on

    @property
    def kind(self) -> tuple[object, ...]:
        """What it has in common with the other blocks that share memory: the shapes of its linear layers."""
        return type(self.heads), *((linear.in_features, linear.out_features) for linear in self.linears)

    @property
    def linears(self) -> list[Linear]:
        """The frozen layers, in the order of a block's groups."""
        last = (self.per_layer.gate, self.per_layer.projection) if self.per_layer else ()
        return [projection.base for projection in (*self.qkv, self.o, *self.gate_up, self.down, *last)]
