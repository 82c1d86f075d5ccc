"""Optimizer state that comes back to the bit."""

from typing import Literal, get_args, get_type_hints

import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from train.config import OptimConfig
from train.optim import (
    LARGEST,
    OPTIMIZERS,
    FlatParameters,
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    # 8-bit state from 4,096 elements on, fp32 state below
    return {
        "large": torch.nn.Parameter(torch.randn(64, 80, generator=generator)),
        "small": torch.nn.Parameter(torch.randn(8, 8, generator=generator)),
    }


def advance(optimizer: torch.optim.Optimizer, flat: FlatParameters, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in flat.named.values():
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
def test_saved_state_continues_to_the_bit(name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"]) -> None:
    """Six steps = three, save, load into a new optimizer with fresh parameters, three more."""
    config = OptimConfig(name=name, weight_decay=0.1)
    whole = FlatParameters(parameters())
    advance(build_optimizer(whole, config), whole, 0, 6)
    first = FlatParameters(parameters())
    optimizer = build_optimizer(first, config)
    advance(optimizer, first, 0, 3)
    state = optimizer_state(optimizer, first)
    second = FlatParameters(parameters())
    for key, parameter in second.named.items():
        parameter.data.copy_(first.named[key].data)
    resumed = build_optimizer(second, config)
    load_optimizer_state(resumed, second, state)
    advance(resumed, second, 3, 6)
    assert all(torch.equal(whole.named[key], second.named[key]) for key in whole.named)
    again = optimizer_state(resumed, second)
    assert set(again) == set(state)
    assert not all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
def test_without_a_step_there_is_no_state(name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"]) -> None:
    """What is saved then begins an optimizer, which goes on as the one that was saved."""
    config, one, other = OptimConfig(name=name), FlatParameters(parameters()), FlatParameters(parameters())
    fresh, resumed = build_optimizer(one, config), build_optimizer(other, config)
    load_optimizer_state(resumed, other, optimizer_state(fresh, one))
    advance(fresh, one, 0, 3)
    advance(resumed, other, 0, 3)
    assert all(torch.equal(one.named[key], other.named[key]) for key in one.named)


def test_state_of_another_model_is_refused() -> None:
    """A missing entry, an unknown one and another shape are errors that name the entry."""
    config, values = OptimConfig(), FlatParameters(parameters())
    optimizer = build_optimizer(values, config)
    advance(optimizer, values, 0, 1)
    state = optimizer_state(optimizer, values)
    broken = {
        "large/state1": {k: v for k, v in state.items() if k != "large/state1"},
        "stranger/step": state | {"stranger/step": torch.tensor(1)},
        "small/state1": state | {"small/state1": torch.zeros(3)},
    }
    for entry, content in broken.items():
        with pytest.raises(ValueError, match=entry):
            load_optimizer_state(build_optimizer(values, config), values, content)


def test_a_flat_parameter_is_no_larger_than_bitsandbytes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels have the number of elements in 32 bits: there are several then, and what is trained is the same."""
    assert LARGEST < 2**31
    generator = torch.Generator().manual_seed(5)
    named = {f"p{number}": torch.randn(64, 70 + number, generator=generator) for number in range(5)}

    def updated() -> FlatParameters:
        flat = FlatParameters({key: torch.nn.Parameter(value.clone()) for key, value in named.items()})
        advance(build_optimizer(flat, OptimConfig(name="adamw_8bit")), flat, 0, 3)
        return flat

    one = updated()
    monkeypatch.setattr("train.optim.LARGEST", 10_240)
    several = updated()
    assert [len(flat.leaves) for flat in (one, several)] == [1, 3]
    assert all(leaf.numel() <= 10_240 for leaf in several.leaves)
    assert all(torch.equal(one.named[key], several.named[key]) for key in named)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
def test_flat_parameters_move_as_single_ones(name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"]) -> None:
    """Five steps over the flat parameter = five steps of the library's optimizer over each alone, to the bit."""
    config = OptimConfig(name=name, weight_decay=0.1)
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (64, 80), "small": (8, 8), "b": (41, 101), "c": (16, 256)}  # 41 x 101 is no whole number of blocks
    start = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    flat = FlatParameters({key: torch.nn.Parameter(value.clone()) for key, value in start.items()})
    alone = {key: FlatParameters({key: torch.nn.Parameter(value.clone())}) for key, value in start.items()}
    assert len(flat.leaves) == 2
    optimizer, others = build_optimizer(flat, config), [build_optimizer(one, config) for one in alone.values()]
    for _ in range(5):
        for key, shape in shapes.items():
            gradient = torch.randn(shape, generator=generator)
            for places in (flat, alone[key]):
                place = places.named[key].grad
                assert place is not None
                place.copy_(gradient)
        for each in (optimizer, *others):
            each.step()
    for key in shapes:
        assert not torch.equal(flat.named[key], start[key])
        assert torch.equal(flat.named[key], alone[key].named[key]), key


def test_every_optimizer_of_the_configuration_is_in_the_table() -> None:
    """One row a value of optim.name, and each says of its state what its class does."""
    annotation = get_type_hints(OptimConfig)["name"]
    assert set(get_args(annotation)) == set(OPTIMIZERS)
    leaf = torch.nn.Parameter(torch.zeros(64, 64))
    for name, kind in OPTIMIZERS.items():
        for build in (kind.build, kind.in_triton):
            built = build([{"params": [leaf]}], lr=1.0, weight_decay=0.0)
            assert isinstance(built, Optimizer8bit) == kind.is_8bit, name
            assert bool(getattr(built, "is_paged", False)) == kind.is_paged, name


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "adamw_8bit", "adamw"])
def test_lora_plus_has_a_leaf_and_a_rate_for_b(name: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"]) -> None:
    """A first step moves B the ratio times as far as A, small B too; saved state continues to the bit."""
    config = OptimConfig(name=name, lora_plus_ratio=8.0)

    def leaves() -> FlatParameters:
        generator = torch.Generator().manual_seed(3)
        shapes = {
            "x.lora_A": (64, 80),
            "x.lora_B": (80, 64),
            "y.lora_A": (8, 8),
            "y.lora_B": (8, 8),
            "z.lora_A": (70, 80),
        }
        named = {f"{key}.weight": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        return FlatParameters({key: torch.nn.Parameter(value) for key, value in named.items()}, config.lora_plus_ratio)

    flat = leaves()
    assert len(flat.leaves) == 4  # the large A, the large B, and two small ones
    advance(build_optimizer(flat, config), flat, 0, 1)
    start = leaves().named
    moved = {key: (parameter - start[key]).abs().mean().item() for key, parameter in flat.named.items()}
    for key, distance in moved.items():
        assert distance == pytest.approx(0.08 if "lora_B" in key else 0.01, rel=0.05), key
    whole, first, second = leaves(), leaves(), leaves()
    advance(build_optimizer(whole, config), whole, 0, 6)
    optimizer, resumed = build_optimizer(first, config), build_optimizer(second, config)
    advance(optimizer, first, 0, 3)
    for key, parameter in second.named.items():
        parameter.data.copy_(first.named[key].data)
    load_optimizer_state(resumed, second, optimizer_state(optimizer, first))
    advance(resumed, second, 3, 6)
    assert all(torch.equal(whole.named[key], second.named[key]) for key in whole.named)
