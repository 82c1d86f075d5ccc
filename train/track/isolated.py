"""Gives a listener a thread of its own, so that it may hang, fail or die while training goes on."""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from train.run.redact import first_line
from train.track.metrics_file import read_metrics

PATIENCE_SECONDS = 15.0  # all that a run waits for its listeners, once, at its end
QUEUE_SIZE = 10_000  # messages that a listener may be behind
IDLE_SECONDS = 5.0  # without a message, until a listener is told so
# Between two looks for messages. Python code in a listener's thread and the code that launches a step's kernels exclude
# each other; right behind a step, taken one by one, messages cost that step more than they take.
PAUSE_SECONDS = 0.5
NO_ANSWERS = Path(os.devnull)  # of a run that keeps none
VALIDATION = "validation"  # the table of a validation's answers

Row = Mapping[str, Any]


class Listener(Protocol):
    """A service outside the run that is told about it; weights_and_biases.py is one.

    `start`, `catch_up`, `log`, `table` and `finish` are called one after another in a thread of the listener's own, and
    may raise or hang. A class that inherits from this one writes `name`, `start`, `log` and `finish`, and the others
    where it has more to do than is done here.
    """

    name: str  # as a person calls it
    notes: Sequence[str] = ()  # lines that people should know at the start

    def start(self, run_uid: str) -> int:
        """Begins the record of the run, or goes on with it; returns the last step that it already has, or -1.

        Rows may begin with step 0: a validation before the first step.
        """
        ...

    def log(self, row: Row) -> None:
        """Takes one step's row of metrics, numbers alone, with the step as `step`."""
        ...

    def finish(self) -> str:
        """Ends the record; returns what people should know of it, such as how to upload it, or nothing."""
        ...

    def catch_up(self, rows: Sequence[Row], answers: Mapping[int, Sequence[Row]]) -> None:
        """Takes the rows that it lacks, and the answers of validations by step, right after `start`.

        A killed attempt left before they were delivered.
        """
        for row in rows:
            self.log(row)
            if row["step"] in answers:
                self.table(VALIDATION, answers[row["step"]])

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Takes a table, such as the answers of the finished model; a record that holds none leaves it out."""
        return

    def idle(self, seconds: float) -> None:
        """Is called every few seconds while there is nothing to take, for `seconds` by now."""
        return

    def extra_seconds(self) -> float:
        """Of patience at the end, for an upload that was asked for; called from the main thread."""
        return 0.0

    def abandon(self) -> None:
        """Ends, from the main thread, helper processes that would block the interpreter's exit after a failure."""
        return


class Isolated:
    """A listener in a thread of its own behind a bounded queue.

    What a killed attempt did not deliver is sent out of metrics.jsonl, each step once. A listener that fails is
    reported once and told nothing more.
    """

    def __init__(self, listener: Listener, run_uid: str, metrics: Path, answers: Path = NO_ANSWERS) -> None:
        """Starts at once; `metrics` is the run's metrics.jsonl, `answers` those of its validations, which need not be.

        Both are already shortened to the checkpoint.
        """
        self.listener = listener
        self.metrics, self.answers = metrics, answers
        self.last_step = self.last_answers = -1  # that the listener has; the thread's own
        self.farewell = ""
        self.failure = ""
        self.is_failure_told = False
        self.patience, self.deadline = PATIENCE_SECONDS, float("inf")
        self.messages: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=QUEUE_SIZE)
        self.ending = threading.Event()
        self.is_training = True
        self.thread = threading.Thread(target=self._work, args=(run_uid,), daemon=True)
        self.thread.start()

    def log(self, row: Row) -> None:
        """Passes the row on."""
        self._tell_failure()
        self._put(lambda: self._log(row))

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Passes the table on."""
        kept = list(rows)
        self._put(lambda: self._table(name, kept))

    def rest(self) -> None:
        """Training is over: that nothing comes any more is no standstill."""
        self.is_training = False

    def request_finish(self) -> None:
        """Asks the listener to end, and counts its patience from here: several listeners end at the same time."""
        self.patience = PATIENCE_SECONDS + self.listener.extra_seconds()
        self.deadline = time.monotonic() + self.patience
        self.ending.set()

    def finish(self) -> None:
        """Waits until the deadline for what is under way, and says what became of it."""
        if self.deadline == float("inf"):
            self.request_finish()
        if not self.failure:
            self.thread.join(max(0.0, self.deadline - time.monotonic()))
            if self.thread.is_alive():
                self.failure = self.failure or f"no answer within {self.patience:.0f} s"
        if self.failure:
            self._tell_failure()
            self.listener.abandon()
        elif self.farewell:
            _say(self.farewell)

    def _tell_failure(self) -> None:
        if self.failure and not self.is_failure_told:
            self.is_failure_told = True
            _say(f"{self.listener.name}: {self.failure}; all metrics are in {self.metrics}")

    def _put(self, message: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            self.messages.put_nowait(message)
        except queue.Full:
            self.failure = f"it is more than {self.messages.maxsize} messages behind"

    def _work(self, run_uid: str) -> None:
        try:
            self.last_step = self.listener.start(run_uid)
            self._catch_up()
            self._listen()
            self.farewell = self.listener.finish()
        except BaseException as error:  # whatever it is, it must not reach training
            self.failure = self.failure or f"stopped recording ({type(error).__name__}: {first_line(error)})"

    def _listen(self) -> None:
        """Takes what has come, every PAUSE_SECONDS, until the end is asked for."""
        taken = told = time.monotonic()  # when something was taken, and when the listener knew of the time
        is_last = False
        while not is_last:
            is_last = self.ending.wait(PAUSE_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    self.messages.get_nowait()()
                    taken = told = time.monotonic()
            if self.is_training and time.monotonic() - told > IDLE_SECONDS:
                told = time.monotonic()
                self.listener.idle(told - taken)

    def _catch_up(self) -> None:
        missing = [row for row in read_metrics(self.metrics) if row["step"] > self.last_step]
        answers: dict[int, list[Row]] = {}
        with contextlib.suppress(FileNotFoundError):
            for answer in read_metrics(self.answers):
                answers.setdefault(answer["step"], []).append(answer)
        self.listener.catch_up([_told(row) for row in missing], answers)
        if missing:
            self.last_step = missing[-1]["step"]
            self.last_answers = max((step for step in answers if step <= self.last_step), default=-1)

    def _table(self, name: str, rows: Sequence[Row]) -> None:
        if name != VALIDATION or (rows and rows[0]["step"] > self.last_answers):  # else it came with the missing ones
            self.listener.table(name, rows)

    def _log(self, row: Row) -> None:
        if row["step"] > self.last_step:  # else it came with the missing ones
            self.listener.log(_told(row))
            self.last_step = row["step"]


def _told(row: Row) -> Row:
    """The numbers of a row; text, such as a warning that names files, and lists stay in metrics.jsonl."""
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(text, flush=True)
