"""The products of frozen weights in fp8: e4m3 times e4m3 with sums in fp32, a scale a row; adapters in 16 bits.

Weights go from NF4 to e4m3, which has 3 bits of mantissa: 2.6 % more error (norm) beside NF4's own 9.2 %, whether a
row, a column, a tensor or a block of 128 x 128 has a scale of its own. One scale a group, a power of two, makes the two
forms that the tensor cores ask for, [N, K] and its transpose, hold the same numbers: the input gradient is that of the
function that was computed. Rows of activations and of gradients are divided by their largest magnitude / 448, so
outliers, which are a row's largest, lose nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch

from train.engine.lora_linear import LoraGroup, Pass, dequantize
from train.engine.operations import Dropout, kernels_for
from train.run import devices

E4M3, LARGEST = torch.float8_e4m3fn, 448.0  # the type, and its largest number
TINY = 1e-12  # in place of the largest magnitude of a row of zeros; the same in fp8_kernels.py
MULTIPLE = 16  # of both widths, which the product asks for
CHUNK_BYTES = 2**27  # of a product that is not written where it belongs: 2,340 rows of an 8B's gate and up
FAST_ACCUMULATION: bool = True  # Hopper adds within the tensor core, with some 14 bits, instead of in fp32 registers


class Form(Enum):
    """How a group's W is held for one kind of product."""

    ROWS = auto()  # e4m3 [N, K], which forward products read
    COLUMNS = auto()  # e4m3 [K, N], which input gradients read: operands lie along the sum
    WIDE = auto()  # [N, K] in the compute type


# what the forward product and the input gradient of a pass read; Form.WIDE runs one of them in 16 bits
FORMS: dict[Pass, tuple[Form | None, Form | None]] = {
    Pass.FORWARD: (Form.ROWS, None),
    Pass.BACKWARD: (None, Form.COLUMNS),
    Pass.RECOMPUTED: (Form.ROWS, Form.COLUMNS),
    Pass.CHECKED: (Form.WIDE, None),
}


@dataclass
class Rows:
    """[T, W] in e4m3: values times their row's scale."""

    values: torch.Tensor  # e4m3 [T, W]
    scales: torch.Tensor  # fp32 [T, 1]

    @classmethod
    def of_shape(cls, x: torch.Tensor) -> "Rows":
        """Room for x [T, W]."""
        return cls(torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32))


@dataclass
class Fp8Matrix:
    """What an Fp8Group has in the place of M."""

    up: torch.Tensor  # s B [N, R], and the bias
    down: torch.Tensor  # A [R, K]
    scales: torch.Tensor  # fp32 [1, max(N, K)], all the group's scale: the product wants one a column
    weights: dict[Form, torch.Tensor] = field(default_factory=dict)
    filled: set[Form] = field(default_factory=set)
    run: Pass = Pass.FORWARD

    def read(self, place: int) -> tuple[Form, torch.Tensor]:
        """What the pass's forward product (0) or input gradient (1) reads."""
        form = FORMS[self.run][place]
        assert form in self.filled, f"{self.run} reads {form}, which does not hold this block"
        return form, self.weights[form]


