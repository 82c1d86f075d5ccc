"""Products of adapters with dropout in Triton: their masks to the bit, their sums, and as a graph."""

import pytest
import torch

from train.engine import dropout_products, operations
from train.engine.dropout_products import Dropped, add_spread, gradients, project
from train.engine.operations import Dropout

GPU = torch.device("cuda", 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


def dropped(p: float, first: int, *ranks: int) -> Dropped:
    """Adapters of these ranks in turn; a rank of 0 is a layer without one."""
    ends = [sum(ranks[: number + 1]) for number in range(len(ranks))]
    columns = [slice(end - rank, end) if rank else None for end, rank in zip(ends, ranks, strict=True)]
    return Dropped(Dropout(p, torch.tensor(operations.mixed(3), device=GPU), 8, first), columns)


def masks_of(by: Dropped, num_tokens: int, width: int) -> list[torch.Tensor]:
    """1 / (1 - p) or 0, of each adapter."""
    found = []
    for number, _ in by.adapters:
        found.append(torch.empty(num_tokens, width, device=GPU))
        operations.dropout(torch.ones_like(found[-1]), found[-1], by.drop, number)
    return found


@pytest.mark.parametrize(("p", "first"), [(0.05, 0), (0.5, 12345), (0.75, 2**21)])
@pytest.mark.parametrize("ranks", [(64,), (0, 64, 64), (64, 64, 64)])
def test_masks_are_dropouts_own(ranks: tuple[int, ...], p: float, first: int) -> None:
    """Products with unit matrices are the masks, and not one element differs from operations.dropout's."""
    by = dropped(p, first, *ranks)
    unit = torch.eye(64, device=GPU, dtype=torch.bfloat16)
    down, ones = unit.repeat(len(by.adapters), 1), torch.ones(64, 64, device=GPU, dtype=torch.bfloat16)
    assert by.kernels(ones) is not None
    low_rank = torch.empty(64, len(down), device=GPU, dtype=torch.bfloat16)
    masks = masks_of(by, 64, 64)
    project(ones, down, by, low_rank)
    of_down = gradients(down.T.contiguous(), ones, by)
    for (number, columns), mask in zip(by.adapters, masks, strict=True):
        grad, one = torch.zeros(64, 64, device=GPU, dtype=torch.bfloat16), torch.zeros_like(low_rank)
        one[:, columns.start] = 1
        add_spread(one, torch.ones_like(down), by, grad)
        for found in (low_rank[:, columns], grad, of_down[columns]):
            assert torch.equal(found != 0, mask != 0), number
            torch.testing.assert_close(found.float(), mask, rtol=1e-2, atol=0)


@pytest.mark.parametrize("p", [0.05, 0.3])
def test_masks_of_many_elements(p: float) -> None:
    """33 million, of which 500 have the threshold's upper half, so that the lower one decides."""
    by = dropped(p, 0, 16)
    grad = torch.zeros(4096, 8192, device=GPU, dtype=torch.bfloat16)
    down = torch.ones_like(grad[:64])
    add_spread(torch.ones_like(grad[:, :64]), down, by, grad)
    assert torch.equal(grad != 0, masks_of(by, 4096, 8192)[0] != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "width", "ranks"),
    [
        (1, 64, (1,)),
        (77, 4096, (8, 8, 8)),
        (2500, 14336, (8,)),
        (1000, 576, (12, 0, 12)),
        (333, 960, (16, 16, 16, 16)),
        (4100, 1024, (40, 40)),
        (500, 896, (64, 64, 64)),
    ],
)
def test_products_are_closer_than_copies(
    num_tokens: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In columns of wider rows: no further from fp64 than with dropped copies, the same bits again, nothing beside."""
    torch.manual_seed(0)
    by, most = dropped(0.05, 100, *ranks), -(-sum(ranks) // 64) * 64
    x, low, grad = (random(num_tokens, wide, dtype) for wide in (width + most, width + most, width + 8))
    down, read = random(most, width + 8, dtype)[:, :width], x[:, :width]

    def results() -> list[torch.Tensor]:
        written, added = low.clone(), grad.clone()
        project(read, down, by, written[:, width:])
        add_spread(low[:, width:], down, by, added[:, :width])
        return [written, added, gradients(low[:, width:], read, by)]

    assert by.kernels(read) is not None
    found, again = results(), results()
    monkeypatch.setattr(dropout_products, "kernels_for", lambda _: None)
    for one, other, copied, true in zip(found, again, results(), exact(by, read, down, low, grad, width), strict=True):
        assert torch.equal(one, other)
        assert (one.double() - true).norm() <= 1.1 * (copied.double() - true).norm() + 1e-6 * true.norm()
    behind = width + by.together.stop
    assert torch.equal(found[0][:, :width], low[:, :width])
    assert torch.equal(found[0][:, behind:], low[:, behind:])
    assert torch.equal(found[1][:, width:], grad[:, width:])


def test_a_graph_draws_other_masks_for_another_seed() -> None:
    """The three products as one graph: replayed with another seed on the device, the bits of a run without graphs."""
    torch.manual_seed(0)
    by, dtype = dropped(0.3, 0, 8, 8, 8), torch.bfloat16
    x, down, low, before = (random(*shape, dtype) for shape in ((900, 512), (64, 512), (900, 64), (900, 512)))

    def results() -> list[torch.Tensor]:
        written, added = torch.zeros_like(low), before.clone()
        project(x, down, by, written)
        add_spread(low, down, by, added)
        return [written, added, gradients(low, x, by)]

    first = results()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    by.drop.seed.fill_(operations.mixed(4))
    graph.replay()
    for found, wanted, other in zip(captured, results(), first, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, other)


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, columns, device=GPU, dtype=dtype)


def exact(
    by: Dropped, x: torch.Tensor, down: torch.Tensor, low: torch.Tensor, grad: torch.Tensor, width: int
) -> list[torch.Tensor]:
    """The same in fp64."""
    x, down, written, added = x.double(), down.double(), low.double(), grad.double()
    of_down = torch.empty(by.together.stop, width, device=GPU, dtype=torch.float64)
    for (_, columns), mask in zip(by.adapters, masks_of(by, len(x), width), strict=True):
        side = low[:, width:][:, columns].double()
        written[:, width:][:, columns] = (x * mask) @ down[columns].T
        added[:, :width] += mask * (side @ down[columns])
        of_down[columns] = side.T @ (x * mask)
    return [written, added, of_down]
