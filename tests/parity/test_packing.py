"""Packed samples do not see each other."""

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import scaled_dot_product_attention

from data_tools.packing import pack
from tests.conftest import training_of, with_batch
from train.collate import MicroBatch, collate, collate_packed
from train.config import Config, MemoryConfig
from train.engine import attention
from train.step import Training, optimizer_step


def loss_of(training: Training, batch: MicroBatch) -> float:
    with torch.no_grad():
        return training.model(batch).item()


def test_a_packed_row_is_the_sum_of_its_samples(config: Config) -> None:
    """For rows of two, five and nineteen samples, the first and last of one token too: equal loss sums."""
    training = training_of(config, Accelerator(cpu=True))
    samples = [training.data.samples[i] for i in range(19)]
    one = {"input_ids": [5], "trained": [True]}
    for members in (samples[:2], [one, *samples[2:5], one], samples):
        alone = sum(loss_of(training, collate([row], 0)) for row in members)
        assert loss_of(training, collate_packed(members)) == pytest.approx(alone, rel=1e-5)


def test_what_stands_before_a_sample_does_not_change_it(config: Config) -> None:
    """Other neighbours, the same loss to the last bits; the check sees a leak when positions do not start again."""
    training = training_of(config, Accelerator(cpu=True))
    first, other, watched = (training.data.samples[i] for i in (3, 4, 5))
    results = []
    for before in (first, other):
        silent = {**before, "trained": [False] * len(before["trained"])}
        packed = collate_packed([silent, watched])
        results.append(loss_of(training, packed))
        leaking = replace(packed, position_ids=torch.arange(packed.input_ids.shape[1])[None])
        assert abs(loss_of(training, leaking) - results[-1]) > 1e-3 * results[-1]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_packed_step_has_the_gradient_of_the_unpacked_one(
    checkpointing: Literal["none", "full"], config: Config
) -> None:
    """One step over all samples, packed into rows of 128 tokens and not: loss and every gradient are equal."""
    config = replace(config, memory=replace(config.memory, checkpointing=checkpointing))
    config = with_batch(replace(config, optim=replace(config.optim, max_grad_norm=float("inf"))), 4, 5)
    results = []
    for packing in (False, True):
        training = training_of(replace(config, data=replace(config.data, packing=packing)), Accelerator(cpu=True))
        gradients: list[torch.Tensor] = []

        def keep(*_: object, into: list[torch.Tensor] = gradients, of: Training = training) -> None:
            into.extend(p.grad.clone() for p in of.parameters.values() if p.grad is not None)

        training.optimizer.register_step_pre_hook(keep)
        results.append((optimizer_step(training, 0), gradients))
    (plain, expected), (packed, found) = results
    assert sorted(plain.sample_ids) == sorted(packed.sample_ids) == list(range(19))
    assert packed.loss == pytest.approx(plain.loss, rel=1e-5)
    for one, two in zip(expected, found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_bins_hold_everything_once_and_little_air() -> None:
    """Best-fit decreasing on 5,000 lengths: each sample once, no bin over budget, 97 % filled, the same every time."""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.rand(5000, generator=generator) ** 2 * 900 + 1).int().tolist()
    bins = pack(lengths, 1024)
    assert sorted(i for members in bins for i in members) == list(range(5000))
    used = [sum(lengths[i] for i in members) for members in bins]
    assert max(used) <= 1024
    assert sum(used) / (len(bins) * 1024) > 0.97
    assert pack(lengths, 1024) == bins
    assert pack([4, 4, 4, 3, 3, 3], 10) == [[0, 1], [2, 3, 4], [5]]
    with pytest.raises(ValueError, match="sample 1 has 12 tokens, more than the budget of 10"):
        pack([3, 12], 10)


def attend_by_sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, **options: Any) -> Any:
    """What varlen_attn computes, by one SDPA call a sample: [T, heads, D] and cu_seqlens -> [T, H, D]."""
    cu_seqlens, other_cu_seqlens, longest, other_longest = places
    assert torch.equal(cu_seqlens, other_cu_seqlens)
    assert cu_seqlens.dtype == torch.int32
    assert longest == other_longest == cu_seqlens.diff().max()
    assert options["window_size"] == (-1, 0)
    pieces = []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scale"], enable_gqa=True)
        pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


def test_cu_seqlens_reach_the_attention(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel replaced by a loop: the block mask's loss and gradients, also where blocks are recomputed."""
    monkeypatch.setattr(attention, "varlen_attn", attend_by_sample)
    config = replace(config, data=replace(config.data, packing=True), memory=MemoryConfig(checkpointing="full"))
    results = []
    for kind in ("sdpa", "varlen"):
        training = training_of(config, Accelerator(cpu=True))
        causal_lm: Any = training.model.adapted.get_base_model()
        causal_lm.set_attn_implementation(kind)
        packed = collate_packed([training.data.samples[i] for i in range(7)])
        loss = training.model(packed)
        loss.backward()
        results.append((loss.item(), [p.grad for p in training.parameters.values()]))
        with training.model.generating():
            assert causal_lm.config._attn_implementation == "sdpa"
        assert causal_lm.config._attn_implementation == kind
    (masked_loss, masked), (loss, found) = results
    assert loss == pytest.approx(masked_loss, rel=1e-6)
    torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-5)
