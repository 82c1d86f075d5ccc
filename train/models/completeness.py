"""Whether the files of a base hold what its architecture wants: both loaders end the run where they do not."""

import math
import re
from itertools import chain
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from train.config import ModelConfig
from train.models.experts import expert_parts, part_shape
from train.models.hub import unreadable
from train.models.mxfp4 import stored_parts
from train.models.parameters import stored_buffers
from train.models.stored import Difference, StoredWeights, described_leftovers, left_in_the_model, named


def check_difference(config: ModelConfig, base: PreTrainedModel, difference: Difference) -> list[str]:
    """Notes on the tensors that are not read; raises ExitWith(BAD_INPUT) where the files are not this model's."""
    modules = [name for name, _ in base.named_modules() if name]
    spellings = [*modules, *(name.removeprefix("model.") for name in modules)]
    foreign = left_in_the_model(difference.left, spellings)
    problems = difference.problems()
    if foreign:
        problems.append(f"the files hold {named(foreign)}, which the model of config.json does not have")
    if problems:
        lines = "\n  ".join(problems)
        raise unreadable(config.name_or_path, f"config.json and the weight files are not of one model:\n  {lines}")
    return [described_leftovers(difference.left)] if difference.left else []


def difference_of(base: PreTrainedModel, stored: StoredWeights) -> Difference:
    """What the files lack and hold beside the skeleton's tensors, by the names that StoredWeights.place_of finds."""
    missing, mismatched, read = [], [], set()
    tied, parts_of, in_mxfp4 = tied_embedding(base), expert_parts(base), stored_parts(base)
    for name, parameter in chain(base.named_parameters(), stored_buffers(base)):
        place = stored.place_of(name, name == tied)
        parts = in_mxfp4.get(name, {})
        if not place and name in parts_of:
            parts = dict.fromkeys(chain(*parts_of[name]), part_shape(parts_of[name], parameter.shape))
        for each, shape in parts.items():
            found = stored.place_of(each)
            read.add(found)
            if not found:
                missing.append(each)
            elif stored.tensors[found].shape != shape:
                mismatched.append((each, stored.tensors[found].shape, shape))
        if parts:
            continue
        read.add(place)
        if not place:
            missing.append(name)
            continue
        is_packed = isinstance(parameter, bnb.nn.Params4bit) and stored.is_packed(place)
        if not is_packed and stored.tensors[place].shape != tuple(parameter.shape):
            mismatched.append((name, stored.tensors[place].shape, tuple(parameter.shape)))
    if tied:
        read.add("lm_head.weight")
    unread = getattr(base, "_keys_to_ignore_on_load_unexpected", None) or []  # what transformers knows to lie beside
    left = [name for name in stored.tensors if name not in read and not _belongs_to(name, read)]
    left = [name for name in left if not any(re.search(each, name) for each in unread)]
    return Difference(missing, mismatched, left)


def check_tied_pair(config: ModelConfig, base: PreTrainedModel, stored: StoredWeights) -> None:
    """Raises ExitWith(BAD_INPUT) where config.json ties the head to the embedding and the files hold two of them.

    transformers would take both, other programs the embedding alone.
    """
    tied, head = tied_embedding(base), base.get_output_embeddings()
    if not tied:
        return
    own = next(f"{name}.weight" for name, module in base.named_modules() if module is head)
    pair = [stored.place_of(tied), stored.place_of(own)]
    if all(pair) and pair[0] != pair[1]:
        one, other = map(stored.values, pair)
        if one.shape != other.shape or not torch.equal(one, other):
            raise unreadable(
                config.name_or_path,
                f"config.json ties the head to the embedding, and the files hold two: {pair[0]} and {pair[1]} differ. "
                'With "tie_word_embeddings": false in config.json both are used as they are',
            )


def tied_embedding(base: PreTrainedModel) -> str:
    """The name of the embedding's parameter where the head shares it; else empty."""
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return ""
    return next(f"{name}.weight" for name, module in base.named_modules() if module is embedding)


def _belongs_to(name: str, read: set[str]) -> bool:
    """Whether this is a scale or a table of a packed weight."""
    start, weight, _ = name.rpartition(".weight.")
    return bool(weight) and f"{start}.weight" in read


def check_quantized(config: ModelConfig, base: PreTrainedModel) -> None:
    """Raises ExitWith(BAD_INPUT) where a layer does not hold what its class says: packed weights of its own shape."""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        reason = _quantization_fault(module)
        if not reason and module is head and isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            reason = "the head is quantised, which is not trained with"
        if reason:
            raise unreadable(config.name_or_path, f"{name}: {reason}")


def _quantization_fault(module: torch.nn.Module) -> str:
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, bnb.nn.Linear4bit):
        return packed_fault(weight, (module.out_features, module.in_features))
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = getattr(weight, "SCB", None)
        if not isinstance(weight, bnb.nn.Int8Params) or weight.dtype != torch.int8:
            return "it should be stored in 8 bits by config.json, and is not"
        if scales is None or scales.numel() != module.out_features:
            return "the scales of its 8 bits are not of its size"
    return ""


def packed_fault(weight: Any, shape: tuple[int, int]) -> str:
    """Why a weight is none of this shape packed in 4 bits; empty where it is one."""
    state = getattr(weight, "quant_state", None)
    if not isinstance(weight, bnb.nn.Params4bit) or state is None:
        return "it should be packed in 4 bits by config.json, and is not"
    if state.shape is None or tuple(state.shape) != shape:
        return f"it is {list(state.shape or [])} by its scales, {list(shape)} by config.json"
    num_bytes, num_scales = weight.numel() * weight.element_size(), -(-math.prod(shape) // state.blocksize)
    if num_bytes != -(-math.prod(shape) // 2) or state.absmax.numel() != num_scales:
        return "its packed weights, or their scales, are not of its size"
    if state.quant_type not in ("nf4", "fp4"):
        return f"it is quantised as {state.quant_type}, not as nf4 or fp4"
    return ""