class Fp8Group(LoraGroup):
    """As LoraGroup, with W in e4m3."""

    scale: torch.Tensor | None = None  # fp32 scalar on the device: W / scale is e4m3; of the frozen base, found once

    def new_matrix(self, like: torch.Tensor) -> Fp8Matrix:
        """Its adapters' part; the forms of W come with what fills them."""
        up = like.new_zeros(self.num_outputs, self.padded_rank)
        down = like.new_zeros(self.padded_rank, self.num_inputs)
        return Fp8Matrix(up, down, like.new_empty(1, max(self.num_outputs, self.num_inputs), dtype=torch.float32))

    def begin(self, matrix: Fp8Matrix, run: Pass) -> bool:
        """As OneMatrix."""
        matrix.run = run
        return _needed(run) <= matrix.filled

    def matrix_bytes(self, element_bytes: int) -> int:
        """Of both forms in e4m3, the adapters' part and the scales."""
        widths = self.num_outputs + self.num_inputs
        both = 2 * self.num_outputs * self.num_inputs
        return both + element_bytes * self.padded_rank * widths + 4 * max(self.num_outputs, self.num_inputs)

    def up(self, matrix: Fp8Matrix) -> torch.Tensor:
        """As LoraGroup."""
        return matrix.up

    def down(self, matrix: Fp8Matrix) -> torch.Tensor:
        """As LoraGroup."""
        return matrix.down

    def fill_base(self, matrix: Fp8Matrix, weights: Sequence[torch.Tensor]) -> None:
        """Dequantises the layers' frozen weights, wherever they are, into the forms that the pass reads."""
        if self.scale is None:
            self.scale = _scale_of(weights)
        matrix.scales.copy_(self.scale)
        matrix.filled = _needed(matrix.run)
        for form in matrix.filled - matrix.weights.keys():
            shape = (self.num_inputs, self.num_outputs) if form is Form.COLUMNS else (self.num_outputs, self.num_inputs)
            matrix.weights[form] = matrix.up.new_empty(shape, dtype=matrix.up.dtype if form is Form.WIDE else E4M3)
        for weight, rows in zip(weights, self.rows, strict=True):
            if Form.WIDE in matrix.filled:
                dequantize(weight, matrix.weights[Form.WIDE][rows])
            along = matrix.weights[Form.ROWS][rows] if Form.ROWS in matrix.filled else None
            across = matrix.weights[Form.COLUMNS][:, rows] if Form.COLUMNS in matrix.filled else None
            if along is not None or across is not None:
                dequantize_e4m3(weight, self.scale, along, across)
        self._fill_bias(matrix)

    def forward(
        self, matrix: Fp8Matrix, x: torch.Tensor, low_rank: torch.Tensor, out: torch.Tensor, drop: Dropout | None
    ) -> None:
        """As LoraGroup; the adapters' product is added to the output, rounded, in a pass of its own."""
        if self.padded_rank:
            self._project(matrix, x, low_rank, drop)
        form, weight = matrix.read(0)
        if form is Form.WIDE:
            torch.mm(x, weight.T, out=out)
        else:
            scaled_product(quantize(x), weight.T, matrix.scales, out)
        if self.padded_rank:
            out.addmm_(low_rank, matrix.up.T)
        if self.bias is not None and self.bias_column is None:
            out += self.bias

    def input_gradient(
        self, matrix: Fp8Matrix, grad_out: torch.Tensor, drop: Dropout | None, grad_x: torch.Tensor | None
    ) -> None:
        """As LoraGroup."""
        self._project_gradient(matrix, grad_out)
        if grad_x is None:
            return
        grad_y, (form, weight) = grad_out[:, : self.num_outputs], matrix.read(1)
        if form is Form.WIDE:
            torch.mm(grad_y, weight, out=grad_x)
        else:
            scaled_product(quantize(grad_y), weight.T, matrix.scales, grad_x)
        if drop is not None:
            self._add_dropped(matrix, grad_out, drop, grad_x)
        elif self.padded_rank:
            grad_x.addmm_(grad_out[:, self.num_outputs :], matrix.down)


GROUPS: dict[str, type[LoraGroup]] = {"bf16": LoraGroup, "fp8": Fp8Group}  # by engine.products


def _needed(run: Pass) -> set[Form]:
    return {form for form in FORMS[run] if form is not None}


def _scale_of(weights: Sequence[torch.Tensor]) -> torch.Tensor:
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
    scales = (nested.code, nested.absmax, state.offset) if nested else (state.absmax, state.absmax, state.absmax)
    words = None if across is None else across.view(torch.int32)
    rows, places = kernels.DEQUANTIZED_ROWS, [out if out is not None else scale for out in (along, words)]
    strides = [0 if out is None else out.stride(0) for out in (along, words)]
    kernels.dequantize_kernel[(width // state.blocksize, -(-num_rows // rows))](
        weight.data, state.absmax, *scales, state.code, scale, *places, num_rows, *strides, width, state.blocksize,
        nested.blocksize if nested else 0, along is not None, across is not None, rows, enable_fp_fusion=False,
        num_warps=4,
    )  # fmt: skip


def quantize(x: torch.Tensor) -> Rows:
    """[T, W] in e4m3; a row with infinity or NaN becomes NaN where it has them."""
    rows = Rows.of_shape(x)
    kernels = _kernels_for(x.device)
    if kernels is None:
        wide = x.float()
        torch.mul(wide.abs().amax(1, keepdim=True).clamp(min=TINY), 1 / LARGEST, out=rows.scales)
        rows.values.copy_(wide / rows.scales)
        return rows
    block = 1 << (x.shape[1] - 1).bit_length()
    kernels.quantize_kernel[(x.shape[0],)](
        x, x.stride(0), rows.values, rows.values.stride(0), rows.scales, x.shape[1], block,
        num_warps=4 if block <= 4096 else 16,
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
