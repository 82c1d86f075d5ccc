"""Calls of train/engine/operations.py with random inputs on the GPU."""

import torch

from train.engine import operations
from train.engine.operations import Dropout

GPU = torch.device("cuda", 0)


def rms_norm() -> list[torch.Tensor]:
    x, weight, wide = random(77, 4096), random(4096), random(77, 4160)
    rstd = operations.rms_norm(x, weight, 1e-5, wide[:, :4096])
    grad = random(77, 4200)
    operations.rms_norm_backward(random(77, 4096), x, weight, rstd, grad[:, :4096], add=True)
    fresh = torch.full_like(x, torch.nan)
    operations.rms_norm_backward(random(77, 4096), x, weight, rstd, fresh, add=False)
    return [wide, rstd, grad, fresh]


def rotate() -> list[torch.Tensor]:
    heads, angle = random(77, 6192), random(77, 64).repeat(1, 2)
    operations.rotate(heads[:, :5120], heads[:, :5120], angle.cos(), angle.sin())
    out = random(77, 4160)
    operations.rotate(random(77, 4096), out[:, :4096], angle.cos(), angle.sin(), sign=-1)
    return [heads, out]


def swiglu() -> list[torch.Tensor]:
    gate_up, out, grad = random(77, 11300), random(77, 5696), random(77, 5632)
    operations.swiglu(gate_up, out[:, :5632])
    operations.swiglu_backward(gate_up, grad)
    return [gate_up, out, grad]


def dropout() -> list[torch.Tensor]:
    out, seed = random(77, 4160), torch.tensor(12345, device=GPU)
    operations.dropout(random(77, 4096), out[:, :4096], Dropout(0.05, seed, 3))
    first = out.clone()
    operations.dropout(random(77, 4096), out[:, :4096], Dropout(0.3, seed, 4, first=50), add=True)
    return [first, out]


def cross_entropy() -> list[torch.Tensor]:
    logits = 5 * random(33, 10007)
    losses = operations.cross_entropy(logits, torch.randint(10007, (33,), device=GPU))
    return [losses, logits]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)
