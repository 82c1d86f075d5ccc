"""What a block adds behind its MLP of the inputs that each token has for it (Gemma 4), forward and backward."""

from dataclasses import dataclass

import torch

from train.engine.context import ForwardContext
from train.engine.layers import PerLayerInput
from train.engine.lora_linear import LoraGroup, Matrices
from train.engine.operations import gate, gate_backward
from train.engine.residual import Branch, Residual


@dataclass
class PerLayerActivations:
    """What the backward pass reads."""

    read: torch.Tensor  # [T, H + R]: what it reads, and behind it its product with the adapter's A^T
    gate_up: torch.Tensor  # [T, 2 P]: what the gate makes, and the block's own inputs
    product: torch.Tensor  # [T, P + R]: act(gate) times inputs, and its product with the adapter's A^T
    branch: Branch | None


class PerLayer:
    """x + norm(projection(act(gate(x)) inputs)): an MLP whose `up` is not projected but given."""

    def __init__(self, parts: PerLayerInput, activation: str, number: int) -> None:
        self.number = number
        self.gate, self.projection = LoraGroup([parts.gate]), LoraGroup([parts.projection])
        self.groups = [self.gate, self.projection]
        self.around = Residual(None, parts.norm, 1.0)
        self.activation = activation
        self.size = self.gate.num_outputs  # P
        self.num_gradient_columns = self.projection.padded_rank

    def forward(
        self, matrices: Matrices, x: torch.Tensor, context: ForwardContext
    ) -> tuple[torch.Tensor, PerLayerActivations]:
        """The sum [T, H] of x and what it adds, and what `backward` reads."""
        (num_tokens, width), size = x.shape, self.size
        read = x.new_empty(num_tokens, width + self.gate.padded_rank)
        self.around.read(x, read[:, :width])
        gate_up = x.new_empty(num_tokens, 2 * size)
        drop = context.drop(self.number, 4)
        self.gate.forward(matrices[0], read[:, :width], read[:, width:], gate_up[:, :size], drop)
        gate_up[:, size:] = context.per_layer[:, self.number * size : (self.number + 1) * size]
        product = x.new_empty(num_tokens, size + self.projection.padded_rank)
        gate(gate_up, product[:, :size], self.activation, is_gated=True)
        output, drop = torch.empty_like(x), context.drop(self.number, 5)
        self.projection.forward(matrices[1], product[:, :size], product[:, size:], output, drop)
        out, branch = self.around.add(output, x)
        return out, PerLayerActivations(read, gate_up, product, branch)

    def backward(
        self, matrices: Matrices, saved: PerLayerActivations, grad: torch.Tensor, context: ForwardContext
    ) -> list[torch.Tensor]:
        """The adapters' gradients; the first H columns of grad hold the sum's gradient, and then that of x."""
        size, width = self.size, self.gate.num_inputs
        gate_drop, drop = context.drop(self.number, 4), context.drop(self.number, 5)
        grad_out = self.around.output_gradient(grad, saved.branch, width, self.num_gradient_columns)
        grad_product = grad.new_empty(grad.shape[0], size)
        self.projection.input_gradient(matrices[1], grad_out, drop, grad_product)
        of_product = saved.product[:, :size], saved.product[:, size:]
        gradients = self.projection.adapter_gradients(grad_out, *of_product, drop)
        del grad_out
        gate_backward(saved.gate_up, grad_product, self.activation, is_gated=True)
        grad_gate = grad.new_empty(grad.shape[0], size + self.gate.padded_rank)
        grad_gate[:, :size] = saved.gate_up[:, :size]
        grad_read = grad.new_empty(grad.shape[0], width)
        self.gate.input_gradient(matrices[0], grad_gate, gate_drop, grad_read)
        of_read = saved.read[:, :width], saved.read[:, width:]
        gradients = self.gate.adapter_gradients(grad_gate, *of_read, gate_drop) + gradients
        self.around.read_backward(grad_read, grad_read, None, grad[:, :width])
        return gradients
