"""What the reference engine tries on a GPU, in which order, and what it takes of that which fits."""

from dataclasses import replace
from typing import Any

import pytest

from train.batching import LengthStatistics, MicroBatchShape
from train.config import BatchConfig, MemoryConfig
from train.memory.reference import BUSY_TOKENS, CPU_TOKENS, Passes, ReferencePlan, configured_plan

SHORT = LengthStatistics((900, 1700), 334.0, 150.0, 167.0, 75.0, 2)
NUM_BLOCKS = 4


def passes(
    rows: LengthStatistics = SHORT,
    batch: BatchConfig = BatchConfig(2, 8),  # noqa: B008  (frozen)
    checkpointing: Any = "auto",
    layout: Any = "unpadded",
    saved: MicroBatchShape | None = None,
) -> Passes:
    memory = MemoryConfig(checkpointing=checkpointing)
    return Passes(replace(configured_plan(NUM_BLOCKS, memory), layout=layout), rows, batch, memory, saved)


def test_sizes_go_from_a_whole_step_to_a_single_row() -> None:
    """Unpadded: never more than the attention allows, never less than the longest row. Padded: whole rows."""
    sizes = [plan.micro_batch_tokens for plan in passes().sizes(16384)]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[0] == SHORT.merged_tokens(8)
    assert sizes[-1] == 900
    assert [plan.micro_batch_tokens for plan in passes().sizes(1000)] == [1000, 900]
    assert [plan.micro_batch_tokens for plan in passes().sizes(100)] == [900]
    padded = passes(layout="padded").sizes(16384)
    assert [(plan.merges, plan.micro_batch_tokens) for plan in padded] == [(False, 0), (True, 900)]
    for layout in ("padded", "unpadded"):
        literal = passes(batch=BatchConfig(2, 8, merge="off"), layout=layout)
        assert literal.sizes(16384) == [literal.start]
        assert literal.on_cpu() == literal.start


def found(one: Passes, most_kept: int, most_recomputed: int) -> tuple[int, int] | None:
    """(tokens, blocks kept) of what is taken where passes of so many tokens fit."""

    def fits(plan: ReferencePlan) -> bool:
        return plan.micro_batch_tokens <= (most_kept if plan.num_kept else most_recomputed)

    plan = one.fastest(one.sizes(16384), fits)
    return None if plan is None else (plan.micro_batch_tokens, plan.num_kept)


def test_the_fastest_that_fits_is_taken() -> None:
    """Kept activations, unless recomputing saves more than a third of the passes and these do not fill a GPU."""
    whole, half = (SHORT.merged_tokens(count) for count in (8, 4))
    assert found(passes(), 10**6, 10**6) == (whole, NUM_BLOCKS)
    assert found(passes(), 0, 10**6) == (whole, 0)
    assert found(passes(), half, half) == (half, NUM_BLOCKS)
    assert found(passes(), 900, 10**6) == (whole, 0)  # a pass of 900 tokens, three or four times as many
    assert found(passes(), 0, 0) is None
    long = LengthStatistics((8192,), 8192.0, 0.0, 8192.0)
    assert BUSY_TOKENS < 8192
    assert found(passes(long, BatchConfig(1, 2)), 8192, 10**6) == (8192, NUM_BLOCKS)


@pytest.mark.parametrize(("wanted", "kept"), [("none", NUM_BLOCKS), (0, NUM_BLOCKS), ("full", 0), (2, 0)])
def test_what_is_asked_for_is_done(wanted: Any, kept: int) -> None:
    """Recomputed or kept as memory.checkpointing says, by passes as small as that takes."""
    assert found(passes(checkpointing=wanted), 10**6, 10**6) == (SHORT.merged_tokens(8), kept)
    assert found(passes(checkpointing=wanted), 900, 900) == (900, kept)


def test_a_resumed_run_keeps_its_passes() -> None:
    """Kept or recomputed, which changes no bit; smaller ones only where both do not fit. On a CPU, too."""
    resumed = passes(saved=MicroBatchShape(1234, layout="unpadded"))
    assert found(resumed, 10**6, 10**6) == (1234, NUM_BLOCKS)
    assert found(resumed, 1000, 10**6) == (1234, 0)
    smaller = found(resumed, 1000, 1000)
    assert smaller is not None
    assert smaller[0] < 1234
    assert resumed.on_cpu().micro_batch_tokens == 1234
    split = passes(layout="padded", saved=MicroBatchShape(900, layout="padded"))
    assert found(split, 10**6, 10**6) == (900, NUM_BLOCKS)


def test_passes_on_a_cpu_are_short() -> None:
    """A step is merged up to CPU_TOKENS, or to its longest row; nothing is tried there."""
    short = LengthStatistics((100, 190), 134.0, 30.0, 67.0, 15.0, 2)
    for rows, tokens in ((short, CPU_TOKENS), (SHORT, 900)):
        plan = passes(rows).on_cpu()
        assert (plan.merges, plan.micro_batch_tokens, plan.num_kept) == (True, tokens, 0)
    assert passes(short, BatchConfig(2, 1)).on_cpu().micro_batch_tokens == short.merged_tokens(1) < CPU_TOKENS
