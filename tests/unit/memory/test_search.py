"""The plan fits the budget, spends what is left, and keeps the micro-batches that a resumed run was started with."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from tests.conftest import training_of
from tests.unit.memory.examples import GIB, H200, LLAMA_8B, LONG, PACKED, SHORT, first_candidate, planned, planner_for
from train.batching import LengthStatistics, MicroBatchShape
from train.checkpoints.resume import checkpoint_layout, saved_shape
from train.config import BatchConfig, Config, EngineConfig, MemoryConfig
from train.memory import cost
from train.memory.candidate import Candidate
from train.memory.cost import peak
from train.memory.search import MARGIN, MIN_GAIN, MLP_TILE
from train.memory.time import step_seconds


def test_more_memory_is_never_slower() -> None:
    """From 4 to 130 GiB the predicted time of a step does not rise, and every plan fits."""
    plans = [planned(PACKED, BatchConfig(4, 4), gib) for gib in range(4, 131, 3)]
    for gib, plan in zip(range(4, 131, 3), plans, strict=True):
        assert plan.peak_bytes <= MARGIN * gib * GIB
    for less, more in pairwise(plans):
        assert more.seconds <= less.seconds
    assert plans[0].streamed
    assert not plans[-1].streamed
    assert plans[-1].num_kept == plans[-1].num_cached == 32
    assert any(0 < plan.num_cached < 32 for plan in plans)
    assert any(1 < plan.num_kept < 32 for plan in plans)


def with_counts(candidate: Candidate, counts: Sequence[int]) -> Candidate:
    """So many blocks kept, cached and streamed."""
    kept, cached, streamed = counts
    return replace(candidate, num_kept=kept, num_cached=cached, num_streamed=streamed)


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("gib", [6, 8, 12, 16, 20, 28, 40, 60])
def test_no_choice_nearby_is_faster(gib: int, num_shards: int) -> None:
    """Up to eight more or fewer blocks that are kept, cached or streamed, and inputs elsewhere: what fits takes longer
    by the rule that host memory must gain MIN_GAIN. Room that is left for a matrix or two is worth 0.1 % at most."""
    planner = planner_for(PACKED, BatchConfig(4, 4))
    planner = replace(planner, job=replace(planner.job, num_shards=num_shards, num_local=num_shards))

    def told(each: Candidate) -> float:
        return step_seconds(planner.job, each) * (1 + MIN_GAIN * each.uses_host)

    plan = planner.best(gib * GIB)
    shape = (plan.micro_batch_tokens, plan.uses_graphs)
    near_it = (each for each in planner._candidates(True, 0, 0) if (each.tokens, each.uses_graphs) == shape)
    of_plan = plan.num_kept, plan.num_cached, len(plan.streamed)
    chosen = with_counts(replace(next(near_it), offloads=plan.offloads_inputs), of_plan)
    assert step_seconds(planner.job, chosen) == plan.seconds
    steps, num_fitting = (-8, -3, -2, -1, 0, 1, 2, 3, 8), 0
    for kept, cached, streamed, offloads in product(steps, steps, steps, (False, True)):
        counts = [own + step for own, step in zip(of_plan, (kept, cached, streamed), strict=True)]
        if not (min(counts) >= 0 < counts[0] and max(counts) <= 32):
            continue
        near = with_counts(replace(chosen, offloads=offloads), counts)
        if planner._fits(near, gib * GIB):
            num_fitting += 1
            assert told(near) > told(chosen) * 0.999
    assert num_fitting > 3


def test_as_many_blocks_are_kept_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more, and one where not even that fits, of which few predictions are made: most of what is tried is such."""
    planner, asked = planner_for(PACKED, BatchConfig(4, 4)), []
    candidates = list(planner._candidates(True, 0, 0))[::7]
    every = [[peak(planner.job, replace(each, num_kept=count)) for count in range(1, 33)] for each in candidates]
    monkeypatch.setattr(cost, "peak", lambda job, each: asked.append(each) or peak(job, each))
    for gib in (2, 4, 8, 16, 32, 64):
        for each, peaks in zip(candidates, every, strict=True):
            num_fitting = sum(one <= gib * GIB for one in peaks)
            asked.clear()
            assert planner._num_kept(each, gib * GIB) == max(1, num_fitting)
            assert len(asked) <= (6 if num_fitting else 1)


def test_8b_in_four_gib_is_streamed_and_in_three_its_inputs_leave_too() -> None:
    """2,048 tokens at a time: in 4 GiB most blocks are streamed, in less almost all, and block inputs are offloaded."""
    four = planned(LONG, BatchConfig(1, 4, merge="off"), 4)
    assert 16 <= len(four.streamed) <= 32
    assert four.micro_batch_tokens == 2048
    three = planned(LONG, BatchConfig(1, 4, merge="off"), 3)
    assert len(three.streamed) >= 28
    assert three.offloads_inputs
    assert three.peak_bytes <= MARGIN * 3 * GIB
    assert four.host_bytes > 2 * GIB


