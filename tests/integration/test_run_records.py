"""What real runs leave in their folder: their records, through kills, full disks and new starts."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path

from tests.compare_runs import at
from tests.conftest import arguments, losses, run_command
from tests.injections import Fault
from train.config import CompareConfig, Config, TrackConfig
from train.report.page import page_of, render
from train.report.record import read_run
from train.report.state import State
from train.run.attempts import read_attempts
from train.run.folder import OURS, RunFolder, read_object
from train.run.versions import versions


def test_a_run_records_itself(config: Config, tmp_path: Path) -> None:
    """Killed behind its first save and repeated: both attempts, configuration and plan, read from the files.

    The report of the folder knows as much: killed and finished, where it went on, what was saved, and the batch.
    """
    words, folder = arguments(at(config, tmp_path / "run")), RunFolder(tmp_path / "run")
    assert run_command(words, Fault("save", 1, "after")).returncode == -signal.SIGKILL
    assert read_run(folder.path).state == State.KILLED
    outcome = run_command(words)
    assert outcome.returncode == 0, outcome.stderr
    killed, finished = read_attempts(folder)
    assert (killed.number, killed.start["from_step"], killed.end) == (1, 0, None)
    assert (finished.number, finished.start["from_step"]) == (2, 3)
    assert finished.end is not None
    assert {"code": 0, "name": "finished", "reason": "finished", "last_step": 6}.items() <= finished.end.items()
    start = finished.start
    assert start["versions"] == versions()
    assert (start["num_processes"], start["engine"]) == (1, "reference")
    assert "CPU" in start["device"]
    assert start["code_version"] != "unknown"
    assert (start["data"]["num_records"], start["data"]["total_steps"]) == (19, 6)
    plan = read_object(folder.plan)
    assert (plan["engine"], plan["num_blocks"], plan["num_kept"], plan["peak_bytes"]) == ("reference", 2, 2, 0)
    assert "no GPU" in plan["reason"]
    assert plan["summary"] == start["plan"]
    assert plan["parts"] == {}
    saved = read_object(folder.config)
    assert saved["optim"]["lr"] == config.optim.lr
    assert saved["data"]["path"] == list(config.data.path)
    assert saved["run"]["dir"] == str(folder.path)
    run = read_run(folder.path)
    assert (run.state, run.resumes, run.last_step, run.total_steps) == (State.FINISHED, [3], 6, 6)
    assert {3, 6} <= set(run.saved)
    samples = config.batch.per_device * config.batch.accumulation
    assert f" x 1 process = {samples} samples a step" in render(page_of(run))


def test_a_start_that_is_refused_is_no_attempt(config: Config, tmp_path: Path) -> None:
    """A recipe that is refused says so in exit.json alone: what it would have done is not known."""
    folder = RunFolder(tmp_path / "run")
    assert run_command(arguments(at(config, folder.path))).returncode == 0
    changed = replace(at(config, folder.path), lora=replace(config.lora, r=2))
    assert run_command(arguments(changed)).returncode == 77
    assert [attempt.number for attempt in read_attempts(folder)] == [1]
    assert read_object(folder.exit)["code"] == 77
    assert read_object(folder.config)["lora"]["r"] == config.lora.r


@dataclass(frozen=True)
class NoRoomForRecords:
    """Every write of the attempt's records fails as on a full disk."""

    def __call__(self) -> None:
        import train.run.attempts

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        for name in ("append_line", "write_atomically"):
            setattr(train.run.attempts, name, full)


def test_records_that_cannot_be_written_end_no_run(config: Config, tmp_path: Path) -> None:
    """Exit 0, the same losses, one line about it."""
    assert run_command(arguments(at(config, tmp_path / "whole"))).returncode == 0
    outcome = run_command(arguments(at(config, tmp_path / "full")), NoRoomForRecords())
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr.count("the run goes on without a full record of this attempt") == 1
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")
    assert not RunFolder(tmp_path / "full").attempts.exists()


def test_two_runs_never_mix(config: Config, pairs: Path, tmp_path: Path) -> None:
    """--run.resume never: all that the first run wrote is in previous-1, what a user put beside it stays."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    rows = folder.path / "rows.jsonl"
    rows.write_bytes(pairs.read_bytes())
    watched = replace(
        at(config, folder.path),
        data=replace(config.data, path=(str(rows),)),
        track=TrackConfig(wandb="offline"),
        compare=CompareConfig(num_questions=1, max_new_tokens=2),
    )
    assert run_command(arguments(watched)).returncode == 0
    first = {entry.name for entry in folder.path.iterdir()}
    assert first <= OURS | {"rows.jsonl"}  # no name of a run's is missing from the list
    assert {"wandb", "answers.json", "attempts.jsonl", "config.json", "plan.json"} <= first
    (folder.path / "notes.txt").write_text("mine")
    outcome = run_command(arguments(replace(watched, run=replace(watched.run, resume="never"))))
    assert outcome.returncode == 0, outcome.stderr
    assert f"the earlier run is kept in {folder.path / 'previous-1'}\n" in outcome.stdout
    moved = {entry.name for entry in (folder.path / "previous-1").iterdir()}
    assert moved == first - {"rows.jsonl", ".lock", "exit.json"}
    assert {entry.name for entry in folder.path.iterdir()} == first | {"previous-1", "notes.txt"}
    assert [attempt.number for attempt in read_attempts(folder)] == [1]


def test_a_lost_tracker_id_costs_no_checkpoint(config: Config, tmp_path: Path) -> None:
    """run.json of a run that began without W&B: the run goes on, and gets an id there."""
    folder = RunFolder(tmp_path / "run")
    assert run_command(arguments(at(config, folder.path))).returncode == 0
    before = read_object(folder.identity)
    assert set(before) == {"run_uid"}
    watched = replace(at(config, folder.path), track=TrackConfig(wandb="offline"))
    outcome = run_command(arguments(watched))
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step 6" in outcome.stdout
    after = read_object(folder.identity)
    assert after["run_uid"] == before["run_uid"]
    (record,) = folder.wandb.glob("offline-run-*/run-*.wandb")
    assert record.name == f"run-{after['wandb_id']}.wandb"
