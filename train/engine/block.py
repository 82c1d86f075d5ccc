"""One decoder block of the Llama family, forward and backward by hand."""

from dataclasses import dataclass

import torch

from train.engine.attention import Attend
from train.engine.layers import DecoderLayer
from train.engine.lora_linear import LoraGroup
from train.engine.operations import Dropout, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward

Matrices = list[torch.Tensor]  # M (lora_linear.py) of each group, in the order of Block.groups


@dataclass
class ForwardContext:
    """What all blocks share in one forward pass over T tokens, and in its backward pass."""

    cos: torch.Tensor  # [T, D]
    sin: torch.Tensor  # [T, D]
    attend: Attend
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
    """What the backward pass of a block reads. Its output is not part of it, so down_proj need not be recomputed."""

    x: torch.Tensor  # [T, H]
    rstd: torch.Tensor  # [T]
    normed: torch.Tensor  # [T, H + R]: the normed x, and behind it its product with the adapters' A^T
    qkv: torch.Tensor  # [T, N + R]: query, key and value of all heads, rotated
    raw_qk: torch.Tensor  # query and key before their norms (Qwen3), or empty
    raw_rstds: list[torch.Tensor]  # [T x heads] of query and key
    attended: torch.Tensor  # [T, heads, D], with the autograd graph of attention
    attention_inputs: list[torch.Tensor]
    low_rank: torch.Tensor  # [T, R]: attended A^T
    post_attention: torch.Tensor  # [T, H]: x plus o_proj's output
    post_attention_rstd: torch.Tensor  # [T]
    post_attention_normed: torch.Tensor  # [T, H + R]
    gate_up: torch.Tensor | None  # [T, 2 F + R]; None where the MLP is tiled: each tile is recomputed on demand


