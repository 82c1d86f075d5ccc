"""What fp8 products read, and the products: frozen weights, adapters and rows in e4m3 (fp8.py says which and why).

The kernels are in fp8_kernels.py; where there is none, torch's lines here compute the same numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.engine.lora_linear import dequantize
from train.engine.operations import TANH_GELU, gate, gate_backward, kernels_for, power_of_two
from train.run import devices

E4M3, LARGEST = torch.float8_e4m3fn, 448.0  # the type, and its largest number
TINY = 1e-12  # in place of the largest magnitude of a row of zeros; the same in fp8_kernels.py, as are the next two
LEAST = 1e-30  # in place of the largest magnitude of adapters that are zero
ROW_BLOCK = 2048  # elements of a row that a program takes at once where it goes over the row twice
CHUNK_BYTES = 2**27  # of a product that is not written where it belongs: 2,340 rows of an 8B's gate and up
FAST_ACCUMULATION: bool = True  # Hopper adds within the tensor core, with some 14 bits, instead of in fp32 registers


@dataclass
class Rows:
    """[T, W] in e4m3: values times their row's scale."""

    values: torch.Tensor  # e4m3 [T, W]
    scales: torch.Tensor  # fp32 [T, 1]

    @classmethod
    def of_shape(cls, num_rows: int, width: int, device: torch.device) -> "Rows":
        """Room for so many."""
        values = torch.empty(num_rows, width, dtype=E4M3, device=device)
        return cls(values, torch.empty(num_rows, 1, dtype=torch.float32, device=device))


@dataclass(frozen=True)
class Beside:
    """What goes through an adapter, to be columns behind rows."""

    low_rank: torch.Tensor  # [T, R]
    factor: torch.Tensor  # scalar: it is divided by this, and the adapter multiplied


@dataclass
class AdapterSizes:
    """What a group's adapters are scaled by, and from what that follows; fp32 [2]: of s B, and of A."""

    largest: torch.Tensor  # the magnitude of its largest element
    factors: torch.Tensor  # Beside.factor, of the forward product and of the input gradient


