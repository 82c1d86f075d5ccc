"""One decoder block, forward and backward by hand; what differs between families is in its DecoderLayer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from train.engine.attention import Attend
from train.engine.layers import DecoderLayer
from train.engine.lora_linear import LoraGroup
from train.engine.operations import Dropout, Rotation, gate, gate_backward, normalize, normalize_backward, rotate
from train.engine.positions import Positions
from train.engine.residual import Branch, Residual

Matrices = list[torch.Tensor]  # M (lora_linear.py) of each group, in the order of Block.groups


@dataclass
class ForwardContext:
    """What all blocks share in one forward pass over T tokens, and in its backward pass."""

    positions: Positions
    attend: Mapping[int | None, Attend]  # by the window of a layer
    dropout: float
    seed: torch.Tensor  # int64 scalar on the device, so that a CUDA graph can be replayed with another
    tile: int = 0  # tokens that go through an MLP together; 0: all

    def drop(self, block: int, group: int, rows: slice = slice(0, None)) -> Dropout | None:
        """The dropout of one group's adapters, for these of the tokens; None without dropout."""
        return Dropout(self.dropout, self.seed, (block << 5) + (group << 3), rows.start) if self.dropout else None

    def tiles(self, num_tokens: int) -> list[slice]:
        """The tokens of each tile in turn."""
        size = self.tile or num_tokens
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


@dataclass
class Activations:
    """What the backward pass of a block reads. Its output is not part of it, so down_proj need not be recomputed, but
    for families with a norm behind it.
    """

    x: torch.Tensor  # [T, H]
    rstd: torch.Tensor | None  # [T]; None where no norm is before attention
    normed: torch.Tensor  # [T, H + R]: the normed x, and behind it its product with the adapters' A^T
    qkv: torch.Tensor  # [T, N + R]: query, key and value of all heads, rotated
    raw_qk: torch.Tensor  # query and key before their norms (Qwen3), or empty
    raw_rstds: list[torch.Tensor]  # [T x heads], or [T], of query and key
    attended: torch.Tensor  # [T, heads, D], with the autograd graph of attention
    attention_inputs: list[torch.Tensor]
    low_rank: torch.Tensor  # [T, R]: attended A^T
    attention_branch: Branch | None  # where a norm is behind attention
    post_attention: torch.Tensor  # [T, H]: x plus what attention adds
    mlp_rstd: torch.Tensor | None  # [T]; None where no norm is before the MLP
    mlp_normed: torch.Tensor  # [T, H + R]: what the MLP reads
    gate_up: torch.Tensor | None  # [T, 2 F + R]; None where the MLP is tiled: each tile is recomputed on demand
    mlp_branch: Branch | None = None  # where a norm is behind the MLP; `finish` makes it


