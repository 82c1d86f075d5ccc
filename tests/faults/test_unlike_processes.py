"""Processes that were not given the same, and one that alone cannot read what it is to read."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.compare_runs import at, exit_record, start_processes
from tests.conftest import Outcome, arguments, run_command, with_batch
from tests.injections import Fault
from tests.interruptions import Defect
from train.config import CheckpointConfig, Config
from train.run.folder import RunFolder
from train.run.versions import versions


@pytest.fixture
def config(config: Config) -> Config:
    run = replace(config.run, timeout_minutes=0.2)
    return with_batch(replace(config, checkpoint=CheckpointConfig(every=1), run=run), 2, 2)


@dataclass(frozen=True)
class Given:
    """This process has another value of an option than the command line says."""

    option: str
    value: str

    def __call__(self) -> None:
        import train.main

        original = train.main.parse

        def parse(argv: list[str]) -> Config:
            place = argv.index(f"--{self.option}") if f"--{self.option}" in argv else len(argv)
            return original([*argv[:place], f"--{self.option}", self.value, *argv[place + 2 :]])

        setattr(train.main, "parse", parse)  # noqa: B010


@dataclass(frozen=True)
class Has:
    """A function of train.run.same_command gives this process something else."""

    name: str
    value: object

    def __call__(self) -> None:
        setattr(importlib.import_module("train.run.same_command"), self.name, lambda: self.value)


def beside(config: Config, second: Callable[[], None] | None) -> tuple[Outcome, Outcome]:
    """How both processes end, of which the second has this fault."""
    first, other = (run.wait() for run in start_processes(arguments(config), [None, second]))
    return first, other


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Given("checkpoint.every", "2"), "not given the same options: --checkpoint.every; start each"),
        (Given("batch.per_device", "1"), "not given the same options: --batch.per_device; start each"),
        (Given("run.resume", "never"), "not given the same options: --run.resume; start each"),
        (Has("source_digest", "other"), "the processes do not run the same code"),
    ],
)
def test_another_command(fault: Callable[[], None], told: str, config: Config) -> None:
    """Both end before the first step, with 78 and the option's name; no exchange is waited for."""
    first, other = beside(config, fault)
    assert (first.returncode, other.returncode) == (78, 78), first.stderr
    assert told in first.stderr
    assert not other.stderr.strip()  # once


def test_other_validation_data(config: Config, pairs: Path, tmp_path: Path) -> None:
    """A file of the same name and length with other text on one machine is refused: the loss would be of both."""
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    ours.write_text(pairs.read_text())
    theirs.write_text(pairs.read_text().replace("bolt", "nut"))
    config = replace(config, data=replace(config.data, validation_path=(str(ours),)))
    first, other = beside(config, Given("data.validation_path", str(theirs)))
    assert (first.returncode, other.returncode) == (78, 78), first.stderr
    assert "have not read the same: validation data; give" in first.stderr


def test_other_versions_are_said(config: Config) -> None:
    """They do not end the run."""
    first, other = beside(config, Has("versions", versions() | {"torch": "0.1", "peft": "0.2"}))
    assert (first.returncode, other.returncode) == (0, 0), first.stderr
    assert "torch, peft differ between processes" in first.stdout


def test_a_disk_of_its_own(config: Config, tmp_path: Path) -> None:
    """A machine whose run folder lacks the first one's checkpoint, or has another of that step: all end with 78."""
    for name in ("first", "second"):
        other_rate = replace(config, optim=replace(config.optim, lr=1e-2 if name == "first" else 2e-2))
        killed = run_command(arguments(at(other_rate, tmp_path / name)), Fault("save", 2, "after"))
        assert killed.returncode == -9, killed.stderr
    for name in ("nothing", "second"):
        first, other = beside(at(config, tmp_path / "first"), Given("run.dir", str(tmp_path / name)))
        assert (first.returncode, other.returncode) == (78, 78), first.stderr
        assert "not all processes find the step-0000000002 from which the first one goes on" in first.stderr
        assert ("it is not a folder" in other.stdout) == (name == "nothing")  # the other one can be read


def test_a_named_checkpoint_that_one_machine_lacks(config: Config, tmp_path: Path) -> None:
    """--run.resume PATH is refused in all processes, also where another than the first has no such folder."""
    killed = run_command(arguments(config), Fault("save", 2, "after"))
    assert killed.returncode == -9, killed.stderr
    (folder,) = Path(config.run.dir).glob("checkpoints/step-*2")
    named = replace(config, run=replace(config.run, dir=str(tmp_path / "new"), resume=str(folder)))
    first, other = beside(named, Given("run.resume", str(tmp_path / "none")))
    assert (first.returncode, other.returncode) == (78, 78), first.stderr
    assert "--run.resume must name the same checkpoint on each machine" in first.stderr
    assert "it is not a folder" in other.stdout


def test_what_one_process_cannot_read(config: Config, tmp_path: Path) -> None:
    """It says so itself; once there is a group, exit.json has it, and not the peer failure that follows."""
    config = replace(config, run=replace(config.run, timeout_minutes=0.05))
    first, other = beside(config, Given("data.path", str(tmp_path / "none.jsonl")))
    assert (first.returncode, other.returncode) == (81, 78), first.stderr
    assert other.stderr.strip().startswith("handloop: process 1: 1 problem in the data")
    config = at(config, tmp_path / "later")
    first, other = beside(config, Defect("train.main", "assemble", OSError(28, "No space left on device")))
    assert (first.returncode, other.returncode) == (81, 78), first.stderr
    assert "process 1: while loading the base: [Errno 28] No space left on device" in other.stderr
    record = exit_record(RunFolder.of(config).path)
    assert record["code"] == 78
    assert "process 1: while loading the base: [Errno 28]" in str(record["reason"])


def test_what_all_processes_cannot_read(config: Config, tmp_path: Path) -> None:
    """It is said once, by the first."""
    config = replace(config, data=replace(config.data, path=(str(tmp_path / "none.jsonl"),)))
    first, other = beside(config, None)
    assert (first.returncode, other.returncode) == (78, 78), first.stderr
    assert "1 problem in the data" in first.stderr
    assert not other.stderr.strip()


def test_a_process_without_the_run_folder(config: Config) -> None:
    """Where one cannot write its signs of life, the run goes on without them."""
    first, other = beside(config, Given("run.dir", "/proc/none"))
    assert (first.returncode, other.returncode) == (0, 0), other.stderr
