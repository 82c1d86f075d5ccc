"""The update of 8-bit AdamW in Triton beside bitsandbytes' own."""

from typing import Literal

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim.optimizer import Optimizer8bit

from train.config import OptimConfig
from train.optim import BLOCK, FlatParameters, build_optimizer, optimizer_state, set_learning_rate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


def gradients(shape: tuple[int, int], step: int) -> torch.Tensor:
    """Of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(shape, generator=generator) * 10 ** (-8 * torch.rand(shape, generator=generator))
    grad[: step % 3] = 0
    return grad


def trained(has_triton: bool, config: OptimConfig, num_steps: int) -> tuple[FlatParameters, dict[str, torch.Tensor]]:
    """Parameters, two of them with 8-bit state, after some steps, and the state."""
    torch.manual_seed(3)
    shapes = {"wide": (700, 300), "odd": (65, 65), "small": (8, 8)}
    flat = FlatParameters({name: torch.nn.Parameter(torch.randn(shape).cuda()) for name, shape in shapes.items()})
    optimizer = build_optimizer(flat, config, has_triton)
    for step in range(num_steps):
        for parameter in flat.named.values():
            assert parameter.grad is not None
            parameter.grad.copy_(gradients((parameter.shape[0], parameter.shape[1]), step))
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()
    assert isinstance(optimizer, Optimizer8bit)
    return flat, optimizer_state(optimizer, flat)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_update_is_bitsandbytes(name: Literal["adamw_8bit", "paged_adamw_8bit"], weight_decay: float) -> None:
    """After one update the codes are bitsandbytes' but for some halfway between two numbers; after five the parameters
    differ where a gradient is too small for 8 bits: with another code an update is another."""
    config = OptimConfig(name=name, weight_decay=weight_decay)
    for num_steps, near, of_scales in ((1, 1e-6, 1e-5), (5, 1e-4, 2e-2)):
        (ours, state), (theirs, expected) = (trained(has, config, num_steps) for has in (True, False))
        assert state.keys() == expected.keys()
        for key, value in state.items():
            if value.dtype == torch.uint8 and num_steps == 1:
                off = (value.int() - expected[key].int()).abs()
                assert off.max() <= 1, key
                assert off.float().mean() < 1e-3, key
            elif "absmax" in key:
                assert torch.allclose(value, expected[key], rtol=of_scales), key
        for parameter, other in zip(ours.named.values(), theirs.named.values(), strict=True):
            assert (parameter - other).abs().mean() <= near


def test_codes_are_of_the_nearest_numbers() -> None:
    """Of both states after one update, beside a search in bitsandbytes' maps."""
    _, state = trained(True, OptimConfig(name="adamw_8bit"), 1)
    grad = gradients((700, 300), 0).double().flatten()
    padded = torch.nn.functional.pad(grad, (0, -grad.numel() % BLOCK))
    for number, (moment, is_signed) in enumerate(((padded, True), (padded * padded, False)), 1):
        blocks = moment.view(-1, BLOCK)
        scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: grad.numel()]
        numbers = create_dynamic_map(signed=is_signed).double()
        nearest = torch.searchsorted((numbers[1:] + numbers[:-1]) / 2, scaled)
        if is_signed:
            nearest -= ((scaled < 0) & (nearest == 127)).long()  # no number below zero becomes zero
        off = (state[f"wide/state{number}"].flatten().long() - nearest).abs()
        assert off.max() <= 1
        assert off.float().mean() < 1e-3


def test_state_is_read_when_its_update_has_ended() -> None:
    """Paged state looks like host memory, whose copies wait for nothing: right behind an update that takes a while,
    what is saved is what is there later."""
    flat = FlatParameters({"a": torch.nn.Parameter(torch.zeros(40_000, 4_096, device="cuda"))})
    optimizer = build_optimizer(flat, OptimConfig(name="paged_adamw_8bit"), has_triton=True)
    for _ in range(3):
        leaf = flat.leaf("a")
        assert leaf.grad is not None
        leaf.grad.normal_()
        optimizer.step()
    found = optimizer_state(optimizer, flat)
    torch.cuda.synchronize()
    later = optimizer_state(optimizer, flat)
    assert all(torch.equal(value, later[key]) for key, value in found.items())
