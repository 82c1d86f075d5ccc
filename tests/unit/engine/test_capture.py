"""What a capture leaves behind; capturing itself needs a GPU (tests/gpu/test_engine_cuda.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from train.engine.capture import capturing


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that are made current, the last one is; torch.cuda.graph changes it as torch's own does."""
    current = ["default"]

    @contextmanager
    def graph(graph: Any, pool: Any) -> Iterator[None]:
        before = current[-1]
        current.append("capture")
        yield  # an error in here is raised again at once: torch's stops at the end of the capture, which fails too
        current.append(before)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    return current


def test_a_capture_that_fails_leaves_the_stream(streams: list[str]) -> None:
    """Or what is computed afterwards would not be in order with kernels on the default stream."""

    def fail() -> None:
        graph: Any = None
        with capturing(graph, None):
            assert streams[-1] == "capture"
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        fail()
    assert streams[-1] == "default"


def test_a_capture_that_succeeds_leaves_the_stream(streams: list[str]) -> None:
    graph: Any = None
    with capturing(graph, None):
        assert streams[-1] == "capture"
    assert streams[-1] == "default"
