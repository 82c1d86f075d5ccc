"""What only a GPU can show of the engine: bf16 steps, CUDA graphs, tiles."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from tests.conftest import training_of, with_batch
from tests.gpu.kernel_calls import GPU
from train.assemble import assemble
from train.collate import collate_packed
from train.config import Config, EngineConfig, LoraConfig
from train.engine import graphs, plan
from train.memory import search as planning
from train.models.adapted_linear import restore_products
from train.seeds import seed_forward
from train.step import Training, optimizer_step
from train.validation.material import Material
from train.validation.measure import validate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


def build(config: Config, **changes: Any) -> Training:
    config = replace(config, run=replace(config.run, device="cuda"), **changes)
    return training_of(config, Accelerator())


def gradient(training: Training, step: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = training.optimizer.register_step_pre_hook(
        lambda *_: found.append(
            torch.cat([leaf.grad.flatten() for leaf in training.flat.leaves if leaf.grad is not None])
        )
    )
    optimizer_step(training, step)
    handle.remove()
    return found[0]


def test_bf16_gradients_are_the_reference_s(config: Config) -> None:
    """On an NF4 base in bf16, dropout off: loss within 0.2 %, gradients point the same way within bf16's noise."""
    training = build(config)
    reference = build(config, engine=EngineConfig(kind="reference"))
    restore_products(reference.model)  # PEFT's own
    assert (training.model.engine_name, reference.model.engine_name) == ("fused", "reference")
    for step in range(3):
        one, two = gradient(training, step), gradient(reference, step)
        assert torch.cosine_similarity(one, two, dim=0) > 0.995
        assert one.norm().item() == pytest.approx(two.norm().item(), rel=0.02)