class Block:
    """A decoder layer of transformers with PEFT's adapters, read once; its parameters stay where they are."""

    def __init__(self, layer: DecoderLayer, number: int) -> None:
        self.number = number
        self.qkv = LoraGroup(layer.qkv)
        self.o = LoraGroup([layer.o])
        self.gate_up = LoraGroup(layer.gate_up)
        self.down = LoraGroup([layer.down])
        self.groups = [self.qkv, self.o, self.gate_up, self.down]
        self.norms = layer.norms
        self.qk_norms = layer.qk_norms
        self.head_dim = layer.head_dim
        self.scaling = layer.scaling
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
        rstd = rms_norm(x, self.norms[0].weight, self.norms[0].variance_epsilon, normed[:, :width])
        qkv = x.new_empty(num_tokens, self.qkv.num_outputs + self.qkv.padded_rank)
        out, drop = qkv[:, : self.qkv.num_outputs], context.drop(self.number, 0)
        self.qkv.forward(matrices[0], normed[:, :width], normed[:, width:], out, drop)
        raw_qk, raw_rstds = self._norm_qk(qkv)
        qk = qkv[:, : self.qkv.rows[1].stop]
        rotate(qk, qk, context.cos, context.sin)
        split = [qkv[:, rows].unflatten(1, (-1, self.head_dim)) for rows in self.qkv.rows]
        inputs = [part.detach().requires_grad_() for part in split]
        with torch.enable_grad():
            attended = context.attend(*inputs)

        flat = attended.detach().flatten(1)
        low_rank = x.new_empty(num_tokens, self.o.padded_rank)
        post_attention = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.o.forward(matrices[1], flat, low_rank, post_attention, context.drop(self.number, 1))
        post_attention += x
        post_attention_normed = x.new_empty(num_tokens, width + self.gate_up.padded_rank)
        weight, eps = self.norms[1].weight, self.norms[1].variance_epsilon
        post_attention_rstd = rms_norm(post_attention, weight, eps, post_attention_normed[:, :width])
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
            post_attention=post_attention,
            post_attention_rstd=post_attention_rstd,
            post_attention_normed=post_attention_normed,
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
        normed, width = saved.post_attention_normed[rows], saved.x.shape[1]
        gate_up = normed.new_empty(normed.shape[0], self.gate_up.num_outputs + self.gate_up.padded_rank)
        out, drop = gate_up[:, : self.gate_up.num_outputs], context.drop(self.number, 2, rows)
        self.gate_up.forward(matrices[2], normed[:, :width], normed[:, width:], out, drop)
        return gate_up

    def finish(
        self, matrices: Matrices, saved: Activations, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output [T, H], post_attention plus down_proj's output; and down_proj's input times A^T [T, R]."""
        width, out = self.down.num_inputs, torch.empty_like(saved.post_attention)
        low_rank = out.new_empty(out.shape[0], self.down.padded_rank)
        for rows in context.tiles(out.shape[0]):
            product = out.new_empty(out[rows].shape[0], width + self.down.padded_rank)
            swiglu(self._gate_up(matrices, saved, rows, context), product[:, :width])
            drop = context.drop(self.number, 3, rows)
            self.down.forward(matrices[3], product[:, :width], product[:, width:], out[rows], drop)
            low_rank[rows] = product[:, width:]
        return out.add_(saved.post_attention), low_rank

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
        mlp_gradients = self._backward_mlp(matrices, saved, low_rank, grad, context)
        del saved.gate_up, saved.post_attention, saved.post_attention_normed  # attention's gradients need the room
        qkv_drop, o_drop = context.drop(self.number, 0), context.drop(self.number, 1)
        width = saved.x.shape[1]

        grad_out = grad[:, : width + self.o.padded_rank]
        grad_attended = grad.new_empty(saved.attended.shape)
        self.o.input_gradient(matrices[1], grad_out, o_drop, grad_attended.flatten(1))
        o_gradients = self.o.adapter_gradients(grad_out, saved.attended.detach().flatten(1), saved.low_rank, o_drop)
        self._backward_attention(saved, grad_attended, context)
        del grad_attended

        normed = saved.normed
        grad_normed = grad.new_empty(grad.shape[0], width) if self.gives_input_gradient else None
        self.qkv.input_gradient(matrices[0], saved.qkv, qkv_drop, grad_normed)
        qkv_gradients = self.qkv.adapter_gradients(saved.qkv, normed[:, :width], normed[:, width:], qkv_drop)
        if grad_normed is not None:
            rms_norm_backward(grad_normed, saved.x, self.norms[0].weight, saved.rstd, grad[:, :width], add=True)
        return qkv_gradients + o_gradients + mlp_gradients

    def _backward_mlp(
        self,
        matrices: Matrices,
        saved: Activations,
        low_rank: torch.Tensor,
        grad: torch.Tensor,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The gradients of the MLP's adapters; grad becomes the gradient of post_attention, as in `backward`."""
        width = saved.x.shape[1]
        grad_out, grad_normed = grad[:, : width + self.down.padded_rank], grad.new_empty(grad.shape[0], width)
        gradients: list[torch.Tensor] = []
        for rows in context.tiles(grad.shape[0]):
            gate_up_drop, down_drop = (context.drop(self.number, group, rows) for group in (2, 3))
            gate_up, normed = self._gate_up(matrices, saved, rows, context), saved.post_attention_normed[rows]
            product = grad.new_empty(gate_up.shape[0], self.down.num_inputs)
            self.down.input_gradient(matrices[3], grad_out[rows], down_drop, product)
            swiglu_backward(gate_up, product)  # the product replaces its gradient
            of_down = self.down.adapter_gradients(grad_out[rows], product, low_rank[rows], down_drop)
            del product
            self.gate_up.input_gradient(matrices[2], gate_up, gate_up_drop, grad_normed[rows])
            read = normed[:, :width], normed[:, width:]
            of_tile = self.gate_up.adapter_gradients(gate_up, *read, gate_up_drop) + of_down
            if gradients:
                torch._foreach_add_(gradients, of_tile)
            gradients = gradients or of_tile
            del gate_up  # or two tiles would stand in memory at once
        x, rstd = saved.post_attention, saved.post_attention_rstd
        rms_norm_backward(grad_normed, x, self.norms[1].weight, rstd, grad[:, :width], add=True)
        return gradients

    def _backward_attention(self, saved: Activations, grad_attended: torch.Tensor, context: ForwardContext) -> None:
        """saved.qkv becomes the gradient of the projections' output."""
        gradients = torch.autograd.grad(saved.attended, saved.attention_inputs, grad_attended)
        for number, (rows, gradient) in enumerate(zip(self.qkv.rows, gradients, strict=True)):
            place = saved.qkv[:, rows]
            if number == 2:
                place.copy_(gradient.flatten(1))
            else:
                rotate(gradient.flatten(1), place, context.cos, context.sin, sign=-1)
        for number, norm in enumerate(self.qk_norms):
            place, raw = saved.qkv[:, self.qkv.rows[number]], saved.raw_qk[:, self.qkv.rows[number]]
            flat = place.reshape(-1, self.head_dim)  # a copy: the rows of place are wider than it
            grad = torch.empty_like(flat)
            raw = raw.reshape(-1, self.head_dim)
            rms_norm_backward(flat, raw, norm.weight, saved.raw_rstds[number], grad, add=False)
            place.copy_(grad.view(place.shape))

    def _norm_qk(self, qkv: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Qwen3's norm of each query and key head, in place; returns what its backward needs."""
        if not self.qk_norms:
            return qkv[:0], []
        raw = qkv[:, : self.qkv.rows[1].stop].clone()
        rstds = []
        for number, norm in enumerate(self.qk_norms):
            flat = raw[:, self.qkv.rows[number]].reshape(-1, self.head_dim)
            normed = torch.empty_like(flat)
            rstds.append(rms_norm(flat, norm.weight, norm.variance_epsilon, normed))
            qkv[:, self.qkv.rows[number]] = normed.view(qkv.shape[0], -1)
        return raw, rstds
