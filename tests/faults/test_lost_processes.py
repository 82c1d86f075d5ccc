"""Trainer processes that are killed, stopped or fail alone: found and named, by the real command and its launcher."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import DistBackendError

from tests.compare_runs import at, exit_record, start_processes
from tests.conftest import ROOT, arguments, thorough, with_batch
from tests.faults.test_stops import COMMANDS, trainers
from tests.interruptions import Defect
from train.config import BatchConfig, Config
from train.run.attempts import read_attempts
from train.run.folder import RunFolder

TIMEOUT_MINUTES = 0.2


@contextmanager
def launched(config: Config, run_dir: Path, name: str, *words: str) -> Iterator[subprocess.Popen]:
    """The launcher, given these words too, of an endless run that has made three steps."""
    endless = replace(config, train=replace(config.train, epochs=10_000))
    endless = at(replace(endless, run=replace(config.run, timeout_minutes=TIMEOUT_MINUTES)), run_dir)
    with subprocess.Popen(
        [*COMMANDS[name], *words, str(ROOT / "train" / "main.py"), *arguments(endless)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
    ) as launcher:
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert launcher.poll() is None, launcher.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield launcher


def pid_of(run_dir: Path, rank: int) -> int:
    """The trainer process of this rank."""
    for pid in trainers(run_dir):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"no process of rank {rank}")


@thorough  # tests/unit/run/test_launcher.py wants the same of a stand-in, and the next test loses real ones
@pytest.mark.fault("T26")
def test_the_only_process_is_killed(config: Config, tmp_path: Path) -> None:
    """83 and a sentence, in exit.json and the attempt's end as well; the same command goes on."""
    run_dir = tmp_path / "run"
    with launched(config, run_dir, "ours") as launcher:
        (pid,) = (pid for pid in trainers(run_dir) if Path(f"/proc/{pid}/cmdline").read_bytes().count(b"launch") == 0)
        os.kill(pid, signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 83, said
    reason = str(exit_record(run_dir)["reason"])
    assert reason.startswith(f"the trainer was killed from outside while {exit_record(run_dir)['doing']}, ")
    assert f"{RunFolder(run_dir).standing}: run the same command again" in reason
    assert reason in said
    (attempt,) = read_attempts(RunFolder(run_dir))
    assert attempt.end is not None
    assert (attempt.end["code"], attempt.end["name"]) == (83, "killed")
    assert attempt.end["last_step"] >= 3


@pytest.mark.fault("T26")
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=thorough)])
def test_one_of_several_is_killed_or_stopped(count: int, config: Config, tmp_path: Path) -> None:
    """The others are ended, and the lost one named, within run.timeout_minutes and ten seconds; no process is left."""
    config = with_batch(config, 2, 2) if count == 2 else replace(config, batch=BatchConfig(1, 0, samples=8))
    cases = ((signal.SIGSTOP, count - 1), (signal.SIGKILL, 0 if count == 2 else 5))

    def lost(kind: signal.Signals, rank: int) -> tuple[int, str, float]:
        """The launcher's code, what it said, and after how many seconds."""
        with launched(config, tmp_path / kind.name, "ours, two processes", "--num_processes", str(count)) as launcher:
            os.kill(pid_of(tmp_path / kind.name, rank), kind)
            began = time.monotonic()
            _, said = launcher.communicate(timeout=120)
            return launcher.returncode, said, time.monotonic() - began

    with ThreadPoolExecutor(2 if count == 2 else 1) as at_once:  # for most of the time one of them waits
        runs = [at_once.submit(lost, *case) for case in cases]
    for (kind, rank), run in zip(cases, runs, strict=True):
        run_dir = tmp_path / kind.name
        code, said, seconds = run.result()
        assert code == 81, said
        assert seconds < 60 * TIMEOUT_MINUTES + 10
        record = exit_record(run_dir)
        assert record["code"] == 81
        assert f"last heard of: process {rank}: step " in str(record["reason"])
        assert ("stopped, as by SIGSTOP" in str(record["reason"])) == (kind == signal.SIGSTOP)
        assert not trainers(run_dir)
        (attempt,) = read_attempts(RunFolder(run_dir))
        assert attempt.end is not None
        assert attempt.end["code"] == 81


@pytest.mark.fault("T26")
def test_a_defect_in_one_of_two(config: Config, tmp_path: Path) -> None:
    """exit.json has the defect, not the peer failure that follows from it; the other process ends soon."""
    config = with_batch(replace(config, run=replace(config.run, timeout_minutes=1.0)), 2, 2)
    for rank in (0, 1):
        run_dir = tmp_path / f"rank-{rank}"
        faults: list = [None, None]
        faults[rank] = Defect("train.loop", "optimizer_step", ZeroDivisionError("a bug"), call=3)
        began = time.monotonic()
        both = [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults)]
        assert time.monotonic() - began < 50
        assert (both[rank].returncode, both[1 - rank].returncode) == (70, 81), both[rank].stderr
        record = exit_record(run_dir)
        assert (record["code"], record["doing"]) == (70, "training, step 3")
        assert "a bug" in RunFolder(run_dir).defect.read_text()
        assert "a defect of Handloop, while training, step 3: ZeroDivisionError: a bug" in both[rank].stderr
        ends = [attempt.end and attempt.end["code"] for attempt in read_attempts(RunFolder(run_dir))]
        assert ends == [70]


OF_NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error, NCCL 2.27
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Failed to CUDA calloc async 4194304 bytes"""
OF_TORCH = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.fault("T26")
@pytest.mark.parametrize(
    ("rank", "error"),
    [(0, DistBackendError(OF_NCCL)), (1, DistBackendError(OF_NCCL)), (1, torch.OutOfMemoryError(OF_TORCH))],
)
def test_one_of_two_runs_out_of_memory(rank: int, error: RuntimeError, config: Config, tmp_path: Path) -> None:
    """Also where NCCL does, which is no lost process: exit.json has 78 and why, not the peer failure that follows."""
    config = with_batch(replace(config, run=replace(config.run, timeout_minutes=1.0)), 2, 2)
    faults: list = [None, None]
    faults[rank] = Defect("train.loop", "optimizer_step", error, call=3)
    both = [run.wait() for run in start_processes(arguments(at(config, tmp_path / "run")), faults)]
    assert (both[rank].returncode, both[1 - rank].returncode) == (78, 81), both[rank].stderr
    folder, told = RunFolder(tmp_path / "run"), str(error).splitlines()[-1]
    record = exit_record(folder.path)
    assert (record["code"], record["doing"]) == (78, "training, step 3")
    assert f"{'process 1: ' if rank else ''}out of memory: {told}\nlower --batch.per_device" in str(record["reason"])
    assert both[rank].stderr.count(told) == 1
    assert both[rank].stderr.strip().startswith("handloop: ")
    ends = [attempt.end and attempt.end["code"] for attempt in read_attempts(folder)]
    assert ends == [78]


@thorough
@pytest.mark.fault("T26")
def test_a_second_job_leaves_no_record_in_the_folder(config: Config, tmp_path: Path) -> None:
    """Its first process is refused; the other one, which waits in vain, does not end the job that has it."""
    config = with_batch(replace(config, run=replace(config.run, timeout_minutes=0.1)), 2, 2)
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        first, second = (run.wait() for run in start_processes(arguments(at(config, folder.path)), [None, None]))
        assert (first.returncode, second.returncode) == (78, 81), second.stderr
        assert "in use by another job" in first.stderr
        assert not folder.exit.exists()
