"""All decoder blocks as one autograd function: which activations are kept, which are computed again."""

from dataclasses import dataclass
from typing import Any

import torch

from train.engine.block import Activations, Block, Pass
from train.engine.hidden_store import DeviceInputs, HostInputs
from train.engine.operations import rms_norm, rms_norm_backward
from train.engine.weight_store import WeightStore


@dataclass
class Kept:
    """Of one block, for the backward pass."""

    low: torch.Tensor
    activations: Activations | None  # where None, its input is in Stack.inputs


@dataclass
class Last:
    """What the last norm's backward reads."""

    hidden: torch.Tensor  # [T, H]
    rstd: torch.Tensor  # [T]


Memory = list[Kept | Last]  # of a pass: of each block, and of the norm behind them


class Stack:
    """The decoder's blocks and its last norm.

    The last `num_kept` blocks keep their activations; of the others only the input is kept and everything but
    down_proj is computed again. The last block always keeps them: they are needed at once. A training pass forward is
    followed by its backward before the next begins.
    """

    def __init__(
        self, blocks: list[Block], norm: Any, store: WeightStore, num_kept: int, inputs: DeviceInputs | HostInputs
    ) -> None:
        self.blocks = blocks
        self.norm = norm
        self.store = store
        self.num_kept = max(1, num_kept)
        self.forward_order = range(len(blocks))
        self.backward_order = self.forward_order[::-1]
        self.inputs = inputs
        self.anchor = next(parameter for block in blocks for parameter in block.parameters)
        self.padded_rank = max(max(block.o.padded_rank, block.down.padded_rank) for block in blocks)

    def __call__(self, hidden: torch.Tensor, shared: Pass) -> torch.Tensor:
        """Embedded tokens [T, H] -> what the head reads [T, H]."""
        self.store.invalidate_adapters()
        if torch.is_grad_enabled():
            return _Stack.apply(hidden, self, shared, self.anchor)
        return self.forward(hidden, shared, None)

    def forward(self, hidden: torch.Tensor, shared: Pass, kept: Memory | None) -> torch.Tensor:
        """The normed output; fills `kept` where one is given."""
        num_recomputed = len(self.blocks) - self.num_kept
        self.store.begin(self.forward_order)
        self.inputs.begin()
        for block in self.blocks:
            is_kept = block.number >= num_recomputed
            matrices = self.store.matrices(block.number)
            if kept is not None and not is_kept:
                self.inputs.keep(hidden)
            activations = block.forward(matrices, hidden, shared)
            hidden, low = block.finish(matrices, activations, shared)
            if kept is not None:
                kept.append(Kept(low, activations if is_kept else None))
            del activations
        self.inputs.settle()
        out = torch.empty_like(hidden)
        rstd = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon, out)
        if kept is not None:
            kept.append(Last(hidden, rstd))
        return out

    def backward(self, grad_out: torch.Tensor, shared: Pass, kept: Memory) -> None:
        """Adds to the adapters' gradients; consumes `kept`."""
        width = grad_out.shape[1]
        last = kept.pop()
        assert isinstance(last, Last)
        grad = grad_out.new_empty(grad_out.shape[0], width + self.padded_rank)
        rms_norm_backward(grad_out, last.hidden, self.norm.weight, last.rstd, grad[:, :width], add=False)
        del last
        self.store.begin(self.backward_order)
        for block in reversed(self.blocks):
            record = kept.pop()
            assert isinstance(record, Kept)
            matrices = self.store.matrices(block.number)
            activations = record.activations
            if activations is None:
                activations = block.forward(matrices, self.inputs.take(), shared)
            gradients = block.backward(matrices, activations, record.low, grad, shared)
            places: Any = [parameter.grad for parameter in block.parameters]
            torch._foreach_add_(places, gradients)
            del activations, record, gradients


class _Stack(torch.autograd.Function):
    """Stack as autograd sees it: a function of one adapter, so that it is asked for the gradients of all.

    They are added to `.grad` where they lie (optim.FlatParameters): handing 448 of them to autograd costs 5 ms a pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, stack: Stack, shared: Pass, _: torch.nn.Parameter) -> torch.Tensor:
        ctx.stack, ctx.shared, ctx.kept = stack, shared, []
        return stack.forward(hidden, shared, ctx.kept)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        ctx.stack.backward(grad_outputs[0], ctx.shared, ctx.kept)
        return None, None, None, None
