"""What Weights & Biases records of a run: each step, table, alert and number once, whatever became of its attempts."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import told
from tests.conftest import arguments, run_command, thorough
from tests.fake_wandb import FakeServer, blackhole, environment, recorded_rows, records
from train.config import Config, TrackConfig
from train.track.weights_and_biases import RECORD_SECONDS, WeightsAndBiases

OFFLINE = environment("", key="")


@pytest.fixture
def watched(config: Config) -> Config:
    return replace(config, track=TrackConfig(wandb="offline"))


def record_of(config: Config) -> Path:
    """The .wandb file that is to be uploaded."""
    (found,) = (Path(config.run.dir) / "wandb").glob("offline-run-*/run-*.wandb")
    return found


def kinds(record: Path) -> dict[str, list[Any]]:
    """The records by their kind."""
    found: dict[str, list[Any]] = {}
    for each in records(record):
        kind = each.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(each, kind))
    return found


def summary_in(record: Path) -> dict[str, Any]:
    """The summary as it is at the record's end."""
    updates = [update for each in kinds(record).get("summary", []) for update in each.update]
    return {"/".join(each.nested_key) or each.key: json.loads(each.value_json) for each in updates}


def test_an_offline_record_has_everything_once_after_kills(watched: Config) -> None:
    """Killed twice, saved, finished: rows from step 0 on, validation tables, the summary, and older records aside."""
    told.attempt(watched, 0, 4, "killed", **OFFLINE)
    told.attempt(watched, 3, 6, "late", **OFFLINE)
    told.attempt(watched, 5, 6, "saved", **OFFLINE)
    saved = kinds(record_of(watched))
    assert len(saved["preempting"]) == 1
    assert saved["exit"][0].exit_code == 75
    said = told.attempt(watched, 7, 7, **OFFLINE)
    record = record_of(watched)
    assert f"handloop sync {watched.run.dir}\n" in said
    rows = recorded_rows(record)
    plain = [{name: row[name] for name in row if not name.startswith(("_", "samples/"))} for row in rows]
    assert plain == told.numbers()
    assert [row["_step"] for row in rows] == list(range(told.LAST + 1))
    tables = {row["step"]: row["samples/validation/nrows"] for row in rows if "samples/validation/nrows" in row}
    assert tables == dict.fromkeys(told.VALIDATED, 2)
    assert [row["step"] for row in rows if "samples/answers/nrows" in row] == [told.LAST]
    found, summary = kinds(record), summary_in(record)
    assert found["exit"][0].exit_code == 0
    assert "preempting" not in found
    assert {name: summary[name] for name in ("best/eval_loss", "best/step", "total/steps", "total/tokens")} == {
        "best/eval_loss": 3.0,
        "best/step": 4,
        "total/steps": 7,
        "total/tokens": 2800,
    }
    assert summary["mean/tokens_per_second"] == 1300.0  # of steps 6 and 7
    assert summary["peak/reserved_gib"] == 4.0


def test_axes_and_summaries_are_defined(watched: Config) -> None:
    """Every metric is drawn over our step, which is not drawn itself; the validation loss is kept with its minimum."""
    told.attempt(watched, 0, 1, **OFFLINE)
    defined = {each.name or each.glob_name: each for each in kinds(record_of(watched))["metric"]}
    assert defined["step"].options.hidden
    assert defined["*"].step_metric == defined["eval/loss"].step_metric == "step"
    assert defined["eval/loss"].summary.min
    assert defined["memory/peak_reserved_gib"].summary.max


class FakeRun:
    """Notes alerts, and takes rows of numbers alone."""

    starting_step = 0

    def __init__(self) -> None:
        self.alerts: list[tuple[str, str]] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        if not all(isinstance(value, int | float) for value in row.values()):
            raise TypeError("no tables here")

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text))


def test_alerts_come_once_a_kind(watched: Config) -> None:
    """A skipped step, a save that failed, a standstill: one each, without a warning's words."""
    listener, run = WeightsAndBiases(watched, "offline"), FakeRun()
    listener.run, bad = run, {"train/skipped": 1, "perf/failed_saves": 2}
    listener.log({"step": 1, "perf/failed_saves": 0})
    assert run.alerts == []
    for step in (2, 3):
        listener.log({"step": step, **bad})
    for seconds in (5.0, 60 * watched.run.timeout_minutes + 1, 60 * watched.run.timeout_minutes + 6):
        listener.idle(seconds)
    assert [title for title, _ in run.alerts] == [
        "A step was skipped (test)",
        "A checkpoint could not be saved (test)",
        "Training stands still (test)",
    ]
    assert run.alerts[0][1] == "step 2: its loss or gradient was not finite"
    assert all(len(title) < 64 for title, _ in run.alerts)  # W&B's limit


def test_a_server_without_artifacts_costs_the_tables(watched: Config) -> None:
    """A table that cannot be sent does not end the record; the end says which error it was."""
    listener, run = WeightsAndBiases(watched, "online"), FakeRun()
    listener.run = run
    listener.table("validation", [{"step": 0, "now": "a bolt"}])
    listener.log({"step": 1})
    assert listener.lost_tables == "TypeError: no tables here"


