"""An update of 8-bit AdamW in Triton, over bitsandbytes' own state.

bitsandbytes searches each element's place among the 256 numbers of a map; here it is computed. From 0 to 1 the maps of
bitsandbytes' create_dynamic_map have seven decades, of which each has twice the numbers of the one before: in decade d,
10^(d-7) to 10^(d-6), lie the middles of 2^(d+s) equal parts, with s 0 in the signed map and 1 in the unsigned one.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from train.optim import BLOCK

ROWS = 4  # such blocks of a program, one a warp
NO_SCALE = tl.constexpr(1e-37)  # a block of nothing larger is kept too small, as 1 / 1e-39 is infinite


@triton.jit
def _index_of(x, FINER: tl.constexpr):
    """The index of the number nearest to x, fp32 from 0 to 1, among the map's from 0 on."""
    slope = tl.full(x.shape, 1e6 / 0.9 * 2**FINER, tl.float32)
    count = tl.full(x.shape, 2**FINER, tl.float32)  # numbers in the decade
    for decade in tl.static_range(1, 7):
        # in the middle of the last number of the decade before and the first of this one
        is_in = x >= 10.0 ** (decade - 7) * (1 + 1.8 / 2 ** (decade + FINER))
        slope = tl.where(is_in, 10.0 ** (6 - decade) / 0.9 * 2 ** (decade + FINER), slope)
        count = tl.where(is_in, 2.0 ** (decade + FINER), count)
    part = tl.minimum(tl.floor(x * slope - count * (1 / 9)), count - 1)
    index = part + count + (1 - 2**FINER)
    index = tl.where(x >= (0.1 + 0.45 / 2**FINER) * 0.5e-6, index, 0.0)
    return tl.where(x > 1 - 0.225 / 2 ** (6 + FINER), 128.0 * 2**FINER - FINER, index).to(tl.int32)


@triton.jit
def adamw_kernel(
    p, grad, state1, state2, absmax1, absmax2, map1, map2, beta1, beta2, step_size, eps, decay, num_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of p, fp32 [num_blocks BLOCK], and of its state."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_blocks
    place = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = is_row[:, None]
    g = tl.load(grad + place, mask=inside, other=0.0)
    code1 = tl.load(state1 + place, mask=inside, other=0).to(tl.int32)
    code2 = tl.load(state2 + place, mask=inside, other=0).to(tl.int32)
    scale1 = tl.load(absmax1 + row, mask=is_row, other=0.0)
    scale2 = tl.load(absmax2 + row, mask=is_row, other=0.0)
    first = tl.load(map1 + code1) * scale1[:, None] * beta1 + (1 - beta1) * g
    second = tl.load(map2 + code2) * scale2[:, None] * beta2 + (1 - beta2) * g * g

    value = tl.load(p + place, mask=inside, other=0.0)
    value += step_size * (first / (tl.sqrt(second) + eps))
    tl.store(p + place, value * decay, mask=inside)

    scale1, scale2 = tl.max(tl.abs(first), 1), tl.max(second, 1)
    tl.store(absmax1 + row, scale1, mask=is_row)
    tl.store(absmax2 + row, scale2, mask=is_row)
    index1 = _index_of(tl.abs(first) * (1 / tl.maximum(scale1, NO_SCALE))[:, None], 0)
    index2 = _index_of(second * (1 / tl.maximum(scale2, NO_SCALE))[:, None], 1)
    # below zero there is no 1, and what is there keeps its sign, as in bitsandbytes
    code1 = tl.where(first < 0, 127 - tl.minimum(tl.maximum(index1, 1), 127), 127 + index1)
    tl.store(state1 + place, code1.to(tl.uint8), mask=inside)
    tl.store(state2 + place, index2.to(tl.uint8), mask=inside)


def adamw(p: torch.Tensor, grad: torch.Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Updates p, fp32 of whole blocks, and the tensors of its state by the numbers of its group of parameters.

    state["step"] counts this update already.
    """
    rate, (beta1, beta2) = group["lr"], group["betas"]
    correction1, correction2 = 1 - beta1 ** state["step"], (1 - beta2 ** state["step"]) ** 0.5
    num_blocks = state["absmax1"].numel()
    assert p.numel() == num_blocks * BLOCK
    adamw_kernel[(triton.cdiv(num_blocks, ROWS),)](
        p, grad, state["state1"], state["state2"], state["absmax1"], state["absmax2"], state["qmap1"], state["qmap2"],
        beta1, beta2, -rate * correction2 / correction1, correction2 * group["eps"],
        1 - rate * group["weight_decay"], num_blocks, BLOCK, ROWS, num_warps=ROWS,
    )  # fmt: skip
