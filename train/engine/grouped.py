"""Products and moves of rows sorted into groups, those of experts: as in operations.py, kernels or torch's lines.

S rows in E groups; `ends` int32 [E] holds the index behind each group's last row, on the device: nothing waits for it.
"""

import importlib
from itertools import pairwise
from typing import Any

import torch

from train.engine.operations import TANH_GELU, gate, gate_backward, kernels_for


def _kernels_for(device: torch.device) -> Any:
    """The Triton kernels for groups, or None where the device has none."""
    return importlib.import_module("train.engine.grouped_kernels") if kernels_for(device) is not None else None


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


def grouped_outer(a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, ends: torch.Tensor) -> torch.Tensor:
    """fp32 [E, p, q]: a^T b of each group's rows, a [S, p] of few columns, b [S, q], or `rows` of b [T, q]."""
    kernels = _kernels_for(a.device)
    if kernels is not None:
        return kernels.outer(a, b, rows, ends)
    b = b if rows is None else b[rows]
    return torch.stack([a[part].float().T @ b[part].float() for part in _slices(ends)])


def sum_rows(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, H] = the sum of x[places[:, j]] over j, for x [S, H] and places [T, k], added in fp32."""
    kernels = _kernels_for(x.device)
    if kernels is not None:
        kernels.add_up(x, places, out)
    else:
        out.copy_(x[places].float().sum(1))


def scaled_gate(gate_up: torch.Tensor, out: torch.Tensor, activation: str, factors: torch.Tensor) -> None:
    """out [S, F] = act(gate) up factor, of gate_up [S, 2 F] and a factor [S] a row."""
    kernels = _kernels_for(out.device)
    if kernels is not None:
        kernels.scaled_gate(gate_up, out, factors, activation == TANH_GELU)
        return
    gate(gate_up, out, activation, is_gated=True)
    out *= factors[:, None].to(out.dtype)


def scaled_gate_backward(
    gate_up: torch.Tensor, grad: torch.Tensor, activation: str, factors: torch.Tensor
) -> torch.Tensor:
    """In place: gate_up [S, 2 F] becomes its gradient, grad [S, F] (of the product) the product; returns the factors'
    gradient, fp32 [S]."""
    kernels = _kernels_for(grad.device)
    if kernels is not None:
        return kernels.scaled_gate_backward(gate_up, grad, factors, activation == TANH_GELU)
    upstream, scale = grad.clone(), factors[:, None].to(grad.dtype)
    grad *= scale
    gate_backward(gate_up, grad, activation, is_gated=True)
    of_factors = (upstream.float() * grad.float()).sum(1)
    grad *= scale
    return of_factors


def _slices(ends: torch.Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]
