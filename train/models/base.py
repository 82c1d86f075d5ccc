"""Loads the frozen base: quantised as it is read, block by block, so that it is never whole in 16 bits."""

import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from train.config import ModelConfig
from train.engine.embedding import offload_embedding
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks
from train.engine.layers import as_causal_lm
from train.run.exits import ExitCode, ExitWith
from train.seeds import derived_seed

Read = Callable[[str, torch.nn.Parameter], torch.Tensor]  # its name, a parameter without values -> its values


def load_base(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, host: HostBlocks, seed: int, embedding_on_host: bool
) -> PreTrainedModel:
    """The base on `device`, except for the blocks that `host` wants; random weights are drawn from `seed`.

    Raises ExitWith(BAD_INPUT) where it cannot be found or read.
    """
    shape = model_shape(config)  # refuses what must not be loaded
    if config.random_init:
        draw = _drawn(shape, dtype, torch.Generator(device).manual_seed(derived_seed(seed, "random base")))
        return _filled(skeleton(config, dtype), draw, device, host, embedding_on_host)
    indexed = _indexed_files(config)
    try:
        if host.wanted:
            if getattr(shape, "quantization_config", None) is not None:
                raise ValueError("it is quantised already, and only the blocks of a base that is not can be streamed")
            with ExitStack() as files:
                read = _stored(config, indexed, dtype, device, files)
                base = _filled(skeleton(config, dtype), read, device, host, embedding_on_host)
            with suppress(OSError):  # not every base has one
                base.generation_config = GenerationConfig.from_pretrained(config.name_or_path, revision=config.revision)
            return base
        base = _by_transformers(config, dtype, device)
    except (OSError, ValueError, ImportError, SafetensorError, HfHubHTTPError) as error:
        raise not_found(config, "safetensors weights", error) from None
    if embedding_on_host:
        offload_embedding(as_causal_lm(base))
    return base


