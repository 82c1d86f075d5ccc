"""Triton kernels of fp8_operations.py, all of which write e4m3. They need compute capability 8.9.

Divisions are tl.div_rn: `/` may be two units in the last place off, which turns ties, and 16-bit numbers have many.
"""

import triton
import triton.language as tl

from train.engine.kernels import gated, ungated

BLOCKS_ALONG, WORDS_ACROSS = 128, 64  # of NF4, of four rows each; of a program
COLUMN_ELEMENTS = 4096  # of a program of columns_kernel
WORD = tl.constexpr(4)  # bytes, of rows below one another
LARGEST, TINY, LEAST = tl.constexpr(448.0), tl.constexpr(1e-12), tl.constexpr(1e-30)  # as in fp8_operations.py


@triton.jit
def permute(a, b, selector):
    """A word of bytes of a (0 to 3) and b (4 to 7): which, its four lowest nibbles say, each below 8."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def level_word(code, factor, FIRST: tl.constexpr):
    """Four levels times the factors of blocks, from FIRST on, as a word of e4m3 for each block."""
    word = tl.zeros(factor.shape, tl.uint32)
    for byte in tl.static_range(4):
        value = (tl.load(code + FIRST + byte) * factor).to(tl.float8e4nv)
        word |= value.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * byte)
    return word


@triton.jit
def levels(absmax, nested_code, nested_absmax, offset, code, scale, block, inside, NESTED: tl.constexpr):
    """The 16 numbers that elements of these blocks are, in e4m3 of / scale: four words for each block."""
    factor = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        nested = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
        factor = tl.load(nested_code + factor.to(tl.int32), mask=inside, other=0.0) * nested + tl.load(offset)
    factor = tl.div_rn(factor, tl.load(scale))
    return (
        level_word(code, factor, 0), level_word(code, factor, 4),
        level_word(code, factor, 8), level_word(code, factor, 12),
    )  # fmt: skip


@triton.jit
def four(codes, low, below, above, high):
    """The numbers of the codes in the four lowest nibbles, from the 16 of their block."""
    index = codes & 0x7777
    half = ((codes >> 1) & 0x4444) | 0x3210  # of the table, by a code's fourth bit
    return permute(permute(low, below, index), permute(above, high, index), half)


@triton.jit
def in_order(pairs):
    """Codes of 4 bits, eight a word: bnb has the first of two in the upper half of a byte."""
    return ((pairs << 4) & 0xF0F0F0F0) | ((pairs >> 4) & 0x0F0F0F0F)


@triton.jit
def quarter(pairs, NUMBER: tl.constexpr):
    """Four codes of 16, in the lowest bits."""
    return in_order((pairs >> (32 * (NUMBER // 2))).to(tl.uint32)) >> (16 * (NUMBER % 2))


@triton.jit
def dequantize_along_kernel(
    packed, absmax, nested_code, nested_absmax, offset, code, scale, along, num_blocks, stride,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """NF4 / scale -> along[N, K], BLOCKS a program; `packed` in words of 4 bytes, `along` and its stride of 8."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    low, below, above, high = levels(absmax, nested_code, nested_absmax, offset, code, scale, block, inside, NESTED)
    word = tl.arange(0, BLOCKSIZE // 8)[None, :]
    pairs = tl.load(packed + block[:, None] * (BLOCKSIZE // 8) + word, mask=inside[:, None], other=0)
    codes = in_order(pairs.to(tl.uint32, bitcast=True))
    first = four(codes, low[:, None], below[:, None], above[:, None], high[:, None])
    second = four(codes >> 16, low[:, None], below[:, None], above[:, None], high[:, None])
    both = (second.to(tl.uint64) << 32) | first.to(tl.uint64)
    row = (block // (K // BLOCKSIZE)).to(tl.int64)
    place = along + (row * stride + block % (K // BLOCKSIZE) * (BLOCKSIZE // 8))[:, None] + word
    tl.store(place, both.to(tl.int64, bitcast=True), mask=inside[:, None])


@triton.jit
def store_across(place, stride, a, b, c, d, inside):
    """Words of four rows, as words of their four columns, at place, place + stride ..."""
    first, other_first = permute(a, b, 0x5140), permute(c, d, 0x5140)
    last, other_last = permute(a, b, 0x7362), permute(c, d, 0x7362)
    tl.store(place, permute(first, other_first, 0x5410).to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + stride, permute(first, other_first, 0x7632).to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 2 * stride, permute(last, other_last, 0x5410).to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 3 * stride, permute(last, other_last, 0x7632).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def dequantize_across_kernel(
    packed, absmax, nested_code, nested_absmax, offset, code, scale, across, N, stride,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """NF4 / scale -> across[K, N]: a thread takes a block of four rows, so that neighbours store beside one another.

    `packed` is in words of 8 bytes, `across` and its stride of 4.
    """
    column, word = tl.program_id(0), tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < N // 4
    a = word * 4 * (K // BLOCKSIZE) + column  # blocks of four rows
    b, c, d = a + K // BLOCKSIZE, a + 2 * (K // BLOCKSIZE), a + 3 * (K // BLOCKSIZE)
    a0, a1, a2, a3 = levels(absmax, nested_code, nested_absmax, offset, code, scale, a, inside, NESTED)
    b0, b1, b2, b3 = levels(absmax, nested_code, nested_absmax, offset, code, scale, b, inside, NESTED)
    c0, c1, c2, c3 = levels(absmax, nested_code, nested_absmax, offset, code, scale, c, inside, NESTED)
    d0, d1, d2, d3 = levels(absmax, nested_code, nested_absmax, offset, code, scale, d, inside, NESTED)
    place = across + (column * BLOCKSIZE).to(tl.int64) * stride + word
    words: tl.constexpr = BLOCKSIZE // 16  # of 8 bytes, four of which, read by one thread, are a sector
    together: tl.constexpr = min(words, 4)
    for start in range(0, words, together):
        for each in tl.static_range(together):
            codes_a = tl.load(packed + a * words + start + each, mask=inside, other=0)
            codes_b = tl.load(packed + b * words + start + each, mask=inside, other=0)
            codes_c = tl.load(packed + c * words + start + each, mask=inside, other=0)
            codes_d = tl.load(packed + d * words + start + each, mask=inside, other=0)
            for part in tl.static_range(4):
                values_a = four(quarter(codes_a, part), a0, a1, a2, a3)
                values_b = four(quarter(codes_b, part), b0, b1, b2, b3)
                values_c = four(quarter(codes_c, part), c0, c1, c2, c3)
                values_d = four(quarter(codes_d, part), d0, d1, d2, d3)
                store_across(place, stride, values_a, values_b, values_c, values_d, inside)
                place += 4 * stride


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
def largest_kernel(
    up, stride_up, stride_up_rank, N, down, stride_down, stride_down_rank, K, largest,
    R: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """largest[0] = max |up[N, R]|, largest[1] = max |down[K, R]|, from zeros, as bits of fp32: they order like
    numbers, NaN above all. No program has to be first."""
    program = tl.program_id(0)
    own = program >= tl.cdiv(N, ROWS)
    rank = tl.arange(0, RANK)[None, :]
    if own:
        row = ((program - tl.cdiv(N, ROWS)) * ROWS + tl.arange(0, ROWS))[:, None]
        place, inside = down + row * stride_down + rank * stride_down_rank, (row < K) & (rank < R)
    else:
        row = (program * ROWS + tl.arange(0, ROWS))[:, None]
        place, inside = up + row * stride_up + rank * stride_up_rank, (row < N) & (rank < R)
    size = tl.abs(tl.load(place, mask=inside, other=0.0).to(tl.float32))
    tl.atomic_max(largest + own.to(tl.int32), tl.max(size.to(tl.int32, bitcast=True)))


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
    tl.debug_barrier()  # all have read the scale that one of them replaces
    if wanted > scale:
        tl.store(scales + row, wanted)
        round_row(x + row * stride, out + row * stride_out, tl.div_rn(1.0, wanted), W, BLOCK)
    round_beside(beside * tl.div_rn(1.0, tl.maximum(scale, wanted)), out + row * stride_out + W, rank, R)