def test_an_alert_is_in_the_record(watched: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's client takes what we give it."""
    monkeypatch.setattr(told, "ROWS", [{"step": 0}, {"step": 1, "train/skipped": 1}, {"step": 2}])
    told.attempt(watched, 0, 2, **OFFLINE)
    assert [each.title for each in kinds(record_of(watched))["alert"]] == ["A step was skipped (test)"]


@pytest.mark.slow
def test_a_whole_run_is_recorded_with_its_plan_audit_and_adapter(watched: Config) -> None:
    """Plan and audit as tables of counts, and final/ as an artifact with what it was made of, but no path of ours."""
    asked = replace(watched, track=replace(watched.track, wandb_artifact=True))
    variables = {"WANDB_TAGS": "one,two", "WANDB_RUN_GROUP": "night", **OFFLINE}
    outcome = run_command(arguments(asked), None, **variables)
    assert outcome.returncode == 0, outcome.stderr
    record = record_of(asked)
    found, summary = kinds(record), summary_in(record)
    assert summary["run/plan"]["_type"] == summary["run/audit"]["_type"] == "table-file"
    tables = {path.stem.split("_")[0]: json.loads(path.read_text()) for path in record.parent.rglob("*.table.json")}
    audit = {row[0]: row[1] for row in tables["audit"]["data"]}
    assert audit["rows"] == 19
    assert ["engine", "reference"] in tables["plan"]["data"]
    assert "pairs" not in str(tables)
    (run,) = found["run"]
    assert (sorted(run.tags), run.run_group) == (["one", "two"], "night")
    (artifact,) = [each for each in found["artifact"] if each.type == "model"]
    facts = json.loads(artifact.metadata)
    assert facts["base"] == Path(asked.model.name_or_path).name
    assert facts["config"]["lora"]["r"] == 4
    assert str(Path(asked.run.dir).parent) not in artifact.metadata
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {each.path for each in artifact.manifest.contents}
    assert Counter(row["step"] for row in recorded_rows(record)) == Counter(range(1, 7))


def test_online_that_cannot_start_becomes_an_offline_record(config: Config) -> None:
    """A server that refuses: an offline record under the same id, with each step, and one line that says why."""
    online = replace(config, track=TrackConfig(wandb="online"))
    with FakeServer(401) as server:
        said = told.attempt(online, 0, told.LAST, **environment(server.url))
    record = record_of(online)
    (line,) = [line for line in said.splitlines() if "Weights & Biases" in line]
    assert "could not be reached (" in line
    assert "401" in line
    assert line.endswith(f"recorded offline; to upload it: handloop sync {online.run.dir}")
    assert [row["step"] for row in recorded_rows(record)] == list(range(told.LAST + 1))
    identity = json.loads((Path(online.run.dir) / "run.json").read_text())["wandb_id"]
    assert record.name == f"run-{identity}.wandb"


def test_a_run_that_is_over_first_waits_for_its_record(config: Config) -> None:
    """Until there is a record, the end takes the seconds of an offline one; then none."""
    listener = WeightsAndBiases(replace(config, track=TrackConfig(wandb="online")), "online")
    assert listener.extra_seconds() == RECORD_SECONDS > 3
    listener.has_begun = True
    assert listener.extra_seconds() == 0


@thorough  # test_watchers.py has a silent server, the test before the last one the record of each step
def test_a_short_run_without_an_answer_keeps_its_steps(config: Config) -> None:
    """Two steps, a wrong key, a server that is silent: the run waits, and its offline record has both steps."""
    online = replace(config, track=TrackConfig(wandb="online"))
    with blackhole() as url:
        said = told.attempt(online, 1, 2, **environment(url, key="f" * 40))
    record = record_of(online)
    assert [row["step"] for row in recorded_rows(record)] == [1, 2]
    assert re.search(r"could not be reached \(.*recorded offline; to upload it: handloop sync", said)


@pytest.mark.slow
def test_a_server_has_step_0_once(config: Config) -> None:
    """Killed and resumed online: each row from step 0 on is there once, in one run."""
    online = replace(config, track=TrackConfig(wandb="online"))
    with FakeServer() as server:
        told.attempt(online, 0, 0, "late", **environment(server.url))
        told.attempt(online, 1, 6, "late", **environment(server.url))
        told.attempt(online, 5, 7, "saved", **environment(server.url))
    assert [row["step"] for row in server.rows] == list(range(told.LAST + 1))
    assert len(server.names) == 1
    assert [row["step"] for row in server.rows if "samples/validation" in row] == list(told.VALIDATED)


@pytest.mark.slow
def test_what_a_server_has_in_part_gets_no_second_record(config: Config) -> None:
    """A resumed run whose server is gone: it says so, and the next attempt sends what is missing there."""
    online = replace(config, track=TrackConfig(wandb="online"))
    with FakeServer() as server:
        told.attempt(online, 0, 3, "saved", **environment(server.url))
        server.status = 401
        assert "stopped recording (CommError: " in told.attempt(online, 4, 5, "saved", **environment(server.url))
        assert not list((Path(online.run.dir) / "wandb").glob("offline-run-*"))
        server.status = 200
        told.attempt(online, 6, 7, "saved", **environment(server.url))
    assert [row["step"] for row in server.rows] == list(range(told.LAST + 1))


def test_a_sweep_s_agent_names_the_run(config: Config) -> None:
    """With WANDB_SWEEP_ID the run takes the id that the agent has given it, and goes on under it when resumed."""
    online = replace(config, track=TrackConfig(wandb="online"))
    agent = {"WANDB_SWEEP_ID": "a-sweep", "WANDB_RUN_ID": "agents-run"}
    with FakeServer() as server:
        told.attempt(online, 0, 3, "saved", **environment(server.url), **agent)
        told.attempt(online, 4, 5, "saved", **environment(server.url))
    assert server.names == {"agents-run"}
    sent = b"".join(server.bodies)
    assert b'"sweep":"a-sweep"' in sent
    assert b'"project":"handloop"' in sent
    assert set(re.findall(rb'"(?:host|program)":("[^"]*"|null)', sent)) <= {b"null", b'""', b'"train/main.py"'}
    assert [row["step"] for row in server.rows] == list(range(6))
