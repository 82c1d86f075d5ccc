"""Machines that vanish: what is at the mirror is whole, a new machine goes on from it, and no fault stops a run."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at, exit_record, known_reference, result_of, wait_for_rows
from tests.conftest import Outcome, Run, arguments, run_command, with_batch
from tests.faults.test_secrets import with_option
from tests.injections import die
from tests.interruptions import AtMicroBatch
from train.checkpoints.mirror import Mirror
from train.checkpoints.remote import Remote
from train.config import CheckpointConfig, Config
from train.track.metrics_file import read_metrics


@dataclass(frozen=True)
class AtWrite:
    """Kills the process in its n-th write to the mirror, or makes each write take `seconds`."""

    number: int = 0
    seconds: float = 0.0

    def __call__(self) -> None:
        from train.checkpoints.remote import Remote

        original, count = Remote.write, 0

        def write(remote: Any, name: str, chunks: Iterable[bytes], size: int) -> None:
            nonlocal count
            count += 1
            if count == self.number:
                original(remote, name, [b"".join(chunks)[: size // 2]], size)
                die()
            time.sleep(self.seconds)
            original(remote, name, chunks, size)

        setattr(Remote, "write", write)  # noqa: B010


@dataclass(frozen=True)
class Elsewhere:
    """The process works in another folder, as on another machine: a relative --run.dir is its own."""

    folder: str

    def __call__(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        os.chdir(self.folder)


def mirrored(config: Config, url: str, run_dir: Path) -> list[str]:
    """The command line of a run that saves after each step and copies it."""
    return arguments(at(replace(config, checkpoint=CheckpointConfig(every=1, mirror=url)), run_dir))


def steps_at(url: str) -> list[int]:
    return [copy.step for copy in Mirror(Remote(url)).copies()]


@pytest.fixture
def expected(config: Config) -> dict[str, bytes]:
    """The result of the run that was left alone."""
    return known_reference(replace(config, checkpoint=CheckpointConfig(every=1)))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/mirror"


def test_machines_that_vanish_in_a_chain(config: Config, expected: dict[str, bytes], url: str, tmp_path: Path) -> None:
    """Killed within the copy of step 3, and of step 5, with nothing left of the machine: the third ends in the same."""
    first = run_command(mirrored(config, url, tmp_path / "one"), AtWrite(27))
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert steps_at(url)[0] == 2
    shutil.rmtree(tmp_path / "one")
    second = run_command(mirrored(config, url, tmp_path / "two"), AtWrite(27))
    assert second.returncode == -signal.SIGKILL, second.stderr
    assert "step 2 fetched from file://" in second.stdout
    assert "continues after step 2" in second.stdout
    shutil.rmtree(tmp_path / "two")
    third = run_command(mirrored(config, url, tmp_path / "three"))
    assert third.returncode == 0, third.stderr
    assert "step 6 is whole at file://" in third.stdout
    assert "all 3 attempts together" in third.stdout
    assert result_of(tmp_path / "three") == expected
    assert steps_at(url) == [6, 5]


def test_the_best_checkpoint_comes_with_the_newest(config: Config, url: str, tmp_path: Path) -> None:
    """A new machine makes final/ of the step with the lowest validation loss, though that was long before."""
    worse = replace(config.optim, lr=0.5, schedule="constant", warmup=0)  # the first step is the best
    held_out = replace(config.data, validation_path=config.data.path, gate="warn")
    validate = replace(config.validate, every=1, final="best")
    config = replace(config, optim=worse, data=held_out, validate=validate, train=replace(config.train, max_steps=4))
    expected = known_reference(replace(config, checkpoint=CheckpointConfig(every=1)))
    stopped = run_command(mirrored(config, url, tmp_path / "one"), AtMicroBatch(2, 0))
    assert stopped.returncode == 75, stopped.stderr
    best = steps_at(url)[-1]
    assert best < 3
    again = run_command(mirrored(config, url, tmp_path / "two"))
    assert again.returncode == 0, again.stderr
    assert f"final/ is made of step {best}" in again.stdout
    assert result_of(tmp_path / "two") == expected


def test_another_machine_is_further(config: Config, expected: dict[str, bytes], url: str, tmp_path: Path) -> None:
    """A disk with an older checkpoint goes on from the mirror; one that the user names takes later copies back."""
    for name, step in (("one", 1), ("two", 3)):
        assert run_command(mirrored(config, url, tmp_path / name), AtMicroBatch(step, 0)).returncode == 75
    again = run_command(mirrored(config, url, tmp_path / "one"), AtMicroBatch(4, 0))
    assert "step 4 fetched from" in again.stdout
    assert steps_at(url) == [5, 4]
    named = str(tmp_path / "one" / "checkpoints" / "step-0000000004")
    words = with_option(mirrored(config, url, tmp_path / "one"), ["--run.resume", named])
    back = run_command(words, AtMicroBatch(4, 0, kind=signal.SIGKILL))
    assert back.returncode == -signal.SIGKILL, back.stderr
    assert steps_at(url) == [4]
    assert run_command(mirrored(config, url, tmp_path / "three")).returncode == 0
    assert result_of(tmp_path / "three") == expected


def test_a_run_that_starts_again_leaves_the_copies_of_the_old_one(config: Config, url: str, tmp_path: Path) -> None:
    """With --run.resume never; a machine with nothing then goes on from the new run."""
    words = mirrored(config, url, tmp_path / "one")
    assert run_command(words, AtMicroBatch(2, 0)).returncode == 75
    assert run_command(with_option(words, ["--run.resume", "never"]), AtMicroBatch(0, 0)).returncode == 75
    assert steps_at(url)[::2] == [3, 1]
    assert "step 1 fetched from" in run_command(mirrored(config, url, tmp_path / "two")).stdout


def together(config: Config, url: str, where: Path, faults: list[Callable[[], None] | None]) -> list[Outcome]:
    """Two nodes, each with a folder of its own below `where`, that begin at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    runs = []
    for rank, fault in enumerate(faults):
        node = OnNode(Elsewhere(str(where / str(rank))), fault)
        words = mirrored(config, url, Path("run"))
        runs.append(Run(words, node, RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", **world))
    return [run.wait() for run in runs]


def test_nodes_without_a_disk_between_them(config: Config, url: str, tmp_path: Path) -> None:
    """Two nodes, each with a folder of its own: each fetches, the first copies what the mirror lacks; the same bits."""
    config = replace(config, batch=replace(config.batch, per_device=2, accumulation=2))

    done = together(config, url, tmp_path / "whole", [None, None])
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    shutil.rmtree(tmp_path / "mirror")
    stopped = together(config, url, tmp_path / "first", [AtMicroBatch(2, 0), None])
    assert [one.returncode for one in stopped] == [75, 75], stopped[0].stderr + stopped[1].stderr
    assert "step 3 is whole at" in stopped[0].stderr
    shutil.rmtree(tmp_path / "first" / "1")  # the second node is another one
    shutil.rmtree(next((tmp_path / "mirror").rglob("step-0000000003-*")))  # and the mirror has lost the newest
    again = together(config, url, tmp_path / "first", [None, None])
    assert [one.returncode for one in again] == [0, 0], again[0].stderr + again[1].stderr
    assert result_of(tmp_path / "first" / "0" / "run") == result_of(tmp_path / "whole" / "0" / "run")


def test_nodes_that_should_have_one_disk_and_have_not(config: Config, tmp_path: Path) -> None:
    """Without a mirror: where another machine becomes the first, its empty folder is no reason to start again."""
    config = replace(config, batch=replace(config.batch, per_device=2, accumulation=2))
    alone = mirrored(with_batch(config, 2, 4), "", tmp_path / "1" / "run")
    assert run_command(alone, AtMicroBatch(1, 0)).returncode == 75
    refused = together(config, "", tmp_path, [None, None])
    assert [one.returncode for one in refused] == [78, 78], refused[0].stderr + refused[1].stderr
    assert "must be on a disk that all of them see" in refused[0].stderr


@dataclass(frozen=True)
class OnNode:
    """What happens on a node: its folder, and a fault."""

    where: Callable[[], None]
    fault: Callable[[], None] | None

    def __call__(self) -> None:
        self.where()
        if self.fault is not None:
            self.fault()


def test_a_slow_mirror_costs_no_step_and_a_stop_keeps_to_its_grace(
    config: Config, expected: dict[str, bytes], url: str, tmp_path: Path
) -> None:
    """Each write takes 0.4 s, a copy 4 s: steps go on; a stop waits 2.4 s of 3 and says what is there and what not."""
    run_dir = tmp_path / "run"
    endless = replace(config, train=replace(config.train, epochs=2000), run=replace(config.run, grace_seconds=3))
    run = Run(mirrored(endless, url, run_dir), AtWrite(seconds=0.4))
    assert wait_for_rows(run, run_dir, 10)
    assert len(steps_at(url)) <= 1
    asked = time.monotonic()
    run.signal(signal.SIGTERM)
    outcome = run.wait()
    took = time.monotonic() - asked
    assert outcome.returncode == 75, outcome.stderr
    assert 2 < took < 4
    record = exit_record(run_dir)
    assert float(str(record["seconds_after_signal"])) < 1
    assert "is not whole at file://" in str(record["reason"])
    assert "time was up" in str(record["reason"])
    slow = [row["perf/step_seconds"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert sorted(slow)[len(slow) // 2] < 0.3, slow
