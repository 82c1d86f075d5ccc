"""The bytes of a hybrid's blocks with linear attention are those that they take."""

from typing import Any

import pytest
import torch
import transformers as T

from tests.parity.models import ALL_OF_BOTH, DELTA, LINEAR, SIZES, adapted_model
from tests.tensor_bytes import PeakBytes, storages
from tests.unit.memory.examples import GIB, first_candidate, planner_for
from tests.unit.memory.test_cost import forward
from train.batching import LengthStatistics
from train.collate import collate_packed
from train.config import BatchConfig, EngineConfig, OptimConfig
from train.engine.copies import ThreadCopies, host_bytes
from train.engine.delta_rule import CHUNK, PackedSamples, mix
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks, HostStream
from train.engine.lora_linear import Pass
from train.engine.machine_memory import OwnMemory
from train.engine.plan import spread
from train.memory import cost
from train.memory.attention import linear_backward
from train.memory.linear import RULE_FORWARD, rule_bytes
from train.memory.sizes import ModelSizes, model_sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("keys", "values", "key_size", "value_size"), [(4, 4, 32, 64), (2, 4, 64, 32), (2, 4, 128, 128)]
)
def test_the_rule_takes_what_is_counted(
    dtype: torch.dtype, keys: int, values: int, key_size: int, value_size: int
) -> None:
    """Between the projections, forward and backward, within 5 %; a forward pass alone takes no more than its share.

    Samples of several lengths, which run one group after another, take no more.
    """
    delta: dict[str, Any] = {"linear_num_key_heads": keys, "linear_num_value_heads": values}
    delta |= {"linear_key_head_dim": key_size, "linear_value_head_dim": value_size}
    shape = T.Qwen3_5TextConfig(**SIZES, head_dim=16, **delta, layer_types=LINEAR)
    layer = decoder_layers(T.AutoModelForCausalLM.from_config(shape).to(dtype).requires_grad_(False))[0]
    heads: Any = layer.heads
    num_tokens = 4 * CHUNK
    counted = num_tokens * rule_bytes(heads, dtype.itemsize)
    parts = [torch.randn(num_tokens, each.base.out_features, dtype=dtype).requires_grad_() for each in layer.qkv]
    for lengths in ((num_tokens,), (CHUNK, 3 * CHUNK)):
        samples = PackedSamples(collate_packed([{"input_ids": [1] * n, "trained": [True] * n} for n in lengths]))
        assert len(samples._batches[1]) == num_tokens
        with PeakBytes() as both:
            out = mix(parts, heads, samples)
            torch.autograd.grad(out, parts, torch.ones_like(out))
        with torch.no_grad(), PeakBytes() as alone:
            mix(parts, heads, samples)
        assert both.peak <= 1.05 * counted
        assert both.peak >= 0.95 * counted or len(lengths) > 1
        assert alone.peak <= RULE_FORWARD * counted


def test_a_backward_pass_takes_what_is_counted() -> None:
    """Of the last block with linear attention, kept: its output's gradient, the rule, and the adapters' gradients."""
    done = forward("qwen3.5", 64 * CHUNK)
    job, number = done.planner.job, 2
    activations: Any = done.kept[number].activations.attention
    grad = torch.randn(64 * CHUNK, job.sizes.hidden + done.stack.padded_rank)
    grad_read = torch.empty(64 * CHUNK, job.sizes.hidden)
    matrices = done.stack.store.matrices(number, Pass.FORWARD)[:2]
    with torch.no_grad(), PeakBytes() as found:
        half = done.stack.blocks[number].attention
        gradients = half.backward(matrices, activations, grad, grad_read, done.context)
    adapters = sum(storages(gradients, {}).values())
    candidate = first_candidate(done.planner, 64 * CHUNK, num_kept=3)
    freed = 2 * job.sizes.hidden + job.sizes.padded_rank + job.sizes.gate_up + job.sizes.padded_rank
    predicted = linear_backward(job, candidate) + 64 * CHUNK * 4 * freed
    assert found.peak == pytest.approx(predicted + adapters, rel=0.05)


def hybrid() -> tuple[Any, ModelSizes]:
    """Five blocks, of which the second and the last have softmax attention."""
    kinds = [*LINEAR, "linear_attention", "full_attention"]
    shape = T.Qwen3_5TextConfig(**SIZES | {"num_hidden_layers": 5}, **DELTA, layer_types=kinds)
    causal_lm = adapted_model(shape, ALL_OF_BOTH).get_base_model()
    config: Any = type("Config", (), {"optim": OptimConfig(), "engine": EngineConfig()})
    return causal_lm, model_sizes(causal_lm, config, on_gpu=True)


def test_weights_of_two_kinds() -> None:
    """Resident, streamed, in slots and in pinned memory: each block counts as it is, a slot as the larger kind."""
    causal_lm, sizes = hybrid()
    layers = decoder_layers(causal_lm)
    rows = LengthStatistics((500,), 500, 0, 500)
    planner = planner_for(rows, BatchConfig(1, 1), sizes=sizes)
    both = 0
    for count in range(6):
        candidate = first_candidate(planner, 500, num_streamed=count)
        host = HostBlocks(spread(count, 5), OwnMemory(pin=False))
        resident = 0
        for number, layer in enumerate(layers):
            host.offload(number, layers)
            resident += 0 if number in host.wanted else sum(linear.weight.nbytes for linear in layer.linears)
        assert cost.packed_weights(planner.job, candidate) - sizes.norm_bytes == pytest.approx(resident, rel=0.02)
        if not count:
            continue
        stream = HostStream(host, host.numbers, layers, torch.device("cpu"), ThreadCopies())
        slots = sum(slot.buffer.nbytes for slot in stream.slots)
        if len(host.layouts) == 2:
            assert slots == cost.streaming_slots(planner.job, candidate)
            both += 1
        sizes_of_kinds = [[host.buffers[n].nbytes for n in host.wanted if (n in (1, 4)) == full] for full in (0, 1)]
        pinned = sum(host_bytes(each[0], len(each)) for each in sizes_of_kinds if each)
        assert (
            cost.host_bytes(planner.job, candidate)
            - cost.host_bytes(planner.job, first_candidate(planner, 500, num_streamed=0))
            == pinned
        )
    assert both > 1


def test_matrices_of_two_kinds() -> None:
    """What blocks share on the GPU: the largest block's matrices and what the other kind adds to them."""
    done = forward("qwen3.5")
    shared = done.stack.store.shared
    sizes = done.planner.job.sizes
    assert sizes.matrix_bytes + sizes.shared_bytes == sum(matrix.nbytes for matrix in shared.values())
    assert sizes.shared_bytes > 0


def test_hybrids_are_planned_without_graphs() -> None:
    """Whatever the GPU, and the plan says so; keeping fewer blocks never counts more than keeping all."""
    _, sizes = hybrid()
    planner = planner_for(LengthStatistics((500,), 500, 0, 500), BatchConfig(1, 1), sizes=sizes)
    plan = planner.best(GIB)
    assert not plan.uses_graphs
    assert "3 have linear attention, so there are no CUDA graphs" in str(plan)
    peaks = [cost.peak(planner.job, first_candidate(planner, 500, num_kept=count)) for count in range(1, 6)]
    assert peaks == sorted(peaks)
