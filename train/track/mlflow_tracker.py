"""MLflow: a run at a tracking server, or in the database that its client keeps."""

import importlib.util
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from train.bundled import how_to_install
from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object
from train.run.redact import first_line, redact
from train.track.isolated import VALIDATION, Listener, Row
from train.track.metrics_file import read_metrics
from train.track.shared import ABOUT, flat_config, summary_of, table_key

IDENTIFIER = "mlflow_id"  # in run.json
MAX_METRICS = 1000  # in a request, by the server's limit
MAX_PARAMS = 100
SEND_SECONDS = 5.0  # between two requests: a request takes tens of milliseconds, as long as a quick step
ON_EVERY_ROW = "epoch"  # the metric by which the server is asked which steps it has
STATUS = {ExitCode.FINISHED: "FINISHED", ExitCode.INTERRUPTED: "KILLED"}  # any other end: FAILED
SAMPLES = table_key("").rstrip("/")  # folder of the steps' tables among the run's artifacts


class MLflow(Listener):
    """Goes on in the run whose id is in run.json.

    A step's metrics are in one request, which the server takes whole or not at all, and the history of one of them says
    which steps it has. Repeated requests carry the same times, by which the server knows them.
    """

    name = "MLflow"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder.of(config)
        self.client: Any = None
        self.run_id = ""
        self.step = 0  # of the last row
        self.waiting: list[Any] = []  # metrics that are not sent yet
        self.last_sent = 0.0
        self.lost_tables = ""  # why the artifact store took none
        if os.environ.get("MLFLOW_RUN_ID"):
            decided = "the run has an id of its own, under which it goes on when it is resumed"
            self.notes = (f"{self.name}: MLFLOW_RUN_ID has no effect: {decided}",)

    @classmethod
    def wanted(cls, config: Config) -> "MLflow | None":
        """The listener, if it is asked for; raises ExitWith(BAD_INPUT) where a package that it needs is missing."""
        if config.track.mlflow == "off":
            return None
        option = f"--track.mlflow {config.track.mlflow}"
        if importlib.util.find_spec("mlflow") is None:
            raise ExitWith(
                ExitCode.BAD_INPUT, f"{option}: the package mlflow is not installed: {how_to_install('mlflow')}"
            )
        is_local = config.track.mlflow == "on" and not os.environ.get("MLFLOW_TRACKING_URI")
        if is_local and importlib.util.find_spec("sqlalchemy") is None:
            reason = f"{option}: without a server mlflow needs a database: set MLFLOW_TRACKING_URI to the server, "
            raise ExitWith(ExitCode.BAD_INPUT, reason + "write its address as --track.mlflow, or: pip install mlflow")
        return cls(config)

    def start(self, run_uid: str) -> int:
        """Begins the run or goes on with it; asks the server which steps it has."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell others that mlflow is used, and how
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)
        from mlflow import MlflowClient  # takes two seconds; only runs that use it pay

        place = self.config.track.mlflow
        self.client = MlflowClient(None if place == "on" else place)
        # asked for outside `identifier`, where a silent server would make training wait, which asks for its own id
        found = read_object(self.folder.identity).get(IDENTIFIER) or self._new_run(run_uid)
        self.run_id = self.folder.identifier(IDENTIFIER, lambda: found)
        self.client.update_run(self.run_id, "RUNNING")
        self._send_params()
        held = [metric.step for metric in self.client.get_metric_history(self.run_id, ON_EVERY_ROW)]
        self.step = max(held, default=0)
        return max(held, default=-1)

    def _new_run(self, run_uid: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment()
        name = os.environ.get("MLFLOW_RUN_NAME") or f"{self.config.profile}-{run_uid[:6]}"
        tags = {"profile": self.config.profile, "run": run_uid}
        return self.client.create_run(experiment, tags=tags, run_name=redact(name)).info.run_id

    def _experiment(self) -> str:
        name = redact(self.config.track.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "handloop")
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except Exception:  # another run may have made it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _send_params(self) -> None:
        """Sends the options; one that differs from an earlier attempt's is a tag, because a param never changes."""
        from mlflow.entities import Param, RunTag

        held = self.client.get_run(self.run_id).data
        known, prefix = held.params, "now/"
        shown = known | {
            name.removeprefix(prefix): value for name, value in held.tags.items() if name.startswith(prefix)
        }
        options = {name: str(value) for name, value in flat_config(self.config).items()}
        new = [Param(name, value) for name, value in options.items() if name not in known]
        changed = [
            RunTag(f"{prefix}{name}", value) for name, value in options.items() if shown.get(name, value) != value
        ]
        for first in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=new[first : first + MAX_PARAMS])
        if changed:
            self.client.log_batch(self.run_id, tags=changed)

    def catch_up(self, rows: Sequence[Row], answers: Mapping[int, Sequence[Row]]) -> None:
        """Sends the rows, and those tables that the server lacks."""
        super().catch_up(rows, {})
        self._send()
        held = self._held_tables() if answers else set()
        for step, table in answers.items():
            if _table_path(VALIDATION, step) not in held:
                self.table(VALIDATION, table)

    def _held_tables(self) -> set[str]:
        try:
            return {each.path for each in self.client.list_artifacts(self.run_id, SAMPLES)}
        except Exception as error:
            self._lose_tables(error)
            return set()

    def log(self, row: Row) -> None:
        """Takes the row; sends what waits if it is time, or a request is full."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.step = row["step"]
        metrics = [Metric(name, float(value), now, self.step) for name, value in row.items() if name != "step"]
        if len(self.waiting) + len(metrics) > MAX_METRICS:
            self._send()
        self.waiting += metrics
        if time.monotonic() - self.last_sent > SEND_SECONDS:
            self._send()

    def idle(self, seconds: float) -> None:
        """Sends what waits."""
        self._send()

    def _send(self) -> None:
        if self.waiting:
            self.client.log_batch(self.run_id, metrics=self.waiting)
            self.waiting = []
        self.last_sent = time.monotonic()

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Sends the rows as an artifact, in the form of mlflow's own tables; a step's table has one name.

        An artifact store that takes none, as one without credentials, costs the tables and not the metrics.
        """
        columns = list(rows[0])
        content = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        try:
            self.client.log_dict(self.run_id, content, _table_path(name, rows[0].get("step", self.step)))
        except Exception as error:
            self._lose_tables(error)

    def _lose_tables(self, error: Exception) -> None:
        self.lost_tables = self.lost_tables or f"{type(error).__name__}: {first_line(error)}"

    def finish(self) -> str:
        """Sends what is left, the numbers by which runs are compared, and how the run ended."""
        from mlflow.entities import Metric

        known = self.client.get_run(self.run_id).data.metrics
        now, summary = int(time.time() * 1000), summary_of(read_metrics(self.folder.metrics))
        self.waiting += [
            Metric(key, value, now, self.step) for key, value in summary.items() if known.get(key) != value
        ]
        self._send()
        code = read_object(self.folder.exit).get("code")
        status = next((status for ended, status in STATUS.items() if ended == code), "FAILED")
        self.client.set_terminated(self.run_id, status)
        lost = f"; its artifact store took no tables ({self.lost_tables})" if self.lost_tables else ""
        return f"{self.name}: run {self.run_id}{lost}"


def _table_path(name: str, step: int) -> str:
    return f"{table_key(name)}.json" if name in ABOUT else f"{table_key(name)}-step-{step:010}.json"
