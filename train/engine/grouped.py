"""Products and moves of rows sorted into groups, those of experts: as in operations.py, kernels or torch's lines.

S rows in E groups; `ends` int32 [E] holds the index behind each group's last row, on the device: nothing waits for it.
"""

import importlib
from itertools import pairwise
from typing import Any

import torch

from train.engine.operations import TANH_GELU, gate, gate_backward, kernels_for

# gate and up of a row in turn, clamped: min(gate, limit) sigmoid(slope min(gate, limit)) (1 + up) (gpt-oss)
CLAMPED = "clamped_swiglu"
CLAMPED_SLOPE, CLAMPED_LIMIT = 1.702, 7.0
TENSOR_CORES = 16  # columns that they multiply at once, at least


def _kernels_for(device: torch.device, name: str = "grouped_kernels") -> Any:
    """A module of Triton kernels for groups, or None where the device has none."""
    return importlib.import_module(f"train.engine.{name}") if kernels_for(device) is not None else None


def _gates_for(device: torch.device) -> Any:
    return _kernels_for(device, "grouped_gates")


def grouped_product(
    a: torch.Tensor, rows: torch.Tensor | None, low: torch.Tensor | None, b: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """[S, N]: each row of [a, low] times its group's matrix of b [E, K + R, N].

    a is [S, K]; or [T, K], of which `rows` int64 [S] are taken. low is [S, R], or None where R is 0.
    """
    kernels = _kernels_for(a.device)
    if kernels is not None:
        return kernels.product(a, rows, low, b, ends)
    a = a if rows is None else a[rows]
    a = a if low is None else torch.cat([a, low], 1)
    out = a.new_empty(a.shape[0], b.shape[2])
    for matrix, part in zip(b, _slices(ends), strict=True):
        torch.mm(a[part], matrix, out=out[part])
    return out


def grouped_outer(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, ends: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """out, fp32 [E, p, q] of any strides, = scale a^T b of each group's rows, a [S, p] of few columns, b [S, q], or
    `rows` of b [T, q]."""
    kernels = _kernels_for(a.device)
    if kernels is not None:
        kernels.outer(a, b, rows, ends, scale, out)
        return
    b = b if rows is None else b[rows]
    for part, own in zip(_slices(ends), out, strict=True):
        own.copy_(scale * (a[part].float().T @ b[part].float()))


def spread_ranks(b: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """out [E, N, r] = scale b of PEFT's [N, r E], whose columns are the ranks, each of all experts in turn."""
    kernels = _kernels_for(b.device)
    if kernels is not None:
        kernels.spread(b, scale, out)
    else:
        torch.mul(b.view(out.shape[1], out.shape[2], -1).permute(2, 0, 1), scale, out=out)


def sum_rows(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, H] = the sum of x[places[:, j]] over j, for x [S, H] and places [T, k], added in fp32."""
    kernels = _kernels_for(x.device)
    if kernels is not None:
        kernels.add_up(x, places, out)
    else:
        out.copy_(x[places].float().sum(1))


def scaled_gate(gate_up: torch.Tensor, out: torch.Tensor, activation: str, factors: torch.Tensor) -> None:
    """out [S, F] = act(gate) up factor, of gate_up [S, 2 F] and a factor [S] a row."""
    kernels, is_clamped = _gates_for(out.device), activation == CLAMPED
    if kernels is not None:
        if is_clamped:
            kernels.clamped_gate(gate_up, out, factors)
        else:
            kernels.scaled_gate(gate_up, out, factors, activation == TANH_GELU)
        return
    if is_clamped:
        opened, up, sigmoid = _clamped(gate_up)
        out.copy_(opened * sigmoid * up * factors[:, None])
        return
    gate(gate_up, out, activation, is_gated=True)
    out *= factors[:, None].to(out.dtype)


def scaled_gate_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, activation: str, factors: torch.Tensor
) -> torch.Tensor:
    """In place: gate_up [S, 2 F] becomes its gradient, grad [S, F] (of the product) the product; returns the factors'
    gradient, fp32 [S]."""
    kernels, is_clamped = _gates_for(grad.device), activation == CLAMPED
    if kernels is not None:
        if is_clamped:
            return kernels.clamped_gate_backward(gate_up, grad, factors)
        return kernels.scaled_gate_backward(gate_up, grad, factors, activation == TANH_GELU)
    if is_clamped:
        return _clamped_gate_backward(gate_up, grad, factors)
    upstream, scale = grad.clone(), factors[:, None].to(grad.dtype)
    grad *= scale
    gate_backward(gate_up, grad, activation, is_gated=True)
    of_factors = (upstream.float() * grad.float()).sum(1)
    grad *= scale
    return of_factors


def _clamped(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gate, 1 + up, and the gate's sigmoid, fp32 [S, F] each, of gate_up [S, 2 F]."""
    opened = gate_up[:, ::2].float().clamp(max=CLAMPED_LIMIT)
    up = 1 + gate_up[:, 1::2].float().clamp(-CLAMPED_LIMIT, CLAMPED_LIMIT)
    return opened, up, torch.sigmoid(CLAMPED_SLOPE * opened)


def _clamped_gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    opened, up, sigmoid = _clamped(gate_up)
    product, scale, upstream = opened * sigmoid * up, factors[:, None], grad.float()
    of_factors = (upstream * product).sum(1)
    bend = 1 + CLAMPED_SLOPE * opened * (1 - sigmoid)
    gate_up[:, ::2] = torch.where(gate_up[:, ::2] <= CLAMPED_LIMIT, upstream * scale * up * sigmoid * bend, 0.0)
    inside = gate_up[:, 1::2].abs() <= CLAMPED_LIMIT
    gate_up[:, 1::2] = torch.where(inside, upstream * scale * opened * sigmoid, 0.0)
    grad.copy_(product * scale)
    return of_factors


def _slices(ends: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]
