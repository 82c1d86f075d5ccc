"""One decoder block of the Llama family, forward and backward by hand."""

from dataclasses import dataclass
from typing import Any

import torch

from train.engine.attention import Attend
from train.engine.lora_linear import LoraGroup
from train.engine.operations import Dropout, rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward

Matrices = list[torch.Tensor]  # M of each group, in the order of Block.groups


@dataclass
class Pass:
    """What all blocks share in one forward pass over T tokens."""

    cos: torch.Tensor  # [T, D]
    sin: torch.Tensor
    attend: Attend  # query [T, heads, D], key and value [T, groups, D] -> [T, heads, D]
    dropout: float
    seed: torch.Tensor  # int64 scalar on the device, so that a recorded graph can be given another
    tile: int = 0  # tokens that go through an MLP together; 0: all

    def drop(self, block: int, group: int, rows: slice = slice(0, None)) -> Dropout | None:
        """The dropout of one group's adapters in this pass, for these of its tokens."""
        return Dropout(self.dropout, self.seed, (block << 5) + (group << 3), rows.start) if self.dropout else None

    def tiles(self, num_tokens: int) -> list[slice]:
        """The tokens of each tile in turn."""
        size = self.tile or num_tokens
        return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


@dataclass
class Activations:
    """What the backward pass of a block reads; its output is not among it, so down_proj need not be recomputed."""

    x: torch.Tensor  # [T, H]
    rstd: torch.Tensor  # [T]
    normed: torch.Tensor  # [T, H + R], with the adapters' X A^T behind
    heads: torch.Tensor  # [T, N + R]: query, key, value, rotated
    raw_heads: torch.Tensor  # the same before their norms (Qwen3), or empty
    raw_rstds: list[torch.Tensor]  # [T heads] of queries and keys
    attended: torch.Tensor  # [T, heads, D], with the graph of its attention
    attention_inputs: list[torch.Tensor]
    low: torch.Tensor  # [T, R]: attended A^T
    middle: torch.Tensor  # [T, H]: the residual after attention
    middle_rstd: torch.Tensor
    middle_normed: torch.Tensor  # [T, H + R]
    gate_up: torch.Tensor | None  # [T, 2 F + R]; None where tiles of it are made when they are needed


