"""Weights & Biases."""

import contextlib
import netrc
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.redact import redact
from train.track.metrics_file import read_metrics

WANDB_PATIENCE_SECONDS = 15.0  # all that a run waits for Weights & Biases, once, at its end

# Sections sent to Weights & Biases. Paths, and any section added later, stay at home until they are named here.
SHARED_SECTIONS = ("lora", "batch", "optim", "train", "memory", "checkpoint")


class WeightsAndBiases:
    """Weights & Biases, in a thread of its own behind a bounded queue: it may hang, fail or die, training goes on.

    A killed attempt leaves behind what its service process had not yet sent (online) or written (offline, 15 s or
    32 KiB), so every attempt first asks what is there and sends the steps that are missing, out of metrics.jsonl.
    """

    def __init__(self, config: Config, record: Mapping[str, str], mode: str, last_step_seen: int) -> None:
        """Continues the run that `record` (run.json) names; `last_step_seen` is 0 where nothing was logged before."""
        self.folder = RunFolder.of(config)
        self.mode = mode
        self.is_first_attempt = last_step_seen == 0
        self.record = self.folder.wandb  # from the start on, this attempt's folder in it
        self.failure = ""
        self.is_failure_told = False
        self.messages: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=10_000)
        self.thread = threading.Thread(target=self._work, args=(config, record), daemon=True)
        self.thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Sends the row."""
        self._tell_failure()
        self._put("log", row)

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Sends the answers as a table."""
        self._put("answers", (name, list(rows)))

    def finish(self) -> None:
        """Waits a little for what is under way, and says where the record is."""
        self._put("finish", None)
        self.thread.join(WANDB_PATIENCE_SECONDS)
        if self.thread.is_alive():
            self.failure = self.failure or f"no answer within {WANDB_PATIENCE_SECONDS:.0f} s"
        if self.failure:
            self._tell_failure()
            _abandon_service()
        elif self.mode == "offline":
            print(f"Weights & Biases recorded offline; to upload it: wandb sync {self.record}", flush=True)

    def _tell_failure(self) -> None:
        if self.failure and not self.is_failure_told:
            self.is_failure_told = True
            print(f"Weights & Biases: {self.failure}; all metrics are in {self.folder.metrics}", flush=True)

    def _put(self, kind: str, content: Any) -> None:
        if self.failure:
            return
        try:
            self.messages.put_nowait((kind, content))
        except queue.Full:
            self.failure = f"it is more than {self.messages.maxsize} messages behind"

    def _work(self, config: Config, record: Mapping[str, str]) -> None:
        try:
            run = self._init(config, record)
            sent = max(run.summary.get("step") or 0, run.starting_step)  # of the server; 0 offline
            for row in [] if self.is_first_attempt else read_metrics(self.folder.metrics):
                sent = _send(run, row, sent)
            self.record = Path(run.dir).parent
            self._set_aside_older_records()
            kind = ""
            while kind != "finish":
                kind, content = self.messages.get()
                if kind == "log":
                    sent = _send(run, content, sent)
                elif kind == "answers":
                    import wandb

                    name, rows = content
                    columns = list(rows[0])
                    run.log({f"samples/{name}": wandb.Table(columns, [[row[c] for c in columns] for row in rows])})
            run.finish()
        except BaseException as error:  # whatever it is, it must not reach training
            lines = redact(str(error)).strip().splitlines() or ["its service process is gone"]
            self.failure = self.failure or f"stopped recording ({type(error).__name__}: {lines[0]})"

    def _set_aside_older_records(self) -> None:
        """Moves earlier attempts' offline records out of the way of `wandb sync`: this one holds their steps too."""
        for old in self.folder.wandb.glob("offline-run-*"):
            if old.resolve() != self.record.resolve():
                target = self.folder.wandb / "superseded"
                target.mkdir(exist_ok=True)
                os.rename(old, target / old.name)

    def _init(self, config: Config, record: Mapping[str, str]) -> Any:
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
        run = wandb.init(
            project=redact(config.track.project),
            name=f"{config.profile}-{record['run_uid'][:6]}",
            id=record["wandb_id"],
            resume="allow",
            mode=mode,
            dir=str(self.folder.path),
            config={name: vars(getattr(config, name)) for name in SHARED_SECTIONS},
            settings=settings,
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run


def _send(run: Any, row: Mapping[str, Any], sent: int) -> int:
    """Sends the row unless its step was `sent` before; returns the last step sent."""
    if row["step"] <= sent:
        return sent
    run.log({key: value for key, value in row.items() if not isinstance(value, list)})
    return row["step"]


def _abandon_service() -> None:
    """Ends W&B's service process, for which the interpreter would else wait at its end, however long it takes."""
    with contextlib.suppress(Exception):
        from wandb.sdk import wandb_setup

        connection: Any = wandb_setup.singleton().assert_service()
        connection._cleanup()  # takes back the exit hook that waits
        connection._proc._process.kill()


def wandb_mode(config: Config) -> str:
    """online, offline or off; never a question on the terminal.

    Raises ExitWith(BAD_INPUT) where online is demanded and there is no key: that is better known before the night.
    """
    if config.track.wandb == "online" and not (os.environ.get("WANDB_API_KEY") or _netrc_has_key()):
        reason = "--track.wandb online: there is no key; run `wandb login`, set WANDB_API_KEY, or leave it at auto"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    if config.track.wandb != "auto":
        return config.track.wandb
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return {"offline": "offline", "disabled": "off"}[os.environ["WANDB_MODE"]]
    return "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"


def _netrc_has_key() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
