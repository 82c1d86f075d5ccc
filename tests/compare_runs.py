"""Runs of a tiny job, and the results in which interrupted and uninterrupted runs must agree."""

import json
import random
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conftest import Outcome, Run, arguments, losses, run_command
from train.checkpoints.contents import CONTENTS, MANIFEST, STATE, manifest_of
from train.config import Config
from train.track.metrics_file import read_metrics


def at(config: Config, run_dir: Path) -> Config:
    """The same run in another folder."""
    return replace(config, run=replace(config.run, dir=str(run_dir)))


def result_of(run_dir: Path) -> dict[str, bytes]:
    """Final adapters, the last checkpoint's tensors, the bits of every step's loss and gradient norm, the samples."""
    last = max((run_dir / "checkpoints").glob("step-*"))
    rows = read_metrics(run_dir / "metrics.jsonl")
    return {
        "adapters": (run_dir / "final" / "adapter_model.safetensors").read_bytes(),
        "saved": last.name.encode() + (last / "adapter_model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "losses": repr(losses(run_dir)).encode(),
        "samples": repr([(row["step"], row.get("data/sample_ids")) for row in rows]).encode(),
    }


def reference(config: Config, run_dir: Path) -> dict[str, bytes]:
    """The result of the uninterrupted run."""
    outcome = run_command(arguments(at(config, run_dir)))
    assert outcome.returncode == 0, outcome.stderr
    return result_of(run_dir)


_RESULTS: dict[str, dict[str, bytes]] = {}


def known_reference(config: Config) -> dict[str, bytes]:
    """The same for a test that needs no folder of it: run once, in its own, for all tests of this process."""
    name = repr(at(config, Path()))
    if name not in _RESULTS:
        with tempfile.TemporaryDirectory() as folder:
            _RESULTS[name] = reference(config, Path(folder) / "run")
    return _RESULTS[name]


def killed_at_random(words: list[str], draw: random.Random, seconds: float) -> Outcome:
    """Starts a run and kills it within `seconds`, unless it ends before."""
    run = Run(words)
    limit = time.monotonic() + draw.uniform(0, seconds)
    while run.is_alive() and time.monotonic() < limit:
        time.sleep(0.005)
    if run.is_alive():
        run.signal(signal.SIGKILL)
    return run.wait()


def finish(words: list[str]) -> Outcome:
    """Starts the run again and lets it finish."""
    outcome = run_command(words)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome


def start_processes(words: list[str], faults: Sequence[Callable[[], None] | None], on_gpus: bool = False) -> list[Run]:
    """One process for each entry of `faults`, as torchrun would start them on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(len(faults)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world |= {"ACCELERATE_USE_CPU": "" if on_gpus else "true", "LOCAL_WORLD_SIZE": str(len(faults))}
    return [Run(words, fault, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank, fault in enumerate(faults)]


def exit_record(run_dir: Path) -> dict[str, object]:
    """The content of exit.json."""
    return json.loads((run_dir / "exit.json").read_text())


def wait_for_rows(run: Run, run_dir: Path, number: int) -> bool:
    """Waits for `number` rows in metrics.jsonl; False if the run ends before. `run_dir` must be empty at the start."""
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= number):
        if not run.is_alive():
            return False
        time.sleep(0.005)
    return True


def change_states(run_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites trainer_state.json of every checkpoint, and its manifest."""
    for folder in (run_dir / "checkpoints").glob("step-*"):
        state = json.loads((folder / STATE).read_bytes())
        change(state)
        (folder / STATE).write_text(json.dumps(state))
        uid = json.loads((folder / MANIFEST).read_bytes())["run_uid"]
        contents = {name: (folder / name).read_bytes() for name in CONTENTS}
        (folder / MANIFEST).write_bytes(manifest_of(contents, state["step"], uid))
