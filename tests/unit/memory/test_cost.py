"""The predicted bytes are those of the tensors that the engine makes, term by term, and of measured peaks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parity.test_engine import ALL, FAMILIES, adapted_model
from tests.unit.memory.examples import GIB, H200, LLAMA_8B, LONG, PACKED, SHORT, first_candidate, planned, planner_for
from train.batching import LengthStatistics, MicroBatchShape
from train.collate import collate_packed
from train.config import BatchConfig, MemoryConfig, OptimConfig
from train.engine.block import Pass
from train.engine.decoder import Engine
from train.engine.packed_weights import HostBlocks
from train.engine.plan import Plan
from train.memory import cost
from train.memory.sizes import model_sizes


def test_against_measured_peaks() -> None:
    """Within 5 % of what an H200 needed: 8,192 tokens, nothing recomputed, in 37 GiB, three blocks cached."""
    plan = planned(PACKED, BatchConfig(4, 4), 37, MemoryConfig(checkpointing="none"))
    assert plan.peak_bytes == pytest.approx(34.32 * GIB, rel=0.05)  # docs/LOG.md


def storages(thing: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every storage that tensors in a dataclass or list stand on, by address."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, list):
        for each in thing:
            storages(each, found)
    elif hasattr(thing, "__dataclass_fields__"):
        for each in vars(thing).values():
            storages(each, found)
    return found


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_activations_are_what_a_block_keeps(family: str, tile: int) -> None:
    """Of each family of models, within 5 %: the tensors that the backward pass of a block reads."""
    shape, targets = FAMILIES[family]
    config: Any = type("Config", (), {"optim": OptimConfig()})
    # with flash kernels attention keeps no more than on this CPU, where no heads are repeated
    shape = type(shape)(**shape.to_dict() | {"num_key_value_heads": 4})
    causal_lm = adapted_model(shape, targets).get_base_model()
    sizes = model_sizes(causal_lm, config, on_gpu=False)
    batch = collate_packed([{"input_ids": [1] * 500, "trained": [True] * 500}])
    engine = Engine(causal_lm, Plan(True, True, 500, 3, 3), HostBlocks([], pin=False))
    kept: Any = []
    stack = engine.stack
    hidden = causal_lm.base_model.embed_tokens(batch.input_ids[0]).detach()
    cos, sin = causal_lm.base_model.rotary_emb(hidden[None], batch.position_ids)
    with torch.no_grad():
        stack.forward(hidden, Pass(cos[0], sin[0], engine.attend_for(batch), 0.0, torch.tensor(0), tile), kept)
    middle = storages(kept[1].activations, {})
    middle.pop(kept[1].activations.x.untyped_storage().data_ptr())  # counted among the inputs
    rows = LengthStatistics((500,), 500, 0, 500)
    planner = planner_for(rows, BatchConfig(1, 1), sizes=replace(sizes, element_bytes=4))
    predicted = cost.kept_activations(planner.job, first_candidate(planner, 500, mlp_tile=tile))
    without_flash = 500 * 4 * 3 * sizes.query  # what the plan adds for fp32 on a GPU, which has no flash kernels
    if targets == ALL:
        assert sum(middle.values()) == pytest.approx(predicted - without_flash, rel=0.05)
    else:  # adapters of all layers are counted
        assert sum(middle.values()) <= predicted - without_flash


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
    wide = replace(LLAMA_8B, intermediate=40_000)
    for less, more in ((wide, replace(wide, has_dropout=True)), (LLAMA_8B, replace(LLAMA_8B, normed_qk=5120))):
        peaks = [cost.peak(replace(plain.job, sizes=sizes), candidate) for sizes in (less, more)]
        assert peaks[0] < peaks[1]
    old: Any = replace(H200, capability=(6, 1))
    assert cost.peak(replace(plain.job, gpu=old), candidate) > cost.peak(plain.job, candidate)


def test_many_short_samples_take_memory() -> None:
    """Attention's backward pass has 128 rows of fp32 more for each: rows of 100 samples are planned with it."""
    sizes = replace(LLAMA_8B, intermediate=1000, chunk_bytes=2**20)  # so that attention is the peak
    few, many = PACKED, replace(PACKED, mean_length=20, max_samples=400)
    planners = [planner_for(rows, BatchConfig(4, 4), sizes=sizes) for rows in (few, many)]
    peaks = [cost.peak(planner.job, first_candidate(planners[0], 8192)) for planner in planners]
    assert (few.num_samples(4, 8192), many.num_samples(4, 8192)) == (4, 410)
    assert peaks[1] - peaks[0] == (410 - 4) * 128 * 4096 * 4
