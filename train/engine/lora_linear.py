"""Frozen linear layers with LoRA adapters, those that read the same input together, as one matrix product each way.

For layers W (stacked, [N, K]) with adapters A [R, K] and s B [N, R] (block diagonal over the layers):

    Y  = X W^T + (X A^T)(s B)^T  =  [X, X A^T] [W, s B]^T
    dX = dY W + (dY s B) A       =  [dY, dY s B] [W; A]
    dA = (dY s B)^T X,   dB = s dY^T (X A^T)

Both products take their operand from the one matrix M = [[W, s B], [A, 0]] of [N + R, K + R]: the adapters cost R more
columns of a product instead of another pass over its output. A frozen bias is one more such column.
"""

import math
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

import bitsandbytes as bnb
import torch

from train.engine.dropout_products import Dropped, add_spread, gradients, project
from train.engine.linears import Linear, Projection
from train.engine.mxfp4 import MXFP4, dequantize_mxfp4
from train.engine.operations import Dropout, gate, gate_backward, kernels_for, wide_mm

FROZEN_LINEARS = (torch.nn.Linear, bnb.nn.Linear4bit)
PADDING = 64  # adapters' columns fill a multiple: rows stay aligned to 128 bytes, products are 1 to 4 % faster
Matrices = list[Any]  # M of each group, or what it has in its place, in the order of a block's, or of a half's, groups


class Pass(Enum):
    """What a block's matrices are asked for."""

    FORWARD = auto()
    BACKWARD = auto()  # of a block that kept its activations
    RECOMPUTED = auto()  # forward again, then backward
    CHECKED = auto()  # forward, to be compared with transformers


class OneMatrix:
    """A group whose weights are one tensor M, which serves every pass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of M."""
        raise NotImplementedError

    def new_matrix(self, like: torch.Tensor) -> Any:
        """M without weights, of the type and on the device of `like`."""
        return like.new_zeros(self.shape)

    def begin(self, matrix: Any, run: Pass) -> bool:
        """The pass for which M is read next; returns whether the base that has been filled in serves it."""
        return True

    def matrix_bytes(self, element_bytes: int) -> int:
        """Of M, where an element of the compute type has so many."""
        return element_bytes * math.prod(self.shape)

    def fill_adapters(self, matrix: Any) -> None:
        """Puts the adapters, as they are now, into M."""
        raise NotImplementedError


