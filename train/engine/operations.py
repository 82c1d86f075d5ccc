"""What lies between a block's matrix products, forward and backward, written into tensors that the caller gives.

On a GPU with Triton each function is one kernel; elsewhere the torch lines compute the same (compared in
tests/gpu/test_kernels_cuda.py).
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from train.engine.layers import Norm
from train.run import devices

TANH_GELU = "gelu_tanh"
# GELU by tanh (Hendrycks and Gimpel 2016): x (1 + tanh z) / 2 with z = TANH_SCALE (x + TANH_CUBE x^3)
TANH_SCALE, TANH_CUBE = (2 / math.pi) ** 0.5, 0.044715
ACTIVATIONS = {"silu": F.silu, TANH_GELU: partial(F.gelu, approximate="tanh")}
HASH = (0x7FEB352D, 0x846CA68B)  # lowbias32 (Wellons 2018), the same in kernels.py and dropout_kernels.py


@cache
def kernels_for(device: torch.device) -> Any:
    """The Triton kernels, or None where the device has none: a CPU, or a GPU older than compute capability 7.0."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    if devices.capability(device) < devices.TRITON:
        return None
    from train.engine import kernels

    return kernels


def power_of_two(size: int) -> int:
    """The smallest one that is not below `size`, which Triton's ranges ask for."""
    return 1 << (size - 1).bit_length()


def normalize(x: torch.Tensor, norm: Norm, out: torch.Tensor) -> torch.Tensor:
    """out [T, W] = (x - mean) rstd factor + bias, as `norm` says; returns rstd = (mean(x^2) + eps)^-1/2, fp32 [T]."""
    kernels = kernels_for(x.device)
    if kernels is not None:
        rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        block = power_of_two(x.shape[1])
        bias = norm.weight if norm.bias is None else norm.bias
        kernels.norm_kernel[(x.shape[0],)](
            x, x.stride(0), norm.weight, bias, out, out.stride(0), rstd, norm.eps, x.shape[1],
            norm.is_centred, norm.is_offset, norm.rounds_first, norm.bias is not None, block,
            num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
        return rstd
    wide = x.float()
    if norm.is_centred:
        wide = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + norm.eps)
    normed = wide * rstd[:, None]
    if norm.rounds_first:
        out.copy_(normed.to(out.dtype) * norm.weight)
    else:
        normed = normed * _factor(norm)
        out.copy_(normed if norm.bias is None else normed + norm.bias.float())
    return rstd


