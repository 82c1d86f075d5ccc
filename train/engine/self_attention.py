"""The attention half of a block, forward and backward: projections, norms and rotation of heads, softmax attention."""

from dataclasses import dataclass

import torch

from train.engine.context import ForwardContext
from train.engine.layers import DecoderLayer
from train.engine.lora_linear import LoraGroup, Matrices
from train.engine.operations import Rotation, normalize_heads, normalize_heads_backward, rotate
from train.engine.positions import Positions


@dataclass
class AttentionActivations:
    """What the backward pass of attention reads."""

    read: torch.Tensor  # [T, H + R]: what it reads, and behind it its product with the adapters' A^T
    qkv: torch.Tensor  # [T, N + R]: query, key and value of all heads, rotated
    raw_qk: torch.Tensor  # query and key before their norms (Qwen3), or empty
    raw_rstds: list[torch.Tensor]  # [T, heads], or [T, 1], of query and key
    attended: torch.Tensor  # [T, heads, D], with the autograd graph of attention
    inputs: list[torch.Tensor]  # query, key and value, of that graph
    low_rank: torch.Tensor  # [T, R]: attended A^T


class SelfAttention:
    """Softmax attention of a decoder layer."""

    def __init__(self, layer: DecoderLayer, number: int) -> None:
        self.number = number
        self.qkv = LoraGroup(layer.qkv)
        self.o = LoraGroup([layer.o])
        self.groups = [self.qkv, self.o]
        self.num_read_columns = self.qkv.padded_rank  # behind what it reads
        self.num_gradient_columns = self.o.padded_rank  # behind the gradient of its output
        self.heads = layer.heads
        query, key, _ = layer.heads.widths
        self.parts = slice(0, query), slice(query, query + key), slice(query + key, self.qkv.num_outputs)

    def forward(
        self, matrices: Matrices, read: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, AttentionActivations]:
        """Its output [T, H] for read [T, H + R], whose last columns it fills."""
        num_tokens, width = read.shape[0], self.qkv.num_inputs
        qkv = read.new_empty(num_tokens, self.qkv.num_outputs + self.qkv.padded_rank)
        out, drop = qkv[:, : self.qkv.num_outputs], context.drop(self.number, 0)
        self.qkv.forward(matrices[0], read[:, :width], read[:, width:], out, drop)
        raw_qk, raw_rstds = self._norm_qk(qkv)
        self._place(qkv, context.positions)
        split = [qkv[:, part].unflatten(1, (-1, self.heads.size)) for part in self.parts]
        inputs = [part.detach().requires_grad_() for part in split]
        with torch.enable_grad():
            attended = context.attend[self.heads.window](*inputs)

        low_rank, output = read.new_empty(num_tokens, self.o.padded_rank), read.new_empty(num_tokens, width)
        flat, drop = attended.detach().flatten(1), context.drop(self.number, 1)
        self.o.forward(matrices[1], flat, low_rank, output, drop)
        return output, AttentionActivations(read, qkv, raw_qk, raw_rstds, attended, inputs, low_rank)

    def backward(
        self,
        matrices: Matrices,
        saved: AttentionActivations,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor | None,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The adapters' gradients, from the output's [T, H + R]; grad_read [T, H] becomes that of `read`, if given.

        Consumes `saved`, and what lies behind H in grad_out.
        """
        qkv_drop, o_drop = context.drop(self.number, 0), context.drop(self.number, 1)
        grad_attended = grad_out.new_empty(saved.attended.shape)
        self.o.input_gradient(matrices[1], grad_out, o_drop, grad_attended.flatten(1))
        o_gradients = self.o.adapter_gradients(grad_out, saved.attended.detach().flatten(1), saved.low_rank, o_drop)
        del grad_out
        self._backward_softmax(saved, grad_attended, context)
        del grad_attended
        read, width = saved.read, self.qkv.num_inputs
        self.qkv.input_gradient(matrices[0], saved.qkv, qkv_drop, grad_read)
        return self.qkv.adapter_gradients(saved.qkv, read[:, :width], read[:, width:], qkv_drop) + o_gradients

    def _backward_softmax(
        self, saved: AttentionActivations, grad_attended: torch.Tensor, context: ForwardContext
    ) -> None:
        """saved.qkv becomes the gradient of the projections' output."""
        gradients = torch.autograd.grad(saved.attended, saved.inputs, grad_attended)
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
            normalize_heads_backward(saved.qkv[:, part], saved.raw_qk[:, part], norm, rstd)

    def _norm_qk(self, qkv: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The norms of query and key, over each head or all together, in place; returns what their backward needs."""
        if not self.heads.norms:
            return qkv[:0], []
        raw = qkv.new_empty(qkv.shape[0], self.parts[1].stop)
        parts = zip(self.parts, self.heads.norms, strict=False)
        return raw, [normalize_heads(qkv[:, part], norm, raw[:, part]) for part, norm in parts]

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
