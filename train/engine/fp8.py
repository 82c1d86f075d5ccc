"""The products of frozen weights in fp8: e4m3 times e4m3 with sums in fp32, a scale a row.

Weights go from NF4 to e4m3, which has 3 bits of mantissa: 2.6 % more error (norm) beside NF4's own 9.2 %, whether a
row, a column, a tensor or a block of 128 x 128 has a scale of its own. One scale a group, a power of two, makes the two
forms that the tensor cores ask for, [N, K] and its transpose, hold the same numbers: the input gradient is that of the
function that was computed. Rows of activations and of gradients are divided by their largest magnitude / 448, so
outliers, which are a row's largest, lose nothing.

Adapters are columns of the same products, as in lora_linear.py: what is added to an output afterwards costs a pass over
it. X A^T and s B are each the sum of two e4m3 numbers, high and low, which hold 8 bits of mantissa together, as bf16
does, unless an adapter is below some 1e-6 of what it is added to; of the four products of these the least is left out:

    [X, high, high, low] [W, high', low', high']^T

Adapters' gradients are products in the compute type.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch

from train.engine.fp8_operations import (
    E4M3,
    AdapterSizes,
    Beside,
    Rows,
    adapter_columns,
    dequantize_e4m3,
    gate_backward_rows,
    gate_rows,
    measure,
    quantize,
    scale_of,
    scaled_product,
)
from train.engine.linears import Projection
from train.engine.lora_linear import LoraGroup, Pass, dequantize
from train.engine.operations import Dropout

MULTIPLE = 16  # of both widths, which the product asks for


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
class Fp8Matrix:
    """What an Fp8Group has in the place of M."""

    up: torch.Tensor  # s B [N, R]
    down: torch.Tensor  # A [R, K]
    scales: torch.Tensor  # fp32 [1, max(N, K)], all the group's scale: the product wants one a column
    sizes: AdapterSizes
    weights: dict[Form, torch.Tensor] = field(default_factory=dict)  # ROWS and COLUMNS with adapters behind them
    filled: set[Form] = field(default_factory=set)
    run: Pass = Pass.FORWARD
    made: Rows | None = None  # what the next product reads, where it was made in e4m3 with what it is made of

    def read(self, place: int) -> tuple[Form, torch.Tensor]:
        """What the pass's forward product (0) or input gradient (1) reads."""
        form = FORMS[self.run][place]
        assert form in self.filled, f"{self.run} reads {form}, which does not hold this block"
        return form, self.weights[form]

    def take(self) -> Rows | None:
        """What was made, once."""
        made, self.made = self.made, None
        return made


