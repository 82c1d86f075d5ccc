"""Triton kernels of fp8_operations.py, all of which write e4m3. They need compute capability 8.9.

Divisions are tl.div_rn: `/` may be two units in the last place off, which turns ties, and 16-bit numbers have many.
"""

import triton
import triton.language as tl

from train.engine.kernels import gated, ungated

DEQUANTIZED_ROWS = 64  # of a program: a column of so many NF4 blocks
COLUMN_ELEMENTS = 4096  # of a program of columns_kernel
WORD = tl.constexpr(4)  # bytes that go to the transpose together
LARGEST, TINY, LEAST = tl.constexpr(448.0), tl.constexpr(1e-12), tl.constexpr(1e-30)  # as in fp8_operations.py


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
        factor = tl.div_rn(factor, tl.load(scale))
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
def rounded(x):
    """x, of at most 448, rounded to e4m3: (the number in fp32, its byte); rare enough to do without the instruction.

    What is left of an fp8 number when it is taken from x, rounded in turn, loses every other pair of elements where
    four lie in a register (ptxas of Triton 3.6, Hopper).
    """
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20  # exponent and three bits of mantissa
    steps = (size * 512 + 12582912.0) - 12582912.0  # of 2^-9, in which numbers below 2^-6 lie; the sum has no fraction
    is_small = size < 1 / 64
    number = tl.where(is_small, steps / 512, (normal << 20).to(tl.float32, bitcast=True))
    byte = tl.where(is_small, steps.to(tl.int32), normal - 960)  # exponents are 120 less
    byte = tl.where(x == x, tl.minimum(byte, 126), 127) | tl.where(x < 0, 128, 0)
    return tl.where(x < 0, -number, number), byte.to(tl.uint8)


@triton.jit
def columns_kernel(
    part, stride, stride_rank, out, stride_out, largest, scale, factors, root, N,
    OWN: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """part[N, R] f / scale = high + low -> out[N, 3 R] = high, low, high; f, which adapter_factor describes, ->
    factors[OWN]; `out` as bytes; RANK is a power of two, not below R."""
    unit = tl.load(scale)
    most = tl.div_rn(LARGEST * unit, tl.maximum(tl.load(largest + OWN), LEAST))
    wanted = root * tl.maximum(tl.load(largest + 1 - OWN), LEAST)
    bits = tl.minimum(most, wanted).to(tl.int32, bitcast=True) & 0x7F800000  # the power of two that is not above it
    factor = bits.to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(factors + OWN, factor)
    row, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    inside = (row < N)[:, None] & (rank < R)[None, :]
    value = tl.load(part + row[:, None] * stride + rank[None, :] * stride_rank, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.div_rn(factor, unit)
    number, high = rounded(value)
    _, low = rounded(value - number)
    place = out + row.to(tl.int64)[:, None] * stride_out + rank[None, :]
    tl.store(place, high, mask=inside)
    tl.store(place + R, low, mask=inside)
    tl.store(place + 2 * R, high, mask=inside)


@triton.jit
def row_scale(place, largest):
    """Stores the scale of a row whose largest magnitude this is; returns its inverse."""
    scale = tl.maximum(largest, TINY) * (1 / LARGEST)
    tl.store(place, scale)
    return tl.div_rn(1.0, scale)


@triton.jit
def round_beside(beside, out, rank, R: tl.constexpr):
    """out[3 R] = beside rounded, rounded, and what rounding has taken from it."""
    number, high = rounded(beside)
    _, low = rounded(beside - number)
    place = out.to(tl.pointer_type(tl.uint8)) + rank
    tl.store(place, high, mask=rank < R)
    tl.store(place + R, high, mask=rank < R)
    tl.store(place + 2 * R, low, mask=rank < R)


@triton.jit
def round_row(x, out, inverse, W, BLOCK: tl.constexpr):
    """out[W] = e4m3(x inverse)."""
    for start in range(0, W, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < W
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + column, (values * inverse).to(tl.float8e4nv), mask=inside)


@triton.jit
def quantize_kernel(
    x, stride, low_rank, stride_low_rank, factor, out, stride_out, scales, W,
    R: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out = e4m3(x / scale), scale = max |x| / 448; behind it R columns low_rank / (factor scale), thrice:
    rounded, rounded, and what rounding has taken from them. The second time x comes from the cache."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, RANK)
    beside, largest = tl.zeros([RANK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if R:
        beside = tl.load(low_rank + row * stride_low_rank + rank, mask=rank < R, other=0.0).to(tl.float32)
        beside = tl.div_rn(beside, tl.load(factor))
    for start in range(0, W, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + column, mask=column < W, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    inverse = row_scale(scales + row, tl.maximum(tl.max(largest), tl.max(tl.abs(beside))))
    round_row(x + row * stride, out + row * stride_out, inverse, W, BLOCK)
    if R:
        round_beside(beside * inverse, out + row * stride_out + W, rank, R)


@triton.jit
def gate_rows_kernel(
    gate_up, stride, out, stride_out, values, stride_values, scales, F,
    TANH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out as gate_kernel, and what quantize_kernel makes of it, which then comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    gate, place, largest = gate_up + row * stride, out + row * stride_out, tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = gated(gate + column, F, column < F, out.dtype.element_ty, TANH, GATED)
        tl.store(place + column, value, mask=column < F)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    inverse = row_scale(scales + row, tl.max(largest))
    tl.debug_barrier()  # other threads read what these have written
    round_row(place, values + row * stride_values, inverse, F, BLOCK)


@triton.jit
def gate_backward_rows_kernel(
    gate_up, stride, grad, stride_grad, values, stride_values, scales, F,
    TANH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: as gate_backward_kernel, and the gradients in e4m3 as gate_rows_kernel."""
    row = tl.program_id(0).to(tl.int64)
    gate, largest = gate_up + row * stride, tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        column = start + tl.arange(0, BLOCK)
        found = ungated(gate + column, grad + row * stride_grad + column, F, column < F, TANH, GATED)
        largest = tl.maximum(largest, found)
    inverse = row_scale(scales + row, tl.max(largest))
    tl.debug_barrier()
    round_row(gate, values + row * stride_values, inverse, F * (1 + GATED), BLOCK)


@triton.jit
def beside_kernel(
    x, stride, low_rank, stride_low_rank, factor, out, stride_out, scales, W,
    R: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row whose W elements are in e4m3: its other columns as by quantize_kernel. Where they are larger than all of
    x, that is rounded again."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, RANK)
    beside = tl.load(low_rank + row * stride_low_rank + rank, mask=rank < R, other=0.0).to(tl.float32)
    beside = tl.div_rn(beside, tl.load(factor))
    scale, wanted = tl.load(scales + row), tl.maximum(tl.max(tl.abs(beside)), TINY) * (1 / LARGEST)
    if wanted > scale:
        scale = wanted
        tl.store(scales + row, scale)
        round_row(x + row * stride, out + row * stride_out, tl.div_rn(1.0, scale), W, BLOCK)
    round_beside(beside * tl.div_rn(1.0, scale), out + row * stride_out + W, rank, R)