class Block:
    """A decoder layer of transformers with PEFT's adapters, read once; its parameters stay where they are."""

    def __init__(self, layer: Any, number: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.number = number
        self.qkv = LoraGroup([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = LoraGroup([attention.o_proj])
        self.gate_up = LoraGroup([mlp.gate_proj, mlp.up_proj])
        self.down = LoraGroup([mlp.down_proj])
        self.groups = [self.qkv, self.o, self.gate_up, self.down]
        self.norms = [layer.input_layernorm, layer.post_attention_layernorm]
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self.head_size: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.dropout = max(group.dropout for group in self.groups)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapters, in the order in which backward gives their gradients."""
        return [parameter for group in self.groups for parameter in group.parameters]

    def forward(self, matrices: Matrices, x: torch.Tensor, shared: Pass) -> Activations:
        """Everything up to the MLP's inner activations, those too where one tile is all; `finish` makes the output."""
        num_tokens, width = x.shape
        qkv, o = matrices[:2]
        normed = x.new_empty(num_tokens, width + self.qkv.padded_rank)
        rstd = rms_norm(x, self.norms[0].weight, self.norms[0].variance_epsilon, normed[:, :width])
        heads = x.new_empty(num_tokens, self.qkv.num_outputs + self.qkv.padded_rank)
        low = normed[:, width:]
        self.qkv.forward(qkv, normed[:, :width], low, heads[:, : self.qkv.num_outputs], shared.drop(self.number, 0))
        raw_heads, raw_rstds = self._norm_heads(heads)
        turned = heads[:, : self.qkv.rows[1].stop]
        rotate(turned, turned, shared.cos, shared.sin)
        split = [heads[:, rows].unflatten(1, (-1, self.head_size)) for rows in self.qkv.rows]
        inputs = [part.detach().requires_grad_() for part in split]
        with torch.enable_grad():
            attended = shared.attend(*inputs)

        flat = attended.detach().flatten(1)
        low = x.new_empty(num_tokens, self.o.padded_rank)
        middle = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.o.forward(o, flat, low, middle, shared.drop(self.number, 1))
        middle += x
        middle_normed = x.new_empty(num_tokens, width + self.gate_up.padded_rank)
        weight, eps = self.norms[1].weight, self.norms[1].variance_epsilon
        middle_rstd = rms_norm(middle, weight, eps, middle_normed[:, :width])
        kept = Activations(
            x=x,
            rstd=rstd,
            normed=normed,
            heads=heads,
            raw_heads=raw_heads,
            raw_rstds=raw_rstds,
            attended=attended,
            attention_inputs=inputs,
            low=low,
            middle=middle,
            middle_rstd=middle_rstd,
            middle_normed=middle_normed,
            gate_up=None,
        )
        tiles = shared.tiles(num_tokens)
        if len(tiles) == 1:
            kept.gate_up = self._gate_up(matrices, kept, tiles[0], shared)
        return kept

    def _gate_up(self, matrices: Matrices, kept: Activations, rows: slice, shared: Pass) -> torch.Tensor:
        """[t, 2 F + R]: what goes into the MLP's silu(gate) up, of one tile."""
        if kept.gate_up is not None:
            return kept.gate_up
        normed, width = kept.middle_normed[rows], kept.x.shape[1]
        inner = normed.new_empty(normed.shape[0], self.gate_up.num_outputs + self.gate_up.padded_rank)
        out, drop = inner[:, : self.gate_up.num_outputs], shared.drop(self.number, 2, rows)
        self.gate_up.forward(matrices[2], normed[:, :width], normed[:, width:], out, drop)
        return inner

    def finish(self, matrices: Matrices, kept: Activations, shared: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output [T, H], the residual plus down_proj of silu(gate) up; and [T, R], that product's A^T."""
        width, out = self.down.num_inputs, torch.empty_like(kept.middle)
        low = out.new_empty(out.shape[0], self.down.padded_rank)
        for rows in shared.tiles(out.shape[0]):
            product = out.new_empty(out[rows].shape[0], width + self.down.padded_rank)
            swiglu(self._gate_up(matrices, kept, rows, shared), product[:, :width])
            drop = shared.drop(self.number, 3, rows)
            self.down.forward(matrices[3], product[:, :width], product[:, width:], out[rows], drop)
            low[rows] = product[:, width:]
        return out.add_(kept.middle), low

    def backward(
        self, matrices: Matrices, kept: Activations, low: torch.Tensor, grad: torch.Tensor, shared: Pass
    ) -> list[torch.Tensor]:
        """The adapters' gradients. grad [T, H + R] holds the output's gradient and is given the input's, in place.

        Consumes `kept`: its buffers become gradients or are freed. The first block's input, the frozen embedding,
        has none.
        """
        mlp_gradients = self._backward_mlp(matrices, kept, low, grad, shared)
        del kept.gate_up, kept.middle, kept.middle_normed  # attention's gradients need the room
        qkv, o = shared.drop(self.number, 0), shared.drop(self.number, 1)
        width = kept.x.shape[1]

        with_low = grad[:, : width + self.o.padded_rank]
        grad_attended = grad.new_empty(kept.attended.shape)
        self.o.input_gradient(matrices[1], with_low, o, grad_attended.flatten(1))
        o_gradients = self.o.adapter_gradients(with_low, kept.attended.detach().flatten(1), kept.low, o)
        self._backward_attention(kept, grad_attended, shared)
        del grad_attended

        normed = kept.normed
        grad_normed = grad.new_empty(grad.shape[0], width) if self.number else None
        self.qkv.input_gradient(matrices[0], kept.heads, qkv, grad_normed)
        qkv_gradients = self.qkv.adapter_gradients(kept.heads, normed[:, :width], normed[:, width:], qkv)
        if grad_normed is not None:
            rms_norm_backward(grad_normed, kept.x, self.norms[0].weight, kept.rstd, grad[:, :width], add=True)
        return qkv_gradients + o_gradients + mlp_gradients

    def _backward_mlp(
        self, matrices: Matrices, kept: Activations, low: torch.Tensor, grad: torch.Tensor, shared: Pass
    ) -> list[torch.Tensor]:
        """The gradients of the MLP's adapters; grad is given the residual's before the MLP, as in `backward`."""
        width = kept.x.shape[1]
        with_low, grad_normed = grad[:, : width + self.down.padded_rank], grad.new_empty(grad.shape[0], width)
        gradients: list[torch.Tensor] = []
        for rows in shared.tiles(grad.shape[0]):
            gate_up_drop, down_drop = (shared.drop(self.number, group, rows) for group in (2, 3))
            gate_up, normed = self._gate_up(matrices, kept, rows, shared), kept.middle_normed[rows]
            product = grad.new_empty(gate_up.shape[0], self.down.num_inputs)
            self.down.input_gradient(matrices[3], with_low[rows], down_drop, product)
            swiglu_backward(gate_up, product)  # rebuilds the product in the place of its gradient
            of_down = self.down.adapter_gradients(with_low[rows], product, low[rows], down_drop)
            del product
            self.gate_up.input_gradient(matrices[2], gate_up, gate_up_drop, grad_normed[rows])
            read = normed[:, :width], normed[:, width:]
            found = self.gate_up.adapter_gradients(gate_up, *read, gate_up_drop) + of_down
            if gradients:
                torch._foreach_add_(gradients, found)
            gradients = gradients or found
            del gate_up  # or the next tile's would stand beside it
        rms_norm_backward(grad_normed, kept.middle, self.norms[1].weight, kept.middle_rstd, grad[:, :width], add=True)
        return gradients

    def _backward_attention(self, kept: Activations, grad_attended: torch.Tensor, shared: Pass) -> None:
        """kept.heads becomes the gradient of the projections' output."""
        gradients = torch.autograd.grad(kept.attended, kept.attention_inputs, grad_attended)
        for number, (rows, gradient) in enumerate(zip(self.qkv.rows, gradients, strict=True)):
            place = kept.heads[:, rows]
            if number == 2:
                place.copy_(gradient.flatten(1))
            else:
                rotate(gradient.flatten(1), place, shared.cos, shared.sin, sign=-1)
        for number, norm in enumerate(self.head_norms):
            place, raw = kept.heads[:, self.qkv.rows[number]], kept.raw_heads[:, self.qkv.rows[number]]
            flat = place.reshape(-1, self.head_size)  # a copy: the rows of place are wider than it
            grad = torch.empty_like(flat)
            raw = raw.reshape(-1, self.head_size)
            rms_norm_backward(flat, raw, norm.weight, kept.raw_rstds[number], grad, add=False)
            place.copy_(grad.view(place.shape))

    def _norm_heads(self, heads: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Qwen3's norm of each query and key head, in place; returns what its backward needs."""
        if not self.head_norms:
            return heads[:0], []
        raw = heads[:, : self.qkv.rows[1].stop].clone()
        rstds = []
        for number, norm in enumerate(self.head_norms):
            flat = raw[:, self.qkv.rows[number]].reshape(-1, self.head_size)
            normed = torch.empty_like(flat)
            rstds.append(rms_norm(flat, norm.weight, norm.variance_epsilon, normed))
            heads[:, self.qkv.rows[number]] = normed.view(heads.shape[0], -1)
        return raw, rstds
