"""Triton kernels for what lies between the matrix products; operations.py says what each computes.

All are bound by memory traffic: every element is read once and written once, arithmetic is fp32, results are rounded
once. Outputs may be column ranges of wider rows, so that a matrix product can take them with its adapter's columns.
"""

import triton
import triton.language as tl


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_code, nested_absmax, offset, code, out, num_blocks, stride,
    K: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """NF4 -> out[N, K], BLOCKS quantisation blocks a program; a nested (double quantised) scale is decoded first."""
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
    start = (element // K).to(tl.int64) * stride + element % K
    place = out + start[:, None] + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(place, tl.interleave(first, second).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def rms_norm_kernel(x, stride_x, weight, out, stride_out, rstd, eps, H, BLOCK: tl.constexpr):
    """One row: out = x rstd weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / H + eps)
    tl.store(rstd + row, scale)
    dtype = out.dtype.element_ty
    normed = (values * scale).to(dtype).to(tl.float32) * tl.load(weight + column, mask=inside).to(tl.float32)
    tl.store(out + row * stride_out + column, normed.to(dtype), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad_out, stride_grad_out, x, stride_x, weight, rstd, grad, stride_grad, H, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: grad (+)= rstd (g - n mean(g n)) with g = grad_out weight, n = x rstd."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    scale = tl.load(rstd + row)
    normed = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32) * scale
    inner = tl.load(grad_out + row * stride_grad_out + column, mask=inside, other=0.0).to(tl.float32)
    inner *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result = scale * (inner - normed * (tl.sum(inner * normed) / H))
    place = grad + row * stride_grad + column
    if ADD:
        result += tl.load(place, mask=inside).to(tl.float32)
    tl.store(place, result.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    source, stride_source, target, stride_target, cos, sin, num_heads, sign,
    D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: each head's halves (a, b) become (a cos - b sin, b cos + a sin); sign -1 turns back."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < num_heads) & (column < D // 2)
    cosine = tl.load(cos + row * D + column, mask=column < D // 2).to(tl.float32)
    sine = sign * tl.load(sin + row * D + column, mask=column < D // 2).to(tl.float32)
    place = row * stride_source + head * D + column
    a = tl.load(source + place, mask=inside).to(tl.float32)
    b = tl.load(source + place + D // 2, mask=inside).to(tl.float32)
    dtype = target.dtype.element_ty
    place = row * stride_target + head * D + column
    tl.store(target + place, (a * cosine - b * sine).to(dtype), mask=inside)
    tl.store(target + place + D // 2, (b * cosine + a * sine).to(dtype), mask=inside)


@triton.jit
def swiglu_kernel(gate_up, stride, out, stride_out, F, BLOCK: tl.constexpr):
    """out = silu(gate) up; gate and up are the halves of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + F + column, mask=inside, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    silu = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out + row * stride_out + column, (silu * up).to(dtype), mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_up, stride, grad, stride_grad, F, BLOCK: tl.constexpr):
    """In place: gate and up become their gradients, grad (of the product) becomes the product itself."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate_place = gate_up + row * stride + column
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + F, mask=inside, other=0.0).to(tl.float32)
    grad_place = grad + row * stride_grad + column
    upstream = tl.load(grad_place, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dtype = grad.dtype.element_ty
    silu = (gate * sigmoid).to(dtype).to(tl.float32)
    tl.store(grad_place, (silu * up).to(dtype), mask=inside)
    tl.store(gate_place + F, (upstream * silu).to(dtype), mask=inside)
    tl.store(gate_place, (upstream * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)


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
def cross_entropy_kernel(logits, targets, losses, V, BLOCK: tl.constexpr):
    """One row: losses = logsumexp(logits) - logits[target]; logits become softmax - onehot(target)."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * V
    column = tl.arange(0, BLOCK)
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
    target = tl.load(targets + row)
    tl.store(losses + row, log_total - tl.load(start + target).to(tl.float32))
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
