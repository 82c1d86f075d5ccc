"""A run that is killed and resumed equals the uninterrupted run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tests.compare_runs import at, reference, result_of
from tests.conftest import ROOT, Run, arguments, losses, run_command, thorough, with_batch
from tests.injections import Fault
from train.config import CheckpointConfig, Config, EngineConfig
from train.track.metrics_file import read_metrics


@pytest.fixture
def dropped(config: Config) -> Config:
    """Dropout, paged 8-bit AdamW, a checkpoint every two steps of six, epochs that end in a smaller batch."""
    return replace(config, lora=replace(config.lora, dropout=0.1), checkpoint=CheckpointConfig(every=2))


def uninterrupted(config: Config, run_dir: Path) -> dict[str, bytes]:
    expected = reference(config, run_dir)
    assert len(losses(run_dir)) == 6
    return expected


@pytest.mark.parametrize("kind", [pytest.param("reference", marks=thorough), "fused"])
def test_kill_between_saves_before_the_first_and_twice(
    kind: Literal["reference", "fused"], dropped: Config, tmp_path: Path
) -> None:
    """A run killed after steps 1, 3 and 5 (before the first save, between saves) resumes to the same bits."""
    dropped = replace(dropped, engine=EngineConfig(kind=kind))
    expected = uninterrupted(dropped, tmp_path / "reference")
    run_dir = tmp_path / "killed"
    words = arguments(at(dropped, run_dir))
    for lines in (1, 3, 5):
        run = Run(words)
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        # wait for the banner, because earlier attempts have left rows
        while "steps " not in run.said() or not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert run.is_alive(), "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run.signal(signal.SIGKILL)
        assert run.wait().returncode == -signal.SIGKILL
    finished = run_command(words)
    assert finished.returncode == 0, finished.stderr
    assert result_of(run_dir) == expected


def test_sigterm_saves_the_last_step_and_asks_to_be_repeated(dropped: Config, tmp_path: Path) -> None:
    """SIGTERM is exit 75, also in exit.json, with a checkpoint of the last step."""
    longer = replace(dropped, train=replace(dropped.train, epochs=40), checkpoint=CheckpointConfig(every="epoch"))
    run_dir = tmp_path / "stopped"
    words = arguments(at(longer, run_dir))
    run = Run(words)
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert run.is_alive()
        time.sleep(0.01)
    for _ in range(3):  # launchers and schedulers send it more than once
        run.signal(signal.SIGTERM)
    outcome = run.wait()
    assert outcome.returncode == 75, outcome.stderr
    assert "stopping after this micro-batch" in outcome.stderr
    assert "SIGTERM" in outcome.stderr
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    newest = max(path.name for path in (run_dir / "checkpoints").iterdir())
    assert int(newest.removeprefix("step-")) == len(losses(run_dir))


def test_a_finished_run_repeated_changes_nothing(dropped: Config, tmp_path: Path) -> None:
    """Repeating the command of a finished run trains nothing, ends with 0 and leaves the result unchanged."""
    expected = uninterrupted(dropped, tmp_path / "run")
    again = run_command(arguments(at(dropped, tmp_path / "run")))
    assert again.returncode == 0, again.stderr
    assert result_of(tmp_path / "run") == expected


def test_another_recipe_is_refused_by_name(dropped: Config, tmp_path: Path) -> None:
    """A checkpoint with another learning rate and rank is exit 77, and the message shows both values of each."""
    uninterrupted(dropped, tmp_path / "run")
    changed = replace(
        at(dropped, tmp_path / "run"), lora=replace(dropped.lora, r=2), optim=replace(dropped.optim, lr=0.5)
    )
    outcome = run_command(arguments(changed))
    assert outcome.returncode == 77
    assert "lora.r 4 -> 2" in outcome.stderr
    assert "optim.lr 0.01 -> 0.5" in outcome.stderr
    assert "optim.schedule" not in outcome.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 77


def test_damaged_checkpoints_are_skipped_and_kept(dropped: Config, tmp_path: Path) -> None:
    """With a flipped bit in the newest, the older one is resumed to the same bits; with all damaged, exit 80."""
    expected = uninterrupted(dropped, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    damage(checkpoints / "step-0000000006" / "optimizer.safetensors")
    outcome = run_command(arguments(at(dropped, tmp_path / "run")))
    assert outcome.returncode == 0, outcome.stderr
    assert "step-0000000006 is not usable: optimizer.safetensors is damaged" in outcome.stdout
    assert "continues after step 4" in outcome.stdout
    assert result_of(tmp_path / "run") == expected
    for folder in checkpoints.glob("step-*"):
        damage(folder / "adapter_model.safetensors")
    outcome = run_command(arguments(at(dropped, tmp_path / "run")))
    assert outcome.returncode == 80
    assert len(list(checkpoints.glob("quarantine-*"))) == 3
    assert run_command(arguments(at(dropped, tmp_path / "run"))).returncode == 80  # also at the next start


def test_never_starts_again_and_keeps_the_old_run(dropped: Config, tmp_path: Path) -> None:
    """run.resume never starts fresh and keeps the old run in previous-1; must without a checkpoint is exit 80."""
    run_dir = tmp_path / "run"
    outcome = run_command([*arguments(replace(dropped, run=replace(dropped.run, dir=str(run_dir), resume="must")))])
    assert outcome.returncode == 80
    expected = uninterrupted(dropped, run_dir)
    again = run_command(arguments(replace(dropped, run=replace(dropped.run, dir=str(run_dir), resume="never"))))
    assert again.returncode == 0, again.stderr
    assert "starts fresh" in again.stdout
    assert result_of(run_dir) == expected
    assert result_of(run_dir / "previous-1") == expected


def test_checkpoints_outlive_a_lost_or_damaged_run_json(dropped: Config, tmp_path: Path) -> None:
    """With run.json lost or damaged, the same command finds the newest checkpoint, behind which nothing is left."""
    expected = uninterrupted(dropped, tmp_path / "run")
    for content in (None, "{", "[]"):
        record = tmp_path / "run" / "run.json"
        record.unlink() if content is None else record.write_text(content)
        outcome = run_command(arguments(at(dropped, tmp_path / "run")))
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        assert "this run has finished before" in outcome.stdout
        assert result_of(tmp_path / "run") == expected


def test_a_named_checkpoint_is_continued(dropped: Config, tmp_path: Path) -> None:
    """--run.resume PATH takes an older checkpoint (newer ones are set aside) or another run's; a damaged one is 80."""
    expected = uninterrupted(dropped, tmp_path / "run")
    chosen = tmp_path / "run" / "checkpoints" / "step-0000000004"
    words = arguments(replace(dropped, run=replace(dropped.run, dir=str(tmp_path / "run"), resume=str(chosen))))
    killed = run_command(words, Fault("publish", 1, "before"))
    assert killed.returncode == -signal.SIGKILL
    assert "step-0000000006 is newer than the chosen checkpoint; kept as superseded-" in killed.stdout
    outcome = run_command(arguments(at(dropped, tmp_path / "run")))
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step 4" in outcome.stdout
    assert result_of(tmp_path / "run") == expected

    elsewhere = replace(dropped, run=replace(dropped.run, dir=str(tmp_path / "other"), resume=str(chosen)))
    outcome = run_command(arguments(elsewhere))
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "other" / "final" / "adapter_model.safetensors").read_bytes() == expected["adapters"]
    outcome = run_command(arguments(elsewhere))
    assert outcome.returncode == 78
    assert "holds a run of its own" in outcome.stderr

    damage(chosen / "adapter_model.safetensors")
    outcome = run_command(arguments(replace(elsewhere, run=replace(elsewhere.run, dir=str(tmp_path / "third")))))
    assert outcome.returncode == 80
    assert "adapter_model.safetensors is damaged" in outcome.stderr


