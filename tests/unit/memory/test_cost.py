"""The predicted bytes are those of the tensors that the engine makes, term by term, and of measured peaks."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

from tests.parity.models import ALL, ALL_AND_PER_LAYER, ALL_OF_BOTH, FAMILIES, adapted_model
from tests.tensor_bytes import PeakBytes, storages
from tests.unit.memory.examples import GIB, H200, LLAMA_8B, LONG, PACKED, SHORT, first_candidate, planned, planner_for
from train import loss
from train.batching import LengthStatistics, MicroBatchShape
from train.collate import collate_packed
from train.config import BatchConfig, EngineConfig, MemoryConfig, OptimConfig
from train.engine import dropout_products, fp8, fp8_operations, lora_linear
from train.engine.attention import _padded_heads
from train.engine.context import ForwardContext
from train.engine.decoder import FusedDecoder
from train.engine.delta_rule import PackedSamples
from train.engine.host_stream import HostBlocks
from train.engine.lora_linear import Pass
from train.engine.machine_memory import OwnMemory
from train.engine.plan import Plan
from train.engine.stack import Stack
from train.memory import cost
from train.memory.attention import attention_backward
from train.memory.candidate import Candidate
from train.memory.kept import kept_of
from train.memory.search import Planner
from train.memory.sizes import model_sizes


def test_against_measured_peaks() -> None:
    """Within 5 % of what an H200 needed: 8,192 tokens, nothing recomputed, in 37 GiB, three blocks cached."""
    plan = planned(PACKED, BatchConfig(4, 4), 37, MemoryConfig(checkpointing="none"))
    assert plan.peak_bytes == pytest.approx(34.32 * GIB, rel=0.05)  # docs/LOG.md


@dataclass
class Forward:
    """A forward pass of a small model, and the planner of a job with its sizes."""

    planner: Planner
    stack: Stack
    context: ForwardContext
    kept: list[Any]


def forward(
    family: str,
    num_tokens: int = 500,
    tile: int = 0,
    num_kept: int = 3,
    dropout: float = 0.0,
    products: Literal["bf16", "fp8"] = "bf16",
) -> Forward:
    """Of one of the parity tests' families, in fp32, all samples one."""
    shape, targets = FAMILIES[family]
    config: Any = type("Config", (), {"optim": OptimConfig(), "engine": EngineConfig(products=products)})
    # with flash kernels attention keeps no more than on this CPU, where no heads are repeated
    shape = type(shape)(**shape.to_dict() | {"num_key_value_heads": 4, "num_global_key_value_heads": 4})
    causal_lm = adapted_model(shape, targets).get_base_model()
    sizes = replace(model_sizes(causal_lm, config, on_gpu=False), element_bytes=4, has_dropout=dropout > 0)
    batch = collate_packed([{"input_ids": [1] * num_tokens, "trained": [True] * num_tokens}])
    plan = Plan(True, True, num_tokens, 3, num_kept, products=products)
    engine = FusedDecoder(causal_lm, plan, HostBlocks([], OwnMemory(pin=False)))
    kept: Any = []
    hidden = causal_lm.base_model.embed_tokens(batch.input_ids[0]).detach()
    positions = engine.position_tables(hidden, batch.position_ids)
    samples = PackedSamples(batch)
    per_layer = engine.inputs_per_layer(batch.input_ids[0])
    context = ForwardContext(positions, engine.attend_for(batch), dropout, torch.tensor(0), tile, samples, per_layer)
    with torch.no_grad():
        engine.stack.forward(hidden, context, kept)
    rows = LengthStatistics((num_tokens,), num_tokens, 0, num_tokens)
    return Forward(planner_for(rows, BatchConfig(1, 1), sizes=sizes), engine.stack, context, kept)


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_activations_are_what_a_block_keeps(family: str, tile: int) -> None:
    """Of each family of models, within 5 %: the tensors that the backward pass of a block reads."""
    done = forward(family, tile=tile, num_kept=6)
    job, numbers = done.planner.job, range(len(done.kept) - 1)
    for number in numbers[1:]:  # the kinds of blocks
        activations = done.kept[number].activations
        found = storages(activations, {})
        found.pop(activations.x.untyped_storage().data_ptr())  # counted among the inputs
        for lent in storages([each for pair in done.context.lent.states.values() for each in pair], {}):
            found.pop(lent, None)  # likewise
        predicted = kept_of(job, first_candidate(done.planner, 500, mlp_tile=tile), [number])
        if not job.sizes.num_linear([number]):
            query = next(sizes.query for count, sizes in job.sizes.by_kind([number]) if count)
            predicted -= 500 * 4 * 3 * query  # what is added for fp32 on a GPU, which has no flash kernels
        if FAMILIES[family][1] in (ALL, ALL_OF_BOTH, ALL_AND_PER_LAYER):
            assert sum(found.values()) == pytest.approx(predicted, rel=0.05)
        else:  # adapters of all layers are counted
            assert sum(found.values()) <= predicted
    assert cost.kept_activations(job, first_candidate(done.planner, 500, num_kept=len(numbers))) == kept_of(
        job, first_candidate(done.planner, 500), numbers
    )


