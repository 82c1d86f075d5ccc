"""All decoder blocks as one autograd function: which activations are kept, and which are recomputed."""

from dataclasses import dataclass
from typing import Any

import torch

from train.engine.block import Activations, Block
from train.engine.context import ForwardContext
from train.engine.hidden_store import DeviceInputs, HostInputs
from train.engine.layers import Norm
from train.engine.lora_linear import Pass
from train.engine.operations import normalize, normalize_backward
from train.engine.weight_store import WeightStore


@dataclass
class SavedBlock:
    """What the backward pass needs of one block."""

    low_rank: torch.Tensor  # [T, R]: down_proj's input times A^T
    activations: Activations | None  # None: recomputed from the block's input, which is in Stack.inputs


@dataclass
class SavedNorm:
    """What the last norm's backward reads."""

    hidden: torch.Tensor  # [T, H]
    rstd: torch.Tensor  # [T]


Saved = list[SavedBlock | SavedNorm]  # of a forward pass: each block's in order, then the last norm's


class Stack:
    """The decoder's blocks and its last norm.

    The last `num_kept` blocks keep their activations. The others keep only their input, and the backward pass
    recomputes everything but down_proj (that too where a norm is behind it). The last block always keeps its
    activations: they are needed at once. Each training forward pass is followed by its backward pass before the next
    begins. With `trains_input` the embedding, or rows of it, are trained, and the first block's input gets a gradient.
    """

    def __init__(
        self,
        blocks: list[Block],
        norm: Norm,
        store: WeightStore,
        num_kept: int,
        inputs: DeviceInputs | HostInputs,
        trains_input: bool,
    ) -> None:
        self.blocks = blocks
        blocks[0].gives_input_gradient = trains_input
        self.norm = norm
        self.store = store
        self.num_kept = max(1, num_kept)
        self.forward_order = range(len(blocks))
        self.backward_order = self.forward_order[::-1]
        self.inputs = inputs
        self.anchor = next(parameter for block in blocks for parameter in block.parameters)
        self.padded_rank = max(block.num_gradient_columns for block in blocks)

    def __call__(self, hidden: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Embedded tokens [T, H] -> what the head reads [T, H]."""
        self.store.invalidate_adapters()
        if torch.is_grad_enabled():
            return _StackFunction.apply(hidden, self, context, self.anchor)
        return self.forward(hidden, context, None)

    def forward(self, hidden: torch.Tensor, context: ForwardContext, saved: Saved | None) -> torch.Tensor:
        """The normed output [T, H]; fills `saved` where a list is given, for `backward`."""
        num_recomputed = len(self.blocks) - self.num_kept
        self.store.begin(self.forward_order)
        self.inputs.begin()
        for block in self.blocks:
            is_kept = block.number >= num_recomputed
            matrices = self.store.matrices(block.number, Pass.FORWARD)
            if saved is not None and not is_kept:
                self.inputs.keep(hidden)
            activations = block.forward(matrices, hidden, context)
            hidden, low_rank = block.finish(matrices, activations, context)
            if saved is not None:
                saved.append(SavedBlock(low_rank, activations if is_kept else None))
            del activations
        self.inputs.settle()
        out = torch.empty_like(hidden)
        rstd = normalize(hidden, self.norm, out)
        if saved is not None:
            saved.append(SavedNorm(hidden, rstd))
        return out

    def backward(self, grad_out: torch.Tensor, context: ForwardContext, saved: Saved) -> torch.Tensor | None:
        """Adds to the adapters' gradients, from the output's [T, H]; consumes `saved`.

        Returns the gradient of the embedded tokens [T, H] where they need one.
        """
        width = grad_out.shape[1]
        last = saved.pop()
        assert isinstance(last, SavedNorm)
        grad = grad_out.new_empty(grad_out.shape[0], width + self.padded_rank)
        normalize_backward(grad_out, last.hidden, self.norm, last.rstd, grad[:, :width], add=False)
        del last
        self.store.begin(self.backward_order)
        for block in reversed(self.blocks):
            of_block = saved.pop()
            assert isinstance(of_block, SavedBlock)
            activations = of_block.activations
            # tiles of an MLP compute gate and up again
            run = Pass.RECOMPUTED if activations is None or context.tile else Pass.BACKWARD
            matrices = self.store.matrices(block.number, run)
            if activations is None:
                activations = block.forward(matrices, self.inputs.take(), context)
                if block.around_mlp.after is not None:  # whose backward reads what down_proj made
                    block.finish(matrices, activations, context)
            gradients = block.backward(matrices, activations, of_block.low_rank, grad, context)
            totals = [parameter.grad for parameter in block.parameters if parameter.grad is not None]
            assert len(totals) == len(gradients), "every adapter has a gradient to add to (optim.FlatParameters)"
            if totals:  # a hybrid may have adapters in blocks of one kind alone
                torch._foreach_add_(totals, gradients)
            del activations, of_block, gradients
        return grad[:, :width] if self.blocks[0].gives_input_gradient else None


class _StackFunction(torch.autograd.Function):
    """Stack as autograd sees it: a function of one adapter, so that it is asked for the gradients of all.

    They are added to `.grad` where they are (optim.FlatParameters): handing 448 of them to autograd costs 5 ms a
    micro-batch.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, stack: Stack, context: ForwardContext, _: torch.nn.Parameter
    ) -> torch.Tensor:
        ctx.stack, ctx.context, ctx.saved = stack, context, []
        return stack.forward(hidden, context, ctx.saved)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        return ctx.stack.backward(grad_outputs[0], ctx.context, ctx.saved), None, None, None
