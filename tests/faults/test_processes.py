"""Several processes: their number changes, one dies, one hangs, one cannot save."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, exit_record, finish, reference, result_of, start_processes
from tests.conftest import Outcome, arguments, run_command, with_batch
from tests.injections import AtForward, Both, DiskError, Fault, GroupAtEnd
from tests.tally import Tally
from train.config import CheckpointConfig, Config
from train.run.exits import ExitCode
from train.run.folder import RunFolder
from train.run.heartbeats import read_beats
from train.track.metrics_file import read_metrics


def together(config: Config, run_dir: Path, faults: list) -> list[Outcome]:
    """The outcomes of one start, in order of rank."""
    return [run.wait() for run in start_processes(arguments(at(config, run_dir)), faults)]


@pytest.mark.fault("T14")
def test_another_number_of_processes(config: Config, tmp_path: Path, tally: Tally) -> None:
    """A run resumed with another number of processes has the same samples per step, and losses within 1e-5."""
    config = replace(config, train=replace(config.train, epochs=4), checkpoint=CheckpointConfig(every=2))
    batches = {1: with_batch(config, 2, 4), 2: with_batch(config, 2, 2), 4: with_batch(config, 1, 2)}
    reference(batches[1], tmp_path / "alone")
    alone = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    changes = [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)][: tally.times(1, 6)]
    for before, after in changes:
        for kill in range(1, 1 + tally.times(1, 3)):
            run_dir, label = tmp_path / f"{before}-{after}-{kill}", f"{before} -> {after}, kill {kill}"
            first: list = [Fault("save", kill, "after")] + [Fault("save", 99, "after")] * (before - 1)
            killed = together(batches[before], run_dir, first)
            tally.check(killed[0].returncode == -signal.SIGKILL, f"{label}: {killed[0].stderr[-300:]}")
            second = together(batches[after], run_dir, [None] * after)
            tally.check(all(o.returncode == 0 for o in second), f"{label}: {second[0].stderr[-300:]}")
            tally.check("continues after step" in second[0].stdout, f"{label}: started again")
            rows = read_metrics(run_dir / "metrics.jsonl")
            same = [row["data/sample_ids"] for row in rows] == [row["data/sample_ids"] for row in alone]
            tally.check(same, f"{label}: other samples")
            pairs = list(zip(rows, alone, strict=True))[: 2 * kill + 2]  # later, rounding errors grow
            apart = max(abs(a["train/loss"] / b["train/loss"] - 1) for a, b in pairs)
            tally.check(apart < 1e-5, f"{label}: losses {apart:.1e} apart")
    refused = run_command(arguments(at(with_batch(config, 2, 2), tmp_path / "alone")))
    tally.check(
        refused.returncode == 77 and "batch (samples in a step) 8 -> 4" in refused.stderr, refused.stderr[-300:]
    )


@pytest.mark.fault("T15")
def test_a_process_that_dies(config: Config, tmp_path: Path, tally: Tally) -> None:
    """SIGKILL of either of two processes, in computing, saving or loading: the other ends with 81; resume is exact."""
    config = with_batch(replace(config, checkpoint=CheckpointConfig(every=2)), 2, 2)
    config = replace(config, run=replace(config.run, timeout_minutes=0.5), train=replace(config.train, epochs=3))
    outcomes = together(config, tmp_path / "reference", [None, None])
    assert [o.returncode for o in outcomes] == [0, 0], outcomes[0].stderr
    expected = result_of(tmp_path / "reference")
    faults = [AtForward(5), AtForward(9), Fault("save", 1, "before"), AtForward(1), AtForward(14)]
    cases = [(rank, fault) for fault in faults for rank in (0, 1) if isinstance(fault, AtForward) or rank == 0]
    short = [(0, Fault("save", 1, "before")), (1, AtForward(9))]
    assert all(case in cases for case in short)
    for number, (rank, fault) in enumerate(cases if tally.full else short):
        run_dir, label = tmp_path / f"case-{number}", f"rank {rank}, {fault}"
        both = together(config, run_dir, [fault, None] if rank == 0 else [None, fault])
        tally.check(both[rank].returncode == -signal.SIGKILL, f"{label}: was not killed")
        tally.check(both[1 - rank].returncode == 81, f"{label}: {both[1 - rank].returncode}")
        tally.check(exit_record(run_dir)["code"] == 81, f"{label}: {exit_record(run_dir)}")
        again = together(config, run_dir, [None, None])
        tally.check([o.returncode for o in again] == [0, 0], f"{label}: {again[0].stderr[-300:]}")
        tally.check(result_of(run_dir) == expected, f"{label}: another result")


@pytest.mark.fault("T16")
def test_heartbeats_are_this_run_s(config: Config, tmp_path: Path) -> None:
    """--run.resume never sets an earlier run aside, and only that; both processes are heard of behind it."""
    config, folder = with_batch(replace(config, run=replace(config.run, resume="never")), 2, 2), RunFolder(tmp_path)
    for times in range(2):
        ends = together(config, tmp_path, [None, None])
        assert [end.returncode for end in ends] == [0, 0], ends[0].stderr
        assert len(list(tmp_path.glob("previous-*"))) == times
        assert {beat.rank for beat in read_beats(folder.heartbeats) if beat.step > 0} == {"0", "1"}


@pytest.mark.fault("T16")
def test_a_process_that_hangs(config: Config, tmp_path: Path, tally: Tally) -> None:
    """SIGSTOP of one process: after run.timeout_minutes the other ends with 81 and names the one that hangs."""
    config = with_batch(config, 2, 2)
    config = replace(config, run=replace(config.run, timeout_minutes=0.1))
    for rank in (1, 0)[: tally.times(1, 2)]:
        run_dir = tmp_path / f"rank-{rank}"
        faults: list = [None, None]
        faults[rank] = AtForward(5, signal.SIGSTOP)
        runs = start_processes(arguments(at(config, run_dir)), faults)
        other = runs[1 - rank].wait()
        runs[rank].signal(signal.SIGKILL)
        runs[rank].wait()
        tally.check(other.returncode == 81, f"rank {rank}: {other.returncode} {other.stderr[-500:]}")
        said = other.stderr.partition("last heard of: ")[2]
        tally.check(said.startswith(f"process {rank}: step "), f"rank {rank} is not named first: {said[:200]}")


@pytest.mark.fault("T16")
def test_a_first_process_that_cannot_save(config: Config, tmp_path: Path, tally: Tally) -> None:
    """If the first process cannot save, both continue; if the disk never recovers, both end with 76."""
    config = replace(with_batch(config, 2, 2), checkpoint=CheckpointConfig(every=1))
    both = together(config, tmp_path / "once", [DiskError(3, 3), None])
    tally.check([o.returncode for o in both] == [0, 0], both[0].stderr[-300:])
    tally.check("training goes on" in both[0].stdout, "it was not said")
    both = together(config, tmp_path / "always", [DiskError(1, 99), None])
    tally.check([o.returncode for o in both] == [76, 76], f"{[o.returncode for o in both]}")
    again = finish(arguments(at(with_batch(config, 2, 4), tmp_path / "always")))
    tally.check("starts fresh" in again.stdout, again.stdout[-300:])
    tally.check(json.loads((tmp_path / "always" / "exit.json").read_text())["code"] == 0, "exit.json")


def test_processes_close_their_group(config: Config, tmp_path: Path) -> None:
    """However a run ends, the process group is closed first: Gloo's threads could abort the interpreter at its end."""
    config = with_batch(replace(config, run=replace(config.run, timeout_minutes=0.5)), 2, 2)
    must_resume = replace(config, run=replace(config.run, resume="must"))
    stop, die = AtForward(5, signal.SIGTERM), AtForward(5)
    ends: list = [
        (config, None, ExitCode.FINISHED),
        (config, stop, ExitCode.INTERRUPTED),
        (config, die, ExitCode.PEER_FAILURE),
        (must_resume, None, ExitCode.NO_VALID_CHECKPOINT),
    ]
    for case, fault, code in ends:
        looks = [tmp_path / f"{code.name}-{rank}" for rank in (0, 1)]
        faults = [Both(GroupAtEnd(looks[0]), fault) if fault else GroupAtEnd(looks[0]), GroupAtEnd(looks[1])]
        both = together(case, tmp_path / code.name, faults)
        for rank in (1,) if fault is die else (0, 1):
            assert both[rank].returncode == code, both[rank].stderr
            delivers = rank == 0 and code is ExitCode.FINISHED  # which may take longer than the others wait
            assert looks[rank].read_text() == "closed\n" * (1 + delivers), (code.name, rank)
