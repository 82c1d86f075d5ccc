"""An empty metrics file, and something that hangs until the test is over."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    return path


@pytest.fixture
def hang() -> Iterator[Callable[[], object]]:
    """Waits until the test is over."""
    over = threading.Event()
    yield lambda: over.wait(30)
    over.set()
