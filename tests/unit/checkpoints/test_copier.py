"""Copying in the background: nobody waits for it, and it says what it did not do."""

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.faults.saves import save
from tests.unit.checkpoints.test_mirror import steps_at, store_at, url_of
from train.checkpoints import copier
from train.checkpoints.copier import Copier
from train.checkpoints.mirror import Mirror
from train.checkpoints.remote import Remote
from train.run.signals import StopRequest


class Line(Remote):
    """A line that can be blocked, and fail."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.open = threading.Event()
        self.open.set()
        self.failure: Exception | None = None

    def write(self, name: str, chunks: Iterable[bytes], size: int) -> None:
        self.open.wait(30)
        if self.failure is not None:
            raise self.failure
        super().write(name, chunks, size)


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(url_of(tmp_path))


def idle() -> StopRequest:
    return StopRequest(listens=False)


def settled(copies: Copier) -> None:
    """Waits until nothing is under way."""
    while copies._is_busy():
        time.sleep(0.005)


def test_nobody_waits_and_the_newest_is_copied(line: Line, tmp_path: Path) -> None:
    """Four saves during one copy: each returns at once; the one that waits last is copied though it is removed here."""
    store = store_at(tmp_path / "run")
    store.keep = 2
    line.open.clear()
    copies = Copier(Mirror(line), store, newest=2)
    while copies.current is None:
        time.sleep(0.001)
    for step in (3, 4, 5):
        save(store, step)
        began = time.monotonic()
        copies.copy(step)
        assert time.monotonic() - began < 0.5
    assert [path.name for path in sorted(store.root.iterdir())] == [f"step-000000000{step}" for step in (1, 4, 5)]
    line.open.set()
    settled(copies)
    assert steps_at(line.url) == [5, 2, 1]  # 2 was removed here while it was copied; 1 is the best
    assert copies.finish(idle(), 30, is_stopping=False) == f"step 5 is whole at {line.url}"
    assert copies.finish(idle(), 30, is_stopping=False) == ""
    told = json.loads(store.folder.mirror.read_text())
    assert (told["step"], told["copied"], told["failed"], told["overtaken"]) == (5, 2, 0, 2)


def test_a_failure_is_told_once_and_tried_again(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning with the reason, without secrets; the next checkpoint, or the end of the run, tries again."""
    store = store_at(tmp_path / "run", [1])
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"s3cret-{name}")
    line.failure = OSError(
        28, "QuotaExceeded for https://key:s3cret-0123@bucket, s3cret-AWS_SECRET_ACCESS_KEY, s3cret-AWS_SESSION_TOKEN"
    )
    copies = Copier(Mirror(line), store, newest=1)
    settled(copies)
    warning, figures = copies.news()
    assert warning.startswith(f"step 1 could not be copied to {line.url}: OSError: [Errno 28] QuotaExceeded")
    assert "no checkpoint is there yet, training goes on" in warning
    assert "s3cret" not in warning + store.folder.mirror.read_text()
    assert figures == {"checkpoint/failed_copies": 1}
    assert copies.news() == ("", {})
    save(store, 2)
    copies.copy(2)
    settled(copies)
    assert copies.news()[1] == {"checkpoint/failed_copies": 2}
    line.failure = None
    assert copies.finish(idle(), 30, is_stopping=False) == f"step 2 is whole at {line.url}"
    assert copies.news() == ("", {"checkpoint/mirrored_step": 2})


def test_the_grace_period_bounds_a_stop(line: Line, tmp_path: Path) -> None:
    """A copy under way is finished where the grace period allows it; otherwise it is said what is there."""
    store = store_at(tmp_path / "run", [1])
    copies = Copier(Mirror(line), store, newest=1)
    settled(copies)
    line.open.clear()
    save(store, 2)
    copies.copy(2)
    stop = idle()
    stop.request("SIGTERM")
    began = time.monotonic()
    said = copies.finish(stop, 0.5, is_stopping=True)
    assert 0.3 < time.monotonic() - began < 2
    assert said.startswith(f"step 2 is not whole at {line.url}, time was up (0.0 of 0.0 MiB were sent of step 2)")
    assert said.endswith("step 1 is the newest there")
    line.open.set()
    settled(copies)
    assert steps_at(line.url) == [2, 1]

    line.open.clear()
    again = Copier(Mirror(line), store, newest=2)  # whole there already
    save(store, 3)
    again.copy(3)
    threading.Timer(0.3, line.open.set).start()
    stop = idle()
    stop.request("SIGTERM")
    assert again.finish(stop, 30, is_stopping=True) == f"step 3 is whole at {line.url}"


def test_a_dead_line_ends_the_waiting(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends by itself waits while bytes go, and a while longer; a stop from elsewhere its grace period."""
    store = store_at(tmp_path / "run", [1])
    line.open.clear()
    monkeypatch.setattr(copier, "STALL_SECONDS", 0.3)
    for is_stopping, grace in ((False, 30.0), (True, 0.4)):
        copies = Copier(Mirror(line), store, newest=1)
        began = time.monotonic()
        assert "no checkpoint is there" in copies.finish(idle(), grace, is_stopping)
        assert 0.2 < time.monotonic() - began < 2
    line.open.set()


def test_a_checkpoint_that_changed_here_is_not_copied(line: Line, tmp_path: Path) -> None:
    """What is read must be what the manifest says: a disk that lies is not mirrored."""
    store = store_at(tmp_path / "run", [1])
    path = store.path_of(1) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    copies = Copier(Mirror(line), store, newest=1)
    settled(copies)
    assert "here is not what the checkpoint's manifest says" in copies.news()[0]
    assert steps_at(line.url) == []
