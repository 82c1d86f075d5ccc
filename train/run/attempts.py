"""What the run folder keeps of each attempt, and how it is read again.

config.json and plan.json are the last attempt's; attempts.jsonl has a line at each attempt's start and one at its end,
which is missing where the attempt was killed. Nothing here can end a run: what a full disk refuses is said once.
"""

import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from train.run.durable import write_atomically
from train.run.environment import is_first_process
from train.run.exits import ExitCode
from train.run.folder import RunFolder
from train.run.json_lines import append_line, last_step, read_lines
from train.run.redact import redact

LOCK_SECONDS = 2.0  # that an end waits for another process's, which takes milliseconds


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as attempts.jsonl has it."""

    number: int  # from 1
    start: dict[str, Any]  # time, code, versions, device, num_processes, engine, plan, data, from_step
    end: dict[str, Any] | None  # time, code, name, reason, last_step, doing; None: killed, or still running


class AttemptLog:
    """Records one attempt, from just before its first step; only the first process begins one.

    A start that ends earlier, on bad data for example, leaves exit.json alone.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.number = 0  # not begun
        self.from_step = 0
        self.is_refused = False
        self.created = _now()

    def begin(self, config: Mapping[str, Any], plan: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Writes config.json and plan.json, and the line of the start."""
        self._try(lambda: self._write(self.folder.config, config))
        self._try(lambda: self._write(self.folder.plan, plan))
        self.number = 1 + max((attempt.number for attempt in read_attempts(self.folder)), default=0)
        self.from_step = int(start.get("from_step", 0))
        self._append("start", start)

    def take_over(self, attempt: Attempt) -> None:
        """Makes this the log of an attempt that another process, which is gone, has begun."""
        self.number, self.from_step = attempt.number, int(attempt.start.get("from_step", 0))

    def end(self, code: ExitCode, reason: str, **facts: float | str) -> None:
        """Writes the line of the end, if this attempt was begun, with the last step in metrics.jsonl.

        Another process than the first ends the attempt that the first had begun, by what it alone knows. An attempt has
        one end, whoever writes it; only a peer failure is followed by its cause, which counts then.
        """
        with self._alone():
            self._end(code, reason, **facts)

    def _end(self, code: ExitCode, reason: str, **facts: float | str) -> None:
        if not self.number and not is_first_process():
            # one that was begun since this process started; an earlier one was killed long ago
            begun = [each for each in read_attempts(self.folder) if each.start.get("time", "") >= self.created]
            self.number = max((each.number for each in begun), default=0)
        if self.number and self._is_open(code):
            step = max(self.from_step, last_step(self.folder.metrics))
            end = {"code": int(code), "name": code.name.lower(), "reason": reason, "last_step": step}
            self._append("end", {**end, **facts})

    def _is_open(self, code: ExitCode) -> bool:
        end = next((each.end for each in read_attempts(self.folder) if each.number == self.number), None)
        return end is None or (end.get("code") == ExitCode.PEER_FAILURE != code)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While entered, no other process of the run ends the attempt; where files cannot be locked, one may.

        So may one where another holds the lock for seconds, which is stopped then.
        """
        with ExitStack() as closing:
            with suppress(OSError):
                file = closing.enter_context(self.folder.attempts.open("r+b"))  # NFS locks what is open for writing
                deadline = time.monotonic() + LOCK_SECONDS
                while not _is_locked(file) and time.monotonic() < deadline:
                    time.sleep(0.02)
            yield

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        if self.folder.is_foreign(path):
            raise FileExistsError(f"{path.name} is no record of a run and stays as it is")
        write_atomically(path, _document(content))

    def _append(self, event: str, fields: Mapping[str, Any]) -> None:
        row = {"attempt": self.number, "event": event, "time": _now(), **plain(fields)}
        self._try(lambda: append_line(self.folder.attempts, row))

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self.is_refused:
                with suppress(OSError):  # the terminal may be a file on the same disk
                    text = f"{self.folder.path}: {error}; the run goes on without a full record of this attempt"
                    print(redact(text), file=sys.stderr, flush=True)
            self.is_refused = True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_attempts(folder: RunFolder) -> list[Attempt]:
    """The attempts in order; lines that a killed process left unfinished are left out."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    with suppress(OSError):
        for row in read_lines(folder.attempts):
            number, event = row.pop("attempt", None), row.pop("event", None)
            if isinstance(number, int) and event in ("start", "end"):
                found.setdefault(number, {})[event] = row
    return [Attempt(number, lines.get("start", {}), lines.get("end")) for number, lines in sorted(found.items())]


def last_start(folder: RunFolder) -> dict[str, Any]:
    """What the last attempt wrote down at its start; empty where none is recorded."""
    attempts = read_attempts(folder)
    return attempts[-1].start if attempts else {}


def plain(value: Any) -> Any:
    """The value as JSON has it: secrets redacted, tuples as lists, paths as text, inf and nan as their names."""
    if isinstance(value, Mapping):
        return {redact(str(name)): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return redact(str(value)) if isinstance(value, str | Path) else value


def _document(content: Mapping[str, Any]) -> str:
    return json.dumps(plain(content), indent=2, ensure_ascii=False) + "\n"


def _is_locked(file: BinaryIO) -> bool:
    """Locks the file for this process; whether no other has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
