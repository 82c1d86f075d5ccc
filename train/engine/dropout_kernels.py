"""Triton kernels of dropout_products.py: products of adapters whose input has dropout, which is applied on the way.

Up to four adapters of R columns each read one input, each through a mask of its own. Making masks is what bounds these
kernels, not bytes, so integer operations are counted. The element's place in the tensor is (first + row) K + column,
and its hash is lowbias32 of it, as in kernels.dropout_kernel, to the bit:

- BLOCK is a power of two that divides K, so a place is that of its row's first element in the block ^ column, and its
  first step, place ^ (place >> 16), is computed once a row;
- the last step, bits ^ (bits >> 16), keeps the upper half, and the lower one decides only where the upper half is that
  of the threshold: bits ^ (threshold >> 16) compares alike.
"""

import triton
import triton.language as tl


@triton.jit
def key_of(seed, salt):
    """What the pass and the adapter put into a hash's first step."""
    key = tl.load(seed).to(tl.uint32) ^ salt.to(tl.uint32)
    return key ^ (key >> 16)


@triton.jit
def row_of(start):
    """[ROWS, 1]: what the place of a row's first element of a block puts into it."""
    place = start.to(tl.uint32)
    return (place ^ (place >> 16))[:, None]


@triton.jit
def kept(values, row, key, column, THRESHOLD: tl.constexpr):
    """The values, 0 where they are dropped."""
    bits = ((row ^ key) ^ column.to(tl.uint32)[None, :]) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return tl.where((bits ^ (THRESHOLD >> 16)) >= THRESHOLD, values, tl.zeros_like(values))


