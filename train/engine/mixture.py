"""The MLP half of a block that is a mixture of experts, forward and backward: each token goes through a few of many."""

from dataclasses import dataclass

import torch

from train.engine.context import ForwardContext
from train.engine.experts import ExpertGroup
from train.engine.grouped import scaled_gate, scaled_gate_backward, sum_rows
from train.engine.layers import DecoderLayer
from train.engine.linears import Router
from train.engine.lora_linear import Matrices


@dataclass
class Routing:
    """Which experts T tokens go to, k each: S = T k rows, sorted by expert."""

    read: torch.Tensor  # [T, H], the leaf of the router's graph
    weights: torch.Tensor  # [T, k], with the router's autograd graph
    tokens: torch.Tensor  # int64 [S]: of each row
    factors: torch.Tensor  # fp32 [S]: what each row counts
    places: torch.Tensor  # int64 [T, k]: the row of each choice
    ends: torch.Tensor  # int32 [E]: behind each expert's last row

    @classmethod
    def of(cls, router: Router, read: torch.Tensor, num_experts: int) -> "Routing":
        """transformers' router decides; nothing waits for the host."""
        leaf = read.detach().requires_grad_()
        with torch.enable_grad():
            _, weights, chosen = router(leaf)
        experts, order = chosen.flatten().sort(stable=True)  # order: the choice, t k + j, of each row
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(num_experts, device=order.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        factors = weights.detach().flatten()[order].float()
        return cls(leaf, weights, order // chosen.shape[1], factors, places.view(chosen.shape), ends)


@dataclass
class MixtureActivations:
    """What the backward pass of a mixture reads."""

    routing: Routing
    gate_up: torch.Tensor  # [S, 2 F]
    low_rank: torch.Tensor | None  # [S, P]: the rows times gate_up's A^T


class Mixture:
    """The sum over a token's experts e of weight_e down_e(act(gate_e(x)) up_e(x)); each layer may have biases."""

    num_read_columns = 0  # behind what it reads: the adapters' are behind the sorted rows
    num_gradient_columns = 0

    def __init__(self, layer: DecoderLayer, router: Router) -> None:
        self.router = router
        self.gate_up = ExpertGroup(layer.gate_up[0])
        self.down = ExpertGroup(layer.down)
        self.groups = [self.gate_up, self.down]
        self.activation = layer.activation

    def forward(self, matrices: Matrices, read: torch.Tensor, context: ForwardContext) -> MixtureActivations:
        """Routes read [T, H]; gate and up of each row; `finish` makes more."""
        routing = Routing.of(self.router, read, self.gate_up.num_experts)
        gate_up, low_rank = self.gate_up.forward(matrices[0], read, routing.tokens, routing.ends)
        return MixtureActivations(routing, gate_up, low_rank)

    def finish(
        self, matrices: Matrices, saved: MixtureActivations, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [T, H]; and nothing [T, 0]: down's input times A^T is as quickly made again."""
        routing, out = saved.routing, torch.empty_like(saved.routing.read)
        product = saved.gate_up.new_empty(saved.gate_up.shape[0], self.down.num_inputs)
        scaled_gate(saved.gate_up, product, self.activation, routing.factors)
        rows, _ = self.down.forward(matrices[1], product, None, routing.ends, routing.factors)
        sum_rows(rows, routing.places, out)
        return out, out.new_empty(out.shape[0], 0)

    def backward(
        self,
        matrices: Matrices,
        saved: MixtureActivations,
        low_rank: torch.Tensor,
        grad_out: torch.Tensor,
        grad_read: torch.Tensor,
        context: ForwardContext,
    ) -> list[torch.Tensor]:
        """The adapters' gradients, from the output's [T, H]; grad_read [T, H] becomes that of `read`.

        Consumes `saved`.
        """
        routing, gate_up = saved.routing, saved.gate_up
        tokens, ends = routing.tokens, routing.ends
        product, spread = self.down.input_gradient(matrices[1], grad_out, tokens, ends)
        # the product, times its factor, replaces its gradient
        grad_factors = scaled_gate_backward(gate_up, product, self.activation, routing.factors)
        grad_factors += self.down.bias_gradient(spread)
        low = self.down.low_rank(matrices[1], product, None, ends)
        of_down = self.down.adapter_gradients((product, None), (grad_out, tokens), low, spread, ends)
        del product, low
        grad_rows, spread = self.gate_up.input_gradient(matrices[0], gate_up, None, ends)
        sum_rows(grad_rows, routing.places, grad_read)
        del grad_rows
        read = routing.read.detach(), tokens
        of_gate_up = self.gate_up.adapter_gradients(read, (gate_up, None), saved.low_rank, spread, ends)
        grad_weights = grad_factors[routing.places].to(routing.weights.dtype)
        grad_read += torch.autograd.grad(routing.weights, routing.read, grad_weights)[0]
        return of_gate_up + of_down
