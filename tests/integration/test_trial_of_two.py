"""A plan is tried by several processes: where one is out of memory, all learn it, and none takes another for lost."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at, start_processes
from tests.conftest import Outcome, arguments, with_batch
from train.config import Config, EngineConfig
from train.engine.peer_memory import MAX_PROBLEM, SHORT
from train.engine.plan import Plan
from train.memory.outlook import Outlook
from train.run.exits import ExitCode
from train.track.metrics_file import read_metrics

MODULES = ("train.assemble", "train.memory.outlook", "torch.cuda", "torch.distributed", "train.engine.split_attention")
# what an exchange is for, by the numbers that a process sends, behind whether it is there
FAILED, OFFER, PROBLEM, SETTLED = 1, 6, MAX_PROBLEM, 0


@dataclass(frozen=True)
class Trial:
    """Plans are tried as on a GPU, the next ones stream; meanwhile there is no memory for exchanges of these kinds."""

    kinds: tuple[int, ...] = ()
    most: int = 1000
    num_passes: int = 0  # that run out of memory in attention, where processes share rows

    def __call__(self) -> None:
        modules: list[Any] = [importlib.import_module(name) for name in MODULES]
        assembling, outlook, cuda, distributed, split = modules
        assembling._is_gpu = lambda training: True
        assembling.free_gpu_bytes = lambda *_: 10**12
        outlook.Outlook.smaller_plans = streaming
        cuda.synchronize = lambda *_: None
        fit, all_gather = assembling.fit_to_memory, distributed.all_gather
        attend, refused, failed = split.SplitAttention.__call__, [], []

        def short(every: list[torch.Tensor], mine: torch.Tensor) -> None:
            kind = len(mine) - 1
            if kind in self.kinds and mine[0] != SHORT and len(refused) < self.most:
                refused.append(kind)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
            all_gather(every, mine)

        def full(attention: Any, *given: Any) -> torch.Tensor:
            if len(failed) < self.num_passes:
                failed.append(given)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return attend(attention, *given)

        def fit_to_memory(*given: Any) -> Any:
            distributed.all_gather, split.SplitAttention.__call__ = short, full
            try:
                return fit(*given)
            finally:
                distributed.all_gather, split.SplitAttention.__call__ = all_gather, attend
                assert set(refused) == set(self.kinds)
                assert len(failed) == self.num_passes

        assembling.fit_to_memory = fit_to_memory


def streaming(_: Outlook, plan: Plan) -> Iterator[Plan]:
    """One block and then both; so small a model's plans need no less memory so."""
    return (replace(plan, num_cached=0, streamed=streamed) for streamed in ((1,), (0, 1)))


def ended(config: Config, kind: str, run_dir: Path, trial: Trial) -> list[Outcome]:
    """The ends of two processes, of which the second has this trial; of kind `split` they share rows."""
    engine: Any = "fused" if kind == "split" else kind
    config = with_batch(replace(config, engine=EngineConfig(kind=engine)), 2, 2)
    config = replace(config, batch=replace(config.batch, context_parallel=2 if kind == "split" else 1))
    config = at(replace(config, run=replace(config.run, timeout_minutes=0.5)), run_dir)
    return [run.wait() for run in start_processes(arguments(config), [Trial(), trial])]


@pytest.mark.parametrize("kind", ["fused", "reference", "split"])
def test_one_process_without_memory_makes_the_plan_smaller(kind: str, config: Config, tmp_path: Path) -> None:
    """It cannot even tell that it fits, or fails where it would exchange with another one: both take the next plan, and
    train as they would have by the first."""
    trials = {"whole": Trial(), "smaller": Trial((), num_passes=1) if kind == "split" else Trial((FAILED,), most=1)}
    ends = {name: ended(config, kind, tmp_path / name, trial) for name, trial in trials.items()}
    for outcomes in ends.values():
        assert [outcome.returncode for outcome in outcomes] == [0, 0], [each.stderr[-500:] for each in outcomes]
    if kind != "reference":
        assert "1 blocks' weights are streamed" in ends["smaller"][0].stdout
        assert ["did not fit; trying" in outcomes[0].stdout for outcomes in ends.values()] == [False, True]
    whole, smaller = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ends)
    assert len(whole) == len(smaller) > 1
    for one, other in zip(whole, smaller, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)


@pytest.mark.parametrize("kind", [FAILED, OFFER, PROBLEM, SETTLED])
@pytest.mark.parametrize("sharing", ["fused", "split"])
def test_where_no_plan_is_left_all_end_by_it(sharing: str, kind: int, config: Config, tmp_path: Path) -> None:
    """Also in the exchanges by which blocks are moved to host memory: 78 and its reason in both, and nobody is lost."""
    outcomes = ended(config, sharing, tmp_path / "run", Trial((FAILED, kind)))
    assert [outcome.returncode for outcome in outcomes] == [ExitCode.BAD_INPUT] * 2, outcomes[0].stderr[-500:]
    assert "2 blocks' weights are streamed" in outcomes[0].stdout
    assert "out of memory at the longest micro-batch" in outcomes[0].stderr
    assert "another process died" not in outcomes[0].stderr + outcomes[1].stderr