def scale_of(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """A power of two by which no element of the weights is more than 448."""
    largest = torch.stack([_largest(weight) for weight in weights]).max()
    return torch.exp2(torch.frexp(largest / LARGEST).exponent.float())


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """No element of the weight is larger: of NF4 the largest scale, or what a quantised one can be at most."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return weight.abs().max().float()
    return state.state2.absmax.max() + state.offset if state.nested else state.absmax.max()


def dequantize_e4m3(
    weight: torch.Tensor, scale: torch.Tensor, along: torch.Tensor | None, across: torch.Tensor | None
) -> None:
    """along [N, K] and across [K, N], where they are given, = the frozen weight / scale, in e4m3."""
    state: Any = getattr(weight, "quant_state", None)
    kernels = _kernels_for(weight.device)
    shape = weight.shape if state is None else state.shape
    if kernels is None or state is None or shape[1] % state.blocksize or shape[0] % kernels.WORD.value:
        wide = torch.empty(shape, device=weight.device)
        dequantize(weight, wide)
        values = (wide / scale).to(E4M3)
        for out, part in ((along, values), (across, values.T)):
            if out is not None:
                out.copy_(part)
        return
    nested, (num_rows, width) = state.state2, shape
    num_blocks, blocks, words = num_rows * width // state.blocksize, kernels.BLOCKS_ALONG, kernels.WORDS_ACROSS
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.absmax, state.absmax, state.absmax)
    packed, read = weight.data.flatten(), (state.absmax, *scales, state.code, scale)
    of_weight = width, state.blocksize, nested.blocksize if nested else 0
    if along is not None:
        out = along.view(torch.int64)
        kernels.dequantize_along_kernel[(-(-num_blocks // blocks),)](
            packed.view(torch.int32), *read, out, num_blocks, out.stride(0), *of_weight, blocks,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    if across is not None:
        out = across.view(torch.int32)
        kernels.dequantize_across_kernel[(width // state.blocksize, -(-num_rows // (kernels.WORD.value * words)))](
            packed.view(torch.int64), *read, out, num_rows, out.stride(0), *of_weight, words,
            enable_fp_fusion=False, num_warps=2,
        )  # fmt: skip


def measure(sizes: AdapterSizes, up: torch.Tensor, down: torch.Tensor) -> None:
    """sizes.largest = the largest magnitudes of s B, `up` [N, R], and A, `down` [K, R]; NaN where there is one."""
    kernels = _kernels_for(up.device)
    if kernels is None:
        for largest, side in zip(sizes.largest, (up, down), strict=True):
            torch.linalg.vector_norm(side, torch.inf, dtype=torch.float32, out=largest)
        return
    rank = up.shape[1]
    rows = max(1, kernels.COLUMN_ELEMENTS // power_of_two(rank))
    sizes.largest.zero_()
    kernels.largest_kernel[(sum(-(-len(side) // rows) for side in (up, down)),)](
        up, *up.stride(), len(up), down, *down.stride(), len(down), sizes.largest.view(torch.int32), rank,
        power_of_two(rank), rows, num_warps=4,
    )  # fmt: skip


def adapter_factor(largest: torch.Tensor, own: int, scale: torch.Tensor, width: int) -> torch.Tensor:
    """The power of two that s B (0) or A (1) is multiplied with, and what goes through it divided by.

    As large as makes both operands alike: rows of X that are not parallel to any of A [R, K] have products of sqrt(K)
    times its elements; but no element of the adapter becomes more than 448 scales.
    """
    most = LARGEST * scale / largest[own].clamp(min=LEAST)
    wanted = math.sqrt(width) * largest[1 - own].clamp(min=LEAST)
    return torch.exp2(torch.frexp(torch.minimum(most, wanted)).exponent.float() - 1)


def adapter_columns(
    side: torch.Tensor, sizes: AdapterSizes, own: int, scale: torch.Tensor, width: int, out: torch.Tensor
) -> None:
    """out [N, 3 R] = high, low, high of s B (own 0) or A^T (1) times its factor, in units of the weights' scale.

    The side is [N, R]; the other one has rows of `width`. The factor, adapter_factor, goes to sizes.factors.
    """
    num_rows, rank = side.shape
    kernels = _kernels_for(side.device)
    if kernels is None:
        factor = adapter_factor(sizes.largest, own, scale, width)
        sizes.factors[own] = factor
        high, low = _split(side.float() * (factor / scale))
        out.copy_(torch.cat([high, low, high], 1))
        return
    rows = max(1, kernels.COLUMN_ELEMENTS // power_of_two(rank))
    kernels.columns_kernel[(-(-num_rows // rows),)](
        side, *side.stride(), out.view(torch.uint8), out.stride(0), sizes.largest, scale, sizes.factors,
        math.sqrt(width), num_rows, own, rank, power_of_two(rank), rows, enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """high and low: e4m3 numbers that add up to x."""
    high = x.to(E4M3)
    return high, (x - high.float()).to(E4M3)


def quantize(x: torch.Tensor, beside: Beside | None = None, made: Rows | None = None) -> Rows:
    """[T, W] in e4m3, or [T, W + 3 R]: behind x high, high and low of what is beside it, with the same scale a row.

    A row with infinity or NaN becomes NaN where it has them. `made` has room for it, and x in e4m3 already.
    """
    if made is not None:
        return _with_beside(x, beside, made)
    rank = beside.low_rank.shape[1] if beside else 0
    num_rows, width = x.shape
    rows = Rows.of_shape(num_rows, width + 3 * rank, x.device)
    kernels = _kernels_for(x.device)
    if kernels is None:
        wide = x.float() if beside is None else torch.cat([x.float(), beside.low_rank.float() / beside.factor], 1)
        torch.mul(wide.abs().amax(1, keepdim=True).clamp(min=TINY), 1 / LARGEST, out=rows.scales)
        wide = wide * (1 / rows.scales)
        high, low = _split(wide[:, width:])
        rows.values.copy_(torch.cat([wide[:, :width].to(E4M3), high, high, low], 1))
        return rows
    low_rank = beside.low_rank if beside else x
    assert x.stride(1) == low_rank.stride(1) == 1
    kernels.quantize_kernel[(num_rows,)](
        x, x.stride(0), low_rank, low_rank.stride(0), beside.factor if beside else x, rows.values,
        rows.values.stride(0), rows.scales, width, rank, power_of_two(max(1, rank)), ROW_BLOCK,
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
    return rows


def _with_beside(x: torch.Tensor, beside: Beside | None, rows: Rows) -> Rows:
    """Rows that hold x [T, W] already get what is beside it."""
    if beside is not None:
        low_rank, (num_rows, width) = beside.low_rank, x.shape
        rank = low_rank.shape[1]
        assert rows.values.shape == (num_rows, width + 3 * rank)
        assert x.stride(1) == low_rank.stride(1) == 1
        _kernels_for(x.device).beside_kernel[(num_rows,)](
            x, x.stride(0), low_rank, low_rank.stride(0), beside.factor, rows.values, rows.values.stride(0),
            rows.scales, width, rank, power_of_two(rank), ROW_BLOCK, enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
    return rows


def gate_rows(gate_up: torch.Tensor, out: torch.Tensor, activation: str, is_gated: bool, rank: int) -> Rows | None:
    """As operations.gate; and out in e4m3 [T, F + 3 `rank`], of which it fills F, where there are kernels for that."""
    kernels = _kernels_for(out.device)
    if kernels is None:
        gate(gate_up, out, activation, is_gated)
        return None
    num_rows, width = out.shape
    rows = Rows.of_shape(num_rows, width + 3 * rank, out.device)
    kernels.gate_rows_kernel[(num_rows,)](
        gate_up, gate_up.stride(0), out, out.stride(0), rows.values, rows.values.stride(0), rows.scales, width,
        activation == TANH_GELU, is_gated, ROW_BLOCK, num_warps=8,
    )  # fmt: skip
    return rows


def gate_backward_rows(
    gate_up: torch.Tensor, grad: torch.Tensor, activation: str, is_gated: bool, rank: int
) -> Rows | None:
    """As operations.gate_backward; and the gradient of gate and up in e4m3, as gate_rows."""
    kernels = _kernels_for(grad.device)
    if kernels is None:
        gate_backward(gate_up, grad, activation, is_gated)
        return None
    num_rows, width = grad.shape
    rows = Rows.of_shape(num_rows, (1 + is_gated) * width + 3 * rank, grad.device)
    kernels.gate_backward_rows_kernel[(num_rows,)](
        gate_up, gate_up.stride(0), grad, grad.stride(0), rows.values, rows.values.stride(0), rows.scales, width,
        activation == TANH_GELU, is_gated, ROW_BLOCK, num_warps=8,
    )  # fmt: skip
    return rows


def scaled_product(a: Rows, b: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, N] = a b scaled, for b [W, N], the transpose of rows in memory, in e4m3; scales [1, N or more].

    On a CPU the same numbers are multiplied in fp32. Where `out` is a range of wider rows that the product cannot
    write, it goes through dense ones, CHUNK_BYTES at a time.
    """
    scales = scales[:, : b.shape[1]]
    if out.is_contiguous() or writes_ranges(out.device):
        _multiply(a, b, scales, out)
        return
    rows_per_chunk = max(16, CHUNK_BYTES // (out.shape[1] * out.element_size()))
    for start in range(0, out.shape[0], rows_per_chunk):
        part = out[start : start + rows_per_chunk]
        rows = slice(start, start + part.shape[0])
        dense = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        _multiply(Rows(a.values[rows], a.scales[rows]), b, scales, dense)
        part.copy_(dense)


def writes_ranges(device: torch.device) -> bool:
    """Whether torch's product heeds the stride of its output's rows.

    cuBLAS does, which torch takes on Hopper in builds for CUDA 12.9 or newer. Of the kernels that it takes elsewhere
    (RowwiseScaledMM.cu) those of 8.9, and on 9.0 and 10.x those of transposed problems, write dense rows into any
    output, without an error.
    """
    if device.type != "cuda":
        return True
    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return devices.capability(device)[0] == 9 and version >= (12, 9)


def _multiply(a: Rows, b: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    if not out.is_cuda:
        out.copy_((a.values.float() @ b.float()) * a.scales * scales)
        return
    torch._scaled_mm(
        a.values, b, a.scales, scales, out_dtype=out.dtype, use_fast_accum=FAST_ACCUMULATION, out=out
    )  # the public torch.nn.functional.scaled_mm writes no `out`


def _kernels_for(device: torch.device) -> Any:
    if kernels_for(device) is None:
        return None
    from train.engine import fp8_kernels

    return fp8_kernels
