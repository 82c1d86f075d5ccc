"""grouped.py in Triton: rows sorted into groups, each with a matrix of its own."""

import torch
import triton
import triton.language as tl

from train.engine.grouped import TENSOR_CORES
from train.run import devices

DEPTH = 64  # elements of 16 bits that a tile of a product sums at a time
# Rows and columns of a tile, warps, stages, from this compute capability on: what shared memory holds. On an H100 128
# experts of 1,536 x 2,048 reach 473 TFLOP/s forward and 567 backward, where one product of 8,192 x 8,192 reaches 778
TILES = {(9, 0): (128, 256, 8, 4), (8, 0): (128, 128, 8, 3), (0, 0): (64, 64, 4, 2)}
NARROW = 64  # columns of adapters, which fit one tile


@triton.jit
def _add_product(
    total, left, right, stride, is_column, K, DEPTH: tl.constexpr, WHOLE_DEPTH: tl.constexpr, WHOLE_WIDTH: tl.constexpr
):
    """total + left[ROWS, K] right[K, COLUMNS], from the places of their first DEPTH; masks only where something is not
    whole, as they take a quarter of the instructions beside the tensor cores'."""
    depth = tl.arange(0, DEPTH)
    for k in range(0, K, DEPTH):
        inside = depth < K - k
        one = tl.load(left) if WHOLE_DEPTH else tl.load(left, mask=inside[None, :], other=0.0)
        if WHOLE_DEPTH and WHOLE_WIDTH:
            other = tl.load(right)
        else:
            other = tl.load(right, mask=inside[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(one, other, total, input_precision="ieee")
        left += DEPTH
        right += DEPTH * stride
    return total


@triton.jit
def product_kernel(
    a, stride_a, rows, low, stride_low, b, stride_be, stride_bk, stride_bn, out, stride_out, ends, K, R, N,
    E: tl.constexpr, GATHERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    RANK: tl.constexpr, GROUPS: tl.constexpr, WHOLE_DEPTH: tl.constexpr, WHOLE_RANK: tl.constexpr,
    WHOLE_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of out[S, N] = [a, low] b[e], b [K + R, N], DEPTH of K and RANK of R at a time.

    A group has a whole number of tiles, the last not full."""
    tile = tl.program_id(1)
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, mask=group < E, other=0)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    num_tiles = tl.where(group < E, (end - start + ROWS - 1) // ROWS, 0)
    behind = tl.cumsum(num_tiles)  # tiles up to and with this group
    expert = tl.sum((behind <= tile).to(tl.int32))
    if expert < E:
        mine = group == expert
        first = tl.sum(tl.where(mine, start + (tile - (behind - num_tiles)) * ROWS, 0))
        last = tl.sum(tl.where(mine, end, 0))
        row = first + tl.arange(0, ROWS)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        is_row, is_column = row < last, column < N
        row = tl.minimum(row, last - 1).to(tl.int64)  # beyond the group the last row is read again, and not stored
        source = tl.load(rows + row) if GATHERS else row
        own = b + expert.to(tl.int64) * stride_be + column[None, :] * stride_bn
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        left, right = a + source[:, None] * stride_a + depth[None, :], own + depth[:, None] * stride_bk
        total = _add_product(total, left, right, stride_bk, is_column, K, DEPTH, WHOLE_DEPTH, WHOLE_WIDTH)
        depth = tl.arange(0, RANK)
        left, right = low + row[:, None] * stride_low + depth[None, :], own + (K + depth[:, None]) * stride_bk
        total = _add_product(total, left, right, stride_bk, is_column, R, RANK, WHOLE_RANK, WHOLE_WIDTH)
        place = out + row[:, None] * stride_out + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def product(
    a: torch.Tensor, rows: torch.Tensor | None, low: torch.Tensor | None, b: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """As grouped.grouped_product."""
    depth, num_rows = a.shape[1], int(a.shape[0] if rows is None else rows.shape[0])
    num_groups, whole_depth, width = b.shape
    out = a.new_empty(num_rows, width)
    has = devices.capability(a.device)
    height, columns, warps, stages = next(tile for least, tile in TILES.items() if has >= least)
    if width <= NARROW:
        columns, warps = max(TENSOR_CORES, triton.next_power_of_2(width)), 4
    beside, step, rank = a if low is None else low, DEPTH * 2 // a.element_size(), whole_depth - depth
    of_rank = min(step, max(TENSOR_CORES, rank & -rank))  # the largest power of two in it
    product_kernel[(-(-width // columns), -(-num_rows // height) + num_groups)](
        a, a.stride(0), ends if rows is None else rows, beside, beside.stride(0), b, *b.stride(), out, out.stride(0),
        ends, depth, rank, width, num_groups, rows is not None, height, columns, step, of_rank,
        triton.next_power_of_2(num_groups), depth % step == 0, rank % of_rank == 0, width % columns == 0,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def outer_kernel(
    a, stride_a, b, stride_b, rows, out, stride_oe, stride_op, stride_oq, ends, scale, P, Q,
    GATHERS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[e] = scale a^T b over the rows of group e: all of a's columns, COLUMNS of b's."""
    group = tl.program_id(1)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    own = tl.arange(0, WIDTH)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((WIDTH, COLUMNS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        wide, is_row = row.to(tl.int64), row < end
        left = tl.load(
            a + wide[None, :] * stride_a + own[:, None], mask=is_row[None, :] & (own < P)[:, None], other=0.0
        )
        source = tl.load(rows + row, mask=is_row, other=0) if GATHERS else wide
        place = b + source[:, None] * stride_b + column[None, :]
        right = tl.load(place, mask=is_row[:, None] & (column < Q)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    wide = column.to(tl.int64)  # with experts innermost, a column's stride is that of all adapters
    place = out + group.to(tl.int64) * stride_oe + own[:, None] * stride_op + wide[None, :] * stride_oq
    tl.store(place, total * scale, mask=(own < P)[:, None] & (column < Q)[None, :])


def outer(
    a: torch.Tensor, b: torch.Tensor, rows: torch.Tensor | None, ends: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """As grouped.grouped_outer."""
    num_groups, width, columns = out.shape
    outer_kernel[(-(-columns // 128), num_groups)](
        a, a.stride(0), b, b.stride(0), ends if rows is None else rows, out, *out.stride(), ends, scale, width, columns,
        rows is not None, 128 // a.element_size(), max(TENSOR_CORES, triton.next_power_of_2(width)), 128, num_warps=4,
    )  # fmt: skip


@triton.jit
def spread_kernel(b, out, stride_e, stride_n, scale, E, R, EXPERTS: tl.constexpr, RANK: tl.constexpr):
    """out[e, n, j] = scale b[n, j, e] for one n: read along e, written along j."""
    number = tl.program_id(0).to(tl.int64)
    expert, rank = tl.arange(0, EXPERTS)[:, None], tl.arange(0, RANK)[None, :]
    inside = (expert < E) & (rank < R)
    values = tl.load(b + number * E * R + rank * E + expert, mask=inside, other=0.0) * scale
    place = out + number * stride_n + expert.to(tl.int64) * stride_e + rank
    tl.store(place, values.to(out.dtype.element_ty), mask=inside)


def spread(b: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """As grouped.spread_ranks."""
    num_experts, num_outputs, rank = out.shape
    spread_kernel[(num_outputs,)](
        b, out, out.stride(0), out.stride(1), scale, num_experts, rank, triton.next_power_of_2(num_experts),
        triton.next_power_of_2(rank), num_warps=4,
    )  # fmt: skip


@triton.jit
def add_up_kernel(x, stride_x, places, out, stride_out, H, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One row: out[t] = the sum of x[places[t, j]] over COUNT j."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(COUNT):
        row = tl.load(places + token * COUNT + j)
        total += tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * stride_out + column, total.to(out.dtype.element_ty), mask=inside)


def add_up(x: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
    """As grouped.sum_rows."""
    num_tokens, count = places.shape
    block = triton.next_power_of_2(out.shape[1])
    add_up_kernel[(num_tokens,)](x, x.stride(0), places, out, out.stride(0), out.shape[1], count, block, num_warps=4)
