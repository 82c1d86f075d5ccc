"""launch/slurm.sbatch under a real Slurm of one node: what is preempted, warned or cancelled, and what comes of it."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, result_of
from tests.conftest import ROOT, Run, arguments, thorough
from tests.slurm_cluster import Cluster, cluster, missing, wait_for
from train.checkpoints.contents import step_of
from train.config import CheckpointConfig, Config
from train.run.folder import RunFolder, read_object

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
STEPS = 200
FOR_EVER = 10**6
PATIENCE = 180.0  # seconds; a start takes 6 to 20
HANDLOOP = f"""#!/bin/bash
PYTHONPATH={ROOT} exec {sys.executable} -c 'import sys; from train.commands.handloop import main; sys.exit(main())' "$@"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a venv in which handloop is this checkout's, as sbatch is typed in one."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    (folder / "handloop").write_text(HANDLOOP)
    (folder / "handloop").chmod(0o755)
    return tmp_path


def words_of(config: Config, steps: int, run: Path) -> list[str]:
    """The tiny run with so many steps, saved at the end and when it is stopped."""
    long = replace(config, train=replace(config.train, epochs=FOR_EVER, max_steps=steps))
    return arguments(at(replace(long, checkpoint=CheckpointConfig(every=FOR_EVER)), run))


def submitted(slurm: Cluster, place: Path, words: list[str], *options: str) -> str:
    return slurm.submit(place, *options, str(ROOT / "launch" / "slurm.sbatch"), *words)


def steps_done(place: Path) -> int:
    path = RunFolder(place / "run").metrics
    return path.read_text().count("\n") if path.exists() else 0


def saved_step(place: Path) -> int:
    return max(map(step_of, RunFolder(place / "run").checkpoints.glob("step-*")), default=0)


def test_an_interrupted_job_ends_in_the_bits_of_one_left_alone(slurm: Cluster, place: Path, config: Config) -> None:
    """Warned by its signal, then queued again as a preemption does, it saves, resumes each time and completes."""
    alone = Run(words_of(config, STEPS, place / "alone"))
    job = submitted(slurm, place, words_of(config, STEPS, place / "run"))
    wait_for(lambda: steps_done(place) >= 5, PATIENCE, "five steps")
    slurm.says("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: slurm.state(job) == "PENDING", PATIENCE, "the job is queued again")
    first = saved_step(place)
    assert 5 <= first < STEPS
    wait_for(lambda: steps_done(place) >= first + 5, PATIENCE, "five steps more")
    slurm.says("scontrol", "requeue", job)
    wait_for(lambda: slurm.state(job) == "PENDING", PATIENCE, "the job is queued again")
    assert first + 5 <= saved_step(place) < STEPS
    wait_for(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), PATIENCE, "the job's end")
    log = (place / f"handloop-{job}.log").read_text()
    assert (slurm.state(job), slurm.restarts(job)) == ("COMPLETED", 2), log
    assert "is pending execution" not in log  # what Slurm has queued again by itself is left to it
    assert alone.wait().returncode == 0
    assert result_of(place / "run") == result_of(place / "alone")


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, place: Path, config: Config) -> None:
    """scancel is a user's last word: the run ends with 75, and nothing is queued again."""
    job = submitted(slurm, place, words_of(config, FOR_EVER, place / "run"))
    wait_for(lambda: steps_done(place) >= 3, PATIENCE, "three steps")
    slurm.says("scancel", job)
    wait_for(lambda: slurm.state(job) == "CANCELLED", PATIENCE, "the job's end")
    assert read_object(RunFolder(place / "run").exit)["code"] == 75
    assert saved_step(place) >= 3
    time.sleep(7)  # longer than a job that is queued again waits
    assert (slurm.state(job), slurm.restarts(job)) == ("CANCELLED", 0)


@thorough
def test_a_job_whose_time_is_up_is_queued_again(slurm: Cluster, place: Path, config: Config) -> None:
    """The script's own --signal comes two minutes before the end; Slurm looks for it every 30 s."""
    job = submitted(slurm, place, words_of(config, FOR_EVER, place / "run"), "--time=2")
    wait_for(lambda: slurm.restarts(job) == 1, PATIENCE, "the job is queued again")
    told = read_object(RunFolder(place / "run").exit)
    assert (told["code"], saved_step(place) > 0) == (75, True)
    assert "stopped by SIGUSR1" in told["reason"]