@triton.jit(do_not_specialize=["T", "first", "salt_0", "salt_1", "salt_2", "salt_3"])
def project_kernel(
    x, stride_x, down, stride_down, out, stride_out, stride_part, T, K, first, scale, seed,
    salt_0, salt_1, salt_2, salt_3, inputs,
    NUM: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[parts, T, NUM R] = scale times what is kept of x[T, K] down[NUM R, K]^T, each part of `inputs` columns."""
    row, column, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, RANK)
    part = tl.program_id(1)
    key_0, key_1, key_2, key_3 = key_of(seed, salt_0), key_of(seed, salt_1), key_of(seed, salt_2), key_of(seed, salt_3)
    sum_0, sum_1 = tl.zeros([ROWS, RANK], tl.float32), tl.zeros([ROWS, RANK], tl.float32)
    sum_2, sum_3 = tl.zeros([ROWS, RANK], tl.float32), tl.zeros([ROWS, RANK], tl.float32)
    wide, is_row = row.to(tl.int64)[:, None], (row < T)[:, None]
    start = (first + row) * K
    left = x + wide * stride_x + column[None, :]
    # beyond R the last row is read again; these sums are not stored
    right = down + tl.minimum(rank, R - 1)[None, :] * stride_down + column[:, None]
    for block in range(part * inputs, tl.minimum(K, (part + 1) * inputs), BLOCK):
        values, place = tl.load(left + block, mask=is_row, other=0.0), row_of(start + block)
        side = right + block
        sum_0 = tl.dot(kept(values, place, key_0, column, THRESHOLD), tl.load(side), sum_0)
        if NUM > 1:
            one = tl.load(side + R * stride_down)
            sum_1 = tl.dot(kept(values, place, key_1, column, THRESHOLD), one, sum_1)
        if NUM > 2:
            one = tl.load(side + 2 * R * stride_down)
            sum_2 = tl.dot(kept(values, place, key_2, column, THRESHOLD), one, sum_2)
        if NUM > 3:
            one = tl.load(side + 3 * R * stride_down)
            sum_3 = tl.dot(kept(values, place, key_3, column, THRESHOLD), one, sum_3)
    place, inside = out + part.to(tl.int64) * stride_part + wide * stride_out + rank[None, :], is_row & (rank < R)
    tl.store(place, (sum_0 * scale).to(out.dtype.element_ty), mask=inside)
    if NUM > 1:
        tl.store(place + R, (sum_1 * scale).to(out.dtype.element_ty), mask=inside)
    if NUM > 2:
        tl.store(place + 2 * R, (sum_2 * scale).to(out.dtype.element_ty), mask=inside)
    if NUM > 3:
        tl.store(place + 3 * R, (sum_3 * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "first", "salt_0", "salt_1", "salt_2", "salt_3"])
def spread_kernel(
    low_rank, stride_low_rank, down, stride_down, out, stride_out, T, K, first, scale, seed,
    salt_0, salt_1, salt_2, salt_3, inputs,
    NUM: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[T, K] += scale times the sum over adapters of what is kept of low_rank[T, R] down[R, K]."""
    row, column, rank = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, RANK)
    part = tl.program_id(1)
    key_0, key_1, key_2, key_3 = key_of(seed, salt_0), key_of(seed, salt_1), key_of(seed, salt_2), key_of(seed, salt_3)
    wide, is_row = row.to(tl.int64)[:, None], (row < T)[:, None]
    start = (first + row) * K
    inner, is_inner = low_rank + wide * stride_low_rank + rank[None, :], is_row & (rank < R)[None, :]
    one_0 = tl.load(inner, mask=is_inner, other=0.0)
    one_1 = tl.load(inner + R, mask=is_inner & (NUM > 1), other=0.0)
    one_2 = tl.load(inner + 2 * R, mask=is_inner & (NUM > 2), other=0.0)
    one_3 = tl.load(inner + 3 * R, mask=is_inner & (NUM > 3), other=0.0)
    outer = down + tl.minimum(rank, R - 1)[:, None] * stride_down + column[None, :]
    target = out + wide * stride_out + column[None, :]
    for block in range(part * inputs, tl.minimum(K, (part + 1) * inputs), BLOCK):
        before, place = tl.load(target + block, mask=is_row, other=0.0), row_of(start + block)
        side = outer + block
        total = kept(tl.dot(one_0, tl.load(side)), place, key_0, column, THRESHOLD)
        if NUM > 1:
            one = tl.dot(one_1, tl.load(side + R * stride_down))
            total += kept(one, place, key_1, column, THRESHOLD)
        if NUM > 2:
            one = tl.dot(one_2, tl.load(side + 2 * R * stride_down))
            total += kept(one, place, key_2, column, THRESHOLD)
        if NUM > 3:
            one = tl.dot(one_3, tl.load(side + 3 * R * stride_down))
            total += kept(one, place, key_3, column, THRESHOLD)
        after = before.to(tl.float32) + total * scale
        tl.store(target + block, after.to(out.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["T", "first", "salt_0", "salt_1", "salt_2", "salt_3"])
def gradient_kernel(
    low_rank, stride_low_rank, x, stride_x, out, T, K, first, scale, seed,
    salt_0, salt_1, salt_2, salt_3, tokens,
    NUM: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr, THRESHOLD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[parts, NUM R, K] = scale low_rank[T, NUM R]^T times what is kept of x[T, K], each part of `tokens` rows."""
    column, rank, part = tl.arange(0, BLOCK), tl.arange(0, RANK), tl.program_id(1)
    block = tl.program_id(0) * BLOCK
    key_0, key_1, key_2, key_3 = key_of(seed, salt_0), key_of(seed, salt_1), key_of(seed, salt_2), key_of(seed, salt_3)
    sum_0, sum_1 = tl.zeros([RANK, BLOCK], tl.float32), tl.zeros([RANK, BLOCK], tl.float32)
    sum_2, sum_3 = tl.zeros([RANK, BLOCK], tl.float32), tl.zeros([RANK, BLOCK], tl.float32)
    row, own = part * tokens + tl.arange(0, ROWS), (rank < R)[None, :]
    wide = row.to(tl.int64)[:, None]
    left, right = low_rank + wide * stride_low_rank + rank[None, :], x + wide * stride_x + block + column[None, :]
    start = (first + row) * K + block
    for token in range(part * tokens, tl.minimum(T, (part + 1) * tokens), ROWS):
        is_row = (tl.arange(0, ROWS) < T - token)[:, None]
        values, place, inside = tl.load(right, mask=is_row, other=0.0), row_of(start), is_row & own
        one = tl.load(left, mask=inside, other=0.0).T
        sum_0 = tl.dot(one, kept(values, place, key_0, column, THRESHOLD), sum_0)
        if NUM > 1:
            one = tl.load(left + R, mask=inside, other=0.0).T
            sum_1 = tl.dot(one, kept(values, place, key_1, column, THRESHOLD), sum_1)
        if NUM > 2:
            one = tl.load(left + 2 * R, mask=inside, other=0.0).T
            sum_2 = tl.dot(one, kept(values, place, key_2, column, THRESHOLD), sum_2)
        if NUM > 3:
            one = tl.load(left + 3 * R, mask=inside, other=0.0).T
            sum_3 = tl.dot(one, kept(values, place, key_3, column, THRESHOLD), sum_3)
        left += ROWS * stride_low_rank
        right += ROWS * stride_x
        start += ROWS * K
    target = out + (part * NUM * R + rank).to(tl.int64)[:, None] * K + block + column[None, :]
    inside = (rank < R)[:, None]
    tl.store(target, sum_0 * scale, mask=inside)
    if NUM > 1:
        tl.store(target + R * K, sum_1 * scale, mask=inside)
    if NUM > 2:
        tl.store(target + 2 * R * K, sum_2 * scale, mask=inside)
    if NUM > 3:
        tl.store(target + 3 * R * K, sum_3 * scale, mask=inside)
