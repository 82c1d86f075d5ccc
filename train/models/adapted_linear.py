"""PEFT's adapted linear layers as one function each, for the reference engine on a GPU; taken back where it differs.

PEFT computes adapters in their own type: the input of each layer is copied to fp32, kept in both types and multiplied
without tensor cores, by some 30 kernels a layer forward and backward. Here 20 do it and, as on the fused engine,
products are in the compute type and sums over tokens in fp32:

    y = [x, x A^T] [W, s B]^T,   dx = [dy, dy s B] [W; A],   dA = (dy s B)^T x,   dB = s dy^T (x A^T)

The adapter's small product is a part of the large one and is rounded with it. Added to it, as PEFT does, what is less
than half a step of a product that is rounded already is lost: half of an adapter's output of a thousandth. addmm_ does
no better: on Hopper cuBLAS rounds the product before it adds, whichever of the two is the product. With dropout the
adapter's part of dx is still added to a rounded one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from train.engine.linears import ADAPTER
from train.engine.lora_linear import FROZEN_LINEARS, dequantize, frozen_matrix
from train.engine.operations import wide_mm
from train.models.adapters import is_adapted_layer
from train.models.agreement import random_adapters
from train.models.language_model import LanguageModel
from train.models.sample_check import SampleCheck
from train.models.shape import BROKEN, told

ALIGNMENT = 8  # elements, 16 bytes in 16 bits: what tensor cores want rows to begin at
FEW_TOKENS = 4  # times the tokens are fewer than a weight's rows or columns: fp32 outputs then move less than its copy


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
        low_rank = rows @ a.to(x.dtype).T  # [T, r]
        beside, up, bias = low_rank, _scaled(b, layer.scale, x.dtype), layer.base.bias
        if bias is not None:
            beside = torch.cat([low_rank, low_rank.new_ones(len(rows), 1)], 1)
            up = torch.cat([up, bias.to(x.dtype)[:, None]], 1)
        out = _rounded_once(flat, beside, layer.base, up, 1)
        ctx.save_for_backward(rows, low_rank, a, b)
        ctx.layer, ctx.is_dropped = layer, read is not x
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low_rank, a, b = ctx.saved_tensors
        (grad,) = grad_outputs
        shape, grad = (*grad.shape[:-1], rows.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_low_rank = grad @ _scaled(b, ctx.layer.scale, grad.dtype)  # [T, r]
        grad_x = grad_read = None
        if ctx.needs_input_grad[0]:
            if ctx.is_dropped:
                grad_x = grad @ frozen_matrix(ctx.layer.base, grad.dtype)
            else:
                grad_x = _rounded_once(grad, grad_low_rank, ctx.layer.base, a.to(grad.dtype), 0)
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            grad_read = grad_low_rank @ a.to(grad.dtype)
        grad_a, grad_b = wide_mm(grad_low_rank.T, rows), wide_mm(grad.T, low_rank).mul_(ctx.layer.scale)
        parts = [None if each is None else each.view(shape) for each in (grad_x, grad_read)]
        return *parts, grad_a, grad_b, None


def _compute_type(base: Any) -> torch.dtype:
    """Of its products, whichever type its NF4 was made from."""
    return getattr(base, "compute_dtype", None) or base.weight.dtype


def _rounded_once(x: torch.Tensor, low_rank: torch.Tensor, base: Any, adapter: torch.Tensor, dim: int) -> torch.Tensor:
    """x W^T + low_rank adapter^T for an adapter [N, R] (`dim` 1), x W + low_rank adapter for [R, K] (0).

    A weight that is not packed is copied for it. Where there are few tokens, as in answers, a sum in fp32 moves less.
    """
    if base.weight.shape == (base.out_features, base.in_features) and FEW_TOKENS * len(x) < x.shape[1]:
        weight, small = (base.weight.T, adapter.T) if dim else (base.weight, adapter)
        return wide_mm(x, weight).add_(low_rank @ small).to(x.dtype)
    if missing := -low_rank.shape[1] % ALIGNMENT:
        low_rank = F.pad(low_rank, (0, missing))
        adapter = F.pad(adapter, (0, missing) if dim else (0, 0, 0, missing))
    matrix = _with_frozen(base, adapter, dim)
    return torch.cat([x, low_rank], 1) @ (matrix.T if dim else matrix)


def _with_frozen(base: Any, adapter: torch.Tensor, dim: int) -> torch.Tensor:
    """The frozen weight [N, K] with the adapter's columns [N, R] (`dim` 1) or rows [R, K] (0) behind it."""
    shape = [base.out_features, base.in_features]
    shape[dim] += adapter.shape[dim]
    out = adapter.new_empty(shape)
    dequantize(base.weight, out[: base.out_features, : base.in_features])
    out.narrow(dim, shape[dim] - adapter.shape[dim], adapter.shape[dim]).copy_(adapter)
    return out


def _scaled(b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """s B [N, r] in the compute type, rounded once."""
    return torch.mul(b, scale, out=torch.empty(b.shape, dtype=dtype, device=b.device))