def test_another_split_of_the_same_data_is_refused(dropped: Config, tmp_path: Path) -> None:
    """Another validation_fraction gives other samples of the same files: exit 77 before the base is loaded."""
    short = replace(dropped, train=replace(dropped.train, max_steps=4))
    config = at(replace(short, data=replace(short.data, validation_fraction=0.1)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    outcome = run_command(arguments(replace(config, data=replace(config.data, validation_fraction=0.2))))
    assert outcome.returncode == 77
    assert "data.validation_fraction 0.1 -> 0.2" in outcome.stderr
    assert "loading" not in outcome.stdout


@thorough  # T14 does it in short counts
def test_the_number_of_processes_may_change(config: Config, tmp_path: Path) -> None:
    """Stopped as two processes by SIGTERM, continued as one: the samples and, closely, the losses of one process."""
    config = replace(config, train=replace(config.train, epochs=20))
    single = at(config, tmp_path / "single")
    assert run_command(arguments(single)).returncode == 0
    double = at(with_batch(config, 1, 4), tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.Popen(
        [*command, str(ROOT / "train" / "main.py"), *arguments(double)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # agent and workers, as a scheduler does
    process.wait(timeout=120)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 75
    outcome = run_command(arguments(at(config, tmp_path / "run")))
    assert outcome.returncode == 0, outcome.stderr
    assert "the layout has changed" in outcome.stdout
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("single", "run"))
    assert [row["data/sample_ids"] for row in one] == [row["data/sample_ids"] for row in two]
    first_few = zip(one[:12], two[:12], strict=True)  # later, rounding errors grow
    assert all(a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-3) for a, b in first_few)


def damage(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path)
