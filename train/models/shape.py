"""What config.json says of a base, without its weights."""

import json
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    __version__,
)

from train.config import ModelConfig
from train.models.hub import NAME_A_BASE, locate, unreadable
from train.run.exits import ExitCode, ExitWith

MXFP4_BASES = ("gpt_oss",)  # whose experts alone are stored so
STORED_AS = {"nf4": "in 4 bits by bitsandbytes", "int8": "in 8 bits by bitsandbytes"}
# what transformers raises where config.json, or a file, says what cannot be
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, AssertionError)
BROKEN += (RuntimeError, ImportError, StrictDataclassError, HfHubHTTPError, SafetensorError)
# what a transformers configuration may hold only for us: it names files or code that would be read instead
FOREIGN_SETTINGS = ("transformers_weights",)
POSITIONS = "max_position_embeddings"  # by the name that transformers gives to it, whatever config.json calls it
MAX_REASON = 400  # characters of a library's error


def model_shape(config: ModelConfig) -> PreTrainedConfig:
    """The base's transformers configuration; of a multimodal base it nests the language model's.

    With model.max_positions it is that of a config.json with this number.

    Raises ExitWith(BAD_INPUT) where it cannot be read, or must not be trusted.
    """
    place = locate(config)
    if not (place.folder / "config.json").is_file():
        held = "adapter_config.json" if (place.folder / "adapter_config.json").exists() else ""
        reason = "it has no config.json" + (f", but an adapter ({held}): name the base of the adapter" if held else "")
        raise unreadable(config.name_or_path, f"{reason}\n{NAME_A_BASE}")
    try:
        shape = AutoConfig.from_pretrained(str(place.folder), trust_remote_code=False)
    except BROKEN as error:
        raise cannot_read(config, "config.json", error) from None
    kernel = getattr(shape, "_attn_implementation", None)
    if "/" in str(kernel):  # transformers would fetch a binary from the hub and run it, where `kernels` is installed
        reason = f"config.json names the attention kernel {kernel!r} of the hub; take it out"
        raise ExitWith(ExitCode.BAD_INPUT, f"{config.name_or_path}: {reason}")
    if getattr(shape, "is_encoder_decoder", False):  # transformers would take its decoder alone, as Whisper's
        reason = f"it is an encoder and a decoder ({shape.model_type}), and only a decoder by itself is trained here"
        raise unreadable(config.name_or_path, f"{reason}; name a causal language model")
    for setting in FOREIGN_SETTINGS:
        if getattr(shape, setting, None) is not None:
            reason = f"config.json sets {setting}, which is not read; take it out"
            raise ExitWith(ExitCode.BAD_INPUT, f"{config.name_or_path}: {reason}")
    if config.max_positions:
        try:
            return type(shape).from_dict(_with_positions(config, shape), name_or_path=str(place.folder))
        except BROKEN as error:
            raise cannot_read(config, f"config.json with model.max_positions {config.max_positions}", error) from None
    return shape


def trained_settings(config: ModelConfig) -> dict[str, Any]:
    """config.json of the base as it is trained: as it lies there, but for model.max_positions."""
    if config.max_positions:
        return _with_positions(config, model_shape(replace(config, max_positions=0)))
    return _read_settings(config)


