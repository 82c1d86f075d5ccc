"""What lies between a block's matrix products, forward and backward, written into tensors that the caller gives.

On a GPU with Triton each function is one kernel; elsewhere the torch lines compute the same (compared in
tests/gpu/test_kernels_cuda.py).
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from train.run import devices

HASH = (0x7FEB352D, 0x846CA68B)  # lowbias32 (Wellons 2018), the same in kernels.py


@cache
def kernels_for(device: torch.device) -> Any:
    """The Triton kernels, or None where the device has none: a CPU, or a GPU older than compute capability 7.0."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if devices.capability(device) < devices.TRITON:
        return None
    from train.engine import kernels

    return kernels


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """out [T, H] = x rstd weight; returns rstd = (mean(x^2) + eps)^-1/2, fp32 [T]."""
    kernels = kernels_for(x.device)
    if kernels is not None:
        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        block = _power_of_two(x.shape[1])
        options = {"num_warps": 8 if block >= 4096 else 4}
        kernels.rms_norm_kernel[(x.shape[0],)](
            x, x.stride(0), weight, out, out.stride(0), rstd, eps, x.shape[1], block, **options
        )
        return rstd
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    out.copy_((wide * rstd[:, None]).to(out.dtype) * weight)
    return rstd


def rms_norm_backward(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, grad: torch.Tensor, add: bool
) -> None:
    """grad [T, H] = (grad +) rstd (g - n mean(g n)), where g = grad_out weight and n = x rstd."""
    kernels = kernels_for(x.device)
    if kernels is not None:
        block = _power_of_two(x.shape[1])
        kernels.rms_norm_backward_kernel[(x.shape[0],)](
            grad_out, grad_out.stride(0), x, x.stride(0), weight, rstd, grad, grad.stride(0), x.shape[1], add, block,
            num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
        return
    inner = grad_out.float() * weight.float()
    normed = x.float() * rstd[:, None]
    result = rstd[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    grad.copy_(result + grad.float() if add else result)


def rotate(source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int = 1) -> None:
    """Rotary position embedding of heads: [T, n D] -> target [T, n D]; cos, sin [T, D]; sign -1 is the gradient.

    Each head's halves (a, b) become (a cos - b sin, b cos + a sin) (Su et al. 2021, in transformers' order).
    """
    num_tokens, size = cos.shape
    num_heads = source.shape[1] // size
    kernels = kernels_for(source.device)
    if kernels is not None:
        kernels.rotate_kernel[(num_tokens,)](
            source, source.stride(0), target, target.stride(0), cos, sin, num_heads, sign,
            size, _power_of_two(size // 2), _power_of_two(num_heads), num_warps=4,
        )  # fmt: skip
        return
    a, b = source.unflatten(1, (num_heads, 2, size // 2)).float().unbind(2)
    cosine, sine = cos[:, None, : size // 2].float(), sign * sin[:, None, : size // 2].float()
    turned = torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=2)
    target.copy_(turned.flatten(1))


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [T, F] = silu(gate) up, the halves of gate_up [T, 2 F]."""
    width = out.shape[1]
    kernels = kernels_for(out.device)
    if kernels is not None:
        grid = (out.shape[0], -(-width // 2048))
        kernels.swiglu_kernel[grid](gate_up, gate_up.stride(0), out, out.stride(0), width, 2048, num_warps=8)
        return
    torch.mul(F.silu(gate_up[:, :width]), gate_up[:, width : 2 * width], out=out)


def swiglu_backward(gate_up: torch.Tensor, grad: torch.Tensor) -> None:
    """In place: gate_up [T, 2 F] becomes its gradient, grad [T, F] (of silu(gate) up) becomes silu(gate) up."""
    width = grad.shape[1]
    kernels = kernels_for(grad.device)
    if kernels is not None:
        grid = (grad.shape[0], -(-width // 2048))
        kernels.swiglu_backward_kernel[grid](gate_up, gate_up.stride(0), grad, grad.stride(0), width, 2048, num_warps=8)
        return
    gate, up = gate_up[:, :width].float(), gate_up[:, width : 2 * width].float()
    upstream, sigmoid = grad.float(), gate.sigmoid()
    silu = gate * sigmoid
    grad_gate, grad_up = upstream * up * sigmoid * (1 + gate * (1 - sigmoid)), upstream * silu
    grad.copy_(silu * up)
    gate_up[:, :width] = grad_gate
    gate_up[:, width : 2 * width] = grad_up


@dataclass(frozen=True)
class Dropout:
    """The dropout of the adapters' input: its masks are a function of these values."""

    p: float
    seed: torch.Tensor  # int64 scalar on the device, another for each forward pass
    place: int  # identifies a group of adapters in the model
    first: int = 0  # index of the first row, a token, in the micro-batch


def dropout(x: torch.Tensor, out: torch.Tensor, drop: Dropout, number: int = 0, add: bool = False) -> None:
    """out [T, K] = (out +) x / (1 - p) where an element survives, else 0, for adapter `number` of the group.

    The mask depends on seed, place and row only: nothing is kept for the backward pass, which applies the same function
    to the gradient.
    """
    salt, threshold, scale = mixed(drop.place + number), int(drop.p * 2**32), 1 / (1 - drop.p)
    kernels = kernels_for(x.device)
    if kernels is not None:
        grid = (x.shape[0], -(-x.shape[1] // 2048))
        kernels.dropout_kernel[grid](
            x, x.stride(0), out, out.stride(0), x.shape[1], drop.first, drop.seed, salt, threshold, scale, add, 2048,
            num_warps=8,
        )  # fmt: skip
        return
    first, last = drop.first * x.shape[1], (drop.first + x.shape[0]) * x.shape[1]
    bits = torch.arange(first, last, device=x.device).reshape(x.shape)
    bits = bits ^ drop.seed ^ salt  # the host need not know the seed
    bits = ((bits ^ (bits >> 16)) * HASH[0]) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * HASH[1]) & 0xFFFFFFFF
    bits ^= bits >> 16
    values = torch.where(bits >= threshold, x.float() * scale, 0.0)
    out.copy_(values + out.float() if add else values)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses [N], fp32, of logits [N, V] at targets [N]; the logits become softmax - onehot(target), in place."""
    kernels = kernels_for(logits.device)
    if kernels is not None:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        kernels.cross_entropy_kernel[(logits.shape[0],)](logits, targets, losses, logits.shape[1], 4096, num_warps=16)
        return losses
    wide, own = logits.float(), targets[:, None]
    log_total = wide.logsumexp(-1, keepdim=True)
    losses = (log_total - wide.gather(-1, own)).flatten()
    grad = wide.sub_(log_total).exp_()  # softmax; in place in `logits` where they are fp32
    logits.copy_(grad.scatter_add_(-1, own, grad.new_full(own.shape, -1.0)))
    return losses


def gather_rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """table[rows] on the device of rows [T], for table [V, H] in pinned host memory.

    The GPU reads them over the bus, without a host sync; without Triton the host collects and copies them.
    """
    kernels = kernels_for(rows.device)
    if kernels is None:
        return table[rows.cpu()].to(rows.device)
    out = torch.empty(rows.numel(), table.shape[1], dtype=table.dtype, device=rows.device)
    block = _power_of_two(table.shape[1])
    kernels.gather_kernel[(rows.numel(),)](table, rows, out, table.shape[1], block, num_warps=8)
    return out


def mixed(seed: int) -> int:
    """31 bits in which neighbouring seeds have nothing in common (splitmix64's finaliser)."""
    seed = (seed * 0x9E3779B97F4A7C15) % 2**64
    seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % 2**64
    return (seed ^ (seed >> 31)) >> 33
