"""A base's parameters made of values, quantised where they are to be, and the values that they stand for."""

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import torch


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
    if isinstance(parameter, bnb.nn.Params4bit):
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    if isinstance(parameter, bnb.nn.Int8Params):
        return bnb.functional.int8_vectorwise_dequant(packed.data, packed.SCB)
    return parameter.data
