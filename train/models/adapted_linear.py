"""PEFT's adapted linear layers as one function each, for the reference engine on a GPU; taken back where it differs.

PEFT computes adapters in their own type: the input of each layer is copied to fp32, kept in both types and multiplied
without tensor cores, by some 30 kernels a layer forward and backward. Here 17 do it and, as on the fused engine,
products are in the compute type and sums over tokens in fp32:

    y = x W^T + (x A^T)(s B)^T,   dx = dy W + (dy s B) A,   dA = (dy s B)^T x,   dB = s dy^T (x A^T)

The large product is added to the adapter's small one and rounded with it. The other way round, as PEFT does, what is
less than half a step of a product that is rounded already goes lost: half of an adapter's output of a thousandth.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from train.engine.linears import ADAPTER
from train.engine.lora_linear import FROZEN_LINEARS, frozen_matrix, wide_mm
from train.models.adapters import is_adapted_layer
from train.models.agreement import random_adapters
from train.models.language_model import LanguageModel
from train.models.sample_check import SampleCheck
from train.models.shape import BROKEN, told


def use_own_products(model: LanguageModel, ids: Sequence[int]) -> str:
    """Puts the function in the place of PEFT's, if hidden states and gradients of a sample `ids` agree.

    Returns what was done and why, in words; empty where no layer is one that it computes.
    """
    own = {module: _Forward(module) for module in model.adapted.modules() if _is_plain(module, model.compute_dtype)}
    if not own:
        return ""
    with random_adapters(model):
        check = SampleCheck(model, ids)
        for module, forward in own.items():
            vars(module)["forward"] = forward  # on the instance: PEFT's class keeps its own
        try:
            problem = check.problem()
        except torch.OutOfMemoryError:
            raise
        except (*BROKEN, NotImplementedError) as error:  # a card without the kernels
            problem = told(error)
    if problem:
        restore_products(model)
        return f"PEFT's products of adapters: ours were tried and taken back ({problem})"
    return f"adapters: {len(own)} layers are one function each, in {str(model.compute_dtype).removeprefix('torch.')}"


def restore_products(model: LanguageModel) -> None:
    """Gives PEFT's layers their own forward pass back."""
    for module in model.adapted.modules():
        if isinstance(vars(module).get("forward"), _Forward):
            del vars(module)["forward"]


def _is_plain(module: Any, compute: torch.dtype) -> bool:
    """Whether it is LoRA and nothing else around a frozen linear layer of the type, in NF4 or not quantised."""
    if not is_adapted_layer(module) or type(module.base_layer) not in FROZEN_LINEARS:
        return False
    return (
        _compute_type(module.base_layer) == compute
        and list(module.lora_A) == [ADAPTER]
        and not module.lora_variant
        and not module.lora_bias[ADAPTER]
        and not module.base_layer.weight.requires_grad
        and not getattr(module, "fan_in_fan_out", False)
    )


class _Forward:
    """The forward pass of one layer; PEFT's where the adapter is off or merged, or the input has another type."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.base = module.base_layer
        self.scale = module.scaling[ADAPTER]

    def __call__(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """x [..., K] -> [..., N]."""
        module = self.module
        is_other = x.dtype != _compute_type(self.base) or module.disable_adapters or module.merged
        if is_other or args or options or torch.is_autocast_enabled(x.device.type):
            return type(module).forward(module, x, *args, **options)
        dropout = module.lora_dropout[ADAPTER]
        p = getattr(dropout, "p", 0.0) if module.training else 0.0
        read = F.dropout(x, p) if p else x
        a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        return _AdaptedLinear.apply(x, read, a, b, self)


class _AdaptedLinear(torch.autograd.Function):
    """As in the head of this file; with dropout the adapter reads `read` instead of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        read: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        layer: _Forward,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [T, K]
        rows = flat if read is x else read.reshape(flat.shape)
        weight, bias = frozen_matrix(layer.base, x.dtype), layer.base.bias  # [N, K], [N]
        low_rank = rows @ a.to(x.dtype).T  # [T, r]
        out = low_rank @ _scaled(b, layer.scale, x.dtype).T
        out.addmm_(flat, weight.T)
        if bias is not None:
            out += bias.to(x.dtype)
        ctx.save_for_backward(rows, low_rank, a, b)
        ctx.layer, ctx.is_dropped = layer, read is not x
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low_rank, a, b = ctx.saved_tensors
        (grad,) = grad_outputs
        shape, grad = (*grad.shape[:-1], rows.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_low_rank = grad @ _scaled(b, ctx.layer.scale, grad.dtype)  # [T, r]
        grad_x = grad_read = None
        if ctx.needs_input_grad[0]:
            weight = frozen_matrix(ctx.layer.base, grad.dtype)
            grad_x = grad @ weight if ctx.is_dropped else (grad_low_rank @ a.to(grad.dtype)).addmm_(grad, weight)
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            grad_read = grad_low_rank @ a.to(grad.dtype)
        grad_a, grad_b = wide_mm(grad_low_rank.T, rows), wide_mm(grad.T, low_rank).mul_(ctx.layer.scale)
        parts = [None if each is None else each.view(shape) for each in (grad_x, grad_read)]
        return *parts, grad_a, grad_b, None


def _compute_type(base: Any) -> torch.dtype:
    """Of its products, whichever type its NF4 was made from."""
    return getattr(base, "compute_dtype", None) or base.weight.dtype


def _scaled(b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """s B [N, r] in the compute type, rounded once."""
    return torch.mul(b, scale, out=torch.empty(b.shape, dtype=dtype, device=b.device))
