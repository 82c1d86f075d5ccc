"""Triton kernels of fp8.py: NF4 to e4m3, and rows to e4m3 with a scale each. They need compute capability 8.9."""

import triton
import triton.language as tl

DEQUANTIZED_ROWS = 64  # of a program: a column of so many NF4 blocks
WORD = tl.constexpr(4)  # bytes that go to the transpose together


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_code, nested_absmax, offset, code, scale, along, across, N, stride_along, stride_across,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ALONG: tl.constexpr, ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """NF4 / scale -> along[N, K], across[K, N] or both, ROWS blocks below one another a program.

    `across` is in words of 4 bytes, its stride too. No tl.interleave: on Hopper (Triton 3.6) tl.trans of what comes
    from it is wrong, always for 8 bits, for 32 where rows are not stored as vectors.
    """
    column = tl.program_id(0)
    place_in_block = tl.arange(0, BLOCKSIZE)
    inner = column * BLOCKSIZE + place_in_block
    word = tl.program_id(1) * (ROWS // WORD) + tl.arange(0, ROWS // WORD).to(tl.int64)
    words = tl.zeros([ROWS // WORD, BLOCKSIZE], tl.int32)
    for byte in tl.static_range(WORD):
        row = word * WORD + byte
        inside = row < N
        block = row * (K // BLOCKSIZE) + column
        factor = tl.load(absmax + block, mask=inside, other=0)
        if NESTED:
            nested = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
            factor = tl.load(nested_code + factor.to(tl.int32), mask=inside, other=0.0) * nested + tl.load(offset)
        factor = factor / tl.load(scale)
        place = packed + block[:, None] * (BLOCKSIZE // 2) + (place_in_block // 2)[None, :]
        pair = tl.load(place, mask=inside[:, None], other=0).to(tl.int32)  # the first in the upper half of a byte
        level = tl.load(code + ((pair >> (4 - 4 * (place_in_block % 2))[None, :]) & 15))
        values = (level * factor[:, None]).to(tl.float8e4nv)
        if ALONG:
            place = along + row[:, None] * stride_along + inner[None, :]
            tl.store(place, values, mask=inside[:, None])
        if ACROSS:
            words |= values.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * byte)
    if ACROSS:
        place = across + inner.to(tl.int64)[:, None] * stride_across + word[None, :]
        tl.store(place, tl.trans(words), mask=word[None, :] < N // WORD)


@triton.jit
def quantize_kernel(x, stride, out, stride_out, scales, W, BLOCK: tl.constexpr):
    """One row: out = e4m3(x / scale), scale = max |x| / 448."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < W
    values = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values)), 1e-12) * (1 / 448)
    tl.store(scales + row, scale)
    # `/` may be two units in the last place off
    tl.store(out + row * stride_out + column, tl.div_rn(values, scale).to(tl.float8e4nv), mask=inside)