def test_tiles_are_for_rows_that_do_not_fit_without() -> None:
    """In 4 GiB 8,000 tokens go through the MLPs at once, 13,000 in tiles, and 20,000 do not fit."""
    for length, tile in ((8000, 0), (13_000, MLP_TILE)):
        plan = planned(LengthStatistics((length,), length, 0, length), BatchConfig(1, 4), 4)
        assert plan.mlp_tile == tile
        assert plan.peak_bytes <= MARGIN * 4 * GIB
    assert planned(LengthStatistics((20_000,), 20_000, 0, 20_000), BatchConfig(1, 4), 4).peak_bytes > 4 * GIB
    planner = planner_for(LONG, BatchConfig(1, 4), sizes=replace(LLAMA_8B, chunk_bytes=2**20))
    whole, wide, narrow = (first_candidate(planner, 2000, mlp_tile=tile) for tile in (0, 1024, 128))
    assert peak(planner.job, whole) > peak(planner.job, wide) > peak(planner.job, narrow)
    one, other = (step_seconds(planner.job, replace(each, uses_graphs=True)) for each in (whole, wide))
    assert one < other  # kept blocks compute gate and up again
    short = planned(LengthStatistics((900,), 900, 0, 900), BatchConfig(1, 4), 1)  # does not fit either, and is one tile
    assert short.mlp_tile == 0


def test_a_small_model_is_not_streamed() -> None:
    """A sixteenth of the weights in 4 GiB: nothing is streamed, and that is said."""
    small = replace(LLAMA_8B, packed_bytes=7_000_000, matrix_bytes=28_000_000, head_bytes=131_072_000, hidden=2048)
    plan = planner_for(LONG, BatchConfig(1, 16), sizes=small).best(4 * GIB)
    assert plan.streamed == ()
    assert "all weights are on the GPU, nothing is streamed" in str(plan)


def test_a_step_of_short_samples_is_one_micro_batch() -> None:
    """2 x 4 short samples are merged where memory allows, never when that is off, and never beyond what helps."""
    roomy = planned(SHORT, BatchConfig(2, 4), 100)
    assert roomy.merges
    assert 4 * 334 < roomy.micro_batch_tokens <= 4 * 900
    literal = planned(SHORT, BatchConfig(2, 4, merge="off"), 100)
    assert not literal.merges
    assert literal.micro_batch_tokens == 900
    assert planned(PACKED, BatchConfig(4, 16), None).micro_batch_tokens <= 16384


def test_a_micro_batch_that_is_too_large_is_split() -> None:
    """Four rows of 2,048 tokens at once do not fit in 3 GiB; fewer do, unless merging is off."""
    plan = planned(PACKED, BatchConfig(4, 4), 3)
    assert plan.micro_batch_tokens < 8192
    assert plan.peak_bytes <= MARGIN * 3 * GIB
    assert planned(PACKED, BatchConfig(4, 4, merge="off"), 3).peak_bytes > 3 * GIB


@pytest.mark.parametrize(("checkpointing", "kept"), [("full", 1), ("none", 32), (0, 32), (8, 24), (31, 1), (99, 1)])
def test_what_is_asked_for_is_done(checkpointing: Any, kept: int) -> None:
    """full, none and a number of blocks hold whatever memory there is; the last block is always kept."""
    for gib in (6, 130):
        assert planned(PACKED, BatchConfig(4, 4), gib, MemoryConfig(checkpointing=checkpointing)).num_kept == kept


@pytest.mark.parametrize(("offload", "streamed"), [("none", 0), ("stream", 32)])
def test_streaming_can_be_forbidden_and_demanded(offload: Any, streamed: int) -> None:
    """Whatever memory there is; without it nothing goes to the host, not even inputs."""
    for gib in (3, 130):
        plan = planned(LONG, BatchConfig(1, 4), gib, MemoryConfig(offload=offload))
        assert len(plan.streamed) == streamed
        assert offload == "stream" or not plan.offloads_inputs


def test_a_resumed_run_keeps_its_micro_batches() -> None:
    """Whatever is free now, micro-batches hold what they held: sums would be rounded in another order otherwise."""
    for gib in (3, 20, 130):
        plan = planner_for(SHORT, BatchConfig(2, 4)).best(gib * GIB, MicroBatchShape(1234))
        assert (plan.micro_batch_tokens, plan.merges) == (1234, True)


