"""Hybrids on the fused engine: blocks of two kinds in one model, and linear attention that ends with each sample."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as T

from tests.parity.hybrids import SHAPE, by_transformers, packed, passed, same, small_hybrid
from tests.parity.models import ALL_OF_BOTH, DELTA, NOTHING, SIZES, adapted_model, close
from tests.parity.models import plan as plan_of_three
from train.engine import delta_rule
from train.engine.decoder import FusedDecoder
from train.engine.delta_rule import PackedSamples
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks
from train.engine.lora_linear import Pass
from train.engine.machine_memory import OwnMemory
from train.engine.sharded_blocks import ShardedBlocks
from train.engine.support import unsupported_reason


@pytest.fixture
def adapted() -> Any:
    return small_hybrid()


def test_a_packed_row_is_its_samples_alone(adapted: Any) -> None:
    """Samples of one to three chunks: the hidden states and gradients that transformers computes of each alone."""
    assert not unsupported_reason(adapted.get_base_model())
    batch = packed()
    same(passed(adapted, batch), by_transformers(adapted, batch))


def test_a_sample_does_not_see_the_one_before_it(adapted: Any) -> None:
    """To the bit the same behind another; the rule and the convolution alone, each, would carry something on."""
    first, second = packed((70, 40)), packed((70, 40))
    second = replace(second, input_ids=torch.cat([second.input_ids[:, :70], first.input_ids[:, 70:]], 1))
    engine = FusedDecoder(adapted.get_base_model(), plan_of_three(3, 0), NOTHING)
    with torch.no_grad():
        found = [engine(batch) for batch in (first, second)]
        assert torch.equal(found[0][70:], found[1][70:])
        assert not torch.equal(found[0][:70], found[1][:70])
        whole = replace(first, cu_seqlens=torch.tensor([0, 110], dtype=torch.int32), lengths=(110,))
        heads: Any = decoder_layers(adapted.get_base_model())[0].heads
        for function, width in ((delta_rule._convolved, 192), (leaking_rule, 128)):
            mixed = torch.randn(110, 192)
            one, both = (function(mixed, heads, PackedSamples(batch)) for batch in (first, whole))
            assert one.flatten(1).shape == (110, width)
            close(one[:70], both[:70])
            assert (one[70:] - both[70:]).norm() > 1e-3 * both[70:].norm()


def leaking_rule(mixed: torch.Tensor, heads: Any, samples: PackedSamples) -> torch.Tensor:
    """The rule alone, of made-up parts."""
    value = mixed[:, 64:].unflatten(1, (4, 32))
    query, key = (mixed[:, part].unflatten(1, (4, 8)) for part in (slice(0, 32), slice(32, 64)))
    gates = torch.full((len(mixed), 4), -0.01), torch.full((len(mixed), 4), 0.5)
    return delta_rule._ruled((query, key, value, *gates), heads, samples)


@pytest.mark.parametrize("changes", [{"num_kept": 3, "num_cached": 1}, {"mlp_tile": 100}])
def test_kinds_of_blocks_share_and_take_turns(adapted: Any, changes: dict[str, Any]) -> None:
    """Cached or in the shared place, which has the MLP's matrices once; recomputed, kept, in tiles: the same."""
    batch = packed()
    same(passed(adapted, batch, **changes), passed(adapted, batch))
    engine = FusedDecoder(adapted.get_base_model(), plan_of_three(1, 0), NOTHING)
    engine(batch)
    assert len(engine.stack.store.shared) == 6  # two of each attention, two of the MLPs
    outer = [matrix.data_ptr() for number in (0, 1) for matrix in engine.stack.store.matrices(number, Pass.FORWARD)]
    assert len(set(outer)) == 6


@pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 2]])
def test_streamed_blocks_of_two_kinds(adapted: Any, numbers: list[int]) -> None:
    """One slot holds a block of either kind in turn: hidden states and gradients to the bit of resident ones."""
    batch = packed()
    wanted = passed(adapted, batch)
    host = HostBlocks(numbers, OwnMemory(pin=False))
    for number in range(3):
        host.offload(number, decoder_layers(adapted.get_base_model()))
    assert len(host.layouts) == 2
    found = passed(adapted, batch, host, streamed=tuple(numbers))
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