class Block:
    """A decoder layer of transformers with PEFT's adapters, read once; its parameters stay where they are."""

    def __init__(self, layer: DecoderLayer, number: int) -> None:
        self.number = number
        self.qkv = LoraGroup(layer.qkv)
        self.o = LoraGroup([layer.o])
        self.gate_up = LoraGroup(layer.gate_up)
        self.down = LoraGroup([layer.down])
        self.groups = [self.qkv, self.o, self.gate_up, self.down]
        self.heads = layer.heads
        query, key, _ = layer.heads.widths
        self.parts = slice(0, query), slice(query, query + key), slice(query + key, self.qkv.num_outputs)
        self.activation, self.is_gated = layer.activation, layer.is_gated
        self.is_parallel = layer.is_parallel
        norms, scale = layer.norms, layer.residual_scale
        self.around_attention = Residual(norms.before_attention, norms.after_attention, scale)
        self.around_mlp = Residual(norms.before_mlp, norms.after_mlp, scale)
        self.gives_input_gradient = number > 0  # a frozen embedding's output needs none
        self.dropout = max(group.dropout for group in self.groups)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters, in the order in which backward returns their gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def forward(self, matrices: Matrices, x: torch.Tensor, context: ForwardContext) -> Activations:
        """Everything up to the MLP's product, and gate and up unless the MLP is tiled; `finish` makes the output."""
        num_tokens, width = x.shape
        normed = x.new_empty(num_tokens, width + self.qkv.padded_rank)
        rstd = self.around_attention.read(x, normed[:, :width])
        qkv = x.new_empty(num_tokens, self.qkv.num_outputs + self.qkv.padded_rank)
        out, drop = qkv[:, : self.qkv.num_outputs], context.drop(self.number, 0)
        self.qkv.forward(matrices[0], normed[:, :width], normed[:, width:], out, drop)
        raw_qk, raw_rstds = self._norm_qk(qkv)
        self._place(qkv, context.positions)
        split = [qkv[:, part].unflatten(1, (-1, self.heads.size)) for part in self.parts]
        inputs = [part.detach().requires_grad_() for part in split]
        with torch.enable_grad():
            attended = context.attend[self.heads.window](*inputs)

        low_rank, output = x.new_empty(num_tokens, self.o.padded_rank), torch.empty_like(x)
        flat, drop = attended.detach().flatten(1), context.drop(self.number, 1)
        self.o.forward(matrices[1], flat, low_rank, output, drop)
        post_attention, branch = self.around_attention.add(output, x)
        mlp_normed = x.new_empty(num_tokens, width + self.gate_up.padded_rank)
        mlp_rstd = self.around_mlp.read(x if self.is_parallel else post_attention, mlp_normed[:, :width])
        activations = Activations(
            x=x,
            rstd=rstd,
            normed=normed,
            qkv=qkv,
            raw_qk=raw_qk,
            raw_rstds=raw_rstds,
            attended=attended,
            attention_inputs=inputs,
            low_rank=low_rank,
            attention_branch=branch,
            post_attention=post_attention,
            mlp_rstd=mlp_rstd,
            mlp_normed=mlp_normed,
            gate_up=None,
        )
        tiles = context.tiles(num_tokens)
        if len(tiles) == 1:
            activations.gate_up = self._gate_up(matrices, activations, tiles[0], context)
        return activations

    def _gate_up(self, matrices: Matrices, saved: Activations, rows: slice, context: ForwardContext) -> torch.Tensor:
        """[t, 2 F + R]: gate and up of one tile, with the adapters' columns behind them."""
        if saved.gate_up is not None:
            return saved.gate_up
        normed, width = saved.mlp_normed[rows], saved.x.shape[1]
        gate_up = normed.new_empty(normed.shape[0], self.gate_up.num_outputs + self.gate_up.padded_rank)
        out, drop = gate_up[:, : self.gate_up.num_outputs], context.drop(self.number, 2, rows)
        self.gate_up.forward(matrices[2], normed[:, :width], normed[:, width:], out, drop)
        return gate_up

    def finish(
        self, matrices: Matrices, saved: Activations, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output [T, H], post_attention plus what the MLP adds; and down_proj's input times A^T [T, R]."""
        width, out = self.down.num_inputs, torch.empty_like(saved.post_attention)
        low_rank = out.new_empty(out.shape[0], self.down.padded_rank)
        for rows in context.tiles(out.shape[0]):
            product = out.new_empty(out[rows].shape[0], width + self.down.padded_rank)
            gate_up = self._gate_up(matrices, saved, rows, context)
            gate(gate_up, product[:, :width], self.activation, self.is_gated)
            drop = context.drop(self.number, 3, rows)
            self.down.forward(matrices[3], product[:, :width], product[:, width:], out[rows], drop)
            low_rank[rows] = product[:, width:]
            del gate_up
        out, saved.mlp_branch = self.around_mlp.add(out, saved.post_attention)
        return out, low_rank

    def backward(
        self,
        matrices: Matrices,
        saved: Activations,
        low_rank: torch.Tensor,
        grad: torch.Tensor,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The adapters' gradients. grad [T, H + R] holds the output's gradient, and then the input's, in place.

        `low_rank` is that of `finish`. Consumes `saved`: its buffers become gradients or are freed. The input's
        gradient is made where `gives_input_gradient`.
        """
        mlp_gradients, grad_read = self._backward_mlp(matrices, saved, low_rank, grad, context)
        # attention's gradients need the room
        del saved.gate_up, saved.post_attention, saved.mlp_normed, saved.mlp_branch
        qkv_drop, o_drop = context.drop(self.number, 0), context.drop(self.number, 1)
        width = saved.x.shape[1]

        around, rank = self.around_attention, self.o.padded_rank
        grad_out = around.output_gradient(grad, saved.attention_branch, width, rank)
        grad_attended = grad.new_empty(saved.attended.shape)
        self.o.input_gradient(matrices[1], grad_out, o_drop, grad_attended.flatten(1))
        o_gradients = self.o.adapter_gradients(grad_out, saved.attended.detach().flatten(1), saved.low_rank, o_drop)
        del grad_out
        self._backward_attention(saved, grad_attended, context)
        del grad_attended

        normed = saved.normed
        grad_normed = grad.new_empty(grad.shape[0], width) if self.gives_input_gradient else None
        self.qkv.input_gradient(matrices[0], saved.qkv, qkv_drop, grad_normed)
        qkv_gradients = self.qkv.adapter_gradients(saved.qkv, normed[:, :width], normed[:, width:], qkv_drop)
        if grad_normed is not None:
            if grad_read is not None:
                grad_normed += grad_read
            around.read_backward(grad_normed, saved.x, saved.rstd, grad[:, :width])
        return qkv_gradients + o_gradients + mlp_gradients

    def _backward_mlp(
        self,
        matrices: Matrices,
        saved: Activations,
        low_rank: torch.Tensor,
        grad: torch.Tensor,
        context: ForwardContext,
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The gradients of the MLP's adapters; grad becomes the gradient of post_attention, as in `backward`.

        Where attention reads the same as the MLP, the gradient of that [T, H] is not added, but returned.
        """
        width = saved.x.shape[1]
        grad_out = self.around_mlp.output_gradient(grad, saved.mlp_branch, width, self.down.padded_rank)
        grad_normed = grad.new_empty(grad.shape[0], width)
        gradients: list[torch.Tensor] = []
        for rows in context.tiles(grad.shape[0]):
            gate_up_drop, down_drop = (context.drop(self.number, group, rows) for group in (2, 3))
            gate_up, normed = self._gate_up(matrices, saved, rows, context), saved.mlp_normed[rows]
            product = grad.new_empty(gate_up.shape[0], self.down.num_inputs)
            self.down.input_gradient(matrices[3], grad_out[rows], down_drop, product)
            gate_backward(gate_up, product, self.activation, self.is_gated)  # the product replaces its gradient
            of_down = self.down.adapter_gradients(grad_out[rows], product, low_rank[rows], down_drop)
            del product
            self.gate_up.input_gradient(matrices[2], gate_up, gate_up_drop, grad_normed[rows])
            read = normed[:, :width], normed[:, width:]
            of_tile = self.gate_up.adapter_gradients(gate_up, *read, gate_up_drop) + of_down
            if gradients:
                torch._foreach_add_(gradients, of_tile)
            gradients = gradients or of_tile
            del gate_up  # or two tiles would stand in memory at once
        if self.is_parallel:
            return gradients, grad_normed
        self.around_mlp.read_backward(grad_normed, saved.post_attention, saved.mlp_rstd, grad[:, :width])
        return gradients, None

    def _backward_attention(self, saved: Activations, grad_attended: torch.Tensor, context: ForwardContext) -> None:
        """saved.qkv becomes the gradient of the projections' output."""
        gradients = torch.autograd.grad(saved.attended, saved.attention_inputs, grad_attended)
        rotation, factor = self._rotation(context.positions), context.positions.query_factor
        for number, (part, gradient) in enumerate(zip(self.parts, gradients, strict=True)):
            place = saved.qkv[:, part]
            if number == 2 or rotation is None:
                place.copy_(gradient.flatten(1))
            else:
                rotate(gradient.flatten(1), place, rotation, sign=-1)
            if number == 0 and factor is not None:
                place *= factor
        for part, norm, rstd in zip(self.parts, self.heads.norms, saved.raw_rstds, strict=False):
            place, width = saved.qkv[:, part], norm.weight.shape[0]
            flat = place.reshape(-1, width)  # a copy: the rows of place are wider than it
            grad = torch.empty_like(flat)
            normalize_backward(flat, saved.raw_qk[:, part].reshape(-1, width), norm, rstd, grad, add=False)
            place.copy_(grad.view(place.shape))

    def _norm_qk(self, qkv: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The norms of query and key, over each head or all together, in place; returns what their backward needs."""
        if not self.heads.norms:
            return qkv[:0], []
        raw, rstds = qkv[:, : self.parts[1].stop].clone(), []
        for part, norm in zip(self.parts, self.heads.norms, strict=False):
            flat = raw[:, part].reshape(-1, norm.weight.shape[0])
            normed = torch.empty_like(flat)
            rstds.append(normalize(flat, norm, normed))
            qkv[:, part] = normed.view(qkv.shape[0], -1)
        return raw, rstds

    def _place(self, qkv: torch.Tensor, positions: Positions) -> None:
        """Turns queries and keys by their positions, in place, and scales queries where the family does."""
        both, rotation = qkv[:, : self.parts[1].stop], self._rotation(positions)
        if rotation is not None:
            rotate(both, both, rotation)
        if positions.query_factor is not None:
            qkv[:, self.parts[0]] *= positions.query_factor

    def _rotation(self, positions: Positions) -> Rotation | None:
        heads = self.heads
        return None if heads.rotary is None else positions.rotation(heads.rotary, heads.size, heads.is_interleaved)
