"""The families of models that the engine executes, one row each, and why it executes no other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from transformers.activations import ACT2FN

from train.engine.delta_net import DeltaNet
from train.engine.grouped import CLAMPED, CLAMPED_LIMIT, CLAMPED_SLOPE
from train.engine.layers import BlockNorms, CausalLM, DecoderLayer, Heads, Norm, PerLayerInput
from train.engine.linears import Projection, innermost
from train.engine.operations import TANH_GELU
from train.engine.positions import PositionTables, TableRow

EXPERTS = ("gate_up_proj", "down_proj")  # transformers' parameters of a mixture's experts
# transformers' modules that compute what operations.ACTIVATIONS compute: silu and swish are two of them
NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": TANH_GELU}  # configurations', and ours
ACTIVATIONS = {type(ACT2FN[name]): ours for name, ours in NAMES.items()}
COMPUTED = (*dict.fromkeys(NAMES.values()), CLAMPED)  # what the engine computes behind gate and up


class NormKind(Enum):
    """What a family's norms compute."""

    ROUNDED = auto()  # RMSNorm, rounded to the compute type before the weight (Llama)
    PLAIN = auto()  # RMSNorm, weighted in fp32
    OFFSET = auto()  # RMSNorm, weighted by 1 + weight in fp32 (Gemma)
    CENTRED = auto()  # LayerNorm, with or without a bias


# The part of a layer's attention (a module of transformers) and of config.json that a row asks about.
Asked = Callable[[Any, Any], Any]


def _no(attention: Any, config: Any) -> None:
    """Whatever config.json says."""


def _always(attention: Any, config: Any) -> bool:
    return True


def _window_of_config(attention: Any, config: Any) -> int | None:
    return getattr(config, "sliding_window", None)


def _window_of_attention(attention: Any, config: Any) -> int | None:
    return attention.sliding_window


def _window_where_sliding(attention: Any, config: Any) -> int | None:
    return attention.sliding_window if attention.is_sliding else None


def _window_by_kind(attention: Any, config: Any) -> int | None:
    """By the kind of layer, as the masks of transformers' SDPA have it, also where use_sliding_window is false."""
    return config.sliding_window if config.layer_types[attention.layer_idx] == "sliding_attention" else None


def _llama4_query_factor(config: Any, positions: torch.Tensor) -> torch.Tensor:
    """1 + beta log(1 + floor(position / the length of pretraining)): queries far behind are sharpened (Llama 4)."""
    rotary = config.rope_parameters
    beta, length = rotary["llama_4_scaling_beta"], rotary["original_max_position_embeddings"]
    return 1 + beta * torch.log(1 + torch.floor(positions / length))


