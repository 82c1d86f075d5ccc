"""The run folder: every name in it, the lock on it, and what `--run.resume never` moves aside.

No other module spells one of these names: they ask a RunFolder for the path.
"""

import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from train.config import Config
from train.run.durable import make_folder, sync, write_atomically
from train.run.exits import ExitCode, ExitWith

IDENTITY, LOCK = "run.json", ".lock"
RUN_UID, START_DATE = "run_uid", "start_date"  # in run.json


class Entry:
    """A name in the run folder; read from a RunFolder it is the whole path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `path` need not exist yet."""

    path: Path

    identity = Entry(IDENTITY)  # the run's id, and the ids of its records at trackers
    config = Entry("config.json")  # what the last attempt ran with
    plan = Entry("plan.json")  # how the last attempt is executed
    audit = Entry("audit.jsonl")  # a line a kind of finding of the audit at the start: how often
    attempts = Entry("attempts.jsonl")  # a line at each attempt's start and end
    metrics = Entry("metrics.jsonl")  # a line a step
    exit = Entry("exit.json")  # how the last attempt ended; absent while one runs, or where it was killed
    defect = Entry("defect.txt")  # the report of the last defect of Handloop, if there was one
    report = Entry("report.html")  # the page of handloop report
    answers = Entry("answers.json")
    held_out_answers = Entry("answers_held_out.json")
    general_answers = Entry("answers_general.json")
    comparison = Entry("compare.json")  # of base and tuned model, by handloop compare
    validation_answers = Entry("validation_answers.jsonl")  # a line an answer, at each validation
    checkpoints = Entry("checkpoints")
    final = Entry("final")
    wandb = Entry("wandb")  # Weights & Biases makes it, in the folder that it is given
    tensorboard = Entry("tensorboard")  # event files
    heartbeats = Entry(".heartbeats")  # a file a process: the last step that it completed
    mirror = Entry("mirror.json")  # what of this attempt's checkpoints is at the mirror
    lock = Entry(LOCK)

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder that `run.dir` names."""
        return cls(Path(config.run.dir))

    def nonfinite(self, step: int) -> Path:
        """The note about a step that was left out because its loss or gradient was not finite."""
        return self.path / f"nonfinite-step-{step}.json"

    @property
    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints that stand, by their folders' names; whether they are whole is not looked at."""
        with suppress(OSError):
            found = (STEP_FOLDER.fullmatch(path.name) for path in self.checkpoints.iterdir() if path.is_dir())
            return sorted(int(match[1]) for match in found if match)
        return []

    @property
    def standing(self) -> str:
        """What of the run the same command would go on from, in words."""
        if self.checkpoint_steps:
            return "the newest checkpoint stands"
        return "no checkpoint had been written, so it starts from the beginning"

    @property
    def asked(self) -> dict[str, Path]:
        """The files of answers at the run's end, by the kind of questions."""
        return {"trained": self.answers, "held_out": self.held_out_answers, "general": self.general_answers}

    @property
    def carried(self) -> list[Path]:
        """The records that go to the mirror with a checkpoint: with them a new machine goes on as if it had been it."""
        return [self.identity, self.metrics, self.validation_answers, self.attempts, self.audit]

    @property
    def receipts(self) -> list[Path]:
        """Those of `handloop merge` and `handloop export`, where they wrote into the run folder."""
        return [*sorted(self.path.glob("merged-*/receipt.json")), *self.path.glob("export/receipts.json")]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this job until it ends or dies; raises ExitWith(BAD_INPUT) when another job has it."""
        try:
            make_folder(self.path)
            file = self.lock.open("w")
        except OSError as error:
            raise ExitWith(ExitCode.BAD_INPUT, f"--run.dir {self.path}: {error}; choose another") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                reason = f"{self.path} is in use by another job; wait for it or choose another --run.dir"
                raise ExitWith(ExitCode.BAD_INPUT, reason) from None
            self.exit.unlink(missing_ok=True)  # an earlier attempt's
            shutil.rmtree(self.heartbeats, ignore_errors=True)
            yield

    def is_in_use(self) -> bool:
        """Whether a job has the folder; raises OSError where its lock cannot be read."""
        if not self.lock.exists():
            return False
        with self.lock.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False

    def write_exit(self, code: ExitCode, reason: str, **facts: float | str) -> None:
        """Records how the run ended: launchers flatten exit codes (accelerate and torchrun return 1 for all).

        A peer failure, which is only the consequence, replaces no other end. Raises OSError.
        """
        make_folder(self.path)
        record = {"code": int(code), "name": code.name.lower(), "reason": reason, **facts}
        write_atomically(self.exit, json.dumps(record, indent=2) + "\n", replaces=code != ExitCode.PEER_FAILURE)

    def identifier(self, name: str, make: Callable[[], str]) -> str:
        """The id that run.json keeps as `name`; where it is missing or damaged `make` gives one, which is kept.

        Each id stands for itself: a lost one never costs another. `make` must be quick: others wait for their ids
        meanwhile, a checkpoint for the run's. Raises OSError where a new one cannot be written.
        """
        with _IDENTIFIERS:
            known = read_object(self.identity)
            found = known.get(name)
            if isinstance(found, str) and found:
                return found
            made = make()
            make_folder(self.path)
            write_atomically(self.identity, json.dumps({**known, name: made}) + "\n")
            return made

    def start_date(self, resume: str) -> date:
        """The day on which the run that `--run.resume` continues was started; today for one that starts now."""
        folders = {"auto": [self], "must": [self], "never": []}.get(resume)
        if folders is None:  # a checkpoint, which may be another run's
            folders = [RunFolder(Path(resume).resolve().parent.parent), self]
        for folder in folders:
            with suppress(ValueError):
                return date.fromisoformat(str(read_object(folder.identity).get(START_DATE)))
        return date.today()

    def keep_start_date(self, day: date) -> None:
        """Keeps the day for later attempts; raises OSError."""
        self.identifier(START_DATE, day.isoformat)

    def is_foreign(self, path: Path) -> bool:
        """Whether this is a config.json or plan.json that is none of a run's: a model's folder has one, too."""
        return path.exists() and not RECORD_KEYS.get(path.name, set()) <= read_object(path).keys()

    def archive(self) -> None:
        """Moves the earlier run to the next previous-N and says so; nothing is deleted. Raises OSError.

        What moves is every name above but the lock, and what a run writes beside them; exit.json is gone since this
        job took the lock, and attempts.jsonl says the same. A tracker writes only where this class tells it, so its
        folder cannot be missing here. What a user has put into the folder stays. Where there is no run, nothing moves.

        The identity goes first, so that a run that starts after an interruption here is another one, or is taken from
        the checkpoints, which go last; and the metrics second, which such a start would shorten.
        """
        entries = sorted(self.path.iterdir())
        if not any(_holds_a_run(entry) for entry in entries):
            return
        taken = [int(entry.name.rpartition("-")[2]) for entry in entries if PREVIOUS.fullmatch(entry.name)]
        target = self.path / f"previous-{1 + max(taken, default=0)}"
        target.mkdir()
        order = {self.identity: 0, self.metrics: 1, self.checkpoints: 3}
        for entry in sorted(entries, key=lambda entry: order.get(entry, 2)):
            if is_of_a_run(entry.name) and entry != self.lock and not self.is_foreign(entry):
                os.rename(entry, target / entry.name)
        sync(target)
        sync(self.path)
        print(f"the earlier run is kept in {target}", flush=True)


# keys by which a run's own config.json and plan.json are known
RECORD_KEYS: dict[str, set[str]] = {"config.json": {"profile", "run"}, "plan.json": {"engine", "summary"}}
OURS = {entry.name for entry in vars(RunFolder).values() if isinstance(entry, Entry)}
# notes on steps, and what a killed process was writing
OURS_TOO = re.compile(r"nonfinite-step-\d+\.json|\.(tmp|trash)-.*|\..*\.tmp-\d+")
PREVIOUS = re.compile(r"previous-\d+")
STEP_FOLDER = re.compile(r"step-(\d{10})")
_IDENTIFIERS = threading.Lock()  # trackers ask for their ids in threads of their own


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or no whole one."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def is_of_a_run(name: str) -> bool:
    """Whether a run writes this name directly into its folder."""
    return name in OURS or OURS_TOO.fullmatch(name) is not None


def _holds_a_run(entry: Path) -> bool:
    """Whether this is left of a run: an identity or a configuration alone is not, nor an empty folder."""
    if entry.name not in OURS - {IDENTITY, LOCK} - RECORD_KEYS.keys():
        return False
    return not entry.is_dir() or any(entry.iterdir())
