"""Products of adapters whose input has dropout: it is read once for all adapters of a group, and no copy is written.

Where no kernel serves, dropped copies are written one by one and multiplied. Masks are those of operations.dropout.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.engine.operations import Dropout, dropout, kernels_for, mixed, power_of_two, threshold_of, wide_mm
from train.run import devices

MOST_ADAPTERS, MOST_RANK, MOST_COLUMNS = 4, 64, 192  # of a launch: sums lie in registers, adapters in shared memory
MULTIPLE = 64  # of K, which kernels ask for
PROGRAMS = 1056  # 8 for each multiprocessor of an H100: sums are split for them, as far as their parts take no more
MOST_PARTS = 16  # bytes than a dropped copy, and sums over inputs into so many
# Tokens and inputs that a program takes at a time, its warps, and stages of its loads: of adapters of up to 64 columns
# together, and of more. Chosen by the compiler's counts of registers and instructions
WIDE = (64, 64, 8, 2)
PROJECT, SPREAD, GRADIENT, GRADIENT_64 = (32, 64, 2, 3), (64, 64, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3)


@dataclass(frozen=True)
class Dropped:
    """The adapters of a group, which read one input through masks of their own."""

    drop: Dropout
    columns: Sequence[slice | None]  # of each layer's adapter in low_rank [T, R]; those that exist are its first

    @property
    def adapters(self) -> list[tuple[int, slice]]:
        """Number and columns of each adapter that exists."""
        return [(number, columns) for number, columns in enumerate(self.columns) if columns is not None]

    @property
    def together(self) -> slice:
        """The columns of all of them."""
        return slice(0, self.adapters[-1][1].stop)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Adapters, the rank of each, and that of a tensor core's tile."""
        columns = self.adapters[0][1]
        rank = columns.stop - columns.start
        return len(self.adapters), rank, max(16, power_of_two(rank))

    def fits(self, x: torch.Tensor) -> bool:
        """Whether the kernels take x [T, K]: in 16 bits (in fp32 they spill registers), K a multiple of 64; adapters of
        one rank of up to 64, and not too many of them."""
        ranks = {columns.stop - columns.start for _, columns in self.adapters}
        if len(ranks) != 1 or max(ranks) > MOST_RANK or x.dtype == torch.float32 or x.shape[1] % MULTIPLE:
            return False
        number, _, padded = self.sizes
        return number <= MOST_ADAPTERS and number * padded <= MOST_COLUMNS

    def kernels(self, x: torch.Tensor) -> Any:
        """The Triton kernels, or None where x does not fit them, and on a CPU or a GPU before Ampere."""
        if not self.fits(x) or kernels_for(x.device) is None or devices.capability(x.device) < devices.BF16:
            return None
        return importlib.import_module("train.engine.dropout_kernels")

    def tile(self, narrow: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """`narrow`, or WIDE where its sums would not fit into registers."""
        number, _, padded = self.sizes
        return narrow if number * padded <= 64 else WIDE

    @property
    def masks(self) -> list[Any]:
        """What the kernels are told of them: the first row, the scale, the seed, and a salt for each of four."""
        salts = [mixed(self.drop.place + number) for number, _ in self.adapters]
        return [self.drop.first, 1 / (1 - self.drop.p), self.drop.seed, *salts, *[0] * (MOST_ADAPTERS - len(salts))]

    @property
    def constants(self) -> tuple[int, ...]:
        """Their sizes, and the threshold below which a hash drops its element."""
        return *self.sizes, threshold_of(self.drop.p)


def project(x: torch.Tensor, down: torch.Tensor, dropped: Dropped, low_rank: torch.Tensor) -> None:
    """low_rank [T, R] = what each adapter keeps of x [T, K], times its rows of down [R, K], in its columns."""
    kernels = dropped.kernels(x)
    if kernels is None:
        copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for number, columns in dropped.adapters:
            dropout(x, copy, dropped.drop, number)
            torch.mm(copy, down[columns].T, out=low_rank[:, columns])
        return
    (num_tokens, width), here = x.shape, dropped.together
    rows, block, warps, stages = dropped.tile(PROJECT)
    row_blocks = -(-num_tokens // rows)
    most_parts = min(MOST_PARTS, width // (2 * here.stop) - 1)
    inputs = _share(width, block, min(most_parts, PROGRAMS // row_blocks))
    num_parts = -(-width // inputs)
    out = low_rank[None, :, here]
    if num_parts > 1:
        out = torch.empty(num_parts, num_tokens, here.stop, dtype=torch.float32, device=x.device)
    kernels.project_kernel[(row_blocks, num_parts)](
        x, x.stride(0), down[here], down.stride(0), out, out.stride(1), out.stride(0), num_tokens, width,
        *dropped.masks, inputs, *dropped.constants, rows, block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if num_parts > 1:
        low_rank[:, here].copy_(out.sum(0))


def add_spread(low_rank: torch.Tensor, down: torch.Tensor, dropped: Dropped, grad: torch.Tensor) -> None:
    """grad [T, K] += what is kept of each adapter's columns of low_rank [T, R] times its rows of down [R, K]."""
    kernels = dropped.kernels(grad)
    if kernels is None:
        for number, columns in dropped.adapters:
            dropout(low_rank[:, columns] @ down[columns], grad, dropped.drop, number, add=True)
        return
    (num_tokens, width), here = grad.shape, dropped.together
    rows, block, warps, stages = dropped.tile(SPREAD)
    row_blocks = -(-num_tokens // rows)
    inputs = _share(width, block, 4 * PROGRAMS // row_blocks)
    kernels.spread_kernel[(row_blocks, -(-width // inputs))](
        low_rank[:, here], low_rank.stride(0), down[here], down.stride(0), grad, grad.stride(0), num_tokens, width,
        *dropped.masks, inputs, *dropped.constants, rows, block, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def gradients(low_rank: torch.Tensor, x: torch.Tensor, dropped: Dropped) -> torch.Tensor:
    """[R, K] fp32, R of all adapters together: low_rank [T, R]^T times what each of them keeps of x [T, K]."""
    kernels, here = dropped.kernels(x), dropped.together
    if kernels is None:
        copy = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out = torch.empty(here.stop, x.shape[1], dtype=torch.float32, device=x.device)
        for number, columns in dropped.adapters:
            dropout(x, copy, dropped.drop, number)
            out[columns] = wide_mm(low_rank[:, columns].T, copy)
        return out
    num_tokens, width = x.shape
    rows, block, warps, stages = dropped.tile(GRADIENT if width % GRADIENT[1] == 0 else GRADIENT_64)
    column_blocks = width // block
    most_parts = num_tokens // (2 * here.stop)
    tokens = _share(num_tokens, rows, min(most_parts, PROGRAMS // column_blocks))
    out = torch.empty(-(-num_tokens // tokens), here.stop, width, dtype=torch.float32, device=x.device)
    kernels.gradient_kernel[(column_blocks, out.shape[0])](
        low_rank[:, here], low_rank.stride(0), x, x.stride(0), out, num_tokens, width,
        *dropped.masks, tokens, *dropped.constants, rows, block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out[0] if out.shape[0] == 1 else out.sum(0)  # in a fixed order


def _share(whole: int, step: int, num_parts: int) -> int:
    """Of `whole`, a multiple of `step`, so that there are `num_parts` or fewer."""
    return -(-whole // (step * max(1, num_parts))) * step
