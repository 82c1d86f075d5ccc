"""Frozen linear layers with LoRA adapters, those that read the same input together, as one matrix product each way.

For layers W (stacked, [N, K]) with adapters A [R, K] and s B [N, R] (block diagonal over the layers):

    Y  = X W^T + (X A^T)(s B)^T  =  [X, X A^T] [W, s B]^T
    dX = dY W + (dY s B) A       =  [dY, dY s B] [W; A]
    dA = (dY s B)^T X,   dB = s dY^T (X A^T)

Both products take their operand from the one matrix M = [[W, s B], [A, 0]] of [N + R, K + R]: the adapters cost R more
columns of a product instead of another pass over its output.
"""

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import torch

from train.engine.operations import Dropout, dropout, kernels_for


class LoraGroup:
    """The layers of one group, which share their input; `layers` are PEFT's, or plain ones without an adapter."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self.bases: list[Any] = [getattr(layer, "base_layer", layer) for layer in layers]
        adapted: list[Any] = [layer if hasattr(layer, "lora_A") else None for layer in layers]
        self.num_inputs: int = self.bases[0].in_features
        rows = columns = 0
        self.rows: list[slice] = []  # of each layer's outputs in M
        self.columns: list[slice | None] = []  # of each layer's adapter, counted from the adapters' first
        self.scales: list[float] = []
        self.parameters: list[torch.nn.Parameter] = []  # A and B of each adapted layer in turn
        for base, layer in zip(self.bases, adapted, strict=True):
            self.rows.append(slice(rows, rows + base.out_features))
            rows += base.out_features
            rank = layer.r["default"] if layer else 0
            self.columns.append(slice(columns, columns + rank) if layer else None)
            self.scales.append(layer.scaling["default"] if layer else 0.0)
            columns += rank
            if layer:
                self.parameters += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        drops = [layer.lora_dropout["default"] for layer in adapted if layer]
        self.dropout: float = max((getattr(drop, "p", 0.0) for drop in drops), default=0.0)
        self.num_outputs = rows
        self.padded_rank = -(-columns // 64) * 64  # rows stay aligned to 128 bytes: products are 1 to 4 % faster
        biases = [base.bias for base in self.bases]
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, self.bases, strict=True)
            zeros = next(bias for bias in biases if bias is not None)
            self.bias = torch.cat([zeros.new_zeros(b.out_features) if bias is None else bias for bias, b in parts])

    @property
    def shape(self) -> tuple[int, int]:
        """Of M."""
        return self.num_outputs + self.padded_rank, self.num_inputs + self.padded_rank

    def fill_base(self, matrix: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Dequantises the frozen weights of the layers, which need not be where the layers have them, into M."""
        for weight, rows in zip(weights, self.rows, strict=True):
            dequantize(weight, matrix[rows, : self.num_inputs])

    def adapter_places(self, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(place in M, parameter, factor) of each adapter's A and B."""
        adapters, places = iter(self.parameters), []
        for rows, columns, scale in zip(self.rows, self.columns, self.scales, strict=True):
            if columns is not None:
                a, b = next(adapters), next(adapters)
                start = self.num_outputs + columns.start
                places.append((matrix[start : start + a.shape[0], : self.num_inputs], a, 1.0))
                place = matrix[rows, self.num_inputs + columns.start : self.num_inputs + columns.stop]
                places.append((place, b, scale))
        return places

    def forward(
        self, matrix: torch.Tensor, x: torch.Tensor, low: torch.Tensor, out: torch.Tensor, drop: Dropout | None
    ) -> None:
        """out [T, N] = Y for x [T, K]; low [T, R] becomes X A^T, where it stands directly behind x in memory or not."""
        weight = matrix[: self.num_outputs]
        if self.padded_rank:
            self._project(matrix, x, low, drop)
        if x.stride(0) == self.num_inputs + self.padded_rank:
            wide = x.as_strided((x.shape[0], x.stride(0)), x.stride())  # [X, X A^T]
            torch.mm(wide, weight.T, out=out)
        else:
            torch.mm(x, weight[:, : self.num_inputs].T, out=out)
            out.addmm_(low, weight[:, self.num_inputs :].T)
        if self.bias is not None:
            out += self.bias

    def _project(self, matrix: torch.Tensor, x: torch.Tensor, low: torch.Tensor, drop: Dropout | None) -> None:
        down = matrix[self.num_outputs :, : self.num_inputs]  # A
        if drop is None:
            torch.mm(x, down.T, out=low)
            return
        low.zero_()
        dropped = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for number, columns in enumerate(self.columns):
            if columns is not None:
                dropout(x, dropped, drop, number)
                torch.mm(dropped, down[columns].T, out=low[:, columns])

    def input_gradient(
        self, matrix: torch.Tensor, grad_out: torch.Tensor, drop: Dropout | None, grad_x: torch.Tensor | None
    ) -> None:
        """grad_x [T, K] = dX, unless it is None; grad_out [T, N + R] holds dY and is given dY s B behind it."""
        grad_y, grad_low = grad_out[:, : self.num_outputs], grad_out[:, self.num_outputs :]
        if self.padded_rank:
            torch.mm(grad_y, matrix[: self.num_outputs, self.num_inputs :], out=grad_low)
        if grad_x is None:
            return
        up = matrix[:, : self.num_inputs]  # [W; A]
        if drop is None:
            torch.mm(grad_out, up, out=grad_x)
            return
        torch.mm(grad_y, up[: self.num_outputs], out=grad_x)
        for number, columns in enumerate(self.columns):
            if columns is not None:
                spread = grad_low[:, columns] @ up[self.num_outputs :][columns]
                dropout(spread, grad_x, drop, number, add=True)

    def adapter_gradients(
        self, grad_out: torch.Tensor, x: torch.Tensor, low: torch.Tensor, drop: Dropout | None
    ) -> list[torch.Tensor]:
        """dA [r, K] and dB [n, r] of each adapter in the order of `parameters`, fp32, after input_gradient."""
        grad_y, grad_low = grad_out[:, : self.num_outputs], grad_out[:, self.num_outputs :]
        # without dropout the adapters read the same input: one product, which reads it once
        together = _wide_mm(grad_low.T, x) if drop is None and self.padded_rank else x
        gradients = []
        for number, (rows, columns, scale) in enumerate(zip(self.rows, self.columns, self.scales, strict=True)):
            if columns is not None:
                grad_a = together[columns]
                if drop is not None:
                    read = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                    dropout(x, read, drop, number)
                    grad_a = _wide_mm(grad_low[:, columns].T, read)
                gradients += [grad_a, _wide_mm(grad_y[:, rows].T, low[:, columns]).mul_(scale)]
        return gradients


def _wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32: a sum over all tokens is not rounded to 16 bits before micro-batches are added."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def dequantize(weight: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, K] = the frozen weight, bit for bit as bitsandbytes dequantises it (NF4, nested scales or not)."""
    if not isinstance(weight, bnb.nn.Params4bit):
        out.copy_(weight)
        return
    state: Any = weight.quant_state
    kernels = kernels_for(weight.device)
    if kernels is None or state.shape[1] % state.blocksize:
        out.copy_(bnb.functional.dequantize_4bit(weight.data, state))
        return
    nested = state.state2
    num_blocks, blocks = out.numel() // state.blocksize, 32
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.absmax, state.absmax, state.absmax)
    kernels.dequantize_kernel[(-(-num_blocks // blocks),)](
        weight.data, state.absmax, *scales, state.code, out, num_blocks, out.stride(0),
        state.shape[1], state.blocksize, nested.blocksize if nested else 0, blocks,
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
