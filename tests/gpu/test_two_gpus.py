"""Two GPUs and NCCL, by the launcher: processes that are lost, and what sharded weights train to.

All runs share the two GPUs at once, as each would be alone for most of a minute while Python imports: the runs are
deterministic, and what else a GPU does changes no bit.
"""

import math
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.compare_runs import at, result_of
from tests.conftest import ROOT, arguments, tiny_run, with_batch
from tests.faults.test_stops import COMMANDS
from tests.gpu.faulty_trainer import FAULTS, NOTHING
from train.config import CheckpointConfig, Config, EngineConfig, MemoryConfig
from train.run.attempts import read_attempts
from train.run.folder import RunFolder, read_object

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; the CPU suite covers the same with gloo"),
]
# Processes of a run wait so long for one another. Twenty that import at once on a slow host, 25 s each when alone, need
# not come within 30 s of one another
TIMEOUT_SECONDS = 60
PROMISED_SECONDS = TIMEOUT_SECONDS + 10  # RELIABILITY.md
RUN_SECONDS = 240  # of a run at most: launcher and trainers import, a lost process is waited for
AT_ONCE = 10  # runs, of two processes each: all
SHARDED = {"replicas": False, "sharded": True}


@dataclass(frozen=True)
class Ended:
    """How a run came out; `code` is None where it was ended after RUN_SECONDS, the rest is empty unless it is 0."""

    code: int | None
    stderr: str
    result: dict[str, bytes]
    plan: str = ""


@dataclass(frozen=True)
class Fault:
    """A run with a fault, what its folder then said, and how the same command went on."""

    end: Ended
    record: dict[str, Any]  # exit.json
    seconds: float  # from the lost process's last sign of life to exit.json; infinite where one of them is not there
    again: Ended
    from_step: int  # from which it went on


Runs = dict[str, Future[Any]]  # by the fault, NOTHING for a run that is left alone, or by SHARDED


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, shape: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """Every run that the selected tests of this file ask for, all of them started at once."""
    folder, config = tmp_path_factory.mktemp("two-gpus"), on_two(tiny_run(shape, pairs, Path("unused")))
    nf4 = replace(config, model=replace(config.model, quantization="nf4"))
    own = [
        item for item in request.session.items if isinstance(item, pytest.Function) and item.module is request.module
    ]
    cases = [
        str(item.callspec.params["case"]) for item in own if item.originalname == test_a_fault_in_one_of_two.__name__
    ]
    is_sharding = any(item.name == test_sharded_weights_train_to_the_bits_of_replicas.__name__ for item in own)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        started: Runs = {NOTHING: pool.submit(launched, config, folder / NOTHING)} if cases else {}
        started |= {case: pool.submit(faulted, config, folder / case, case) for case in cases}
        for name, shard in SHARDED.items() if is_sharding else ():
            started[name] = pool.submit(launched, replace(nf4, memory=MemoryConfig(shard=shard)), folder / name)
        yield started
        pool.shutdown(cancel_futures=True)


def on_two(config: Config) -> Config:
    """Twelve steps on the fused engine, deterministic, with dropout and a checkpoint every two."""
    config = with_batch(replace(config, checkpoint=CheckpointConfig(every=2)), 2, 2)
    config = replace(config, engine=EngineConfig(kind="fused"), lora=replace(config.lora, dropout=0.1))
    run = replace(config.run, device="cuda", deterministic=True, timeout_minutes=TIMEOUT_SECONDS / 60)
    return replace(config, run=run)


def launched(config: Config, run_dir: Path, case: str = NOTHING) -> Ended:
    """The run on two GPUs, to its end."""
    command = [*COMMANDS["ours, two processes"], str(ROOT / "tests" / "gpu" / "faulty_trainer.py"), case]
    words, paths = arguments(at(config, run_dir)), f"{ROOT}:{os.getenv('PYTHONPATH', '')}"
    setting = {**os.environ, "PYTHONPATH": paths}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, *words], cwd=ROOT, env=setting, **pipes) as launcher:
        try:
            _, said = launcher.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            # by hand: those that are stopped would not hear of the launcher's end, and hold the pipe
            for process in psutil.Process(launcher.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            launcher.kill()
            said = ""
            with suppress(subprocess.TimeoutExpired):  # a process whose parent has ended may hold the pipe
                said = launcher.communicate(timeout=10)[1]
            return Ended(None, f"ended after {RUN_SECONDS} s:\n{said}", {})
    if launcher.returncode:
        return Ended(launcher.returncode, said, {})
    return Ended(0, said, result_of(run_dir), str(read_object(RunFolder(run_dir).plan)["summary"]))


def faulted(config: Config, run_dir: Path, case: str) -> Fault:
    """The run with the fault, and its resumption."""
    end, folder = launched(config, run_dir, case), RunFolder(run_dir)
    beat = folder.heartbeats / str(FAULTS[case][0])
    is_told = folder.exit.exists() and beat.exists()
    seconds = folder.exit.stat().st_mtime - beat.stat().st_mtime if is_told else math.inf
    record = read_object(folder.exit)
    again = launched(config, run_dir)
    return Fault(end, record, seconds, again, int(read_attempts(folder)[-1].start["from_step"]))


@pytest.mark.parametrize("case", [name for name in FAULTS if name != NOTHING])
def test_a_fault_in_one_of_two(case: str, runs: Runs) -> None:
    """81 in the time that is promised, the lost process is named; 70 for an exception. The resumed run has the bits of
    one that was left alone."""
    found: Fault = runs[case].result()
    code = 70 if case == "an exception" else 81
    assert found.end.code == code, found.end.stderr[-2000:]
    assert found.record["code"] == code
    if code == 81:
        reason = str(found.record["reason"])
        print(f"{case}: {found.seconds:.1f} s from its last sign of life; {reason}")
        assert found.seconds < PROMISED_SECONDS
        assert f"last heard of: process {FAULTS[case][0]}: step " in reason
        assert ("stopped, as by SIGSTOP" in reason) == case.startswith("stopped")
    assert found.again.code == 0, found.again.stderr[-2000:]
    alone: Ended = runs[NOTHING].result()
    assert alone.code == 0, alone.stderr[-2000:]
    assert found.again.result == alone.result
    assert bool(found.from_step) == (case != "killed while it loads")  # it went on, and did not begin anew


def test_sharded_weights_train_to_the_bits_of_replicas(runs: Runs) -> None:
    """NF4, packed: losses and adapters; each plan says what is shared out."""
    results = []
    for name, shard in SHARDED.items():
        end = runs[name].result()
        assert end.code == 0, end.stderr[-2000:]
        assert ("each of 2 GPUs holds a part" in end.plan) == shard
        results.append(end.result)
    for name in ("losses", "adapters", "samples"):
        assert results[0][name] == results[1][name], name
