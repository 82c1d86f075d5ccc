"""What a GGUF file says of a model's shape, for the families that the engine runs, and why it is written for no other.

llama.cpp computes each architecture in one fixed way: what config.json asks for beyond that way is refused by name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from train.config import ModelConfig
from train.deliver.optional import package
from train.models.shape import BROKEN, model_class, told
from train.models.text_part import TextPart, text_part
from train.run.exits import ExitCode, ExitWith


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp computes one architecture of transformers."""

    architecture: str  # its name in GGUF
    pairs_neighbours: bool  # rotary embeddings turn elements 2i and 2i+1 together; transformers turns i and i + D/2
    rope_kinds: tuple[str, ...]
    biases: tuple[str, ...]  # linear layers that may have one
    required_biases: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")


QKV = ("attn_q", "attn_k", "attn_v")
MLP = ("ffn_gate", "ffn_up", "ffn_down")
LLAMA = GgufFamily("llama", True, ("default", "linear", "yarn", "llama3"), biases=(*QKV, "attn_output", *MLP))
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": GgufFamily("qwen2", False, ("default", "linear", "yarn"), QKV, required_biases=QKV),
    "Qwen3ForCausalLM": GgufFamily(
        "qwen3",
        False,
        ("default", "linear", "yarn"),
        biases=QKV,
        norms=("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"),
    ),
}


@dataclass(frozen=True)
class GgufShape:
    """A model's shape as GGUF has it."""

    family: GgufFamily
    config: Any  # of transformers
    head_dim: int
    context_length: int
    notes: tuple[str, ...]  # what a user should know
    part: TextPart | None = None  # of a multimodal model, which alone is written

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""
        return self.config.num_hidden_layers

    @property
    def is_tied(self) -> bool:
        """Whether the head's weight is the embedding's, which is then written once."""
        return bool(self.config.tie_word_embeddings)

    def num_heads(self, name: str) -> int:
        """Of the queries, or of the keys, of which `name` is the tensor."""
        return self.config.num_attention_heads if ".attn_q." in name else self.config.num_key_value_heads

    def permuted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A projection's rows in the order that llama.cpp's rotary embedding wants; other tensors as they are."""
        if not self.family.pairs_neighbours or not (".attn_q." in name or ".attn_k." in name):
            return tensor
        heads = tensor.reshape(self.num_heads(name), 2, self.head_dim // 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def rope_factors(self) -> torch.Tensor | None:
        """What each frequency of the rotary embedding is divided by, fp32 [D/2]; None where GGUF has keys for it."""
        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, torch.device("cpu"))
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        return 1.0 / self.config.rope_parameters["rope_theta"] ** steps / scaled

    def expected(self) -> set[str]:
        """Names of the tensors that the file must have, beside biases that are a model's choice."""
        parts = (*(f"{name}.weight" for name in (*self.family.norms, *QKV, "attn_output", *MLP)),)
        parts += tuple(f"{name}.bias" for name in self.family.required_biases)
        names = {f"blk.{number}.{part}" for number in range(self.num_layers) for part in parts}
        return names | {"token_embd.weight", "output_norm.weight"} | (set() if self.is_tied else {"output.weight"})

    def write_keys(self, writer: Any) -> None:
        """Adds the shape to a gguf.GGUFWriter."""
        config, rope = self.config, self.config.rope_parameters
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(self.num_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        self._write_scaling(writer, rope)

    def _write_scaling(self, writer: Any, rope: dict[str, Any]) -> None:
        if rope["rope_type"] not in ("linear", "yarn"):
            return
        writer.add_rope_scaling_type(package("gguf").RopeScalingType(rope["rope_type"]))
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_factor(float(rope["factor"]))
            return
        original = rope["original_max_position_embeddings"]
        factor = rope["factor"] or self.config.max_position_embeddings / original
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](self.config, torch.device("cpu"))
        writer.add_rope_scaling_factor(float(factor))
        writer.add_rope_scaling_orig_ctx_len(int(original))
        # llama.cpp multiplies by 1 + 0.1 ln(factor) by itself
        writer.add_rope_scaling_attn_factors(attention / (1 + 0.1 * math.log(factor)))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def gguf_shape(folder: Path) -> GgufShape:
    """The shape of the model in `folder`; raises ExitWith(BAD_INPUT) where GGUF, or llama.cpp, cannot say it."""
    try:
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except BROKEN as error:
        raise not_written(folder, f"config.json cannot be read: {told(error)}") from None
    part = text_part(ModelConfig(name_or_path=str(folder)))
    names = config.architectures or []
    if part is not None:
        config = part.shape
        names = [model_class(AutoModelForCausalLM, config).__name__]
    family = FAMILIES.get(names[0]) if len(names) == 1 else None
    if family is None:
        raise not_written(folder, f"{', '.join(names) or config.model_type} is not one of {', '.join(FAMILIES)}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reasons = _reasons(family, config, head_dim)
    if reasons:
        raise not_written(folder, "; ".join(reasons))
    context, notes = config.max_position_embeddings, []
    window = getattr(config, "sliding_window", None)
    has_window = window and any(kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or [])
    if (has_window or (window and names[0] == "MistralForCausalLM")) and window < context:
        notes.append(
            f"context: {window:,} tokens, the sliding window; llama.cpp has none for {family.architecture}, "
            f"so that beyond it (config.json says {context:,}) it would compute something else"
        )
        context = window
    return GgufShape(family, config, head_dim, context, tuple(notes), part)


def _reasons(family: GgufFamily, config: Any, head_dim: int) -> Sequence[str]:
    """What llama.cpp would compute otherwise than transformers."""
    rope, found = config.rope_parameters, []
    kind = rope.get("rope_type")
    if kind not in family.rope_kinds:
        found.append(f"rotary scaling {kind!r} is not written for {family.architecture}")
    if kind == "yarn" and not rope.get("truncate", True):
        found.append("yarn without truncation is not written")
    if kind == "yarn" and not rope.get("factor"):
        found.append("yarn without a factor is not written")
    if (rope.get("partial_rotary_factor") or 1) != 1:
        found.append("rotary embeddings of a part of each head are not written")
    if head_dim % 2:
        found.append(f"heads of {head_dim} elements are not written")
    if family.architecture == "qwen2" and head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"heads of {head_dim} elements do not add up to hidden_size, as llama.cpp wants for qwen2")
    if config.hidden_act != "silu":
        found.append(f"its MLP computes {config.hidden_act}, not silu")
    return found


def not_written(folder: Path, reason: str) -> ExitWith:
    """The end of an export of a model that cannot be written as GGUF."""
    return ExitWith(ExitCode.BAD_INPUT, f"{folder}: not written as GGUF: {reason}")
