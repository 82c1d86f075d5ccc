"""What a capture leaves behind; capturing itself needs a GPU (tests/gpu/test_reference_cuda.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from train.engine import capture
from train.engine.capture import capturing

ENDED = "endAllocatePool: not currently recording to mempool_id"


class Torch:
    """Plays torch.cuda: `current` are the streams that were made current, `pools` those that allocations go to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.pools, self.released = ["default"], list[Any](), list[Any]()
        self.draws = True  # whether random numbers can be drawn outside a capture
        self.end_fails = False
        self.is_broken = False  # after an end that failed nothing can be captured
        for name in ("graph", "current_stream", "current_device", "set_stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch, "zeros", lambda size, device: None)
        monkeypatch.setattr(capture, "_cuda_endAllocateToPool", self.end)
        monkeypatch.setattr(capture, "_cuda_releasePool", lambda device, pool: self.released.append(pool))

    @contextmanager
    def graph(self, graph: Any, pool: Any = "its own") -> Iterator[None]:
        before = self.current[-1]
        self.current.append("capture")
        self.pools.append(pool)
        self.draws = False
        try:
            yield
        finally:
            if self.end_fails:
                self.end_fails = self.is_broken
                raise RuntimeError("operation failed due to a previous error during capture")
            self.pools.pop()
            self.draws = True
            self.current.append(before)

    def current_stream(self) -> str:
        return self.current[-1]

    def current_device(self) -> int:
        return 0

    def set_stream(self, stream: str) -> None:
        self.current.append(stream)

    def CUDAGraph(self) -> None:
        """What graph() takes."""

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError(ENDED)
        self.pools.remove(pool)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Torch:
    return Torch(monkeypatch)


def capture_of(error: Exception | None) -> None:
    graph: Any = None
    with capturing(graph, "pool"):
        if error is not None:
            raise error


@pytest.mark.parametrize("end_fails", [False, True])
def test_work_that_fails_leaves_torch_as_it_was(played: Torch, end_fails: bool) -> None:
    """Its own error is raised, whether or not the capture's end fails as well; drawing and the default stream stay."""
    played.end_fails = end_fails
    with pytest.raises(ValueError, match="of the work"):
        capture_of(ValueError("of the work"))
    assert played.current[-1] == "default"
    assert not played.pools
    assert played.draws
    assert played.released == (["pool"] if end_fails else [])  # a whole capture's graph releases the pool itself


def test_a_broken_device_does_not_hide_the_cause(played: Torch) -> None:
    """Nothing can be captured any more: what the work raised is raised, in the stream of before."""
    played.end_fails = played.is_broken = True
    with pytest.raises(ValueError, match="of the work"):
        capture_of(ValueError("of the work"))
    assert played.current[-1] == "default"


def test_an_end_that_fails_alone_is_raised(played: Torch) -> None:
    played.end_fails = True
    with pytest.raises(RuntimeError, match="previous error"):
        capture_of(None)
    assert played.current[-1] == "default"
    assert played.released == ["pool"]


def test_a_capture_that_succeeds_leaves_the_stream(played: Torch) -> None:
    graph: Any = None
    with capturing(graph, "pool"):
        assert played.current[-1] == "capture"
    assert played.current[-1] == "default"
    assert not played.released