def test_shared_out_blocks_of_two_kinds(adapted: Any) -> None:
    """Each of two processes holds a part of blocks of both kinds: the same bits as of resident ones, in both."""
    memory: dict[int, list[torch.Tensor]] = {}

    def arenas(num_bytes: int) -> list[torch.Tensor]:
        return memory.setdefault(num_bytes, [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2)])

    batch = packed()
    wanted = passed(adapted, batch)
    models = [copy.deepcopy(adapted) for _ in range(2)]
    holders = [ShardedBlocks([1, 2], rank, 2, arenas) for rank in range(2)]
    for model, shards in zip(models, holders, strict=True):
        layers = decoder_layers(model.get_base_model())
        for number in range(3):
            shards.offload(number, layers)
        assert len(shards.layouts) == 2
    for model, shards in zip(models, holders, strict=True):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        found = passed(model, batch, shards)
        assert torch.equal(found[0], wanted[0])
        assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


def test_dropout_draws_its_masks_again() -> None:
    """The backward pass has those of the forward pass: gradients are slopes; kept and recomputed blocks agree."""
    model, batch = adapted_model(SHAPE, ALL_OF_BOTH, dropout=0.3), packed()
    kept, recomputed = passed(model, batch, num_kept=3), passed(model, batch)
    assert torch.equal(kept[0], recomputed[0])
    assert all(torch.equal(kept[1][name], recomputed[1][name]) for name in kept[1])
    direction = {name: torch.randn_like(gradient) for name, gradient in kept[1].items()}
    weights, losses, size = torch.linspace(-1, 1, kept[0].numel()), [], 1e-4
    for step in (size, -2 * size):  # one step along the direction, and one against it
        for name, parameter in model.named_parameters():
            if name in direction:
                parameter.data += step * direction[name]
        losses.append(float(passed(model, batch)[0].flatten() @ weights))
    slope = sum(float((kept[1][name] * direction[name]).sum()) for name in direction)
    assert (losses[0] - losses[1]) / (2 * size) == pytest.approx(slope, rel=0.02)
    without = model.eval()
    assert (passed(without, batch)[0] - kept[0]).norm() > 0.01 * kept[0].norm()


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    """What is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("new_memory_is_nan")
def test_bf16_on_a_cpu(adapted: Any) -> None:
    """Within twice the noise of transformers' own bf16 of samples alone; nothing is read before it is written.

    The projections have 328 outputs together, no multiple of 32.
    """
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    batch = packed()
    wanted = by_transformers(adapted, batch)
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    theirs, ours = by_transformers(adapted, batch), passed(adapted, batch)
    for found, noisy, exact in zip(*map(in_two_rows, (ours, theirs, wanted)), strict=True):
        assert (found - exact).norm() <= max(2 * (noisy - exact).norm(), 0.02 * exact.norm())


def in_two_rows(found: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and all gradients."""
    return found[0].float().flatten(), torch.cat([gradient.flatten() for gradient in found[1].values()])


def test_what_hybrids_are_not_run() -> None:
    """Models without softmax attention, and adapters that differ within a kind; those that differ between kinds run."""
    linear = T.Qwen3_5TextConfig(**SIZES, **DELTA, layer_types=["linear_attention"] * 3)
    model = adapted_model(linear, ["out_proj"]).get_base_model()
    assert unsupported_reason(model) == "none of its blocks has softmax attention"
    for targets, reason in (
        (["0.linear_attn.in_proj_qkv", "2.linear_attn.in_proj_z"], "its blocks do not all have the same adapters"),
        (["0.mlp.up_proj", "2.mlp.up_proj", "q_proj"], ""),
    ):
        assert unsupported_reason(adapted_model(SHAPE, targets).get_base_model()) == reason
    mixed, batch = adapted_model(SHAPE, ["0.mlp.up_proj", "2.mlp.up_proj", "q_proj"]), packed()
    same(passed(mixed, batch), by_transformers(mixed, batch))