class Fp8Group(LoraGroup):
    """As LoraGroup, with W in e4m3."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        super().__init__(projections)
        self.bias_column = None  # it may be large beside adapters, with which it would share a scale
        most = max((columns.stop for columns in self.columns if columns), default=0)
        self.num_beside = -(-most // MULTIPLE) * MULTIPLE
        self.scale: torch.Tensor | None = None  # fp32 scalar: W / scale is e4m3; of the frozen base, found once

    def new_matrix(self, like: torch.Tensor) -> Fp8Matrix:
        """Its adapters' part; the forms of W come with what fills them."""
        up = like.new_zeros(self.num_outputs, self.padded_rank)
        down = like.new_zeros(self.padded_rank, self.num_inputs)
        scales = like.new_empty(1, max(self.num_outputs, self.num_inputs), dtype=torch.float32)
        return Fp8Matrix(up, down, scales, AdapterSizes(scales.new_zeros(2), scales.new_ones(2)))

    def begin(self, matrix: Fp8Matrix, run: Pass) -> bool:
        """As OneMatrix."""
        matrix.run = run
        return _needed(run) <= matrix.filled

    def matrix_bytes(self, element_bytes: int) -> int:
        """Of both forms in e4m3, the adapters' part and the scales."""
        widths = self.num_outputs + self.num_inputs
        both = 2 * self.num_outputs * self.num_inputs + 3 * self.num_beside * widths
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
            self.scale = scale_of(weights)
        matrix.scales.copy_(self.scale)
        matrix.filled = _needed(matrix.run)
        for form in matrix.filled - matrix.weights.keys():
            matrix.weights[form] = self._new_form(form, matrix.up)
        for weight, rows in zip(weights, self.rows, strict=True):
            if Form.WIDE in matrix.filled:
                dequantize(weight, matrix.weights[Form.WIDE][rows])
            along = matrix.weights[Form.ROWS][rows, : self.num_inputs] if Form.ROWS in matrix.filled else None
            across = matrix.weights[Form.COLUMNS][:, rows] if Form.COLUMNS in matrix.filled else None
            if along is not None or across is not None:
                dequantize_e4m3(weight, self.scale, along, across)

    def _new_form(self, form: Form, like: torch.Tensor) -> torch.Tensor:
        shape = self.num_outputs, self.num_inputs
        if form is Form.WIDE:
            return like.new_empty(shape)
        if form is Form.COLUMNS:
            shape = shape[::-1]
        return like.new_empty(shape[0], shape[1] + 3 * self.num_beside, dtype=E4M3)

    @torch.no_grad()
    def fill_adapters(self, matrix: Fp8Matrix) -> None:
        """As OneMatrix, and behind the forms of W that the pass reads."""
        super().fill_adapters(matrix)
        if not self.num_beside or self.scale is None or not matrix.filled & {Form.ROWS, Form.COLUMNS}:
            return
        sides = matrix.up[:, : self.num_beside], matrix.down[: self.num_beside].T
        measure(matrix.sizes, *sides)
        for own, form in enumerate((Form.ROWS, Form.COLUMNS)):
            if form in matrix.filled:
                out = matrix.weights[form][:, -3 * self.num_beside :]
                adapter_columns(sides[own], matrix.sizes, own, self.scale, sides[1 - own].shape[0], out)

    def gate(
        self, matrix: Fp8Matrix, gate_up: torch.Tensor, out: torch.Tensor, activation: str, is_gated: bool
    ) -> None:
        """As LoraGroup; in e4m3 at once, unless the pass's product is one of 16 bits."""
        if matrix.read(0)[0] is Form.WIDE:
            super().gate(matrix, gate_up, out, activation, is_gated)
        else:
            matrix.made = gate_rows(gate_up, out, activation, is_gated, self.num_beside)

    def gate_backward(
        self, matrix: Fp8Matrix, gate_up: torch.Tensor, grad: torch.Tensor, activation: str, is_gated: bool
    ) -> None:
        """As LoraGroup; likewise."""
        if matrix.read(1)[0] is Form.WIDE:
            super().gate_backward(matrix, gate_up, grad, activation, is_gated)
        else:
            matrix.made = gate_backward_rows(gate_up, grad, activation, is_gated, self.num_beside)

    def forward(
        self, matrix: Fp8Matrix, x: torch.Tensor, low_rank: torch.Tensor, out: torch.Tensor, drop: Dropout | None
    ) -> None:
        """As LoraGroup."""
        if self.padded_rank:
            self._project(matrix, x, low_rank, drop)
        form, weight = matrix.read(0)
        if form is Form.WIDE:
            if self.padded_rank:  # as one product, which is rounded once
                x, weight = torch.cat([x, low_rank], 1), torch.cat([weight, matrix.up], 1)
            torch.mm(x, weight.T, out=out)
        else:
            beside = Beside(low_rank[:, : self.num_beside], matrix.sizes.factors[0]) if self.num_beside else None
            scaled_product(quantize(x, beside, matrix.take()), weight.T, matrix.scales, out)
        if self.bias is not None:
            out += self.bias

    def input_gradient(
        self, matrix: Fp8Matrix, grad_out: torch.Tensor, drop: Dropout | None, grad_x: torch.Tensor | None
    ) -> None:
        """As LoraGroup; dropout goes over each adapter's part of the gradient, which is then added in its own pass."""
        self._project_gradient(matrix, grad_out)
        if grad_x is None:
            return
        grad_y, (form, weight) = grad_out[:, : self.num_outputs], matrix.read(1)
        low_rank = grad_out[:, self.num_outputs :][:, : self.num_beside]
        if form is Form.WIDE:
            if self.padded_rank and drop is None:
                grad_y = torch.cat([grad_y, low_rank], 1)
                weight = torch.cat([weight, matrix.down[: self.num_beside]], 0)
            torch.mm(grad_y, weight, out=grad_x)
        else:
            low_rank = low_rank if drop is None else low_rank.new_zeros(1, self.num_beside).expand(low_rank.shape)
            beside = Beside(low_rank, matrix.sizes.factors[1]) if self.num_beside else None
            scaled_product(quantize(grad_y, beside, matrix.take()), weight.T, matrix.scales, grad_x)
        if drop is not None:
            self._add_dropped(matrix, grad_out, drop, grad_x)


GROUPS: dict[str, type[LoraGroup]] = {"bf16": LoraGroup, "fp8": Fp8Group}  # by engine.products


def _needed(run: Pass) -> set[Form]:
    return {form for form in FORMS[run] if form is not None}
