"""Weights in MXFP4: floats of 4 bits, E2M1, and a power of two, E8M0, for 32 of them (OCP Microscaling Formats 1.0).

They are held as bitsandbytes holds NF4 with double quantisation, with other tables: a code of E2M1 is an index of its
values, one of E8M0 an index of the powers. So whatever packs, streams, shares out or dequantises NF4 does it to them,
and nothing is rounded: what is computed with is what the files hold.
"""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState

from train.engine.packed_weights import NESTED_BLOCK

MXFP4 = "mxfp4"
BLOCK = 32  # weights of a row with one scale
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # then the same below zero
BIAS = 127  # of E8M0: code c is 2^(c - BIAS); 255, which is no number, becomes infinity


def mxfp4_kind() -> dict[str, Any]:
    """What bitsandbytes' Params4bit is told of such weights."""
    return {"quant_type": MXFP4, "blocksize": BLOCK, "compress_statistics": True}


def is_mxfp4(parameter: object) -> bool:
    """Whether a parameter holds its weights so, or will."""
    return getattr(parameter, "quant_type", "") == MXFP4


def mxfp4_parameter(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    """The packed weight [..., K] of blocks [..., K / 32, 16], whose bytes have the first of two weights below, and
    scales [..., K / 32], both uint8 and on its device; it is dequantised to `dtype`."""
    device = blocks.device
    codes = torch.tensor([*VALUES, *(-value for value in VALUES)], device=device)
    powers = torch.exp2(torch.arange(256.0, dtype=torch.float64) - BIAS).float()
    ones = torch.ones(-(-scales.numel() // NESTED_BLOCK), device=device)
    nested = QuantState(ones, code=powers.to(device), blocksize=NESTED_BLOCK, dtype=torch.float32)
    shape = torch.Size((*scales.shape[:-1], scales.shape[-1] * BLOCK))
    state = QuantState(
        scales.flatten(), shape, codes, BLOCK, MXFP4, dtype, offset=torch.zeros((), device=device), state2=nested
    )
    data = (blocks >> 4 | blocks << 4).reshape(-1, 1)  # bitsandbytes has the first of two above
    params4bit: Any = bnb.nn.Params4bit
    return params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True, **mxfp4_kind())


def dequantize_mxfp4(data: torch.Tensor, state: Any, out: torch.Tensor) -> None:
    """out [E, N, K] = the weights, one matrix at a time; where there are no kernels (lora_linear.dequantize)."""
    codes, scales = data.view(*state.shape[:-1], -1, BLOCK // 2), state.absmax.view(*state.shape[:-1], -1)
    for place, code, scale in zip(out, codes, scales, strict=True):
        values = state.code[torch.stack([code >> 4, code & 15], -1).flatten(-2).int()]
        place.copy_((values * state.state2.code[scale.int()][..., None]).flatten(1))
