"""Loads the frozen base: quantised as it is read, block by block, so that it is never whole in 16 bits.

There are two loaders, transformers' own and one for bases whose blocks are streamed. Both end the run unless every
tensor that the architecture wants is in the files with its shape: what is not there would be drawn at random.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from train.config import ModelConfig
from train.engine.copies import HostMemoryError
from train.engine.embedding import offload_embedding
from train.engine.families import FAMILIES, decoder_layers
from train.engine.host_stream import BlockHolder
from train.engine.layers import as_causal_lm
from train.engine.mxfp4 import is_mxfp4
from train.engine.packed_weights import UnlikeBlocksError
from train.engine.peer_memory import PeerMemoryError
from train.models.completeness import (
    check_difference,
    check_quantized,
    check_tied_pair,
    difference_of,
    packed_fault,
    tied_embedding,
)
from train.models.experts import (
    expert_parameter,
    expert_parts,
    lend_to_transformers,
    pack_experts,
    packed_experts,
    read_experts,
    with_block_names,
)
from train.models.fingerprint import verified_weights
from train.models.hub import locate, unreadable
from train.models.mxfp4 import hold_as_stored, read_mxfp4
from train.models.parameters import computed_values, stored_buffers, unify_compute_type
from train.models.shape import (
    BROKEN,
    auto_class,
    cannot_read,
    is_in_mxfp4,
    model_class,
    plain_attention,
    positions_note,
    quantization,
    text_shape,
)
from train.models.stored import Difference, StoredWeights
from train.models.text_part import loaded_shape, text_part
from train.run.exits import ExitCode, ExitWith
from train.seeds import derived_seed

# its name, a parameter without values -> its values, or the whole parameter where it is stored quantised
Read = Callable[[str, torch.nn.Parameter], torch.Tensor]


def load_base(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, host: BlockHolder, seed: int, embedding_on_host: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The base on `device`, except for the blocks that `host` wants, and notes on its files.

    Random weights are drawn from `seed`. Raises ExitWith(BAD_INPUT) where the base cannot be found or read, and where
    its files do not hold what its architecture wants.
    """
    part = text_part(config)  # refuses what must not be loaded
    notes = [*([str(part)] if part else []), *positions_note(config)]
    if config.random_init:
        generator = torch.Generator(device).manual_seed(derived_seed(seed, "random base"))
        draw = _drawn(text_shape(loaded_shape(config)), dtype, generator)
        return _filled(skeleton(config, dtype), draw, device, host, embedding_on_host), notes
    place = locate(config)
    if (place.folder / "adapter_config.json").exists():
        reason = "an adapter lies beside the base (adapter_config.json); merge it into the base, or move it away"
        raise unreadable(config.name_or_path, reason)
    paths, is_quantized = verified_weights(place), quantization(config, loaded_shape(config), dtype)[1]
    with ExitStack() as files:
        try:
            stored = StoredWeights(paths, files)
            stored = part.of(stored) if part else stored
            stored.check_names()
            stored.check_types(is_quantized or is_in_mxfp4(config, loaded_shape(config)))
        except (OSError, ValueError, SafetensorError) as error:
            raise cannot_read(config, "safetensors weights", error) from None
        base = skeleton(config, dtype)
        stored = with_block_names(stored, base)
        check_tied_pair(config, base, stored)
        is_ours = bool(host.wanted or packed_experts(base))  # transformers' loader neither streams nor packs experts
        try:
            if is_ours:
                read = read_stored(base, stored, is_quantized, dtype, device)
                left = check_difference(config, base, difference_of(base, stored))
                base = _filled(base, read, device, host, embedding_on_host)
            else:
                base, difference = _by_transformers(config, stored if part else None, dtype, device)
                left = check_difference(config, base, difference)
            if is_ours or part:
                with suppress(*BROKEN):  # not every base has one, and no answer is written by it
                    base.generation_config = GenerationConfig.from_pretrained(str(place.folder))
        except BROKEN as error:
            raise _fault(config, error) from None
    check_quantized(config, base)
    if is_quantized or (base._keep_in_fp32_modules and type(base).__name__ in FAMILIES):
        unify_compute_type(base, dtype)
    if embedding_on_host and not is_ours:
        offload_embedding(as_causal_lm(base), host.memory)
    return base, [*notes, *left]


def _fault(config: ModelConfig, error: Exception) -> Exception:
    """What is to be raised where a base was not loaded: as it is, if it is no fault of the files."""
    if isinstance(error, HostMemoryError | PeerMemoryError | torch.distributed.DistError):
        return error
    if isinstance(error, UnlikeBlocksError):
        reason = f"{config.name_or_path}: {error}; --memory.offload none, with a budget for it, trains it"
        return ExitWith(ExitCode.BAD_INPUT, f"--memory.offload: {reason}")
    try:
        GenerationConfig.from_pretrained(str(locate(config).folder))
    except BROKEN as fault:  # transformers reads it with the weights; a folder without one has no fault of it
        if str(fault) == str(error):
            return cannot_read(config, "generation_config.json", error)
    return cannot_read(config, "safetensors weights", error)