def test_fifty_bf16_steps_follow_the_reference(config: Config) -> None:
    """The loss curves of fifty steps lie within 1 % of the first loss of one another."""
    config = replace(config, train=replace(config.train, epochs=50))
    runs = [build(config, engine=EngineConfig(kind=kind)) for kind in ("fused", "reference")]
    curves = [[optimizer_step(run, step).loss for step in range(50)] for run in runs]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 0.01 * curves[0][0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("num_cached", [0, 1, 2])
def test_captured_graphs_compute_what_eager_passes_compute(config: Config, dropout: float, num_cached: int) -> None:
    """Five steps with graphs and without: each step's gradient is the same, and a validation between them."""
    config = with_batch(replace(config, lora=LoraConfig(r=4, dropout=dropout)), 2, 4)
    found: list[list[torch.Tensor]] = []
    for is_captured in (True, False):
        training = build(config)
        training.model.execute(replace(training.plan, num_kept=1, num_cached=num_cached, uses_graphs=True))
        engine: Any = training.model.engine
        gradients = []
        for step in range(5):
            if not is_captured:
                engine.graphs = None
            gradients.append(gradient(training, step))
            with torch.no_grad():
                seed_forward(0, step, 0, 9)
                batch = collate_packed([training.data.samples[i] for i in range(3)]).to(GPU)
                gradients.append(training.model(batch)[None])
        if is_captured:
            assert len(engine.graphs.graphs) > 1
        found.append(gradients)
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() < 0.05 * two.norm()
        if one.numel() > 1:
            assert torch.cosine_similarity(one, two, dim=0) > 0.999


def test_a_validation_leaves_captured_graphs_alone(config: Config) -> None:
    """Also one with a sample that is longer than any in training, tried before the first step; its loss is the same."""
    training = build(with_batch(config, 2, 4))
    samples = training.data.samples
    longest = {name: 2 * samples[0][name] for name in ("input_ids", "trained")}
    while len(longest["input_ids"]) <= training.plan.micro_batch_tokens:
        longest = {name: 2 * value for name, value in longest.items()}
    long_sample = {**samples[0], **longest, "num_tokens": len(longest["input_ids"])}
    rows: list[Any] = [*samples, long_sample]
    validation = Dataset.from_list(rows)
    training = assemble(training.config, training.accelerator, training.data, None, long_sample["num_tokens"])
    assert training.plan.uses_graphs
    assert training.plan.validation_tokens == long_sample["num_tokens"]
    engine: Any = training.model.engine
    for step in range(4):
        optimizer_step(training, step)
    own, captured = engine.graphs, dict(engine.graphs.graphs)
    found = validate(training, Material({1: validation}))["eval/loss"]
    assert captured
    assert own.graphs == captured
    engine.graphs = None
    one_by_one = replace(training, plan=replace(training.plan, validation_tokens=1))
    assert validate(one_by_one, Material({1: validation}))["eval/loss"] == pytest.approx(found, rel=2e-3)
    engine.graphs = own
    assert optimizer_step(training, 4).loss > 0
    assert captured.items() <= own.graphs.items()


@pytest.mark.parametrize("uses_graphs", [False, True])
def test_tiles_of_an_mlp_are_the_whole(config: Config, uses_graphs: bool) -> None:
    """With dropout, eagerly and as graphs: gradients of four steps, 48 tokens at a time or all."""
    config = with_batch(replace(config, lora=LoraConfig(r=4, dropout=0.2)), 2, 4)
    found = []
    for tile in (0, 48):
        training = build(config)
        plan = replace(training.plan, num_kept=1, num_cached=0, uses_graphs=uses_graphs, mlp_tile=tile)
        training.model.execute(plan)
        found.append([gradient(training, step) for step in range(4)])
    for one, two in zip(*found, strict=True):
        assert one.norm() > 0
        assert torch.cosine_similarity(one, two, dim=0) > 0.999


def test_beyond_the_most_graphs_a_larger_one_serves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two graphs, more shapes than that train, and a micro-batch longer than all runs eagerly."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    for module in (planning, plan):
        monkeypatch.setattr(module, "GRAPH_STEP", 8)
    training = build(with_batch(config, 2, 4))
    engine: Any = training.model.engine
    for step in range(6):
        optimizer_step(training, step)
    assert len(engine.graphs.graphs) == 2
    engine.graphs.largest = (8, 1000)
    assert optimizer_step(training, 6).loss > 0


def test_without_room_a_larger_graph_serves(config: Config) -> None:
    """The gradients of four steps through the one graph of the largest shape are those of eager passes."""
    found = []
    for is_captured in (True, False):
        training = build(with_batch(config, 2, 4))
        training.model.execute(replace(training.plan, num_kept=1, num_cached=0, uses_graphs=True))
        engine: Any = training.model.engine
        if not is_captured:
            engine.graphs = None
        for step in range(2):  # eagerly, and captured
            gradient(training, step)
        if is_captured:
            engine.graphs.state = graphs.State.FULL
            first = next(iter(engine.graphs.graphs))
            engine.graphs.graphs = {first: engine.graphs.graphs[first]}
        found.append([gradient(training, step) for step in range(2, 6)])
        if is_captured:
            assert len(engine.graphs.graphs) == 1
    for one, two in zip(*found, strict=True):
        assert one.norm() > 0
        assert torch.isfinite(one).all()
        assert torch.cosine_similarity(one, two, dim=0) > 0.99


@pytest.mark.parametrize("is_any_left", [True, False])
def test_a_capture_that_took_too_much_is_given_back(
    config: Config, is_any_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest graph alone serves then; where not even that has room, passes run eagerly. Gradients stay."""
    found, plenty = [], 2**40
    for is_limited in (False, True):
        rooms = {0: plenty, 1: plenty}  # by the graphs that there are
        monkeypatch.setattr(graphs.Graphs, "_room", lambda self, rooms=rooms: rooms.get(len(self.graphs), plenty))
        training = build(with_batch(config, 2, 4))
        plan = replace(training.plan, num_kept=1, num_cached=0, uses_graphs=True, graph_bytes=1, eager_bytes=1)
        training.model.execute(plan)
        engine: Any = training.model.engine
        own = engine.graphs
        for step in range(2):  # eagerly, and captured
            gradient(training, step)
        assert own.largest is not None
        if is_limited:
            own.graphs = {own.largest: own.graphs[own.largest]}
            rooms |= {2: 0}
            if not is_any_left:
                own.graphs = {}
                rooms |= {0: 0}
        found.append(torch.cat([gradient(training, step) for step in range(2, 6)]))
        if is_limited:
            assert list(own.graphs) == [own.largest] * is_any_left
        else:
            assert len(own.graphs) > 1
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99
