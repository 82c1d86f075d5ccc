"""A mixture's experts in MXFP4, as gpt-oss is shipped: codes and scales of a parameter under its name with an end."""

from collections.abc import Mapping

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from train.engine.mxfp4 import BLOCK, is_mxfp4, mxfp4_kind, mxfp4_parameter
from train.models.experts import expert_linears
from train.models.stored import StoredWeights

ENDS = ("_blocks", "_scales")


def hold_as_stored(base: PreTrainedModel) -> None:
    """Puts parameters in MXFP4 in the place of a skeleton's experts."""
    for _, linear in expert_linears(base):
        params4bit = bnb.nn.Params4bit
        linear.weight = params4bit(linear.weight.data, requires_grad=False, **mxfp4_kind())


def stored_parts(base: PreTrainedModel) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Names and shapes in the files of what makes each parameter in MXFP4."""
    found = {}
    for name, linear in expert_linears(base):
        if is_mxfp4(linear.weight):
            num_experts, num_outputs, num_inputs = linear.shape
            shape = num_experts, num_outputs, num_inputs // BLOCK
            found[name] = {name + ENDS[0]: (*shape, BLOCK // 2), name + ENDS[1]: shape}
    return found


def read_mxfp4(stored: StoredWeights, name: str, dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """The parameter of this name, to the bit; raises ValueError where its tensors are no bytes."""
    found = [stored.values(stored.place_of(name + end)) for end in ENDS]
    if any(tensor.dtype != torch.uint8 for tensor in found):
        raise ValueError(f"{name} should be in MXFP4 by config.json, and its {' and '.join(ENDS)} are no bytes")
    return mxfp4_parameter(found[0].to(device), found[1].to(device), dtype)
