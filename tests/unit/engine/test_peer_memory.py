"""What is taken from other processes: numbers of all that are there, and no file but the one that was meant."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from train.engine import peer_memory
from train.engine.peer_memory import PeerMemoryError, agree, gathered

CPU = torch.device("cpu")


def gathering(monkeypatch: pytest.MonkeyPatch, *others: list[int]) -> None:
    """Makes a group of this process and of others that send these numbers."""

    def all_gather(every: list[torch.Tensor], mine: torch.Tensor) -> None:
        for place, numbers in zip(every, [mine.tolist(), *others], strict=True):
            place.copy_(torch.tensor(numbers))

    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "get_world_size", lambda: 1 + len(others))
    monkeypatch.setattr(dist, "all_gather", all_gather)


def test_a_process_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as such where a collective raises, and where NCCL gives up and leaves zeros in the place of numbers."""
    gathering(monkeypatch, [1, 8, 9])
    assert gathered([6, 7], CPU) == [[6, 7], [8, 9]]
    gathering(monkeypatch, [0, 0, 0])
    with pytest.raises(dist.DistError, match="a process is not in it"):
        gathered([6, 7], CPU)

    def closed(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_gather", closed)
    with pytest.raises(dist.DistError, match="Connection closed by peer"):
        gathered([6, 7], CPU)
    with pytest.raises(dist.DistError, match="Connection closed by peer"):  # and not as memory that cannot be shared
        peer_memory.arenas(4096, CPU)


def test_one_problem_is_everybody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by who has it, in all."""
    length = peer_memory.MAX_PROBLEM
    gathering(monkeypatch, [1, *b"no room".ljust(length)])
    with pytest.raises(PeerMemoryError, match=r"^process 1: no room$"):
        agree("", CPU)
    gathering(monkeypatch, [1, *b"".ljust(length)])
    agree("", CPU)
    with pytest.raises(PeerMemoryError, match=r"^process 0: no room"):
        agree("no room " + 300 * "ü", CPU)


def test_another_file_under_that_number() -> None:
    """A process of another PID namespace may have the number: what it holds open is not mapped."""
    meant, other = peer_memory._file(4096), peer_memory._file(4096)
    try:
        place = peer_memory._place_of(meant)
        peer_memory._mapped(place, 4096)[5] = 7
        assert os.pread(meant, 1, 5) == b"\x07"
        with pytest.raises(OSError, match="another process"):
            peer_memory._mapped([place[0], other, *place[2:]], 4096)
    finally:
        os.close(meant)
        os.close(other)
