"""Two GPUs and NCCL, by the launcher: processes that are lost, and what sharded weights train to."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.compare_runs import at, exit_record, result_of
from tests.conftest import ROOT, arguments, with_batch
from tests.faults.test_stops import COMMANDS
from tests.gpu.faulty_trainer import FAULTS, NOTHING
from train.config import CheckpointConfig, Config, EngineConfig, MemoryConfig
from train.run.folder import RunFolder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; the CPU suite covers the same with gloo"),
]
TIMEOUT_SECONDS = 30
PROMISED_SECONDS = TIMEOUT_SECONDS + 10  # RELIABILITY.md


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """What the run comes to that is left alone; made by the first test that asks."""
    return {}


@pytest.fixture
def on_two(config: Config) -> Config:
    """Twelve steps on the fused engine, deterministic, with dropout and a checkpoint every two."""
    config = with_batch(replace(config, checkpoint=CheckpointConfig(every=2)), 2, 2)
    config = replace(config, engine=EngineConfig(kind="fused"), lora=replace(config.lora, dropout=0.1))
    run = replace(config.run, device="cuda", deterministic=True, timeout_minutes=TIMEOUT_SECONDS / 60)
    return replace(config, run=run)


def launched(config: Config, run_dir: Path, case: str = NOTHING) -> subprocess.CompletedProcess:
    """The run on two GPUs, to its end."""
    command = [*COMMANDS["ours, two processes"], str(ROOT / "tests" / "gpu" / "faulty_trainer.py"), case]
    words, setting = arguments(at(config, run_dir)), {**os.environ, "PYTHONPATH": f"{ROOT}:{os.getenv('PYTHONPATH')}"}
    return subprocess.run([*command, *words], cwd=ROOT, env=setting, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("case", [name for name in FAULTS if name != NOTHING])
def test_a_fault_in_one_of_two(
    case: str, on_two: Config, whole: dict[str, bytes], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """81 in the time that is promised, the lost process is named; 70 for an exception. The resumed run has the bits of
    one that was left alone."""
    if not whole:
        alone = tmp_path_factory.mktemp("alone")
        end = launched(on_two, alone)
        assert end.returncode == 0, end.stderr[-2000:]
        whole |= result_of(alone)
    end = launched(on_two, tmp_path, case)
    code = 70 if case == "an exception" else 81
    assert end.returncode == code, end.stderr[-2000:]
    record, rank, folder = exit_record(tmp_path), FAULTS[case][0], RunFolder(tmp_path)
    assert record["code"] == code
    if code == 81:
        beat = folder.heartbeats / str(rank)
        seconds = folder.exit.stat().st_mtime - beat.stat().st_mtime
        print(f"{case}: {seconds:.1f} s from its last sign of life; {record['reason']}")
        assert seconds < PROMISED_SECONDS
        assert f"last heard of: process {rank}: step " in str(record["reason"])
        assert ("stopped, as by SIGSTOP" in str(record["reason"])) == case.startswith("stopped")
    again = launched(on_two, tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert result_of(tmp_path) == whole


def test_sharded_weights_train_to_the_bits_of_replicas(on_two: Config, tmp_path: Path) -> None:
    """NF4, packed and captured: losses and adapters."""
    results = []
    for shard in (False, True):
        each = replace(on_two, memory=MemoryConfig(shard=shard), model=replace(on_two.model, quantization="nf4"))
        end = launched(each, tmp_path / str(shard))
        assert end.returncode == 0, end.stderr[-2000:]
        results.append(result_of(tmp_path / str(shard)))
    for name in ("losses", "adapters", "samples"):
        assert results[0][name] == results[1][name], name