def test_heads_with_zeros_behind_them_are_kept_beside_the_block_s_own() -> None:
    """Where flash kernels do not take heads as they are, OpenLLaMA-3B's of 100: query, key, value and output."""
    widths = {"query": 3200, "qkv": 3200 + 2 * 800, "num_key_value": 8}
    shapes = [replace(LLAMA_8B, head_size=size, **widths) for size in (0, 100)]
    jobs = [planner_for(LONG, BatchConfig(1, 1), sizes=each) for each in shapes]
    candidates = [first_candidate(each, 2048, num_kept=1) for each in jobs]
    kept = [kept_of(each.job, c, [31]) for each, c in zip(jobs, candidates, strict=True)]
    padded = _padded_heads(states := [torch.empty(2048, heads, 100, dtype=torch.bfloat16) for heads in (32, 8, 8)])
    found = sum(each.nbytes for each in padded) + padded[0].nbytes - states[0].nbytes
    assert kept[1] - kept[0] == found
    backward = [attention_backward(each.job, c) for each, c in zip(jobs, candidates, strict=True)]
    assert backward[1] - backward[0] == found + padded[0].nbytes + padded[0].nbytes - states[0].nbytes


@pytest.mark.parametrize("num_kept", [1, 2, 3])
def test_block_inputs_are_what_a_stack_keeps_of_every_block(num_kept: int) -> None:
    """Each block's input once, whether the block recomputes or not, and down_proj's X A^T."""
    done = forward("llama", num_kept=num_kept)
    inputs: Any = done.stack.inputs
    assert len(inputs.stack) == 3 - num_kept
    found = storages(inputs.stack, {})
    for kept in done.kept[:3]:
        storages([kept.low_rank, *([kept.activations.x] if kept.activations else [])], found)
    candidate = first_candidate(done.planner, 500, num_kept=num_kept)
    assert sum(found.values()) == cost.block_inputs(done.planner.job, candidate)


def test_dequantised_weights_in_fp8_are_what_is_counted() -> None:
    """Of a block whose activations are recomputed: both forms in e4m3, the adapters' part, the scales."""
    done = forward("llama", products="fp8")
    matrices = done.stack.store.matrices(1, Pass.RECOMPUTED)
    tensors = [tensor for each in matrices for tensor in (each.up, each.down, each.scales, *each.weights.values())]
    assert len(tensors) == 4 * 5
    assert sum(tensor.nbytes for tensor in tensors) == sum(
        group.matrix_bytes(4) for group in done.stack.blocks[1].groups
    )
    assert done.planner.job.sizes.in_fp8


