"""A step that several processes share by cost is the step of one, and they capture the same graphs before the first."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from train.config import BatchConfig, Config, EngineConfig, OptimConfig
from train.engine.attention import PackedAttention
from train.engine.graphs import Graphs
from train.loop import Boundary
from train.optim import state_bytes
from train.recording import capture_seconds, record_graphs, shapes_of
from train.run.processes import UNWATCHED
from train.step import Training, step_gradient


@pytest.fixture
def config(config: Config) -> Config:
    """Eight samples a step of three in an epoch, the last with three."""
    config = replace(config, optim=OptimConfig(max_grad_norm=1e9), batch=BatchConfig(1, 0, samples=8))
    return replace(config, engine=EngineConfig(kind="fused"))


def training_at(config: Config, num_processes: int, rank: int, **plan: Any) -> Training:
    """What process `rank` has; alone, since no other is started."""
    batch = replace(config.batch, accumulation=8)
    training = training_of(replace(config, batch=batch), Accelerator(cpu=True))
    training.data.layout = replace(training.data.layout, num_processes=num_processes, rank=rank)
    return replace(training, plan=replace(training.plan, **plan))


def loss_and_gradient(training: Training, step: int) -> tuple[float, torch.Tensor]:
    stats = step_gradient(training, training.data.batch(step, training.plan), step, UNWATCHED)
    return stats.loss_sum, torch.cat(
        [leaf.grad.flatten().clone() for leaf in training.flat.leaves if leaf.grad is not None]
    )


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_shares_add_up_to_the_step(num_processes: int, config: Config) -> None:
    """Losses and gradients of all processes are those of one, also where they do not divide, or some are idle."""
    for step in (0, 2):
        loss, gradient = loss_and_gradient(training_at(config, 1, 0), step)
        parts = [
            loss_and_gradient(training_at(config, num_processes, rank, pair_cost=1e-3, micro_batch_tokens=130), step)
            for rank in range(num_processes)
        ]
        assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-6)
        error = (sum(part for _, part in parts) - gradient).norm() / gradient.norm()
        assert error < 1e-5, error


class Recorded:
    """In the place of torch's CUDAGraph: a replay runs what would be captured."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


@pytest.fixture
def _captures(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Graphs, graph: Any, work: Callable[[], None]) -> None:
        def again() -> None:
            self.stack.store.invalidate_adapters()  # a captured pass fills the adapters in each time
            work()

        graph.work = again

    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr("train.engine.graphs.room", lambda: 2**40)
    for name in ("synchronize", "graph_pool_handle", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    # a kernel reads the boundaries where they are, so that a replay finds those of its micro-batch
    monkeypatch.setattr(PackedAttention, "_lengths", property(lambda self: self.cu_seqlens.diff().tolist()))


@pytest.mark.usefixtures("_captures")
@pytest.mark.parametrize("missing", [0, 1])
def test_room_is_left_for_the_optimizer(missing: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose state comes with the first step: with a byte less than it takes, the largest graph serves all."""
    training = training_at(config, 2, 0, micro_batch_tokens=300, uses_graphs=True, num_samples=7, eager_bytes=1000)
    training.model.execute(training.plan)
    engine = training.model.engine
    assert engine is not None
    assert engine.graphs is not None
    left, own = 1000 + state_bytes(training.parameters.values(), training.config.optim) - missing, engine.graphs
    monkeypatch.setattr("train.engine.graphs.room", lambda: left if own.graphs else 2**40)
    training.model(training.data.batch(0, training.plan).micro_batches[0]).backward()
    assert (record_graphs(training) > 1) == (not missing)
    assert own._room() == left


@pytest.mark.usefixtures("_captures")
def test_no_step_captures_a_graph(config: Config) -> None:
    """Both processes capture the same shapes before the first step, and none in any step; losses are as without."""
    captured: list[set[tuple[int, int]]] = []
    for rank in (0, 1):
        plain = training_at(config, 2, rank, micro_batch_tokens=300)
        training = training_at(config, 2, rank, micro_batch_tokens=300, uses_graphs=True, num_samples=7)
        training.model.execute(training.plan)
        engine = training.model.engine
        assert engine is not None
        assert engine.graphs is not None
        first = training.data.batch(0, training.plan).micro_batches[0]
        training.model(first).backward()  # the very first runs eagerly, as the longest does before the first step
        assert record_graphs(training) == len(engine.graphs.graphs) > 1
        assert not any(leaf.grad is not None and leaf.grad.any() for leaf in training.flat.leaves)
        captured.append(set(engine.graphs.graphs))
        seconds = capture_seconds(training)
        assert seconds > 0
        for step in range(training.total_steps):
            loss, gradient = loss_and_gradient(training, step)
            expected, other = loss_and_gradient(plain, step)
            assert loss == pytest.approx(expected, rel=1e-6)
            assert (gradient - other).norm() <= 1e-5 * other.norm()
        assert set(engine.graphs.graphs) == captured[-1]
        assert capture_seconds(training) == seconds
        assert captured[-1] >= set(shapes_of(training.data, training.plan, training.total_steps))
        boundary: Any = SimpleNamespace(training=training, capture_seconds=0.0)
        engine.graphs.seconds = 1.5  # on a CPU it may be less than a row shows
        assert [Boundary._captures(boundary) for _ in range(2)] == [{"perf/capture_seconds": 1.5}, {}]
    assert captured[0] == captured[1]


def test_shapes_are_those_of_all_processes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each padded length, with room for the samples of every micro-batch of this length; as many as may be."""
    config = replace(config, batch=BatchConfig(1, 0, samples=2))
    training = training_at(config, 2, 1, micro_batch_tokens=300, uses_graphs=True, num_samples=7)
    data, plan = training.data, training.plan
    data.num_tokens = [60 + 70 * (i % 5) for i in range(len(data.num_tokens))]
    shapes = shapes_of(data, plan, training.total_steps)
    assert [tokens for tokens, _ in shapes] == [384, 256, 128]
    monkeypatch.setattr("train.recording.MAX_GRAPHS", 3)
    assert len(shapes_of(data, plan, training.total_steps)) == 2
    short, long = sorted(data.sample_ids(0), key=data.num_tokens.__getitem__)
    data.num_tokens[short], data.num_tokens[long] = 100, 200
    assert shapes_of(data, plan, 1) == [(256, 8), (128, 8)]
    data.num_tokens = [20] * len(data.num_tokens)
    data.layout = replace(data.layout, samples=18)
    assert shapes_of(data, replace(plan, num_samples=9), 1) == [(256, 16)]
    data.layout = replace(data.layout, num_processes=1, rank=0)  # one process may have more than there is room for
    assert shapes_of(data, replace(plan, num_samples=9), 1) == [(128, 8)]