def test_a_resumed_run_keeps_its_tiles(config: Config) -> None:
    """What a checkpoint says of a step's micro-batches; other layouts, or nothing saved, begin anew."""
    planner = planner_for(LONG, BatchConfig(1, 4))
    for saved in (MicroBatchShape(2048, 1024), MicroBatchShape(2048)):
        assert planner.best(100 * GIB, saved).micro_batch_shape == saved
    training = training_of(replace(config, engine=EngineConfig(kind="fused")), Accelerator(cpu=True))
    tiled = replace(training, plan=replace(training.plan, micro_batch_tokens=96, mlp_tile=32))
    checkpoint: Any = SimpleNamespace(state=SimpleNamespace(layout=checkpoint_layout(tiled)))
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(96, 32)
    assert saved_shape(None, training.data, config.batch.merge) is None
    old_names = {"micro_batch_tokens": "tokens in a pass", "mlp_tile_tokens": "tokens in a tile"}
    checkpoint.state.layout = {old_names.get(name, name): value for name, value in checkpoint.state.layout.items()}
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(96, 32)
    del checkpoint.state.layout["tokens in a tile"]  # older still
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(96)
    checkpoint.state.layout |= {"engine": "reference", "tokens in a pass": 0}  # which padded then
    del checkpoint.state.layout["layout"]
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(0, layout="padded")
    checkpoint.state.layout["processes"] = 2
    assert saved_shape(checkpoint, training.data, config.batch.merge) is None


def test_graphs_are_for_gpus_that_wait_for_their_host() -> None:
    """A short micro-batch is captured on an H200, not on a GPU that computes longer than the host launches."""
    slow: Any = replace(H200, flops=1e13, bandwidth=2e11)
    for gpu, graphs in ((H200, True), (slow, False)):
        plan = planner_for(SHORT, BatchConfig(2, 4), gpu=gpu).best(24 * GIB)
        assert plan.uses_graphs == graphs
        assert (plan.graph_bytes > 0) == (plan.eager_bytes > 0) == graphs
        assert plan.graph_bytes + plan.eager_bytes < plan.peak_bytes


def test_captured_micro_batches_are_as_long_as_they_are_padded() -> None:
    """The room of padding holds samples; a step of padding fewer is tried too, where it holds the longest row."""
    for longest, given in ((500, 0), (1250, 0), (500, 1281)):
        rows = replace(SHORT, longest=(longest, longest + 400))
        planner = planner_for(rows, BatchConfig(2, 4))
        eager, captured = (
            [n for n, graphs in planner._micro_batches(given) if graphs == wanted] for wanted in (False, True)
        )
        if given:
            assert eager == captured == [given]
            continue
        assert len(eager) < len(captured)
        assert all(n % 128 == 0 and n >= longest for n in captured)
        for tokens in eager:
            padded = math.ceil(tokens / 128) * 128
            assert (padded in captured) == (padded <= 4096)
            assert padded - 128 in captured or padded - 128 < longest
    long = list(planner_for(PACKED, BatchConfig(4, 4))._micro_batches(0))
    assert (8192, False) in long
    assert max(tokens for tokens, graphs in long if graphs) == 4096  # longer ones are not captured
    as_configured = planner_for(SHORT, BatchConfig(2, 4, merge="off"))
    assert list(as_configured._micro_batches(0)) == [(900, False), (900, True)]


def test_a_validation_s_longer_sample_goes_in_tiles_where_it_must() -> None:
    """A sample of 14,000 tokens can be validated in 4 GiB whatever is trained on; beyond, the longest is told."""
    rows = replace(LONG, longest=(512,), mean_micro_batch=200, deviation=50, mean_length=200)
    plans = [planned(replace(rows, longest_validation=n), BatchConfig(1, 4), 4) for n in (0, 2000, 14_000)]
    assert [plan.mlp_tile for plan in plans] == [0, 0, 1024]
    assert plans[2].peak_bytes <= 4 * GIB
    assert plans[2].micro_batch_shape.mlp_tile == 1024  # which a resumed run keeps
    planner = planner_for(replace(rows, longest_validation=40_000), BatchConfig(1, 4))
    assert planner.best(4 * GIB).peak_bytes > 4 * GIB
    assert 14_000 < planner.longest_row(4 * GIB) < 20_000


def test_streaming_that_is_not_needed_is_called_so() -> None:
    """In 12 GiB an 8B would fit without, in 4 it would not."""
    for gib, is_needed in ((4, True), (12, False)):
        plan = planned(LONG, BatchConfig(1, 4), gib)
        assert plan.streamed
        assert plan.needs_host == is_needed
        assert ("it would fit without" in str(plan)) != is_needed
