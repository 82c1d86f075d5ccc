"""The frozen weights of one decoder block packed into one buffer of bytes, so that a block is one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState

from train.engine.linears import Linear

ALIGNMENT = 512  # bytes, as CUDA's own allocations have; kernels read words of 16 bytes
NESTED_BLOCK = 256  # NF4 scales that share a scale, where the scales are quantised too


@dataclass(frozen=True)
class _Field:
    """A tensor's place in the buffer."""

    start: int
    num_bytes: int
    shape: torch.Size
    dtype: torch.dtype

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class UnlikeBlocksError(ValueError):
    """Blocks that cannot share a layout."""


class PackedLayout:
    """Where in a buffer each linear layer's weight is, followed by its NF4 scales; the same for every block
    of a kind.

    Norms and biases stay on the device: 16 KB of a block's 107 MiB in Llama-3.1-8B.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.fields: list[list[_Field]] = []  # of each layer
        self.states: list[QuantState | None] = []  # of each layer of the block that this was made for
        self.codes: dict[tuple[int, torch.device], torch.Tensor] = {}  # NF4's tables, by id of the first and device
        self.num_bytes = 0
        for linear in linears:
            fields = []
            for tensor in _tensors(linear.weight):
                num_bytes = tensor.numel() * tensor.element_size()
                fields.append(_Field(self.num_bytes, num_bytes, tensor.shape, tensor.dtype))
                self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
            self.fields.append(fields)
            self.states.append(_without_tensors(getattr(linear.weight, "quant_state", None)))

    def check(self, linears: Sequence[Linear]) -> None:
        """Raises UnlikeBlocksError unless the layers' weights have this layout."""
        for linear, fields, state in zip(linears, self.fields, self.states, strict=True):
            found = [(tensor.shape, tensor.dtype) for tensor in _tensors(linear.weight)]
            own = _without_tensors(getattr(linear.weight, "quant_state", None))
            if found != [(field.shape, field.dtype) for field in fields] or not _equal(own, state):
                raise UnlikeBlocksError("its blocks are not all stored in the same way, and only such can be streamed")

    def write(self, linears: Sequence[Linear], buffer: torch.Tensor) -> None:
        """Copies the layers' weights, which have this layout, into the buffer."""
        for linear, fields in zip(linears, self.fields, strict=True):
            for tensor, field in zip(_tensors(linear.weight), fields, strict=True):
                field.of(buffer).copy_(tensor)

    def views(self, buffer: torch.Tensor) -> list[torch.nn.Parameter]:
        """The layers' weights as views of the buffer, each a Parameter that bitsandbytes can compute with."""
        weights: list[torch.nn.Parameter] = []
        for fields, state in zip(self.fields, self.states, strict=True):
            data, *scales = [field.of(buffer) for field in fields]
            if state is None:
                weights.append(torch.nn.Parameter(data, requires_grad=False))
            else:
                weights.append(self._params4bit(data, scales, state))
        return weights

    def _params4bit(self, data: torch.Tensor, scales: list[torch.Tensor], like: Any) -> torch.nn.Parameter:
        options: dict[str, Any] = {"blocksize": like.blocksize, "dtype": like.dtype}
        nested, offset = None, None
        if like.nested:
            table = self._code(like.state2.code, data.device)
            inner = {"blocksize": like.state2.blocksize, "dtype": like.state2.dtype}
            nested, offset = QuantState(scales[1], code=table, **inner), scales[2]
        code = self._code(like.code, data.device)
        more: dict[str, Any] = {"shape": like.shape, "quant_type": like.quant_type, "offset": offset, "state2": nested}
        state = QuantState(scales[0], code=code, **options, **more)
        kind = {"quant_type": like.quant_type, "compress_statistics": like.nested, "quant_storage": data.dtype}
        params4bit: Any = bnb.nn.Params4bit
        return params4bit(data, quant_state=state, blocksize=like.blocksize, bnb_quantized=True, **kind)

    def _code(self, code: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The table on the device, one copy for all views."""
        return self.codes.setdefault((id(code), device), code.to(device))


def packed_bytes(linear: Linear) -> int:
    """Bytes of a layer's weight as it is packed; its values need not be there yet (meta device)."""
    weight, sizes = linear.weight, [linear.weight.numel() * linear.weight.element_size()]
    if isinstance(weight, bnb.nn.Params4bit):
        num_elements = linear.in_features * linear.out_features
        num_scales = -(-num_elements // weight.blocksize)
        sizes = [num_elements // 2, 4 * num_scales]
        if weight.compress_statistics:
            sizes = [num_elements // 2, num_scales, 4 * -(-num_scales // NESTED_BLOCK), 4]
    elif isinstance(weight, bnb.nn.Int8Params):
        sizes = [linear.in_features * linear.out_features, 4 * linear.out_features]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def _without_tensors(state: QuantState | None) -> QuantState | None:
    """The part of a weight's state that all blocks share, without this block's scales."""
    if state is None:
        return None
    nested = state.state2
    if nested is not None:
        nested = QuantState(None, code=nested.code, blocksize=nested.blocksize, dtype=nested.dtype)
    common = {"blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype, "state2": nested}
    return QuantState(None, shape=state.shape, code=state.code, **common)


def _equal(one: Any, other: Any) -> bool:
    """Whether two weights are quantised in the same way, whatever their scales are."""
    if one is None or other is None:
        return one is other
    names = ("shape", "blocksize", "quant_type", "dtype")
    is_same = all(getattr(one, name) == getattr(other, name) for name in names)
    return is_same and torch.equal(one.code.cpu(), other.code.cpu()) and _equal(one.state2, other.state2)


def _tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    """The weight and its scales: what differs between blocks."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return [weight.detach()]
    return [weight.detach(), state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]


def put(linears: Sequence[Linear], weights: Sequence[torch.nn.Parameter]) -> None:
    """Replaces the layers' weights, and the second reference to their state that bitsandbytes' layers hold."""
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight = weight
        if isinstance(linear, bnb.nn.Linear4bit) and isinstance(weight, bnb.nn.Params4bit):
            linear.quant_state = weight.quant_state
