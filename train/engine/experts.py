"""The same frozen linear layer of all experts of a mixture, with PEFT's adapters on each, as grouped products.

Rows of tokens come sorted by expert: S of them, `ends[e]` behind the last of expert e. As in lora_linear.py each expert
has one matrix M = [[W, s B], [A, 0]], of [N + R, K + R], and the adapters are more columns of both products. A frozen
bias is one more. R is padded so that M's rows are aligned; products take the first P of the R columns, since each is
computed for every row of an expert: 64 instead of 16 are 2 to 8 % of a product.
"""

from collections.abc import Sequence

import torch

from train.engine.grouped import TENSOR_CORES, grouped_outer, grouped_product, spread_ranks
from train.engine.linears import ExpertLinear, Projection
from train.engine.lora_linear import PADDING, OneMatrix, dequantize

Rows = tuple[torch.Tensor, torch.Tensor | None]  # x [S, W], or x [T, W] and the rows [S] of it that are meant


class ExpertGroup(OneMatrix):
    """One linear layer [N, K] of each of E experts, perhaps with adapters; weights are given to it as M [E, ...]."""

    def __init__(self, projection: Projection) -> None:
        base, adapter = projection.base, projection.adapter
        assert isinstance(base, ExpertLinear)
        self.base, self.bias = base, base.bias
        self.bases = [base]
        self.num_experts, self.num_outputs, self.num_inputs = base.shape
        self.rank = adapter.rank // self.num_experts if adapter else 0
        used = self.rank + (self.bias is not None)
        self.padded_rank = -(-used // PADDING) * PADDING
        self.num_columns = -(-used // TENSOR_CORES) * TENSOR_CORES
        self.parameters = [adapter.a, adapter.b] if adapter else []
        self.scale = adapter.scale if adapter else 0.0
        self.dropout = 0.0  # PEFT has none on experts

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of all M: [E, N + R, K + R]."""
        return self.num_experts, self.num_outputs + self.padded_rank, self.num_inputs + self.padded_rank

    @property
    def layout(self) -> tuple[object, ...]:
        """As LoraGroup's: what of M is written."""
        return self.shape, self.rank, self.bias is not None

    def fill_base(self, matrix: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Dequantises the frozen weights, wherever they are, into M."""
        place = matrix[:, : self.num_outputs, : self.num_inputs]
        is_packed = hasattr(weights[0], "quant_state")
        dequantize(weights[0], place if is_packed else self.base.turned(place))
        if self.bias is not None:
            matrix[:, : self.num_outputs, self.num_inputs + self.rank].copy_(self.bias)

    @torch.no_grad()
    def fill_adapters(self, matrix: torch.Tensor) -> None:
        """Puts A [E, r, K] and B [E, N, r], as they are now, into M."""
        if not self.parameters:
            return
        a, b = self.parameters
        up = slice(self.num_inputs, self.num_inputs + self.rank)
        down = slice(self.num_outputs, self.num_outputs + self.rank)
        matrix[:, down, : self.num_inputs].copy_(a.view(self.num_experts, self.rank, -1))
        spread_ranks(b, self.scale, matrix[:, : self.num_outputs, up])

    def forward(
        self,
        matrix: torch.Tensor,
        x: torch.Tensor,
        rows: torch.Tensor | None,
        ends: torch.Tensor,
        factors: torch.Tensor | float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Y [S, N], and X A^T [S, P] where there are adapters or biases, for x [S, K], or rows [S] of x [T, K].

        A row's bias counts as often as `factors` [S] say, by which x is multiplied already.
        """
        low = self.low_rank(matrix, x, rows, ends)
        if low is not None and self.bias is not None:
            low[:, self.rank] = factors
        weights = matrix[:, : self.num_outputs, : self.num_inputs + self.num_columns]
        return grouped_product(x, rows, low, weights.transpose(1, 2), ends), low

    def low_rank(
        self, matrix: torch.Tensor, x: torch.Tensor, rows: torch.Tensor | None, ends: torch.Tensor
    ) -> torch.Tensor | None:
        """X A^T [S, P]; None without adapters and biases."""
        if not self.num_columns:
            return None
        if not self.rank:
            return x.new_zeros(len(x if rows is None else rows), self.num_columns)
        down = slice(self.num_outputs, self.num_outputs + self.num_columns)
        return grouped_product(x, rows, None, matrix[:, down, : self.num_inputs].transpose(1, 2), ends)

    def input_gradient(
        self, matrix: torch.Tensor, grad: torch.Tensor, rows: torch.Tensor | None, ends: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dX [S, K], and dY s B [S, P] where there are adapters or biases, for grad = dY [S, N], or rows [S] of it
        [T, N]."""
        spread = None
        if self.num_columns:
            up = slice(self.num_inputs, self.num_inputs + self.num_columns)
            spread = grouped_product(grad, rows, None, matrix[:, : self.num_outputs, up], ends)
        weights = matrix[:, : self.num_outputs + self.num_columns, : self.num_inputs]
        return grouped_product(grad, rows, spread, weights, ends), spread

    def bias_gradient(self, spread: torch.Tensor | None) -> torch.Tensor | float:
        """dY b [S], in fp32: what `factors` have of the biases; of input_gradient's dY s B."""
        return 0.0 if spread is None or self.bias is None else spread[:, self.rank].float()

    def adapter_gradients(
        self, x: Rows, grad: Rows, low: torch.Tensor | None, spread: torch.Tensor | None, ends: torch.Tensor
    ) -> list[torch.Tensor]:
        """dA [r E, K] and dB [N, r E] in fp32, as PEFT has them: of X and dY, X A^T and dY s B."""
        if low is None or spread is None or not self.parameters:
            return []
        shape = self.num_experts, self.rank
        grad_a = spread.new_empty(*shape, self.num_inputs, dtype=torch.float32)
        grad_b = spread.new_empty(self.num_outputs, *shape[::-1], dtype=torch.float32)
        grouped_outer(spread[:, : self.rank], *x, ends, 1.0, grad_a)
        grouped_outer(low[:, : self.rank], *grad, ends, self.scale, grad_b.permute(2, 1, 0))
        return [grad_a.flatten(0, 1), grad_b.flatten(1)]
