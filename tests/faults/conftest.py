"""Fixtures of the fault tests: what counts every try, checkpoints to damage, an empty cache, a tokenizer."""

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tokenizer_at
from tests.faults.saves import KEEP, identity, save
from tests.power_cut import Tree, tree_of
from tests.tally import Tally
from train.checkpoints.store import CheckpointStore
from train.run.folder import RunFolder

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keeps whether a test has failed, for the fixture that counts it."""
    report = yield
    if call.when == "call":
        item.stash[FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def _counted(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that is marked and takes no tally is one try and one check."""
    began = time.monotonic()
    yield
    marker = request.node.get_closest_marker("fault")
    if marker is not None and "tally" not in request.fixturenames:
        failures = int(request.node.stash.get(FAILED, True))
        _record(marker.args[0], request.node.name, (1, 1, failures), began)


def _record(number: str, what: str, counts: tuple[int, int, int], began: float) -> None:
    """Adds a line to the file that HANDLOOP_TALLY names: tries, checks and failures of one test."""
    names = ("tries", "count", "failures")
    seconds = round(time.monotonic() - began, 1)
    record = {"test": number, "what": what, **dict(zip(names, counts, strict=True)), "seconds": seconds}
    if "HANDLOOP_TALLY" in os.environ:
        with Path(os.environ["HANDLOOP_TALLY"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The tally of a test marked `@pytest.mark.fault("T1")`."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "mark the test with the number of its fault"
    counted = Tally(marker.args[0])
    began = time.monotonic()
    yield counted
    counts = len(counted.tries), counted.count, len(counted.failures)
    _record(counted.name, request.node.name, counts, began)
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
