"""Which shapes are captured and which graph serves them, by the memory that is left; capturing itself needs a GPU."""

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.engine import graphs
from train.engine.context import ForwardContext
from train.engine.graphs import CapturedGraph, Graphs, Shape, State, StaticBuffers
from train.engine.positions import Positions

GRAPH, FRAGMENTATION, EAGER = 100, 25, 50
PLENTY = 10**6


class Book(Graphs):
    """Graphs whose captures are their shapes, and whose room a function of those says."""

    def __init__(self, room: Callable[[list[Shape]], int], longest_sample: int = 0) -> None:
        stack: Any = None
        super().__init__(stack, stack, 1000, GRAPH, FRAGMENTATION, EAGER)
        self.longest_sample = longest_sample
        self.room, self.asked, self.captured = room, 0, []

    def _room(self) -> int:
        self.asked += 1
        return self.room(list(self.graphs))

    def _capture(self, shape: Shape, context: Any, batch: Any) -> Any:
        self.captured.append(shape)
        return shape

    def serve(self, num_tokens: int, num_boundaries: int = 16, num_samples: int = 0) -> Any:
        """The graph that a micro-batch gets; it has as many samples as its boundaries have room for."""
        nothing: Any = None
        batch: Any = SimpleNamespace(lengths=(1,) * (num_samples or num_boundaries - 2))
        if self.state is State.COLD:
            self.state = State.OPEN  # as the first, eager micro-batch leaves it
        return self._graph_for((num_tokens, num_boundaries), nothing, batch)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


def test_the_largest_is_captured_first_and_every_shape_has_its_own() -> None:
    """With plenty of room; a shape that was seen is not captured again."""
    book = Book(lambda _: PLENTY)
    assert [book.serve(n) for n in (256, 512, 256, 1024)] == [(256, 16), (512, 16), (256, 16), (1024, 16)]
    assert book.captured == [(1024, 16), (256, 16), (512, 16)]
    assert book.state is State.OPEN


def test_the_first_micro_batch_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """It allocates the buffers, for the longest; the next is copied into them, and surplus tokens are a sample's."""
    book, eager = Book(lambda _: PLENTY), []
    stack: Any = lambda hidden, context: eager.append(hidden) or hidden  # noqa: E731
    stack.anchor = None
    book.stack = stack
    context = ForwardContext(Positions(torch.rand(256, 4), {"": 2}, False), {None: stack}, 0.0, torch.tensor(7))
    context.per_layer = torch.rand(256, 6)
    hidden = torch.rand(256, 4)
    ends = torch.tensor([0, 100, 200, 256], dtype=torch.int32)
    batch: Any = SimpleNamespace(cu_seqlens=ends, lengths=(100, 100), input_ids=torch.zeros(1, 256))
    assert book(hidden, context, batch) is hidden
    assert len(eager) == 1
    assert not book.captured
    static = book.static
    assert static is not None
    assert (static.hidden.shape, static.positions.shape) == ((1024, 4), (1024, 4))  # 1,000 tokens, padded
    boundaries = torch.full((4,), -1, dtype=torch.int32)
    nothing: Any = None
    graph = CapturedGraph(static.first(512), torch.tensor(0), boundaries, nothing, nothing)
    book.graphs[512, 4] = graph
    book.largest = (1024, 4)
    replayed: list[Any] = []
    monkeypatch.setattr(graphs._Replay, "apply", lambda *arguments: replayed.append(arguments))
    book.state = State.FULL
    book(hidden, context, batch)
    assert len(eager) == 1
    assert replayed == [(hidden, graph, stack, None)]
    assert torch.equal(static.hidden[:256], hidden)
    assert torch.equal(static.positions[:256], context.positions.values)
    assert graph.seed == 7
    assert boundaries.tolist() == [0, 100, 200, 512]


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(0, [0, 100, 170, 512, 512, 512]), (256, [0, 100, 170, 384, 512, 512]), (128, [0, 100, 170, 256, 384, 512])],
)
def test_padding_is_samples_without_numbers_of_before(
    longest: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is longer than the longest, and nothing is left of the gradient of a longer micro-batch: it may be NaN."""
    book = Book(lambda _: PLENTY, longest)
    stack: Any = SimpleNamespace(anchor=None)
    book.stack, book.state, book.largest = stack, State.FULL, (512, 6)
    static = StaticBuffers(*(torch.full((1024, 2), torch.nan) for _ in range(5)))
    nothing: Any = None
    boundaries = torch.full((6,), -1, dtype=torch.int32)
    book.graphs[512, 6] = CapturedGraph(static.first(512), torch.tensor(0), boundaries, nothing, nothing)
    monkeypatch.setattr(graphs._Replay, "apply", lambda *_: None)
    context = ForwardContext(Positions(torch.rand(256, 2), {"": 1}, False), {None: stack}, 0.0, torch.tensor(7))
    context.per_layer = torch.rand(256, 2)
    ends = torch.tensor([0, 100, 170, 256, 256], dtype=torch.int32)
    batch: Any = SimpleNamespace(cu_seqlens=ends, lengths=(100, 70), input_ids=torch.zeros(1, 256))
    book(torch.rand(256, 2), context, batch)
    assert boundaries.tolist() == expected
    assert static.hidden[:512].isfinite().all()


def test_without_room_the_largest_serves() -> None:
    """The first capture of another length needs the room of all fragmentation beside eager work, later ones do not."""
    for left, served in ((EAGER + FRAGMENTATION - 1, (1024, 16)), (EAGER + FRAGMENTATION, (256, 16))):
        book = Book(lambda there, left=left: left if there else PLENTY)
        assert book.serve(256) == served
        assert book.state is (State.FULL if served == (1024, 16) else State.OPEN)
    for left, served in ((EAGER, (512, 16)), (EAGER - 1, (1024, 16))):
        book = Book(lambda there, left=left: left if len(there) > 1 else PLENTY)
        book.serve(256)
        assert book.serve(512) == served
        assert book.state is (State.OPEN if left == EAGER else State.FULL)


@pytest.mark.parametrize("left", [GRAPH + EAGER - 1, 0])
def test_no_room_for_the_first_is_out_of_memory(left: int) -> None:
    """So that a smaller plan is tried before training."""
    with pytest.raises(torch.OutOfMemoryError):
        Book(lambda _: left).serve(256)


def test_what_took_too_much_is_given_back() -> None:
    """All graphs go, the largest alone is captured again and serves."""
    book = Book(lambda there: EAGER - 1 if len(there) > 2 else PLENTY)
    assert book.serve(256) == (256, 16)
    pool = book.pool
    assert book.serve(512) == (1024, 16)
    assert book.pool is not pool
    assert list(book.graphs) == [(1024, 16)]
    assert book.serve(256) == book.serve(128) == (1024, 16)
    assert book.captured == [(1024, 16), (256, 16), (512, 16), (1024, 16)]
    assert book.state is State.FULL


def test_what_took_too_much_may_leave_no_room_for_the_largest() -> None:
    """Then everything runs eagerly."""
    rooms = iter([PLENTY, PLENTY, EAGER - 1, GRAPH + EAGER - 1])
    book = Book(lambda _: next(rooms))
    assert book.serve(256) is None
    assert book.captured == [(1024, 16), (256, 16)]
    assert book.serve(1024) is None
    assert book.state is State.EAGER
    assert not book.graphs


def test_when_the_largest_no_longer_fits_everything_runs_eagerly() -> None:
    """Memory is asked for once, not for every micro-batch; after a release it is asked for again."""
    left = PLENTY
    book = Book(lambda _: left)
    book.serve(256)
    book.graphs.clear()
    left, book.asked = GRAPH + EAGER - 1, 0
    assert book.serve(256) is None
    assert book.serve(512) is None
    assert book.asked == 1
    left = PLENTY
    book.release()
    assert book.serve(512) == (512, 16)


def test_larger_shapes_run_eagerly_in_the_graphs_memory() -> None:
    """More tokens, or more samples, than the first capture had: all graphs are released."""
    book = Book(lambda _: PLENTY)
    book.serve(256)
    for shape in ((2048, 16), (256, 24)):
        assert book.serve(*shape) is None
        assert not book.graphs
        assert book.state is State.COLD
        assert book.serve(256) == (256, 16)


def test_when_there_are_enough_the_next_larger_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured any more, and memory is not asked for."""
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 3)
    book = Book(lambda _: PLENTY)
    for num_tokens in (128, 384):
        book.serve(num_tokens)
    there, book.asked = list(book.graphs), 0
    assert there == [(1024, 16), (128, 16), (384, 16)]
    assert [book.serve(n) for n in (256, 512, 128)] == [(384, 16), (1024, 16), (128, 16)]
    assert list(book.graphs) == there
    assert book.asked == 0


