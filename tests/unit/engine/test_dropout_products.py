"""Products of adapters with dropout: torch's lines, what goes to the kernels, and what these take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.engine import dropout_products, operations
from train.engine.dropout_products import Dropped, add_spread, gradients, project
from train.engine.operations import Dropout


def dropped(*ranks: int) -> Dropped:
    """Adapters of these ranks in turn; a rank of 0 is a layer without one."""
    ends = [sum(ranks[: number + 1]) for number in range(len(ranks))]
    columns = [slice(end - rank, end) if rank else None for end, rank in zip(ends, ranks, strict=True)]
    return Dropped(Dropout(0.25, torch.tensor(operations.mixed(3)), 8, first=5), columns)


@pytest.mark.parametrize("ranks", [(3,), (4, 0, 7), (65, 65)])
def test_products_are_those_of_the_masked_input(ranks: tuple[int, ...]) -> None:
    """In columns of wider rows, with ranks that differ or a layer without an adapter; what is beside them stays."""
    by, most = dropped(*ranks), sum(ranks) + 2
    x, low, down, grad = (torch.randn(shape) for shape in ((13, 50), (13, most), (most, 50), (13, 60)))
    wanted, added, of_down = low.clone(), grad.clone(), torch.empty(sum(ranks), 40)
    for number, columns in by.adapters:
        mask = torch.empty(13, 40)
        operations.dropout(torch.ones(13, 40), mask, by.drop, number)
        wanted[:, columns] = (x[:, :40] * mask) @ down[columns, :40].T
        added[:, :40] += mask * (low[:, columns] @ down[columns, :40])
        of_down[columns] = low[:, columns].T @ (x[:, :40] * mask)
    found = low.clone()
    project(x[:, :40], down[:, :40], by, found)
    torch.testing.assert_close(gradients(low, x[:, :40], by), of_down)
    add_spread(low, down[:, :40], by, grad[:, :40])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grad, added)


@pytest.mark.parametrize(
    ("ranks", "width", "dtype", "fits"),
    [
        ((1,), 64, torch.bfloat16, True),
        ((64, 0, 64, 64), 4096, torch.float16, True),
        ((8, 8, 8, 8), 4096, torch.bfloat16, True),
        ((65,), 4096, torch.bfloat16, False),
        ((33, 33, 33, 33), 4096, torch.bfloat16, False),  # 4 x 64 columns
        ((8, 8, 8, 8, 8), 4096, torch.bfloat16, False),
        ((8, 16), 4096, torch.bfloat16, False),
        ((8,), 4096 + 32, torch.bfloat16, False),
        ((8,), 4096, torch.float32, False),
        ((0, 0), 4096, torch.bfloat16, False),
    ],
)
def test_what_goes_to_the_kernels(ranks: tuple[int, ...], width: int, dtype: torch.dtype, fits: bool) -> None:
    """Sixteen bits, whole blocks, one rank of up to 64 for up to four adapters of 192 columns; nothing on a CPU."""
    x = torch.empty(2, width, dtype=dtype)
    assert dropped(*ranks).fits(x) == fits
    assert dropped(*ranks).kernels(x) is None


class Recorded:
    """In a kernel's place: `launches` gets its grid and its tensors of partial sums, which are the ones of rank 3."""

    def __init__(self, launches: list[tuple[tuple[int, ...], list[torch.Tensor]]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values, **_: self.launches.append(
            (grid, [each for each in values if isinstance(each, torch.Tensor) and each.dim() == 3])
        )


@pytest.mark.parametrize("num_tokens", [1, 100, 2048, 30_000])
@pytest.mark.parametrize(("width", "ranks"), [(64, (8,)), (576, (64, 64, 64)), (1024, (16,) * 4), (4096, (8,) * 3)])
def test_partial_sums_take_no_more_than_a_copy(
    num_tokens: int, width: int, ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan counts a dropped copy; every token and input is in one part; a large input keeps a GPU busy."""
    launches: list[tuple[tuple[int, ...], list[torch.Tensor]]] = []
    kernel = Recorded(launches)
    kernels = SimpleNamespace(project_kernel=kernel, spread_kernel=kernel, gradient_kernel=kernel)
    monkeypatch.setattr(Dropped, "kernels", lambda *_: kernels)
    by, all_ranks = dropped(*ranks), sum(ranks)
    x = torch.empty(num_tokens, width, dtype=torch.bfloat16)
    low, down = x.new_empty(num_tokens, all_ranks), x.new_empty(all_ranks, width)
    project(x, down, by, low)
    add_spread(low, down, by, x)
    assert gradients(low, x, by).shape == (all_ranks, width)
    assert len(launches) == 3
    for grid, partial in launches:
        assert num_tokens * width < 2**25 or grid[0] * grid[1] > dropout_products.PROGRAMS // 3
        for sums in partial:
            assert sums.shape[0] == grid[1]
            assert sums.shape[0] == 1 or sums.nbytes <= x.nbytes
