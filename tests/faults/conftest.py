"""Fixtures of the fault tests: what counts every try, checkpoints to damage, an empty cache, a tokenizer."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tokenizer_at
from tests.faults.saves import KEEP, identity, save
from tests.power_cut import Tree, tree_of
from tests.tally import Tally
from train.checkpoints.store import CheckpointStore
from train.run.folder import RunFolder


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The tally of a test marked `@pytest.mark.fault("T1")`."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "mark the test with the number of its fault"
    counted = Tally(marker.args[0])
    began = time.monotonic()
    yield counted
    record = {
        "test": counted.name,
        "what": request.node.name,
        "tries": len(counted.tries),
        "count": counted.count,
        "failures": len(counted.failures),
        "seconds": round(time.monotonic() - began, 1),
    }
    if "HANDLOOP_TALLY" in os.environ:
        with Path(os.environ["HANDLOOP_TALLY"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    assert counted.count, "the test has checked nothing"
    assert not counted.failures, f"{len(counted.failures)} of {counted.count}: " + "; ".join(counted.failures[:10])


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fsync do nothing: the replay needs no durable disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run folder with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("two") / "run"
    store = CheckpointStore(RunFolder(root), KEEP)
    identity(store)
    for step in (1, 2):
        save(store, step)
    return tree_of(root)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The bundled tokenizer."""
    return tokenizer_at()


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A test folder with an empty cache of prepared data in it."""
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path
