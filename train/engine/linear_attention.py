"""Linear attention, a block's first half, forward and backward: projections by hand, the delta rule by autograd."""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from train.engine.context import ForwardContext
from train.engine.delta_rule import mix
from train.engine.layers import DecoderLayer, DeltaHeads
from train.engine.lora_linear import LoraGroup, Matrices


@dataclass
class LinearActivations:
    """What the backward pass of linear attention reads.

    Nothing of what is between the projections, which the backward pass computes again: transformers' torch code takes
    some 14 KB a head and token for it (bf16, heads of 128 elements).
    """

    read: torch.Tensor  # [T, H + R]: what it reads, and behind it its product with the adapters' A^T
    projected: torch.Tensor  # [T, N + R]: what the projections make of it
    low_rank: torch.Tensor  # [T, R]: out_proj's input times A^T


class LinearAttention:
    """The gated delta rule of a decoder layer (Qwen3.5)."""

    def __init__(self, layer: DecoderLayer, heads: DeltaHeads, number: int, group: type[LoraGroup]) -> None:
        self.number = number
        self.heads = heads
        self.projections = group(layer.qkv)
        self.o = group([layer.o])
        self.groups = [self.projections, self.o]
        self.num_read_columns = self.projections.padded_rank
        self.num_gradient_columns = self.o.padded_rank
        ends = accumulate((each.base.out_features for each in layer.qkv), initial=0)
        self.parts = [slice(*each) for each in pairwise(ends)]

    def forward(
        self, matrices: Matrices, read: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, LinearActivations]:
        """As Attention (block.py)."""
        assert context.samples is not None
        num_tokens, width = read.shape[0], self.projections.num_inputs
        projected = read.new_empty(num_tokens, self.projections.num_outputs + self.projections.padded_rank)
        out, drop = projected[:, : self.projections.num_outputs], context.drop(self.number, 0)
        self.projections.forward(matrices[0], read[:, :width], read[:, width:], out, drop)
        mixed = mix([projected[:, part] for part in self.parts], self.heads, context.samples)
        low_rank, output = read.new_empty(num_tokens, self.o.padded_rank), read.new_empty(num_tokens, width)
        self.o.forward(matrices[1], mixed, low_rank, output, context.drop(self.number, 1))
        return output, LinearActivations(read, projected, low_rank)

    def backward(
        self,
        matrices: Matrices,
        saved: LinearActivations,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor | None,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """As Attention (block.py)."""
        assert context.samples is not None
        drop, o_drop = context.drop(self.number, 0), context.drop(self.number, 1)
        inputs = [saved.projected[:, part].detach().requires_grad_() for part in self.parts]
        with torch.enable_grad():
            mixed = mix(inputs, self.heads, context.samples)
        grad_mixed = grad_out.new_empty(mixed.shape)
        self.o.input_gradient(matrices[1], grad_out, o_drop, grad_mixed)
        o_gradients = self.o.adapter_gradients(grad_out, mixed.detach(), saved.low_rank, o_drop)
        del grad_out
        gradients = torch.autograd.grad(mixed, inputs, grad_mixed)
        del mixed, grad_mixed
        for part, gradient in zip(self.parts, gradients, strict=True):
            saved.projected[:, part] = gradient
        del gradients, inputs
        read, width = saved.read, self.projections.num_inputs
        self.projections.input_gradient(matrices[0], saved.projected, drop, grad_read)
        of_read = read[:, :width], read[:, width:]
        return self.projections.adapter_gradients(saved.projected, *of_read, drop) + o_gradients
