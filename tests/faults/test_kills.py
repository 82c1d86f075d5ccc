"""A run that is killed anywhere, even repeatedly, ends with the bits of the uninterrupted run."""

import random
import signal
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, finish, killed_at_random, known_reference, result_of
from tests.conftest import arguments, run_command, with_batch
from tests.injections import Fault, KillAtOperation
from tests.tally import Tally
from train.config import CheckpointConfig, Config

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")


@pytest.fixture
def dropped(config: Config) -> Config:
    """Dropout, paged 8-bit AdamW, a checkpoint every two steps of six, epochs that end in a smaller batch."""
    return replace(config, lora=replace(config.lora, dropout=0.1), checkpoint=CheckpointConfig(every=2))


@pytest.mark.fault("T1")
def test_kills_at_random_moments(dropped: Config, tmp_path: Path, tally: Tally) -> None:
    """SIGKILL at random moments of a run, including loading; two or three per run, which then finishes."""
    longer = replace(dropped, train=replace(dropped.train, epochs=4))
    expected = known_reference(longer)
    for number in range(tally.times(2, 60)):
        draw, run_dir = random.Random(number), tmp_path / f"run-{number}"
        words = arguments(at(longer, run_dir))
        for _ in range(tally.times(2, 3)):
            outcome = killed_at_random(words, draw, 2.0)
            tally.check(outcome.returncode in (0, -signal.SIGKILL), f"seed {number}: code {outcome.returncode}")
        finish(words)
        tally.check(result_of(run_dir) == expected, f"seed {number}: another result")


@pytest.mark.fault("T2")
def test_a_kill_around_every_operation_of_a_save(dropped: Config, tmp_path: Path, tally: Tally) -> None:
    """SIGKILL before and after every write, sync, rename and removal: from a whole checkpoint to the same bits.

    The short count takes one moment of each operation.
    """
    expected = known_reference(dropped)
    log = tmp_path / "moments"
    assert run_command(arguments(at(dropped, tmp_path / "logged")), KillAtOperation(0, str(log))).returncode == 0
    moments = log.read_text().splitlines()
    one_of_each = ("before _write", "after rename", "before rmtree", "after sync")
    assert set(one_of_each) <= set(moments)
    first = len(moments) // 3  # the first of three saves, and what comes before it, is left to T1
    chosen: Sequence[int] = range(first, len(moments))
    if not tally.full:
        chosen = [moments.index(what, first - 1) + 1 for what in one_of_each]
    for moment in chosen:
        run_dir, label = tmp_path / f"killed-{moment}", f"moment {moment}, {moments[moment - 1]}"
        words = arguments(at(dropped, run_dir))
        killed = run_command(words, KillAtOperation(moment))
        if killed.returncode == 0:  # the moment fell after training, where other code calls the same operations
            continue
        outcome = finish(words)
        tally.check("continues after step" in outcome.stdout, f"{label}: started again")
        tally.check(result_of(run_dir) == expected, f"{label}: another result")
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        tally.check(names == {"step-0000000004", "step-0000000006"}, f"{label}: {names}")


def matrix() -> list[tuple[Any, ...]]:
    """Accumulation, moment of the kill, optimizer, dropout and schedule: every pair of values occurs."""
    points = ("in the epoch", "at the epoch's end", "after validation", "before the last step")
    whole = list(product((1, 3, 4), points, OPTIMIZERS, ((0.0, "cosine"), (0.1, "linear"))))
    return [case for number, case in enumerate(whole) if number % 3 != 2]


@pytest.mark.fault("T12")
def test_every_kind_of_run_resumes_to_the_bit(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Accumulation 1, 3, 4; three optimizers; dropout; schedules; killed in epochs, at their end, after validation."""
    cases = matrix()
    assert len(cases) == 48
    numbers = range(0, 48, 1 if tally.full else 13)
    values = [len({cases[number][place] for number in numbers}) for place in range(4)]
    assert values == [3, 4, 3, 2], "the short count leaves out a value"
    for number in numbers:
        accumulation, point, optimizer, (dropout, schedule) = cases[number]
        case = with_batch(config, 2, accumulation)
        case = replace(
            case,
            lora=replace(case.lora, dropout=dropout),
            optim=replace(case.optim, name=optimizer, schedule=schedule),
            data=replace(case.data, validation_fraction=0.2 if point == "after validation" else 0.0),
            checkpoint=CheckpointConfig(every=1 if point in ("in the epoch", "before the last step") else "epoch"),
        )
        expected = known_reference(case)
        words = arguments(at(case, tmp_path / f"{number}"))
        kill = {"in the epoch": 1, "before the last step": expected["samples"].count(b"(") - 1}.get(point, 1)
        killed = run_command(words, Fault("save", kill, "after"))
        tally.check(killed.returncode == -signal.SIGKILL, f"{number} {cases[number]}: was not killed")
        outcome = finish(words)
        tally.check("continues after step" in outcome.stdout, f"{number} {cases[number]}: started again")
        tally.check(result_of(tmp_path / f"{number}") == expected, f"{number} {cases[number]}: another result")


@pytest.mark.fault("T13")
def test_a_chain_of_resumes(dropped: Config, tmp_path: Path, tally: Tally) -> None:
    """Eleven starts (five in the short count), all but the last killed behind their first checkpoint."""
    kills = tally.times(3, 10)
    for number in range(tally.times(1, 3)):
        seeded = replace(dropped, train=replace(dropped.train, epochs=tally.times(4, 8), seed=number))
        expected = known_reference(seeded)
        words = arguments(at(seeded, tmp_path / f"chain-{number}"))
        for start in range(kills):
            killed = run_command(words, Fault("save", 1, "after"))
            tally.check(killed.returncode == -signal.SIGKILL, f"seed {number}, start {start}: {killed.stderr[-300:]}")
        finish(words)
        tally.check(result_of(tmp_path / f"chain-{number}") == expected, f"seed {number}: another result")
