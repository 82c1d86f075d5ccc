"""Who is told about a run: metrics.jsonl always, the terminal, Weights & Biases. None of them can stop training."""

import contextlib
import json
import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from train.config import Config
from train.exits import ExitCode, ExitWith
from train.scrub import scrub

PLAIN_LINE_SECONDS = 5.0  # a line this often where there is no terminal
WANDB_PATIENCE_SECONDS = 15.0  # all that a run waits for Weights & Biases, once, at its end
# Sections sent to Weights & Biases. Paths, and any section added later, stay at home until they are named here.
SHARED_SECTIONS = ("lora", "batch", "optim", "train", "memory", "checkpoint")


class Tracker(Protocol):
    """A listener."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics, at a step's boundary."""
        ...

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the answers of the finished model."""
        ...

    def finish(self) -> None:
        """Ends; nothing comes after it."""
        ...


class Trackers:
    """All listeners of a run; processes other than the first have none. One that fails is dropped, and that is said."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = list(members)
        self.files = [member for member in members if isinstance(member, MetricsFile)]  # also once they failed

    def log(self, row: Mapping[str, Any]) -> None:
        """Tells all of them."""
        self._each(lambda member: member.log(row))

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tells all of them."""
        self._each(lambda member: member.answers(name, rows))

    def finish(self) -> None:
        """Ends all of them."""
        self._each(lambda member: member.finish())

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, made durable; 0 in a process that writes none. Raises OSError."""
        return sum(file.durable_bytes() for file in self.files)

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for member in list(self.members):
            try:
                tell(member)
            except Exception as error:  # whatever it is, it must not reach training
                self.members.remove(member)
                with contextlib.suppress(OSError):
                    print(f"{type(member).__name__} is left out from now on: {error}", file=sys.stderr, flush=True)


class MetricsFile:
    """metrics.jsonl, the truth: one JSON object a step. What a full disk refuses is kept and written later."""

    def __init__(self, run_dir: Path, keep_bytes: int) -> None:
        """Goes on after `keep_bytes`, the file's length at the checkpoint; what a lost attempt wrote behind is cut."""
        self.path = run_dir / "metrics.jsonl"
        self.path.touch()
        self.last_step_seen = max((row["step"] for row in read_metrics(self.path)), default=0)
        size = self.path.stat().st_size
        if size < keep_bytes:
            print(f"{self.path} is shorter than at the checkpoint: rows of earlier steps are lost", flush=True)
        os.truncate(self.path, min(keep_bytes, size))
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.unwritten = b""
        self.is_refused = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends the row."""
        self.unwritten += json.dumps(row).encode() + b"\n"
        try:
            self._write()
            self.is_refused = False
        except OSError as error:
            if not self.is_refused:
                with contextlib.suppress(OSError):  # the terminal may be a file on the same disk
                    print(f"{self.path}: {error}; rows are kept until it can be written", file=sys.stderr, flush=True)
            self.is_refused = True

    def _write(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[os.write(self.descriptor, self.unwritten) :]

    def durable_bytes(self) -> int:
        """The file's length, after making sure that all rows are on disk; raises OSError where they cannot be."""
        self._write()
        os.fsync(self.descriptor)
        return self.path.stat().st_size

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """They have a file of their own."""

    def finish(self) -> None:
        """Closes the file; raises OSError where rows are lost with it."""
        try:
            self._write()
        finally:
            os.close(self.descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class Display:
    """The terminal: a live bar where there is one, else a plain line every few seconds and at each epoch's end."""

    def __init__(self, console: Console, completed: int, total_steps: int, steps_per_epoch: int) -> None:
        self.console = console
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.last_line = 0.0
        self.started = time.monotonic()
        self.first_step = completed
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        if console.is_terminal:
            self.progress.start()
        self.task = self.progress.add_task("train", total=total_steps, completed=completed, numbers="")

    def log(self, row: Mapping[str, Any]) -> None:
        """Shows the row."""
        step = row["step"]
        numbers = _numbers(row)
        self.progress.update(self.task, completed=step, numbers=numbers)
        at_epoch_end = step % self.steps_per_epoch == 0 or step == self.total_steps
        due = time.monotonic() - self.last_line > PLAIN_LINE_SECONDS
        if at_epoch_end or (due and not self.console.is_terminal):
            self.last_line = time.monotonic()
            per_step = (self.last_line - self.started) / (step - self.first_step)
            left = f"  {per_step * (self.total_steps - step):.0f} s left" if step < self.total_steps else ""
            self.console.print(f"step {step}/{self.total_steps}  {numbers}{left}", highlight=False, soft_wrap=True)
        if "warning" in row:
            self.console.print(f"step {step}: {row['warning']}", highlight=False, soft_wrap=True)
        if step == self.total_steps:
            self.progress.stop()

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """They are printed as a table when the bar is gone."""

    def finish(self) -> None:
        """Takes the bar away."""
        self.progress.stop()


def _numbers(row: Mapping[str, Any]) -> str:
    loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "left out"
    parts = [f"epoch {row['epoch']:.2f}", loss]
    if "eval/loss" in row:
        parts.append(f"validation {row['eval/loss']:.4f}")
    parts += [f"lr {row['train/learning_rate']:.2e}", f"{row['perf/tokens_per_second']:,.0f} tokens/s"]
    if "perf/mfu" in row:
        parts.append(f"MFU {row['perf/mfu']:.1%}")
    if "memory/peak_allocated_gib" in row:
        parts.append(f"{row['memory/peak_allocated_gib']:.2f} GiB")
    return "  ".join(parts)


class WeightsAndBiases:
    """Weights & Biases, in a thread of its own behind a bounded queue: it may hang, fail or die, training goes on.

    A killed attempt leaves behind what its service process had not yet sent (online) or written (offline, 15 s or
    32 KiB), so every attempt first asks what is there and sends the steps that are missing, out of metrics.jsonl.
    """

    def __init__(self, config: Config, record: Mapping[str, str], mode: str, last_step_seen: int) -> None:
        """Continues the run that `record` (run.json) names; `last_step_seen` is 0 where nothing was logged before."""
        self.run_dir = Path(config.run.dir)
        self.mode = mode
        self.is_first_attempt = last_step_seen == 0
        self.record = self.run_dir / "wandb"  # from the start on, this attempt's folder in it
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
            metrics = self.run_dir / "metrics.jsonl"
            print(f"Weights & Biases: {self.failure}; all metrics are in {metrics}", flush=True)

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
            for row in [] if self.is_first_attempt else read_metrics(self.run_dir / "metrics.jsonl"):
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
            lines = scrub(str(error)).strip().splitlines() or ["its service process is gone"]
            self.failure = self.failure or f"stopped recording ({type(error).__name__}: {lines[0]})"

    def _set_aside_older_records(self) -> None:
        """Moves earlier attempts' offline records out of the way of `wandb sync`: this one holds their steps too."""
        for old in (self.run_dir / "wandb").glob("offline-run-*"):
            if old.resolve() != self.record.resolve():
                target = self.run_dir / "wandb" / "superseded"
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
            project=scrub(config.track.project),
            name=f"{config.profile}-{record['run_uid'][:6]}",
            id=record["wandb_id"],
            resume="allow",
            mode=mode,
            dir=str(self.run_dir),
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