def _read_settings(config: ModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((locate(config).folder / "config.json").read_text(encoding="utf-8"))
    return settings


def _with_positions(config: ModelConfig, shape: PreTrainedConfig) -> dict[str, Any]:
    """config.json with the language model's number of positions raised."""
    settings, text = _read_settings(config), text_shape(shape)
    nested = [settings[name] for name in shape.sub_configs if getattr(shape, name, None) is text and name in settings]
    part = nested[0] if nested else settings
    part[text.attribute_map.get(POSITIONS, POSITIONS)] = config.max_positions
    return settings


def text_shape(shape: PreTrainedConfig) -> Any:
    """The language model's part of a configuration: all of it, but for multimodal bases."""
    return shape.get_text_config(decoder=True)


def max_positions(config: ModelConfig) -> int:
    """Tokens that the base takes at most; 0 where config.json says no number."""
    return positions_of(model_shape(config))


def positions_of(shape: Any) -> int:
    """The same of a shape that is read."""
    return max(0, int(getattr(text_shape(shape), POSITIONS, None) or 0))  # XLNet's -1 is none either


def positions_note(config: ModelConfig) -> list[str]:
    """That the base takes more positions than it was made for, where model.max_positions says so."""
    if not config.max_positions:
        return []
    own = max_positions(replace(config, max_positions=0))
    return [f"takes {config.max_positions:,} positions (model.max_positions); beyond {own:,} it has never seen any"]


def auto_class(config: ModelConfig, shape: PreTrainedConfig) -> Any:
    """transformers' class for models of this shape; raises ExitWith(BAD_INPUT) where it knows none."""
    if type(shape) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    reason = f"transformers {__version__} knows no language model of the type {shape.model_type!r}"
    raise unreadable(config.name_or_path, reason)


def model_class(kind: Any, shape: PreTrainedConfig) -> Any:
    """The class of the model that one of transformers' Auto classes makes of this shape."""
    found: Any = kind._model_mapping[type(shape)]
    return found[0] if isinstance(found, tuple | list) else found


def plain_attention(kind: Any, shape: PreTrainedConfig) -> str:
    """The attention of transformers that computes what the model asks for: sdpa, or eager where it has a soft cap.

    transformers 5.17 takes SDPA for Gemma 2 all the same, which leaves the cap out.
    """
    has_cap = getattr(text_shape(shape), "attn_logit_softcapping", None) is not None
    return "eager" if has_cap or not model_class(kind, shape)._supports_sdpa else "sdpa"


def stored_quantization(config: ModelConfig, shape: PreTrainedConfig) -> BitsAndBytesConfig | None:
    """How the base's linear layers are quantised in its files; None where they are not.

    Raises ExitWith(BAD_INPUT) where that is not what --model.quantization says, and for formats that are not trained.
    """
    found: Any = getattr(shape, "quantization_config", None)
    found = found if found is not None else getattr(text_shape(shape), "quantization_config", None)
    if found is None:
        return None
    found = found.to_dict() if hasattr(found, "to_dict") else found
    if not isinstance(found, dict):
        raise unreadable(config.name_or_path, f"config.json: quantization_config is {found!r}, which says nothing")
    is_4bit, is_8bit = bool(found.get("load_in_4bit")), bool(found.get("load_in_8bit"))
    if (is_4bit and is_8bit) or found.get("llm_int8_has_fp16_weight"):
        reason = "both 4 and 8 bits" if is_4bit and is_8bit else "8 bits with weights in 16 (llm_int8_has_fp16_weight)"
        raise unreadable(config.name_or_path, f"config.json: quantization_config says {reason}, which is not trained")
    if not is_4bit and not is_8bit:
        method = str(getattr(found.get("quant_method"), "value", found.get("quant_method")))
        if method == "mxfp4" and shape.model_type in MXFP4_BASES:
            if config.quantization == "int8":
                reason = f"{config.name_or_path} has experts in MXFP4, which stay as they are; write nf4, or none"
                raise ExitWith(ExitCode.BAD_INPUT, f"--model.quantization int8: {reason} for its other layers")
            return None
        reason = f"its files are quantised by {method}, which is not trained here; name the base that is not quantised"
        raise unreadable(config.name_or_path, reason)
    kind = "nf4" if is_4bit else "int8"
    if config.quantization != kind and not config.random_init:
        reason = f"{config.name_or_path} is stored {STORED_AS[kind]}; write --model.quantization {kind}"
        raise ExitWith(ExitCode.BAD_INPUT, f"--model.quantization {config.quantization}: {reason}")
    try:
        read: Any = BitsAndBytesConfig.from_dict(found)
    except BROKEN as error:
        raise cannot_read(config, "the quantization_config of config.json", error) from None
    return read


def is_in_mxfp4(config: ModelConfig, shape: PreTrainedConfig) -> bool:
    """Whether experts are read from the files as MXFP4, beside linear layers in 16 bits."""
    is_told = getattr(shape, "quantization_config", None) is not None
    return is_told and not config.random_init and stored_quantization(config, shape) is None


def quantization(config: ModelConfig, shape: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, bool]:
    """(How linear layers are held while training, or None; whether the files have them so already)."""
    stored = stored_quantization(config, shape)
    if stored is not None and not config.random_init:
        stored.bnb_4bit_compute_dtype = dtype
        return stored, True
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ), False
    return (BitsAndBytesConfig(load_in_8bit=True) if config.quantization == "int8" else None), False


def cannot_read(config: ModelConfig, what: str, error: Exception) -> ExitWith:
    """The end of a run for which something of the base cannot be read."""
    return unreadable(config.name_or_path, f"cannot read {what}: {told(error)}\n{NAME_A_BASE}")


def told(error: Exception) -> str:
    """What a library's error says, on one line."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
