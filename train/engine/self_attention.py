"""The attention half of a block, forward and backward: projections, norms and rotation of heads, softmax attention."""

from dataclasses import dataclass

import torch

from train.engine.context import ForwardContext
from train.engine.layers import DecoderLayer, Heads
from train.engine.lora_linear import LoraGroup, Matrices
from train.engine.operations import Rotation, normalize_heads, normalize_heads_backward, rotate
from train.engine.positions import Positions


@dataclass
class AttentionActivations:
    """What the backward pass of attention reads."""

    read: torch.Tensor  # [T, H + R]: what it reads, and behind it its product with the adapters' A^T
    projected: torch.Tensor  # [T, N + R]: what the projections make; `qkv` itself, unless that has other columns
    qkv: torch.Tensor  # query, key and value of all heads, rotated; where keys are borrowed, query alone
    raw: torch.Tensor  # query and key before their norms (Qwen3), value too (Gemma 4), or empty
    raw_rstds: list[torch.Tensor]  # [T, heads], or [T, 1], of each of them
    attended: torch.Tensor  # [T, heads, D], with the autograd graph of attention
    inputs: list[torch.Tensor]  # query, key and value, of that graph
    low_rank: torch.Tensor  # [T, R]: o_proj's input times A^T


class SelfAttention:
    """Softmax attention of a decoder layer."""

    def __init__(self, layer: DecoderLayer, heads: Heads, number: int, group: type[LoraGroup]) -> None:
        self.number = number
        self.qkv = group(layer.qkv)
        self.o = group([layer.o])
        self.groups = [self.qkv, self.o]
        self.num_read_columns = self.qkv.padded_rank  # behind what it reads
        self.num_gradient_columns = self.o.padded_rank  # behind the gradient of its output
        self.heads = heads
        query, key, value = heads.widths
        parts = [slice(0, query), slice(query, query + key), slice(query + key, query + key + value)]
        self.parts = parts[:1] if heads.borrows else parts  # of `qkv`
        self.num_placed = query if heads.borrows else query + key  # columns that positions turn

    def forward(
        self, matrices: Matrices, read: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, AttentionActivations]:
        """As Attention (block.py)."""
        num_tokens, width = read.shape[0], self.qkv.num_inputs
        projected = read.new_empty(num_tokens, self.qkv.num_outputs + self.qkv.padded_rank)
        out, drop = projected[:, : self.qkv.num_outputs], context.drop(self.number, 0)
        self.qkv.forward(matrices[0], read[:, :width], read[:, width:], out, drop)
        qkv = self._as_heads(projected)
        raw, raw_rstds = self._norm(qkv)
        self._place(qkv, context.positions)
        split = [qkv[:, part].unflatten(1, (-1, self.heads.size)) for part in self.parts]
        if self.heads.lends:
            context.lent.lend(self.heads.lends, split[1:])
        elif self.heads.borrows:
            split += context.lent.states[self.heads.borrows]
        inputs = [part.detach().requires_grad_() for part in split]
        query, key, value = inputs
        with torch.enable_grad():
            attended = context.attend[self.heads.window](query, key, value, self.heads.sinks)

        low_rank, output = read.new_empty(num_tokens, self.o.padded_rank), read.new_empty(num_tokens, width)
        gated, drop = self._gated(attended, projected), context.drop(self.number, 1)
        self.o.forward(matrices[1], gated, low_rank, output, drop)
        return output, AttentionActivations(read, projected, qkv, raw, raw_rstds, attended, inputs, low_rank)

    def backward(
        self,
        matrices: Matrices,
        saved: AttentionActivations,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor | None,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """As Attention (block.py)."""
        qkv_drop, o_drop = context.drop(self.number, 0), context.drop(self.number, 1)
        grad_attended = grad_out.new_empty(saved.attended.shape)
        self.o.input_gradient(matrices[1], grad_out, o_drop, grad_attended.flatten(1))
        gated = self._gated(saved.attended, saved.projected)
        o_gradients = self.o.adapter_gradients(grad_out, gated, saved.low_rank, o_drop)
        del grad_out, gated
        if self.heads.has_gate:
            self._gate_backward(saved, grad_attended)
        self._backward_softmax(saved, grad_attended, context)
        del grad_attended
        self._put_back(saved)
        read, width = saved.read, self.qkv.num_inputs
        self.qkv.input_gradient(matrices[0], saved.projected, qkv_drop, grad_read)
        return self.qkv.adapter_gradients(saved.projected, read[:, :width], read[:, width:], qkv_drop) + o_gradients

    def _backward_softmax(
        self, saved: AttentionActivations, grad_attended: torch.Tensor, context: ForwardContext
    ) -> None:
        """saved.qkv becomes the gradient of queries, keys and values as they were projected."""
        gradients = torch.autograd.grad(saved.attended, saved.inputs, grad_attended)
        if self.heads.lends:
            for gradient, total in zip(gradients[1:], context.lent.collect(self.heads.lends), strict=True):
                gradient += total
        elif self.heads.borrows:
            context.lent.give_back(self.heads.borrows, gradients[1:])
        rotation, factor = self._rotation(context.positions), context.positions.query_factor
        for number, (part, gradient) in enumerate(zip(self.parts, gradients, strict=False)):
            place = saved.qkv[:, part]
            if number == 2 or rotation is None:
                place.copy_(gradient.flatten(1))
            else:
                rotate(gradient.flatten(1), place, rotation, sign=-1)
            if number == 0 and factor is not None:
                place *= factor
        for part, norm, rstd in zip(self.parts, self.heads.norms, saved.raw_rstds, strict=False):
            normalize_heads_backward(saved.qkv[:, part], saved.raw[:, part], norm, rstd)

    def _pairs(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of what the projections make, where queries have gates: queries and gates [T, heads, D], keys and values."""
        width = 2 * self.parts[0].stop
        queries, gates = projected[:, :width].unflatten(1, (-1, 2, self.heads.size)).unbind(2)
        return queries, gates, projected[:, width : self.qkv.num_outputs]

    def _as_heads(self, projected: torch.Tensor) -> torch.Tensor:
        """Query, key and value one behind another; what is projected itself where it is that."""
        if self.heads.values_are_keys:
            return torch.cat([projected[:, : self.num_placed], projected[:, self.parts[1]]], 1)
        if not self.heads.has_gate:
            return projected
        queries, _, keys_values = self._pairs(projected)
        return torch.cat([queries.flatten(1), keys_values], 1)

    def _put_back(self, saved: AttentionActivations) -> None:
        """The gradient of query, key and value to where they were projected."""
        if self.heads.values_are_keys:
            saved.projected[:, : self.num_placed] = saved.qkv[:, : self.num_placed]
            saved.projected[:, self.parts[1]] += saved.qkv[:, self.parts[2]]
        elif self.heads.has_gate:
            queries, _, keys_values = self._pairs(saved.projected)
            queries.copy_(saved.qkv[:, self.parts[0]].unflatten(1, (-1, self.heads.size)))
            keys_values.copy_(saved.qkv[:, self.parts[0].stop :])

    def _gated(self, attended: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """What o_proj reads [T, Q]: attended, times the sigmoid of the gates where there are any."""
        flat = attended.detach()
        return (flat * self._pairs(projected)[1].sigmoid() if self.heads.has_gate else flat).flatten(1)

    def _gate_backward(self, saved: AttentionActivations, grad: torch.Tensor) -> None:
        """grad [T, heads, D] becomes that of what is attended to, and the gates in saved.projected theirs."""
        _, gates, _ = self._pairs(saved.projected)
        opened = gates.sigmoid()
        gates.copy_(grad * saved.attended.detach() * (opened * (1 - opened)))
        grad *= opened

    def _norm(self, qkv: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The norms of query, key and value, of each head or all together, in place; returns what their backward
        needs."""
        if not self.heads.norms:
            return qkv[:0], []
        raw = qkv.new_empty(qkv.shape[0], self.parts[len(self.heads.norms) - 1].stop)
        parts = zip(self.parts, self.heads.norms, strict=False)
        return raw, [normalize_heads(qkv[:, part], norm, raw[:, part]) for part, norm in parts]

    def _place(self, qkv: torch.Tensor, positions: Positions) -> None:
        """Turns queries and keys by their positions, in place, and scales queries where the family does."""
        both, rotation = qkv[:, : self.num_placed], self._rotation(positions)
        if rotation is not None:
            rotate(both, both, rotation)
        if positions.query_factor is not None:
            qkv[:, self.parts[0]] *= positions.query_factor

    def _rotation(self, positions: Positions) -> Rotation | None:
        heads = self.heads
        return None if heads.rotary is None else positions.rotation(heads.rotary, heads.size, heads.is_interleaved)
