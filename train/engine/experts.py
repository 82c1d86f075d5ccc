"""The same frozen linear layer of all experts of a mixture, with PEFT's adapters on each, as grouped products.

Rows of tokens come sorted by expert: S of them, `ends[e]` behind the last of expert e. As in lora_linear.py each expert
has one matrix M = [[W, s B], [A, 0]], of [N + R, K + R], and the adapters are R more columns of both products.
"""

from collections.abc import Sequence

import torch

from train.engine.grouped import grouped_outer, grouped_product
from train.engine.linears import ExpertLinear, Projection
from train.engine.lora_linear import PADDING, dequantize


class ExpertGroup:
    """One linear layer [N, K] of each of E experts, perhaps with adapters; weights are given to it as M [E, ...]."""

    def __init__(self, projection: Projection) -> None:
        base, adapter = projection.base, projection.adapter
        assert isinstance(base, ExpertLinear)
        self.bases = [base]
        self.num_experts, self.num_outputs, self.num_inputs = base.shape
        self.rank = adapter.rank // self.num_experts if adapter else 0
        self.padded_rank = -(-self.rank // PADDING) * PADDING
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
        return self.shape, self.rank

    def fill_base(self, matrix: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
        """Dequantises the frozen weights, wherever they are, into M."""
        dequantize(weights[0], matrix[:, : self.num_outputs, : self.num_inputs])

    def adapter_places(self, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """(place in M, adapter in M's order, factor) of A [E, r, K] and B [E, N, r]."""
        if not self.parameters:
            return []
        a, b = self.parameters
        up = slice(self.num_inputs, self.num_inputs + self.rank)
        down = slice(self.num_outputs, self.num_outputs + self.rank)
        return [
            (matrix[:, down, : self.num_inputs], a.view(self.num_experts, self.rank, -1), 1.0),
            # PEFT's columns of B are the ranks, each of all experts in turn
            (matrix[:, : self.num_outputs, up], b.view(-1, self.rank, self.num_experts).permute(2, 0, 1), self.scale),
        ]

    def low_rank(self, matrix: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """X A^T [S, R] of x [S, K]."""
        return grouped_product(x, matrix[:, self.num_outputs :, : self.num_inputs].transpose(1, 2), ends)

    def forward(self, matrix: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, num_columns: int) -> torch.Tensor:
        """[S, num_columns]: Y, and X A^T behind it where there is room; x [S, K + R] is given X A^T behind X."""
        if self.padded_rank:
            x[:, self.num_inputs :] = self.low_rank(matrix, x[:, : self.num_inputs], ends)
        return grouped_product(x, matrix[:, :num_columns].transpose(1, 2), ends)

    def input_gradient(self, matrix: torch.Tensor, grad_out: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """dX [S, K]; grad_out [S, N + R] holds dY and is given dY s B behind it."""
        if self.padded_rank:
            grad_y = grad_out[:, : self.num_outputs]
            spread = matrix[:, : self.num_outputs, self.num_inputs :]
            grad_out[:, self.num_outputs :] = grouped_product(grad_y, spread, ends)
        return grouped_product(grad_out, matrix[:, :, : self.num_inputs], ends)

    def adapter_gradients(
        self, grad_out: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor, ends: torch.Tensor
    ) -> list[torch.Tensor]:
        """dA [r E, K] and dB [N, r E] in fp32, as PEFT has them, after input_gradient; x [S, K], low_rank [S, R]."""
        if not self.parameters:
            return []
        own = slice(self.num_outputs, self.num_outputs + self.rank)
        grad_a = grouped_outer(grad_out[:, own], x, ends)
        grad_b = grouped_outer(low_rank[:, : self.rank], grad_out[:, : self.num_outputs], ends).mul_(self.scale)
        return [grad_a.flatten(0, 1), grad_b.permute(2, 1, 0).reshape(self.num_outputs, -1)]
