"""When a process closes its group, and the memory that processes plan with."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from train.config import Config
from train.run.accelerator import close_group, free_gpu_bytes


@pytest.mark.parametrize(
    ("backend", "together", "closes"),
    [("gloo", False, True), ("gloo", True, True), ("nccl", False, False), ("nccl", True, True), ("", True, False)],
)
def test_nccl_is_closed_only_together(
    backend: str, together: bool, closes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its closing waits for the others; Gloo's does not; without a group there is nothing to close."""
    closed: list[str] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: bool(backend))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: closed.append(backend))
    close_group(together)
    assert closed == [backend] * closes


def test_a_group_that_does_not_close_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is trained is delivered all the same."""

    def fail() -> None:
        raise RuntimeError("NCCL: remote process exited")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", fail)
    close_group(together=True)
    assert "did not close: NCCL: remote process exited" in capsys.readouterr().err


def test_processes_plan_with_the_least_memory_of_all(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with 9 GiB free beside one with 5 plans with 5, and with the budget where that is less."""
    free = 9 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 16 * 2**30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)

    class Two:
        device = torch.device("cuda")

    both = "train.run.accelerator.gathered"
    monkeypatch.setattr(both, lambda _, numbers: [numbers, [min(each, 5.0 * 2**30) for each in numbers]])
    accelerator: Any = Two()
    assert free_gpu_bytes(config, accelerator) == 5 * 2**30
    capped = replace(config, memory=replace(config.memory, budget="3GiB"))
    assert free_gpu_bytes(capped, accelerator) == 3 * 2**30