def skeleton(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base without its weights, on torch's meta device, with the layers of its quantisation.

    Raises ExitWith(BAD_INPUT) where config.json is not that of a causal language model.
    """
    shape = model_shape(config)
    with init_empty_weights(include_buffers=False):
        options = {"dtype": dtype, "attn_implementation": "sdpa"}
        try:
            base: PreTrainedModel = AutoModelForCausalLM.from_config(shape, trust_remote_code=False, **options)
        except ValueError as error:
            raise not_found(config, "a causal language model", error) from None
    quantization = _quantization(config, dtype)
    if quantization is not None:
        replace_with_bnb_linear(base, modules_to_not_convert=["lm_head"], quantization_config=quantization)
        flags: Any = base
        flags.is_loaded_in_4bit = config.quantization == "nf4"
        flags.is_loaded_in_8bit = config.quantization == "int8"
    base.tie_weights()
    base.name_or_path = config.name_or_path
    return base


def model_shape(config: ModelConfig) -> PreTrainedConfig:
    """The base's transformers configuration, without its weights."""
    try:
        shape = AutoConfig.from_pretrained(**where(config), trust_remote_code=False)
    except (OSError, ValueError, TypeError, StrictDataclassError, HfHubHTTPError) as error:
        raise not_found(config, "config.json", error) from None
    kernel = getattr(shape, "_attn_implementation", None)
    if "/" in str(kernel):  # transformers would fetch a binary from the hub and run it, where `kernels` is installed
        reason = f"{config.name_or_path}: config.json names the attention kernel {kernel!r} of the hub; take it out"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return shape


def _by_transformers(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    quantization = _quantization(config, dtype)
    options = {"quantization_config": quantization} if quantization else {}
    return AutoModelForCausalLM.from_pretrained(
        **where(config),
        **options,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="sdpa",
    )


def _filled(
    base: PreTrainedModel, read: Read, device: torch.device, host: HostBlocks, embedding_on_host: bool
) -> PreTrainedModel:
    """The skeleton with weights, each quantised as it is read; a block is offloaded as soon as it is whole."""
    causal_lm = as_causal_lm(base)
    layers = decoder_layers(causal_lm) if host.wanted else []
    ends = {list(layer.module.modules())[-1]: number for number, layer in enumerate(layers)}
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    for prefix, module in list(base.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not (module is head and is_tied):
                setattr(module, name, _parameter(parameter, read(f"{prefix}.{name}", parameter), device))
        if module is embedding and is_tied:
            head.weight = embedding.weight
        if module is embedding and embedding_on_host:
            offload_embedding(causal_lm)
            torch.cuda.empty_cache()  # or small weights would take its memory, the largest piece of all
        if module in ends:
            host.offload(ends[module], layers[ends[module]])
    return base


def _parameter(parameter: torch.nn.Parameter, values: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    """The values as a parameter like the skeleton's; bitsandbytes quantises them when they are moved to the device."""
    params4bit: Any = bnb.nn.Params4bit
    int8_params: Any = bnb.nn.Int8Params
    if isinstance(parameter, bnb.nn.Params4bit):
        return params4bit(values, requires_grad=False, **parameter.__dict__).to(device)
    if isinstance(parameter, bnb.nn.Int8Params):
        return int8_params(values.cpu(), requires_grad=False).to(device)
    return torch.nn.Parameter(values, requires_grad=False)


def _drawn(shape: PreTrainedConfig, dtype: torch.dtype, generator: torch.Generator) -> Read:
    """Random values, drawn on the generator's device."""
    device = generator.device

    def read(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        if name.endswith("bias"):
            return torch.zeros(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, dtype=dtype, device=device)
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        return values.normal_(0.0, shape.initializer_range, generator=generator)

    return read


def _stored(
    config: ModelConfig, indexed: list[str], dtype: torch.dtype, device: torch.device, files: ExitStack
) -> Read:
    """Values from safetensors files, which stay open until `files` is closed; raises ValueError for missing ones."""
    # a single file wins over an index, as in transformers
    names = indexed if indexed and _cached(config, SAFE_WEIGHTS_NAME) is None else [SAFE_WEIGHTS_NAME]
    place: dict[str, Any] = {}
    for name in names:
        path = cached_file(config.name_or_path, name, revision=config.revision)
        file = files.enter_context(safe_open(path, framework="pt"))
        place |= dict.fromkeys(file.keys(), file)

    def read(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        stored = name if name in place else name.removeprefix("model.")  # a decoder saved without its head
        if stored not in place:
            raise ValueError(f"the files hold no {name}")
        values = place[stored].get_tensor(stored)
        if values.shape != parameter.shape:
            raise ValueError(f"{name} is {list(values.shape)} in the files, {list(parameter.shape)} by config.json")
        return values.to(device).to(dtype)

    return read


def _quantization(config: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if config.quantization == "int8" else None


def _cached(config: ModelConfig, name: str) -> str | None:
    missing_is_fine = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return cached_file(config.name_or_path, name, revision=config.revision, **missing_is_fine)


def _indexed_files(config: ModelConfig) -> list[str]:
    """The files that the index names; empty without an index.

    Raises ExitWith(BAD_INPUT) where it names anything but safetensors: transformers would read it.
    """
    index = _cached(config, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        wrong = [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise not_found(config, SAFE_WEIGHTS_INDEX_NAME, error) from None
    if wrong:
        reason = f"{config.name_or_path}: {SAFE_WEIGHTS_INDEX_NAME} names {wrong[0]!r}; only *.safetensors are read"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return names


def where(config: ModelConfig) -> dict[str, str]:
    """The arguments of transformers' from_pretrained that say which base."""
    return {"pretrained_model_name_or_path": config.name_or_path, "revision": config.revision}


def not_found(config: ModelConfig, what: str, error: Exception) -> ExitWith:
    """The error that says what of the base cannot be read, and what to do."""
    name = config.name_or_path
    if Path(name).is_dir() or isinstance(error, HFValidationError):
        remedy = "name a folder that holds config.json, tokenizer.json and *.safetensors, or a hub id"
    else:
        remedy = (
            "name a folder, or a hub id that you can reach (gated models: accept their licence, then `hf auth login`)"
        )
    if name.startswith(("/", ".", "~")) and not os.path.isdir(os.path.expanduser(name)):
        return ExitWith(ExitCode.BAD_INPUT, f"--model.name_or_path {name}: no such folder\n{remedy}")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ExitWith(ExitCode.BAD_INPUT, f"--model.name_or_path {name}: cannot read {what}: {first_line}\n{remedy}")
