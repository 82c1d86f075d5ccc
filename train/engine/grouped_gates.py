"""The gates of grouped.py in Triton: what experts' activations are multiplied by, each row with a factor."""

from typing import Any

import torch
import triton
import triton.language as tl

from train.engine.grouped import CLAMPED_LIMIT, CLAMPED_SLOPE
from train.engine.kernels import _bend_of, _sigmoid_of

GATE_BLOCK = 1024  # elements of a row that a program gates


@triton.jit
def scaled_gate_kernel(gate_up, stride, out, stride_out, factors, F, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(gate) up factor, where gate and up are the halves of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    value = (gate * _sigmoid_of(gate, TANH)).to(dtype).to(tl.float32) * up
    tl.store(out + row * stride_out + column, (value * tl.load(factors + row)).to(dtype), mask=inside)


def scaled_gate(gate_up: torch.Tensor, out: torch.Tensor, factors: torch.Tensor, is_tanh: bool) -> None:
    """As grouped.scaled_gate."""
    num_rows, width = out.shape
    scaled_gate_kernel[(num_rows, -(-width // GATE_BLOCK))](
        gate_up, gate_up.stride(0), out, out.stride(0), factors, width, is_tanh, GATE_BLOCK, num_warps=4
    )


@triton.jit
def scaled_gate_backward_kernel(
    gate_up, stride, grad, stride_grad, factors, of_factors, F, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    """In place: gate and up become their gradients, grad the scaled product; of_factors [S, blocks] parts of sums."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate_place = gate_up + row * stride + column
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + F, mask=inside, other=0.0).to(tl.float32)
    grad_place = grad + row * stride_grad + column
    upstream = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factors + row)
    sigmoid = _sigmoid_of(gate, TANH)
    dtype = grad.dtype.element_ty
    value = (gate * sigmoid).to(dtype).to(tl.float32)
    tl.store(of_factors + row * tl.num_programs(1) + tl.program_id(1), tl.sum(upstream * value * up))
    tl.store(grad_place, (value * up * factor).to(dtype), mask=inside)
    upstream *= factor
    tl.store(gate_place + F, (upstream * value).to(dtype), mask=inside)
    tl.store(gate_place, (upstream * up * sigmoid * _bend_of(gate, sigmoid, TANH)).to(dtype), mask=inside)


def scaled_gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, factors: torch.Tensor, is_tanh: bool) -> Any:
    """As grouped.scaled_gate_backward."""
    num_rows, width = grad.shape
    num_blocks = -(-width // GATE_BLOCK)
    of_factors = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=grad.device)
    scaled_gate_backward_kernel[(num_rows, num_blocks)](
        gate_up, gate_up.stride(0), grad, grad.stride(0), factors, of_factors, width, is_tanh, GATE_BLOCK, num_warps=4
    )
    return of_factors.sum(1)


@triton.jit
def _at_most(x, limit):
    """tl.minimum(x, limit) would be the limit where x is NaN."""
    return tl.where(x > limit, limit, x)


@triton.jit
def _clamped(gate_up, row, stride, column, inside, SLOPE: tl.constexpr, LIMIT: tl.constexpr):
    """Gate and up as they are in a row, in turn, and the sigmoid of what the gate is clamped to."""
    place = gate_up + row * stride + 2 * column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    return gate, up, tl.sigmoid(SLOPE * _at_most(gate, LIMIT))


@triton.jit
def clamped_gate_kernel(
    gate_up, stride, out, stride_out, factors, F, SLOPE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):
    """out = gate sigmoid(SLOPE gate) (1 + up) factor, gate and up clamped."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate, up, sigmoid = _clamped(gate_up, row, stride, column, inside, SLOPE, LIMIT)
    opened, raised = _at_most(gate, LIMIT), 1 + _at_most(-_at_most(-up, LIMIT), LIMIT)
    value = opened * sigmoid * raised * tl.load(factors + row)
    tl.store(out + row * stride_out + column, value.to(out.dtype.element_ty), mask=inside)


def clamped_gate(gate_up: torch.Tensor, out: torch.Tensor, factors: torch.Tensor) -> None:
    """As grouped.scaled_gate, of clamped gates."""
    num_rows, width = out.shape
    clamped_gate_kernel[(num_rows, -(-width // GATE_BLOCK))](
        gate_up, gate_up.stride(0), out, out.stride(0), factors, width, CLAMPED_SLOPE, CLAMPED_LIMIT, GATE_BLOCK,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def clamped_gate_backward_kernel(
    gate_up, stride, grad, stride_grad, factors, of_factors, F,
    SLOPE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In place: gate and up become their gradients, grad the scaled product; of_factors [S, blocks] parts of sums."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate, up, sigmoid = _clamped(gate_up, row, stride, column, inside, SLOPE, LIMIT)
    opened, raised = _at_most(gate, LIMIT), 1 + _at_most(-_at_most(-up, LIMIT), LIMIT)
    grad_place, place = grad + row * stride_grad + column, gate_up + row * stride + 2 * column
    upstream = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    value, factor = opened * sigmoid, tl.load(factors + row)
    tl.store(of_factors + row * tl.num_programs(1) + tl.program_id(1), tl.sum(upstream * value * raised))
    tl.store(grad_place, (value * raised * factor).to(grad.dtype.element_ty), mask=inside)
    upstream *= factor
    of_gate = upstream * raised * sigmoid * (1 + SLOPE * opened * (1 - sigmoid))
    tl.store(place, tl.where(gate <= LIMIT, of_gate, 0.0).to(grad.dtype.element_ty), mask=inside)
    of_up = tl.where(tl.abs(up) <= LIMIT, upstream * value, 0.0)
    tl.store(place + 1, of_up.to(grad.dtype.element_ty), mask=inside)


def clamped_gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """As grouped.scaled_gate_backward, of clamped gates."""
    num_rows, width = grad.shape
    num_blocks = -(-width // GATE_BLOCK)
    of_factors = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=grad.device)
    clamped_gate_backward_kernel[(num_rows, num_blocks)](
        gate_up, gate_up.stride(0), grad, grad.stride(0), factors, of_factors, width, CLAMPED_SLOPE, CLAMPED_LIMIT,
        GATE_BLOCK, num_warps=4,
    )  # fmt: skip
    return of_factors.sum(1)