@pytest.mark.parametrize("products", ["bf16", "fp8"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tile", [0, 512])
def test_the_mlp_s_backward_pass_takes_what_is_counted(
    tile: int, dropout: float, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the norm's output and the product, of a tile at a time; beside them the adapters' gradients."""
    done = forward("llama", 4096, tile=tile, dropout=dropout, products=products)
    number, job = 1, done.planner.job
    activations, low_rank = done.kept[number].activations, done.kept[number].low_rank
    assert (activations.mlp.gate_up is None) == bool(tile)
    matrices = done.stack.store.matrices(number, Pass.RECOMPUTED)[2:]
    grad = activations.x.new_zeros(4096, job.sizes.hidden + done.stack.padded_rank)
    # where our kernels run, these take no memory
    for name in ("gate_backward", "gate"):
        monkeypatch.setattr(lora_linear, name, lambda *_, **__: None)
    monkeypatch.setattr(dropout_products, "dropout", lambda *_, **__: None)

    def room(x: torch.Tensor, width: int, rank: int) -> fp8_operations.Rows:
        return fp8_operations.Rows.of_shape(x.shape[0], width + 3 * rank, x.device)

    def quantized(x: torch.Tensor, beside: Any, made: Any = None) -> fp8_operations.Rows:
        return made or room(x, x.shape[1], beside.low_rank.shape[1] if beside else 0)

    monkeypatch.setattr(fp8, "quantize", quantized)
    monkeypatch.setattr(fp8, "gate_rows", lambda _, out, __, ___, rank: room(out, out.shape[1], rank))
    monkeypatch.setattr(fp8, "gate_backward_rows", lambda _, grad, __, ___, rank: room(grad, 2 * grad.shape[1], rank))
    monkeypatch.setattr(fp8, "scaled_product", lambda *_: None)
    with torch.no_grad(), PeakBytes() as found:
        grad_read = torch.empty_like(activations.x)
        half = done.stack.blocks[number].mlp
        gradients = half.backward(matrices, activations.mlp, low_rank, grad, grad_read, done.context)
    assert len(gradients) == 6
    adapters = sum(storages(gradients, {}).values())
    predicted = cost.mlp_backward(job, first_candidate(done.planner, 4096, mlp_tile=tile))
    assert predicted <= found.peak <= predicted + 3 * adapters  # two tiles' gradients, and products on the way to them


def test_the_head_takes_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the stack's output and its supervised rows, which are given: their gradient and one chunk of logits."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2**20)
    monkeypatch.setattr(loss, "cross_entropy", lambda logits, targets: logits.new_zeros(len(targets)))  # as our kernel
    hidden, weight = torch.randn(1000, 64, requires_grad=True), torch.randn(2048, 64)
    with PeakBytes() as found:
        loss.summed_cross_entropy(hidden, loss.Head(weight), torch.zeros(1000, dtype=torch.int64))
    sizes = replace(LLAMA_8B, hidden=64, vocabulary=2048, element_bytes=4, chunk_bytes=2**20)
    planner = planner_for(LONG, BatchConfig(1, 4), sizes=sizes)
    given = 2 * hidden.nbytes
    assert found.peak == pytest.approx(cost.head_bytes(planner.job, 1000) - given, rel=0.01)


def test_offloaded_inputs_leave_the_gpu() -> None:
    """Kept blocks' inputs stay, three of the others are on their way; pinned memory holds the others, padded."""
    planner = planner_for(LONG, BatchConfig(1, 4))
    stay, leave = (first_candidate(planner, 2000, num_kept=4, offloads=offloads) for offloads in (False, True))
    one = 2000 * 4096 * 2
    assert cost.block_inputs(planner.job, stay) - cost.block_inputs(planner.job, leave) == (28 - 3) * one
    pinned = cost.host_bytes(planner.job, leave) - cost.host_bytes(planner.job, stay)
    assert 28 * 2048 * 4096 * 2 <= pinned < 1.1 * 28 * 2048 * 4096 * 2
    assert cost.block_inputs(planner.job, replace(leave, num_kept=32)) == cost.block_inputs(planner.job, stay)


def test_host_memory_of_a_machine() -> None:
    """Eight processes: one copy of blocks and embedding where they share it, else eight; block inputs eight times."""
    job = planner_for(LONG, BatchConfig(1, 4)).job
    streamed = Candidate(2048, 4.0, 2000.0, num_streamed=32, offloads=False, uses_graphs=False)
    one, eight = job, replace(job, num_local=8)
    shared = replace(eight, shares_host=True)
    assert cost.host_bytes(eight, streamed) == 8 * cost.host_bytes(one, streamed)
    assert cost.host_bytes(shared, streamed) == 32 * 112_500_000 + 1_050_673_152
    leaving = replace(streamed, offloads=True)
    inputs = cost.host_bytes(one, leaving) - cost.host_bytes(one, streamed)
    assert cost.host_bytes(shared, leaving) - cost.host_bytes(shared, streamed) == 8 * inputs > 0


def test_what_graphs_have_beside_them() -> None:
    """Fragmentation counts where lengths differ; a validation's longest row has room, within the head's memory."""
    several = replace(SHORT, length_deviation=85.0)
    per_token = cost.validation_per_token(LLAMA_8B)
    for rows in (SHORT, several, replace(several, longest=(2000, 3000))):
        planner = planner_for(rows, BatchConfig(2, 4))
        plan = planner.best(24 * GIB)
        assert plan.uses_graphs
        width = math.ceil(plan.micro_batch_tokens / 128) * 128
        assert plan.fragmentation_bytes == plan.graph_bytes * 128 // width  # so many hidden states are 1 MiB
        assert dict(plan.parts)["fragmentation between graphs"] == (
            plan.fragmentation_bytes if rows.length_deviation else 0
        )
        assert rows.longest[0] <= plan.validation_tokens <= plan.micro_batch_tokens
        needed, head = plan.validation_tokens * per_token, cost.head_bytes(planner.job, width)
        assert plan.eager_bytes == max(head, needed)
        assert (needed > head) == (rows.longest[0] == 2000)
        assert needed > head - per_token  # there is no room for one more token
    short = replace(several, longest=(100,), mean_micro_batch=100)
    plan = planned(short, BatchConfig(1, 1), 24)
    assert plan.uses_graphs
    assert plan.fragmentation_bytes == 0  # every tensor that is small for fewer tokens is small for these


def test_a_captured_micro_batch_is_counted_with_its_padding() -> None:
    """As long as the next multiple of 128 tokens; an eager one has none."""
    planner = planner_for(replace(SHORT, longest=(1, 2)), BatchConfig(2, 4))
    for graphs, tokens in ((True, 1408), (False, 1281)):
        candidate = first_candidate(planner, 1281, uses_graphs=graphs, num_kept=32)
        parts, longer = (cost.parts(planner.job, replace(candidate, tokens=n)) for n in (1281, tokens))
        assert parts == longer
        more = cost.kept_activations(planner.job, replace(candidate, tokens=tokens + 1))
        assert parts["kept activations"] < more


def test_all_that_a_graph_needs_is_counted_with_its_padding() -> None:
    """Also of a resumed run whose micro-batches are no multiple of 128 tokens."""
    several = replace(SHORT, longest=(1250, 1300), length_deviation=85.0)
    planner = planner_for(several, BatchConfig(2, 4), MemoryConfig(checkpointing="none", offload="none"))
    short, full = (planner.best(24 * GIB, MicroBatchShape(tokens)) for tokens in (1281, 1408))
    assert short.uses_graphs
    assert (short.micro_batch_tokens, full.micro_batch_tokens) == (1281, 1408)
    for name in ("graph_bytes", "fragmentation_bytes", "eager_bytes", "validation_tokens", "num_cached"):
        assert getattr(short, name) == getattr(full, name) > 0


def test_a_validation_s_longer_sample_has_room() -> None:
    """Beside graphs it always counts; in eager runs only if it needs more than all that training keeps."""
    for longest in (900, 6000):
        rows = replace(SHORT, length_deviation=85.0, longest_validation=longest)
        plan = planner_for(rows, BatchConfig(2, 4)).best(24 * GIB)
        assert plan.uses_graphs
        assert (plan.validation_tokens == longest) == (longest == 6000)
        assert plan.eager_bytes >= plan.validation_tokens * 2 * (2 * 4096 + 3 * 14336)
    peaks = []
    for longest in (0, 4096, 60_000):
        planner = planner_for(replace(LONG, longest_validation=longest), BatchConfig(1, 4))
        peaks.append(cost.peak(planner.job, first_candidate(planner, 2048)))
    assert peaks[0] == peaks[1] < 60_000 * cost.validation_per_token(LLAMA_8B) < peaks[2]


def test_dropout_and_old_gpus_take_more() -> None:
    """A model with dropout, one whose heads are normed, and a GPU without Triton are planned with more memory."""
    plain = planner_for(LONG, BatchConfig(1, 4))
    candidate = first_candidate(plain, 2048, num_kept=4)
    wide = replace(LLAMA_8B, intermediate=40_000, gate_up=80_000)
    for less, more in ((wide, replace(wide, has_dropout=True)), (LLAMA_8B, replace(LLAMA_8B, normed_qk=5120))):
        peaks = [cost.peak(replace(plain.job, sizes=sizes), candidate) for sizes in (less, more)]
        assert peaks[0] < peaks[1]
    old: Any = replace(H200, capability=(6, 1))
    assert cost.peak(replace(plain.job, gpu=old), candidate) > cost.peak(plain.job, candidate)


def test_many_short_samples_take_memory() -> None:
    """Attention's backward pass has 128 rows of fp32 more for each: rows of 100 samples are planned with it."""
    sizes = replace(LLAMA_8B, intermediate=1000, gate_up=2000, chunk_bytes=2**20)  # so that attention is the peak
    few, many = PACKED, replace(PACKED, mean_length=20, max_samples=400)
    planners = [planner_for(rows, BatchConfig(4, 4), sizes=sizes) for rows in (few, many)]
    peaks = [cost.peak(planner.job, first_candidate(planners[0], 8192)) for planner in planners]
    assert (few.num_samples(4, 8192), many.num_samples(4, 8192)) == (4, 410)
    assert peaks[1] - peaks[0] == (410 - 4) * 128 * 4096 * 4
