"""Two GPUs and NCCL: processes that are lost, and what sharded weights train to."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.compare_runs import at, exit_record, result_of, start_processes
from tests.conftest import Outcome, arguments, with_batch
from tests.injections import AtForward, Fault
from tests.interruptions import Defect, SignalAt
from train.config import CheckpointConfig, Config, EngineConfig, MemoryConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; the CPU suite covers the same with gloo"),
]
TIMEOUT_SECONDS = 30
REDUCTION = ("train.step", "all_reduce_gradients", 5)
LOSSES = {  # where a process is killed or stopped, and which it is; only the first one saves
    "killed in forward": (1, AtForward(5)),
    "killed in reduction": (0, SignalAt(*REDUCTION)),
    "killed in a save": (0, Fault("save", 2, "before")),
    "killed while it loads": (1, SignalAt("train.main", "assemble")),
    "stopped in reduction": (1, SignalAt(*REDUCTION, signal.SIGSTOP)),
    "stopped in a save": (0, SignalAt("train.checkpoints.store", "publish", 2, signal.SIGSTOP)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, bytes]]:
    """What the run comes to that is left alone; made by the first test that asks."""
    return {}


@pytest.fixture
def on_two(config: Config) -> Config:
    """Twelve steps on the fused engine, deterministic, with dropout and a checkpoint every two."""
    config = with_batch(replace(config, checkpoint=CheckpointConfig(every=2)), 2, 2)
    config = replace(config, engine=EngineConfig(kind="fused"), lora=replace(config.lora, dropout=0.1))
    run = replace(config.run, device="cuda", deterministic=True, timeout_minutes=TIMEOUT_SECONDS / 60)
    return replace(config, run=run)


def together(config: Config, run_dir: Path, faults: list[Callable[[], None] | None]) -> list[Outcome]:
    """The outcomes of one start, in order of rank."""
    return [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults, on_gpus=True)]


@pytest.mark.parametrize("case", LOSSES)
def test_a_lost_process(
    case: str,
    on_two: Config,
    whole: dict[Path, dict[str, bytes]],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """The other ends with 81 in the time that was promised, names the silent one, and the resumed run has the bits of
    one that was left alone."""
    if not whole:
        alone = tmp_path_factory.mktemp("alone")
        ends = together(on_two, alone, [None, None])
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-1000:]
        whole[alone] = result_of(alone)
    rank, fault = LOSSES[case]
    faults: list[Callable[[], None] | None] = [None, None]
    faults[rank] = fault
    runs = start_processes(arguments(at(on_two, tmp_path)), faults, on_gpus=True)
    began = time.monotonic()
    other = runs[1 - rank].wait()
    print(f"{case}: {time.monotonic() - began:.0f} s from the start to the other's end")
    if case.startswith("stopped"):
        runs[rank].signal(signal.SIGKILL)
    assert runs[rank].wait().returncode == -signal.SIGKILL
    assert other.returncode == 81, other.stderr[-1000:]
    assert exit_record(tmp_path)["code"] == 81
    if "reduction" in case:
        assert other.stderr.partition("last heard of: ")[2].startswith(f"process {rank}: step "), other.stderr[-1000:]
    again = together(on_two, tmp_path, [None, None])
    assert [end.returncode for end in again] == [0, 0], again[0].stderr[-1000:]
    (wanted,) = whole.values()
    assert result_of(tmp_path) == wanted


def test_an_exception_in_the_first_process(on_two: Config, tmp_path: Path) -> None:
    """exit.json has the defect, the other process ends with 81, and the same command goes on."""
    bug = Defect("train.loop", "optimizer_step", ZeroDivisionError("a bug"), call=5)
    both = together(on_two, tmp_path, [bug, None])
    assert [end.returncode for end in both] == [70, 81], both[1].stderr[-1000:]
    assert exit_record(tmp_path)["code"] == 70
    again = together(on_two, tmp_path, [None, None])
    assert [end.returncode for end in again] == [0, 0], again[0].stderr[-1000:]
    assert "continues after step" in again[0].stdout


def test_sharded_weights_train_to_the_bits_of_replicas(on_two: Config, tmp_path: Path) -> None:
    """NF4, packed and captured: losses and adapters."""
    results = []
    for shard in (False, True):
        each = replace(on_two, memory=MemoryConfig(shard=shard), model=replace(on_two.model, quantization="nf4"))
        ends = together(each, tmp_path / str(shard), [None, None])
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr[-1000:]
        results.append(result_of(tmp_path / str(shard)))
    for name in ("losses", "adapters", "samples"):
        assert results[0][name] == results[1][name], name
