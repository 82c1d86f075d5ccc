"""Which graph serves a pass of the reference engine, and what it is given; stand-ins play CUDA's graphs."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.collate import MicroBatch, collate_packed
from train.models import pass_graphs
from train.models.pass_graphs import PassGraphs, _Graph, _tensors


def batch_of(*lengths: int) -> MicroBatch:
    return collate_packed([{"input_ids": list(range(1, n + 1)), "trained": [True] * n} for n in lengths])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> PassGraphs:
    """An embedding of ids and boundaries in the decoder's place, whose recorded passes are run again."""
    weight = torch.nn.Parameter(torch.ones(()))
    weight.grad = torch.zeros(())

    def eager(batch: MicroBatch) -> torch.Tensor:
        ids, positions, boundaries = _tensors(batch)
        return (ids[0] * 1000 + positions[0] + boundaries[1])[:, None] * weight

    def capture(self: PassGraphs, batch: MicroBatch) -> _Graph:
        ids, positions, boundaries = (each.clone() for each in _tensors(batch))
        own = replace(batch, input_ids=ids, position_ids=positions, cu_seqlens=boundaries)
        out = torch.zeros_like(eager(own)).detach()
        grad_out = torch.zeros_like(out)

        def played(work: Callable[[], Any]) -> Any:
            return SimpleNamespace(replay=work)

        def backward() -> None:
            assert weight.grad is not None
            weight.grad += grad_out.sum()

        return _Graph(own, out, grad_out, played(lambda: out.copy_(eager(own).detach())), played(backward))

    monkeypatch.setattr(PassGraphs, "_capture", capture)
    monkeypatch.setattr(pass_graphs, "room", lambda: 100)
    return PassGraphs(eager, [weight])


def rows(graphs: PassGraphs, batch: MicroBatch) -> torch.Tensor:
    """What the graphs make of the batch's own rows."""
    return graphs(batch)[: batch.input_ids.shape[1]]


def test_each_shape_has_a_graph_that_later_passes_fill_anew(graphs: PassGraphs) -> None:
    """Passes of a shape share its graph, which reads their ids, positions and boundaries; gradients are added."""
    for batch in (batch_of(40, 20), batch_of(30, 50), batch_of(200), batch_of(40, 20)):
        assert torch.equal(rows(graphs, batch), graphs.eager(batch))
    assert sorted(graphs.graphs) == [(128, 8), (256, 8)]
    found = rows(graphs, batch_of(3))
    found.backward(torch.full_like(found, 2.0))
    assert graphs.trained[0].grad == 6.0


@pytest.mark.parametrize("limit", ["number", "memory"])
def test_beyond_the_limit_a_larger_graph_serves(
    limit: str, graphs: PassGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape that is not captured any more takes the smallest that it fits in, or runs eagerly."""
    for batch in (batch_of(500), batch_of(300)):
        rows(graphs, batch)
    if limit == "number":
        monkeypatch.setattr(pass_graphs, "MAX_GRAPHS", 2)
    else:
        graphs.needed = 101
    for batch in (batch_of(60, 20), batch_of(700)):
        assert torch.equal(rows(graphs, batch), graphs.eager(batch))
    assert sorted(graphs.graphs) == [(384, 8), (512, 8)]
    assert graphs(batch_of(60, 20)).shape[0] == 384
    assert graphs(batch_of(700)).shape[0] == 700


def test_planned_shapes_are_captured_in_place_of_others(graphs: PassGraphs) -> None:
    """The smallest with room serves a pass; one that is longer than all of them has its own. Room is left as asked."""
    graphs.planned = [(384, 16), (256, 8)]
    for batch in (batch_of(60, 20), batch_of(10, 10, 10, 10, 10, 10, 10), batch_of(300), batch_of(500)):
        assert torch.equal(rows(graphs, batch), graphs.eager(batch))
    assert sorted(graphs.graphs) == [(256, 8), (384, 16), (512, 8)]
    graphs.needed, graphs.reserved = 100, 1
    assert graphs(batch_of(700)).shape[0] == 700
    assert len(graphs.graphs) == 3
