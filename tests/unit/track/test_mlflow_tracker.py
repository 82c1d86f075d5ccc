"""A real MLflow server, with its database, has every step of a run once, whatever became of its attempts."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import told
from tests.conftest import arguments, losses, run_command
from tests.fake_wandb import blackhole
from train.config import Config, TrackConfig
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.track.isolated import Isolated
from train.track.mlflow_tracker import MLflow
from train.track.trackers import wanted_listeners

HAS_CLIENT = importlib.util.find_spec("mlflow") is not None
HAS_SERVER = HAS_CLIENT and all(importlib.util.find_spec(name) for name in ("flask", "sqlalchemy", "alembic"))
needs_client = pytest.mark.skipif(not HAS_CLIENT, reason="needs the extra `mlflow`")
needs_server: Any = pytest.mark.skipif(not HAS_SERVER, reason="needs mlflow's server: pip install mlflow")
START_SECONDS = 120.0  # it imports for some seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow server` with an sqlite database."""
    folder = tmp_path_factory.mktemp("mlflow")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "store")]
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        settings = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(words, stdout=log, stderr=log, env=settings, cwd=folder, start_new_session=True)
        try:
            limit = time.monotonic() + START_SECONDS
            while not _answers(address):
                is_coming = process.poll() is None and time.monotonic() < limit
                assert is_coming, (folder / "log").read_text()
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def _answers(address: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    return False


def at(config: Config, place: str) -> Config:
    return replace(config, track=TrackConfig(wandb="off", mlflow=place))


def client(address: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(address)


def run_of(address: str, config: Config) -> Any:
    """The run at the server."""
    identity = json.loads((Path(config.run.dir) / "run.json").read_text())["mlflow_id"]
    return client(address).get_run(identity)


def history(address: str, config: Config) -> Counter[tuple[str, int, float]]:
    """(name, step, value) of every point of every metric that a row has."""
    run, asked = run_of(address, config), client(address)
    names = [name for name in run.data.metrics if name in {name for row in told.ROWS for name in row}]
    points = [point for name in names for point in asked.get_metric_history(run.info.run_id, name)]
    return Counter((point.key, point.step, point.value) for point in points)


def expected(last: int) -> Counter[tuple[str, int, float]]:
    rows = told.numbers(told.ROWS[: last + 1])
    return Counter((name, row["step"], float(row[name])) for row in rows for name in row if name != "step")


@pytest.mark.slow
@needs_server
def test_every_step_is_there_once_after_kills(server: str, config: Config) -> None:
    """One run at the server, with each step from 0 on once, its tables, its options and how it ended."""
    watched = at(config, server)
    told.attempt(watched, 0, 4, "killed")
    told.attempt(watched, 3, 6, "late")
    assert run_of(server, watched).info.status == "RUNNING"
    told.attempt(watched, 5, 6, "saved")
    assert run_of(server, watched).info.status == "KILLED"
    assert history(server, watched) == expected(6)
    extended = replace(watched, train=replace(config.train, epochs=9))
    told.attempt(extended, 7, 7, "late")
    said = told.attempt(extended, 7, 7)  # the server has it all
    run = run_of(server, watched)
    assert f"MLflow: run {run.info.run_id}\n" in said
    assert run.info.status == "FINISHED"
    assert history(server, watched) == expected(told.LAST)
    assert run.data.metrics["best/eval_loss"] == 3.0
    assert run.data.metrics["best/step"] == 4
    assert run.data.params["lora.r"] == "4"
    assert (run.data.params["train.epochs"], run.data.tags["now/train.epochs"]) == ("2", "9")
    assert "pairs.jsonl" not in str(run.data.params | run.data.tags)
    assert not [name for name in run.data.tags if "source" in name or "user" in name]
    held = [each.path for each in client(server).list_artifacts(run.info.run_id, "samples")]
    steps = [f"samples/validation-step-{step:010}.json" for step in told.VALIDATED]
    assert held == [f"samples/answers-step-{told.LAST:010}.json", *steps]
    assert client(server).get_experiment(run.info.experiment_id).name == "handloop"
    told.attempt(watched, 7, 7)  # what was changed is changed back
    assert run_of(server, watched).data.tags["now/train.epochs"] == "2"


@pytest.mark.slow
@needs_server
def test_a_failed_run_is_one(server: str, config: Config) -> None:
    """Neither finished nor stopped: FAILED; the experiment and the name are those of the variables."""
    names = {"MLFLOW_EXPERIMENT_NAME": "mine", "MLFLOW_RUN_NAME": "first", "MLFLOW_TRACKING_URI": server}
    told.attempt(at(config, "on"), 0, 2, "failed", **names)
    run = run_of(server, config)
    assert (run.info.status, run.info.run_name) == ("FAILED", "first")
    assert client(server).get_experiment(run.info.experiment_id).name == "mine"


@pytest.mark.slow
@needs_server
def test_the_bits_are_those_of_a_run_without_it(server: str, config: Config, tmp_path: Path) -> None:
    """A whole run, watched, watched in vain and not: the same losses, and the server has them."""
    watched = at(config, server)
    outcome = run_command(arguments(watched))
    assert outcome.returncode == 0, outcome.stderr
    plain = replace(config, run=replace(config.run, dir=str(tmp_path / "plain")))
    assert run_command(arguments(plain)).returncode == 0
    assert losses(Path(watched.run.dir)) == losses(tmp_path / "plain")
    seen = sorted(step for name, step, _ in history(server, watched).elements() if name == "train/loss")
    assert seen == [step for step, _, _ in losses(tmp_path / "plain")]
    assert run_of(server, watched).info.status == "FINISHED"


def test_a_silent_server_does_not_keep_a_checkpoint_waiting(
    config: Config, tmp_path: Path, hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a new run is asked for, others get their ids out of run.json: a checkpoint needs the run's."""
    silent: Any = ModuleType("mlflow")
    asked = threading.Event()

    class Silent:
        def __init__(self, place: str) -> None:
            """Connects to nothing yet."""

        def get_experiment_by_name(self, name: str) -> None:
            asked.set()
            hang()
            raise ConnectionError

    silent.MlflowClient = Silent
    monkeypatch.setitem(sys.modules, "mlflow", silent)
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    Isolated(MLflow(at(config, "http://127.0.0.1:9")), "uid", metrics)
    assert asked.wait(10)
    began = time.monotonic()
    assert RunFolder.of(config).identifier("run_uid", lambda: "mine") == "mine"
    assert time.monotonic() - began < 5


def impatient() -> None:
    """Shortens the wait at the end."""
    from train.track import isolated

    isolated.PATIENCE_SECONDS = 2.0


@pytest.mark.slow
@needs_client
@pytest.mark.parametrize("kind", ["silent", "unreachable"])
def test_a_server_that_does_not_answer_costs_seconds(kind: str, config: Config, tmp_path: Path) -> None:
    """Exit 0, every row in metrics.jsonl, and one line that says where they are."""
    with blackhole() as silent:
        place = silent if kind == "silent" else "http://127.0.0.1:9"
        outcome = run_command(arguments(at(config, place)), impatient)
    assert outcome.returncode == 0, outcome.stderr
    (line,) = [line for line in outcome.stdout.splitlines() if line.startswith("MLflow")]
    assert line == f"MLflow: no answer within 2 s; all metrics are in {config.run.dir}/metrics.jsonl"
    assert [step for step, _, _ in losses(Path(config.run.dir))] == [1, 2, 3, 4, 5, 6]
    assert "Traceback" not in outcome.stderr


def test_a_missing_package_is_said_before_training(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """78 with the command that installs it; without a server it needs a database as well."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExitWith, match=r"pip install -c constraints\.txt -e '\.\[mlflow\]'") as refused:
        wanted_listeners(at(config, "on"))
    assert refused.value.code == ExitCode.BAD_INPUT
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == "mlflow" else None)
    with pytest.raises(ExitWith, match="set MLFLOW_TRACKING_URI to the server"):
        wanted_listeners(at(config, "on"))
    assert [each.name for each in wanted_listeners(at(config, "http://127.0.0.1:9"))] == ["MLflow"]


def test_an_address_is_one_and_holds_no_password(config: Config) -> None:
    """Other words are refused with an example; a password is refused and not repeated."""
    assert "write off, on, or an address such as http://" in " ".join(at(config, "yes").problems())
    (problem,) = at(config, "https://me:c4nary@host/").problems()
    assert "MLFLOW_TRACKING_PASSWORD" in problem
    assert "c4nary" not in problem
    for place in ("off", "on", "databricks", "http://host:5000", "sqlite:////tmp/a.db"):
        assert at(config, place).problems() == []
