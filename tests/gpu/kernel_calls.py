"""Calls of train/engine/operations.py and grouped.py with random inputs on the GPU."""

import torch

from train.engine import grouped, operations
from train.engine.layers import Norm
from train.engine.operations import Dropout, Rotation

GPU = torch.device("cuda", 0)


def norms() -> list[torch.Tensor]:
    found = []
    for kind in ((False, False, True), (False, True, False), (True, False, False)):
        x, wide, grad = random(77, 3072), random(77, 3136), random(77, 3100)
        norm = Norm(random(3072), random(3072) if kind[0] else None, 1e-5, *kind)
        rstd = operations.normalize(x, norm, wide[:, :3072])
        operations.normalize_backward(random(77, 3072), x, norm, rstd, grad[:, :3072], add=True)
        fresh = torch.full_like(x, torch.nan)
        operations.normalize_backward(random(77, 3072), x, norm, rstd, fresh, add=False)
        found += [wide, rstd, grad, fresh]
    for size, num_heads, offset in ((128, 24, False), (256, 8, True), (3072, 1, False)):
        norm = Norm(random(size), None, 1e-5, False, offset, not offset)
        heads, raw, grad = random(77, 3136), random(77, 3072), random(77, 3100)
        rstd = operations.normalize_heads(heads[:, : size * num_heads], norm, raw[:, : size * num_heads])
        operations.normalize_heads_backward(grad[:, : size * num_heads], raw[:, : size * num_heads], norm, rstd)
        found += [heads, raw, rstd, grad]
    return found


def rotate() -> list[torch.Tensor]:
    found = []
    for num_pairs, is_interleaved in ((64, False), (48, False), (64, True), (32, True)):
        heads, tables = random(77, 6192), random(77, 2 * num_pairs + 1)
        by = Rotation(tables[:, :num_pairs].cos(), tables[:, num_pairs:-1].sin(), 128, is_interleaved)
        operations.rotate(heads[:, :5120], heads[:, :5120], by)
        out = random(77, 4160)
        operations.rotate(random(77, 4096), out[:, :4096], by, sign=-1)
        found += [heads, out]
    return found


def gates() -> list[torch.Tensor]:
    found = []
    for activation in operations.ACTIVATIONS:
        for is_gated in (True, False):
            gate_up, out, grad = random(77, 11300), random(77, 5696), random(77, 5632)
            operations.gate(gate_up, out[:, :5632], activation, is_gated)
            operations.gate_backward(gate_up, grad, activation, is_gated)
            found += [gate_up, out, grad]
    return found


def dropout() -> list[torch.Tensor]:
    out, seed = random(77, 4160), torch.tensor(12345, device=GPU)
    operations.dropout(random(77, 4096), out[:, :4096], Dropout(0.05, seed, 3))
    first = out.clone()
    operations.dropout(random(77, 4096), out[:, :4096], Dropout(0.3, seed, 4, first=50), add=True)
    return [first, out]


def cross_entropy() -> list[torch.Tensor]:
    logits = (5 * random(33, 10048))[:, :10007]
    losses = operations.cross_entropy(logits, torch.randint(10007, (33,), device=GPU))
    return [losses, logits]


def groups() -> list[torch.Tensor]:
    """Rows in five groups, one of them empty and one of a single row."""
    ends = torch.tensor([130, 130, 131, 400, 437], dtype=torch.int32, device=GPU)
    wide, matrices, rows = random(437, 576), random(5, 464, 576), torch.randint(77, (437,), device=GPU)
    x, low = random(77, 520)[:, :512], wide[:, 512:]
    found = [
        grouped.grouped_product(x, rows, low, matrices[:, :400].transpose(1, 2), ends),
        grouped.grouped_product(x, rows, None, matrices[:, 400:, :512].transpose(1, 2), ends),
        grouped.grouped_product(random(437, 400), None, low, matrices[:, :, :512], ends),
    ]
    outer, turned = (torch.full(shape, torch.nan, device=GPU) for shape in ((5, 32, 500), (512, 16, 5)))
    grouped.grouped_outer(random(437, 100)[:, 60:92], wide[:, :500], None, ends, 1.0, outer)
    grouped.grouped_outer(random(437, 100)[:, 60:76], x, rows, ends, 0.25, turned.permute(2, 1, 0))
    spread = random(5, 512, 576)
    grouped.spread_ranks(torch.randn(512, 60, device=GPU), 0.25, spread[:, :, 520:532])
    found += [outer, turned, spread]
    summed = random(77, 520)
    grouped.sum_rows(wide[:, :512], torch.randint(437, (77, 4), device=GPU), summed[:, :512])
    for activation in (*operations.ACTIVATIONS, grouped.CLAMPED):
        gate_up, product, grad = 5 * random(437, 3008), random(437, 1600), random(437, 1500)
        gate_up = gate_up[:, :3000] if activation == grouped.CLAMPED else gate_up  # in turn, not behind one another
        factors = torch.rand(437, device=GPU)
        grouped.scaled_gate(gate_up, product[:, :1500], activation, factors)
        found += [product, gate_up, grad, grouped.scaled_gate_backward(gate_up, grad, activation, factors)]
    return [*found, summed]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)
