"""With Weights & Biases absent, silent, refusing, dying or hanging, the run is unaffected and reports it once."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.compare_runs import wait_for_rows
from tests.conftest import Run, arguments, losses, thorough
from tests.fake_wandb import FakeServer, WatcherFault, blackhole, environment, recorded_rows, records, services_of
from tests.tally import Tally
from train.config import CheckpointConfig, Config, TrackConfig
from train.track.isolated import PATIENCE_SECONDS
from train.track.metrics_file import read_metrics

MODES = Literal["auto", "online", "offline", "off"]
MAX_ADDED_SECONDS = 20.0
SHORT_PATIENCE = 2.0
NUM_STEPS = 90
NO_ANSWER = r"no answer within|could not be reached"  # within the patience of the run, or of the client


@dataclass(frozen=True)
class Case:
    """A way in which Weights & Biases fails, and what the run must print about it."""

    name: str
    said: str  # a pattern
    server: Callable[[], AbstractContextManager[Any]] = nullcontext  # none: recorded offline
    what: str = ""
    block: Callable[[Path], object] = field(default=lambda run_dir: None)  # done to the run folder first


def file_in_the_way(run_dir: Path) -> None:
    """Puts a file where the wandb folder should be."""
    (run_dir / "wandb").write_text("")


def folder_that_refuses(run_dir: Path) -> None:
    """Makes the wandb folder one in which not even root can create files."""
    (run_dir / "wandb").symlink_to("/proc")


CASES = {
    "unavailable": [
        Case("not installed", "ModuleNotFoundError", what="absent"),
        Case("no key", "recorded offline; to upload it: handloop sync "),
    ],
    "silent": [
        Case("blackhole", NO_ANSWER, blackhole),
        Case("unreachable", NO_ANSWER, lambda: nullcontext("http://127.0.0.1:9")),
    ],
    "refusing": [
        Case("401", "returned error 401", lambda: FakeServer(401)),
        Case("429", NO_ANSWER, lambda: FakeServer(429)),
        Case("500", NO_ANSWER, lambda: FakeServer(500)),
    ],
    "dying": [
        Case("service killed, offline", "stopped recording", what="service killed"),
        Case("service killed, online", "stopped recording", FakeServer, what="service killed"),
    ],
    "raising": [Case("log raises", r"stopped recording \(RuntimeError: a bad day\)", what="log raises")],
    "hanging": [
        Case("service hangs", NO_ANSWER, what="service hangs"),
        Case("no answer to the last rows", NO_ANSWER, lambda: FakeServer(is_silent_stream=True)),
        Case("finish hangs", NO_ANSWER, what="finish hangs"),
    ],
    "unwritable": [
        Case("refusing folder", "stopped recording", block=folder_that_refuses),
        Case("file in the way", "stopped recording", block=file_in_the_way),
    ],
}
# what refuses is also in tests/unit/track/test_weights_and_biases.py: the error, and an offline record of each step
MARKS = {"refusing": thorough}
FULL_ONLY = {"silent": 1, "refusing": 2, "dying": 1, "hanging": 2, "unwritable": 1}  # cases at each list's end


def watched(config: Config, run_dir: Path, mode: MODES) -> list[str]:
    """The command line of a run with Weights & Biases in `mode`."""
    run_dir.mkdir(exist_ok=True)
    config = replace(config, track=TrackConfig(wandb=mode), run=replace(config.run, dir=str(run_dir)))
    return arguments(config)


ALONE: list[
    tuple[list[tuple[int, str, str]], float]
] = []  # losses and seconds of the run without W&B, which is made once


def alone(config: Config, folder: Path) -> tuple[list[tuple[int, str, str]], float]:
    """The losses and the seconds of a run with --track.wandb off."""
    if not ALONE:
        began = time.monotonic()
        outcome = Run(watched(config, folder / "alone", "off"), WatcherFault()).wait()
        assert outcome.returncode == 0, outcome.stderr
        ALONE.append((losses(folder / "alone"), time.monotonic() - began))
        assert [step for step, _, _ in ALONE[0][0]] == [1, 2, 3, 4, 5, 6]
    return ALONE[0]


@pytest.mark.fault("T19")
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in CASES])
def test_weights_and_biases_cannot_reach_training(kind: str, config: Config, tmp_path: Path, tally: Tally) -> None:
    """Exit 0, the same bits and rows as without it, at most 20 s more, no process left, and one line about it."""
    expected, seconds_alone = alone(config, tmp_path)
    cases = CASES[kind]
    for number, case in enumerate(cases[: tally.times(len(cases) - FULL_ONLY.get(kind, 0), len(cases))]):
        run_dir = tmp_path / f"run-{number}"
        run_dir.mkdir()
        case.block(run_dir)
        # only without an expected answer, for which a busy machine may need longer
        patience = SHORT_PATIENCE if case.said == NO_ANSWER and not tally.full else 0.0
        with case.server() as server:
            url = getattr(server, "url", server) or ""
            settings = environment(url) if url else environment("", key="")
            began = time.monotonic()
            run = Run(watched(config, run_dir, "auto"), WatcherFault(case.what, patience), **settings)
            outcome = run.wait()
            added = time.monotonic() - began - seconds_alone
        lines = [line for line in (outcome.stdout + outcome.stderr).splitlines() if "Weights & Biases" in line]
        said = " ".join(lines)
        label = f"{case.name} ({added:.1f} s more): exit {outcome.returncode}, {lines}, {outcome.stderr[-300:]}"
        tally.check(outcome.returncode == 0, label)
        tally.check(losses(run_dir) == expected, f"{case.name}: other losses or rows")
        tally.check(added <= MAX_ADDED_SECONDS, label)
        tally.check(len(lines) == 1 and re.search(case.said, said), label)
        tally.check("recorded offline" in said or str(run_dir / "metrics.jsonl") in said, label)
        tally.check("Traceback" not in outcome.stderr, label)
        tally.check(json.loads((run_dir / "exit.json").read_text())["code"] == 0, f"{case.name}: exit.json")
        tally.check(not services_of(run.process.pid), f"{case.name}: its service process is still alive")


def test_the_wait_fits_into_what_is_promised() -> None:
    """Runs with the short patience say nothing about the real one."""
    assert PATIENCE_SECONDS <= MAX_ADDED_SECONDS - 5


def long_run(config: Config) -> Config:
    """A run of NUM_STEPS steps (two seconds) that nearly always has rows after its newest checkpoint."""
    return replace(config, train=replace(config.train, epochs=NUM_STEPS // 3), checkpoint=CheckpointConfig(every=7))


def kill_after(words: list[str], run_dir: Path, rows: int, settings: dict[str, str]) -> None:
    """Starts the run and kills it when metrics.jsonl has `rows` rows."""
    run = Run(words, None, **settings)
    assert wait_for_rows(run, run_dir, rows), run.wait().stderr
    run.signal(signal.SIGKILL)
    run.wait()


@pytest.mark.fault("T20")
def test_offline_records_of_a_killed_run_hold_each_step_once(config: Config, tmp_path: Path, tally: Tally) -> None:
    """After several kills there is one run id, and the record to upload has every step of metrics.jsonl once."""
    run_dir, settings = tmp_path / "run", environment("", key="")
    words = watched(long_run(config), run_dir, "auto")
    draw, kills = random.Random(20), tally.times(1, 5)
    stops = sorted(draw.sample(range(10, NUM_STEPS - 10), kills))
    for rows in stops:
        kill_after(words, run_dir, rows, settings)
    outcome = Run(words, None, **settings).wait()
    tally.check(outcome.returncode == 0, f"killed after {stops}: {outcome.stderr[-300:]}")
    identity = json.loads((run_dir / "run.json").read_text())["wandb_id"]
    everything = list((run_dir / "wandb").rglob("*.wandb"))
    for path in everything:
        ids = {record.run.run_id for record in records(path) if record.WhichOneof("record_type") == "run"}
        tally.check(path.name == f"run-{identity}.wandb" and ids <= {identity}, f"killed after {stops}: {path}, {ids}")
    to_upload = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(to_upload) == 1, to_upload
    assert f"handloop sync {run_dir}\n" in outcome.stdout
    sent = [(row["step"], row["train/loss"]) for row in recorded_rows(to_upload[0] / f"run-{identity}.wandb")]
    kept = [(row["step"], row["train/loss"]) for row in read_metrics(run_dir / "metrics.jsonl")]
    assert [step for step, _ in kept] == list(range(1, NUM_STEPS + 1))
    tally.check(sent == kept, f"killed after {stops}: sent {[step for step, _ in sent]}")
    if tally.full:
        tally.check(uploaded(to_upload[0]) == [step for step, _ in kept], f"killed after {stops}: wandb sync")


def uploaded(record: Path) -> list[int]:
    """The steps that a server receives from `wandb sync` of `record`."""
    with FakeServer() as server:
        clean = {name: value for name, value in environment(server.url).items() if value}
        command = [str(Path(sys.executable).with_name("wandb")), "sync", "--yes", str(record)]
        path = {"PATH": "/usr/bin:/bin", "HOME": str(record)}
        subprocess.run(command, env=clean | path, check=True, capture_output=True, timeout=120)
        return [row["step"] for row in server.rows]


@pytest.mark.fault("T20")
def test_a_server_gets_each_step_of_a_killed_run_once(config: Config, tmp_path: Path, tally: Tally) -> None:
    """After kills while rows are being sent, the server has one run with every step once, and none was sent twice."""
    run_dir, draw = tmp_path / "run", random.Random(21)
    words = watched(long_run(config), run_dir, "auto")
    with FakeServer() as server:
        stops = sorted(draw.sample(range(NUM_STEPS // 2, NUM_STEPS - 10), tally.times(1, 5)))
        on_server = []
        for rows in stops:
            kill_after(words, run_dir, rows, environment(server.url))
            on_server.append(len(server.rows))
        outcome = Run(words, None, **environment(server.url)).wait()
    label = f"killed after {stops}, when the server had {on_server}"
    tally.check(outcome.returncode == 0, f"{label}: {outcome.stderr[-300:]}")
    identity = json.loads((run_dir / "run.json").read_text())["wandb_id"]
    tally.check(server.names == {identity}, f"{label}: {server.names}, not {identity}")
    kept = [(row["step"], row["train/loss"]) for row in read_metrics(run_dir / "metrics.jsonl")]
    assert [step for step, _ in kept] == list(range(1, NUM_STEPS + 1))
    tally.check([(row["step"], row["train/loss"]) for row in server.rows] == kept, f"{label}: other rows")
    tally.check(server.num_rows_received == len(kept), f"{label}: {server.num_rows_received} rows were sent")
