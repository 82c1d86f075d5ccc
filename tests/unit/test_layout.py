"""The batch arithmetic: what batch.samples makes of per_device and accumulation, and what is refused with a way out."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from train.cli import parse
from train.config import BatchConfig
from train.layout import BatchLayout, arranged
from train.report.facts import batch_line
from train.run.exits import ExitCode, ExitWith


@pytest.mark.parametrize(
    ("num_processes", "per_device", "expected"),
    [(1, 2, (2, 16)), (2, 2, (2, 8)), (4, 2, (2, 4)), (3, 2, (2, 6)), (8, 16, (4, 1)), (32, 2, (1, 1)), (5, 4, (4, 2))],
)
def test_accumulation_follows_from_the_global_batch(
    num_processes: int, per_device: int, expected: tuple[int, int]
) -> None:
    """32 samples on any number of processes, with room for all of them, also where they do not divide."""
    batch = arranged(BatchConfig(per_device, accumulation=0, samples=32), num_processes)
    assert (batch.per_device, batch.accumulation) == expected
    layout = BatchLayout(batch.per_device, batch.accumulation, num_processes, 0, batch.samples)
    assert layout.samples_per_step == 32 <= batch.per_device * batch.accumulation * num_processes
    assert arranged(batch, num_processes) == batch


def test_without_it_the_product_is_the_global_batch() -> None:
    """per_device x accumulation stay as they are, and twice the processes take twice the samples."""
    batch = BatchConfig(2, 4)
    assert arranged(batch, 3) == batch
    assert [BatchLayout(2, 4, count, 0).samples_per_step for count in (1, 2)] == [8, 16]


def test_the_command_line_s_global_batch_replaces_the_profile_s_accumulation() -> None:
    """Accumulation that is typed beside it is kept, to be compared with it."""
    words = ["--profile", "a100", "--batch.samples", "32"]
    assert parse(words).batch == BatchConfig(2, 0, samples=32)
    assert parse([*words, "--batch.accumulation", "4"]).batch == BatchConfig(2, 4, samples=32)
    for wrong in (["--batch.accumulation", "0"], ["--batch.samples", "-1"]):
        with pytest.raises(ExitWith, match="must be at least"):
            parse(["--profile", "a100", *wrong])


@pytest.mark.parametrize(
    ("batch", "num_processes", "ways"),
    [
        (BatchConfig(2, 4, samples=32), 2, ["which is then 8", "--batch.per_device 4", "--batch.samples 16"]),
        (BatchConfig(2, 3, samples=32), 2, ["which is then 8", "--batch.samples 12"]),
        (BatchConfig(2, 0, samples=3), 4, ["give at least 4", "start at most 3"]),
    ],
)
def test_contradictions_are_refused_with_what_would_work(
    batch: BatchConfig, num_processes: int, ways: list[str]
) -> None:
    """Exit 78 with the arithmetic; each way out that is told is one."""
    with pytest.raises(ExitWith) as refused:
        arranged(batch, num_processes)
    assert refused.value.code == ExitCode.BAD_INPUT
    for way in ways:
        assert way in refused.value.reason
    if batch.accumulation:
        assert ("--batch.per_device" in refused.value.reason) == (32 % (batch.accumulation * num_processes) == 0)
        product = batch.per_device * batch.accumulation * num_processes
        arranged(BatchConfig(batch.per_device, batch.accumulation, samples=product), num_processes)
        arranged(BatchConfig(batch.per_device, 0, samples=32), num_processes)


def test_the_arithmetic_is_told_where_shares_differ() -> None:
    """Numbers whose product is another than the samples are not set equal to them."""
    assert BatchLayout(2, 4, 1, 0).arithmetic() == "2 per device x 4 accumulated x 1 process = 8 samples per step"
    told = BatchLayout(2, 6, 3, 0, 32).arithmetic("packed rows")
    assert told == "32 packed rows per step in uneven shares, of at most 2 per device x 6 accumulated x 3 processes"
    for samples, told in (
        (0, "x 3 processes = 36 samples a step"),
        (32, "32 samples a step in uneven shares, of at most"),
    ):
        batch = {"per_device": 2, "accumulation": 6, "samples": samples}
        record: Any = SimpleNamespace(config={"batch": batch}, start={"num_processes": 3}, plan={})
        assert told in batch_line(record)


def test_a_group_counts_as_one_process() -> None:
    """Eight processes in groups of four take the samples of two, and tell so; what makes no groups is refused."""
    batch = BatchConfig(2, 0, samples=32, context_parallel=4)
    assert arranged(batch, 8) == replace(arranged(replace(batch, context_parallel=1), 2), context_parallel=4)
    layout = BatchLayout.of_first(arranged(batch, 8), 8)
    assert (layout.num_processes, layout.samples_per_step) == (2, 32)
    assert layout.arithmetic().endswith("x 8 processes in groups of 4 = 32 samples per step")
    accelerator: Any = SimpleNamespace(num_processes=8, process_index=6)
    assert (BatchLayout.of(arranged(batch, 8), accelerator).rank, layout.rank) == (1, 0)
    record: Any = SimpleNamespace(
        config={"batch": {"per_device": 2, "accumulation": 8, "context_parallel": 4}},
        start={"num_processes": 8},
        plan={},
    )
    assert "x 8 processes in groups of 4 = 32 samples a step" in batch_line(record)
    for count in (1, 6):
        with pytest.raises(ExitWith, match="no groups of 4; start a multiple of 4") as refused:
            arranged(batch, count)
        assert refused.value.code == ExitCode.BAD_INPUT
