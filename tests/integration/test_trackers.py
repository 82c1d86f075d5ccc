"""Weights & Biases never prompts, stops, changes or delays a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from tests.conftest import arguments, losses, run_command, thorough
from train.config import Config, TrackConfig
from train.track.metrics_file import MetricsFile, read_metrics
from train.track.weights_and_biases import wandb_mode


def watched(config: Config, run_dir: Path, mode: Literal["auto", "online", "offline", "off"] = "auto") -> Config:
    return replace(config, track=TrackConfig(wandb=mode), run=replace(config.run, dir=str(run_dir)))


def test_without_a_key_it_records_offline_and_says_how_to_sync(config: Config, tmp_path: Path) -> None:
    """Without key and terminal the run records offline, and has the bits of a run without W&B."""
    keyless = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "no-netrc"), "HOME": str(tmp_path), "WANDB_MODE": ""}
    outcome = run_command(arguments(watched(config, tmp_path / "with")), **keyless)
    assert outcome.returncode == 0, outcome.stderr
    assert "handloop sync" in outcome.stdout
    records = list((tmp_path / "with" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 1
    content = records[0].read_bytes()
    assert b"train/loss" in content
    plain = run_command(arguments(watched(config, tmp_path / "without", "off")))
    assert plain.returncode == 0
    assert not (tmp_path / "without" / "wandb").exists()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_the_record_continues_under_the_same_id(config: Config, tmp_path: Path) -> None:
    """A repeated command uses the id in run.json, and metrics.jsonl has each step once."""
    config = watched(config, tmp_path / "run", "offline")
    first = run_command(arguments(replace(config, train=replace(config.train, epochs=2))))
    assert first.returncode == 0, first.stderr
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["wandb_id"]
    again = run_command(arguments(config))
    assert again.returncode == 0, again.stderr
    records = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {record.name for record in records} == {f"run-{identity}.wandb"}
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


@thorough  # T19 does it in short counts
def test_an_unreachable_server_costs_seconds_and_no_bit(config: Config, tmp_path: Path) -> None:
    """Online with a key but no server: exit 0, the same losses, and a message that says where the metrics are."""
    environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_MODE": ""}
    outcome = run_command(arguments(watched(config, tmp_path / "with", "online")), **environment)
    assert outcome.returncode == 0, outcome.stderr
    assert "metrics.jsonl" in outcome.stdout
    plain = run_command(arguments(watched(config, tmp_path / "without", "off")))
    assert plain.returncode == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_paths_and_names_are_not_sent(config: Config, tmp_path: Path) -> None:
    """Nothing sent to Weights & Biases names a file, folder or argument of this machine."""
    outcome = run_command(arguments(watched(config, tmp_path / "canary-folder", "offline")))
    assert outcome.returncode == 0, outcome.stderr
    (record,) = (tmp_path / "canary-folder" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content
    assert b"pairs.jsonl" not in content
    assert b"canary-folder" not in content


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"WANDB_API_KEY": "k"}, "online"), ({}, "offline"), ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "k"}, "off")],
)
def test_mode(
    environment: dict[str, str], expected: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is online with a key, offline without one, and off if the user has disabled W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(watched(config, tmp_path)) == expected


def test_a_key_in_netrc_is_found(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb login` writes the key to netrc, where it is found."""
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n login user\n password key\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb_mode(watched(config, tmp_path)) == "online"


def test_a_file_that_lost_rows_goes_on_with_whole_ones(tmp_path: Path) -> None:
    """Shorter than at the checkpoint, and cut within a row: the next one is a line of its own."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    file = MetricsFile(tmp_path / "metrics.jsonl", 500)
    file.log({"step": 3})
    file.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_metrics_of_a_lost_attempt_are_cut(tmp_path: Path) -> None:
    """Rows behind the checkpoint's length, and half a line, go."""
    kept = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(kept + '{"step": 3}\n{"step": 4, "tr')
    file = MetricsFile(tmp_path / "metrics.jsonl", len(kept))
    file.log({"step": 3})
    assert file.durable_bytes() == len(kept) + len('{"step": 3}\n')
    file.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
