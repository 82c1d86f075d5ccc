"""Weights & Biases: a run on its server, or an offline record for a later sync."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.redact import redact
from train.track import wandb_settings
from train.track.isolated import Listener, Row
from train.track.shared import shared_config


class WeightsAndBiases(Listener):
    """Goes on under the id in run.json.

    A killed attempt leaves behind what its service process had not yet sent (online) or written (offline, 15 s or
    32 KiB). A server says which steps it has; an offline record is a new one that gets all of them, and older ones are
    set aside.
    """

    name = "Weights & Biases"

    def __init__(self, config: Config, mode: str) -> None:
        self.config = config
        self.mode = mode
        self.folder = RunFolder.of(config)
        self.run: Any = None
        self.step = 0  # of the last row
        self.notes = tuple(f"{self.name}: {line}" for line in wandb_settings.decided())

    @classmethod
    def wanted(cls, config: Config) -> "WeightsAndBiases | None":
        """The listener, unless it is off; raises ExitWith(BAD_INPUT) as wandb_mode does."""
        mode = wandb_mode(config)
        return None if mode == "off" else cls(config, mode)

    def start(self, run_uid: str) -> int:
        """Continues the run on the server, or begins an offline record.

        WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_TAGS, WANDB_NOTES and WANDB_JOB_TYPE are read by wandb itself.
        """
        wandb_settings.settle_environment(self.mode)
        import wandb  # takes a second; only runs that use it pay

        mode: Any = self.mode
        # console off: what the program prints may hold secrets; the rest keeps argv and code at home
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            init_timeout=15,
        )
        wandb.setup(settings=settings)  # silent from here on, not only from the run's start
        self.run = wandb.init(
            project=redact(self.config.track.project or wandb_settings.project() or "handloop"),
            name=os.environ.get("WANDB_NAME") or f"{self.config.profile}-{run_uid[:6]}",
            id=self.folder.identifier("wandb_id", lambda: uuid4().hex[:8]),
            resume="allow",
            mode=mode,
            dir=str(self.folder.path),
            config=shared_config(self.config),
            settings=settings,
        )
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")
        # the server's, where the summary may be behind the history, whose own steps are ours; -1 and 0 - 1 offline
        return max(self.run.summary.get("step", -1), self.run.starting_step - 1)

    def catch_up(self, rows: Sequence[Row], answers: Mapping[int, Sequence[Row]]) -> None:
        """Logs them; then earlier attempts' offline records, whose steps are now in this one too, are set aside."""
        super().catch_up(rows, answers)
        superseded = self.folder.wandb / "superseded"  # where `wandb sync` does not look
        for old in self.folder.wandb.glob("offline-run-*"):
            if old.resolve() != self._record().resolve():
                superseded.mkdir(exist_ok=True)
                os.rename(old, superseded / old.name)

    def log(self, row: Row) -> None:
        """Sends the row, as W&B's own step of the same number, which it keeps until the next one begins."""
        self.step = row["step"]
        self.run.log(dict(row), step=self.step)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Sends the rows as a table of the step that they name, or of the last one."""
        import wandb

        columns: Any = list(rows[0])
        table = wandb.Table(columns, [[row[column] for column in columns] for row in rows])
        self.run.log({f"samples/{name}": table}, step=max(self.step, rows[0].get("step", 0)))

    def finish(self) -> str:
        """Sends what is left; says how to upload an offline record."""
        self.run.finish()
        if self.mode != "offline":
            return ""
        return f"{self.name} recorded offline; to upload it: wandb sync {self._record()}"

    def abandon(self) -> None:
        """Ends W&B's service process, for which the interpreter would else wait at its end, however long it takes."""
        with contextlib.suppress(Exception):
            from wandb.sdk import wandb_setup

            connection: Any = wandb_setup.singleton().assert_service()
            connection._cleanup()  # takes back the exit hook that waits
            connection._proc._process.kill()

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
