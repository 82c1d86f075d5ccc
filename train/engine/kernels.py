"""Triton kernels for what lies between the matrix products; operations.py says what each computes.

All are bound by memory traffic: every element is read once and written once, arithmetic is fp32, results are rounded
once. Outputs may be column ranges of wider rows, so that a matrix product can take them with its adapter's columns.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_code, nested_absmax, offset, code, out, num_blocks, stride_matrix, stride,
    N: tl.constexpr, K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """NF4 -> out[E, N, K], BLOCKS quantisation blocks a program; a nested (double quantised) scale is decoded first."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    scale = tl.load(absmax + block, mask=inside)
    if NESTED:
        nested = tl.load(nested_absmax + block // NESTED, mask=inside)
        scale = tl.load(nested_code + scale.to(tl.int32), mask=inside) * nested + tl.load(offset)
    pair = tl.arange(0, BLOCKSIZE // 2)
    values = tl.load(packed + block[:, None] * (BLOCKSIZE // 2) + pair[None, :], mask=inside[:, None]).to(tl.int32)
    first = tl.load(code + (values >> 4)) * scale[:, None]
    second = tl.load(code + (values & 15)) * scale[:, None]
    element = block * BLOCKSIZE  # a row is a whole number of blocks
    row = (element // K).to(tl.int64)
    start = row // N * stride_matrix + row % N * stride + element % K
    place = out + start[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(place, tl.interleave(first, second).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def norm_kernel(
    x, stride_x, weight, bias, out, stride_out, rstd, eps, H,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: out = (x - mean) rstd (weight + offset) + bias; mean, offset and bias where there are such."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values) / H, 0.0)
    scale = tl.rsqrt(tl.sum(values * values) / H + eps)
    tl.store(rstd + row, scale)
    dtype = out.dtype.element_ty
    normed = values * scale
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside).to(tl.float32)
    if OFFSET:
        factor += 1.0
    normed *= factor
    if BIAS:
        normed += tl.load(bias + column, mask=inside).to(tl.float32)
    tl.store(out + row * stride_out + column, normed.to(dtype), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_out, stride_grad_out, x, stride_x, weight, rstd, grad, stride_grad, H,
    CENTRED: tl.constexpr, OFFSET: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: grad (+)= rstd (g - mean(g) - n mean(g n)) with g = grad_out factor; mean(g) where CENTRED."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    scale = tl.load(rstd + row)
    normed = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        normed = tl.where(inside, normed - tl.sum(normed) / H, 0.0)
    normed *= scale
    inner = tl.load(grad_out + row * stride_grad_out + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        factor += 1.0
    inner *= factor
    if CENTRED:
        inner -= tl.sum(inner) / H
    result = scale * (inner - normed * (tl.sum(inner * normed) / H))
    place = grad + row * stride_grad + column
    if ADD:
        result += tl.load(place, mask=inside).to(tl.float32)
    tl.store(place, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def head_norm_kernel(
    x, stride, weight, raw, stride_raw, rstd, eps, num_heads,
    D: tl.constexpr, OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: each of its heads, in place, by an RMSNorm over D elements; raw becomes what was there."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < num_heads) & (column < D)
    place = x + row * stride + head * D + column
    given = tl.load(place, mask=inside, other=0.0)
    tl.store(raw + row * stride_raw + head * D + column, given, mask=inside)
    values = given.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
    one = tl.arange(0, HEADS)
    tl.store(rstd + row * num_heads + one, scale, mask=one < num_heads)
    dtype = x.dtype.element_ty
    normed = values * scale[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    if OFFSET:
        factor += 1.0
    tl.store(place, (normed * factor).to(dtype), mask=inside)


@triton.jit
def head_norm_backward_kernel(
    grad, stride, raw, stride_raw, weight, rstd, num_heads,
    D: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: the gradient of its normed heads becomes that of the raw ones, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < num_heads) & (column < D)
    one = tl.arange(0, HEADS)
    scale = tl.load(rstd + row * num_heads + one, mask=one < num_heads, other=0.0)[:, None]
    normed = tl.load(raw + row * stride_raw + head * D + column, mask=inside, other=0.0).to(tl.float32) * scale
    place = grad + row * stride + head * D + column
    inner = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    if OFFSET:
        factor += 1.0
    inner *= factor
    mean = tl.sum(inner * normed, 1) / D
    tl.store(place, (scale * (inner - normed * mean[:, None])).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    source, stride_source, target, stride_target, cos, sin, stride_table, num_heads, sign,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: each head's first PAIRS pairs (a, b) become (a cos - b sin, b cos + a sin); sign -1 turns back."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (column < PAIRS)
    cosine = tl.load(cos + row * stride_table + column, mask=column < PAIRS).to(tl.float32)
    sine = sign * tl.load(sin + row * stride_table + column, mask=column < PAIRS).to(tl.float32)
    dtype = target.dtype.element_ty
    if INTERLEAVED:  # neighbours are read and written together
        both = tl.arange(0, 2 * HALF)[None, :]
        is_inside = (head < num_heads) & (both < 2 * PAIRS)
        values = tl.load(source + row * stride_source + head * D + both, mask=is_inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(values, (HEADS, HALF, 2)))
        turned = tl.interleave(a * cosine - b * sine, b * cosine + a * sine)
        tl.store(target + row * stride_target + head * D + both, turned.to(dtype), mask=is_inside)
    else:
        place = row * stride_source + head * D + column
        a = tl.load(source + place, mask=inside).to(tl.float32)
        b = tl.load(source + place + PAIRS, mask=inside).to(tl.float32)
        place = row * stride_target + head * D + column
        tl.store(target + place, (a * cosine - b * sine).to(dtype), mask=inside)
        tl.store(target + place + PAIRS, (b * cosine + a * sine).to(dtype), mask=inside)


@triton.jit
def _sigmoid_of(gate, TANH: tl.constexpr):
    """What the gate is multiplied by: sigmoid(gate) for SiLU; for the tanh GELU sigmoid(2 z) = (1 + tanh z) / 2."""
    inner = gate
    if TANH:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    return tl.sigmoid(inner)


@triton.jit
def _bend_of(gate, sigmoid, TANH: tl.constexpr):
    """The activation's derivative is sigmoid times this."""
    inner = gate
    if TANH:
        inner = 1.5957691216057308 * (gate + 0.134145 * gate * gate * gate)
    return 1 + inner * (1 - sigmoid)


@triton.jit
def gated(place, F, inside, dtype: tl.constexpr, TANH: tl.constexpr, GATED: tl.constexpr):
    """act(gate) up in `dtype`, gate at these places and up F behind them; without a gate act(gate)."""
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value = (gate * _sigmoid_of(gate, TANH)).to(dtype).to(tl.float32)
    if GATED:
        value *= tl.load(place + F, mask=inside, other=0.0).to(tl.float32)
    return value.to(dtype)


@triton.jit
def gate_kernel(gate_up, stride, out, stride_out, F, TANH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """out = act(gate) up, where gate and up are the halves of a row; without a gate act(row)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    value = gated(gate_up + row * stride + column, F, inside, out.dtype.element_ty, TANH, GATED)
    tl.store(out + row * stride_out + column, value, mask=inside)


@triton.jit
def ungated(gate_place, grad_place, F, inside, TANH: tl.constexpr, GATED: tl.constexpr):
    """In place: gate and up become their gradients, grad (of the product) the product; returns the gradients' larger
    magnitude, as they are stored."""
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid_of(gate, TANH)
    dtype = grad_place.dtype.element_ty
    value = (gate * sigmoid).to(dtype).to(tl.float32)
    bend = _bend_of(gate, sigmoid, TANH)
    if GATED:
        up = tl.load(gate_place + F, mask=inside, other=0.0).to(tl.float32)
        grad_gate = (upstream * up * sigmoid * bend).to(dtype)
        grad_up = (upstream * value).to(dtype)
        tl.store(grad_place, (value * up).to(dtype), mask=inside)
        tl.store(gate_place + F, grad_up, mask=inside)
        largest = tl.maximum(tl.abs(grad_gate.to(tl.float32)), tl.abs(grad_up.to(tl.float32)))
    else:
        grad_gate = (upstream * sigmoid * bend).to(dtype)
        tl.store(grad_place, value.to(dtype), mask=inside)
        largest = tl.abs(grad_gate.to(tl.float32))
    tl.store(gate_place, grad_gate, mask=inside)
    return largest


@triton.jit
def gate_backward_kernel(
    gate_up, stride, grad, stride_grad, F, TANH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """In place: gate and up become their gradients, grad (of the product) becomes the product itself."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ungated(gate_up + row * stride + column, grad + row * stride_grad + column, F, column < F, TANH, GATED)


@triton.jit(do_not_specialize=["first", "salt", "threshold"])
def dropout_kernel(
    x, stride_x, out, stride_out, K, first, seed, salt, threshold, scale, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """out (+)= x scale where the element's hash is at least `threshold`, else 0; lowbias32 of (seed, place)."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < K
    bits = ((first + row) * K + column).to(tl.uint32) ^ tl.load(seed).to(tl.uint32) ^ salt.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    bits = bits ^ (bits >> 16)
    wide = row.to(tl.int64)
    values = tl.load(x + wide * stride_x + column, mask=inside, other=0.0).to(tl.float32) * scale
    values = tl.where(bits.to(tl.int64) >= threshold, values, 0.0)
    place = out + wide * stride_out + column
    if ADD:
        values += tl.load(place, mask=inside).to(tl.float32)
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(logits, stride, targets, losses, V, BLOCK: tl.constexpr):
    """One row: losses = logsumexp(logits) - logits[target]; logits become softmax - onehot(target).

    The target's logit is read before the reductions, in which warps wait for one another: behind them, one may have
    written its gradient already.
    """
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    column = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    chosen = tl.load(start + target).to(tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, V, BLOCK):
        values = tl.load(start + offset + column, mask=offset + column < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, values)
        # a lane that has seen nothing yet keeps -inf, whose difference would be NaN
        kept = tl.where(highest == float("-inf"), 0.0, tl.exp(highest - higher))
        total = total * kept + tl.where(values == float("-inf"), 0.0, tl.exp(values - higher))
        highest = higher
    top = tl.max(highest)
    log_total = top + tl.log(tl.sum(total * tl.where(highest == float("-inf"), 0.0, tl.exp(highest - top))))
    tl.store(losses + row, log_total - chosen)
    for offset in range(0, V, BLOCK):
        inside = offset + column < V
        values = tl.load(start + offset + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.exp(values - log_total) - tl.where(offset + column == target, 1.0, 0.0)
        tl.store(start + offset + column, grad.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def gather_kernel(table, rows, out, H, BLOCK: tl.constexpr):
    """out[i] = table[rows[i]], one row a program; the table may lie in pinned host memory."""
    number = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    row = tl.load(rows + number)
    tl.store(out + number * H + column, tl.load(table + row * H + column, mask=inside), mask=inside)
