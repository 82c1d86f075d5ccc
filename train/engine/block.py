"""One decoder block, forward and backward by hand: two halves on the residual stream, attention and MLP."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from train.engine.context import ForwardContext
from train.engine.fp8 import GROUPS
from train.engine.layers import DecoderLayer, DeltaHeads
from train.engine.linear_attention import LinearAttention
from train.engine.lora_linear import LoraGroup, Matrices
from train.engine.mixture import Mixture, MixtureActivations
from train.engine.mlp import Mlp, MlpActivations
from train.engine.per_layer import PerLayer, PerLayerActivations
from train.engine.residual import Branch, Residual
from train.engine.self_attention import SelfAttention


class Attention(Protocol):
    """A block's first half: softmax attention (self_attention.py), or linear attention (linear_attention.py)."""

    groups: list[LoraGroup]
    num_read_columns: int  # behind what it reads
    num_gradient_columns: int  # behind the gradient of its output

    def forward(self, matrices: Matrices, read: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, Any]:
        """Its output [T, H] for read [T, H + R], whose last columns it fills; and what `backward` reads."""
        ...

    def backward(
        self,
        matrices: Matrices,
        saved: Any,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor | None,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The adapters' gradients, from the output's [T, H + R]; grad_read [T, H] becomes that of `read`, if given.

        Consumes `saved`, and what lies behind H in grad_out.
        """
        ...


@dataclass
class Activations:
    """What the backward pass of a block reads. Its output is not part of it, so down_proj need not be recomputed, but
    for families with a norm behind it.
    """

    x: torch.Tensor  # [T, H]
    rstd: torch.Tensor | None  # [T]; None where no norm is before attention
    attention: Any  # what its kind of attention reads
    attention_branch: Branch | None  # where a norm is behind attention
    post_attention: torch.Tensor  # [T, H]: x plus what attention adds
    mlp_rstd: torch.Tensor | None  # [T]; None where no norm is before the MLP
    mlp: MlpActivations | MixtureActivations
    mlp_branch: Branch | None = None  # where a norm is behind the MLP; `finish` makes it
    per_layer: PerLayerActivations | None = None  # of its own inputs, where it has such; `finish` makes it


def attention_of(layer: DecoderLayer, number: int, group: type[LoraGroup]) -> Attention:
    """The kind that the layer has, with its projections in such groups."""
    if isinstance(layer.heads, DeltaHeads):
        return LinearAttention(layer, layer.heads, number, group)
    return SelfAttention(layer, layer.heads, number, group)


class Block:
    """A decoder layer of transformers with PEFT's adapters, read once; its parameters stay where they are."""

    def __init__(self, layer: DecoderLayer, number: int, products: str = "bf16") -> None:
        """`products` as in engine.products."""
        self.number = number
        group = GROUPS[products]
        self.attention = attention_of(layer, number, group)
        self.mlp: Any = Mlp(layer, number, group) if layer.router is None else Mixture(layer, layer.router)
        self.per_layer = PerLayer(layer.per_layer, layer.activation, number) if layer.per_layer else None
        self.output_scale = layer.output_scale
        parts = [self.attention, self.mlp, *([self.per_layer] if self.per_layer else [])]
        self.groups = [group for part in parts for group in part.groups]
        self.num_gradient_columns = max(part.num_gradient_columns for part in parts)
        # of each group: blocks that have the same can take turns in one matrix
        self.places = tuple((number, group.layout) for number, group in enumerate(self.groups))
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

    def _halves(self, matrices: Matrices) -> tuple[Matrices, Matrices, Matrices]:
        """Those of attention, of the MLP, and of what is behind it."""
        first = len(self.attention.groups)
        second = first + len(self.mlp.groups)
        return matrices[:first], matrices[first:second], matrices[second:]

    def forward(self, matrices: Matrices, x: torch.Tensor, context: ForwardContext) -> Activations:
        """Everything up to the MLP's product, and gate and up unless the MLP is tiled; `finish` makes the output."""
        (num_tokens, width), (of_attention, of_mlp, _) = x.shape, self._halves(matrices)
        read = x.new_empty(num_tokens, width + self.attention.num_read_columns)
        rstd = self.around_attention.read(x, read[:, :width])
        output, attention = self.attention.forward(of_attention, read, context)
        post_attention, branch = self.around_attention.add(output, x)
        mlp_read = x.new_empty(num_tokens, width + self.mlp.num_read_columns)
        mlp_rstd = self.around_mlp.read(x if self.is_parallel else post_attention, mlp_read[:, :width])
        mlp = self.mlp.forward(of_mlp, mlp_read, context)
        return Activations(x, rstd, attention, branch, post_attention, mlp_rstd, mlp)

    def finish(
        self, matrices: Matrices, saved: Activations, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output [T, H], post_attention plus what the MLP adds; and down_proj's input times A^T [T, R]."""
        _, of_mlp, of_per_layer = self._halves(matrices)
        out, low_rank = self.mlp.finish(of_mlp, saved.mlp, context)
        out, saved.mlp_branch = self.around_mlp.add(out, saved.post_attention)
        if self.per_layer is not None:
            out, saved.per_layer = self.per_layer.forward(of_per_layer, out, context)
        if self.output_scale is not None:
            out *= self.output_scale
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
        width, (of_attention, of_mlp, of_per_layer) = saved.x.shape[1], self._halves(matrices)
        if self.output_scale is not None:
            grad[:, :width] *= self.output_scale
        behind: list[torch.Tensor] = []
        if self.per_layer is not None:
            assert saved.per_layer is not None
            behind = self.per_layer.backward(of_per_layer, saved.per_layer, grad, context)
            saved.per_layer = None
        columns = self.mlp.num_gradient_columns
        grad_out = self.around_mlp.output_gradient(grad, saved.mlp_branch, width, columns)
        grad_mlp_read = grad.new_empty(grad.shape[0], width)
        mlp_gradients = self.mlp.backward(of_mlp, saved.mlp, low_rank, grad_out, grad_mlp_read, context)
        del grad_out
        shared = None  # the gradient of what attention reads as well
        if self.is_parallel:
            shared = grad_mlp_read
        else:
            self.around_mlp.read_backward(grad_mlp_read, saved.post_attention, saved.mlp_rstd, grad[:, :width])
        # attention's gradients need the room
        del saved.mlp, saved.mlp_branch, saved.post_attention, grad_mlp_read

        columns = self.attention.num_gradient_columns
        grad_out = self.around_attention.output_gradient(grad, saved.attention_branch, width, columns)
        grad_read = grad.new_empty(grad.shape[0], width) if self.gives_input_gradient else None
        gradients = self.attention.backward(of_attention, saved.attention, grad_out, grad_read, context)
        if grad_read is not None:
            if shared is not None:
                grad_read += shared
            self.around_attention.read_backward(grad_read, saved.x, saved.rstd, grad[:, :width])
        return gradients + mlp_gradients + behind
