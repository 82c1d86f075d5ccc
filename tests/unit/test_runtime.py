"""When a process closes its group, by what connects the processes."""

import pytest
import torch

from train.run.accelerator import close_group


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