class LoraGroup(OneMatrix):
    """Linear layers that read the same input, some or all with adapters; weights are given to it as M."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.bases = [projection.base for projection in projections]
        self.num_inputs = self.bases[0].in_features
        rows = columns = 0
        self.rows: list[slice] = []  # of each layer's outputs in M
        self.columns: list[slice | None] = []  # of each layer's adapter, counted from the adapters' first
        self.scales: list[float] = []
        self.parameters: list[torch.nn.Parameter] = []  # A and B of each adapted layer in turn
        for base, adapter in ((each.base, each.adapter) for each in projections):
            self.rows.append(slice(rows, rows + base.out_features))
            rows += base.out_features
            rank = adapter.rank if adapter else 0
            self.columns.append(slice(columns, columns + rank) if adapter else None)
            self.scales.append(adapter.scale if adapter else 0.0)
            columns += rank
            if adapter:
                self.parameters += [adapter.a, adapter.b]
        self.dropout = max((each.adapter.dropout for each in projections if each.adapter), default=0.0)
        self.num_outputs = rows
        self.bias = _stacked_bias(self.bases)
        # where there are adapters, the bias is the column of M behind theirs, and 1 behind X A^T: it costs no pass
        self.bias_column = columns if self.bias is not None and columns else None
        columns += self.bias_column is not None
        self.padded_rank = -(-columns // PADDING) * PADDING

    @property
    def shape(self) -> tuple[int, int]:
        """Of M: [N + R, K + R]."""
        return self.num_outputs + self.padded_rank, self.num_inputs + self.padded_rank

    @property
    def layout(self) -> tuple[object, ...]:
        """What of M is written, and where; the rest stays zero. Groups of one layout can take turns in one matrix."""
        adapters = [(columns.start, columns.stop) if columns else None for columns in self.columns]
        return self.shape, tuple(base.out_features for base in self.bases), tuple(adapters), self.bias_column

    def up(self, matrix: Any) -> torch.Tensor:
        """s B [N, R], and the bias, where they are in M."""
        return matrix[: self.num_outputs, self.num_inputs :]

    def down(self, matrix: Any) -> torch.Tensor:
        """A [R, K], where it is in M."""
        return matrix[self.num_outputs :, : self.num_inputs]

    def fill_base(self, matrix: Any, weights: Sequence[torch.Tensor]) -> None:
        """Dequantises the layers' frozen weights, wherever they are, into M."""
        for weight, rows in zip(weights, self.rows, strict=True):
            dequantize(weight, matrix[rows, : self.num_inputs])
        self._fill_bias(matrix)

    def _fill_bias(self, matrix: Any) -> None:
        if self.bias is not None and self.bias_column is not None:
            self.up(matrix)[:, self.bias_column].copy_(self.bias)

    def adapter_places(self, matrix: Any) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(place in M, parameter, factor) of each adapter's A and B."""
        adapters, places = iter(self.parameters), []
        for rows, columns, scale in zip(self.rows, self.columns, self.scales, strict=True):
            if columns is not None:
                a, b = next(adapters), next(adapters)
                places.append((self.down(matrix)[columns], a, 1.0))
                places.append((self.up(matrix)[rows, columns], b, scale))
        return places

    @torch.no_grad()
    def fill_adapters(self, matrix: Any) -> None:
        """As OneMatrix."""
        for place, parameter, factor in self.adapter_places(matrix):
            if factor == 1.0:
                place.copy_(parameter)
            else:
                torch.mul(parameter, factor, out=place)

    def gate(self, matrix: Any, gate_up: torch.Tensor, out: torch.Tensor, activation: str, is_gated: bool) -> None:
        """operations.gate, where `out` is what `forward` reads next."""
        gate(gate_up, out, activation, is_gated)

    def gate_backward(
        self, matrix: Any, gate_up: torch.Tensor, grad: torch.Tensor, activation: str, is_gated: bool
    ) -> None:
        """operations.gate_backward, where gate_up is what `input_gradient` reads next."""
        gate_backward(gate_up, grad, activation, is_gated)

    def forward(
        self, matrix: Any, x: torch.Tensor, low_rank: torch.Tensor, out: torch.Tensor, drop: Dropout | None
    ) -> None:
        """out [T, N] = Y for x [T, K]; low_rank [T, R] becomes X A^T.

        One product of [X, X A^T], which is copied together where low_rank is not the columns directly behind x in
        memory. Two products would be rounded apart, and what is less than half a step of the large one's rounded output
        is lost: cuBLAS on Hopper rounds a 16-bit product before it adds a matrix to it, as addmm asks for.
        """
        weight, wide = matrix[: self.num_outputs], x
        if self.padded_rank:
            self._project(matrix, x, low_rank, drop)
            if x.stride(0) == self.num_inputs + self.padded_rank:
                wide = x.as_strided((x.shape[0], x.stride(0)), x.stride())
            else:
                wide = torch.cat([x, low_rank], 1)
        self._product(wide, weight.T, out)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        if self.bias is None or self.bias_column is not None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(self.bias, x, weight, out=out)

    def _project(self, matrix: Any, x: torch.Tensor, low_rank: torch.Tensor, drop: Dropout | None) -> None:
        down = self.down(matrix)
        if drop is None:
            _leave_no_gap(low_rank)
            torch.mm(x, down.T, out=low_rank)
        else:
            self._project_dropped(down, x, low_rank, drop)
        if self.bias_column is not None:
            low_rank[:, self.bias_column] = 1

    def _project_dropped(self, down: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, drop: Dropout) -> None:
        low_rank.zero_()
        project(x, down, Dropped(drop, self.columns), low_rank)

    def input_gradient(
        self, matrix: Any, grad_out: torch.Tensor, drop: Dropout | None, grad_x: torch.Tensor | None
    ) -> None:
        """grad_x [T, K] = dX, unless it is None; grad_out [T, N + R] holds dY and is given dY s B behind it."""
        self._project_gradient(matrix, grad_out)
        if grad_x is None:
            return
        if drop is None:
            torch.mm(grad_out, matrix[:, : self.num_inputs], out=grad_x)  # [W; A]
        else:
            torch.mm(grad_out[:, : self.num_outputs], matrix[: self.num_outputs, : self.num_inputs], out=grad_x)
            self._add_dropped(matrix, grad_out, drop, grad_x)

    def _project_gradient(self, matrix: Any, grad_out: torch.Tensor) -> None:
        if self.padded_rank:
            grad_low_rank = grad_out[:, self.num_outputs :]
            _leave_no_gap(grad_low_rank)
            torch.mm(grad_out[:, : self.num_outputs], self.up(matrix), out=grad_low_rank)

    def _add_dropped(self, matrix: Any, grad_out: torch.Tensor, drop: Dropout, grad_x: torch.Tensor) -> None:
        add_spread(grad_out[:, self.num_outputs :], self.down(matrix), Dropped(drop, self.columns), grad_x)

    def adapter_gradients(
        self, grad_out: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, drop: Dropout | None
    ) -> list[torch.Tensor]:
        """dA [r, K] and dB [n, r] of each adapter in the order of `parameters`, fp32, after input_gradient."""
        grad_y, grad_low_rank = grad_out[:, : self.num_outputs], grad_out[:, self.num_outputs :]
        if not self.parameters:
            return []
        # the adapters read the same input, which is read once: by one product, or with the masks that each puts on it
        if drop is None:
            of_down = wide_mm(grad_low_rank.T, x)
        else:
            of_down = gradients(grad_low_rank, x, Dropped(drop, self.columns))
        found = []
        for rows, columns, scale in zip(self.rows, self.columns, self.scales, strict=True):
            if columns is not None:
                found += [of_down[columns], wide_mm(grad_y[:, rows].T, low_rank[:, columns]).mul_(scale)]
        return found


