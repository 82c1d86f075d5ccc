"""CUDA graphs are taken where a trial finds them right and faster; stand-ins play the GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from train.config import Config
from train.memory.reference import ReferencePlan
from train.models import graph_trial
from train.models.graph_trial import take_graphs
from train.models.language_model import LanguageModel

LIMIT = 100


def stand_in(monkeypatch: pytest.MonkeyPatch, factor: float, seconds: float, error: Exception | None = None) -> None:
    """Graphs that replay the eager pass times `factor` in `seconds` more, or raise `error`."""

    class Graphs:
        def __init__(self, eager: Callable[..., torch.Tensor], trained: list[torch.nn.Parameter]) -> None:
            self.eager = eager

        def __call__(self, batch: Any) -> torch.Tensor:
            if error is not None:
                raise error
            graph_trial.time.sleep(seconds)
            return self.eager(batch) * factor

    monkeypatch.setattr(graph_trial, "PassGraphs", Graphs)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 40)


@pytest.fixture
def model_and_batch(config: Config) -> tuple[LanguageModel, Any]:
    training = training_of(config, Accelerator(cpu=True))
    plan = training.plan
    assert isinstance(plan, ReferencePlan)
    batch: Any = next(b for b in training.data.batch(0, plan).micro_batches if b.cu_seqlens is not None)
    return training.model, batch


@pytest.mark.parametrize(
    ("factor", "seconds", "error", "reason"),
    [
        (3.0, 0.0, None, "their gradients differ by"),
        (float("nan"), 0.0, None, "their gradients differ by nan"),
        (1.0, 0.3, None, " ms instead of "),
        (1.0, 0.0, RuntimeError("operation not permitted when stream is capturing"), "not permitted when stream"),
        (1.0, 0.0, torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_graphs_that_are_wrong_or_slow_are_left(
    factor: float,
    seconds: float,
    error: Exception | None,
    reason: str,
    model_and_batch: tuple[LanguageModel, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason is told, passes are eager again, and neither gradients nor adapters keep a trace."""
    model, batch = model_and_batch
    before = [parameter.clone() for parameter in model.trainable().values()]
    stand_in(monkeypatch, factor, seconds, error)
    note = take_graphs(model, batch, LIMIT)
    assert note.startswith("no CUDA graphs (")
    assert reason in note
    assert model.reference.graphs is None
    assert all(torch.equal(one, two) for one, two in zip(before, model.trainable().values(), strict=True))
    assert all(not p.grad.any() for p in model.trainable().values() if p.grad is not None)


def test_graphs_that_are_right_and_faster_stay(
    model_and_batch: tuple[LanguageModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They serve from then on; a pass that takes more than half of the memory is not tried."""
    model, batch = model_and_batch
    eager = model.reference.eager
    stand_in(monkeypatch, 1.0, 0.0)
    monkeypatch.setattr(graph_trial, "ENOUGH", 100.0)
    assert "half" not in take_graphs(model, batch, 50)
    assert model.reference.graphs is None
    assert take_graphs(model, batch, LIMIT).startswith("passes are CUDA graphs: ")
    graphs: Any = model.reference.graphs
    assert graphs.eager == eager
