"""A base's parameters made of values, quantised where they are to be, and the values that they stand for."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch

from train.engine.lora_linear import dequantize
from train.engine.mxfp4 import is_mxfp4


def as_parameter(parameter: torch.nn.Parameter, values: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
    """The values as a parameter like the skeleton's; bitsandbytes quantises them when they are moved to the device."""
    params4bit: Any = bnb.nn.Params4bit
    int8_params: Any = bnb.nn.Int8Params
    if isinstance(values, bnb.nn.Params4bit):  # quantised already
        return values
    if isinstance(parameter, bnb.nn.Params4bit):
        return params4bit(values, requires_grad=False, **parameter.__dict__).to(device)
    if isinstance(parameter, bnb.nn.Int8Params):
        return int8_params(values.cpu(), requires_grad=False).to(device)
    return torch.nn.Parameter(values, requires_grad=False)


def stored_buffers(base: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that lie in a model's files beside its parameters, such as Gemma 4's factor of a block's output."""
    for prefix, module in base.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def computed_values(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The values that a layer computes with: of a quantised weight those that its codes stand for."""
    packed: Any = parameter
    if is_mxfp4(parameter):
        state = packed.quant_state
        out = torch.empty(state.shape, dtype=state.dtype, device=packed.device)
        dequantize(packed, out)
        return out
    if isinstance(parameter, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    if isinstance(parameter, bnb.nn.Int8Params):
        return bnb.functional.int8_vectorwise_dequant(packed.data, packed.SCB)
    return parameter.data


def unify_compute_type(base: torch.nn.Module, dtype: torch.dtype) -> None:
    """Gives a base this run's compute type where transformers leaves it that of its files, which were quantised, or
    keeps norms in fp32 beside fp16.

    So packed weights are dequantised to it, too; they themselves are codes, whatever type they are stored in.
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight: Any = module.weight
            module.compute_dtype, weight.quant_state.dtype = dtype, dtype
            module.compute_type_is_set = True
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and not isinstance(parameter, bnb.nn.Params4bit | bnb.nn.Int8Params):
                parameter.data = parameter.data.to(dtype)


def values_in(parameter: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of a weight: itself, or of codes, which may be stored as floats, their scales, which
    NaN reaches in quantising.
    """
    state = getattr(parameter, "quant_state", None)
    nested = getattr(state, "state2", None)
    scales = (getattr(state, "absmax", None), getattr(state, "offset", None), getattr(nested, "absmax", None))
    found = (parameter, getattr(parameter, "SCB", None)) if state is None else scales
    for part in found:
        if isinstance(part, torch.Tensor) and part.is_floating_point():
            yield part
