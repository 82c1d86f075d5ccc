"""What goes between GPUs in a step, and how long they wait for it."""

from dataclasses import replace

import pytest

from tests.unit.memory.examples import GIB, LLAMA_8B, LONG, planner_for
from train.config import BatchConfig, MemoryConfig
from train.memory.cluster import Cluster, peer_bytes, reduction_seconds, ring_rate, sent_bytes

SIZES = replace(LLAMA_8B, gradient_bytes=160_000_000)
JOB = planner_for(LONG, BatchConfig(1, 4), sizes=SIZES).job


def test_gradients_by_pencil() -> None:
    """Of 160 MB eight GPUs send 280 each: over NVLink in 1.1 ms, and sixteen 300 over 25 Gbit/s in 120 ms."""
    alone, one, two = (Cluster(count, nodes, 25.0) for count, nodes in ((1, 1), (8, 1), (8, 2)))
    assert [sent_bytes(JOB, each) for each in (alone, one, two)] == [0, 280_000_000, 300_000_000]
    assert [ring_rate(JOB, each) for each in (one, two)] == [250e9, 0.8 * 25e9 / 8]
    assert [reduction_seconds(JOB, each) for each in (alone, one, two)] == pytest.approx([0, 280e6 / 250e9, 0.12])
    fast, single = Cluster(8, 2, 4000.0), Cluster(1, 4, 100.0)
    assert ring_rate(JOB, fast) == 250e9  # NVLink is the slowest then
    assert ring_rate(JOB, single) == 10e9
    assert str(single) == "4 GPUs (1 on each of 4 machines)"


def test_parts_by_pencil() -> None:
    """Four processes read three quarters of 32 blocks forward, and of 30 backward, in each micro-batch."""
    batch = BatchConfig(1, 4, merge="off")
    planner = planner_for(LONG, batch, MemoryConfig(offload="none"), sizes=SIZES)
    sharded = replace(planner, job=replace(planner.job, num_shards=4, num_local=4))
    plan = sharded.best(8 * GIB)
    assert (plan.streamed, plan.num_cached) == ((), 0)
    assert peer_bytes(sharded.job, plan) == pytest.approx(4 * (32 + 30) * 0.75 * LLAMA_8B.packed_bytes, rel=1e-4)
    assert peer_bytes(planner.job, planner.best(8 * GIB)) == 0
    cached = sharded.best(40 * GIB)  # all blocks' matrices stay from step to step
    assert (cached.num_cached, peer_bytes(sharded.job, cached)) == (32, 0)