def normalize_backward(
    grad_out: torch.Tensor, x: torch.Tensor, norm: Norm, rstd: torch.Tensor, grad: torch.Tensor, add: bool
) -> None:
    """grad [T, W] = (grad +) rstd (g - n mean(g n)), where g = grad_out factor and n = x rstd; both less their means
    where the norm is centred."""
    kernels = kernels_for(x.device)
    if kernels is not None:
        block = power_of_two(x.shape[1])
        kernels.norm_backward_kernel[(x.shape[0],)](
            grad_out, grad_out.stride(0), x, x.stride(0), norm.weight, rstd, grad, grad.stride(0), x.shape[1],
            norm.is_centred, norm.is_offset, add, block, num_warps=8 if block >= 4096 else 4,
        )  # fmt: skip
        return
    inner, wide = grad_out.float() * _factor(norm), x.float()
    if norm.is_centred:
        inner, wide = (each - each.mean(-1, keepdim=True) for each in (inner, wide))
    normed = wide * rstd[:, None]
    result = rstd[:, None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    grad.copy_(result + grad.float() if add else result)


def normalize_heads(x: torch.Tensor, norm: Norm, raw: torch.Tensor) -> torch.Tensor:
    """x [T, n W] in place: each n W elements by an RMSNorm over W; raw [T, n W] becomes what was there.

    Returns rstd, fp32 [T, n].
    """
    size = norm.weight.shape[0]
    num_heads = x.shape[1] // size
    kernels = kernels_for(x.device)
    if kernels is not None:
        rstd = torch.empty(x.shape[0], num_heads, dtype=torch.float32, device=x.device)
        width, heads = power_of_two(size), power_of_two(num_heads)
        kernels.head_norm_kernel[(x.shape[0],)](
            x, x.stride(0), norm.weight, raw, raw.stride(0), rstd, norm.eps, num_heads,
            size, norm.is_offset, norm.rounds_first, width, heads, num_warps=8 if width * heads >= 4096 else 4,
        )  # fmt: skip
        return rstd
    raw.copy_(x)
    flat = raw.reshape(-1, size)
    normed = torch.empty_like(flat)
    rstd = normalize(flat, norm, normed)
    x.copy_(normed.view(x.shape))
    return rstd.view(-1, num_heads)


def normalize_heads_backward(grad: torch.Tensor, raw: torch.Tensor, norm: Norm, rstd: torch.Tensor) -> None:
    """grad [T, n W], of the normed heads, becomes that of the raw ones, in place."""
    size, num_heads = norm.weight.shape[0], rstd.shape[1]
    kernels = kernels_for(grad.device)
    if kernels is not None:
        width, heads = power_of_two(size), power_of_two(num_heads)
        kernels.head_norm_backward_kernel[(grad.shape[0],)](
            grad, grad.stride(0), raw, raw.stride(0), norm.weight, rstd, num_heads,
            size, norm.is_offset, width, heads, num_warps=8 if width * heads >= 4096 else 4,
        )  # fmt: skip
        return
    flat = grad.reshape(-1, size)  # a copy where the rows of grad are wider than it
    found = torch.empty_like(flat)
    normalize_backward(flat, raw.reshape(-1, size), norm, rstd.flatten(), found, add=False)
    grad.copy_(found.view(grad.shape))


def _factor(norm: Norm) -> torch.Tensor:
    return norm.weight.float() + 1.0 if norm.is_offset else norm.weight.float()


@dataclass(frozen=True)
class Rotation:
    """How heads of D elements are turned: rotary position embedding (Su et al. 2021) of the first 2 P of them."""

    cos: torch.Tensor  # [T, P]
    sin: torch.Tensor  # [T, P], with the stride of cos
    size: int  # D
    is_interleaved: bool  # a pair is two neighbours; else the halves of the 2 P elements


def rotate(source: torch.Tensor, target: torch.Tensor, by: Rotation, sign: int = 1) -> None:
    """Turns heads: [T, n D] -> target [T, n D]; each pair (a, b) becomes (a cos - b sin, b cos + a sin).

    sign -1 turns back, which is the gradient.
    """
    num_tokens, num_pairs = by.cos.shape
    num_heads = source.shape[1] // by.size
    if 2 * num_pairs < by.size and source.data_ptr() != target.data_ptr():
        target.copy_(source)
        source = target
    kernels = kernels_for(source.device)
    if kernels is not None:
        kernels.rotate_kernel[(num_tokens,)](
            source, source.stride(0), target, target.stride(0), by.cos, by.sin, by.cos.stride(0), num_heads, sign,
            by.size, num_pairs, by.is_interleaved, power_of_two(num_pairs), power_of_two(num_heads), num_warps=4,
        )  # fmt: skip
        return
    cosine, sine = by.cos[:, None].float(), sign * by.sin[:, None].float()
    turned = target.unflatten(1, (num_heads, by.size))
    pairs, shape = source.unflatten(1, (num_heads, by.size))[..., : 2 * num_pairs].float(), (num_pairs, 2)
    a, b = pairs.unflatten(2, shape).unbind(3) if by.is_interleaved else pairs.unflatten(2, shape[::-1]).unbind(2)
    both = [a * cosine - b * sine, b * cosine + a * sine]
    turned[..., : 2 * num_pairs] = torch.stack(both, dim=3 if by.is_interleaved else 2).flatten(2)


def gate(gate_up: torch.Tensor, out: torch.Tensor, activation: str, is_gated: bool) -> None:
    """out [T, F] = act(gate) up, the halves of gate_up [T, 2 F]; without a gate act(gate_up) [T, F]."""
    width = out.shape[1]
    kernels = kernels_for(out.device)
    if kernels is not None:
        kernels.gate_kernel[(out.shape[0], -(-width // 2048))](
            gate_up, gate_up.stride(0), out, out.stride(0), width, activation == TANH_GELU, is_gated, 2048, num_warps=8
        )
        return
    value = ACTIVATIONS[activation](gate_up[:, :width])
    if is_gated:
        torch.mul(value, gate_up[:, width : 2 * width], out=out)
    else:
        out.copy_(value)


def gate_backward(gate_up: torch.Tensor, grad: torch.Tensor, activation: str, is_gated: bool) -> None:
    """In place: gate_up [T, 2 F] becomes its gradient, grad [T, F] (of act(gate) up) becomes act(gate) up."""
    width = grad.shape[1]
    kernels = kernels_for(grad.device)
    if kernels is not None:
        kernels.gate_backward_kernel[(grad.shape[0], -(-width // 2048))](
            gate_up, gate_up.stride(0), grad, grad.stride(0), width, activation == TANH_GELU, is_gated, 2048,
            num_warps=8,
        )  # fmt: skip
        return
    opened, upstream = gate_up[:, :width].float(), grad.float()
    inner = slope = opened
    if activation == TANH_GELU:
        inner = 2 * TANH_SCALE * (opened + TANH_CUBE * opened**3)
        slope = 2 * TANH_SCALE * (opened + 3 * TANH_CUBE * opened**3)
    sigmoid = inner.sigmoid()
    value, bend = opened * sigmoid, 1 + slope * (1 - sigmoid)
    if not is_gated:
        grad_gate = upstream * sigmoid * bend
        grad.copy_(value)
    else:
        up = gate_up[:, width : 2 * width].float()
        grad_gate, grad_up = upstream * up * sigmoid * bend, upstream * value
        grad.copy_(value * up)
        gate_up[:, width : 2 * width] = grad_up
    gate_up[:, :width] = grad_gate


@dataclass(frozen=True)
class Dropout:
    """The dropout of the adapters' input: its masks are a function of these values."""

    p: float
    seed: torch.Tensor  # int64 scalar on the device, another for each forward pass
    place: int  # identifies a group of adapters in the model
    first: int = 0  # index of the first row, a token, in the micro-batch


def threshold_of(p: float) -> int:
    """An element is dropped where its hash, of 32 bits, is below it."""
    return int(p * 2**32)


def dropout(x: torch.Tensor, out: torch.Tensor, drop: Dropout, number: int = 0, add: bool = False) -> None:
    """out [T, K] = (out +) x / (1 - p) where an element survives, else 0, for adapter `number` of the group.

    The mask depends on seed, place and row only: nothing is kept for the backward pass, which applies the same function
    to the gradient.
    """
    salt, threshold, scale = mixed(drop.place + number), threshold_of(drop.p), 1 / (1 - drop.p)
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


def wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32: a sum over all tokens is not rounded to 16 bits before micro-batches are added."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses [N], fp32, of logits [N, V] at targets [N]; the logits become softmax - onehot(target), in place."""
    kernels = kernels_for(logits.device)
    if kernels is not None:
        losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
        kernels.cross_entropy_kernel[(logits.shape[0],)](
            logits, logits.stride(0), targets, losses, logits.shape[1], 4096, num_warps=16
        )
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
    block = power_of_two(table.shape[1])
    kernels.gather_kernel[(rows.numel(),)](table, rows, out, table.shape[1], block, num_warps=8)
    return out


def mixed(seed: int) -> int:
    """31 bits in which neighbouring seeds have nothing in common (splitmix64's finaliser)."""
    seed = (seed * 0x9E3779B97F4A7C15) % 2**64
    seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % 2**64
    return (seed ^ (seed >> 31)) >> 33
