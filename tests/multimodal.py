"""Tiny multimodal bases with random weights, as transformers saves them, and what serves them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as T

from tests.conftest import BUNDLED_BASE
from tests.unit.models.test_agreement import SIZES

HEADS: dict[str, Any] = SIZES | {"head_dim": 16}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
PIXTRAL: dict[str, Any] = VISION | {"model_type": "pixtral", "head_dim": 16}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 16,
    "out_hidden_size": 64,
}
MROPE: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LLAMA4: dict[str, Any] = {"intermediate_size_mlp": 96, "num_local_experts": 2}
PROJECTOR: dict[str, Any] = {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
GEMMA4: dict[str, Any] = {
    "vocab_size_per_layer_input": SIZES["vocab_size"],
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
}

# the family -> (configuration, the class of its text part)
FAMILIES: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma3": (
        lambda: T.Gemma3Config(
            text_config=T.Gemma3TextConfig(**HEADS).to_dict(),
            vision_config=VISION | {"vision_use_head": False},
            mm_tokens_per_image=4,
        ),
        "Gemma3ForCausalLM",
    ),
    "gemma4": (
        lambda: T.Gemma4Config(
            text_config=T.Gemma4TextConfig(**HEADS | GEMMA4).to_dict(),
            vision_config=VISION | {"head_dim": 16, "num_key_value_heads": 2},
            audio_config=None,
        ),
        "Gemma4ForCausalLM",
    ),
    "llama4": (
        lambda: T.Llama4Config(
            text_config=T.Llama4TextConfig(**HEADS | LLAMA4).to_dict(), vision_config=VISION | PROJECTOR
        ),
        "Llama4ForCausalLM",
    ),
    "llava": (
        lambda: T.LlavaConfig(
            text_config=T.LlamaConfig(**SIZES).to_dict(), vision_config=VISION | {"model_type": "clip_vision_model"}
        ),
        "LlamaForCausalLM",
    ),
    "ministral3": (
        lambda: T.Mistral3Config(text_config=T.Ministral3Config(**HEADS).to_dict(), vision_config=PIXTRAL),
        "Ministral3ForCausalLM",
    ),
    "mistral3": (
        lambda: T.Mistral3Config(
            text_config=T.MistralConfig(**HEADS).to_dict(), vision_config=PIXTRAL, tie_word_embeddings=False
        ),
        "MistralForCausalLM",
    ),
    "qwen2_5_vl": (
        lambda: T.Qwen2_5_VLConfig(
            text_config={"model_type": "qwen2_5_vl_text"} | SIZES | MROPE,
            vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]},
        ),
        "Qwen2ForCausalLM",
    ),
    "qwen3_5": (
        lambda: T.Qwen3_5Config(
            text_config=T.Qwen3_5TextConfig(**HEADS | HYBRID).to_dict(),
            vision_config=QWEN_VISION | {"num_position_embeddings": 16},
        ),
        "Qwen3_5ForCausalLM",
    ),
    "qwen3_vl": (
        lambda: T.Qwen3VLConfig(
            text_config={"model_type": "qwen3_vl_text"} | HEADS | MROPE,
            vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        ),
        "Qwen3ForCausalLM",
    ),
}


def write_multimodal(folder: Path, family: str, **saving: Any) -> Path:
    """A base of the family with the bundled tokenizer."""
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    model = T.AutoModelForImageTextToText.from_config(FAMILIES[family][0]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or name.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "bias" not in name and not parameter.isfinite().all():  # some are left empty
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder, **saving)
    return folder


def served(folder: Path) -> Any:
    """The whole base, as it is served."""
    return T.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B, T, V] in fp32."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float()
