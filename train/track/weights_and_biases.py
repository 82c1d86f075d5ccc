"""Weights & Biases: a run on its server, or an offline record for a later sync."""

import contextlib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object
from train.run.redact import first_line, redact
from train.track import wandb_settings
from train.track.isolated import Listener, Row
from train.track.metrics_file import read_metrics
from train.track.offline_records import OFFLINE_RECORDS, SUPERSEDED, last_online_step, last_uploaded_step
from train.track.shared import ABOUT, shared_config, summary_of, table_key

# that a run waits longer at its end where the server has not answered by then: an offline record takes 3
RECORD_SECONDS = 5.0
ARTIFACT_SECONDS = 600.0  # that a run waits for its artifact's upload, which was asked for
# what W&B's summary keeps of a metric, beside its last value
SUMMARIES = {
    "eval/loss": "min,last",
    "train/loss": "min,last",
    "perf/tokens_per_second": "mean,last",
    "memory/peak_reserved_gib": "max",
    "memory/peak_allocated_gib": "max",
}


class WeightsAndBiases(Listener):
    """Goes on under the id in run.json.

    A killed attempt leaves behind what its service process had not yet sent (online) or written (offline, 15 s or
    32 KiB). A server says which steps it has; an offline record is a new one that gets all that are not uploaded, which
    `wandb sync` would send again, and older ones are set aside.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, mode: str) -> None:
        self.config = config
        self.mode = mode
        self.folder = RunFolder.of(config)
        self.run: Any = None
        self.step = 0  # of the last row
        self.alerted: set[str] = set()
        self.lost_tables = ""  # why the server took none
        self.has_begun = False  # whether there is a record by now
        self.fallback = ""  # why there is an offline record, where the run was to be online
        self.notes = tuple(f"{self.name}: {line}" for line in wandb_settings.decided())

    @classmethod
    def wanted(cls, config: Config) -> "WeightsAndBiases | None":
        """The listener, unless it is off; raises ExitWith(BAD_INPUT) as wandb_mode does."""
        mode = wandb_mode(config)
        return None if mode == "off" else cls(config, mode)

    def start(self, run_uid: str) -> int:
        """Continues the run on the server, or begins an offline record, also where the server does not answer.

        WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES and WANDB_JOB_TYPE are read by wandb itself. A step that
        the server has and its summary has not yet is refused by W&B, whose own steps are ours.
        """
        identity = self.folder.identifier("wandb_id", wandb_settings.run_of_sweep() or (lambda: uuid4().hex[:8]))
        project = redact(self.config.track.project or wandb_settings.project() or "handloop")
        wandb_settings.settle_environment(self.mode, identity, project)
        try:
            self._init(run_uid, identity, project)
        except Exception as error:
            if self.mode == "offline" or last_online_step(self.folder) >= 0:
                raise  # another record would repeat what the server has; the next attempt sends what it lacks
            self.fallback = f"{type(error).__name__}: {first_line(error)}"
            self.mode = "offline"
            self._restart_service()
            wandb_settings.settle_environment(self.mode, identity, project)
            self._init(run_uid, identity, project)
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        for name, summary in SUMMARIES.items():
            self.run.define_metric(name, step_metric="step", summary=summary)
        last = self.run.summary.get("step", -1) if self.mode == "online" else last_uploaded_step(self.folder)
        self.step = max(0, last)
        self.has_begun = True
        return last

    def _init(self, run_uid: str, identity: str, project: str) -> None:
        import wandb  # takes a second; only runs that use it pay

        mode: Any = self.mode
        # console off: what the program prints may hold secrets; the rest keeps argv and code at home
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            program="train/main.py",  # not its whole path, nor the machine's name
            host="",
            init_timeout=wandb_settings.INIT_SECONDS,
        )
        wandb.setup(settings=settings)  # silent from here on, not only from the run's start
        self.run = wandb.init(
            project=project,
            name=os.environ.get("WANDB_NAME") or f"{self.config.profile}-{run_uid[:6]}",
            id=identity,
            resume="allow",
            mode=mode,
            dir=str(self.folder.path),
            config=shared_config(self.config),
            settings=settings,
        )

    def catch_up(self, rows: Sequence[Row], answers: Mapping[int, Sequence[Row]]) -> None:
        """Logs them; then earlier attempts' offline records, whose steps are now in this one too, are set aside."""
        super().catch_up(rows, answers)
        superseded = self.folder.wandb / SUPERSEDED
        for old in self.folder.wandb.glob(OFFLINE_RECORDS):
            if old.resolve() != self._record().resolve():
                superseded.mkdir(exist_ok=True)
                os.rename(old, superseded / old.name)

    def log(self, row: Row) -> None:
        """Sends the row as W&B's own step of the same number, which it keeps until the next one begins; and alerts."""
        self.step = row["step"]
        self.run.log(dict(row), step=self.step)
        if "train/skipped" in row:
            self._alert("A step was skipped", f"step {self.step}: its loss or gradient was not finite")
        if row.get("perf/failed_saves"):
            self._alert("A checkpoint could not be saved", f"before step {self.step}; the disk may be full")

    def idle(self, seconds: float) -> None:
        """Sends an alert where no step has come for as long as processes may wait for one another."""
        minutes = self.config.run.timeout_minutes
        if seconds > 60 * minutes:
            self._alert("Training stands still", f"no step for {minutes:g} minutes, after step {self.step}")

    def _alert(self, title: str, text: str) -> None:
        if title not in self.alerted:
            self.alerted.add(title)
            self.run.alert(f"{title} ({self.config.profile})", text, level="WARN")

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Sends the rows as a table of the step that they name, or of the last one.

        What belongs to no step, or to one that is with the server already, goes into the summary. A server that takes
        no artifacts, which tables are, costs the tables and not the metrics.
        """
        import wandb

        columns: Any = list(rows[0])
        step = max(self.step, rows[0].get("step", 0))
        try:
            table = wandb.Table(columns, [[row[column] for column in columns] for row in rows])
            if name in ABOUT or step < self.run.starting_step:
                self.run.summary[table_key(name)] = table
            else:
                self.run.log({table_key(name): table}, step=step)
        except Exception as error:
            self.lost_tables = self.lost_tables or f"{type(error).__name__}: {first_line(error)}"

    def finish(self) -> str:
        """Sends what is left and how the run ended; says how to upload an offline record."""
        code = self._exit_code()
        self.run.summary.update(summary_of(read_metrics(self.folder.metrics)))
        if self._has_artifact():
            self._send_artifact()
        if code == ExitCode.INTERRUPTED:
            self.run.mark_preempting()  # it will go on
        self.run.finish(exit_code=code)
        if self.mode != "offline":
            return f"{self.name}: it took no tables ({self.lost_tables})" if self.lost_tables else ""
        why = f"could not be reached ({self.fallback}) and " if self.fallback else ""
        return f"{self.name} {why}recorded offline; to upload it: handloop sync {shlex.quote(str(self.folder.path))}"

    def extra_seconds(self) -> float:
        """Those of the artifact, if there is one; and of an offline record, where the server has not answered yet.

        A run of a few steps may be over before it is known whether there is a server.
        """
        artifact = ARTIFACT_SECONDS if self._has_artifact() else 0.0
        return artifact + (0.0 if self.has_begun else RECORD_SECONDS)

    def _exit_code(self) -> int:
        """How the run has ended."""
        return read_object(self.folder.exit).get("code", int(ExitCode.DEFECT))

    def _has_artifact(self) -> bool:
        return self.config.track.wandb_artifact and self._exit_code() == ExitCode.FINISHED

    def _send_artifact(self) -> None:
        """Sends final/ as an artifact of type model, which the run has made."""
        import wandb

        base = self.config.model.name_or_path
        facts = {
            "base": Path(base).name if Path(base).exists() else base,  # of a folder no more than its own name
            "revision": self.config.model.revision,
            "config": shared_config(self.config),
        }
        artifact = wandb.Artifact(f"{self.config.profile}-{self.run.id}", type="model", metadata=facts)
        artifact.add_dir(str(self.folder.final), policy="immutable")  # sent from there, without a copy beside it
        self.run.log_artifact(artifact)

    def abandon(self) -> None:
        """Ends W&B's service process, for which the interpreter would else wait at its end, however long it takes."""
        with contextlib.suppress(Exception):
            from wandb.sdk import wandb_setup

            connection: Any = wandb_setup.singleton().assert_service()
            connection._cleanup()  # takes back the exit hook that waits
            connection._proc._process.kill()

    def _restart_service(self) -> None:
        """Ends W&B's service process, which holds the run's id and may wait for a server; a new one follows."""
        self.abandon()
        with contextlib.suppress(Exception):
            from wandb.sdk import wandb_setup
            from wandb.sdk.lib.service import service_token

            service_token.clear_service_in_env()
            wandb_setup.singleton()._connection = None

    def _record(self) -> Path:
        """This attempt's folder."""
        return Path(self.run.dir).parent


def wandb_mode(config: Config) -> str:
    """online, offline or off; never a question on the terminal.

    Raises ExitWith(BAD_INPUT) where online is demanded and there is no key: that is better known before the night.
    """
    if config.track.wandb == "online" and not wandb_settings.has_key():
        reason = "--track.wandb online: there is no key; run `wandb login`, set WANDB_API_KEY, or leave it at auto"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    if config.track.wandb != "auto":
        return config.track.wandb
    said = wandb_settings.said_mode()
    if said in ("off", "offline"):
        return said
    return "online" if wandb_settings.has_key() else "offline"
