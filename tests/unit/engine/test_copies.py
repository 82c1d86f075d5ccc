"""Pinned host memory: how buffers share allocations, and memory that is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import arguments
from train import main as command
from train.config import Config
from train.engine.copies import HostMemoryError, host_buffers, host_bytes, pinned
from train.engine.embedding import HostEmbedding
from train.engine.machine_memory import OwnMemory
from train.run.exits import ExitCode

MIB = 2**20


def test_pinned_buffers_waste_little() -> None:
    """32 blocks of 107.3 MiB, which torch would round up to 128 MiB each, take less than 5 % more than they need."""
    size = int(107.3 * MIB)
    assert 32 * size <= host_bytes(size, 32) < 1.05 * 32 * size
    assert host_bytes(MIB + 1, 1) == 2 * MIB
    assert host_bytes(size, 0) == 0


def test_buffers_have_their_sizes_and_do_not_overlap() -> None:
    """In order, each as large as asked for, and writing one leaves the others."""
    sizes = [512, 1024, 512, 4096]
    buffers = host_buffers(sizes, pin=False)
    assert [buffer.numel() for buffer in buffers] == sizes
    for number, buffer in enumerate(buffers):
        buffer.fill_(number)
    assert [set(buffer.tolist()) for buffer in buffers] == [{0}, {1}, {2}, {3}]


def test_memory_that_cannot_be_pinned(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused by the system's limit: how much it was, why, and what to do, with exit 78."""
    empty = torch.empty

    def refusing(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    assert host_buffers([5], pin=False)[0].numel() == 5
    for allocate in (lambda: host_buffers([3 * 2**29], pin=True), lambda: pinned((3, 2**27), torch.float32)):
        with pytest.raises(HostMemoryError, match=r"^1.50 GiB of host memory .* CUDA error: out of memory$"):
            allocate()

    with pytest.raises(HostMemoryError):
        HostEmbedding(torch.ones(3, 4), OwnMemory(pin=True))

    def assembled(*_: Any) -> None:
        host_buffers([2**30], pin=True)

    monkeypatch.setattr(command, "assemble", assembled)
    run_dir = tmp_path / "run"
    words = arguments(replace(config, run=replace(config.run, dir=str(run_dir))))
    assert command.main(words) == ExitCode.BAD_INPUT
    told = capsys.readouterr().err
    assert "handloop: 1.00 GiB of host memory could not be pinned" in told
    assert "--engine.kind reference" in told
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 78