@dataclass(frozen=True)
class Family:
    """One architecture of transformers: the names of its modules, and what they compute; the defaults are Llama's.

    A norm without a name is one that the family does not have. Attention and MLP that read the same norm are parallel.
    """

    architecture: str
    window: Asked = _no  # of a layer's attention: tokens that a token sees, its own among them; None: all before it
    norm: NormKind = NormKind.ROUNDED
    qk_norms: tuple[str, ...] = ()  # of the attention: norms of queries, keys and values, over each head or over all
    has_rotary: Asked = _always  # whether a layer's attention turns queries and keys
    is_interleaved: bool = False  # rotary pairs are neighbours
    table_row: TableRow = TableRow.TWICE  # of the rotary tables
    query_factor: Callable[[Any, torch.Tensor], torch.Tensor] | None = None  # of positions [T], with config.json
    is_gated: bool = True
    has_attention_gate: bool = False  # what is attended to is multiplied by the sigmoid of gates that q_proj makes too
    linear: DeltaNet | None = None  # linear attention, in the layers that have it
    layers: str = "layers"  # of the decoder
    attention: str = "self_attn"  # of a layer
    mlp: str = "mlp"
    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")  # norms before attention and MLP
    after: tuple[str, str] = ("", "")  # norms behind them, before their outputs are added
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")  # of the attention; one name where one layer makes all three
    o: str = "o_proj"
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")  # of the MLP; one name where one layer makes both
    down: str = "down_proj"
    router: str = ""  # of the MLP, where it may be a mixture, whose layers are parameters of `experts`
    activations: tuple[str, ...] = field(default=("act_fn", "activation_fn", "act"), repr=False)

    def decoder_layers(self, causal_lm: CausalLM) -> list[DecoderLayer]:
        """The layers of a model of this family."""
        decoder, config = causal_lm.base_model, causal_lm.config
        has_kinds = hasattr(getattr(decoder.rotary_emb, "inner", decoder.rotary_emb), "layer_types")
        modules = getattr(decoder, self.layers)
        kinds = config.layer_types if has_kinds else [""] * len(modules)  # type: ignore[attr-defined]
        return [self._decoder_layer(module, config, kind) for module, kind in zip(modules, kinds, strict=True)]

    def norm_of(self, module: Any) -> Norm:
        """A norm of this family."""
        eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
        kind = self.norm
        return Norm(
            module.weight,
            getattr(module, "bias", None),
            eps,
            is_centred=kind is NormKind.CENTRED,
            is_offset=kind is NormKind.OFFSET,
            rounds_first=kind is NormKind.ROUNDED,
        )

    def position_tables(self, causal_lm: CausalLM, layers: Sequence[DecoderLayer]) -> PositionTables:
        """What the layers read of positions."""
        factor = partial(self.query_factor, causal_lm.config) if self.query_factor else None
        return PositionTables(causal_lm.base_model, layers, self.table_row, factor)

    def embedding_scale(self, causal_lm: CausalLM) -> float:
        """What the decoder multiplies embedded tokens by, beside what its embedding does itself."""
        return float(getattr(causal_lm.base_model, "embedding_multiplier", 1.0))

    def _decoder_layer(self, module: Any, config: Any, kind: str) -> DecoderLayer:
        mlp = getattr(module, self.mlp)
        norms = [self.norm_of(getattr(module, name)) if name else None for name in (*self.before, *self.after)]
        linear = self.linear.parts(module) if self.linear else None
        qkv, o, heads = linear or self._softmax(getattr(module, self.attention), config, kind)
        router = getattr(mlp, self.router, None) if self.router else None  # some layers may be dense
        if router is None:
            gate_up = [Projection.of(getattr(mlp, name)) for name in self.gate_up]
            down, computes = Projection.of(getattr(mlp, self.down)), mlp
        else:
            both, down = (Projection.of_experts(mlp.experts, name) for name in EXPERTS)
            gate_up, computes = [both], innermost(mlp.experts)
        return DecoderLayer(
            module=module,
            qkv=qkv,
            o=o,
            gate_up=gate_up,
            down=down,
            heads=heads,
            norms=BlockNorms(norms[0], norms[2], norms[1], norms[3]),
            activation=self._activation_of(computes),
            is_gated=self.is_gated,
            is_parallel=self.before[0] == self.before[1] != "",
            residual_scale=float(getattr(module, "residual_multiplier", 1.0)),
            router=router,
            per_layer=self._per_layer(module),
            output_scale=getattr(module, "layer_scalar", None),
        )

    def _activation_of(self, module: Any) -> str:
        """Of a module that computes gate and up; what the engine does not know is described."""
        if hasattr(module, "limit"):
            found = module.alpha, module.limit
            return CLAMPED if found == (CLAMPED_SLOPE, CLAMPED_LIMIT) else f"{CLAMPED} with {found[0]} and {found[1]}"
        act = next(getattr(module, name) for name in self.activations if hasattr(module, name))
        return ACTIVATIONS.get(type(act), type(act).__name__)

    def _head_norms(self, attention: Any) -> list[Norm]:
        """Those that a layer has; one without a weight (Gemma 4's, of values) is as the one before it, by ones."""
        norms: list[Norm] = []
        for module in (getattr(attention, name) for name in self.qk_norms if hasattr(attention, name)):
            is_weighted = hasattr(module, "weight")
            like = self.norm_of(module) if is_weighted else norms[-1]
            norms.append(like if is_weighted else replace(like, weight=torch.ones_like(like.weight)))
        return norms

    def _per_layer(self, module: Any) -> PerLayerInput | None:
        if not hasattr(module, "per_layer_input_gate"):
            return None
        gate, projection = map(Projection.of, (module.per_layer_input_gate, module.per_layer_projection))
        return PerLayerInput(gate, projection, self.norm_of(module.post_per_layer_input_norm))

    def _softmax(self, attention: Any, config: Any, kind: str) -> tuple[list[Projection], Projection, Heads]:
        # only Gemma 4 reads the number, and stores keys of kinds that no layer shares, too
        num_shared = config.num_kv_shared_layers if hasattr(attention, "is_kv_shared_layer") else 0
        shared = config.layer_types[-num_shared:] if num_shared else []
        heads = Heads(
            num_query=config.num_attention_heads,
            num_key_value=config.num_attention_heads // attention.num_key_value_groups,
            size=attention.head_dim,
            scaling=attention.scaling,
            window=self.window(attention, config),
            rotary=kind if self.has_rotary(attention, config) else None,
            is_interleaved=self.is_interleaved,
            norms=self._head_norms(attention),
            has_gate=self.has_attention_gate,
            values_are_keys=getattr(attention, "v_proj", attention) is None,
            lends=kind if kind in shared and attention.store_full_length_kv else "",
            borrows=kind if shared and attention.is_kv_shared_layer else "",
            sinks=getattr(attention, "sinks", None),
        )
        projections = [getattr(attention, name, None) for name in self.qkv]  # shared keys have none
        qkv = [Projection.of(each) for each in projections if each is not None]
        return qkv, Projection.of(getattr(attention, self.o)), heads


BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),
        Family("MistralForCausalLM", _window_of_config),
        Family("Ministral3ForCausalLM", _window_of_config, query_factor=_llama4_query_factor),
        Family("Qwen2ForCausalLM", _window_of_attention),
        Family("Qwen3ForCausalLM", _window_of_attention, qk_norms=("q_norm", "k_norm")),
        Family("Qwen3MoeForCausalLM", _window_of_attention, qk_norms=("q_norm", "k_norm"), router="gate"),
        Family("MixtralForCausalLM", _window_of_config, router="gate"),
        Family("GptOssForCausalLM", _window_of_attention, NormKind.PLAIN, table_row=TableRow.ONCE, router="router"),
        Family("SeedOssForCausalLM"),
        Family("GraniteForCausalLM"),
        Family("SmolLM3ForCausalLM", _window_by_kind, has_rotary=lambda attention, config: bool(attention.use_rope)),
        Family("Phi3ForCausalLM", _window_of_config, qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
        Family(
            "Glm4ForCausalLM",
            is_interleaved=True,
            after=("post_self_attn_layernorm", "post_mlp_layernorm"),
            gate_up=("gate_up_proj",),
        ),
        Family("GemmaForCausalLM", norm=NormKind.OFFSET),
        Family(
            "Gemma3ForCausalLM",
            _window_of_attention,
            NormKind.OFFSET,
            qk_norms=("q_norm", "k_norm"),
            before=("input_layernorm", "pre_feedforward_layernorm"),
            after=BEHIND,
        ),
        Family(
            "Gemma4ForCausalLM",
            _window_of_attention,
            NormKind.PLAIN,
            qk_norms=("q_norm", "k_norm", "v_norm"),
            before=("input_layernorm", "pre_feedforward_layernorm"),
            after=BEHIND,
        ),
        Family("Olmo2ForCausalLM", norm=NormKind.PLAIN, qk_norms=("q_norm", "k_norm"), before=("", ""), after=BEHIND),
        Family(
            "Olmo3ForCausalLM",
            _window_of_attention,
            NormKind.PLAIN,
            qk_norms=("q_norm", "k_norm"),
            before=("", ""),
            after=BEHIND,
        ),
        Family(
            "Exaone4ForCausalLM",
            _window_where_sliding,
            qk_norms=("q_norm", "k_norm"),
            has_rotary=lambda attention, config: attention.sliding_window is None or attention.is_sliding,
            before=("", ""),
            after=BEHIND,
        ),
        Family(
            "Cohere2ForCausalLM",
            _window_of_attention,
            NormKind.CENTRED,
            has_rotary=lambda attention, config: attention.sliding_window is not None,
            is_interleaved=True,
            table_row=TableRow.IN_PAIRS,
            before=("input_layernorm", "input_layernorm"),
        ),
        Family(
            "Starcoder2ForCausalLM",
            _window_of_config,
            NormKind.CENTRED,
            is_gated=False,
            gate_up=("c_fc",),
            down="c_proj",
        ),
        Family(
            "Qwen3_5ForCausalLM",
            norm=NormKind.OFFSET,
            qk_norms=("q_norm", "k_norm"),
            has_attention_gate=True,
            linear=DeltaNet(),
        ),
    )
}


def family_of(causal_lm: CausalLM) -> Family:
    """The family of a model that the engine executes; KeyError for another."""
    return FAMILIES[type(causal_lm).__name__]


def decoder_layers(causal_lm: CausalLM) -> list[DecoderLayer]:
    """The layers of a model that the engine executes; KeyError for another."""
    return family_of(causal_lm).decoder_layers(causal_lm)
