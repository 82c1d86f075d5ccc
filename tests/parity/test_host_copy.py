"""One copy a machine of streamed weights: the processes' runs are those with a copy each, to the bit."""

import importlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at, exit_record, start_processes
from tests.conftest import BUNDLED_BASE, Outcome, arguments, losses, with_batch
from tests.injections import Both, at_call, before_and_after, die
from train.assemble import longest_micro_batch
from train.config import Config, EngineConfig, MemoryConfig, ModelConfig
from train.engine.packed_weights import PackedLayout
from train.run.exits import ExitCode

NAME = "/memfd:handloop weights"
ONE_COPY = "one copy for 2 processes"


@dataclass(frozen=True)
class Looked:
    """Writes what this process maps of the file to `path`, before the first step."""

    path: Path

    def __call__(self) -> None:
        at_call(importlib.import_module("train.main"), "training_loop", 1, self.look)

    def look(self) -> None:
        found = re.findall(
            rf"\w+-\w+ \S+ \S+ \S+ (\d+) +{NAME}.*\n((?:\w+: .*\n)+)", Path("/proc/self/smaps").read_text()
        )
        self.path.write_text("".join(f"{inode} {_kib('Rss', rows)} {_kib('Pss', rows)}\n" for inode, rows in found))


def _kib(name: str, rows: str) -> str:
    return re.findall(rf"^{name}: +(\d+) kB", rows, re.MULTILINE)[0]


@dataclass(frozen=True)
class Denied:
    """The system does not open the files of other processes, as with hidepid or in another user namespace."""

    def __call__(self) -> None:
        original = os.open

        def refusing(path: Any, *rest: Any, **options: Any) -> int:
            if str(path).startswith("/proc/") and f"/{os.getpid()}/" not in str(path):
                raise PermissionError(13, "Permission denied", path)
            return original(path, *rest, **options)

        setattr(os, "open", refusing)  # noqa: B010


@dataclass(frozen=True)
class Later:
    """Begins with resident weights and then moves some blocks to host memory, as where memory runs out at first.

    A micro-batch that is computed at once has the loss that it had before.
    """

    numbers: tuple[int, ...]

    def __call__(self) -> None:
        main: Any = importlib.import_module("train.main")
        original = main.assemble

        def assemble(*given: Any) -> Any:
            training = original(*given)
            plan = replace(training.plan, streamed=self.numbers)
            batch, found = longest_micro_batch(training, plan), []
            with torch.no_grad():
                found.append(training.model(batch).item())
                training.model.execute(plan)
                found.append(training.model(batch).item())
            assert found[0] == found[1]
            return replace(training, plan=plan)

        main.assemble = assemble


@dataclass(frozen=True)
class Slow:
    """Takes a while for each block that it writes."""

    def __call__(self) -> None:
        before_and_after(PackedLayout, "write", lambda when: time.sleep(0.4 * (when == "before")))


@dataclass(frozen=True)
class DiesAt:
    """SIGKILL at the n-th call of a function."""

    holder: str
    name: str
    call: int

    def __call__(self) -> None:
        at_call(importlib.import_module(self.holder), self.name, self.call, die)


@pytest.fixture
def two(config: Config) -> Config:
    """Of two processes, on the engine, with its weights in host memory."""
    config = with_batch(replace(config, engine=EngineConfig(kind="fused")), 2, 2)
    memory = MemoryConfig(offload="stream")
    return replace(config, memory=memory, run=replace(config.run, timeout_minutes=0.5))


def ended(config: Config, run_dir: Path, faults: Sequence[Callable[[], None] | None] = (None, None)) -> list[Outcome]:
    return [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults)]


def result(run_dir: Path) -> tuple[Any, bytes]:
    return losses(run_dir), (run_dir / "final" / "adapter_model.safetensors").read_bytes()


def test_one_copy_is_read_by_both(two: Config, tmp_path: Path) -> None:
    """Losses and adapters are those of resident weights and of a copy each; both map one file, whose pages count
    once. Where one process may not map it, all say so and have a copy each."""
    resident = ended(replace(two, memory=MemoryConfig()), tmp_path / "resident")
    shared = ended(two, tmp_path / "shared", [Looked(tmp_path / "0"), Both(Looked(tmp_path / "1"), Slow())])
    own = ended(two, tmp_path / "own", [Looked(tmp_path / "2"), Denied()])
    assert [end.returncode for end in (*resident, *shared, *own)] == [0] * 6, shared[0].stderr[-500:]
    assert ONE_COPY in shared[0].stdout
    assert ONE_COPY not in own[0].stdout
    assert (
        "each process has its own copy of what it reads in host memory: process 1: [Errno 13] Permission denied"
        in own[0].stdout
    )
    assert result(tmp_path / "shared") == result(tmp_path / "own") == result(tmp_path / "resident")
    assert not (tmp_path / "2").read_text()
    maps = [[tuple(map(int, line.split())) for line in (tmp_path / rank).read_text().splitlines()] for rank in "01"]
    assert len(maps[0]) == len(maps[1]) == 1
    (inode, rss, pss), (other, *_) = maps[0][0], maps[1][0]
    assert inode == other
    assert 0 < pss <= rss / 2 + 4


@pytest.mark.parametrize("shard", [False, True])
def test_blocks_that_move_later(shard: bool, two: Config, tmp_path: Path) -> None:
    """A smaller plan moves blocks to the one copy, from whole weights and from those shared out."""
    resident = replace(two, memory=MemoryConfig(shard=shard))
    ends = ended(resident, tmp_path / "resident")
    moved = ended(resident, tmp_path / "moved", [Later((0, 1)), Both(Later((0, 1)), Slow())])
    assert [end.returncode for end in (*ends, *moved)] == [0] * 4, moved[0].stderr[-500:]
    assert ONE_COPY in moved[0].stdout
    assert result(tmp_path / "moved") == result(tmp_path / "resident")


def test_other_plans_end_all(two: Config, tmp_path: Path) -> None:
    """Processes that want different blocks in the one copy end together, and do not wait for one another."""
    ends = ended(replace(two, memory=MemoryConfig()), tmp_path / "run", [Later((1,)), Later((0, 1))])
    assert [end.returncode for end in ends] == [ExitCode.BAD_INPUT] * 2, ends[0].stderr[-500:]
    assert "could not be shared or pinned: process 0: processes have made different plans" in ends[0].stderr


@pytest.mark.parametrize("name", ["machine_file", "_mapped"])
def test_a_process_that_dies_while_the_base_is_read(name: str, two: Config, tmp_path: Path) -> None:
    """Before the one copy is made, or before it is mapped: the other ends with 81, and does not blame the files."""
    of_files = replace(two, model=ModelConfig(name_or_path=str(BUNDLED_BASE)))
    holder = "train.engine.machine_memory" if name == "machine_file" else "train.engine.peer_memory"
    ends = ended(of_files, tmp_path / "run", [None, DiesAt(holder, name, 2)])  # the first is the trial
    assert (ends[0].returncode, ends[1].returncode) == (ExitCode.PEER_FAILURE, -9), ends[0].stderr[-500:]
    assert exit_record(tmp_path / "run")["doing"] == "loading the base"
