"""Which passes are recorded and which graph serves them, by the memory that is left; recording itself needs a GPU."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from train.engine import graphs
from train.engine.graphs import Graphs

GRAPH, GAP, LAUNCH = 100, 25, 50
PLENTY = 10**6
Shape = tuple[int, int]


class Book(Graphs):
    """Graphs whose recordings are their shapes, and whose room a function of those says."""

    def __init__(self, room: Callable[[list[Shape]], int]) -> None:
        stack: Any = None
        super().__init__(stack, stack, 1000, GRAPH, GAP, LAUNCH)
        self.room, self.asked, self.recorded = room, 0, []

    def _room(self) -> int:
        self.asked += 1
        return self.room(list(self.graphs))

    def _record(self, shape: Shape, shared: Any, batch: Any) -> Any:
        self.recorded.append(shape)
        return shape

    def serve(self, num_tokens: int, num_borders: int = 16) -> Any:
        """The graph that a pass gets."""
        batch: Any = SimpleNamespace(cu_seqlens=[0] * num_borders)
        shared: Any = None
        return self._graph_for(num_tokens, shared, batch)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


def test_the_largest_is_recorded_first_and_every_shape_has_its_own() -> None:
    """With plenty of room; a shape that was seen is not recorded again."""
    book = Book(lambda _: PLENTY)
    assert [book.serve(n) for n in (256, 512, 256, 1024)] == [(256, 16), (512, 16), (256, 16), (1024, 16)]
    assert book.recorded == [(1024, 16), (256, 16), (512, 16)]


def test_without_room_the_largest_serves() -> None:
    """The first recording of another length wants the room of all gaps beside what is launched, later ones do not."""
    for left, served in ((LAUNCH + GAP - 1, (1024, 16)), (LAUNCH + GAP, (256, 16))):
        book = Book(lambda there, left=left: left if there else PLENTY)
        assert book.serve(256) == served
    for left, served in ((LAUNCH, (512, 16)), (LAUNCH - 1, (1024, 16))):
        book = Book(lambda there, left=left: left if len(there) > 1 else PLENTY)
        book.serve(256)
        assert book.serve(512) == served


@pytest.mark.parametrize("left", [GRAPH + LAUNCH - 1, 0])
def test_no_room_for_the_first_is_out_of_memory(left: int) -> None:
    """So that a smaller plan is tried before training."""
    with pytest.raises(torch.OutOfMemoryError):
        Book(lambda _: left).serve(256)


def test_what_took_too_much_is_given_back() -> None:
    """All graphs go, the largest alone is recorded again and serves."""
    book = Book(lambda there: LAUNCH - 1 if len(there) > 2 else PLENTY)
    assert book.serve(256) == (256, 16)
    pool = book.pool
    assert book.serve(512) == (1024, 16)
    assert book.pool is not pool
    assert list(book.graphs) == [(1024, 16)]
    assert book.serve(256) == book.serve(128) == (1024, 16)
    assert book.recorded == [(1024, 16), (256, 16), (512, 16), (1024, 16)]


def test_when_the_largest_fits_no_more_passes_are_launched() -> None:
    """Memory is asked for once, not at every pass; after a release it is asked for again."""
    left = PLENTY
    book = Book(lambda _: left)
    book.serve(256)
    book.graphs.clear()
    left, book.asked = GRAPH + LAUNCH - 1, 0
    assert book.serve(256) is None
    assert book.serve(512) is None
    assert book.asked == 1
    left = PLENTY
    book.release()
    assert book.serve(512) == (512, 16)


def test_longer_passes_are_launched_in_the_graphs_memory() -> None:
    """More tokens, or more samples, than the first recording had."""
    book = Book(lambda _: PLENTY)
    book.serve(256)
    for shape in ((2048, 16), (256, 24)):
        assert book.serve(*shape) is None
        assert not book.graphs
        assert book.serve(256) == (256, 16)


def test_when_there_are_enough_the_next_larger_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is recorded any more, and memory is not asked for."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 3)
    book = Book(lambda _: PLENTY)
    for num_tokens in (128, 384):
        book.serve(num_tokens)
    there, book.asked = list(book.graphs), 0
    assert there == [(1024, 16), (128, 16), (384, 16)]
    assert [book.serve(n) for n in (256, 512, 128)] == [(384, 16), (1024, 16), (128, 16)]
    assert list(book.graphs) == there
    assert book.asked == 0


def test_a_loss_does_not_keep_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given back is free, although the loss of the pass before is still there; and it is not there long."""
    monkeypatch.setattr(graphs, "_replay", lambda *_, **__: None)
    anchor = torch.nn.Parameter(torch.zeros(1))
    places = SimpleNamespace(out=torch.zeros(8, 4), grad_out=torch.zeros(8, 4))
    none: Any = None
    graph = graphs._Graph(cast(Any, places), none, none, none, none)
    loss = graphs._Replay.apply(
        graph, SimpleNamespace(store=None, forward_order=(), backward_order=()), 6, anchor
    ).sum()
    loss.backward()
    assert places.grad_out[:6].eq(1).all()
    assert not places.grad_out[6:].any()
    kept = weakref.ref(graph)
    del graph
    assert kept() is None
    assert loss == 0