def skeleton(config: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The base without its weights, on torch's meta device, with the layers of its quantisation.

    Raises ExitWith(BAD_INPUT) where config.json is not that of a language model.
    """
    shape = loaded_shape(config)
    kind = auto_class(config, shape)
    with init_empty_weights(include_buffers=False):
        options = {"dtype": dtype, "attn_implementation": plain_attention(kind, shape)}
        try:
            base: PreTrainedModel = kind.from_config(shape, trust_remote_code=False, **options)
        except BROKEN as error:
            raise cannot_read(config, "a causal language model", error) from None
    wanted, is_stored = quantization(config, shape, dtype)
    if is_in_mxfp4(config, shape):
        hold_as_stored(base)
    if wanted is not None:
        skipped = HfQuantizer.get_modules_to_not_convert(
            base, wanted.llm_int8_skip_modules, list(base._keep_in_fp32_modules or [])
        )
        with _quiet():
            replace_with_bnb_linear(
                base, modules_to_not_convert=skipped, quantization_config=wanted, pre_quantized=is_stored
            )
        if config.quantization == "nf4" and not is_stored:
            pack_experts(base, wanted)
        flags: Any = base
        flags.is_loaded_in_4bit = config.quantization == "nf4"
        flags.is_loaded_in_8bit = config.quantization == "int8"
    base.tie_weights()
    base.name_or_path = config.name_or_path
    return base


def _by_transformers(
    config: ModelConfig, text: StoredWeights | None, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Difference]:
    """The base as transformers loads it, and what it says about the files; it only warns of what is missing.

    Of a multimodal base it is given the `text` weights alone.
    """
    shape = loaded_shape(config)
    wanted, is_stored = quantization(config, shape, dtype)
    options: dict[str, Any] = {"quantization_config": wanted} if wanted and not is_stored else {}
    kind = auto_class(config, shape)
    folder, attention = str(locate(config).folder), plain_attention(kind, shape)
    if text is not None:  # an Auto class takes no tensors
        kind, folder = model_class(kind, shape), None
        options |= {"config": shape, "state_dict": text.slices()}
    elif config.max_positions:
        options |= {"config": shape}
    with _quiet():
        base, info = kind.from_pretrained(
            folder,
            **options,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told together with what is missing
        )
    base.name_or_path = config.name_or_path
    mismatched = sorted((name, tuple(found), tuple(shape)) for name, found, shape in info["mismatched_keys"])
    return base, Difference(sorted(info["missing_keys"]), mismatched, sorted(info["unexpected_keys"]))


def _filled(
    base: PreTrainedModel, read: Read, device: torch.device, host: BlockHolder, embedding_on_host: bool
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
            if not (module is head and name == "weight" and is_tied):
                setattr(module, name, expert_parameter(module, name, read(f"{prefix}.{name}", parameter), device))
        if isinstance(module, bnb.nn.Linear4bit):
            state: Any = module.weight
            module.quant_state = state.quant_state
        if module is embedding and is_tied:
            head.weight = embedding.weight
        if module is embedding and embedding_on_host:
            offload_embedding(causal_lm, host.memory)
            torch.cuda.empty_cache()  # or small weights would take its memory, the largest piece of all
        if module in ends:
            host.offload(ends[module], layers)
    lend_to_transformers(base)
    return base


def dequantized(stored: StoredWeights, name: str) -> torch.Tensor:
    """The values that a weight which is stored in 4 bits stands for, in host memory."""
    params4bit: Any = bnb.nn.Params4bit
    parts = stored.quantized_parts(name)
    return computed_values(params4bit.from_prequantized(stored.values(name), parts, requires_grad=False, device="cpu"))


def _drawn(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Read:
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


def read_stored(
    base: PreTrainedModel, stored: StoredWeights, is_quantized: bool, dtype: torch.dtype, device: torch.device
) -> Read:
    """Values from the files; a weight that is stored in 4 bits, as all are if `is_quantized`, comes with its scales.

    Buffers that lie there are filled at once; which do not, difference_of tells.
    """
    for name, buffer in stored_buffers(base):
        if place := stored.place_of(name):
            buffer.copy_(stored.values(place))
    tied, parts_of = tied_embedding(base), expert_parts(base)
    params4bit: Any = bnb.nn.Params4bit

    def read(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        place = stored.place_of(name, name == tied)
        if is_mxfp4(parameter):
            return read_mxfp4(stored, name, dtype, device)
        if not place and name in parts_of:
            like = torch.empty(parameter.shape, dtype=dtype, device=device)
            return read_experts(stored, parts_of[name], like)
        assert place, "difference_of has found it"
        parts = stored.quantized_parts(place) if isinstance(parameter, bnb.nn.Params4bit) else {}
        values = stored.values(place)
        if parts:
            packed = params4bit.from_prequantized(values, parts, requires_grad=False, device=device)
            if reason := packed_fault(packed, (parameter.shape[0], parameter.shape[1])):
                raise ValueError(f"{name}: {reason}")
            packed.quant_state.dtype = dtype  # before a streamed block's layout takes it over
            return packed
        if isinstance(parameter, bnb.nn.Params4bit) and (is_quantized or not values.is_floating_point()):
            raise ValueError(f"{name} should be packed in 4 bits by config.json, and its scales are not in the files")
        return values.to(device).to(dtype)

    return read


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings about a load, which are told by us, or end the run."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