def test_a_loss_does_not_keep_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was released is freed although the last micro-batch's loss is still there, and so is the stack."""
    monkeypatch.setattr(graphs, "_replay", lambda *_, **__: None)
    anchor = torch.nn.Parameter(torch.zeros(1))
    static = StaticBuffers(*(torch.zeros(8, 4) for _ in range(5)))
    nothing: Any = None
    graph = CapturedGraph(static, nothing, nothing, nothing, nothing)
    stack = type("Stack", (), {"store": object(), "forward_order": (), "backward_order": ()})()
    loss = graphs._Replay.apply(torch.zeros(6, 4), graph, stack, anchor).sum()
    loss.backward()
    assert static.grad_out[:6].eq(1).all()
    assert not static.grad_out[6:].any()
    kept = [weakref.ref(graph), weakref.ref(stack)]
    del graph, stack
    assert [each() for each in kept] == [None, None]
    assert loss == 0


def test_planned_shapes_are_captured_in_place_of_others() -> None:
    """The smallest with room for tokens and samples; where none has, the largest. Nothing else is captured."""
    book = Book(lambda _: PLENTY)
    book.planned = [(640, 16), (384, 24), (256, 8)]
    for shape, served in (
        ((128, 8), (256, 8)),
        ((128, 16), (384, 24)),
        ((256, 8), (256, 8)),
        ((512, 16), (640, 16)),
        ((512, 24), (1024, 24)),
        ((768, 8), (1024, 24)),
    ):
        book.largest = (1024, 24)
        assert book.serve(*shape) == served
    assert set(book.captured) == {(1024, 24), *book.planned}
    book.release()
    assert book.serve(100) == (384, 24)


def test_a_graph_does_not_serve_where_what_is_padded_is_too_long_a_sample() -> None:
    """Attention reads no more of a sample than it was launched for; 127 tokens may be padding before. A graph with room
    for more samples serves all the same: they share what is padded."""
    book = Book(lambda _: PLENTY, longest_sample=512)
    book.planned = [(640, 16)]
    assert [book.serve(n) for n in (640, 256, 1024, 768)] == [(640, 16), (640, 16), (1024, 16), (1024, 16)]
    assert book.serve(128) is None
    assert (book.graphs, book.state) == ({}, State.COLD)  # the eager pass needs their memory
    assert book.captured == [(1024, 16), (640, 16)]
    assert book.serve(128, 16) is None
    assert book.serve(128, 16, num_samples=13) == (640, 16)
    assert book.state is State.OPEN