def _leave_no_gap(columns: torch.Tensor) -> None:
    """Fills new memory behind a product's operand, on a CPU.

    There a bf16 product reads on where the number of columns is no multiple of 32, and multiplies it by 0 (torch 2.13).
    """
    if not columns.is_cuda:
        columns.zero_()


def _stacked_bias(bases: Sequence[Linear]) -> torch.Tensor | None:
    """[N], zeros where a layer has none; None where no layer has one."""
    like = next((base.bias for base in bases if base.bias is not None), None)
    if like is None:
        return None
    return torch.cat([like.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases])


def frozen_matrix(base: Linear, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of one of FROZEN_LINEARS in the compute type: itself, or what its NF4 stands for."""
    if not isinstance(base.weight, bnb.nn.Params4bit):
        return base.weight
    out = torch.empty(base.out_features, base.in_features, dtype=dtype, device=base.weight.device)
    dequantize(base.weight, out)
    return out


def dequantize(weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, K], or [E, N, K], = the frozen weight, bit for bit as bitsandbytes dequantises it (NF4), or as it is in
    MXFP4."""
    if not isinstance(weight, bnb.nn.Params4bit):
        out.copy_(weight)
        return
    state: Any = weight.quant_state
    kernels = kernels_for(weight.device)
    if kernels is None and state.quant_type == MXFP4:
        dequantize_mxfp4(weight.data, state, out)
        return
    if kernels is None or state.shape[-1] % state.blocksize:
        out.copy_(bnb.functional.dequantize_4bit(weight.data, state))
        return
    nested = state.state2
    num_blocks, blocks = out.numel() // state.blocksize, 32
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.absmax, state.absmax, state.absmax)
    kernels.dequantize_kernel[(-(-num_blocks // blocks),)](
        weight.data, state.absmax, *scales, state.code, out, num_blocks, out.stride(0) if out.dim() == 3 else 0,
        out.stride(-2), state.shape[-2], state.shape[-1], state.blocksize, nested.blocksize if nested else 0, blocks,
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
