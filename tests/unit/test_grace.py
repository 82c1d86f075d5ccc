"""When a run says that a stop takes too long, and how far the host may be ahead of the device."""

import torch

from train.config import RunConfig
from train.grace import Grace, grace_warning
from train.metrics import Pace


def test_a_micro_batch_and_a_save_against_the_grace() -> None:
    """Nothing within the grace; beyond it both times, and what to lower."""
    run = RunConfig(dir="x", grace_seconds=10.0)
    assert grace_warning(run, 6.0, 4.0) == ""
    told = grace_warning(run, 6.0, 4.1)
    assert "up to 10.1 s (a micro-batch of 6.0 s and a save of 4.1 s)" in told
    assert "run.grace_seconds = 10" in told
    assert "--batch.per_device" in told
    assert "and a save" not in grace_warning(run, 11.0, 0.0)


def test_the_warning_comes_once_and_not_for_the_first_step() -> None:
    """The first step is slower than the others; the last save counts from when there is one."""
    grace = Grace(RunConfig(dir="x", grace_seconds=10.0))
    assert [bool(grace.check(seconds)) for seconds in (99.0, 9.0)] == [False, False]
    grace.save_seconds = 2.0
    assert [bool(grace.check(seconds)) for seconds in (9.0, 9.0)] == [True, False]


def test_the_host_is_one_micro_batch_ahead(monkeypatch) -> None:
    """When the third micro-batch is queued, the second is awaited, and so on; on a CPU nothing is."""
    calls: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.number = sum(call.startswith("queued") for call in calls)

        def record(self) -> None:
            calls.append(f"queued {self.number}")

        def synchronize(self) -> None:
            calls.append(f"awaited {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for device in ("cpu", "cuda"):
        pace = Pace(torch.device(device))
        for _ in range(3):
            pace.mark()
    assert calls == ["queued 0", "queued 1", "awaited 0", "queued 2", "awaited 1"]
