"""The MLP half of a block, forward and backward, in tiles of tokens where memory asks for it."""

from dataclasses import dataclass

import torch

from train.engine.context import ForwardContext
from train.engine.layers import DecoderLayer
from train.engine.lora_linear import LoraGroup, Matrices


@dataclass
class MlpActivations:
    """What the backward pass of an MLP reads. Its output is not part of it, so down_proj need not be recomputed."""

    read: torch.Tensor  # [T, H + R]: what it reads, and behind it its product with the adapters' A^T
    gate_up: torch.Tensor | None = None  # [T, 2 F + R]; None where the MLP is tiled: each tile is recomputed on demand


class Mlp:
    """down(act(gate(x)) up(x)), or down(act(up(x)))."""

    def __init__(self, layer: DecoderLayer, number: int, group: type[LoraGroup]) -> None:
        self.number = number
        self.gate_up = group(layer.gate_up)
        self.down = group([layer.down])
        self.groups = [self.gate_up, self.down]
        self.num_read_columns = self.gate_up.padded_rank  # behind what it reads
        self.num_gradient_columns = self.down.padded_rank  # behind the gradient of its output
        self.activation, self.is_gated = layer.activation, layer.is_gated

    def forward(self, matrices: Matrices, read: torch.Tensor, context: ForwardContext) -> MlpActivations:
        """Gate and up of read [T, H + R], whose last columns it fills, unless they are tiled; `finish` makes more."""
        saved, tiles = MlpActivations(read), context.tiles(read.shape[0])
        if len(tiles) == 1:
            saved.gate_up = self._gate_up(matrices, saved, tiles[0], context)
        return saved

    def _gate_up(self, matrices: Matrices, saved: MlpActivations, rows: slice, context: ForwardContext) -> torch.Tensor:
        """[t, 2 F + R]: gate and up of one tile, with the adapters' columns behind them."""
        if saved.gate_up is not None:
            return saved.gate_up
        read, width = saved.read[rows], self.gate_up.num_inputs
        gate_up = read.new_empty(read.shape[0], self.gate_up.num_outputs + self.gate_up.padded_rank)
        out, drop = gate_up[:, : self.gate_up.num_outputs], context.drop(self.number, 2, rows)
        self.gate_up.forward(matrices[0], read[:, :width], read[:, width:], out, drop)
        return gate_up

    def finish(
        self, matrices: Matrices, saved: MlpActivations, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The MLP's output [T, H], and down_proj's input times A^T [T, R]."""
        width, read = self.down.num_inputs, saved.read
        out = read.new_empty(read.shape[0], self.down.num_outputs)
        low_rank = read.new_empty(read.shape[0], self.down.padded_rank)
        for rows in context.tiles(read.shape[0]):
            product = out.new_empty(out[rows].shape[0], width + self.down.padded_rank)
            gate_up = self._gate_up(matrices, saved, rows, context)
            self.down.gate(matrices[1], gate_up, product[:, :width], self.activation, self.is_gated)
            drop = context.drop(self.number, 3, rows)
            self.down.forward(matrices[1], product[:, :width], product[:, width:], out[rows], drop)
            low_rank[rows] = product[:, width:]
            del gate_up
        return out, low_rank

    def backward(
        self,
        matrices: Matrices,
        saved: MlpActivations,
        low_rank: torch.Tensor,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The adapters' gradients, from the output's [T, H + R]; grad_read [T, H] becomes that of `read`.

        `low_rank` is that of `finish`. Consumes `saved`, and what lies behind H in grad_out.
        """
        width = self.gate_up.num_inputs
        gradients: list[torch.Tensor] = []
        for rows in context.tiles(grad_out.shape[0]):
            gate_up_drop, down_drop = (context.drop(self.number, group, rows) for group in (2, 3))
            gate_up, read = self._gate_up(matrices, saved, rows, context), saved.read[rows]
            product = grad_out.new_empty(gate_up.shape[0], self.down.num_inputs)
            self.down.input_gradient(matrices[1], grad_out[rows], down_drop, product)
            # the product replaces its gradient
            self.gate_up.gate_backward(matrices[0], gate_up, product, self.activation, self.is_gated)
            of_down = self.down.adapter_gradients(grad_out[rows], product, low_rank[rows], down_drop)
            del product
            self.gate_up.input_gradient(matrices[0], gate_up, gate_up_drop, grad_read[rows])
            of_tile = self.gate_up.adapter_gradients(gate_up, read[:, :width], read[:, width:], gate_up_drop) + of_down
            if gradients:
                torch._foreach_add_(gradients, of_tile)
            gradients = gradients or of_tile
            del gate_up  # or two tiles would stand in memory at once
        return gradients
