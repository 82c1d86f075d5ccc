"""`handloop train` runs accelerate and the trainer, and tells how it ended."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import result_of
from tests.conftest import ROOT, arguments, run_command, thorough
from train.commands import handloop, train
from train.config import Config, RunConfig

COMMAND = [sys.executable, "-c", "import sys\nfrom train.commands.handloop import main\nsys.exit(main())", "train"]


def started(config: Config, folder: Path, *words: str) -> subprocess.Popen[str]:
    config = replace(config, run=RunConfig(dir=str(folder), device="cpu"))
    return subprocess.Popen(
        [*COMMAND, *arguments(config), *words, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def told(run: subprocess.Popen[str]) -> dict[str, Any]:
    """The one document on stdout, whose code is that of the process."""
    out, said = run.communicate(timeout=120)
    document = json.loads(out)
    assert document["code"] == run.returncode, said
    return document


def launched_here(words: list[str], output: int | None) -> tuple[int, str]:
    """Instead of the launcher, which takes ten seconds to start: a fork with the trainer's words."""
    return run_command(words[words.index(str(train.MAIN)) + 1 :]).returncode or 0, ""


def test_stopped_and_repeated(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM ends it with 75 and a document; repeated it finishes in the bits of a run without a stop.

    The first start is a process with its launcher. The second leaves the launcher out; tests/project/test_wheel.py
    finishes with it, and has the reason that it passes on.
    """
    endless = replace(config, train=replace(config.train, epochs=10_000))
    run = started(endless, tmp_path / "stopped")
    metrics, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    document = told(run)
    assert (document["code"], document["name"], document["final"]) == (75, "interrupted", None)
    assert "stopped by SIGTERM" in document["reason"]
    step = document["step"]
    whole = replace(config, train=replace(config.train, max_steps=step + 2))
    monkeypatch.setattr(train, "launch", launched_here)
    again = replace(whole, run=RunConfig(dir=str(tmp_path / "stopped"), device="cpu"))
    assert handloop.main(["train", *arguments(again), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["code"], document["name"]) == (0, "finished")
    assert (document["step"], document["total_steps"], document["num_attempts"]) == (step + 2, step + 2, 2)
    assert document["final"] == str(tmp_path / "stopped" / "final")
    uninterrupted = replace(whole, run=RunConfig(dir=str(tmp_path / "whole"), device="cpu"))
    assert run_command(arguments(uninterrupted)).returncode == 0
    assert result_of(tmp_path / "stopped") == result_of(tmp_path / "whole")


@thorough  # tests/faults/test_stops.py starts two by the same launcher
def test_two_processes(config: Config, tmp_path: Path) -> None:
    """--num_processes 2 trains in two processes, also on a CPU."""
    words = ("--num_processes", "2", "--main_process_port", "0")
    document = told(started(replace(config, train=replace(config.train, max_steps=1)), tmp_path / "run", *words))
    assert (document["code"], document["step"]) == (0, 1)
    start = json.loads((tmp_path / "run" / "attempts.jsonl").read_text().splitlines()[0])
    assert start["num_processes"] == 2
